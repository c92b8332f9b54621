"""The weights of a model in memory: shared with a clone, put in by name, in the dtype they are saved in, counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layercut.distributed import sharding
from layercut.errors import ModelError

STREAMED = "the model's layers are left on disk: for this it has to be in memory"
STREAMED_HINT = "from disk run search, compress, tune and evaluate; with enough memory: --stream off"


def share(model: Any) -> Any:
    """A second model over the same weights: own modules and config, the very same parameters and buffers.

    Cutting or retraining layers of the clone leaves the original as it is, and memory is used once.
    """
    if getattr(model, "layers_on_disk", None):
        raise ModelError(STREAMED, STREAMED_HINT)
    return copied(model)


def copied(model: Any) -> Any:
    """Own modules and config, the very same parameters and buffers, with data or without."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


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
    """The dtype a model is saved in. It computes in this one, or in a wider one (`devices.computing_dtype`)."""
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
