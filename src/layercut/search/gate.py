"""CLP's differentiable concave gate (arXiv 2510.23652): find the segment by gradient descent.

Layer i is mixed with the identity, h_{i+1} = g_i f_i(h_i) + (1 - g_i) h_i, by a well of width n at a free place c:

    g_i(c) = 1 - sigmoid(k (i - c + 1/2)) * sigmoid(k (c + n - 1/2 - i)),      c in [0, L - n]

The loss is KL(p || q_gated) on calibration text; only c moves. What was measured and shapes this file (docs/log.md):
half-open layers are nearly harmless and a soft gate therefore ranks segments wrongly, so the inside of the well
stays closed (sharp walls, k grows) while the place moves; the landscape has several local minima, so several
places (particles, P) descend at once as rows of one batch; and the places they end at are only candidates, which
are priced by the real cut, with their neighbours: all on a quarter of the tokens, the closest few on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layercut.losses import kl_divergence
from layercut.search.exhaustive import segment_costs
from layercut.search.result import Candidate, Cost
from layercut.segments import Segment
from layercut.sweep import Calls, Stack

CLOSED = 1e-3
"""A gate below this is taken as 0 and its layer is not entered; above 1 - CLOSED as 1."""

FINALISTS, CLOSE, FEWEST_ROWS = 4, 1.5, 4
"""Priced on all tokens: so many candidates at most, within this factor of the best on a quarter of the rows."""


@dataclass(frozen=True, kw_only=True)
class GateSchedule:
    """How the gate descends. The defaults are derived from the stack by `schedule_for`."""

    particles: int
    """P, places that descend at once."""
    steps: int
    sharpness: tuple[float, float] = (3.0, 8.0)
    """k at the first and at the last step."""
    stride: tuple[float, float] = (1.0, 0.25)
    """Longest move of a place in one step, in layers, at the first and at the last step."""


def schedule_for(length: int, layers: int) -> GateSchedule:
    """A place for every three starts, four at least and twelve at most, and steps enough to walk to the next one."""
    starts = layers - length + 1
    particles = min(starts, max(4, min(12, round(starts / 3))))
    return GateSchedule(particles=particles, steps=8 + round(2 * starts / particles / 2))


def concave_gate(place: torch.Tensor, length: int, layers: int, sharpness: float) -> torch.Tensor:
    """The well of equation 1.1: [P] places -> [P, L] gates in (0, 1)."""
    i = torch.arange(layers, device=place.device, dtype=place.dtype)
    left = torch.sigmoid(sharpness * (i - place[:, None] + 0.5))
    right = torch.sigmoid(sharpness * (place[:, None] + length - 0.5 - i))
    return 1 - left * right


def gated_forward(
    stack: Stack, gates: torch.Tensor, tokens: torch.Tensor, cost: Cost
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states of the dense model [1, T, D] and of P gated ones [P, T, D], for one row of tokens [1, T].

    A particle leaves the dense stream at its first gate below one; before that it costs nothing. A closed layer
    is not entered. gates: [P, L], may require gradients.
    """
    calls: dict[int, Calls] = {}  # by number of rows that run together: some masks carry the batch size
    with torch.no_grad():
        dense, calls[1] = stack.enter(tokens)
    streams: list[torch.Tensor | None] = [None] * gates.shape[0]  # None: still the dense stream
    for i in range(len(stack)):
        opening = gates[:, i].tolist()
        streams = [dense if h is None and g < 1 - CLOSED else h for h, g in zip(streams, opening, strict=True)]
        entered = [p for p, h in enumerate(streams) if h is not None and opening[p] > CLOSED]
        if entered:
            if len(entered) not in calls:
                calls[len(entered)] = stack.enter(tokens.expand(len(entered), -1))[1]
            before = torch.cat([streams[p] for p in entered])  # type: ignore[misc]
            after = stack.layer(i, before, calls[len(entered)])
            g = gates[entered, i].to(before.dtype)[:, None, None]
            mixed = before + g * (after - before)
            for row, p in enumerate(entered):
                # an open layer is passed as it is: mixing in low precision would not give f_i back to the bit
                source = after if opening[p] >= 1 - CLOSED else mixed
                streams[p] = source[row : row + 1]
        with torch.no_grad():
            dense = stack.layer(i, dense, calls[1])
        cost.layer_forwards += len(entered) + 1
        cost.layer_backwards += len(entered)
    cost.dense_tokens += tokens.numel()
    return dense, torch.cat([dense if h is None else h for h in streams])


def clp_search(
    stack: Stack,
    tokens: torch.Tensor,
    length: int,
    cost: Cost,
    *,
    seed: int,
    schedule: GateSchedule | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Candidates priced by their real cut on all tokens [N, T], cheapest first, and the gate's path."""
    schedule = schedule or schedule_for(length, len(stack))
    path = descend(stack, tokens, length, schedule, cost, seed=seed, advance=advance)
    candidates = promising(path[-1]["places"], length, len(stack))
    rows = max(FEWEST_ROWS, len(tokens) // 4)
    if rows < len(tokens):
        rough = segment_costs(stack, tokens[:rows], candidates, cost)[:FINALISTS]
        candidates = [c.segments[0] for c in rough if c.kl <= CLOSE * rough[0].kl]
    return segment_costs(stack, tokens, candidates, cost), path


def descend(
    stack: Stack,
    tokens: torch.Tensor,
    length: int,
    schedule: GateSchedule,
    cost: Cost,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[dict[str, Any]]:
    """Let P places descend, one row of tokens a step; the path they took.

    Steps are normalised: each place moves against its gradient by the stride, whatever the slope, since the cost
    of segments spans orders of magnitude along the stack.
    """
    layers, last_start = len(stack), len(stack) - length
    device = stack.device
    # the middle of P equal parts of [0, L - n]
    place = (torch.arange(schedule.particles, device=device) + 0.5) * last_start / schedule.particles
    momentum = torch.zeros_like(place)
    order = torch.randperm(tokens.shape[0], generator=torch.Generator().manual_seed(seed))
    path: list[dict[str, Any]] = []
    for step in range(schedule.steps):
        done = step / max(1, schedule.steps - 1)
        row = tokens[order[step % len(order)]][None]
        place.requires_grad_(True)
        gates = concave_gate(place, length, layers, _anneal(schedule.sharpness, done))
        losses = _gated_loss(stack, gates, row, cost)
        (slope,) = torch.autograd.grad(losses.sum(), place)
        path.append({"step": step, "places": place.tolist(), "losses": losses.tolist()})
        momentum = 0.5 * momentum + 0.5 * slope.sign()
        with torch.no_grad():
            place = (place - _anneal(schedule.stride, done) * momentum).clamp(0, last_start)
        advance(1)
    path.append({"step": schedule.steps, "places": place.tolist(), "losses": []})
    return path


def promising(places: list[float], length: int, layers: int) -> list[Segment]:
    """The segments worth their real price: where each place ended, and its neighbours."""
    starts = {round(place) + d for place in places for d in (-1, 0, 1)}
    return [Segment(start, start + length) for start in sorted(starts) if 0 <= start <= layers - length]


def _gated_loss(stack: Stack, gates: torch.Tensor, row: torch.Tensor, cost: Cost) -> torch.Tensor:
    """Mean KL(p || q_gated) of each particle on one row of tokens [1, T] -> [P], differentiable in the gates."""
    dense, gated = gated_forward(stack, gates, row, cost)
    with torch.no_grad():
        p_logits = stack.exit(dense, row)
    q_logits = stack.exit(gated, row.expand(gates.shape[0], -1))
    return kl_divergence(p_logits, q_logits).mean(-1)


def _anneal(ends: tuple[float, float], done: float) -> float:
    """From ends[0] at 0 to ends[1] at 1, evenly in the logarithm."""
    return ends[0] * (ends[1] / ends[0]) ** done
