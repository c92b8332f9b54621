"""The report's picture of bits by budget: layers across, their matrices down, colour by the bits of each.

Beside `report/charts.py`, which has what both draw with.
"""

from __future__ import annotations

import re
from typing import Any

from layercut.report.charts import LOSS_COLOURS, drawing
from layercut.report.formatting import Json, figure, finite, whole_number

IN_LAYER = re.compile(r"\.(\d+)\.(.+)")
"""The number of the layer, and what the matrix is called in it."""


def chosen_bits(found: Json) -> dict[str, int]:
    """Bits of every weight among which they were chosen, by name, 16 where it stays as it is; empty where none were."""
    rows = {str(row.name): bits for row in found.layers if (bits := whole_number(row.bits)) is not None}
    return {name: rows.get(name, 16) for name, _ in found.mixture.costs.entries()}


def bits_outside(found: Json) -> list[tuple[str, int]]:
    """Names and bits of embeddings and head, where these were chosen."""
    return [(name, bits) for name, bits in chosen_bits(found).items() if not IN_LAYER.search(name)]


def bit_chart(found: Json) -> str | None:
    """The bits of each matrix in the decoder layers, as a map."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex
    from matplotlib.patches import Patch, Rectangle

    known = {(int(at[1]), at[2]): (name, bits) for name, bits in chosen_bits(found).items()
             if (at := IN_LAYER.search(name))}  # fmt: skip
    if not known:
        return None
    matrices, costs = list(dict.fromkeys(matrix for _, matrix in known)), _costs(found)
    widths = sorted({bits for _, bits in known.values()})
    scale = LinearSegmentedColormap.from_list("bits", LOSS_COLOURS)
    colours = {bits: to_hex(scale(i / max(1, len(widths) - 1))) for i, bits in enumerate(widths)}
    with drawing("bits", "Bits of each matrix: layers across, matrices down", xlabel="layer") as d:
        for (layer, matrix), (name, bits) in sorted(known.items()):
            place = (layer - 0.5, matrices.index(matrix) - 0.5)
            cell = Rectangle(place, 1, 1, fc=colours[bits], ec=colours[bits], lw=0.3)
            d.axes.add_patch(cell)
            told = "".join(f"; in {width} bits KL {figure(kl)}" for width, kl in costs.get(name, []))
            d.tip(cell, f"{matrix} of layer {layer}: {bits} bits{told}")
        d.axes.set_xlim(-0.5, max(layer for layer, _ in known) + 0.5)
        d.axes.set_ylim(len(matrices) - 0.5, -0.5)
        d.axes.set_yticks(range(len(matrices)), [matrix.rpartition(".")[2] for matrix in matrices])
        d.axes.grid(False)
        d.axes.xaxis.get_major_locator().set_params(integer=True)
        legend: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncol": 6}
        d.axes.legend(handles=[Patch(color=colours[bits], label=f"{bits} bits") for bits in widths], **legend)
        return d.svg()


def _costs(found: Json) -> dict[str, list[tuple[int, float]]]:
    """KL of each weight alone at each number of bits, the least of its group sizes, by name."""
    least: dict[str, dict[int, float]] = {}
    for name, rows in found.mixture.costs.entries():
        for row in rows:
            bits, kl = whole_number(row.bits), finite(row.kl)
            if bits is not None and kl is not None:
                each = least.setdefault(name, {})
                each[bits] = min(kl, each.get(bits, kl))
    return {name: sorted(each.items()) for name, each in least.items()}
