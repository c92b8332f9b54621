"""A finished run, and a comparison of search methods, as a page and as what the terminal shows at the end.

`write_report` makes report.html or compare.html from the JSON files of a run folder, one file that needs nothing beside
it. Whatever a user or a model wrote is escaped, and the page's content policy forbids scripts and the network.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.files import write_atomically
from layercut.report import charts, sections
from layercut.report.formatting import (
    Json,
    change,
    dash,
    deviation,
    figure,
    finite,
    label,
    layer_names,
    number,
    page,
    percent,
    printable,
    short_name,
    size,
    source_name,
    spans,
    times,
    whole,
    whole_number,
)
from layercut.report.run_facts import evaluation_rows, hits_of, last_stage, read_json, read_run, source_bytes
from layercut.report.sections import Section, Table
from layercut.report.verdicts import LIMITS, SIGNIFICANT, conclusion, size_alone, title, verdicts

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

PRUNED = {"compressed": "pruned", "compressed_stderr": "pruned_stderr"}
"""Names of artefacts that people know by others."""
PAGE_ONLY = ("over dense", "KL on probes")
"""Heads of a comparison's columns from which on eighty columns of a terminal hold no more."""


def write_report(run: Path) -> Path:
    """Write RUN/report.html, or compare.html of a comparison, atomically, and return its path.

    RunError if RUN is no finished run's folder.
    """
    if (run / "compare.json").is_file() and not (run / "summary.json").is_file():
        target, text = run / "compare.html", comparison_page(read_json(run / "compare.json"))
    else:
        found, target = read_run(run), run / "report.html"
        text = page(
            "report.html", run=found, name=short_name(found.summary.model), title=title(found.summary),
            conclusion=conclusion(found), verdicts=verdicts(found), limits=LIMITS,
            stack=charts.layer_stack(found.summary, found.heal), samples=list(found.evaluation.generations),
            sections=sections.of(found, sections.PAGE),
        )  # fmt: skip
    with write_atomically(target) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return target


def comparison_page(found: Json) -> str:
    before, after, layers = finite(found.layers.before), finite(found.layers.after), whole_number(found.layers.before)
    removed = whole(before - after) if before is not None and after is not None else "some"
    strips = [(printable(row.method), spans(row.segments)) for row in by_kl(found)] if 0 < (layers or 0) <= 2000 else []
    title = f"{len(list(found.methods))} ways to remove {removed} of {whole(before)} layers"
    facts = {"name": short_name(found.model), "title": title, "layers": layers, "strips": strips}
    return page("compare.html", **facts, sections=comparison(found))


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
        states = f"{figure(found.summary.perplexity.dense)} → {figure((last_stage(found.summary) or ('', None))[1])}"
        lines["quality"] = f"{states}, {quality.figure} {quality.text}"
    for name, verdict in (("skills", "Recall and skills"), ("tasks", "Tasks")):
        if kept := known.get(verdict):
            lines[name] = f"{kept.figure} {kept.text}"
    for name, metric, *figures in evaluation_rows(found.summary):
        lines[f"{name}, {metric}"] = "{} → {} {}".format(*figures).rstrip()
    alike: dict[str, list[str]] = {}
    for engine, reads, _ in sections.engine_rows(found.summary.consumers):
        alike.setdefault(reads, []).append(engine)
    if alike:
        lines["engines"] = "; ".join(f"{reads}: {', '.join(names)}" for reads, names in alike.items())
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


# ---- a comparison of methods -----------------------------------------------------------------------------------


def comparison_tables(found: Any) -> Iterator[RenderableType]:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    for section in comparison(Json(found)):
        for table in section.tables if section.name != "texts" else ():
            drawn = RichTable(title=Text(section.title, style="bold"), title_justify="left", caption=Text(section.note),
                              caption_justify="left", box=box.SIMPLE, pad_edge=False)  # fmt: skip
            drawn.collapse_padding = True
            shown = next((i for i, head in enumerate(table.heads) if head in PAGE_ONLY), len(table.heads))
            for i, head in enumerate(table.heads[:shown]):
                drawn.add_column(Text(head), justify="left" if i < 2 else "right", no_wrap=i != 1)
            for row in table.rows:
                drawn.add_row(*map(Text, row[:shown]))
            yield drawn


def comparison(found: Json) -> list[Section]:
    """What each method removes and what that costs; the same by text; and what each cut still does."""
    made, texts = [_methods(found)], [name for name, _ in found.dense.texts.entries()]
    if len(texts) > 1:
        states = [("dense", "–", found.dense.texts)]
        states += [(printable(row.method), state, of) for row in by_kl(found) for state, of in row.texts.entries()]
        rows = [[method, state, *(figure(of[text]) for text in texts)] for method, state, of in states]
        table = Table(["method", "state", *map(source_name, texts)], rows)
        made.append(Section("texts", "Perplexity of each text alone", "", [table]))
    judged = [("dense", "", found.judged_dense)] if found.judged_dense else []
    judged += [(printable(row.method), state, of) for row in found.methods for state, of in row.judged.entries()]
    return [*made, _survival(found, judged)] if judged else made


def by_kl(found: Json) -> list[Json]:
    """The methods, from the cheapest cut to the dearest; those without a finite KL last."""
    return sorted(found.methods, key=lambda row: math.inf if (kl := finite(row.kl)) is None else kl)


def _methods(found: Json) -> Section:
    named = [s for s in ("lora", "control") if any(finite(row.perplexity[s]) is not None for row in found.methods)]
    states = ["cut", "folded", *(["tuned"] if found.tuning else []), *named]
    rows, dense = [], finite(found.dense.perplexity)
    for row in by_kl(found):
        cells = [dash(row.perplexity[state]) for state in states]
        cells = ["refused", *cells[1:]] if row.refused else cells
        last = last_stage(row)
        error = finite(row.standard_error[last[0]]) if last else None
        off = "–" if last is None or error is None else deviation(last[1] * error)
        over = times(last[1] / dense, error) if last and dense else "–"
        cost = figure(row.search_seconds), whole(row.layer_forwards), whole(row.layer_backwards)
        rows.append([printable(row.method), layer_names(row.segments), figure(row.kl), *cells, off, over, *cost])
    note = (
        f"KL of the plain cut on {whole(found.calibration.tokens)} tokens of {source_name(found.calibration.source)}; "
        f"perplexity on {whole(found.evaluation.tokens)} tokens of {source_name(found.evaluation.source)} "
        f"(dense {figure(dense)})"
    )
    note += f", each tuned on the same {whole(found.tuning.tokens)} tokens" if found.tuning else ""
    note += "; ± one standard error of the last state, paired with the dense model's windows."
    note += "".join(f" {printable(row.method)}: {printable(row.refused)}." for row in found.methods if row.refused)
    heads = ["method", "removed", "KL, nats", *(f"ppl {state}" for state in states), "±"]
    table = Table([*heads, "over dense", "search, s", "forwards", "backwards"], rows, wide=1)
    return Section("methods", "What each method removes, and what that costs", note, [table])


def _survival(found: Json, rows: list[tuple[str, str, Json]]) -> Section:
    tasks, cuts = dict(found.tasks.entries()), [judged for _, state, judged in rows if state]
    every = [pair for *_, judged in rows for pair in judged.evaluations.entries()]
    own = list(dict.fromkeys((name, metric) for name, metrics in every for metric, _ in metrics.entries()))
    cells = []
    for method, state, judged in rows:
        line = [method, state or "–", *(_retention(judged, state, cuts) if tasks else [])]
        line += [hits_of(judged["keys"]), hits_of(judged.lists), _answered(judged, state, cuts)]
        line += [dash(judged.evaluations[name][metric]) for name, metric in own]
        kls = [kl for _, each in judged.capabilities.kl.entries() if (kl := number(each)) is not None]
        line += [figure(sum(kls) / len(kls)) if kls and state else "–"]
        line += [dash(judged.health.compressed.repeated_4grams, percent)]
        for name, task in tasks.items():
            line.append(dash(judged.scores[name], figure if task.share == False else percent))  # noqa: E712
        cells.append(line)
    note = "Keys, lists: found of those hidden; probes: answers given, mean over kinds."
    if tasks:
        about = ", ".join(f"{printable(name)} ({whole(task['items'])} items)" for name, task in tasks.items())
        first = printable(next(iter(found.methods), Json()).method)
        note += (
            f" Kept: mean over {about} of score / dense score, and of what is above chance; behind: what {first} keeps "
            f"less this; ± one standard error, paired over the items; * p < {SIGNIFICANT:g}."
        )
    heads = ["method", "state", *(["kept %", "above chance", "behind"] if tasks else []), "keys", "lists", "probes"]
    heads += [*(f"{name} {metric}" for name, metric in own), "KL on probes", "repeats", *tasks]
    return Section("survives", "What each cut still does", note, [Table(heads, cells)])


def _retention(judged: Json, state: str, cuts: list[Json]) -> list[str]:
    """What is kept of the tasks' scores, of that above chance, and how far it is behind the first method."""
    if not state:  # the dense model, beside which the others are
        measured = [any(finite(cut.retained[key]) is not None for cut in cuts) for key in ("mean", "above_chance")]
        return [*("100" if each else "–" for each in measured), "–"]
    words = []
    for key, error_key in (("mean", "error"), ("above_chance", ""), ("behind", "behind_error")):
        value, error = finite(judged.retained[key]), finite(judged.retained[error_key])
        text = "–" if value is None else f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
        p_value = finite(judged.retained.p_value) if key == "behind" else None
        words.append(f"{text}*" if p_value is not None and p_value < SIGNIFICANT else text)
    return words


def _answered(judged: Json, state: str, cuts: list[Json]) -> str:
    """The share of the probes' answers that greedy decoding gives, mean over kinds; the dense model's from any cut."""
    of = [judged.capabilities.hits] if state else [cut.capabilities.dense_hits for cut in cuts]
    known = next((each.entries() for each in of if each), [])
    shares = [share for _, each in known if (share := finite(each)) is not None]
    return percent(sum(shares) / len(shares)) if shares else "–"
