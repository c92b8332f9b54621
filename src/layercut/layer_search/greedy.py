"""The baselines that measure again and again what they have chosen so far: SLEB and EvoPress's evolution.

Candidates of one round are priced in one sweep, in which they share what they have in common; that is less work
than in the papers' own programs, and it is what `cost` counts. Both grow with the calibration tokens: SLEB reads
all of them in every round, and evolution may spend as many layer-forwards as SLEB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import DENSE, Cuts, set_costs, set_losses, set_work
from layercut.models.runner import DecoderRunner
from layercut.segments import joined_segments, layers_of

FIRST, OFFSPRING, SURVIVORS = 16, 16, 2
"""Evolution: random sets at the outset, children a generation, and those of them that are priced a second time."""

FIRST_SHARE, SECOND_SHARE, FEWEST_ROWS = 16, 4, 2
"""Rows that children, and then survivors, are priced on: one in so many, but never fewer. The number is a guess."""

FEWEST_GENERATIONS = 4
"""Run even where the budget is spent before: with fewer it is no evolution."""


def sleb(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    cost: Cost,
    *,
    restriction: Restriction | None = None,
    advance: Callable[[int], None] = lambda rounds: None,
) -> Cuts:
    """Greedy (SLEB, 2402.09025): n times, remove the layer without which the next-token loss is lowest.

    The loss is that of the model without all layers removed so far, on all tokens, measured again each time.
    """
    removed: set[int] = set()
    limits = restriction or Restriction.none(len(stack), length)
    for _ in range(length):
        left = [i for i in range(len(stack)) if i not in removed]
        if not limits.is_none:  # those after which an allowed set can still be reached
            left = [i for i in left if limits.cheapest([0.0] * len(stack), removed | {i}) is not None]
        layers = {joined_segments(removed | {i}): i for i in left}
        losses = set_losses(stack, tokens, layers, cost)
        removed.add(layers[min(losses, key=lambda cuts: (losses[cuts], cuts))])
        advance(1)
    return joined_segments(removed)


def sleb_work(length: int, layers: int, rows: int) -> int:
    """Layer-forwards of `sleb`, whatever it chooses.

    With m layers left, the candidate at place p enters the m - 1 - p layers behind it, and the stream that they
    all fork from enters m - 1: (m - 1)(m + 2) / 2 a round and row.
    """
    return rows * sum((m - 1) * (m + 2) // 2 for m in range(layers - length + 1, layers + 1))


def evolution(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    cost: Cost,
    *,
    seed: int,
    budget: int | None = None,
    restriction: Restriction | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> Cuts:
    """Evolution of drop sets (EvoPress, 2410.14649), whole layers, fitness KL(p || q) of the real cut.

    One parent; the first is the best of some random sets. Each generation has children that differ from it and
    from each other, made by level switches (a kept layer is removed and a removed one kept). Selection takes two
    steps on growing numbers of tokens, drawn again each time: the children on a few rows, then the best of them and
    the parent on more; the fittest is the next parent. The paper's programs run hundreds of generations of
    attention and MLP apart on up to 131,072 tokens; here a generation is begun only while all of it fits the budget.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, rows = len(stack), len(tokens)
    few, more = (min(rows, max(FEWEST_ROWS, rows // share)) for share in (FIRST_SHARE, SECOND_SHARE))
    budget = sleb_work(length, layers, rows) if budget is None else budget
    begun, generation = cost.layer_forwards, 0
    limits = restriction or Restriction.none(layers, length)

    def fittest(sets: Iterable[Cuts], number: int, survivors: int) -> list[Cuts]:
        some = torch.randperm(rows, generator=generator)[:number]
        priced = set_costs(stack, tokens[some], dict.fromkeys(sets), cost, advance=advance)
        return [found.segments for found in priced[:survivors]]

    def random_set() -> Cuts:
        if not limits.is_none:
            return limits.drawn(generator)
        return joined_segments(torch.randperm(layers, generator=generator)[:length].tolist())

    (parent,) = fittest(distinct(random_set, FIRST), few, 1)
    while True:
        children = distinct(partial(level_switch, parent, layers, generator, limits), OFFSPRING, parent)
        # the second pricing by its upper bound: who survives is not known yet
        price = set_work([DENSE, *children], layers, few) + more * layers * (2 + SURVIVORS)
        spent = cost.layer_forwards - begun
        if not children or (generation >= FEWEST_GENERATIONS and spent + price > budget):
            advance(max(0, budget - spent))  # no more is spent: what shows how far it is ends at its end
            return parent
        (parent,) = fittest([*fittest(children, few, SURVIVORS), parent], more, 1)
        generation += 1


def distinct(draw: Callable[[], Cuts], wanted: int, *besides: Cuts) -> list[Cuts]:
    """Up to `wanted` different sets; fewer where ten times as many draws have no more."""
    found: dict[Cuts, None] = {}
    for _ in range(10 * wanted):
        if len(found) < wanted and (drawn := draw()) not in besides:
            found[drawn] = None
    return list(found)


def level_switch(cuts: Cuts, layers: int, generator: torch.Generator, restriction: Restriction | None = None) -> Cuts:
    """Swap k removed layers against k kept ones; k is the smaller of two draws from 1 … 3, as in EvoPress."""
    removed = layers_of(cuts)
    kept = [i for i in range(layers) if i not in removed]
    wanted = int(torch.randint(1, 4, (2,), generator=generator).min())
    k = min(wanted, len(removed), len(kept))
    out = torch.randperm(len(removed), generator=generator)[k:].tolist()
    if restriction is not None and not restriction.is_none:
        return restriction.drawn(generator, {removed[i] for i in out})
    into = torch.randperm(len(kept), generator=generator)[:k].tolist()
    return joined_segments([removed[i] for i in out] + [kept[i] for i in into])
