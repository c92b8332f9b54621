"""`compress`, as the command and as a Python function: the journey, in the time that it may take."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercut import plan
from layercut.config.commands import CompressConfig, from_flat
from layercut.errors import ConfigError
from layercut.files import restored
from layercut.pipeline import journey
from layercut.pipeline.handover import result_of
from layercut.pipeline.resolve_options import Stage
from layercut.plan.in_time import in_time


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, and what it found."""

    folder: Path
    """The run folder; docs/index.md says what is in it."""
    summary: dict[str, Any]
    """summary.json: layers, bytes, perplexity by state, tasks, speed, seconds. What was not measured is None."""

    @property
    def model(self) -> Path:
        """The stock checkpoint, as `AutoModelForCausalLM.from_pretrained` reads it; of a .gguf model the .gguf file."""
        return result_of(self.folder)

    @property
    def report(self) -> Path:
        """The page that says what happened and whether to ship it."""
        return self.folder / "report.html"

    @property
    def segments(self) -> list[tuple[int, int]]:
        """What was removed: [start, stop) in the dense model's layers."""
        return [(start, stop) for start, stop in self.summary["segments"]]

    def to_dict(self) -> dict[str, Any]:
        """The folder's path and the summary, as plain values."""
        return {"folder": str(self.folder), **self.summary}

    def _repr_html_(self) -> str:
        """The report, in a frame of its own."""
        page = html.escape(self.report.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'


def run(model: str, config: CompressConfig, *, until: Stage = "report", own_process: bool = False) -> Path:
    """The journey, with what `--time` decides filled in, and the share of each stage for what progress tells."""
    planned = plan.shares if own_process else None
    return journey.compress(model, config, until=until, own_process=own_process, in_time=in_time, planned=planned)


def compress(model: str | Path, *, config: CompressConfig | None = None, **options: Any) -> RunResult:
    """Search, cut, heal, measure, export and report; a run that was stopped is resumed.

    Args:
        model: a Hub id, a folder, or a .gguf file. A model that is in memory goes through `search`, `cut`, … instead.
        config: all options at once; no others may be given then.
        **options: the command's flags with underscores: `ratio=0.2`, `segment="13:19"`, `bits=4`, `out="runs/mine"`.

    Returns:
        The finished run. Its folder is `out`, or runs/NAME.

    Raises:
        LayercutError: wrong input; `message` says what was got and what is allowed, `hint` how to correct it.
    """
    if not isinstance(model, str | Path):
        words = f"compress takes a model's name or path, not a {type(model).__name__}"
        raise ConfigError(words, "for a model in memory: layercut.search, cut, fold_, tune_, quantize, evaluate, save")
    if config is not None and options:
        raise ConfigError(f"both config and {', '.join(options)} are given", "give one of them")
    folder = run(str(model), config or from_flat(options))
    summary = restored(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    return RunResult(folder, summary)
