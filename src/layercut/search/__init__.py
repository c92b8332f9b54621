"""Find the segment that a model can best do without. Every method goes in by `find_segments` and comes out alike."""

from __future__ import annotations

import torch

from layercut.progress import bar
from layercut.search.exhaustive import all_segments, segment_costs, sweep_work
from layercut.search.gate import clp_search, schedule_for
from layercut.search.result import Candidate, Cost, SearchResult
from layercut.segments import Segment
from layercut.sweep import Stack

__all__ = ["Candidate", "Cost", "SearchResult", "find_segments", "price_segments"]


def find_segments(
    stack: Stack, tokens: torch.Tensor, length: int, method: str, *, seed: int, oracle: bool = False
) -> SearchResult:
    """Search one segment of `length` layers on calibration tokens [N, T]."""
    if method == "exhaustive":
        return _exhaustive(stack, tokens, length)
    result = _clp(stack, tokens, length, seed)
    if oracle:
        exact = _exhaustive(stack, tokens, length)
        result.oracle = exact.to_json() | {"kl": exact.candidates[0].kl, "regret": regret(result, exact)}
    return result


def regret(result: SearchResult, oracle: SearchResult) -> float:
    """KL of the segment found over KL of the best there is: 1 is perfect."""
    found, best = result.candidates[0].kl, oracle.candidates[0].kl
    return found / best if best > 0 else 1.0 if found == best else float("inf")


def price_segments(stack: Stack, tokens: torch.Tensor, segments: list[Segment]) -> SearchResult:
    """No search: segments given by hand. A single one is priced; of several together only the whole would tell."""
    cost = Cost()
    if len(segments) > 1:
        return SearchResult("given", [Candidate(tuple(segments), float("nan"))], cost)
    with bar("pricing the segment", sweep_work(segments, len(stack), len(tokens))) as advance:
        return SearchResult("given", segment_costs(stack, tokens, segments, cost, advance=advance), cost)


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
