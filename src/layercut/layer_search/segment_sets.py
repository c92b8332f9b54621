"""Sets of segments: the cheapest by the sum of what each costs alone, one-layer moves of a set, all sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nsmallest
from itertools import product
from math import comb

from layercut.layer_search.restriction import Restriction
from layercut.layer_search.sweep import Cuts, all_lengths
from layercut.segments import Segment, joined_segments, layers_of

Sums = list[tuple[float, Cuts]]
BEAM = 8  # `cheapest_sums` keeps so many sets of each kind


def cheapest_sums(costs: Mapping[Segment, float], limits: Restriction, count: int) -> list[Cuts]:
    """Allowed sets of `count` segments at most with n layers in all, by the sum of their single costs.

    Beam search by dynamic programming, without a model: for every number of layers removed and every place where the
    last segment may end, the BEAM cheapest whose kept layers so far stand where they may.
    """
    layers, length = len(limits.may), limits.length
    # best[m, e]: sets of m layers that end at e or before; each round of the loop adds one segment
    best: dict[tuple[int, int], Sums] = {(0, e): [(0.0, ())] for e in range(layers + 1) if limits.keeps(0, e, 0)}
    found: dict[Cuts, float] = {}
    for _ in range(count):
        ending: dict[tuple[int, int], Sums] = {}
        for segment, cost in costs.items():
            for m in range(length - len(segment) + 1):
                # at least one kept layer between two segments, or they would be one
                if m and not limits.keeps(segment.start - 1, segment.start, m):
                    continue
                before = best.get((m, segment.start - 1 if m else segment.start), [])
                sums = [(total + cost, (*cuts, segment)) for total, cuts in before]
                ending.setdefault((m + len(segment), segment.stop), []).extend(sums)
        for m in range(1, length + 1):
            for e in range(1, layers + 1):
                kept = best.get((m, e - 1), []) if limits.may_keep(e - 1, m) else []
                options = {*best.get((m, e), []), *kept, *ending.get((m, e), [])}
                best[m, e] = nsmallest(BEAM, options)
        for e in range(1, layers + 1):
            found |= {cuts: total for total, cuts in best[length, e]}
        for sums in (sums for (m, _), sums in ending.items() if m == length):
            found |= {cuts: total for total, cuts in nsmallest(BEAM, sums)}
    return sorted(filter(limits.allows, found), key=lambda cuts: (found[cuts], cuts))


def least_layers(costs: Sequence[float], limits: Restriction, count: int) -> list[Cuts]:
    """The same, by the sum of what each layer costs; where the beam has none, the single segments."""
    alone = {one: sum(costs[one.start : one.stop]) for one in all_lengths(limits.length, len(costs))}
    return cheapest_sums(alone, limits, count) or [(one,) for one in limits.needed_segments()]


def neighbours(cuts: Cuts, layers: int, count: int) -> list[Cuts]:
    """All sets of `count` segments at most with one layer more beside a segment and one fewer at an end, sorted."""
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
