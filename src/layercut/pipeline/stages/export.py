"""Stage: the healed and, where asked, quantized student as a stock checkpoint that a fresh process has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safetensors.torch import load_file

from layercut import evaluation
from layercut.export import engines
from layercut.export.checkpoint import export_checkpoint, publish_streamed, text_to_check
from layercut.files import partial_of
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
    if gguf_run.keeps_gguf(work.config, work.checkpoint):
        exported = gguf_run.export(work, segments)
    else:
        with work.run.stage(ExportArtefact, "export", work.text[work.verified_on], after=["quantize"]) as stage:
            if stage.open:
                stage.found, stage.files = write_folder(work, segments), ["model"]
        exported = stage.artefact
        say("export", describe_export(asdict(exported), work.run / "model"))
    engines.warn_misread("export", read_by(work, segments))
    return exported


def write_folder(work: RunContext, segments: Sequence[Segment]) -> ExportArtefact:
    """A checkpoint folder; where the layers are on disk from files: byte ranges, and what healing changed."""
    model, folder = work.compressed(segments), work.run / "model"
    if layer_reader.layers_on_disk(model):
        healed, partial = layer_reader.as_saved(model, work.changed(model)), partial_of(folder)
        dtype = work.stack.stored_dtype
        with bar("saving", None):
            cut_checkpoint(work.checkpoint.folder, segments, partial, force=True, healed=healed, dtype=dtype)
        return ExportArtefact(**publish_streamed(model, partial, folder))
    quantized, text = work.run.artefact(QuantizeArtefact, "quantize"), text_to_check(work.blocks[work.verified_on])
    packing: dict[str, Any] = {}
    if quantized.bits != 16:
        packed = load_file(work.run / "quantized.safetensors")
        packing = {"packed": packed, "quantization_config": quantized.quantization_config}
    source = None if work.checkpoint.gguf else work.checkpoint.folder
    written = export_checkpoint(model, work.tokenizer, folder, text=text, source=source, **packing)
    with bar("perplexity of what was saved", len(text)) as advance:  # what the fresh process should have found
        value = evaluation.perplexity(model, text, advance=advance)
    return ExportArtefact(**written, perplexity={"tokens": text.numel(), "value": value})


def read_by(work: RunContext, segments: Sequence[Segment]) -> list[engines.Reading]:
    """What each engine makes of the exported model."""
    gguf = gguf_run.keeps_gguf(work.config, work.checkpoint)
    written = "gguf" if gguf else engines.written_by(work.config.quantize)
    if work.config.quantize.bits == "auto":
        written = engines.written_as(work.run.artefact(QuantizeArtefact, "quantize").quantization_config or {})
    return engines.readings(work.architecture, segments, written)
