"""Distances between what two models predict. Pure functions of tensors.

p is the dense model's next-token distribution, q the compressed one's. Logits are [..., T, V]; every result is
in nats per token, computed in float32 whatever the model's own number format.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


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
        """KL(p || q) per token, differentiable in q_logits.  [..., V] -> [...]"""
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
    """KL(p || q) per token.  [..., V], [..., V] -> [...]"""
    return Teacher(p_logits).kl(q_logits)


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next token.  [B, T, V], [B, T] -> [B, T - 1]"""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def rows_per_chunk(tokens_per_row: int, vocabulary: int, budget_bytes: int = 256 * 2**20) -> int:
    """How many rows of logits fit the budget in float32: [rows, T, V] tensors are the largest there are."""
    return max(1, budget_bytes // (tokens_per_row * vocabulary * 4))
