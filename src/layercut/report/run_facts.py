"""A run folder's JSON artefacts, and the figures that the page, the card and the terminal share.

The pipeline refuses an artefact that is not whole; a report shows what there is, also of an old or partial run.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercut.errors import RunError
from layercut.report.formatting import Json, change, figure, finite, number, plain, printable, spans, whole_number

FILES = {"summary": "summary", "search": "search", "heal": "heal", "evaluation": "eval", "env": "env",
         "quantization": "quantize", "export": "export", "frontier": "frontier", "gguf": "gguf",
         "capabilities": "capabilities", "shares": "shares"}  # fmt: skip
"""Names in RunFacts, and the JSON files they are read from."""
STAGES = ("dense", "cut", "folded", "tuned", "lora", "quantized")
BOTH = ("dense", "compressed")
"""The two models, as artefacts name them."""


class RunFacts:
    """The artefacts of a run folder by the names of `FILES`; one that is missing, or of another run, is empty."""

    def __init__(self, *, place: str | None = "RUN", evaluations: Sequence[Json] = (), **files: Json) -> None:
        """`place`: the folder's name in suggested commands; None for a reader who does not have it, as of a card.

        `evaluations`: what `layercut evaluate RUN` measured, in the order of their files.
        """
        self.place, self.evaluations, self._files = place, list(evaluations), files

    def __getattr__(self, name: str) -> Json:
        if name not in FILES:
            raise AttributeError(name)
        return self._files.get(name, Json())

    @property
    def speed(self) -> Json:
        """Of eval.json, or else of summary.json."""
        return self.evaluation.speed or self.summary.speed

    @property
    def decoding(self) -> tuple[Json, str]:
        """Tokens a second of both models, and where: llama.cpp, of a run whose result it reads, or transformers."""
        theirs = self.export.gguf.again.llama_cpp.speed
        return (theirs, "llama.cpp") if theirs else (self.speed.decode, "transformers")

    @property
    def exported(self) -> Json:
        """The GGUF file that was made of the result afterwards; empty where the result is that file itself."""
        return Json() if self.export.gguf else self.gguf

    @property
    def health(self) -> Json:
        """Figures of both models' continuations; empty where one of them is not known."""
        found = self.summary.generation_health
        return found if found.dense and found.compressed else Json()

    @property
    def scored(self) -> Json:
        """The holder of the tasks: the run, or the last `layercut evaluate RUN` that scored some."""
        later = [] if self.summary.tasks.entries() else [found for found in self.evaluations if found.tasks.entries()]
        return max(later, key=lambda found: printable(found.date)) if later else self.summary


def check_finished_run(folder: Path) -> None:
    if not (folder / "summary.json").is_file():
        raise RunError(
            f"{folder} has no summary.json, so it is not the folder of a finished run",
            f"finish the run first: layercut compress MODEL --out {shlex.quote(str(folder))}",
        )


def read_run(folder: Path, *, place: str | None = "RUN") -> RunFacts:
    """What is known of a run. RunError if it is no finished run's folder."""
    check_finished_run(folder)
    found = {name: read_json(folder / f"{file}.json") for name, file in FILES.items()}
    settings, summary = _settings(folder / "config.yaml"), found["summary"]
    keys = {str(summary.config_hash), str(found["quantization"].config_hash or summary.config_hash)}
    of_this_run = {
        "gguf": str(found["gguf"].run) in keys,
        "shares": settings.bits == "auto"
        and number(settings.ratio) is None
        and not settings.segment
        and sum(stop - start for start, stop in spans(found["search"].segments)) == found["shares"].layers,
        "capabilities": bool(summary.capabilities),
        "frontier": bool(found["frontier"].budgets)
        and all(dict(settings.entries()).get(k) == asked for k, asked in found["frontier"].budgets.entries()),
    }
    found |= {name: Json() for name, same in of_this_run.items() if not same}
    later = [one for file in sorted(folder.glob("evaluations/*.json")) if str((one := read_json(file)).run) in keys]
    return RunFacts(**found, evaluations=later, place=place)


def model_key(folder: Path) -> str:
    """Marks a file made later as of this run's model, whatever else is measured in the run afterwards."""
    return str(read_json(folder / "quantize.json").config_hash or read_json(folder / "summary.json").config_hash)


def _settings(path: Path) -> Json:
    """config.yaml; empty where it cannot be read, since the report does not depend on it."""
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


# ---- perplexity and size ---------------------------------------------------------------------------------------


def perplexities(summary: Json) -> dict[str, float]:
    found = {name: number(summary.perplexity[name]) for name in STAGES}
    return {name: value for name, value in found.items() if value is not None}


def last_stage(summary: Json) -> tuple[str, float] | None:
    """The last stage whose perplexity was measured (not the dense model's), and that perplexity."""
    found = [pair for pair in perplexities(summary).items() if pair[0] != "dense"]
    return found[-1] if found else None


def final_factor(summary: Json) -> float | None:
    """Perplexity of the last measured stage over the dense model's, inf where that is not finite; None: not known."""
    last, dense = last_stage(summary), perplexities(summary).get("dense")
    if last is None or dense is None or not math.isfinite(dense) or dense <= 0:
        return None
    return last[1] / dense if math.isfinite(last[1]) else math.inf


def gap_closed(summary: Json, stage: str) -> float | None:
    """(ln cut − ln x) / (ln cut − ln dense): 0 at the bare cut, 1 at the dense model."""
    found = perplexities(summary)
    values = [found.get(name, math.nan) for name in ("dense", "cut", stage)]
    if stage in ("dense", "cut") or not all(math.isfinite(value) and value > 0 for value in values):
        return None
    dense, cut, here = map(math.log, values)
    return (cut - here) / (cut - dense) if cut > dense else None


def source_bytes(summary: Json) -> float | None:
    """Of the files the model came in; of an older run, of its weights in the number format it was run in."""
    return finite(summary.bytes.source) or finite(summary.bytes.before)


# ---- what survived ---------------------------------------------------------------------------------------------


def main_tasks(scored: Json) -> list[tuple[str, Json]]:
    """The tasks that have numbers, with the scores of their main metric."""
    return [(task, row) for task, row in scored.tasks.entries() if any(finite(row[key]) is not None for key in BOTH)]


@dataclass(frozen=True, kw_only=True)
class ProbeShare:
    """One kind of probe: how many of its answers each model gives."""

    name: str
    items: int | None
    """Answers asked for; None: not known."""
    dense: float | None
    """Share of the answers that the dense model gives."""
    pruned: float | None
    kl: Json = field(default_factory=Json)
    """KL(dense || pruned) over the answers' tokens, in nats per token."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the pruned model's share, at 95 %."""
        return interval_of(self.pruned, self.items) if self.pruned is not None and self.items else None


def interval_of(share: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share of n items, at 95 %."""
    p, z = min(max(share, 0.0), 1.0), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def skills(judged: Json) -> list[ProbeShare]:
    return [
        ProbeShare(name=name, items=whole_number(judged.answers[name]), dense=finite(judged.dense_hits[name]),
              pruned=finite(judged.hits[name]), kl=kl)
        for name, kl in judged.kl.entries()
    ]  # fmt: skip


def found_in_context(name: str, dense: Json, pruned: Json) -> list[ProbeShare]:
    """Hidden keys or list values that each model finds, by the length of the prompt."""
    grids = [
        {(finite(cell.length), finite(cell.depth)): (found, trials) for cell in grid
         if (found := finite(cell.found)) is not None and (trials := finite(cell.trials) or 0) > 0}
        for grid in (dense, pruned)
    ]  # fmt: skip
    totals: dict[float, list[float]] = {}
    for place in (place for place in grids[0] if place in grids[1] and None not in place):
        row = totals.setdefault(place[0] or 0.0, [0, 0, 0])
        row[:] = row[0] + grids[0][place][0], row[1] + grids[1][place][0], row[2] + grids[0][place][1]
    return [ProbeShare(name=f"{name}, {length:,.0f} tokens", items=int(n), dense=first / n, pruned=second / n)
            for length, (first, second, n) in sorted(totals.items())]  # fmt: skip


def recall(summary: Json) -> list[ProbeShare]:
    keys, lists = (summary.long_context.passkey or summary.probes["keys"]), summary.probes["lists"]
    return [*found_in_context("hidden keys", keys.dense, keys.compressed),
            *found_in_context("list values", lists.dense, lists.compressed)]  # fmt: skip


def positions(summary: Json) -> list[tuple[int, int, float | None, float | None]]:
    """(start, stop, dense, pruned) perplexity of each range of positions; None where it is no finite number."""
    dense, pruned = (
        {where[0]: finite(row.perplexity)
         for row in summary.long_context.perplexity[name] if (where := spans([[plain(row.start), plain(row.stop)]]))}
        for name in BOTH
    )  # fmt: skip
    return [(*bounds, dense.get(bounds), value) for bounds, value in pruned.items() if 0 < bounds[0] < bounds[1]]


def evaluation_rows(summary: Json) -> list[list[str]]:
    """A row for each metric of each evaluation of a package: name, metric, dense, pruned, change in words."""
    rows = []
    for name, metrics in summary.evaluations.entries():
        for metric, row in metrics.entries():
            dense, pruned = finite(row.dense), finite(row.compressed)
            words = change(dense, pruned)
            if dense is not None and pruned is not None and dense != pruned and row.higher_is_better in (True, False):
                words += ", better" if (pruned > dense) == bool(row.higher_is_better) else ", worse"
            if row:
                rows.append([name, metric, figure(row.dense), figure(row.compressed), words])
    return rows


def held_out_losses(tuning: Json) -> list[float]:
    """Of a training, from the start on, where they were numbers."""
    return [loss for point in tuning.heldout if (loss := finite(point.loss)) is not None]


def runs_of(layers: Iterable[int]) -> list[list[int]]:
    """Layers as segments: {2, 3, 7} -> [[2, 4], [7, 8]]."""
    known = set(layers)
    starts, stops = (sorted(i for i in known if i + step not in known) for step in (-1, 1))
    return [[start, stop + 1] for start, stop in zip(starts, stops, strict=True)]


def hits_of(grid: Json) -> str:
    """How many hidden keys or list values were found, of how many, over all lengths and depths."""
    found, trials = (sum(finite(cell[key]) or 0 for cell in grid) for key in ("found", "trials"))
    return f"{found:.0f}/{trials:.0f}" if trials else "-"
