"""What a user can get wrong is refused with exit code 2 before any weights are loaded, the flag that failed named."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layercut.cli import early_checks
from layercut.cli.command_line import main

HEAVY = ("torch", "transformers", "datasets", "pyarrow")
EARLY: dict[str, tuple[list[str], str]] = {
    "no model": (["./nowhere"], "./nowhere"),
    "no gguf file": (["{tmp}/nowhere.gguf"], "nowhere.gguf"),
    "no text": (["--data=nowhere.txt"], "--data"),
    "no held-out text": (["--eval-data={tmp}/nowhere.txt"], "--eval-data python-docs"),
    "no tuning text": (["--tune-data=nowhere.jsonl"], "--tune-data"),
    "nothing matches": (["--eval-data={tmp}/*.parquet"], "--eval-data"),
    "empty text": (["--eval-data={tmp}/empty.txt"], "--eval-data"),
    "blank text": (["--data={tmp}/blank.txt"], "--data"),
    "binary text": (["--data={tmp}/binary.txt"], "--data"),
    "text of another encoding": (["--tune-data={tmp}/latin.txt"], "--tune-data"),
    "too little text": (["--tokens=100000"], "--tokens"),
    "too little held-out text": (["--eval-tokens=100000"], "--eval-tokens"),
    "too little tuning text": (["--tune-data={tmp}/short.txt", "--tune-tokens=900"], "--tune-tokens"),
    "a text that may not be read": (["--eval-data={tmp}/closed.txt"], "--eval-data"),
    "a part of a mix": (["--data={text}+nowhere.txt"], "--data"),
    "a set where there is no Hub": (["--eval-data=c4"], "--eval-data FILE.txt"),
    "another's run": (["--out={tmp}/held"], "{tmp}/held"),
    "a run of a file": (["--out={tmp}/held.gguf"], "held.gguf-run"),
    "a full disk": (["--out={tmp}/full"], "--out {tmp}/full"),
    "no package for bits": (["--bits=4"], "layercut[quantize]"),
    "no package for tasks": (["--tasks=piqa"], "layercut[eval]"),
    "no package for a K-quant": (["--gguf-type=q4_k_m", "--out={tmp}/x.gguf"], "layercut[gguf]"),
    "no package for a GGUF file": (["{tmp}/some.gguf"], "layercut[gguf]"),
}
LATER: dict[str, tuple[list[str], str]] = {
    "two things to remove": (["--segment=3:5"], "--segment"),
    "no such text": (["--data=wikitxt"], "wikitxt"),
    "a folder of text": (["--data={tmp}"], "a folder"),
    "reported on as well": (["--eval-data={text}"], "--eval-data"),
    "a window that is too long": (["--window=256"], "--window 128"),
    "no such engine": (["--for=vlm"], "--for vllm"),
    "a device that is not there": (["--device=abacus"], "abacus"),
    "a file in a folder's place": (["--out={text}"], "--out"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Files to stumble over; neither a Hub nor optional packages; loading weights is a failure."""
    contents = {"empty.txt": b"", "blank.txt": b"\n \n", "binary.txt": b"text\0text" * 300, "short.txt": b"few words",
                "latin.txt": b"caf\xe9 " * 400, "closed.txt": b"text", "some.gguf": b"GGUF"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    held = []
    for name in ("held", "held.gguf-run"):
        (tmp_path / name).mkdir()
        held.append((tmp_path / name / ".lock").open("w"))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
    monkeypatch.setattr(early_checks, "_online", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("layercut.models.placement.load", loaded)
    yield tmp_path
    for lock in held:
        lock.close()


def refused(
    flags: list[str], named: str, place: Path, model: Path, texts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"tmp": str(place), "text": str(texts[0])}
    words = [flag.format_map(names) for flag in flags]
    usual = [f"--data={texts[0]}", f"--eval-data={texts[1]}", "--tokens=64", "--window=16", "--eval-tokens=64",
             "--tune-tokens=64", f"--out={place / 'run'}"]  # fmt: skip
    taken = {word.partition("=")[0] for word in words}
    target = [word for word in words if not word.startswith("--")] or [str(model)]
    argv = ["compress", *target, "--ratio=0.25", *(word for word in words if word.startswith("--"))]
    assert main([*argv, *(word for word in usual if word.partition("=")[0] not in taken)]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert (error.partition(":")[0], hint.partition(":")[0]) == ("error", "hint")
    assert named.format_map(names) in error + hint
    assert not (place / "run" / "model").exists()


@pytest.mark.parametrize("kind", EARLY)
def test_misuse_is_refused_before_anything_is_imported(kind, place, tiny_model, texts, monkeypatch, capsys):
    found, free = importlib.util.find_spec, shutil.disk_usage
    gone = {"no package for bits": "compressed_tensors", "no package for tasks": "lm_eval",
            "no package for a K-quant": "llama_cpp_py_sync", "no package for a GGUF file": "gguf"}  # fmt: skip
    monkeypatch.setattr(early_checks, "find_spec", lambda name: None if name == gone.get(kind) else found(name))
    disk = free(place)._replace(free=1000 if kind == "a full disk" else free(place).free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    if kind == "a text that may not be read":
        opened = Path.open

        def refuse(self: Path, *how: Any, **more: Any) -> Any:
            if self.name == "closed.txt":
                raise PermissionError(13, "Permission denied")
            return opened(self, *how, **more)

        monkeypatch.setattr(Path, "open", refuse)
    flags, named = EARLY[kind]
    monkeypatch.setattr("layercut.pipeline.journey.compress", lambda *_, **__: pytest.fail("the run has begun"))
    refused(flags, named, place, tiny_model, texts, capsys)


@pytest.mark.parametrize("kind", LATER)
def test_misuse_that_the_models_config_shows_is_refused_before_weights(kind, place, tiny_model, texts, capsys):
    refused(*LATER[kind], place, tiny_model, texts, capsys)


def test_an_early_refusal_needs_no_torch(tiny_model):
    lines = ["import sys", "from layercut.cli.command_line import main",
             f"assert main(['compress', {str(tiny_model)!r}, '--ratio=0.2', '--data=nowhere.txt']) == 2",
             f"assert not [name for name in {HEAVY} if name in sys.modules]"]  # fmt: skip
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], timeout=60).returncode == 0


def test_without_a_hub_the_default_texts_come_with_python_and_that_is_said(place, tiny_model, monkeypatch, capsys):
    taken: list[Any] = []
    monkeypatch.setattr("layercut.pipeline.journey.compress", lambda _, config, **__: taken.append(config) or place)
    monkeypatch.setattr("layercut.cli.command_line._show", lambda *_: None)
    assert main(["compress", str(tiny_model), "--ratio=0.25"]) == 0
    assert (taken[0].text.data, taken[0].evaluate.eval_data) == ("python-docstrings", "python-docs")
    said = capsys.readouterr().err
    assert "--data FILE.txt" in said
    assert "--eval-data FILE.txt" in said
    monkeypatch.setattr(early_checks, "_online", lambda: True)
    assert main(["compress", str(tiny_model), "--ratio=0.25"]) == 0
    assert (taken[1].text.data, taken[1].evaluate.eval_data) == ("c4", "wikitext2")
