"""The protocol of a criterion, and the criteria that measure the model once, each with its paper's formula.

A criterion says which layers to remove. It is a function, found by its name in `layercut.criteria`:

    @layercut.criteria.register("mypackage-norm")
    def norm(runner, tokens, length, *, cost):
        ...
        return scores                                  # [L], the lowest are removed

What it picks is priced by the real cut afterwards, on all tokens (`layer_search.search`). Those that price their
candidates themselves are in `fisher.py` and `race.py`; those that measure again after each choice in `greedy.py`.

L layers, of which n are removed; h_i enters layer i. Layers that are not neighbours come back as several segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence, Set
from typing import Any, Literal, Protocol

import torch

from layercut.layer_search import greedy
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost, SearchResult
from layercut.layer_search.statistics import Similarity, similarity, taylor_scores
from layercut.layer_search.sweep import Cuts, set_losses, set_work
from layercut.models.losses import as_price
from layercut.models.runner import DecoderRunner
from layercut.progress import bar
from layercut.segments import Segment, joined_segments


class Criterion(Protocol):
    """A function that chooses layers.

    Beside its three positional arguments it is given those of these keyword arguments that it names as parameters
    (all of them, where it takes `**options`):

        seed: int                       the same seed must give the same choice
        cost: Cost                      to which it adds what it spends; `sweep.set_losses` and the like do so
        advance: Callable[[float], None]    to be called with the steps done, for a progress bar without an end
        num_segments: int               K; only a criterion that names it can be asked for more than one segment
        objective: Objective            what makes a cut good; only a criterion that names it can be asked for one
        restriction: Restriction        of the cuts that it may choose (`restriction.py`); a forbidden choice is refused

    It runs under `torch.no_grad()` or not as it likes, and leaves the model as it is. Of several processes each
    calls it with the same tokens; the main process's choice counts.
    """

    def __call__(
        self, runner: DecoderRunner, tokens: torch.Tensor, length: int, /, *args: Any, **options: Any
    ) -> Sequence[Segment] | torch.Tensor | SearchResult:
        """Choose `length` layers."""
        ...


def most_segments(criterion: Callable[..., Any], num_segments: int | Literal["auto"], length: int) -> int:
    """How many segments a criterion may remove."""
    if names(criterion, "num_segments"):
        return min(length, 2 if num_segments == "auto" else num_segments)
    return min(length, 1) if criterion in (random_segment, reverse_order, angular, cosine) else length


def names(criterion: Callable[..., Any], option: str) -> bool:
    """Whether a criterion has a parameter of that name."""
    return option in inspect.signature(criterion).parameters


def takes(criterion: Callable[..., Any], option: str) -> bool:
    """Whether a criterion accepts an option: it names it, or takes `**options`."""
    parameters = inspect.signature(criterion).parameters.values()
    return names(criterion, option) or any(p.kind is p.VAR_KEYWORD for p in parameters)


def accepted(criterion: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a criterion takes."""
    return {name: value for name, value in options.items() if takes(criterion, name)}


def random_segment(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, seed: int, restriction: Restriction | None = None
) -> Cuts:
    """A start drawn uniformly from 0 … L - n: the baseline that any criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    allowed = allowed_segments(runner, length, restriction)
    return (allowed[int(torch.randint(len(allowed), (), generator=generator))],)


def reverse_order(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, restriction: Restriction | None = None
) -> Cuts:
    """[L - 1 - n, L - 1): the last n layers, but the very last one, which is kept (2411.15558)."""
    allowed = allowed_segments(runner, length, restriction)
    return (next((one for one in reversed(allowed) if one.stop < len(runner)), allowed[-1]),)


def block_influence(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> torch.Tensor:
    """BI_i = 1 - E[cos(h_i, h_{i+1})], over all tokens (ShortGPT, 2403.03853)."""
    return 1 - _measured("block-influence", runner, tokens, cost).cosine.diagonal(1)


def angular(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction | None = None
) -> Cuts:
    """argmin_s E[arccos(cos(h_s, h_{s+n})) / pi], over the last token of each row (UIDL, 2403.17887)."""
    scores = _measured("angular", runner, tokens, cost).angular.diagonal(length)
    return best_start(scores, length, allowed_segments(runner, length, restriction))


def cosine(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction | None = None
) -> Cuts:
    """argmax_s E[cos(h_s, h_{s+n})], over all tokens, along the hidden dimension (LLM-Streamline, 2403.19135)."""
    scores = -_measured("cosine", runner, tokens, cost).cosine.diagonal(length)
    return best_start(scores, length, allowed_segments(runner, length, restriction))


def without_each(layers: int) -> list[Cuts]:
    """Every layer, as a set of its own."""
    return [(Segment(i, i + 1),) for i in range(layers)]


def perplexity(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction | None = None
) -> Cuts:
    """The n layers without each of which, alone, the next-token loss is lowest (Shortened LLaMA, 2402.02834)."""
    sets = without_each(len(runner))
    with bar("perplexity", set_work(sets, len(runner), len(tokens))) as advance:
        losses = set_losses(runner, tokens, sets, cost, advance=advance)
    return one_shot(torch.tensor([losses[cuts] for cuts in sets]), length, restriction)


def taylor(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction | None = None
) -> Cuts:
    """The n layers of lowest sum |w dL/dw| over their weights, L the next-token loss (Shortened LLaMA, 2402.02834)."""
    with bar("taylor", len(tokens)) as advance:
        return one_shot(taylor_scores(runner, tokens, cost, advance=advance), length, restriction)


def sleb(
    runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost, restriction: Restriction | None = None
) -> Cuts:
    """Greedily, n times, the layer without which the next-token loss is lowest (SLEB, 2402.09025): `greedy.sleb`."""
    with bar("sleb", length) as advance:
        return greedy.sleb(runner, tokens, length, cost, restriction=restriction, advance=advance)


def evolution(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    seed: int,
    cost: Cost,
    restriction: Restriction | None = None,
) -> Cuts:
    """Sets of n layers by mutation and selection, by their KL (after EvoPress, 2410.14649): `greedy.evolution`."""
    with bar("evolution", greedy.sleb_work(length, len(runner), len(tokens))) as advance:
        return greedy.evolution(runner, tokens, length, cost, seed=seed, restriction=restriction, advance=advance)


def _measured(name: str, runner: DecoderRunner, tokens: torch.Tensor, cost: Cost) -> Similarity:
    with bar(name, len(tokens)) as advance:
        return similarity(runner, tokens, cost, advance=advance)


# --- from scores to segments ---


def one_shot(scores: torch.Tensor, length: int, restriction: Restriction | None = None) -> Cuts:
    """The n layers of lowest score, each scored alone, none of the protected (Shortened LLaMA, 2402.02834)."""
    return lowest(scores, length, protected_layers(len(scores)), restriction)


def best_start(scores: torch.Tensor, length: int, allowed: Sequence[Segment] = ()) -> Cuts:
    """The segment of n layers whose start has the lowest score; the earlier of equals."""
    values = [as_price(score) for score in scores.tolist()]
    allowed = allowed or [Segment(start, start + length) for start in range(len(values))]
    return (min(allowed, key=lambda one: (values[one.start], one.start)),)


def protected_layers(layers: int) -> set[int]:
    """The first 4 and the last 2 layers (2402.02834); under 12 layers proportionally fewer: L // 3 and L // 6."""
    first, last = min(4, layers // 3), min(2, layers // 6)
    return {*range(first), *range(layers - last, layers)}


def lowest(
    scores: torch.Tensor, length: int, protected: Set[int] = frozenset(), restriction: Restriction | None = None
) -> Cuts:
    """The n layers of lowest score; protected ones only where the others are too few. The earlier of equals."""
    values = [as_price(score) for score in scores.tolist()]
    if restriction is not None and not restriction.is_none:
        return _lowest_allowed(values, protected, restriction)
    order = sorted(range(len(values)), key=lambda i: (i in protected, values[i], i))
    return joined_segments(order[:length])


def _lowest_allowed(values: list[float], protected: Set[int], restriction: Restriction) -> Cuts:
    """The allowed cut of the lowest sum of scores, with as few protected layers as possible; not finite ones last."""
    finite = [value for value in values if value < float("inf")]
    beyond = max(finite, default=0.0) - min(finite, default=0.0) + 1  # more than one layer's score can differ
    costs = [min(value, max(finite, default=0.0) + beyond * len(values)) for value in values]
    costs = [cost + beyond * len(values) ** 2 * (i in protected) for i, cost in enumerate(costs)]
    return restriction.needed(costs)


def allowed_segments(runner: DecoderRunner, length: int, restriction: Restriction | None) -> list[Segment]:
    """The single segments of n layers that may be removed."""
    return (restriction or Restriction.none(len(runner), length)).needed_segments()
