"""Searches by real cuts alone: `race`, successive halving, and `exhaustive`, every cut on every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layercut.data.probes import ProbeRows
from layercut.errors import ConfigError
from layercut.layer_search.cut_costs import FINALISTS, CutCosts, best_by_text, halving, shuffled, with_single
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Candidate, Cost, SearchResult
from layercut.layer_search.segment_sets import all_sets, cheapest_sums, neighbours, number_of_sets
from layercut.layer_search.sweep import DENSE, Cuts, all_lengths, set_costs, set_work
from layercut.models.runner import DecoderRunner
from layercut.progress import bar

COARSE_SETS = 4  # race with several segments: so many sets a layer are raced
MOST_CLIMBS, CLIMB_FINALISTS = 8, 2
"""Rounds of climbing at most, each of which takes one move; and how many moves are run on all rows, at least."""
MOST_SETS = 20_000  # the exhaustive search refuses more sets than these


def race(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    seed: int,
    num_segments: int,
    probes: ProbeRows | None,
    restriction: Restriction,
) -> SearchResult:
    """Successive halving by real cuts, without a gradient: what an estimate has to be compared with.

    With one segment all race. With several, where not all sets can be run, each segment is run alone on a few
    rows, the sets of least sum race, and the best's one-layer moves race against it until none is better.
    """
    costs = CutCosts(runner, shuffled(tokens, seed), cost, probes)
    if num_segments == 1:
        sets: Sequence[Cuts] = [(segment,) for segment in restriction.needed_segments()]
        found = halving(costs, sets)
    else:
        sets = least_sums(costs, restriction, num_segments)
        single = [cuts for cuts in sets if len(cuts) == 1]
        found = with_single(costs, climb(costs, halving(costs, sets), restriction, num_segments), single)
    return SearchResult("race", found, cost, by_text=best_by_text(costs, found, sets))


def least_sums(costs: CutCosts, limits: Restriction, count: int) -> list[Cuts]:
    """Sets by the sum of what each segment costs alone, by its real cut on a few rows; some of one segment."""
    singles = all_lengths(limits.length, len(limits.may))
    alone = costs.weighted.mean(costs.of_singles(singles)).tolist()
    sums = dict(zip(singles, alone, strict=True))
    ranked = cheapest_sums(sums, limits, count)
    if not ranked:
        limits.needed_segments()  # raises: a single segment would have been among them
    one = cheapest_sums(sums, limits, 1)[:FINALISTS]
    return [*dict.fromkeys([*ranked[: COARSE_SETS * len(limits.may)], *one])]


def climb(costs: CutCosts, found: list[Candidate], limits: Restriction, count: int) -> list[Candidate]:
    """Race the one-layer moves of the best candidate against it until none is better."""
    best = found[0].segments
    known = {candidate.segments: candidate for candidate in found}
    for _ in range(MOST_CLIMBS):
        moves = filter(limits.allows, neighbours(best, len(limits.may), count))
        name = f"race beside {', '.join(map(str, best))}"
        raced = halving(costs, {best, *moves}, name, finalists=CLIMB_FINALISTS)
        known |= {candidate.segments: candidate for candidate in raced}
        ordered = sorted(known.values(), key=lambda each: each.merit)
        if ordered[0].segments == best:
            break
        best = ordered[0].segments
    return sorted(known.values(), key=lambda each: each.merit)


def exhaustive(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    num_segments: int,
    probes: ProbeRows | None,
    restriction: Restriction,
) -> SearchResult:
    """Every set of at most `num_segments` segments with n layers in all, by its real cut; the best is the optimum."""
    layers = len(runner)
    if (number := number_of_sets(length, layers, num_segments)) > MOST_SETS:
        words = f"{number:,} sets of {num_segments} segments are too many to run them all; allowed are {MOST_SETS:,}"
        raise ConfigError(words, f"search them by an estimate: --method fisher --num-segments {num_segments}")
    sets = [cuts for cuts in all_sets(length, layers, num_segments) if restriction.allows(cuts)]
    if not sets:
        words = f"no cut of {length} layers into {num_segments} segments is allowed: {restriction.why}"
        raise ConfigError(words, "give another --ratio, or leave out --for")
    if probes is not None:
        costs = CutCosts(runner, tokens, cost, probes)
        with bar(f"sweeping {len(sets)} sets", None):
            found = costs.candidates(costs.ranked(sets, costs.rows))
            return SearchResult("exhaustive", found, cost, by_text=best_by_text(costs, found, sets))
    with bar(f"sweeping {len(sets)} segments", set_work([DENSE, *sets], layers, len(tokens))) as advance:
        return SearchResult("exhaustive", set_costs(runner, tokens, sets, cost, advance=advance), cost)
