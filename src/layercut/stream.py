"""A model larger than memory: its decoder layers stay on disk, and each is read when it is entered.

Stands between `models.py` and `sweep.py`: what `load` returns is used like any other model, whose layers happen to
fetch their weights when they are called and to drop them when another one is. The next layer is read ahead by one
thread, so that at most two layers are in memory. Embeddings, final norm, head and whatever else is no decoder layer
stay resident.

Which stored tensor becomes which weight is decided by transformers' own loader: once for the whole checkpoint on
tensors without data, which tells what is missing or of a wrong shape before anything is read, and again for
each layer on the real ones. Fused experts, renamed and tied weights are what they are when loaded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercut import models
from layercut.config import StreamMode
from layercut.errors import ModelError
from layercut.progress import say

FITS = 0.8
"""A model in memory may take this share of what is available; the rest is for activations and logits. A guess."""

IN_MEMORY = "load it in memory instead: --stream off"


def load(checkpoint: models.Checkpoint, *, stream: StreamMode = "auto", **how: Any) -> models.LanguageModel:
    """`models.load`, or the same model with its layers left on disk. how: the arguments of `models.load`.

    stream "auto": on disk where the weights would take more than `FITS` of the memory that is available.
    """
    if wanted(checkpoint, stream=stream, **how):
        return open_on_disk(checkpoint, **how)
    return models.load(checkpoint, **how)


def wanted(checkpoint: models.Checkpoint, *, stream: StreamMode = "auto", **how: Any) -> bool:
    """Whether `load` would leave the layers on disk. Reads headers only."""
    if stream != "auto":
        return stream == "on"
    if checkpoint.gguf or not models.weight_files(checkpoint.folder):
        return False  # no other way than to load these
    config = models.load_config(checkpoint, trust_remote_code=how.get("trust_remote_code", False))
    if getattr(config, "quantization_config", None):
        return False
    place = models.pick_device(how.get("device", "auto"))
    number = models.pick_dtype(how.get("dtype", "auto"), config, checkpoint, place)
    elements = sum(s.elements for s in stored_tensors(checkpoint.folder).values())
    return elements * number.itemsize > FITS * available_bytes(place)


def available_bytes(device: torch.device) -> int:
    """Memory that can be had without swapping: of the machine, within a container's limit, and of the device."""
    import psutil

    free = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")  # cgroup v2, as seen from inside a container
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(cache["inactive_file"]))
    except (OSError, ValueError, KeyError):
        pass
    if device.type == "cuda":
        free.append(torch.cuda.mem_get_info(device)[0])
    return min(free)


def layers_on_disk(model: Any) -> LayersOnDisk | None:
    """The reader behind a model's layers, None for a model in memory."""
    return getattr(model, "layers_on_disk", None)


@contextmanager
def without_reading(model: Any) -> Iterator[None]:
    """While open, layers on disk compute with random weights and nothing is read; a model in memory stays as it is.

    For what depends on a model's structure alone. Weights are drawn by the class's own initialisation, seeded.
    """
    disk = layers_on_disk(model)
    with disk.stand_ins() if disk else nullcontext():
        yield


# --- what is stored -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, known from the header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def __getitem__(self, key: Any) -> Stored:
        """transformers' loader asks for `tensor[...]` and then for `.to(...)`: this stands in for a tensor there."""
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name; ModelError where a file cannot be read."""
    found: dict[str, Stored] = {}
    for file in models.weight_files(folder):
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118, this is no dict
                tensor = shard.get_slice(name)
                found[name] = Stored(file, tuple(tensor.get_shape()), tensor.get_dtype())
    return found


def _opened(file: Path) -> Any:
    """A safetensors file, of which tensors are read one by one into memory of their own: nothing stays mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is corrupt, truncated or gone: {models.first_line(error)}", "fetch this file again"
        ) from None


# --- a model whose layers are on disk -----------------------------------------------------------------------


def open_on_disk(
    checkpoint: models.Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> models.LanguageModel:
    """Open a safetensors folder with its decoder layers left on disk. dtype and device: as `models.load` takes them.

    Raises ModelError: GGUF, pickled or quantized weights, modelling code of its own, weights that several layers
    share, and all that `models.load` refuses.
    """
    config = models.load_config(checkpoint, trust_remote_code=trust_remote_code)
    _refuse(checkpoint, config)
    place = models.pick_device(device)
    number = models.pick_dtype(dtype, config, checkpoint, place)
    stored = stored_tensors(checkpoint.folder)
    with models.quiet_transformers():
        try:
            model, info = _model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=dict(stored),
                dtype=number,
                ignore_mismatched_sizes=True,  # refused below, and by name
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{checkpoint.name} cannot be opened: {models.first_line(error)}", IN_MEMORY) from error
    models.check_loading(info, checkpoint.name)
    if info.get("conversion_errors"):
        raise ModelError(
            f"{checkpoint.name} holds weights that cannot be converted (first: {min(info['conversion_errors'])})",
            "check that the checkpoint is complete and that this version of transformers knows it",
        )
    model.config.name_or_path = str(checkpoint.folder)
    disk = LayersOnDisk(model, stored, number, place)
    disk.read_the_rest_()
    disk.attach_()
    tokenizer = models.load_tokenizer(checkpoint)
    return models.LanguageModel(model.eval().requires_grad_(False), tokenizer, checkpoint, number, place)


def _refuse(checkpoint: models.Checkpoint, config: Any) -> None:
    """What is not read layer by layer."""
    name = checkpoint.name
    if checkpoint.gguf:
        raise ModelError(f"{name} is a GGUF file, whose layers are not read one by one", IN_MEMORY)
    if not models.weight_files(checkpoint.folder):
        raise ModelError(f"{name} holds pickled weights, which are not read layer by layer", IN_MEMORY)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is quantized, and quantized layers are not read one by one", IN_MEMORY)
    if not type(config).__module__.startswith("transformers."):
        raise ModelError(f"{name} brings its own modelling code, whose layers are not read one by one", IN_MEMORY)


def _model_class(config: Any) -> Any:
    """The class that transformers' automatic one would take: only a class itself loads from tensors given to it."""
    from transformers.models.auto.auto_factory import _get_model_class

    return _get_model_class(config, models.auto_class(config)._model_mapping)


class LayersOnDisk:
    """Reads decoder layers when they are entered. `layers_read` and `bytes_read` count what that took."""

    def __init__(
        self, model: Any, stored: dict[str, Stored], dtype: torch.dtype, device: torch.device
    ) -> None:
        decoder = models.find_decoder(model)
        self.model, self.device, self.dtype = model, device, dtype
        self.layers: list[nn.Module] = list(decoder.layers)
        self.layers_read, self.bytes_read = [0] * len(self.layers), 0
        self.resident: int | None = None
        self._empty = [_tensors(layer) for layer in self.layers]  # names and shapes, without data
        self._prefixes = [f"{decoder.path}.{i}." for i in range(len(self.layers))]
        self._refuse_sharing()
        self._stored, self._rest = self._by_layer(stored)
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layer-reader")
        self._said = ""
        self._random: dict[Any, dict[str, torch.Tensor]] | None = None  # stand-ins, while they are wanted

    def say_once(self, words: str) -> None:
        """A line about streaming, unless it was the last one said: some searches sweep many times."""
        if words != self._said:
            say("stream", words)
        self._said = words

    # --- what goes where ---

    def _by_layer(self, stored: dict[str, Stored]) -> tuple[list[dict[str, Stored]], dict[str, Stored]]:
        """The stored tensors that make up each layer, and the rest; names as transformers' loader maps them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        weights = self.model.state_dict()
        by_layer: list[dict[str, Stored]] = [{} for _ in self.layers]
        rest: dict[str, Stored] = {}
        owner = {prefix: i for i, prefix in enumerate(self._prefixes)}
        depth = self._prefixes[0].count(".")
        for key, tensor in stored.items():
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, weights)
            if name not in weights and key in weights:
                name = key
            i = owner.get(".".join(name.split(".")[:depth]) + ".")
            (rest if i is None else by_layer[i])[key] = tensor
        return by_layer, rest

    def _refuse_sharing(self) -> None:
        """A weight that two layers hold, or a layer and the rest, would have to be kept when a layer is dropped."""
        holders: dict[int, int] = {}
        inside = {id(t): i for i, tensors in enumerate(self._empty) for t in tensors.values()}
        for i, tensors in enumerate(self._empty):
            for name, tensor in tensors.items():
                if holders.setdefault(id(tensor), i) != i:
                    raise ModelError(
                        f"layers {holders[id(tensor)]} and {i} of {type(self.model).__name__} share {name}", IN_MEMORY
                    )
        tied = getattr(self.model, "all_tied_weights_keys", {})
        shared = [name for pair in tied.items() for name in pair if name.startswith(tuple(self._prefixes))]
        mine = {id(layer_part) for layer in self.layers for layer_part in layer.modules()}
        for path, module in self.model.named_modules():
            if id(module) not in mine:
                shared += [f"{path}.{n}" for n, t in module._parameters.items() if t is not None and id(t) in inside]
        if shared:
            raise ModelError(f"{type(self.model).__name__} ties weights of its layers: {shared[0]}", IN_MEMORY)

    def read_the_rest_(self) -> None:
        """Embeddings, final norm, head: what is no layer is read once, and tied as transformers ties it."""
        missing = self._install_(self._read(self._rest))
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        inside = {id(t) for tensors in self._empty for t in tensors.values()}
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(self.device)

    # --- entering a layer ---

    def attach_(self) -> None:
        """From here on each layer of the model fetches its weights when it is called."""
        for i, layer in enumerate(self.layers):
            layer.forward = self._on_demand(i, layer.forward)
        self.model.layers_on_disk = self

    def _on_demand(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_with_weights(*args: Any, **kwargs: Any) -> Any:
            self.enter_(i)
            return forward(*args, **kwargs)

        return forward_with_weights

    def enter_(self, i: int) -> None:
        """Have layer i's weights in memory, drop those of the layer before, and begin to read the one after.

        After is upwards, or downwards where the last step went down, as in a backward pass.
        """
        if i == self.resident:
            return
        if self._random is not None:
            self._stand_in_(i, self._random)
            return
        step = -1 if self.resident is not None and i == self.resident - 1 else 1
        tensors = self._take(i)
        self.leave_()
        self._install_(tensors)
        self.layers[i].requires_grad_(False)
        if lacking := [name for name, tensor in _tensors(self.layers[i]).items() if tensor.is_meta]:
            raise ModelError(f"layer {i} has no {lacking[0]} in the checkpoint", "fetch the checkpoint again")
        self.resident = i
        if 0 <= i + step < len(self.layers):
            self._ahead = i + step, self._reader.submit(self._read, self._stored[i + step], i + step)

    def leave_(self) -> None:
        """Drop the weights of the layer that is in memory."""
        if self.resident is not None:
            _put_(self.layers[self.resident], self._empty[self.resident])
        self.resident = None

    def _take(self, i: int) -> dict[str, torch.Tensor]:
        """Layer i's tensors as stored: read ahead, or read now."""
        ahead, self._ahead = self._ahead, None
        if ahead:
            tensors = ahead[1].result()  # waited for also where it is another layer: no third one in memory
            if ahead[0] == i:
                return tensors
            del tensors, ahead
        return self._read(self._stored[i], i)

    def _read(self, stored: dict[str, Stored], layer: int | None = None) -> dict[str, torch.Tensor]:
        """Tensors as they are in the files."""
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted({tensor.file for tensor in stored.values()}):
            with _opened(file) as shard:
                for name in [name for name, tensor in stored.items() if tensor.file == file]:
                    try:
                        tensors[name] = shard.get_tensor(name)
                    except Exception as error:  # its own error type, or the system's
                        raise ModelError(
                            f"{name} cannot be read from {file}: {models.first_line(error)}",
                            "fetch this file again; it has changed since it was opened",
                        ) from None
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        if layer is not None:
            self.layers_read[layer] += 1
        return tensors

    def _install_(self, tensors: dict[str, torch.Tensor]) -> set[str]:
        """Convert stored tensors and put them into the model, by transformers' loader; names still without."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        how = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": str(self.device)},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        with models.quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how)
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            wrong = [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
            raise ModelError(f"weights have changed since they were opened: {wrong[0]}", "fetch the checkpoint again")
        return info.missing_keys

    # --- structure without weights ---

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """While open, layers entered get random weights: of one seed for all layers of one make."""
        self.leave_()
        self._random = {}
        try:
            yield
        finally:
            self.leave_()
            self._random = None

    def _stand_in_(self, i: int, made: dict[Any, dict[str, torch.Tensor]]) -> None:
        self.leave_()
        layer = self.layers[i]
        make = type(layer), tuple((n, t.shape, t.dtype) for n, t in self._empty[i].items())
        if make in made:
            _put_(layer, made[make])
        else:
            _put_(layer, {name: _blank(tensor, self.device) for name, tensor in self._empty[i].items()})
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                for module in layer.modules():
                    self._owner(layer)._init_weights(module)
            made[make] = _tensors(layer)
        self.resident = i

    def _owner(self, layer: nn.Module) -> Any:
        """The innermost model around a layer: in a vision-language model, the language model."""
        from transformers import PreTrainedModel

        around = [m for m in self.model.modules() if isinstance(m, PreTrainedModel) and layer in list(m.modules())]
        return around[-1]


def _blank(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    blank = torch.zeros_like(tensor, device=device)
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers of a layer by name, the very objects."""
    return layer.state_dict(keep_vars=True)


def _put_(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, tensor)
