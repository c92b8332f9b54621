"""What a user can get wrong, one row each: exit code 2, an `error:` that says what, a `hint:` that mends it.

Every row goes through the real entry, `cli.main`; some through a process of their own. No row may show a
traceback or leave a stage's artefact or a model behind.
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

from layercut.cli.command_line import main
from layercut.errors import RunError
from layercut.files import write_text
from layercut.models.checkpoints import resolve

Spoil = Callable[[Path], object]
TINY = ["--tokens=64", "--window=16", "--tune-tokens=64", "--eval-tokens=64", "--no-speed"]


@pytest.fixture
def names(tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path) -> dict[str, str]:
    """What the rows of the tables call {model}, {text}, {heldout}, {out} and {tmp}."""
    places = {"model": tiny_model, "text": texts[0], "heldout": texts[1], "out": tmp_path / "run", "tmp": tmp_path}
    return {name: str(path) for name, path in places.items()}


def command(names: dict[str, str], *changes: str, model: str = "{model}", name: str = "compress") -> list[str]:
    """A command that would work, and then flags that spoil it: those given last win."""
    usual = [*TINY, "--data={text}", "--eval-data={heldout}", "--out={out}"]
    given = {flag.partition("=")[0] for flag in changes}
    kept = [flag for flag in usual if flag.partition("=")[0] not in given]
    return [word.format_map(names) for word in [name, model, *kept, *changes]]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run it; check the form of the refusal and its words; returns what stderr said."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    check_words(captured.err, *words)
    return captured.err


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
    refused(command(names, "--segment=3:5", model=str(folder)), capsys, *words)
    nothing_left(tmp_path / "run")


# --- the command line -------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, list[str]]] = {
    "no such folder": ("./nowhere", ["./nowhere", "neither a folder nor a .gguf file", "Hub id"]),
    "no such gguf file": ("nowhere.gguf", ["no file 'nowhere.gguf'", "check the path"]),
    "a text file": ("{text}", ["calibration.txt", "not a GGUF file", "config.json"]),
    "a gguf file that is none": ("{tmp}/not.gguf", ["not a GGUF file", "starts with b'this'"]),
    "an empty gguf file": ("{tmp}/empty.gguf", ["not a GGUF file"]),
    "an empty folder": ("{tmp}/empty", ["no file", "config.json"]),
    "a folder of two gguf files": ("{tmp}", ["holds 2 .gguf files", "give one"]),
    "not a Hub id": ("what is this?", ["'what is this?'", "Hub id (owner/name)"]),
    "no name": ("", ["no model at ''"]),
}

FLAGS: dict[str, list[str]] = {
    "": ["neither --ratio nor --segment", "--ratio 0.2"],
    "--ratio=0.2 --segment=1:2": ["both --ratio and --segment", "one of them"],
    "--ratio=0.3 --group-size=32": ["--group-size is given, but nothing is quantized"],
    "--ratio=0.3 --bits=4 --bits-allowed=8": ["--bits-allowed", "--bits auto"],
    "--ratio=0.3 --probe-share=0.0004": ["--probe-share 0.0004", "0.001 to 0.999"],
    "--ratio=0": ["--ratio 0 is outside 0 to 1", "--ratio 0.2"],
    "--ratio=1": ["outside 0 to 1"],
    "--ratio=-0.5": ["--ratio -0.5 is outside 0 to 1"],
    "--ratio=nan": ["--ratio nan is outside 0 to 1"],
    "--ratio=0.01": ["0.01", "8 layers", "--ratio 0.125"],
    "--ratio=0.99": ["0.99", "8 layers", "1 to 7"],
    "--ratio=lots": ["--ratio", "lots", "float"],
    "--segment=3": ["'3'", "START:STOP", "--segment 13:19"],
    "--segment=a:b": ["'a:b'", "START:STOP", "whole numbers"],
    "--segment=5:3": ["5:3", "START < STOP"],
    "--segment=3:3": ["3:3", "empty"],
    "--segment=-1:2": ["-1:2", "negative"],
    "--segment=6:20": ["6:20", "8 layers", "0:8"],
    "--segment=1:4 --segment=3:6": ["1:4 and 3:6 overlap", "--segment 1:6"],
    "--segment=0:8": ["0:8", "all 8 layers", "keep at least one"],
    "--ratoi=0.2": ["--ratoi", "Did you mean", "--ratio"],
    "--ratio=0.2 --tokens=many": ["--tokens", "many", "int"],
    "--ratio=0.2 --tokens=0": ["--tokens 0 is too small", "1 or more"],
    "--ratio=0.2 --window=2": ["--window 2 is too small", "8 or more"],
    "--ratio=0.2 --tune-tokens=-1": ["--tune-tokens -1 is too small"],
    "--ratio=0.2 --learning-rate=7": ["--learning-rate 7 is outside 0 to 1", "1e-4"],
    "--ratio=0.2 --method=guess": ["--method", "guess", "fisher", "exhaustive"],
    "--ratio=0.2 --objective=mse": ["--objective", "mse", "next-token"],
    "--ratio=0.2 --dtype=int3": ["--dtype", "int3", "bfloat16"],
    "--ratio=0.2 --data={tmp}/broken.jsonl": ["line 2", "not JSON"],
    "--ratio=0.2 --data={tmp}/rows.jsonl:body": ["no field 'body'", "text"],
    "--ratio=0.2 --eval-data={tmp}/link.txt": ["calibration.txt", "reported on", "--eval-data"],
    "--ratio=0.2 --tune-data={heldout}": ["evaluation.txt", "tuned on", "--eval-data"],
    "--ratio=0.2 --long-context=1": ["--long-context 1", "2 and more"],
    f"--target-size={'9' * 400}": ["is no size", "MB"],
    "--config={tmp}/nowhere.yaml": ["nowhere.yaml", "cannot be read", "No such file"],
    "--config={tmp}": ["cannot be read", "directory"],
    "--config": ["--config names no file", "run.yaml"],
    "--config={tmp}/not.yaml": ["not.yaml", "is not YAML"],
    "--config={tmp}/list.yaml": ["list.yaml", "does not hold keys", "ratio: 0.2"],
    "--config={tmp}/unknown.yaml": ["'ratoi'", "unknown.yaml", "did you mean 'ratio'"],
    "--config={tmp}/wrong.yaml": ["learning", "fast", "wrong.yaml"],
    "--ratio=0.2 --out={text}/run": ["cannot be written", "Not a directory"],
    "--ratio=0.2 --out=/proc/run": ["cannot be written", "--out"],
    "--ratio=0.2 --out={tmp}": ["not empty", "no layercut run"],
}
"""More of them, refused before anything is imported, are in tests/cli/test_misuse.py."""


@pytest.fixture
def litter(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Files for the rows above to stumble over."""
    for name, content in {
        "not.gguf": b"this is no GGUF", "empty.gguf": b"",
        "broken.jsonl": b'{"text": "fine"}\n{"text":\n', "rows.jsonl": b'{"text": "fine"}\n',
        "not.yaml": b"ratio: [0.2", "list.yaml": b"- ratio", "unknown.yaml": b"ratoi: 0.2\n",
        "wrong.yaml": b"ratio: 0.2\nlearning_rate: fast\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.txt").symlink_to(texts[0])
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("litter")
def test_a_model_that_is_none_is_refused(kind, names, tmp_path, capsys):
    model, words = MODELS[kind]
    refused(command(names, "--ratio=0.25", model=model), capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.usefixtures("litter")
def test_wrong_flags_are_refused(flags, names, tmp_path, capsys):
    refused(command(names, *flags.split()), capsys, *FLAGS[flags])
    nothing_left(tmp_path / "run")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the machine has an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_there_is_refused(device, names, capsys):
    refused(command(names, "--ratio=0.25", f"--device={device}"), capsys, device, "--device cpu")


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
    refused(command(names, "--ratio=0.25", model="owner/name"), capsys, *words)
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


# --- other commands ---------------------------------------------------------------------------------------

OTHERS: dict[str, list[str]] = {
    "report {tmp}/nowhere": ["nowhere", "layercut compress"],
    "report {model}": ["no summary.json", "layercut compress"],
    "cut {model} --out={out}": ["--segment", "layercut cut --help"],
    "cut {model} --segment=3:5": ["--out", "layercut cut --help"],
    "cut {model} --segment=3:99 --out={out}": ["3:99", "8 layers"],
    "cut {model} --segment=3:5 --out={tmp}": ["exist", "--force"],
    "evaluate ./nowhere": ["./nowhere", "neither a folder"],
    "evaluate {model} --window=64 --eval-data=nowhere.txt": ["no file 'nowhere.txt'"],
    "search --ratio=0.2": ["model", "requires", "layercut search --help"],
    "compres {model}": ["compres", "Did you mean", "compress", "layercut --help"],
    "report {tmp} --ratio=1": ["--ratio", "layercut report --help"],
}


@pytest.mark.parametrize("argv", OTHERS)
@pytest.mark.usefixtures("litter")
def test_other_commands_refuse_too(argv, names, tmp_path, capsys):
    refused([word.format_map(names) for word in argv.split()], capsys, *OTHERS[argv])
    nothing_left(tmp_path / "run")


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
        done = layercut(command(names, "--ratio=0.25", model="owner/name"), **nowhere)
    assert len(calls) <= 2  # the libraries beneath would try again and again, with waits between
    assert done.returncode == 2
    check_words(done.stderr, "'owner/name'", "not on this machine", "Hub cannot be reached", "local folder")
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert not (tmp_path / "run").exists()


# --- a disk that refuses ---


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
    refused(["report", str(tmp_path)], capsys, *words)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.files.sync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(RunError, match=r"report\.html cannot be written: No space left"):
        write_text(tmp_path / "report.html", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "old")]
