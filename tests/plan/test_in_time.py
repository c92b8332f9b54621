"""What fits a time, and that a run which goes on does not change its mind."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from layercut.cli.command_line import main
from layercut.config import DataConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig, RunConfig
from layercut.errors import ConfigError
from layercut.healing import endpoint_tuning
from layercut.plan.in_time import in_time
from layercut.plan.time_budget import FEWEST, MOST, STEP, fitted

HIGHER = 600.0  # seconds that a high effort takes more
ASKED = CompressConfig(search=SearchConfig(ratio=0.2), heal=HealConfig(time="30m"))


def seconds(run):
    """A run of 500 s beside its tuning, of 100 tokens a second."""
    return 500 + run.heal.tokens / 100 + HIGHER * (run.search.effort == "high")


def with_time(time, **more):
    return replace(ASKED, heal=replace(ASKED.heal, time=time, **more))


def test_the_most_tokens_are_taken_that_end_in_time():
    found = fitted(ASKED, seconds)
    assert found.search.effort == "normal", "a third of the time is too much to choose in"
    assert (
        seconds(found) <= 1800 < seconds(replace(found, heal=replace(found.heal, tune_tokens=found.heal.tokens + STEP)))
    )
    longer = fitted(with_time("2h"), seconds)
    assert longer.search.effort == "high"
    assert longer.heal.tokens == (7200 - 500 - HIGHER) * 100 // STEP * STEP
    assert fitted(with_time("90d"), seconds).heal.tokens == MOST


def test_what_is_given_stays():
    assert fitted(with_time("30m", tune_tokens=7), seconds).heal.tokens == 7
    given = replace(with_time("2h"), search=replace(ASKED.search, effort="low"))
    assert fitted(given, seconds).search.effort == "low"


def test_a_time_that_is_too_short_is_refused_with_the_least_that_is_not():
    with pytest.raises(ConfigError) as error:
        fitted(with_time("11m"), seconds)
    assert "--time 12m or more" in error.value.hint
    assert fitted(with_time("12m"), seconds).heal.tokens >= FEWEST


@pytest.mark.parametrize("time", ["30", "0m", "-1h", "2 hours", "inf", "1e999h"])
def test_what_is_no_time_is_refused(time):
    with pytest.raises(ConfigError, match="is no time"):
        HealConfig(time=time)


@pytest.fixture
def command(tiny_model, texts, monkeypatch):
    monkeypatch.setattr("layercut.plan.time_budget.FEWEST", 128)
    monkeypatch.setattr("layercut.plan.time_budget.STEP", 64)
    monkeypatch.setattr("layercut.plan.time_budget.MOST", 2048)
    of_a_machine(monkeypatch, 100)
    text, heldout = texts
    return [
        "compress", str(tiny_model), "--segment=2:4", f"--data={text}", "--tokens=64", "--window=16", "--no-speed",
        f"--eval-data={heldout}", "--eval-tokens=64", "--dtype=float32", "--preserve=none",
        "--batch-tokens=64",
    ]  # fmt: skip


def of_a_machine(patch, tokens_a_second):
    patch.setattr("layercut.plan.Planner.seconds", lambda *_: lambda run: 2 + run.heal.tokens / tokens_a_second)


def told(out):
    return yaml.safe_load((out / "config.yaml").read_text())


def test_a_run_that_was_stopped_goes_on_with_what_was_decided(command, tmp_path, monkeypatch, capsys):
    command = [*command, "--time=14s"]
    assert main([*command, f"--out={tmp_path / 'once'}"]) == 0
    first = told(tmp_path / "once")
    assert first["tune_tokens"] == (14 - 2) * 100 // 64 * 64
    assert first["time"] == "14s"

    out, made, step = tmp_path / "twice", [], endpoint_tuning._Training.step_

    def killed(training):
        made.append(training)
        if len(made) == 2:
            raise KeyboardInterrupt
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(endpoint_tuning._Training, "step_", killed)
        assert main([*command, f"--out={out}"]) == 130
    of_a_machine(monkeypatch, 50)  # by now the machine is slower
    assert main([*command, f"--out={tmp_path / 'slower'}"]) == 0
    assert told(tmp_path / "slower")["tune_tokens"] < first["tune_tokens"]
    assert main([*command, f"--out={out}"]) == 0
    assert told(out)["tune_tokens"] == first["tune_tokens"]
    assert (out / "tuned.safetensors").read_bytes() == (tmp_path / "once" / "tuned.safetensors").read_bytes()


def test_a_time_that_cannot_be_kept_is_refused_before_anything_is_written(command, tmp_path, capsys):
    assert main([*command, "--time=1s", f"--out={tmp_path / 'run'}"]) == 2
    assert "--time 1s is too short" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_plan_says_what_fits_some_times(tiny_model, capsys):
    flags = ["plan", str(tiny_model), "--ratio=0.3", "--window=16", "--tokens=64", "--json"]
    rows = json_of(capsys, *flags)["times"]
    assert [row["time"] for row in rows] == ["30m", "2h", "8h"]
    assert rows[0]["tune_tokens"] <= rows[1]["tune_tokens"] <= rows[2]["tune_tokens"]
    seconds = [json_of(capsys, *flags, *more)["stages"]["tune"]["seconds"] for more in ([], ["--time=1h"])]
    assert seconds[0] < seconds[1], "the stages are those of the tokens that fit"
    assert main([*flags, "--time=1s"]) == 2
    assert "--time 1s is too short" in capsys.readouterr().err
    assert json_of(capsys, *flags, "--tune-tokens=64")["times"] == []


def json_of(capsys, *words):
    assert main([*words]) == 0
    return json.loads(capsys.readouterr().out)


def test_on_an_accelerator_a_run_takes_an_hour_where_nothing_is_said(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.models.loading.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("layercut.plan.Planner.seconds", lambda *_: seconds)
    plain = CompressConfig(
        text=DataConfig(window=16), search=SearchConfig(ratio=0.3), run=RunConfig(out=tmp_path / "none")
    )
    found = in_time(str(tiny_model), plain)
    assert (found.heal.time, found.search.effort) == ("1h", "high")
    assert found.heal.tokens == (3600 - 500 - HIGHER) * 100 // STEP * STEP
    given = replace(plain, heal=HealConfig(tune_tokens=64))
    assert in_time(str(tiny_model), given) is given
    by_loss = replace(plain, search=SearchConfig(max_loss=0.1))
    assert in_time(str(tiny_model), by_loss) is by_loss, "how many layers go is found by the run"
    with pytest.raises(ConfigError, match="--time cannot be planned: --max-loss"):
        in_time(str(tiny_model), replace(by_loss, heal=HealConfig(time="1h")))
