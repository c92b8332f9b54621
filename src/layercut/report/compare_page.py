"""A comparison of search methods, from compare.json: the same tables on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.files.writing import write_atomically
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
    short,
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


def write_comparison(run: Path) -> Path:
    """Write RUN/compare.html from compare.json, atomically, and return its path."""
    found, target = read_json(run / "compare.json"), run / "compare.html"
    removed, layers = _removed(found), whole_number(found.layers.before) or 0
    strips = [(printable(row.method), spans(row.segments)) for row in by_kl(found)] if 0 < layers <= 2000 else []
    title = f"{len(strips) or len(list(found.methods))} ways to remove {removed} of {whole(found.layers.before)} layers"
    facts = {"name": short_name(found.model), "title": title, "layers": layers, "strips": strips}
    text = page("compare.html", **facts, sections=sections_of(found))
    with write_atomically(target) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return target


def printed(comparison: Any) -> Iterator[RenderableType]:
    """The tables as the terminal shows them, in eighty columns."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    for section in sections_of(Json(comparison), narrow=True):
        for table in section.tables:
            drawn = RichTable(title=Text(section.title, style="bold"), caption=Text(section.note), title_justify="left",
                              caption_justify="left", box=box.SIMPLE, pad_edge=False)  # fmt: skip
            drawn.collapse_padding = True
            for i, head in enumerate(table.heads):
                drawn.add_column(Text(head), justify="left" if i < 2 else "right", no_wrap=i != 1)
            for row in table.rows:
                drawn.add_row(*map(Text, row))
            yield drawn


def sections_of(found: Json, *, narrow: bool = False) -> list[Section]:
    """What each method removes and what that costs; the same by text; and what each cut still does."""
    made = [
        Section(
            "methods", "What each method removes, and what that costs", _methods_note(found), [_methods(found, narrow)]
        )
    ]
    texts = [name for name, _ in found.dense.texts.entries()]
    if len(texts) > 1 and not narrow:
        rows = [[method, state or "–", *(short(of[text]) for text in texts)] for method, state, of in _by_text(found)]
        heads = ["method", "state", *map(source_name, texts)]
        made.append(Section("texts", "Perplexity of each text alone", "", [Table(heads, rows)]))
    if judged := list(survivals(found)):
        made.append(
            Section("survives", "What each cut still does", _survival_note(found), [_survival(found, judged, narrow)])
        )
    return made


def by_kl(found: Json) -> list[Json]:
    """The methods, from the cheapest cut to the dearest; those without a finite KL last."""
    return sorted(found.methods, key=lambda row: math.inf if (kl := finite(row.kl)) is None else kl)


def _removed(found: Json) -> str:
    before, after = finite(found.layers.before), finite(found.layers.after)
    return whole(before - after) if before is not None and after is not None else "some"


# ---- perplexity ------------------------------------------------------------------------------------------------


def states_of(found: Json) -> list[str]:
    """The states whose perplexity was measured, in the order in which a cut takes them."""
    lora = any(finite(row.perplexity.lora) is not None for row in found.methods)
    return ["cut", "folded", *(["tuned"] if found.tuning else []), *(["lora"] if lora else [])]


def _methods(found: Json, narrow: bool) -> Table:
    states, rows = states_of(found), []
    for row in by_kl(found):
        cells = [dash(row.perplexity[state], short) for state in states]
        cells = ["refused", *cells[1:]] if row.refused else cells
        last, dense = last_stage(row), finite(found.dense.perplexity)
        error = finite(row.standard_error[last[0]]) if last else None
        off = "–" if last is None or error is None else deviation(last[1] * error)
        over = [times(last[1] / dense if last and dense else None, error)] if last and dense else ["–"]
        cost = (
            [] if narrow else [*over, figure(row.search_seconds), whole(row.layer_forwards), whole(row.layer_backwards)]
        )
        rows.append([printable(row.method), layer_names(row.segments), figure(row.kl), *cells, off, *cost])
    heads = ["method", "removed", "KL, nats", *(f"ppl {state}" for state in states), "±"]
    return Table(heads if narrow else [*heads, "over dense", "search, s", "forwards", "backwards"], rows, wide=1)


def _methods_note(found: Json) -> str:
    words = (
        f"KL of the plain cut on {whole(found.calibration.tokens)} tokens of {source_name(found.calibration.source)}; "
        f"perplexity on {whole(found.evaluation.tokens)} tokens of {source_name(found.evaluation.source)} "
        f"(dense {figure(found.dense.perplexity)})"
    )
    words += f", each tuned on the same {whole(found.tuning.tokens)} tokens" if found.tuning else ""
    words += "; ± one standard error of the last state, paired with the dense model's windows."
    refused = [f"{printable(row.method)} was refused: {printable(row.refused)}" for row in found.methods if row.refused]
    return " ".join([words, *refused])


def _by_text(found: Json) -> Iterator[tuple[str, str, Json]]:
    yield "dense", "", found.dense.texts
    for row in by_kl(found):
        for state in states_of(found):
            if row.texts[state]:
                yield printable(row.method), state, row.texts[state]


# ---- what survives ---------------------------------------------------------------------------------------------


def survivals(found: Json) -> Iterator[tuple[str, str, Json]]:
    """(method, state, figures) of everything that was measured beyond perplexity; the dense model first."""
    if found.judged_dense:
        yield "dense", "", found.judged_dense
    for row in found.methods:
        for state, judged in row.judged.entries():
            yield printable(row.method), state, judged


def _survival(found: Json, rows: list[tuple[str, str, Json]], narrow: bool) -> Table:
    tasks, cuts = dict(found.tasks.entries()), [judged for _, state, judged in rows if state]
    every = [pair for *_, judged in rows for pair in judged.evaluations.entries()]
    own = list(dict.fromkeys((name, metric) for name, metrics in every for metric, _ in metrics.entries()))
    kept = ["kept %", "above chance", "behind"] if tasks else []
    heads = ["method", "state", *kept, *([] if narrow else tasks), "keys", "lists", "probes"]
    heads += [*([] if narrow else ["KL, nats", "repeats"]), *(f"{name} {metric}" for name, metric in own)]
    cells = []
    for method, state, judged in rows:
        line = [method, state or "–", *(_retention(judged, state, cuts) if tasks else [])]
        for name, task in tasks.items() if not narrow else ():
            score = finite(judged.scores[name])
            line.append("–" if score is None else figure(score) if task.share == False else percent(score))  # noqa: E712
        line += [hits_of(judged["keys"]), hits_of(judged.lists), _answered(judged, state, cuts)]
        if not narrow:
            kls = [kl for _, each in judged.capabilities.damage.entries() if (kl := number(each)) is not None]
            repeats = judged.health.compressed.repeated_4grams
            line += [figure(sum(kls) / len(kls)) if kls and state else "–", dash(repeats, percent)]
        line += [dash(judged.evaluations[name][metric]) for name, metric in own]
        cells.append(line)
    return Table(heads, cells)


def _retention(judged: Json, state: str, cuts: list[Json]) -> list[str]:
    """What is kept of the tasks' scores, of that above chance, and how far it is behind the first method."""
    if not state:  # the dense model, beside which the others are
        return [*("100" if any(finite(cut.retained[key]) is not None for cut in cuts) else "–"
                  for key in ("mean", "above_chance")), "–"]  # fmt: skip
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
    shares = [
        share for _, each in next((each.entries() for each in of if each), []) if (share := finite(each)) is not None
    ]
    return percent(sum(shares) / len(shares)) if shares else "–"


def _survival_note(found: Json) -> str:
    tasks, first = dict(found.tasks.entries()), next(iter(found.methods), Json())
    words = "Keys, lists: found of those hidden; probes: answers given, mean over kinds."
    if not tasks:
        return words
    about = ", ".join(f"{printable(name)} ({whole(task['items'])} items)" for name, task in tasks.items())
    return (
        f"Kept: mean over {about} of score / dense score, and of what is above chance; behind: what "
        f"{printable(first.method)} keeps less this; ± one standard error, paired over the items; "
        f"* p < {SIGNIFICANT:g}. {words}"
    )
