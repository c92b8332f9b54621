"""What every search method returns, whatever way it went: segments, the candidates it priced, what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from layercut.distributed import processes
from layercut.segments import Segment


@dataclass(frozen=True)
class Candidate:
    """Segments removed together, and KL(p || q) of the real cut on the calibration tokens, in nats per token."""

    segments: tuple[Segment, ...]
    kl: float
    score: float | None = None
    """What the search went by, where that is not the KL; lower is better."""

    def to_json(self) -> dict[str, Any]:
        score = {} if self.score is None else {"score": self.score}
        return {"segments": [[s.start, s.stop] for s in self.segments], "kl": self.kl, **score}


@dataclass
class Cost:
    """What a search spent, independent of the machine. One layer applied to one row of tokens counts one."""

    dense_tokens: int = 0
    """Tokens that went through the whole dense model."""
    layer_forwards: int = 0
    layer_backwards: int = 0

    def add_(self, share: Cost) -> None:
        """Take in what every process spent on its share of the rows."""
        spent = processes.summed([share.dense_tokens, share.layer_forwards, share.layer_backwards])
        self.dense_tokens += int(spent[0])
        self.layer_forwards += int(spent[1])
        self.layer_backwards += int(spent[2])


@dataclass
class SearchResult:
    """The outcome of a search: `candidates` are sorted from the best, `segments` are those of the first."""

    method: str
    candidates: list[Candidate]
    cost: Cost
    path: list[dict[str, Any]] = field(default_factory=list)
    """The gate's way, a step: "step", "places" and "stops" [P * K], where its wells begin and end, "losses" [P * K],
    the loss of each well's set; empty for methods without one."""
    oracle: dict[str, Any] | None = None
    """The exhaustive answer beside it, where it was asked for."""
    triangle: list[tuple[int, int, float]] | None = None
    """(start, stop, KL) of every segment up to some length, where that was asked for."""
    budget: dict[str, Any] | None = None
    """What a loss budget allowed: {"max_loss", "rise", "tried": [{"length", "segments", "rise"}]}."""
    seconds: float = field(default=0.0, compare=False)
    """What the search took, by the same rule as `cost`: without what is measured beside it."""

    @property
    def segments(self) -> list[Segment]:
        return list(self.candidates[0].segments)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "segments": [[s.start, s.stop] for s in self.segments],
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "oracle": self.oracle,
            "path": self.path,
            "triangle": None if self.triangle is None else [list(row) for row in self.triangle],
            "budget": self.budget,
            "dense_tokens": self.cost.dense_tokens,
            "layer_forwards": self.cost.layer_forwards,
            "layer_backwards": self.cost.layer_backwards,
        }
