"""Which weights are quantized, to how many bits, in groups of how many columns. Decided before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def plan(model: Any, config: QuantizeConfig, endpoints: Sequence[int] = ()) -> list[Assignment]:
    """Every weight that `config` asks to quantize, in the order the model uses them."""
    decoder = find_decoder(model)
    merged = [name for name, p in decoder.layers.named_parameters() if p.dim() == 3 and "experts" in name]
    if merged:  # seen with transformers 5.24: its loader then looks for packed experts, and fails
        raise ModelError(
            f"the experts of {type(model).__name__} are merged into one tensor ({merged[0]}), beside which "
            "transformers cannot load weights that compressed-tensors packed",
            "leave out --bits; layercut export RUN quantizes mixtures of experts for llama.cpp",
        )
    if config.endpoint_bits and not endpoints:
        raise ConfigError("--endpoint-bits is given, but this model has no cut", "leave out --endpoint-bits")
    ends, zeros = _ends(model) if config.quantize_embeddings else [], config.zero_points
    if config.one_width and config.group_size is None:
        config = replace(config, group_size=_common_group_size([*_columns(decoder.layers), *(e[1] for e in ends)]))
    elif config.group_size is not None:
        _check_group_size(config.group_size, [*_columns(decoder.layers), *(width for _, width in ends)])
    inside: list[Assignment] = []
    for i, layer in enumerate(decoder.layers):
        bits = config.endpoint_bits if i in endpoints and config.endpoint_bits else int(config.bits)
        for name, module in layer.named_modules():
            if bits < 16 and isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTERS:
                full = f"{decoder.path}.{i}.{name}"
                group = group_size(full, module.in_features, config)
                inside.append(Assignment(full, i, bits, group, zero_points=zeros))
    if not inside:
        raise ModelError(
            f"{type(model).__name__} has no linear modules in its decoder layers that could be quantized",
            "leave out --bits; for llama.cpp, layercut export RUN --format gguf quantizes other architectures too",
        )
    if not ends:
        return inside
    form, bits = (PACKED if config.packs_embeddings else WHOLE_BYTES), config.embedded_in
    first, last = (Assignment(name, None, bits, group_size(name, width, config), form, zeros) for name, width in ends)
    return [first, *inside, last]


def _check_group_size(size: int, columns: Sequence[int]) -> None:
    """Refuse groups that do not divide all columns; the hint is of such as do."""
    if any(width % size for width in columns):
        common = math.gcd(*columns)
        fitting = [each for each in range(8, min(common, 256) + 1, 8) if common % each == 0]
        raise ConfigError(
            f"groups of {size} do not divide the columns of all weights, {', '.join(map(str, sorted({*columns})))}",
            f"give --group-size {fitting[-1]}" if fitting else "leave out --group-size",
        )


def _columns(layers: nn.Module) -> list[int]:
    """Columns of the linear modules."""
    return [module.in_features for module in layers.modules() if isinstance(module, nn.Linear)]


def _common_group_size(columns: Sequence[int]) -> int | None:
    """The largest usual size that divides all; None where none does."""
    return next((size for size in GROUP_SIZES if not any(width % size for width in columns)), None)


def _ends(model: Any) -> list[tuple[str, int]]:
    """Names and columns of the embeddings and the head."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    ends = []
    for module, kind in ((first, nn.Embedding), (last, nn.Linear)):
        if type(module) is not kind:
            raise ModelError(
                f"{type(model).__name__} computes its embeddings or logits in a {type(module).__name__}, "
                "which cannot be quantized",
                "leave out --quantize-embeddings; of --bits auto: --embedding-bits 16",
            )
        name = next(name for name, found in model.named_modules() if found is module)
        ends.append((name, module.weight.shape[1]))
    return ends


def group_size(name: str, columns: int, config: QuantizeConfig) -> int:
    """The size asked for, or else the largest usual one that divides the columns."""
    for size in GROUP_SIZES if config.group_size is None else (config.group_size,):
        if columns % size == 0:
            return size
    fitting = [size for size in range(8, min(columns, 256) + 1, 8) if columns % size == 0]
    raise ConfigError(
        f"{name} has {columns} columns, which groups of {config.group_size or GROUP_SIZES[-1]} do not divide",
        f"give --group-size {fitting[-1]}" if fitting else "this model cannot be quantized in groups",
    )


def left_as_they_are(model: Any, targets: Sequence[Assignment]) -> list[str]:
    """Matrices and larger in the decoder layers that no target covers, such as routers and convolutions."""
    decoder = find_decoder(model)
    done = {f"{target.name}.weight" for target in targets}
    names = (f"{decoder.path}.{name}" for name, p in decoder.layers.named_parameters() if p.dim() >= 2)
    return [name for name in names if name not in done]


def linear_left(model: Any, targets: Sequence[Assignment]) -> list[str]:
    """Linear modules anywhere in the model that no target covers: routers, layers left at 16 bits, the head."""
    done = {target.name for target in targets}
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in done]
