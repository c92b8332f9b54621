"""What a search computes and holds, told beforehand: each criterion says it for itself, and a search adds up.

    @costs(cost)
    def criterion(runner, tokens, length, *, cost): ...

`cost(run)` is the work that `criterion` adds to its `Cost` for one segment of n layers, and the memory that it holds. A
criterion that does not say it is unknown to `layercut plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from layercut import registries
from layercut.config import SearchConfig
from layercut.layer_search.sweep import DENSE, all_segments, set_work, sweep_cost
from layercut.models.cost import Bounds, PlannedRun, Spent, Work, total
from layercut.segments import Segment

Function = TypeVar("Function", bound=Callable[..., Any])
CostFunction = Callable[[PlannedRun], Spent]
SeveralCost = Callable[[PlannedRun, int], Spent]


def costs(
    cost: CostFunction, *, prices_itself: bool = False, several: SeveralCost | None = None
) -> Callable[[Function], Function]:
    """A decorator by which a criterion says what it costs."""

    def say(criterion: Function) -> Function:
        criterion.__dict__.update(planned_cost=cost, prices_itself=prices_itself, planned_several=several)
        return criterion

    return say


def all_segments_cost(run: PlannedRun) -> Spent:
    """Price every segment of n layers by its real cut."""
    segments = all_segments(run.length, run.shape.layers)
    return sweep_cost(run, [DENSE, *((segment,) for segment in segments)])


def measured_once(forwards: int, backwards: int = 0) -> CostFunction:
    """The cost of passes through the whole dense model; its memory is taken as that of all segments' pricing."""

    def cost(run: PlannedRun) -> Spent:
        there, back = (n * run.shape.layers * run.calibration for n in (forwards, backwards))
        work = Work.of(run.shape, there, back, trained=back, heads=2 * backwards * run.calibration)
        return Spent(all_segments_cost(run).peak, work)

    return cost


def picked_work(run: PlannedRun) -> Work:
    """The pricing of what a criterion picked, by one real cut somewhere."""
    layers, rows = run.shape.layers, run.calibration
    ends = [set_work([DENSE, (Segment(s, s + run.length),)], layers, rows) for s in (0, layers - run.length)]
    return Work.of(run.shape, Bounds(sum(ends) / 2, min(ends), max(ends)), heads=2 * rows)


def search_cost(run: PlannedRun) -> Spent:
    """What the search of a run costs: of given segments, or by the criterion.

    Several segments, and what does not say its cost, are taken to hold what the exhaustive search of one does.
    """
    search = run.config.search
    if search.segments:
        return sweep_cost(run, [DENSE, tuple(run.segments)])
    criterion = registries.criteria.get(search.method)
    found = getattr(criterion, "planned_cost", lambda run: Spent(all_segments_cost(run).peak, None))(run)
    several = getattr(criterion, "planned_several", None)
    if search.num_segments == "auto":
        # where tests are weighed with the text, one segment is compared with two
        more = several(run, 2) if several and run.tests and run.length > 1 else Spent({}, Work())
        if more.work is None and search.method == "exhaustive":
            more = Spent({}, Work())  # more sets than it prices: one segment alone is searched
        found = found.then(more)
    elif search.num_segments > 1:
        more = several(run, min(search.num_segments, run.length)) if several else Spent({}, None)
        found = Spent(max(found.peak, more.peak, key=total), more.work)
    if found.work is None:
        return Spent(found.peak, None)
    return found if criterion.prices_itself else Spent(found.peak, found.work + picked_work(run))


def unknown_search(search: SearchConfig) -> str | None:
    """What to say about the search by a criterion of another package that does not say its cost; None for others."""
    known = search.segments or search.method in registries.criteria.own
    if known or hasattr(registries.criteria.get(search.method), "planned_cost"):
        return None
    return (
        f"What the criterion {search.method!r} computes and holds is unknown: its time is not counted, "
        "its memory is taken as the exhaustive search's."
    )
