"""Two processes do what one does: the same choices, the same losses to rounding, one run folder, one error.

Tolerances: the models are float32, and another number of processes adds the same float32 numbers up in another order.
"""

from __future__ import annotations

import json
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
import together
from layercut.cli.command_line import main
from layercut.distributed import processes
from layercut.errors import ConfigError
from layercut.models import checkpoints, placement

RUN = ["--tokens=112", "--window=16", "--eval-window=16", "--tune-tokens=176", "--eval-tokens=112"]
RUN += ["--no-speed", "--ratio=0.25", "--batch-tokens=80", "--learning-rate=0.0003"]
COSTS, LOSSES, WEIGHTS = 1e-6, 1e-5, 1e-5
"""Relative, of KLs; relative, of losses during tuning; absolute, of weights after it, which have a size of 0.15."""


def compress(model: Path, texts: tuple[Path, Path], out: Path) -> list[str]:
    return ["compress", str(model), *RUN, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={out}"]


@pytest.fixture(scope="module")
def alone(tiny_model, texts, tmp_path_factory):
    """The run folder of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(compress(tiny_model, texts, run)) == 0
    return run


@pytest.fixture(scope="module")
def folder(tiny_model, texts, tmp_path_factory):
    """Where two processes left their results."""
    folder = tmp_path_factory.mktemp("two")
    command = compress(tiny_model, texts, folder / "run")
    commands = {
        "compress": command, "again": command,
        "spread": [*compress(tiny_model, texts, folder / "spread"), "--place=processes"],
        "evaluate": ["evaluate", str(folder / "run" / "model"), f"--eval-data={texts[1]}", "--eval-tokens=112",
                     "--window=16", "--place=processes"],
        "no-text": compress(tiny_model, (Path("nowhere.txt"), texts[1]), folder / "no-text"),
        "no-flag": [*command, "--ratoi=0.2"],
        "last": compress(tiny_model, texts, folder / "last"),
        "cut": ["cut", str(tiny_model), "--segment=3:5", f"--out={folder / 'cut'}"],
    }  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(commands))
    codes = together.launched(lambda: together.main(folder), folder / "errors")
    (folder / "exit_codes.json").write_text(json.dumps(codes))
    return folder


def of(folder: Path, rank: int) -> dict[str, Any]:
    try:
        return json.loads((folder / f"{rank}.json").read_text())
    except OSError:
        pytest.fail((folder / "errors").read_text()[-5000:])


def artefact(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / f"{stage}.json").read_text())


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Compare, number by number, whatever JSON holds; words, counts and structure must be equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"seconds", "config_hash", "content_hash"}:
            close(found[key], expected[key], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-9)
    else:
        assert found == expected


def test_searches_folds_and_tunings_go_the_same_way(folder):
    first, second = (of(folder, rank) for rank in (0, 1))
    assert [(found["world"], found["rank"]) for found in (first, second)] == [(2, 0), (2, 1)]
    for work, tolerance in {"searches": COSTS, "healings": LOSSES}.items():
        assert first[work] == second[work]  # to the bit: all processes make the same steps
        close(first[work], getattr(together, work)(), tolerance)
    assert len(first["healings"]["kl"][0]) == 5


@pytest.mark.parametrize("kind", together.KINDS)
def test_tuning_that_was_killed_and_terminated_ends_in_the_same_bits(kind, tmp_path):
    """Killed in one process within step 2, told to stop in the other within step 4, each time with the state kept."""
    endings = {
        phase: together.launched(lambda phase=phase: together.tune(kind, phase, tmp_path), tmp_path / "errors")
        for phase in together.PHASES
    }
    assert endings["killed"][1] == -signal.SIGKILL
    assert endings["killed"][0] != 0
    assert endings["terminated"] == [-signal.SIGTERM] * 2
    for rank in (0, 1):
        straight, resumed = (artefact(tmp_path, f"{kind}-{phase}.{rank}") for phase in ("straight", "resumed"))
        assert (straight.pop("steps"), resumed.pop("steps")) == (6, 2)
        assert straight == resumed


def test_a_spread_model_is_searched_and_healed_alike(folder):
    """And is held in parts."""
    first, second = (of(folder, rank)["spread"] for rank in (0, 1))
    model = tiny.llama(**together.ODD)
    searched = together.searches(model, together.SPREAD_METHODS)
    for work, expected in (("searches", searched), ("healings", together.healings(model))):
        assert first[work] == second[work]
        close(first[work], expected, LOSSES)
    assert first["held"] + second["held"] == first["bytes"]
    for found in (first, second):
        assert found["held"] == pytest.approx(found["bytes"] / 2, rel=0.01)
        assert found["student_held"] == pytest.approx(found["held"] * 6 / 8, rel=0.1)
        assert found["whole_before_each_layer"] == [0] * 8, "loading had more than a layer whole"
        assert found["dense_is_as_it_was"]
        assert found["trained"] == found["trained_layers"] == [2, 3]
        assert found["best_step"] > 0
    assert first["learning_rate"] == second["learning_rate"], "by whole weights, of which each has a part"


def test_spreading_needs_several_processes(tiny_model, texts, tmp_path, capsys):
    assert main([*compress(tiny_model, texts, tmp_path / "run"), "--place=processes"]) == 2
    assert "there is one" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "spread"])
def test_the_journey_is_the_same(folder, alone, name):
    assert of(folder, 0)["codes"]["compress" if name == "run" else name] == 0
    run = folder / name
    close(artefact(run, "search"), artefact(alone, "search"), COSTS)
    ours, theirs = (artefact(where, "heal")["tuning"] for where in (run, alone))
    assert ours["best_step"] == theirs["best_step"] > 0
    for curve in ("curve", "heldout"):
        close([p["loss"] for p in ours[curve]], [p["loss"] for p in theirs[curve]], LOSSES)
    close(artefact(run, "fold")["fold"], artefact(alone, "fold")["fold"], 1e-4)
    close(artefact(run, "eval")["perplexity"], artefact(alone, "eval")["perplexity"], LOSSES)
    ours, theirs = (load_file(where / "model" / "model.safetensors") for where in (run, alone))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=WEIGHTS, rtol=0)


def test_one_process_writes_and_speaks(folder, alone):
    run = folder / "run"
    ours, theirs = (
        [[event["stage"], event["step"], event["name"]] for event in map(json.loads, lines.splitlines())]
        for lines in ((where / "metrics.jsonl").read_text() for where in (run, alone))
    )
    assert ours == theirs  # also: nothing was run anew when the command was given again
    assert artefact(run, "env")["processes"] == 2
    said = (folder / "compress.0.err").read_text()
    assert said.count("remove ") == (folder / "again.0.err").read_text().count("remove ") > 0
    assert (folder / "compress.0.out").read_text().count("report ") == 1
    assert (folder / "compress.1.err").read_text() == (folder / "compress.1.out").read_text() == ""
    assert not [path for path in run.rglob("*") if path.name.endswith(".partial")]


def test_perplexity_is_shared(folder, alone):
    assert (folder / "evaluate.1.out").read_text() == ""
    name, value = (folder / "evaluate.0.out").read_text().split()
    assert name == str(folder / "run" / "model")
    assert float(value) == pytest.approx(artefact(alone, "eval")["perplexity"]["tuned"], rel=1e-4)


@pytest.mark.parametrize(("name", "words"), [
    ("no-text", "nowhere.txt"), ("no-flag", "--ratoi"), ("cut", "works in one"),
])  # fmt: skip
def test_a_users_error_is_said_once(folder, name, words):
    assert [of(folder, rank)["codes"][name] for rank in (0, 1)] == [2, 2]
    said = "".join((folder / f"{name}.{rank}.err").read_text() for rank in (0, 1))
    assert said.count("error:") == 1
    assert words in said
    assert not (folder / "cut").exists()


def test_an_error_in_one_process_ends_all_with_its_code(folder):
    said = [(folder / f"last.{rank}.err").read_text() for rank in (0, 1)]
    assert "error: this process alone fails" in said[1]
    assert "error:" not in said[0]
    assert "Traceback" not in said[0]
    codes = artefact(folder, "exit_codes")
    assert codes[1] == 2
    assert codes[0] != 0


def test_rows_are_shared_out(monkeypatch):
    for world, length in [(1, 5), (2, 7), (3, 2), (8, 8)]:
        rows: list[list[int]] = []
        batches: list[list[int]] = []
        monkeypatch.setattr(processes, "world", lambda n=world: n)
        for rank in range(world):
            monkeypatch.setattr(processes, "rank", lambda r=rank: r)
            rows.append(list(range(length))[processes.share(length)])
            batches += [list(range(length))[part] for part in processes.share_of_batches(length, 4)]
        assert [*chain(*rows)] == [*chain(*batches)] == list(range(length))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        assert len(batches) >= min(world, length)


def test_an_environment_that_says_half_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["compress", "nowhere", "--ratio=0.2"]) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err


def test_processes_do_not_crowd_on_one_device(monkeypatch):
    monkeypatch.setattr(processes, "on_this_machine", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    processes.check_device(torch.device("cpu"))
    with pytest.raises(ConfigError, match="2 processes were started on a machine with 1 cuda"):
        processes.check_device(torch.device("cuda"))
    with pytest.raises(ConfigError, match="--device cuda:0 is given to 2"):
        processes.check_device(torch.device("cuda:0"))


@pytest.mark.parametrize(("share", "how", "spread"), [
    (1.2, {}, True), (0.5, {}, False), (2.0, {}, False),  # nor is there room for a half
    (1.2, {"place": "disk"}, False), (1.2, {"place": "memory"}, False), (0.5, {"place": "processes"}, True),
])  # fmt: skip
def test_what_fits_no_process_is_spread_where_a_part_fits(share, how, spread, tiny_model, monkeypatch):
    """share: of the weights in one process's memory, of which there are two."""
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "launched", lambda: True)
    monkeypatch.setattr(placement, "_share_of_memory", lambda *_, **__: share)
    assert (placement.place_of(checkpoints.resolve(str(tiny_model)), **how) == "processes") is spread
