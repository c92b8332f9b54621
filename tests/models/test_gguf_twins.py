"""Tied embeddings that a .gguf file keeps twice, in two roundings: read, cut and written as the one that they were."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import folders
import tiny
from layercut.cli.command_line import main
from layercut.export.gguf_check import by_llama_cpp
from layercut.export.gguf_tensors import stored_types
from layercut.models import checkpoints, loading
from layercut.models.gguf_header import EMBEDDING, HEAD, TIED_WITHOUT_HEAD, open_gguf, read_header
from layercut.segments import Segment
from layercut.surgery import cut_gguf

gguf = pytest.importorskip("gguf")
from gguf_writer import rewritten, write_gguf  # noqa: E402 - it needs gguf

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp_py_sync") is None, reason="pip install llama-cpp-py-sync"
)
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tied(architecture: str) -> Any:
    """Small, but for Qwen 3's heads: transformers takes their width from its defaults, not from the file."""
    width = {"head_dim": 128} if architecture == "qwen3" else {}
    return tiny.tiny(
        CONFIGS[architecture](
            vocab_size=folders.VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=4,
            num_key_value_heads=2, num_hidden_layers=6, max_position_embeddings=128,
            initializer_range=0.15, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, **width,
        )
    )  # fmt: skip


def twice(plain: Path, out: Path, embeddings: str, head: str, scale: float = 1.0, row: int | None = None) -> Path:
    """The file with its embeddings in one type, and as the head in another, where one row or all are scaled."""
    (tensor,) = (t for t in gguf.GGUFReader(plain).tensors if t.name == EMBEDDING)
    other = tensor.data.copy()
    other[slice(None) if row is None else row] *= scale

    def add(writer: Any) -> None:
        for name, kind, data in ((EMBEDDING, embeddings, tensor.data), (HEAD, head, other)):
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(data, number), raw_dtype=number)

    return rewritten(plain, out, add, tensors=lambda name: name != EMBEDDING)


@pytest.fixture(scope="module", params=sorted(TIED_WITHOUT_HEAD))
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32, its embeddings stored once."""
    return write_gguf(tied(request.param), folders.tokenizer(), tmp_path_factory.mktemp("gguf") / "plain.gguf")


def exact(name: str, file: Path) -> torch.Tensor:
    (tensor,) = (t for t in gguf.GGUFReader(file).tensors if t.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.mark.parametrize(("embeddings", "head", "finer"), [("Q4_0", "Q8_0", HEAD), ("F16", "Q5_0", EMBEDDING)])
def test_the_finer_of_the_two_is_the_tied_matrix(plain, tmp_path, embeddings, head, finer):
    file = twice(plain, tmp_path / "twice.gguf", embeddings, head)
    assert read_header(file).finer_twin == finer
    checkpoint = checkpoints.resolve(str(file))
    assert loading.load_config(checkpoint).tie_word_embeddings
    model = loading.load(checkpoint, dtype="float32").model
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, exact(finer, file))


@pytest.mark.parametrize(
    ("embeddings", "head", "scale", "row"),
    [("Q4_0", "Q8_0", 1.5, 123), ("F16", "Q8_0", 1.05, 7), ("F32", "F32", 1.0001, None)],
)
def test_two_matrices_stay_two(plain, tmp_path, embeddings, head, scale, row):
    """A head whose every row, or one, was trained apart by more than the two types explain."""
    file = twice(plain, tmp_path / "apart.gguf", embeddings, head, scale, row)
    assert read_header(file).finer_twin is None
    assert HEAD in open_gguf(file, as_loaded=True)[0].tensors
    model = loading.load(checkpoints.resolve(str(file)), dtype="float32").model
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, exact(HEAD, file))
    assert torch.equal(model.model.embed_tokens.weight, exact(EMBEDDING, file))
    assert read_header(twice(plain, tmp_path / "same.gguf", embeddings, head)).finer_twin


@needs_llama_cpp
def test_llama_cpp_takes_the_head_from_the_embeddings_that_are_left(plain, tmp_path):
    file, out = twice(plain, tmp_path / "twice.gguf", "Q4_0", "Q8_0"), tmp_path / "out.gguf"
    cut_gguf(file, [Segment(2, 4)], tmp_path / "as-it-is.gguf")
    assert exact(HEAD, tmp_path / "as-it-is.gguf").equal(exact(HEAD, file))
    cut_gguf(file, [Segment(2, 4)], out, as_loaded=True)
    assert stored_types(out)[EMBEDDING] == "q8_0"
    assert HEAD not in read_header(out).tensors
    assert file.stat().st_size - out.stat().st_size > exact(EMBEDDING, file).numel() // 2
    read = loading.load(checkpoints.resolve(str(out)), dtype="float32")
    tokens = torch.arange(32).view(1, 32) * 7 % folders.VOCABULARY
    found = by_llama_cpp(out, read.model, read.tokenizer, tokens)
    assert found["logit_error"] < 0.02


@needs_llama_cpp
def test_every_command_writes_them_once(texts, tmp_path, quick_runs):
    plain = write_gguf(tied("llama"), folders.tokenizer(), tmp_path / "plain.gguf")
    file, out = twice(plain, tmp_path / "twice.gguf", "Q4_0", "Q8_0"), tmp_path / "out.gguf"
    assert main(["quantize", str(file), "--gguf-type=iq4_xs", f"--out={tmp_path / 'rounded.gguf'}"]) == 0
    assert HEAD not in read_header(tmp_path / "rounded.gguf").tensors
    short = ["--tokens=128", "--window=16", "--eval-window=16", "--tune-tokens=256", "--eval-tokens=64", "--no-speed"]
    argv = ["compress", str(file), *short, "--segment=2:4", f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    assert main([*argv, f"--out={out}"]) == 0
    assert HEAD not in read_header(out).tensors
    assert torch.equal(exact(EMBEDDING, out), exact(HEAD, file))
