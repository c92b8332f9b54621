"""What the gate foretells of segments, put right by real cuts of a few of them.

The gate's price is of second order around the dense model: of a segment of ten layers it may tell a third of what its
real cut costs, and a set that has one looks cheaper than two shorter segments which are better. So the segments of what
is proposed are cut for real, each alone, on a few rows; of the others what is foretold is multiplied by what these have
in common, and the sets of least sum are proposed anew, until every segment in them is known (MOST_ROUNDS at most):

    C'(s) = C(s) exp( sum_p w_sp ln(c_p / C(p)) / (1 + sum_p w_sp) )        w_sp = (|s and p| / |s or p|)^4

with C the gate's price, c_p the real one of a segment p, and layers counted in w. (Layercut's; how much of the sets of
least real sum it finds, and of what else was tried: docs/log.md.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layercut.distributed import processes
from layercut.layer_search.gate import Foretold, proposals
from layercut.layer_search.prices import WORST, Prices
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.sweep import DENSE, Cuts, all_lengths, set_work
from layercut.models.cost import Bounds, PlannedRun, Work
from layercut.segments import Segment

SHARPNESS = 4
"""Power of what two segments have in common. Of 1, 2 and 4 the one by which the least sum was found each time."""

MOST_ROUNDS = 12
"""Proposals are made anew so often at most."""

LEAST, FARTHEST = 1e-6, 100.0
"""Prices below the first, and quotients beyond the second, are rounding or overflow, and not what a segment costs."""

EXPECTED_SHARE = 0.3
"""Of the work of cutting every segment of up to n layers, what is expected."""


def proposals_of_each(
    foretold: Foretold, limits: Restriction, count: int, asked: Sequence[tuple[float, int]]
) -> list[list[Cuts]]:
    """What a table proposes where tests count as much, less, and nothing."""
    return [proposals(foretold.weighing(tests), limits, count, most) for tests, most in asked]


def corrected_proposals(
    prices: Prices, foretold: Foretold, limits: Restriction, count: int, asked: Sequence[tuple[float, int]]
) -> list[list[Cuts]]:
    """The same, with what real cuts of their segments say of the table, until all of these are known."""
    told, known = foretold, dict[Segment, tuple[float, float]]()
    for _ in range(MOST_ROUNDS):
        proposed = proposals_of_each(told, limits, count, asked)
        lacking = sorted({segment for some in proposed for cuts in some for segment in cuts} - known.keys())
        if not lacking:
            return proposed
        found = prices.of_singles(lacking)
        both = (prices.weighted.mean(found, tests).tolist() for tests in (1.0, 0.0))
        known |= dict(zip(lacking, zip(*both, strict=True), strict=True))
        told = corrected(foretold, known)
    return proposals_of_each(told, limits, count, asked)


def corrected(foretold: Foretold, known: dict[Segment, tuple[float, float]]) -> Foretold:
    """The gate's tables by the formula above.

    Every process does the same; the main one's are taken.
    """
    layers, priced = len(foretold.table) - 1, list(known)
    segments = all_lengths(layers, layers)
    common = shared_layers(segments, priced) ** SHARPNESS
    tables = []
    for kind, own in enumerate((foretold.table, foretold.text)):
        if own is not None:
            real = torch.tensor([known[segment][kind] for segment in priced], dtype=torch.float64)
            logs = (real.clamp_min(LEAST) / own[places(priced)].clamp_min(LEAST)).clamp(1 / FARTHEST, FARTHEST).log()
            weights = torch.where(real < WORST / 1e6, common, 0.0)  # a mean that holds what overflowed says nothing
            table = own.clone()
            table[places(segments)] *= ((weights @ logs) / (1 + weights.sum(1))).exp()
            table[places(priced)] = real
            tables.append(table)
    return Foretold(*processes.from_main(tables))


def places(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Where S segments stand in a table [L + 1, L + 1]: their rows and their columns."""
    return [segment.start for segment in segments], [segment.stop for segment in segments]


def shared_layers(ours: Sequence[Segment], theirs: Sequence[Segment]) -> torch.Tensor:
    """What segments have in common: layers in both over layers in either."""
    (starts, stops), (begins, ends) = (map(torch.tensor, places(some)) for some in (ours, theirs))
    both = (torch.minimum(stops[:, None], ends) - torch.maximum(starts[:, None], begins)).clamp_min(0).double()
    return both / ((stops - starts)[:, None] + (ends - begins) - both)


def corrections_work(run: PlannedRun, rows: int) -> Work:
    """The work of the real cuts, of which it is not known beforehand how many there are."""
    layers = run.shape.layers
    every = [DENSE, *((segment,) for segment in all_lengths(run.length, layers))]
    most = set_work(every, layers, rows) + (MOST_ROUNDS - 1) * layers * rows
    forwards = Bounds(EXPECTED_SHARE * most, layers * rows, most)
    return Work.of(run.shape, forwards, heads=EXPECTED_SHARE * rows * len(every))
