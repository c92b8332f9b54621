"""The Fisher information estimate: one backward pass of the dense model estimates the cost of every cut.

Gates mix what layers compute with the identity, at every position t of the text each by itself. With all gates open
KL(p || q_g) is 0, its least, and so is its slope; closing a gate costs, to second order, half its curvature, and that
is the mean square of a slope: of log p(y), for tokens y drawn from the model's own predictions (Fisher information).
Two kinds of gates estimate the cost of a segment [a, b):

    one for each layer       h_{i+1} = g_i f_i(h_i) + (1 - g_i) h_i      s_ti = v_{i+1,t} . (h_{i+1} - h_i)_t
    one for the segment      h_b <- g h_b + (1 - g) h_a                  s_tab = v_{b,t} . (h_b - h_a)_t

    cost of [a, b)  ~  1/2 E_y sum_t  1/2 (sum_{a <= i < b} s_ti^2  +  s_tab^2)

with v the gradient of log p(y) at the hidden state. The first sum takes layers to do their work alone, the second lets
those of a segment add up or cancel; their mean ranks segments better than either (research/search.md). Products of
slopes at different positions are left out: they make most of the noise of a draw of y. Costs of several segments are
added up, and dynamic programming finds the sets of least sum. Real cuts decide among these.

The estimate is of second order around the dense model: of a segment of ten layers it may be a third of the real cost,
and a set that has one looks cheaper than two shorter segments which are better. So for several segments those that are
proposed are cut for real, each alone, on a few rows; the estimates of the others are multiplied by what these have in
common, and sets are proposed anew, until every segment in them is known (MOST_ROUNDS at most):

    C'(s) = C(s) exp( sum_p w_sp ln(c_p / C(p)) / (1 + sum_p w_sp) )        w_sp = (|s and p| / |s or p|)^4

with C the estimate, c_p the real cost of a segment p, and layers counted in w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layercut.data.probes import ProbeRows
from layercut.distributed import processes
from layercut.layer_search.cut_costs import WORST, CutCosts, best_by_text, halving, shuffled, with_single
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost, SearchResult
from layercut.layer_search.segment_sets import cheapest_sums
from layercut.layer_search.sweep import Cuts, all_lengths
from layercut.models.losses import LOSS_SCALE, dense_logits, likelihood_slope_
from layercut.models.memory import slices
from layercut.models.runner import DecoderRunner, recomputed_layer
from layercut.segments import Segment

GRADIENT_SHARE = 8  # of the rows one in so many gives gradients
PROPOSALS, PER_SEGMENT = 10, 6  # sets that are proposed: of one segment, and of several so many for each of them
BEGIN_SHARE = 4
"""Proposals are first run on one row in four. They are alike: rounds on fewer rows dropped the best now and then."""
LIGHTER, OTHERS = 0.25, 6
"""With probes: how much less they count in more proposals, which the shortlist takes too (healing teaches back more of
what probes lose than of what text loses), and how many of these, and of those by text alone, there are."""
DIFFERENCES_SHARE = 8
"""One part in so many of what the budget has for hidden states is had in float32 at once, to be subtracted."""
SHARPNESS = 4
"""Power of what two segments have in common. Of 1, 2 and 4 the one by which the least sum was found each time."""
MOST_ROUNDS = 12  # proposals are made anew so often at most
LEAST, FARTHEST = 1e-6, 100.0
"""Costs below the first, and quotients beyond the second, are rounding or overflow, and not what a segment costs."""


def fisher(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    seed: int,
    num_segments: int,
    probes: ProbeRows | None,
    restriction: Restriction,
) -> SearchResult:
    """The sets of least estimated cost are cut for real; of several segments at most, some of one too."""
    costs = CutCosts(runner, shuffled(tokens, seed), cost, probes)
    several = num_segments > 1
    found = estimate(costs, gradient_rows(costs.rows), seed)
    asked = [(1.0, PER_SEGMENT * num_segments if several else PROPOSALS)]
    asked += [(LIGHTER, OTHERS), (0.0, OTHERS)] if costs.kinds > 1 else []
    proposed = (corrected_proposals if several else proposals_of_each)(costs, found, restriction, num_segments, asked)
    single = proposals(found, restriction, 1, PER_SEGMENT) if several and restriction.segments() else []
    sets = list(dict.fromkeys(cuts for some in (*proposed, single) for cuts in some))
    begin = first_of_proposals(costs.rows, costs.kinds)
    best = with_single(costs, halving(costs, sets, f"fisher: {len(sets)} proposals race", begin=begin), single)
    lighter = proposed[1] if len(asked) > 1 else []
    first = {"the Fisher estimate": sets[0]}
    return SearchResult("fisher", best, cost, by_text=best_by_text(costs, best, sets), lighter=lighter, first_by=first)


def gradient_rows(rows: int) -> int:
    """Of N rows, those that give gradients: two at least, of text and of probes where there are both."""
    return min(rows, max(2, rows // GRADIENT_SHARE))


def first_of_proposals(rows: int, kinds: int = 1) -> int:
    """Rows that proposals are first run on: two of each kind at least."""
    return min(rows, max(2 * kinds, rows // BEGIN_SHARE))


# --- the estimate ---


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of each segment."""

    table: torch.Tensor
    """float64 [L + 1, L + 1]: of the segment [a, b) at (a, b); nats per token, where the objective is KL."""
    text: torch.Tensor | None = None  # the same of the text alone; None: not known

    def of(self, cuts: Cuts) -> float:
        """The cost of a set of segments: the sum of theirs."""
        return sum(self.table[segment.start, segment.stop].item() for segment in cuts)

    def weighing(self, probes: float) -> Estimate:
        """The estimate if probes counted so many times as much; 0: nothing."""
        if self.text is None:
            return self
        return Estimate(self.text + probes * (self.table - self.text), self.text)


def estimate(costs: CutCosts, rows: int, seed: int) -> Estimate:
    """From one forward and one backward pass of each of the first rows; every process does the same."""
    draw, layers, stack = torch.Generator().manual_seed(seed), len(costs.stack), costs.stack
    scale = LOSS_SCALE if stack.model.dtype == torch.float16 else 1.0
    found, states = list[torch.Tensor](), dict[int, torch.Tensor]()  # of each row, and of `draw` before it
    queue = stack.parts("search", [slice(at, at + 1) for at in range(rows)])
    for part in queue:
        begun = states.setdefault(part.start, draw.get_state())
        weights = None if costs.weights is None else costs.weights[part.start]
        with queue.trying(part):
            while True:  # what is drawn is the same again
                draw.set_state(begun)
                row = costs.tokens[part]
                table = estimate_of_row(stack, row, draw, weights=weights, scale=scale)
                if scale == 1 or table.isfinite().all():
                    break
                scale /= 2
            found.append(table.flatten())
            # back to the first layer's output, each layer run again: what it computes inside is kept of one at a time
            costs.cost.layer_forwards += 2 * layers - 1
            costs.cost.layer_backwards += layers - 1
            costs.cost.dense_tokens += costs.tokens.shape[1]
    of_rows = torch.stack(found, -1).nan_to_num(WORST, WORST, WORST)
    both = [costs.weighted.mean(of_rows, probes).view(layers + 1, layers + 1) for probes in (1.0, 0.0)]
    return Estimate(*processes.from_main(both))


@torch.enable_grad()
def estimate_of_row(
    stack: DecoderRunner,
    row: torch.Tensor,
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
    slope = slope_at_end(stack, states[-1].detach(), row, draw, share.sqrt() * scale)
    slopes = torch.autograd.grad(states[-1], states, slope)
    table = summed_squares([embedded, *states], slopes, stack.budget.streams // DIFFERENCES_SHARE) / scale**2
    alone = torch.cat([table.new_zeros(1), table.diagonal(1).cumsum(0)])
    return (table + (alone - alone[:, None]).triu(1)) / 4


@torch.no_grad()
def summed_squares(states: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor], most_bytes: int) -> torch.Tensor:
    """sum_t s_tab^2 of every segment, some tokens at a time; sums in float32, read from the device once."""
    states, slopes = ([each.flatten(2) for each in of] for of in (states, slopes))  # several streams side by side
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
    draw: torch.Generator,
    weights: torch.Tensor,
) -> torch.Tensor:
    """v_L, by the head's backward pass on as many positions at a time as there is room for logits."""
    drawn, slope = torch.rand(last.shape[1], generator=draw), torch.empty_like(last)
    for part in slices(len(weights), stack.budget.logit_tokens(stack.vocabulary)):
        leaf = last[:, part].detach().requires_grad_(True)
        end, upstream = upstream_of(stack, leaf, row[:, part], drawn[part])
        upstream *= weights[part, None].to(upstream.device)
        (slope[:, part],) = torch.autograd.grad(end, leaf, upstream.to(end.dtype))
    return slope


def upstream_of(
    stack: DecoderRunner, last: torch.Tensor, row: torch.Tensor, drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the backward pass begins, and with which gradient, whose square has the curvature of the predictions: that
    of sum_t log p(y_t) with y_t drawn from p_t, by numbers drawn uniformly from [0, 1) [T].
    """
    logits = dense_logits(stack, last, row)
    p = logits.detach().float().softmax(-1)
    y = (p[0].cumsum(-1) < drawn.to(p.device)[:, None]).sum(-1).clamp_max(p.shape[-1] - 1)
    return logits, likelihood_slope_(p, y[None])


# --- sets of segments by the estimate ---


def proposals(found: Estimate, limits: Restriction, count: int, most: int) -> list[Cuts]:
    """The sets of least estimated cost."""
    singles = all_lengths(limits.length, len(limits.may))
    sums = cheapest_sums({one: found.of((one,)) for one in singles}, limits, count)
    if not sums:
        limits.needed_segments()  # raises: a single segment would have been among them
    return sums[:most]


def proposals_of_each(
    costs: CutCosts, found: Estimate, limits: Restriction, count: int, asked: Sequence[tuple[float, int]]
) -> list[list[Cuts]]:
    """So many proposals for each weight of the probes."""
    return [proposals(found.weighing(probes), limits, count, most) for probes, most in asked]


def corrected_proposals(
    costs: CutCosts, found: Estimate, limits: Restriction, count: int, asked: Sequence[tuple[float, int]]
) -> list[list[Cuts]]:
    """The same, the estimate corrected by real cuts of the segments in them, until all of these are known."""
    own, known = found, dict[Segment, tuple[float, float]]()
    for _ in range(MOST_ROUNDS):
        proposed = proposals_of_each(costs, found, limits, count, asked)
        lacking = sorted({segment for some in proposed for cuts in some for segment in cuts} - known.keys())
        if not lacking:
            return proposed
        alone = costs.of_singles(lacking)
        both = (costs.weighted.mean(alone, probes).tolist() for probes in (1.0, 0.0))
        known |= dict(zip(lacking, zip(*both, strict=True), strict=True))
        found = corrected(own, known)
    return proposals_of_each(costs, found, limits, count, asked)


def corrected(found: Estimate, known: dict[Segment, tuple[float, float]]) -> Estimate:
    """The estimate by the second formula of this module; every process does the same, the main one's is taken."""
    layers, cut = len(found.table) - 1, list(known)
    segments = all_lengths(layers, layers)
    places = [s.start for s in segments], [s.stop for s in segments]
    cut_places = [s.start for s in cut], [s.stop for s in cut]
    (starts, stops), (begins, ends) = map(torch.tensor, places), map(torch.tensor, cut_places)
    both = (torch.minimum(stops[:, None], ends) - torch.maximum(starts[:, None], begins)).clamp_min(0).double()
    common = (both / ((stops - starts)[:, None] + (ends - begins) - both)) ** SHARPNESS
    tables = []
    for kind, own in enumerate((found.table, found.text)):
        if own is not None:
            real = torch.tensor([known[segment][kind] for segment in cut], dtype=torch.float64)
            logs = (real.clamp_min(LEAST) / own[cut_places].clamp_min(LEAST)).clamp(1 / FARTHEST, FARTHEST).log()
            weights = torch.where(real < WORST / 1e6, common, 0.0)  # a mean that holds what overflowed says nothing
            table = own.clone()
            table[places] *= ((weights @ logs) / (1 + weights.sum(1))).exp()
            table[cut_places] = real
            tables.append(table)
    return Estimate(*processes.from_main(tables))
