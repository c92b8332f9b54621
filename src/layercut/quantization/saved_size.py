"""How many bytes a model takes once it is rounded to given bits: from shapes alone, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layercut.config import QuantizeConfig
from layercut.models import decoder_stack, model_weights
from layercut.quantization.assignment import WHOLE_BYTES, Assignment, plan
from layercut.quantization.packing import stored_bytes


@dataclass(frozen=True)
class SavedBytes:
    """Of the weights in a checkpoint, its file's header aside."""

    layers: tuple[int, ...]
    """Of each decoder layer."""
    total: int
    more: tuple[int, ...] = ()
    """What a layer takes more where it stands beside a cut, the dearest first; empty where all have the same bits."""

    def beside(self, endpoints: int) -> int:
        """Of all, where so many layers stand beside cuts: the dearest, so that it is no more."""
        return self.total + sum(self.more[:endpoints])


def saved_bytes(model: Any, config: QuantizeConfig, dtype: torch.dtype, *, endpoints: Sequence[int] = ()) -> SavedBytes:
    """What `quantize_` will make of a model, to the byte, where bits are not chosen for a size."""
    decoder = decoder_stack.find_decoder(model)
    targets = plan(model, config, endpoints) if config.rounds else []
    saved = [model_weights.parameter_bytes(layer, dtype) for layer in decoder.layers]
    total, done = model_weights.parameter_bytes(model, dtype), set[int]()
    for target in targets:
        weight = model.get_submodule(target.name).weight
        plain = weight.numel() * min(weight.itemsize, dtype.itemsize)
        parts = stored_bytes(target, tuple(weight.shape), dtype)
        again = target.layer is None and id(weight) in done
        change = _of_tied_head(target, parts) if again else sum(parts.values()) - plain
        done.add(id(weight))
        total += change
        if target.layer is not None:
            saved[target.layer] += change
    return SavedBytes(tuple(saved), total)


def _of_tied_head(target: Assignment, parts: dict[str, int]) -> int:
    """Bytes beside the codes, which are the embeddings': in whole bytes scales are stored again, as loaders ask."""
    return sum(parts.values()) - parts[f"{target.name}.weight"] if target.form == WHOLE_BYTES else 0


def saved_bytes_of_any_cut(model: Any, config: QuantizeConfig, dtype: torch.dtype) -> SavedBytes:
    """The same where it is not known yet which layers stand beside a cut."""
    layers = decoder_stack.find_decoder(model).layers
    plain = saved_bytes(model, config, dtype, endpoints=[len(layers)])  # none of them
    if not (config.rounds and config.endpoint_bits):
        return plain
    if config.endpoint_bits == 16:
        alone = tuple(model_weights.parameter_bytes(layer, dtype) for layer in layers)
    else:
        alone = saved_bytes(model, config, dtype, endpoints=range(len(layers))).layers
    return replace(plain, more=tuple(sorted((a - b for a, b in zip(alone, plain.layers, strict=True)), reverse=True)))
