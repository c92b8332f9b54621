"""The pictures of the report, as inline SVG that follows the page's light or dark colours.

Used by `report/page.py` at the end of the journey. matplotlib draws (and is imported only when drawing);
its SVG is then stripped of everything that points outside the page, fixed colours become CSS variables, and
marks get hover titles. No text from the user enters a chart. A chart is None when there is nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

from layercut.report.formatting import count, figure, finite, items, label, part, percent, printable, size, spans
from layercut.report.rounds import Frontier

# Stand-ins for the page's CSS variables: matplotlib wants a colour, and these hardly occur by chance.
INK, MUTED, GRID, ACCENT, SECOND, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SECOND: "second", SURFACE: "surface"}
LOSS_COLOURS = ("#2b7fd0", "#8c86b0", "#e07b28")  # low to high; readable on light and dark, also colour-blind
SIZE = (6.1, 3.9)  # inches of 72 units; the page scales it to its column


@dataclass
class Drawing:
    """A figure being drawn, its axes, and the hover titles of its marks by id."""

    figure: Any
    axes: Any
    name: str
    titles: dict[str, str] = field(default_factory=dict)

    def tip(self, artist: Any, text: str) -> None:
        """Give one mark a hover title."""
        key = f"tip{len(self.titles)}"
        artist.set_gid(key)
        self.titles[key] = text

    def svg(self, description: str) -> str:
        """Finish: the figure as an <svg> element to be put inside a page."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        return inline(buffer.getvalue(), self.name, description, self.titles)


@contextmanager
def drawing(name: str, x: str, y: str) -> Iterator[Drawing]:
    """Axes in the page's style, to be drawn on and finished inside the block."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "layercut", "font.family": "DejaVu Sans", "font.size": 11.5,
        "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "axes.unicode_minus": False,
        "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "axes.axisbelow": True,
        "legend.frameon": False, "legend.fontsize": 10.5, "legend.labelcolor": INK,
        "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=SIZE, layout="constrained")
        axes = canvas.subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.tick_params(length=0)
        yield Drawing(canvas, axes, name)


def inline(text: str, name: str, description: str, titles: dict[str, str] | None = None) -> str:
    """matplotlib's SVG document -> an element without namespaces, style sheets, fixed ids or colours."""
    titles = titles or {}
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
        title = titles.get(parent.get("id", ""))
        if title is not None:
            hover = ElementTree.Element("title")
            hover.text = title
            parent.insert(0, hover)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": description}
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r"#[0-9a-f]{6}\b", lambda hit: _colour(hit[0]), text)


def _colour(code: str) -> str:
    return f"var(--{VARIABLES[code]})" if code in VARIABLES else code


def _log_axis(axis: Any, low: float, high: float) -> None:
    """A log axis whose ticks read 0.5, 1, 2 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Any, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncol=columns,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.3,
        handletextpad=0.5,
    )


# ---- cost of the candidates -----------------------------------------------------------------------------------

Scored = dict[tuple[tuple[int, int], ...], float]


def scored(candidates: list[Any]) -> Scored:
    """Segments -> finite KL, in nats."""
    found: Scored = {}
    for candidate in candidates:
        where, kl = tuple(spans(part(candidate).get("segments"))), finite(part(candidate).get("kl"))
        if where and kl is not None:
            found[where] = kl
    return found


MARKS: dict[str, dict[str, Any]] = {
    "priced exactly": {"marker": "o", "ms": 4.5, "mfc": MUTED, "mec": MUTED},
    "scored by the search": {"marker": "o", "ms": 8, "mfc": "none", "mec": INK, "mew": 1.3},
    "best by exhaustive search": {"marker": "s", "ms": 13, "mfc": "none", "mec": SECOND, "mew": 2},
    "chosen": {"marker": "D", "ms": 7.5, "mfc": ACCENT, "mec": ACCENT},
}


def cost_chart(search: dict[str, Any]) -> str | None:
    """Exact KL over the first layer removed: those priced exactly, those the search scored, its choice, best."""
    verified, oracle = scored(items(search, "candidates")), part(search, "oracle")
    exhaustive = search.get("method") == "exhaustive"
    landscape = scored(items(oracle, "candidates")) or (verified if exhaustive else {})
    everything = {**landscape, **verified}
    if not everything:
        return None
    floor = min((kl for kl in everything.values() if kl > 0), default=1e-6) / 3  # where a cost of 0 is drawn
    place = _places(everything)
    choice, best = tuple(spans(search.get("segments"))), tuple(spans(oracle.get("segments")))
    groups = {
        "priced exactly": landscape,
        "scored by the search": verified if verified != landscape else {},
        "best by exhaustive search": {best: everything[best]} if best in everything else {},
        "chosen": {choice: everything[choice]} if choice in everything else {},
    }
    x = "first layer removed" if all(len(where) == 1 for where in everything) else "candidates by rank"
    with drawing("cost", x, "KL to the dense model, nats") as d:
        d.axes.set_yscale("log")
        _join_equal_lengths(d, landscape, place, floor)
        for name, points in groups.items():
            _mark(d, points, place, floor, name)
        if choice in everything:
            _name_choice(d, choice, everything[choice], place, floor)
        low, high = max(min(everything.values()), floor), max(*everything.values(), floor)
        d.axes.set_ylim(low / max(1.6, (high / low) ** 0.17), high * 1.25)
        d.axes.xaxis.get_major_locator().set_params(integer=True)
        d.axes.margins(x=0.04)
        _log_axis(d.axes.yaxis, low, high)
        _legend(d.axes, 2)
        return d.svg("Cost of each candidate: KL divergence to the dense model over the first layer removed")


def _places(everything: Scored) -> dict[tuple[tuple[int, int], ...], int]:
    """x of each candidate: its first layer, or its rank by cost where a candidate has several segments."""
    if all(len(where) == 1 for where in everything):
        return {where: where[0][0] for where in everything}
    ranked = sorted(everything, key=lambda where: everything[where])
    return {where: rank for rank, where in enumerate(ranked, start=1)}


def _join_equal_lengths(d: Drawing, landscape: Scored, place: dict[Any, int], floor: float) -> None:
    by_length: dict[int, list[tuple[int, float]]] = {}
    for where, kl in landscape.items():
        by_length.setdefault(sum(b - a for a, b in where), []).append((place[where], max(kl, floor)))
    for points in by_length.values():
        d.axes.plot(*zip(*sorted(points), strict=True), color=MUTED, lw=1.4, zorder=1)


def _mark(d: Drawing, points: Scored, place: dict[Any, int], floor: float, name: str) -> None:
    for number, (where, kl) in enumerate(sorted(points.items())):
        legend = name if number == 0 else "_"  # one entry for the group
        (mark,) = d.axes.plot(place[where], max(kl, floor), ls="none", label=legend, **MARKS[name])
        d.tip(mark, f"{label([list(s) for s in where])}: {figure(kl)} nats ({name})")


def _name_choice(d: Drawing, choice: Any, kl: float, place: dict[Any, int], floor: float) -> None:
    """Write the choice and its cost under its mark, without running out of the axes."""
    left, right = min(place.values()), max(place.values())
    at = (place[choice] - left) / (right - left) if right > left else 0.5
    side = "left" if at < 0.2 else "right" if at > 0.8 else "center"
    text = f"{label([list(s) for s in choice])}   {figure(kl)}"
    spot = (place[choice], max(kl, floor))
    style = {"ha": side, "va": "top", "color": ACCENT, "weight": "bold"}
    d.axes.annotate(text, spot, (0, -17), textcoords="offset points", **style)


# ---- the gate's path ---------------------------------------------------------------------------------------


def path_chart(search: dict[str, Any], most_steps: int = 120) -> str | None:
    """Where each particle of the gate stood at each step, coloured by its loss there."""
    steps = [row for row in map(_step, items(search, "path")) if row]
    if not steps:
        return None
    steps = steps[:: math.ceil(len(steps) / most_steps)]
    losses = [loss for _, _, row in steps for loss in row if loss is not None and loss > 0]
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    with drawing("path", "step", "place of the gate (first layer closed)") as d:
        colours = LinearSegmentedColormap.from_list("loss", LOSS_COLOURS, N=32)
        low, high = (min(losses), max(losses)) if losses else (1.0, 1.0)
        norm = LogNorm(low, high if high > low else low * 1.01)

        def shade(loss: float | None) -> Any:
            return MUTED if loss is None else colours(norm(loss))

        for start, stop in spans(search.get("segments")):
            line = d.axes.axhline(start, color=ACCENT, lw=1.3, ls=(0, (4, 3)), zorder=1)
            d.tip(line, f"chosen: {start}:{stop}")
        pairs = [(a, b, i) for a, b in pairwise(steps) for i in range(min(len(a[1]), len(b[1])))]
        lines = [[(a[0], a[1][i]), (b[0], b[1][i])] for a, b, i in pairs]
        paint = [shade(b[2][i]) for _, b, i in pairs]
        d.axes.add_collection(LineCollection(lines, colors=paint, linewidths=2.2, capstyle="round"))
        for step, places, row in (steps[0], steps[-1]):
            for place, loss in zip(places, row, strict=False):
                (mark,) = d.axes.plot(
                    step, place, "o", ms=6.5, mfc=shade(loss), mec=SURFACE, mew=1, zorder=3, clip_on=False
                )
                d.tip(mark, f"step {step:g}: place {place:.2f}, loss {figure(loss)} nats")
        d.axes.margins(0.03, 0.08)
        d.axes.yaxis.get_major_locator().set_params(integer=True)
        d.axes.xaxis.get_major_locator().set_params(integer=True)
        if losses:
            _loss_bar(d.axes, colours, norm, "loss, nats", MUTED)
        return d.svg("Place of each particle of the gate over the steps of the search, coloured by its loss")


def _step(row: Any) -> tuple[float, list[float], list[float | None]] | None:
    """One row of the path, or None if it is not numbers. Losses that are not finite are None."""
    step = finite(part(row).get("step"))
    places = [finite(place) for place in items(row, "places")]
    losses = [loss if (loss := finite(value)) and loss > 0 else None for value in items(row, "losses")]
    known = [place for place in places if place is not None]
    if step is None or not known or len(known) != len(places):
        return None
    return step, known, losses + [None] * (len(known) - len(losses))


def _loss_bar(axes: Any, colours: Any, norm: Any, label: str, ink: str, **place: Any) -> None:
    from matplotlib.cm import ScalarMappable

    place = place or {"pad": 0.02, "fraction": 0.045, "aspect": 24}
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, **place)
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # no hairlines between the colours
    bar.set_label(label, color=ink)
    _log_axis(bar.ax.yaxis if bar.orientation == "vertical" else bar.ax.xaxis, norm.vmin, norm.vmax)
    bar.ax.tick_params(length=0, which="both")


# ---- the price of every segment ----------------------------------------------------------------------------

Prices = dict[tuple[int, int], float]


def prices(found: dict[str, Any]) -> Prices:
    """(start, stop) -> finite KL in nats, of the "triangle" of search.json or compare.json."""
    rows = [row for row in items(found, "triangle") if isinstance(row, list) and len(row) == 3]
    known = {bounds[0]: kl for *pair, kl in rows if (bounds := spans([pair]))}
    return {bounds: value for bounds, kl in known.items() if (value := finite(kl)) is not None}


def triangle_chart(search: dict[str, Any]) -> str | None:
    """KL of every segment, first layer over length, as a heat map; the chosen segments are framed."""
    known = prices(search)
    if not known:
        return None
    with drawing("triangle", "first layer removed", "layers removed") as d:
        cells = paint_prices(d.axes, known, left=-0.5, ink=MUTED)
        cheapest = cheapest_by_length(known)
        for bounds, cell in cells.items():
            most = ", the cheapest of its length" if bounds in cheapest else ""
            d.tip(cell, f"{label([list(bounds)])}: {figure(known[bounds])} nats{most}")
        for start, stop in cheapest:
            d.axes.plot(start, stop - start, "o", ms=3.6, mfc=SURFACE, mec="none", ls="none")
        for start, stop in spans(search.get("segments")):
            (frame,) = d.axes.plot(
                start, stop - start, "s", ms=13, mfc="none", mec=INK, mew=2.2, ls="none", clip_on=False
            )
            d.tip(frame, f"chosen: {start}:{stop}")
        return d.svg("KL divergence of every segment: first layer removed across, number of layers up")


def paint_prices(axes: Any, known: Prices, *, left: float, ink: str, **bar: Any) -> dict[tuple[int, int], Any]:
    """A heat map of segments on axes: x the first layer (each cell begins `left` of it), y the length, colour log KL.

    Returns each segment's cell.
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.patches import Rectangle

    above = [kl for kl in known.values() if kl > 0]
    low, high = (min(above), max(above)) if above else (1e-6, 1e-6)
    norm = LogNorm(low, high if high > low else low * 1.01)
    # of 50 colours or more, matplotlib would make the bar a bitmap
    colours = LinearSegmentedColormap.from_list("loss", LOSS_COLOURS, N=32)
    cells = {}
    for (start, stop), kl in sorted(known.items()):
        colour = colours(norm(max(kl, low)))
        cells[start, stop] = Rectangle((start + left, stop - start - 0.5), 1, 1, fc=colour, ec=colour, lw=0.3)
        axes.add_patch(cells[start, stop])
    axes.set_xlim(min(s for s, _ in known) + left, max(s for s, _ in known) + left + 1)
    axes.set_ylim(min(b - a for a, b in known) - 0.5, max(b - a for a, b in known) + 0.5)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    _loss_bar(axes, colours, norm, "KL, nats", ink, **bar)
    return cells


def cheapest_by_length(known: Prices) -> set[tuple[int, int]]:
    """The cheapest segment of each length; the first of equals."""
    best: dict[int, tuple[float, tuple[int, int]]] = {}
    for (start, stop), kl in sorted(known.items()):
        best[stop - start] = min(best.get(stop - start, (kl, (start, stop))), (kl, (start, stop)))
    return {bounds for _, bounds in best.values()}


# ---- tuning ------------------------------------------------------------------------------------------------


def tuning_chart(heal: dict[str, Any]) -> str | None:
    """Training and held-out loss over the tokens seen, with the state that was kept."""
    from matplotlib.ticker import FuncFormatter

    tuning = part(heal, "tuning")
    train, held = _curve(items(tuning, "curve")), _curve(items(tuning, "heldout"))
    if not train and not held:
        return None
    unit = printable(tuning.get("unit") or "nats")
    objective = {"kl": "KL to the dense model, nats"}.get(str(tuning.get("objective")), f"loss, {unit}")
    with drawing("tuning", "tokens trained on", objective) as d:
        if train:
            d.axes.plot(
                [t for _, t, _ in train],
                [loss for _, _, loss in train],
                color=MUTED,
                lw=1.1,
                label="training",
            )
        if held:
            d.axes.plot([t for _, t, _ in held], [loss for _, _, loss in held], color=ACCENT, lw=2, label="held-out")
        for step, tokens, loss in held:
            (mark,) = d.axes.plot(tokens, loss, "o", ms=5, mfc=ACCENT, mec=SURFACE, mew=0.8)
            d.tip(mark, f"step {step:g}, {count(tokens)} tokens: held-out loss {figure(loss)}")
        best = [row for row in held or train if row[0] == finite(tuning.get("best_step"))]
        for step, tokens, loss in best[:1]:
            (mark,) = d.axes.plot(tokens, loss, "o", ms=14, mfc="none", mec=SECOND, mew=2, ls="none", label="kept")
            d.tip(mark, f"kept: step {step:g}, loss {figure(loss)}")
        d.axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1e3 else f"{value:g}")
        )
        d.axes.margins(0.03, 0.1)
        _legend(d.axes, 3)
        return d.svg("Loss over the tokens trained on: training, held-out, and the step that was kept")


def _curve(rows: list[Any]) -> list[tuple[float, float, float]]:
    """(step, tokens, loss) of the rows that have all three, at most about 400 of them."""
    found = []
    for row in rows:
        step, tokens, loss = (finite(part(row).get(key)) for key in ("step", "tokens", "loss"))
        if step is not None and tokens is not None and loss is not None:
            found.append((step, tokens, loss))
    return found[:: max(1, math.ceil(len(found) / 400))]


# ---- long context ------------------------------------------------------------------------------------------


def position_chart(rows: list[tuple[int, int, float | None, float | None]]) -> str | None:
    """Perplexity over the position in the text, dense and compressed: (start, stop, dense, compressed) a bucket."""
    known = [row for row in rows if any(value is not None and value > 0 for value in row[2:])]
    if len(known) < 2:
        return None
    from matplotlib.ticker import FuncFormatter, NullLocator

    with drawing("positions", "position in the text, tokens", "perplexity") as d:
        d.axes.set_xscale("log")
        for which, name, colour in ((2, "dense", MUTED), (3, "compressed", ACCENT)):
            points = [(math.sqrt(row[0] * row[1]), row[which], row) for row in known if row[which] is not None]
            d.axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, lw=2, label=name)
            for x, y, (start, stop, *_) in points:
                (mark,) = d.axes.plot(x, y, "o", ms=6, mfc=colour, mec=SURFACE, mew=0.8)
                d.tip(mark, f"positions {start:,} to {stop - 1:,}: {figure(y)} ({name})")
        d.axes.set_xticks([stop for _, stop, _, _ in known])
        d.axes.xaxis.set_minor_locator(NullLocator())
        d.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        d.axes.set_xlim(math.sqrt(known[0][0] * known[0][1]) / 1.3, known[-1][1] * 1.05)
        d.axes.set_ylim(0, 1.1 * max(v for row in known for v in row[2:] if v is not None))
        _legend(d.axes, 2)
        return d.svg("Perplexity over the position in the text: dense and compressed")


# ---- size against loss -------------------------------------------------------------------------------------

BIT_COLOURS = {16: MUTED, 8: ACCENT, 4: SECOND}


def frontier_chart(frontier: Frontier | None) -> str | None:
    """Rise of perplexity over size, a series for each number of bits, with the choice and the budgets."""
    known = [p for p in frontier.points if math.isfinite(p.rise)] if frontier else []
    if not frontier or not known:
        return None
    with drawing("frontier", "size, MB", "rise in perplexity, %") as d:
        for bits in sorted({p.bits for p in known}, reverse=True):
            series = sorted((p for p in known if p.bits == bits), key=lambda p: p.bytes)
            places, colour = [(p.bytes / 1e6, 100 * p.rise) for p in series], BIT_COLOURS.get(bits, INK)
            d.axes.plot(*zip(*places, strict=True), color=colour, lw=1.6, label=f"{bits} bits")
            for point, (x, y) in zip(series, places, strict=True):
                (mark,) = d.axes.plot(x, y, "o", ms=6, mfc=colour, mec=SURFACE, mew=0.8)
                d.tip(mark, f"{point.words}{', chosen' if point.chosen else ''}")
        for number, point in enumerate(p for p in known if p.chosen):
            (ring,) = d.axes.plot(
                point.bytes / 1e6, 100 * point.rise, "o", ms=14, mfc="none", mec=INK, mew=2, ls="none",
                label="chosen" if number == 0 else "_",
            )  # fmt: skip
            d.tip(ring, f"chosen: {point.words}")
        _mark_budgets(d, frontier)
        _rise_axis(d.axes, frontier, [100 * p.rise for p in known])
        d.axes.margins(x=0.08)
        _legend(d.axes, 5)
        return d.svg("Rise in perplexity over size in megabytes, by number of bits, with the budgets and the choice")


def _mark_budgets(d: Drawing, frontier: Frontier) -> None:
    """Dashed lines that may not be exceeded: upwards the loss, to the right the size."""
    dashed: dict[str, Any] = {"color": INK, "lw": 1.2, "ls": (0, (4, 3)), "zorder": 1}
    lines = []
    if frontier.loss is not None:
        line = d.axes.axhline(100 * frontier.loss, **dashed)
        lines.append((line, f"budget: perplexity up by {percent(frontier.loss)}"))
    if frontier.size is not None:
        lines.append((d.axes.axvline(frontier.size / 1e6, **dashed), f"budget: {size(frontier.size)}"))
    for number, (line, words) in enumerate(lines):
        line.set_label("budget" if number == 0 else "_")
        d.tip(line, words)


def _rise_axis(axes: Any, frontier: Frontier, rises: list[float]) -> None:
    """Per cent; where some points are far beyond the budget, only the range around it stays linear."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    budget = 100 * frontier.loss if frontier.loss is not None else max(map(abs, rises))
    crowded = 0.0
    if max(map(abs, rises)) > 10 * budget:
        axes.set_yscale("symlog", linthresh=budget, linscale=0.7)
        axes.yaxis.set_minor_locator(NullLocator())
        crowded = budget  # ticks below it would be written over that of 0
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "" if 0 < abs(value) < crowded else f"{value:g}"))
    axes.margins(y=0.1)


# ---- the layer stack ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layer of the stack before or after, in per cent of the width; drawn by stack.svg."""

    x: float
    width: float
    kind: str
    """kept, removed or tuned."""
    folded: bool
    index: int
    """In the dense model."""
    title: str


@dataclass(frozen=True, kw_only=True)
class LayerPicture:
    """The stack before and after, and the bands that join the runs of layers that stay."""

    before: list[Cell]
    after: list[Cell]
    bands: list[tuple[float, float, float, float]]
    """Left and right edge above, left and right edge below; in layers."""
    layers: int

    @property
    def kinds(self) -> list[str]:
        """Those that occur, for the legend."""
        found = {cell.kind for cell in self.before} | {"folded" for cell in self.before if cell.folded}
        return [kind for kind in ("kept", "removed", "tuned", "folded") if kind in found]


def stack(summary: dict[str, Any], heal: dict[str, Any]) -> LayerPicture | None:
    """Geometry of the picture of the layer stack."""
    layers = part(summary, "layers").get("before")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= 2000:
        return None
    gone = {i for start, stop in spans(summary.get("segments")) for i in range(start, stop)}
    kept = [i for i in range(layers) if i not in gone]
    now = {old: new for new, old in enumerate(kept)}
    tuned = {
        kept[i] for i in items(part(heal, "tuning"), "trained_layers") if isinstance(i, int) and 0 <= i < len(kept)
    }
    folded = {s - 1 for fold in items(heal, "fold") for s, _ in spans([part(fold).get("segment")])}

    def cell(old: int, at: float) -> Cell:
        kind = "removed" if old in gone else "tuned" if old in tuned else "kept"
        title = f"layer {old}: removed" if old in gone else f"layer {old}, now layer {now[old]}: "
        if old not in gone:
            title += (
                ", ".join(w for w, yes in (("folded", old in folded), ("tuned", old in tuned)) if yes) or "unchanged"
            )
        return Cell(
            x=100 * (at + 0.07) / layers,
            width=86 / layers,
            kind=kind,
            folded=old in folded,
            index=old,
            title=title,
        )

    shift = (layers - len(kept)) / 2
    runs: list[list[int]] = []
    for old in kept:
        if runs and runs[-1][-1] == old - 1:
            runs[-1].append(old)
        else:
            runs.append([old])
    return LayerPicture(
        before=[cell(old, old) for old in range(layers)],
        after=[cell(old, new + shift) for new, old in enumerate(kept)],
        bands=[(r[0], r[-1] + 1, now[r[0]] + shift, now[r[-1]] + 1 + shift) for r in runs],
        layers=layers,
    )
