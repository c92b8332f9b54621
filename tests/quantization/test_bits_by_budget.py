"""Bits by budget: what each weight costs at each width, the knapsack, and what is written and reloaded."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import folders
import tiny
from layercut import quantize
from layercut.cli.command_line import main
from layercut.config import QuantizeConfig
from layercut.config.commands import from_flat
from layercut.errors import ConfigError
from layercut.export import checkpoint, engines
from layercut.layer_search import search
from layercut.models import decoder_stack
from layercut.models.losses import kl_divergence
from layercut.pipeline.run_folder import Run
from layercut.pipeline.stages import quantize as quantize_stage
from layercut.pipeline.stages import size_budgets
from layercut.quantization import bit_choice, calibration, quantize_
from layercut.quantization.bit_choice import cheapest
from layercut.quantization.grid import decode, encode, fit_grid
from layercut.segments import Segment
from layercut.surgery import cut

TOKENS, OTHERS = tiny.some_tokens(32, 32), tiny.some_tokens(8, 32, seed=1)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


def half(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def uneven(layers: int = 4) -> Any:
    """A model of which half the layers hardly matter: what they add to the stream is small."""
    model = tiny.llama(layers, **SIZES)
    for layer in list(model.model.layers)[1::2]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= 0.03
    return half(model)


def kl(model: Any, other: Any) -> float:
    p, q = (each(OTHERS, use_cache=False).logits for each in (model, other))
    return kl_divergence(p, q).mean().item()


# --- the knapsack ---


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_is_that_of_all_combinations(seed):
    draw = random.Random(seed)
    costs = [[draw.choice([math.inf, draw.random()]) for _ in range(3)] + [draw.random()] for _ in range(5)]
    sizes = [[draw.randint(1, 40) for _ in row] for row in costs]
    budget = draw.randint(sum(map(min, sizes)), sum(map(max, sizes)))
    every = [
        (sum(costs[i][j] for i, j in enumerate(pick)), sum(sizes[i][j] for i, j in enumerate(pick)))
        for pick in itertools.product(*map(range, map(len, costs)))
    ]
    least = min((cost for cost, size in every if size <= budget), default=math.inf)
    picked = cheapest(costs, sizes, budget)
    if math.isinf(least):
        assert picked is None
        return
    assert picked is not None
    assert sum(sizes[i][j] for i, j in enumerate(picked)) <= budget
    assert sum(costs[i][j] for i, j in enumerate(picked)) == pytest.approx(least, rel=1e-5)


# --- what each width costs ---


def test_costs_are_the_kl_of_rounding_one_weight():
    model = tiny.llama(4, tie_word_embeddings=True, **SIZES)
    names = [name for name, module in model.named_modules() if name.endswith("_proj")] + ["model.embed_tokens"]
    widths = [(3, 32, True), (4, 64, False)]
    found = calibration.measure(model, TOKENS, dict.fromkeys(names, widths), dtype=torch.bfloat16)
    pairs = []
    for name, width in itertools.product(names[::3], widths):
        copy = decoder_stack.share(model)
        weight = copy.get_submodule(name).weight
        grid = fit_grid(weight, *width[:2], asymmetric=width[2], dtype=torch.bfloat16)
        rounded = torch.nn.Parameter(decode(encode(weight, grid), grid).to(weight.dtype), False)
        decoder_stack.replace_parameters_(copy, {f"{name}.weight": rounded})
        pairs.append((kl(model, copy), found[name][width]))
    ranks = [torch.tensor(column).argsort().argsort().float() for column in zip(*pairs, strict=True)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9, pairs
    assert 0.5 < sum(told for _, told in pairs) / sum(true for true, _ in pairs) < 2
    again = calibration.measure(model, TOKENS, dict.fromkeys(names, widths), dtype=torch.bfloat16)
    assert again == found, "the same seed, the same costs"
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_a_mixture_costs_less_than_one_width_of_its_size():
    model = uneven()
    uniform = quantize(model, bits=4, quantizer="rtn", embedding_bits=8)
    budget = uniform.bytes_after + 8192  # both take about as much for the file's header
    mixed = quantize(model, TOKENS, bits="auto", quantizer="rtn", target_size=str(budget))
    assert mixed.bytes_after <= uniform.bytes_after + 200 * len(uniform.packed)
    assert kl(model, mixed.model) < 0.7 * kl(model, uniform.model)
    assert len({row.bits for row in mixed.weights}) > 1
    assert mixed.mixture["predicted_kl"] == pytest.approx(kl(model, mixed.model), rel=0.6)


# --- what is written ---


@pytest.mark.parametrize(("size", "tied"), [("100kB", False), ("least", False), ("least", True)])
def test_it_is_within_the_size_and_reloads_to_the_bit(size, tied, tmp_path):
    model = half(tiny.llama(3, tie_word_embeddings=tied, vocab_size=folders.VOCABULARY, **SIZES))
    with pytest.raises(ConfigError, match="the least possible is") as refusal:
        quantize(model, TOKENS, bits="auto", target_size="1kB")
    size = str(refusal.value.hint).rpartition(" ")[2] if size == "least" else size
    found = quantize(model, TOKENS, bits="auto", target_size=size)
    small = refusal.value.hint.endswith(size)
    assert bool(found.config.get("dequantize")) == small, "embeddings packed as all others, or as whole bytes"
    assert small or len({row.bits for row in found.weights}) > 1
    packing = {"packed": dict(found.packed), "quantization_config": dict(found.config)}
    written = checkpoint.export_checkpoint(found.model, folders.tokenizer(), tmp_path / "model", **packing)
    assert found.mixture is not None
    assert found.bytes_after < written["bytes"] <= found.mixture["bytes"] <= float(size.removesuffix("kB")) * 1000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(loaded(TOKENS, use_cache=False).logits, found.model(TOKENS, use_cache=False).logits)
    if small:  # whole bytes are unpacked under both names
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert engines.written_as(found.config) == ("packed embeddings" if small else "int8 embeddings")


def test_only_what_is_allowed_is_chosen():
    model = half(tiny.llama(3, **SIZES))
    config = QuantizeConfig(bits="auto", quantizer="rtn", bits_allowed="8,4", embedding_bits=16)
    found = quantize_(decoder_stack.share(model), TOKENS, config, target=110_000)
    assert {row.bits for row in found.weights} == {8, 4}
    assert not any(row.name in ("model.embed_tokens", "lm_head") for row in found.weights)
    assert engines.written_as(found.config) == engines.written_by(config) == "int4", "as vLLM reads it"
    with pytest.raises(ConfigError, match="needs no quantization: the model's weights are"):
        bit_choice.check_target(model, config, 10**9)
    with pytest.raises(ConfigError, match="the least possible is") as refusal:
        bit_choice.check_target(model, config, 10_000)
    assert "--embedding-bits" in str(refusal.value.hint)
    grouped = replace(config, group_size=16, embedding_bits=None, bits_allowed="6,3")
    found = quantize_(decoder_stack.share(model), TOKENS, grouped, target=100_000)
    assert {row.group_size for row in found.weights} == {16}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ratio": 0.2}, "without --target-size"), ({"target_size": "1MB", "max_loss": 0.1}, "with --max-loss"),
        ({"target_size": "1MB", "ratio": 0.2, "embedding_bits": 4}, "--embedding-bits 4 is given"),
        ({"target_size": "1MB", "ratio": 0.2, "bits_allowed": "5"}, "--bits-allowed is '5'"),
        ({"target_size": "1MB", "ratio": 0.2, "bits": 4}, "both --ratio and --target-size"),
        ({"ratio": 0.0, "bits": 16}, "not between 0 and 1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        from_flat({"bits": "auto", **given}).check()
    for removed in ({}, {"ratio": 0.0}, {"segment": ["2:3"]}):
        from_flat({"bits": "auto", "target_size": "1MB", **removed}).check()


# --- the command ---


def test_a_run_that_removes_no_layer_chooses_bits(texts, tmp_path, capsys):
    model = half(tiny.llama(3, vocab_size=folders.VOCABULARY, tie_word_embeddings=True, **SIZES))
    model.save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--bits=auto", "--no-speed", "--tokens=256", "--window=32", "--tune-tokens=64", "--eval-tokens=256"]
    flags += ["--quantizer=rtn", f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    argv = ["compress", str(tmp_path / "model"), "--ratio=0", *flags, f"--out={tmp_path / 'run'}"]
    assert main([*argv, "--target-size=10kB"]) == 2
    assert "the least possible is" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--target-size=100kB"]) == 0
    run = {name: json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("quantize", "summary")}
    assert run["summary"]["layers"] == {"before": 3, "after": 3}
    assert run["summary"]["bytes"]["after"] <= 100_000
    assert run["quantize"]["bits"] == "auto"
    assert run["quantize"]["mixture"]["costs"]["model.embed_tokens"]
    assert run["quantize"]["tuning"], "below 8 bits scales are trained"
    assert "Bits of each matrix" in (tmp_path / "run" / "report.html").read_text()


# --- a size that layers and bits share ---

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
def test_layers_go_where_they_are_cheaper_than_bits(weigh, size, go, texts, tmp_path):
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
    assert quantize_stage.learns_rounding(work, Weights(bits)) == learns
