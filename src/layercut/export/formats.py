"""Exporters: the file formats of `layercut export --format`. The protocol of an exporter, and layercut's own two.

An exporter is a function:

    @layercut.exporters.register("mypackage-npz")
    def npz(source, out, options):
        model = AutoModelForCausalLM.from_pretrained(source.model)
        numpy.savez(out, **{name: weight.numpy() for name, weight in model.state_dict().items()})
        return {"weights": len(model.state_dict())}

    layercut export RUN --format mypackage-npz --out small.npz
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layercut.config import ExportConfig
from layercut.data.blocks import stored_blocks
from layercut.export.checkpoint import save, text_to_check
from layercut.export.gguf_export import write_converted, write_healed
from layercut.export.gguf_tensors import PLAIN, require_llama_cpp, tensor_types
from layercut.models import checkpoints, loading


@dataclass(frozen=True)
class ExportSource:
    """What is to be exported."""

    model: Path
    """A checkpoint folder, of a finished run that in its folder; safetensors takes a .gguf file too."""
    run: Path | None = None
    """The folder of the finished run."""

    @property
    def text(self) -> torch.Tensor | None:
        """Token ids [N, T] to measure on: the first of the run's evaluation text; None without a run."""
        return text_to_check(stored_blocks(self.run, "evaluation")) if self.run else None


Exporter = Callable[[ExportSource, Path, ExportConfig], dict[str, Any]]
"""(source, out, options) -> facts, fit for JSON, which are printed.

out: a path that does not exist yet, of the name asked for, on which the exporter writes a file or a folder; it is moved
to its place when the exporter has returned, and removed where it raises. Raise a LayercutError with a hint for what the
user can correct."""


def gguf(source: ExportSource, out: Path, options: ExportConfig) -> dict[str, Any]:
    """A GGUF file for llama.cpp, read back and compared; a run that began from one keeps the bytes it did not heal.

    Args:
        source: what is exported.
        out: the file to write.
        options: `gguf_type` and `converter` count.

    Returns:
        What was written and measured, as JSON values.

    Raises:
        ConfigError: llama-cpp-py-sync (K-quants) or llama.cpp's converter (checkpoint folders) is missing.
        ModelError: llama.cpp does not know the architecture, or reads something else from the file.
    """
    if options.gguf_type not in PLAIN:
        require_llama_cpp()
    began = checkpoints.read_json(source.run / "summary.json")["model"] if source.run else ""
    text = source.text
    if source.run and text is not None and began.endswith(".gguf"):
        facts = write_healed(source.run, began, out, options.gguf_type, text)
    else:
        facts = write_converted(source.model, out, options, text)
    return facts | {"tensor_types": tensor_types(out)}


def safetensors(source: ExportSource, out: Path, options: ExportConfig) -> dict[str, Any]:
    """A stock checkpoint folder of float weights, verified by a fresh process: of a .gguf file, or of packed weights.

    Args:
        source: what is exported.
        out: the folder to write.
        options: none count.

    Returns:
        What the fresh process found, as JSON values.

    Raises:
        ModelError: the model cannot be loaded.
    """
    loaded = loading.load(checkpoints.resolve(str(source.model)))
    return {"check": save(loaded.model, loaded.tokenizer, out, text=source.text).check}
