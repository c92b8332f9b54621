"""The whole journey with the decoder layers left on disk gives what it gives in memory, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from layercut import stream
from layercut.cli import main

RUN = ["--ratio=0.25", "--tokens=128", "--window=16", "--tune-tokens=192", "--eval-tokens=64", "--no-speed"]
RUN += ["--batch-tokens=32", "--learning-rate=0.001"]


def compressed(mode, model, texts, out, *more):
    """A run folder, with the layers on disk or in memory."""
    argv = ["compress", str(model), *RUN, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={out}"]
    assert main([*argv, f"--stream={mode}", *more]) == 0
    return out


def read(run, name):
    return json.loads((run / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def both(tiny_model, texts, tmp_path_factory):
    """Run folders of the same run, from disk and in memory."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layercut.heal.endpoints.PASS_TOKENS", 16)  # a step is several passes
        return [compressed(mode, tiny_model, texts, folder / mode) for mode in ("on", "off")]


def test_every_stage_finds_the_same(both):
    disk, memory = both
    for stage, told in {
        "search": ("segments", "candidates"),
        "cut": ("segments", "original_layer_index", "parameters", "bytes"),
        "fold": ("fold", "changed"),
        "eval": ("perplexity",),
    }.items():
        ours, theirs = read(disk, stage), read(memory, stage)
        assert {key: ours[key] for key in told} == {key: theirs[key] for key in told}
    ours, theirs = read(disk, "heal")["tuning"], read(memory, "heal")["tuning"]
    assert ours["heldout"] == theirs["heldout"]
    assert [point["loss"] for point in ours["curve"]] == [point["loss"] for point in theirs["curve"]]
    assert ours["best_step"] > 0
    for file in ("folded", "tuned"):
        assert (disk / f"{file}.safetensors").read_bytes() == (memory / f"{file}.safetensors").read_bytes()


def test_the_checkpoint_is_the_same_and_says_how_it_was_checked(both):
    disk, memory = (load_file(run / "model" / "model.safetensors") for run in both)
    assert disk.keys() == memory.keys()
    assert all(torch.equal(disk[name], memory[name]) for name in disk)
    ours, theirs = (json.loads((run / "model" / "config.json").read_text()) for run in both)
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"] == 6
    check = read(both[0], "export")["check"]
    assert check["logits"] == "equal to the bit"
    assert "left on disk" in check["how"]
    assert check["cached_generation"] is None


def test_what_was_not_measured_is_null(both):
    summary = read(both[0], "summary")
    assert summary["speed"] is None
    assert summary["generation_health"] is None
    assert summary["perplexity"] == read(both[1], "summary")["perplexity"]
    assert (both[0] / "report.html").is_file()
    assert not list(both[0].glob("*tuning*"))
