"""CLP's differentiable concave gate (arXiv 2510.23652): find the segments by gradient descent.

Layer i is mixed with the identity, h_{i+1} = g_i f_i(h_i) + (1 - g_i) h_i, by a well for each of K segments [a, b),
the walls a and b being free numbers:

    g_i = prod_k (1 - sigmoid(s (i - a_k + 1/2)) sigmoid(s (b_k - 1/2 - i))),      sum_k (b_k - a_k) = n

The loss is the distance of the gated from the dense model on calibration text, KL(p || q_gated) by default; only the
walls move. What was measured and shapes this file (docs/log.md): half-open layers are nearly harmless and a soft gate
therefore ranks segments wrongly, so the inside of the wells stays closed (sharp walls, s grows) while they move; the
landscape has several local minima, so several sets (particles, P) descend at once as rows of one batch; and where
they end is only a proposal, which is then priced by the real cut (`clp.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from layercut.distributed import processes
from layercut.layer_search.gate_walls import cuts_of, inside, spans_of, step_of, walls_of
from layercut.layer_search.prices import Judge
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import Cuts
from layercut.models.losses import as_price
from layercut.models.objectives import KL, Objective
from layercut.models.runner import Calls, DecoderRunner

CLOSED = 1e-3
"""A gate below this is taken as 0 and its layer is not entered; above 1 - CLOSED as 1."""

HEAD_EVERY = 4
"""The descent sends one position in so many through the head. A step is normalised, so this only adds a little noise;
the head of a small model costs as much as a third of its layers."""


@dataclass(frozen=True, kw_only=True)
class GateSchedule:
    """How the gate descends. What has no default is derived from stack and text by `clp.schedule_for`."""

    particles: int
    """P, sets that descend at once."""
    steps: int
    """Steps, each on one row of tokens."""
    sharpness: tuple[float, float] = (3.0, 8.0)
    """s at the first and at the last step."""
    stride: tuple[float, float] = (1.0, 0.25)
    """Longest move of a wall in one step, in layers, at the first and at the last step."""
    relaxation: Literal["sigmoid", "straight-through"] = "sigmoid"
    """sigmoid: walls are half open. straight-through: the forward pass is that of the nearest real cut, the slope
    that of the sigmoid. Compared in docs/log.md."""
    recompute: bool = False
    """Run each layer again in the backward pass instead of keeping what it computed: less memory, more forwards."""


def concave_gate(walls: torch.Tensor, layers: int, sharpness: float) -> torch.Tensor:
    """The wells of the equation above (after CLP, 2510.23652; the product of two sigmoids is layercut's own form).

    Args:
        walls: a_1, b_1, … of each set, in layers [P, 2K].
        layers: L.
        sharpness: s, per layer.

    Returns:
        Gates g_i [P, L] in (0, 1): 0 removes layer i, 1 keeps it.
    """
    i = torch.arange(layers, device=walls.device, dtype=walls.dtype)
    left = torch.sigmoid(sharpness * (i - walls[:, 0::2, None] + 0.5))
    right = torch.sigmoid(sharpness * (walls[:, 1::2, None] - 0.5 - i))
    return (1 - left * right).prod(1)


def hard_gate(sets: Sequence[Cuts], layers: int) -> torch.Tensor:
    """The gate of a real cut: 0 at the layers of each set of segments, 1 elsewhere.

    Args:
        sets: P sets of segments.
        layers: L.

    Returns:
        Gates [P, L], float32.
    """
    gates = torch.ones(len(sets), layers)
    for row, cuts in zip(gates, sets, strict=True):
        for segment in cuts:
            row[segment.start : segment.stop] = 0
    return gates


def gated_forward(
    stack: DecoderRunner,
    gates: torch.Tensor,
    tokens: torch.Tensor,
    cost: Cost,
    *,
    moving: torch.Tensor | None = None,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the dense model and P gated ones, h_{i+1} = g_i f_i(h_i) + (1 - g_i) h_i, on one row of tokens.

    A particle leaves the dense stream at its first gate that is not open; before that it costs nothing. A closed
    layer is not entered.

    Args:
        stack: the dense model.
        gates: [P, L]; may require gradients.
        tokens: token ids [1, T].
        cost: to which the layer passes are added.
        moving: bool [P, L], the gates that get a gradient; those between 0 and 1 where not given.
        recompute: run each layer again in the backward pass instead of keeping what it computed.

    Returns:
        Hidden states after the last layer, of the dense model [1, T, D] and of the gated ones [P, T, D].
    """
    values = gates.detach()
    if moving is None:
        moving = (values > CLOSED) & (values < 1 - CLOSED)
    is_open, is_moving = ((values >= 1 - CLOSED) & ~moving).tolist(), moving.tolist()
    layer = partial(checkpoint, stack.layer, use_reentrant=False) if recompute else stack.layer
    calls: dict[int, Calls] = {}  # by number of rows that run together: some masks carry the batch size
    with torch.no_grad():
        dense, calls[1] = stack.enter(tokens)
    streams: list[torch.Tensor | None] = [None] * len(gates)  # None: still the dense stream
    for i in range(len(stack)):
        streams = [dense if h is None and not is_open[p][i] else h for p, h in enumerate(streams)]
        entered = [p for p, h in enumerate(streams) if h is not None and (is_open[p][i] or is_moving[p][i])]
        if entered:
            if len(entered) not in calls:
                calls[len(entered)] = stack.enter(tokens.expand(len(entered), -1))[1]
            before = torch.cat([stack.on_device_of(i, streams[p]) for p in entered])  # type: ignore[arg-type]  # [E, T, D]
            after = layer(i, before, calls[len(entered)])
            g = gates[entered, i].to(before)[:, None, None]
            mixed = before + g * (after - before)
            for row, p in enumerate(entered):
                # of an open layer take f_i(h) itself: h + 1 (f_i(h) - h) rounds to something else in low precision
                source = after if is_open[p][i] else mixed
                streams[p] = source[row : row + 1]
        with torch.no_grad():
            dense = stack.layer(i, dense, calls[1])
        cost.layer_forwards += len(entered) * (1 + recompute) + 1
        cost.layer_backwards += len(entered)
    cost.dense_tokens += tokens.numel()
    return dense, torch.cat([dense if h is None else h.to(dense.device) for h in streams])


@torch.enable_grad()
def descend(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    seeds: Sequence[Cuts],
    schedule: GateSchedule,
    cost: Cost,
    *,
    count: int = 1,
    objective: Objective | None = None,
    weights: torch.Tensor | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[list[Cuts], list[dict[str, Any]]]:
    """Let sets of segments descend the gate's loss, one row of tokens a step.

    Each set moves against its gradient, the farthest wall by the stride, whatever the slope; one whose slope is not
    finite stays where it is, since its gated model overflows there. A step has one row, so that several processes all
    do the same; the main one's path is taken.

    Args:
        stack: the dense model.
        tokens: token ids [N, T]; step i takes row i modulo N.
        seeds: P sets of n layers, where the descent begins.
        schedule: steps, sharpness and strides.
        cost: to which the layer passes are added.
        count: K, segments a set has at most.
        objective: the loss, mean over tokens; KL in nats per token where not given.
        weights: of each position in its row's loss [N, T] (`weighted_rows`); the mean where not given.
        advance: called with 1 after each step.

    Returns:
        The set of whole segments nearest to where each ends, and the path (`SearchResult.path`).
    """
    layers, length = len(stack), sum(map(len, seeds[0]))
    objective = objective or KL()
    spans = torch.tensor([spans_of(cuts, layers, count) for cuts in seeds], device=stack.device)  # [P, 2K + 1]
    momentum = torch.zeros_like(spans)
    path: list[dict[str, Any]] = []
    for step in range(schedule.steps):
        done = step / max(1, schedule.steps - 1)
        at = step % len(tokens)
        row, weighed = tokens[at : at + 1], None if weights is None else weights[at : at + 1]
        spans.requires_grad_(True)
        gates = concave_gate(walls_of(spans), layers, _anneal(schedule.sharpness, done))  # [P, L]
        moving = (gates > CLOSED) & (gates < 1 - CLOSED)
        if schedule.relaxation == "straight-through":
            gates = _hard_forward(gates, spans)
        dense, gated = gated_forward(stack, gates, row, cost, moving=moving, recompute=schedule.recompute)
        losses = Judge(objective, stack, dense, row, weights=weighed, every=HEAD_EVERY)(gated)  # [P]
        (slope,) = torch.autograd.grad(losses.sum(), spans)  # [P, 2K + 1]: particles are independent rows
        slope = torch.where(slope.isfinite().all(-1, keepdim=True), slope, 0.0)
        spans = spans.detach()
        found = [as_price(loss) for loss in losses.tolist()]
        path.append({"step": step, **_places(spans), "losses": [loss for loss in found for _ in range(count)]})
        # normalised (`step_of`), since costs differ by orders of magnitude along the stack; the mean smooths rows
        momentum = 0.5 * momentum + 0.5 * step_of(slope)
        spans = inside(spans + _anneal(schedule.stride, done) * momentum, layers, length)
        advance(1)
    path.append({"step": schedule.steps, **_places(spans), "losses": []})
    return processes.from_main(([cuts_of(row) for row in spans.cpu()], path))


def _hard_forward(gates: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Gates [P, L] with the value of the nearest real cut and the slope of the soft ones (straight-through)."""
    hard = hard_gate([cuts_of(row) for row in spans.detach().cpu()], gates.shape[1]).to(gates)
    return hard + gates - gates.detach()


def _places(spans: torch.Tensor) -> dict[str, list[float]]:
    """Where the wells begin and end, those of the first particle first."""
    walls = walls_of(spans.detach())
    return {"places": walls[:, 0::2].flatten().tolist(), "stops": walls[:, 1::2].flatten().tolist()}


def _anneal(ends: tuple[float, float], done: float) -> float:
    """From ends[0] at 0 to ends[1] at 1, evenly in the logarithm."""
    return ends[0] * (ends[1] / ends[0]) ** done
