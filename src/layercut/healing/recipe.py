"""Which layers beside a cut are trained, how fast, and when the rate was too high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch

from layercut.config import TuneSettings
from layercut.distributed import sharding
from layercut.models.losses import KL
from layercut.segments import Segment, kept_layers

SETBACK = 0.25
"""What the rate is multiplied by where the held-out loss has risen above that of the start: see `is_setback`."""
TOLERATED = 0.01
"""Rise above the start, as a share of the start's loss, of a mixture of its KL, that is no setback the first time."""
FEW_STEPS = 64  # fewer take half the default rate


def endpoints(segments: Sequence[Segment], layers: int, radius: int = 1) -> list[int]:
    """Positions, in the cut model, of the layers beside each cut: s - 1 and e, or more of them by the radius."""
    kept = kept_layers(segments, layers)
    beside: set[int] = set()
    for segment in segments:
        cut = sum(i < segment.start for i in kept)
        beside |= {p for p in range(cut - radius, cut + radius) if 0 <= p < len(kept)}
    return sorted(beside)


def trained_layers(segments: Sequence[Segment], layers: int, settings: TuneSettings) -> list[int]:
    """Positions, in the cut model, of the layers that are trained."""
    if settings.train == "endpoints":
        return endpoints(segments, layers, settings.radius)
    return [*range(len(kept_layers(segments, layers)))]


def default_learning_rate(weight: float, steps: int = FEW_STEPS, layers: int = 2) -> float:
    """A 120th of a weight, half of it in fewer than `FEW_STEPS` steps, and 2 / N of it where N > 2 layers are trained.

    A step of AdamW is the rate whatever the gradient, so it is a share of what it changes. Of SmolLM2-135M, whose
    weights are 0.19, 1.6e-3 was the best in 128 steps of 1,024 tokens, half of it the best in 12; of four layers half
    of either, and 19 were trained well at an eighth. Of Qwen2.5-0.5B, whose weights are 0.016 at nearly that width,
    eight times as much ruined the first steps (research/healing.md). Where few ends, and 2 / N, are guesses.
    """
    return weight / 120 * (0.5 if steps < FEW_STEPS else 1.0) * min(1.0, 2 / layers)


def usual_weight(parameters: Sequence[torch.Tensor]) -> float:
    """Each matrix' root mean square, of these the median; of the vectors where there is no matrix, 0 of nothing.

    That of all entries together would be the fold's, which solves a few of the matrices: it has some entries hundreds
    of times the others where removed layers wrote them, and a rate by those ruins the rest (research/healing.md).
    """
    counted = [p for p in parameters if p.dim() > 1] or parameters
    squares = [float(sharding.whole(p.detach().float().square().sum())) / max(1, p.numel()) for p in counted]
    return math.sqrt(median(squares)) if squares else 0.0


def warmup_then_cosine(step: int, steps: int) -> float:
    """Share of the peak rate: up over the first 5 % of the steps, then down a cosine to 5 %."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def is_setback(heldout: Sequence[dict[str, float]], setbacks: Sequence[int], tolerated: float = TOLERATED) -> bool:
    """Whether the last held-out score says that the rate is too high.

    So it does above the start's by more than is tolerated, and above it for the second time in a row. A smaller rise
    may pass by itself, where the rate that it would cost does not come back (research/healing.md).
    """
    start, *later = heldout
    if not later:
        return False
    last, rises = later[-1], [math.isinf(point["loss"]) or point["loss"] > start["loss"] for point in later]
    again = len(later) > 1 and rises[-2] and later[-2]["step"] not in setbacks
    allowed = tolerated * abs(start.get(KL.name, start["loss"]))
    return rises[-1] and (again or math.isinf(last["loss"]) or last["loss"] > start["loss"] + allowed)
