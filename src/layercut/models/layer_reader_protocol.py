"""The interface between code that runs a model's layers and a reader of layers on disk; `offload/` implements it.

A model whose layers are on disk carries its reader as the attribute `layers_on_disk`; a model in memory has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol


class LayerReader(Protocol):
    """Loads a model's layers when they are entered."""

    def enter_(self, i: int) -> None:
        """Load layer i's weights."""

    def leave_(self) -> None:
        """Drop the weights of the layer that is in memory."""

    def say_once(self, words: str) -> None:
        """Log a line about streaming, unless it was the last one."""

    def random_weights(self) -> AbstractContextManager[None]:
        """While open, layers entered get random weights."""


def layers_on_disk(model: Any) -> LayerReader | None:
    """The reader behind a model's layers, None for a model in memory."""
    return getattr(model, "layers_on_disk", None)


@contextmanager
def without_reading(model: Any) -> Iterator[None]:
    """While open, layers on disk compute with random weights and nothing is read; a model in memory stays as it is.

    For what depends on a model's structure alone. Weights are drawn by the class's own initialisation, seeded.
    """
    disk = layers_on_disk(model)
    with disk.random_weights() if disk else nullcontext():
        yield
