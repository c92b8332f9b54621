"""Closed-form fold: mend the cut by least squares, inside a weight that is there anyway.

After the cut, layer e receives what layer s - 1 puts out: a + m, with m the MLP's output and a the rest of the
residual stream. It used to receive h_e. Find T minimising

    || m T + a - h_e ||^2 + ridge || T - I ||^2,      T = I + (M'M + ridge I)^-1 M'(h_e - a - m)

in float64 from streamed M'M and M'Y, and write it into the MLP's output projection, W <- T'W, b <- T'b, so that the
result stays a stock architecture (ReplaceMe, 2505.02819, equation 5, here with the ridge towards the identity:
without evidence the layer stays as it is). The ridge is relative to the mean of M'M's diagonal and is chosen on
tokens that the statistics have not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from layercut.segments import Segment, kept_layers
from layercut.sweep import Calls, Stack, hidden_of, intercepted

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Tried relative ridges. Between 1e-3 and 1e-1 little changes (docs/log.md); the ends guard against few tokens."""

HELD_OUT = 8
"""One row in this many is kept out of the statistics and chooses the ridge."""


@dataclass
class Normal:
    """Streamed sums of a least-squares problem m -> y, float64: M'M [D, D], M'Y [D, D], |Y|^2 and tokens."""

    mm: torch.Tensor
    my: torch.Tensor
    yy: float = 0.0
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Normal:
        mm, my = torch.zeros(2, width, width, dtype=torch.float64, device=device).unbind(0)
        return cls(mm, my)

    def add_(self, m: torch.Tensor, y: torch.Tensor) -> None:
        """Take in m and y, both [..., D]."""
        m, y = m.flatten(0, -2).double(), y.flatten(0, -2).double()
        self.mm += m.T @ m
        self.my += m.T @ y
        self.yy += y.square().sum().item()
        self.tokens += len(m)

    def solve(self, ridge: float) -> torch.Tensor:
        """X [D, D] minimising |M X - Y|^2 + ridge * mean(diag M'M) * |X|^2."""
        scale = self.mm.diagonal().mean() * ridge
        eye = torch.eye(len(self.mm), dtype=torch.float64, device=self.mm.device)
        return torch.linalg.solve(self.mm + scale * eye, self.my)

    def error(self, x: torch.Tensor) -> float:
        """|M X - Y|^2 / |Y|^2: what is left of the error, 1 where X = 0 does nothing."""
        left = self.yy - 2 * (x * self.my).sum() + (x * (self.mm @ x)).sum()
        return max(0.0, left.item() / self.yy) if self.yy else 0.0


@dataclass(frozen=True)
class Fold:
    """What one fold did, or why it could not be done."""

    segment: list[int]
    layer: int | None
    """Index, in the cut model, of the layer that was changed."""
    module: str | None
    ridge: float | None
    error_before: float | None
    error_after: float | None
    """Squared error of what enters layer e, on held-out rows, relative to the plain cut's (error_before = 1)."""
    tokens: int
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fold_(
    dense: Stack,
    student: Stack,
    segments: Sequence[Segment],
    tokens: torch.Tensor,
    *,
    rows: int = 8,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Fold]:
    """Fold every cut of `student` (whose segments are removed already), from the first to the last.

    The student's changed weights are new parameters: layers shared with the dense model are left as they are.
    tokens: [N, T]. A cut is skipped, with the reason, where there is no layer before it or where that layer's
    MLP output is not added to the residual stream as it is.
    """
    kept = kept_layers(segments, len(dense))
    return [_fold_one_(dense, student, segment, kept, tokens, rows, advance) for segment in sorted(segments)]


@torch.no_grad()
def _fold_one_(
    dense: Stack,
    student: Stack,
    segment: Segment,
    kept: list[int],
    tokens: torch.Tensor,
    rows: int,
    advance: Callable[[int], None],
) -> Fold:
    def skipped(reason: str) -> Fold:
        return Fold([segment.start, segment.stop], None, None, None, None, None, 0, reason)

    position = sum(i < segment.start for i in kept) - 1
    if position < 0:
        return skipped("no layer before the cut")
    if segment.stop == len(dense):
        return skipped("no layer after the cut")
    probe, calls = student.enter(tokens[:1, :16])
    name = output_projection(student, position, student.run(probe, calls, 0, position), calls)
    if name is None:
        return skipped("the layer before the cut adds no plain linear output to the residual stream")

    module = student.layers[position].get_submodule(name)
    fit, check = (Normal.zeros(_width(module), student.device) for _ in range(2))
    for number, batch in enumerate(tokens.split(rows)):
        m, y = _gap(dense, student, segment, position, module, batch)
        held = torch.arange(number * rows, number * rows + len(batch)) % HELD_OUT == HELD_OUT - 1
        if len(tokens) < HELD_OUT:  # too few rows to spare one: the largest ridge that helps is the safe choice
            held = torch.zeros(len(batch), dtype=torch.bool)
        fit.add_(m[~held], y[~held])
        check.add_(m[held], y[held])
        advance(len(batch))
    judge = check if check.tokens else fit
    ridge = min(RIDGES, key=lambda r: judge.error(fit.solve(r))) if check.tokens else RIDGES[-2]
    delta = fit.solve(ridge)
    fold_into_(module, delta)
    return Fold(
        [segment.start, segment.stop], position, name, ridge, 1.0, judge.error(delta), fit.tokens + check.tokens
    )


def _gap(
    dense: Stack, student: Stack, segment: Segment, position: int, module: nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m, the MLP's output in the student, and y = h_e - (a + m), what its output lacks; both [B, T, D]."""
    hidden, calls = dense.enter(tokens)
    target = dense.run(hidden, calls, 0, segment.stop)
    hidden, calls = student.enter(tokens)
    before = student.run(hidden, calls, 0, position)
    out, m = _layer_and_output(student, position, module, before, calls)
    return m, target.float() - out.float()


def _layer_and_output(
    stack: Stack, position: int, module: nn.Module, before: torch.Tensor, calls: Calls
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's output, and the output of one module in it."""
    caught: list[torch.Tensor] = []

    def catch(_: int, run: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        caught.append(run(x))
        return caught[-1]

    with intercepted([module], catch):
        out = stack.layer(position, before, calls)
    return out, hidden_of(caught[-1])


def output_projection(stack: Stack, position: int, before: torch.Tensor, calls: Calls) -> str | None:
    """Name, inside a layer, of the MLP's linear output projection: its output is added to the residual stream.

    Found by what it does, not by its name: of the layer's linear modules from the last to the first, the one
    that runs once and without whose output m the layer gives out - m. Behind a norm (Gemma 2), in a mixture of
    experts, or scaled by a constant, there is none.
    """
    layer = stack.layers[position]
    linear = [(name, module) for name, module in layer.named_modules() if is_linear(module)]
    for name, module in reversed(linear):
        if _width(module) != before.shape[-1] or "expert" in name:
            continue
        try:
            out, m = _layer_and_output(stack, position, module, before, calls)
        except IndexError:  # it did not run
            continue
        with intercepted([module], lambda _, run, x: torch.zeros_like(run(x))):
            rest = stack.layer(position, before, calls)
        if m.shape == out.shape and _same_but_for_rounding(out.float() - rest.float(), m, out):
            return name
    return None


def _same_but_for_rounding(a: torch.Tensor, b: torch.Tensor, stream: torch.Tensor) -> bool:
    """Equal up to what a sum in the stream's own number format rounds away, against its largest value."""
    step = 4 * torch.finfo(stream.dtype).eps
    return torch.allclose(a.float(), b.float(), rtol=step, atol=step * stream.abs().max().item())


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D, which is the same with a transposed weight."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _width(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.nf


def fold_into_(module: Any, delta: torch.Tensor) -> None:
    """y = x W' + b  ->  y (I + delta): new weight and bias parameters, delta [D, D] float64."""
    transform = torch.eye(len(delta), dtype=torch.float64, device=delta.device) + delta
    weight = module.weight.double()
    # nn.Linear holds [out, in] and computes x W'; Conv1D holds [in, out] and computes x W
    folded = transform.T @ weight if isinstance(module, nn.Linear) else weight @ transform
    module.weight = nn.Parameter(folded.to(module.weight.dtype), requires_grad=False)
    if module.bias is not None:
        bias = module.bias.double() @ transform
        module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=False)
