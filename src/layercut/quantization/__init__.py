"""Quantize: store what is left in 8 or 4 bits a weight. After healing, before the last measurement.

    found = quantize_(model, tokens, config)

leaves `model` a plain model whose weights are the rounded ones, to the bit those that a reload will compute, and
returns the packed tensors for the checkpoint. Weights only: activations stay in the model's number format.

One decoder layer after another, each calibrated on what the quantized layers before it give out, so that later
layers make up for earlier ones as far as they can; only one layer's Hessians are held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from layercut.config import QuantizeConfig
from layercut.errors import ModelError
from layercut.models.loading import replace_parameters_, stored_dtype
from layercut.models.runner import Calls, DecoderRunner, intercepted
from layercut.quantization.assignment import Assignment, left_as_they_are, linear_left, plan
from layercut.quantization.gptq import add_to_hessian_, gptq, output_errors
from layercut.quantization.grid import decode, encode, fit_grid
from layercut.quantization.packing import pack, quantization_config, require_library, unpack

__all__ = ["Quantization", "endpoints_of", "quantize_", "quantized_weights"]

BATCH_TOKENS = 2048
Batches = list[tuple[torch.Tensor, Calls]]


@dataclass(frozen=True)
class Quantization:
    """What was done to each weight, and the tensors for the checkpoint."""

    layers: list[dict[str, Any]]
    """By weight: name, method, bits, group_size, bytes, weight_error = ||W - Q||^2 / ||W||^2, and where calibrated
    output_error = ||(W - Q) X'||^2 / ||W X'||^2 and rtn_output_error, the same of rounding to nearest."""
    left: list[str]
    """Matrices in the decoder layers that stay as they were."""
    packed: dict[str, torch.Tensor]
    config: dict[str, Any]
    """quantization_config for config.json."""


def endpoints_of(config: Any, layers: int) -> list[int]:
    """Layers beside a cut, from `original_layer_index` in a model's config; empty for a model that was not cut.

    The index does not tell how many layers there were. It is only there after a cut, so that one without a gap means a
    cut at the stack's end; a cut there beside another one does not show.
    """
    index = original_layer_index(config)
    if not index or len(index) != layers:
        return []
    beside = {j for i in range(1, layers) if index[i] != index[i - 1] + 1 for j in (i - 1, i)}
    if index[0] != 0:
        beside.add(0)
    return sorted(beside) or [layers - 1]


def original_layer_index(config: Any) -> list[int] | None:
    """Where a cut model's layers stood in the first model of all; of a composite model the outer config says it."""
    found = getattr(config, "original_layer_index", None)
    return found or getattr(config.get_text_config(), "original_layer_index", None)


def quantized_weights(packed: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters by name, as any loader computes them from the packed tensors."""
    require_library()
    return unpack(packed, config)


@torch.no_grad()
def quantize_(
    model: Any,
    tokens: torch.Tensor,
    config: QuantizeConfig,
    *,
    endpoints: Sequence[int] = (),
    advance: Callable[[int], None] = lambda layers: None,
) -> Quantization:
    """Quantize `model` in place; tokens [N, T] calibrate, and are not looked at where `config.quantizer` is rtn.

    New parameters are put in; tensors that another model shares are left alone, ties are kept.
    Raises ConfigError: compressed-tensors is missing, or the group size does not fit. ModelError: nothing to
    quantize, weights that are not finite, or (gptq) a model that cannot be run layer by layer.
    """
    require_library()
    targets = plan(model, config, endpoints)
    rows: list[dict[str, Any]] = []
    packed: dict[str, torch.Tensor] = {}

    def quantize_one(target: Assignment, hessian: torch.Tensor | None) -> None:
        row, stored, weight = _quantize_weight(model, target, hessian, config)
        rows.append(row)
        packed.update(stored)
        replace_parameters_(model, {f"{target.name}.weight": weight})

    left = left_as_they_are(model, targets)
    ends = [target for target in targets if target.layer is None]
    tied = bool(ends) and model.get_submodule(ends[0].name).weight is model.get_submodule(ends[1].name).weight
    if ends:
        quantize_one(ends[0], None)
    if tied:
        packed.update(_scales_for_tied_head(ends, packed))
    elif ends:
        quantize_one(ends[1], None)
    by_layer = groupby((target for target in targets if target.layer is not None), lambda target: target.layer)
    if config.quantizer == "rtn":
        for _, group in by_layer:
            for target in group:
                quantize_one(target, None)
            advance(1)
    else:
        wanted = {layer: list(group) for layer, group in by_layer if layer is not None}
        _layer_by_layer(DecoderRunner(model), tokens, wanted, quantize_one, advance)
    described = quantization_config(targets, linear_left(model, targets), asymmetric=config.asymmetric)
    return Quantization(rows, left, packed, described)


def _layer_by_layer(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    wanted: dict[int, list[Assignment]],
    quantize_one: Callable[[Assignment, torch.Tensor | None], None],
    advance: Callable[[int], None],
) -> None:
    """Hessians of a layer, then its weights, then its outputs for the next one."""
    batches = [stack.enter(batch) for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))]
    for i in range(max(wanted) + 1):
        if i in wanted:
            hessians = _hessians(stack, i, batches, wanted[i])
            for target in wanted[i]:
                quantize_one(target, hessians[target.name])
        batches = [(stack.layer(i, hidden, calls), calls) for hidden, calls in batches]
        advance(1)


def _hessians(
    stack: DecoderRunner, i: int, batches: Batches, targets: Sequence[Assignment]
) -> dict[str, torch.Tensor | None]:
    """H = 2 X'X of every target's input in layer i; one matrix where several read the same tensor.

    None: the module did not run, as an expert to which no token was sent.
    """
    modules = [stack.model.get_submodule(target.name) for target in targets]
    source: dict[int, int] = {}  # module -> the module whose Hessian it uses
    sums: dict[int, torch.Tensor] = {}
    for hidden, calls in batches:
        seen: dict[int, torch.Tensor] = {}

        def record(which: int, run: Callable[..., Any], x: torch.Tensor, seen: dict[int, Any] = seen) -> Any:
            seen[which] = x
            return run(x)

        with intercepted(modules, record):
            stack.layer(i, hidden, calls)
        for which, x in seen.items():
            if which not in source:
                source[which] = next((other for other in seen if seen[other] is x and other in sums), which)
            if source[which] == which:
                if which not in sums:
                    width = x.shape[-1]
                    sums[which] = torch.zeros(width, width, dtype=_sum_dtype(x.device), device=x.device)
                add_to_hessian_(sums[which], x)
    return {t.name: sums[source[which]] if which in source else None for which, t in enumerate(targets)}


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _quantize_weight(
    model: Any, target: Assignment, hessian: torch.Tensor | None, config: QuantizeConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """One weight: its line of the report, its packed tensors, and what they stand for."""
    weight = model.get_submodule(target.name).weight
    if not torch.isfinite(weight).all():
        raise ModelError(f"{target.name} holds weights that are not finite", "this model is ruined already")
    grid = fit_grid(weight, target.bits, target.group_size, asymmetric=config.asymmetric, dtype=stored_dtype(model))
    nearest = encode(weight, grid)
    codes = nearest if hessian is None else gptq(weight, hessian, grid)
    rounded, plain = decode(codes, grid), decode(nearest, grid)
    stored = pack(target, codes, grid)
    row = {
        "name": target.name,
        "method": "rtn" if hessian is None else "gptq",
        "bits": target.bits,
        "group_size": target.group_size,
        "bytes": sum(t.nbytes for t in stored.values()),
        "weight_error": _share((weight.float() - rounded.float()).square().sum(), weight.float().square().sum()),
        "output_error": None,
        "rtn_output_error": None,
    }
    if hessian is not None:
        whole = output_errors(weight, torch.zeros_like(weight), hessian).sum()
        row["output_error"] = _share(output_errors(weight, rounded, hessian).sum(), whole)
        row["rtn_output_error"] = _share(output_errors(weight, plain, hessian).sum(), whole)
    return row, stored, rounded


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0


def _scales_for_tied_head(ends: Sequence[Assignment], packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head reads the embedding's codes, stored once; its scales are stored again, since loaders ask for them."""
    first, last = (target.name for target in ends)
    own = [key for key in packed if key.startswith(f"{first}.") and key != f"{first}.weight"]
    return {last + key.removeprefix(first): packed[key].clone() for key in own}
