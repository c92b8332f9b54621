"""What research/fronts.py says of points: against answers worked out by hand; and research/frontier.py in small."""

import json
import math
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import folders
import quick
import tiny
from layercut.data import blocks
from layercut.data.probes import probe_rows
from layercut.models import checkpoints, decoder_stack, loading


@pytest.fixture
def fronts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "research")
    return import_module("fronts")


def point(ratio: float, setting: str, size: float, *rises: float) -> dict:
    """A point of a dense model of 1,000 bytes and perplexity 10 on every text."""
    by_text = {f"text{i}": rise for i, rise in enumerate(rises)}
    perplexity = {text: 10 * (1 + rise) for text, rise in by_text.items()}
    return {
        "ratio": ratio, "setting": setting, "layers": round(10 * (1 - ratio)), "bytes": size, "share": size / 1000,
        "rise": by_text, "perplexity": perplexity, "keys_found": 3, "keys_asked": 4,
    }  # fmt: skip


DENSE = point(0.0, "bf16", 1000, 0.0, 0.0)
POINTS = [
    DENSE,
    point(0.2, "bf16", 800, 0.20, 0.30),
    point(0.4, "bf16", 600, 1.00, 0.90),
    point(0.0, "int8", 500, 0.005, 0.001),
    point(0.0, "int4", 300, 0.04, 0.08),
    point(0.2, "int8", 400, 0.21, 0.31),
    point(0.2, "int4", 240, 0.25, 0.40),
    point(0.4, "int4", 190, 1.20, 1.00),
]


def test_a_front_has_no_point_that_another_beats(fronts):
    found = fronts.front([POINTS[i] for i in (5, 0, 4, 6, 3, 7)])
    assert [p["bytes"] for p in found] == [190, 240, 300, 500, 1000], "400 bytes at 0.31 is beaten by 300 at 0.08"


def test_the_smallest_within_each_budget(fronts):
    within = fronts.answers(POINTS)["smallest_within"]
    assert {budget: p["bytes"] for budget, p in within.items()} == {"0.01": 500, "0.05": 500, "0.1": 300, "0.25": 300}


def test_the_goal_is_answered_from_either_side(fronts):
    found = fronts.answers(POINTS)
    assert found["goal"]["bytes"] == pytest.approx(200.5), "to the digits that are told"
    assert found["goal"]["best_that_fits"] is POINTS[7]
    share = (200.5 - 190) / (240 - 190)
    between = math.exp((1 - share) * math.log(2.2) + share * math.log(1.4)) - 1
    assert found["goal"]["loss_interpolated"] == pytest.approx(between)
    assert "Within 1% the model gets 50% smaller; at 80% smaller perplexity rises by 120%" in found["words"][0]
    without = fronts.answers(POINTS[:-1])
    assert without["goal"]["best_that_fits"] is None
    assert without["goal"]["loss_interpolated"] is None
    assert without["goal"]["smallest"] is POINTS[6]
    assert "no point is 80% smaller: the smallest is 76.0% smaller" in without["words"][0]


def test_more_tokens_to_round_on_are_those_to_train_on_and_none_that_judge(fronts, texts):
    drawn, model = import_module("tune_quantized").drawn, SimpleNamespace(tokenizer=folders.tokenizer())
    asked = {"tokens": 32, "heldout_tokens": 16, "tune_tokens": 64}
    args = Namespace(data=str(texts[0]), window=8, tune_window=16, seed=0, **asked)
    few, more = drawn(model, {}, args), drawn(model, {"calibration": 64}, args)
    assert few.calibration.shape == (4, 8)
    assert more.calibration.shape == (8, 8)
    assert torch.equal(more.calibration, torch.cat([few.calibration, few.tuning.view(8, 8)[:4]]))
    assert torch.equal(more.heldout, few.heldout)
    assert torch.equal(more.tuning, few.tuning)
    assert torch.equal(more.rounding, more.calibration)
    longer = {"window": 256, "tune_window": 0, "tokens": 1024, "heldout_tokens": 256, "tune_tokens": 256}
    tests = drawn(model, {"rounding_tests": 0.5}, Namespace(**vars(args) | longer))
    made = probe_rows(model.tokenizer, rows=2, window=256, family="tuning", first=2**20)
    assert made.names
    assert torch.equal(tests.rounding, torch.cat([tests.calibration, made.tokens[(made.answers >= 0).any(1)]]))
    assert len(tests.calibration) == 4, "which a fold is solved on"
    assert dict(import_module("frontier").rows_of({"bits": 3, "rounding_tests": 0.5})) == {"rounding_tests": 0.5}
    for wrong in (24, 128):
        with pytest.raises(SystemExit, match=f"calibration={wrong}"):
            drawn(model, {"calibration": wrong}, args)


def test_a_share_of_tests_is_trained_on_and_neither_rounded_on_nor_judged_by(fronts, texts):
    tune_quantized = import_module("tune_quantized")
    model = SimpleNamespace(tokenizer=folders.tokenizer())
    args = Namespace(
        data=str(texts[0]), window=256, tune_window=0, seed=0, tokens=256, heldout_tokens=256, tune_tokens=6144
    )
    plain, mixed = (tune_quantized.drawn(model, asked, args) for asked in ({}, {"tests": 0.2, "calibration": 1024}))
    tests = blocks.load_blocks(f"{texts[0]}+probes:0.2", model.tokenizer, tokens=6144, window=1024, seed=0, skip=2)
    assert torch.equal(mixed.tuning, tests.tokens)
    assert (tests.marks.lengths > 0).sum() == 2
    assert mixed.treated.row_lengths[tests.marks.lengths == 0].tolist() == [1024, 256, 1024, 256], "as a run does them"
    assert torch.equal(mixed.treated.token_weights, torch.where(tests.marks.answers, 4.0, 1.0))
    assert set(vars(plain.treated).values()) == {None}
    text = tests.tokens[tests.marks.lengths == 0].view(-1, 256)
    assert torch.equal(mixed.calibration, torch.cat([plain.calibration, text[:3]]))
    assert torch.equal(mixed.heldout, plain.heldout)
    assert tune_quantized.drawn(model, {"tests": 0.2, "batch": 512}, args).tuning.shape == (12, 512), "a row a step"
    rows_of, mixture = import_module("frontier").rows_of, {"tests": 0.2, "batch": 512}
    assert dict(rows_of({"bits": 3} | mixture)) == mixture
    assert not rows_of({"bits": 4, "batch": 512}), "plain rows are the same for all"
    rows = {tuple(row) for row in mixed.tuning.view(-1, 256).tolist()}
    assert not rows & {tuple(row) for row in torch.cat([plain.calibration, plain.heldout]).tolist()}


@pytest.mark.parametrize("word", ["removed=1:2", "beside=a.txt", "calibration=64", "quantizer=auto-round"])
def test_words_that_are_not_read_are_refused(fronts, word):
    with pytest.raises(SystemExit, match=f"{word} is not read here"):
        import_module("frontier").points_of(f"bits=4 {word}", 64)


# --- the benchmark itself, on a tiny .gguf model ---


ROUNDED = "bits=4 embeddings=8"
TRAINED = f"{ROUNDED} train=scales batch=32"
SETTINGS = ("bf16", TRAINED, "Q4_0 throughout (GGUF)")


@pytest.fixture
def benchmark(monkeypatch, tmp_path, texts):
    """A call of the benchmark; its result file and what it kept."""
    pytest.importorskip("gguf")
    from gguf_writer import write_gguf

    model = tiny.llama(5, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    file = write_gguf(model, folders.tokenizer(), tmp_path / "tiny.gguf", "Q4_1")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "research")
    quick.leave_out(monkeypatch)
    frontier = import_module("frontier")
    # no key fits a tiny tokenizer's context
    monkeypatch.setattr(frontier, "retrieval_grid", lambda *asked: [{"found": 1, "trials": 2}])

    def run(*flags: str, settings: tuple[str, ...] = SETTINGS) -> tuple[dict, dict]:
        few = "--search-tokens 64 --tune-tokens 128 --quantize-tokens 64 --train-tokens 64 --eval-tokens 256"
        few += " --window 16 --threads 1"
        given = ["--model", str(file), "--data", str(texts[0]), "--report", f"made={texts[1]}", *few.split()]
        places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", ["frontier.py", *given, *places, "--settings", *settings, *flags])
        frontier.main()
        return tuple(json.loads((tmp_path / name).read_text()) for name in ("out.json", "work/points.json"))

    return run


def test_the_benchmark_measures_and_goes_on_where_it_was_stopped(benchmark, tmp_path):
    _, first = benchmark("--ratios", "0", "--gguf-ratios", "0", settings=SETTINGS[1:2])
    assert [row["setting"] for row in first["rows"]] == ["bf16", "bf16", ROUNDED, f"{TRAINED} tokens=64", "Q4_1 kept"]
    flags = ("--ratios", "0.2", "--gguf-ratios", "0.2")
    result, kept = benchmark(*flags)
    assert kept["rows"][: len(first["rows"])] == first["rows"], "finished points are not measured again"
    rows = {(row["points"], row["ratio"], row["setting"]): row for row in result["rows"]}
    assert len(rows) == 2 * (len(SETTINGS) + 1) + 2
    control = loading.load(checkpoints.resolve(str(tmp_path / "work" / "dense"))).model
    plain = loading.load(checkpoints.resolve(str(tmp_path / "tiny.gguf"))).model
    assert not torch.equal(control.model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight)
    dense = rows["control", 0.0, "bf16"]
    assert dense["bytes"] == 2 * decoder_stack.parameter_count(control), "saved in bfloat16, whatever is computed in"
    assert dense["rise"] == {"made": 0.0}
    assert dense["perplexity"] != result["perplexity_as_loaded"], "dithered"
    weights = sum(p.numel() * 18 / 32 if p.dim() == 2 else 4 * p.numel() for p in control.parameters())
    assert rows["control", 0.0, "Q4_0 throughout (GGUF)"]["bytes"] == weights
    rounded, trained = (rows["control", 0.2, name] for name in (ROUNDED, f"{TRAINED} tokens=64"))
    assert rounded["bytes"] == trained["bytes"]
    losses = [each["loss"] for each in trained["trained"]["heldout"]]
    assert min(losses) < losses[0]
    assert trained["perplexity"] != rounded["perplexity"]
    assert all((row["keys_found"], row["keys_asked"]) == (1, 2) for row in (dense, rounded, trained))
    cut = rows["control", 0.2, "bf16"]
    assert (cut["layers"], cut["way"], len(cut["segments"])) == (4, "fewer layers", 1)
    assert cut["retention"]["made"] == pytest.approx(dense["perplexity"]["made"] / cut["perplexity"]["made"])
    whole = rows["gguf", 0.2, "Q4_1 kept"]
    assert whole["bytes"] == (tmp_path / "work" / "cut-0.2.gguf").stat().st_size
    assert whole["share"] == whole["bytes"] / (tmp_path / "tiny.gguf").stat().st_size
    assert result["answers"]["smallest_within"]["0.01"]["bytes"] <= dense["bytes"]
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert str(tmp_path) not in (tmp_path / "out.json").read_text(), "results name files, not folders"
    assert not any("retained" in row for row in result["rows"]), "no task was asked"
    with pytest.raises(SystemExit, match="made with other settings"):
        benchmark(*flags, "--tune-tokens", "256")
