"""Claim: a tuning step and a sweep on an accelerator launch few operations, and wait for it once.

    python benchmarks/launches.py [--before SRC] [--layers 8] [--batch-tokens 1024 2048] [--skip-compiled 1]

On the stand-in accelerator of the tests (`tests/stand_in_device.py`), which the CPU's kernels compute and which counts
operations launched, values read by the host and bytes copied. A random Llama of a vocabulary of 128,256, tiny layers,
bfloat16, on a device that says it has 24 GiB. Counted are the second step of a tuning, and a sweep of all segments of
two layers. Beside them "layers": what the layers' own passes launch. AdamW and the clipping of gradients run as on
CUDA, by operations on lists of tensors; such a one counts once. SRC: the `src` folder of an older version, whose
figures are put beside.

"compiled" is the same with `--compile`. torch's compiler has no backend for the stand-in, so it is counted on the CPU,
with the sizes of that device; "after, on the CPU" is the plain code counted alike. There attention is one operation, as
on CUDA, and not put together of several as on the stand-in. Counted are operations that are dispatched, seen by a
`TorchDispatchMode`, those that compiled code calls (matrix products, attention) among them; and every loop nest of a
generated kernel as one launch, each time it is called. The CPU's code generator puts several nests into a function, of
which Triton would launch some one by one and join others: in "launches_joined" each such function counts once. Reads
and copies are those of the stand-in alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch._inductor.async_compile import AsyncCompile
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import stand_in_device
from common import arguments
from layercut.files.json_values import write_json
from layercut.healing import endpoint_tuning, tune_
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import all_segments, segment_costs
from layercut.models import loading
from layercut.models.runner import DecoderRunner
from layercut.pipeline.provenance import environment
from layercut.segments import Segment
from layercut.surgery import cut_segment_

VOCABULARY, WINDOW, LENGTH, ROWS = 128256, 256, 2, 4


def as_on_cuda_() -> None:
    """Lists of tensors in AdamW and in clipping, which torch takes by itself on CUDA alone."""
    torch.optim.AdamW = functools.partial(lambda *a, fused=False, **k: AdamW(*a, **k, foreach=True))  # type: ignore
    torch.nn.utils.clip_grad._has_foreach_support = lambda *_: True
    stand_in_device.MEMORY = 24 * 2**30


def model_of(layers: int, device: str = "standin") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(torch.bfloat16).to(device)


def counted(counts: Any) -> dict[str, int]:
    on_cpu = isinstance(counts, Dispatched)
    names = ("launches", "launches_joined") if on_cpu else ("launches", "reads", "to_device", "to_host")
    return {name: getattr(counts, name) for name in names}


def layers_alone(dense: DecoderRunner, student: DecoderRunner, counts: Any) -> int:
    """What the layers launch in a pass of tuning: forwards, and backwards through the student's above the prefix."""
    first = endpoint_tuning.endpoints([cut_of(len(dense))], len(dense))[0]
    tokens = torch.zeros(4, WINDOW, dtype=torch.long)
    with torch.no_grad():
        hidden, calls = dense.enter(tokens)
    counts.reset_()
    with torch.no_grad():
        shared = dense.run(hidden, calls, 0, first)
        dense.run(shared, calls, first, len(dense))
    out = student.run(shared, calls, first, len(student))
    out.backward(torch.empty_like(out))
    return counts.launches


def cut_of(layers: int) -> Segment:
    return Segment(layers // 2, layers // 2 + LENGTH)


def step_counts(model: Any, batch_tokens: int, counts: Any) -> dict[str, int]:
    """Of the second step."""
    student, found = loading.share(model), list[dict[str, int]]()
    cut_segment_(student, [cut_of(len(model.model.layers))])
    step_ = endpoint_tuning._Training.step_

    def counting(self: Any) -> int:
        counts.reset_()
        with counts if isinstance(counts, Dispatched) and len(found) else contextlib.nullcontext():
            done = step_(self)
        found.append(counted(counts))
        return done

    rows = 2 * batch_tokens // WINDOW
    tokens = torch.randint(VOCABULARY, (rows + 1, WINDOW), generator=torch.Generator().manual_seed(0))
    endpoint_tuning._Training.step_ = counting  # type: ignore[method-assign]
    try:
        tune_(student, model, tokens[:-1], heldout=tokens[-1:], batch_tokens=batch_tokens)
    finally:
        endpoint_tuning._Training.step_ = step_  # type: ignore[method-assign]
    return found[1]


def sweep_counts(model: Any, counts: Any) -> dict[str, int]:
    stack = DecoderRunner(model)
    tokens = torch.randint(VOCABULARY, (2 * ROWS, WINDOW), generator=torch.Generator().manual_seed(0))
    segments = all_segments(LENGTH, len(stack))
    segment_costs(stack, tokens[:ROWS], segments[:1], Cost())
    counts.reset_()
    with counts if isinstance(counts, Dispatched) else contextlib.nullcontext():
        segment_costs(stack, tokens[ROWS:], segments, Cost())
    return counted(counts)


class Dispatched(TorchDispatchMode):
    """Counts operations as the stand-in does, on the CPU, with the generated kernels that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.launches_joined = 0, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what is compiled runs compiled, and is seen

    def reset_(self) -> None:
        self.launches, self.launches_joined = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        counts = name not in stand_in_device.VIEWS and name not in stand_in_device.ALLOCATIONS
        self.launches += counts
        self.launches_joined += counts
        return func(*args, **(kwargs or {}))

    def counting_kernels_(self) -> None:
        """Have every kernel that the compiler makes from now on count its loop nests when it is called."""
        inductor.compile_threads = 1
        make = AsyncCompile.cpp_pybinding

        def counting(compiler: Any, types: list[str], source: str) -> Any:
            kernel, nests = make(compiler, types, source), sum(line == "    {" for line in source.splitlines())
            assert nests, source

            def run(*args: Any) -> Any:
                self.launches += nests
                self.launches_joined += 1
                return kernel(*args)

            return run

        AsyncCompile.cpp_pybinding = counting  # type: ignore


def measured_on_cpu(layers: int, batch_tokens: list[int], compile: bool) -> list[dict[str, Any]]:
    """`measured` of CPU tensors, with the sizes of the stand-in."""
    from layercut.models.memory import Budget  # an older version has none

    as_on_cuda_()
    sizes = Budget.of_accelerator(stand_in_device.MEMORY - 2**28)
    Budget.of_cpu = classmethod(lambda cls, threads=None: sizes)  # type: ignore[method-assign, assignment]
    counts, model = Dispatched(), model_of(layers, "cpu")
    with contextlib.ExitStack() as opened:
        if compile:
            from layercut import compiled

            counts.counting_kernels_()
            opened.enter_context(compiled())
        tune_counts = [step_counts(model, n, counts) for n in batch_tokens]
        rows = [{"what": "tuning step", "batch_tokens": n, **c} for n, c in zip(batch_tokens, tune_counts, strict=True)]
        return [*rows, {"what": "sweep", "rows": ROWS, "segments": layers - LENGTH + 1, **sweep_counts(model, counts)}]


def measured(layers: int, batch_tokens: list[int]) -> list[dict[str, Any]]:
    as_on_cuda_()
    with tempfile.TemporaryDirectory() as folder, stand_in_device.present(Path(folder)) as counts:
        model = model_of(layers)
        student = loading.share(model)
        cut_segment_(student, [cut_of(layers)])
        with torch.enable_grad():
            endpoints = endpoint_tuning.own_parameters_(own := DecoderRunner(student), [layers // 2 - 1, layers // 2])
            assert endpoints
            alone = layers_alone(DecoderRunner(model), own, counts)
        rows: list[dict[str, Any]] = [
            {"what": "tuning step", "batch_tokens": n, "layers_launch_a_pass": alone, **step_counts(model, n, counts)}
            for n in batch_tokens
        ]
        return [*rows, {"what": "sweep", "rows": ROWS, "segments": layers - LENGTH + 1, **sweep_counts(model, counts)}]


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1].startswith("--count"):
        layers, *tokens = map(int, sys.argv[2:])
        where = sys.argv[1].removeprefix("--count")
        print(json.dumps(measured_on_cpu(layers, tokens, where == "-compiled") if where else measured(layers, tokens)))
        return
    args = arguments(__doc__, before="", layers=8, batch_tokens=[1024, 2048], skip_compiled=0)
    here = str(Path(__file__).parents[1] / "src")
    wanted = [("before", args.before, ""), ("after", here, "")]
    if not args.skip_compiled:
        wanted += [("after, on the CPU", here, "-cpu"), ("compiled, on the CPU", here, "-compiled")]
    rows = []
    for version, source, where in wanted:
        if source:
            command = [sys.executable, __file__, f"--count{where}", str(args.layers), *map(str, args.batch_tokens)]
            told = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": source}, stdout=subprocess.PIPE, text=True, check=True
            )
            rows += [{"version": version, **row} for row in json.loads(told.stdout.splitlines()[-1])]
    environ = environment()
    environ["command"] = ["launches.py", "--layers", str(args.layers), "--batch-tokens", *map(str, args.batch_tokens)]
    shape = {"vocabulary": VOCABULARY, "window": WINDOW, "layers": args.layers, "device_bytes": 24 * 2**30}
    write_json(args.out, {"claim": __doc__.splitlines()[0], **shape, "rows": rows, "environment": environ})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
