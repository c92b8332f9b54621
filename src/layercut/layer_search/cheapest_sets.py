"""Sets of several segments by the sum of what each costs alone: beam search by dynamic programming, no model."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nsmallest

from layercut.layer_search.restriction import Restriction
from layercut.layer_search.sweep import Cuts
from layercut.segments import Segment

Sums = list[tuple[float, Cuts]]

BEAM = 8
"""`cheapest_sums` keeps so many sets of each kind."""


def cheapest_sums(costs: Mapping[Segment, float], limits: Restriction, count: int) -> list[Cuts]:
    """Allowed sets of `count` segments at most with n layers in all, by the sum of their single costs.

    Beam search by dynamic programming: for every number of layers removed and every place where the last segment may
    end, the BEAM cheapest whose kept layers so far stand where they may. What segments do to each other is left out.
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
