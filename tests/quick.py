"""Runs of the command without what takes longest in them, for tests that are not of it."""

from __future__ import annotations

import pytest

from layercut.evaluation import PROMPTS


def leave_out(patch: pytest.MonkeyPatch) -> None:
    """What verifies an export (5 s of a tiny run), the text that both models write (2 s), the charts (0.3 s)."""
    patch.setattr("layercut.export.checkpoint.verify_reload", lambda *_: {})
    patch.setattr("layercut.report.charts.Drawing.svg", lambda *_, **__: "<svg></svg>")
    leave_out_samples(patch)


def leave_out_samples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("layercut.evaluation.generations", lambda *_: [""] * len(PROMPTS))
    patch.setattr("layercut.evaluation.generation_health", lambda *_: {})
