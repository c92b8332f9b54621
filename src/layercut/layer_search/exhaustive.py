"""The criterion `exhaustive`: price every segment, or every set of segments, by its real cut in one sweep."""

from __future__ import annotations

import torch

from layercut.data.probes import ProbeRows
from layercut.errors import ConfigError
from layercut.layer_search.gate_walls import all_sets, number_of_sets
from layercut.layer_search.prices import Prices, as_objective, beside_text, candidates, is_kl
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost, SearchResult
from layercut.layer_search.search_cost import all_segments_cost, costs
from layercut.layer_search.sweep import DENSE, set_costs, set_work, sweep_cost
from layercut.models.cost import PlannedRun, Spent
from layercut.models.objectives import Objective
from layercut.models.runner import DecoderRunner
from layercut.progress import bar

MOST_SETS = 20_000
"""More sets than these are refused."""


def all_sets_cost(run: PlannedRun, count: int) -> Spent:
    """Price every set of K segments at most."""
    if number_of_sets(run.length, run.shape.layers, count) > MOST_SETS:
        return Spent({}, None)
    return sweep_cost(run, [DENSE, *all_sets(run.length, run.shape.layers, count)])


@costs(all_segments_cost, prices_itself=True, several=all_sets_cost)
def exhaustive(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    num_segments: int = 1,
    objective: str | Objective = "kl",
    probes: ProbeRows | None = None,
    restriction: Restriction | None = None,
) -> SearchResult:
    """Price every set of at most `num_segments` segments with `length` layers in all; the best is the optimum."""
    layers, objective = len(runner), as_objective(objective)
    if (number := number_of_sets(length, layers, num_segments)) > MOST_SETS:
        raise ConfigError(
            f"{number:,} sets of {num_segments} segments are too many to price them all; allowed are {MOST_SETS:,}",
            f"search them by the gate: --method clp --num-segments {num_segments}",
        )
    limits = restriction or Restriction.none(layers, length)
    sets = [cuts for cuts in all_sets(length, layers, num_segments) if limits.allows(cuts)]
    if not sets:
        raise ConfigError(
            f"no cut of {length} layers into {num_segments} segments is allowed: {limits.why}",
            "give another --ratio, or leave out --for",
        )
    number = len(sets)
    if probes is not None or not is_kl(objective):
        prices = Prices(runner, tokens, cost, objective, probes)
        with bar(f"sweeping {number} sets", None):
            found = candidates(prices, prices.ranked(sets, prices.rows))
            return SearchResult("exhaustive", found, cost, by_text=beside_text(prices, found, sets))
    with bar(f"sweeping {number} segments", set_work([DENSE, *sets], layers, len(tokens))) as advance:
        return SearchResult("exhaustive", set_costs(runner, tokens, sets, cost, advance=advance), cost)
