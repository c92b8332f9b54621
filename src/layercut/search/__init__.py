"""Find the layers that a model can best do without. Every method goes in by `find_segments` and comes out alike."""

from __future__ import annotations

import time

import torch

from layercut.progress import bar
from layercut.search import criteria
from layercut.search.exhaustive import (
    DENSE,
    Cuts,
    all_segments,
    segment_costs,
    set_costs,
    set_losses,
    set_work,
    sweep_work,
)
from layercut.search.gate import clp_search, schedule_for
from layercut.search.greedy import evolution, sleb, sleb_work
from layercut.search.result import Candidate, Cost, SearchResult
from layercut.search.statistics import similarity, taylor_scores
from layercut.segments import Segment
from layercut.sweep import Stack

__all__ = ["Candidate", "Cost", "SearchResult", "find_segments", "price_segments"]


def find_segments(
    stack: Stack, tokens: torch.Tensor, length: int, method: str, *, seed: int, oracle: bool = False
) -> SearchResult:
    """Search `length` layers to remove on calibration tokens [N, T], by any of `config.Method`.

    clp and exhaustive price their candidates as part of the search. What a baseline picks is priced too, by the KL
    of the real cut on all tokens, but that is in neither its `cost` nor its `seconds`, which hold what the method
    itself needs.
    """
    begun = time.perf_counter()
    if method == "exhaustive":
        result = _exhaustive(stack, tokens, length)
        result.seconds = time.perf_counter() - begun
    elif method == "clp":
        result = _clp(stack, tokens, length, seed)
        result.seconds = time.perf_counter() - begun
    else:
        picked = _pick(stack, tokens, length, method, seed, cost := Cost())
        seconds = time.perf_counter() - begun
        result = SearchResult(method, set_costs(stack, tokens, [picked], Cost()), cost, seconds=seconds)
    if oracle and method != "exhaustive":
        exact = _exhaustive(stack, tokens, length)
        result.oracle = exact.to_json() | {"kl": exact.candidates[0].kl, "regret": regret(result, exact)}
    return result


def regret(result: SearchResult, oracle: SearchResult) -> float:
    """KL of the segment found over KL of the best there is: 1 is perfect."""
    found, best = result.candidates[0].kl, oracle.candidates[0].kl
    return found / best if best > 0 else 1.0 if found == best else float("inf")


def price_segments(stack: Stack, tokens: torch.Tensor, segments: list[Segment]) -> SearchResult:
    """No search: segments given by hand, priced as the one cut they are."""
    cost, cuts = Cost(), tuple(sorted(segments))
    with bar("pricing the cut", set_work([DENSE, cuts], len(stack), len(tokens))) as advance:
        return SearchResult("given", set_costs(stack, tokens, [cuts], cost, advance=advance), cost)


def _exhaustive(stack: Stack, tokens: torch.Tensor, length: int) -> SearchResult:
    cost = Cost()
    segments = all_segments(length, len(stack))
    with bar(f"sweeping {len(segments)} segments", sweep_work(segments, len(stack), len(tokens))) as advance:
        return SearchResult("exhaustive", segment_costs(stack, tokens, segments, cost, advance=advance), cost)


def _clp(stack: Stack, tokens: torch.Tensor, length: int, seed: int) -> SearchResult:
    cost = Cost()
    schedule = schedule_for(length, len(stack))
    with bar(f"gate: {schedule.particles} places descend", schedule.steps) as advance:
        candidates, path = clp_search(stack, tokens, length, cost, seed=seed, schedule=schedule, advance=advance)
    return SearchResult("clp", candidates, cost, path)


def _pick(stack: Stack, tokens: torch.Tensor, length: int, method: str, seed: int, cost: Cost) -> Cuts:
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
