"""What a run folder holds, read for the report, the model card and the closing table at the end of the journey.

The pipeline's own reader refuses an artefact that is not whole, so that its stage runs again. A report shows what
there is, also of an old or partial run: what is missing is empty here, and "not measured" in words.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercut.errors import RunError
from layercut.report.formatting import Json, number, printable, spans

FILES = {"summary": "summary", "search": "search", "heal": "heal", "evaluation": "eval", "env": "env",
         "quantization": "quantize", "frontier": "frontier", "gguf": "gguf",
         "capabilities": "capabilities", "shares": "shares"}  # fmt: skip
"""Fields of RunFacts, and the JSON files they are read from."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The JSON artefacts of a run folder, one that it does not have, or that is of another run, empty; and its name."""

    summary: Json = field(default_factory=Json)
    search: Json = field(default_factory=Json)
    heal: Json = field(default_factory=Json)
    evaluation: Json = field(default_factory=Json)
    env: Json = field(default_factory=Json)
    quantization: Json = field(default_factory=Json)
    frontier: Json = field(default_factory=Json)
    shares: Json = field(default_factory=Json)
    capabilities: Json = field(default_factory=Json)
    gguf: Json = field(default_factory=Json)
    """Of the GGUF file last exported."""
    evaluations: list[Json] = field(default_factory=list)
    """What `layercut evaluate RUN` measured, in the order of their files."""
    settings: Json = field(default_factory=Json)
    """config.yaml."""
    place: str | None = "RUN"
    """What the folder is called in commands that are named; None for a reader who has none, as of a model card."""

    @property
    def speed(self) -> Json:
        """Of eval.json, or else of summary.json."""
        return self.evaluation.speed or self.summary.speed

    @property
    def health(self) -> Json:
        """Figures of both models' continuations; nothing where one of them is not known."""
        found = self.summary.generation_health
        return found if found.dense and found.compressed else Json()

    @property
    def scored(self) -> Json:
        """Who has the tasks: the run, or the last `layercut evaluate RUN` that scored some where the run has none."""
        later = [] if self.summary.tasks.entries() else [found for found in self.evaluations if found.tasks.entries()]
        return max(later, key=lambda found: printable(found.date)) if later else self.summary


def read_run(folder: Path, *, place: str | None = "RUN") -> RunFacts:
    """What is known of a run."""
    if not (folder / "summary.json").is_file():
        raise RunError(
            f"{folder} has no summary.json, so it is not the folder of a finished run",
            f"finish the run first: layercut compress MODEL --out {shlex.quote(str(folder))}",
        )
    found: dict[str, Any] = {name: read_json(folder / f"{file}.json") for name, file in FILES.items()}
    settings, summary = _settings(folder / "config.yaml"), found["summary"]
    keys = {str(summary.config_hash), _model_key(found["quantization"], summary)}
    of_this_run = {
        "gguf": str(found["gguf"].run) in keys,
        "shares": settings.bits == "auto"
        and number(settings.ratio) is None
        and not (settings.segment or settings.target_speedup)
        and sum(stop - start for start, stop in spans(found["search"].segments)) == found["shares"].layers,
        "capabilities": bool(found["summary"].capabilities),
        "frontier": bool(found["frontier"].budgets)
        and all(dict(settings.entries()).get(k) == asked for k, asked in found["frontier"].budgets.entries()),
    }
    found |= {name: Json() for name, same in of_this_run.items() if not same}
    later = [one for file in sorted(folder.glob("evaluations/*.json")) if str((one := read_json(file)).run) in keys]
    return RunFacts(**found, settings=settings, evaluations=later, place=place)


def model_key(folder: Path) -> str:
    """What says that something found later is of this run's model, whatever else is measured in the run after it."""
    return _model_key(read_json(folder / "quantize.json"), read_json(folder / "summary.json"))


def _model_key(quantization: Json, summary: Json) -> str:
    return str(quantization.config_hash or summary.config_hash)


def _settings(path: Path) -> Json:
    """What a run was asked for; empty where that cannot be read, since the report does not depend on it."""
    import yaml

    try:
        return Json(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return Json()


def read_json(path: Path) -> Json:
    """An artefact, empty where there is none. RunError where it is no JSON object."""
    if not path.is_file():
        return Json()
    hint = f"remove {path} and run the same layercut command again; it makes the file anew"
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what a wrong encoding raises
        raise RunError(f"{path} is not valid JSON ({error})", hint) from None
    if not isinstance(value, dict):
        raise RunError(f"{path} holds a {type(value).__name__}; allowed is a JSON object", hint)
    return Json(value)
