"""Claim: pruning in rounds, healed between, against one cut of as many layers healed with as many tokens.

    python benchmarks/rounds.py --data TUNE.txt --report wiki=WIKI.txt web=WEB.txt [--rounds 1 2 3]

R rounds remove a segment each, chosen on the model as the rounds before left it (healed); then fold, then endpoint
tuning on 1/R of the tuning tokens, no token twice. The teacher is the dense model throughout. Segments are given in
its layers: where a cut meets an older one they are one segment. Tuning trains the endpoints of *all* cuts so far.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from common import arguments, blocks, finish, open_model
from layercut.evaluation import perplexity
from layercut.files.json_values import write_json
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuneSettings
from layercut.healing.least_squares import fold_cut_
from layercut.layer_search import search
from layercut.models import loading
from layercut.models.runner import DecoderRunner, mean_kl
from layercut.pipeline.iterative import round_lengths
from layercut.segments import Removal, layers_to_remove
from layercut.surgery import cut_segment_


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", report=["docs=python-docs"], ratio=0.2, rounds=[1, 2, 3], window=256, seed=0,
        calibration_tokens=16384, search_tokens=4096, tune_tokens=65536, heldout_tokens=2048, eval_tokens=65536,
        batch_tokens=TuneSettings.batch_tokens, method="exhaustive", threads=2,
    )  # fmt: skip
    torch.set_num_threads(args.threads)
    opened = open_model(args.model)

    def draw(source: str, tokens: int, **more: Any) -> torch.Tensor:
        return blocks(opened, source, tokens, args.window, args.seed, **more).tokens

    text = {"calibration": draw(args.data, args.calibration_tokens)}
    text["heldout"] = draw(args.data, args.heldout_tokens, skip=len(text["calibration"]))
    text["tuning"] = draw(args.data, args.tune_tokens, skip=len(text["calibration"]) + len(text["heldout"]))
    reported = {
        name: draw(source, args.eval_tokens, order="as written")
        for name, _, source in (item.partition("=") for item in args.report)
    }
    dense = DecoderRunner(opened.model)
    part = args.out.with_name(f".{args.out.stem}.partial.json")  # a stopped run goes on after its last whole row
    rows = json.loads(part.read_text()) if part.is_file() else [{"rounds": 0, **figures(dense.model, reported)}]
    for count in args.rounds:
        if all(row["rounds"] != count for row in rows):
            rows.append(in_rounds(args, dense, text, count, reported))
            write_json(part, rows)
    kept = ("ratio", "window", "seed", "calibration_tokens", "search_tokens", "tune_tokens", "eval_tokens", "method")
    texts = {"data": [Path(each).name for each in args.data.split("+")], "reported": list(reported)}
    settings = {key: getattr(args, key) for key in kept}
    finish(args.out, opened, (__doc__ or "").splitlines()[0], rows, **settings, **texts)
    part.unlink(missing_ok=True)


def in_rounds(
    args: Namespace, dense: DecoderRunner, text: dict[str, torch.Tensor], count: int, reported: dict[str, torch.Tensor]
) -> dict[str, Any]:
    begun = time.perf_counter()
    student = loading.share(dense.model)
    lengths = round_lengths(layers_to_remove(args.ratio, len(dense)), len(dense), count)
    removal, rounds = Removal.first(()), []
    for length, tokens in zip(lengths, text["tuning"].tensor_split(len(lengths)), strict=True):
        rows = text["calibration"][: max(1, args.search_tokens // args.window)]
        found = search(student, rows, n_layers=length, method=args.method, seed=args.seed)
        removal = removal.then(found.segments, len(dense))
        cut_segment_(student, list(found.segments))
        stack = DecoderRunner(student)
        state: dict[str, Any] = {"removed": [[cut.start, cut.stop] for cut in removal.new]}
        state["kl_cut"] = mean_kl(dense, stack, text["heldout"])
        for segment in removal.new:
            fold_cut_(stack, dense, segment, text["calibration"])
        state["kl_folded"] = mean_kl(dense, stack, text["heldout"])
        report = tune_(stack, dense, tokens, heldout=text["heldout"], batch_tokens=args.batch_tokens)
        state |= {"kl_tuned": mean_kl(dense, stack, text["heldout"]), "trained_layers": report.trained_layers}
        rounds.append(state | {"tune_tokens": tokens.numel()})
        print(rounds[-1], flush=True)
    final = {"segments": [[cut.start, cut.stop] for cut in removal.all], "seconds": time.perf_counter() - begun}
    return {"rounds": count, "each": rounds, **final, **figures(student, reported)}


def figures(model: Any, reported: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"perplexity": {name: perplexity(model, tokens) for name, tokens in reported.items()}}


if __name__ == "__main__":
    main()
