"""The pictures of the report, as inline SVG that follows the page's light or dark colours.

matplotlib draws in the style of templates/charts.mplstyle, imported only when drawing; `inline` strips its SVG of all
that points outside the page, turns fixed colours into CSS variables, and gives marks hover titles. A chart is None when
there is nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from layercut.report.formatting import (
    Json,
    count,
    figure,
    finite,
    label,
    layer_names,
    plain,
    printable,
    spans,
    whole_number,
)
from layercut.report.run_facts import RunFacts, runs_of

STYLE = Path(__file__).parent / "templates" / "charts.mplstyle"
# Stand-ins for the page's CSS variables: matplotlib wants a colour, and these hardly occur by chance.
INK, MUTED, GRID, ACCENT, SECOND, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SECOND: "second", SURFACE: "surface"}
LOW_TO_HIGH = ("#2b7fd0", "#8c86b0", "#e07b28")
"""Readable on light and dark, also colour-blind."""
IN_LAYER = re.compile(r"\.(\d+)\.(.+)")
"""The number of the layer, and what a matrix is called in it."""


class Drawing:
    """Axes in the page's style; marks are given hover titles, and `svg` finishes."""

    def __init__(self, **axes: Any) -> None:
        from matplotlib.figure import Figure

        self.axes = Figure().add_subplot(**axes)
        self.titles: dict[str, str] = {}

    def tip(self, artist: Any, title: str) -> None:
        artist.set_gid(f"tip{len(self.titles)}")
        self.titles[artist.get_gid()] = title

    def marks(self, points: Iterable[tuple[float, float, str]], name: str, **style: Any) -> None:
        """A mark with a hover title at each (x, y, title)."""
        for number, (x, y, title) in enumerate(points):
            self.tip(self.axes.plot(x, y, ls="none", label="_" if number else name, **style)[0], title)

    def svg(self, name: str, description: str, legend: int = 0) -> str:
        """An <svg> element to be put inside a page, with a legend of so many columns above the axes."""
        if legend:
            self.axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=legend)
        buffer = io.StringIO()
        self.axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        return inline(buffer.getvalue(), name, description, self.titles)


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    def styled(*given: Any, **named: Any) -> Any:
        from matplotlib import style

        with style.context(STYLE):
            return draw(*given, **named)

    return styled


def inline(text: str, name: str, description: str, titles: Mapping[str, str]) -> str:
    """An SVG document of matplotlib as an element without namespaces, style sheets, fixed ids or colours."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        parent.attrib = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
        if title := titles.get(parent.get("id", "")):
            hover = ElementTree.Element("title")
            hover.text = title
            parent.insert(0, hover)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": description}
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", ElementTree.tostring(root, encoding="unicode"))
    return re.sub("|".join(VARIABLES), lambda hit: f"var(--{VARIABLES[hit[0]]})", text)


@_styled
def cost_chart(search: Json) -> str | None:
    """KL of each candidate over the first layer that it removes, or over its rank; and the choice."""
    from matplotlib.ticker import LogLocator, NullLocator

    found = {label(one.segments): (spans(one.segments), finite(one.kl)) for one in search.candidates}
    known = {name: (where, kl) for name, (where, kl) in found.items() if where and kl is not None}
    if len(known) < 2:
        return None
    floor = min((kl for _, kl in known.values() if kl > 0), default=1e-6) / 3  # where a cost of 0 is drawn
    ranked, single = sorted(known, key=lambda name: known[name][1]), all(len(where) == 1 for where, _ in known.values())
    spots = {
        name: (where[0][0] if single else ranked.index(name) + 1, max(kl, floor)) for name, (where, kl) in known.items()
    }
    chosen, names = (
        label(search.segments),
        {label(one.segments): layer_names(one.segments) for one in search.candidates},
    )
    drawing = Drawing(xlabel="first layer removed" if single else "candidates by rank",
                      ylabel="KL to the dense model, nats", yscale="log")  # fmt: skip
    for name, style in (("candidate", {"marker": "o", "ms": 7, "mfc": "none", "mec": INK, "mew": 1.3}),
                        ("chosen", {"marker": "D", "ms": 8, "mfc": ACCENT, "mec": ACCENT})):  # fmt: skip
        points = [(*spots[one], f"layers {names[one]}: {figure(known[one][1])} nats")
                  for one in known if (one == chosen) == (name == "chosen")]  # fmt: skip
        drawing.marks(points, name, **style)
    low, high = min(y for _, y in spots.values()), max(y for _, y in spots.values())
    steps = range(1, 10) if high / low < 5 else (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    drawing.axes.yaxis.set_major_locator(LogLocator(subs=steps))
    drawing.axes.yaxis.set_minor_locator(NullLocator())
    drawing.axes.yaxis.set_major_formatter("{x:g}")
    drawing.axes.set_ylim(low / 1.5, high * 1.25)
    drawing.axes.locator_params(axis="x", integer=True)
    return drawing.svg("cost", "KL of each candidate to the dense model", legend=2)


@_styled
def tuning_chart(tuning: Json) -> str | None:
    """Training and held-out loss over the tokens seen, with the state that was kept."""
    from matplotlib.ticker import EngFormatter

    train, held = _curve(tuning.curve), _curve(tuning.heldout)
    if not train and not held:
        return None
    unit = (printable(tuning.unit) or "nats").replace("$", "")
    drawing = Drawing(xlabel="tokens trained on", ylabel=f"loss, {unit}")
    drawing.axes.plot([t for _, t, _ in train], [loss for *_, loss in train], color=MUTED, lw=1.1, label="training")
    points = [
        (tokens, loss, f"step {step:g}, {count(tokens)} tokens: held-out loss {figure(loss)}")
        for step, tokens, loss in held
    ]
    drawing.axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=ACCENT, lw=2, label="held-out")
    drawing.marks(points, "_", marker="o", ms=6, mfc=ACCENT, mec=SURFACE, mew=0.8)
    kept = [(tokens, loss, f"kept: step {step:g}, loss {figure(loss)}")
            for step, tokens, loss in held or train if step == finite(tuning.best_step)]  # fmt: skip
    drawing.marks(kept[:1], "kept", marker="o", ms=14, mfc="none", mec=SECOND, mew=2)
    drawing.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    drawing.axes.margins(0.03, 0.1)
    return drawing.svg("tuning", "Training and held-out loss over the tokens trained on", legend=3)


def _curve(rows: Json) -> list[tuple[float, float, float]]:
    """(step, tokens, loss) of the rows that have all three, at most about 400 of them."""
    found = [(finite(row.step), finite(row.tokens), finite(row.loss)) for row in rows]
    known = [(s, t, loss) for s, t, loss in found if s is not None and t is not None and loss is not None]
    return known[:: max(1, math.ceil(len(known) / 400))]


# ---- maps: layers across ---------------------------------------------------------------------------------------


@_styled
def _map(name: str, description: str, rows: list[str], cells: dict[tuple[int, int], tuple[str, str]],
         legend: Mapping[str, str], xlabel: str = "layer", frames: Iterable[tuple[int, int]] = ()) -> str:  # fmt: skip
    """Coloured cells at (layer, row): (colour, hover title); removed layers framed."""
    from matplotlib.patches import Patch, Rectangle

    drawing = Drawing(xlabel=xlabel)
    for (layer, row), (colour, title) in sorted(cells.items()):
        cell = Rectangle((layer - 0.5, row - 0.5), 1, 1, fc=colour, ec=colour, lw=0.3)
        drawing.axes.add_patch(cell)
        drawing.tip(cell, title)
    for start, stop in frames:
        frame = Rectangle((start - 0.5, -0.5), stop - start, len(rows), fc="none", ec=INK, lw=1.6, clip_on=False)
        drawing.axes.add_patch(frame)
        drawing.tip(frame, f"removed: {layer_names([[start, stop]])}")
    drawing.axes.set_xlim(-0.5, max(layer for layer, _ in cells) + 0.5)
    drawing.axes.set_ylim(len(rows) - 0.5, -0.5)
    drawing.axes.set_yticks(range(len(rows)), rows)
    drawing.axes.grid(False)
    drawing.axes.xaxis.get_major_locator().set_params(integer=True)
    patches = [Patch(color=colour, label=words) for words, colour in legend.items()]
    drawing.axes.legend(handles=patches, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=len(patches))
    return drawing.svg(name, description)


def _colour(share: float) -> str:
    """Of a share of the range, 0 to 1."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    return str(to_hex(LinearSegmentedColormap.from_list("scale", LOW_TO_HIGH)(min(max(share, 0.0), 1.0))))


def probe_maps(run: RunFacts) -> list[str]:
    """KL increase of each kind of probe without each single layer, and without each longer window that was measured."""
    found = run.capabilities.map
    names = [printable(name) for name in found.names]
    by_length: dict[int, dict[tuple[int, int], float]] = {}
    for window in found.windows:
        for start, stop in spans([[plain(window.start), plain(window.stop)]]):
            for i, name in enumerate(names):
                if (kl := finite(window.costs[name])) is not None and stop > start:
                    by_length.setdefault(stop - start, {})[start, i] = kl
    charts = []
    for length, known in sorted(by_length.items()):
        high = max(max(known.values()), 1e-6)
        low = max(min((kl for kl in known.values() if kl > 0), default=high), high / 1e3)
        across, steps = math.log(high / low) or 1.0, (low, math.sqrt(low * high), high)
        cells = {
            (start, i): (_colour(math.log(max(kl, low) / low) / across),
                         f"without layers {layer_names([[start, start + length]])}: {names[i]} {figure(kl)} nats")
            for (start, i), kl in known.items()
        }  # fmt: skip
        frames = [(a, b) if length == 1 else (a, a + 1) for a, b in spans(run.summary.segments) if length in (1, b - a)]
        where = "layer removed" if length == 1 else f"first of {length} layers removed"
        legend = {f"{figure(kl)} nats": _colour(math.log(kl / low) / across) for kl in steps}
        charts.append(_map(f"map{length}", f"KL increase of probes, by {where}", names, cells, legend, where, frames))
    return charts


def chosen_bits(found: Json) -> dict[str, int]:
    """Bits of every weight among which they were chosen, by name, 16 where it stays as it is; empty where none were."""
    rows = {str(row.name): bits for row in found.layers if (bits := whole_number(row.bits)) is not None}
    return {name: rows.get(name, 16) for name, _ in found.mixture.costs.entries()}


def bit_map(found: Json) -> str | None:
    known = {(int(at[1]), at[2]): bits for name, bits in chosen_bits(found).items() if (at := IN_LAYER.search(name))}
    if not known:
        return None
    matrices, widths = list(dict.fromkeys(matrix for _, matrix in known)), sorted(set(known.values()))
    colours = {bits: _colour(i / max(1, len(widths) - 1)) for i, bits in enumerate(widths)}
    cells = {(layer, matrices.index(matrix)): (colours[bits], f"{matrix} of layer {layer}: {bits} bits")
             for (layer, matrix), bits in known.items()}  # fmt: skip
    legend = {f"{bits} bits": colour for bits, colour in colours.items()}
    return str(_map("bits", "Bits of each matrix", [name.rpartition(".")[2] for name in matrices], cells, legend))


def gate_maps(search: Json) -> list[str]:
    """Of a concave gate the gates by step and layer, and the loss of all wells; none where no gate was trained."""
    steps = [[finite(g) for g in row] for row in search.gate.gates]
    cells = {(layer, step): (_colour(1 - g), f"step {step + 1}, layer {layer}: gate {figure(g)}")
             for step, row in enumerate(steps) for layer, g in enumerate(row) if g is not None}  # fmt: skip
    losses = [[loss for each in row if (loss := finite(each)) is not None] for row in search.gate.losses]
    if not cells or not any(losses):
        return []
    rows = [str(step + 1) if step % 3 == 0 else "" for step in range(len(steps))]
    legend = {"open": _colour(0), "half open": _colour(0.5), "closed": _colour(1)}
    heat = _map("gates", "Gate of each layer by step", rows, cells, legend, "layer", spans(search.segments))
    return [str(heat), str(gate_losses(losses))]


@_styled
def gate_losses(losses: list[list[float]]) -> str:
    """The loss of every set of wells by step, the chosen one's first."""
    drawing = Drawing(xlabel="step", ylabel="KL of the gated model, nats", yscale="log")
    for i, well in reversed([*enumerate(losses)]):
        style = (
            {"color": ACCENT, "lw": 2, "label": "chosen well"} if i == 0 else {"color": MUTED, "lw": 1.1, "label": "_"}
        )
        drawing.axes.plot(range(1, len(well) + 1), well, **style)
    drawing.axes.yaxis.set_major_formatter("{x:g}")
    drawing.axes.locator_params(axis="x", integer=True)
    return drawing.svg("wells", "KL of the gated model by step, of each well", legend=2)


# ---- the layer stack -------------------------------------------------------------------------------------------


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
        "bands": [(a, b, now[a] + shift, now[a] + shift + b - a) for a, b in runs_of(kept)],
        "layers": layers,
    }
