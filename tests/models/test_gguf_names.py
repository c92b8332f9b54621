"""The ways to name a .gguf file: in a Hub repository, through links as the Hub's cache has them, alone in a folder."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import folders
import tiny
from hub_stand_in import Hub, Repository
from layercut.cli.command_line import main
from layercut.errors import ModelError
from layercut.models import checkpoints, loading
from layercut.pipeline.resolve_options import default_folder

gguf = pytest.importorskip("gguf")
from gguf_writer import write_gguf  # noqa: E402 - it needs gguf


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
