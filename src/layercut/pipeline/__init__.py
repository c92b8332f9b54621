"""The journey and its run folder: which stage runs when, on what, and what it leaves. Begin with journey.py."""

from __future__ import annotations

from layercut.pipeline.api import RunResult, compress

__all__ = ["RunResult", "compress"]
