"""Runs of the command without what takes longest in them, for tests that are not of it; and all of it again."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pytest

from layercut.evaluation import PROMPTS
from layercut.pipeline import journey
from layercut.report import charts

write_report = journey.write_report


def without_charts(run: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts.Drawing, "svg", lambda *_, **__: "<svg></svg>")
        return write_report(run)


STAND_INS: dict[str, Any] = {
    "layercut.export.checkpoint.verify_reload": lambda *_: {},  # 1.5 s of a run, in a process
    "layercut.plan.shares": lambda _: {},  # 0.7 s
    "layercut.pipeline.journey.write_report": without_charts,  # 0.3 s
    "layercut.evaluation.generations": lambda *_: [""] * len(PROMPTS),
    "layercut.evaluation.generation_health": lambda *_: {},
}
REAL = {place: pkgutil.resolve_name(place) for place in STAND_INS}


def leave_out(patch: pytest.MonkeyPatch) -> None:
    for place, stand_in in STAND_INS.items():
        patch.setattr(place, stand_in)


def bring_back(patch: pytest.MonkeyPatch, *names: str) -> None:
    """All of it, or some by their names."""
    for place, real in REAL.items():
        if not names or place.rpartition(".")[2] in names:
            patch.setattr(place, real)
