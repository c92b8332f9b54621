"""Several rounds of pruning, and the walk along the frontier of size and loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quick
from layercut import evaluation
from layercut.cli.command_line import main
from layercut.data.blocks import stored_blocks
from layercut.models import checkpoints, loading, model_weights
from layercut.pipeline.iterative import round_lengths
from layercut.pipeline.stages import quantize
from layercut.segments import Removal, Segment, kept_layers

SHORT = ["--tokens=96", "--window=16", "--tune-tokens=128", "--eval-tokens=64", "--no-speed", "--learning-rate=0.001"]
LARGE = "1GB"


pytestmark = pytest.mark.usefixtures("quick_runs")


def command(model: Path, texts: tuple[Path, Path], out: Path, *flags: str) -> list[str]:
    return ["compress", str(model), *SHORT, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={out}", *flags]


def artefact(run: Path, name: str) -> dict:
    return json.loads((run / f"{name}.json").read_text())


# --- what is removed ---


def test_a_later_cut_is_told_in_the_dense_models_layers():
    first = Removal.first([Segment(3, 5)])
    beside = first.then([Segment(2, 4)], 8)  # layers 2 and 5 of eight
    assert (beside.cut, beside.all, beside.new) == ((Segment(2, 4),), (Segment(2, 6),), (Segment(2, 6),))
    apart = first.then([Segment(4, 5)], 8)  # layer 6
    assert (apart.all, apart.new) == ((Segment(3, 5), Segment(6, 7)), (Segment(6, 7),))


@given(st.data())
def test_cuts_one_after_another_leave_what_one_cut_of_all_leaves(data):
    layers = data.draw(st.integers(4, 16))
    removal, left = None, list(range(layers))
    for _ in range(data.draw(st.integers(1, 3))):
        if len(left) < 2:
            break
        start = data.draw(st.integers(0, len(left) - 1))
        stop = data.draw(st.integers(start + 1, len(left) if start else len(left) - 1))
        cut = Segment(start, stop)
        fresh = set(left[start:stop])
        left = left[:start] + left[stop:]
        removal = removal.then([cut], layers) if removal else Removal.first([cut])
        assert kept_layers(removal.all, layers) == left
        assert {i for s in removal.new for i in range(s.start, s.stop)} >= fresh
        assert set(removal.new) <= set(removal.all)


def test_rounds_share_the_layers():
    assert round_lengths(7, 30, 3) == [3, 2, 2]
    assert round_lengths(2, 30, 5) == [1, 1]
    assert round_lengths(None, 30, 5) == [3, 3, 3, 3, 3]
    assert round_lengths(None, 4, 9) == [1, 1, 1]


# --- runs ---


@pytest.fixture(scope="module")
def two_rounds(tiny_model, texts, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "two"
    with pytest.MonkeyPatch.context() as patch:
        quick.leave_out(patch)
        assert main(command(tiny_model, texts, run, "--ratio=0.5", "--rounds=2")) == 0
    return run


def test_two_rounds_remove_what_was_asked_and_heal_in_between(two_rounds):
    summary, search = artefact(two_rounds, "summary"), artefact(two_rounds, "search")
    assert summary["layers"] == {"before": 8, "after": 4}
    assert [len(r["cut"]) > 0 for r in search["rounds"]] == [True, True]
    assert search["rounds"][-1]["segments"] == search["segments"] == summary["segments"]
    assert search["candidates"][0]["segments"] == search["segments"]
    heal = artefact(two_rounds, "heal")
    assert [tuning["tokens"] for tuning in heal["rounds"]] == [64, 64], "no token is tuned on twice"
    assert summary["perplexity"]["cut"] != summary["perplexity"]["tuned"]


def test_what_is_exported_is_what_the_last_round_left(two_rounds, tiny_model):
    """Rebuilt step by step from the rounds' own artefacts."""
    from safetensors.torch import load_file

    from layercut.surgery import cut_segment_

    model = loading.load(checkpoints.resolve(str(tiny_model))).model
    for number in (1, 2):
        cut_segment_(model, [Segment(*bounds) for bounds in artefact(two_rounds, f"search-{number}")["cut"]])
        for name, stage, key in (("folded", "fold", "changed"), ("tuned", "heal", "tuning")):
            if artefact(two_rounds, f"{stage}-{number}")[key]:
                model_weights.replace_parameters_(model, load_file(two_rounds / f"{name}-{number}.safetensors"))
    exported = loading.load(checkpoints.resolve(str(two_rounds / "model"))).model
    theirs = exported.state_dict()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, theirs[name])} == set()
    tokens = stored_blocks(two_rounds, "evaluation")
    found = artefact(two_rounds, "summary")["perplexity"]["tuned"]
    assert evaluation.perplexity(exported, tokens) == pytest.approx(found, rel=1e-6)


def test_a_finished_run_of_rounds_does_nothing_again(two_rounds, tiny_model, texts):
    events = two_rounds / "metrics.jsonl"
    before = events.read_text().count('"started"')
    assert main(command(tiny_model, texts, two_rounds, "--ratio=0.5", "--rounds=2")) == 0
    assert events.read_text().count('"started"') == before


def test_a_round_beyond_the_budget_of_loss_is_undone(tiny_model, texts, tmp_path, capsys, monkeypatch):
    measured = quantize.point
    # a random model may gain by a cut
    monkeypatch.setattr(quantize, "point", lambda *of: replace(one := measured(*of), rise=0.1 * (8 - one.layers)))
    run = tmp_path / "run"
    assert main(command(tiny_model, texts, run, "--max-loss=1e9", "--rounds=2")) == 0
    frontier = artefact(run, "frontier")
    assert [point["layers"] for point in frontier["points"]] == [7, 6]
    for name in ("export.json", "summary.json"):  # what a run that was stopped before its end lacks
        (run / name).unlink()
    assert main(command(tiny_model, texts, run, "--max-loss=0.15", "--rounds=2")) == 0
    assert artefact(run, "summary")["layers"]["after"] == 7
    capsys.readouterr()
    assert main(command(tiny_model, texts, tmp_path / "none", "--max-loss=0.05", "--rounds=2")) == 2
    assert "is exceeded by the first round" in capsys.readouterr().err


def test_two_budgets_walk_the_frontier_and_take_the_best_point(tiny_model, texts, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [f"--target-size={LARGE}", "--max-loss=1e9", "--quantizer=rtn"]
    assert main(command(tiny_model, texts, run, *flags)) == 0
    frontier = artefact(run, "frontier")
    assert {point["bits"] for point in frontier["points"]} == {16, 8, 4}
    assert frontier["chosen"] == min(frontier["points"], key=lambda point: point["rise"])
    sizes = {point["bits"]: point["bytes"] for point in frontier["points"]}
    target = (sizes[4] + sizes[8]) // 2
    small = tmp_path / "small"
    assert main(command(tiny_model, texts, small, f"--target-size={target}B", *flags[1:])) == 0
    chosen, summary = artefact(small, "frontier")["chosen"], artefact(small, "summary")
    assert chosen["bits"] == 4
    assert summary["layers"]["after"] == chosen["layers"] == 8
    assert summary["bytes"]["after"] < target * 1.1, "the file's header beside the weights"
    assert summary["perplexity"]["quantized"] is not None
    embedded = tmp_path / "embedded"
    assert main(command(tiny_model, texts, embedded, *flags, "--quantize-embeddings")) == 0
    points = artefact(embedded, "frontier")["points"]
    embeddings = {point["bits"]: sizes[point["bits"]] - point["bytes"] for point in points}
    assert embeddings[16] == 0 < embeddings[8] == embeddings[4], "in 8 bits where anything is quantized"
    assert '<section id="frontier">' in (small / "report.html").read_text()
    assert "Size against loss" in (small / "model" / "README.md").read_text()


def test_budgets_that_cannot_be_met_are_refused_with_what_was_seen(tiny_model, texts, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--target-size=1KB", "--max-loss=0.5", "--rounds=2", "--quantizer=rtn"]
    assert main(command(tiny_model, texts, run, *flags)) == 2
    said = capsys.readouterr().err
    assert "nothing seen is inside both" in said
    assert "hint:" in said
    assert artefact(run, "frontier")["chosen"] is None
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--segment=3:5", "--rounds=2"], "--rounds repeats a search"),
        (["--ratio=0.5", "--rounds=2", "--tune-tokens=0"], "--tune-tokens is 0"),
        (["--ratio=0.5", "--rounds=0"], "--rounds 0 is too small"),
        (["--target-size=1MB", "--max-loss=0.1", "--rounds=1"], "--rounds 1 is given"),
        (["--ratio=0.5", "--max-loss=0.1"], "both --ratio and --max-loss are given"),
        (["--target-size=1MB", "--max-loss=0.1", "--bits=8"], "tries 16, 8 and 4 bits"),
        (["--target-size=1MB", "--max-loss=0.1", "--endpoint-bits=8"], "tries 16, 8 and 4 bits"),
        (["--ratio=0.5", "--quantize-embeddings"], "nothing is quantized"),
        (["--ratio=0.5", "--endpoint-bits=8"], "nothing is quantized"),
    ],
)
def test_what_rounds_cannot_heed_is_refused(flags, words, tiny_model, texts, tmp_path, capsys):
    argv = [flag for flag in command(tiny_model, texts, tmp_path / "run") if not flag.startswith("--tune-tokens")]
    assert main([*argv, *flags]) == 2
    assert words in capsys.readouterr().err
