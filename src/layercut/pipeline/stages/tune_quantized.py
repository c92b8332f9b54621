"""Stage, with quantization: what rounding left is trained towards the dense model, in the same stock format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layercut.config import CompressConfig, HealConfig
from layercut.data.blocks import in_rows
from layercut.distributed import processes
from layercut.healing.endpoint_tuning import TuneSettings, TuningFiles, tune_parameters_
from layercut.healing.tuning_state import StateFile, asked_to_stop, never_asked
from layercut.models import memory
from layercut.pipeline.artefacts import TuningRecord
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages.heal import objective
from layercut.quantization import Quantized
from layercut.quantization.trainable import RATE, Trainable

STATE = "quantized-tuning-state.safetensors"
"""Where it stands, written every few minutes and when it is stopped; gone when the stage is done."""


def wanted(config: CompressConfig) -> bool:
    """Whether what was rounded is trained: below 8 bits, unless that was switched off or nothing is tuned at all."""
    asked = config.after_rounding.tune_quantized
    few = config.quantize.bits == "auto" or config.quantize.bits < 8
    return bool(config.heal.tune_tokens) and (few if asked == "auto" else asked != "none")


def inputs(work: RunContext) -> list[Any]:
    """All that decides the result beside what quantization depends on; nothing where nothing is trained."""
    if not wanted(work.config):
        return []
    heal, text = work.config.heal, work.text
    return [work.config.after_rounding, heal.objective, heal.temperature, heal.mix, heal.batch_tokens, heal.epochs,
            heal.patience, text["tuning"], text["heldout"]]  # fmt: skip


def settings_of(heal: HealConfig) -> TuneSettings:
    """How it is trained."""
    own = replace(heal, teacher_topk=0, mix=heal.mix or 0.0)
    return TuneSettings(
        objective=objective(own), learning_rate=RATE, batch_tokens=heal.batch_tokens, epochs=heal.epochs,
        patience=heal.patience,
    )  # fmt: skip


def tune(work: RunContext, found: Quantized, before: Any) -> tuple[Quantized, TuningRecord | None]:
    """Train scales and norms of a quantized model, and the rounding where that is asked.

    Args:
        work: of the run.
        found: the quantized model, changed in place.
        before: the model before it was rounded.

    Returns:
        The same with other scales, norms and codes where that lowered the held-out loss, and how it went.
    """
    if not wanted(work.config):
        return found, None
    settings = settings_of(work.config.heal)
    learned = work.config.after_rounding.tune_quantized == "rounding"
    parts = Trainable.of_(found, before if learned else None)
    files = TuningFiles(
        state=StateFile(work.run / STATE, key=work.run.inputs_of("quantize")),
        stopping=asked_to_stop if work.own_process else never_asked,
    )
    if work.own_process:
        memory.reuse_freed()
    heldout, rows = work.blocks["heldout"], in_rows(work.blocks["tuning"], work.config.text.window)
    report = tune_parameters_(
        parts.model, work.dense.model, parts.parameters, rows, heldout=heldout, settings=settings, files=files
    )
    for point in report.curve:
        work.run.event("quantize", int(point["step"]), "loss", point["loss"], "nats/token")
    return parts.finished_(), TuningRecord(**vars(report), data=work.text["tuning"])


def forget_state_(work: RunContext) -> None:
    """Remove the state of a training that is done."""
    processes.on_main(lambda: (work.run / STATE).unlink(missing_ok=True))
