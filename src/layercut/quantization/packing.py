"""What is stored: which weights in how many bits, their tensors in the checkpoint, and what rounding made of them.

Decided before anything is computed (`plan`). Tensors are as compressed-tensors stores them, so that stock transformers
and vLLM read them: linear weights packed into int32 words ("pack-quantized"), which transformers refuses for embeddings
beside weights of other bits: those are plain int8 ("naive-quantized"). What is computed here and what a loader will
compute are the same bits: `decode` does the loader's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from layercut.config import GROUP_SIZES, QuantizeConfig
from layercut.errors import ConfigError, ModelError
from layercut.models.decoder_stack import find_decoder, linear_by_layer, parameter_bytes, replace_parameters_
from layercut.quantization.grid import Grid, decode

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linear modules that choose experts: tiny, and a wrong choice costs more than a rounded weight. Left as they are."""
PACKED, WHOLE_BYTES = "pack-quantized", "naive-quantized"
"""compressed-tensors' names: codes in words of 32 bits, or each in a byte of its own."""
Width = tuple[int, int, bool]  # bits, columns that share a scale, and whether they share a zero point


@dataclass(frozen=True)
class Assignment:
    """One weight to quantize."""

    name: str  # of its module
    layer: int | None  # decoder layer it is in; None: embeddings or head
    bits: int
    group_size: int
    form: str = PACKED
    zero_points: bool = False  # whether each group has one

    @property
    def width(self) -> Width:
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
    linear = [*linear_by_layer(model)]
    columns = [module.in_features for _, _, module in linear] + [width for _, width in ends]
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
            name, i, int(config.bits), group_size(name, module.in_features, config), zero_points=config.zero_points
        )
        for i, name, module in linear
        if name.rpartition(".")[2] not in ROUTERS
    ]
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
    return [size for size in range(8, min(columns, 256) + 1, 8) if columns % size == 0]


def _ends(model: Any) -> list[tuple[str, int]]:
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


# --- tensors of a checkpoint ---


def require_library(*, one_width: bool = False) -> None:
    """Refuse to quantize where what is written could not be read."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        words = "quantizing needs a package that is missing: compressed-tensors"
        raise ConfigError(words, 'pip install "layercut[quantize]"') from None
    if one_width and not unpacks_while_loading():
        words = f"transformers {transformers.__version__} cannot load zero points or packed embeddings"
        raise ConfigError(words, "pip install -U transformers, or give 4 bits or more without --embedding-bits")


def unpacks_while_loading() -> bool:
    """Whether this version of transformers has the operation that unpacks each weight as it is read."""
    from transformers.integrations import compressed_tensors

    return hasattr(compressed_tensors, "CompressedTensorsDequantize")


def pack(name: str, codes: torch.Tensor, grid: Grid, form: str = PACKED) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, zero = codes.cpu(), None if grid.zero is None else grid.zero.cpu()
    stored = {"weight_scale": grid.scale.cpu().contiguous()}
    if form == WHOLE_BYTES:
        stored["weight"] = codes
    else:
        stored |= {"weight_packed": pack_to_int32(codes, grid.bits), "weight_shape": torch.tensor(codes.shape)}
    if zero is not None:
        stored["weight_zero_point"] = zero if form == WHOLE_BYTES else pack_to_int32(zero, grid.bits, 0)
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}


def grids(packed: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, Grid]]:
    """Codes and grids that packed tensors hold: the inverse of `pack`. A head that reads an embedding's is left out."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    found = {}
    for group in config["config_groups"].values():
        bits, size = group["weights"]["num_bits"], group["weights"]["group_size"]
        for name in group["targets"]:
            scale, zero = packed[f"{name}.weight_scale"], packed.get(f"{name}.weight_zero_point")
            if f"{name}.weight_packed" in packed:
                shape = torch.Size(packed[f"{name}.weight_shape"].tolist())
                codes = unpack_from_int32(packed[f"{name}.weight_packed"], bits, shape)
                zero = None if zero is None else unpack_from_int32(zero, bits, scale.shape, 0)
            elif f"{name}.weight" in packed:
                codes = packed[f"{name}.weight"]
            else:
                continue
            found[name] = codes, Grid(scale, zero, bits, size)
    return found


def quantized_weights(packed: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights [O, I] that packed tensors encode, as any loader computes them; with norms that were trained."""
    require_library()
    described = {name for group in config["config_groups"].values() for name in group["targets"]}
    plain = {key: tensor for key, tensor in packed.items() if key.rpartition(".")[0] not in described}
    return {f"{name}.weight": decode(*found) for name, found in grids(packed, config).items()} | plain


def quantization_config(
    targets: Sequence[Assignment], left: Sequence[str], *, one_width: bool = False
) -> dict[str, Any]:
    """What config.json must say for a loader to read the packed weights: one group of modules for each kind of grid.

    left: linear modules that stay as they are; vLLM fails where one is neither in a group nor in `ignore`.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    kinds: dict[tuple[int, int, bool, str], list[str]] = {}
    for target in targets:
        kinds.setdefault((*target.width, target.form), []).append(target.name)
    groups = {}
    for number, (kind, names) in enumerate(sorted(kinds.items())):
        bits, size, zero_points, form = kind
        args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=size, symmetric=not zero_points)
        groups[f"group_{number}"] = QuantizationScheme(targets=names, weights=args, format=form)
    forms = {kind[-1] for kind in kinds}
    described = QuantizationConfig(
        config_groups=groups, format=forms.pop() if len(forms) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED, ignore=list(left),
    ).model_dump(mode="json")  # fmt: skip
    return described | {"dequantize": True} if one_width else described


def stored_bytes(target: Assignment, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor that `pack` will make of a weight."""
    rows, columns = shape
    groups, whole = columns // target.group_size, target.form == WHOLE_BYTES
    parts = {"weight_scale": rows * groups * dtype.itemsize}
    if whole:
        parts["weight"] = rows * columns
    else:
        parts |= {"weight_packed": rows * -(-columns * target.bits // 32) * 4, "weight_shape": 2 * 8}
    if target.zero_points:
        parts["weight_zero_point"] = rows * groups if whole else -(-rows * target.bits // 32) * 4 * groups
    return {f"{target.name}.{name}": count for name, count in parts.items()}


class SavedBytes(NamedTuple):
    """Of the weights in a checkpoint, its file's header aside."""

    layers: list[int]
    total: int


def saved_bytes(model: Any, config: QuantizeConfig, dtype: torch.dtype) -> SavedBytes:
    """What `quantize_` will make of a model, to the byte, where bits are not chosen for a size. Needs no weights."""
    layers = [parameter_bytes(layer, dtype) for layer in find_decoder(model).layers]
    total, done = parameter_bytes(model, dtype), set[int]()
    for target in plan(model, config) if config.rounds else []:
        weight = model.get_submodule(target.name).weight
        parts = stored_bytes(target, tuple(weight.shape), dtype)
        change = sum(parts.values())
        if id(weight) not in done:
            change -= weight.numel() * min(weight.itemsize, dtype.itemsize)
        else:  # a tied head: its codes are the embeddings'; in whole bytes scales are stored again, as loaders ask
            change = change - parts[f"{target.name}.weight"] if target.form == WHOLE_BYTES else 0
        done.add(id(weight))
        total += change
        if target.layer is not None:
            layers[target.layer] += change
    return SavedBytes(layers, total)


# --- what was made ---


@dataclass(frozen=True)
class QuantizedWeight:
    """What became of one weight W [O, I], Q after rounding."""

    name: str
    """Dotted name of its module."""
    method: str
    """The quantizer: "gptq", "rtn" or another's name."""
    bits: int
    group_size: int
    """Columns that share a scale."""
    bytes: int
    """Codes, scales and zero points, as stored."""
    weight_error: float
    """||W - Q||² / ||W||²"""
    output_error: float | None
    """||(W - Q) X'||² / ||W X'||² on the calibration inputs X; None where it was not calibrated."""
    rtn_output_error: float | None
    """The same of rounding to nearest."""


@dataclass(frozen=True)
class Quantized:
    """A model with rounded weights, and the tensors that a checkpoint stores in their place."""

    model: Any = field(repr=False)
    """A plain causal LM whose weights are the rounded ones, to the bit those that a loader computes."""
    packed: Mapping[str, torch.Tensor] = field(repr=False)
    """The stored tensors by name, as compressed-tensors packs them; on the CPU."""
    config: Mapping[str, Any] = field(repr=False)
    """`quantization_config` for config.json."""
    weights: tuple[QuantizedWeight, ...] = field(repr=False)
    """In the order in which they were rounded."""
    left: tuple[str, ...]
    """Matrices in the decoder layers that stay as they were, such as routers."""
    bytes_before: int
    """All weights as saved, tied ones counted once."""
    bytes_after: int
    settings: Mapping[str, Any]
    """What was asked: bits, quantizer, group_size, embedding_bits, bits_allowed; and whether there are zero_points."""
    mixture: Mapping[str, Any] | None = field(default=None, repr=False)
    """Where bits were chosen for a size: the estimated KL of all together, and of each weight at each width."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and its tensors, fit for JSON; what a run keeps as quantize.json."""
        return {
            **self.settings,
            "mixture": self.mixture and dict(self.mixture),
            "layers": [asdict(row) for row in self.weights],
            "left": list(self.left),
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "quantization_config": dict(self.config),
        }

    @classmethod
    def restored(cls, model: Any, packed: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Quantized:
        """From packed tensors and `to_dict`; `model`, as it was before it was rounded, is changed in place."""
        own = dict(facts)
        mixture, weights, left, size, config = (
            own.pop(name) for name in ("mixture", "layers", "left", "bytes", "quantization_config")
        )
        replace_parameters_(model, quantized_weights(packed, config))
        rows = tuple(QuantizedWeight(**row) for row in weights)
        return cls(model, packed, config, rows, tuple(left), size["before"], size["after"], own, mixture)
