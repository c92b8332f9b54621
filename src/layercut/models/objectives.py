"""What makes a cut model good: the losses that a search prices cuts by and that endpoint tuning minimises.

Between the formulas (`losses.py`) and those who use them (`layer_search/prices.py`, `healing/tuning_pass.py`). What a
search adds of generated tests to the loss on text is in `layer_search/weighted_rows.py`. To add one, subclass
`Objective`, override `loss`, and register the class:

    @layercut.objectives.register("mypackage-reverse-kl")
    class ReverseKL(layercut.Objective):
        def loss(self, student, dense, targets):
            p, q = dense.log_softmax(-1), student.log_softmax(-1)
            return (q.exp() * (q - p)).sum(-1)

p is the dense model's next-token distribution, q the cut one's (the student's). M tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from layercut.errors import ConfigError
from layercut.models.losses import Teacher, kl_divergence
from layercut.registries import objectives


class Objective:
    """A loss per token. The constructor takes the options it knows as keywords, from `--mix`."""

    name: str = "objective"
    """What it is registered as; of an unregistered class its own name."""
    label: str = "loss"
    """What reports call it."""
    reads: ClassVar[Literal["logits", "hidden"]] = "logits"
    """What it compares: logits after the head, or hidden states: in a search those after the last layer, in tuning
    those after the last trained layer, which is cheaper and spares the head."""
    needs_dense: bool = True
    """Whether the dense model is run on the same tokens."""
    per_target: ClassVar[bool] = False
    """Whether the loss is that of the next token, and 0 where there is none: the last of a row of T. The mean is then
    over the T - 1 others."""
    whole_pass: ClassVar[bool] = False
    """Whether a token's loss depends on which tokens share its forward pass: several processes then split a step by
    passes, and not by rows."""

    def __init__(self, **options: Any) -> None:
        if options:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(options)}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", cls.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """The plain values that its instance holds: with the name, what identifies an objective."""
        plain = {key: value for key, value in vars(self).items() if isinstance(value, int | float | str)}
        return {key: value for key, value in plain.items() if not hasattr(Objective, key)}

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
        """`loss`, and the gradient of its sum in `student`; by autograd unless written out.

        Args:
            student: float32 logits [M, V] or hidden states [M, D].
            dense: the same of the dense model; None where `needs_dense` is False.
            targets: token ids [M], -1 where there is none.

        Returns:
            [M], and [M, V] or [M, D]; without a graph.
        """
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

    def terms(self) -> list[tuple[float, Objective]]:
        """The objectives that it is the weighted sum of, each with its weight: itself, unless it mixes several."""
        return [(1.0, self)]

    def judge(self) -> Objective:
        """What held-out rows are scored by during tuning; it reads logits, since these are what counts."""
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
    """KL(p || q); with `mix`, that share of next-token loss."""

    name = "kl"
    label = "KL to the dense model"

    def __init__(self, *, mix: float = 0.0) -> None:
        if not 0 <= mix <= 1:
            raise ConfigError(f"mix = {mix:g} is outside 0 to 1", "a tenth of the next-token loss: mix=0.1")
        self.mix = mix
        self.needs_dense = mix < 1
        if mix:
            self.label = f"{self.label} and {NextToken.label}" if mix < 1 else NextToken.label

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """KL(p || q), mixed with the next-token loss where `mix` > 0; arguments as of `Objective.loss`."""
        if self.mix:
            return torch.stack([share * term.loss(student, dense, targets) for share, term in self.terms()]).sum(0)
        assert dense is not None
        return kl_divergence(dense, student)

    def loss_and_gradient(
        self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(p || q) and q - p, written out; arguments as of `Objective.loss_and_gradient`."""
        if self.mix:
            return weighted([(w, *term.loss_and_gradient(student, dense, targets)) for w, term in self.terms()])
        assert dense is not None
        # in place where a tensor is not needed again: each is [M, V], the largest there are
        log_p, log_q = (F.log_softmax(x, -1) for x in (dense, student))
        p = log_p.exp()
        loss = torch.linalg.vecdot(p, log_p.sub_(log_q))
        return loss, log_q.exp_().sub_(p)

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """KL with log p computed once for all students; arguments as of `Objective.against`."""
        if self.mix or dense is None:
            return super().against(dense, targets)
        return Teacher(dense).kl

    def terms(self) -> list[tuple[float, Objective]]:
        """The divergence and the next-token loss, with the weights 1 - mix and mix; those of weight 0 are left out."""
        if not self.mix:
            return [(1.0, self)]
        divergence: list[tuple[float, Objective]] = [(1 - self.mix, KL())]
        return [*divergence[: self.mix < 1], (self.mix, NextToken())]


class NextToken(Objective):
    """Cross entropy of the text's next token: the paper's setting (CLP, 2510.23652)."""

    name = "next-token"
    label = "next-token loss"
    needs_dense = False
    per_target = True

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """-log q(target), 0 where there is no target; arguments as of `Objective.loss`."""
        some, index = targets >= 0, targets.clamp_min(0)[:, None]
        return -F.log_softmax(student, -1).gather(-1, index)[:, 0] * some

    def loss_and_gradient(
        self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-log q(target) and q - onehot(target), written out; arguments as of `Objective.loss_and_gradient`."""
        some, index = (targets >= 0)[:, None], targets.clamp_min(0)[:, None]
        log_q = F.log_softmax(student, -1)
        loss = -log_q.gather(-1, index) * some
        return loss[:, 0], log_q.exp_().scatter_add_(-1, index, -torch.ones_like(loss)).mul_(some)

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Cross entropy of each student; arguments as of `Objective.against`."""

        def loss(student: torch.Tensor) -> torch.Tensor:
            logits, index = student.float().transpose(1, 2), targets.expand(len(student), -1)
            return F.cross_entropy(logits, index, reduction="none", ignore_index=-1)

        return loss


class Hidden(Objective):
    """|h - h_dense|² / |h_dense|²; the norm is each token's own in a search, the mean of a pass in tuning."""

    name = "hidden"
    label = "relative error of hidden states"
    reads = "hidden"
    whole_pass = True

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """|h - h_dense|² / |h_dense|² of each token; arguments as of `Objective.loss`."""
        assert dense is not None
        norm = dense.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return (student.float() - dense.float()).square().sum(-1) / norm

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The relative error of each student, each token over its own norm; arguments as of `Objective.against`."""
        return lambda student: self.loss(student, dense, targets)

    def loss_and_gradient(
        self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For a pass of M tokens: |h - h_dense|² / mean |h_dense|², so that tokens of a small norm do not decide.

        Arguments as of `Objective.loss_and_gradient`.
        """
        assert dense is not None
        gap, norm = student - dense, dense.square().sum(-1).mean()
        return gap.square().sum(-1) / norm, 2 * gap / norm


def weighted(terms: Sequence[tuple[float, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of losses [M] and of gradients [M, V], each of a term with its weight."""
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1:]
    return (
        torch.stack([weight * loss for weight, loss, _ in terms]).sum(0),
        torch.stack([weight * slope for weight, _, slope in terms]).sum(0),
    )


def objective_of(given: str | Objective | type[Objective], **options: Any) -> Objective:
    """An objective from its name or class, with options of its constructor; an instance is returned as it is."""
    if isinstance(given, Objective):
        return given
    kind = objectives.get(given) if isinstance(given, str) else given
    try:
        made = kind(**options)
    except TypeError as error:
        given_options = ", ".join(f"--{name} {value:g}" for name, value in options.items()) or "no options"
        raise ConfigError(
            f"the objective {given!r} cannot be used with {given_options}: {error}", "leave out what it does not take"
        ) from error
    if not isinstance(made, Objective):
        raise ConfigError(f"the objective {given!r} is a {type(made).__name__}", "subclass layercut.Objective")
    if isinstance(given, str):
        made.name = given
    return made


__all__ = ["KL", "Hidden", "NextToken", "Objective", "kl_divergence", "objective_of"]
