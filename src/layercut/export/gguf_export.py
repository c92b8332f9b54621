"""The GGUF file of a run, of a .gguf file or of a checkpoint folder: written, read back, measured again.

Three ways, between which `export/formats.py` and the pipeline choose. A run that began from a .gguf file gives one
again: the bytes of all that was not healed stay (`write_cut`, `check_cut`). A .gguf file that is not cut takes other
number formats (`write_requantized`). A checkpoint folder goes through llama.cpp's converter (`write_converted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layercut.config import ExportConfig
from layercut.data.blocks import load_blocks
from layercut.errors import ModelError
from layercut.export.checkpoint import CHECK_TOKENS
from layercut.export.ggml import PLAIN, llama_cpp_installed, quantize_file
from layercut.export.gguf_check import (
    by_llama_cpp,
    compare_weights,
    read_by_transformers,
    readable,
    unlike_the_folder,
)
from layercut.export.gguf_measured import FLOATS, check_unrounded, coarsest, measure_again
from layercut.export.gguf_tensors import (
    CONVERTED,
    architecture_of,
    convert,
    gguf_tensors,
    possible_names,
    requantized,
    stored_types,
    types_as_they_came,
)
from layercut.export.importance import importance
from layercut.files import read_json
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models import llama_cpp_rules as rules
from layercut.models.gguf_header import read_header
from layercut.progress import bar, say
from layercut.segments import Segment
from layercut.surgery import cut_gguf, cut_segment_

WINDOW = 256
"""Tokens a row of the text that a GGUF file is measured on where no run brings its own."""
IMPORTANCE_TOKENS = 16384
"""Tokens that importance is measured on, at most."""
FINE = (*CONVERTED, "q8_0")
"""GGML types that are so fine that the importance of columns changes nothing worth measuring."""
SAME, FINER = "same", "finer"
"""--gguf-type: healed tensors in the number format that they came in, or in the next finer one. Those that were left
alone lie on the grid of theirs; healed ones do not, and lose most."""
AS_THEY_CAME = (SAME, FINER)
NEXT_FINER = {
    "q4_0": "q5_0", "q4_1": "q5_1", "q5_0": "q8_0", "q5_1": "q8_0", "iq4_nl": "q5_0", "q2_k": "q3_k", "q3_k": "q4_k",
    "q4_k": "q5_k", "q5_k": "q6_k", "q6_k": "q8_0", "iq4_xs": "q5_k", "iq3_s": "q4_k", "iq3_xxs": "q4_k",
    "iq2_s": "q3_k", "iq2_xs": "q3_k", "iq2_xxs": "q3_k", "iq1_m": "iq2_xs", "iq1_s": "iq2_xs",
}  # fmt: skip
"""By GGML type: what healed tensors that came in it are written in; of others, which are fine enough, the same."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token ids [N, T] that a GGUF file is made with; where they are None, Python's own documentation is taken."""

    measured: torch.Tensor | None = None
    """To measure on."""
    calibration: torch.Tensor | None = None
    """To measure the importance of columns on."""


@dataclass(frozen=True, kw_only=True)
class CutGguf:
    """A .gguf file without some layers, and what healing changed of the others."""

    checkpoint: checkpoints.Checkpoint
    """The source file."""
    segments: list[Segment]
    healed: Mapping[str, torch.Tensor]
    """By parameter name, of the model after the cut."""

    def student(self) -> loading.LanguageModel:
        """The model that the file should be, in float32."""
        loaded = loading.load(self.checkpoint, dtype="float32", device="cpu")
        if self.segments:
            cut_segment_(loaded.model, self.segments)
        decoder_stack.replace_parameters_(loaded.model, {name: weight.float() for name, weight in self.healed.items()})
        return loaded


def healed_type(kind: str, came: str) -> str:
    """The number format of a healed tensor."""
    return NEXT_FINER.get(came, came) if kind == FINER else came if kind == SAME else kind


def is_mixture(kind: str) -> bool:
    """Whether a --gguf-type is one of llama.cpp's mixtures, which are of all matrices and not of healed ones alone."""
    return kind not in (*AS_THEY_CAME, *PLAIN)


def write_cut(source: CutGguf, file: Path, kind: str, student: Any, tokens: torch.Tensor | None) -> dict[str, Any]:
    """The source file without the segments, with what healing changed replaced."""
    came, architecture = source.checkpoint.file, architecture_of(source.checkpoint.file)
    mixture = is_mixture(kind)
    kinds = types_as_they_came(came, source.segments)
    columns = _columns(student, tokens) if source.healed or mixture else {}
    plain = file.with_name("unrounded.gguf")
    plain.unlink(missing_ok=True)  # of a command that was stopped
    if not mixture:
        if not llama_cpp_installed():
            columns = {}  # the gguf package rounds to nearest
        tensors = gguf_tensors(
            source.healed, student.config, architecture, lambda name: healed_type(kind, kinds[name]), columns
        )
        cut_gguf(came, source.segments, file, replaced=tensors, as_loaded=True)
    else:
        try:
            cut_gguf(came, source.segments, plain, replaced=_unrounded(source, student, architecture), as_loaded=True)
            with bar(f"quantizing to {kind}", None):
                quantize_file(plain, file, kind, _in_file(plain, student, columns))
        finally:
            plain.unlink(missing_ok=True)
    measured = columns.keys() & source.healed.keys() if not mixture else columns.keys()
    return {"kind": kind, "healed": sorted(source.healed), "importance": len(measured)}


def _unrounded(source: CutGguf, student: Any, architecture: str) -> dict[str, tuple[Any, Any]]:
    return gguf_tensors(source.healed, student.config, architecture, "f32")


def _columns(model: Any, tokens: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Importance of the columns of matrices by parameter name; none without tokens."""
    if tokens is None:
        return {}
    return importance(model, tokens[: max(1, IMPORTANCE_TOKENS // tokens.shape[1])])


def _in_file(plain: Path, model: Any, columns: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The importance of columns by the matrices' names in a file, of those that are one tensor there."""
    names = possible_names(model, architecture_of(plain)) if columns else {}
    return {name: columns[one].numpy() for one, name in names.items() if name and one in columns}


def check_cut(source: CutGguf, file: Path, text: torch.Tensor) -> dict[str, Any]:
    """Hold a file that `write_cut` wrote against the model that it should be."""
    loaded, architecture = source.student(), architecture_of(file)
    student = loaded.model
    if unlike_the_folder(file, student.config) is not None:
        raise ModelError(f"{file.name} gives llama.cpp other sliding layers than the model has", "report this fault")
    read = read_by_transformers(file, student.config)
    kept, types = types_as_they_came(source.checkpoint.file, source.segments), _types_of(student, file)
    same = {name: kept == stored_types(file) if theirs is None else types[name] == kept.get(theirs)
            for name, theirs in possible_names(student, architecture).items()}  # fmt: skip
    again = {name: types[name] for name in types if name in source.healed or not same[name]}
    errors = compare_weights(file.name, read, student, again)
    if {kind.upper() for kind in again.values()} - FLOATS:

        def write(plain: Path) -> None:
            cut_gguf(source.checkpoint.file, source.segments, plain,
                     replaced=_unrounded(source, student, architecture), as_loaded=True)  # fmt: skip

        check_unrounded(write, student, loaded.tokenizer, text)
    measured = measure_again(file, student, read, loaded.tokenizer, text, source=source.checkpoint.file)
    return {"errors": errors, "again": measured}


def write_requantized(checkpoint: checkpoints.Checkpoint, file: Path, kind: str) -> dict[str, Any]:
    """A .gguf file with its matrices in another number format."""
    if kind in AS_THEY_CAME:
        raise ModelError(
            f"{checkpoint.name} was not healed: its tensors stay in their number formats", "give another --gguf-type"
        )
    loaded = loading.load(checkpoint, dtype="float32", device="cpu")
    text = _some_text(loaded)
    came = checkpoint.file
    if read_header(came).finer_twin:
        came = file.with_name("unrounded.gguf")
        cut_gguf(checkpoint.file, [], came, as_loaded=True)
    how = write_rounded(came, file, kind, loaded.model, text, None)
    if came != checkpoint.file:
        came.unlink()
    return {"kind": kind} | how | _read_and_measured(file, loaded, text, checkpoint.file)


def write_converted(
    folder: Path, file: Path, config: ExportConfig, texts: Texts = Texts(), name: str | None = None
) -> dict[str, Any]:
    """A checkpoint folder through llama.cpp's converter, then where asked to fewer bits."""
    kind = config.gguf_type or "q8_0"
    checkpoints.check_folder(folder)
    own = kind in AS_THEY_CAME
    if own or "quantization_config" in read_json(folder / "config.json"):
        why = "came in no number format of GGUF" if own else "is quantized already"
        raise ModelError(f"{folder} {why}; a GGUF file is made from float weights",
                         "give another --gguf-type" if own else
                         "compress without --bits, and let --gguf-type quantize")  # fmt: skip
    # in float32: what llama.cpp computes of a bfloat16 folder is nearer to that than the folder's own dtype comes
    loaded = loading.load(checkpoints.resolve(str(folder)), device="cpu", dtype="float32")
    text = _some_text(loaded) if texts.measured is None else texts.measured
    plain = file if kind in CONVERTED else file.with_name("unrounded.gguf")
    with bar("converting", None):
        convert(folder, plain, kind if kind in CONVERTED else "f32", config.converter, name)
        _write_sliding_layers_(plain, loaded.model.config)
    _refuse_unknown(architecture_of(plain))
    how: dict[str, Any] = {"importance": 0}
    if plain != file:
        if llama_cpp_installed():  # what rounding costs would hide a small difference
            with bar("comparing before rounding", None):
                by_llama_cpp(plain, loaded.model, loaded.tokenizer, text)
        how = write_rounded(plain, file, kind, loaded.model, text, texts.calibration)
        plain.unlink()
    return {"kind": kind} | how | _read_and_measured(file, loaded, text)


def write_rounded(
    plain: Path, file: Path, kind: str, model: Any, text: torch.Tensor, calibration: torch.Tensor | None
) -> dict[str, Any]:
    """A GGUF file with all its matrices in another number format."""
    heeds = kind not in PLAIN or (kind not in FINE and calibration is not None and llama_cpp_installed())
    columns = _columns(model, text if calibration is None else calibration) if heeds else {}
    named = _in_file(plain, model, columns)
    if kind in PLAIN:
        cut_gguf(plain, [], file, replaced=requantized(plain, kind, named))
    else:
        with bar(f"quantizing to {kind}", None):
            quantize_file(plain, file, kind, named)
    return {"importance": len(columns)}


def _refuse_unknown(architecture: str) -> None:
    """Refuse what neither a table of ours nor llama.cpp itself can vouch for."""
    if not rules.known(architecture) and not llama_cpp_installed():
        raise ModelError(
            f"llama.cpp is missing, and layercut does not know how it distinguishes the layers of {architecture!r}",
            'pip install "layercut[gguf]"',
        )


def _read_and_measured(file: Path, loaded: Any, text: torch.Tensor, source: Path | None = None) -> dict[str, Any]:
    """Compare a file with the model that it was made from. source: the .gguf file it was made from."""
    name, model = architecture_of(file), loaded.model
    read = read_by_transformers(file, model.config) if readable(name) else None
    errors = {} if read is None else compare_weights(file.name, read, model, _types_of(model, file))
    return {"errors": errors, "again": measure_again(file, model, read, loaded.tokenizer, text, source=source)}


def _some_text(loaded: Any) -> torch.Tensor:
    """Token ids [N, T] of Python's own documentation."""
    window = min(WINDOW, decoder_stack.positions(loaded.model.config) or WINDOW)
    return load_blocks(
        "python-docs", loaded.tokenizer, tokens=CHECK_TOKENS, window=window, seed=0, order="as written"
    ).tokens


def _write_sliding_layers_(file: Path, config: Any) -> None:
    """Write into a converted file which layers slide, where llama.cpp would take others."""
    full = unlike_the_folder(file, config)
    if full is None:
        return
    spelled = file.with_name("spelled.gguf")
    cut_gguf(file, [], spelled, full=full)
    spelled.replace(file)
    say("note", f"which layers slide is written as {rules.PATTERN}, which llama.cpp reads from {rules.NEEDS_BUILD} on")


def _types_of(model: Any, file: Path) -> dict[str, str]:
    """The GGML type, in lower case, that each parameter has in a file; of those that llama.cpp parts, the coarsest."""
    types, coarse = stored_types(file), coarsest(file)[1].lower()
    names = possible_names(model, architecture_of(file))
    return {parameter: types.get(name or "", coarse) for parameter, name in names.items()}
