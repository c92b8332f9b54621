"""`layercut evaluate` on a finished run: the same figures printed, as JSON, and from the API."""

from __future__ import annotations

import json

import pytest

import layercut as lc
from layercut.cli.command_line import main
from layercut.data.blocks import stored_blocks
from layercut.models import checkpoints, loading


def test_the_ratio_of_two_perplexities_has_the_error_that_the_api_gives(tiny_model, texts, tmp_path, capsys):
    run = tmp_path / "run"
    measured = [f"--eval-data={texts[1]}", "--eval-tokens=64", "--eval-window=16"]
    argv = ["compress", str(tiny_model), f"--data={texts[0]}", "--tokens=64", "--window=16", "--segment=3:5"]
    assert main([*argv, *measured, "--tune-tokens=0", "--no-fold", "--no-speed", f"--out={run}"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), *measured]) == 0
    (dense,), (pruned,), (ratio, error) = [line.split("\t")[1:] for line in capsys.readouterr().out.splitlines()]
    assert main(["evaluate", str(run), *measured, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    both = (loading.load(checkpoints.resolve(str(folder))).model for folder in (run / "model", tiny_model))
    api = lc.evaluate(next(both), stored_blocks(run, "evaluation"), baseline=next(both))
    assert api.ratio != pytest.approx(1, rel=1e-3), "else the errors of ratio and logarithm are the same"
    assert found["perplexity"] == {"dense": api.baseline_perplexity, "compressed": api.perplexity}
    assert found["ratio"] == {"value": api.ratio, "standard_error": pytest.approx(api.ratio_error, rel=1e-9)}
    shown = [float(dense), float(pruned), float(ratio), float(error.removeprefix("± "))]
    assert shown == pytest.approx([api.baseline_perplexity, api.perplexity, api.ratio, api.ratio_error], abs=1e-4)
    (kept,) = (run / "evaluations").iterdir()
    assert json.loads(kept.read_text())["ratio"] == found["ratio"]
