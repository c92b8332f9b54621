"""Claim: the default settings of endpoint tuning are near the best there are at equal tokens.

    python benchmarks/tuning_settings.py --data TUNING_TEXT --judge OTHER_TEXT [--tokens 65536] \\
        [--variants learning_rate=1.6e-3 batch_tokens=1024,learning_rate=1.6e-3 temperature=2 mix=0.1 …]

Each variant is the defaults of `TuneSettings` with the named fields changed; all start from the same fold and see the
same tokens, in turn in one process. They are judged by KL to the dense model and perplexity on a text that is neither
tuned on nor reported on. `topk=K` is not a field: it tunes towards the dense model's K likeliest tokens, stored.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, blocks, finish, open_model
from layercut.evaluation import perplexity
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuneSettings, TuningFiles
from layercut.healing.least_squares import fold_cut_
from layercut.healing.stored_teacher import store_teacher, stored_bytes
from layercut.models import loading
from layercut.models.memory import reuse_freed
from layercut.models.objectives import objective_of
from layercut.models.runner import DecoderRunner, mean_kl
from layercut.segments import Segment
from layercut.surgery import cut_segment_

VARIANTS = [
    "default", "learning_rate=4e-4", "learning_rate=1.6e-3", "learning_rate=3e-3", "batch_tokens=1024",
    "batch_tokens=4096", "temperature=2", "mix=0.1", "objective=next-token", "radius=2", "topk=16", "topk=64",
]  # fmt: skip
KINDS: dict[str, Any] = {"batch_tokens": int, "radius": int, "epochs": int, "patience": int}


def parse(variant: str) -> tuple[TuneSettings, int]:
    """The settings a variant names, and its K."""
    pairs = dict(part.split("=") for part in variant.split(",") if part != "default")
    k = int(pairs.pop("topk", 0))
    options = {name: float(pairs.pop(name)) for name in ("temperature", "mix") if name in pairs}
    objective = objective_of(pairs.pop("objective", "kl"), **options)
    settings = {name: KINDS.get(name, float)(value) for name, value in pairs.items()}
    return TuneSettings(objective=objective, **settings), k


def main() -> None:
    args = arguments(
        __doc__, data="python-docs", judge="python-docstrings", segment="13:19", tokens=65536, window=256,
        fold_tokens=8192, heldout_tokens=2048, judge_tokens=8192, variants=VARIANTS,
    )  # fmt: skip
    model = open_model(args.model)
    segment, dense = [Segment.parse(args.segment)], DecoderRunner(model.model)
    count = args.fold_tokens + args.heldout_tokens + args.tokens
    text = blocks(model, args.data, count, args.window, 0).tokens
    fold, heldout, tokens = text.split(
        [n // args.window for n in (args.fold_tokens, args.heldout_tokens)] + [args.tokens // args.window]
    )
    judge = blocks(model, args.judge, args.judge_tokens, args.window, 0).tokens

    def cut() -> DecoderRunner:
        student = loading.share(model.model)
        cut_segment_(student, segment)
        return DecoderRunner(student)

    reuse_freed()
    folded = cut()
    fold_cut_(folded, dense, segment[0], fold)
    shared = {id(p) for p in model.model.parameters()}
    start = {n: p.detach().clone() for n, p in folded.model.named_parameters() if id(p) not in shared}
    before = {"judge_kl": mean_kl(dense, folded, judge), "judge_perplexity": perplexity(folded.model, judge)}
    rows: list[dict[str, Any]] = [{"variant": "fold", **before}]
    for variant in args.variants:
        settings, k = parse(variant)
        student = cut()
        loading.replace_parameters_(student.model, start)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            teacher = store_teacher(dense, tokens, k, Path(folder) / "teacher", key="") if k else None
            report = tune_(
                student, dense, tokens, heldout=heldout, files=TuningFiles(teacher=teacher), **vars(settings)
            )
        rows.append(
            {
                "variant": variant,
                "learning_rate": report.learning_rate,
                "judge_kl": mean_kl(dense, student, judge),
                "judge_perplexity": perplexity(student.model, judge),
                "heldout": [point["loss"] for point in report.heldout],
                "best_step": report.best_step,
                "tokens_per_second": report.tokens_per_second,
                "seconds": time.perf_counter() - begun,
                "stored_bytes": stored_bytes(tokens.numel(), k) if k else 0,
            }
        )
        print(rows[-1], flush=True)
    finish(
        args.out, model, __doc__.splitlines()[0], rows,
        segment=args.segment, data=args.data, judge=args.judge, tokens=tokens.numel(), window=args.window,
        judge_tokens=judge.numel(), dense_perplexity=perplexity(model.model, judge),
    )  # fmt: skip


if __name__ == "__main__":
    main()
