"""Stage: what is left in fewer bits, and the points of the frontier of size and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from layercut import evaluation
from layercut.config import QuantizeConfig
from layercut.healing.endpoint_tuning import endpoints
from layercut.models import loading
from layercut.models.losses import as_price
from layercut.pipeline.context import RunContext
from layercut.progress import bar
from layercut.quantization import Quantization, endpoints_of, quantize_
from layercut.segments import Segment


def quantize(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """The healed student's weights in fewer bits, where that is asked."""
    config = work.config.quantize
    if config.bits == 16:
        return {"bits": 16, "layers": []}
    student = work.student(segments, "folded", "tuned")
    beside = endpoints(segments, work.layers)
    found = quantize_with_bar_(student, work.blocks["calibration"], config, endpoints=beside)
    work.save(found.packed, "quantized")
    return quantization_facts(found, student, config) | {"files": ["quantized.safetensors"]}


def frontier(work: RunContext, bits: Sequence[int]) -> dict[str, Any]:
    """Size and loss of what is left, at several numbers of bits."""
    return {"points": [point(work, work.healed, width) for width in bits]}


def point(work: RunContext, model: Any, bits: int) -> dict[str, Any]:
    """A point of the frontier: bytes, and by how much perplexity rises over the dense model's on held-out rows."""
    quantize = replace(work.config.quantize, bits=bits)  # type: ignore[arg-type]
    size, layers = loading.parameter_bytes(model), len(loading.find_decoder(model))
    if bits < 16:
        model = loading.share(model)
        found = quantize_with_bar_(model, work.blocks["calibration"], quantize)
        size = quantization_facts(found, model, quantize)["bytes"]["after"]
    perplexity = evaluation.perplexity(model, work.blocks["heldout"])
    return {"layers": layers, "bits": bits, "bytes": size, "rise": as_price(perplexity / work.heldout_perplexity - 1)}


def quantize_with_bar_(
    model: Any, tokens: torch.Tensor, config: QuantizeConfig, *, endpoints: Sequence[int] = ()
) -> Quantization:
    """`quantize_`, with a bar. endpoints: layers beside a cut, besides those found in the model's own config."""
    layers = len(loading.find_decoder(model))
    beside = sorted({*endpoints, *endpoints_of(model.config, layers)})
    with bar(f"quantizing to {config.bits} bits", layers) as advance:
        return quantize_(model, tokens, config, endpoints=beside, advance=advance)


def quantization_facts(found: Quantization, model: Any, config: QuantizeConfig) -> dict[str, Any]:
    """quantize.json: what was asked, what became of every weight, and how many bytes that makes."""
    parameters = {id(p): p for p in model.parameters()}
    quantized = {row["name"] for row in found.layers}
    covered = {id(model.get_submodule(name).weight) for name in quantized}
    stored = loading.stored_dtype(model).itemsize
    after = sum(p.numel() * min(stored, p.itemsize) for key, p in parameters.items() if key not in covered)
    after += sum(t.nbytes for t in found.packed.values())
    return {
        **asdict(config),
        "layers": found.layers,
        "left": found.left,
        "bytes": {"before": loading.parameter_bytes(model), "after": after},
        "quantization_config": found.config,
    }
