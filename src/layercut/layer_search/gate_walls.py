"""Sets of K segments as walls that move: where they may begin, and one move of a wall. Pure functions; no model.

L layers, n of them removed, as K segments [a, b) at most; a and b are the walls.
"""

from __future__ import annotations

from itertools import product
from math import comb

from layercut.layer_search.sweep import Cuts
from layercut.segments import Segment, joined_segments, layers_of


def neighbours(cuts: Cuts, layers: int, count: int) -> list[Cuts]:
    """All sets of `count` segments at most that differ by one move of a wall outward and one inward, sorted."""
    removed = {*layers_of(cuts)}
    closed = {i for s in cuts for i in (s.start - 1, s.stop) if 0 <= i < layers}
    opened = {i for s in cuts for i in (s.start, s.stop - 1)}
    if len(cuts) < count:  # a segment may split: one layer leaves it for anywhere beside another layer
        closed |= set(range(layers)) - removed
    moves = {joined_segments(removed - {out} | {into}) for into, out in product(closed, opened)}
    return sorted(move for move in moves if len(move) <= count and move != cuts)


def all_sets(length: int, layers: int, count: int) -> list[Cuts]:
    """Every set of `count` segments at most, `length` layers in all, that do not touch: `number_of_sets` of them."""

    def below(start: int, left: int, segments: int) -> list[Cuts]:
        if left == 0:
            return [()]
        if segments == 0:
            return []
        return [
            (Segment(a, a + n), *rest)
            for a in range(start, layers - left + 1)
            for n in range(1, left + 1)
            for rest in below(a + n + 1, left - n, segments - 1)
        ]

    return below(0, length, count)


def number_of_sets(length: int, layers: int, count: int) -> int:
    """sum_{k <= K} C(n - 1, k - 1) C(L - n + 1, k): n into k widths, times k places among the layers kept."""
    return sum(comb(length - 1, k - 1) * comb(layers - length + 1, k) for k in range(1, count + 1))
