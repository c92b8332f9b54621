"""What is written appears whole or not at all, and what was there is not lost, whenever a command is stopped."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from layercut.errors import RunError
from layercut.files import (
    Damaged,
    appearing,
    decode,
    disk_refusal,
    jsonable,
    partial_of,
    remove_written,
    write_atomically,
)
from layercut.segments import Segment

GONE = 2**22 + 1
"""No process has this number: it is above what Linux gives."""


def replace(target: Path, words: str, **more: Any) -> None:
    with appearing(target, force=True, **more) as work:
        (work / "model").write_text(words)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def renames_fail(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """From the so manieth rename on one fails, and then no more."""
    real, done = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        yield


def test_a_full_disk_is_told_of_files_that_rust_writes():
    with pytest.raises(Exception, match="os error 28") as caught:
        Tokenizer(BPE()).save("/dev/full")
    assert type(caught.value) is Exception, "tokenizers raises a plain one"
    told = disk_refusal(caught.value, Path("out"))
    assert told
    assert "No space left" in str(told)
    assert disk_refusal(Exception("28 errors")) is None
    assert disk_refusal(ValueError("(os error 28)")) is None, "of another library's words"


def test_what_was_there_is_back_where_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    target = tmp_path / "small"
    replace(target, "first")
    with renames_fail(monkeypatch, 2), pytest.raises(RunError, match="cannot be written"):
        replace(target, "second")
    assert names(tmp_path) == ["small"]
    assert (target / "model").read_text() == "first"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    target, new = tmp_path / "small", tmp_path / f".small.layercut-{GONE}"
    for folder, words in ((new, "second"), (new.with_name(f"{new.name}-old"), "first")):
        folder.mkdir()
        (folder / "model").write_text(words)
    with pytest.raises(RunError, match="No space left"):
        replace(target, "third", need=2**62)
    assert (target / "model").read_text() == "first"
    assert names(tmp_path) == ["small"]
    with pytest.raises(RunError, match="exists already"), appearing(target):
        pass
    target.rename(new.with_name(f"{new.name}-old"))
    with pytest.raises(RunError, match="exists already"), appearing(target):  # nor is what was put back
        pass
    assert names(tmp_path) == ["small"]
    replace(target, "third")
    assert (target / "model").read_text() == "third"


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), write_atomically(path) as partial:
        partial.write_text("ne")
        raise KeyError
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "old"
    with write_atomically(path) as partial:
        partial.write_text("new")
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "new"
    partial_of(path).write_text("half, of a command that was killed")
    remove_written(path)
    assert names(tmp_path) == []


def test_the_umask_decides_who_may_read_it(tmp_path):
    before = os.umask(0o027)
    try:
        with write_atomically(tmp_path / "x.safetensors") as partial:
            save_file({"x": torch.ones(2)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced: list[tuple[str, bool]] = []
    path, fsync = tmp_path / "file", os.fsync

    def noted(number: int) -> None:
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{number}")), path.exists()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    with write_atomically(path) as partial:
        partial.write_text("new")
    assert synced == [(".file.partial", False), (tmp_path.name, True)]


# --- JSON ---


@dataclass(frozen=True, kw_only=True)
class Loss:
    segments: list[Segment]
    loss: float


def test_a_dataclass_is_its_json_and_damage_is_named():
    found = Loss(segments=[Segment(1, 2)], loss=math.inf)
    content = json.loads(json.dumps(jsonable(found), allow_nan=False))
    assert content == {"segments": [[1, 2]], "loss": "inf"}
    assert decode(Loss, content | {"unknown": 1}) == found
    for damaged, where in (({"segments": [[1]], "loss": 1}, r"segments\[0\]"), ({"segments": []}, "loss")):
        with pytest.raises(Damaged, match=where):
            decode(Loss, damaged)
    with pytest.raises(Damaged):
        decode(Loss, {"segments": [[2, 1]], "loss": 0})
