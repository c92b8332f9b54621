"""The baselines that measure again and again what they have chosen so far: SLEB and EvoPress-style evolution.

Candidates of one round are priced in one sweep, in which they share what they have in common; that is less work
than in the papers' own programs, and it is what `cost` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from layercut.search.exhaustive import Cuts, set_costs, set_losses
from layercut.search.result import Cost
from layercut.segments import joined_segments
from layercut.sweep import Stack

GENERATIONS, OFFSPRING, SURVIVORS, FIRST = 24, 12, 3, 16
"""Evolution: rounds, children a round, those of them that are looked at twice, and random sets at the outset."""

FEWEST_ROWS = 4
"""On fewer rows than these, fitness would be chance."""


def sleb(
    stack: Stack,
    tokens: torch.Tensor,
    length: int,
    cost: Cost,
    *,
    advance: Callable[[int], None] = lambda rounds: None,
) -> Cuts:
    """Greedy (SLEB, 2402.09025): n times, remove the layer without which the next-token loss is lowest.

    The loss is that of the model without all layers removed so far, on all tokens [N, T], measured anew each time.
    """
    removed: set[int] = set()
    for _ in range(length):
        layers = {joined_segments(removed | {i}): i for i in range(len(stack)) if i not in removed}
        losses = set_losses(stack, tokens, layers, cost)
        removed.add(layers[min(losses, key=lambda cuts: (losses[cuts], cuts))])
        advance(1)
    return joined_segments(removed)


def evolution(
    stack: Stack,
    tokens: torch.Tensor,
    length: int,
    cost: Cost,
    *,
    seed: int,
    generations: int = GENERATIONS,
    advance: Callable[[int], None] = lambda generations: None,
) -> Cuts:
    """Evolution of drop sets after EvoPress (2410.14649), whole layers, fitness KL(p || q) of the real cut.

    The parent is the best of some random sets. Each generation mutates it by level switches (a kept layer is
    removed and a removed one kept, once or twice or thrice); the children are priced on an eighth of the rows, the
    best few and the parent on a quarter (four rows at least), and the fittest is the next parent. Rows are drawn
    anew each generation.

    tokens: [N, T]. The paper runs hundreds of generations of attention and MLP apart; these are small populations.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, rows = len(stack), len(tokens)

    def fittest(sets: Iterable[Cuts], share: int, count: int) -> list[Cuts]:
        some = torch.randperm(rows, generator=generator)[: max(FEWEST_ROWS, rows // share)]
        return [found.segments for found in set_costs(stack, tokens[some], dict.fromkeys(sets), cost)[:count]]

    def random_set() -> Cuts:
        return joined_segments(torch.randperm(layers, generator=generator)[:length].tolist())

    (parent,) = fittest([random_set() for _ in range(FIRST)], 8, 1)
    for _ in range(generations):
        children = [level_switch(parent, layers, generator) for _ in range(OFFSPRING)]
        (parent,) = fittest([parent, *fittest(children, 8, SURVIVORS)], 4, 1)
        advance(1)
    return parent


def level_switch(cuts: Cuts, layers: int, generator: torch.Generator) -> Cuts:
    """Swap k removed layers against k kept ones; k is the smaller of two draws from 1 … 3, as in EvoPress."""
    removed = [i for segment in cuts for i in range(segment.start, segment.stop)]
    kept = [i for i in range(layers) if i not in removed]
    wanted = int(torch.randint(1, 4, (2,), generator=generator).min())
    k = min(wanted, len(removed), len(kept))
    out = torch.randperm(len(removed), generator=generator)[k:].tolist()
    into = torch.randperm(len(kept), generator=generator)[:k].tolist()
    return joined_segments([removed[i] for i in out] + [kept[i] for i in into])
