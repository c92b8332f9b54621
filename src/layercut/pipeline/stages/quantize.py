"""Stage: what is left in fewer bits, and the points of the frontier of size and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from layercut import evaluation
from layercut import quantization as rounding
from layercut.config import Bits
from layercut.healing.endpoint_tuning import endpoints
from layercut.models import loading
from layercut.models.losses import as_price
from layercut.pipeline import gguf_run
from layercut.pipeline.artefacts import BeforeAfter, FrontierArtefact, FrontierRecord, QuantizeArtefact
from layercut.pipeline.run_context import Round, RunContext
from layercut.pipeline.stages import tune_quantized
from layercut.progress import say
from layercut.quantization.quantizers import resolve as quantizer_of
from layercut.report.stage_lines import describe_quantization, describe_quantized_tuning
from layercut.segments import Segment


def quantize(work: RunContext, segments: Sequence[Segment]) -> QuantizeArtefact:
    """The healed student's weights in fewer bits, where that is asked.

    Args:
        work: of the run.
        segments: that are removed.

    Returns:
        The artefact.
    """
    if gguf_run.keeps_gguf(work.config, work.checkpoint):
        return gguf_run.quantize(work, segments)
    config = work.config.quantize
    chosen = [work.config.search.target_size] if config.bits == "auto" else []
    read = bool(chosen) or quantizer_of(config.quantizer)[1].needs_calibration
    calibrated = work.text["calibration"] if read else None
    how = rounding.recipe(config) if read else []
    inputs = [config, calibrated, *chosen, *how, *tune_quantized.inputs(work)] if config.rounds else None
    with work.run.stage(QuantizeArtefact, "quantize", inputs, after=["heal"]) as stage:
        if stage.open and config.bits == 16:
            stage.found = QuantizeArtefact(bits=16, layers=[])
        elif stage.open:
            student, beside = work.student(segments, "folded", "tuned"), endpoints(segments, work.layers)
            asked = asdict(config) | {"target_size": chosen[0] if chosen else None}
            found = rounding.quantize(student, work.blocks["calibration"], endpoints=beside, **asked)
            found, tuning = tune_quantized.tune(work, found, student)
            work.save(dict(found.packed), "quantized")
            stage.found = QuantizeArtefact(
                **(vars(config) | {"asymmetric": found.settings["asymmetric"]}),
                layers=list(found.weights),
                left=list(found.left),
                bytes=BeforeAfter(before=found.bytes_before, after=found.bytes_after),
                quantization_config=dict(found.config),
                mixture=dict(found.mixture) if found.mixture else None,
                tuning=tuning,
                files=["quantized.safetensors"],
            )
    if stage.artefact.bits != 16:
        tune_quantized.forget_state_(work)
        say("quantize", describe_quantization(asdict(stage.artefact)))
    if stage.artefact.tuning:
        say("quantize", describe_quantized_tuning(asdict(stage.artefact.tuning)))
    return stage.artefact


def frontier(this: Round, bits: Sequence[Bits], inputs: Sequence[Any]) -> list[FrontierRecord]:
    """Size and loss of what a round leaves, at several numbers of bits; before the first round, of the dense model.

    Args:
        this: the round.
        bits: that are tried.
        inputs: what the figures depend on.

    Returns:
        A point for each number of bits.
    """
    work, after = this.work, [this.name("heal")] if this.removal else []
    with work.run.stage(FrontierArtefact, f"frontier-{this.number or 0}", inputs, after=after) as stage:
        if stage.open:
            stage.found = FrontierArtefact(points=[point(work, this.healed, width) for width in bits])
    return stage.artefact.points


def point(work: RunContext, model: Any, bits: Bits) -> FrontierRecord:
    """A point of the frontier: bytes, and by how much perplexity rises over the dense model's on held-out rows.

    Args:
        work: of the run.
        model: what a round left.
        bits: of each weight; 16: not quantized.

    Returns:
        The point.
    """
    size, layers = loading.parameter_bytes(model), len(loading.find_decoder(model))
    if bits < 16:
        asked = asdict(work.config.quantize) | {"bits": bits}
        found = rounding.quantize(model, work.blocks["calibration"], **asked)
        model, size = found.model, found.bytes_after
    perplexity = evaluation.perplexity(model, work.blocks["heldout"])
    rise = as_price(perplexity / work.heldout_perplexity - 1)
    return FrontierRecord(layers=layers, bits=bits, bytes=size, rise=rise)
