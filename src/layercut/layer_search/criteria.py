"""The baselines that choose by one look at the model, each with its paper's formula (docs/method.md).

Every function is pure: statistics in, the segments to remove out. L layers, of which n are removed; h_i enters
layer i. Layers that are not neighbours come back as several segments.
"""

from __future__ import annotations

from collections.abc import Set

import torch

from layercut.layer_search.statistics import Similarity
from layercut.layer_search.sweep import Cuts
from layercut.models.losses import as_price
from layercut.segments import Segment, joined_segments


def random_segment(layers: int, length: int, seed: int) -> Cuts:
    """s uniform in 0 … L - n: what any criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(layers - length + 1, (), generator=generator))
    return (Segment(start, start + length),)


def reverse_order(layers: int, length: int) -> Cuts:
    """[L - 1 - n, L - 1): the last n layers, but the very last one, which is kept (2411.15558)."""
    return (Segment(layers - 1 - length, layers - 1),)


def block_influence(statistics: Similarity, length: int) -> Cuts:
    """The n layers of lowest BI_i = 1 - E[cos(h_i, h_{i+1})], over all tokens (ShortGPT, 2403.03853)."""
    return lowest(1 - statistics.cosine.diagonal(1), length)


def angular(statistics: Similarity, length: int) -> Cuts:
    """argmin_s E[arccos(cos(h_s, h_{s+n})) / pi], over the last token of each row (UIDL, 2403.17887)."""
    return best_start(statistics.angular.diagonal(length), length)


def cosine(statistics: Similarity, length: int) -> Cuts:
    """argmax_s E[cos(h_s, h_{s+n})], over all tokens, along the hidden dimension (LLM-Streamline, 2403.19135)."""
    return best_start(-statistics.cosine.diagonal(length), length)


def one_shot(scores: torch.Tensor, length: int) -> Cuts:
    """The n layers of lowest score [L], each layer scored alone, none of the protected (Shortened LLaMA, 2402.02834).

    The score is the loss without the layer (`perplexity`) or the sum of |w dL/dw| over its weights (`taylor`).
    """
    return lowest(scores, length, protected_layers(len(scores)))


def best_start(scores: torch.Tensor, length: int) -> Cuts:
    """The segment of n layers whose start has the lowest score [L - n + 1]; the earlier of equals."""
    values = [as_price(score) for score in scores.tolist()]
    start = values.index(min(values))
    return (Segment(start, start + length),)


def protected_layers(layers: int) -> set[int]:
    """The first 4 and the last 2 layers (2402.02834); under 12 layers proportionally fewer: L // 3 and L // 6."""
    first, last = min(4, layers // 3), min(2, layers // 6)
    return {*range(first), *range(layers - last, layers)}


def lowest(scores: torch.Tensor, length: int, protected: Set[int] = frozenset()) -> Cuts:
    """The n layers of lowest score [L]; protected ones only where the others are too few. The earlier of equals."""
    values = [as_price(score) for score in scores.tolist()]
    order = sorted(range(len(values)), key=lambda i: (i in protected, values[i], i))
    return joined_segments(order[:length])
