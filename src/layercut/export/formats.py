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
from safetensors.torch import load_file

from layercut.config import ExportConfig
from layercut.data.blocks import stored_blocks
from layercut.errors import RunError
from layercut.export.checkpoint import save, text_to_check
from layercut.export.ggml import require_llama_cpp
from layercut.export.gguf_export import (
    AS_THEY_CAME,
    FINER,
    SAME,
    CutGguf,
    Texts,
    check_cut,
    is_mixture,
    write_converted,
    write_cut,
    write_requantized,
)
from layercut.export.gguf_tensors import tensor_types
from layercut.files import read_json
from layercut.models import checkpoints, decoder_stack, loading
from layercut.segments import Segment


@dataclass(frozen=True)
class ExportSource:
    """What is to be exported."""

    model: Path
    """A checkpoint folder or a .gguf file; of a finished run what is in its folder."""
    run: Path | None = None
    """The folder of the finished run."""

    @property
    def came(self) -> checkpoints.Checkpoint | None:
        """The .gguf file that this began from, or is; None where it is no such file."""
        named = read_json(self.run / "summary.json")["model"] if self.run else str(self.model)
        if not checkpoints.names_a_gguf(named):
            return None
        found = checkpoints.resolve(named)
        return found if found.gguf else None

    @property
    def name(self) -> str | None:
        """Of the model that a run began from, without its owner and place."""
        if self.run is None:
            return None
        summary = read_json(self.run / "summary.json")
        layers = summary["layers"]
        return f"{Path(summary['model']).name} ({layers['after']} of {layers['before']} layers)"

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
    """A GGUF file for llama.cpp, read back and compared; a run that began from one keeps the bytes it did not heal."""
    kind = options.gguf_type
    if kind is not None and is_mixture(kind):
        require_llama_cpp()
    came = source.came
    if source.run is not None and came is not None:
        cut = cut_of_run(source.run, came)
        text, calibration = source.text, stored_blocks(source.run, "calibration")
        assert text is not None
        facts = write_cut(cut, out, kind or type_in(source.run), cut.student().model, calibration)
        facts |= check_cut(cut, out, text)
    elif came is not None:
        facts = write_requantized(came, out, kind or SAME)
    else:
        texts = Texts(
            measured=source.text, calibration=stored_blocks(source.run, "calibration") if source.run else None
        )
        facts = write_converted(source.model, out, options, texts, source.name)
    return facts | {"tensor_types": tensor_types(out)}


def type_in(run: Path) -> str:
    """What the healed tensors of a finished run's own .gguf file are in; where it has none, as those of others."""
    written = read_json(run / "quantize.json").get("gguf") or {}
    return written["kind"] if written.get("kind") in AS_THEY_CAME else FINER


def cut_of_run(run: Path, came: checkpoints.Checkpoint) -> CutGguf:
    """What a finished run removed from a .gguf file, and what it healed of the rest.

    Quantization is not among it, a GGUF file has its own.
    """
    if came.changed_since(run / checkpoints.DIGESTS):
        raise RunError(
            f"{came.file} is another file than the one that {run} was made from",
            "put that one back, or compress this one",
        )
    heal, fold = read_json(run / "heal.json"), read_json(run / "fold.json")
    changed = "tuned" if heal["tuning"] else "folded" if fold["changed"] else None
    return CutGguf(
        checkpoint=came,
        segments=[Segment(*bounds) for bounds in read_json(run / "cut.json")["segments"]],
        healed=load_file(run / f"{changed}.safetensors") if changed else {},
    )


def safetensors(source: ExportSource, out: Path, options: ExportConfig) -> dict[str, Any]:
    """A stock checkpoint folder of float weights, verified by a fresh process: of a .gguf file, or of packed
    weights.
    """
    if source.run and (came := source.came):  # its own healed weights, not what a GGUF file rounds them to
        loaded = cut_of_run(source.run, came).student()
        decoder_stack.convert_parameters_(loaded.model, torch.bfloat16)
        loaded.model.stored_dtype = torch.bfloat16
    else:
        loaded = loading.load(checkpoints.resolve(str(source.model)))
    return {"check": save(loaded.model, loaded.tokenizer, out, text=source.text).check}
