"""A set of K segments as real numbers that gradient descent can move. Pure functions; no model.

A set is written as *spans*: gap, width, gap, width, …, gap, the layers kept before, between and after the segments
and those removed. Gaps are >= 0 and add up to L - n, widths are >= 1 and add up to n, so that places and widths
move freely while n stays. The *walls* are the cumulative sums a_1, b_1, a_2, b_2, …: segment k is [a_k, b_k).

    spans [..., 2K + 1]        walls [..., 2K]        P particles, K segments, L layers, n of them removed
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, product
from math import comb

import torch

from layercut.layer_search.sweep import Cuts
from layercut.segments import Segment, joined_segments


def walls_of(spans: torch.Tensor) -> torch.Tensor:
    """The walls a_1, b_1, a_2, b_2, … of spans: [..., 2K + 1] -> [..., 2K]."""
    return spans.cumsum(-1)[..., :-1]


def spans_of(cuts: Cuts, layers: int, count: int) -> list[float]:
    """The spans of whole segments, as `count` of them: where they are fewer, the widest is split in two that touch.

    Args:
        cuts: a set of segments.
        layers: L.
        count: K.

    Returns:
        2K + 1 gaps and widths, in layers.
    """
    segments = list(cuts)
    while len(segments) < count:
        widest = max(segments, key=len)
        middle = (widest.start + widest.stop) // 2
        at = segments.index(widest)
        segments[at : at + 1] = [Segment(widest.start, middle), Segment(middle, widest.stop)]
    walls = [0, *(wall for s in segments for wall in (s.start, s.stop)), layers]
    return [float(b - a) for a, b in pairwise(walls)]


def cuts_of(spans: torch.Tensor) -> Cuts:
    """The nearest set of whole segments, of as many layers; segments that touch become one. Spans are [2K + 1]."""
    gaps = (spans[0::2].cumsum(0)[:-1] + 0.5).floor()
    widths = (spans[1::2].cumsum(0) + 0.5).floor()
    starts = gaps + torch.cat([widths.new_zeros(1), widths[:-1]])
    layers = [i for a, b in zip(starts.tolist(), (gaps + widths).tolist(), strict=True) for i in range(int(a), int(b))]
    return joined_segments(layers)


def step_of(slope: torch.Tensor) -> torch.Tensor:
    """The move of steepest descent that keeps both sums, scaled so that the farthest wall moves by one layer.

    Normalised, since the cost of segments spans orders of magnitude along the stack. `slope` is dL/dspans [P, 2K + 1],
    and so is the move.
    """
    move = torch.empty_like(slope)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        move[:, part] = slope[:, part].mean(-1, keepdim=True) - slope[:, part]
    farthest = walls_of(move).abs().amax(-1, keepdim=True)
    return torch.where(farthest > 0, move / farthest.clamp_min(torch.finfo(move.dtype).tiny), 0.0)


def inside(spans: torch.Tensor, layers: int, length: int) -> torch.Tensor:
    """The nearest spans that are a set of segments: gaps >= 0 with sum L - n, widths >= 1 with sum n.

    Args:
        spans: [P, 2K + 1], in layers.
        layers: L.
        length: n.

    Returns:
        Spans [P, 2K + 1].
    """
    result = spans.clone()
    result[:, 0::2] = onto_simplex(spans[:, 0::2], layers - length)
    result[:, 1::2] = 1 + onto_simplex(spans[:, 1::2] - 1, length - spans.shape[1] // 2)
    return result


def onto_simplex(x: torch.Tensor, total: float) -> torch.Tensor:
    """The nearest point with entries >= 0 that add up to `total`: max(x - theta, 0) for the theta that fits.

    Euclidean projection onto the simplex by sorting: theta is the largest (sum of the m largest - total) / m that is
    below the m-th largest entry.

    Args:
        x: points [P, M].
        total: the sum of each row.

    Returns:
        Projections [P, M].
    """
    ordered = x.sort(-1, descending=True).values
    thetas = (ordered.cumsum(-1) - total) / torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = ((ordered > thetas).sum(-1, keepdim=True) - 1).clamp_min(0)
    return (x - thetas.gather(-1, last)).clamp_min(0)


def neighbours(cuts: Cuts, layers: int, count: int) -> list[Cuts]:
    """All sets of `count` segments at most that differ by one move of a wall outward and one inward, sorted.

    Args:
        cuts: a set of segments.
        layers: L.
        count: K.

    Returns:
        Sets of as many layers, without `cuts` itself.
    """
    removed = {i for segment in cuts for i in range(segment.start, segment.stop)}
    closed = {i for s in cuts for i in (s.start - 1, s.stop) if 0 <= i < layers}
    opened = {i for s in cuts for i in (s.start, s.stop - 1)}
    if len(cuts) < count:  # a segment may split: one layer leaves it for anywhere beside another layer
        closed |= set(range(layers)) - removed
    moves = {joined_segments(removed - {out} | {into}) for into, out in product(closed, opened)}
    return sorted(move for move in moves if len(move) <= count and move != cuts)


def spread(ranked: Iterable[Cuts], count: int, distance: int = 2) -> list[Cuts]:
    """The first `count` sets of a ranking that differ from each other in more than `distance` layers, at most.

    Args:
        ranked: sets from the best.
        count: how many.
        distance: in layers; a layer exchanged for another counts two.

    Returns:
        The sets, from the best.
    """
    chosen: list[tuple[set[int], Cuts]] = []
    for cuts in ranked:
        layers = {i for segment in cuts for i in range(segment.start, segment.stop)}
        if all(len(layers - other) > distance // 2 for other, _ in chosen):
            chosen.append((layers, cuts))
        if len(chosen) == count:
            break
    return [cuts for _, cuts in chosen]


def all_sets(length: int, layers: int, count: int) -> list[Cuts]:
    """Every set of `count` segments at most, `length` layers in all, that do not touch: `number_of_sets` of them.

    Args:
        length: n.
        layers: L.
        count: K.

    Returns:
        The sets.
    """

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
    """sum_{k <= K} C(n - 1, k - 1) C(L - n + 1, k): n into k widths, times k places among the layers kept.

    Args:
        length: n.
        layers: L.
        count: K.

    Returns:
        How many sets `all_sets` gives.
    """
    return sum(comb(length - 1, k - 1) * comb(layers - length + 1, k) for k in range(1, count + 1))
