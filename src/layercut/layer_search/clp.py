"""The criteria `clp`, `gate` and `race`: who proposes sets of segments, and who decides among them.

    criterion   proposes                                                        decides, by the real cut
    gate        the gradients of the gates, open in the dense model (`gate.py`)    halving among the proposals
    clp         the same, of several segments put right by real cuts of single     halving, and the climb
                ones (`gate_corrected.py`), and one-layer moves of the best
    race        real cuts on a few rows: of all segments, or, with several,        halving; with several the climb
                the sets of least sum of what their segments cost alone

Halving and climb go by the real cut alone, so that a bad proposal costs time and not the answer. What each part is
worth was measured: docs/log.md, research/gate_ablation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from layercut.data.probes import ProbeRows
from layercut.layer_search.cheapest_sets import cheapest_sums
from layercut.layer_search.gate import Foretold, foretell
from layercut.layer_search.gate_corrected import corrected_proposals, corrections_work, proposals_of_each
from layercut.layer_search.gate_walls import neighbours
from layercut.layer_search.prices import (
    FINALISTS,
    Prices,
    as_objective,
    beside_text,
    coarse_rows,
    few_rows,
    first_rows,
    halving,
    rounds,
)
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Candidate, Cost, SearchResult, merit
from layercut.layer_search.search_cost import all_segments_cost, costs
from layercut.layer_search.sweep import DENSE, Cuts, all_lengths, set_work, sweep_cost
from layercut.models.cost import Bounds, PlannedRun, Spent, Work, total
from layercut.models.objectives import Objective
from layercut.models.runner import DecoderRunner


@dataclass(frozen=True)
class Effort:
    """How much a criterion spends on the gate, and on real cuts of what it proposes."""

    share: int
    """Of the rows one in so many gives gradients."""
    proposals: int
    """Sets that the gate proposes, for one segment."""
    finalists: int
    """Of them, so many at least are priced on all rows."""
    climbs: bool
    """With several segments: whether the best's one-layer moves race against it until none is better."""

    def sets(self, count: int) -> int:
        """Sets that the gate proposes for K segments."""
        return self.proposals if count == 1 else SETS_PER_SEGMENT * count

    def gradient_rows(self, rows: int) -> int:
        """Of N rows, those that give gradients: two at least, of text and of tests where there are both."""
        return min(rows, max(2, rows // self.share))


GATE, CLP = Effort(16, 8, 2, climbs=False), Effort(8, 10, FINALISTS, climbs=True)
"""Of the criteria of these names."""

SETS_PER_SEGMENT = 6
"""Sets that the gate proposes for each of several segments; the climb adds those beside the best."""

BEGIN_SHARE = 4
"""Proposals are first priced on one row in four. They are alike: rounds on fewer rows dropped the best now and then."""

LIGHTER, OTHERS = 0.25, 6
"""Where tests are weighed: how much less they count in more proposals, which are kept for a trial too (healing teaches
back more of what tests lose than of what text loses), and how many of these, and of those by text alone, there are."""

COARSE_SETS = 4
"""`race` with several segments: so many sets a layer are raced."""

MOST_CLIMBS, CLIMB_FINALISTS = 8, 2
"""Rounds of climbing at most, each of which takes one move; and how many moves are priced on all rows, at least."""


def first_of_proposals(rows: int, kinds: int = 1) -> int:
    """Rows that proposals are first priced on: two of each kind at least."""
    return min(rows, max(2 * kinds, rows // BEGIN_SHARE))


def shuffled(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows in the order in which halving takes them."""
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]


def gate_cost(run: PlannedRun, effort: Effort, count: int = 1) -> Spent:
    """A pass there and back of some rows, and halving of what the gate proposes; of several segments more (`clp`).

    In the pass the hidden states are kept, their gradients, and what one layer needs at a time for its backward pass;
    at the turn there are a row of logits, p in float32 and the gradient.
    """
    shape, layers = run.shape, run.shape.layers
    rows, row = effort.gradient_rows(run.searched), shape.stream(1)
    passes = Work.of(shape, rows * (2 * layers - 1), rows * (layers - 1), heads=2 * rows)
    step = {
        "streams": 2 * layers * row,
        "kept for backward": shape.most("saved"),
        "logits": shape.window * shape.vocabulary * (2 * shape.itemsize + 8),
    }
    begin = first_of_proposals(run.searched, run.kinds)
    raced = race_of_proposals(run, effort, count, begin)
    if run.kinds > 1:  # the best by text alone are priced on all rows, where they are not already
        rest = (run.searched - begin) * (layers + FINALISTS * (layers - run.length))
        raced += Work.of(shape, Bounds(rest / 4, 0, rest), heads=(run.searched - begin) * FINALISTS / 2)
    if effort.climbs and count > 1:
        raced += corrections_work(run, coarse_rows(run.searched, run.kinds)) + climb_work(run, count)
    return Spent(max(step, all_segments_cost(run).peak, key=total), passes + raced)


def race_of_proposals(run: PlannedRun, effort: Effort, count: int, begin: int) -> Work:
    """Halving of what is proposed, where those in which tests count less are other sets or the same."""
    race_of = halving_work if count == 1 else sets_work
    fewest = effort.sets(count)
    same, other = (race_of(run, sets, begin, effort.finalists) for sets in (fewest, fewest + 2 * OTHERS))
    if run.kinds == 1:
        return same
    low, high = same.layer_forwards, other.layer_forwards
    return replace(same, layer_forwards=Bounds((low.expected + high.expected) / 2, low.least, high.most))


def halving_work(run: PlannedRun, most: int, begin: int, finalists: int) -> Work:
    """Halving among single segments."""
    shape, kept, seen, work = run.shape, run.shape.layers - run.length, 0, Work()
    for alive, until in rounds(min(most, kept + 1), run.searched, begin, finalists):
        # behind a segment are 0 to L - n layers, half of them on average
        behind = alive * kept / 2, sum(range(alive)), sum(range(kept, kept - alive, -1))
        entered = Bounds(*((until - seen) * (shape.layers + n) for n in behind))
        work += Work.of(shape, entered, heads=(until - seen) * (alive + 1))
        seen = until
    return work


def sets_work(run: PlannedRun, sets: int, begin: int, finalists: int) -> Work:
    """Halving among sets of several segments, of which it is not known beforehand how many layers they share."""
    shape, kept, seen, work = run.shape, run.shape.layers - run.length, 0, Work()
    for alive, until in rounds(sets, run.searched, begin, finalists):
        new = until - seen
        entered = Bounds(new * (shape.layers + alive * kept / 2), 0, new * (shape.layers + alive * kept))
        work += Work.of(shape, entered, heads=new * (alive + 1))
        seen = until
    return work


def climb_work(run: PlannedRun, count: int) -> Work:
    """The climb: one round at least; two are expected, the second of which finds nothing better."""
    few = few_rows(run.searched, run.kinds)
    walls, kept = 2 * count, run.shape.layers - run.length
    round_of = sets_work(run, walls * walls + 1, few, CLIMB_FINALISTS)
    # fewer segments than K may split: a layer leaves one for anywhere
    widest = sets_work(run, walls * (walls + kept), few, CLIMB_FINALISTS).layer_forwards
    rounds = Bounds(2 * round_of.layer_forwards.expected, 0, MOST_CLIMBS * widest.most)
    return Work.of(run.shape, rounds, heads=2 * round_of.head_rows)


def race_several_cost(run: PlannedRun, count: int) -> Spent:
    """Every single segment on a few rows, halving among the sets of least sum, and the climb."""
    shape, layers, few = run.shape, run.shape.layers, few_rows(run.searched, run.kinds)
    rows = coarse_rows(run.searched, run.kinds)
    singles = [DENSE, *((segment,) for segment in all_lengths(run.length, layers))]
    priced = Work.of(shape, set_work(singles, layers, rows), heads=rows * len(singles))
    raced = sets_work(run, COARSE_SETS * layers, few, FINALISTS)
    return Spent(sweep_cost(run, singles).peak, priced + raced + climb_work(run, count))


def decided(
    name: str, prices: Prices, foretold: Foretold, limits: Restriction, count: int, effort: Effort
) -> SearchResult:
    """The real cut decides among what the gate proposes."""
    asked = [(1.0, effort.sets(count)), *([(LIGHTER, OTHERS), (0.0, OTHERS)] if prices.kinds > 1 else [])]
    if effort.climbs and count > 1:
        proposed = corrected_proposals(prices, foretold, limits, count, asked)
    else:
        proposed = proposals_of_each(foretold, limits, count, asked)
    sets = list(dict.fromkeys(cuts for some in proposed for cuts in some))
    begin = first_of_proposals(prices.rows, prices.kinds)
    found = halving(prices, sets, f"{name}: {len(sets)} proposals race", begin=begin, finalists=effort.finalists)
    if effort.climbs and count > 1:
        found = climb(prices, found, limits, count)
    lighter = proposed[1] if len(asked) > 1 else []
    return SearchResult(name, found, prices.cost, by_text=beside_text(prices, found, sets), lighter=lighter)


@costs(lambda run: gate_cost(run, GATE), prices_itself=True, several=lambda run, count: gate_cost(run, GATE, count))
def gate(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    seed: int = 0,
    num_segments: int = 1,
    objective: str | Objective = "kl",
    probes: ProbeRows | None = None,
    restriction: Restriction | None = None,
) -> SearchResult:
    """CLP's gate (2510.23652) alone: no cut is priced but those that its gradients propose."""
    prices = Prices(runner, shuffled(tokens, seed), cost, as_objective(objective), probes)
    limits = restriction or Restriction.none(len(runner), length)
    foretold = foretell(prices, GATE.gradient_rows(prices.rows), seed)
    return decided("gate", prices, foretold, limits, num_segments, GATE)


@costs(lambda run: gate_cost(run, CLP), prices_itself=True, several=lambda run, count: gate_cost(run, CLP, count))
def clp(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    seed: int = 0,
    num_segments: int = 1,
    objective: str | Objective = "kl",
    probes: ProbeRows | None = None,
    restriction: Restriction | None = None,
) -> SearchResult:
    """CLP's gate (2510.23652), made safe by more real cuts."""
    prices = Prices(runner, shuffled(tokens, seed), cost, as_objective(objective), probes)
    limits = restriction or Restriction.none(len(runner), length)
    foretold = foretell(prices, CLP.gradient_rows(prices.rows), seed)
    return decided("clp", prices, foretold, limits, num_segments, CLP)


def race_cost(run: PlannedRun) -> Spent:
    """Halving of all segments, for one segment: `gate_cost` without the gate."""
    kept = run.shape.layers - run.length
    return Spent(all_segments_cost(run).peak, halving_work(run, kept + 1, first_rows(run.searched), FINALISTS))


@costs(race_cost, prices_itself=True, several=race_several_cost)
def race(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    seed: int = 0,
    num_segments: int = 1,
    objective: str | Objective = "kl",
    probes: ProbeRows | None = None,
    restriction: Restriction | None = None,
) -> SearchResult:
    """Successive halving by real cuts, without a gradient: what the gate has to be compared with.

    With one segment all race. With several, where not all sets can be priced, each segment is priced alone on a few
    rows, the sets of least sum race, and the best's one-layer moves race against it until none is better.
    """
    prices = Prices(runner, shuffled(tokens, seed), cost, as_objective(objective), probes)
    limits = restriction or Restriction.none(len(runner), length)
    if num_segments == 1:
        sets: Sequence[Cuts] = [(segment,) for segment in limits.needed_segments()]
        found = halving(prices, sets)
    else:
        sets = priced_sums(prices, limits, num_segments)
        found = climb(prices, halving(prices, sets), limits, num_segments)
    return SearchResult("race", found, cost, by_text=beside_text(prices, found, sets))


def priced_sums(prices: Prices, limits: Restriction, count: int) -> list[Cuts]:
    """Sets of several segments by the sum of what each costs alone, priced by its real cut on a few rows."""
    singles = all_lengths(limits.length, len(limits.may))
    costs = prices.weighted.mean(prices.of_singles(singles)).tolist()
    ranked = cheapest_sums(dict(zip(singles, costs, strict=True)), limits, count)
    if not ranked:
        limits.needed_segments()  # raises: a single segment would have been among them
    return ranked[: COARSE_SETS * len(limits.may)]


def climb(prices: Prices, found: list[Candidate], limits: Restriction, count: int) -> list[Candidate]:
    """Race the one-layer moves of the best candidate against it until none is better."""
    best = found[0].segments
    known = {candidate.segments: candidate for candidate in found}
    for _ in range(MOST_CLIMBS):
        moves = filter(limits.allows, neighbours(best, len(limits.may), count))
        name = f"race beside {', '.join(map(str, best))}"
        raced = halving(prices, {best, *moves}, name, finalists=CLIMB_FINALISTS)
        known |= {candidate.segments: candidate for candidate in raced}
        ordered = sorted(known.values(), key=merit)
        if ordered[0].segments == best:
            break
        best = ordered[0].segments
    return sorted(known.values(), key=merit)
