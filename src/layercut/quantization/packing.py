"""Codes and grids as compressed-tensors stores them, so that stock transformers (and vLLM) can read them.

Linear weights are packed into int32 words ("pack-quantized"), which transformers refuses for embeddings beside weights
of other bits: those are stored as plain int8 ("naive-quantized"). What is computed here and what a loader will compute
are the same bits: `decode` does the loader's arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from layercut.config import QuantizeConfig
from layercut.errors import ConfigError
from layercut.models.decoder_stack import find_decoder, parameter_bytes
from layercut.quantization.assignment import PACKED, WHOLE_BYTES, Assignment, plan
from layercut.quantization.grid import Grid, decode


def require_library(*, one_width: bool = False) -> None:
    """Refuse to quantize where what is written could not be read."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise ConfigError(
            "quantizing needs a package that is missing: compressed-tensors", 'pip install "layercut[quantize]"'
        ) from None
    if one_width and not unpacks_while_loading():
        raise ConfigError(
            f"transformers {transformers.__version__} cannot load zero points or packed embeddings",
            "pip install -U transformers, or give 4 bits or more without --embedding-bits",
        )


def unpacks_while_loading() -> bool:
    """Whether this version of transformers has the operation that unpacks each weight as it is read."""
    from transformers.integrations import compressed_tensors

    return hasattr(compressed_tensors, "CompressedTensorsDequantize")


def pack(name: str, codes: torch.Tensor, grid: Grid, form: str = PACKED) -> dict[str, torch.Tensor]:
    """A module's tensors as they go into the checkpoint."""
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


# --- bytes, from shapes alone ---


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


@dataclass(frozen=True)
class SavedBytes:
    """Of the weights in a checkpoint, its file's header aside."""

    layers: tuple[int, ...]
    """Of each decoder layer."""
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
    return SavedBytes(tuple(layers), total)
