"""A finished run as a page and as what the terminal shows at its end.

`write_report` makes report.html from the JSON files of a run folder, one file that needs nothing beside it. Whatever a
user or a model wrote is escaped, and the page's content policy forbids scripts and the network.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.files import write_atomically
from layercut.report import charts, sections
from layercut.report.compare_page import write_comparison
from layercut.report.formatting import (
    Json,
    change,
    figure,
    finite,
    label,
    number,
    page,
    percent,
    printable,
    short_name,
    size,
)
from layercut.report.run_facts import evaluation_rows, hits_of, read_run, source_bytes
from layercut.report.verdicts import LIMITS, conclusion, size_alone, title, verdicts

PRUNED = {"compressed": "pruned", "compressed_stderr": "pruned_stderr"}
"""Names of artefacts that people know by others."""

if TYPE_CHECKING:
    from rich.text import Text


def write_report(run: Path) -> Path:
    """Write RUN/report.html, atomically, and return its path; of a run of `compare`, compare.html.

    RunError if RUN is no finished run's folder.
    """
    if (run / "compare.json").is_file() and not (run / "summary.json").is_file():
        return write_comparison(run)
    found, target = read_run(run), run / "report.html"
    text = page(
        "report.html",
        run=found,
        name=short_name(found.summary.model),
        title=title(found.summary),
        conclusion=conclusion(found),
        verdicts=verdicts(found),
        limits=LIMITS,
        stack=charts.layer_stack(found.summary, found.heal),
        samples=list(found.evaluation.generations),
        sections=sections.of(found, sections.PAGE),
    )
    with write_atomically(target) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return target


# ---- the terminal ----------------------------------------------------------------------------------------------


def closing(run: Path, file: Path) -> list[Text]:
    """A run's end in the terminal, a line for each thing: whether to ship it, what was asked for, how to talk to it."""
    from rich.text import Text

    place = printable(shlex.quote(str(run)))
    found = read_run(run, place=place)
    known, last = {verdict.name: verdict for verdict in verdicts(found)}, conclusion(found)
    after, asked = finite(found.summary.bytes.after), file.suffix == ".gguf" and file.is_file()
    lines = {"report": str(run / "report.html"), "file": str(file)}
    if came := source_bytes(found.summary):
        after = file.stat().st_size if asked else after
        lines["size"] = f"{size(came)} → {size(after)}, {change(came, after)}"
    if speed := known.get("Speed"):
        lines["speed"] = f"{speed.figure}, {speed.text}"
    if quality := known.get("Quality"):
        lines["quality"] = f"{quality.figure}, {quality.text}"
        kept = [f"{name.lower()} {one.figure} {one.text}" for name, one in known.items()
                if name in ("Recall and skills", "Tasks")]  # fmt: skip
        lines["quality"] = " ".join([lines["quality"], *kept])
    for name, metric, *figures in evaluation_rows(found.summary):
        lines[f"{name}, {metric}"] = "{} → {} {}".format(*figures).rstrip()
    lines["chat"] = f"layercut chat {place}"
    colour = {"good": "green", "fair": "yellow", "bad": "red", "open": ""}[last.mark]
    told = [Text(printable(title(found.summary)), "bold"), Text(f"{last.sign} {last.text}", f"bold {colour}".strip())]
    told += [Text(alone)] if (alone := size_alone(found)) else []
    return told + [Text(f"{printable(name):<8} {printable(words)}") for name, words in lines.items()]


def search_lines(search: Any) -> list[str]:
    """What `layercut search` prints: the candidates from the best, by all that they are known by."""
    candidates = list(Json(search).candidates)
    heads = {"kl": "KL on text, nats", "probe_kl": "KL on probes, nats", "score": "score"}
    known = [key for key in heads if any(number(each[key]) is not None for each in candidates)]
    rows = [[label(each.segments), *(figure(each[key]) for key in known)] for each in candidates]
    return ["\t".join(row) for row in [["segments", *(heads[key] for key in known)], *rows]]


def evaluation_lines(found: Mapping[str, Any]) -> list[str]:
    """What `layercut evaluate` prints: tables whose cells are parted by tabs, each with a heading."""

    def shown(value: Any) -> str:
        return "-" if value is None else str(value) if isinstance(value, int) else f"{number(value):.4f}"

    rows, retained = (
        [[printable(name), shown(value)] for name, value in found["perplexity"].items()],
        found["retention"],
    )
    if ratio := found["ratio"]:
        error = [] if ratio["standard_error"] is None else [f"± {shown(ratio['standard_error'])}"]
        rows.append(["pruned / dense", shown(ratio["value"]), *error])
    keys = ["dense", "dense_stderr", "compressed", "compressed_stderr", "lost", "gained", "p_value"]
    keys = keys if retained else keys[:2]  # of one model alone each task is compared with itself
    if found["tasks"]:
        rows.append(["task", "metric", "items", "chance", *(keys if retained else ["score", "stderr"])])
    for task, row in found["tasks"].items():
        for metric, figures in [(row["metric"], row), *row["others"].items()]:
            cells = (shown(figures[key]) for key in ["chance", *keys])
            rows.append([printable(task), printable(metric), str(row["items"]), *cells])
    if retained:
        rows += [["retention", shown(retained["mean"])], ["retention above chance", shown(retained["above_chance"])]]
    for index, (name, metrics) in enumerate(found.get("evaluations", {}).items()):
        for metric, row in metrics.items():
            models = [key for key in row if key != "higher_is_better"]
            rows += [["evaluation", "metric", *models]] if index == 0 and metric == next(iter(metrics)) else []
            rows.append([printable(name), printable(metric), *(shown(row[model]) for model in models)])
    rows += _probe_rows(Json(found.get("probes")))
    return ["\t".join(PRUNED.get(cell, cell) for cell in row) for row in rows]


def _probe_rows(probes: Json) -> list[list[str]]:
    if not probes:
        return []
    rows, each = [["", *(printable(name) for name, _ in probes.entries())]], [one for _, one in probes.entries()]
    for name, key in (("hidden keys found", "keys"), ("values found in lists", "lists")):
        rows.append([name, *(hits_of(one[key]) for one in each)])
    for skill, _ in each[-1].capabilities.hits.entries():
        rows.append([f"{skill}: answers", *(percent(one.capabilities.hits[skill]) for one in each)])
        if len(each) > 1:
            rows.append([f"{skill}: KL, nats", "", *(figure(one.capabilities.kl[skill]) for one in each[1:])])
    return rows
