"""What a smaller model keeps of the scores of lm-eval's tasks, for the benchmarks that take --tasks."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS
from layercut import evaluation
from layercut.evaluation.tasks import representative_metric, retained
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
    scores = {name: score_of(record) for name, record in smaller.items()}
    return {"tasks": scores, "retained": kept, "right": {name: right(record) for name, record in smaller.items()}}


def right(record: Any) -> str:
    """Which items were answered rightly, from the first on: 1 and a bit for each, in hexadecimal."""
    values = record["metrics"][representative_metric(record)]["values"]
    return f"{int('1' + ''.join(str(round(value)) for value in values), 2):x}"


def behind(dense: dict[str, Any], best: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """How far a row is behind the best in the share of the dense row's tasks it keeps; the error, paired over items."""

    def records(row: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for task, bits in row["right"].items():
            values = [float(bit) for bit in f"{int(bits, 16):b}"[1:]]
            of = {"score": sum(values) / len(values), "values": values, "higher_is_better": True}
            found[task] = {"metrics": {"acc": of}, "items": len(values), "document_hash": "", "choices": None}
        return found

    found = retained(records(dense), {"best": records(best), "other": records(other)})["other"]
    return found.behind or 0.0, found.behind_error or 0.0
