"""A finished run as a page, a model card and a table: the last stage of the journey.

`write_report` makes report.html from the JSON files of a run folder, one file that needs nothing beside it;
`model_card` the README.md of the exported checkpoint; `closing_table` what the terminal shows at the end.
What the figures mean is decided in `findings.py`; `charts.py` draws the pictures; templates/ has the layout.
Whatever a user or a model wrote is escaped, and the page's content policy forbids scripts and the network.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut import charts, figures, findings
from layercut.figures import NOT_MEASURED, finite, items, part

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.table import Table

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: Path) -> Path:
    """Write RUN/report.html, atomically, and return its path. RunError if RUN is no finished run's folder."""
    from markupsafe import Markup

    found = findings.read_run(run)
    pictures = {
        "cost": charts.cost_chart(found.search),
        "path": charts.path_chart(found.search),
        "triangle": charts.triangle_chart(found.search),
        "tuning": charts.tuning_chart(found.heal),
    }
    page = _templates(escape=True).get_template("report.html")
    html_text = page.render(
        **_facts(found),
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),  # ours, not the user's
        charts={name: Markup(svg) for name, svg in pictures.items() if svg},  # hold no text of the user's
        stack=charts.stack(found.summary, found.heal),
    )
    target, draft = run / "report.html", run / f".report.html.{os.getpid()}"
    try:
        draft.write_text(html_text, encoding="utf-8", errors="replace")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def model_card(run: Path) -> str:
    """README.md for the checkpoint exported from RUN. RunError if RUN is not the folder of a finished run."""
    import yaml

    found = findings.read_run(run)
    name = figures.short_name(found.summary.get("model"))
    front = {
        "base_model": name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layercut", "pruned", "layer-pruning", "depth-pruning"],
    }
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000)
    body = _templates(escape=False).get_template("model_card.md").render(**_facts(found))
    return f"---\n{header}---\n\n{body}"


def _templates(*, escape: bool) -> Environment:
    """The page escapes everything. The card is Markdown: there every string goes through `code` instead."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shown = (figures.count, figures.size, figures.figure, figures.percent, figures.times, figures.duration)
    named = (figures.label, figures.layer_names, figures.printable, code, prose, whole)
    for function in shown + named:
        env.filters[function.__name__] = function
    return env


def _facts(run: findings.Run) -> dict[str, Any]:
    """What both templates are filled with."""
    command = run.env.get("command")
    return {
        "run": run,
        "summary": run.summary,
        "search": run.search,
        "stability": run.stability,
        "heal": run.heal,
        "env": run.env,
        "name": figures.short_name(run.summary.get("model")),
        "headline": findings.headline(run.summary),
        "broken": findings.broken(run.summary),
        "stages": findings.stages(run.summary),
        "verdicts": findings.verdicts(run),
        "chosen_kl": findings.chosen_kl(run.search),
        "original_layer_index": json.dumps(
            [i for i in items(run.summary, "original_layer_index") if type(i) is int]
        ),
        "speed": findings.speed(run),
        "change": figures.change,
        "sources": _sources(run),
        "tasks": _tasks(run.summary),
        "generations": [part(pair) for pair in items(run.evaluation, "generations")],
        "versions": part(run.summary, "versions") or part(run.env, "versions"),
        "command": shlex.join(map(str, command)) if isinstance(command, list) else figures.printable(command),
    }


def _sources(run: findings.Run) -> list[tuple[str, Any, Any, Any]]:
    """(what for, source, tokens, fingerprint) of each text the run read."""
    perplexity = part(run.summary, "perplexity") or part(run.evaluation, "perplexity")
    texts = [
        ("calibration: search and fold", part(run.search, "calibration")),
        ("tuning", part(run.heal, "tuning", "data")),
        ("evaluation", {**perplexity, "source": perplexity.get("dataset")} if perplexity else {}),
    ]
    return [(use, t.get("source"), t.get("tokens"), t.get("fingerprint")) for use, t in texts if t]


def _tasks(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Task scores as a table with whatever numeric columns the tasks have; None when not measured."""
    rows = {str(name): scores for name, scores in part(summary, "tasks").items() if isinstance(scores, dict)}
    columns = [
        c
        for c in dict.fromkeys(key for scores in rows.values() for key in scores)
        if any(finite(scores.get(c)) is not None for scores in rows.values())
    ]
    return {"columns": columns, "rows": rows} if columns else None


def code(value: Any) -> str:
    """Text as a Markdown code span that cannot end early, hold markup, break a table or start a new line."""
    text = figures.printable(value).replace("`", "'").replace("|", "¦")
    return f"`{text}`" if text else NOT_MEASURED


def prose(value: Any) -> str:
    """Text inside a Markdown sentence, with everything that HTML or Markdown would act on made harmless."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(figures.printable(value), quote=False))


def whole(value: Any) -> str:
    """1234567 -> 1,234,567"""
    found = finite(value)
    return NOT_MEASURED if found is None else f"{found:,.0f}"


# ---- the terminal ------------------------------------------------------------------------------------------


def closing_table(summary: dict[str, Any]) -> Table:
    """The table a run ends with: dense against compressed, and what each stage did, as far as measured."""
    from rich.table import Table
    from rich.text import Text

    ruined = findings.broken(summary)
    table = Table(
        title=Text(figures.printable(summary.get("model")) or "layercut", style="bold"),
        caption=Text(ruined, style="bold red") if ruined else None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("dense", "compressed", "change"):
        table.add_column(heading, justify="right")
    groups = (_size_rows(summary), _perplexity_rows(summary), _speed_rows(summary), _cost_rows(summary))
    for rows in groups:
        for number, row in enumerate(rows, start=1):
            table.add_row(*(Text(cell) for cell in row), end_section=number == len(rows))
    return table


Row = tuple[str, str, str, str]


def _size_rows(summary: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, show in (("layers", whole), ("parameters", figures.count), ("bytes", figures.size)):
        pair = part(summary, name)
        before, after = pair.get("before"), pair.get("after")
        rows.append((name, show(before), show(after), figures.change(before, after)))
    rows.insert(1, ("segments removed", "", figures.label(summary.get("segments")), ""))
    return rows


def _perplexity_rows(summary: dict[str, Any]) -> list[Row]:
    stages = {stage.name: stage for stage in findings.stages(summary) if stage.perplexity is not None}
    if not stages:
        return [("perplexity", "", NOT_MEASURED, "")]
    dense = figures.figure(stages["dense"].perplexity) if "dense" in stages else NOT_MEASURED
    rows = [
        (
            f"perplexity, {name}",
            dense,
            figures.figure(stage.perplexity),
            figures.times(stage.factor) if stage.factor else "",
        )
        for name, stage in stages.items()
        if name != "dense"
    ]
    return rows or [("perplexity", dense, NOT_MEASURED, "")]


def _speed_rows(summary: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for phase in ("prefill", "decode"):
        speed = part(summary, "speed", phase)
        if speed:
            dense, compressed = figures.figure(speed.get("dense")), figures.figure(speed.get("compressed"))
            rows.append((f"{phase}, tokens/s", dense, compressed, figures.times(speed.get("ratio"))))
    cache = part(summary, "speed", "kv_bytes_per_token")
    if cache:
        before, after = cache.get("dense"), cache.get("compressed")
        rows.append(
            ("KV cache per token", figures.size(before), figures.size(after), figures.change(before, after))
        )
    return rows or [("speed", "", NOT_MEASURED, "")]


def _cost_rows(summary: dict[str, Any]) -> list[Row]:
    seconds = part(summary, "seconds")
    rows: list[Row] = [
        (f"time, {figures.printable(s)}", "", figures.duration(t), "") for s, t in seconds.items()
    ]
    if finite(summary.get("peak_rss_bytes")) is not None:
        rows.append(("peak memory", "", figures.size(summary["peak_rss_bytes"]), ""))
    return rows
