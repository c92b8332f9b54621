"""The shortlist: candidates are compared after a quick fold, and with a high effort the best after a short healing.

    1. the search's best by plain cuts, of each number of segments and by the text alone, and the proposals in which
       probes count less, are folded
    2. of the best one's one-layer moves, which may split a segment, those that are cheapest as plain cuts are too
    3. while the best of them gains more than GAIN, again from there
    4. with a high effort the best by then that differ are healed for a while, with the best by text alone, then
       variants of the best of them, and of the next where it is CLOSE: those that do not differ from it
    5. where several of these are CLOSE, they are healed LONGER times as long
    6. the one of least cost is taken

How many of each the `Effort` says. Plain cuts only propose; what decides is `healing/quick_fold.py`, and healing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import SearchResult, Shortlisted
from layercut.layer_search.segment_sets import neighbours
from layercut.layer_search.sweep import Cuts
from layercut.segments import layers_of

CLOSE, LONGER = 0.15, 4
"""Cuts whose cost is at most this share above the least have variants healed and are healed again, on so many times the
rows; on so many times these again the choice will be healed."""
GAIN = 0.01  # a move is taken where the cost falls by more than this share; smaller gains are chance


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a shortlist may take."""

    pool: int  # candidates that are folded, and as many of the proposals in which probes count less
    proposed: int  # moves that are folded in each round
    rounds: int  # rounds of moves, at most
    fit_tokens: int  # tokens that a quick fold is solved on
    fold_tokens: int  # tokens that the fold of a short healing is solved on, at most
    judged: int  # held-out rows by which a quick fold is judged, and a short healing steered
    healed: int = 0  # cuts healed that differ from each other, at most; with none the quick fold decides
    places: int = 0  # how many close ones have variants healed, at most
    variants: int = 0  # variants healed of each
    finalists: int = 0  # close ones that are healed longer, at most
    heldout: int = 0  # held-out rows of text that judge a healed cut, at most
    short_tests: int = 0  # rows of probes that judge it, half of the weight of all; as long as those of the search
    long_tests: int = 0  # the same, as long as the rows that are tuned on, where these are longer


EFFORTS = {
    "normal": Effort(pool=4, proposed=6, rounds=1, fit_tokens=4096, fold_tokens=8192, judged=4),
    "high": Effort(
        pool=6, proposed=8, rounds=6, fit_tokens=10240, fold_tokens=65536, judged=8, healed=4, places=2, variants=2,
        finalists=4, heldout=64, short_tests=32, long_tests=16,
    ),
}  # fmt: skip
"""By `--effort`. A high one takes several times as long as tuning does; a low one has no shortlist."""


def shortlist(
    result: SearchResult,
    costs: CutCosts,
    folded: Callable[[Cuts], float] | None,
    limits: Restriction,
    count: int,
    healed: Callable[[Cuts, int], float] | None = None,
    effort: Effort = EFFORTS["high"],
) -> SearchResult:
    """Go on from a search's candidates by their costs after a quick fold, and after healing on so many times the rows.

    Without `healed` the fold decides. Without `folded`, of a model that has no fold, costs of plain cuts take its place
    and no moves are made, since the search has made them.
    """
    by_text = [result.by_text] if result.by_text else []
    begun = [each.segments for each in [*result.candidates[: effort.pool], *result.by_number, *by_text]]
    pool = [*dict.fromkeys([*begun, *result.lighter[: effort.pool]])]
    if folded:
        known = {cuts: folded(cuts) for cuts in pool}
    else:
        known = {each.segments: each.merit[0] for each in costs.candidates(pool)}
    best = min(known, key=known.__getitem__)
    for _ in range(effort.rounds if folded else 0):
        moves = [move for move in neighbours(best, len(limits.may), count) if limits.allows(move) and move not in known]
        nearest = costs.ranked(moves, min(costs.rows, 2 * costs.kinds))[: effort.proposed] if moves else []
        known |= {cuts: folded(cuts) for cuts in nearest} if folded else {}
        ahead = min([best, *nearest], key=known.__getitem__)
        if known[ahead] > (1 - GAIN) * known[best] or ahead == best:
            break
        best = ahead
    ordered = sorted(known, key=lambda cuts: (cuts != best, known[cuts], cuts))
    short, longer = dict[Cuts, float](), dict[Cuts, float]()
    if healed and effort.healed:
        short, longer = after_healing(ordered, healed, effort, [each.segments for each in by_text])
    ordered.sort(key=lambda cuts: (longer.get(cuts, math.inf), short.get(cuts, math.inf)))
    found = {each.segments: each for each in [*result.candidates, *result.by_number, *by_text]}
    chosen = found.get(ordered[0]) or costs.candidates(ordered[:1])[0]
    rest = [found[cuts] for cuts in ordered[1:] if cuts in found]
    return replace(
        result,
        candidates=[replace(each, score=known[each.segments]) for each in [chosen, *rest]],
        shortlist=[
            Shortlisted(cuts, known[cuts] if folded else None, short.get(cuts), longer.get(cuts)) for cuts in ordered
        ],
    )


def after_healing(
    ordered: Sequence[Cuts], healed: Callable[[Cuts, int], float], effort: Effort, by_text: Sequence[Cuts] = ()
) -> tuple[dict[Cuts, float], dict[Cuts, float]]:
    """Costs of the best cuts once they are healed: far apart first, then around the best, then the best longer.

    A fold tells neighbours apart no better than cuts that share nothing, and healing them all is too dear: the first
    round finds the places. Which of close ones is better after a short healing says little, since some cuts heal
    faster at first than others and no further; a forecast from both costs took the one that found fewer keys twice
    (research/search.md).
    """
    short = {cuts: healed(cuts, 1) for cuts in dict.fromkeys([*differing(ordered, effort.healed), *by_text])}
    for place in close_ones(short)[: effort.places]:
        near = [cuts for cuts in ordered if cuts not in short and differing([place, cuts], 2) == [place]]
        short |= {cuts: healed(cuts, 1) for cuts in near[: effort.variants]}
    close = close_ones(short)[: effort.finalists]
    return short, {cuts: healed(cuts, LONGER) for cuts in close} if len(close) > 1 else {}


def close_ones(healed: Mapping[Cuts, float]) -> list[Cuts]:
    """The cuts whose cost is at most CLOSE above the least, the best first."""
    ranked = sorted(healed, key=healed.__getitem__)
    return [cuts for cuts in ranked if healed[cuts] <= (1 + CLOSE) * healed[ranked[0]]]


def differing(ordered: Sequence[Cuts], most: int) -> list[Cuts]:
    """The first cuts of which a third of the layers, two where there are two, are not in any before."""
    found: list[tuple[Cuts, set[int]]] = []
    for cuts in ordered:
        layers = {*layers_of(cuts)}
        if all(len(layers - other) >= min(len(layers), max(2, len(layers) // 3)) for _, other in found):
            found.append((cuts, layers))
    return [cuts for cuts, _ in found[:most]]
