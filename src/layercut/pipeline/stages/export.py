"""Stage: the healed and, where asked, quantized student as a stock checkpoint that a fresh process has read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load_file

from layercut import evaluation
from layercut.export.checkpoint import export_checkpoint, publish_streamed, text_to_check
from layercut.models import layer_reader_protocol
from layercut.offload import layer_reader
from layercut.pipeline.run_context import RunContext
from layercut.progress import bar
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint


def export(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """The healed and, where asked, quantized student as a stock checkpoint."""
    quantized = work.run.read("quantize") or {}
    text = text_to_check(work.blocks[checked_on(work.text)])
    packing: dict[str, Any] = {}
    if quantized["bits"] < 16:
        packing["packed"] = load_file(work.run / "quantized.safetensors")
        packing["quantization_config"] = quantized["quantization_config"]
    model = work.student(segments, "folded", "tuned", "quantized")
    if layer_reader_protocol.layers_on_disk(model):
        return export_files(work, model, segments) | {"files": ["model"]}
    exported = export_checkpoint(model, work.tokenizer, work.run / "model", text=text, **packing)
    # what the fresh process should have found
    with bar("perplexity of what was saved", len(text)) as advance:
        value = evaluation.perplexity(model, text, advance=advance)
    exported["perplexity"] = {"tokens": text.numel(), "value": value}
    return exported | {"files": ["model"]}


def checked_on(text: Mapping[str, Any]) -> str:
    """The use whose tokens measure what was saved: the evaluation's, in a run that is not evaluated held-out ones."""
    return next(use for use in ("evaluation", "heldout", "calibration") if use in text)


def export_files(work: RunContext, student: Any, segments: Sequence[Segment]) -> dict[str, Any]:
    """The same from the files of a model whose layers are on disk: byte ranges, and what healing changed."""
    healed, partial = layer_reader.as_saved(student, work.changed(student)), work.run / ".model.partial"
    dtype = work.stack.stored_dtype
    with bar("saving", None):
        cut_checkpoint(work.checkpoint.folder, segments, partial, force=True, healed=healed, dtype=dtype)
    return publish_streamed(student, partial, work.run / "model")
