"""Find the layers that a model can best do without. Every method goes in by `find_segments` and comes out alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from layercut.errors import ConfigError
from layercut.layer_search import criteria
from layercut.layer_search.budgets import (
    length_for_size,
    length_for_speedup,
    longest_within,
    perplexity_rise,
    split_rows,
    sweep_rows,
    triangle,
    triangle_sets,
)
from layercut.layer_search.clp import clp_search, merit, schedule_for
from layercut.layer_search.greedy import evolution, sleb, sleb_work
from layercut.layer_search.prices import Objective, Prices, candidates
from layercut.layer_search.result import Candidate, Cost, SearchResult
from layercut.layer_search.statistics import similarity, taylor_scores
from layercut.layer_search.sweep import DENSE, Cuts, set_costs, set_losses, set_work
from layercut.layer_search.walls import all_sets, number_of_sets
from layercut.models.runner import DecoderRunner
from layercut.progress import bar
from layercut.segments import Segment

__all__ = [
    "Candidate", "Cost", "SearchResult", "add_triangle_", "find_segments", "length_for_size", "length_for_speedup",
    "longest_within", "perplexity_rise", "price_segments", "rescored", "split_rows",
]  # fmt: skip

MOST_SETS = 20_000
"""Exhaustive search refuses more sets than these; the gate does not."""


def find_segments(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    method: str,
    *,
    seed: int,
    oracle: bool = False,
    count: int = 1,
    objective: Objective = "kl",
) -> SearchResult:
    """Search `length` layers to remove on calibration tokens [N, T], by any of `config.Method`.

    count: into so many segments at most; objective: what makes a cut good. Both are for clp and exhaustive, which
    price their candidates as part of the search. What a baseline picks is priced too, by the KL of the real cut on
    all tokens, but that is in neither its `cost` nor its `seconds`, which hold what the method itself needs.
    """
    begun = time.perf_counter()
    if count > length:
        raise ConfigError(
            f"{length} layers cannot be removed as {count} segments", f"allowed is --num-segments 1 to {length}"
        )
    if method == "exhaustive":
        result = _exhaustive(stack, tokens, length, count, objective)
        result.seconds = time.perf_counter() - begun
    elif method == "clp":
        result = _clp(stack, tokens, length, seed, count, objective)
        result.seconds = time.perf_counter() - begun
    else:
        picked = _pick(stack, tokens, length, method, seed, cost := Cost())
        seconds = time.perf_counter() - begun
        result = SearchResult(method, set_costs(stack, tokens, [picked], Cost()), cost, seconds=seconds)
    if oracle and method != "exhaustive":
        _add_oracle_(result, _exhaustive(stack, tokens, length, count, objective))
    return result


def _add_oracle_(result: SearchResult, exact: SearchResult) -> None:
    """Lay the exhaustive answer beside a result."""
    result.oracle = exact.to_json() | {"kl": exact.candidates[0].kl, "regret": regret(result, exact)}


def regret(result: SearchResult, oracle: SearchResult) -> float:
    """Price of the segments found over that of the best there are, as both searched: 1 is perfect."""
    found, best = merit(result.candidates[0])[0], merit(oracle.candidates[0])[0]
    return 1.0 if found == best else found / best if best > 0 else math.inf


def price_segments(stack: DecoderRunner, tokens: torch.Tensor, segments: list[Segment]) -> SearchResult:
    """No search: segments given by hand, priced as the one cut they are."""
    cost, cuts = Cost(), tuple(sorted(segments))
    with bar("pricing the cut", set_work([DENSE, cuts], len(stack), len(tokens))) as advance:
        return SearchResult("given", set_costs(stack, tokens, [cuts], cost, advance=advance), cost)


def rescored(result: SearchResult, score: Callable[[Cuts], float], most: int = 4) -> SearchResult:
    """The search's first candidates, judged by a dearer score than it could afford for all; lower is better."""
    judged = [replace(c, score=score(c.segments)) for c in result.candidates[:most]]
    return replace(result, candidates=sorted(judged, key=merit))


def add_triangle_(result: SearchResult, stack: DecoderRunner, tokens: torch.Tensor, length: int) -> None:
    """Price every segment of up to `length` layers exactly, for `result.triangle`; its cost is not the search's."""
    sets = triangle_sets(length, len(stack))
    with bar(f"sweeping {len(sets)} segments", set_work([DENSE, *sets], len(stack), len(tokens))) as advance:
        result.triangle = triangle(stack, tokens, length, Cost(), advance=advance)


def _exhaustive(
    stack: DecoderRunner, tokens: torch.Tensor, length: int, count: int, objective: Objective
) -> SearchResult:
    cost, layers = Cost(), len(stack)
    if (number := number_of_sets(length, layers, count)) > MOST_SETS:
        raise ConfigError(
            f"{number:,} sets of {count} segments are too many to price them all; allowed are {MOST_SETS:,}",
            f"search them by the gate: --method clp --num-segments {count}",
        )
    sets = all_sets(length, layers, count)
    if objective != "kl":
        prices = Prices(stack, tokens, cost, objective)
        with bar(f"sweeping {number} sets", None):
            return SearchResult("exhaustive", candidates(prices, prices.ranked(sets, len(tokens))), cost)
    rows = sweep_rows(stack, tokens, number)
    with bar(f"sweeping {number} segments", set_work([DENSE, *sets], layers, len(tokens))) as advance:
        return SearchResult("exhaustive", set_costs(stack, tokens, sets, cost, rows=rows, advance=advance), cost)


def _clp(
    stack: DecoderRunner, tokens: torch.Tensor, length: int, seed: int, count: int, objective: Objective
) -> SearchResult:
    cost = Cost()
    schedule = schedule_for(len(stack), length, count, len(tokens))
    with bar(f"gate: {schedule.particles} sets descend", schedule.steps) as advance:
        found, path = clp_search(
            stack, tokens, length, cost, seed=seed, count=count, objective=objective, schedule=schedule,
            advance=advance,
        )  # fmt: skip
    return SearchResult("clp", found, cost, path)


def _pick(stack: DecoderRunner, tokens: torch.Tensor, length: int, method: str, seed: int, cost: Cost) -> Cuts:
    """What a baseline chooses; what that took is added to `cost`."""
    layers, rows = len(stack), len(tokens)
    match method:
        case "random":
            return criteria.random_segment(layers, length, seed)
        case "reverse-order":
            return criteria.reverse_order(layers, length)
        case "block-influence" | "angular" | "cosine":
            with bar(method, rows) as advance:
                statistics = similarity(stack, tokens, cost, advance=advance)
            if method == "block-influence":
                return criteria.block_influence(statistics, length)
            return (criteria.angular if method == "angular" else criteria.cosine)(statistics, length)
        case "perplexity":
            sets = [(Segment(i, i + 1),) for i in range(layers)]
            with bar(method, set_work(sets, layers, rows)) as advance:
                losses = set_losses(stack, tokens, sets, cost, advance=advance)
            return criteria.one_shot(torch.tensor([losses[cuts] for cuts in sets]), length)
        case "taylor":
            with bar(method, rows) as advance:
                return criteria.one_shot(taylor_scores(stack, tokens, cost, advance=advance), length)
        case "sleb":
            with bar(method, length) as advance:
                return sleb(stack, tokens, length, cost, advance=advance)
        case "evolution":
            with bar(method, sleb_work(length, layers, rows)) as advance:
                return evolution(stack, tokens, length, cost, seed=seed, advance=advance)
    raise ValueError(f"unknown method {method!r}")
