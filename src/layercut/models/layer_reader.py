"""A model larger than memory: its decoder layers stay on disk, and each is read when it is entered.

What `open_on_disk` returns is used like any other model, whose layers fetch their weights when they are called and drop
them when another one is. The next layer is read ahead by one thread, so that at most two layers are in memory. What is
no decoder layer stays resident.

Which stored tensor becomes which weight is decided by transformers' own loader: once for the whole checkpoint on
tensors without data, which shows what is missing or of a wrong shape before anything is read, and again for
each layer on the real ones. Fused experts, renamed and tied weights are what they are when loaded at once.

A clone made by `share` has own modules, of which those left by a cut know which of the original's they are. What is in
no decoder layer it shares with the original, and a layer that either enters is read into both: their parameters are the
same objects (`shared_layers` asks). What healing puts into a clone stays in memory.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from layercut.errors import ModelError, first_line
from layercut.models import checkpoints, loading
from layercut.models.checkpoints import Stored
from layercut.models.decoder_stack import copied, find_decoder
from layercut.progress import say

IN_MEMORY = "load it in memory instead: --place memory"


def layers_on_disk(model: Any) -> Any:
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
    config = loading.load_config(checkpoint, trust_remote_code=trust_remote_code)
    if why := why_not_by_layer(checkpoint, config):
        raise ModelError(f"{checkpoint.name} {why}", IN_MEMORY)
    place = loading.pick_device(device)
    own = loading.pick_dtype(dtype, config, checkpoint)
    number = loading.computing_dtype(dtype, own, place)
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
    files = LayerFiles(model, layers, number, place)
    files.bytes_read = sum(tensor.nbytes for tensor in tensors.values())
    model.layers_on_disk = LayersOnDisk(files, model, range(len(layers)))
    tokenizer = tokenizer or loading.load_tokenizer(checkpoint)
    return loading.LanguageModel(model.eval().requires_grad_(False), tokenizer, checkpoint, number, place)


def _build(checkpoint: checkpoints.Checkpoint, config: Any, tensors: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model as transformers makes it of tensors, some or all of which have no data."""
    from transformers.models.auto.auto_factory import _get_model_class

    # an automatic class loads from files only; this is how it picks the class and the config
    cls = _get_model_class(config, loading.auto_class(config)._model_mapping)
    if (text := config.sub_configs.get("text_config")) and cls.config_class == text:
        config = config.get_text_config()
    how = {"ignore_mismatched_sizes": True, "output_loading_info": True, "use_kernels": False}  # refused by name
    with loading.quiet_transformers():
        try:
            model, info = cls.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype, **how)
        except Exception as error:  # as in `loading.load`
            raise ModelError(f"{checkpoint.name} cannot be opened: {first_line(error)}", IN_MEMORY) from error
    loading.check_loading(info, checkpoint.name)
    if info.get("conversion_errors"):
        words = f"{checkpoint.name} holds weights that cannot be converted (first: {min(info['conversion_errors'])})"
        raise ModelError(words, "check that the checkpoint is complete and that this version of transformers knows it")
    return model


def _by_layer(model: Any, stored: dict[str, Stored]) -> tuple[list[dict[str, Stored]], dict[str, Stored]]:
    """The stored tensors that make up each layer, and the rest."""
    names, decoder = DiskNames(model), find_decoder(model)
    by_layer: list[dict[str, Stored]] = [{} for _ in range(len(decoder))]
    rest: dict[str, Stored] = {}
    for key, tensor in stored.items():
        name = names.to_memory(key)
        i, dot, _ = name.removeprefix(decoder.path + ".").partition(".")
        inside = name.startswith(decoder.path + ".") and dot and i.isdigit()
        (by_layer[int(i)] if inside else rest)[key] = tensor
    return by_layer, rest


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
            hint = "fetch this file again; it has changed since it was opened"
            raise ModelError(f"{name} cannot be read from {file}: {first_line(error)}", hint) from None
    return tensors


class LayerFiles:
    """Reads the layers of one model, for it and its clones. `layers_read` and `bytes_read` count what that took."""

    def __init__(self, model: Any, stored: list[dict[str, Stored]], dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.layers: list[nn.Module] = list(find_decoder(model).layers)
        self.clones: list[WeakSet[nn.Module]] = [WeakSet() for _ in self.layers]
        """Layers of clones of the model, which get the weights of these where they have none of their own."""
        self.layers_read, self.bytes_read = [0] * len(self.layers), 0
        self.resident: int | None = None
        self._stored = stored
        self._empty = [_tensors(layer) for layer in self.layers]  # names and shapes, without data
        self._unchanged = [_versions(layer) for layer in self.layers]
        self._versions = self._unchanged.copy()  # of what each layer holds now
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="layer-reader")
        self._random: dict[Any, dict[str, torch.Tensor]] | None = None  # by kind of layer, in `random_weights`
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))

    def enter_(self, i: int, ahead: Sequence[int]) -> None:
        """Load layer i's weights, drop those of the layer before, and begin to read the ones after."""
        if self._random is not None:
            self.leave_()
            _put_(self.layers[i], self._made(i, self._random))
            self.resident = i
            self._fill_clones_(i)
            return
        self._refuse_changed(i)  # here those without data, which the model may have changed before it calls them
        early, self._ahead = self._ahead, None
        tensors = early[1].result() if early else {}  # waited for also if another layer's: no third one in memory
        if early is None or early[0] != i:
            del early, tensors
            tensors = self._read(i)
        self.leave_()
        self.resident = i  # from here on, also half installed: an error leaves nothing behind
        try:
            self._install_(i, tensors)
        except BaseException:
            self._drop_()
            raise
        self.layers[i].requires_grad_(False)
        self._versions[i] = _versions(self.layers[i])
        self._fill_clones_(i)
        for j in ahead:
            self._ahead = j, self._reader.submit(self._read, j)

    def leave_(self) -> None:
        if self.resident is not None and self._random is None:
            self._refuse_changed(self.resident)
        self._drop_()

    def _drop_(self) -> None:
        if (i := self.resident) is not None:
            shared = _tensors(self.layers[i])
            for clone in self.clones[i]:
                own = _tensors(clone)
                _put_(clone, {name: self._empty[i][name] for name in shared if own.get(name) is shared[name]})
            _put_(self.layers[i], self._empty[i])
            self._versions[i] = self._unchanged[i]
        self.resident = None

    def _fill_clones_(self, i: int) -> None:
        """Put the weights in memory into the layers of clones, where these have no data of their own."""
        weights = _tensors(self.layers[i])
        for clone in self.clones[i]:
            for name, tensor in _tensors(clone).items():
                if tensor.is_meta and tensor is not self._empty[i].get(name):
                    words = f"{type(self.model).__name__} has other weights in layer {i} where layers are cut out"
                    raise ModelError(words, IN_MEMORY)
                if tensor.is_meta:
                    _put_(clone, {name: weights[name]})

    def _refuse_changed(self, i: int) -> None:
        """Changes in place would be lost when the layer is read again."""
        if _versions(self.layers[i]) != self._versions[i]:
            raise ModelError(f"{type(self.model).__name__} changes the weights of its layers as it runs", IN_MEMORY)

    def _read(self, i: int) -> dict[str, torch.Tensor]:
        tensors = _read(self._stored[i])
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        self.layers_read[i] += 1
        return tensors

    def _install_(self, i: int, tensors: dict[str, torch.Tensor]) -> None:
        """Convert stored tensors and put them into the model, by transformers' loader."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping = get_model_conversion_mapping(self.model)
        how = LoadStateDictConfig(dtype=self.dtype, device_map={"": str(self.device)}, weight_mapping=mapping)
        with loading.quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how)
        if lacking := [name for name, tensor in _tensors(self.layers[i]).items() if tensor.is_meta]:
            raise ModelError(f"layer {i} has no {lacking[0]} on disk", "fetch the checkpoint again")
        if wrong := [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]:
            raise ModelError(f"weights have changed since they were opened: {wrong[0]}", "fetch the checkpoint again")

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

    def _made(self, i: int, made: dict[Any, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        kind = type(self.layers[i]), tuple((n, t.shape, t.dtype) for n, t in self._empty[i].items())
        if kind not in made:
            drawn, made[kind] = torch.Generator().manual_seed(0), {}
            for name, empty in self._empty[i].items():
                size = 0.02 if empty.is_floating_point() else 0.0
                tensor = torch.randn(empty.shape, generator=drawn).mul_(size).to(self.device, empty.dtype)
                made[kind][name] = nn.Parameter(tensor, False) if isinstance(empty, nn.Parameter) else tensor
        return made[kind]


class LayersOnDisk:
    """The layers of a model whose weights are on disk, or of a cut clone of it: read where one of them is called."""

    def __init__(self, files: LayerFiles, model: Any, numbers: Sequence[int]) -> None:
        self.files = files
        self.layers = find_decoder(model).layers  # the list itself: a cut removes layers from it
        self.number = WeakKeyDictionary(zip(self.layers, numbers, strict=True))
        """Which of the original's layers each is."""
        self._lowest: int | None = None  # while layers are entered upwards from there and down again
        self._said = ""

        def on_demand(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def forward_with_weights(*args: Any, **kwargs: Any) -> Any:
                self.enter_(layer)
                return forward(*args, **kwargs)

            return forward_with_weights

        for layer, number in self.number.items():
            layer.__dict__.pop("forward", None)  # of the model that this is a clone of
            layer.forward = on_demand(layer, layer.forward)
            if layer is not files.layers[number]:
                files.clones[number].add(layer)

    def __deepcopy__(self, memo: Any) -> LayersOnDisk:
        return self

    def shared(self, model: Any) -> Any:
        """`decoder_stack.share` of the model whose layers these are."""
        self.files.leave_()  # what is copied are layers without data
        gc.collect()  # layers and their `forward` refer to each other: unused clones would keep their own weights
        clone = copied(model)
        clone.layers_on_disk = LayersOnDisk(self.files, clone, [self.number[layer] for layer in self.layers])
        return clone

    def enter_(self, layer: nn.Module) -> None:
        """Load the weights of one of these layers, where it lacks them."""
        number, resident = self.number[layer], self.files.resident
        if number == resident or not _lacks_weights(layer):
            return
        # read ahead is the next layer on the way, up or down, whose weights are lacking
        order = [n for one in self.layers if (n := self.number[one]) in (number, resident) or _lacks_weights(one)]
        place = order.index(number)
        below, above = order[max(0, place - 1) : place], order[place + 1 : place + 2]
        after, turn = (below, above) if resident in above else (above, below)
        if self._lowest is not None:
            after, turn = ([n for n in way if way is above or n >= self._lowest] for way in (after, turn))
            after = after or turn
        self.files.enter_(number, after)

    @contextmanager
    def up_and_down(self, i: int) -> Iterator[None]:
        """While open, layers are entered from i upwards and down again, and are read ahead so."""
        self._lowest = self.number[self.layers[i]]
        try:
            yield
        finally:
            self._lowest = None

    def load_one_by_one(self) -> Iterator[nn.Module]:
        """Each layer of the original in turn, read, for the caller to keep; afterwards nothing is on disk any more."""
        for layer in self.layers:
            self.enter_(layer)
            self.files.resident = None
            del layer.forward
            yield layer
        self.files._reader.shutdown()
        del self.files.model.layers_on_disk

    def say_once(self, words: str) -> None:
        """A line about streaming, unless it was the last one said: some searches sweep many times."""
        if words != self._said:
            say("stream", words)
        self._said = words


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers of a layer by name, the very objects."""
    return layer.state_dict(keep_vars=True)


def _lacks_weights(layer: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in _tensors(layer).values())


def _versions(layer: nn.Module) -> list[int]:
    return [tensor._version for tensor in _tensors(layer).values()]


def _put_(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, tensor)
