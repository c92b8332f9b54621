"""What endpoint tuning minimises: one forward and backward pass for a few rows of tokens.

Between the loop (`endpoints.py`) and the formulas (`losses.py`). Dense teacher and cut student share every hidden
state below the first trained layer, so the prefix runs once and without gradients. From the logits down the gradient
is written out by hand, piece by piece: vocabulary-sized tensors are the largest there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from layercut import processes
from layercut.heal.stored import StoredTeacher
from layercut.losses import (
    Term,
    bucket_kl_and_gradient,
    kl_and_gradient,
    kl_divergence,
    logit_pieces,
    loss_and_gradient,
    next_token_and_gradient,
)
from layercut.sweep import Calls, Stack, common_prefix

Objective = Literal["kl", "next-token", "hidden"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dense model and its cut copy, equal below `prefix`, and what brings them together."""

    dense: Stack
    student: Stack
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

    def backward(self, tokens: torch.Tensor, rows: torch.Tensor) -> float:
        """Add the gradient of the mean loss over tokens [B, T] to the trained parameters; the loss.

        rows: where these tokens stand among those that are tuned on.
        """
        if self.objective == "hidden":
            return _hidden_backward(self, tokens)
        if self.objective == "next-token" or self.stored:
            with torch.no_grad():
                hidden, calls = self.student.enter(tokens)
                shared = self.student.run(hidden, calls, 0, self.prefix)
            final = None
        else:
            final, shared, calls = dense_final(self, tokens)
        return _logit_backward(self, tokens, rows, shared, calls, final)


def dense_final(pair: Pair, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Calls]:
    """Dense hidden states at the end and the shared ones at `prefix`, [B, T, D]; the student's layer arguments."""
    with torch.no_grad():
        shared, calls, student_calls = common_prefix(pair.dense, pair.student, tokens, pair.prefix)
        return pair.dense.run(shared, calls, pair.prefix, len(pair.dense)), shared, student_calls


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """What each token is to predict, -1 at the end of a row.  [B, T] -> [B, T]"""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)


def _hidden_backward(pair: Pair, tokens: torch.Tensor) -> float:
    """|h - h_dense|^2 / |h_dense|^2 after the last trained layer."""
    removed = len(pair.dense) - len(pair.student)
    with torch.no_grad():
        shared, calls, student_calls = common_prefix(pair.dense, pair.student, tokens, pair.prefix)
        target = pair.dense.run(shared, calls, pair.prefix, pair.last + 1 + removed).float()
    got = pair.student.run(shared, student_calls, pair.prefix, pair.last + 1)
    loss = (got.float() - target).square().mean() / target.square().mean()
    loss.backward()
    return loss.item()


def _logit_backward(
    pair: Pair,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    shared: torch.Tensor,
    calls: Calls,
    final: torch.Tensor | None,
) -> float:
    """Backward through head, suffix and endpoints; logits live a piece at a time. Returns the mean loss."""
    student, total = pair.student, 0.0
    out = student.run(shared, calls, pair.prefix, len(student))
    gradient = torch.empty_like(out)
    targets = next_tokens(student.place(tokens))
    for piece in logit_pieces(len(tokens), tokens.shape[1], student.vocabulary * out.element_size()):
        leaf = out[piece].detach().requires_grad_(True)
        logits = student.exit(leaf, tokens[piece])
        with torch.no_grad():
            terms = []
            if pair.objective == "kl" and pair.mix < 1:
                p_logits = pair.dense.exit(final[piece], tokens[piece]) if final is not None else None
                terms.append((1 - pair.mix, _teacher_term(pair, rows[piece[0]], piece[1], p_logits)))
            weight = pair.mix if pair.objective == "kl" else 1.0
            if weight:
                # T - 1 predictions, and the mean over T tokens
                weight *= tokens.shape[1] / (tokens.shape[1] - 1)
                terms.append((weight, _next_token_term(targets[piece].flatten())))
            loss, slope = loss_and_gradient(logits.detach().flatten(0, 1), _sum(terms), 1 / tokens.numel())
        logits.backward(slope.view_as(logits))
        total += loss
        assert leaf.grad is not None
        gradient[piece] = leaf.grad
    out.backward(gradient)
    return total / tokens.numel()


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


def _next_token_term(targets: torch.Tensor) -> Term:
    return lambda part, z: next_token_and_gradient(z, targets[part])


class HeldOut:
    """Rows that judge a student during tuning. What stays as it is from score to score is computed once.

    That is h at `prefix` and the dense h at the end, in the model's own number format: 2 D numbers a token. Of several
    processes each takes a share of the rows; the score is over all.
    """

    def __init__(self, pair: Pair, tokens: torch.Tensor, rows: int) -> None:
        self.pair, self.tokens = pair, tokens
        self.batches = [tokens[part] for part in processes.share_of_batches(len(tokens), rows)]
        self.states = [dense_final(pair, batch)[:2] for batch in self.batches]

    @torch.no_grad()
    def score(self) -> float:
        """KL(p || q) per token at temperature 1; for the objective "next-token", that loss."""
        pair, total = self.pair, 0.0
        loss_of = self._next_token if pair.objective == "next-token" else self._kl
        for batch, (final, shared) in zip(self.batches, self.states, strict=True):
            _, calls = pair.student.enter(batch)
            out = pair.student.run(shared, calls, pair.prefix, len(pair.student))
            for piece in logit_pieces(len(batch), batch.shape[1], pair.student.vocabulary * out.element_size()):
                total += loss_of(batch, piece, final, pair.student.exit(out[piece], batch[piece]).flatten(0, 1))
        predictions = self.tokens.numel() - (len(self.tokens) if pair.objective == "next-token" else 0)
        return processes.summed([total])[0] / predictions

    def _next_token(self, batch: torch.Tensor, piece: tuple[slice, slice], _: torch.Tensor, q: torch.Tensor) -> float:
        targets = next_tokens(self.pair.student.place(batch))[piece].flatten()
        return _summed(_next_token_term(targets), q)

    def _kl(self, batch: torch.Tensor, piece: tuple[slice, slice], final: torch.Tensor, q: torch.Tensor) -> float:
        p = self.pair.dense.exit(final[piece], batch[piece]).flatten(0, 1)
        return _summed(lambda part, z: (kl_divergence(p[part], z), z), q)


def _summed(term: Term, logits: torch.Tensor) -> float:
    return loss_and_gradient(logits, term, 1.0)[0]
