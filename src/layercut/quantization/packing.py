"""Codes and grids as compressed-tensors stores them, so that stock transformers (and vLLM) can read them.

Linear weights are packed into int32 words ("pack-quantized"), which transformers refuses for embeddings: those are
stored as plain int8 ("naive-quantized"). What is computed here and what a loader will compute are the same bits:
`decode` does the loader's arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from layercut.config import QuantizeConfig
from layercut.errors import ConfigError
from layercut.models.decoder_stack import find_decoder
from layercut.models.model_weights import parameter_bytes
from layercut.quantization.assignment import WHOLE_BYTES, Assignment, plan
from layercut.quantization.grid import Grid


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


def pack(target: Assignment, codes: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """A weight's tensors as they go into the checkpoint."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    stored = {"weight_scale": grid.scale.contiguous()}
    if target.form == WHOLE_BYTES:
        stored["weight"] = codes
    else:
        stored["weight_packed"] = pack_to_int32(codes, grid.bits)
        stored["weight_shape"] = torch.tensor(codes.shape)
    if grid.zero is not None:
        stored["weight_zero_point"] = (
            grid.zero if target.form == WHOLE_BYTES else pack_to_int32(grid.zero, grid.bits, 0)
        )
    return {f"{target.name}.{name}": tensor.cpu() for name, tensor in stored.items()}


def stored_bytes(target: Assignment, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor that `pack` will make of a weight."""
    rows, columns = shape
    groups = columns // target.group_size
    parts = {"weight_scale": rows * groups * dtype.itemsize}
    if target.form == WHOLE_BYTES:
        parts["weight"] = rows * columns
    else:
        parts |= {"weight_packed": rows * -(-columns * target.bits // 32) * 4, "weight_shape": 2 * 8}
    if target.zero_points:
        whole = target.form == WHOLE_BYTES
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


def quantized_weights(packed: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights [O, I] that packed tensors encode, as any loader computes them."""
    require_library()
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights = {}
    described: set[str] = set()
    for group in config["config_groups"].values():
        scheme = QuantizationScheme.model_validate(group)
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        for name in group["targets"]:
            described.add(name)
            own = {key.removeprefix(f"{name}."): t for key, t in packed.items() if key.startswith(f"{name}.weight")}
            if "weight" in own or "weight_packed" in own:  # else a head that reads the embedding's codes
                weights[f"{name}.weight"] = compressor.decompress(own, scheme)["weight"]
    plain = {key: tensor for key, tensor in packed.items() if key.rpartition(".")[0] not in described}
    return weights | plain  # norms, which were trained with the scales


def grids(packed: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, Grid]]:
    """Codes and grids that packed tensors hold: the inverse of `pack`."""
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


def repacked(
    packed: Mapping[str, torch.Tensor], changed: Mapping[str, tuple[torch.Tensor, Grid]]
) -> dict[str, torch.Tensor]:
    """The tensors of packed weights with other codes and scales."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    found: dict[str, torch.Tensor] = {}
    for name, (codes, grid) in changed.items():
        form = "weight_packed" if f"{name}.weight_packed" in packed else "weight"
        stored = pack_to_int32(codes.cpu(), grid.bits) if form == "weight_packed" else codes.cpu()
        found |= {f"{name}.{form}": stored, f"{name}.weight_scale": grid.scale.cpu().contiguous()}
    return found


def quantization_config(
    targets: Sequence[Assignment], left: Sequence[str], *, one_width: bool = False
) -> dict[str, Any]:
    """What config.json must say for a loader to read the packed weights: one group of modules for each kind of grid.

    vLLM fails where it finds a linear module that is neither in a group nor in `ignore`.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    groups: dict[str, Any] = {}
    for kind in sorted({_kind(target) for target in targets}):
        bits, group_size, zero_points, form = kind
        args = QuantizationArgs(
            num_bits=bits, type="int", strategy="group", group_size=group_size, symmetric=not zero_points
        )
        names = [target.name for target in targets if _kind(target) == kind]
        groups[f"group_{len(groups)}"] = QuantizationScheme(targets=names, weights=args, format=form)
    forms = {target.form for target in targets}
    form = forms.pop() if len(forms) == 1 else "mixed-precision"
    config = QuantizationConfig(
        config_groups=groups, format=form, quantization_status=QuantizationStatus.COMPRESSED, ignore=list(left)
    )
    described = config.model_dump(mode="json")
    return described | {"dequantize": True} if one_width else described


def _kind(target: Assignment) -> tuple[int, int, bool, str]:
    return *target.width, target.form
