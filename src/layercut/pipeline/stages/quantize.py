"""Stage: what is left in fewer bits, and the points of the frontier of size and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from layercut import evaluation
from layercut import quantization as rounding
from layercut.healing.endpoint_tuning import endpoints
from layercut.models import loading
from layercut.models.losses import as_price
from layercut.pipeline.run_context import RunContext
from layercut.segments import Segment


def quantize(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """The healed student's weights in fewer bits, where that is asked."""
    config = work.config.quantize
    if config.bits == 16:
        return {"bits": 16, "layers": []}
    student, beside = work.student(segments, "folded", "tuned"), endpoints(segments, work.layers)
    found = rounding.quantize(student, work.blocks["calibration"], endpoints=beside, **asdict(config))
    work.save(dict(found.packed), "quantized")
    return found.to_dict() | {"files": ["quantized.safetensors"]}


def frontier(work: RunContext, bits: Sequence[int]) -> dict[str, Any]:
    """Size and loss of what is left, at several numbers of bits."""
    return {"points": [point(work, work.healed, width) for width in bits]}


def point(work: RunContext, model: Any, bits: int) -> dict[str, Any]:
    """A point of the frontier: bytes, and by how much perplexity rises over the dense model's on held-out rows."""
    size, layers = loading.parameter_bytes(model), len(loading.find_decoder(model))
    if bits < 16:
        asked = asdict(work.config.quantize) | {"bits": bits}
        found = rounding.quantize(model, work.blocks["calibration"], **asked)
        model, size = found.model, found.bytes_after
    perplexity = evaluation.perplexity(model, work.blocks["heldout"])
    return {"layers": layers, "bits": bits, "bytes": size, "rise": as_price(perplexity / work.heldout_perplexity - 1)}
