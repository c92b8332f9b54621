"""A search that goes on by a price too dear for many cuts: what is left of each after a fold.

    1. the best candidates of the search by plain cuts are priced after a fold
    2. of the best one's one-layer moves, which may split a segment, those that are cheapest as plain cuts are too
    3. while the best of them gains more than GAIN, again from there

Plain prices only propose; what decides is `healing/fold_prices.py`, or any other price.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from layercut.layer_search.gate_walls import neighbours
from layercut.layer_search.prices import Prices, candidates
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Candidate, SearchResult, merit
from layercut.layer_search.sweep import Cuts
from layercut.models.cost import Bounds, PlannedRun, Work

POOL, PROPOSED, MOST_MOVES = 6, 8, 6
"""Candidates of the search that are priced, moves that are in each round, and rounds at most."""
GAIN = 0.01
"""A move is taken where the price falls by more than this share; smaller gains are chance."""


def after_fold(
    result: SearchResult, prices: Prices, price: Callable[[Cuts], float], limits: Restriction, count: int
) -> SearchResult:
    """Go on from a search's candidates by what each cut costs once it is folded.

    Args:
        result: of a search by plain cuts.
        prices: plain ones, of which two rows of each kind propose; the choice is priced on all.
        price: of a cut after its fold; lower is better.
        limits: the cuts that are allowed.
        count: K, segments at most.

    Returns:
        The result with the choice first, then those of its candidates that were priced as well; each with its `score`.
    """
    begun = {each.segments: each for each in [*result.candidates[:POOL], *result.by_number]}
    known = {cuts: price(cuts) for cuts in begun}
    best = min(known, key=known.__getitem__)
    for _ in range(MOST_MOVES):
        moves = [move for move in neighbours(best, len(limits.may), count) if limits.allows(move) and move not in known]
        nearest = prices.ranked(moves, min(prices.rows, 2 * prices.kinds))[:PROPOSED] if moves else []
        known |= {cuts: price(cuts) for cuts in nearest}
        ahead = min([best, *nearest], key=known.__getitem__)
        if known[ahead] > (1 - GAIN) * known[best] or ahead == best:
            break
        best = ahead
    chosen = begun.get(best) or candidates(prices, [best])[0]
    return replace(result, candidates=_by_score([chosen, *begun.values()], known))


def _by_score(found: Sequence[Candidate], scores: dict[Cuts, float]) -> list[Candidate]:
    """Candidates with their scores, each once, from the lowest."""
    return sorted({each.segments: replace(each, score=scores[each.segments]) for each in found}.values(), key=merit)


# --- what it costs, told beforehand ---


def priced_after_fold(run: PlannedRun, count: int) -> tuple[Bounds, Work]:
    """How many cuts are priced after a fold, and the work of proposing moves and of pricing the choice.

    Two rounds of moves are expected, the second of which finds nothing better.

    Args:
        run: what is planned.
        count: K, segments at most.

    Returns:
        Both.
    """
    moves, kept = 4 * count * count, run.shape.layers - run.length
    proposed = min(PROPOSED, moves)
    cuts = Bounds(POOL + 2 * proposed, 1, POOL + 2 + MOST_MOVES * PROPOSED)
    rows = min(run.searched, 2 * run.kinds)
    round_of = Bounds(rows * (run.shape.layers + moves * kept / 2), 0, rows * (2 * count * 2 * run.shape.layers) * kept)
    choice = Bounds(run.searched * kept, 0, run.searched * 2 * run.shape.layers)
    forwards = Bounds(2 * round_of.expected, 0, MOST_MOVES * round_of.most) + choice
    return cuts, Work.of(run.shape, forwards, heads=2 * rows * (moves + 1) + 2 * run.searched)
