"""A clone of a model whose layers are on disk: dense model and student read each layer once for both.

Beside `models/layer_reader.py`, whose reader it uses. A clone made by `share` has own modules and no reader of its
own: what is not in a decoder layer it shares with the original, and a layer it enters is entered in the original,
whose weights it then uses. What healing puts into a clone has data of its own and stays in memory.

    student = share(model)          # of a model in memory the same as models.share
    cut_segment_(student, …)        # layers are removed, the others still know which of the original's they are
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from layercut.models import decoder_stack, model_weights
from layercut.models.layer_reader import LayersOnDisk, layers_on_disk


def share(model: Any) -> Any:
    """`model_weights.share`, also of a model whose layers are on disk, or of a clone of one."""
    disk = layers_on_disk(model)
    if disk is None:
        return model_weights.share(model)
    source = disk.source if isinstance(disk, SharedLayers) else disk
    assert isinstance(source, LayersOnDisk)
    source.leave_()  # what is copied are layers without data
    gc.collect()  # layers and their `forward` refer to each other: unused clones would keep their own weights
    numbers = disk.numbers() if isinstance(disk, SharedLayers) else range(len(source.layers))
    copied = model_weights.copied(model)
    copied.layers_on_disk = SharedLayers(source, copied, numbers)
    return copied


class SharedLayers:
    """The layers of a clone, whose weights the original's reader loads: what `LayersOnDisk` is for the original.

    Entering a layer raises ModelError where a cut has given it other weights than the original has there.
    """

    def __init__(self, source: LayersOnDisk, model: Any, numbers: Sequence[int]) -> None:
        self.source = source
        self._lowest: int | None = None  # while layers are entered upwards from there and down again
        self._layers = decoder_stack.find_decoder(model).layers  # the list itself: a cut removes layers from it
        self._number = WeakKeyDictionary(zip(self._layers, numbers, strict=True))
        for layer, number in self._number.items():
            layer.__dict__.pop("forward", None)  # the original's
            layer.forward = self._on_demand(layer, layer.forward)
            source.clone_layers[number].add(layer)

    def __deepcopy__(self, memo: Any) -> SharedLayers:
        return self

    def numbers(self) -> list[int]:
        """Which of the original's layers there are."""
        return [self._number[layer] for layer in self._layers]

    def enter_(self, i: int) -> None:
        """Load layer i's weights, by position in this model."""
        self._enter_(self._layers[i])

    def leave_(self) -> None:
        """Drop the weights in memory: layers hold again what they hold while others are read."""
        self.source.leave_()

    def say_once(self, words: str) -> None:
        """Log a line about streaming, unless it was the last one."""
        self.source.say_once(words)

    @contextmanager
    def up_and_down(self, i: int) -> Iterator[None]:
        """While open, layers are entered from i upwards and down again, and are read ahead so."""
        self._lowest = self._number[self._layers[i]]
        try:
            yield
        finally:
            self._lowest = None

    @contextmanager
    def random_weights(self) -> Iterator[None]:
        """While open, layers entered get random weights, and nothing is read."""
        with self.source.random_weights():
            yield

    def _on_demand(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_with_weights(*args: Any, **kwargs: Any) -> Any:
            self._enter_(layer)
            return forward(*args, **kwargs)

        return forward_with_weights

    def _enter_(self, layer: nn.Module) -> None:
        number = self._number[layer]
        if number != self.source.resident and _lacks_weights(layer):
            self.source.enter_(number, self._after(number))

    def _after(self, number: int) -> list[int]:
        """The layer to read once this one is there: the next one on the way whose weights the clone lacks."""
        resident = self.source.resident
        order = [n for one in self._layers if (n := self._number[one]) == resident or _lacks_weights(one)]
        place = order.index(number)
        below, above = order[max(0, place - 1) : place], order[place + 1 : place + 2]
        downwards = resident in above
        if self._lowest is None:
            return below if downwards else above
        below = [n for n in below if n >= self._lowest]
        return (below or above) if downwards else (above or below)


def _lacks_weights(layer: nn.Module) -> bool:
    """Whether some of a layer's weights are without data."""
    return any(tensor.is_meta for tensor in layer.state_dict(keep_vars=True).values())
