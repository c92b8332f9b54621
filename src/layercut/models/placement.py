"""Where a model's weights lie while it runs: in memory, on several accelerators or processes, or on disk.

The one entry point for all commands: `models/loading.py` loads, `models/layer_reader.py` leaves the layers on disk,
`distributed/sharding.py` shards, `models/several_devices.py` places layers over accelerators.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from layercut.config import DeviceMapMode, ShardMode, StreamMode
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError
from layercut.models import checkpoints, loading
from layercut.models.cost import Peak, PlannedRun, Shape, Spent, Work
from layercut.models.layer_reader import open_on_disk, read_by_layer, stored_tensors
from layercut.models.memory import available_bytes, memory_limit
from layercut.models.several_devices import accelerators, dispatch_, fullest

FITS = 0.8
"""A model in memory may take this share of what is available; the rest is for activations and logits. A guess."""


def load(
    checkpoint: checkpoints.Checkpoint,
    *,
    stream: StreamMode = "auto",
    shard: ShardMode = "auto",
    max_memory: str | None = None,
    device_map: DeviceMapMode = "auto",
    **how: Any,
) -> loading.LanguageModel:
    """`loading.load`, or the same model sharded over processes, placed over devices, or with its layers left on disk.

    "auto": where the weights would take more than `FITS` of the memory that is available, they are sharded if there are
    several processes that have room for a part each; placed over several accelerators if one process has them and they
    have room for it; else left on disk.
    """
    with memory_limit(max_memory):
        if spread(checkpoint, stream=stream, shard=shard, **how):
            return load_spread(checkpoint, **how)
        if over_devices(checkpoint, stream=stream, device_map=device_map, **how):
            return load_over_devices(checkpoint, **how)
        if wanted(checkpoint, stream=stream, device_map=device_map, **how):
            return open_on_disk(checkpoint, **how)
        return loading.load(checkpoint, **how)


def over_devices(
    checkpoint: checkpoints.Checkpoint,
    *,
    stream: StreamMode = "auto",
    device_map: DeviceMapMode = "auto",
    **how: Any,
) -> bool:
    """Whether `load` in one process would place the layers over several accelerators. Reads headers only."""
    if device_map == "off" or (device_map == "auto" and (stream == "on" or processes.on_this_machine() > 1)):
        return False
    devices = accelerators(loading.pick_device(how.get("device", "auto")))
    if device_map == "on":
        if len(devices) < 2 or processes.on_this_machine() > 1:
            raise ConfigError(
                "--device-map on places the layers over several accelerators of one process, and there "
                + ("are several processes" if processes.on_this_machine() > 1 else f"are {len(devices)}"),
                "leave it out",
            )
        return True
    if len(devices) < 2 or share_of_memory(checkpoint, **how) <= FITS:
        return False
    return weight_bytes(checkpoint, **how) <= FITS * sum(map(available_bytes, devices))


def load_over_devices(
    checkpoint: checkpoints.Checkpoint, *, dtype: str = "auto", device: str = "auto", **how: Any
) -> loading.LanguageModel:
    """`loading.load`, of which each accelerator has some layers (`models/several_devices.py`)."""
    place = loading.pick_device(device)
    loaded = loading.load(checkpoint, dtype=_fixed_dtype(checkpoint, dtype, place, **how), device="cpu", **how)
    devices = accelerators(place)
    dispatch_(loaded.model, {device: int(FITS * available_bytes(device)) for device in devices})
    return replace(loaded, device=devices[0])


def _fixed_dtype(checkpoint: checkpoints.Checkpoint, dtype: str, place: torch.device, **how: Any) -> str:
    """The dtype by name, where a CPU, by which the weights come to their device, might decide on another."""
    config = loading.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
    stored = loading.pick_dtype(dtype, config, checkpoint)
    return str(stored).removeprefix("torch.") if loading.computing_dtype(dtype, stored, place) == stored else dtype


def wanted(
    checkpoint: checkpoints.Checkpoint,
    *,
    stream: StreamMode = "auto",
    device_map: DeviceMapMode = "auto",
    **how: Any,
) -> bool:
    """Whether `load` in one process would leave the layers on disk. Reads headers only."""
    if stream != "auto":
        return stream == "on"
    if over_devices(checkpoint, stream=stream, device_map=device_map, **how):
        return False
    return share_of_memory(checkpoint, **how) > FITS


def spread(
    checkpoint: checkpoints.Checkpoint, *, stream: StreamMode = "auto", shard: ShardMode = "auto", **how: Any
) -> bool:
    """Whether `load` would shard the weights over the processes, all of which must call this. Reads headers only."""
    count = processes.world()
    if shard == "on" and not processes.launched():
        raise ConfigError(
            "--shard on shards the weights over several processes, and there is one",
            "start several: torchrun --standalone --nproc-per-node 8 -m layercut.cli …",
        )
    if count == 1 or shard != "auto" or stream == "on":
        return count > 1 and shard == "on"
    share = share_of_memory(checkpoint, **how)
    return bool(processes.most(share > FITS)) and not processes.most(share / count > FITS)


def share_of_memory(checkpoint: checkpoints.Checkpoint, **how: Any) -> float:
    """Bytes of the weights over those that this process has; 0 of what can only be loaded at once."""
    device = loading.pick_device(how.get("device", "auto"))
    with memory_limit(how.get("max_memory")):  # they pass through the machine's memory
        room = min(available_bytes(place) for place in (device, torch.device("cpu")))
    return weight_bytes(checkpoint, **how) / max(1, room)


def weight_bytes(checkpoint: checkpoints.Checkpoint, **how: Any) -> int:
    """Bytes that the weights take once they are loaded; 0 of what can only be loaded at once."""
    if checkpoint.gguf or not checkpoints.weight_files(checkpoint.folder):
        return 0
    config = loading.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
    if getattr(config, "quantization_config", None):
        return 0
    device, dtype = loading.pick_device(how.get("device", "auto")), how.get("dtype", "auto")
    number = loading.computing_dtype(dtype, loading.pick_dtype(dtype, config, checkpoint), device)
    elements = sum(s.elements for s in stored_tensors(checkpoint.folder).values())
    return elements * number.itemsize


def load_spread(
    checkpoint: checkpoints.Checkpoint, *, dtype: str = "auto", device: str = "auto", **how: Any
) -> loading.LanguageModel:
    """`loading.load`, of which each process keeps its shard of every weight (`distributed/sharding.py`).

    A safetensors folder is read layer by layer, by every process in full: two layers and what is no layer are whole
    at a time. What cannot be read so (GGUF, pickled or quantized weights, code of its own) is loaded whole into the
    machine's memory, by one process after the other.
    """
    config = loading.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
    if read_by_layer(checkpoint, config):
        loaded = open_on_disk(checkpoint, dtype=dtype, device=device, **how)
        sharding.spread_(loaded.model, loaded.model.layers_on_disk.load_one_by_one(), loaded.device)
        return loaded
    place = loading.pick_device(device)
    dtype = _fixed_dtype(checkpoint, dtype, place, **how)
    for turn in range(processes.world()):
        if turn == processes.rank():
            loaded = loading.load(checkpoint, dtype=dtype, device="cpu", **how)
            sharding.spread_(loaded.model, loaded.decoder.layers, place)
        processes.barrier()
    return replace(loaded, device=place)


# --- what it costs, told beforehand ---


def weights_peak(shape: Shape, on_disk: bool) -> Peak:
    """What of the dense model's weights is in memory in any stage."""
    if not on_disk:
        return {"weights": shape.dense.total * shape.itemsize}
    two = 2 * max(shape.dense.layers) * shape.itemsize
    return {"weights in memory": shape.outside * shape.itemsize, "two layers": two}


def load_cost(run: PlannedRun, *, files: int, on_cpu: bool, gguf: int | None, stored: int | None) -> Spent:
    """What loading costs: the files are read, and copied once into memory.

    Safetensors in the number format that is computed in are mapped, not read: the file's pages are the weights, and
    come in when they are first used. In another format they are converted, tensor by tensor. Of a GGUF file every
    tensor is dequantized to float32 before the first is rounded, which takes most of its time and is not counted. Of
    layers on disk one of random weights is made to try the model's structure; of the rest, what was read is there
    beside what it is converted to.
    """
    shape, size = run.shape, run.shape.dense.total * run.shape.itemsize
    peak = {"weights, mapped": 0} if on_cpu and not stored else {"weights": size}
    if run.on_disk:
        rest = shape.outside * shape.itemsize
        one = max(max(shape.dense.layers) * shape.itemsize, shape.outside * (stored or 0))
        peak = {"weights in memory": rest, "one layer or as read": one}
    elif on_cpu and gguf:
        peak = {"weights in float32": 4 * gguf}
    return Spent(peak, None if gguf else Work(read_bytes=files, moved_bytes=2 * size))


def placed_peak(peak: Peak, shape: Shape, devices: int) -> Peak:
    """A stage over layers that are placed over several devices (`models/several_devices.py`), of the fullest."""
    layers = [layer * shape.itemsize for layer in shape.dense.layers]
    return {**peak, "weights": fullest(layers, shape.outside * shape.itemsize, devices)}


def spread_peak(peak: Peak, shape: Shape, devices: int) -> Peak:
    """A stage over weights spread over several devices (`distributed/sharding.py`). Computed, never measured.

    Each has a part of the weights and of the trained layers' state. Gathered on top are two layers, one that runs and
    one ahead of it, each in the buffer that the devices fill and in the weights made of it, or so what is no layer;
    backwards, the whole gradient of a trained layer, in the model's format and in float32.
    """
    layer, parted = max(shape.dense.layers), ("weights", "trained state", "healed weights")
    parts = {name: size // devices if name in parted else size for name, size in peak.items()}
    parts["gathered"] = max(4 * layer, 2 * shape.outside) * shape.itemsize
    if "trained state" in peak:
        parts["gradient of a layer"] = layer * (shape.itemsize + 4)
    return parts
