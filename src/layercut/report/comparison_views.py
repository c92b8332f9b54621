"""A comparison of methods as people see it: tables in the terminal and two plots, all made from compare.json.

Beside `page.py`, which makes compare.html of the same. `comparison_table` and `draw_picks` say what each method removes
and what that costs on text; `survival_table` and `draw_survival` what each cut still does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.files.writing import write_atomically
from layercut.report import formatting, thresholds
from layercut.report.formatting import Json, short
from layercut.report.tables import by_kl

if TYPE_CHECKING:
    from rich.table import Table

STATE_COLOURS = {"cut": "#b9b9c6", "folded": "#7d9ad0", "tuned": "#e07b28", "lora": "#5b8c5a"}
"""Of the bars of each state."""


def measured_states(comparison: Any) -> list[str]:
    """The states whose perplexity was measured, in the order in which a cut takes them."""
    comparison = Json(comparison)
    lora = any(formatting.finite(row.perplexity.lora) is not None for row in comparison.methods)
    return ["cut", "folded", *(["tuned"] if comparison.tuning else []), *(["lora"] if lora else [])]


def comparison_table(comparison: dict[str, Any]) -> Table:
    """The methods from the lowest calibration KL, with their cost."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    layers, evaluation, tuning = comparison["layers"], comparison["evaluation"], comparison["tuning"]
    dense, states = formatting.figure(comparison["dense"]["perplexity"]), measured_states(comparison)
    costs = len(states) < 4  # eighty columns hold no more
    table = Table(
        title=Text(f"{comparison['model']}: {layers['before']} -> {layers['after']} layers", style="bold"),
        caption=Text(
            f"KL on {comparison['calibration']['tokens']:,} calibration tokens, perplexity (dense {dense}) on "
            f"{evaluation['tokens']:,} tokens of {evaluation['source']}"
            + (f", each tuned on the same {tuning['tokens']:,} tokens" if tuning else "")
            + "; ± one standard error of the last ppl, paired with the dense model's windows"
            + ("; fwd and bwd are layers times rows" if costs else "; what searching cost: compare.html")
        ),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,  # eighty columns are enough for every column
    )
    table.add_column("method", no_wrap=True)
    table.add_column("removed", min_width=8)
    for heading in ("KL", *(f"ppl\n{state}" for state in states), "±", *(("s", "layers\nfwd+bwd") if costs else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in by_kl(comparison):
        passes = [formatting.count(n) for n in (row["layer_forwards"], row["layer_backwards"]) if n]
        spent = [f"{row['search_seconds']:.0f}", "+".join(passes) or "0"] if costs else []
        perplexities = ["-" if row["perplexity"].get(s) is None else short(row["perplexity"][s]) for s in states]
        table.add_row(
            Text(row["method"]),
            Text(formatting.label(row["segments"])),
            formatting.figure(row["kl"]),
            *(["refused", *perplexities[1:]] if row["refused"] else perplexities),
            error_beside(row, states),
            *spent,
        )
    return table


def error_beside(row: dict[str, Any], states: list[str]) -> str:
    """Standard error of the last state's perplexity that was measured."""
    known = [s for s in states if row["perplexity"].get(s) is not None]
    both = ("perplexity", "standard_error")
    value, error = (formatting.finite(row[key].get(known[-1])) if known else None for key in both)
    return "-" if value is None or error is None else formatting.deviation(value * error)


def draw_picks(comparison: dict[str, Any], path: Path) -> None:
    """What each method removes, on the layer axis, as an SVG file; cheapest cut on top, its KL at the right."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, layers = by_kl(comparison), comparison["layers"]["before"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layercut", "text.parse_math": False}):
        canvas = Figure(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
        axes = canvas.subplots()
        for y, row in enumerate(rows):
            spans = formatting.spans(row["segments"])
            axes.broken_barh([(0, layers)], (y - 0.35, 0.7), color="#e4e4ea")
            axes.broken_barh([(start, stop - start) for start, stop in spans], (y - 0.35, 0.7), color="#e07b28")
            axes.text(layers * 1.01, y, formatting.figure(row["kl"]), va="center", fontsize=9)
        axes.vlines(range(1, layers), -0.35, len(rows) - 0.65, color="white", lw=0.8)
        axes.text(layers * 1.01, -0.75, "KL, nats", fontsize=9)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, layers)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer (removed ones coloured)")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        with write_atomically(path) as partial:
            canvas.savefig(partial, format="svg", metadata={"Date": None})


def survivals(comparison: Any) -> Iterator[tuple[str, str, Json]]:
    """(method, state, figures) of everything that was measured beyond perplexity; the dense model first."""
    comparison = Json(comparison)
    if comparison.judged_dense:
        yield "dense", "", comparison.judged_dense
    for row in comparison.methods:
        for state, judged in row.judged.entries():
            yield str(row.method), state, judged


def by_text(comparison: Any) -> Iterator[tuple[str, str, Json]]:
    """(method, state, perplexity of each text) of everything that was measured; the dense model first."""
    comparison = Json(comparison)
    yield "dense", "", comparison.dense.texts
    for row in by_kl(comparison):
        for state in measured_states(comparison):
            if row.texts[state]:
                yield str(row.method), state, row.texts[state]


def _counted(grid: Json) -> tuple[float, float]:
    """How many were found, of how many."""
    hits, trials = (sum(formatting.finite(cell[key]) or 0 for cell in grid) for key in ("found", "trials"))
    return hits, trials


def found(grid: Json) -> str:
    """How many keys or values were found, of how many; "-" where that is not known."""
    hits, trials = _counted(grid)
    return f"{hits:.0f}/{trials:.0f}" if trials else "-"


def retention_words(judged: Json, key: str = "mean") -> str:
    """A share of the dense model's scores with its standard error: 91.2 ± 0.8, in percent."""
    kept = judged.retained
    value, error = (formatting.finite(kept[name]) for name in (key, "error" if key == "mean" else f"{key}_error"))
    if value is None:
        return "-"
    words = f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
    p_value = formatting.finite(kept.p_value) if key == "behind" else None
    return words + ("*" if p_value is not None and p_value < thresholds.SIGNIFICANT else "")


def repeats(judged: Json) -> str:
    """Share of the 4-grams of the model's own text that occurred before in it."""
    share = formatting.finite(judged.health.compressed.repeated_4grams)
    return "-" if share is None else formatting.percent(share)


def answered(comparison: Any, state: str, judged: Json) -> str:
    """The share of the generated tests' answers that greedy decoding gives, mean over capabilities."""
    cuts = [judged] if state else [each for _, its_state, each in survivals(comparison) if its_state]
    of = (each.capabilities["hits" if state else "dense_hits"].entries() for each in cuts)
    shares = (formatting.finite(value) for _, value in next(filter(None, map(list, of)), []))
    known = [share for share in shares if share is not None]
    return formatting.percent(sum(known) / len(known)) if known else "-"


def damage(judged: Json) -> str:
    """The mean damage to the capabilities, in nats per answer token."""
    each = (formatting.number(value) for _, value in judged.capabilities.damage.entries())
    known = [value for value in each if value is not None]
    mean = sum(known) / len(known) if known else None
    return "-" if mean is None else f"{mean:.2f}" if math.isfinite(mean) else "not finite"


def own_figures(comparison: Any) -> list[tuple[str, str]]:
    """(evaluation, metric) of every figure that the evaluations of packages gave, in the order they came in."""
    every = (judged.evaluations.entries() for *_, judged in survivals(comparison))
    named = ((name, metric) for some in every for name, metrics in some for metric, _ in metrics.entries())
    return list(dict.fromkeys(named))


def own_figure(judged: Json, name: str, metric: str) -> str:
    """A figure of a package's evaluation; "-" where it is not known."""
    value = formatting.finite(judged.evaluations[name][metric])
    return "-" if value is None else formatting.figure(value)


def survival_table(comparison: Any) -> Table:
    """What every cut still does, method by method and state by state, beside the dense model."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    tasks = dict(Json(comparison).tasks.entries())
    table = Table(
        title=Text("What survives", style="bold"), caption=Text(survival_caption(tasks)), title_justify="left",
        caption_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    table.add_column("method", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in (*(("kept", "above\nchance", "behind") if tasks else ()), "keys", "lists", "tests"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metric in (others := own_figures(comparison)):
        table.add_column(Text(f"{name}\n{metric}"), justify="right")
    last = ""
    for method, state, judged in survivals(comparison):
        mean, above, behind = retention_cells(comparison, state, judged)
        kept = [mean, above.partition(" ")[0], behind] if tasks else []  # eighty columns hold no more errors
        of_probes = found(judged["keys"]), found(judged.lists), answered(comparison, state, judged)
        own = (Text(own_figure(judged, *which)) for which in others)
        table.add_row(Text("" if method == last else method), state, *kept, *of_probes, *own)
        last = method
    return table


def retention_cells(comparison: Any, state: str, judged: Json) -> list[str]:
    """What is kept of the tasks, what of it is above chance, and how far that is behind the first method."""
    keys = ("mean", "above_chance")
    if state:
        return [retention_words(judged, key) for key in (*keys, "behind")]
    cuts = [each.retained for _, its_state, each in survivals(comparison) if its_state]
    return [*("100" if any(formatting.finite(each[key]) is not None for each in cuts) else "-" for key in keys), "-"]


def survival_caption(tasks: dict[str, Json]) -> str:
    """What the columns of `survival_table` are."""
    items = sorted({whole for task in tasks.values() if (whole := formatting.whole_number(task["items"])) is not None})
    about = " to ".join(f"{n:,}" for n in dict.fromkeys((items[0], items[-1]))) if items else "some"
    kept = (
        f"kept: mean over {', '.join(tasks)} of score / dense, %, and above chance, over those that the dense model "
        f"does not guess; {about} items each, the same for all; behind: the first method's kept less this one's; ± one "
        "standard error, paired over the items; "
        f"* p < {thresholds.SIGNIFICANT:g}; "
    )
    return (kept if tasks else "") + (
        "keys, lists: found of those hidden; tests: answers given to generated tests, mean over capabilities"
    )


# ---- the plot ------------------------------------------------------------------------------------------------

Bar = tuple[float, float | None] | None
"""A length and its standard error."""


def draw_survival(comparison: Any, path: Path) -> None:
    """Retention of task scores and the share of keys and values found, by method and state, as an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    comparison = Json(comparison)
    panels: list[tuple[str, Callable[[Json], Bar]]] = [
        ("score / dense, mean over tasks, %", kept_bar),
        ("hidden keys found, %", lambda judged: share_bar(judged["keys"])),
        ("values found in lists, %", lambda judged: share_bar(judged.lists)),
    ]
    rows = [row for row in comparison.methods if row.judged]
    panels = [(title, of) for title, of in panels if any(of(j) for row in rows for _, j in row.judged.entries())]
    if not panels:
        path.unlink(missing_ok=True)
        return
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layercut", "text.parse_math": False}):
        canvas = Figure(figsize=(max(7, 3 * len(panels) + 1), 1.2 + 0.45 * len(rows)), layout="constrained")
        every = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        named: set[str] = set()
        for axes, (title, bar_of) in zip(every, panels, strict=False):
            for y, row in enumerate(rows):
                several = row.judged.entries()
                step = 0.75 / max(3, len(several))
                for i, (state, judged) in enumerate(several):
                    if bar := bar_of(judged):
                        place = y + step * (i - (len(several) - 1) / 2)
                        draw_bar(axes, (place, 0.88 * step), bar, state, "_" if state in named else state)
                        named.add(state)
            of_dense = share_bar(comparison.judged_dense["keys" if "keys" in title else "lists"])
            axes.axvline(100 if "dense" in title or of_dense is None else of_dense[0], color="black", lw=0.8, ls=":")
            axes.set_xlabel(title)
            axes.spines[["top", "right"]].set_visible(False)
        every[0].set_yticks(range(len(rows)), [str(row.method) for row in rows])
        every[0].set_ylim(len(rows) - 0.4, -0.6)
        canvas.legend(loc="outside upper center", ncols=4, frameon=False)
        with write_atomically(path) as partial:
            canvas.savefig(partial, format="svg", metadata={"Date": None})


def kept_bar(judged: Json) -> Bar:
    """What is retained of the dense model's scores, in percent."""
    value, error = formatting.finite(judged.retained.mean), formatting.finite(judged.retained.error)
    return None if value is None else (100 * value, None if error is None else 100 * error)


def share_bar(grid: Json) -> Bar:
    """The share that was found, in percent."""
    hits, trials = _counted(grid)
    return (100 * hits / trials, None) if trials else None


def draw_bar(axes: Any, place: tuple[float, float], bar: tuple[float, float | None], state: str, name: str) -> None:
    """One bar with its error."""
    colour = STATE_COLOURS.get(state, "#444")
    y, height = place
    axes.barh(y, bar[0], height=height, color=colour, xerr=bar[1], ecolor="#444", capsize=2, label=name)
