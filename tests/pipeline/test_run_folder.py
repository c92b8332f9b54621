"""A run folder finds its own damaged, and what is no run of its own is left alone."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from layercut.errors import RunError
from layercut.pipeline.artefacts import BeforeAfter, CutArtefact
from layercut.pipeline.run_folder import Run, check_finished
from layercut.segments import Segment

CUT = CutArtefact(
    segments=[Segment(1, 2)], original_layer_index=[0, 2], parameters=BeforeAfter(before=2, after=1),
    bytes=BeforeAfter(before=8, after=4),
)  # fmt: skip


@pytest.fixture
def begun(tmp_path: Path) -> Any:
    """A run folder with a stage in it; call what it yields for how often the stage was computed by then."""
    times, folder = 0, tmp_path / "run"

    def again() -> int:
        nonlocal times
        with Run(folder) as run:
            run.describe({"model": "m"})
            with run.stage(CutArtefact, "cut", "inputs") as stage:
                if stage.open:
                    times += 1
                    save_file({"x": torch.ones(4)}, folder / "part.safetensors")
                    (folder / "folder").mkdir(exist_ok=True)
                    (folder / "folder" / "inside").write_text("text")
                    stage.found, stage.files = CUT, ["part.safetensors", "folder"]
            assert run.artefact(CutArtefact, "cut") == stage.artefact == CUT
        return times

    again.folder = folder  # type: ignore[attr-defined]
    assert again() == again() == 1
    return again


def test_an_artefact_with_anything_missing_changed_or_nested_is_made_anew(begun):
    file = begun.folder / "cut.json"
    sound = json.loads(file.read_text())
    damaged = [{k: v for k, v in sound.items() if k != key} for key in sound]
    damaged += [sound | {key: value} for key in sound for value in (None, {"nested": sound[key]}, [sound[key]])]
    texts = [*map(json.dumps, damaged), "[" * 100_000]
    for number, text in enumerate(texts, start=2):
        file.write_text(text)
        assert begun() == number, text


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


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    with Run(tmp_path / "run") as run, pytest.raises(KeyError):
        run.describe({"model": "m"})
        with run.stage(CutArtefact, "cut", "inputs") as stage:
            assert stage.open
            raise KeyError
    assert not (tmp_path / "run" / "cut.json").exists()


def test_the_seconds_of_a_part_are_its_stages_too_whenever_it_was_run(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 13.0, 20.0, 30.0, 34.0])
    monkeypatch.setattr("layercut.pipeline.run_folder.time.perf_counter", lambda: next(clock))

    def run_both(outer_inputs):
        with Run(tmp_path / "run") as run:
            run.describe({"model": "m"})
            with run.stage(CutArtefact, "outer", outer_inputs) as outer:
                with run.stage(CutArtefact, "inner", "inputs") as inner:
                    inner.found = inner.found or CUT
                outer.found = CUT
        return json.loads((tmp_path / "run" / "inner.json").read_text())["seconds"], run.seconds

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


class NearlyFull(io.FileIO):
    def write(self, data: Any) -> int:
        return super().write(data[:5])


def test_a_full_disk_leaves_no_half_line_among_the_events(tmp_path, monkeypatch):
    with Run(tmp_path / "run") as run:
        run.describe({"model": "m"})
        run.event("text", 0, "started", 1, "")
        before = (run / "metrics.jsonl").read_bytes()
        with monkeypatch.context() as full:
            full.setattr(Path, "open", lambda path, mode, **_: NearlyFull(path, mode.replace("b", "")))
            with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No space left"):
                run.event("text", 0, "finished", 1, "")
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


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"model": 3}'])
def test_a_summary_that_lacks_what_others_read_is_damaged(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(RunError, match=r"summary\.json is damaged"):
        check_finished(tmp_path, "evaluate it")
