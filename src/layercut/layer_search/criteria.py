"""What a criterion is, and those that measure the model once, each with its paper's formula.

A criterion says which layers to remove. It is a function, found by its name in `layercut.criteria`:

    @layercut.criteria.register("mypackage-norm")
    def norm(runner, tokens, length, *, cost):
        ...
        return scores                                  # [L], the lowest are removed

What it picks is priced by the real cut afterwards, on all tokens (`layer_search.search`). Those that price their
candidates themselves are in `clp.py` and `exhaustive.py`; those that measure again after each choice in `greedy.py`.

L layers, of which n are removed; h_i enters layer i. Layers that are not neighbours come back as several segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence, Set
from typing import Any, Protocol

import torch

from layercut.layer_search import greedy
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

    It runs under `torch.no_grad()` or not as it likes, and leaves the model as it is. Of several processes each
    calls it with the same tokens; the main process's choice counts.
    """

    def __call__(
        self, runner: DecoderRunner, tokens: torch.Tensor, length: int, /, *args: Any, **options: Any
    ) -> Sequence[Segment] | torch.Tensor | SearchResult:
        """Choose `length` layers.

        Args:
            runner: the dense model, layer by layer (`models/runner.py`); `runner.model` is the model itself.
            tokens: calibration token ids [N, T], on the CPU or wherever the caller has them: see `runner.place`.
            length: n, layers to remove, in all.
            args: none; `options`: as above.

        Returns:
            Segments with n layers in all; or scores [L], of which the n lowest are removed, the earlier of equals; or
            a `SearchResult` with candidates that the criterion has priced itself, from the best.
        """
        ...


def names(criterion: Callable[..., Any], option: str) -> bool:
    """Whether a criterion has a parameter of that name."""
    return option in inspect.signature(criterion).parameters


def takes(criterion: Callable[..., Any], option: str) -> bool:
    """Whether a criterion is given an option: it names it, or takes `**options`."""
    parameters = inspect.signature(criterion).parameters.values()
    return names(criterion, option) or any(p.kind is p.VAR_KEYWORD for p in parameters)


def accepted(criterion: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a criterion takes."""
    return {name: value for name, value in options.items() if takes(criterion, name)}


def random_segment(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, seed: int) -> Cuts:
    """s uniform in 0 … L - n: what any criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    start = int(torch.randint(len(runner) - length + 1, (), generator=generator))
    return (Segment(start, start + length),)


def reverse_order(runner: DecoderRunner, tokens: torch.Tensor, length: int) -> Cuts:
    """[L - 1 - n, L - 1): the last n layers, but the very last one, which is kept (2411.15558)."""
    return (Segment(len(runner) - 1 - length, len(runner) - 1),)


def block_influence(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> torch.Tensor:
    """BI_i = 1 - E[cos(h_i, h_{i+1})], over all tokens: scores [L] (ShortGPT, 2403.03853)."""
    return 1 - _measured("block-influence", runner, tokens, cost).cosine.diagonal(1)


def angular(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> Cuts:
    """argmin_s E[arccos(cos(h_s, h_{s+n})) / pi], over the last token of each row (UIDL, 2403.17887)."""
    return best_start(_measured("angular", runner, tokens, cost).angular.diagonal(length), length)


def cosine(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> Cuts:
    """argmax_s E[cos(h_s, h_{s+n})], over all tokens, along the hidden dimension (LLM-Streamline, 2403.19135)."""
    return best_start(-_measured("cosine", runner, tokens, cost).cosine.diagonal(length), length)


def perplexity(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> Cuts:
    """The n layers without each of which, alone, the next-token loss is lowest (Shortened LLaMA, 2402.02834)."""
    sets = [(Segment(i, i + 1),) for i in range(len(runner))]
    with bar("perplexity", set_work(sets, len(runner), len(tokens))) as advance:
        losses = set_losses(runner, tokens, sets, cost, advance=advance)
    return one_shot(torch.tensor([losses[cuts] for cuts in sets]), length)


def taylor(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> Cuts:
    """The n layers of lowest sum |w dL/dw| over their weights, L the next-token loss (Shortened LLaMA, 2402.02834)."""
    with bar("taylor", len(tokens)) as advance:
        return one_shot(taylor_scores(runner, tokens, cost, advance=advance), length)


def sleb(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, cost: Cost) -> Cuts:
    """n times, the layer without which the next-token loss is lowest (SLEB, 2402.09025): `greedy.sleb`."""
    with bar("sleb", length) as advance:
        return greedy.sleb(runner, tokens, length, cost, advance=advance)


def evolution(runner: DecoderRunner, tokens: torch.Tensor, length: int, *, seed: int, cost: Cost) -> Cuts:
    """Sets of n layers by mutation and selection, by their KL (after EvoPress, 2410.14649): `greedy.evolution`."""
    with bar("evolution", greedy.sleb_work(length, len(runner), len(tokens))) as advance:
        return greedy.evolution(runner, tokens, length, cost, seed=seed, advance=advance)


def _measured(name: str, runner: DecoderRunner, tokens: torch.Tensor, cost: Cost) -> Similarity:
    with bar(name, len(tokens)) as advance:
        return similarity(runner, tokens, cost, advance=advance)


# --- from scores to segments ---


def one_shot(scores: torch.Tensor, length: int) -> Cuts:
    """The n layers of lowest score [L], each scored alone, none of the protected (Shortened LLaMA, 2402.02834)."""
    return lowest(scores, length, protected_layers(len(scores)))


def best_start(scores: torch.Tensor, length: int) -> Cuts:
    """The segment of n layers whose start has the lowest score [L - n + 1]; the earlier of equals."""
    values = [as_price(score) for score in scores.tolist()]
    start = values.index(min(values))
    return (Segment(start, start + length),)


def protected_layers(layers: int) -> set[int]:
    """The first 4 and the last 2 layers (2402.02834); under 12 layers proportionally fewer: L // 3 and L // 6."""
    first, last = min(4, layers // 3), min(2, layers // 6)
    return {*range(first), *range(layers - last, layers)}


def lowest(scores: torch.Tensor, length: int, protected: Set[int] = frozenset()) -> Cuts:
    """The n layers of lowest score [L]; protected ones only where the others are too few. The earlier of equals."""
    values = [as_price(score) for score in scores.tolist()]
    order = sorted(range(len(values)), key=lambda i: (i in protected, values[i], i))
    return joined_segments(order[:length])
