"""What makes a cut model good: the losses that a search prices cuts by and that endpoint tuning minimises.

Between the formulas (`losses.py`) and those who use them (`layer_search/prices.py`, `healing/tuning_pass.py`). What a
search adds of generated tests to the loss on text is in `layer_search/weighted_rows.py`. To add one, subclass
`Objective`, override `loss`, and register the class:

    @layercut.objectives.register("mypackage-reverse-kl")
    class ReverseKL(layercut.Objective):
        def loss(self, student, dense, targets):
            p, q = dense.log_softmax(-1), student.log_softmax(-1)
            return (q.exp() * (q - p)).sum(-1)

p is the dense model's next-token distribution, q the cut one's (the student's). M tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

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
    needs_dense: bool = True
    """Whether the dense model is run on the same tokens."""
    per_target: ClassVar[bool] = False
    """Whether the loss is that of the next token, and 0 where there is none: the last of a row of T. The mean is then
    over the T - 1 others."""

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
            student: float32 logits [M, V] of the cut model.
            dense: the same of the dense model; None where `needs_dense` is False.
            targets: token ids [M] of the next tokens, -1 where there is none: such a token's loss must be 0 if it
                depends on the target.

        Returns:
            [M], in nats for logits.
        """
        raise NotImplementedError

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """`loss` as a function of the student alone, with what many students share computed once.

        Args:
            dense: logits [B, T, V] of the dense model; None as in `loss`.
            targets: token ids [B, T], as in `loss`.

        Returns:
            A function of the student's [B, T, V], or, where B is 1, of P students' [P, T, V]; it gives [B, T] or [P, T]
            and is differentiable.
        """

        def loss(student: torch.Tensor) -> torch.Tensor:
            flat, shape = student.float().flatten(0, 1), student.shape[:2]
            p = None if dense is None else dense.float().expand(student.shape).flatten(0, 1)
            index = targets.expand(shape).flatten()
            return self.loss(flat, p, index).view(shape)

        return loss

    def terms(self) -> list[tuple[float, Objective]]:
        """The objectives that it is the weighted sum of, each with its weight: itself, unless it mixes several."""
        return [(1.0, self)]


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
        return F.cross_entropy(student, targets, reduction="none", ignore_index=-1)


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
