"""A cut that was worked out (`planning.py`): what stays, what moves with it, what changes its value or its shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Read = Callable[[str], torch.Tensor]
"""A weight by its name in memory before the cut."""
Edit = Callable[[Read], torch.Tensor]
"""A weight as it must be after the cut, made from weights as they were; never in place."""


@dataclass(frozen=True)
class CutPlan:
    """A cut that stock transformers can express."""

    kept: list[int]
    """Original indices of the layers that stay."""
    config: Any
    """The whole config after the cut."""
    before: Any
    """The model before the cut, on the meta device."""
    after: Any
    """The model after the cut, on the meta device."""
    path: str
    """Dotted name of the ModuleList of decoder layers."""
    stacks: tuple[str, ...]
    """Dotted names of all lists with one entry per layer; `path` is the first."""
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    """(module name before the cut, attribute, new value)"""
    edits: dict[str, Edit] = field(default_factory=dict)
    """Tensors, by name after the cut, whose values change (`weight_adjustments.py`)."""
    dropped: frozenset[str] = frozenset()
    """Tensors, by name after the cut, that the new position must not have."""
    added: dict[str, torch.Size] = field(default_factory=dict)
    """Tensors of zeros, by name after the cut, that the new position must have."""

    def rename(self, name: str) -> str | None:
        """Name after the cut of a module or tensor in memory; None if it goes with its layer."""
        return rename(name, self.stacks, self.kept)


def rename(name: str, stacks: Sequence[str], kept: Sequence[int]) -> str | None:
    """Renumber the layer in a dotted name."""
    for stack in stacks:
        if name.startswith(stack + "."):
            index, dot, rest = name[len(stack) + 1 :].partition(".")
            if not index.isdigit():
                return name
            if int(index) not in kept:
                return None
            return f"{stack}.{kept.index(int(index))}{dot}{rest}"
    return name
