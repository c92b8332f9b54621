"""The pictures of the report, as inline SVG that follows the page's light or dark colours.

Used by `report/sections.py` at the end of the journey. matplotlib draws (and is imported only when drawing) in the
style of templates/charts.mplstyle; `inline` strips its SVG of everything that points outside the page, turns fixed
colours into CSS variables, and gives marks hover titles. No markup of the user enters a chart. A chart is None when
there is nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from layercut.report.formatting import (
    Json,
    count,
    figure,
    finite,
    label,
    percent,
    plain,
    printable,
    size,
    spans,
    whole_number,
)
from layercut.report.run_facts import RunFacts
from layercut.report.tables import Frontier, runs_of
from layercut.report.templating import TEMPLATES

# Stand-ins for the page's CSS variables: matplotlib wants a colour, and these hardly occur by chance.
INK, MUTED, GRID, ACCENT, SECOND, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SECOND: "second", SURFACE: "surface"}
LOSS_COLOURS = ("#2b7fd0", "#8c86b0", "#e07b28")  # low to high; readable on light and dark, also colour-blind
Point = tuple[float, float, str]
"""x, y and hover title."""


class Drawing:
    """Axes being drawn on, and the hover titles of their marks."""

    def __init__(self, name: str, description: str, axes: Any) -> None:
        self.name, self.description, self.axes = name, description, axes
        self.titles: dict[str, str] = {}

    def tip(self, artist: Any, title: str) -> None:
        """Give an artist a hover title."""
        artist.set_gid(f"tip{len(self.titles)}")
        self.titles[artist.get_gid()] = title

    def marks(self, points: Iterable[Point], name: str = "_", **style: Any) -> None:
        """Draw a mark with a hover title at each point."""
        for number, (x, y, title) in enumerate(points):
            self.tip(self.axes.plot(x, y, ls="none", label="_" if number else name, **style)[0], title)

    def series(self, points: list[Point], name: str, colour: str) -> None:
        """Draw a line with a mark and a hover title at each point."""
        self.axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=colour, lw=2, label=name)
        self.marks(points, marker="o", ms=6, mfc=colour, mec=SURFACE, mew=0.8)

    def svg(self, legend: int = 0) -> str:
        """Finish: an <svg> element to be put inside a page, with a legend of so many columns above the axes."""
        if legend:
            self.axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=legend)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.axes.figure.savefig(buffer, format="svg", metadata=nothing)
        return inline(buffer.getvalue(), self.name, self.description, self.titles)


@contextmanager
def drawing(name: str, description: str, **axes: Any) -> Iterator[Drawing]:
    """Axes in the page's style, to be drawn on and finished inside the block."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(TEMPLATES / "charts.mplstyle"):
        yield Drawing(name, description, Figure().add_subplot(**axes))


def inline(text: str, name: str, description: str, titles: dict[str, str] | None = None) -> str:
    """An SVG document of matplotlib as an element without namespaces, style sheets, fixed ids or colours."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        parent.attrib = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
        if title := (titles or {}).get(parent.get("id", "")):
            hover = ElementTree.Element("title")
            hover.text = title
            parent.insert(0, hover)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": description}
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", ElementTree.tostring(root, encoding="unicode"))
    return re.sub("|".join(VARIABLES), lambda hit: f"var(--{VARIABLES[hit[0]]})", text)


def _log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks of a log axis that read 0.5, 1, 2 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    steps = range(1, 10) if high / low < 5 else (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _loss_colours(losses: Iterable[float]) -> tuple[Any, Any]:
    """Colour map and logarithmic norm over the losses above 0."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    above = [loss for loss in losses if loss > 0] or [1e-6]
    low, high = min(above), max(above)
    # of 50 colours or more, matplotlib would make the bar a bitmap
    return LinearSegmentedColormap.from_list("loss", LOSS_COLOURS, N=32), LogNorm(low, max(high, low * 1.01), clip=True)


def _loss_bar(axes: Any, colours: Any, norm: Any, title: str, ink: str, **place: Any) -> None:
    from matplotlib.cm import ScalarMappable

    place = place or {"pad": 0.02, "fraction": 0.045, "aspect": 24}
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, **place)
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # no hairlines between the colours
    bar.set_label(title, color=ink)
    _log_axis(bar.ax.yaxis if bar.orientation == "vertical" else bar.ax.xaxis, norm.vmin, norm.vmax)
    bar.ax.tick_params(length=0, which="both")


# ---- the search --------------------------------------------------------------------------------------------

Where = tuple[tuple[int, int], ...]
MARKS: dict[str, dict[str, Any]] = {
    "priced exactly": {"marker": "o", "ms": 4.5, "mfc": MUTED, "mec": MUTED},
    "scored by the search": {"marker": "o", "ms": 8, "mfc": "none", "mec": INK, "mew": 1.3},
    "chosen": {"marker": "D", "ms": 7.5, "mfc": ACCENT, "mec": ACCENT},
}


def _scored(candidates: Json) -> dict[Where, float]:
    """Segments -> finite KL, in nats."""
    found = {tuple(spans(candidate.segments)): finite(candidate.kl) for candidate in candidates}
    return {where: kl for where, kl in found.items() if where and kl is not None}


def cost_chart(search: Any) -> str | None:
    """Exact KL over the first layer removed: of all segments or of those that the search priced, and its choice."""
    search = Json(search)
    everything = _scored(search.candidates)
    landscape = everything if search.method == "exhaustive" else {}
    if not everything:
        return None
    floor = min((kl for kl in everything.values() if kl > 0), default=1e-6) / 3  # where a cost of 0 is drawn
    single, ranked = all(len(where) == 1 for where in everything), sorted(everything, key=everything.__getitem__)
    spots = {where: (where[0][0] if single else ranked.index(where) + 1, max(everything[where], floor))
             for where in everything}  # fmt: skip
    choice = tuple(spans(search.segments))
    groups: dict[str, Iterable[Where]] = {
        "priced exactly": landscape, "scored by the search": {} if landscape else everything,
        "chosen": {choice} & set(everything),
    }  # fmt: skip
    description = "Cost of each candidate: KL divergence to the dense model over the first layer removed"
    x = "first layer removed" if single else "candidates by rank"
    with drawing("cost", description, xlabel=x, ylabel="KL to the dense model, nats", yscale="log") as d:
        for removed in {_length(where) for where in landscape}:
            of_length = sorted(spots[where] for where in landscape if _length(where) == removed)
            d.axes.plot(*zip(*of_length, strict=True), color=MUTED, lw=1.4, zorder=1)
        for name, group in groups.items():
            d.marks([(*spots[w], f"{_named(w)}: {figure(everything[w])} nats ({name})") for w in sorted(group)],
                    name, **MARKS[name])  # fmt: skip
        if choice in everything:  # its name and cost under its mark, without running out of the axes
            left, right = min(x for x, _ in spots.values()), max(x for x, _ in spots.values())
            at = (spots[choice][0] - left) / (right - left) if right > left else 0.5
            side = "left" if at < 0.2 else "right" if at > 0.8 else "center"
            d.axes.annotate(f"{_named(choice)}   {figure(everything[choice])}", spots[choice], (0, -17), ha=side,
                            va="top", textcoords="offset points", color=ACCENT, weight="bold")  # fmt: skip
        low, high = min(y for _, y in spots.values()), max(y for _, y in spots.values())
        d.axes.set_ylim(low / max(1.6, (high / low) ** 0.17), high * 1.25)
        d.axes.locator_params(axis="x", integer=True)
        d.axes.margins(x=0.04)
        _log_axis(d.axes.yaxis, low, high)
        return d.svg(legend=2)


def _length(where: Where) -> int:
    return sum(stop - start for start, stop in where)


def _named(where: Where) -> str:
    return label([list(bounds) for bounds in where])


def map_charts(run: RunFacts) -> list[str]:
    """Damage to each capability without each single layer, and without each longer window that was priced."""
    found = run.capabilities.map
    names = [str(name) for name in found.names]
    cells: dict[int, dict[tuple[int, int], float]] = {}
    for window in found.windows:
        for start, stop in spans([[plain(window.start), plain(window.stop)]]):
            damages = ((i, finite(window.damage[name])) for i, name in enumerate(names))
            known = {(start, i): damage for i, damage in damages if damage is not None}
            cells.setdefault(stop - start, {}).update(known)
    removed = spans(run.summary.segments)
    cells = {length: known for length, known in sorted(cells.items()) if known and length > 0}
    return [_map_chart(length, names, known, removed) for length, known in cells.items()]


def _map_chart(
    length: int, names: Sequence[str], known: dict[tuple[int, int], float], removed: Sequence[tuple[int, int]]
) -> str:
    """A heat map of nats by (first layer, capability), of windows of a length; what was removed is framed."""
    from matplotlib.patches import Rectangle

    where = "layer removed" if length == 1 else f"first of {length} layers removed"
    description = f"Damage to each capability, in nats per answer token: {where} across"
    with drawing(f"map-{length}", description, xlabel=where) as d:
        colours, norm = _loss_colours(damage for damage in known.values() if damage > 0)
        norm.vmin = max(norm.vmin, norm.vmax / 1e3)  # what is smaller is no damage
        for (start, i), damage in sorted(known.items()):
            colour = colours(norm(max(damage, norm.vmin)))
            cell = Rectangle((start - 0.5, i - 0.5), 1, 1, fc=colour, ec=colour, lw=0.3)
            d.axes.add_patch(cell)
            without = f"layer {start}" if length == 1 else f"{start}:{start + length}"
            d.tip(cell, f"without {without}: {names[i]} {figure(damage)} nats")
        for start, stop in removed:
            if length in (1, stop - start):
                wide = stop - start if length == 1 else 1
                frame = Rectangle((start - 0.5, -0.5), wide, len(names), fc="none", ec=INK, lw=1.6, clip_on=False)
                d.axes.add_patch(frame)
                d.tip(frame, f"removed: {start}:{stop}")
        d.axes.set_xlim(-0.5, max(start for start, _ in known) + 0.5)
        d.axes.set_ylim(len(names) - 0.5, -0.5)
        d.axes.set_yticks(range(len(names)), names)
        d.axes.grid(False)
        d.axes.xaxis.get_major_locator().set_params(integer=True)
        _loss_bar(d.axes, colours, norm, "damage, nats", MUTED)
        return d.svg()


# ---- healing, long context, size against loss --------------------------------------------------------------


def tuning_chart(heal: Any) -> str | None:
    """Training and held-out loss over the tokens seen, with the state that was kept."""
    from matplotlib.ticker import EngFormatter

    tuning = Json(heal).tuning
    train, held = _curve(tuning.curve), _curve(tuning.heldout)
    if not train and not held:
        return None
    unit = printable(tuning.unit) or "nats"
    name = printable(tuning.label) or ("KL to the dense model" if tuning.objective == "kl" else "loss")  # an older run
    description = "Loss over the tokens trained on: training, held-out, and the step that was kept"
    with drawing("tuning", description, xlabel="tokens trained on", ylabel=f"{name}, {unit}".replace("$", "")) as d:
        d.axes.plot([t for _, t, _ in train], [loss for *_, loss in train], color=MUTED, lw=1.1, label="training")
        points = [(tokens, loss, f"step {step:g}, {count(tokens)} tokens: held-out loss {figure(loss)}")
                  for step, tokens, loss in held]  # fmt: skip
        d.series(points, "held-out", ACCENT)
        kept = [(tokens, loss, f"kept: step {step:g}, loss {figure(loss)}")
                for step, tokens, loss in held or train if step == finite(tuning.best_step)]  # fmt: skip
        d.marks(kept[:1], "kept", marker="o", ms=14, mfc="none", mec=SECOND, mew=2)
        d.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        d.axes.margins(0.03, 0.1)
        return d.svg(legend=3)


def _curve(rows: Json) -> list[tuple[float, float, float]]:
    """(step, tokens, loss) of the rows that have all three, at most about 400 of them."""
    found = [(finite(row.step), finite(row.tokens), finite(row.loss)) for row in rows]
    known = [(s, t, loss) for s, t, loss in found if s is not None and t is not None and loss is not None]
    return known[:: max(1, math.ceil(len(known) / 400))]


def position_chart(rows: list[tuple[int, int, float | None, float | None]]) -> str | None:
    """Perplexity over the position in the text, dense and compressed: (start, stop, dense, compressed) a bucket."""
    known = [row for row in rows if any(value is not None and value > 0 for value in row[2:])]
    if len(known) < 2:
        return None
    description = "Perplexity over the position in the text: dense and compressed"
    with drawing("positions", description, xlabel="position in the text, tokens", ylabel="perplexity") as d:
        for which, name, colour in ((2, "dense", MUTED), (3, "compressed", ACCENT)):
            points: list[Any] = [
                (math.sqrt(row[0] * row[1]), row[which],
                 f"positions {row[0]:,} to {row[1] - 1:,}: {figure(row[which])} ({name})")
                for row in known if row[which] is not None
            ]  # fmt: skip
            d.series(points, name, colour)
        d.axes.set_xscale("log")
        d.axes.set_xticks([stop for _, stop, *_ in known], minor=False)
        d.axes.set_xticks([], minor=True)
        d.axes.xaxis.set_major_formatter("{x:g}")
        d.axes.set_xlim(math.sqrt(known[0][0] * known[0][1]) / 1.3, known[-1][1] * 1.05)
        d.axes.set_ylim(0, 1.1 * max(v for row in known for v in row[2:] if v is not None))
        return d.svg(legend=2)


def frontier_chart(frontier: Frontier | None) -> str | None:
    """Rise of perplexity over size, a series for each number of bits, with the choice and the budgets."""
    known = [p for p in frontier.points if math.isfinite(p.rise)] if frontier else []
    if not frontier or not known:
        return None
    description = "Rise in perplexity over size in megabytes, by number of bits, with the budgets and the choice"
    with drawing("frontier", description, xlabel="size, MB", ylabel="rise in perplexity, %") as d:
        for bits in sorted({p.bits for p in known}, reverse=True):
            series = sorted((p for p in known if p.bits == bits), key=lambda p: p.bytes)
            colour = {16: MUTED, 8: ACCENT, 4: SECOND}.get(bits, INK)
            points = [(p.bytes / 1e6, 100 * p.rise, f"{p.words}{', chosen' if p.chosen else ''}") for p in series]
            d.series(points, f"{bits} bits", colour)
        ring = [(p.bytes / 1e6, 100 * p.rise, f"chosen: {p.words}") for p in known if p.chosen]
        d.marks(ring, "chosen", marker="o", ms=14, mfc="none", mec=INK, mew=2)
        dashed: dict[str, Any] = {"color": INK, "lw": 1.2, "ls": (0, (4, 3)), "zorder": 1}
        if frontier.loss is not None:
            line = d.axes.axhline(100 * frontier.loss, label="budget", **dashed)
            d.tip(line, f"budget: perplexity up by {percent(frontier.loss)}")
        if frontier.size is not None:
            name = "budget" if frontier.loss is None else "_"
            line = d.axes.axvline(frontier.size / 1e6, label=name, **dashed)
            d.tip(line, f"budget: {size(frontier.size)}")
        _rise_axis(d.axes, frontier, [100 * p.rise for p in known])
        return d.svg(legend=5)


def _rise_axis(axes: Any, frontier: Frontier, rises: list[float]) -> None:
    """Per cent; where some points are far beyond the budget, only the range around it stays linear."""
    from matplotlib.ticker import NullLocator

    budget = 100 * frontier.loss if frontier.loss is not None else max(map(abs, rises))
    crowded = 0.0
    if max(map(abs, rises)) > 10 * budget > 0:
        axes.set_yscale("symlog", linthresh=budget, linscale=0.7)
        axes.yaxis.set_minor_locator(NullLocator())
        crowded = budget  # ticks below it would be written over that of 0
    axes.yaxis.set_major_formatter(lambda value, _: "" if 0 < abs(value) < crowded else f"{value:g}")
    axes.margins(0.08, 0.1)


# ---- the layer stack ---------------------------------------------------------------------------------------


def layer_stack(summary: Json, heal: Json) -> dict[str, Any] | None:
    """What templates/stack.svg draws: the layers before and after, and bands that join the runs of layers that stay."""
    layers = whole_number(summary.layers.before)
    if layers is None or not 0 < layers <= 2000:
        return None
    gone = {i for start, stop in spans(summary.segments) for i in range(start, stop)}
    kept = [i for i in range(layers) if i not in gone]
    now, shift = {old: new for new, old in enumerate(kept)}, (layers - len(kept)) / 2
    tuned = {kept[i] for each in heal.tuning.trained_layers if (i := whole_number(each)) in range(len(kept))}  # type: ignore[index]
    folded = {start - 1 for fold in heal.fold for start, _ in spans([fold.segment])}
    before = [
        {"old": i, "new": now.get(i), "at": i, "folded": i in folded and i in now, "tuned": i in tuned}
        for i in range(layers)
    ]
    return {
        "before": before,
        "after": [cell | {"at": cell["new"] + shift} for cell in before if cell["new"] is not None],
        "bands": [(a, b, now[a] + shift, now[a] + shift + b - a) for a, b in runs_of(set(kept))],
        "layers": layers,
    }
