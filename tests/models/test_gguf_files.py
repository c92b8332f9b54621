"""GGUF files as they come: under many names, with tied embeddings that stand in them twice, and damaged.

The last tests are a small part of `python -m tests.fuzz`.
"""

from __future__ import annotations

import importlib.util
import random
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import folders
import tiny
from hub_stand_in import Hub, Repository
from layercut.cli.command_line import main
from layercut.errors import ModelError
from layercut.export.gguf_check import by_llama_cpp
from layercut.export.gguf_tensors import stored_types
from layercut.models import checkpoints, loading
from layercut.models.gguf_header import EMBEDDING, HEAD, TIED_WITHOUT_HEAD, block_of, open_gguf, read_header
from layercut.pipeline.resolve_options import default_folder
from layercut.segments import Segment
from layercut.surgery import cut_gguf

gguf = pytest.importorskip("gguf")
from fuzz import ROOM, bounded, cut, load, of_gguf, outcome, sound_gguf  # noqa: E402 - it needs gguf
from gguf_writer import rewritten, write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.llama(4, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    return write_gguf(model, folders.tokenizer(), tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", "Q8_0")


@pytest.fixture
def hub(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Hub with a repository of GGUF files."""
    hub, repository = Hub(), Repository(private=False)
    repository.files = dict.fromkeys(("tiny.Q8_0.gguf", "more/tiny.gguf", "README.md"), file.read_bytes())
    hub.repositories["owner/tiny-GGUF"] = repository
    server = hub.serve()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    template = here + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def refused(name: str) -> ModelError:
    with pytest.raises(ModelError) as error:
        checkpoints.resolve(name)
    return error.value


def test_a_file_of_a_hub_repository(hub, file, tmp_path, monkeypatch):
    for name in ("owner/tiny-GGUF:tiny.Q8_0.gguf", "owner/tiny-GGUF:more/tiny.gguf"):
        found = checkpoints.resolve(name)
        assert found.name == name
        assert found.file.is_symlink()  # as the Hub's cache keeps it
        assert found.file.read_bytes() == file.read_bytes()
    assert loading.load(found).model.config.num_hidden_layers == 4
    out = tmp_path / "cut.gguf"
    assert main(["cut", "owner/tiny-GGUF:tiny.Q8_0.gguf", "--segment=1:2", f"--out={out}"]) == 0
    assert checkpoints.resolve(str(out)).gguf == "cut.gguf"
    # fetched once, it is found without the Hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert checkpoints.resolve("owner/tiny-GGUF:tiny.Q8_0.gguf").file.read_bytes() == file.read_bytes()
    assert "Hub cannot be reached" in refused("owner/tiny-GGUF:other.gguf").message


def test_what_a_hub_repository_has_is_told(hub):
    missing = refused("owner/tiny-GGUF:tiny.Q4_K_M.gguf")
    assert "has no file 'tiny.Q4_K_M.gguf'; it has more/tiny.gguf, tiny.Q8_0.gguf" in missing.message
    assert missing.hint == "owner/tiny-GGUF:more/tiny.gguf"
    alone = refused("owner/tiny-GGUF")
    assert "holds GGUF files and no config.json" in alone.message
    assert alone.hint == "give one: owner/tiny-GGUF:more/tiny.gguf"
    assert "no model 'owner/none' on the Hub" in refused("owner/none:x.gguf").message


def test_links_and_other_names(file, tmp_path):
    blob, link = tmp_path / "blobs" / "0a1b", tmp_path / "snapshots" / "tiny.gguf"
    for folder in (blob.parent, link.parent):
        folder.mkdir()
    blob.write_bytes(file.read_bytes())
    link.symlink_to(Path("..") / "blobs" / "0a1b")
    (tmp_path / "again.gguf").symlink_to(link)
    for name in (link, tmp_path / "again.gguf", blob):
        found = checkpoints.resolve(str(name))
        assert loading.load(found).model.config.num_hidden_layers == 4
        assert main(["cut", str(name), "--segment=1:2", f"--out={tmp_path / 'cut.gguf'}", "--force"]) == 0
    (tmp_path / "broken.gguf").symlink_to("nowhere.gguf")
    assert "no file" in refused(str(tmp_path / "broken.gguf")).message


def test_a_folder_that_holds_but_a_gguf_file(file, tmp_path):
    (tmp_path / "model.gguf").write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("a card")
    assert checkpoints.resolve(str(tmp_path)).file == tmp_path / "model.gguf"
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    assert "holds 2 .gguf files: model.gguf, other.gguf" in refused(str(tmp_path)).message


def test_the_run_is_named_after_the_file():
    assert default_folder("owner/tiny-GGUF:more/tiny.Q8_0.gguf") == Path("runs/tiny.Q8_0")
    assert default_folder("files/tiny.gguf") == Path("runs/tiny")


# --- tied embeddings in two roundings: read, cut and written as the one that they were ---

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
def test_every_command_writes_them_once(texts, tmp_path):
    plain = write_gguf(tied("llama"), folders.tokenizer(), tmp_path / "plain.gguf")
    file, out = twice(plain, tmp_path / "twice.gguf", "Q4_0", "Q8_0"), tmp_path / "out.gguf"
    assert main(["quantize", str(file), "--gguf-type=iq4_xs", f"--out={tmp_path / 'rounded.gguf'}"]) == 0
    assert HEAD not in read_header(tmp_path / "rounded.gguf").tensors
    short = ["--tokens=128", "--window=16", "--eval-window=16", "--tune-tokens=256", "--eval-tokens=64", "--no-speed"]
    argv = ["compress", str(file), *short, "--segment=2:4", f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    assert main([*argv, f"--out={out}"]) == 0
    assert HEAD not in read_header(out).tensors
    assert torch.equal(exact(EMBEDDING, out), exact(HEAD, file))


# --- damaged ---


def test_damaged_files_are_cut_or_refused(tmp_path):
    sound = sound_gguf(tmp_path)
    ends = Counter(end for case in range(60) for end in of_gguf(sound, tmp_path, random.Random(f"1/{case}")))
    assert ends.keys() == {"ok", "refused"}
    assert ends["refused"] > 20


def changed(sound: bytes, after: bytes, skip: int, code: str, value: int) -> bytes:
    """`sound` with a number in the place `skip` bytes behind `after`."""
    at = sound.index(after) + len(after) + skip
    packed = struct.pack(f"<{code}", value)
    return sound[:at] + packed + sound[at + len(packed) :]


@pytest.mark.parametrize("value", [1 << 31, (1 << 32) - 1])
def test_a_count_is_bounded_by_the_files_size(tmp_path, value):
    sound, out = sound_gguf(tmp_path).read_bytes(), tmp_path / "out.gguf"
    cases = {
        "blocks": changed(sound, b"llama.block_count", 4, "I", value),
        "elements": changed(sound, b"tokenizer.ggml.tokens", 8, "Q", value),
        "keys": sound[:16] + struct.pack("<Q", value) + sound[24:],
        "tensors": sound[:8] + struct.pack("<Q", value) + sound[16:],
        "rank": changed(sound, b"token_embd.weight", 0, "I", value),
        "columns": changed(sound, b"token_embd.weight", 4, "Q", value),
    }
    for name, data in cases.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        with bounded(5, 1 << 27), pytest.raises(ModelError, match="corrupt"):
            read_header(file)
        assert outcome(cut, file, out, ROOM) == "refused"
    file.write_bytes(changed(sound, b"llama.embedding_length", 4, "I", value))
    assert outcome(load, file, out, ROOM) == "refused"


def test_a_layers_number_is_written_in_ascii_digits():
    assert block_of("blk.13.attn_q.weight") == 13
    for name in ("blk.².attn_q.weight", "blk.٣.attn_q.weight", "blk.03.x", "blk.-1.x", "blk.1", "output.weight"):
        assert block_of(name) is None
