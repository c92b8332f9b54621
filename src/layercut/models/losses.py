"""Distances between what two models predict. Pure functions of tensors.

p is the dense model's next-token distribution, q the compressed one's. Logits are [..., T, V]; every result is
in nats per token, computed in float32 whatever the model's own dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from layercut.models.memory import budget, slices

LOSS_SCALE = 2.0**16
"""What losses are multiplied by where gradients are taken in float16, which below 6e-8 has nothing: at first. Halved
where a gradient overflows. A power of two, undone in float32, changes no bit."""


def as_price(value: float, least: float = -math.inf) -> float:
    """A price or a loss as it is compared with others: infinite, the worst there is, where it is not a finite number.

    NaN compares as neither more nor less than anything, so that max(0.0, nan) is 0.0 and min may return it: whatever
    is compared passes through here first.
    """
    return max(least, value) if math.isfinite(value) else math.inf


class Teacher:
    """The dense model's distribution p, prepared once for any number of students.

    KL(p || q) = sum_v p_v log p_v - sum_v p_v z_v + logsumexp(z), z the student's logits; its gradient in z is
    softmax(z) - p. Written out, since passing over the vocabulary is most of the work where that is large.
    """

    def __init__(self, p_logits: torch.Tensor) -> None:
        self.p, self.negative_entropy = _distribution(p_logits)

    def kl(self, q_logits: torch.Tensor) -> torch.Tensor:
        """KL(p || q) per token, differentiable in the student's logits: [..., V] -> [...]."""
        return self.negative_entropy + _CrossEntropy.apply(q_logits, self.p)


def _distribution(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """p [..., V] and sum_v p_v log p_v [...] of logits, in float32."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    return p, torch.linalg.vecdot(p, log_p)


def likelihood_slope_(p: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """d ln p(v) / d logits = 1_v - p of tokens v drawn from p: its mean square is the Fisher information of the
    logits.
    """
    return p.neg_().scatter_add_(-1, drawn[..., None], torch.ones_like(drawn[..., None], dtype=p.dtype))


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
    """KL(p || q) per token."""
    return Teacher(p_logits).kl(q_logits)


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next token."""
    return token_loss(logits[:, :-1], tokens[:, 1:])


def token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token, a few of them in float32 at a time."""
    z, targets = logits.flatten(0, 1), tokens.flatten()
    parts = slices(len(z), budget(logits.device).float_tokens(logits.shape[-1]))
    losses = [F.cross_entropy(z[part].float(), targets[part], reduction="none") for part in parts]
    return torch.cat(losses).view(tokens.shape)
