"""The criteria that others are compared with, each with its paper's formula.

L layers, of which n are removed; h_i enters layer i. Layers that are not neighbours come back as several segments.
Only the hidden states of a few rows are held at once; where the layers are on disk, those of all rows, so that each
layer is read once. Candidates that are cut together share what they have in common in one sweep, which is less work
than in the papers' own programs, and is what `cost` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from layercut.distributed import processes
from layercut.errors import ModelError
from layercut.layer_search.criteria import best_start, one_shot
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import DENSE, Cuts, set_costs, set_losses, set_work
from layercut.models.decoder_stack import taking_gradients
from layercut.models.losses import next_token_loss
from layercut.models.memory import place_of_float64
from layercut.models.runner import Calls, DecoderRunner, passes, passes_in_step
from layercut.progress import bar
from layercut.segments import Segment, joined_segments, layers_of

BUDGET_BYTES = 512 * 2**20  # hidden states held at once, [L + 1, B, T, D] in float32; one row at least
TAYLOR_ROWS = 4
FIRST, OFFSPRING, SURVIVORS = 16, 16, 2
"""Evolution: random sets at the outset, children a generation, and those of them that are cut a second time."""
FIRST_SHARE, SECOND_SHARE, FEWEST_ROWS = 16, 4, 2
"""Rows that children, and then survivors, are cut on: one in so many, but never fewer. The number is a guess."""
FEWEST_GENERATIONS = 4  # run even where the budget is spent before: with fewer it is no evolution


def contiguous(criterion: Callable[..., Cuts]) -> Callable[..., Cuts]:
    """Mark a criterion that removes one segment."""
    criterion.__dict__["contiguous"] = True
    return criterion


@contiguous
def random_segment(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, seed: int, restriction: Restriction
) -> Cuts:
    """A start drawn uniformly from 0 … L - n: the baseline that any criterion must beat."""
    allowed = restriction.needed_segments()
    return (allowed[int(torch.randint(len(allowed), (), generator=torch.Generator().manual_seed(seed)))],)


@contiguous
def reverse_order(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, restriction: Restriction) -> Cuts:
    """[L - 1 - n, L - 1): the last n layers, but the very last one, which is kept (2411.15558)."""
    allowed = restriction.needed_segments()
    return (next((one for one in reversed(allowed) if one.stop < len(runner)), allowed[-1]),)


def block_influence(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> torch.Tensor:
    """BI_i = 1 - E[cos(h_i, h_{i+1})], over all tokens (ShortGPT, 2403.03853)."""
    return 1 - cosines(runner, tokens, cost)[0].diagonal(1)


@contiguous
def angular(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction) -> Cuts:
    """argmin_s E[arccos(cos(h_s, h_{s+n})) / pi], over the last token of each row (UIDL, 2403.17887)."""
    return best_start(cosines(runner, tokens, cost)[1].diagonal(length), restriction)


@contiguous
def cosine(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction) -> Cuts:
    """argmax_s E[cos(h_s, h_{s+n})], over all tokens, along the hidden dimension (LLM-Streamline, 2403.19135)."""
    return best_start(-cosines(runner, tokens, cost)[0].diagonal(length), restriction)


def perplexity(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction
) -> Cuts:
    """The n layers without each of which, alone, the next-token loss is lowest (Shortened LLaMA, 2402.02834)."""
    sets: list[Cuts] = [(Segment(i, i + 1),) for i in range(len(runner))]
    with bar("perplexity", set_work(sets, len(runner), len(tokens))) as advance:
        losses = set_losses(runner, tokens, sets, cost, advance=advance)
    return one_shot(torch.tensor([losses[cuts] for cuts in sets]), restriction)


def taylor(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction) -> Cuts:
    """The n layers of lowest sum |w dL/dw| over their weights, L the next-token loss (Shortened LLaMA, 2402.02834)."""
    return one_shot(taylor_scores(runner, tokens, cost), restriction)


def sleb(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction) -> Cuts:
    """Greedily, n times, the layer without which the next-token loss is lowest (SLEB, 2402.09025).

    The loss is that of the model without all layers removed so far, on all tokens, measured again each time.
    """
    removed: set[int] = set()
    with bar("sleb", length) as advance:
        for _ in range(length):
            left = [i for i in range(len(runner)) if i not in removed]
            if not restriction.is_none:  # those after which an allowed set can still be reached
                left = [i for i in left if restriction.cheapest([0.0] * len(runner), removed | {i}) is not None]
            layers = {joined_segments(removed | {i}): i for i in left}
            losses = set_losses(runner, tokens, layers, cost)
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
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, seed: int, cost: Cost, restriction: Restriction
) -> Cuts:
    """Evolution of sets of n layers by their KL(p || q) (after EvoPress, 2410.14649), for the work of `sleb`.

    One parent; the first is the best of some random sets. Each generation has children that differ from it and
    from each other, made by level switches (a kept layer is removed and a removed one kept). Selection takes two
    steps on growing numbers of tokens, drawn again each time: the children on a few rows, then the best of them and
    the parent on more; the fittest is the next parent. The paper's programs run hundreds of generations of
    attention and MLP apart on up to 131,072 tokens; here a generation is begun only while all of it fits the work.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, rows, generation = len(runner), len(tokens), 0
    few, more = (min(rows, max(FEWEST_ROWS, rows // share)) for share in (FIRST_SHARE, SECOND_SHARE))
    begun, work = cost.layer_forwards, sleb_work(length, layers, rows)

    def random_set() -> Cuts:
        if not restriction.is_none:
            return restriction.drawn(generator)
        return joined_segments(torch.randperm(layers, generator=generator)[:length].tolist())

    with bar("evolution", work) as advance:

        def fittest(sets: Iterable[Cuts], number: int, survivors: int) -> list[Cuts]:
            some = torch.randperm(rows, generator=generator)[:number]
            found = set_costs(runner, tokens[some], dict.fromkeys(sets), cost, advance=advance)
            return [each.segments for each in found[:survivors]]

        (parent,) = fittest(distinct(random_set, FIRST), few, 1)
        while True:
            children = distinct(partial(level_switch, parent, layers, generator, restriction), OFFSPRING, parent)
            # the second selection by its upper bound: who survives is not known yet
            next_one = set_work([DENSE, *children], layers, few) + more * layers * (2 + SURVIVORS)
            spent = cost.layer_forwards - begun
            if not children or (generation >= FEWEST_GENERATIONS and spent + next_one > work):
                advance(max(0, work - spent))  # no more is spent: what shows how far it is ends at its end
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


def level_switch(cuts: Cuts, layers: int, generator: torch.Generator, restriction: Restriction) -> Cuts:
    """Swap k removed layers against k kept ones; k is the smaller of two draws from 1 … 3, as in EvoPress."""
    removed = layers_of(cuts)
    kept = [i for i in range(layers) if i not in removed]
    k = min(int(torch.randint(1, 4, (2,), generator=generator).min()), len(removed), len(kept))
    out = torch.randperm(len(removed), generator=generator)[k:].tolist()
    if not restriction.is_none:
        return restriction.drawn(generator, {removed[i] for i in out})
    into = torch.randperm(len(kept), generator=generator)[:k].tolist()
    return joined_segments([removed[i] for i in out] + [kept[i] for i in into])


# --- statistics of the dense model ---


@torch.no_grad()
def cosines(stack: DecoderRunner, tokens: torch.Tensor, cost: Cost) -> tuple[torch.Tensor, torch.Tensor]:
    """E[cos(h_i, h_j)] over all tokens and E[arccos(cos(h_i, h_j)) / pi] over the last ones, [L + 1, L + 1], float64.

    h_0 (embeddings) to h_L (before the final norm), from one pass: L layer-forwards a row. Cosines are along the hidden
    dimension, one a token; along the tokens (a fault of some re-implementations) they would choose other segments.
    """
    depth, spent = len(stack) + 1, Cost()
    everywhere, last = (torch.zeros(depth, depth, dtype=torch.float64) for _ in range(2))
    rows = max(1, BUDGET_BYTES // (4 * depth * tokens.shape[1] * stack.hidden_size))
    with bar("hidden states", len(tokens)) as advance:
        for batches, counts in passes_in_step(stack, tokens, rows, depth):
            for batch, (states, _) in zip(batches, all_states(stack, batches), strict=True):
                if counts:
                    h = torch.stack([state.to(stack.device) for state in states])  # layers may be on several devices
                    unit = F.normalize(h.float(), dim=-1).flatten(1)
                    everywhere += (unit @ unit.T).cpu().double()
                    # float64: arccos is steep where two states are nearly the same
                    unit = F.normalize(h[:, :, -1].to(place_of_float64(h.device)).double(), dim=-1)
                    similar = torch.einsum("ibd,jbd->bij", unit, unit).clamp(-1, 1)
                    last += (similar.arccos().sum(0) / torch.pi).cpu()
                    spent.layer_forwards += len(stack) * len(batch)
                    spent.dense_tokens += batch.numel()
                    advance(len(batch))
    cost.add_(spent)
    processes.sum_(everywhere, last)
    return everywhere / tokens.numel(), last / len(tokens)


def all_states(stack: DecoderRunner, batches: list[torch.Tensor]) -> list[tuple[list[torch.Tensor], Calls]]:
    """h_0 … h_L [B, T, D] of each batch [B, T], and the layers' arguments. Each layer is entered once for all."""
    found = [([hidden], calls) for hidden, calls in map(stack.enter, batches)]
    for i in range(len(stack)):
        for states, calls in found:
            states.append(stack.layer(i, states[-1], calls))
    return found


@torch.enable_grad()
def taylor_scores(stack: DecoderRunner, tokens: torch.Tensor, cost: Cost) -> torch.Tensor:
    """sum_w |w dL/dw| over the weight matrices of each layer, L being the next-token loss (2402.02834, Taylor+).

    The backward pass goes layer by layer, each recomputed from its input; gradients, summed over rows, are in float32.
    2 L layer-forwards and L layer-backwards a row; every process computes all of it, since the sums are as large as the
    model. Layers on disk are read twice, and all rows go in one pass.
    """
    layers, predictions = len(stack), tokens.numel() - len(tokens)
    scores, sums = torch.zeros(layers, dtype=torch.float64), dict[int, list[torch.Tensor]]()
    groups = passes(stack, tokens, TAYLOR_ROWS, layers + 2)
    if stack.on_disk and len(groups) > 1:
        words = f"the hidden states of {tokens.numel():,} tokens at {layers} layers do not fit in memory"
        raise ModelError(words, f"give fewer tokens: --tokens {groups[0][0].shape[1] * sum(map(len, groups[0]))}")
    with bar("taylor", len(tokens)) as advance:
        for batches in groups:
            with torch.no_grad():
                found = all_states(stack, batches)
            slopes: list[Any] = []  # of the loss summed over its tokens, at each batch's h_L, then at earlier ones
            for batch, (states, _) in zip(batches, found, strict=True):
                last = states.pop().detach().requires_grad_(True)
                loss = next_token_loss(stack.exit(last, batch), stack.place(batch)).sum()
                slopes += torch.autograd.grad(loss, last)
            for i in reversed(range(layers)):
                weights = [p for p in stack.loaded(i).parameters() if p.ndim > 1]
                totals = sums.setdefault(i, [torch.zeros_like(p, dtype=torch.float32) for p in weights])
                for b, (states, calls) in enumerate(found):
                    hidden = states[i].detach().requires_grad_(True)
                    with taking_gradients(weights, True):
                        output = stack.plain_layer(i, hidden, calls)
                        grads = torch.autograd.grad(output, [hidden, *weights], slopes[b], allow_unused=True)
                    slopes[b] = grads[0]
                    for total, grad in zip(totals, grads[1:], strict=True):
                        if grad is not None:
                            total += grad.float() / predictions
                if batches is groups[-1]:
                    scores[i] = sum(
                        (p.detach().float() * g).abs().to(place_of_float64(g.device)).sum(dtype=torch.float64).item()
                        for p, g in zip(weights, sums.pop(i), strict=True)
                    )
                del weights, totals, output, grads  # a reference would keep a layer on disk in memory
            for batch in batches:
                cost.layer_forwards += 2 * layers * len(batch)
                cost.layer_backwards += layers * len(batch)
                cost.dense_tokens += batch.numel()
                advance(len(batch))
    return processes.from_main(scores)
