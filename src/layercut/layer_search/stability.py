"""How stable a choice of layers is: the same search on other texts, judged on a common set. After the search.

The searches of S seeds, each on its own calibration text, are compared by the exact price of what they chose on rows
that come from all of these texts in equal parts. Nothing is chosen here: it says what choosing by one seed may cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from layercut.files.json_values import OPTIONAL
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import DENSE, Cuts, all_segments, set_costs, set_work
from layercut.models.runner import DecoderRunner

ROUNDING = 1e-6
"""Nats a token that a KL in float32 may be off: one below it is none."""


@dataclass(frozen=True, kw_only=True)
class PricedChoice:
    """Segments removed together, and what that costs on the common set."""

    segments: list[tuple[int, int]]
    kl: float
    """KL(p || q), nats per token."""
    relative: float
    """Over that of the best of all segments of this length and of all choices: 1 where nothing is lost."""
    seeds: int | None = field(default=None, metadata=OPTIONAL)
    """How many seeds chose them; None where that is not the question."""


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """On the part of the common set that comes from one source: the best segment, and what the first seed chose."""

    source: str
    tokens: int
    best: PricedChoice
    chosen: PricedChoice


@dataclass(frozen=True, kw_only=True)
class Stability:
    """What the seeds' choices cost on the common set."""

    choices: list[PricedChoice]
    """Each once, from the most frequent."""
    best: PricedChoice
    worst: float
    """The largest `relative` of a choice."""
    sources: list[SourceChoice]
    tokens: int
    layer_forwards: int


def common_rows(texts: Sequence[torch.Tensor], turns: Sequence[int]) -> list[torch.Tensor]:
    """The common set, one block of rows for each part of a mix.

    Each seed gives as many rows of a part as any other; together they are as many as one search saw, or a few more.
    """
    of = [turns[row % len(turns)] for row in range(len(texts[0]))]
    found = []
    for part in range(max(turns) + 1):
        rows = [row for row, its in enumerate(of) if its == part]
        found.append(torch.cat([text[rows[: math.ceil(len(rows) / len(texts))]] for text in texts]))
    return found


def rivals(choices: Sequence[Cuts], length: int, layers: int) -> list[Cuts]:
    """What is priced: every segment of this length, and the choices that are no single segment."""
    return list(dict.fromkeys([*((segment,) for segment in all_segments(length, layers)), *choices]))


def stability_work(choices: Sequence[Cuts], length: int, layers: int, rows: int) -> int:
    """Layer-forwards of `judge`: one sweep over the common set."""
    return set_work([DENSE, *rivals(choices, length, layers)], layers, rows)


def judge(
    stack: DecoderRunner,
    blocks: dict[str, torch.Tensor],
    choices: Sequence[Cuts],
    length: int,
    *,
    advance: Callable[[int], None] = lambda layers: None,
) -> Stability:
    """What each seed's choice costs on the common set, and which segment of this length is the best there."""
    cost, sets = Cost(), rivals(choices, length, len(stack))
    priced = {
        source: {found.segments: found.kl for found in set_costs(stack, rows, sets, cost, advance=advance)}
        for source, rows in blocks.items()
    }
    tokens = {source: rows.numel() for source, rows in blocks.items()}
    kls = {s: sum(tokens[b] * priced[b][s] for b in blocks) / sum(tokens.values()) for s in sets}
    counts, best = Counter(choices), cheapest(kls)
    ordered = sorted(counts, key=lambda cuts: (-counts[cuts], kls[cuts], cuts))
    return Stability(
        choices=[_priced(cuts, kls, best, counts[cuts]) for cuts in ordered],
        best=_priced(best, kls, best),
        worst=max(relative(kls[cuts], kls[best]) for cuts in choices),
        sources=[
            SourceChoice(
                source=source,
                tokens=tokens[source],
                best=_priced(cheapest(found), found, cheapest(found)),
                chosen=_priced(choices[0], found, cheapest(found)),
            )
            for source, found in priced.items()
        ],
        tokens=sum(tokens.values()),
        layer_forwards=cost.layer_forwards,
    )


def cheapest(kls: dict[Cuts, float]) -> Cuts:
    """The set of lowest KL; the first of equals."""
    return min(kls, key=lambda cuts: (kls[cuts], cuts))


def relative(kl: float, best: float) -> float:
    """A KL over the best one; 1 where both are zero within `ROUNDING`."""
    if kl == best:
        return 1.0
    return kl / best if best > ROUNDING else 1.0 if kl <= ROUNDING else math.inf


def _priced(cuts: Cuts, kls: dict[Cuts, float], best: Cuts, seeds: int | None = None) -> PricedChoice:
    bounds = [(segment.start, segment.stop) for segment in cuts]
    return PricedChoice(segments=bounds, kl=kls[cuts], relative=relative(kls[cuts], kls[best]), seeds=seeds)
