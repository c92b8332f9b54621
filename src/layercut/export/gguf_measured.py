"""What became of a model in a GGUF file: perplexity before and after, and whether llama.cpp computes the model.

Between `export/gguf_export.py`, which writes files, and `export/gguf_check.py`, which compares them. Held against the
model that the file was made from, never against another reading of the same file, or a fault of the layout would be on
both sides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layercut.errors import ModelError
from layercut.evaluation import perplexity
from layercut.export.ggml import llama_cpp_installed
from layercut.export.gguf_check import by_llama_cpp, perplexity_by_llama_cpp
from layercut.export.gguf_tensors import tensor_types
from layercut.progress import bar

FLOATS = {"F32", "F16", "BF16"}
LARGEST_JUMP = ((8.0, 1.05), (5.0, 1.3), (4.0, 2.0), (0.0, 10.0))
"""Bits a weight; how many times the model's perplexity a file may have whose coarsest tensors have at least so many.

Seen on SmolLM2-135M, which suffers more than larger models: Q8_0 1.01, Q4_K_M 1.05, Q4_0 1.4 times.
Beyond these the file is not what rounding makes of the model."""


def measure_again(
    file: Path, model: Any, read: Any | None, tokenizer: Any, tokens: torch.Tensor, *, source: Path | None = None
) -> dict[str, Any]:
    """Perplexity of the model, of the file as transformers reads it, and of it and of the source in llama.cpp."""
    with bar("measuring again", None):
        before = perplexity(model, tokens)
        found = {"model": before, "file": None if read is None else perplexity(read, tokens)}
        theirs = None
        if llama_cpp_installed():
            judge = not rounded(file)
            theirs = by_llama_cpp(file, model, tokenizer, tokens, judge=judge)
            if source is not None:
                theirs["source_perplexity"] = perplexity_by_llama_cpp(source, tokens)
                theirs["source_bytes"] = source.stat().st_size
    refuse_jump(file, theirs["perplexity"] if theirs else found["file"], before)
    return {"tokens": tokens.numel(), "window": tokens.shape[1], "perplexity": found, "llama_cpp": theirs}


def check_unrounded(write: Callable[[Path], None], model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    """Have llama.cpp read a file whose weights are the model's own, since rounding would hide a small difference."""
    if not llama_cpp_installed():
        return
    with tempfile.TemporaryDirectory() as folder, bar("comparing before rounding", None):
        file = Path(folder) / "unrounded.gguf"
        write(file)
        by_llama_cpp(file, model, tokenizer, tokens)


def rounded(file: Path) -> bool:
    """Whether a file holds tensors in fewer bits than 16."""
    return bool(set(tensor_types(file)) - FLOATS)


def refuse_jump(file: Path, found: float | None, wanted: float) -> None:
    """Refuse a file whose perplexity has risen by more than its number formats explain."""
    if found is None:
        return
    bits, kind = coarsest(file)
    most = next(factor for least, factor in LARGEST_JUMP if bits >= least)
    if not found <= most * wanted:
        raise ModelError(
            f"{file.name} is not what it was made from: its perplexity is {found:.4g}, {found / wanted:.2f} times that "
            f"of the model, {wanted:.4g}; {kind} explains up to {most:g} times",
            "take a --gguf-type of more bits, or the checkpoint folder",
        )


def coarsest(file: Path) -> tuple[float, str]:
    """Bits a weight of the coarsest type among a file's tensors, and that type's name."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    bits = {}
    for kind in tensor_types(file):
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        bits[kind] = 8 * size / block
    return min((value, kind) for kind, value in bits.items())
