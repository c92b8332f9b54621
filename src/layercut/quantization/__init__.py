"""Quantize: store the weights in 8 to 2 bits each. After healing, before the last measurement.

    found = quantize(model, tokens, bits=4)

`found.model` is a plain model whose weights are the rounded ones, to the bit those that a reload will compute;
`found.packed` are the tensors for the checkpoint. Weights only: activations stay in the model's dtype.

One decoder layer after another, each calibrated on what the quantized layers before it compute: `calibration.py`.
Which weights and in what format: `packing.py`, for a size `bit_choice.py`; the points a weight may take: `grid.py`;
which point: `quantizers.py`. What can be trained afterwards: `trainable.py`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import nn

from layercut.config import NEAR_ENOUGH, Bits, EmbeddingBits, QuantizeConfig
from layercut.errors import ConfigError, DataError, ModelError
from layercut.files import parse_bytes
from layercut.models import decoder_stack
from layercut.models.decoder_stack import replace_parameters_, stored_dtype
from layercut.models.memory import memory_limit
from layercut.models.runner import DecoderRunner, model_of
from layercut.progress import bar
from layercut.quantization.bit_choice import CHOSEN_AMONG, choose
from layercut.quantization.calibration import each_with_hessian, hessian_of_head, token_weights
from layercut.quantization.grid import decode, encode, fit_grid
from layercut.quantization.packing import (
    WHOLE_BYTES,
    Assignment,
    Quantized,
    QuantizedWeight,
    pack,
    plan,
    quantization_config,
    quantized_weights,
    require_library,
)
from layercut.quantization.quantizers import RECIPE, Quantizer, output_errors, quantized, resolve, with_ridge

__all__ = ["Quantized", "QuantizedWeight", "Quantizer", "quantize", "quantize_", "quantized_weights"]


def recipe(config: QuantizeConfig) -> list[Any]:
    """What decides beside the options how calibrated weights are rounded: an older run's are rounded anew."""
    return [] if not config.small else RECIPE + (CHOSEN_AMONG if config.bits == "auto" else [])


def quantize(
    model: Any,
    tokens: torch.Tensor | None = None,
    *,
    bits: Literal[8, 6, 4, 3, 2, "auto"],
    quantizer: str | Quantizer = "gptq",
    group_size: int | None = None,
    embedding_bits: EmbeddingBits | None = None,
    bits_allowed: str = "16,8,6,4,3,2",
    target_size: str | None = None,
) -> Quantized:
    """Round the weights of the decoder layers to a few bits; `model` stays as it is.

    Args:
        model: a causal LM of transformers in memory, or a DecoderRunner of one.
        tokens: calibration token ids [N, T]; needed below 8 bits where the quantizer is calibrated, as gptq is.
        bits: bits of a weight. "auto": of each weight those that cost least KL within `target_size`.
        quantizer: a name of `layercut.quantizers` ("gptq", "rtn", one of a package), or a class or function as
            `quantization/quantizers.py` describes it. A calibrated one is for fewer than 8 bits.
        group_size: columns that share a scale; None: the largest of 128, 64 and 32 that divides a weight's columns, or
            all weights' where all must have the same.
        embedding_bits: bits of embeddings and head: 8, or as `bits`; None or 16: they stay as they are, but that with
            "auto" None means chosen too.
        bits_allowed: what "auto" chooses among.
        target_size: of the checkpoint's weights, at most, as "60MB"; with "auto".

    Returns:
        A clone with the rounded weights, the packed tensors, and what became of each weight.

    Raises:
        ConfigError: compressed-tensors is missing, an unknown quantizer, no tokens for a calibrated one, or a group
            size that does not divide a weight's columns.
        DataError: tokens that are not [N, T] token ids.
        ModelError: nothing that could be quantized, weights that are not finite, tokens outside the vocabulary, or
            (calibrated) a model that cannot be run layer by layer.
    """
    if bits not in (allowed := (*(each for each in get_args(Bits) if each < 16), "auto")):
        words = f"bits={bits!r} is not among what weights can be stored in"
        raise ConfigError(words, f"allowed are {', '.join(map(str, allowed))}")
    if (target_size is None) == (bits == "auto"):
        given = "is given with bits that are fixed" if target_size else "is missing, and bits='auto' chooses for a size"
        raise ConfigError(f"target_size {given}", "give both, or neither: bits='auto', target_size='60MB'")
    own = {"quantizer": quantizer} if isinstance(quantizer, str) else {}
    config = QuantizeConfig(
        bits=bits, group_size=group_size, embedding_bits=embedding_bits, bits_allowed=bits_allowed, **own
    )
    given = model_of(model)
    decoder_stack.refuse_on_disk(getattr(given, "layers_on_disk", None))
    clone = decoder_stack.share(given).eval()
    target = parse_bytes("target_size", str(target_size)) if target_size else None
    return quantize_(clone, tokens, config, quantizer=None if own else quantizer, target=target)


@torch.no_grad()
def quantize_(
    model: Any,
    tokens: torch.Tensor | None,
    config: QuantizeConfig,
    *,
    quantizer: str | Quantizer | None = None,
    target: int | None = None,
) -> Quantized:
    """`quantize` in place: new parameters are put in, tensors that another model shares stay, ties are kept."""
    require_library(one_width=config.one_width)
    method = resolve(quantizer or config.quantizer)
    calibrated = method[1].needs_calibration and config.small
    _check_tokens(model, tokens, method[0] if calibrated else None, target)
    if config.bits != "auto":
        targets, mixture, one_width = plan(model, config), None, config.one_width
    elif tokens is None or target is None:
        raise ConfigError("bits are to be chosen, and no size is given", "give --target-size, as 60MB")
    else:
        mixture = choose(model, tokens, config, target)
        targets, one_width = list(mixture.targets), mixture.one_width
        require_library(one_width=one_width)
    covered = {target.name for target in targets}
    decoder, before = decoder_stack.find_decoder(model), decoder_stack.parameter_bytes(model)
    matrices = (f"{decoder.path}.{name}" for name, p in decoder.layers.named_parameters() if p.dim() >= 2)
    left = tuple(name for name in matrices if name.removesuffix(".weight") not in covered)
    linear_left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in covered]
    rows, packed = list[QuantizedWeight](), dict[str, torch.Tensor]()

    def quantize_one(target: Assignment, hessian: torch.Tensor | None) -> None:
        row, stored, weight = _quantize_weight(model, target, hessian, method)
        rows.append(row)
        packed.update(stored)
        replace_parameters_(model, {f"{target.name}.weight": weight})

    tokens = tokens if calibrated else None
    ends = [target for target in targets if target.layer is None]
    head = model.get_output_embeddings()
    read = [
        target.name for target in targets
        if target.bits < NEAR_ENOUGH and isinstance(model.get_submodule(target.name), nn.Linear)
    ]  # fmt: skip
    with memory_limit(), bar("quantizing", len(decoder)) as advance:
        counts = {} if tokens is None or not read else token_weights(model, tokens, read)
        if ends:
            first, last = ends[0], ends[-1]
            tied = len(ends) > 1 and model.get_submodule(first.name).weight is model.get_submodule(last.name).weight
            hessian = None
            if tokens is not None and last.bits < NEAR_ENOUGH and model.get_submodule(last.name) is head:
                hessian = hessian_of_head(DecoderRunner(model), tokens, counts.get(last.name))
            quantize_one(first, hessian if tied or first is last else None)
            if tied and first.form == WHOLE_BYTES:  # packed weights are unpacked while loading, then tied
                packed[f"{last.name}.weight_scale"] = packed[f"{first.name}.weight_scale"].clone()
            elif len(ends) > 1 and not tied:
                quantize_one(last, hessian)
        inside = groupby((target for target in targets if target.layer is not None), lambda target: target.layer)
        wanted = {layer: {target.name: target for target in group} for layer, group in inside if layer is not None}
        if tokens is not None and read:
            for i, name, hessian in each_with_hessian(DecoderRunner(model), tokens, wanted, read, advance, counts):
                quantize_one(wanted[i][name], hessian)
        else:
            for group in wanted.values():
                for one in group.values():
                    quantize_one(one, None)
                advance(1)
    described = quantization_config(
        [target for target in targets if f"{target.name}.weight_scale" in packed], linear_left, one_width=one_width
    )  # without a packed, tied head
    rounded = {id(model.get_submodule(row.name).weight) for row in rows}
    kept = sum(
        p.numel() * min(stored_dtype(model).itemsize, p.itemsize) for p in model.parameters() if id(p) not in rounded
    )
    after = kept + sum(tensor.nbytes for tensor in packed.values())
    asked = vars(config) | {"quantizer": method[0], "zero_points": any(target.zero_points for target in targets)}
    chosen = mixture.to_dict() if mixture else None
    return Quantized(model, packed, described, tuple(rows), left, before, after, asked, chosen)


def _check_tokens(model: Any, tokens: Any, calibrated: str | None, target: int | None) -> None:
    """Refuse what is not [N, T] token ids of this model, and none where they are needed."""
    if not isinstance(tokens, torch.Tensor | None):
        raise DataError(f"tokens are a {type(tokens).__name__}; allowed are token ids [N, T]", "torch.tensor(rows)")
    if tokens is None or not tokens.numel():
        if calibrated or target:
            who = f"the quantizer {calibrated} is calibrated" if calibrated else "the choice of bits is measured"
            raise ConfigError(f"{who} on tokens, and none are given", "give tokens [N, T]")
        return
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        got = f"{list(tokens.shape)} of {str(tokens.dtype).removeprefix('torch.')}"
        raise DataError(f"tokens are {got}; wanted are token ids [N, T] of int64", "layercut.token_blocks makes them")
    decoder_stack.check_tokens(tokens, model.config, type(model).__name__)


def _quantize_weight(
    model: Any, target: Assignment, hessian: torch.Tensor | None, method: tuple[str, Quantizer]
) -> tuple[QuantizedWeight, dict[str, torch.Tensor], torch.Tensor]:
    weight, (name, quantizer) = model.get_submodule(target.name).weight, method
    if not torch.isfinite(weight).all():
        raise ModelError(f"{target.name} holds weights that are not finite", "the model is damaged: load it again")
    plain = fit_grid(weight, target.bits, target.group_size, asymmetric=target.zero_points, dtype=stored_dtype(model))
    grid, codes = quantized(name, quantizer, weight, None if hessian is None else with_ridge(hessian), plain)
    rounded = decode(codes, grid)
    stored = pack(target.name, codes, grid, target.form)

    def share(other: torch.Tensor) -> float | None:
        if hessian is None:
            return None
        whole = output_errors(weight, torch.zeros_like(weight), hessian).sum()
        return _share(output_errors(weight, other, hessian).sum(), whole)

    row = QuantizedWeight(
        name=target.name,
        method="rtn" if hessian is None and quantizer.needs_calibration else name,
        bits=target.bits,
        group_size=target.group_size,
        bytes=sum(t.nbytes for t in stored.values()),
        weight_error=_share((weight.float() - rounded.float()).square().sum(), weight.float().square().sum()),
        output_error=share(rounded),
        rtn_output_error=None if hessian is None else share(decode(encode(weight, plain), plain)),
    )
    return row, stored, rounded


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0
