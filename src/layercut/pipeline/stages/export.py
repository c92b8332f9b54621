"""Stage: the healed and, where asked, quantized student as a stock checkpoint that a fresh process has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safetensors.torch import load_file

from layercut import evaluation
from layercut.export import engines
from layercut.export.checkpoint import export_checkpoint, publish_streamed, text_to_check
from layercut.files.writing import partial_of
from layercut.models import layer_reader
from layercut.pipeline import gguf_run
from layercut.pipeline.artefacts import ExportArtefact, QuantizeArtefact
from layercut.pipeline.run_context import RunContext
from layercut.progress import bar, say
from layercut.report.stage_lines import describe_export
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint


def export(work: RunContext, segments: Sequence[Segment]) -> ExportArtefact:
    """The healed and, where asked, quantized student as a stock checkpoint or a GGUF file, verified by a fresh
    process.
    """
    as_gguf = gguf_run.keeps_gguf(work.config, work.checkpoint)
    exported = gguf_run.export(work, segments) if as_gguf else export_folder(work, segments)
    engines.warn_misread("export", read_by(work, segments))
    return exported


def export_folder(work: RunContext, segments: Sequence[Segment]) -> ExportArtefact:
    """The same as a checkpoint folder."""
    used = work.verified_on
    with work.run.stage(ExportArtefact, "export", work.text[used], after=["quantize"]) as stage:
        if stage.open:
            text = text_to_check(work.blocks[used])
            model = work.compressed(segments)
            if layer_reader.layers_on_disk(model):
                written = export_files(work, model, segments)
                stage.found = ExportArtefact(**written, files=["model"])
            else:
                source = None if work.checkpoint.gguf else work.checkpoint.folder
                how: dict[str, Any] = {"text": text, "source": source, **packing(work)}
                written = export_checkpoint(model, work.tokenizer, work.run / "model", **how)
                # what the fresh process should have found
                with bar("perplexity of what was saved", len(text)) as advance:
                    value = evaluation.perplexity(model, text, advance=advance)
                measured = {"tokens": text.numel(), "value": value}
                stage.found = ExportArtefact(**written, perplexity=measured, files=["model"])
    say("export", describe_export(asdict(stage.artefact), work.run / "model"))
    return stage.artefact


def read_by(work: RunContext, segments: Sequence[Segment]) -> list[engines.Reading]:
    """What each consumer makes of the exported model."""
    gguf = gguf_run.keeps_gguf(work.config, work.checkpoint)
    written = "gguf" if gguf else engines.written_by(work.config.quantize)
    if work.config.quantize.bits == "auto":
        written = engines.written_as(work.run.artefact(QuantizeArtefact, "quantize").quantization_config or {})
    return engines.readings(work.architecture, segments, written)


def packing(work: RunContext) -> dict[str, Any]:
    """What `export_checkpoint` takes of a quantized model."""
    quantized = work.run.artefact(QuantizeArtefact, "quantize")
    if quantized.bits == 16:
        return {}
    packed = load_file(work.run / "quantized.safetensors")
    return {"packed": packed, "quantization_config": quantized.quantization_config}


def export_files(work: RunContext, student: Any, segments: Sequence[Segment]) -> dict[str, Any]:
    """The same from the files of a model whose layers are on disk: byte ranges, and what healing changed."""
    healed, partial = layer_reader.as_saved(student, work.changed(student)), partial_of(work.run / "model")
    dtype = work.stack.stored_dtype
    with bar("saving", None):
        cut_checkpoint(work.checkpoint.folder, segments, partial, force=True, healed=healed, dtype=dtype)
    return publish_streamed(student, partial, work.run / "model")
