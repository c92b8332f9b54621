"""Which tensors of a checkpoint a cut keeps, and under which names on disk and in memory.

Many checkpoints name their weights otherwise than the model does (`transformer.h.3` for `model.layers.3`, one tensor
per expert for a fused one, two blocks for one layer). transformers maps disk names to memory; the inverse is found by
trying: of the numbers in a disk name, the right ones to change are those that make it read as the wanted name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layercut.errors import ModelError, SurgeryError
from layercut.surgery.cut_plan import CutPlan

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_IN_MEMORY = "load the model and cut it in memory instead"


class DiskNames:
    """How one model class reads the names in a checkpoint."""

    def __init__(self, model: Any) -> None:
        """model: on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._read: dict[str, str] = {}  # some renamings depend on what was read before: the first answer counts
        self.prefix = model.base_model_prefix
        self._optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
        self.known = dict(model.state_dict(keep_vars=True))
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        self.tied = {name: names for names in owners.values() for name in names}
        """All names of the parameter that has this name."""

    def to_memory(self, key: str) -> str:
        """The name in memory that a tensor of this name on disk is loaded into (of several, the first)."""
        from transformers.core_model_loading import rename_source_key

        if key not in self._read:
            name = rename_source_key(key, self._renamings, self._converters, self.prefix, self.known)[0]
            keeps = name not in self.known and key in self.known  # then a loader takes the name as it is
            self._read[key] = key if keeps else name
        return self._read[key]

    def lacking(self, keys: Sequence[str], besides: Sequence[str] = ()) -> list[str]:
        """What the class calls for and these tensors on disk do not fill."""
        have = {*besides}
        for key in keys:
            have.add(name := self.to_memory(key))
            for converter in self._converters:
                first, *others = converter.target_patterns
                if others and first in name:
                    have.update(name.replace(first, other) for other in others)
                    break
        have = have.union(*(self.tied.get(name, ()) for name in have))
        return [n for n in sorted(self.known.keys() - have) if not any(re.search(each, n) for each in self._optional)]


@dataclass(frozen=True)
class Names:
    """Names of the kept tensors: by old disk name, the new disk name and the new name in memory."""

    on_disk: dict[str, str]
    in_memory: dict[str, str]


def new_names(keys: Sequence[str], plan: CutPlan) -> Names:
    """Decide for every tensor on disk whether it stays, and under which name."""
    from transformers.core_model_loading import dot_natural_key

    before, after = DiskNames(plan.before), DiskNames(plan.after)
    place = {old: new for new, old in enumerate(plan.kept)}
    on_disk: dict[str, str] = {}
    in_memory: dict[str, str] = {}
    gone: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):  # the order in which transformers reads names
        name = before.to_memory(key)
        # tensors that the class does not know (old buffers, scales of a quantizer) still belong to their layer
        where = plan.layer_in(name) or plan.layer_in(f"{before.prefix}.{name}")
        if where is None:
            on_disk[key], in_memory[key] = key, after.to_memory(key)
        elif where[1] in place:
            wanted, new = plan.rename(name) or name, place[where[1]]
            if wanted in plan.dropped:
                continue
            if name not in before.known and wanted == name:  # without the base model's prefix, as GPT-2's old masks
                short = where[0].partition(".")[2]
                wanted = re.sub(rf"^{re.escape(short)}\.\d+(?=\.|$)", f"{short}.{new}", name)
            on_disk[key], in_memory[key] = _renumbered(key, where[1], new, after, wanted), wanted
        elif where[1] < plan.layers:
            gone[name] = key
    # weights shared between layers are stored under one of them; if that one goes, another takes them over (Zamba)
    there = set(in_memory.values())
    for name, key in gone.items():
        heirs = [heir for other in before.tied.get(name, ()) if (heir := plan.rename(other)) is not None]
        if not heirs or there & set(heirs):
            continue
        old, new_place = plan.layer_in(name), plan.layer_in(heirs[0])
        if old is not None and new_place is not None:
            on_disk[key], in_memory[key] = _renumbered(key, old[1], new_place[1], after, heirs[0]), heirs[0]
    if any(key.endswith(".weight_packed") for key in keys):
        raise ModelError(
            "the checkpoint's weights are packed in few bits, and are cut before they are rounded",
            "cut the float checkpoint that it was made from, then layercut quantize the result",
        )
    if lacked := before.lacking(keys):
        raise ModelError(
            f"the checkpoint lacks {len(lacked)} weights that its config calls for (first: {lacked[0]})",
            "fetch the checkpoint again; if it is complete, its config.json does not fit it",
        )
    if missing := after.lacking([*on_disk.values()], [*plan.added]):
        raise SurgeryError(
            f"the cut checkpoint would lack {len(missing)} weights of its class (first: {missing[0]})", _IN_MEMORY
        )
    if len(set(on_disk.values())) != len(on_disk):
        raise SurgeryError("two weights would get the same name on disk", _IN_MEMORY)
    return Names(on_disk, in_memory)


def _renumbered(key: str, old: int, new: int, read: DiskNames, wanted: str) -> str:
    """The disk name that reads as `wanted`, made from a name of layer `old` for layer `new`."""
    if old == new and read.to_memory(key) == wanted:
        return key
    steps = (new - old, 2 * (new - old))  # some checkpoints store a layer as two blocks
    for spot, step in itertools.product(_NUMBER.finditer(key), steps):
        candidate = f"{key[: spot.start()]}{int(spot[0]) + step}{key[spot.end() :]}"
        if int(spot[0]) + step >= 0 and read.to_memory(candidate) == wanted:
            return candidate
    what = f"the weight {key!r} belongs to layer {old}, and no name was found for it as layer {new}"
    raise SurgeryError(what, _IN_MEMORY)
