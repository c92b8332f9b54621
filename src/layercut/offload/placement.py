"""Where a model's weights lie while it runs: in memory, sharded over several processes, or on disk.

The one entry point for all commands: `models/loading.py` loads, `offload/layer_reader.py` leaves the layers on disk,
`distributed/sharding.py` shards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layercut.config import ShardMode, StreamMode
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError
from layercut.models import checkpoints, loading
from layercut.models.memory import available_bytes
from layercut.offload.layer_reader import open_on_disk, read_by_layer, stored_tensors

FITS = 0.8
"""A model in memory may take this share of what is available; the rest is for activations and logits. A guess."""


def load(
    checkpoint: checkpoints.Checkpoint, *, stream: StreamMode = "auto", shard: ShardMode = "auto", **how: Any
) -> loading.LanguageModel:
    """`loading.load`, or the same model with its weights sharded over the processes or its layers left on disk.

    "auto": where the weights would take more than `FITS` of the memory that is available, they are sharded if there are
    several processes that have room for a part each, else left on disk.

    Args:
        checkpoint: the files.
        stream: whether layers are left on disk.
        shard: whether weights are sharded.
        **how: the other arguments of `loading.load`.

    Returns:
        The model.

    Raises:
        ConfigError: `shard` is "on" and there is one process.
        ModelError: as `loading.load`.
    """
    if spread(checkpoint, stream=stream, shard=shard, **how):
        return load_spread(checkpoint, **how)
    if wanted(checkpoint, stream=stream, **how):
        return open_on_disk(checkpoint, **how)
    return loading.load(checkpoint, **how)


def wanted(checkpoint: checkpoints.Checkpoint, *, stream: StreamMode = "auto", **how: Any) -> bool:
    """Whether `load` in one process would leave the layers on disk. Reads headers only.

    Args:
        checkpoint: the files.
        stream: whether layers are left on disk.
        **how: the other arguments of `loading.load`.

    Returns:
        True where it would.
    """
    if stream != "auto":
        return stream == "on"
    return share_of_memory(checkpoint, **how) > FITS


def spread(
    checkpoint: checkpoints.Checkpoint, *, stream: StreamMode = "auto", shard: ShardMode = "auto", **how: Any
) -> bool:
    """Whether `load` would shard the weights over the processes, all of which must call this. Reads headers only.

    Args:
        checkpoint: the files.
        stream: whether layers are left on disk.
        shard: whether weights are sharded.
        **how: the other arguments of `loading.load`.

    Returns:
        True where it would.

    Raises:
        ConfigError: `shard` is "on" and there is one process.
    """
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
    """Bytes of the weights over those that this process has; 0 of what can only be loaded at once.

    Args:
        checkpoint: the files.
        **how: the arguments of `loading.load`.

    Returns:
        A share; above 1 where the weights do not fit.
    """
    if checkpoint.gguf or not checkpoints.weight_files(checkpoint.folder):
        return 0.0
    config = loading.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
    if getattr(config, "quantization_config", None):
        return 0.0
    device, dtype = loading.pick_device(how.get("device", "auto")), how.get("dtype", "auto")
    number = loading.computing_dtype(dtype, loading.pick_dtype(dtype, config, checkpoint), device)
    elements = sum(s.elements for s in stored_tensors(checkpoint.folder).values())
    return elements * number.itemsize / max(1, available_bytes(device))


def load_spread(
    checkpoint: checkpoints.Checkpoint, *, dtype: str = "auto", device: str = "auto", **how: Any
) -> loading.LanguageModel:
    """`loading.load`, of which each process keeps its shard of every weight (`distributed/sharding.py`).

    A safetensors folder is read layer by layer, by every process in full: two layers and what is no layer are whole
    at a time. What cannot be read so (GGUF, pickled or quantized weights, code of its own) is loaded whole into the
    machine's memory, by one process after the other.

    Args:
        checkpoint: the files.
        dtype: as `loading.load`.
        device: as `loading.load`.
        **how: the other arguments of `loading.load`.

    Returns:
        The model, with this process's shards.
    """
    config = loading.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
    if read_by_layer(checkpoint, config):
        loaded = open_on_disk(checkpoint, dtype=dtype, device=device, **how)
        sharding.spread_(loaded.model, loaded.model.layers_on_disk.load_one_by_one(), loaded.device)
        return loaded
    place = loading.pick_device(device)
    stored = loading.pick_dtype(dtype, config, checkpoint)
    if loading.computing_dtype(dtype, stored, place) == stored:
        dtype = str(stored).removeprefix("torch.")  # else a CPU might decide, by which it comes
    for turn in range(processes.world()):
        if turn == processes.rank():
            loaded = loading.load(checkpoint, dtype=dtype, device="cpu", **how)
            sharding.spread_(loaded.model, loaded.decoder.layers, place)
        processes.barrier()
    return replace(loaded, device=place)
