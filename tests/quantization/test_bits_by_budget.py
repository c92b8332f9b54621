"""Bits by budget: what each weight costs at each width, the knapsack, and what is written and reloaded."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import folders
import quick
import tiny
from layercut import quantize
from layercut.cli.command_line import main
from layercut.config import QuantizeConfig
from layercut.config.commands import from_flat
from layercut.errors import ConfigError
from layercut.export import checkpoint, engines
from layercut.models import decoder_stack
from layercut.models.losses import kl_divergence
from layercut.quantization import bit_choice, calibration, quantize_
from layercut.quantization.bit_choice import cheapest
from layercut.quantization.grid import decode, encode, fit_grid
from layercut.quantization.packing import PACKED, WHOLE_BYTES, Assignment, pack, stored_bytes

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


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "form"), [(2, PACKED), (3, PACKED), (6, PACKED), (8, PACKED), (8, WHOLE_BYTES)])
def test_sizes_are_those_of_what_is_packed(bits, form, zeros):
    weight = torch.randn(6, 96).bfloat16()
    target = Assignment("some.module", 0, bits, 32, form, zeros)
    grid = fit_grid(weight, bits, 32, asymmetric=zeros, dtype=torch.bfloat16)
    packed = pack(target.name, encode(weight, grid), grid, form)
    assert {name: tensor.nbytes for name, tensor in packed.items()} == stored_bytes(target, (6, 96), torch.bfloat16)


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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["100kB", "least"])
def test_it_is_within_the_size_and_reloads_to_the_bit(size, tied, tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.export.checkpoint.verify_reload", lambda *_: {})
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
        ({"ratio": 0.2}, "without --target-size"),
        ({"target_size": "1MB", "max_loss": 0.1}, "with --max-loss"),
        ({"target_size": "1MB", "ratio": 0.2, "embedding_bits": 4}, "--embedding-bits 4 is given"),
        ({"target_size": "1MB", "ratio": 0.2, "bits_allowed": "5"}, "--bits-allowed is '5'"),
        ({"target_size": "1MB", "ratio": 0.2, "bits": 4}, "both --ratio and --target-size"),
        ({"ratio": 0.0, "bits": 16}, "outside 0 to 1"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        from_flat({"bits": "auto", **given}).check()
    for removed in ({}, {"ratio": 0.0}, {"segment": ["2:3"]}):
        from_flat({"bits": "auto", "target_size": "1MB", **removed}).check()


# --- the command ---


def test_a_run_that_removes_no_layer_chooses_bits(texts, tmp_path, monkeypatch, capsys):
    quick.leave_out(monkeypatch)
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


def test_quantize_alone_chooses_bits(tiny_model, texts, tmp_path, monkeypatch, capsys):
    quick.leave_out(monkeypatch)
    argv = ["quantize", str(tiny_model), "--bits=auto", "--tokens=256", "--window=32", f"--data={texts[0]}"]
    assert main([*argv, f"--out={tmp_path / 'q'}", "--target-size=120kB"]) == 0
    told = json.loads((tmp_path / "q" / "quantize.json").read_text())
    assert told["exported_bytes"] <= 120_000
    assert len({row["bits"] for row in told["layers"]}) > 1
    assert main([*argv, f"--out={tmp_path / 'r'}"]) == 2
    assert "--bits auto is given without --target-size" in capsys.readouterr().err
    assert main([*argv, f"--out={tmp_path / 'r'}", "--target-size=1kB"]) == 2
    assert "the least possible is" in capsys.readouterr().err
