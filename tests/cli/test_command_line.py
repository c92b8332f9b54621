"""The command: help without torch, the reviewed set of options, --config and the resolved config.yaml."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from layercut.cli.command_line import FEW, app, main
from layercut.config.commands import (
    CompressConfig,
    FindConfig,
    PerplexityConfig,
    TuneConfig,
    flattened,
    from_flat,
    keys,
)
from layercut.errors import ConfigError

COMMANDS = ["compress", "search", "compare", "tune", "cut", "quantize", "export", "evaluate", "plan", "report", "demo"]
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy")
SMALL = {"tokens": 64, "window": 16, "tune_tokens": 0, "eval_tokens": 64, "speed": False, "fold": False}


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercut.cli.early_checks._online", lambda: True)


def run(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)


# --- help ---


def test_help_of_every_command_needs_no_torch():
    done = run(
        "import sys", "from layercut.cli.command_line import main", f"for command in {COMMANDS}:",
        "    assert main([command, '--help']) == 0", "assert main(['--help']) == main(['--version']) == main([]) == 0",
        "assert main(['compress', 'model', '--ratio', '3']) == 2",
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("loaded:\n"), "help is slow where these are imported"
    for name in COMMANDS:
        assert f"layercut {name}" in done.stdout


def test_the_installed_command_is_the_module():
    command = Path(sys.executable).with_name("layercut")
    if not command.exists():
        pytest.skip("layercut is not installed beside this Python")
    done = subprocess.run([command, "report", "/nowhere"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nowhere")


# --- the set of options ---


def parameters(command: str) -> list[Any]:
    return [a for a in app[command].assemble_argument_collection(parse_docstring=True) if a.parse and not a.children]


def test_search_and_tune_take_their_options_from_compress():
    shared = {argument.names: argument.hint for argument in parameters("compress")}
    for command in ("search", "tune"):
        assert all(shared[argument.names] == argument.hint for argument in parameters(command))


def test_every_option_has_help_and_there_are_not_too_many():
    for command in COMMANDS:
        assert all((argument.parameter.help or "").strip() for argument in parameters(command)), command
    assert len(parameters("compress")) <= 55


# --- --config ---


def started(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_text().count('"started"')


def write_yaml(file: Path, **keys: object) -> Path:
    file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return file


def test_a_config_fills_flags_and_flags_win(tiny_model, texts, tmp_path, capsys):
    given = SMALL | {"data": texts[0], "eval_data": texts[1], "segment": "3:5", "seed": 3, "model": tiny_model}
    config = write_yaml(tmp_path / "small.yaml", **given)
    argv = ["search", f"--config={config}", f"--out={tmp_path / 'run'}", "--window=32"]
    assert main(argv) == 0, capsys.readouterr().err
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["window"] == 32, "the flag"
    assert resolved["seed"] == 3, "the file"
    assert resolved["num_segments"] == "auto", "the default"
    assert resolved["segment"] == ["3:5"], "13:19 is a number in YAML 1.1, but not here"
    assert json.loads((tmp_path / "run" / "search.json").read_text())["segments"] == [[3, 5]]


def test_a_resolved_config_repeats_the_run(tiny_model, texts, tmp_path):
    folder = tmp_path / "run"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items() if not isinstance(value, bool)]
    argv = ["compress", str(tiny_model), *flags, "--no-speed", "--no-fold", "--segment=3:5", "--force"]
    assert main([*argv, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={folder}"]) == 0
    before, resolved = started(folder), (folder / "config.yaml").read_text()
    assert main(["compress", "--config", str(folder / "config.yaml")]) == 0
    assert started(folder) == before, "a stage was run again"
    assert (folder / "config.yaml").read_text() == resolved
    fresh = tmp_path / "fresh"
    assert main(["compress", "--config", str(folder / "config.yaml"), f"--out={fresh}"]) == 0
    hashes = [
        {stage: json.loads((run / f"{stage}.json").read_text())["config_hash"] for stage in ("heal", "summary")}
        for run in (folder, fresh)
    ]
    assert hashes[0] == hashes[1]


# --- what a command line comes to ---


@pytest.fixture
def resolved(monkeypatch, capsys):
    """The flat settings a command line comes to, without a run."""
    taken: list[CompressConfig] = []
    monkeypatch.setattr(
        "layercut.pipeline.journey.compress", lambda model, config, **_: taken.append(config) or Path("run")
    )
    monkeypatch.setattr("layercut.cli.command_line._show", lambda *_: None)

    def settings(*flags: str, command: str = "compress") -> dict[str, Any]:
        assert main([command, "model", "--ratio=0.2", *flags]) == 0, capsys.readouterr().err
        return flattened(taken[-1])

    return settings


def test_a_file_may_list_names_that_a_flag_separates_by_commas(resolved, tmp_path):
    lists: dict[str, Any] = {"bits_allowed": [8, 4], "preserve": ["recall", "copy"], "tasks": ["piqa", "arc_easy"]}
    file = write_yaml(tmp_path / "some.yaml", **lists, bits="auto", target_size="50MB")
    found = resolved(f"--config={file}")
    assert [found[key] for key in lists] == ["8,4", "recall,copy", "piqa,arc_easy"]
    assert from_flat({"preserve": ["recall", "copy"]}).search.preserve == "recall,copy"


# --- a command takes what it uses ---


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *(("search", flag) for flag in ("--bits=4", "--tasks=nosuchtask", "--radius=5", "--eval-data=x")),
        *(("tune", flag) for flag in ("--tasks=x", "--eval-tokens=64", "--no-speed", "--long-context=64")),
    ],
)
def test_a_flag_that_a_command_would_not_heed_is_refused(command, flag, capsys):
    assert main([command, "model", "--ratio=0.2", flag]) == 2
    assert flag.partition("=")[0].replace("--no-", "--") in capsys.readouterr().err.replace("--no-", "--")


def test_commands_of_the_journey_are_made_of_its_parts():
    whole = flattened(CompressConfig())
    for part in (FindConfig, TuneConfig):
        assert flattened(part().journey()) == whole
        assert keys(part) < keys(CompressConfig)
    assert keys(FindConfig) < keys(TuneConfig)


def test_the_file_of_a_compress_run_fits_the_other_commands(tmp_path, monkeypatch, capsys):
    taken: list[CompressConfig] = []
    monkeypatch.setattr(
        "layercut.pipeline.journey.compress", lambda model, config, **_: taken.append(config) or Path("run")
    )
    file = tmp_path / "whole.yaml"
    file.write_text(yaml.safe_dump(flattened(CompressConfig()) | {"ratio": 0.3, "bits": 4, "tasks": "piqa"}))
    assert main(["tune", "model", f"--config={file}"]) == 0, capsys.readouterr().err
    assert (taken[0].search.ratio, taken[0].quantize.bits, taken[0].tasks.tasks) == (0.3, 4, "")
    file.write_text(file.read_text() + "no_such_key: 1\n")
    assert main(["tune", "model", f"--config={file}"]) == 2
    assert "no_such_key" in capsys.readouterr().err


def test_the_file_of_a_compress_run_says_to_evaluate_what_it_says_of_evaluation(tmp_path, monkeypatch, capsys):
    """Not its calibration window, and not what compress alone has, however it is spelled there."""
    taken: list[PerplexityConfig] = []

    def evaluate_only(target: str, config: PerplexityConfig) -> None:
        taken.append(config)
        raise ConfigError("stopped here", "")

    monkeypatch.setattr("layercut.cli.single_stage.evaluate_only", evaluate_only)
    file = tmp_path / "whole.yaml"
    file.write_text(yaml.safe_dump(flattened(CompressConfig()) | {"ratio": 0.3, "window": 32, "eval_window": 64}))
    main(["evaluate", "model", f"--config={file}"])
    file.write_text("window: 32\nmethod: race\nno_speed: true\nno_fold: true\nfor: mlx\nplace: memory\n")
    main(["evaluate", "model", f"--config={file}"])
    main(["evaluate", "model", f"--config={file}", "--window=16"])
    assert [config.eval_window for config in taken] == [64, None, 16], capsys.readouterr().err
    assert taken[1].load.place == "memory"


def test_text_is_drawn_for_what_a_command_does_and_the_next_goes_on_with_it(tiny_model, texts, tmp_path, monkeypatch):
    """No evaluation text is there, nor is it asked for."""

    def offline(*_: object) -> None:
        raise AssertionError("the Hub is not asked")

    monkeypatch.setattr("layercut.data.documents.from_hub", offline)
    same = [str(tiny_model), f"--data={texts[0]}", "--tokens=64", "--window=16", "--ratio=0.2", f"--out={tmp_path}"]

    def begun() -> list[str]:
        log = (tmp_path / "metrics.jsonl").read_text().splitlines()
        return [event["stage"] for event in map(json.loads, log) if event["name"] == "started"]

    assert main(["search", *same, "--method=exhaustive"]) == 0
    assert begun() == ["text-calibration", "search", "search-plain"]
    assert main(["tune", *same, "--method=exhaustive", "--no-fold", "--tune-tokens=32", "--batch-tokens=16"]) == 0
    assert begun()[3:] == ["text-heldout", "text-tuning", "cut", "fold", "heal", "quantize", "export"]


# --- help in boxes ---


def test_help_fits_a_screen_and_help_all_has_every_option(capsys):
    flag = re.compile(r"^│ [ *]{0,4}(--[a-z-]+)", re.MULTILINE)
    assert main(["compress", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["compress", "--help-all"]) == 0
    full = capsys.readouterr().out
    assert {*flag.findall(short)} == FEW
    assert len(short.splitlines()) < 64
    assert short.count("    layercut compress MODEL") >= 3
    every = {argument.names[0] for argument in parameters("compress")}
    assert {*flag.findall(full)} >= every - {"--model"}


@pytest.mark.parametrize("arguments", [["compress", "--help"], ["evaluate"], ["plan", "--help"]])
def test_rich_and_refusals_take_a_reader_that_goes_away_as_well(arguments):
    """As in `layercut compress --help | head`; what is refused goes to the same closed pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "layercut.cli", *arguments]
    assert subprocess.run(command, stdout=writing, stderr=writing).returncode == 128 + signal.SIGPIPE
    os.close(writing)
