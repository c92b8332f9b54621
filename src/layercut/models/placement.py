"""Where a model's weights lie while it runs: in memory, on several accelerators or processes, or on disk.

Over several accelerators of one process the layers lie one after the other, and accelerate's hooks bring to a module
what it is given. What is no layer, embeddings and head among it, is on the first device, and so are logits and losses.
Models that transformers dispatched itself (`device_map="auto"`) are run alike, wherever their head is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from layercut.config import Placement
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError, ModelError
from layercut.files import size
from layercut.models import checkpoints, loading
from layercut.models.decoder_stack import find_decoder
from layercut.models.layer_reader import open_on_disk, why_not_by_layer
from layercut.models.loading import accelerators, computing_dtype, pick_device, pick_dtype
from layercut.models.memory import available_bytes, memory_limit

FITS = 0.8
"""A model in memory may take this share of what is available; the rest is for activations and logits. A guess."""


def load(
    checkpoint: checkpoints.Checkpoint,
    *,
    place: Placement = "auto",
    alone: bool = False,
    max_memory: str | None = None,
    **how: Any,
) -> loading.LanguageModel:
    """`loading.load`, or the same model sharded over processes, placed over devices, or with its layers left on disk.

    `place_of` says which; `alone` loads it in this process, whatever the others do.
    """
    with memory_limit(max_memory):
        chosen = place_of(checkpoint, place, alone=alone, **how)
        if chosen == "disk":
            return open_on_disk(checkpoint, **how)
        if chosen == "devices":
            loaded = loading.load(checkpoint, **how, moved=False)
            devices = accelerators(loaded.device)
            dispatch_(loaded.model, {device: int(FITS * available_bytes(device)) for device in devices})
            return replace(loaded, device=devices[0])
        if chosen == "memory":
            return loading.load(checkpoint, **how)
        # a safetensors folder is read layer by layer, by every process in full: two layers, and what is no layer, are
        # whole at a time; what cannot be read so, by one process after the other into the machine's memory
        config = loading.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
        if not why_not_by_layer(checkpoint, config):
            loaded = open_on_disk(checkpoint, **how)
            sharding.spread_(loaded.model, loaded.model.layers_on_disk.load_one_by_one(), loaded.device)
            return loaded
        for turn in range(processes.world()):
            if turn == processes.rank():
                loaded = loading.load(checkpoint, **how, moved=False)
                sharding.spread_(loaded.model, find_decoder(loaded.model).layers, loaded.device)
            processes.barrier()
        return loaded


def place_of(checkpoint: checkpoints.Checkpoint, place: Placement = "auto", *, alone: bool = False, **how: Any) -> str:
    """Where `load` puts the weights; unless alone, all processes must call this. Reads headers only.

    "auto": where they would take more than `FITS` of the memory that is available, they are sharded if there are
    several processes that have room for a part each; placed over several accelerators if one process has them and they
    have room for it; else left on disk.
    """
    count, several = 1 if alone else processes.world(), processes.on_this_machine() > 1
    devices = accelerators(pick_device(how.get("device", "auto")))
    if place == "processes" and not processes.launched():
        words = "--place processes shards the weights over several processes, and there is one"
        raise ConfigError(words, "start several: torchrun --standalone --nproc-per-node 8 -m layercut.cli …")
    if place == "devices" and (len(devices) < 2 or several):
        there = "several processes" if several else len(devices)
        words = f"--place devices is for several accelerators of one process, and there are {there}"
        raise ConfigError(words, "leave it out")
    if place not in ("auto", "processes") or (place == "processes" and count > 1):
        return place
    share = _share_of_memory(checkpoint, **how)
    if count > 1 and processes.most(share > FITS) and not processes.most(share / count > FITS):
        return "processes"
    if share <= FITS:
        return "memory"
    room = FITS * sum(map(available_bytes, devices))
    return "devices" if len(devices) > 1 and not several and weight_bytes(checkpoint, **how) <= room else "disk"


def _share_of_memory(checkpoint: checkpoints.Checkpoint, **how: Any) -> float:
    """Bytes of the weights over those that this process has; 0 of what can only be loaded at once."""
    device = pick_device(how.get("device", "auto"))
    room = min(available_bytes(place) for place in (device, torch.device("cpu")))  # they pass through the machine's
    return weight_bytes(checkpoint, **how) / max(1, room)


def weight_bytes(checkpoint: checkpoints.Checkpoint, **how: Any) -> int:
    """Bytes that the weights take once they are loaded; 0 of what can only be loaded at once."""
    if checkpoint.gguf or not checkpoints.weight_files(checkpoint.folder):
        return 0
    config = loading.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
    if getattr(config, "quantization_config", None):
        return 0
    device, dtype = pick_device(how.get("device", "auto")), how.get("dtype", "auto")
    number = computing_dtype(dtype, pick_dtype(dtype, config, checkpoint), device)
    return checkpoints.stored_elements(checkpoint.folder) * number.itemsize


# --- over several accelerators --------------------------------------------------------------------------------


def place_layers(layers: Sequence[int], rest: int, room: Sequence[int]) -> list[int] | None:
    """Which device each layer goes to, from bytes of each and of the rest, which is on the first: in order, and by
    the devices' shares of the room; None where some device has too little.
    """
    share = (sum(layers) + rest) / max(1, sum(room))
    ends, done, places = [share * end for end in accumulate(room)], rest, list[int]()
    for layer in layers:
        places.append(min(bisect_left(ends, done + layer / 2), len(room) - 1))
        done += layer
    held = [rest, *[0] * (len(room) - 1)]
    for layer, place in zip(layers, places, strict=True):
        held[place] += layer
    return places if all(one <= most for one, most in zip(held, room, strict=True)) else None


def dispatch_(model: Any, room: Mapping[torch.device, int]) -> None:
    """Move a model's weights to several devices and have its modules' inputs follow them."""
    from accelerate import dispatch_model

    decoder, devices = find_decoder(model), list(map(str, room))
    names = [f"{decoder.path}.{name}" for name, _ in decoder.layers.named_children()]
    sizes = [_bytes(model.get_submodule(name)) for name in names]
    places = place_layers(sizes, _bytes(model) - sum(sizes), list(room.values()))
    if places is None:
        needed, there = size(_bytes(model)), size(sum(room.values()))
        words = f"the weights, {needed}, do not fit layer by layer into {len(devices)} devices with {there} for them"
        raise ModelError(words, "leave the layers on disk: --place disk")
    found = dict.fromkeys(_outside(model, decoder.path), devices[0])
    found |= {name: devices[place] for name, place in zip(names, places, strict=True)}
    dispatch_model(model, found, main_device=devices[0], force_hooks=True)


def placed_over(model: nn.Module) -> list[torch.device]:
    return list(dict.fromkeys(p.device for p in model.parameters() if not p.is_meta))


def device_map_of(model: nn.Module) -> dict[str, str]:
    """Where the parts of a model are, by their names: what `from_pretrained(device_map=…)` takes."""
    path = find_decoder(model).path
    names = chain(_outside(model, path), (f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()))
    found = {name: next(iter(model.get_submodule(name).state_dict(keep_vars=True).values()), None) for name in names}
    first = next(model.parameters()).device
    return {name: str(first if tensor is None else tensor.device) for name, tensor in found.items()}


def _outside(model: nn.Module, path: str, prefix: str = "") -> Iterator[str]:
    """Names of the modules that hold what is no layer, none of them inside another."""
    for name, child in model.named_children():
        full = f"{prefix}{name}"
        if path.startswith(f"{full}."):
            yield from _outside(child, path, f"{full}.")
        elif full != path:
            yield full


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))
