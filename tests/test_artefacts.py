"""Artefacts by type, and a run folder that finds its own damaged."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from layercut.errors import RunError
from layercut.files.json_values import Damaged, check_seal, decode, jsonable, seal
from layercut.files.writing import write_atomically
from layercut.pipeline.artefacts import BeforeAfter, CutArtefact, TasksArtefact
from layercut.pipeline.provenance import would_be_lost
from layercut.pipeline.run_store import Run


@dataclass(frozen=True, kw_only=True)
class Loss:
    bounds: list[tuple[int, int]]
    loss: float
    later: list[str] = field(default_factory=list)


def test_json_becomes_a_dataclass_or_is_damaged_and_says_where():
    assert decode(Loss, {"bounds": [[1, 2]], "loss": "inf", "unknown": 1}) == Loss(bounds=[(1, 2)], loss=math.inf)
    for content, where in (({"bounds": [[1]], "loss": 1}, r"bounds\[0\]"), ({"bounds": []}, "loss")):
        with pytest.raises(Damaged, match=where):
            decode(Loss, content)


def test_what_a_seal_finds():
    sealed = seal({"a": 1, "b": [1.5]})
    check_seal(json.loads(json.dumps(sealed)))
    for damaged in (sealed | {"a": 2}, {"a": 1}):
        with pytest.raises(Damaged):
            check_seal(damaged)


# --- in a run folder ---

CUT = CutArtefact(
    segments=[(1, 2)], original_layer_index=[0, 2], parameters=BeforeAfter(before=2, after=1),
    bytes=BeforeAfter(before=8, after=4), files=["part.safetensors", "folder"],
)  # fmt: skip
REQUIRED = ("segments", "original_layer_index", "parameters", "bytes")


@pytest.fixture
def begun(tmp_path: Path) -> Any:
    """A run folder with a stage in it; call what it yields for how often the stage was computed by then."""
    times = 0

    def compute() -> CutArtefact:
        nonlocal times
        times += 1
        save_file({"x": torch.ones(4)}, tmp_path / "run" / "part.safetensors")
        (tmp_path / "run" / "folder").mkdir(exist_ok=True)
        (tmp_path / "run" / "folder" / "inside").write_text("text")
        return CUT

    def again() -> int:
        with Run(tmp_path / "run") as run:
            run.describe({"model": "m"})
            with run.stage(CutArtefact, "cut", "inputs") as stage:
                if stage.open:
                    stage.found = compute()
            assert (stage.artefact.segments, stage.artefact.bytes) == (CUT.segments, CUT.bytes)
            assert run.artefact(CutArtefact, "cut") is stage.artefact
        return times

    again.folder = tmp_path / "run"  # type: ignore[attr-defined]
    assert again() == again() == 1
    return again


def test_an_artefact_with_anything_missing_changed_or_nested_is_made_anew(begun):
    file = begun.folder / "cut.json"
    sound = json.loads(file.read_text())
    damaged = [{k: v for k, v in sound.items() if k != key} for key in sound]
    damaged += [sound | {key: value} for key in sound for value in (None, {"nested": sound[key]}, [sound[key]])]
    with Run(begun.folder) as run:
        run._hashes["cut"] = sound["config_hash"]
        assert run._whole(CutArtefact, "cut", sound)
        for content in damaged:
            assert not run._whole(CutArtefact, "cut", json.loads(json.dumps(content))), content
    for number, text in enumerate((json.dumps(damaged[0]), "[" * 100_000), start=2):
        file.write_text(text)
        assert begun() == number


@pytest.mark.parametrize("damage", ["truncated", "longer", "header", "gone", "inside gone", "inside changed"])
def test_a_stage_whose_files_are_not_as_they_were_is_run_again(damage, begun):
    tensors, inside = begun.folder / "part.safetensors", begun.folder / "folder" / "inside"
    content = tensors.read_bytes()
    match damage:
        case "truncated":
            os.truncate(tensors, len(content) - 1)
        case "longer":
            tensors.write_bytes(content + b"x")
        case "header":
            tensors.write_bytes(content[:8] + b"X" + content[9:])
        case "gone":
            tensors.unlink()
        case "inside gone":
            inside.unlink()
        case _:
            inside.write_text("other text")
    assert begun() == 2
    assert tensors.read_bytes() == content
    assert begun() == 2


def test_an_optional_field_is_left_out_of_the_json_where_it_has_its_default(begun):
    written = json.loads((begun.folder / "cut.json").read_text())
    assert written["files"] == CUT.files
    assert not {"files", "record"} & jsonable(CutArtefact(**{key: getattr(CUT, key) for key in REQUIRED})).keys()


def test_what_was_measured_of_the_same_model_is_there_and_of_another_one_is_not(tmp_path):
    figures = TasksArtefact(tasks={"piqa": {"dense": 0.6}}, retention={"mean": 1.0}, limit=4)

    def measured(inputs, asked, *, damage=lambda: None):
        with Run(tmp_path / "run") as run:
            run.describe({"model": "m"})
            with run.stage(CutArtefact, "quantize", inputs) as making:
                making.found = making.found or replace(CUT, files=[])
            if asked:
                with run.stage(TasksArtefact, "tasks", asked, after=["quantize"]) as stage:
                    stage.found = stage.found or figures
            damage()
            found = None if asked else run.earlier(TasksArtefact, "tasks")
            if found:
                assert run.inputs_of("tasks") == found.config_hash, "what is made of it is made of it"
                assert "tasks" in run.seconds
            return found and (found.tasks, found.limit)

    tasks = tmp_path / "run" / "tasks.json"
    assert measured("one", None) is None
    measured("one", "piqa")
    assert measured("one", None) == (figures.tasks, 4)
    assert measured("another", None) is None
    assert measured("one", None) == (figures.tasks, 4)
    assert measured("one", None, damage=lambda: tasks.write_text(tasks.read_text().replace("0.6", "0.9"))) is None


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    with Run(tmp_path / "run") as run, pytest.raises(KeyError):
        run.describe({"model": "m"})
        with run.stage(CutArtefact, "cut", "inputs") as stage:
            assert stage.open
            raise KeyError
    assert not (tmp_path / "run" / "cut.json").exists()


def test_the_seconds_of_a_part_are_its_stages_too_whenever_it_was_run(tmp_path, monkeypatch):
    clock, bare = iter([0.0, 10.0, 13.0, 20.0, 30.0, 34.0]), replace(CUT, files=[])
    monkeypatch.setattr("layercut.pipeline.run_store.time.perf_counter", lambda: next(clock))

    def run_both(outer_inputs):
        with Run(tmp_path / "run") as run:
            run.describe({"model": "m"})
            with run.stage(CutArtefact, "outer", outer_inputs) as outer:
                with run.stage(CutArtefact, "inner", "inputs") as inner:
                    inner.found = inner.found or bare
                outer.found = bare
        return inner.artefact.seconds, run.seconds

    assert run_both("first") == (3.0, {"outer": 20.0})
    assert run_both("changed") == (3.0, {"outer": 7.0}), "4 now, 3 before"


def test_a_folder_with_a_config_yaml_is_not_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true\n")
    (tmp_path / "env.json").write_text('{"name": "prod"}')
    with pytest.raises(RunError, match="not empty and holds no layercut run"):
        Run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "env.json"]
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"


def test_a_run_killed_at_its_very_beginning_goes_on(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".env.json.partial").write_text('{"da')
    with Run(tmp_path) as run:
        run.describe({"model": "m"})


# --- files ---


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), write_atomically(path) as partial:
        partial.write_text("ne")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    with write_atomically(path) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


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


def test_a_full_disk_leaves_no_half_line_among_the_events(tmp_path, monkeypatch):
    with Run(tmp_path / "run") as run:
        run.describe({"model": "m"})
        run.event("text", 0, "started", 1, "")
        before = (run / "metrics.jsonl").read_bytes()
        opened = Path.open

        def nearly_full(path: Path, *args: Any, **how: Any) -> Any:
            file = opened(path, *args, **how)
            write = file.write

            class Few:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, data: bytes) -> int:
                    return write(data[:5])

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

            return Few()

        monkeypatch.setattr(Path, "open", nearly_full)
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No space left"):
            run.event("text", 0, "finished", 1, "")
        monkeypatch.undo()
        assert (run / "metrics.jsonl").read_bytes() == before


def test_an_error_of_the_disk_is_the_users_wherever_it_comes_up(tmp_path):
    """Also from safetensors, which has an error type of its own."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match="run cannot be written: File too large") as caught, Run(tmp_path / "run"):
            save_file({"x": torch.ones(10_000)}, tmp_path / "elsewhere")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit" in caught.value.hint


@pytest.mark.parametrize(("tasks", "stays"), [("piqa,copa,boolq", True), ("copa", False), ("boolq,copa", False)])
def test_more_tasks_lose_nothing_and_fewer_others_do(tasks, stays, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FINISHED | {"tasks": "copa,piqa"}))
    (tmp_path / "compare.json").write_text("{}")
    assert bool(would_be_lost(tmp_path, FINISHED | {"tasks": tasks})[1]) != stays


FINISHED = {
    "model": "m", "ratio": 0.2, "speed": True, "tasks": "", "limit": None, "out": "a",
    "eval_tokens": 64, "long_context": 128, "probes": False, "device": "auto",
    "data": "a.txt,b.txt",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({}, True), ({"out": "b", "device": "cpu"}, True), ({"added_later": 3}, True),
        ({"tasks": "piqa", "limit": 3}, True), ({"long_context": 0}, True),
        ({"probes": True}, True), ({"data": f"{os.path.abspath('a.txt')}+./b.txt"}, True),
        ({"ratio": 0.4}, False), ({"model": "other"}, False), ({"eval_tokens": 32}, False), ({"speed": False}, False),
        ({"long_context": 64}, False), ({"tasks": "piqa", "ratio": None}, False),
    ],
)  # fmt: skip
def test_what_a_finished_run_would_lose(change, stays, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FINISHED))
    changed = FINISHED | change
    assert would_be_lost(tmp_path, changed)[1] == [], "it is not finished"
    for name in ("export.json", "summary.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model").mkdir()
    words, lost = would_be_lost(tmp_path, changed)
    assert bool(lost) != stays
    assert ("model" in lost) == (not stays and bool({"ratio", "model"} & set(change)))
    if not stays:
        assert len(words) == len(change)
    other = {key: value for key, value in changed.items() if key not in ("ratio", "tasks")}
    words, lost = would_be_lost(tmp_path, other)
    assert lost == ["model", "summary.json"]
    assert [word for word in words if "ratio" in word or "tasks" in word] == [words[-1]], "told once, not one by one"
    assert "another command" in words[-1]
