"""The GGUF file of a run or of a checkpoint folder: written, read back by transformers and llama.cpp, measured again.

Two ways, between which `export/formats.py` chooses. A run that began from a .gguf file gives one again: the bytes of
all that was not healed stay (`write_healed`). A checkpoint folder goes through llama.cpp's converter
(`write_converted`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from layercut.config import ExportConfig
from layercut.data.blocks import load_blocks
from layercut.errors import ModelError
from layercut.evaluation import perplexity
from layercut.export.checkpoint import CHECK_TOKENS
from layercut.export.gguf_check import (
    by_llama_cpp,
    compare_weights,
    llama_cpp_installed,
    read_by_transformers,
    readable,
    unlike_the_folder,
)
from layercut.export.gguf_tensors import (
    CONVERTED,
    PLAIN,
    architecture_of,
    convert,
    gguf_tensors,
    quantize_by_llama_cpp,
    requantized,
)
from layercut.models import checkpoints, loading
from layercut.models import llama_cpp_rules as rules
from layercut.progress import bar, say
from layercut.segments import Segment
from layercut.surgery import cut_gguf, cut_segment_

WINDOW = 256
"""Tokens a row of the text that a GGUF file is measured on where no run brings its own."""


def write_healed(run: Path, source: str, file: Path, kind: str, text: torch.Tensor) -> dict[str, Any]:
    """The source file without the run's segments, with what healing changed replaced.

    Args:
        run: the folder of a finished run that began from `source`.
        source: a .gguf file.
        file: where to write.
        kind: the GGML type of what was healed, in lower case; a K-quant: of all matrices.
        text: token ids [N, T] to measure on.

    Returns:
        "healed": names of parameters, "errors": relative error of each that was rounded, "again": what was measured.

    Raises:
        ModelError: the file, read back, is not the run's model.
    """
    checkpoint = checkpoints.resolve(source)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    segments = [Segment(*bounds) for bounds in checkpoints.read_json(run / "cut.json")["segments"]]
    healed = _healed_weights(run)
    loaded = loading.load(checkpoint, dtype=settings["dtype"], device="cpu")
    student = loaded.model
    cut_segment_(student, segments)
    loading.replace_parameters_(student, healed)
    plain = file if kind in PLAIN else file.with_name("plain.gguf")
    tensors = gguf_tensors(healed, student.config, architecture_of(checkpoint.file), kind if kind in PLAIN else "f16")
    cut_gguf(checkpoint.file, segments, plain, replaced=tensors)
    rounded = {name: ggml.name.lower() for name, (_, ggml) in zip(healed, tensors.values(), strict=True)}
    if unlike_the_folder(plain, student.config) is not None:
        raise ModelError(f"{plain.name} gives llama.cpp other sliding layers than the model has", "report this fault")
    read = read_by_transformers(plain, student.config)
    errors = compare_weights(plain.name, read, student, rounded)
    if plain != file:
        quantize_by_llama_cpp(plain, file, kind)
        read = read_by_transformers(file, student.config)
        errors = compare_weights(file.name, read, student, _matrices(student, kind))
    with bar("measuring again", None):
        again = _measure_again(file, student, read, loaded.tokenizer, text)
    return {"healed": sorted(healed), "errors": errors, "again": again}


def _healed_weights(run: Path) -> dict[str, torch.Tensor]:
    """What fold and tuning changed; quantization is not among it, a GGUF file has its own."""
    heal, fold = checkpoints.read_json(run / "heal.json"), checkpoints.read_json(run / "fold.json")
    if heal["tuning"]:
        return load_file(run / "tuned.safetensors")
    return load_file(run / "folded.safetensors") if fold["changed"] else {}


def write_converted(folder: Path, file: Path, config: ExportConfig, text: torch.Tensor | None) -> dict[str, Any]:
    """A checkpoint folder through llama.cpp's converter, then where asked to fewer bits.

    Args:
        folder: a checkpoint of float weights.
        file: where to write.
        config: the type of the weights, and where the converter is.
        text: token ids [N, T] to measure on; None: Python's own documentation.

    Returns:
        "errors": relative error of each parameter that was rounded, "again": what was measured.

    Raises:
        ConfigError: there is no converter.
        ModelError: a quantized folder, an architecture that llama.cpp does not know, or the file, read back, is not the
            folder's model.
    """
    kind = config.gguf_type
    checkpoints.check_folder(folder)
    if "quantization_config" in checkpoints.read_json(folder / "config.json"):
        raise ModelError(
            f"{folder} is quantized already; a GGUF file is made from float weights",
            "compress without --bits, and let --gguf-type quantize",
        )
    loaded = loading.load(checkpoints.resolve(str(folder)), device="cpu")
    plain = file if kind in CONVERTED else file.with_name("plain.gguf")
    with bar("converting", None):
        convert(folder, plain, kind if kind in CONVERTED else "f32", config.converter)
        _write_sliding_layers_(plain, loaded.model.config)
        if kind == "q4_0":
            cut_gguf(plain, [], file, replaced=requantized(plain, kind))
        elif plain != file:
            quantize_by_llama_cpp(plain, file, kind)
    return _read_and_measured(plain, file, loaded, kind, text if text is not None else _some_text(loaded))


def _read_and_measured(plain: Path, file: Path, loaded: Any, kind: str, text: torch.Tensor) -> dict[str, Any]:
    """Compare a converted file with the model it was made from. plain: the file before its weights were rounded."""
    name, model = architecture_of(file), loaded.model
    if not rules.known(name) and not llama_cpp_installed():
        raise ModelError(
            f"layercut does not know how llama.cpp distinguishes the layers of {name!r}, and it is not installed",
            'pip install "layercut[llamacpp]"',
        )
    read = read_by_transformers(file, model.config) if readable(name) else None
    errors = {} if read is None else compare_weights(file.name, read, model, _matrices(model, kind))
    with bar("measuring again", None):
        if plain != file and llama_cpp_installed():  # what quantization costs would hide a small difference
            by_llama_cpp(plain, model, loaded.tokenizer, text)
        again = _measure_again(file, model, read, loaded.tokenizer, text, judge=plain == file)
    return {"errors": errors, "again": again}


def _some_text(loaded: Any) -> torch.Tensor:
    """Token ids [N, T] of Python's own documentation."""
    window = min(WINDOW, loading.positions(loaded.model.config) or WINDOW)
    return load_blocks(
        "python-docs", loaded.tokenizer, tokens=CHECK_TOKENS, window=window, seed=0, order="as written"
    ).tokens


def _write_sliding_layers_(file: Path, config: Any) -> None:
    """Write into a converted file which layers slide, where llama.cpp would take others.

    Raises:
        ModelError: llama.cpp does not read that for this architecture.
    """
    full = unlike_the_folder(file, config)
    if full is None:
        return
    spelled = file.with_name("spelled.gguf")
    cut_gguf(file, [], spelled, full=full)
    spelled.replace(file)
    say("note", f"which layers slide is written as {rules.PATTERN}, which llama.cpp reads from {rules.NEEDS_BUILD} on")


def _matrices(model: Any, kind: str) -> dict[str, str]:
    """The type each parameter may have been rounded to: matrices to that asked for, vectors stay in float32."""
    return {name: kind if p.dim() >= 2 else "f32" for name, p in model.named_parameters()}


def _measure_again(
    file: Path, model: Any, read: Any | None, tokenizer: Any, tokens: torch.Tensor, *, judge: bool = True
) -> dict[str, Any]:
    """Perplexity on tokens [N, T] of `model`, of the file as transformers `read` it, and of the file in llama.cpp.

    read: None where transformers does not know the architecture; llama.cpp is then compared with `model`, and the file
    refused where they differ, unless `judge` is False. What was not measured is None.

    Raises:
        ModelError: llama.cpp refuses the file, or computes something else.
    """
    found = {"model": perplexity(model, tokens), "file": None if read is None else perplexity(read, tokens)}
    theirs = None
    if llama_cpp_installed():
        reference = model if read is None else read
        theirs = by_llama_cpp(file, reference, tokenizer, tokens, judge=judge or read is not None)
    return {"tokens": tokens.numel(), "window": tokens.shape[1], "perplexity": found, "llama_cpp": theirs}
