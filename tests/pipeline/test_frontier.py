"""What research/fronts.py says of points: against answers worked out by hand; and research/frontier.py in small."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest

import folders
import tiny
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
    DENSE, point(0.2, "bf16", 800, 0.20, 0.30), point(0.4, "bf16", 600, 1.00, 0.90),
    point(0.0, "int8", 500, 0.005, 0.001), point(0.0, "int4", 300, 0.04, 0.08), point(0.2, "int8", 400, 0.21, 0.31),
    point(0.2, "int4", 240, 0.25, 0.40), point(0.4, "int4", 190, 1.20, 1.00),
]  # fmt: skip


def test_fronts_budgets_and_the_goal_are_those_worked_out_by_hand(fronts):
    found = fronts.front([POINTS[i] for i in (5, 0, 4, 6, 3, 7)])
    assert [p["bytes"] for p in found] == [190, 240, 300, 500, 1000], "400 bytes at 0.31 is beaten by 300 at 0.08"
    found = fronts.answers(POINTS)
    within = {budget: p["bytes"] for budget, p in found["smallest_within"].items()}
    assert within == {"0.01": 500, "0.05": 500, "0.1": 300, "0.25": 300}
    assert found["goal"]["best_that_fits"] is POINTS[7]
    share = (200.5 - 190) / (240 - 190)
    between = math.exp((1 - share) * math.log(2.2) + share * math.log(1.4)) - 1
    assert found["goal"]["loss_interpolated"] == pytest.approx(between)
    without = fronts.answers(POINTS[:-1])["goal"]
    assert (without["best_that_fits"], without["loss_interpolated"]) == (None, None)
    assert without["smallest"] is POINTS[6]


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
    dense = rows["control", 0.0, "bf16"]
    assert dense["bytes"] == 2 * decoder_stack.parameter_count(control), "saved in bfloat16, whatever is computed in"
    assert dense["rise"] == {"made": 0.0}
    rounded, trained = (rows["control", 0.2, name] for name in (ROUNDED, f"{TRAINED} tokens=64"))
    assert rounded["bytes"] == trained["bytes"]
    losses = [each["loss"] for each in trained["trained"]["heldout"]]
    assert min(losses) < losses[0]
    cut = rows["control", 0.2, "bf16"]
    assert (cut["layers"], cut["way"], len(cut["segments"])) == (4, "fewer layers", 1)
    whole = rows["gguf", 0.2, "Q4_1 kept"]
    assert whole["bytes"] == (tmp_path / "work" / "cut-0.2.gguf").stat().st_size
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    assert str(tmp_path) not in (tmp_path / "out.json").read_text(), "results name files, not folders"
    with pytest.raises(SystemExit, match="made with other settings"):
        benchmark(*flags, "--tune-tokens", "256")
