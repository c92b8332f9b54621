"""Claim: a cut model is at least 0.95 times as fast as can be: 1 / (1 - r s), r the share of layers removed, s the
share of the dense model's time that is spent inside layers.

    python research/speed.py

Dense and cut are timed in turn, in one process, and their ratio is that of neighbours in time: a noisy machine is noisy
for both. Beside the wall clock stands processor time, which other processes hardly disturb. With llama-cpp-python at
hand and a .gguf model, the same cut of the file is timed by llama.cpp too, as it came and in other number formats
(--gguf-types). The layers' share s is had from a model with one layer left, timed in the same turns.

    python research/speed.py --only-llama-cpp 1 --threads 2
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, finish, open_model
from layercut.evaluation import speed
from layercut.export.gguf_tensors import requantized
from layercut.models import decoder_stack
from layercut.segments import Segment, layers_to_remove
from layercut.surgery import cut_gguf, cut_segment_


def main() -> None:
    args = arguments(
        __doc__ or "",
        ratios=[0.2, 0.3], start=13, prompts=[64, 512, 2048], decode=32, repeats=15, threads=0, wanted=0.95,
        gguf_types=["as it came", "f16", "q8_0", "q4_0"], only_llama_cpp=0,
    )  # fmt: skip
    if args.threads:
        torch.set_num_threads(args.threads)
    model = open_model(args.model)
    layers = len(decoder_stack.find_decoder(model.model).layers)
    segments = {}
    for ratio in args.ratios:
        length = layers_to_remove(ratio, layers)
        # the figures do not depend on which layers go, as long as all are alike
        start = min(args.start, layers - length - 1)
        segments[ratio] = Segment(start, start + length)
    one, rows = decoder_stack.share(model.model), list[dict[str, Any]]()
    cut_segment_(one, [Segment(1, layers)])
    for ratio, segment in segments.items() if not args.only_llama_cpp else ():
        student = decoder_stack.share(model.model)
        cut_segment_(student, [segment])
        for prompt in args.prompts:
            turns = range(args.repeats + 1)  # the first warms up
            three = (model.model, student, one)
            taken = [[speed.time_once(each, prompt, args.decode) for each in three] for _ in turns]
            row = {
                "ratio": ratio, "segment": [segment.start, segment.stop], "prompt_tokens": prompt,
                "decode_tokens": args.decode, "repeats": args.repeats, "threads": torch.get_num_threads(),
            }  # fmt: skip
            rows.append(row | figures(taken[1:], prompt, layers, len(segment), args))
    if importlib.util.find_spec("llama_cpp") is not None and model.checkpoint.gguf:
        for kind in args.gguf_types:
            rows += llama_cpp(model.checkpoint.file, kind, layers, segments, args)
    finish(args.out, model, f"prefill and decode reach {args.wanted} of 1 / (1 - r s)", rows, wanted=args.wanted)


def llama_cpp(source: Path, kind: str, layers: int, segments: dict[float, Segment], args: Any) -> list[dict[str, Any]]:
    """The same by llama.cpp: the .gguf file in another number format, its cuts, and one layer of it, in turn."""
    import llama_cpp

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = source
        if kind != "as it came":
            dense = Path(folder) / f"{kind}.gguf"
            cut_gguf(source, [], dense, replaced=requantized(source, kind))
        files = [dense]
        for ratio, segment in [*segments.items(), (1, Segment(1, layers))]:
            files.append(Path(folder) / f"{kind}-{ratio}.gguf")
            cut_gguf(dense, [segment], files[-1])
        size = [file.stat().st_size for file in files]
        opened = [_open(llama_cpp, file, args) for file in files]
        for prompt in args.prompts:
            taken = [[_llama_once(llama, prompt, args.decode) for llama in opened] for _ in range(args.repeats + 1)][1:]
            for which, (ratio, segment) in enumerate(segments.items(), start=1):
                row: dict[str, Any] = {
                    "backend": f"llama.cpp {llama_cpp.__version__}", "gguf_type": kind, "ratio": ratio,
                    "segment": [segment.start, segment.stop], "prompt_tokens": prompt, "decode_tokens": args.decode,
                    "repeats": args.repeats, "threads": torch.get_num_threads(),
                    "weight_bytes": {"dense": size[0], "compressed": size[which]},
                }  # fmt: skip
                of_three = [[turn[0], turn[which], turn[-1]] for turn in taken]
                rows.append(row | figures(of_three, prompt, layers, len(segment), args))
        for llama in opened:
            llama.close()
    return rows


def figures(
    taken: list[list[dict[str, speed.Seconds]]], prompt: int, layers: int, removed: int, args: Any
) -> dict[str, Any]:
    """Of both phases; taken: by turn, of the dense model, the cut one, and that of one layer."""
    found: dict[str, Any] = {}
    for phase, tokens in (("prefill", prompt), ("decode", args.decode)):
        found[phase] = _phase([[turn[i][phase] for turn in taken] for i in range(3)], tokens, layers, removed)
        found[f"{phase}_holds"] = found[phase]["reached"] >= args.wanted
    return found


def _phase(seconds: list[list[speed.Seconds]], tokens: int, layers: int, removed: int) -> dict[str, Any]:
    dense, cut, one = seconds
    median, r = statistics.median, removed / layers
    ratio = median(a.wall / b.wall for a, b in zip(dense, cut, strict=True))
    # t = outside + layers * a, of which the file with one layer gives the second equation
    layer_share = median((1 - b.cpu / a.cpu) * layers / (layers - 1) for a, b in zip(dense, one, strict=True))
    reachable = 1 / (1 - r * min(1.0, layer_share))
    cpu_ratio = median(a.cpu / b.cpu for a, b in zip(dense, cut, strict=True))
    return {
        "dense": median(tokens / a.wall for a in dense),
        "compressed": median(tokens / b.wall for b in cut),
        "dense_per_cpu_second": median(tokens / a.cpu for a in dense),
        "compressed_per_cpu_second": median(tokens / b.cpu for b in cut),
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "ideal": 1 / (1 - r),
        "layer_share": layer_share,
        "reachable": reachable,
        "reached": ratio / reachable,
        "reached_cpu": cpu_ratio / reachable,
    }


def _open(llama_cpp: Any, file: Path, args: Any) -> Any:
    threads = torch.get_num_threads()
    context = max(args.prompts) + args.decode
    return llama_cpp.Llama(str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)


def _llama_once(llama: Any, prompt: int, decode: int) -> dict[str, speed.Seconds]:
    """What a prefill took, and single-token steps after it."""
    llama.reset()
    marks = [_clocks()]
    llama.eval([i % llama.n_vocab() for i in range(prompt)])
    marks.append(_clocks())
    for i in range(decode):
        llama.eval([i])
    marks.append(_clocks())
    return {"prefill": marks[1].since(marks[0]), "decode": marks[2].since(marks[1])}


def _clocks() -> speed.Seconds:
    return speed.Seconds(time.perf_counter(), time.process_time())


if __name__ == "__main__":
    main()
