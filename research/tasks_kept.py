"""What a smaller model keeps of the scores of lm-eval's tasks, for the benchmarks that take --tasks."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS
from layercut import evaluation
from layercut.evaluation.tasks import retained
from layercut.models import loading
from layercut.pipeline.compare import score_of

ASKED = {"tasks": "", "include_path": "", "items": 400}
"""Options: names joined by commas, a folder with more of them, and how many items of each."""


def tasks_kept(dense: loading.LanguageModel, small: Any, args: Namespace) -> dict[str, Any]:
    """Scores by task, and what they retain of the dense model's; nothing where no task is asked."""
    if not args.tasks:
        return {}
    tasks = evaluation.load_tasks(args.tasks.split(","), Path(args.include_path) if args.include_path else None)
    whole, smaller = (
        evaluation.score_tasks(one, dense.tokenizer, tasks, limit=args.items, name=name, cache=RESULTS / ".tasks")
        for one, name in ((dense.model, "dense"), (small, "smaller"))
    )
    kept = asdict(retained(whole, {"smaller": smaller})["smaller"])
    return {"tasks": {name: score_of(record) for name, record in smaller.items()}, "retained": kept}
