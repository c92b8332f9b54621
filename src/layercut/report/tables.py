"""What a run measured, as the rows that the report, the model card and the verdicts share.

Computed once from the artefacts (`run_facts.py`) at the end of the journey; `verdicts.py` judges these figures, and
templates/tables.html lays them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from layercut.errors import ConfigError
from layercut.export.engines import ENGINES
from layercut.files.sizes import parse_bytes
from layercut.report.formatting import (
    Json,
    change,
    finite,
    number,
    percent,
    plain,
    printable,
    signed,
    size,
    spans,
    times,
    whole_number,
    with_error,
)
from layercut.report.run_facts import RunFacts

STAGES = ("dense", "cut", "folded", "tuned", "lora", "quantized")


# ---- perplexity --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """Perplexity after one stage."""

    name: str
    perplexity: float | None
    """As measured: may be inf or nan. None: not measured."""
    factor: float | None
    """Over the dense model's."""
    error: float | None
    """Standard error of the factor's logarithm, over the windows of text."""
    gap_closed: float | None
    """(ln cut - ln x) / (ln cut - ln dense): 0 at the bare cut, 1 at the dense model."""
    bar: float | None
    """Log-perplexity on a scale from the dense model (0) to the worst stage (1)."""

    @property
    def closed(self) -> str:
        """50.4%: the gap closed; empty where it is not known, or the stage is further off than the bare cut."""
        return percent(self.gap_closed) if self.gap_closed is not None and self.gap_closed >= 0 else ""

    @property
    def over_dense(self) -> str:
        """1.24× ± 0.01: the factor with its standard error, as far as known."""
        return ratio_words(self.factor, self.error)


def ratio_words(factor: float | None, error: float | None) -> str:
    """A ratio with its standard error, as far as known."""
    return "–" if factor is None else times(factor) if error is None else with_error(factor, error)


def perplexities(summary: Json) -> dict[str, float]:
    """Those that were measured, in the order of the journey."""
    found = {name: number(summary.perplexity[name]) for name in STAGES}
    return {name: value for name, value in found.items() if value is not None}


def stage_rows(summary: Json) -> list[StageRow]:
    """One row for each stage of the journey, measured or not."""
    measured = perplexities(summary)
    logs = {name: math.log(value) for name, value in measured.items() if math.isfinite(value) and value > 0}
    dense, cut, worst = logs.get("dense"), logs.get("cut"), max(logs.values(), default=0.0)
    rows = []
    for name in STAGES:
        here, factor, gap, bar = logs.get(name), None, None, None
        if here is not None and dense is not None:
            factor = math.exp(min(here - dense, 700.0))
            bar = max(0.0, here - dense) / (worst - dense) if worst > dense else 0.0
            if cut is not None and cut > dense and name not in ("dense", "cut"):
                gap = (cut - here) / (cut - dense)
        error = finite(summary.perplexity.standard_error[name])
        rows.append(
            StageRow(name=name, perplexity=measured.get(name), factor=factor, error=error, gap_closed=gap, bar=bar)
        )
    return rows


def last_stage(summary: Json) -> tuple[str, float] | None:
    """The last stage whose perplexity was measured (not the dense model's), and that perplexity."""
    found = [pair for pair in perplexities(summary).items() if pair[0] != "dense"]
    return found[-1] if found else None


def final_factor(summary: Json) -> float | None:
    """Perplexity of the last measured stage over the dense model's, inf where that is ruined; None: not known."""
    last, dense = last_stage(summary), perplexities(summary).get("dense")
    if last is None or dense is None or not math.isfinite(dense) or dense <= 0:
        return None
    return last[1] / dense if math.isfinite(last[1]) else math.inf


# ---- tasks, evaluations, long context ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One metric of a task, with its scores as they are in the artefact."""

    task: str
    metric: Json
    items: Json
    score: Json
    main: bool
    """Whether it speaks for its task."""


def task_rows(summary: Json) -> list[TaskRow]:
    """One row for each task and metric that has numbers, a task's main metric first."""
    return [
        TaskRow(task=task, metric=Json(metric), items=scores["items"], score=score, main=score is scores)
        for task, scores in summary.tasks.entries()
        for metric, score in [(scores.metric, scores), *scores.others.entries()]
        if finite(score.dense) is not None or finite(score.compressed) is not None
    ]


def evaluation_rows(summary: Json) -> list[dict[str, Any]]:
    """One row for each metric of each evaluation of a package: name, metric, dense, compressed, change in words."""
    return [
        {"name": name, "metric": metric, "dense": row.dense, "compressed": row.compressed, "change": _change_words(row)}
        for name, metrics in summary.evaluations.entries()
        for metric, row in metrics.entries()
        if row
    ]


def _change_words(row: Json) -> str:
    """−20.0%, worse: the change, and what the evaluation says of its direction."""
    dense, compressed, higher = finite(row.dense), finite(row.compressed), row.higher_is_better
    words = [change(dense, compressed)]
    if dense is not None and compressed is not None and dense != compressed and higher in (True, False):
        words.append("better" if (compressed > dense) == bool(higher) else "worse")
    return ", ".join(filter(None, words))


def positions(summary: Json) -> list[tuple[int, int, float | None, float | None]]:
    """(start, stop, dense, compressed) perplexity of each bucket of positions; None where it is no finite number."""
    dense, compressed = (
        {
            (start, stop): finite(row.perplexity)
            for row in summary.long_context.perplexity[name]
            if (start := whole_number(row.start)) and (stop := whole_number(row.stop)) and 0 < start < stop
        }
        for name in ("dense", "compressed")
    )
    return [(*bounds, dense.get(bounds), value) for bounds, value in compressed.items()]


def hidden_keys(summary: Json) -> dict[str, Any]:
    """Keys that were found (`found_by_place`), of --long-context, or of --probes where that was not measured."""
    return found_by_place(summary.long_context.passkey) or found_by_place(summary.probes["keys"])


def list_values(summary: Json) -> dict[str, Any]:
    """Values of lists that were found (`found_by_place`), of --probes."""
    return found_by_place(summary.probes["lists"])


def found_by_place(grids: Json) -> dict[str, Any]:
    """{"lengths", "rows": [(depth, [(dense, compressed, trials) or None, …]), …], and the totals}; empty: unknown."""
    grid: dict[tuple[float, float], list[Any]] = {}
    for which, name in enumerate(("dense", "compressed")):
        for cell in grids[name]:
            depth, length, found, trials = (finite(cell[key]) for key in ("depth", "length", "found", "trials"))
            if depth is not None and length is not None and found is not None and trials:
                grid.setdefault((depth, length), [None, None, trials])[which] = found
    known = {place: cell for place, cell in grid.items() if None not in cell}
    if not known:
        return {}
    depths, lengths = (sorted({place[axis] for place in known}) for axis in (0, 1))
    totals = {name: sum(cell[i] for cell in known.values()) for i, name in enumerate(("dense", "compressed", "trials"))}
    rows = [(depth, [known.get((depth, length)) for length in lengths]) for depth in depths]
    return {"lengths": lengths, "rows": rows, **totals}


def found_by_model(probes: Json) -> list[dict[str, Any]]:
    """The same of hidden keys and of values in lists, which `layercut evaluate` stores by model; those it asked for.

    Each says as "what" which it is: "keys" or "lists".
    """
    both, kinds = ("dense", "compressed"), ("keys", "lists")
    found = {what: found_by_place(Json({name: plain(probes[name][what]) for name in both})) for what in kinds}
    return [{"what": what, **grid} for what, grid in found.items() if grid]


def capability_rows(judged: Json) -> list[dict[str, Any]]:
    """A row for each capability of `CapabilityFigures`; shares of the answers, None where they are not known."""
    rows = []
    for name, damage in judged.damage.entries():
        dense, compressed = finite(judged.dense_hits[name]), finite(judged.hits[name])
        fewer = dense is not None and compressed is not None and compressed < dense
        row = {"name": name, "answers": judged.answers[name], "dense": dense, "compressed": compressed}
        lost = {"dense_loss": judged.dense_loss[name], "loss": judged.loss[name]}
        rows.append(row | lost | {"damage": damage, "fewer": fewer})
    return rows


def abilities(run: RunFacts) -> dict[str, Any]:
    """Generated tests: a row for each capability, "lengths", and the "trade" with the best cut by text; {}: unknown."""
    rows = capability_rows(run.capabilities.judged)
    lengths = [
        {key: each[key] for key in ("capability", "length", "answers", "dense", "compressed")}
        for each in run.capabilities.by_length
    ]
    chosen = next(iter(run.search.candidates), Json())
    other, trade = run.search.by_text, None
    if finite(chosen.damage) is not None and finite(other.damage) is not None:
        trade = {
            "chosen": chosen.segments, "kl": chosen.kl, "damage": chosen.damage,
            "other": other.segments, "other_kl": other.kl, "other_damage": other.damage,
            "healed": _healed_on_trial(run.search, chosen, other),
            "same": spans(chosen.segments) == spans(other.segments),
        }  # fmt: skip
    return {"rows": rows, "lengths": lengths, "trade": trade} if rows or trade else {}


def on_trial(search: Json, *cuts: Json) -> list[Json]:
    """What was left of cuts on trial."""
    of = {str(spans(one.segments)): one for one in search.tried}
    return [of.get(str(spans(each.segments)), Json()) for each in cuts]


def _healed_on_trial(search: Json, *cuts: Json) -> list[tuple[float, float]]:
    """(KL on text, weighed damage to tests) after a short healing, nats per token; [] where one is not known."""
    found = []
    for one in on_trial(search, *cuts):
        text, both = finite(one.text), finite(one.healed)
        if text is not None and both is not None:
            found.append((text, both - text))
    return found if len(found) == len(cuts) else []


def held_out_losses(tuning: Json) -> list[float]:
    """Of a training, from the start on, where they were numbers."""
    return [loss for point in tuning.heldout if (loss := finite(point.loss)) is not None]


def runs_of(layers: set[int]) -> list[list[int]]:
    """Layers as segments: {2, 3, 7} -> [[2, 4], [7, 8]]."""
    starts, stops = (sorted(i for i in layers if i + step not in layers) for step in (-1, 1))
    return [[start, stop + 1] for start, stop in zip(starts, stops, strict=True)]


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One state of the model that was measured: how large, how much worse."""

    layers: int
    bits: int
    bytes: float
    rise: float
    """Of perplexity over the dense model's, as a share; may be inf or nan."""
    chosen: bool
    fits: bool
    """Inside every budget that was given."""

    @property
    def words(self) -> str:
        """Layers, bits, bytes and the rise of perplexity in one line."""
        return f"{self.layers} layers at {self.bits} bits, {size(self.bytes)}, perplexity {signed(self.rise)}"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """frontier.json, with its budgets as numbers."""

    points: list[FrontierPoint]
    size: float | None
    """Bytes allowed; None: no such budget."""
    loss: float | None
    """Rise of perplexity allowed, a share; None: not known."""


def frontier(found: Json) -> Frontier | None:
    """frontier.json as it can be used; None where it holds no point."""
    loss, target = finite(found.budgets.max_loss), printable(found.budgets.target_size)
    try:
        allowed = float(parse_bytes("--target-size", target)) if target else None
    except ConfigError:
        allowed = None
    points = []
    for row in found.points:
        layers, bits = whole_number(row.layers), whole_number(row.bits)
        weight, rise = finite(row.bytes), number(row.rise)
        if layers is not None and bits is not None and weight is not None and rise is not None:
            fits = (allowed is None or weight <= allowed) and (loss is None or rise <= loss)
            chosen = found.chosen.layers == layers and found.chosen.bits == bits
            points.append(FrontierPoint(layers=layers, bits=bits, bytes=weight, rise=rise, chosen=chosen, fits=fits))
    return Frontier(points=points, size=allowed, loss=loss) if points else None


# ---- what was searched, and what was not measured --------------------------------------------------------------


def bytes_that_came(summary: Json) -> float | None:
    """Of the weight files the model came in; of an older run, in the number format it was run in."""
    return finite(summary.bytes.source) or finite(summary.bytes.before)


def chosen_kl(run: RunFacts) -> float | None:
    """KL on the calibration text of the segments that the search chose, in nats, if they were priced."""
    wanted = spans(run.search.segments)
    found = (candidate.kl for candidate in run.search.candidates if wanted and spans(candidate.segments) == wanted)
    return finite(next(found, None))


def coverage(run: RunFacts) -> tuple[int, int] | None:
    """How many segments were priced of how many of that length there are; None where that is not known."""
    layers, removed = whole_number(run.summary.layers.before), spans(run.search.segments)
    if layers is None or len(removed) != 1:
        return None
    length = removed[0][1] - removed[0][0]
    priced = {where[0] for candidate in run.search.candidates if len(where := spans(candidate.segments)) == 1}
    of_length = [where for where in priced if where[1] - where[0] == length]
    return (len(of_length), layers - length + 1) if of_length else None


def unmeasured(run: RunFacts) -> list[str]:
    """What the report has no figures for, by name."""
    there = {
        "perplexity": last_stage(run.summary),
        "cost of the candidates": list(run.search.candidates),
        "tuning": run.heal.tuning,
        "speed": run.speed,
        "size on disk": run.summary.bytes,
        "tasks": task_rows(run.scored),
        "long context": positions(run.summary),
        "generations": list(run.evaluation.generations) or run.health,
    }
    return [name for name, known in there.items() if not known]


def by_kl(comparison: Any) -> list[Any]:
    """The methods' rows of compare.json, from the cheapest cut to the dearest; those without a finite KL last."""
    kls = [(row, finite(row["kl"])) for row in comparison["methods"]]
    return [row for row, _ in sorted(kls, key=lambda pair: math.inf if pair[1] is None else pair[1])]


def last_over(row: Json, dense: Json) -> str:
    """The last state of a method that was measured over the dense model's perplexity: 1.43× ± 0.01."""
    last = last_stage(row)
    factor = last[1] / base if last and math.isfinite(last[1]) and (base := finite(dense)) else None
    return ratio_words(factor, finite(row.standard_error[last[0]]) if last else None)


# ---- other software ----------------------------------------------------------------------------------------

READINGS = {
    "right": "reads it right", "note": "reads it right", "misread": "would misread it", "refused": "does not load it",
}  # fmt: skip


def consumer_rows(found: Iterable[Any]) -> list[tuple[str, str, str]]:
    """Software, what it makes of a model, and why; of readings as far as this layercut knows both names."""
    return [
        (ENGINES[str(one.consumer)].title, READINGS[str(one.verdict)], printable(one.words))
        for one in found
        if one.consumer in ENGINES and one.verdict in READINGS
    ]
