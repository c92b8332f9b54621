"""Logits from the last layer's output without the rest of a forward pass: the model's own final norm and head alone.

Beside `runner.py`. Which modules lie between the last layer and the head is seen once, in the model's own forward, by
the identity of the tensors that they take and give. What the class does after the head (a scale, a cap of the logits)
its own code does: only the decoder in it is replaced, by one that returns the normalised hidden state at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layercut.models.compiling import fused


@dataclass(frozen=True)
class DirectHead:
    """What turns h_L into logits in a model."""

    model: nn.Module
    decoder: nn.Module
    """What the head's own code calls: embeddings, layers and final norm."""
    norms: tuple[nn.Module, ...]
    """Between the last layer and the decoder's output, in their order; none where it has no final norm."""
    output: Any
    """Of the decoder, with an empty hidden state in it."""

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of every position."""

        def decoded(*_: Any, **__: Any) -> Any:
            h = hidden
            for norm in self.norms:
                h = fused(_output)(norm, h)
            return _with_first(self.output, h)

        own = self.decoder.__dict__.get("forward")
        self.decoder.forward = decoded
        try:
            return self.model(input_ids=tokens, use_cache=False).logits
        finally:
            if own is None:
                del self.decoder.forward
            else:
                self.decoder.forward = own


def _output(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return module(hidden)


def find_direct_head(
    model: nn.Module,
    layers: Sequence[nn.Module],
    exit_whole: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    tokens: torch.Tensor,
) -> DirectHead | None:
    """See which modules turn a hidden state into logits."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    calls: list[tuple[nn.Module, Any, Any]] = []  # as they end: a module after those inside it
    with ExitStack() as hooks:
        for module in model.modules():
            if module is not model and id(module) not in inside:
                hook = module.register_forward_hook(lambda m, given, found: calls.append((m, given, found)))
                hooks.callback(hook.remove)
        expected = exit_whole(hidden, tokens)
    holding = {id(module) for module in model.modules() if any(m is layers[-1] for m in module.modules())}
    norms: list[nn.Module] = []
    ends = hidden
    while True:
        # the outermost: of a model with other towers, what the head's code calls holds the decoder
        found = [(m, output) for m, _, output in calls if id(m) in holding and _first(output) is ends]
        if found:
            decoder, output = found[-1]
            head = DirectHead(model, decoder, tuple(norms), _with_first(output, hidden[:0]))
            return _tried(head, hidden, tokens, expected)
        following = _following(calls, ends)
        if following is None:
            return None
        norms.append(following[0])
        ends = following[1]


def _tried(head: DirectHead, hidden: torch.Tensor, tokens: torch.Tensor, expected: torch.Tensor) -> DirectHead | None:
    """The head, if it gives the logits that the whole model does, to the bit."""
    try:
        got = head.logits(hidden, tokens)
    except Exception:  # the head's own code reads more than the hidden state
        return None
    return head if torch.equal(got.nan_to_num(), expected.nan_to_num()) else None


def _following(calls: list[tuple[nn.Module, Any, Any]], hidden: torch.Tensor) -> tuple[nn.Module, torch.Tensor] | None:
    """The outermost module that took this very tensor alone, and what it gave."""
    found = [(m, out) for m, given, out in calls if len(given) == 1 and given[0] is hidden and _is_hidden(out, hidden)]
    return found[-1] if found else None


def _is_hidden(output: Any, hidden: torch.Tensor) -> bool:
    return isinstance(output, torch.Tensor) and output is not hidden and output.shape[:-1] == hidden.shape[:-1]


def _first(output: Any) -> Any:
    """The hidden state in a decoder's output: a tuple's first entry, or the first that a ModelOutput has."""
    if isinstance(output, tuple):
        return output[0] if output else None
    return next(iter(output.values()), None) if isinstance(output, dict) else None


def _with_first(output: Any, hidden: torch.Tensor) -> Any:
    """A decoder's output with another hidden state in it, and none of its other tensors."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    key, *_ = output
    return type(output)(**{**output, key: hidden})


__all__ = ["DirectHead", "find_direct_head"]
