"""A size that layers and bits share: how many layers go is chosen with the bits of what stays."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bits_by_budget import SIZES, half

import folders
import quick
import tiny
from layercut.cli.command_line import main
from layercut.config import QuantizeConfig
from layercut.config.commands import from_flat
from layercut.errors import ConfigError
from layercut.layer_search import search
from layercut.pipeline.run_folder import Run
from layercut.pipeline.stages import quantize, size_budgets
from layercut.quantization import bit_choice
from layercut.segments import Segment
from layercut.surgery import cut

LAYERS = 6
AUTO = QuantizeConfig(bits="auto")


def model_whose_layers(weigh: float) -> Any:
    """A model every second layer of which adds `weigh` times as much to the stream as it did."""
    model = tiny.llama(LAYERS, vocab_size=folders.VOCABULARY, tie_word_embeddings=True, **SIZES)
    for layer in list(model.model.layers)[1::2]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= weigh
    return half(model)


def compressed(folder: Path, model: Any, texts: Any, size: int, code: int = 0) -> dict[str, Any]:
    """What a run by --bits auto and --target-size leaves in its folder."""
    if model is not None:
        model.save_pretrained(folder / "model")
        folders.tokenizer().save_pretrained(folder / "model")
    argv = ["tune", str(folder / "model"), "--bits=auto", "--bits-allowed=8,4,2", "--tokens=512", "--window=32"]
    argv += ["--quantizer=rtn", "--preserve=none", f"--data={texts[0]}", "--tune-tokens=0"]
    assert main([*argv, f"--out={folder / 'run'}", f"--target-size={size}"]) == code
    names = ("shares", "quantize", "cut", "export") if code == 0 else ()
    return {name: json.loads((folder / "run" / f"{name}.json").read_text()) for name in names}


@pytest.mark.parametrize(("weigh", "size", "go"), [(0.0, 110_000, True), (1.0, 300_000, False)])
def test_layers_go_where_they_are_cheaper_than_bits(weigh, size, go, texts, tmp_path, monkeypatch):
    quick.leave_out(monkeypatch)
    run = compressed(tmp_path, model_whose_layers(weigh), texts, size)
    points, after = run["shares"]["points"], len(run["cut"]["original_layer_index"])
    assert [point["layers"] for point in points] == sorted({point["layers"] for point in points})
    assert all(point["bytes"] <= size for point in points)
    assert run["export"]["bytes"] <= size
    best = min(points, key=lambda point: point["folded"] + point["rounded"])
    assert LAYERS - after == run["shares"]["layers"] == best["layers"]
    assert (after < LAYERS) == go
    assert run["quantize"]["mixture"]["mean_bits"] == pytest.approx(best["mean_bits"], rel=0.1)
    assert run["quantize"]["mixture"]["bytes"] <= size


def test_a_number_that_no_cut_can_have_is_passed_over_and_a_stopped_one_goes_on(texts, tmp_path, monkeypatch):
    quick.leave_out(monkeypatch)
    asked = []

    def searched(*args, n_layers, **more):
        asked.append(n_layers)
        if n_layers == 1:
            raise ConfigError("a cut of one layer breaks its pattern", "take another number")
        if n_layers == 3 and asked.count(3) == 1:
            raise KeyboardInterrupt
        return search(*args, n_layers=n_layers, **more)

    monkeypatch.setattr(size_budgets.layer_search, "search", searched)
    compressed(tmp_path, model_whose_layers(0.0), texts, 110_000, code=130)
    run = compressed(tmp_path, None, texts, 110_000)
    assert asked[:5] == [1, 2, 3, 1, 3], "what was found is kept, what was refused asked again"
    assert [point["layers"] for point in run["shares"]["points"]] == [0, 2, 3]
    assert not (tmp_path / "run" / "shares-costs.json").exists()
    Run(tmp_path / "run", force=True)
    assert not list((tmp_path / "run").glob("shares*.json")), "--force forgets what was chosen"


def test_numbers_left_open_are_those_that_a_choice_of_bits_is_not_refused_for():
    model = model_whose_layers(1.0)
    for target in (70_000, 110_000, 300_000):
        open_ = []
        for number in range(LAYERS):
            try:
                bit_choice.check_target(model, AUTO, target, without=number)
            except ConfigError:
                continue
            open_.append(number)
        assert bit_choice.numbers_left_open(model, AUTO, target) == open_ != []
    for target, words in ((1_000, "one layer in the fewest bits leaves"), (10_000_000, "needs no quantization")):
        with pytest.raises(ConfigError, match=words):
            bit_choice.numbers_left_open(model, AUTO, target)


def test_costs_follow_the_layers_that_stay():
    model = model_whose_layers(1.0)
    small = cut(model, [Segment(1, 3)])
    names = [name for name, module in model.named_modules() if hasattr(module, "weight") and "norm" not in name]
    by_weight = {id(model.get_submodule(name).weight): name for name in reversed(names)}
    costs = {name: {(4, 64): float(i)} for i, name in enumerate(names)}
    after = bit_choice.costs_after(costs, model, small, {1, 2}, AUTO)
    for name, each in after.items():
        before = by_weight[id(small.get_submodule(name).weight)]
        assert each == costs[before] or before == "model.embed_tokens"
    assert len(after) == len(names) - 2 * 7


def test_it_is_planned(tmp_path, capsys):
    model_whose_layers(1.0).save_pretrained(tmp_path)
    argv = ["plan", str(tmp_path), "--bits=auto", "--target-size=110kB", "--window=32", "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert "shares" in told["stages"]
    assert told["layers"] == {"before": LAYERS, "after": LAYERS}


# --- what trains the rounding by itself ---


class Weights:
    """As much of a quantized model as tells how many bits it has."""

    def __init__(self, bits: int) -> None:
        self.model = tiny.llama(2)
        self.packed = {"model.layers.0.mlp.up_proj.weight_packed": None, "model.embed_tokens.weight": None}
        self.weights = [
            SimpleNamespace(name="model.layers.0.mlp.up_proj", bits=bits),
            SimpleNamespace(name="model.embed_tokens", bits=8),  # as whole bytes, which nothing trains
        ]


@pytest.mark.parametrize(
    ("asked", "bits", "room", "learns"),
    [
        ("auto", 3, 10**9, True), ("auto", 4, 10**9, False), ("auto", 3, 1000, False), ("scales", 2, 10**9, False),
        ("rounding", 4, 1000, True),
    ],
)  # fmt: skip
def test_the_rounding_is_trained_by_itself_where_bits_are_few_and_memory_is_not(asked, bits, room, learns, monkeypatch):
    config = from_flat({"ratio": 0.2, "bits": bits, "tune_quantized": asked})
    work: Any = SimpleNamespace(config=config, dense=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr("layercut.models.memory.whole_bytes", lambda _: room)
    assert quantize.learns_rounding(work, Weights(bits)) == learns
