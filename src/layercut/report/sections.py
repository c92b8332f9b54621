"""The sections of the report: for each, what is shown of a run, and in which chapter.

To add one: a line in CHAPTERS with a function of the run that finds the facts, and templates/sections/NAME.html, which
reads these as `f` and the run as `run`. A section of which no fact is known is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layercut.report import bit_chart, charts, formatting, tables, verdicts
from layercut.report.run_facts import RunFacts


@dataclass(frozen=True)
class Section:
    """A section of the report."""

    name: str
    """Of its template, and its id on the page."""
    facts: Callable[[RunFacts], dict[str, Any]]
    wide: bool = False
    """Whether it takes the whole width; else there is room for two side by side."""


CHAPTERS = {
    "proofs": [
        Section("verdict", lambda run: {"verdicts": verdicts.verdicts(run)}, wide=True),
        Section("figures", lambda run: {"last": tables.last_stage(run.summary)}, wide=True),
        Section("abilities", tables.abilities, wide=True),
        Section("tasks", lambda run: {"rows": tables.task_rows(run.summary)}, wide=True),
        Section("measured", lambda run: {"rows": tables.evaluation_rows(run.summary)}, wide=True),
        Section("evaluations", lambda run: {"rows": run.evaluations}, wide=True),
        Section("long", lambda run: _with_chart(tables.positions(run.summary), charts.position_chart)),
        Section("keys", lambda run: tables.hidden_keys(run.summary)),
        Section("lists", lambda run: tables.list_values(run.summary)),
        Section("health", lambda run: {"warning": verdicts.generation_warning(run.health), "known": run.health}),
        Section("speed", lambda run: {"known": run.speed or run.summary.bytes or run.summary.parameters}),
        Section("consumers", lambda run: {"rows": tables.consumer_rows(run.summary.consumers)}, wide=True),
        Section("samples", lambda run: {"samples": list(run.evaluation.generations)}, wide=True),
    ],
    "details": [
        Section("cost", lambda run: {"chart": charts.cost_chart(run.search)}),
        Section("map", lambda run: _map(run), wide=True),
        Section("frontier", lambda run: _with_chart(tables.frontier(run.frontier), charts.frontier_chart)),
        Section("shares", lambda run: {"rows": list(run.shares.points), "layers": run.shares.layers}, wide=True),
        Section("bits", lambda run: _bits(run.quantization), wide=True),
        Section("tuning", lambda run: {"chart": charts.tuning_chart(run.heal)}),
        Section("fold", lambda run: {"rows": list(run.heal.fold)}, wide=True),
        Section("unmeasured", lambda run: {"names": tables.unmeasured(run)}, wide=True),
        Section("provenance", lambda run: {"model": formatting.short_name(run.summary.model)}, wide=True),
    ],
}


def _map(run: RunFacts) -> dict[str, Any]:
    return {"charts": charts.map_charts(run), "words": list(run.capabilities.words)}


def _bits(found: formatting.Json) -> dict[str, Any]:
    return {"chart": bit_chart.bit_chart(found), "outside": bit_chart.bits_outside(found)}


def _with_chart(rows: Any, draw: Callable[[Any], str | None]) -> dict[str, Any]:
    return {"rows": rows, "chart": draw(rows)}


def chapter(run: RunFacts, name: str) -> list[tuple[Section, dict[str, Any]]]:
    """The sections of a chapter of which something is known."""
    found = [(section, section.facts(run)) for section in CHAPTERS[name]]
    return [(section, facts) for section, facts in found if any(facts.values())]
