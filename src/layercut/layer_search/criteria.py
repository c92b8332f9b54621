"""The protocol of a criterion, and how scores of layers become a choice of them.

A criterion says which layers to remove. It is a function, found by its name in `layercut.criteria`:

    @layercut.criteria.register("mypackage-norm")
    def norm(runner, tokens, length, *, cost):
        ...
        return scores                                  # [L], the lowest are removed

What it picks is cut for real afterwards, on all tokens, unless it returns a `SearchResult` with candidates that it has
cut itself. The criteria of layercut are in `fisher.py`, `race.py` and `baselines.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, Protocol

import torch

from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import SearchResult
from layercut.layer_search.sweep import Cuts
from layercut.models.losses import as_cost
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment, joined_segments


class Criterion(Protocol):
    """A function that chooses layers.

    Beside its three positional arguments it is given those of these keyword arguments that it names as parameters
    (all of them, where it takes `**options`):

        seed: int                       the same seed must give the same choice
        cost: Cost                      to which it adds what it spends; `sweep.set_losses` and the like do so
        advance: Callable[[float], None]    to be called with the steps done, for a progress bar without an end
        num_segments: int               K; only a criterion that names it can be asked for more than one segment
        probes: ProbeRows | None        probes beside the text; only a criterion that names it can be given any
        restriction: Restriction        of the cuts that it may choose (`restriction.py`); a forbidden choice is refused

    It runs under `torch.no_grad()` or not as it likes, and leaves the model as it is. Of several processes each
    calls it with the same tokens; the main process's choice counts.
    """

    def __call__(
        self, runner: DecoderRunner, tokens: torch.Tensor, length: int, /, *args: Any, **options: Any
    ) -> Sequence[Segment] | torch.Tensor | SearchResult:
        """Choose `length` layers."""
        ...


def names(criterion: Callable[..., Any], option: str) -> bool:
    """Whether a criterion has a parameter of that name."""
    return option in inspect.signature(criterion).parameters


def takes(criterion: Callable[..., Any], option: str) -> bool:
    """Whether a criterion accepts an option: it names it, or takes `**options`."""
    parameters = inspect.signature(criterion).parameters.values()
    return names(criterion, option) or any(p.kind is p.VAR_KEYWORD for p in parameters)


def most_segments(criterion: Callable[..., Any], num_segments: int | Literal["auto"], length: int) -> int:
    """How many segments a criterion may remove."""
    if names(criterion, "num_segments"):
        return min(length, 2 if num_segments == "auto" else num_segments)
    return 1 if getattr(criterion, "contiguous", False) else length


def lowest(scores: torch.Tensor, restriction: Restriction, protected: Set[int] = frozenset()) -> Cuts:
    """The n layers of lowest score; protected ones only where the others are too few. The earlier of equals."""
    values = [as_cost(score) for score in scores.tolist()]
    if restriction.is_none:
        order = sorted(range(len(values)), key=lambda i: (i in protected, values[i], i))
        return joined_segments(order[: restriction.length])
    # the allowed cut of the lowest sum, with as few protected layers as possible; scores that are not finite last
    finite = [value for value in values if value < float("inf")] or [0.0]
    beyond = max(finite) - min(finite) + 1  # more than one layer's score can differ
    costs = [min(value, max(finite) + beyond * len(values)) for value in values]
    return restriction.needed([c + beyond * len(values) ** 2 * (i in protected) for i, c in enumerate(costs)])


def one_shot(scores: torch.Tensor, restriction: Restriction) -> Cuts:
    """The n layers of lowest score, but the first 4 and the last 2 (Shortened LLaMA, 2402.02834).

    Of less than 12 layers proportionally fewer are protected.
    """
    layers = len(scores)
    first, last = min(4, layers // 3), min(2, layers // 6)
    return lowest(scores, restriction, {*range(first), *range(layers - last, layers)})


def best_start(scores: torch.Tensor, restriction: Restriction) -> Cuts:
    """The allowed segment of n layers whose start has the lowest score; the earlier of equals."""
    values = [as_cost(score) for score in scores.tolist()]
    return (min(restriction.needed_segments(), key=lambda one: (values[one.start], one.start)),)
