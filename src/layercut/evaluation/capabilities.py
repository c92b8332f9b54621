"""What a model can still do of generated tests: the damage and the hit rate of each capability.

Beside perplexity, which does not show it: a model may lose every key hidden in its context at a loss of text that looks
like any other cut's (docs/log.md). Rows of `data/probes.py`, of the judging family, go through both models once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercut.data.probes import ProbeRows
from layercut.models.losses import as_price, kl_divergence
from layercut.models.memory import slices
from layercut.models.model_in_memory import prepared
from layercut.models.runner import DecoderRunner

ROWS = 4
"""Rows in one forward pass."""


@dataclass(frozen=True)
class CapabilityFigures:
    """Of each capability: what the cut did to it."""

    damage: dict[str, float]
    """KL(dense || cut), mean over the answers' tokens, in nats: the distance to the dense model, good or bad."""
    hits: dict[str, float]
    """Share of the answers that the cut model's greedy decoding gives."""
    dense_hits: dict[str, float]
    """The same of the dense model."""
    answers: dict[str, int]
    """How many answers that is."""
    loss: dict[str, float] = field(default_factory=dict)
    """What the right answers cost the cut model, -log p of their tokens, mean, in nats: lower is better."""
    dense_loss: dict[str, float] = field(default_factory=dict)
    """The same of the dense model."""

    def to_dict(self) -> dict[str, Any]:
        """{"damage", "hits", "dense_hits", "answers", "loss", "dense_loss"}, each by capability."""
        return {name: dict(value) for name, value in vars(self).items()}


@torch.no_grad()
def capability_figures(
    model: Any, dense: Any, probes: ProbeRows, *, advance: Callable[[int], None] = lambda rows: None
) -> CapabilityFigures:
    """Damage and hit rates of a model beside the dense one's, on the same rows.

    Args:
        model: a causal LM of transformers, or a `DecoderRunner` of one.
        dense: the model that it came from.
        probes: what is tested.
        advance: told the rows that are done.

    Returns:
        The figures, by capability.
    """
    damage = torch.zeros(probes.tokens.shape, dtype=torch.float64)
    loss, right = (torch.zeros(2, *probes.tokens.shape, dtype=dtype) for dtype in (torch.float64, torch.bool))
    with prepared(model, dense) as stacks:
        queue = stacks[0].parts("evaluate", slices(len(probes.tokens), ROWS))
        for part in queue:
            with queue.trying(part):
                _compare(stacks, probes, part, damage, loss, right)
                advance(part.stop - part.start)
    counts = torch.bincount(probes.capability, minlength=len(probes.names)).tolist()
    apart, *lost = (
        {name: as_price(mean, 0.0) for name, mean in probes.means(each).items()} for each in (damage, *loss)
    )
    answers = dict(zip(probes.names, counts, strict=True))
    return CapabilityFigures(apart, probes.hit_rates(right[0]), probes.hit_rates(right[1]), answers, *lost)


def _compare(
    stacks: list[DecoderRunner],
    probes: ProbeRows,
    part: slice,
    damage: torch.Tensor,
    loss: torch.Tensor,
    right: torch.Tensor,
) -> None:
    """Fill in `damage` [N, T], and `loss` and `right` [2, N, T], of some rows at their answers."""
    tokens = probes.tokens[part]
    ends = [stack.last(tokens) for stack in stacks]
    for row, number in enumerate(range(part.start, part.stop)):
        at = (probes.answers[number] >= 0).nonzero()[:, 0]
        if not len(at):
            continue
        shown = tokens[row : row + 1, at]
        cut, whole = (
            stack.exit(h[row : row + 1, at.to(h.device)], shown)[0].float()
            for stack, h in zip(stacks, ends, strict=True)
        )
        damage[number, at] = kl_divergence(whole, cut).cpu().double()
        wanted = tokens[row, at + 1]
        for which, logits in enumerate((cut, whole)):
            loss[which, number, at] = cross_entropy(logits, wanted.to(logits.device), reduction="none").cpu().double()
            right[which, number, at] = probes.right(number, logits.argmax(-1))
