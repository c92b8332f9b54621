"""What a search computes and holds, for `layercut plan`: the work that each criterion adds to its `Cost`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from layercut import registries
from layercut.config import SearchConfig
from layercut.layer_search.baselines import sleb_work
from layercut.layer_search.fisher import MOST_ROUNDS, OTHERS, PER_SEGMENT, PROPOSALS, first_of_proposals, gradient_rows
from layercut.layer_search.prices import FINALISTS, coarse_rows, few_rows, first_rows, rounds
from layercut.layer_search.race import CLIMB_FINALISTS, COARSE_SETS, MOST_CLIMBS, MOST_SETS
from layercut.layer_search.segment_sets import all_sets, number_of_sets
from layercut.layer_search.sweep import DENSE, all_lengths, all_segments, set_work, sweep_cost
from layercut.models.cost import Bounds, PlannedRun, Spent, Work, total
from layercut.segments import Segment

EXPECTED_SHARE = 0.3
"""Of the work of cutting every segment of up to n layers, what correcting the estimate is expected to take."""


def search_cost(run: PlannedRun) -> Spent:
    """What the search of a run costs: of given segments, or by the criterion.

    Several segments, and what is unknown, are taken to hold what the exhaustive search of one segment does.
    """
    search, length = run.config.search, run.length
    if search.segments:
        return sweep_cost(run, [DENSE, tuple(run.segments)])
    peak = all_segments_cost(run).peak
    if search.method not in COSTS:
        return Spent(peak, None)
    found = COSTS[search.method](run)
    several = SEVERAL.get(search.method)
    if search.num_segments == "auto":  # with probes one segment is compared with two
        if several and run.tests and length > 1:
            two = several(run, 2)
            if two.work is not None:  # else there are more sets than the exhaustive search runs
                found = found.then(two)
    elif search.num_segments > 1:
        more = several(run, min(search.num_segments, length)) if several else Spent({}, None)
        found = Spent(max(found.peak, more.peak, key=total), more.work)
    if found.work is None or several:
        return found
    return Spent(found.peak, found.work + picked_work(run))


def unknown_search(search: SearchConfig) -> str | None:
    """What to say about the search by a criterion of another package; None for others."""
    if search.segments or search.method in registries.criteria.own:
        return None
    return (
        f"What the criterion {search.method!r} computes and holds is unknown: its time is not counted, "
        "its memory is taken as the exhaustive search's."
    )


def all_segments_cost(run: PlannedRun) -> Spent:
    """Run every segment of n layers."""
    return sweep_cost(run, [DENSE, *((segment,) for segment in all_segments(run.length, run.shape.layers))])


def all_sets_cost(run: PlannedRun, count: int) -> Spent:
    """Run every set of K segments at most."""
    if number_of_sets(run.length, run.shape.layers, count) > MOST_SETS:
        return Spent({}, None)
    return sweep_cost(run, [DENSE, *all_sets(run.length, run.shape.layers, count)])


def measured_once(forwards: int, backwards: int = 0) -> Callable[[PlannedRun], Spent]:
    """Passes through the whole dense model; their memory is taken as that of running all segments."""

    def cost(run: PlannedRun) -> Spent:
        there, back = (n * run.shape.layers * run.calibration for n in (forwards, backwards))
        work = Work.of(run.shape, there, back, trained=back, heads=2 * backwards * run.calibration)
        return Spent(all_segments_cost(run).peak, work)

    return cost


def picked_work(run: PlannedRun) -> Work:
    """One real cut somewhere, of what a criterion picked."""
    layers, rows = run.shape.layers, run.calibration
    ends = [set_work([DENSE, (Segment(s, s + run.length),)], layers, rows) for s in (0, layers - run.length)]
    return Work.of(run.shape, Bounds(sum(ends) / 2, min(ends), max(ends)), heads=2 * rows)


def perplexity_cost(run: PlannedRun) -> Spent:
    """The model without each layer in turn."""
    return Spent(
        all_segments_cost(run).peak, sweep_cost(run, [(Segment(i, i + 1),) for i in range(run.shape.layers)]).work
    )


def sleb_cost(run: PlannedRun) -> Spent:
    """`sleb_work`, and in each round logits of every layer that is left."""
    shape, rows = run.shape, run.calibration
    candidates = sum(shape.layers - removed for removed in range(run.length))
    work = Work.of(shape, sleb_work(run.length, shape.layers, rows), heads=rows * candidates)
    return Spent(all_segments_cost(run).peak, work)


def fisher_cost(run: PlannedRun, count: int = 1) -> Spent:
    """A pass there and back of some rows, and halving of what is proposed; of several segments corrections and climb.

    In the pass the hidden states are kept, their gradients, and what one layer needs at a time for its backward pass;
    at the turn there are a row of logits, p in float32 and the gradient.
    """
    shape, layers = run.shape, run.shape.layers
    rows, row = gradient_rows(run.searched), shape.stream(1)
    passes = Work.of(shape, rows * (2 * layers - 1), rows * (layers - 1), heads=2 * rows)
    step = {
        "streams": 2 * layers * row,
        "kept for backward": shape.most("saved"),
        "logits": shape.window * shape.vocabulary * (2 * shape.itemsize + 8),
    }
    begin = first_of_proposals(run.searched, run.kinds)
    sets = PROPOSALS if count == 1 else PER_SEGMENT * count
    raced = halving_work(run, count, sets, begin, FINALISTS)
    if run.kinds > 1:
        # those in which probes count less are other sets or the same
        other = halving_work(run, count, sets + 2 * OTHERS, begin, FINALISTS).layer_forwards
        low = raced.layer_forwards
        raced = replace(raced, layer_forwards=Bounds((low.expected + other.expected) / 2, low.least, other.most))
        # the best by text alone are run on all rows, where they are not already
        rest = (run.searched - begin) * (layers + FINALISTS * (layers - run.length))
        raced += Work.of(shape, Bounds(rest / 4, 0, rest), heads=(run.searched - begin) * FINALISTS / 2)
    if count > 1:
        rows = coarse_rows(run.searched, run.kinds)
        every = [DENSE, *((segment,) for segment in all_lengths(run.length, layers))]
        most = set_work(every, layers, rows) + (MOST_ROUNDS - 1) * layers * rows
        corrections = Bounds(EXPECTED_SHARE * most, layers * rows, most)
        raced += Work.of(shape, corrections, heads=EXPECTED_SHARE * rows * len(every)) + climb_work(run, count)
    return Spent(max(step, all_segments_cost(run).peak, key=total), passes + raced)


def halving_work(run: PlannedRun, count: int, sets: int, begin: int, finalists: int) -> Work:
    """Halving; of sets of several segments it is not known beforehand how many layers they share."""
    shape, kept, seen, work = run.shape, run.shape.layers - run.length, 0, Work()
    for alive, until in rounds(min(sets, kept + 1) if count == 1 else sets, run.searched, begin, finalists):
        # behind a segment are 0 to L - n layers, half of them on average
        behind = alive * kept / 2, 0, alive * kept
        if count == 1:
            behind = alive * kept / 2, sum(range(alive)), sum(range(kept, kept - alive, -1))
        least = 0 if count > 1 else shape.layers + behind[1]
        entered = Bounds(*((until - seen) * n for n in (shape.layers + behind[0], least, shape.layers + behind[2])))
        work += Work.of(shape, entered, heads=(until - seen) * (alive + 1))
        seen = until
    return work


def climb_work(run: PlannedRun, count: int) -> Work:
    """The climb: one round at least; two are expected, the second of which finds nothing better."""
    few = few_rows(run.searched, run.kinds)
    walls, kept = 2 * count, run.shape.layers - run.length
    round_of = halving_work(run, count, walls * walls + 1, few, CLIMB_FINALISTS)
    # fewer segments than K may split: a layer leaves one for anywhere
    widest = halving_work(run, count, walls * (walls + kept), few, CLIMB_FINALISTS).layer_forwards
    forwards = Bounds(2 * round_of.layer_forwards.expected, 0, MOST_CLIMBS * widest.most)
    return Work.of(run.shape, forwards, heads=2 * round_of.head_rows)


def race_cost(run: PlannedRun) -> Spent:
    """Halving of all segments."""
    kept = run.shape.layers - run.length
    return Spent(all_segments_cost(run).peak, halving_work(run, 1, kept + 1, first_rows(run.searched), FINALISTS))


def race_several_cost(run: PlannedRun, count: int) -> Spent:
    """Every single segment on a few rows, halving among the sets of least sum, and the climb."""
    shape, layers, few = run.shape, run.shape.layers, few_rows(run.searched, run.kinds)
    rows = coarse_rows(run.searched, run.kinds)
    singles = [DENSE, *((segment,) for segment in all_lengths(run.length, layers))]
    alone = Work.of(shape, set_work(singles, layers, rows), heads=rows * len(singles))
    raced = halving_work(run, count, COARSE_SETS * layers, few, FINALISTS)
    return Spent(sweep_cost(run, singles).peak, alone + raced + climb_work(run, count))


COSTS: dict[str, Callable[[PlannedRun], Spent]] = {
    "auto": fisher_cost, "fisher": fisher_cost, "race": race_cost, "exhaustive": all_segments_cost,
    "perplexity": perplexity_cost, "sleb": sleb_cost, "taylor": measured_once(2, 1),
    **dict.fromkeys(("random", "reverse-order"), measured_once(0)),
    **dict.fromkeys(("block-influence", "angular", "cosine"), measured_once(1)),
}  # fmt: skip
"""Of one segment; evolution runs until its budget is spent, and other packages' criteria are unknown."""
SEVERAL: dict[str, Callable[[PlannedRun, int], Spent]] = {
    "auto": fisher_cost, "fisher": fisher_cost, "race": race_several_cost, "exhaustive": all_sets_cost,
}  # fmt: skip
"""The same of criteria that take a number of segments, and run what they pick themselves."""
