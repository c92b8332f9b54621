"""Which weights are quantized, to how many bits, in groups of how many columns. Decided before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from layercut.config import GROUP_SIZES, QuantizeConfig
from layercut.errors import ConfigError, ModelError
from layercut.models.decoder_stack import find_decoder

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linear modules that choose experts: tiny, and a wrong choice costs more than a rounded weight. Left as they are."""
PACKED, WHOLE_BYTES = "pack-quantized", "naive-quantized"
"""compressed-tensors' names: codes in words of 32 bits, or each in a byte of its own."""
Width = tuple[int, int, bool]
"""Bits, columns that share a scale, and whether they share a zero point."""


@dataclass(frozen=True)
class Assignment:
    """One weight to quantize."""

    name: str
    """Dotted name of its module."""
    layer: int | None
    """Decoder layer it is in; None: embeddings or head."""
    bits: int
    group_size: int
    form: str = PACKED
    zero_points: bool = False
    """Whether each group has one."""

    @property
    def width(self) -> Width:
        """On which grids it may be."""
        return self.bits, self.group_size, self.zero_points


def plan(model: Any, config: QuantizeConfig) -> list[Assignment]:
    """Every weight that `config` asks to quantize, in the order the model uses them."""
    decoder = find_decoder(model)
    merged = [name for name, p in decoder.layers.named_parameters() if p.dim() == 3 and "experts" in name]
    if merged:  # seen with transformers 5.24: its loader then looks for packed experts, and fails
        raise ModelError(
            f"the experts of {type(model).__name__} are merged into one tensor ({merged[0]}), beside which "
            "transformers cannot load weights that compressed-tensors packed",
            "leave out --bits; layercut export RUN quantizes mixtures of experts for llama.cpp",
        )
    ends = [] if config.embedding_bits in (None, 16) else _ends(model)
    linear = [module for module in decoder.layers.modules() if isinstance(module, nn.Linear)]
    columns = [module.in_features for module in linear] + [width for _, width in ends]
    if config.one_width and config.group_size is None:
        common = next((size for size in GROUP_SIZES if not any(width % size for width in columns)), None)
        config = replace(config, group_size=common)
    elif config.group_size is not None and any(width % config.group_size for width in columns):
        sizes = _dividing(math.gcd(*columns))
        raise ConfigError(
            f"groups of {config.group_size} do not divide the columns of all weights, "
            f"{', '.join(map(str, sorted({*columns})))}",
            f"give --group-size {sizes[-1]}" if sizes else "leave out --group-size",
        )
    inside = [
        Assignment(
            full := f"{decoder.path}.{i}.{name}", i, int(config.bits), group_size(full, module.in_features, config),
            zero_points=config.zero_points,
        )
        for i, layer in enumerate(decoder.layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTERS
    ]  # fmt: skip
    if not inside:
        raise ModelError(
            f"{type(model).__name__} has no linear modules in its decoder layers that could be quantized",
            "leave out --bits; for llama.cpp, layercut export RUN --format gguf quantizes other architectures too",
        )
    if not ends:
        return inside
    form, bits = (PACKED if config.packs_embeddings else WHOLE_BYTES), config.embedding_bits or 8
    first, last = (
        Assignment(name, None, bits, group_size(name, width, config), form, config.zero_points) for name, width in ends
    )
    return [first, *inside, last]


def group_size(name: str, columns: int, config: QuantizeConfig) -> int:
    """The size asked for, or else the largest usual one that divides the columns."""
    for size in GROUP_SIZES if config.group_size is None else (config.group_size,):
        if columns % size == 0:
            return size
    fitting = _dividing(columns)
    raise ConfigError(
        f"{name} has {columns} columns, which groups of {config.group_size or GROUP_SIZES[-1]} do not divide",
        f"give --group-size {fitting[-1]}" if fitting else "this model cannot be quantized in groups",
    )


def _dividing(columns: int) -> list[int]:
    """Group sizes that divide so many columns."""
    return [size for size in range(8, min(columns, 256) + 1, 8) if columns % size == 0]


def _ends(model: Any) -> list[tuple[str, int]]:
    """Names and columns of the embeddings and the head."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    ends = []
    for module, kind in ((first, nn.Embedding), (last, nn.Linear)):
        if type(module) is not kind:
            raise ModelError(
                f"{type(model).__name__} computes its embeddings or logits in a {type(module).__name__}, "
                "which cannot be quantized",
                "leave out --embedding-bits; with --bits auto: --embedding-bits 16",
            )
        name = next(name for name, found in model.named_modules() if found is module)
        ends.append((name, module.weight.shape[1]))
    return ends
