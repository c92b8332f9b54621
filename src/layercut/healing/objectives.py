"""What endpoint tuning minimises: one forward and backward pass for a few rows of tokens.

Between the loop (`endpoints.py`) and the formulas (`models/losses.py`). Dense teacher and cut student share every
hidden state below the first trained layer, so the prefix runs once and without gradients. From the logits down the
gradient is written out by hand, piece by piece: vocabulary-sized tensors are the largest there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from layercut.distributed import processes, sharding
from layercut.healing.stored_teacher import StoredTeacher
from layercut.models.losses import (
    Term,
    bucket_kl_and_gradient,
    kl_and_gradient,
    kl_divergence,
    logit_pieces,
    loss_and_gradient,
    next_token_and_gradient,
)
from layercut.models.runner import DecoderRunner, carry_, common_prefix, enter_all, not_finite

Objective = Literal["kl", "next-token", "hidden"]
Batch = tuple[torch.Tensor, torch.Tensor, float]
"""Tokens [B, T], where they stand among those that are tuned on [B], the weight of their mean loss in the step's."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dense model and its cut copy, equal below `prefix`, and what brings them together."""

    dense: DecoderRunner
    student: DecoderRunner
    prefix: int
    """The first trained layer."""
    last: int
    """The last trained layer, counted in the student."""
    objective: Objective = "kl"
    temperature: float = 1.0
    mix: float = 0.0
    """Share of the next-token loss in the objective "kl"."""
    stored: StoredTeacher | None = None
    """The dense predictions on the tuning tokens, where they were stored."""

    def backwards(self, batches: Sequence[Batch]) -> Iterator[float]:
        """`backward` of several batches of one step, in their order.

        Yields the loss of what the trained parameters hold the gradients of now; whoever asks takes these and clears
        them.
        """
        for batch in batches:
            yield self.backward(*batch)

    def backward(self, tokens: torch.Tensor, rows: torch.Tensor, weight: float = 1.0) -> float:
        """Add the gradient of weight x the mean loss over tokens [B, T] to the trained parameters; that loss.

        rows: where these tokens stand among those that are tuned on.
        """
        if self.objective == "hidden":
            return _hidden_backward(self, tokens, weight)
        with torch.no_grad():
            if self.objective == "next-token" or self.stored:
                hidden, calls = self.student.enter(tokens)
                shared, final = self.student.run(hidden, calls, 0, self.prefix), None
            else:
                shared, dense_calls, calls = common_prefix(self.dense, self.student, tokens, self.prefix)
                final = self.dense.run(shared, dense_calls, self.prefix, len(self.dense))
        out = self.student.run(shared, calls, self.prefix, len(self.student))
        loss, gradient = logit_gradient(self, tokens, rows, weight, out, final)
        out.backward(gradient)
        return loss


def dense_states(pair: Pair, batches: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of batches of tokens [B, T], the dense hidden states at the end and the shared ones at `prefix`, [B, T, D]."""
    with torch.no_grad():
        hidden, calls = enter_all(pair.dense, batches)
        carry_(pair.dense, hidden, calls, 0, pair.prefix)
        shared = list(hidden)
        carry_(pair.dense, hidden, calls, pair.prefix, len(pair.dense))
    return list(zip(hidden, shared, strict=True))


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """What each token is to predict, -1 at the end of a row.  [B, T] -> [B, T]"""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)


def _hidden_backward(pair: Pair, tokens: torch.Tensor, weight: float) -> float:
    """|h - h_dense|^2 / |h_dense|^2 after the last trained layer."""
    removed = len(pair.dense) - len(pair.student)
    with torch.no_grad():
        shared, calls, student_calls = common_prefix(pair.dense, pair.student, tokens, pair.prefix)
        target = pair.dense.run(shared, calls, pair.prefix, pair.last + 1 + removed).float()
    got = pair.student.run(shared, student_calls, pair.prefix, pair.last + 1)
    loss, gradient = hidden_gradient(got, target, weight)
    got.backward(gradient)
    return loss


def hidden_gradient(got: torch.Tensor, target: torch.Tensor, weight: float) -> tuple[float, torch.Tensor]:
    """weight x |h - h_dense|^2 / |h_dense|^2 and its gradient in h [B, T, D]; the target is float32."""
    leaf = got.detach().requires_grad_(True)
    loss = weight * (leaf.float() - target).square().mean() / target.square().mean()
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def logit_gradient(
    pair: Pair,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    weight: float,
    out: torch.Tensor,
    final: torch.Tensor | None,
) -> tuple[float, torch.Tensor]:
    """weight x the mean loss of what leaves the student's last layer [B, T, D], and its gradient there; logits live a
    piece at a time. final: the dense model's, where the objective compares with it."""
    student, total, scale = pair.student, 0.0, weight / tokens.numel()
    gradient = torch.empty_like(out)
    targets = next_tokens(student.place(tokens))
    pieces = list(logit_pieces(len(tokens), tokens.shape[1], student.vocabulary * out.element_size()))
    for piece, counts in sharding.in_step(student.model, pieces, pieces[0]):
        leaf = out[piece].detach().requires_grad_(True)
        logits = student.exit(leaf, tokens[piece])
        with torch.no_grad():
            terms = []
            if pair.objective == "kl" and pair.mix < 1:
                p_logits = pair.dense.exit(final[piece], tokens[piece]) if final is not None else None
                terms.append((1 - pair.mix, _teacher_term(pair, rows[piece[0]], piece[1], p_logits)))
            mix = pair.mix if pair.objective == "kl" else 1.0
            if mix:
                # T - 1 predictions, and the mean over T tokens
                mix *= tokens.shape[1] / (tokens.shape[1] - 1)
                terms.append((mix, _next_token_term(targets[piece].flatten())))
            loss, slope = loss_and_gradient(logits.detach().flatten(0, 1), _sum(terms), scale)
        logits.backward(slope.view_as(logits))
        assert leaf.grad is not None
        if counts:
            total += loss
            gradient[piece] = leaf.grad
    return total * scale, gradient


def _sum(terms: list[tuple[float, Term]]) -> Term:
    """The weighted sum of losses."""

    def both(part: slice, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        results = [(weight, *term(part, z)) for weight, term in terms]
        if len(results) == 1 and results[0][0] == 1:
            return results[0][1:]
        return (
            torch.stack([weight * loss for weight, loss, _ in results]).sum(0),
            torch.stack([weight * slope for weight, _, slope in results]).sum(0),
        )

    return both


def _teacher_term(pair: Pair, rows: torch.Tensor, columns: slice, p_logits: torch.Tensor | None) -> Term:
    if p_logits is not None:
        p = p_logits.flatten(0, 1)
        return lambda part, z: kl_and_gradient(p[part].float(), z, pair.temperature)
    assert pair.stored is not None
    log_p, index = (t.to(pair.student.device) for t in pair.stored.read(rows, columns))
    return lambda part, z: bucket_kl_and_gradient(log_p[part], index[part], z, pair.temperature)


def _kl_term(p_logits: torch.Tensor) -> Term:
    """For scoring: nobody asks for the gradient."""
    return lambda part, z: (kl_divergence(p_logits[part], z), z)


def _next_token_term(targets: torch.Tensor) -> Term:
    return lambda part, z: next_token_and_gradient(z, targets[part])


class HeldOut:
    """Rows that judge a student during tuning. What stays as it is from score to score is computed once.

    That is h at `prefix` and the dense h at the end, in the model's own number format: 2 D numbers a token. Of several
    processes each takes a share of the rows; the score is over all. Raises ModelError where a dense state is not
    finite: nothing can be compared with it.
    """

    def __init__(self, pair: Pair, tokens: torch.Tensor, rows: int) -> None:
        self.pair, self.tokens = pair, tokens
        self.parts = sharding.in_step(pair.student.model, processes.share_of_batches(len(tokens), rows), slice(0, 1))
        self.batches = [tokens[part] for part, _ in self.parts]
        self.states = dense_states(pair, self.batches)
        for batch, (final, _) in zip(self.batches, self.states, strict=True):
            if not (finite := final.isfinite().flatten(1).all(1)).all():
                row = int((~finite).nonzero()[0])
                raise not_finite(pair.dense, batch[row : row + 1])

    @torch.no_grad()
    def score(self) -> float:
        """What the objective minimises, in nats per token: KL(p || q) at temperature 1, the next-token loss, or both by
        their shares. Of the objective "hidden" it is KL too, since logits are what counts."""
        pair, kl, next_token = self.pair, 0.0, 0.0
        mix = {"kl": pair.mix, "next-token": 1.0, "hidden": 0.0}[pair.objective]
        outs = [shared for _, shared in self.states]
        carry_(pair.student, outs, enter_all(pair.student, self.batches)[1], pair.prefix, len(pair.student))
        for (_, mine), batch, (final, _), out in zip(self.parts, self.batches, self.states, outs, strict=True):
            targets = next_tokens(pair.student.place(batch))
            pieces = list(logit_pieces(len(batch), batch.shape[1], pair.student.vocabulary * out.element_size()))
            for piece, counts in sharding.in_step(pair.student.model, pieces, pieces[0]):
                q = pair.student.exit(out[piece], batch[piece]).flatten(0, 1)
                scored = mine and counts
                if mix < 1:
                    p = pair.dense.exit(final[piece], batch[piece]).flatten(0, 1)
                    kl += _summed(_kl_term(p), q) if scored else 0.0
                if mix > 0:
                    next_token += _summed(_next_token_term(targets[piece].flatten()), q) if scored else 0.0
        kl, next_token = processes.summed([kl, next_token])
        tokens = self.tokens.numel()
        return (1 - mix) * kl / tokens + mix * next_token / (tokens - len(self.tokens))


def _summed(term: Term, logits: torch.Tensor) -> float:
    return loss_and_gradient(logits, term, 1.0)[0]
