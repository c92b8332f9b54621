"""A finished run as a page, a model card and a table in the terminal: the last stage of the journey.

`write_report` makes report.html from the JSON files of a run folder, one file that needs nothing beside it;
`card_body` is the text of a model card (`model_card.py`); `closing` what the terminal shows at the end;
`write_comparison` makes compare.html, the page of `layercut compare`. All words are in templates/, and `sections.py`
says which sections the report has. Whatever a user or a model wrote is escaped, and the page's content policy forbids
scripts and the network.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.files.writing import write_atomically
from layercut.report import charts, comparison_views, tables, thresholds, verdicts
from layercut.report.formatting import Json, command_line, figure, label, number, percent, printable, short_name
from layercut.report.run_facts import RunFacts, read_json, read_run
from layercut.report.sections import chapter
from layercut.report.templating import lines, page

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def write_report(run: Path) -> Path:
    """Write RUN/report.html, atomically, and return its path; of a run of `compare`, compare.html.

    RunError if RUN is no finished run's folder.
    """
    if (run / "compare.json").is_file() and not (run / "summary.json").is_file():
        return write_comparison(run)
    found = read_run(run)
    chapters = {name: chapter(found, name) for name in ("proofs", "details")}
    stack = charts.layer_stack(found.summary, found.heal)
    return _write(run / "report.html", page("report.html", **_facts(found), chapters=chapters, stack=stack))


def write_comparison(run: Path) -> Path:
    """Write RUN/compare.html from compare.json and compare.svg, atomically, and return its path."""
    found, svg = read_json(run / "compare.json"), run / "compare.svg"
    what = "Layers that each method removes, with the KL of its cut"
    picks = charts.inline(svg.read_text(encoding="utf-8"), "picks", what) if svg.is_file() else None
    facts = {"comparison": found, "name": short_name(found.model), "methods": tables.by_kl(found), "tables": tables}
    facts |= {"survivals": list(comparison_views.survivals(found)), "views": comparison_views}
    drawn = run / "compare-survival.svg"
    what = "What each cut keeps of task scores, hidden keys and lists"
    survival = charts.inline(drawn.read_text(encoding="utf-8"), "survival", what) if drawn.is_file() else None
    return _write(run / "compare.html", page("compare.html", **facts, picks=picks, survival=survival))


def _write(target: Path, text: str) -> Path:
    with write_atomically(target) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return target


def card_body(run: Path, use: str) -> str:
    """What the model card of RUN's checkpoint says below its front matter."""
    facts = _facts(read_run(run, place=None))
    return re.sub(r"\n{3,}", "\n\n", page("model_card.md", **facts, use=use))


def _facts(run: RunFacts) -> dict[str, Any]:
    """What both templates are filled with, beside the tables."""
    last = tables.last_stage(run.summary)
    return {
        "run": run,
        "name": short_name(run.summary.model),
        "headline": verdicts.headline(run.summary),
        "conclusion": verdicts.conclusion(run),
        "verdicts": verdicts.verdicts(run),
        "last": next((row for row in tables.stage_rows(run.summary) if last and row.name == last[0]), None),
        "command": command_line(run.env.command),
        "tables": tables,
        "warning": verdicts.generation_warning(run.health),
        "thresholds": thresholds,
    }


# ---- the terminal ------------------------------------------------------------------------------------------


def closing(run: Path) -> tuple[Table, list[Text]]:
    """What a run ends with in the terminal."""
    from rich.table import Table
    from rich.text import Text

    found = read_run(run, place=printable(shlex.quote(str(run))))
    table = Table(title=Text(printable(found.summary.model) or "layercut", style="bold"), title_justify="left")
    for heading in ("", "dense", "compressed", "change"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in lines("closing.txt", run=found, tables=tables):
        if row:
            table.add_row(*map(Text, row))
        else:
            table.add_section()
    colours = {"good": "green", "fair": "yellow", "bad": "red", "open": ""}

    def line(verdict: verdicts.Verdict, words: str, style: str) -> Text:
        return Text(f"{verdict.sign} {words}{verdict.text}", f"{style}{colours[verdict.mark]}".strip())

    last = verdicts.conclusion(found)
    warned = [verdict for verdict in verdicts.verdicts(found) if verdict.mark in ("fair", "bad")]
    return table, [*(line(v, f"{v.words}: {v.stage}: ", "") for v in warned), line(last, "", "bold ")]


def search_lines(search: Any) -> list[str]:
    """What `layercut search` prints: the candidates from the best, by all that they are known by."""
    candidates, heads = list(Json(search).candidates), {"kl": "KL, nats", "damage": "damage, nats", "score": "score"}
    known = [key for key in heads if any(number(each[key]) is not None for each in candidates)]
    rows = [[label(each.segments), *(figure(each[key]) for key in known)] for each in candidates]
    return ["\t".join(row) for row in [["segments", *(heads[key] for key in known)], *rows]]


def probe_lines(probes: Mapping[str, Any]) -> list[str]:
    """What `layercut evaluate --probes` prints: what each model finds, and the damage beside the first of them."""
    if not probes:
        return []
    rows = [["", *map(printable, probes)]]
    for name, what in (("hidden keys found", "keys"), ("values found in lists", "lists")):
        rows.append([name, *(comparison_views.found(Json(getattr(each, what))) for each in probes.values())])
    figures = [Json(each.capabilities) for each in probes.values()]
    for capability, _ in figures[-1].hits.entries():
        rows.append([f"{capability}: answers", *(percent(each.hits[capability]) for each in figures)])
        if len(figures) > 1:
            rows.append([f"{capability}: damage, nats", "", *(figure(each.damage[capability]) for each in figures[1:])])
    return ["\t".join(row) for row in rows]


def score_lines(tasks: dict[str, Any], retained: dict[str, Any] | None, measured: dict[str, Any]) -> list[str]:
    """What `layercut evaluate` prints beside perplexities: tables whose cells are parted by tabs, each with a
    heading.
    """
    rows = lines("scores.txt", tasks=tasks, retained=retained, measured=measured)
    return ["\t".join(row) for row in rows if row]
