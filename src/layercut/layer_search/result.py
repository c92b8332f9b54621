"""What every search returns: the segments, the candidates that it priced, and what that cost."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import Any

from layercut.distributed import processes
from layercut.plotting import axes_or_new
from layercut.segments import Segment


@dataclass(frozen=True)
class Candidate:
    """Segments removed together, and KL(p || q) of the real cut on the calibration tokens, in nats per token."""

    segments: tuple[Segment, ...]
    kl: float
    score: float | None = None
    """What the search minimised, where that is not the KL; lower is better."""
    damage: float | None = None
    """Mean over capabilities of the damage to generated tests, in nats per answer token; where the search sees some."""

    def to_dict(self) -> dict[str, Any]:
        """{"segments": [[start, stop], …], "kl"}, and "score" and "damage" where there is one."""
        more = {name: value for name in ("score", "damage") if (value := getattr(self, name)) is not None}
        return {"segments": [[s.start, s.stop] for s in self.segments], "kl": self.kl, **more}


@dataclass(frozen=True)
class Tried:
    """Segments that were removed for a trial, and what was left after a quick fold, and after a short healing."""

    segments: tuple[Segment, ...]
    folded: float
    """The price of `healing/fold_prices.py`, nats per token."""
    healed: float | None = None
    """J after real healing on some of the tokens, by more rows; None where it went no further."""
    longer: float | None = None
    """And on more of the tokens; None where it was not among the close ones."""
    text: float | None = None
    """Of `healed` what is left on text; the rest is of generated tests."""


@dataclass
class Cost:
    """What a search spent, independent of the machine. A criterion adds to it while it works."""

    dense_tokens: int = 0
    """Tokens that went through the whole dense model."""
    layer_forwards: int = 0
    """Layers applied to rows of tokens: one layer applied to one row [1, T] counts one."""
    layer_backwards: int = 0
    """Backward passes of one layer for one row."""

    def __add__(self, other: Cost) -> Cost:
        """What both spent."""
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def add_(self, share: Cost) -> None:
        """Add what every process spent on its share of the rows: on all of its parts, of which one may have more."""
        spent = processes.summed([share.dense_tokens, share.layer_forwards, share.layer_backwards])
        self.dense_tokens += int(spent[0])
        self.layer_forwards += int(spent[1])
        self.layer_backwards += int(spent[2])


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search."""

    method: str
    """The criterion's name; "given" where the segments were given."""
    candidates: list[Candidate]
    """All that were priced on all tokens, from the best; at least one."""
    cost: Cost
    """What the criterion spent, without the pricing of what it picked."""
    budget: dict[str, Any] | None = None
    """What a loss budget allowed: {"max_loss", "rise", "tried": [{"length", "segments", "rise"}]}, as shares."""
    by_text: Candidate | None = None
    """The best by the text alone, where generated tests were weighed with it."""
    by_number: list[Candidate] = field(default_factory=list)
    """The best of one segment, and of two at most, where the search compared them."""
    lighter: list[tuple[Segment, ...]] = field(default_factory=list)
    """Sets that would have been proposed if generated tests counted less; they raced too."""
    tried: list[Tried] = field(default_factory=list)
    """All that were tried beyond the plain cut: the choice, those that were healed, the others, each from the best."""
    seconds: float = field(default=0.0, compare=False)
    """Wall-clock time of what `cost` counts."""

    @property
    def segments(self) -> list[Segment]:
        """The segments to remove, in order: those of the best candidate."""
        return list(self.candidates[0].segments)

    @property
    def kl(self) -> float:
        """KL(p || q) of the best candidate's real cut, in nats per token."""
        return self.candidates[0].kl

    def to_dict(self) -> dict[str, Any]:
        """All but the seconds and the trial, as JSON values; segments are [start, stop], costs in `Cost`'s units."""
        return {
            "method": self.method,
            "segments": [[s.start, s.stop] for s in self.segments],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "budget": self.budget,
            "by_text": self.by_text.to_dict() if self.by_text else None,
            "by_number": [candidate.to_dict() for candidate in self.by_number],
            "dense_tokens": self.cost.dense_tokens,
            "layer_forwards": self.cost.layer_forwards,
            "layer_backwards": self.cost.layer_backwards,
        }

    def plot(self, axes: Any = None) -> Any:
        """Draw each candidate as a bar over the layers that it removes, at the height of its KL; the best is marked.

        Args:
            axes: matplotlib Axes to draw on; new ones where not given.

        Returns:
            The Axes.
        """
        title = f"{self.method}: {_named(self.candidates[0])}"
        axes = axes_or_new(axes, xlabel="layers removed", ylabel="KL, nats per token", title=title)
        best, finite = self.candidates[0], [c for c in self.candidates if math.isfinite(c.kl)]
        for candidate in reversed(finite):
            colour, width = ("tab:red", 3.0) if candidate is best else ("tab:gray", 1.0)
            for s in candidate.segments:
                axes.plot([s.start - 0.5, s.stop - 0.5], [candidate.kl] * 2, color=colour, linewidth=width)
        if finite and min(c.kl for c in finite) > 0:
            axes.set_yscale("log")
        return axes

    def _repr_html_(self, most: int = 10) -> str:
        """A table of the best candidates, for notebooks."""
        scored = any(c.score is not None for c in self.candidates)
        names = ["remove", "KL (nats per token)", *(["score"] if scored else [])]
        rows = [[_named(c), f"{c.kl:.4g}", *([f"{c.score:.4g}"] if c.score is not None else [])]
                for c in self.candidates[:most]]  # fmt: skip
        head = "".join(f"<th>{name}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        left = len(self.candidates) - most
        foot = f", {left} more candidates" if left > 0 else ""
        caption = f"{html.escape(self.method)}: {self.cost.layer_forwards:,} layer-forwards{foot}"
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _named(candidate: Candidate) -> str:
    return ", ".join(map(str, candidate.segments))


def merit(candidate: Candidate) -> tuple[float, tuple[Segment, ...]]:
    """What candidates are sorted by: score, or KL where there is none; the earlier of equals."""
    return candidate.kl if candidate.score is None else candidate.score, candidate.segments
