"""CLP's differentiable gate (arXiv 2510.23652): one backward pass foretells the price of every cut.

Gates mix what layers compute with the identity, at every position t of the text each by itself. With all gates open
KL(p || q_g) is 0, its least, and so is its slope; closing a gate costs, to second order, half its curvature, and that
is the mean square of a slope: of log p(y), for tokens y drawn from what the model itself predicts (Fisher). Two kinds
of gates tell what a segment [a, b) costs:

    one for each layer       h_{i+1} = g_i f_i(h_i) + (1 - g_i) h_i      s_ti = v_{i+1,t} . (h_{i+1} - h_i)_t
    one for the segment      h_b <- g h_b + (1 - g) h_a                  s_tab = v_{b,t} . (h_b - h_a)_t

    price of [a, b)  ~  1/2 E_y sum_t  1/2 (sum_{a <= i < b} s_ti^2  +  s_tab^2)         (layercut's form)

with v the gradient of log p(y) at the hidden state. All of it comes from one forward and one backward pass of a row
through the dense model, a fraction of what it takes to run the cut models of that row. The first sum takes layers to
do their work alone, the second lets those of a segment add up or cancel; their mean ranks segments better than either
(docs/log.md, with what else was tried). Products of slopes at different positions are left out: they make most of the
noise of a draw of y. Prices of several segments are added up.

No cut is priced here, and no walls move: where all prices are known, dynamic programming finds the least of them. The
sets of the lowest foretold price are proposals for the real cut (`clp.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layercut.distributed import processes
from layercut.layer_search.cheapest_sets import cheapest_sums
from layercut.layer_search.prices import WORST, Prices
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.sweep import Cuts, all_lengths
from layercut.models.losses import LOSS_SCALE, likelihood_slope_
from layercut.models.memory import slices
from layercut.models.objectives import Objective
from layercut.models.passes import dense_logits
from layercut.models.runner import DecoderRunner, recomputed_layer

DIFFERENCES_SHARE = 8
"""One part in so many of what the budget has for hidden states is had in float32 at once, to be subtracted."""


@dataclass(frozen=True)
class Foretold:
    """What the gate says that each segment costs, before any cut is priced."""

    table: torch.Tensor
    """float64 [L + 1, L + 1]: of the segment [a, b) at (a, b); nats per token, where the objective is KL."""
    text: torch.Tensor | None = None
    """The same of the text alone; None: not known."""

    def of(self, cuts: Cuts) -> float:
        """The price of a set of segments: the sum of theirs."""
        return sum(self.table[segment.start, segment.stop].item() for segment in cuts)

    def weighing(self, tests: float) -> Foretold:
        """What it would say if generated tests counted `tests` times as much; 0: nothing."""
        if self.text is None:
            return self
        return Foretold(self.text + tests * (self.table - self.text), self.text)


def foretell(prices: Prices, rows: int, seed: int) -> Foretold:
    """The table, from one forward and one backward pass of each of the first rows.

    Every process does the same; the main one's is taken.
    """
    draw, layers, stack = torch.Generator().manual_seed(seed), len(prices.stack), prices.stack
    scale = LOSS_SCALE if stack.model.dtype == torch.float16 else 1.0
    found, states = list[torch.Tensor](), dict[int, torch.Tensor]()  # of each row, and of `draw` before it
    queue = stack.parts("search", [slice(at, at + 1) for at in range(rows)])
    for part in queue:
        begun = states.setdefault(part.start, draw.get_state())
        weights = None if prices.weights is None else prices.weights[part.start]
        with queue.trying(part):
            while True:  # what is drawn is the same again
                draw.set_state(begun)
                row = prices.tokens[part]
                table = foretold_of_row(stack, row, prices.objective, draw, weights=weights, scale=scale)
                if scale == 1 or table.isfinite().all():
                    break
                scale /= 2
            found.append(table.flatten())
            # back to the first layer's output, each layer run again: what it computes inside is kept of one at a time
            prices.cost.layer_forwards += 2 * layers - 1
            prices.cost.layer_backwards += layers - 1
            prices.cost.dense_tokens += prices.tokens.shape[1]
    of_rows = torch.stack(found, -1).nan_to_num(WORST, WORST, WORST)
    both = [prices.weighted.mean(of_rows, tests).view(layers + 1, layers + 1) for tests in (1.0, 0.0)]
    return Foretold(*processes.from_main(both))


@torch.enable_grad()
def foretold_of_row(
    stack: DecoderRunner,
    row: torch.Tensor,
    objective: Objective,
    draw: torch.Generator,
    *,
    weights: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The equation of this module for all segments, by one draw of y."""
    with torch.no_grad():
        embedded, calls = stack.enter(row)
        first = stack.layer(0, embedded, calls)
    states = [first.detach().requires_grad_(True)]
    for i in range(1, len(stack)):
        states.append(recomputed_layer(stack, i, states[-1], calls))
    share = torch.full(row.shape[1:], 1 / row.shape[1]) if weights is None else weights
    slope = slope_at_end(stack, states[-1].detach(), row, objective, draw, share.sqrt() * scale)
    slopes = torch.autograd.grad(states[-1], states, slope)
    table = summed_squares([embedded, *states], slopes, stack.budget.streams // DIFFERENCES_SHARE) / scale**2
    alone = torch.cat([table.new_zeros(1), table.diagonal(1).cumsum(0)])
    return (table + (alone - alone[:, None]).triu(1)) / 4


@torch.no_grad()
def summed_squares(states: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor], most_bytes: int) -> torch.Tensor:
    """sum_t s_tab^2 of every segment, some tokens at a time; sums in float32, read from the device once."""
    layers, tokens, width = len(slopes), *states[0].shape[1:]
    device = states[0].device  # layers may be on several
    sums = [torch.zeros(b, device=device) for b in range(1, layers + 1)]
    for part in slices(tokens, max(1, most_bytes // (4 * len(states) * width))):
        h = torch.stack([state[0, part].to(device) for state in states]).float()  # [L + 1, t, D]
        for b, v in enumerate(slopes, 1):
            sums[b - 1] += ((h[b] - h[:b]) * v[0, part].to(device).float()).sum(-1).square().sum(-1)
    table = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
    for b, found in enumerate(torch.cat(sums).cpu().double().split([*range(1, layers + 1)]), 1):
        table[:b, b] = found
    return table


def slope_at_end(
    stack: DecoderRunner,
    last: torch.Tensor,
    row: torch.Tensor,
    objective: Objective,
    draw: torch.Generator,
    weights: torch.Tensor,
) -> torch.Tensor:
    """v_L, by the head's backward pass on as many positions at a time as there is room for logits."""
    drawn, slope = draws(objective, last.shape, draw), torch.empty_like(last)
    tokens = len(weights)
    together = tokens if objective.reads == "hidden" else stack.budget.logit_tokens(stack.vocabulary)
    for part in slices(tokens, together):
        leaf = last[:, part].detach().requires_grad_(True)
        end, upstream = upstream_of(stack, leaf, row[:, part], objective, drawn[part])
        upstream *= weights[part, None].to(upstream.device)
        (slope[:, part],) = torch.autograd.grad(end, leaf, upstream.to(end.dtype))
    return slope


def draws(objective: Objective, shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    """What `upstream_of` draws by: uniform in [0, 1), [T], or random signs [T, D] where hidden states are compared."""
    if objective.reads == "hidden":
        return torch.randint(2, shape, generator=draw)[0] * 2.0 - 1
    return torch.rand(shape[1], generator=draw)


def upstream_of(
    stack: DecoderRunner, last: torch.Tensor, row: torch.Tensor, objective: Objective, drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the backward pass begins, and with which gradient: one whose square has the objective's curvature.

    Of predictions, sum_t log p(y_t) with y_t drawn from p_t. Where the objective compares hidden states, of which the
    price is |h - h_dense|^2 / |h_dense|^2, sum_t e_t . h_t / |h_t| with random signs e, times the root of two.
    """
    if objective.reads == "hidden":
        return last, 2**0.5 * drawn.to(last.device) / last.detach().float().norm(dim=-1, keepdim=True)
    logits = dense_logits(stack, last, row)
    p = logits.detach().float().softmax(-1)
    y = (p[0].cumsum(-1) < drawn.to(p.device)[:, None]).sum(-1).clamp_max(p.shape[-1] - 1)
    return logits, likelihood_slope_(p, y[None])


def proposals(foretold: Foretold, limits: Restriction, count: int, most: int) -> list[Cuts]:
    """The sets that the gate foretells to be the cheapest."""
    singles = all_lengths(limits.length, len(limits.may))
    sums = cheapest_sums({one: foretold.of((one,)) for one in singles}, limits, count)
    if not sums:
        limits.needed_segments()  # raises: a single segment would have been among them
    return sums[:most]
