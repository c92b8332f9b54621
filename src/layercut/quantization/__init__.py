"""Quantize: store the weights that are left in 8 to 2 bits each. After healing, before the last measurement.

    found = quantize(model, tokens, bits=4)

`found.model` is a plain model whose weights are the rounded ones, to the bit those that a reload will compute;
`found.packed` are the tensors for the checkpoint. Weights only: activations stay in the model's dtype.

One decoder layer after another, each calibrated on what the quantized layers before it compute: `layer_by_layer.py`.
Which weights: `assignment.py`; the points a weight may take: `grid.py`; which point: `quantizers.py`; the file format:
`packing.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import nn

from layercut.config import NEAR_ENOUGH, Bits, EmbeddingBits, QuantizeConfig
from layercut.errors import ConfigError, DataError, ModelError
from layercut.files.sizes import parse_bytes
from layercut.models import decoder_stack, model_weights
from layercut.models.memory import memory_limit
from layercut.models.model_weights import replace_parameters_, stored_dtype
from layercut.models.runner import DecoderRunner, model_of
from layercut.progress import bar
from layercut.quantization.assignment import WHOLE_BYTES, Assignment, plan
from layercut.quantization.bit_choice import CHOSEN_AMONG, Mixture, choose
from layercut.quantization.gptq import output_errors, with_ridge
from layercut.quantization.grid import decode, encode, fit_grid
from layercut.quantization.layer_by_layer import each_with_hessian, hessian_of_head
from layercut.quantization.packing import pack, quantization_config, quantized_weights, require_library
from layercut.quantization.quantized import Quantized, QuantizedWeight
from layercut.quantization.quantizers import Quantizer, codes, resolve
from layercut.quantization.scales import RECIPE, better_start, by_turns
from layercut.quantization.sensitivity import token_weights

__all__ = ["Quantized", "QuantizedWeight", "Quantizer", "quantize", "quantize_", "quantized_weights"]


def recipe(config: QuantizeConfig) -> list[Any]:
    """What decides beside the options how calibrated weights are rounded: an older run's are rounded anew."""
    if not config.small:
        return []
    return RECIPE + (CHOSEN_AMONG if config.bits == "auto" else [])


QuantizeOne = Callable[[Assignment, torch.Tensor | None], None]


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
        tokens: calibration token ids [N, T]; needed where the quantizer is calibrated, as gptq is.
        bits: bits of a weight. "auto": of each weight those that cost least KL within `target_size`.
        quantizer: a name of `layercut.quantizers` ("gptq", "rtn", one of a package), or a class or function as
            `quantization/quantizers.py` describes it.
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
        raise ConfigError(
            f"bits={bits!r} is not among what weights can be stored in", f"allowed are {', '.join(map(str, allowed))}"
        )
    if (target_size is None) == (bits == "auto"):
        given = "is given with bits that are fixed" if target_size else "is missing, and bits='auto' chooses for a size"
        raise ConfigError(f"target_size {given}", "give both, or neither: bits='auto', target_size='60MB'")
    own = {"quantizer": quantizer} if isinstance(quantizer, str) else {}
    config = QuantizeConfig(
        bits=bits, group_size=group_size, embedding_bits=embedding_bits, bits_allowed=bits_allowed, **own
    )
    clone = model_weights.share(model_of(model)).eval()
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
    if not isinstance(tokens, torch.Tensor | None):
        raise DataError(f"tokens are a {type(tokens).__name__}; allowed are token ids [N, T]", "torch.tensor(rows)")
    name, rounds = resolve(quantizer or config.quantizer)
    if (rounds.needs_calibration or target) and (tokens is None or not tokens.numel()):
        who = f"the quantizer {name} is calibrated" if rounds.needs_calibration else "the choice of bits is measured"
        raise ConfigError(f"{who} on tokens, and none are given", "give tokens [N, T]")
    if tokens is not None:
        _check_tokens(tokens, model)
    targets, mixture = _assigned(model, tokens, config, target)
    left, before = _left(model, targets), model_weights.parameter_bytes(model)
    rows, packed = list[QuantizedWeight](), dict[str, torch.Tensor]()

    def quantize_one(target: Assignment, hessian: torch.Tensor | None) -> None:
        row, stored, weight = _quantize_weight(model, target, hessian, config, (name, rounds))
        rows.append(row)
        packed.update(stored)
        replace_parameters_(model, {f"{target.name}.weight": weight})

    tokens = tokens if rounds.needs_calibration else None
    small = [target.name for target in targets if target.bits < NEAR_ENOUGH and _is_linear(model, target)]
    with memory_limit():
        weights = token_weights(model, tokens, small) if tokens is not None and small else {}
    ends = [target for target in targets if target.layer is None]
    _embeddings_and_head(model, ends, tokens, weights, packed, quantize_one)
    _decoder_layers(model, targets, tokens, weights, quantize_one)
    targets = [target for target in targets if f"{target.name}.weight_scale" in packed]  # not a packed, tied head
    one_width = mixture.one_width if mixture else config.one_width
    described = quantization_config(targets, _linear_left(model, targets), one_width=one_width)
    after = _bytes_left(model, rows) + sum(t.nbytes for t in packed.values())
    asked = vars(config) | {"quantizer": name, "zero_points": any(target.zero_points for target in targets)}
    chosen = mixture.to_dict() if mixture else None
    return Quantized(model, packed, described, tuple(rows), tuple(left), before, after, asked, chosen)


def _assigned(
    model: Any, tokens: torch.Tensor | None, config: QuantizeConfig, target: int | None
) -> tuple[list[Assignment], Mixture | None]:
    """What is quantized, and to how many bits: as the config says, or chosen for a size."""
    if config.bits != "auto":
        return plan(model, config), None
    if tokens is None or target is None:
        raise ConfigError("bits are to be chosen, and no size is given", "give --target-size, as 60MB")
    mixture = choose(model, tokens, config, target)
    require_library(one_width=mixture.one_width)
    return list(mixture.targets), mixture


def _decoder_layers(
    model: Any,
    targets: Sequence[Assignment],
    tokens: torch.Tensor | None,
    weights: Mapping[str, torch.Tensor],
    quantize_one: QuantizeOne,
) -> None:
    """The weights in the decoder layers, layer by layer; tokens: to calibrate on, where the quantizer is calibrated."""
    inside = groupby((target for target in targets if target.layer is not None), lambda target: target.layer)
    wanted = {layer: {target.name: target for target in group} for layer, group in inside if layer is not None}
    with memory_limit(), bar("quantizing", len(decoder_stack.find_decoder(model))) as advance:
        if tokens is None or not wanted:
            for group in wanted.values():
                for target in group.values():
                    quantize_one(target, None)
                advance(1)
            return
        for layer, name, hessian in each_with_hessian(DecoderRunner(model), tokens, wanted, advance, weights):
            quantize_one(wanted[layer][name], hessian)


def _is_linear(model: Any, target: Assignment) -> bool:
    return isinstance(model.get_submodule(target.name), nn.Linear)


def _check_tokens(tokens: torch.Tensor, model: Any) -> None:
    """Refuse what is not [N, T] token ids of this model."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        got = f"{list(tokens.shape)} of {str(tokens.dtype).removeprefix('torch.')}"
        raise DataError(f"tokens are {got}; wanted are token ids [N, T] of int64", "layercut.token_blocks makes them")
    decoder_stack.check_tokens(tokens, model.config, type(model).__name__)


def _left(model: Any, targets: Sequence[Assignment]) -> list[str]:
    """Matrices and larger in the decoder layers that no target covers, such as routers and convolutions."""
    decoder, done = decoder_stack.find_decoder(model), {f"{target.name}.weight" for target in targets}
    names = (f"{decoder.path}.{name}" for name, p in decoder.layers.named_parameters() if p.dim() >= 2)
    return [name for name in names if name not in done]


def _linear_left(model: Any, targets: Sequence[Assignment]) -> list[str]:
    """Linear modules anywhere in the model that no target covers: routers, layers left at 16 bits, the head."""
    done = {target.name for target in targets}
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in done]


def _embeddings_and_head(
    model: Any,
    ends: Sequence[Assignment],
    tokens: torch.Tensor | None,
    weights: Mapping[str, torch.Tensor],
    packed: dict[str, torch.Tensor],
    quantize_one: QuantizeOne,
) -> None:
    """The weights outside the decoder layers; tied ones once. Tokens: to calibrate the head on, if it is below a byte.

    In whole bytes a tied head's scales are stored under both names. Packed ones are unpacked while loading, then tied.
    """
    if not ends:
        return
    first, last = ends[0], ends[-1]
    tied = len(ends) > 1 and model.get_submodule(first.name).weight is model.get_submodule(last.name).weight
    hessian, has_head = None, model.get_submodule(last.name) is model.get_output_embeddings()
    if tokens is not None and last.bits < NEAR_ENOUGH and has_head:
        with memory_limit():
            hessian = hessian_of_head(DecoderRunner(model), tokens, weights.get(last.name))
    quantize_one(first, hessian if tied or first is last else None)
    if tied and first.form == WHOLE_BYTES:
        packed.update(_scales_for_tied_head(ends, packed))
    elif len(ends) > 1 and not tied:
        quantize_one(last, hessian)


def _bytes_left(model: Any, rows: Sequence[QuantizedWeight]) -> int:
    """Bytes, as saved, of the parameters that were not quantized; tied ones counted once."""
    parameters = {id(p): p for p in model.parameters()}
    covered = {id(model.get_submodule(row.name).weight) for row in rows}
    stored = stored_dtype(model).itemsize
    return sum(p.numel() * min(stored, p.itemsize) for key, p in parameters.items() if key not in covered)


def _quantize_weight(
    model: Any,
    target: Assignment,
    hessian: torch.Tensor | None,
    config: QuantizeConfig,
    quantizer: tuple[str, Quantizer],
) -> tuple[QuantizedWeight, dict[str, torch.Tensor], torch.Tensor]:
    """Quantize one weight; a calibrated quantizer rounds what has no Hessian to nearest."""
    weight = model.get_submodule(target.name).weight
    if not torch.isfinite(weight).all():
        raise ModelError(f"{target.name} holds weights that are not finite", "the model is damaged: load it again")
    fit = partial(
        fit_grid, weight, target.bits, target.group_size, asymmetric=target.zero_points, dtype=stored_dtype(model)
    )
    grid = plain = fit()
    nearest = encode(weight, plain)
    uncalibrated = hessian is None and quantizer[1].needs_calibration
    small = target.bits < NEAR_ENOUGH
    heeded = with_ridge(hessian) if hessian is not None and small else hessian
    choose = partial(codes, *quantizer, weight, heeded)
    if heeded is not None and small and getattr(quantizer[1], "fits_scales", False):
        grid, chosen = better_start(weight, heeded, lambda counts: fit(counts=counts), choose)
        grid, chosen = by_turns(weight, heeded, grid, chosen, choose)
    else:
        chosen = nearest if uncalibrated else choose(grid)
    rounded = decode(chosen, grid)
    stored = pack(target, chosen, grid)
    output = rtn = None
    if hessian is not None:
        whole = output_errors(weight, torch.zeros_like(weight), hessian).sum()
        output = _share(output_errors(weight, rounded, hessian).sum(), whole)
        rtn = _share(output_errors(weight, decode(nearest, plain), hessian).sum(), whole)
    row = QuantizedWeight(
        name=target.name,
        method="rtn" if uncalibrated else quantizer[0],
        bits=target.bits,
        group_size=target.group_size,
        bytes=sum(t.nbytes for t in stored.values()),
        weight_error=_share((weight.float() - rounded.float()).square().sum(), weight.float().square().sum()),
        output_error=output,
        rtn_output_error=rtn,
    )
    return row, stored, rounded


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0


def _scales_for_tied_head(ends: Sequence[Assignment], packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head reads the embedding's codes, stored once; its scales are stored again, since loaders ask for them."""
    first, last = (target.name for target in ends)
    own = [key for key in packed if key.startswith(f"{first}.") and key != f"{first}.weight"]
    return {last + key.removeprefix(first): packed[key].clone() for key in own}
