"""What every decoder-only model in memory has: a stack of layers, a number of positions, a vocabulary, and weights.

Weights are shared with a clone, put in by name, brought to the dtype that they are saved in, and counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layercut.distributed import sharding
from layercut.errors import ModelError
from layercut.models.config_files import COUNTS, POSITIONS

OTHER_TOWERS = ("vision", "visual", "audio", "encoder", "image", "speech", "mtp", "depth_decoder")
"""Parts of a model whose layers are not the decoder's, by a word in their path."""
REPORTED_WINDOW = 2048
"""Tokens in the windows that perplexities are reported on, where a model reaches so far: the field's length."""
BEHIND_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Model types whose first token has the position behind the padding's: that many fewer are left."""


@dataclass(frozen=True)
class Decoder:
    """Where a model keeps its decoder layers."""

    path: str  # dotted name of the list inside the model, e.g. "model.layers"
    layers: Any  # an nn.ModuleList; a few architectures keep an nn.ModuleDict
    config: Any  # the (text) config that counts these layers

    def __len__(self) -> int:
        return len(self.layers)


def find_decoder(model: Any) -> Decoder:
    """The list of decoder layers of any architecture, in the text model, and the config that counts them."""
    config = model.config.get_text_config(decoder=True)
    counts = {value for name in COUNTS if isinstance(value := getattr(config, name, None), int)}
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts
    ]
    # BERT's relatives keep their decoder under `encoder`: only prefer what is in no other tower
    lists = [item for item in lists if not any(word in item[0] for word in OTHER_TOWERS)] or lists
    if not lists:
        raise ModelError(
            f"no stack of {' or '.join(map(str, sorted(counts))) or 'any number of'} decoder layers "
            f"was found in {type(model).__name__}",
            "this architecture is not supported; see research/families.md for those that are",
        )
    # of nested lists the outermost is the stack; of several, the one that weighs most
    path, layers = max(lists, key=lambda item: (-item[0].count("."), sum(p.numel() for p in item[1].parameters())))
    return Decoder(path, layers, config)


def linear_by_layer(model: Any) -> Iterator[tuple[int, str, nn.Linear]]:
    """Linear modules in decoder layers: the layer, the name in the model, the module."""
    decoder = find_decoder(model)
    for i, layer in enumerate(decoder.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                yield i, f"{decoder.path}.{i}.{name}", module


def count_layers(config: Any) -> int:
    """L, the number of decoder layers that a config promises; the model's own stack has the last word."""
    text = config.get_text_config(decoder=True)
    for name in COUNTS:
        if isinstance(value := getattr(text, name, None), int):
            return value
    words = f"the config of this {config.model_type!r} does not count its layers ({', '.join(COUNTS)})"
    raise ModelError(words, "use the model's own config.json")


def positions(config: Any) -> int | None:
    """How many tokens in a row a model has positions for; None where its config sets no limit."""
    text = config.get_text_config()
    found = (value for name in POSITIONS if isinstance(value := getattr(text, name, None), int) and value > 0)
    limit = next(found, None)
    if limit is not None and text.model_type in BEHIND_PADDING:
        limit -= (text.pad_token_id or 0) + 1
    return limit


def reported_window(config: Any) -> int:
    """Tokens in a window that perplexity is reported on, where the user asks for none."""
    return min(REPORTED_WINDOW, positions(config) or REPORTED_WINDOW)


def check_tokens(tokens: torch.Tensor, config: Any, name: str) -> None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        worst = int(tokens.max()) if int(tokens.max()) >= size else int(tokens.min())
        words = f"the tokenizer of {name} gives token {worst:,}, and the model's vocabulary has {size:,}"
        raise ModelError(words, "give the tokenizer files that belong to this model")


# --- weights --------------------------------------------------------------------------------------------------------


def share(model: Any) -> Any:
    """A second model over the same weights: own modules and config, the very same parameters and buffers.

    Cutting or retraining layers of the clone leaves the original as it is, and memory is used once.
    """
    if disk := getattr(model, "layers_on_disk", None):
        return disk.shared(model)
    return copied(model)


def copied(model: Any) -> Any:
    """Own modules and config, the very same parameters and buffers, with data or without."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def refuse_on_disk(on_disk: Any) -> None:
    """Refuse layers that are left on disk, or would be, where the work needs all of them in memory."""
    if on_disk:
        words = "the model's layers are left on disk: for this it has to be in memory"
        raise ModelError(words, "from disk run search, compress, tune and evaluate; with enough memory: --place memory")


def replace_parameters_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put new parameters in by name, also where they are tied to another name; tensors of other models stay."""
    everywhere = list(model.named_parameters(remove_duplicate=False))
    resident = next(parameter.device for _, parameter in everywhere if not parameter.is_meta)
    for name, weight in weights.items():
        old = model.get_parameter(name)  # of a layer on disk, it has no data
        new = sharding.like(old, weight.to(resident) if old.is_meta else weight)
        for place in [name, *(other for other, parameter in everywhere if parameter is old and other != name)]:
            owner, _, attribute = place.rpartition(".")
            setattr(model.get_submodule(owner), attribute, new)


def convert_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model's parameters to a dtype, in place.

    Never model.to(dtype): that would round the rotary frequencies too, a buffer which a reload keeps in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def stored_dtype(model: Any) -> torch.dtype:
    """The dtype a model is saved in. It computes in this one, or in a wider one (`loading.computing_dtype`)."""
    return getattr(model, "stored_dtype", None) or model.dtype


def weight_as_stored(weight: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """A weight in the dtype that its model is saved in, or itself where it has values that this one does not hold."""
    narrow = weight.to(stored)
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight


def as_stored(model: Any) -> Any:
    """The model in the dtype it is saved in: itself, or a copy where it computes in a wider one.

    Nothing is lost: what is loaded, folded, tuned or quantized is rounded to this format at once. A weight with other
    values, as a class may keep some in float32, stays as it is; beside a cut it is tuned as it is.
    """
    stored = stored_dtype(model)
    if stored == model.dtype:
        return model
    refuse_on_disk(getattr(model, "layers_on_disk", None))
    narrow, new = share(model), {}
    for module in narrow.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in new:
                kept = weight_as_stored(parameter.detach(), stored)
                new[id(parameter)] = nn.Parameter(kept, requires_grad=False)
            setattr(module, name, new[id(parameter)])
    return narrow


def parameter_count(model: nn.Module) -> int:
    """Number of weights, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def parameter_bytes(model: nn.Module, stored: torch.dtype | None = None) -> int:
    """Bytes of the weights as saved, tied ones counted once."""
    number = stored or getattr(model, "stored_dtype", None)
    return sum(p.numel() * min(p.itemsize, number.itemsize if number else p.itemsize) for p in model.parameters())


@contextmanager
def as_just_loaded(model: Any) -> Iterator[None]:
    """While open, the head's weight takes gradients, as transformers leaves it; for generation, which computes none.

    Of rows that are not contiguous, as the last token's of a prompt, torch multiplies each by a copy of a weight that
    takes no gradients: with 512 tokens of SmolLM2-135M in bfloat16 on a CPU that was an eighth of the prefill.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    weights = [weight] if isinstance(weight, nn.Parameter) and weight.is_floating_point() else []
    with taking_gradients([weight for weight in weights if not weight.is_inference()], True):
        yield


@contextmanager
def taking_gradients(weights: Sequence[nn.Parameter], flag: bool) -> Iterator[None]:
    """While open, the weights take gradients, or none does; afterwards those do that did before."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(flag)
        yield
    finally:
        for weight, own in zip(weights, before, strict=True):
            weight.requires_grad_(own)
