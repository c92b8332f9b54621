"""Distances between what two models predict. Pure functions of tensors.

p is the dense model's next-token distribution, q the compressed one's. Logits are [..., T, V]; every result is
in nats per token, computed in float32 whatever the model's own number format.
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


# --- losses whose gradient is written out: for tuning, where each is wanted once ---------------------------------


def kl_and_gradient(
    p_logits: torch.Tensor, z: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """t^2 KL(p_t || q_t) per token, p_t = softmax(p_logits / t) (Hinton, 1503.02531), and its gradient t (q_t - p_t).

    Args:
        p_logits: float32 [n, V], of the dense model.
        z: float32 [n, V], the student's logits.
        temperature: t.

    Returns:
        The loss [n] in nats, and the gradient of its sum in z [n, V].
    """
    # in place where a tensor is not needed again: each is [n, V], the largest there are
    log_p, log_q = (F.log_softmax(x if temperature == 1 else x / temperature, -1) for x in (p_logits, z))
    p = log_p.exp()
    loss = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return temperature**2 * loss, _scaled_(log_q.exp_().sub_(p), temperature)


def bucket_kl_and_gradient(
    log_p: torch.Tensor, index: torch.Tensor, z: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same between p and q of K tokens and one bucket that holds all others; never above the full KL.

    With q_b = 1 - sum of q over the K, the gradient is t (q - p) at the K and t q (1 - p_b / q_b) at the others.

    Args:
        log_p: float32 [n, K + 1], log-probabilities at temperature t, the bucket last.
        index: int64 [n, K], token ids of the K.
        z: float32 [n, V], the student's logits.
        temperature: t.

    Returns:
        The loss [n] in nats, and the gradient of its sum in z [n, V].
    """
    log_q = F.log_softmax(z if temperature == 1 else z / temperature, -1)
    log_q_k = log_q.gather(-1, index)
    q = log_q.exp_()
    q_k = q.gather(-1, index)  # [n, K]
    # q of the bucket summed from the others, not 1 - sum of q_k, which would cancel to noise where q_k is nearly all
    others = q.scatter_(-1, index, 0.0).sum(-1, keepdim=True).clamp_min_(torch.finfo(q.dtype).tiny)
    p, p_bucket = log_p[:, :-1].exp(), log_p[:, -1:].exp()
    loss = torch.linalg.vecdot(log_p.exp(), log_p - torch.cat([log_q_k, others.log()], -1))
    gradient = q.mul_(1 - p_bucket / others).scatter_(-1, index, q_k - p)
    return temperature**2 * loss, _scaled_(gradient, temperature)


def next_token_and_gradient(z: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the next token, 0 where there is none, and its gradient.

    Args:
        z: float32 logits [n, V].
        targets: token ids [n], negative where there is none.

    Returns:
        The loss [n] in nats, and the gradient of its sum in z [n, V].
    """
    some, index = (targets >= 0)[:, None], targets.clamp_min(0)[:, None]
    log_q = F.log_softmax(z, -1)
    loss = -log_q.gather(-1, index) * some
    return loss[:, 0], log_q.exp_().scatter_add_(-1, index, -torch.ones_like(loss)).mul_(some)


def _scaled_(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1 else x.mul_(factor)


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
