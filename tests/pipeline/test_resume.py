"""A run that is stopped is resumed after the last finished stage and ends as if it had never been stopped."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from layercut.cli.command_line import main
from layercut.pipeline.stages import heal
from layercut.pipeline.stages.heal import TUNING_STATE

TEXTS = ("text-evaluation", "text-calibration", "text-heldout", "text-tuning")
STAGES = (*TEXTS, "text-shared", "search", "cut", "fold", "heal", "quantize", "eval", "export", "summary")
MOMENTS = ["text-calibration", "search", "heal", "export/folder", "summary"]
RUN = ["--tokens=64", "--window=16", "--tune-tokens=64", "--eval-tokens=64", "--no-speed", "--ratio=0.25"]
RUN += ["--batch-tokens=16", "--learning-rate=0.001"]
VARY = {"seconds", "speed", "peak_rss_bytes", "content_hash"}
PLAIN = "search-plain"
"""Run within the stage search."""


def started(run: Path) -> list[str]:
    """The stages that were begun, in order, as metrics.jsonl tells; without what is a part of another."""
    log = run / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [event["stage"] for event in events if event["name"] == "started" and event["stage"] != PLAIN]


def artefacts(run: Path) -> dict[str, int]:
    """When each stage's JSON was written."""
    return {s: (run / f"{s}.json").stat().st_mtime_ns for s in STAGES if (run / f"{s}.json").exists()}


def summary(run: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if k not in VARY}


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run folder but what only tells how far commands were."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "metrics.jsonl"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def arguments(model: Path, texts: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    """The command of these tests; flags in `more` take the place of its own."""
    usual = [*RUN, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={out}"]
    given = {flag.partition("=")[0].replace("--no-", "--") for flag in more}
    kept = [flag for flag in usual if flag.partition("=")[0].replace("--no-", "--") not in given]
    return ["compress", str(model), *kept, *more]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(tiny_model, texts, run)) == 0
    return run


@pytest.fixture
def again(whole, tiny_model, texts, tmp_path, monkeypatch):
    """Run the command again, with other flags, in a copy of the finished run; returns the stages it ran.

    With `stopped` the copy is of a run that was stopped when it was evaluated: nothing forbids other settings.
    """
    run = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr("layercut.pipeline.journey.write_report", lambda *_: None)  # slow, and not what is tested here

    def rerun(*more: str, model: Path = tiny_model) -> list[str]:
        before = len(started(run))
        assert main(arguments(model, texts, run, *more)) == 0
        return started(run)[before:]

    def stopped() -> None:
        for name in ("export.json", "summary.json"):
            (run / name).unlink()
        env = json.loads((run / "env.json").read_text())
        (run / "env.json").write_text(json.dumps({key: value for key, value in env.items() if key != "finished"}))

    rerun.run, rerun.stopped = run, stopped
    return rerun


# --- killed ---


def test_a_run_killed_in_every_stage_ends_as_if_it_had_not_been(whole, tiny_model, texts, tmp_path, run_until):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = arguments(tiny_model, texts, run)
    finished: dict[str, int] = {}
    for moment in MOMENTS:
        stage, before = moment.partition("/")[0], len(started(run))
        assert run_until(moment, signal.SIGKILL, log, argv) == -signal.SIGKILL, log.read_text()
        written = artefacts(run)
        assert stage not in written
        assert {s: written.get(s) for s in finished} == finished, "a finished stage was written again"
        todo = [s for s in STAGES if s not in finished]
        assert started(run)[before:] == todo[: todo.index(stage) + 1]
        finished = written

    assert main(argv) == 0
    assert started(run)[-1] == "summary"
    assert {s: artefacts(run)[s] for s in finished} == finished
    assert summary(run) == summary(whole)
    assert set(json.loads((run / "summary.json").read_text())["seconds"]) == {*STAGES} - {"summary"}
    assert {p.name for p in run.iterdir()} == {p.name for p in whole.iterdir()}, "partial files are left"
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]


def test_tuning_that_was_stopped_ends_in_the_same_bits(whole, tiny_model, texts, tmp_path, run_until):
    """Killed after step 1, where the state was due; terminated within step 3; Ctrl-C within step 4, the last."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = arguments(tiny_model, texts, run)
    state, steps = run / TUNING_STATE, []
    for moment, number, code in (
        ("step/1", signal.SIGKILL, -signal.SIGKILL),
        ("step/2", signal.SIGTERM, -signal.SIGTERM),
        ("step/3", signal.SIGINT, 130),
    ):
        assert run_until(moment, number, log, argv) == code, log.read_text()
        assert "heal" not in artefacts(run)
        with safe_open(state, framework="pt") as file:
            steps.append(json.loads(file.metadata()["facts"])["curve"][-1]["step"])
    assert steps == [1, 3, 4]
    assert "Traceback" not in log.read_text()
    assert log.read_text().splitlines()[-1].startswith("stopped; the same command resumes")
    assert main(argv) == 0
    assert not list(run.glob("*tuning-state*")), "the state is of use to nobody"
    assert (run / "tuned.safetensors").read_bytes() == (whole / "tuned.safetensors").read_bytes()
    curves = [json.loads((folder / "heal.json").read_text())["tuning"] for folder in (run, whole)]
    assert curves[0]["heldout"] == curves[1]["heldout"]
    assert [p["loss"] for p in curves[0]["curve"]] == [p["loss"] for p in curves[1]["curve"]]


def test_a_failed_stage_is_not_taken_for_finished(again, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of ours")

    (again.run / "heal.json").unlink()
    with monkeypatch.context() as broken:
        broken.setattr("layercut.pipeline.stages.heal.tune_", fail)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            again()
    assert not {"heal", "summary"} & artefacts(again.run).keys(), "a summary of what is no longer whole"
    assert again() == ["heal", "summary"]


# --- nothing is run twice, and nothing is left out ---

LAST = ["export", "summary"]
STOPPED: dict[str, list[str]] = {
    "--learning-rate=0.002": ["heal", "quantize", "eval", *LAST],
    "--tune-tokens=96": ["text-tuning", "text-shared", "fold", "heal", "quantize", "eval", *LAST],
    "--eval-tokens=96": ["text-evaluation", "text-shared", "eval", *LAST], "--bits=8": ["quantize", "eval", *LAST],
    "--dtype=bfloat16": list(STAGES),
}  # fmt: skip
"""Of a run that was stopped before it was exported."""
FINISHED: dict[str, list[str]] = {
    "--device=cpu --max-memory=20GB --place=memory": [],
    "--speed": ["eval", "summary"],
    "--force --ratio=0.4": list(STAGES),
}


@pytest.mark.parametrize("flags", [*STOPPED, *FINISHED])
def test_a_changed_flag_runs_again_what_depends_on_it(flags, again, monkeypatch):
    monkeypatch.setattr("layercut.evaluation.speed.speed", lambda *_: None)
    if flags in STOPPED:
        again.stopped()
    (again.run / TUNING_STATE).write_bytes(b"of other code")
    assert again(*flags.split()) == {**STOPPED, **FINISHED}[flags]
    assert again(*flags.replace("--force ", "").split()) == []


@pytest.mark.parametrize("flag", ["--ratio=0.4", "--eval-tokens=256"])
def test_a_finished_run_is_not_replaced_by_other_settings(flag, whole, tiny_model, texts, capsys):
    before = contents(whole)
    assert main(arguments(tiny_model, texts, whole, flag)) == 2
    said, (name, value) = capsys.readouterr().err, flag.removeprefix("--").split("=")
    assert f"{name.replace('-', '_')} was " in said
    assert f"and is {value}" in said
    assert "--force" in said.partition("hint:")[2]
    assert contents(whole) == before


def test_a_finished_search_is_not_replaced_by_another(tiny_model, texts, tmp_path, capsys):
    run, first, other = tmp_path / "run", "--ratio=0.25", "--ratio=0.4"
    search = ["search", str(tiny_model), "--tokens=64", "--window=16", f"--data={texts[0]}", f"--out={run}"]
    assert main([*search, first]) == 0
    before = contents(run)
    assert main([*search, other]) == 2
    assert "--force" in capsys.readouterr().err.partition("hint:")[2]
    assert contents(run) == before
    assert main([*search, first]) == 0, "the same again is no other"
    assert main([*search, other, "--force"]) == 0
    assert contents(run)["search.json"] != before["search.json"]


def test_every_command_for_a_folder_is_on_record(again, monkeypatch):
    first = json.loads((again.run / "env.json").read_text())
    assert [entry["date"] for entry in first["commands"]] == [first["date"]]
    again()
    second = json.loads((again.run / "env.json").read_text())
    assert {k: v for k, v in second.items() if k != "commands"} == {k: v for k, v in first.items() if k != "commands"}
    assert second["commands"][0] == first["commands"][0]
    assert len(second["commands"]) == 2
    for module in ("environment", "run_folder"):
        monkeypatch.setattr(f"layercut.pipeline.{module}.versions", lambda: {"python": "3", "layercut": "9"})
    again("--force")
    third = json.loads((again.run / "env.json").read_text())
    assert third["versions"] == {"python": "3", "layercut": "9"}, "all was made anew"
    assert third["commands"][:2] == second["commands"]
    made_with = {json.loads((again.run / f"{s}.json").read_text())["versions"]["layercut"] for s in STAGES}
    assert made_with == {"9"}


def test_a_finished_run_is_not_replaced_by_edits_in_place(again, tiny_model, texts, tmp_path, capsys, monkeypatch):
    """What the command was given holds something else by now: nothing changes. Back as it was, the run is whole."""
    texts = [Path(shutil.copy(text, tmp_path / f"{i}.txt")) for i, text in enumerate(texts)]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    again.stopped()
    command = arguments(model, texts, again.run)
    assert main(command) == 0
    before = contents(again.run)

    def refused(*more: str) -> None:
        capsys.readouterr()
        assert main(arguments(model, texts, again.run, *more)) == 2
        assert "--force" in capsys.readouterr().err.partition("hint:")[2]

    with monkeypatch.context() as code:
        code.setattr(heal, "keyed", lambda config: ["another"])
        refused()
    assert contents(again.run) == before
    weights = model / "model.safetensors"
    for file, more in ((texts[0], []), (texts[1], ["--speed"]), (weights, ["--speed"])):
        sound, times = file.read_bytes(), (file.stat().st_atime, file.stat().st_mtime)
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]) if file == weights else sound[::-1])
        if file == weights:  # another weight in a file of the same size and time
            os.utime(file, times)
        refused(*more)
        if file == weights:
            for other in (["evaluate", f"--eval-data={texts[1]}", "--eval-tokens=512"], ["chat"]):
                assert main([other[0], str(again.run), *other[1:]]) == 2
                assert "is another model than the one that" in capsys.readouterr().err
        assert contents(again.run) == before
        file.write_bytes(sound)
    already = len(started(again.run))
    assert main(command) == 0
    assert started(again.run)[already:] == []


def test_back_to_the_old_flag_after_a_kill_never_mixes_two_runs(again, whole, monkeypatch):
    """Killed after the tokens of other flags were written: the old artefact must not stand for them."""

    class Killed(BaseException):
        pass

    def die(path: Path, content: Any) -> None:
        if path.name == "text-calibration.json":
            raise Killed

    again.stopped()
    with monkeypatch.context() as killed:
        killed.setattr("layercut.pipeline.run_folder.write_json", die)
        with pytest.raises(Killed):
            again("--seed=1")
    assert again() == ["text-evaluation", "text-calibration", *LAST]
    assert summary(again.run) == summary(whole)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("search.json", "search"), ("tokens-tuning.safetensors", "text-tuning"), ("folded.safetensors", "fold"),
        ("tuned.safetensors", "heal"), ("model/model.safetensors", "export"), ("model", "export"),
    ],
)  # fmt: skip
def test_a_stage_whose_file_is_gone_or_truncated_runs_again(file, stage, again, whole):
    """How a file can be damaged is in test_run_folder.py; here, that each stage counts its own."""
    path = again.run / file
    if path.is_dir():
        shutil.rmtree(path)
    else:
        os.truncate(path, path.stat().st_size // 2)
    assert again() == [stage, "summary"]
    assert not path.name.endswith(".safetensors") or path.read_bytes() == (whole / file).read_bytes()
    assert summary(again.run) == summary(whole)


def test_a_limit_on_the_size_of_files_is_the_users_to_mend(again, whole, tiny_model, texts, capsys):
    """A stand-in for a full disk, which the system refuses in the same way; once it is lifted, all is well."""
    again.stopped()
    shutil.rmtree(again.run / "model")
    kept = {path: path.read_bytes() for path in again.run.glob("*.json") if path.name != "env.json"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        assert main(arguments(tiny_model, texts, again.run)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert f"error: {again.run / 'model'} cannot be written: File too large" in said
    assert "ulimit" in said.partition("hint:")[2]
    assert {path: path.read_bytes() for path in kept} == kept
    assert not list(again.run.glob(".*partial")), "partial files are left"
    assert again() == LAST
    assert summary(again.run) == summary(whole)
