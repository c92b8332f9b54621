"""Distances between what two models predict. Pure functions of tensors.

p is the dense model's next-token distribution, q the compressed one's. Logits are [..., T, V]; every result is
in nats per token, computed in float32 whatever the model's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F


def as_price(value: float, least: float = -math.inf) -> float:
    """A price or a loss as it is compared with others: infinite, the worst there is, where it is not a finite number.

    NaN compares as neither more nor less than anything, so that max(0.0, nan) is 0.0 and min may return it: whatever
    is compared passes through here first.

    Args:
        value: as computed.
        least: what a finite value is raised to, 0 for a divergence, which is negative only by rounding.

    Returns:
        A number that is not NaN.
    """
    return max(least, value) if math.isfinite(value) else math.inf


class Teacher:
    """The dense model's distribution p, prepared once for any number of students.

    KL(p || q) = sum_v p_v log p_v - sum_v p_v z_v + logsumexp(z), z the student's logits; its gradient in z is
    softmax(z) - p. Written out, since passing over the vocabulary is most of the work where that is large.
    """

    def __init__(self, p_logits: torch.Tensor) -> None:
        log_p = F.log_softmax(p_logits.float(), dim=-1)
        self.p = log_p.exp()
        self.negative_entropy = torch.linalg.vecdot(self.p, log_p)

    def kl(self, q_logits: torch.Tensor) -> torch.Tensor:
        """KL(p || q) per token, differentiable in the student's logits: [..., V] -> [...]."""
        return self.negative_entropy + _CrossEntropy.apply(q_logits, self.p)


class _CrossEntropy(torch.autograd.Function):
    """-sum_v p_v log softmax(z)_v, in float32; the backward pass makes one tensor of the size of z, not three."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        z = logits.float()
        log_sum = z.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, p, log_sum)
        return log_sum.squeeze(-1) - torch.linalg.vecdot(p, z)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, p, log_sum = ctx.saved_tensors
        q = (logits.float() - log_sum).exp_()
        return q.sub_(p).mul_(grads[0].unsqueeze(-1)).to(logits.dtype), None


def kl_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per token.

    Args:
        p_logits: of the dense model [..., V].
        q_logits: of the cut model [..., V].

    Returns:
        [...], in nats; differentiable in q_logits.
    """
    return Teacher(p_logits).kl(q_logits)


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next token.

    Args:
        logits: [B, T, V].
        tokens: token ids [B, T].

    Returns:
        [B, T - 1], in nats.
    """
    return token_loss(logits[:, :-1], tokens[:, 1:])


def token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token, a few of them in float32 at a time.

    Args:
        logits: [B, T, V].
        tokens: token ids [B, T] that they predict.

    Returns:
        [B, T], in nats.
    """
    z, targets = logits.flatten(0, 1), tokens.flatten()
    parts = slices(len(z), tokens_at_once(logits))
    losses = [F.cross_entropy(z[part].float(), targets[part], reduction="none") for part in parts]
    return torch.cat(losses).view(tokens.shape)


def tokens_at_once(logits: torch.Tensor, budget_bytes: int | None = None) -> int:
    """How many tokens' logits to have in float32 at a time.

    On a CPU so few (half a MiB a thread) that they, and what is made of them, stay in its inner cache (docs/log.md).

    Args:
        logits: [..., V].
        budget_bytes: for them in float32; by device where not given.

    Returns:
        At least 1.
    """
    budget = budget_bytes or (torch.get_num_threads() * 2**19 if logits.device.type == "cpu" else 256 * 2**20)
    return max(1, budget // (4 * logits.shape[-1]))


def slices(length: int, step: int) -> Iterator[slice]:
    """range(length) in runs of `step`.

    Args:
        length: how many in all.
        step: how many in a run, the last one excepted.

    Yields:
        Slices, in order.
    """
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


PIECE_BYTES = 32 * 2**20
"""Above it glibc no longer reuses memory but fetches it from the system, page by page, each time."""


def logit_pieces(
    rows: int, window: int, bytes_per_token: int, budget_bytes: int = PIECE_BYTES
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a [rows, window] of tokens, so that the logits of each piece fit the budget.

    Args:
        rows: N.
        window: T.
        bytes_per_token: of the logits of one token.
        budget_bytes: of the logits of a piece.

    Yields:
        Slices of the rows and of the positions.
    """
    tokens = max(1, budget_bytes // bytes_per_token)
    for part in slices(rows, max(1, tokens // window)):
        for columns in slices(window, min(window, tokens)):
            yield part, columns


def rows_per_chunk(tokens_per_row: int, vocabulary: int, budget_bytes: int = 256 * 2**20) -> int:
    """How many rows of logits fit the budget in float32: [rows, T, V] tensors are the largest there are.

    Args:
        tokens_per_row: T.
        vocabulary: V.
        budget_bytes: in bytes.

    Returns:
        At least 1.
    """
    return max(1, budget_bytes // (tokens_per_row * vocabulary * 4))
