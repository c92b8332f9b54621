"""What makes a cut model good: distances between the predictions of two models, and the objectives made of them.

p is the dense model's next-token distribution, q the pruned one's (the student's). Logits are [..., T, V]; every result
is in nats per token, computed in float32 whatever the model's own dtype. To add an objective, subclass `Objective`,
override `loss`, and register the class:

    @layercut.objectives.register("mypackage-reverse-kl")
    class ReverseKL(layercut.Objective):
        def loss(self, student, dense, targets):
            p, q = dense.log_softmax(-1), student.log_softmax(-1)
            return (q.exp() * (q - p)).sum(-1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from layercut.distributed import processes, sharding
from layercut.errors import ConfigError, ModelError
from layercut.models.decoder_stack import find_decoder
from layercut.models.memory import budget, slices
from layercut.models.runner import DecoderRunner, carry_, enter_all, shared_passes
from layercut.registries import objectives

LOSS_SCALE = 2.0**16
"""What losses are multiplied by where gradients are taken in float16, which below 6e-8 has nothing: at first. Halved
where a gradient overflows. A power of two, undone in float32, changes no bit."""


def as_cost(value: float, least: float = -math.inf) -> float:
    """A cost or a loss as it is compared with others: infinite, the worst there is, where it is not a finite number.

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
    return Teacher(p_logits).kl(q_logits)


def likelihood_slope_(p: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """d ln p(v) / d logits = 1_v - p of tokens v drawn from p; its mean square is the logits' Fisher information."""
    return p.neg_().scatter_add_(-1, drawn[..., None], torch.ones_like(drawn[..., None], dtype=p.dtype))


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return token_loss(logits[:, :-1], tokens[:, 1:])


def token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token, a few of them in float32 at a time."""
    z, targets = logits.flatten(0, 1), tokens.flatten()
    parts = slices(len(z), budget(logits.device).float_tokens(logits.shape[-1]))
    losses = [F.cross_entropy(z[part].float(), targets[part], reduction="none") for part in parts]
    return torch.cat(losses).view(tokens.shape)


# --- of models, run layer by layer ------------------------------------------------------------------------------------


def teacher_of(stack: DecoderRunner, hidden: torch.Tensor, tokens: torch.Tensor) -> Teacher:
    """The dense model's predictions, prepared for comparison with any number of students."""
    return Teacher(dense_logits(stack, hidden, tokens))


def dense_logits(stack: DecoderRunner, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = stack.exit(hidden, tokens)
    finite = logits.isfinite().all(-1)
    if not finite.all():
        row = int((~finite).any(-1).nonzero()[0])
        raise not_finite(stack, tokens[row : row + 1])
    return logits


def not_finite(stack: DecoderRunner, row: torch.Tensor) -> ModelError:
    """The error for a model whose logits for a row of tokens are not finite.

    Names the weights that hold NaN or Inf, if any do, else the first layer whose output is not finite. Of a model that
    is sharded over processes only this process's part is examined, and no layer is run, which would need all.
    """

    def damaged(module: nn.Module, prefix: str = "") -> list[str]:
        named = ((name, p) for name, p in module.named_parameters() if not p.is_meta)
        return [prefix + name for name, p in named if not sharding.local(p.detach()).isfinite().all()]

    number = str(stack.model.dtype).removeprefix("torch.")
    what, where = f"the model's predictions are not finite (computed in {number})", ""
    held = damaged(stack.model)
    if not sharding.is_spread(stack.model):
        prefix, first = find_decoder(stack.model).path, None
        with torch.no_grad():
            hidden, calls = stack.enter(row)
            for i in range(len(stack)):
                held += damaged(stack.loaded(i), f"{prefix}.{i}.") if stack.on_disk else []
                hidden = stack.layer(i, hidden, calls)
                first = i if first is None and not hidden.isfinite().all() else first
        where = ": the layers' outputs are, what the head makes of them is not"
        if first is not None:
            where = f": layer {first} is the first of {len(stack)}, counted from 0, whose output is not"
    if held := list(dict.fromkeys(held)):  # a layer of a copy that is on disk may have weights in memory as well
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        words = f"{what}: {', '.join(held[:3])}{more} hold{'s' if len(held) == 1 else ''} NaN or Inf"
        return ModelError(words, "the checkpoint is damaged: fetch or convert it again")
    wider = "--dtype bfloat16 or --dtype float32" if number == "float16" else "--dtype float32"
    hint = "compute in a wider dtype: " + wider if number != "float32" else "this model cannot be used"
    return ModelError(f"{what}{where}; no weight holds NaN or Inf", hint)


@torch.no_grad()
def mean_kl(dense: DecoderRunner, student: DecoderRunner, tokens: torch.Tensor, prefix: int = 0) -> float:
    """KL(p || q) of the student's predictions. Of several processes each takes a share of the rows."""
    total, tokens = 0.0, dense.place(tokens)
    mine = shared_passes(dense, tokens, dense.budget.logit_rows(tokens.shape[1], dense.vocabulary), streams=3)
    queue = dense.parts("kl", sharding.in_step(dense.model, mine, [slice(0, 1)]))
    for part in queue:
        with queue.trying(part):
            rows, counts = part
            batches = [tokens[some] for some in rows]
            p, calls = enter_all(dense, batches)
            carry_(dense, p, calls, 0, prefix)
            q, student_calls = list(p), [student.arguments(batch) for batch in batches]
            carry_(dense, p, calls, prefix, len(dense))
            carry_(student, q, student_calls, prefix, len(student))
            found = [
                teacher_of(dense, p_hidden, batch).kl(student.exit(q_hidden, batch)).sum()
                for batch, p_hidden, q_hidden in zip(batches, p, q, strict=True)
            ]
            total += sum(torch.stack(found).tolist()) if counts else 0.0
    return as_cost(processes.summed([total])[0] / tokens.numel())


# --- objectives ---------------------------------------------------------------------------------------------------


class Objective:
    """A loss per token. `--objective NAME` makes one with no arguments."""

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
            return self.loss(flat, p, targets.expand(shape).flatten()).view(shape)

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
        if self.mix:
            return torch.stack([share * term.loss(student, dense, targets) for share, term in self.terms()]).sum(0)
        assert dense is not None
        return kl_divergence(dense, student)

    def against(self, dense: torch.Tensor | None, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return super().against(dense, targets) if self.mix or dense is None else Teacher(dense).kl

    def terms(self) -> list[tuple[float, Objective]]:
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
        return F.cross_entropy(student, targets, reduction="none", ignore_index=-1)


def objective_of(given: str | Objective | type[Objective]) -> Objective:
    """An objective from its name or class; an instance is returned as it is."""
    if isinstance(given, Objective):
        return given
    kind = objectives.get(given) if isinstance(given, str) else given
    try:
        made = kind()
    except TypeError as error:
        raise ConfigError(f"the objective {given!r} cannot be made: {error}", "give an instance of it") from error
    if not isinstance(made, Objective):
        raise ConfigError(f"the objective {given!r} is a {type(made).__name__}", "subclass layercut.Objective")
    if isinstance(given, str):
        made.name = given
    return made
