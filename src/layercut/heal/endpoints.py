"""Cutoff endpoint tuning: train the layers beside the cut, and nothing else (CLP, arXiv 2510.23652).

Dense teacher and cut student share every frozen weight and, below the first trained layer, every hidden state, so
the prefix runs once and without gradients. Gradients flow from the logits down to the first trained layer; weight
gradients, float32 master weights and AdamW's moments exist for the trained layers only. The student is at all
times the stock model in its own number format: what is measured is what is saved.

Objectives: "kl" (KL(p || q) on the logits, the default), "next-token" (the paper's setting), "hidden" (what leaves
the last trained layer should be what left it in the dense model; no logits, cheap and weaker).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from layercut.losses import kl_divergence, next_token_loss, rows_per_chunk
from layercut.segments import Segment, kept_layers
from layercut.sweep import Calls, Stack, common_prefix, mean_kl

Objective = Literal["kl", "next-token", "hidden"]


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How long and how fast to train."""

    objective: Objective = "kl"
    learning_rate: float | None = None
    """Peak rate of AdamW; None takes `default_learning_rate`."""
    batch_tokens: int = 2048
    radius: int = 1
    """Layers trained on each side of a cut."""


@dataclass
class Tuning:
    """What was trained and how it went. Losses are means per token, in nats for logits."""

    objective: str
    tokens: int
    steps: int
    learning_rate: float
    trained_layers: list[int]
    trained_parameters: int
    state_bytes: int
    """Bytes of masters, gradients and moments: all there is beside the shared weights."""
    curve: list[dict[str, float]] = field(default_factory=list)
    heldout: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    tokens_per_second: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def endpoints(segments: Sequence[Segment], layers: int, radius: int = 1) -> list[int]:
    """Positions, in the cut model, of the layers beside each cut: s - 1 and e, or more of them by the radius."""
    kept = kept_layers(segments, layers)
    beside: set[int] = set()
    for segment in segments:
        cut = sum(i < segment.start for i in kept)
        beside |= {p for p in range(cut - radius, cut + radius) if 0 <= p < len(kept)}
    return sorted(beside)


def default_learning_rate(hidden_size: int) -> float:
    """8e-4 at a width of 576, where it was measured (docs/log.md); inversely with the width, which is a guess."""
    return 8e-4 * 576 / hidden_size


def tune_(
    dense: Stack,
    student: Stack,
    segments: Sequence[Segment],
    tokens: torch.Tensor,
    heldout: torch.Tensor,
    settings: TuneSettings,
    *,
    advance: Callable[[int, float], None] = lambda tokens, loss: None,
) -> Tuning:
    """Train the student's endpoints on tokens [N, T] in their order; leave it in its best state by held-out loss.

    heldout: [M, T], never trained on; it is scored before the first step, so that the end is never worse than
    the start. Deterministic: no randomness is used.
    """
    positions = endpoints(segments, len(dense), settings.radius)
    prefix = min(positions)  # the layers below are the same in both models
    trained = own_parameters_(student, positions)
    masters = [p.detach().float().clone() for p in trained]
    rate = settings.learning_rate or default_learning_rate(student.hidden_size)
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches = tokens.split(max(1, settings.batch_tokens // tokens.shape[1]))
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_cosine(step, len(batches)))
    report = Tuning(
        objective=settings.objective,
        tokens=tokens.numel(),
        steps=len(batches),
        learning_rate=rate,
        trained_layers=positions,
        trained_parameters=sum(m.numel() for m in masters),
        state_bytes=sum(4 * m.element_size() * m.numel() for m in masters),
    )
    step_loss = _LOSSES[settings.objective]
    best = _score_heldout(dense, student, prefix, heldout, report, step=0, tokens=0)
    best_state = [p.detach().cpu().clone() for p in trained]
    seen, seconds = 0, 0.0
    try:
        for step, batch in enumerate(batches, start=1):
            begun = time.perf_counter()
            for p in trained:
                p.grad = None
            loss = step_loss(dense, student, prefix, max(positions), batch)
            _step_(optimizer, masters, trained)
            lr.step()
            seconds += time.perf_counter() - begun
            seen += batch.numel()
            report.curve.append({"step": step, "tokens": seen, "loss": loss, "seconds": round(seconds, 2)})
            if step % max(1, len(batches) // 8) == 0 or step == len(batches):
                score = _score_heldout(dense, student, prefix, heldout, report, step=step, tokens=seen)
                if score < best:
                    best, report.best_step = score, step
                    best_state = [p.detach().cpu().clone() for p in trained]
            advance(batch.numel(), loss)
    finally:
        with torch.no_grad():
            for p, value in zip(trained, best_state, strict=True):
                p.copy_(value)
        for p in trained:
            p.requires_grad_(False)
            p.grad = None
    report.tokens_per_second = seen / seconds if seconds else 0.0
    return report


def own_parameters_(student: Stack, positions: Sequence[int]) -> list[nn.Parameter]:
    """Give the layers at these positions parameters of their own, trainable, and return them."""
    own: list[nn.Parameter] = []
    for position in positions:
        for module in student.layers[position].modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_floating_point():
                    replacement = nn.Parameter(parameter.detach().clone(), requires_grad=True)
                    setattr(module, name, replacement)
                    own.append(replacement)
    return own


def warmup_then_cosine(step: int, steps: int) -> float:
    """Share of the peak rate: up over the first 5 % of the steps, then down a cosine to 5 %."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _step_(optimizer: torch.optim.Optimizer, masters: list[torch.Tensor], trained: list[nn.Parameter]) -> None:
    """One AdamW step on the float32 masters, then round them into the student's weights."""
    for master, p in zip(masters, trained, strict=True):
        master.grad = torch.zeros_like(master) if p.grad is None else p.grad.float()
    nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    for master, p in zip(masters, trained, strict=True):
        p.copy_(master)


# --- objectives: each runs forward and backward for one batch [B, T] and returns the mean loss ------------------


def _forward_both(
    dense: Stack, student: Stack, prefix: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Calls]:
    """Dense hidden states at the end [B, T, D], the shared ones at `prefix`, and the student's layer arguments."""
    with torch.no_grad():
        shared, calls, student_calls = common_prefix(dense, student, tokens, prefix)
        final = dense.run(shared, calls, prefix, len(dense))
    return final, shared, student_calls


def _logit_backward(
    student: Stack, prefix: int, tokens: torch.Tensor, shared: torch.Tensor, calls: Calls, loss_of: Callable[..., Any]
) -> float:
    """Backward through head, suffix and endpoints; logits live a few rows at a time.

    loss_of(rows, logits) -> summed loss over those rows, divided by the tokens of the batch.
    """
    final = student.run(shared, calls, prefix, len(student))
    leaf = final.detach().requires_grad_(True)
    rows = rows_per_chunk(tokens.shape[1], student.vocabulary)
    total = 0.0
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        loss = loss_of(part, student.exit(leaf[part], tokens[part]))
        loss.backward()
        total += loss.item()
    assert leaf.grad is not None
    final.backward(leaf.grad)
    return total


def _kl_step(dense: Stack, student: Stack, prefix: int, last: int, tokens: torch.Tensor) -> float:
    final, shared, calls = _forward_both(dense, student, prefix, tokens)

    def loss_of(part: slice, q_logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            p_logits = dense.exit(final[part], tokens[part])
        return kl_divergence(p_logits, q_logits).sum() / tokens.numel()

    return _logit_backward(student, prefix, tokens, shared, calls, loss_of)


def _next_token_step(dense: Stack, student: Stack, prefix: int, last: int, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        hidden, calls = student.enter(tokens)
        shared = student.run(hidden, calls, 0, prefix)
    targets = student.place(tokens)

    def loss_of(part: slice, logits: torch.Tensor) -> torch.Tensor:
        return next_token_loss(logits, targets[part]).sum() / (targets.numel() - len(targets))

    return _logit_backward(student, prefix, tokens, shared, calls, loss_of)


def _hidden_step(dense: Stack, student: Stack, prefix: int, last: int, tokens: torch.Tensor) -> float:
    removed = len(dense) - len(student)
    with torch.no_grad():
        shared, calls, student_calls = common_prefix(dense, student, tokens, prefix)
        target = dense.run(shared, calls, prefix, last + 1 + removed)
    got = student.run(shared, student_calls, prefix, last + 1)
    loss = (got.float() - target.float()).square().mean() / target.float().square().mean()
    loss.backward()
    return loss.item()


_LOSSES: dict[str, Callable[[Stack, Stack, int, int, torch.Tensor], float]] = {
    "kl": _kl_step,
    "next-token": _next_token_step,
    "hidden": _hidden_step,
}


@torch.no_grad()
def _score_heldout(
    dense: Stack, student: Stack, prefix: int, heldout: torch.Tensor, report: Tuning, *, step: int, tokens: int
) -> float:
    """Next-token loss for that objective, KL(p || q) for the others, on held-out rows."""
    if report.objective == "next-token":
        rows = student.place(heldout).split(rows_per_chunk(heldout.shape[1], student.vocabulary))
        losses = [next_token_loss(student.model(input_ids=batch, use_cache=False).logits, batch) for batch in rows]
        score = torch.cat(losses).mean().item()
    else:
        score = mean_kl(dense, student, heldout, prefix)
    report.heldout.append({"step": step, "tokens": tokens, "loss": score})
    return score
