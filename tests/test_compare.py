"""compare: every method on the same tokens, one artefact each, resumed one by one."""

import json
from typing import get_args

import pytest
from safetensors.torch import load_file

from layercut import compare as module
from layercut import evaluate, models
from layercut.cli import main
from layercut.config import Method
from layercut.cut import cut_segment_
from layercut.errors import SurgeryError
from layercut.segments import Segment

METHODS = list(get_args(Method))


@pytest.fixture(scope="module")
def arguments(tiny_model, texts):
    text, heldout = texts
    return [
        "compare", str(tiny_model), "--ratio=0.25", f"--data={text}", f"--eval-data={heldout}",
        "--tokens=64", "--window=16", "--eval-tokens=64", "--dtype=float32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A run with every method."""
    out = tmp_path_factory.mktemp("compare") / "run"
    assert main([*arguments, f"--out={out}"]) == 0
    return out


def test_every_method_is_measured_on_the_same_tokens(finished, tiny_model):
    comparison = json.loads((finished / "compare.json").read_text())
    assert [row["method"] for row in comparison["methods"]] == METHODS
    assert comparison["layers"] == {"before": 8, "after": 6}
    model = models.load(models.resolve(str(tiny_model)), dtype="float32").model
    heldout = load_file(finished / "tokens.safetensors")["evaluation"]
    assert comparison["dense"]["perplexity"] == pytest.approx(evaluate.perplexity(model, heldout))
    best = {row["method"]: row for row in comparison["methods"]}["exhaustive"]
    for row in comparison["methods"]:
        segments = [Segment(*bounds) for bounds in row["segments"]]
        assert sum(map(len, segments)) == 2
        student = models.share(model)
        cut_segment_(student, segments)
        assert row["perplexity"]["cut"] == pytest.approx(evaluate.perplexity(student, heldout), rel=1e-5)
        assert (row["perplexity"]["folded"] is None) == all(fold["skipped"] for fold in row["fold"])
        assert len(segments) > 1 or row["kl"] >= best["kl"]
        assert json.loads((finished / f"compare-{row['method']}.json").read_text()) == row


def test_the_table_and_the_plot_name_every_method(arguments, finished, capsys):
    assert main([*arguments, f"--out={finished}"]) == 0
    shown, plot = capsys.readouterr().out, (finished / "compare.svg").read_text()
    for method in METHODS:
        assert method in shown
        assert method in plot


def test_methods_resume_one_by_one(arguments, tmp_path, monkeypatch, capsys):
    tried = []
    real = module.try_method

    def recorded(work, method, length):
        if method == stop_at:
            raise KeyboardInterrupt
        tried.append(method)
        return real(work, method, length)

    monkeypatch.setattr(module, "try_method", recorded)
    out = f"--out={tmp_path / 'run'}"
    stop_at = "cosine"
    assert main([*arguments, out, "--methods=random,cosine,angular"]) == 130
    assert tried == ["random"]
    stop_at = None
    assert main([*arguments, out, "--methods=random,cosine,angular"]) == 0
    assert tried == ["random", "cosine", "angular"]
    # one more, and in another order: the others stay
    assert main([*arguments, out, "--methods=angular, reverse-order,random"]) == 0
    assert tried == ["random", "cosine", "angular", "reverse-order"]
    assert main([*arguments, out, "--methods=random", "--force"]) == 0
    assert tried[4:] == ["random"]
    assert not (tmp_path / "run" / "compare-cosine.json").exists()


def test_a_pick_that_cannot_be_cut_is_told_and_the_others_go_on(arguments, tmp_path, monkeypatch, capsys):
    def refuse(model, segments):
        if segments == [Segment(5, 7)]:
            raise SurgeryError("layers 5 and 6 must stay", "")
        cut_segment_(model, segments)

    monkeypatch.setattr(module, "cut_segment_", refuse)
    assert main([*arguments, f"--out={tmp_path / 'run'}", "--methods=reverse-order,random"]) == 0
    refused, other = json.loads((tmp_path / "run" / "compare.json").read_text())["methods"]
    assert refused["refused"] == "layers 5 and 6 must stay"
    assert refused["perplexity"] == {"cut": None, "folded": None}
    assert other["refused"] is None
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods=clp,magic"], "'magic'"),
        (["--methods=,"], "no method"),
        (["--ratio=1.5"], "outside 0 to 1"),
        (["--eval-tokens=1"], "too small"),
    ],
)
def test_bad_flags_are_refused(arguments, tmp_path, capsys, flags, words):
    kept = [a for a in arguments if a.partition("=")[0] not in {flag.partition("=")[0] for flag in flags}]
    assert main([*kept, *flags, f"--out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_ratio_is_asked_for(arguments, tmp_path, capsys):
    assert main([a for a in arguments if not a.startswith("--ratio")]) == 2
    assert "--ratio" in capsys.readouterr().err
