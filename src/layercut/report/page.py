"""A finished run as a page, a model card and a table: the last stage of the journey.

`write_report` makes report.html from the JSON files of a run folder, one file that needs nothing beside it;
`card_body` is the text of a model card (`report/model_card.py`); `closing` what the terminal shows at the end;
`write_comparison` makes compare.html, the page of `layercut compare`.
What the figures mean is decided in `report/verdicts.py`; `report/charts.py` draws the pictures; templates/ has the
layout. Whatever a user or a model wrote is escaped, and the page's content policy forbids scripts and the network.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.files.writing import write_atomically
from layercut.report import charts, formatting, rounds, survival, thresholds, verdicts
from layercut.report.formatting import NOT_MEASURED, finite, items, part

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.table import Table
    from rich.text import Text

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: Path) -> Path:
    """Write RUN/report.html, atomically, and return its path; of a run of `compare`, compare.html.

    RunError if RUN is no finished run's folder.
    """
    if (run / "compare.json").is_file() and not (run / "summary.json").is_file():
        return write_comparison(run)
    found = verdicts.read_run(run)
    pictures = {
        "cost": charts.cost_chart(found.search),
        "path": charts.path_chart(found.search),
        "triangle": charts.triangle_chart(found.search),
        "tuning": charts.tuning_chart(found.heal),
        "positions": charts.position_chart(survival.positions(found.summary)),
        "frontier": charts.frontier_chart(rounds.read_frontier(found.frontier)),
    }
    facts = _facts(found) | {"stack": charts.stack(found.summary, found.heal)}
    return _write_page(run / "report.html", "report.html", pictures, facts)


def write_comparison(run: Path) -> Path:
    """Write RUN/compare.html from compare.json and compare.svg, atomically, and return its path."""
    found = verdicts.read_json(run / "compare.json")
    svg = run / "compare.svg"
    what = "Layers that each method removes, with the KL of its cut"
    picture = charts.inline(svg.read_text(encoding="utf-8"), "picks", what) if svg.is_file() else None
    facts = {"comparison": found, "name": formatting.short_name(found.get("model")), "methods": verdicts.by_kl(found)}
    return _write_page(run / "compare.html", "compare.html", {"picks": picture}, facts)


def _write_page(target: Path, template: str, pictures: dict[str, str | None], facts: dict[str, Any]) -> Path:
    """Fill a template and put it in its place, whole or not at all."""
    from markupsafe import Markup

    text = _templates(escape=True).get_template(template).render(
        **facts,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),  # ours, not the user's
        charts={name: Markup(svg) for name, svg in pictures.items() if svg},  # hold no text of the user's
    )  # fmt: skip
    with write_atomically(target) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return target


def card_body(run: Path, use: str) -> str:
    """What the model card of RUN's checkpoint says below its front matter. RunError if RUN is no finished run's folder.

    use: how to load it, as Markdown.
    """
    return filled("model_card.md", **_facts(verdicts.read_run(run)), use=use)


def filled(template: str, **facts: Any) -> str:
    """A template of Markdown, filled in; text of users has to go through `code` or `prose` there."""
    return _templates(escape=False).get_template(template).render(**facts)


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
    shown = (
        formatting.count,
        formatting.size,
        formatting.figure,
        formatting.percent,
        formatting.times,
        formatting.duration,
    )
    named = (formatting.label, formatting.layer_names, formatting.printable, formatting.source_name, code, prose, whole)
    beside = (plus_minus, probability, with_standard_error, over_dense, rounds.signed)
    for function in (*shown, *named, *beside):
        env.filters[function.__name__] = function
    return env


def _facts(run: verdicts.RunFacts) -> dict[str, Any]:
    """What both templates are filled with."""
    came, sizes = verdicts.came_with(run.summary), part(run.summary, "bytes")
    return {
        "run": run,
        "summary": run.summary,
        "search": run.search,
        "stability": run.stability,
        "rounds": rounds.round_rows(run.search, run.heal),
        "frontier": rounds.read_frontier(run.frontier),
        "heal": run.heal,
        "env": run.env,
        "quantized": finite(run.quantization.get("bits")) in (4, 8),
        "name": formatting.short_name(run.summary.get("model")),
        "headline": verdicts.headline(run.summary),
        "broken": verdicts.broken(run.summary),
        "stages": verdicts.stages(run.summary),
        "verdicts": verdicts.verdicts(run),
        "conclusion": verdicts.conclusion(run),
        "rules": thresholds.RULES,
        "marks": thresholds.MARKS,
        "mark_words": thresholds.MARK_WORDS,
        "disk": {"before": came, "after": sizes.get("after"), "computed": sizes.get("before")} if sizes else {},
        "evaluations": [verdicts.evaluation_row(found) for found in run.evaluations],
        "unmeasured": verdicts.unmeasured(run),
        "coverage": verdicts.coverage(run),
        "chosen_kl": verdicts.chosen_kl(run.search),
        "original_layer_index": json.dumps([i for i in items(run.summary, "original_layer_index") if type(i) is int]),
        "speed": verdicts.speed(run),
        "change": formatting.change,
        "sources": _sources(run),
        "tasks": survival.task_rows(run.summary),
        "retention": part(run.summary, "retention"),
        "keys": survival.keys(run.summary),
        "positions": survival.positions(run.summary),
        "long": part(run.summary, "long_context"),
        "health": survival.health(run.summary),
        "warning": survival.generation_warning(run.summary),
        "measured": survival.evaluation_rows(run.summary),
        "generations": [part(pair) for pair in items(run.evaluation, "generations")],
        "versions": part(run.summary, "versions") or part(run.env, "versions"),
        "command": formatting.command_line(run.env.get("command")),
    }


def _sources(run: verdicts.RunFacts) -> list[tuple[str, Any, Any, Any]]:
    """(what for, source, tokens, fingerprint) of each text the run read."""
    perplexity = part(run.summary, "perplexity") or part(run.evaluation, "perplexity")
    texts = [
        ("calibration: search and fold", part(run.search, "calibration")),
        ("tuning", part(run.heal, "tuning", "data")),
        ("evaluation", {**perplexity, "source": perplexity.get("dataset")} if perplexity else {}),
    ]
    return [
        (use, formatting.source_name(t.get("source")), t.get("tokens"), t.get("fingerprint")) for use, t in texts if t
    ]


def plus_minus(row: dict[str, Any], name: str) -> str:
    """0.43 ± 0.05, a score with its standard error as far as there is one."""
    error = finite(row.get(f"{name}_stderr"))
    score = finite(row.get(name))
    if score is None:
        return NOT_MEASURED
    shown = f"{score:.3f}" if abs(score) < 10 else formatting.figure(score)
    return shown + (f" ± {error:.3f}" if error is not None else "")


def with_standard_error(row: dict[str, Any], state: str) -> str:
    """64.65 ± 0.41: a method's perplexity in a state, with its standard error as far as known."""
    value, error = finite(part(row, "perplexity").get(state)), finite(part(row, "standard_error").get(state))
    shown = formatting.short(part(row, "perplexity").get(state))
    return shown if value is None or error is None else f"{shown} ± {formatting.deviation(value * error)}"


def over_dense(row: dict[str, Any], comparison: dict[str, Any]) -> str:
    """1.43× ± 0.01: the last state of a method that was measured, over the dense model."""
    dense, known = finite(part(comparison, "dense").get("perplexity")), part(row, "perplexity")
    last = [state for state in ("cut", "folded", "tuned") if finite(known.get(state)) is not None][-1:]
    if not dense or not last:
        return "–"
    factor, error = float(known[last[0]]) / dense, finite(part(row, "standard_error").get(last[0]))
    return formatting.times(factor) if error is None else formatting.with_error(factor, error)


def probability(value: Any) -> str:
    """A p-value to three places; a dash where there is none."""
    found = finite(value)
    return "–" if found is None else "<0.001" if found < 0.001 else f"{found:.3f}"


def code(value: Any) -> str:
    """Text as a Markdown code span that cannot end early, hold markup, break a table or start a new line."""
    text = formatting.printable(value).replace("`", "'").replace("|", "¦")
    return f"`{text}`" if text else NOT_MEASURED


def prose(value: Any) -> str:
    """Text inside a Markdown sentence, with everything that HTML or Markdown would act on made harmless."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(formatting.printable(value), quote=False))


def whole(value: Any) -> str:
    """1234567 -> 1,234,567"""
    found = finite(value)
    return NOT_MEASURED if found is None else f"{found:,.0f}"


def task_lines(rows: dict[str, Any], retained: dict[str, Any] | None) -> list[str]:
    """Task scores as lines of cells parted by tabs, a heading first; none where no task was asked for.

    Of a dense and a compressed model side by side with what flipped and what is retained; of one model alone,
    where nothing is retained, its scores.
    """
    if not rows:
        return []
    alone = {"chance": "chance", "dense": "score", "dense_stderr": "stderr"}
    both = ("chance", "dense", "dense_stderr", "compressed", "compressed_stderr", "lost", "gained", "p_value")
    columns = alone if retained is None else dict(zip(both, both, strict=True))
    table = [["task", "metric", "items", *columns.values()]]
    for task, row in rows.items():
        for metric, figures_of_metric in {row["metric"]: row, **row["others"]}.items():
            table.append([task, metric, str(row["items"]), *(_cell(figures_of_metric[key]) for key in columns)])
    if retained is not None:
        table.append(["retention", _cell(retained["mean"])])
        table.append(["retention above chance", _cell(retained["above_chance"])])
    return ["\t".join(row) for row in table]


def evaluation_lines(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Figures of packages' evaluations as lines of cells parted by tabs, a heading with the models' names first; none
    where none was asked for."""
    rows = [(name, metric, row) for name, metrics in found.items() for metric, row in metrics.items()]
    models = [key for key in rows[0][2] if key != "higher_is_better"] if rows else []
    table = [["evaluation", "metric", *models]] if rows else []
    table += [[name, metric, *(_cell(row[model]) for model in models)] for name, metric, row in rows]
    return ["\t".join(map(formatting.printable, row)) for row in table]


def _cell(value: Any) -> str:
    """A count whole, any other figure to four places, a dash where there is none."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


# ---- the terminal ------------------------------------------------------------------------------------------


def closing(run: Path) -> tuple[Table, list[Text]]:
    """What a run ends with in the terminal: the table; a line for every verdict that is a caution or a failure, and a
    last one that says what follows. RunError if RUN is no finished run's folder.
    """
    from rich.text import Text

    found = verdicts.read_run(run)
    colours = {"good": "green", "fair": "yellow", "bad": "red", "open": ""}
    lines = [
        Text(f"{verdict.sign} {verdict.words}: {verdict.stage}: {verdict.text}", colours[verdict.mark])
        for verdict in verdicts.verdicts(found)
        if verdict.mark in ("fair", "bad")
    ]
    last = verdicts.conclusion(found)
    lines.append(Text(f"{last.sign} {last.text}", f"bold {colours[last.mark]}".strip()))
    command, name = re.compile(r"(layercut (?:evaluate|export|quantize)) RUN\b"), formatting.printable(run)
    return closing_table(found.summary), [
        Text(command.sub(lambda hit: f"{hit[1]} {name}", line.plain), line.style) for line in lines
    ]


def closing_table(summary: dict[str, Any]) -> Table:
    """The table a run ends with: dense against compressed, and what each stage did, as far as measured."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(formatting.printable(summary.get("model")) or "layercut", style="bold"),
        title_justify="left",
    )
    table.add_column("")
    for heading in ("dense", "compressed", "change"):
        table.add_column(heading, justify="right")
    groups = (
        _size_rows(summary), _perplexity_rows(summary), _task_rows(summary), _speed_rows(summary), _cost_rows(summary),
    )  # fmt: skip
    for rows in groups:
        for number, row in enumerate(rows, start=1):
            table.add_row(*(Text(cell) for cell in row), end_section=number == len(rows))
    return table


Row = tuple[str, str, str, str]


def _size_rows(summary: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    disk = {"before": verdicts.came_with(summary), "after": part(summary, "bytes").get("after")}
    pairs = (("layers", part(summary, "layers"), whole), ("parameters", part(summary, "parameters"), formatting.count))
    for name, pair, show in (*pairs, ("bytes on disk", disk, formatting.size)):
        before, after = pair.get("before"), pair.get("after")
        rows.append((name, show(before), show(after), formatting.change(before, after)))
    rows.insert(1, ("segments removed", "", formatting.label(summary.get("segments")), ""))
    return rows


def _perplexity_rows(summary: dict[str, Any]) -> list[Row]:
    stages = {stage.name: stage for stage in verdicts.stages(summary) if stage.perplexity is not None}
    if not stages:
        return [("perplexity", "", NOT_MEASURED, "")]
    dense = formatting.figure(stages["dense"].perplexity) if "dense" in stages else NOT_MEASURED
    rows = [
        (
            f"perplexity, {name}",
            dense,
            formatting.figure(stage.perplexity),
            stage.over_dense if stage.factor else "",
        )
        for name, stage in stages.items()
        if name != "dense"
    ]
    return rows or [("perplexity", dense, NOT_MEASURED, "")]


def _task_rows(summary: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for row in survival.task_rows(summary):
        if row["main"]:
            name = formatting.printable(f"{row['task']}, {row['metric'] or 'score'}")
            kept = formatting.times(row.get("retention")) if row.get("retention") else ""
            rows.append((name, plus_minus(row, "dense"), plus_minus(row, "compressed"), kept))
    retained = part(summary, "retention")
    for key, name in (("mean", "retention"), ("above_chance", "retention above chance")):
        if finite(retained.get(key)) is not None:
            rows.append((name, "", formatting.percent(retained[key]), ""))
    for row in survival.evaluation_rows(summary):
        figures = (formatting.figure(row[which]) for which in ("dense", "compressed"))
        rows.append((formatting.printable(f"{row['name']}, {row['metric']}"), *figures, row["change"]))
    grid = survival.keys(summary)
    if grid:
        before, after = (f"{grid[which]:.0f}/{grid['trials']:.0f}" for which in ("dense", "compressed"))
        rows.append(("hidden keys found", before, after, ""))
    return rows


def _speed_rows(summary: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for phase in ("prefill", "decode"):
        speed = part(summary, "speed", phase)
        if speed:
            dense, compressed = formatting.figure(speed.get("dense")), formatting.figure(speed.get("compressed"))
            rows.append((f"{phase}, tokens/s", dense, compressed, formatting.times(speed.get("ratio"))))
    cache = part(summary, "speed", "kv_bytes_per_token")
    if cache:
        before, after = cache.get("dense"), cache.get("compressed")
        rows.append(
            ("KV cache per token", formatting.size(before), formatting.size(after), formatting.change(before, after))
        )
    return rows or [("speed", "", NOT_MEASURED, "")]


def _cost_rows(summary: dict[str, Any]) -> list[Row]:
    seconds = part(summary, "seconds")
    rows: list[Row] = [(f"time, {formatting.printable(s)}", "", formatting.duration(t), "") for s, t in seconds.items()]
    if finite(summary.get("peak_rss_bytes")) is not None:
        rows.append(("peak memory", "", formatting.size(summary["peak_rss_bytes"]), ""))
    return rows
