"""The oracle: the exact cost of every segment, in one sweep through the stack.

Carry the dense stream h_0, h_1, … through the layers once. At depth s fork a stream that jumps over the segment:
what enters layer s + n is h_s. Layer j then serves the dense stream and every fork already past its jump, so that
all L - n + 1 candidates cost about half of running each in full, and each layer is entered once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layercut.losses import Teacher, rows_per_chunk
from layercut.search.result import Candidate, Cost
from layercut.segments import Segment
from layercut.sweep import Stack


@torch.no_grad()
def segment_costs(
    stack: Stack,
    tokens: torch.Tensor,
    segments: Sequence[Segment],
    cost: Cost,
    *,
    rows: int = 8,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[Candidate]:
    """KL(p || q_segment) of each segment, mean over all tokens [N, T], in nats; sorted from cheapest.

    One sweep per `rows` rows of tokens. `advance` is told each layer that was entered. METHOD 1.2.
    """
    totals = dict.fromkeys(segments, 0.0)
    for batch in tokens.split(rows):
        dense, forks = _sweep(stack, batch, segments, cost, advance)
        for segment, kl in _kl_sums(stack, batch, dense, forks).items():
            totals[segment] += kl
        cost.dense_tokens += batch.numel()
    # a divergence is never negative; where a segment does nothing, rounding may make it so
    candidates = [Candidate((segment,), max(0.0, total / tokens.numel())) for segment, total in totals.items()]
    return sorted(candidates, key=lambda candidate: (candidate.kl, candidate.segments))


def all_segments(length: int, layers: int) -> list[Segment]:
    """The L - n + 1 segments of one length."""
    return [Segment(start, start + length) for start in range(layers - length + 1)]


def sweep_work(segments: Sequence[Segment], layers: int, rows: int) -> int:
    """Layer-forwards of one sweep: L for the dense stream and L - stop for each fork, times the rows."""
    return rows * (layers + sum(layers - segment.stop for segment in segments))


def _sweep(
    stack: Stack, tokens: torch.Tensor, segments: Sequence[Segment], cost: Cost, advance: Callable[[int], None]
) -> tuple[torch.Tensor, dict[Segment, torch.Tensor]]:
    """Final hidden states [B, T, D]: of the dense model, and with each segment skipped."""
    dense, calls = stack.enter(tokens)
    forks: dict[Segment, torch.Tensor] = {}
    for j in range(len(stack)):
        forks |= {segment: dense for segment in segments if segment.start == j}
        dense = stack.layer(j, dense, calls)
        past = [segment for segment in forks if segment.stop <= j]
        for segment in past:
            forks[segment] = stack.layer(j, forks[segment], calls)
        entered = (1 + len(past)) * tokens.shape[0]
        cost.layer_forwards += entered
        advance(entered)
    return dense, forks


def _kl_sums(
    stack: Stack, tokens: torch.Tensor, dense: torch.Tensor, forks: dict[Segment, torch.Tensor]
) -> dict[Segment, float]:
    """Sum of KL(p || q) over the tokens of a batch for every fork; logits are made a few rows at a time."""
    sums = dict.fromkeys(forks, 0.0)
    rows = rows_per_chunk(tokens.shape[1], stack.vocabulary)
    for start in range(0, tokens.shape[0], rows):
        part = slice(start, start + rows)
        teacher = Teacher(stack.exit(dense[part], tokens[part]))
        for segment, hidden in forks.items():
            sums[segment] += teacher.kl(stack.exit(hidden[part], tokens[part])).sum().item()
    return sums
