"""A model larger than memory: its decoder layers stay on disk, and each is read when it is entered.

Stands between `models/loading.py` and `models/runner.py`: what `open_on_disk` returns is used like any other model,
whose layers happen to fetch their weights when they are called and to drop them when another one is. The next layer is
read ahead by one thread, so that at most two layers are in memory. Embeddings, final norm, head and whatever else is
no decoder layer stay resident.

Which stored tensor becomes which weight is decided by transformers' own loader: once for the whole checkpoint on
tensors without data, which shows what is missing or of a wrong shape before anything is read, and again for
each layer on the real ones. Fused experts, renamed and tied weights are what they are when loaded at once.

A cut clone of such a model shares its layers: `models/weight_sharing.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from layercut.errors import ModelError, first_line
from layercut.models import checkpoints, devices, loading
from layercut.models.checkpoints import Stored
from layercut.models.decoder_stack import find_decoder
from layercut.progress import say

IN_MEMORY = "load it in memory instead: --stream off"


def layers_on_disk(model: Any) -> Any:
    """The reader behind a model's layers, None for a model in memory."""
    return getattr(model, "layers_on_disk", None)


def as_saved(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model under the names, and in the pieces, in which its class saves them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def why_not_by_layer(checkpoint: checkpoints.Checkpoint, config: Any) -> str | None:
    """Why a checkpoint is not read layer by layer; None where it is."""
    if checkpoint.gguf:
        return "is a GGUF file, whose layers are not read one by one"
    if not checkpoints.weight_files(checkpoint.folder):
        return "holds pickled weights, which are not read layer by layer"
    if getattr(config, "quantization_config", None):
        return "is quantized, and quantized layers are not read one by one"
    if not type(config).__module__.startswith("transformers."):
        return "brings its own modelling code, whose layers are not read one by one"
    return None


def open_on_disk(
    checkpoint: checkpoints.Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tokenizer: Any = None,
) -> loading.LanguageModel:
    """Open a safetensors folder with its decoder layers left on disk."""
    config = loading.load_config(checkpoint, trust_remote_code=trust_remote_code)
    if why := why_not_by_layer(checkpoint, config):
        raise ModelError(f"{checkpoint.name} {why}", IN_MEMORY)
    place = devices.pick_device(device)
    own = devices.pick_dtype(dtype, config, checkpoint)
    number = devices.computing_dtype(dtype, own, place)
    stored = checkpoints.stored_tensors(checkpoint.folder)
    loading.refuse_larger(config, checkpoint)
    skeleton = _build(checkpoint, config, stored, number)
    layers, rest = _by_layer(skeleton, stored)
    refuse_sharing(skeleton)
    tensors = _read(rest)
    absent = {name: tensor for layer in layers for name, tensor in layer.items()}
    model = _build(checkpoint, config, absent | tensors, number)
    model.config.name_or_path = str(checkpoint.folder)
    model.stored_dtype = own
    model.layers_on_disk = disk = LayersOnDisk(model, layers, number, place)
    disk.bytes_read = sum(tensor.nbytes for tensor in tensors.values())
    tokenizer = tokenizer or loading.load_tokenizer(checkpoint)
    return loading.LanguageModel(model.eval().requires_grad_(False), tokenizer, checkpoint, number, place)


def _build(checkpoint: checkpoints.Checkpoint, config: Any, tensors: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model as transformers makes it of tensors, some or all of which have no data."""
    from transformers.models.auto.auto_factory import _get_model_class

    # an automatic class loads from files only; this is how it picks the class and the config
    cls = _get_model_class(config, loading.auto_class(config)._model_mapping)
    if (text := config.sub_configs.get("text_config")) and cls.config_class == text:
        config = config.get_text_config()
    with loading.quiet_transformers():
        try:
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                ignore_mismatched_sizes=True,  # refused below, and by name
                output_loading_info=True,
            )
        except Exception as error:  # as in `loading.load`
            raise ModelError(f"{checkpoint.name} cannot be opened: {first_line(error)}", IN_MEMORY) from error
    loading.check_loading(info, checkpoint.name)
    if info.get("conversion_errors"):
        raise ModelError(
            f"{checkpoint.name} holds weights that cannot be converted (first: {min(info['conversion_errors'])})",
            "check that the checkpoint is complete and that this version of transformers knows it",
        )
    return model


def _by_layer(model: Any, stored: dict[str, Stored]) -> tuple[list[dict[str, Stored]], dict[str, Stored]]:
    """The stored tensors that make up each layer, and the rest; names as transformers' loader maps them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    weights, decoder = model.state_dict(), find_decoder(model)
    by_layer: list[dict[str, Stored]] = [{} for _ in range(len(decoder))]
    rest: dict[str, Stored] = {}
    for key, tensor in stored.items():
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, weights)
        if name not in weights and key in weights:
            name = key
        i, dot, _ = name.removeprefix(decoder.path + ".").partition(".")
        inside = name.startswith(decoder.path + ".") and dot and i.isdigit()
        (by_layer[int(i)] if inside else rest)[key] = tensor
    return by_layer, rest


def refuse_sharing(model: Any) -> None:
    """A weight that two layers hold, or a layer and the rest, would have to be kept when a layer is dropped."""
    layers, name = list(find_decoder(model).layers), type(model).__name__
    holder: dict[int, int] = {}
    for i, layer in enumerate(layers):
        for path, tensor in _tensors(layer).items():
            if holder.setdefault(id(tensor), i) != i:
                raise ModelError(f"layers {holder[id(tensor)]} and {i} of {name} share {path}", IN_MEMORY)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for path, module in model.named_modules():
        for own, tensor in {} if id(module) in inside else module._parameters.items():
            if id(tensor) in holder:
                raise ModelError(f"{name} ties {path}.{own} to layer {holder[id(tensor)]}", IN_MEMORY)


def _read(stored: dict[str, Stored]) -> dict[str, torch.Tensor]:
    """Tensors as they are in the files, read one by one into memory of their own: nothing stays mapped."""
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        name = "its header"
        try:
            with safe_open(file, framework="pt", device="cpu", backend="pread") as shard:
                for name in [name for name, tensor in stored.items() if tensor.file == file]:
                    tensors[name] = shard.get_tensor(name)
        except Exception as error:  # its own error type, or the system's
            raise ModelError(
                f"{name} cannot be read from {file}: {first_line(error)}",
                "fetch this file again; it has changed since it was opened",
            ) from None
    return tensors


class LayersOnDisk:
    """Reads decoder layers when they are entered. `layers_read` and `bytes_read` count what that took."""

    def __init__(self, model: Any, stored: list[dict[str, Stored]], dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.layers: list[nn.Module] = list(find_decoder(model).layers)
        self.layers_read, self.bytes_read = [0] * len(self.layers), 0
        self.resident: int | None = None
        self._stored = stored
        self._empty = [_tensors(layer) for layer in self.layers]  # names and shapes, without data
        self._unchanged = [_versions(layer) for layer in self.layers]
        self._versions = self._unchanged.copy()  # of what each layer holds now
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layer-reader")
        # by kind of layer, while `random_weights` is open
        self._random: dict[Any, dict[str, torch.Tensor]] | None = None
        self._said = ""
        self.clone_layers: list[WeakSet[nn.Module]] = [WeakSet() for _ in self.layers]
        """Layers of clones of the model, which get the weights of these where they have none of their own."""
        _move_(model, device)
        for i, layer in enumerate(self.layers):
            layer.forward = self._on_demand(i, layer.forward)

    def say_once(self, words: str) -> None:
        """A line about streaming, unless it was the last one said: some searches sweep many times."""
        if words != self._said:
            say("stream", words)
        self._said = words

    def load_one_by_one(self) -> Iterator[nn.Module]:
        """Each layer in turn, read, for the caller to keep; afterwards nothing is on disk any more."""
        for i, layer in enumerate(self.layers):
            self.enter_(i)
            self.resident = None
            del layer.forward
            yield layer
        self._reader.shutdown()
        del self.model.layers_on_disk

    def __deepcopy__(self, memo: Any) -> LayersOnDisk:
        """A copy of the model has the same reader."""
        return self

    # --- entering a layer ---

    def _on_demand(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_with_weights(*args: Any, **kwargs: Any) -> Any:
            self.enter_(i)
            return forward(*args, **kwargs)

        return forward_with_weights

    def enter_(self, i: int, ahead: Sequence[int] | None = None) -> None:
        """Load layer i's weights, drop those of the layer before, and begin to read the one after.

        After is upwards, or downwards where the last step went down, as in a backward pass.
        """
        if i == self.resident:
            return
        if self._random is not None:
            self._set_random_(i, self._random)
            return
        self._refuse_changed(i)  # here those without data, which the model may have changed before it calls them
        if ahead is None:
            below, above = range(max(0, i - 1), i), range(i + 1, min(i + 2, len(self.layers)))
            ahead = below if self.resident == i + 1 else above
        tensors = self._take(i)
        self.leave_()
        self.resident = i  # from here on, also half installed: an error leaves nothing behind
        try:
            self._install_(tensors)
        except BaseException:
            self._drop_()
            raise
        self.layers[i].requires_grad_(False)
        self._versions[i] = _versions(self.layers[i])
        self._fill_clones_(i)
        for j in ahead:
            self._ahead = j, self._reader.submit(self._read, j)

    def leave_(self) -> None:
        """Drop the weights of the layer that is in memory."""
        if self.resident is not None and self._random is None:
            self._refuse_changed(self.resident)
        self._drop_()

    def _drop_(self) -> None:
        if (i := self.resident) is not None:
            shared = _tensors(self.layers[i])
            for clone_layer in self.clone_layers[i]:
                own = _tensors(clone_layer)
                _put_(clone_layer, {name: self._empty[i][name] for name in shared if own.get(name) is shared[name]})
            _put_(self.layers[i], self._empty[i])
            self._versions[i] = self._unchanged[i]
        self.resident = None

    def _fill_clones_(self, i: int) -> None:
        """Put the weights in memory into the layers of clones, where these have no data of their own."""
        weights = _tensors(self.layers[i])
        for clone_layer in self.clone_layers[i]:
            for name, tensor in _tensors(clone_layer).items():
                if tensor.is_meta:
                    if tensor is not self._empty[i].get(name):
                        raise ModelError(
                            f"{type(self.model).__name__} has other weights in layer {i} where layers are cut out",
                            IN_MEMORY,
                        )
                    _put_(clone_layer, {name: weights[name]})

    def _refuse_changed(self, i: int) -> None:
        """Changes in place would be lost when the layer is read again."""
        if _versions(self.layers[i]) != self._versions[i]:
            raise ModelError(f"{type(self.model).__name__} changes the weights of its layers as it runs", IN_MEMORY)

    def _take(self, i: int) -> dict[str, torch.Tensor]:
        """Layer i's tensors as stored: read ahead, or read now."""
        ahead, self._ahead = self._ahead, None
        if ahead:
            tensors = ahead[1].result()  # waited for also where it is another layer: no third one in memory
            if ahead[0] == i:
                return tensors
            del tensors, ahead
        return self._read(i)

    def _read(self, i: int) -> dict[str, torch.Tensor]:
        """Layer i's tensors as stored, from disk."""
        tensors = _read(self._stored[i])
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        self.layers_read[i] += 1
        return tensors

    def _install_(self, tensors: dict[str, torch.Tensor]) -> None:
        """Convert stored tensors and put them into the model, by transformers' loader."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        how = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": str(self.device)},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        with loading.quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how)
        lacking = [name for name, tensor in _tensors(self.layers[self.resident or 0]).items() if tensor.is_meta]
        if lacking:
            raise ModelError(f"layer {self.resident} has no {lacking[0]} on disk", "fetch the checkpoint again")
        if info.mismatched_keys or info.conversion_errors or info.error_msgs:
            wrong = [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
            raise ModelError(f"weights have changed since they were opened: {wrong[0]}", "fetch the checkpoint again")

    # --- structure without weights ---

    @contextmanager
    def random_weights(self) -> Iterator[None]:
        """While open, layers entered get random weights, the same for all layers of one kind, and nothing is read."""
        self.leave_()
        self._random = {}
        try:
            yield
        finally:
            self._drop_()
            self._random = None

    def _set_random_(self, i: int, made: dict[Any, dict[str, torch.Tensor]]) -> None:
        self.leave_()
        kind = type(self.layers[i]), tuple((n, t.shape, t.dtype) for n, t in self._empty[i].items())
        if kind not in made:
            drawn, made[kind] = torch.Generator().manual_seed(0), {}
            for name, empty in self._empty[i].items():
                tensor = torch.zeros(empty.shape, dtype=empty.dtype)
                if tensor.is_floating_point():
                    tensor = torch.randn(empty.shape, generator=drawn).mul_(0.02).to(empty.dtype)
                tensor = tensor.to(self.device)
                made[kind][name] = nn.Parameter(tensor, False) if isinstance(empty, nn.Parameter) else tensor
        _put_(self.layers[i], made[kind])
        self.resident = i
        self._fill_clones_(i)


def _move_(model: nn.Module, device: torch.device) -> None:
    """Put new tensors on the device in the place of those with data; one that several modules share stays one."""
    moved: dict[int, torch.Tensor] = {}
    for held in (held for module in model.modules() for held in (module._parameters, module._buffers)):
        for name, tensor in held.items():
            if tensor is None or tensor.is_meta or tensor.device == device:
                continue
            if id(tensor) not in moved:
                there = tensor.detach().to(device)
                moved[id(tensor)] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
            held[name] = moved[id(tensor)]  # type: ignore[assignment]


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers of a layer by name, the very objects."""
    return layer.state_dict(keep_vars=True)


def _versions(layer: nn.Module) -> list[int]:
    """How often each tensor was changed in place."""
    return [tensor._version for tensor in _tensors(layer).values()]


def _put_(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, tensor)
