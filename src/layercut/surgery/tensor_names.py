"""From the names of weights on disk to the names in memory, and back for other layers.

Many checkpoints name their weights otherwise than the model does (`transformer.h.3` for `model.layers.3`, one
tensor per expert for a fused one, two blocks for one layer). transformers maps disk names to memory; the inverse is
found by trying: of the numbers in a disk name, the right ones to change are those that make it read as the wanted name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from layercut.errors import SurgeryError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class DiskNames:
    """How one model class reads the names in a checkpoint."""

    def __init__(self, model: Any) -> None:
        """model: on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        # Some renamings depend on what was read before: the first answer counts
        self._read: dict[str, str] = {}
        self._prefix = model.base_model_prefix
        self._optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
        self.known = dict(model.state_dict(keep_vars=True))

    def to_memory(self, key: str) -> str:
        """The name in memory that a tensor of this name on disk is loaded into (of several, the first)."""
        from transformers.core_model_loading import rename_source_key

        if key not in self._read:
            renames = self._renamings, self._converters, self._prefix, self.known
            name = rename_source_key(key, *renames)[0]
            keeps = name not in self.known and key in self.known  # then a loader takes the name as it is
            self._read[key] = key if keeps else name
        return self._read[key]

    def all_in_memory(self, key: str) -> list[str]:
        """Every name in memory that a tensor of this name on disk becomes part of."""
        name = self.to_memory(key)
        for converter in self._converters:
            first, *others = converter.target_patterns
            if others and first in name:
                return [name, *(name.replace(first, other) for other in others)]
        return [name]

    def may_lack(self, name: str) -> bool:
        """Whether the class fills in this tensor by itself."""
        return any(re.search(pattern, name) for pattern in self._optional)

    def layer(self, key: str, stacks: Sequence[str]) -> tuple[str, int] | None:
        """The layer a tensor on disk belongs to.

        A tensor that the class does not know (old buffers, scales of a quantizer) still belongs to its layer.
        """
        name = self.to_memory(key)
        for candidate in (name, f"{self._prefix}.{name}"):
            for stack in stacks:
                if (index := layer_of(candidate, [stack])) is not None:
                    return stack, index
        return None


def layer_of(name: str, stacks: Sequence[str]) -> int | None:
    """The layer index in a name in memory."""
    for stack in stacks:
        index = name[len(stack) + 1 :].partition(".")[0]
        if name.startswith(stack + ".") and index.isdigit():
            return int(index)
    return None


def renumbered(key: str, old: int, new: int, read: DiskNames, wanted: str) -> str:
    """The disk name that reads as `wanted`, made from a name of layer `old` for layer `new`."""
    if old == new and read.to_memory(key) == wanted:
        return key
    spots = list(_NUMBER.finditer(key))
    steps = (new - old, 2 * (new - old))  # some checkpoints store a layer as two blocks
    for spot, step in itertools.product(spots, steps):
        candidate = f"{key[: spot.start()]}{int(spot[0]) + step}{key[spot.end() :]}"
        if int(spot[0]) + step >= 0 and read.to_memory(candidate) == wanted:
            return candidate
    raise SurgeryError(
        f"the weight {key!r} belongs to layer {old}, and no name was found for it as layer {new}",
        "load the model and cut it in memory instead",
    )


def in_reading_order(keys: Iterable[str]) -> list[str]:
    """The order in which transformers reads names; some renamings depend on it."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(keys, key=dot_natural_key)
