"""CLP's concave gate (arXiv 2510.23652): wells over the layers, moved by gradient descent to where they do least harm.

Every layer is mixed with the identity, and the gates of all layers form K wells with walls a_k < b_k:

    h_{i+1} = h_i + g_i (f_i(h_i) - h_i)
    g_i     = prod_k [1 - sigmoid(s (i + 1/2 - a_k)) sigmoid(s (b_k - i - 1/2))],     sum_k (b_k - a_k) = n
    loss    = KL(p || q_g) on calibration text, p by the dense model, q_g by the gated one

All weights are frozen; gradient descent trains the walls alone. Then the gate is hardened (walls to whole layers), and
a few finalists are compared by the real cut.

The paper's abstract states the gate and the gradient descent; no code of it is public. The formula, several wells and
the schedule are ours. A soft well ranks segments wrongly, since half-open layers are nearly harmless
(research/search.md): so walls are sharp and sharpen further, wells start at several places, every step sees other text,
and steps of about one layer leave local minima. A gate within EXACT of 0 or 1 is 0 or 1, so that layers inside a well
are not computed, and wells share the dense stream up to their first wall.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from layercut.data.probes import ProbeRows
from layercut.distributed import processes
from layercut.layer_search.cut_costs import CutCosts, halving, row_kl
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost, GateTrace, SearchResult
from layercut.layer_search.segment_sets import least_layers
from layercut.layer_search.sweep import Cuts
from layercut.models.losses import LOSS_SCALE, as_cost
from layercut.models.runner import DecoderRunner, recomputed_layer
from layercut.progress import bar
from layercut.segments import joined_segments

EXACT = 2e-3  # a gate this near to 0 or 1 is 0 or 1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the wells are trained."""

    apart: int = 3  # K sets of K wells begin for every so many layers that stay, of narrow wells for fewer
    steps: int = 16  # steps of gradient descent
    piece: int = 64  # tokens of text in a step
    sharpness: tuple[float, float] = (3.0, 8.0)
    """s in the first and the last step; higher for wells of fewer than three layers, or their middle were half open."""
    rate: tuple[float, float] = (1.0, 0.25)  # learning rate of Adam, in layers, in the first and the last step
    every: int = 2  # after so many steps, K times as many, of wells that met one stays, and the worse half is dropped
    least: int = 2  # wells that are trained to the end, at least
    finalists: int = 4  # sets of whole layers that are cut for real

    def at(self, step: int, first: float, last: float) -> float:
        """A value that goes from one to the other by equal factors."""
        return first * (last / first) ** (step / max(1, self.steps - 1))

    def sharpness_at(self, step: int, length: int, count: int) -> float:
        """s in a step, for K wells of n layers in all."""
        return max(1.0, 3 * count / length) * self.at(step, *self.sharpness)

    def sets(self, layers: int, length: int, count: int) -> list[int]:
        """How many sets of K wells are in each step, where none meet."""
        found = [max(4, round((layers - length) / min(self.apart, 0.7 * length / count + 0.5))) * count]
        for step in range(1, self.steps):
            halved = min(found[-1], max(self.least, (found[-1] + 1) // 2))
            found.append(found[-1] if step % (self.every * count) else halved)
        return found


def gates(walls: torch.Tensor, layers: int, sharpness: float) -> torch.Tensor:
    """g [L] of wells with walls [K, 2], in layers from 0 to L: 1 outside, 0 inside."""
    middle = torch.arange(layers) + 0.5
    inside = torch.sigmoid(sharpness * (middle - walls[:, :1])) * torch.sigmoid(sharpness * (walls[:, 1:] - middle))
    g = (1 - inside).prod(0)
    return torch.where(g < EXACT, 0.0, torch.where(g > 1 - EXACT, 1.0, g))


def gated_losses(costs: CutCosts, rows: slice, part: slice, wells: Sequence[torch.Tensor], s: float) -> torch.Tensor:
    """The loss with each set of wells, differentiable in their walls; each layer is entered once, for all of them."""
    stack, cost = costs.stack, costs.cost
    tokens = stack.place(costs.tokens[rows, part])
    with torch.no_grad():
        dense, calls = stack.enter(tokens)
    kept = 40 * dense.numel() * dense.element_size() * len(stack) * len(wells)  # what a layer keeps for its way back
    layer = recomputed_layer if stack.on_disk or kept > 2 * stack.budget.streams else type(stack).layer
    streams: list[torch.Tensor | None] = [None] * len(wells)  # None: the same as the dense stream so far
    share = tokens.shape[1] / costs.tokens.shape[1] * len(tokens)  # of a row
    entered = backwards = 0
    all_gates = [gates(walls, len(stack), s) for walls in wells]
    values = torch.stack(all_gates).tolist()
    for i in range(len(stack)):
        for w, g in enumerate(all_gates):
            value, h = values[w][i], streams[w]
            if value == 1 and h is None:
                continue
            h = dense if h is None else h
            if value > 0:
                out = layer(stack, i, h, calls)
                h = out if value == 1 else h + (g[i].to(h.device) * (out - h).float()).to(h.dtype)
                entered, backwards = entered + 1, backwards + h.requires_grad
            streams[w] = h
        with torch.no_grad():
            dense = stack.layer(i, dense, calls)
    cost.layer_forwards += math.ceil((entered + len(stack)) * share)
    cost.layer_backwards += math.ceil(backwards * share)
    cost.dense_tokens += tokens.numel()
    kl = row_kl(stack, dense, tokens, None if costs.weights is None else costs.weights[rows, part])
    return torch.stack([kl(dense if h is None else h).mean().cpu() for h in streams])


def slopes(losses: torch.Tensor, walls: Sequence[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """d log loss / d walls of each set of wells, without the part that would change its length."""
    nothing = sum(0 * w.sum() for w in walls)  # where no gate is half open there is no slope
    found = torch.autograd.grad((losses.clamp_min(1e-12).log() * scale).sum() + nothing, walls)
    outward = torch.tensor([-1.0, 1.0])
    return [(g - outward * (g * outward).mean()) / scale for g in found]


def settle_(walls: torch.Tensor, length: int, layers: int) -> None:
    """Put the walls [K, 2] of wells in order, within 0 and L, n layers apart in all."""
    flat = walls.view(-1)
    for _ in range(3):
        flat.copy_(flat.clamp(0, layers).sort().values)
        walls += torch.tensor([-0.5, 0.5]) * (length - (walls[:, 1] - walls[:, 0]).sum()) / len(walls)
        walls += max(0.0, -flat[0].item()) - max(0.0, flat[-1].item() - layers)


def beginnings(starts: int, layers: int, length: int, count: int, draw: torch.Generator) -> list[torch.Tensor]:
    """Where sets of K wells begin: one well at even distances, several at random places."""
    free = layers - length
    if count == 1:
        return [torch.tensor([[a, a + length]]) for a in (free * (start + 0.5) / starts for start in range(starts))]
    gaps = torch.rand(starts, count + 1, generator=draw).log().neg()
    a = (gaps / gaps.sum(-1, keepdim=True) * free)[:, :count].cumsum(-1) + torch.arange(count) * length / count
    return [*torch.stack([a, a + length / count], -1)]


def batches(costs: CutCosts, piece: int, draw: torch.Generator) -> Iterator[tuple[slice, slice]]:
    """Rows and positions of each step: a piece of a row of text, or a row of text and one of probes beside it."""
    window = costs.tokens.shape[1]
    if costs.weights is not None:
        rows = [slice(at, at + 2) for at in range(0, costs.rows - 1, 2)]
        parts = [(some, slice(0, window)) for some in rows]
    else:
        size = min(piece, window)
        parts = [
            (slice(r, r + 1), slice(at, at + size))
            for r in range(costs.rows)
            for at in range(0, window - size + 1, size)
        ]
    while True:
        for i in torch.randperm(len(parts), generator=draw).tolist():
            yield parts[i]


@dataclass(eq=False)
class Wells:
    """A set of K wells while it is trained."""

    walls: torch.Tensor  # [K, 2], in layers
    losses: list[float] = field(default_factory=list)
    gates: list[list[float]] = field(default_factory=list)


def trained(costs: CutCosts, length: int, count: int, seed: int, schedule: Schedule) -> list[Wells]:
    """Sets of wells after gradient descent, from the least loss; then those that were dropped on the way."""
    layers, draw, dropped = len(costs.stack), torch.Generator().manual_seed(seed), list[Wells]()
    begun = beginnings(schedule.sets(layers, length, count)[0], layers, length, count, draw)
    alive = [Wells(walls.requires_grad_()) for walls in begun]
    optimizer = torch.optim.Adam([well.walls for well in alive], lr=schedule.rate[0], betas=(0.5, 0.9))
    scale = LOSS_SCALE if costs.stack.model.dtype == torch.float16 else 1.0
    pieces = batches(costs, schedule.piece, draw)
    with bar("concave gate", schedule.steps) as advance:
        for step in range(schedule.steps):
            sharpness = schedule.sharpness_at(step, length, count)
            optimizer.param_groups[0]["lr"] = schedule.at(step, *schedule.rate)
            optimizer.zero_grad()
            walls = [well.walls for well in alive]
            with torch.enable_grad():
                losses = gated_losses(costs, *next(pieces), walls, sharpness)
                found = slopes(losses, walls, scale)
            for well, loss, slope in zip(alive, losses.tolist(), found, strict=True):
                well.gates.append(gates(well.walls.detach(), layers, sharpness).tolist())
                well.losses.append(as_cost(loss))
                well.walls.grad = slope.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            with torch.no_grad():
                for well in alive:
                    settle_(well.walls, length, layers)
            alive.sort(key=lambda well: well.losses[-1])  # of one text; earlier ones are of places that it has left
            if (step + 1) % (schedule.every * count) == 0 and step < schedule.steps - 1:
                kept = apart(alive, schedule.least)
                alive, dropped = kept, [w for w in alive if w not in kept] + dropped
            advance(1)
    return alive + dropped


def apart(ranked: Sequence[Wells], least: int) -> list[Wells]:
    """Of wells from the best the better half of those that are a layer apart from better ones."""
    kept: list[Wells] = []
    for well in ranked:
        if all((well.walls - other.walls).abs().max() > 1 for other in kept):
            kept.append(well)
    return kept[: max(least, (len(kept) + 1) // 2)]


def hardened(walls: torch.Tensor, limits: Restriction, whatever: bool = True) -> list[Cuts]:
    """Walls rounded to whole layers, the nearest first; where no such set is allowed, if asked, others nearest."""
    layers, near = len(limits.may), dict[Cuts, float]()
    low = [math.floor(x) for x in walls.flatten().tolist()]
    for bits in range(2 ** len(low)):  # each wall down or up
        ends = [min(layers, x + (bits >> k & 1)) for k, x in enumerate(low)]
        gone = sorted({i for a, b in zip(ends[::2], ends[1::2], strict=True) for i in range(a, b)})
        if len(gone) == limits.length and limits.allows(cuts := joined_segments(gone)):
            near[cuts] = (torch.tensor(ends) - walls.flatten()).abs().sum().item()
    if near:
        return sorted(near, key=near.__getitem__)
    middle = torch.arange(layers) + 0.5
    outside = torch.maximum(walls[:, :1] - middle, middle - walls[:, 1:]).clamp_min(0).amin(0)
    return least_layers(outside.tolist(), limits, len(walls)) if whatever else []


def clp(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, seed: int, num_segments: int,
    probes: ProbeRows | None, restriction: Restriction, schedule: Schedule = Schedule(),
) -> SearchResult:  # fmt: skip
    """The concave gate of CLP: its own proposals, of which a few real cuts decide."""
    costs = CutCosts(runner, tokens, cost, probes)
    wells = processes.from_main(trained(costs, length, num_segments, seed, schedule))
    ways = [hardened(well.walls, restriction, w < schedule.least) for w, well in enumerate(wells)]
    last, before = ways[: schedule.least], ways[schedule.least :]
    proposed = [way[k] for some in (last, before) for k in range(2) for way in some if k < len(way)]
    sets = [*dict.fromkeys(proposed)][: schedule.finalists]
    found = halving(costs, sets, "finalists of the concave gate", finalists=2)
    first = next((w for w, way in enumerate(ways) if found[0].segments in way), 0)
    ordered = [wells[first], *wells[:first], *wells[first + 1 :]]
    trace = GateTrace(gates=wells[first].gates, losses=[well.losses for well in ordered], proposed=sets)
    return SearchResult("clp", found, cost, gate=trace, first_by={"the concave gate": sets[0]})
