"""Claim: a cut model is at least 0.95 times as fast as can be: 1 / (1 - r s), r the share of layers removed, s the
share of the dense model's time that is spent inside layers.

    python benchmarks/speed.py

Dense and cut are timed in turn, in one process, and their ratio is that of neighbours in time: a noisy machine is noisy
for both. Beside the wall clock stands processor time, which other processes hardly disturb. With llama-cpp-python at
hand and a .gguf model, the same cut of the file is timed by llama.cpp too.
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
from layercut import measure, models
from layercut.cut import cut_gguf, cut_segment_
from layercut.segments import Segment, layers_to_remove


def main() -> None:
    args = arguments(
        __doc__ or "",
        ratios=[0.2, 0.3], start=13, prompts=[64, 512, 2048], decode=32, repeats=15, threads=0, wanted=0.95,
    )  # fmt: skip
    if args.threads:
        torch.set_num_threads(args.threads)
    model = open_model(args.model)
    rows = []
    for ratio in args.ratios:
        length = layers_to_remove(ratio, len(model.decoder))
        # the figures do not depend on which layers go, as long as all are alike
        start = min(args.start, len(model.decoder) - length - 1)
        segment = Segment(start, start + length)
        student = models.share(model.model)
        cut_segment_(student, [segment])
        for prompt in args.prompts:
            found = measure.speed(model.model, student, prompt=prompt, decode=args.decode, repeats=args.repeats)
            row: dict[str, Any] = {"ratio": ratio, "segment": [segment.start, segment.stop], **found}
            for phase in ("prefill", "decode"):
                row[f"{phase}_reached_cpu"] = found[phase]["cpu_ratio"] / found[phase]["reachable"]
                row[f"{phase}_holds"] = found[phase]["reached"] >= args.wanted
            rows.append(row)
        rows += llama_cpp(model, segment, ratio, args)
    finish(args.out, model, f"prefill and decode reach {args.wanted} of 1 / (1 - r s)", rows, wanted=args.wanted)


def llama_cpp(model: models.LanguageModel, segment: Segment, ratio: float, args: Any) -> list[dict[str, Any]]:
    """The same by llama.cpp on the .gguf file and its cut, interleaved; nothing where either is missing."""
    if importlib.util.find_spec("llama_cpp") is None or not model.checkpoint.gguf:
        return []
    from llama_cpp import Llama

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        smaller = Path(folder) / "cut.gguf"
        cut_gguf(model.checkpoint.file, [segment], smaller)
        both = [Llama(str(file), n_ctx=4096, verbose=False) for file in (model.checkpoint.file, smaller)]
        for prompt in args.prompts:
            taken = [[_llama_once(llama, prompt, args.decode) for llama in both] for _ in range(args.repeats + 1)][1:]
            ratios = [statistics.median(a[i] / b[i] for a, b in taken) for i in range(2)]
            rows.append(
                {
                    "ratio": ratio,
                    "segment": [segment.start, segment.stop],
                    "prompt_tokens": prompt,
                    "backend": "llama.cpp",
                    "prefill": {"ratio": ratios[0]},
                    "decode": {"ratio": ratios[1]},
                }
            )
    return rows


def _llama_once(llama: Any, prompt: int, decode: int) -> tuple[float, float]:
    """Seconds of a prefill and of single-token steps after it."""
    llama.reset()
    marks = [time.perf_counter()]
    llama.eval([i % llama.n_vocab() for i in range(prompt)])
    marks.append(time.perf_counter())
    for i in range(decode):
        llama.eval([i])
    marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


if __name__ == "__main__":
    main()
