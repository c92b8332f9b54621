"""llama.cpp's quantization: of a single matrix, and of a whole file. The library comes prebuilt (extra `gguf`).

Used where a GGUF file is written (`export/gguf_tensors.py`, `export/gguf_export.py`). The `gguf` package rounds to the
plainest types itself, without importance; what else there is, is llama.cpp's own. An importance matrix (the mean square
of what each column of a matrix is multiplied with, `export/importance.py`) makes it round what matters less coarsely.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from layercut.errors import ConfigError, ModelError, RunError

PLAIN = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""GGML types that the `gguf` package itself writes."""
DECLARED = """
size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
                           const float * imatrix);
bool ggml_quantize_requires_imatrix(int type);
"""
"""Of ggml.h, b11739."""


def llama_cpp_installed() -> bool:
    """Whether a fresh process would find llama-cpp-py-sync."""
    return importlib.util.find_spec("llama_cpp_py_sync") is not None


def quantized_rows(data: np.ndarray, kind: Any, importance: np.ndarray | None = None) -> np.ndarray:
    """A matrix in a GGML type."""
    from gguf import GGML_QUANT_SIZES, quants

    plain = kind.name.lower() in PLAIN
    if plain and (importance is None or kind.name in ("F32", "F16", "BF16")):
        return quants.quantize(np.ascontiguousarray(data), kind)
    ffi, library = _ggml()
    if importance is None and library.ggml_quantize_requires_imatrix(int(kind)):
        raise ModelError(f"{kind.name} needs an importance matrix, and none was measured", "take another --gguf-type")
    rows = np.ascontiguousarray(data, dtype=np.float32).reshape(-1, data.shape[-1])
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.zeros((len(rows), rows.shape[1] // block * size), np.uint8)
    weights = ffi.NULL
    if importance is not None:
        held = np.ascontiguousarray(importance, dtype=np.float32)
        weights = ffi.from_buffer("float[]", held)
    numbers, room = ffi.from_buffer("float[]", rows), ffi.from_buffer("char[]", packed)
    library.ggml_quantize_chunk(int(kind), numbers, room, 0, len(rows), rows.shape[1], weights)
    return packed.reshape(*data.shape[:-1], -1)


def quantize_file(source: Path, out: Path, kind: str, importance: Mapping[str, np.ndarray]) -> None:
    """A GGUF file in one of llama.cpp's mixtures."""
    from gguf import LlamaFileType

    library, ffi = require_llama_cpp(), _ffi()
    library.llama_backend_init()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = int(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    settings.allow_requantize = True  # kept tensors of a quantized source are quantized again
    entries, alive = _importance_entries(ffi, importance)
    if importance:
        settings.imatrix = entries
    said: list[str] = []
    log = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda _level, text, _: said.append(
        ffi.string(text).decode(errors="replace")))  # fmt: skip
    library.llama_log_set(log, ffi.NULL)
    failed = library.llama_model_quantize(os.fsencode(source), os.fsencode(out), ffi.new(
        "llama_model_quantize_params *", settings))  # fmt: skip
    del alive
    if failed:
        why = next(
            (line.strip() for line in reversed(said) if "fail" in line or "rror" in line or "issing" in line), ""
        )
        if "iostream error" in why:  # of writing: the source has been read by then
            raise RunError(f"llama.cpp cannot write {out}: {why}", "free some space, or name another --out")
        told = f": {why}" if why else ""
        raise ModelError(f"llama.cpp cannot quantize {source.name} to {kind}{told}", "take another --gguf-type")


def _importance_entries(ffi: Any, importance: Mapping[str, np.ndarray]) -> tuple[Any, list[Any]]:
    """llama.cpp's list of importance by name, which ends with an empty entry, and what must live as long as it."""
    entries = ffi.new("struct llama_model_imatrix_data[]", len(importance) + 1)
    alive: list[Any] = [entries]
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        held = np.ascontiguousarray(values, dtype=np.float32)
        key, numbers = ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", held)
        entry.name, entry.data, entry.size = key, numbers, held.size
        alive += [key, numbers, held]
    return entries, alive


def require_llama_cpp() -> Any:
    """llama.cpp's C functions."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_lib
    except ImportError:
        raise ConfigError(
            "this number format needs a package that is missing: llama-cpp-py-sync",
            f'pip install "layercut[gguf]", or a --gguf-type of {", ".join(PLAIN)}',
        ) from None
    return get_lib()


def _ffi() -> Any:
    """cffi's view of llama.cpp's C interface."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi

    return get_ffi()


@cache
def _ggml() -> tuple[Any, Any]:
    """cffi and the functions of ggml that llama.h does not declare, out of the same library."""
    require_llama_cpp()
    from cffi import FFI
    from llama_cpp_py_sync._cffi_bindings import _find_library

    ffi = FFI()
    ffi.cdef(DECLARED)
    return ffi, ffi.dlopen(str(_find_library()))
