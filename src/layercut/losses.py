"""Distances between what two models predict. Pure functions of tensors.

p is the dense model's next-token distribution, q the compressed one's. Logits are [..., T, V]; every result is
in nats per token, computed in float32 whatever the model's own number format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kl_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(p || q) per token: sum_v p_v (log p_v - log q_v).  [..., V], [..., V] -> [...]

    With a temperature t both are softened to softmax(logits / t) and the result is scaled by t^2, so that
    gradients keep their size (Hinton et al., 1503.02531, section 2).
    """
    log_p = F.log_softmax(p_logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(q_logits.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next token.  [B, T, V], [B, T] -> [B, T - 1]"""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def rows_per_chunk(tokens_per_row: int, vocabulary: int, budget_bytes: int = 256 * 2**20) -> int:
    """How many rows of logits fit the budget in float32: [rows, T, V] tensors are the largest there are."""
    return max(1, budget_bytes // (tokens_per_row * vocabulary * 4))
