"""Layers and bits for a size and a loss at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layercut.cli.command_line import main

SHORT = ["--tokens=96", "--window=16", "--tune-tokens=128", "--eval-tokens=64", "--no-speed", "--learning-rate=0.001"]
BUDGETS = ["--target-size=1GB", "--max-loss=1e9", "--quantizer=rtn"]


def command(model: Path, texts: tuple[Path, Path], out: Path, *flags: str) -> list[str]:
    return ["compress", str(model), *SHORT, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={out}", *flags]


def artefact(run: Path, name: str) -> dict:
    return json.loads((run / f"{name}.json").read_text())


def test_the_fewest_layers_inside_both_budgets_go(tiny_model, texts, tmp_path):
    run = tmp_path / "run"
    assert main(command(tiny_model, texts, run, *BUDGETS)) == 0
    found = artefact(run, "frontier")
    assert [(point["layers"], point["bits"]) for point in found["points"]] == [(8, 16), (8, 8), (8, 4)]
    assert found["chosen"] == min(found["points"], key=lambda point: point["rise"])
    smallest = found["points"][-1]["bytes"]

    small, flags = tmp_path / "small", [f"--target-size={smallest - 1000}B", *BUDGETS[1:]]
    assert main(command(tiny_model, texts, small, *flags)) == 0
    found, summary = artefact(small, "frontier"), artefact(small, "summary")
    assert [point["layers"] for point in found["points"]] == [8, 8, 8, 7, 7, 7]
    assert (found["chosen"]["layers"], found["chosen"]["bits"]) == (summary["layers"]["after"], 4) == (7, 4)
    assert summary["bytes"]["after"] < 1.2 * found["chosen"]["bytes"], "the file's header beside the weights"
    assert summary["perplexity"]["tuned"] is not None
    assert summary["perplexity"]["quantized"] is not None
    assert '<section id="frontier"' in (small / "report.html").read_text()
    before = (small / "metrics.jsonl").read_text().count('"started"')
    assert main(command(tiny_model, texts, small, *flags)) == 0
    assert (small / "metrics.jsonl").read_text().count('"started"') == before, "finished, and nothing is run again"


def test_budgets_that_cannot_be_met_are_refused_with_what_was_seen(tiny_model, texts, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command(tiny_model, texts, run, "--target-size=1KB", "--max-loss=0.5", "--quantizer=rtn")) == 2
    assert "--target-size" in capsys.readouterr().err.partition("hint:")[2]
    assert artefact(run, "frontier")["chosen"] is None
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--target-size=1MB", "--max-loss=0.1", "--tune-tokens=0"], ["--ratio=0.5", "--max-loss=0.1"],
        ["--target-size=1MB", "--max-loss=0.1", "--bits=8"], ["--ratio=0.5", "--embedding-bits=8"],
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(flags, tiny_model, texts, tmp_path, capsys):
    argv = [flag for flag in command(tiny_model, texts, tmp_path / "run") if not flag.startswith("--tune-tokens")]
    assert main([*argv, *flags]) == 2
    assert flags[-1].partition("=")[0] in capsys.readouterr().err
