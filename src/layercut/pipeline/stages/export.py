"""Stage: the healed and, where asked, quantized student as a stock checkpoint that a fresh process has read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from layercut import evaluation
from layercut.export import engines
from layercut.export.checkpoint import export_checkpoint, publish_streamed, text_to_check
from layercut.export.formats import FLOATS, check_cut
from layercut.export.gguf_check import speed_by_llama_cpp
from layercut.export.gguf_tensors import tensor_types, weights_by_columns
from layercut.files import partial_of, replace_folder, writing
from layercut.models import layer_reader
from layercut.pipeline.artefacts import ExportArtefact, QuantizeArtefact
from layercut.pipeline.handover import say_gguf
from layercut.pipeline.resolve_options import keeps_gguf
from layercut.pipeline.run_context import QUANTIZED_GGUF, RunContext
from layercut.pipeline.stages.quantize import cut_of
from layercut.progress import bar, say
from layercut.report.stage_lines import describe_export
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint


def export(work: RunContext, segments: Sequence[Segment]) -> ExportArtefact:
    """The healed and, where asked, quantized student as a stock checkpoint or a GGUF file, verified by a fresh
    process.
    """
    if keeps_gguf(work.config, work.checkpoint):
        exported = export_gguf(work, segments)
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
    gguf = keeps_gguf(work.config, work.checkpoint)
    written = "gguf" if gguf else engines.written_by(work.config.quantize)
    if work.config.quantize.bits == "auto":
        written = engines.written_as(work.run.artefact(QuantizeArtefact, "quantize").quantization_config or {})
    return engines.readings(work.architecture, segments, written)


# --- a .gguf file ---


def export_gguf(work: RunContext, segments: Sequence[Segment]) -> ExportArtefact:
    """Compare the .gguf file with the healed student in transformers and llama.cpp, and put it into its place.

    It is called as --out names it, else after the source.
    """
    used, named = work.verified_on, work.config.run.file
    name = named.name if named else f"{Path(work.checkpoint.gguf or 'model').stem}-cut.gguf"
    with work.run.stage(ExportArtefact, "export", [work.text[used], name], after=["quantize"]) as stage:
        if stage.open:
            file = work.run / QUANTIZED_GGUF
            facts = check_cut(cut_of(work, segments), file, text_to_check(work.blocks[used]))
            partial = partial_of(work.run / "model")
            shutil.rmtree(partial, ignore_errors=True)
            with writing(partial):
                partial.mkdir()
                put(file, partial / name)
                replace_folder(partial, work.run / "model")
            if theirs := facts["again"]["llama_cpp"]:
                theirs["speed"] = speed_by_llama_cpp(work.checkpoint.file, file)
            kinds = (kind for kind in tensor_types(work.checkpoint.file) if kind not in FLOATS)
            facts |= {"tensor_types": tensor_types(file), "file": name, "bytes": file.stat().st_size}
            facts |= {"source_type": next(kinds, None), "weights": weights_by_columns(work.checkpoint.file)}
            written = (work.run.artefact(QuantizeArtefact, "quantize").gguf or {}) | facts
            stage.found = ExportArtefact(bytes=written["bytes"], check={}, gguf=written)
            stage.files = ["model"]
    say_gguf(stage.artefact.gguf or {}, f": {work.run / 'model' / name}")
    return stage.artefact


def put(source: Path, target: Path) -> None:
    """Have a file under a second name: the same bytes on disk where that can be, else a copy."""
    partial = partial_of(target)
    with writing(target):
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, partial)
        partial.replace(target)
