"""One model over several accelerators of one process: its layers one after the other, each run on the device it is on.

Beside `models/placement.py`, which decides. accelerate's hooks move what a module is given to the device of its
weights, so hidden states follow the layers; what is no layer, embeddings and head among it, is on the first device, and
so are logits and losses. Models that transformers dispatched itself (`device_map="auto"`) are run alike, wherever their
head is. For more than one process can hold: `distributed/sharding.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from layercut.errors import ModelError
from layercut.files.sizes import size
from layercut.models.loading import find_decoder


def accelerators(kind: torch.device) -> list[torch.device]:
    """The accelerators of this machine that a model may be placed over; one where the user named it, none on a CPU."""
    if kind.type == "cpu":
        return []
    if kind.index is not None:
        return [kind]
    return [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]


def place_layers(layers: Sequence[int], rest: int, room: Sequence[int]) -> list[int] | None:
    """Which device each layer goes to: in order, and so that the fullest device is as empty as can be."""

    def within(share: float) -> list[int] | None:
        places, device, left = [], 0, room[0] * share - rest
        for layer in layers:
            while layer > left:
                if (device := device + 1) == len(room):
                    return None
                left = room[device] * share
            places.append(device)
            left -= layer
        return places if rest <= room[0] * share else None

    least, most = 0.0, 1.0
    for _ in range(50):
        middle = (least + most) / 2
        least, most = (least, middle) if within(middle) else (middle, most)
    return within(most)


def fullest(layers: Sequence[int], rest: int, devices: int) -> int:
    """Bytes of weights on the fullest of so many equal devices."""
    places = place_layers(layers, rest, [sum(layers) + rest] * devices)
    assert places is not None  # one device has room for all
    held = [rest] + [0] * (devices - 1)
    for place, layer in zip(places, layers, strict=True):
        held[place] += layer
    return max(held)


def dispatch_(model: Any, room: Mapping[torch.device, int]) -> None:
    """Move a model's weights to several devices and have its modules' inputs follow them."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    decoder, devices = find_decoder(model), list(room)
    names = [f"{decoder.path}.{name}" for name, _ in decoder.layers.named_children()]
    sizes = [_bytes(model.get_submodule(name)) for name in names]
    places = place_layers(sizes, _bytes(model) - sum(sizes), list(room.values()))
    if places is None:
        needed, there = size(_bytes(model)), size(sum(room.values()))
        raise ModelError(
            f"the weights, {needed}, do not fit layer by layer into {len(devices)} devices with {there} for them",
            "leave the layers on disk: --stream on",
        )
    found = dict.fromkeys(_outside(model, decoder.path), devices[0])
    found |= {name: devices[place] for name, place in zip(names, places, strict=True)}
    for name, device in found.items():
        add_hook_to_module(model.get_submodule(name).to(device), AlignDevicesHook(device))
    for module in model.modules():  # what holds the list of layers may have weights of its own
        for table in (module._parameters, module._buffers):
            here: dict[str, Any] = {name: t for name, t in table.items() if t is not None and t.device.type == "cpu"}
            table.update({name: _moved(tensor, devices[0]) for name, tensor in here.items()})
    add_hook_to_module(model, AlignDevicesHook(devices[0], io_same_device=True))
    model.hf_device_map = {name: str(device) for name, device in found.items()}


def _moved(tensor: torch.Tensor, device: torch.device) -> Any:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def placed_over(model: nn.Module) -> list[torch.device]:
    """The devices that a model's weights are on, in the order in which they are used."""
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
        if full == path:
            continue
        if path.startswith(f"{full}."):
            yield from _outside(child, path, f"{full}.")
        else:
            yield full


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))
