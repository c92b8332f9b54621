"""What two processes do in test_processes.py, forked off the tests, which have the libraries loaded.

`launched` starts two as torchrun does: it holds their store, and where one of them dies the other is told to stop.
`main` does all that is asked of them at once, and `tune` tunes with an end by a signal.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import quick
import tiny
from layercut import cli, evaluation
from layercut.distributed import processes, sharding
from layercut.errors import ModelError
from layercut.export import checkpoint
from layercut.healing import endpoint_tuning, tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.least_squares import fold_cut_
from layercut.healing.tuning_state import StateFile, asked_to_stop
from layercut.layer_search import search
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import set_costs
from layercut.models import checkpoints, decoder_stack, layer_reader, placement
from layercut.models.losses import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.progress import console
from layercut.segments import Segment
from layercut.surgery import cut_segment_

METHODS = [
    "clp", "fisher", "race", "exhaustive", "block-influence", "angular", "perplexity", "taylor", "sleb", "evolution"
]  # fmt: skip
SPREAD_METHODS = ["clp", "fisher", "exhaustive", "angular"]
CUT = [Segment(3, 5)]


def searches(model: Any = None, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """What every method finds on seven rows, of which two processes have three and four."""
    stack, tokens = DecoderRunner(model or tiny.llama()), tiny.some_tokens(7)
    found = {method: search(stack, tokens, method=method, n_layers=2).to_dict() for method in methods}
    # steps of gradient descent make more of what rounding differs in
    found["clp"]["gate"] = found["clp"]["gate"]["proposed"]
    for method in ("fisher", "race"):
        found[f"two, {method}"] = search(stack, tokens, method=method, n_layers=3, num_segments=2).to_dict()
    cost = Cost()  # of three passes one process has two
    found["passes"] = [candidate.kl for candidate in set_costs(stack, tokens[:3], [tuple(CUT)], cost, rows=1)]
    found["spent"] = asdict(cost)
    return found


ODD = {"intermediate_size": 65, "vocab_size": 97}
"""Of which two processes have parts of different sizes."""


def spread_llama(**changes: Any) -> Any:
    """The same model, spread over the processes."""
    model = tiny.llama(**changes)
    sharding.spread_(model, list(model.model.layers), torch.device("cpu"))
    return model


def student_of(model: Any) -> Any:
    student = decoder_stack.share(model)
    cut_segment_(student, CUT)
    return student


def healings(model: Any = None) -> dict[str, Any]:
    """Fold and tuning, by every objective. Steps have five rows and the last one: one process has nothing to do."""
    model = model or tiny.llama()
    dense, folded = DecoderRunner(model), DecoderRunner(student_of(model))
    tokens, heldout = tiny.some_tokens(11, seed=1).repeat(2, 1)[:21], tiny.some_tokens(3, seed=2)
    fold = fold_cut_(folded, dense, CUT[0], tiny.some_tokens(14, seed=3))  # kept out is not the first row of a share
    found: dict[str, Any] = {"fold": fold.to_dict() | {"kl": mean_kl(dense, folded, heldout)}}
    for name in ("kl", "next-token"):
        settings = {"learning_rate": 3e-3, "batch_tokens": 80, "objective": name}
        report = tune_(DecoderRunner(student_of(model)), dense, tokens, heldout=heldout, **settings)
        found[name] = [[point["loss"] for point in points] for points in (report.curve, report.heldout)]
    return found


def spreading(model: Path) -> dict[str, Any]:
    """A model that each process reads layer by layer and keeps a part of, and what tuning makes of the parts."""
    install, whole = layer_reader.LayerFiles._install_, []

    def counted(files: Any, i: int, tensors: Any) -> None:
        loaded = [[p for p in layer.parameters() if not p.is_meta] for layer in files.layers]
        whole.append(sum(any(sharding.local(p) is p for p in parameters) for parameters in loaded))
        install(files, i, tensors)

    layer_reader.LayerFiles._install_ = counted  # type: ignore[method-assign]
    try:
        spread = placement.load(checkpoints.resolve(str(model)), place="processes").model
    finally:
        layer_reader.LayerFiles._install_ = install  # type: ignore[method-assign]
    before = [sharding.local(p).clone() for p in spread.parameters()]
    student = DecoderRunner(student_of(spread))
    tokens = tiny.some_tokens(4, seed=1)  # judged on what it learns, so that it does get better
    report = tune_(student, DecoderRunner(spread), tokens, heldout=tokens, batch_tokens=32)
    same, own = {id(p) for p in spread.parameters()}, student.model.named_parameters()
    return {
        "bytes": decoder_stack.parameter_bytes(spread), "held": sharding.bytes_held(spread),
        "student_held": sharding.bytes_held(student.model), "whole_before_each_layer": whole,
        "dense_is_as_it_was": all(map(torch.equal, before, map(sharding.local, spread.parameters()))),
        "trained": sorted({int(name.split(".")[2]) for name, p in own if id(p) not in same}),
        "trained_layers": report.trained_layers, "best_step": report.best_step, "learning_rate": report.learning_rate,
    }  # fmt: skip


def command(argv: list[str], folder: Path, name: str) -> int:
    """The exit code of a command; what it says goes to FOLDER/NAME.out and .err of each process."""
    out_file, err_file = (folder / f"{name}.{processes.rank()}.{kind}" for kind in ("out", "err"))
    with out_file.open("w") as out, err_file.open("w") as err, redirect_stdout(out), redirect_stderr(err):
        console.file = err
        return cli.main(argv)


def main(folder: Path) -> int:
    """Searches, healings and the command lines of FOLDER/commands.json; each process leaves FOLDER/RANK.json."""
    gc.freeze()  # see conftest.py
    checkpoint.verify_reload = lambda *_: {}  # type: ignore[assignment]
    for name in ("generations", "generation_health"):
        setattr(evaluation, name, partial(quick.REAL[f"layercut.evaluation.{name}"], tokens=4))
    processes.start()
    processes.stop = lambda: None  # type: ignore[assignment]  # one group for all commands
    commands = json.loads((folder / "commands.json").read_text())
    found: dict[str, Any] = {"world": processes.world(), "rank": processes.rank()}
    found |= {"searches": searches(), "healings": healings(), "codes": {}}
    found["spread"] = {
        "searches": searches(spread_llama(**ODD), SPREAD_METHODS),
        "healings": healings(spread_llama(**ODD)),
        **spreading(Path(commands["compress"][1])),
    }
    last = commands.pop("last")
    for name, argv in commands.items():
        found["codes"][name] = command(argv, folder, name)
        processes.barrier()
        if found["codes"][name] and processes.is_main():  # the next one may fail as well
            for key in ("failed", "said"):
                processes._started.store.delete_key(key)  # type: ignore[union-attr]
        processes.barrier()
        (folder / f"{processes.rank()}.json").write_text(json.dumps(found))

    def fails(*_: Any, **__: Any) -> None:
        raise ModelError("this process alone fails", "none")

    if processes.rank() == processes.world() - 1:  # where the other one waits for its share of a sum
        endpoint_tuning.warmup_then_cosine = fails  # type: ignore[assignment]
    return command(last, folder, "last")


KINDS = ("whole", "spread")
PHASES: dict[str, tuple[int, int, int] | None] = {
    "straight": None, "killed": (signal.SIGKILL, 1, 1), "terminated": (signal.SIGTERM, 0, 3), "resumed": None,
}  # fmt: skip
"""A signal to one process of the pair, its rank, and the steps done by then."""


def tune(kind: str, phase: str, folder: Path) -> int:
    """A phase of tuning that is killed, terminated and resumed; at its end FOLDER/KIND-PHASE.RANK.json."""
    processes.start()
    ending, step, steps = PHASES[phase], endpoint_tuning._Training.step_, []

    def step_or_die(training: Any) -> int:
        steps.append(training)
        if ending and ending[1:] == (processes.rank(), training.report.step):
            os.kill(os.getpid(), ending[0])
        return step(training)

    endpoint_tuning._Training.step_ = step_or_die  # type: ignore[method-assign]
    StateFile.due = lambda _: True  # type: ignore[method-assign]
    model = tiny.llama() if kind == "whole" else spread_llama(**ODD)
    dense, student = DecoderRunner(model), DecoderRunner(student_of(model))
    state = StateFile(folder / f"{kind}-{'straight' if phase == 'straight' else 'broken'}")
    report = tune_(
        student, dense, tiny.some_tokens(11, seed=1), heldout=tiny.some_tokens(3, seed=2), learning_rate=3e-3,
        batch_tokens=32, files=TuningFiles(state=state, stopping=asked_to_stop),
    )  # fmt: skip
    weights = hashlib.sha256()
    for p in student.model.parameters():
        weights.update(sharding.local(p.detach()).contiguous().numpy().tobytes())
    found = {
        "steps": len(steps), "weights": weights.hexdigest(), "losses": [point["loss"] for point in report.curve],
        "heldout": [point["loss"] for point in report.heldout],
    }  # fmt: skip
    (folder / f"{kind}-{phase}.{processes.rank()}.json").write_text(json.dumps(found))
    processes.stop()
    return 0


def launched(work: Callable[[], int], errors: Path) -> list[int]:
    """The exit codes of two processes that do some work."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                code = work()
            except BaseException:
                with errors.open("a") as file:
                    traceback.print_exc(file=file)
            finally:
                os._exit(code)
        children.append(child)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    codes: dict[int, int] = {}
    while len(codes) < 2:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGTERM)
    del store
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        del os.environ[name]
    return [codes[child] for child in children]
