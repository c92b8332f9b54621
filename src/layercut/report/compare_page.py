"""A comparison of search methods, from compare.json: the same tables on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.files import write_atomically
from layercut.report.formatting import (
    Json,
    dash,
    deviation,
    figure,
    finite,
    layer_names,
    number,
    page,
    percent,
    printable,
    short_name,
    source_name,
    spans,
    times,
    whole,
    whole_number,
)
from layercut.report.run_facts import hits_of, last_stage, read_json
from layercut.report.sections import Section, Table
from layercut.report.verdicts import SIGNIFICANT

if TYPE_CHECKING:
    from rich.console import RenderableType

PAGE_ONLY = ("over dense", "KL on probes")
"""Heads of the columns from which on eighty columns hold no more."""


def write_comparison(run: Path) -> Path:
    """Write RUN/compare.html from compare.json, atomically, and return its path."""
    found, target = read_json(run / "compare.json"), run / "compare.html"
    before, after, layers = finite(found.layers.before), finite(found.layers.after), whole_number(found.layers.before)
    removed = whole(before - after) if before is not None and after is not None else "some"
    strips = [(printable(row.method), spans(row.segments)) for row in by_kl(found)] if 0 < (layers or 0) <= 2000 else []
    title = f"{len(list(found.methods))} ways to remove {removed} of {whole(before)} layers"
    facts = {"name": short_name(found.model), "title": title, "layers": layers, "strips": strips}
    text = page("compare.html", **facts, sections=sections_of(found))
    with write_atomically(target) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return target


def printed(comparison: Any) -> Iterator[RenderableType]:
    """The tables as the terminal shows them."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    for section in sections_of(Json(comparison)):
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


def sections_of(found: Json) -> list[Section]:
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
    lora = any(finite(row.perplexity.lora) is not None for row in found.methods)
    states = ["cut", "folded", *(["tuned"] if found.tuning else []), *(["lora"] if lora else [])]
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
