"""Which cuts of one length a search may choose, where a layer's kind depends on its place for who loads the model.

Given to every criterion. A restriction is local: it says of each layer at which places it may come to stand, and the
place of a kept layer is its index less the layers removed before it. So the cheapest cut that fits is found by dynamic
programming over (layer, layers removed so far), exactly, for any additive costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch

from layercut.errors import ConfigError
from layercut.layer_search.sweep import Cuts, all_segments
from layercut.segments import Segment, joined_segments


@dataclass(frozen=True)
class Restriction:
    """The places at which each of L layers may stand when n of them are removed."""

    may: tuple[tuple[bool, ...], ...]  # [L, L - n]: whether layer i may come to stand at place p
    why: str = ""  # who takes a layer's kind from its place, and how

    @classmethod
    def none(cls, layers: int, length: int) -> Restriction:
        """All cuts are allowed."""
        return cls(((True,) * (layers - length),) * layers)

    @property
    def length(self) -> int:
        """n, layers to remove."""
        return len(self.may) - len(self.may[0])

    @property
    def is_none(self) -> bool:
        """Whether all cuts are allowed."""
        return all(map(all, self.may))

    def keeps(self, start: int, stop: int, removed: int) -> bool:
        """Whether layers start … stop - 1 may stay."""
        return all(self.may_keep(i, removed) for i in range(start, stop))

    def may_keep(self, layer: int, removed: int) -> bool:
        """Whether a layer may stay."""
        return 0 <= layer - removed < len(self.may[0]) and self.may[layer][layer - removed]

    def allows(self, cuts: Iterable[Segment]) -> bool:
        """Whether all layers that a cut leaves stand where they may."""
        at = removed = 0
        for segment in sorted(cuts):
            if not self.keeps(at, segment.start, removed):
                return False
            at, removed = segment.stop, removed + len(segment)
        return removed == self.length and self.keeps(at, len(self.may), removed)

    def check(self, cuts: Iterable[Segment]) -> None:
        """ConfigError for a cut that is not allowed; the hint names single segments that are."""
        cuts = list(cuts)
        if not self.allows(cuts):
            near = sorted(self.segments(), key=lambda one: abs(one.start - min(cuts).start))[:3]
            raise ConfigError(
                f"the cut {', '.join(map(str, sorted(cuts)))} is not allowed: {self.why}",
                f"allowed are --segment {', or --segment '.join(map(str, near))}" if near else "leave out --for",
            )

    def segments(self) -> list[Segment]:
        """The single segments of n layers that are allowed."""
        return [one for one in all_segments(self.length, len(self.may)) if self.allows((one,))]

    def needed_segments(self) -> list[Segment]:
        """The same, for a criterion that takes no other cuts."""
        if found := self.segments():
            return found
        words = f"no single segment of {self.length} layers is allowed: {self.why}"
        raise ConfigError(words, "give another --ratio, more --num-segments, or leave out --for")

    def cheapest(self, costs: Sequence[float], must: Set[int] = frozenset()) -> Cuts | None:
        """The allowed cut whose layers have the lowest sum of costs; the earlier of equals."""
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the number of layers removed so far
        for i, cost in enumerate(costs):
            new: dict[int, tuple[float, tuple[int, ...]]] = {}
            for m, (total, gone) in best.items():
                ways = [(m + 1, (total + cost, (*gone, i)))] if m < self.length else []
                if i not in must and self.may_keep(i, m):
                    ways.append((m, (total, gone)))
                for key, way in ways:
                    new[key] = min(new.get(key, way), way)
            best = new
        return joined_segments(best[self.length][1]) if self.length in best else None

    def needed(self, costs: Sequence[float], must: Set[int] = frozenset()) -> Cuts:
        """`cheapest`, where there has to be one."""
        if (cuts := self.cheapest(costs, must)) is None:
            words = f"no cut of {self.length} layers is allowed: {self.why}"
            raise ConfigError(words, "give another --ratio, or leave out --for")
        return cuts

    def drawn(self, generator: torch.Generator, must: Set[int] = frozenset()) -> Cuts:
        """An allowed cut at random."""
        return self.needed(torch.rand(len(self.may), generator=generator).tolist(), must)
