"""What calibrated rounding sees: the Hessian of each weight, one decoder layer after another, and of the head.

Each layer is calibrated on what the layers before it compute once they are rounded, so that later ones compensate the
errors of earlier ones as far as they can; only one layer's Hessians are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from layercut.models.memory import place_of_float64, slices
from layercut.models.runner import DecoderRunner, intercepted
from layercut.quantization.gptq import gram

Weights = Mapping[str, torch.Tensor]
"""How much each calibration token counts [N, T], by the module that reads it; of others each counts 1."""


def each_with_hessian(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    wanted: Mapping[int, Collection[str]],
    read: Collection[str],
    advance: Callable[..., None],
    weights: Weights = MappingProxyType({}),
) -> Iterator[tuple[int, str, torch.Tensor | None]]:
    """Weights by layer and name with their Hessians; whoever takes one rounds it before asking for the next.

    The Hessian is None of those not in `read`, and where the module did not run, as an expert to which no token was
    sent.
    """
    stream = _Stream(stack, tokens)
    for i in range(max(wanted) + 1):
        if i in wanted:
            names = [name for name in wanted[i] if name in read]
            hessians = stream.hessians(names, weights, partial(stream.layer, i)) if names else {}
            yield from ((i, name, hessians.get(name)) for name in wanted[i])
        stream.pass_(i)
        advance(1)


def hessian_of_head(
    stack: DecoderRunner, tokens: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor | None:
    """H = 2 X' diag(w) X [D, D] of what the head reads in the model as it is; None where its module is not called."""
    head, stream = stack.model.get_output_embeddings(), _Stream(stack, tokens)
    for i in range(len(stack)):
        stream.pass_(i)
    few = stack.budget.logit_rows(tokens.shape[1], head.out_features)

    def logits(part: slice) -> None:
        for some in slices(part.stop - part.start, few):
            rows = slice(part.start + some.start, part.start + some.stop)
            stack.exit(stream.hidden[rows], stream.tokens[rows])

    name = next(name for name, module in stack.model.named_modules() if module is head)
    return stream.hessians([name], {} if weights is None else {name: weights}, logits, run=False).get(name)


class _Stream:
    """All calibration rows [N, T] between two layers, worked on in parts of a few rows, fewer where memory runs out."""

    def __init__(self, stack: DecoderRunner, tokens: torch.Tensor) -> None:
        self.stack, self.tokens = stack, stack.place(tokens)
        self.parts = list(slices(len(tokens), stack.budget.recorded_rows(tokens.shape[1])))
        self.calls: dict[tuple[int, int], Any] = {}
        embedded: list[torch.Tensor] = []

        def enter(part: slice) -> None:
            hidden, self.calls[part.start, part.stop] = stack.enter(self.tokens[part])
            embedded.append(hidden)

        self._each(enter)
        self.hidden = torch.cat(embedded)
        """What enters the layer at hand [N, T, D]."""

    def _each(self, work: Callable[[slice], None]) -> None:
        queue, done = self.stack.parts("quantize", self.parts), []
        for part in queue:
            with queue.trying(part):
                work(part)
                done.append(part)
        self.parts = done

    def layer(self, i: int, part: slice) -> torch.Tensor:
        """What layer i makes of some rows."""
        if (key := (part.start, part.stop)) not in self.calls:  # a half of a part that ran out of memory
            self.calls[key] = self.stack.arguments(self.tokens[part])
        return self.stack.plain_layer(i, self.hidden[part], self.calls[key])

    def pass_(self, i: int) -> None:
        """Through layer i."""

        def work(part: slice) -> None:
            self.hidden[part] = self.layer(i, part)

        self._each(work)

    def hessians(
        self, names: Sequence[str], weights: Weights, work: Callable[[slice], Any], *, run: bool = True
    ) -> dict[str, torch.Tensor]:
        """H = 2 X' diag(w) X of what each module reads in `work` on each part. run: whether it is to compute, too."""
        modules = [self.stack.model.get_submodule(name) for name in names]
        sums: dict[str, torch.Tensor] = {}

        def add_(part: slice) -> None:
            seen: dict[str, list[torch.Tensor]] = {}

            def record(which: int, forward: Callable[..., Any], x: torch.Tensor) -> Any:
                seen.setdefault(names[which], []).append(x)
                return forward(x) if run else x.new_zeros(*x.shape[:-1], modules[which].weight.shape[0])

            with intercepted(modules, record):
                work(part)
            # nothing is added before all is there: a part that runs out of memory comes again
            counts = {name: weights[name][part] if name in weights else None for name in seen}
            found = {
                name: gram(_weighted(x[0] if len(x) == 1 else torch.cat(x), counts[name])) for name, x in seen.items()
            }
            for name, product in found.items():
                if name not in sums:
                    double = place_of_float64(product.device) == product.device
                    sums[name] = torch.zeros_like(product, dtype=torch.float64 if double else torch.float32)
                sums[name].add_(product)

        self._each(add_)
        return sums


def _weighted(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Inputs [B, T, I], or of as many tokens [B * T, I], times the roots of their weights [B, T].

    Of more or fewer tokens, as where a rounded layer before sends others to an expert, each counts 1, as the mean does.
    """
    flat = x.flatten(0, -2)
    if weights is None or weights.numel() != len(flat):
        return x
    return flat.float() * weights.to(x.device).flatten().sqrt().unsqueeze(-1)
