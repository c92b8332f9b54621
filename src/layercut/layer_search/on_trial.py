"""A search that goes on by prices too dear for many cuts: what is left of each after a fold, and after some healing.

    1. the search's best by plain cuts, of each number of segments and by the text alone, and the proposals in which
       tests count less, are priced after a fold
    2. of the best one's one-layer moves, which may split a segment, those that are cheapest as plain cuts are too
    3. while the best of them gains more than GAIN, again from there
    4. where asked the TRIED best by then that differ are healed for a while, with what the text alone would take, then
       the VARIANTS best of those that do not differ from the best of them, and from the next where it is CLOSE
    5. where several of these are CLOSE, they are healed LONGER times as long, and the one is taken of which least is
       left

Plain prices only propose; what decides is `healing/fold_prices.py`, and healing itself, or any other prices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from layercut.layer_search.prices import Prices, candidates
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import SearchResult, Shortlisted
from layercut.layer_search.segment_sets import neighbours
from layercut.layer_search.sweep import Cuts
from layercut.segments import layers_of

POOL, PROPOSED, MOST_MOVES = 6, 8, 6
"""Candidates that are priced, moves that are in each round, and rounds at most."""
TRIED, PLACES, VARIANTS, FINALISTS = 4, 2, 2, 4
"""Cuts healed that differ from each other, how many close ones have variants healed, so many each, and at most of these
that are healed again."""
CLOSE, LONGER = 0.15, 4
"""What more than the least may be left of cuts whose variants are healed and that are healed again, as a share, and on
how many times the rows; on so many times these again the choice will be healed."""
GAIN = 0.01
"""A move is taken where the price falls by more than this share; smaller gains are chance."""
Price = Callable[[Cuts], float]
Healing = Callable[[Cuts, int], float]
"""The price of a cut after a short healing, and after one on so many times the rows."""


def tried(
    result: SearchResult,
    prices: Prices,
    folded: Price,
    limits: Restriction,
    count: int,
    *,
    healed: Healing | None = None,
) -> SearchResult:
    """Go on from a search's candidates by what each cut costs once it is folded, and then by healing the best."""
    by_text = [result.by_text] if result.by_text else []
    begun = [each.segments for each in [*result.candidates[:POOL], *result.by_number, *by_text]]
    known = {cuts: folded(cuts) for cuts in dict.fromkeys([*begun, *result.lighter])}
    best = climbed_(known, min(known, key=known.__getitem__), prices, folded, limits, count)
    ordered = sorted(known, key=lambda cuts: (cuts != best, known[cuts], cuts))
    short, longer = after_healing(ordered, healed, [each.segments for each in by_text]) if healed else ({}, {})
    ordered.sort(key=lambda cuts: (longer.get(cuts, math.inf), short.get(cuts, math.inf)))
    found = {each.segments: each for each in [*result.candidates, *result.by_number, *by_text]}
    chosen = found.get(ordered[0]) or candidates(prices, ordered[:1])[0]
    rest = [found[cuts] for cuts in ordered[1:] if cuts in found]
    return replace(
        result,
        candidates=[replace(each, score=known[each.segments]) for each in [chosen, *rest]],
        shortlist=[Shortlisted(cuts, known[cuts], short.get(cuts), longer.get(cuts)) for cuts in ordered],
    )


def climbed_(
    known: dict[Cuts, float], best: Cuts, prices: Prices, folded: Price, limits: Restriction, count: int
) -> Cuts:
    """Where one-layer moves lead from a cut, each of which has to gain more than GAIN."""
    for _ in range(MOST_MOVES):
        moves = [move for move in neighbours(best, len(limits.may), count) if limits.allows(move) and move not in known]
        nearest = prices.ranked(moves, min(prices.rows, 2 * prices.kinds))[:PROPOSED] if moves else []
        known |= {cuts: folded(cuts) for cuts in nearest}
        ahead = min([best, *nearest], key=known.__getitem__)
        if known[ahead] > (1 - GAIN) * known[best] or ahead == best:
            break
        best = ahead
    return best


def after_healing(
    ordered: Sequence[Cuts], healed: Healing, by_text: Sequence[Cuts] = ()
) -> tuple[dict[Cuts, float], dict[Cuts, float]]:
    """What is left of the best cuts once they are healed: far apart first, then around the best, then the best longer.

    A fold tells neighbours apart no better than cuts that share nothing, and healing them all is too dear: the first
    round finds the places. Which of close ones is better after a short healing says little, since some cuts heal
    faster at first than others and no further; what both prices foretell took the one that found fewer keys
    twice (docs/log.md).
    """
    short = {cuts: healed(cuts, 1) for cuts in dict.fromkeys([*differing(ordered, TRIED), *by_text])}
    for place in close_ones(short)[:PLACES]:
        near = [cuts for cuts in ordered if cuts not in short and differing([place, cuts], 2) == [place]]
        short |= {cuts: healed(cuts, 1) for cuts in near[:VARIANTS]}
    close = close_ones(short)[:FINALISTS]
    return short, {cuts: healed(cuts, LONGER) for cuts in close} if len(close) > 1 else {}


def close_ones(healed: Mapping[Cuts, float]) -> list[Cuts]:
    """The cuts of which at most CLOSE more than of the best is left, the best first; healed: what is left of each."""
    ranked = sorted(healed, key=healed.__getitem__)
    return [cuts for cuts in ranked if healed[cuts] <= (1 + CLOSE) * healed[ranked[0]]]


def differing(ordered: Sequence[Cuts], most: int) -> list[Cuts]:
    """The first cuts that are no variants of one before: a third of their layers, two where there are two, are
    others.
    """
    found: list[tuple[Cuts, set[int]]] = []
    for cuts in ordered:
        layers = {*layers_of(cuts)}
        if all(len(layers - other) >= min(len(layers), max(2, len(layers) // 3)) for _, other in found):
            found.append((cuts, layers))
    return [cuts for cuts, _ in found[:most]]
