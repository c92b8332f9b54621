"""What a user can get wrong: exit code 2, an `error:` that says what, a `hint:` that mends it, and nothing left behind.

The commands are in tests/misuses.py, damaged checkpoints here. What needs no weights is refused before torch
is imported.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

import misuses
from layercut.cli import early_checks
from layercut.cli.command_line import main
from layercut.errors import RunError
from layercut.files import write_text
from layercut.models.checkpoints import resolve

Spoil = Callable[[Path], object]
FIRST = [*((command, "", words) for command, words in misuses.EARLY.items()),
         *((command, missing, words) for command, (missing, words) in misuses.WITHOUT.items())]  # fmt: skip


@pytest.fixture
def names(tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path) -> dict[str, object]:
    """What the commands call {model}, {text}, {heldout} and {tmp}."""
    return {"model": tiny_model, "text": texts[0], "heldout": texts[1], "tmp": tmp_path}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(argv) == 2
    check_words(capsys.readouterr().err, *words)


def check_words(stderr: str, *words: str) -> None:
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    said = [line for line in lines if line.startswith(("error: ", "hint: "))]
    assert [line.partition(":")[0] for line in said] == ["error", "hint"], stderr
    assert lines[-2:] == said, "something is said after, or in between, error and hint"
    for word in words:
        assert word in " ".join(said), f"{word!r} is not in:\n{stderr}"


def nothing_left(out: Path) -> None:
    """No artefact of a stage that needs the model, no model, no partial file."""
    left = {path.name for path in out.glob("*")} if out.is_dir() else set()
    assert (
        not {name for name in left if name.endswith(".json")}
        - {"env.json", ".digests.json"}
        - {f"text-{use}.json" for use in ("evaluation", "calibration", "heldout", "tuning", "shared")}
    )
    assert not [name for name in left if "partial" in name or name in ("model", "report.html")]


# --- commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def early(tiny_model: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of each command, given to one process: exit code, stderr, and what of torch and its kin it imported."""
    place = tmp_path_factory.mktemp("place")
    names = {"model": tiny_model, "text": texts[0], "heldout": texts[1], "tmp": place}
    with misuses.litter(place, texts[0]):
        done = subprocess.run(
            [sys.executable, misuses.__file__], capture_output=True, text=True,
            env=os.environ | {"HF_HOME": str(place)},
            input="".join(f"{json.dumps([gone, misuses.argv(command, names)])}\n" for command, gone, _ in FIRST),
        )  # fmt: skip
        assert not (place / "run").exists()
        lines = zip(FIRST, done.stdout.splitlines(), strict=True)
        yield {command: json.loads(line) for (command, *_), line in lines}, names


@pytest.mark.parametrize(("command", "words"), [(command, words) for command, _, words in FIRST])
def test_what_needs_no_weights_is_refused_before_torch_is_imported(command, words, early):
    code, said, imported = early[0][command]
    assert (code, imported) == (2, [])
    check_words(said, *words.format_map(early[1]).split("|"))


@pytest.mark.parametrize("command", misuses.LATER)
def test_what_the_run_sees_is_refused_before_weights_are_loaded(command, names, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("layercut.models.placement.load", lambda *_, **__: pytest.fail("weights are loaded"))
    with misuses.litter(tmp_path, names["text"]):
        refused(misuses.argv(command, names), capsys, *misuses.LATER[command].format_map(names).split("|"))
    nothing_left(tmp_path / "run")


@pytest.mark.parametrize("model", ["what is this?", ""])
def test_a_name_of_no_model_is_refused(model, tmp_path, capsys):
    refused(
        ["compress", model, "--ratio=0.25", f"--out={tmp_path / 'run'}"], capsys, repr(model), "Hub id (owner/name)"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the machine has an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_there_is_refused(device, names, capsys):
    refused(misuses.argv(f"compress {{model}} --ratio=0.25 --device={device}", names), capsys, device, "--device cpu")


# --- the checkpoint ---------------------------------------------------------------------------------------


def edit_config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def shard(folder: Path, *, second: str = "model-00002-of-00002.safetensors", write: bool = True) -> None:
    """Two shards and their index, in the place of the one file."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, keys = "model-00001-of-00002.safetensors", sorted(weights)
    half = len(keys) // 2
    places = {key: first if i < half else second for i, key in enumerate(keys)}
    for name in {first, second} if write else {first}:
        save_file({key: weights[key] for key in keys if places[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_then_truncate(folder: Path) -> None:
    shard(folder)
    os.truncate(folder / "model-00002-of-00002.safetensors", 5000)


def drop_a_layer(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".layers.7." not in k}, file, {"format": "pt"})


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove(*patterns: str) -> Spoil:
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def write(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def index_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json").write_text("{}")


SPOILED: dict[str, tuple[Spoil, list[str]]] = {
    "no config.json": (remove("config.json"), ["no file", "config.json", "complete model folder"]),
    "config.json is not JSON": (write("config.json", "{"), ["config.json", "not valid JSON", "fetch"]),
    "config.json is a list": (write("config.json", "[]"), ["config.json", "does not hold an object"]),
    "config.json without a model type": (write("config.json", "{}"), ["config", "cannot be read"]),
    "no tokenizer": (remove("token*"), ["holds no tokenizer", "copy tokenizer.json"]),
    "tokenizer is not JSON": (write("tokenizer.json", "{"), ["tokenizer", "cannot be loaded"]),
    "no weights": (remove("*.safetensors"), ["holds no weights", "*.safetensors"]),
    "corrupt weights": (write("model.safetensors", b"\xff" * 4000), ["corrupt or truncated", "4,000 bytes"]),
    "truncated weights": (truncate, ["model.safetensors", "corrupt or truncated", "fetch this file again"]),
    "truncated shard": (shard_then_truncate, ["00002-of-00002", "corrupt or truncated", "5,000 bytes"]),
    "missing shard": (lambda f: shard(f, write=False), ["00002-of-00002", "not there", "fetch"]),
    "shard outside": (lambda f: shard(f, second="../stolen.safetensors"), ["../stolen.safetensors", "outside the"]),
    "index without a weight map": (index_alone, ["index.json", "no weight_map"]),
    "pickled weights": (pickle_only, ["pickled weights", "run code", "--allow-pickle"]),
    "encoder-decoder": (T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained, ["encoder-decoder"]),
    "masked": (BertConfig(architectures=["BertForMaskedLM"]).save_pretrained, ["not a causal language model"]),
    "vision model": (edit_config(model_type="vit"), ["not a causal language model", "vit"]),
    "unknown architecture": (edit_config(model_type="dreamt-up"), ["dreamt-up", "pip install -U transformers"]),
    "remote code": (edit_config(model_type="theirs", auto_map={"AutoConfig": "code.C"}), ["--trust-remote-code"]),
    "more layers than weights": (edit_config(num_hidden_layers=9), ["lacks", "model.layers.8", "num_hidden_layers"]),
    "weights of a layer missing": (drop_a_layer, ["lacks", "model.layers.7"]),
    "weights of another width": (edit_config(intermediate_size=80), ["mlp", "[32, 64]", "[32, 80]", "config.json"]),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_checkpoint_is_refused(kind, names, tiny_model, tmp_path, capsys):
    spoil, words = SPOILED[kind]
    folder = shutil.copytree(tiny_model, tmp_path / "spoiled")
    spoil(folder)
    refused(misuses.argv("compress {model} --segment=3:5", names | {"model": folder}), capsys, *words)
    nothing_left(tmp_path / "run")


# --- the Hub, which no test reaches -----------------------------------------------------------------------


class Answer:
    """As much of an HTTP response as the Hub's errors ask for."""

    status_code, headers, text = 404, {}, ""
    request = None


HUB: dict[str, tuple[type[Exception], list[str]]] = {
    "unknown": (errors.RepositoryNotFoundError, ["no model 'owner/name' on the Hub", "spelling", "hf auth login"]),
    "gated": (errors.GatedRepoError, ["'owner/name' is gated", "https://huggingface.co/owner/name"]),
    "broken": (errors.EntryNotFoundError, ["'owner/name' could not be fetched", "not there"]),
}


@pytest.mark.parametrize("kind", HUB)
def test_what_the_hub_refuses_is_refused(kind, names, tmp_path, capsys, monkeypatch):
    error, words = HUB[kind]

    def refuse(*_: object, **__: object) -> None:
        known = {"response": Answer()} if issubclass(error, errors.HfHubHTTPError) else {}
        raise error("it is not there", **known)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None if kind != "unknown" else refuse())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    refused(misuses.argv("compress owner/name --ratio=0.25", names), capsys, *words)
    assert not (tmp_path / "run").exists()


def test_an_earlier_fetch_serves_without_a_network(tiny_model, tmp_path, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    cache = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(tiny_model, cache / "snapshots" / "0123abcd")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert resolve("owner/name").folder == cache / "snapshots" / "0123abcd"


def test_without_a_hub_the_default_texts_come_with_python_and_that_is_said(tiny_model, tmp_path, monkeypatch, capsys):
    taken: list[Any] = []
    monkeypatch.setattr(early_checks, "_online", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("layercut.pipeline.journey.compress", lambda _, config, **__: taken.append(config) or tmp_path)
    monkeypatch.setattr("layercut.cli.command_line._show", lambda *_: None)
    assert main(["compress", str(tiny_model), "--ratio=0.25", "--window=16"]) == 0
    assert (taken[0].text.data, taken[0].evaluate.eval_data) == ("python-docstrings", "python-docs")
    said = capsys.readouterr().err
    assert "--data FILE.txt" in said
    assert "--eval-data FILE.txt" in said
    monkeypatch.setattr(early_checks, "_online", lambda: True)
    assert main(["compress", str(tiny_model), "--ratio=0.25", "--window=16"]) == 0
    assert (taken[1].text.data, taken[1].evaluate.eval_data) == ("c4", "wikitext2")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("data: python-docstrings\neval_data: wikitext2\n")
    (tmp_path / "begun" / "env.json").write_text('{"versions": {"layercut": "0"}}')
    assert main(["compress", str(tiny_model), "--ratio=0.25", "--window=16", f"--out={tmp_path / 'begun'}"]) == 0
    assert (taken[2].text.data, taken[2].evaluate.eval_data) == ("python-docstrings", "wikitext2"), "as the run began"


# --- in a process of its own: exit code, and no noise of the libraries beneath ----------------------------


def layercut(argv: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layercut.cli", *argv],
        capture_output=True, text=True, env=os.environ | environment, timeout=120,
    )  # fmt: skip


@contextmanager
def deaf_server() -> Iterator[tuple[int, list[None]]]:
    """A port that hangs up on everybody, and how often that was."""
    calls: list[None] = []

    def hang_up() -> None:
        with suppress(OSError):
            while True:
                server.accept()[0].close()
                calls.append(None)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=hang_up, daemon=True).start()
        yield server.getsockname()[1], calls


def test_a_hub_model_without_a_network_is_refused_at_once(names, tmp_path):
    with deaf_server() as (port, calls):
        nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        done = layercut(misuses.argv("compress owner/name --ratio=0.25", names), **nowhere)
    assert len(calls) <= 2  # the libraries beneath would try again and again, with waits between
    assert done.returncode == 2
    check_words(done.stderr, "'owner/name'", "not on this machine", "Hub cannot be reached", "local folder")
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert not (tmp_path / "run").exists()


# --- a disk that refuses ----------------------------------------------------------------------------------


def test_output_on_a_full_disk_is_refused():
    command = [sys.executable, "-m", "layercut.cli", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the output cannot be written: No space left on device",
        "hint: free some space, or name another --out",
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["the output cannot be written", "free some space"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), ["/x/y cannot be written", "free some space"]),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), ["/x/y cannot be written: Read-only", "may write to"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), ["/x/y cannot be opened", "may write to"]),
        (SafetensorError("I/O error: No space left on device (os error 28)"), ["cannot be written: No space", "free"]),
    ],
)
def test_a_disk_that_refuses_is_the_users_to_mend(error, words, tmp_path, capsys, monkeypatch):
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("layercut.report.page.write_report", fails)
    (tmp_path / "summary.json").touch()
    refused(["report", str(tmp_path)], capsys, *words)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.files.sync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(RunError, match=r"report\.html cannot be written: No space left"):
        write_text(tmp_path / "report.html", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "old")]
