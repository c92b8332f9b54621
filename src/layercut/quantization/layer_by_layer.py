"""What calibrated rounding sees: the Hessian of the head, and of each weight, one decoder layer after another.

Each layer is calibrated on what the layers before it compute once they are rounded, so that later ones compensate the
errors of earlier ones as far as they can; only one layer's Hessians are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from layercut.models.devices import place_of_float64
from layercut.models.memory import slices
from layercut.models.runner import Calls, DecoderRunner, intercepted
from layercut.quantization.gptq import gram

Part = TypeVar("Part")
Weights = Mapping[str, torch.Tensor]


def each_with_hessian(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    wanted: Mapping[int, Collection[str]],
    advance: Callable[..., None],
    weights: Weights = MappingProxyType({}),
) -> Iterator[tuple[int, str, torch.Tensor | None]]:
    """Weights with their Hessians; whoever takes one rounds it in the model before asking for the next."""
    batches = _entered(stack, tokens)
    for i in range(max(wanted) + 1):
        if i in wanted:
            batches, hessians = _hessians(stack, i, batches, list(wanted[i]), weights)
            yield from ((i, name, hessians[name]) for name in wanted[i])
        batches = _in_parts(stack, batches, partial(_Rows.pass_, i=i))
        advance(1)


def hessian_of_head(
    stack: DecoderRunner, tokens: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor | None:
    """H = 2 X' diag(w) X [D, D] of what the head reads in the model as it is; None where its module is not called."""
    head: nn.Linear = stack.model.get_output_embeddings()
    batches = _entered(stack, tokens)
    for i in range(len(stack)):
        batches = _in_parts(stack, batches, partial(_Rows.pass_, i=i))
    sums: list[torch.Tensor] = []

    few = stack.budget.logit_rows(tokens.shape[1], head.out_features)

    def add_(rows: _Rows) -> None:
        seen: list[torch.Tensor] = []

        def record(_: int, run: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.new_zeros(*x.shape[:-1], head.out_features)  # nobody reads the logits

        with intercepted([head], record):
            for part in slices(len(rows), few):
                stack.exit(rows.hidden[part], rows.tokens[part])
        found = [gram(_weighted(torch.cat(seen), rows.of(weights)))] if seen else []
        if found and not sums:
            sums.append(torch.zeros_like(found[0], dtype=_sum_dtype(found[0].device)))
        for product in found:  # nothing is added before all is there: a part that runs out of memory comes again
            sums[0].add_(product)

    _in_parts(stack, batches, add_)
    return sums[0] if sums else None


@dataclass
class _Rows:
    """Rows of calibration tokens [B, T] on their way through the layers."""

    stack: DecoderRunner
    tokens: torch.Tensor
    hidden: torch.Tensor
    """What enters the layer at hand [B, T, D]."""
    calls: Calls
    first: int
    """Of all rows, the number of the first."""

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, rows: int) -> list[_Rows]:
        """As of a tensor: so many rows each."""
        starts = range(self.first, self.first + len(self), rows)
        parts = zip(starts, self.tokens.split(rows), self.hidden.split(rows), strict=True)
        return [_Rows(self.stack, ids, hidden, self.stack.arguments(ids), first) for first, ids, hidden in parts]

    def of(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        """Of the weights of all rows [N, T] those of these [B, T]."""
        return None if weights is None else weights[self.first : self.first + len(self)]

    def pass_(self, i: int) -> None:
        """Through layer i."""
        self.hidden = self.stack.plain_layer(i, self.hidden, self.calls)


def _entered(stack: DecoderRunner, tokens: torch.Tensor) -> list[_Rows]:
    """Rows of tokens [N, T] before the first layer, as many in a batch as may be recorded at once."""
    rows, batches = stack.place(tokens).split(stack.budget.recorded_rows(tokens.shape[1])), list[_Rows]()

    def enter(some: torch.Tensor) -> None:
        batches.append(_Rows(stack, some, *stack.enter(some), first=sum(map(len, batches))))

    _in_parts(stack, list(rows), enter)
    return batches


def _in_parts(stack: DecoderRunner, parts: list[Part], work: Callable[[Part], None]) -> list[Part]:
    """Do work on each part, on two halves of it where memory runs out; the parts that it was done on."""
    queue, done = stack.parts("quantize", parts), []
    for part in queue:
        with queue.trying(part):
            work(part)
            done.append(part)
    return done


def _hessians(
    stack: DecoderRunner, i: int, batches: list[_Rows], names: Sequence[str], weights: Weights
) -> tuple[list[_Rows], dict[str, torch.Tensor | None]]:
    """H of every module's input in layer i; one matrix where several without weights read the same tensor.

    None: the module did not run, as an expert to which no token was sent. With them the batches, which are smaller
    where memory ran out.
    """
    modules = [stack.model.get_submodule(name) for name in names]
    plain = [name not in weights for name in names]
    source: dict[int, int] = {}  # module -> the module whose Hessian it uses
    sums: dict[int, torch.Tensor] = {}

    def add_(rows: _Rows) -> None:
        seen: dict[int, torch.Tensor] = {}

        def record(which: int, run: Callable[..., Any], x: torch.Tensor) -> Any:
            seen[which] = x
            return run(x)

        with intercepted(modules, record):
            stack.plain_layer(i, rows.hidden, rows.calls)
        for which, x in seen.items():
            if which not in source:
                alike = (other for other in seen if seen[other] is x and other in sums and plain[other])
                source[which] = next(alike, which) if plain[which] else which
            if source[which] == which and which not in sums:
                sums[which] = torch.zeros(x.shape[-1], x.shape[-1], dtype=_sum_dtype(x.device), device=x.device)
        # nothing is added before all is there: a part that runs out of memory comes again
        own = {which: x for which, x in seen.items() if source[which] == which}
        found = {which: gram(_weighted(x, rows.of(weights.get(names[which])))) for which, x in own.items()}
        for which, product in found.items():
            sums[which].add_(product)

    batches = _in_parts(stack, batches, add_)
    return batches, {name: sums[source[which]] if which in source else None for which, name in enumerate(names)}


def _weighted(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Inputs [B, T, I], or of as many tokens [B * T, I], times the roots of their weights [B, T].

    Of more or fewer tokens, as where a rounded layer before sends others to an expert, each counts 1, as the mean does.
    """
    flat = x.flatten(0, -2)
    if weights is None or weights.numel() != len(flat):
        return x
    return flat.float() * weights.to(x.device).flatten().sqrt().unsqueeze(-1)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if place_of_float64(device) == device else torch.float32
