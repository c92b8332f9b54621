"""What makes a cut model good: the losses that a search prices cuts by and that endpoint tuning minimises.

Between the formulas (`losses.py`) and those who use them (`layer_search/prices.py`, `healing/objectives.py`). To add
one, subclass `Objective`, override `loss`, and register the class:

    @layercut.objectives.register("mypackage-reverse-kl")
    class ReverseKL(layercut.Objective):
        def loss(self, student, dense, targets):
            p, q = dense.log_softmax(-1), student.log_softmax(-1)
            return (q.exp() * (q - p)).sum(-1)

p is the dense model's next-token distribution, q the cut one's (the student's). M tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from layercut.models.losses import (
    Teacher,
    bucket_kl_and_gradient,
    kl_and_gradient,
    kl_divergence,
    next_token_and_gradient,
)


class Objective:
    """A loss per token. The constructor takes the options it knows as keywords, from `--temperature` and `--mix`."""

    label: ClassVar[str] = "loss"
    """What reports call it."""
    reads: ClassVar[Literal["logits", "hidden"]] = "logits"
    """What it compares: logits after the head, or hidden states: in a search those after the last layer, in tuning
    those after the last trained layer, which is cheaper and spares the head."""
    needs_dense: bool = True
    """Whether the dense model is run on the same tokens."""
    stored_topk: ClassVar[bool] = False
    """Whether it can do with the dense model's K likeliest tokens from disk (`loss_and_gradient_topk`)."""

    def __init__(self, **options: Any) -> None:
        if options:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(options)}")

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each token, differentiable in `student`.

        Args:
            student: float32 logits [M, V] of the cut model, or its hidden states [M, D].
            dense: the same of the dense model; None where `needs_dense` is False.
            targets: token ids [M] of the next tokens, -1 where there is none: such a token's loss must be 0 if it
                depends on the target.

        Returns:
            [M], in nats for logits.
        """
        raise NotImplementedError

    def loss_and_gradient(
        self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`loss` [M], and the gradient of its sum in `student` [M, V]; by autograd unless written out."""
        leaf = student.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = self.loss(leaf, dense, targets)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), gradient

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """`loss` as a function of the student alone, with what many students share computed once.

        Args:
            dense: logits [B, T, V] of the dense model, or its hidden states [B, T, D]; None as in `loss`.
            targets: token ids [B, T], as in `loss`.

        Returns:
            A function of the student's [B, T, V] or [B, T, D], or, where B is 1, of P students' [P, T, …]; it gives
            [B, T] or [P, T] and is differentiable.
        """

        def loss(student: torch.Tensor) -> torch.Tensor:
            flat, shape = student.float().flatten(0, 1), student.shape[:2]
            p = None if dense is None else dense.float().expand(student.shape).flatten(0, 1)
            index = targets.expand(shape).flatten()
            if torch.is_grad_enabled() and student.requires_grad:
                return _WithGradient.apply(flat, self, p, index).view(shape)
            return self.loss(flat, p, index).view(shape)

        return loss

    def judge(self) -> Objective:
        """What held-out rows are scored by during tuning: logits are what counts, at temperature 1."""
        return self if self.reads == "logits" else KL()


class _WithGradient(torch.autograd.Function):
    """A loss per token [M] of a student [M, …], backwards by `Objective.loss_and_gradient`."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, objective: Objective, dense: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        loss, gradient = objective.loss_and_gradient(student, dense, targets)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].unsqueeze(-1), None, None, None


class KL(Objective):
    """t² KL(p_t || q_t), p_t = softmax(logits / t) (Hinton, 1503.02531); with `mix`, that share of next-token loss."""

    label = "KL"
    stored_topk = True

    def __init__(self, *, temperature: float = 1.0, mix: float = 0.0) -> None:
        self.temperature, self.mix = temperature, mix
        self.needs_dense = mix < 1

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        return self.loss_and_gradient(student, dense, targets)[0]

    def loss_and_gradient(
        self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        terms = []
        if dense is not None and self.mix < 1:
            terms.append((1 - self.mix, *kl_and_gradient(dense.float(), student, self.temperature)))
        return self._mixed(terms, student, targets)

    def loss_and_gradient_topk(
        self, student: torch.Tensor, log_p: torch.Tensor, index: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with p of K tokens and one bucket for all others.  log_p: [M, K + 1], index: [M, K]"""
        kl = bucket_kl_and_gradient(log_p, index, student, self.temperature)
        return self._mixed([(1 - self.mix, *kl)], student, targets)

    def _mixed(
        self, terms: list[tuple[float, torch.Tensor, torch.Tensor]], student: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mix:
            terms.append((self.mix, *next_token_and_gradient(student, targets)))
        if len(terms) == 1 and terms[0][0] == 1:
            return terms[0][1:]
        loss = torch.stack([weight * each for weight, each, _ in terms]).sum(0)
        return loss, torch.stack([weight * slope for weight, _, slope in terms]).sum(0)

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.mix or self.temperature != 1 or dense is None:
            return super().against(dense, targets)
        return Teacher(dense).kl

    def judge(self) -> Objective:
        return KL(mix=self.mix)


class NextToken(Objective):
    """Cross entropy of the text's next token: the paper's setting (CLP, 2510.23652)."""

    label = "next-token loss"
    needs_dense = False

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        return next_token_and_gradient(student, targets)[0]

    def loss_and_gradient(
        self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return next_token_and_gradient(student, targets)

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def loss(student: torch.Tensor) -> torch.Tensor:
            logits, index = student.float().transpose(1, 2), targets.expand(len(student), -1)
            return F.cross_entropy(logits, index, reduction="none", ignore_index=-1)

        return loss


class Hidden(Objective):
    """|h - h_dense|² / |h_dense|²; the norm is each token's own in a search, the mean of a pass in tuning."""

    label = "hidden states"
    reads = "hidden"

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        assert dense is not None
        norm = dense.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return (student.float() - dense.float()).square().sum(-1) / norm

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda student: self.loss(student, dense, targets)


__all__ = ["KL", "Hidden", "NextToken", "Objective", "kl_divergence"]
