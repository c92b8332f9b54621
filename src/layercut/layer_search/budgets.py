"""How many layers to remove, where the user gives a budget instead of a share: size, speed or loss.

Size and speed are arithmetic. A loss budget needs the model: the longest cut is found whose loss stays within it on
text that the search has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layercut.errors import ConfigError
from layercut.files import size, size_flag
from layercut.layer_search.result import Cost, SearchResult
from layercut.layer_search.sweep import DENSE, Cuts, set_losses
from layercut.models.losses import as_cost
from layercut.models.runner import DecoderRunner

UNSEEN_SHARE = 4  # with a loss budget, one calibration row in four is not searched on but verifies


def length_for_size(
    layer_bytes: Sequence[int],
    total_bytes: int,
    target_bytes: int,
    weights: str = "the model's weights",
    beside: Callable[[int], int] = lambda n: 0,
) -> int:
    """The fewest layers n such that any n of them bring the model's weights down to a size.

    Where layers differ in size, the lightest are counted, so that the target is met whichever are removed.
    """
    lightest = sorted(layer_bytes)
    sizes = [total_bytes - sum(lightest[:n]) + (beside(n) if n else 0) for n in range(len(lightest))]
    n = next((n for n, left in enumerate(sizes) if left <= target_bytes), len(lightest))
    if n == 0:
        words = f"the target size of {size(target_bytes)} is no cut: {weights} are {size(total_bytes)}"
        raise ConfigError(words, f"give a --target-size below {size(total_bytes)}")
    if n >= len(layer_bytes):
        smallest = min(sizes[1:], default=total_bytes)
        raise ConfigError(
            f"no cut of layers meets the target size of {size(target_bytes)}: with as few layers as "
            f"can be left {weights} are {size(smallest)}, most of it embeddings and head",
            f"allowed is down to --target-size {size_flag(smallest)}",
        )
    return n


def split_rows(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split calibration rows [N, T] into those to search on and those that verify what was found."""
    unseen = max(1, len(tokens) // UNSEEN_SHARE)
    if len(tokens) < 2:
        words = "one row of calibration text cannot be both searched on and verified on"
        raise ConfigError(words, "give two rows at least: --tokens of twice --window or more")
    return tokens[:-unseen], tokens[-unseen:]


def perplexity_rise(stack: DecoderRunner, tokens: torch.Tensor, cuts: Cuts) -> float:
    """How much a cut raises perplexity."""
    losses = set_losses(stack, tokens, [DENSE, cuts], Cost())
    risen = as_cost(losses[cuts] - losses[DENSE])
    return math.expm1(risen) if risen < 700 else math.inf  # e^710 overflows


@dataclass
class Within:
    """The longest cut within a loss budget, and those that were found on the way."""

    result: SearchResult
    rise: float  # of perplexity on the tokens that verify, as a share
    lengths: list[dict[str, Any]]  # {"length", "segments", "rise"} of each that was searched, in that order


def longest_within(
    budget: float, lengths: Sequence[int], find: Callable[[int], SearchResult], rise: Callable[[Cuts], float]
) -> Within:
    """The most layers whose best cut raises perplexity by no more than a budget.

    The rise grows with the length but for small dents, so the length is bisected: about log2 of their number searches.
    """
    searched: list[dict[str, Any]] = []
    good: Within | None = None
    low, high = -1, len(lengths)
    cost = Cost()
    while high - low > 1:
        at = (low + high) // 2
        length = lengths[at]
        result = find(length)
        cost += result.cost
        risen = rise(result.candidates[0].segments)
        searched.append({"length": length, "segments": result.segments, "rise": risen})
        if risen <= budget:
            low, good = at, Within(result, risen, searched)
        else:
            high = at
    if good is None:
        least = min(searched, key=lambda one: one["rise"])
        segments = ", ".join(map(str, least["segments"]))
        raise ConfigError(
            f"no cut meets --max-loss {budget:g}: the best found removes {segments} "
            f"and raises perplexity by {least['rise']:.1%} on text that was not searched on",
            f"allow more: --max-loss {math.ceil(1000 * least['rise']) / 1000:g}"
            if math.isfinite(least["rise"])
            else "no finite --max-loss allows it; try another --dtype, or other text",
        )
    return replace(good, result=replace(good.result, cost=cost))
