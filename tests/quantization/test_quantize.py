"""Quantization of whole models: what is calibrated on what, what is written, and what a reload makes of it."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, Phi3Config, Qwen3Config

import folders
import quick
import tiny
from layercut.cli.command_line import main
from layercut.cli.single_stage import quantize_alone
from layercut.config import QuantizeConfig
from layercut.config.commands import QuantizeAloneConfig
from layercut.data.blocks import stored_blocks
from layercut.errors import ConfigError, ModelError
from layercut.evaluation import perplexity
from layercut.export import checkpoint
from layercut.models import checkpoints, decoder_stack, loading
from layercut.quantization import bit_choice, quantize_, quantized_weights
from layercut.quantization.calibration import token_weights
from layercut.quantization.packing import saved_bytes
from layercut.quantization.quantizers import gram, output_errors

TOKENS = tiny.some_tokens(32)
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def half(model: Any) -> Any:
    """As a checkpoint in bfloat16 is loaded: buffers stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def linears(model: Any) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def share_of_error(dense: Any, student: Any, name: str, hessian: torch.Tensor) -> float:
    weight, rounded = (m.get_submodule(name).weight for m in (dense, student))
    whole = output_errors(weight, torch.zeros_like(weight), hessian).sum()
    return (output_errors(weight, rounded, hessian).sum() / whole).item()


def read_by(model: Any, name: str) -> torch.Tensor:
    """The inputs of a module on TOKENS."""
    caught: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: caught.append(args[0]))
    logits(model)
    hook.remove()
    return caught[0]


# --- what is calibrated on what ---


def test_every_layer_is_calibrated_on_the_quantized_ones_before_it():
    dense = tiny.llama(4)
    student = decoder_stack.share(dense)
    found = quantize_(student, TOKENS, QuantizeConfig(bits=4))
    rows = {row.name: row for row in found.weights}
    assert set(rows) == set(linears(dense))
    for i in range(4):
        name = f"model.layers.{i}.self_attn.q_proj"
        counts = token_weights(dense, TOKENS, [name])[name]  # before anything is rounded
        hessian = gram(read_by(student, name) * counts.sqrt().unsqueeze(-1)).double()
        assert rows[name].output_error == pytest.approx(share_of_error(dense, student, name, hessian), rel=1e-4)
        assert rows[name].method == "gptq"
    assert all(row.output_error <= row.rtn_output_error for row in found.weights)


def test_weights_are_the_slopes_of_what_is_predicted():
    dense, name = tiny.llama(3), "model.layers.1.mlp.down_proj"
    dense.get_submodule(name).weight.requires_grad_(True)
    found = token_weights(dense, TOKENS, [name], seed=5)[name]
    assert dense.get_submodule(name).weight.requires_grad, "as it was"
    assert dense.get_submodule(name).weight.grad is None
    kept = []
    hook = dense.get_submodule(name).register_forward_hook(lambda _, args, out: kept.append(out))
    predicted = logits(dense)
    hook.remove()
    drawn = torch.multinomial(
        predicted.detach().softmax(-1).flatten(0, 1), 1, generator=torch.Generator().manual_seed(5)
    )
    (slope,) = torch.autograd.grad(predicted.log_softmax(-1).flatten(0, 1).gather(1, drawn).sum(), kept)
    expected = slope.square().mean(-1).sqrt()
    assert torch.allclose(found, expected / expected.mean(), rtol=1e-3)


def test_a_module_that_does_not_see_every_token_has_no_weights():
    dense = tiny.llama(3)
    mlp = dense.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:1]), x[1:]])  # as an expert to which one row is sent
    names = list(linears(dense))
    weights = token_weights(dense, TOKENS, names)
    assert set(names) - set(weights) == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {row.method for row in quantize_(dense, TOKENS, QuantizeConfig(bits=4)).weights} == {"gptq"}


# --- embeddings and head ---


def test_a_head_beside_plain_embeddings_is_calibrated_too(monkeypatch):
    monkeypatch.setattr(bit_choice, "unpacks_while_loading", lambda: False)  # else all in one width is cheaper
    mixed = QuantizeConfig(bits="auto", bits_allowed="16,4,3")
    found = quantize_(tiny.llama(4, tie_word_embeddings=False), TOKENS, mixed, target=62_000)
    assert {row.name: row.method for row in found.weights if ".layers." not in row.name} == {"lm_head": "gptq"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_few_bits_is_calibrated_on_what_it_reads(tied):
    dense = tiny.llama(4, tie_word_embeddings=tied)
    counts = token_weights(dense, TOKENS, ["lm_head"])["lm_head"]
    hessian = gram(read_by(dense, "lm_head") * counts.sqrt().unsqueeze(-1)).double()
    student = decoder_stack.share(dense)
    rows = {row.name: row for row in quantize_(student, TOKENS, QuantizeConfig(bits=4, embedding_bits=4)).weights}
    row = rows["model.embed_tokens" if tied else "lm_head"]
    assert row.method == "gptq"
    assert row.output_error == pytest.approx(share_of_error(dense, student, "lm_head", hessian), rel=1e-4)
    assert row.output_error < 0.9 * row.rtn_output_error
    if not tied:
        assert rows["model.embed_tokens"].method == "rtn", "what rows are read as they are is not calibrated"


# --- what is written ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [{"bits": 8}, {"bits": 4}])
def test_the_packed_tensors_are_the_model(tied, width):
    dense = half(tiny.llama(4, tie_word_embeddings=tied))
    before = {name: weight.clone() for name, weight in dense.named_parameters()}
    student = decoder_stack.share(dense)
    found = quantize_(student, TOKENS, QuantizeConfig(quantizer="rtn", embedding_bits=8, **width))
    assert all(torch.equal(weight, before[name]) for name, weight in dense.named_parameters()), "the dense model"
    weights = quantized_weights(found.packed, found.config)
    for name, weight in student.named_parameters(remove_duplicate=False):
        if name in weights:
            assert torch.equal(weight, weights[name])
        else:
            assert "norm" in name or (name, tied) == ("lm_head.weight", True)
            assert name not in before or torch.equal(weight, before[name]) or tied
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    bits = {row.name: row.bits for row in found.weights}
    assert {bits[name] for name in bits if ".layers." in name} == {width["bits"]}
    assert bits["model.embed_tokens"] == 8
    assert {row.group_size for row in found.weights} == {32, 64}, "the largest that divides each weight's columns"


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_config_says_what_vllm_asks(bits):
    """Its rules, as read in its source: every linear module in a group or ignored, by full name; modules that it fuses
    in one group; packed weights in groups it has kernels for."""
    model = half(tiny.llama(4))
    found = quantize_(model, TOKENS, QuantizeConfig(bits=bits, quantizer="rtn"))
    groups, linear = found.config["config_groups"], {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    named = [name for group in groups.values() for name in group["targets"]]
    assert sorted(named + found.config["ignore"]) == sorted(linear)
    assert "lm_head" in found.config["ignore"]
    assert found.config["quant_method"] == "compressed-tensors"
    where = {name: key for key, group in groups.items() for name in group["targets"]}
    for i, fused in itertools.product(range(4), (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))):
        assert len({where.get(name) for name in linear if f".layers.{i}." in name and name.endswith(fused)}) == 1
    for group in groups.values():
        weights = group["weights"]
        assert (group["format"], group["input_activations"]) == ("pack-quantized", None)
        assert (weights["type"], weights["strategy"], weights.get("actorder")) == ("int", "group", None)
        assert (weights["dynamic"], weights["symmetric"], weights["num_bits"]) == (False, bits > 3, bits)
        for name in group["targets"]:
            (rows, columns), size = model.get_submodule(name).weight.shape, weights["group_size"]
            assert size in (32, 64, 128)
            expected = {"weight_packed": (rows, -(-columns * bits // 32)), "weight_scale": (rows, columns // size)}
            if bits == 3:  # packed along the outputs
                expected["weight_zero_point"] = (-(-rows * bits // 32), columns // size)
            assert {key: tuple(found.packed[f"{name}.{key}"].shape) for key in expected} == expected
            assert found.packed[f"{name}.weight_shape"].tolist() == [rows, columns]


def written(found: Any, folder: Path) -> dict[str, Any]:
    packing = {"packed": dict(found.packed), "quantization_config": dict(found.config)}
    return checkpoint.export_checkpoint(found.model, folders.tokenizer(), folder, **packing)


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**SIZES, tie_word_embeddings=True), Phi3Config(**SIZES), GPTNeoXConfig(**SIZES)],
    ids=lambda config: config.model_type,
)
def test_other_architectures_reload_to_the_bit(config, tmp_path):
    model = half(tiny.tiny(config))
    written(quantize_(model, TOKENS, QuantizeConfig(bits=4, embedding_bits=8)), tmp_path / "model")
    loaded = loading.load(checkpoints.resolve(str(tmp_path / "model")), dtype="bfloat16").model
    assert torch.equal(logits(loaded), logits(model))
    assert not hasattr(model.config, "quantization_config"), "the model in memory is a plain one"


@pytest.mark.parametrize(
    ("bits", "tied", "embeddings"), [(2, False, 2), (3, True, 3), (6, True, 6), (6, False, 6), (3, False, None)]
)
def test_one_width_throughout_reloads_to_the_bit(bits, tied, embeddings, tmp_path):
    """Embeddings packed as all other weights, which stock transformers unpacks while loading; tied ones stored once."""
    model = half(tiny.llama(2, tie_word_embeddings=tied))
    config = QuantizeConfig(bits=bits, quantizer="rtn", embedding_bits=embeddings)
    found = quantize_(model, TOKENS, config)
    assert {row.group_size for row in found.weights} == {32}, "one for all: a loader takes the first group's"
    assert any(name.endswith("weight_zero_point") for name in found.packed) == (bits <= 3)
    size = written(found, tmp_path / "model")["bytes"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ends = 0 if embeddings is None else 1 if tied else 2
    assert sum("weight_scale" in name for name in found.packed) == 2 * 7 + ends
    assert found.bytes_after <= size < found.bytes_after + 8192, "with the header of the file"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"bits": 16}, {"bits": 6, "group_size": 32}, {"bits": 4, "embedding_bits": 8}, {"bits": 3},
        {"bits": 3, "embedding_bits": 3}, {"bits": 4, "embedding_bits": 4},
    ],
)  # fmt: skip
def test_bytes_are_known_before_anything_is_rounded(asked, tied):
    """To the byte those of the tensors, of each layer too: without it there are as many fewer."""
    config = QuantizeConfig(quantizer="rtn", **asked)
    model = half(tiny.llama(3, tie_word_embeddings=tied))
    model.stored_dtype = torch.bfloat16
    found = saved_bytes(model, config, torch.bfloat16)
    whole = decoder_stack.parameter_bytes(model)
    if config.rounds:
        whole = quantize_(decoder_stack.share(model), None, config).bytes_after
    assert found.total == whole
    fewer = saved_bytes(half(tiny.llama(2, tie_word_embeddings=tied)), config, torch.bfloat16)
    assert found.layers == [found.total - fewer.total] * 3


# --- what is refused ---


def test_refusals(monkeypatch):
    model = tiny.llama(2)
    with pytest.raises(ConfigError, match="beside --bits 4 cannot be loaded"):
        QuantizeConfig(bits=4, embedding_bits=3)
    with pytest.raises(ConfigError, match="groups of 48 do not divide the columns of all weights, 32, 64") as refusal:
        quantize_(model, TOKENS, QuantizeConfig(bits=4, group_size=48))
    assert refusal.value.hint == "give --group-size 32"
    with pytest.raises(ModelError, match="no linear modules"):
        quantize_(tiny.gpt2(2), TOKENS, QuantizeConfig(bits=4))
    with pytest.raises(ModelError, match="experts of MixtralForCausalLM are merged"):
        quantize_(tiny.tiny(MixtralConfig(**SIZES, num_local_experts=2)), TOKENS, QuantizeConfig(bits=4))
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj holds weights that are not finite"):
        quantize_(model, TOKENS, QuantizeConfig(bits=4, quantizer="rtn"))
    with monkeypatch.context() as older:
        older.delattr("transformers.integrations.compressed_tensors.CompressedTensorsDequantize")
        with pytest.raises(ConfigError, match="cannot load zero points or packed embeddings"):
            quantize_(tiny.llama(2), TOKENS, QuantizeConfig(bits=3))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ConfigError, match="compressed-tensors") as refusal:
        quantize_(model, TOKENS, QuantizeConfig(bits=4))
    assert refusal.value.hint == 'pip install "layercut[quantize]"'


def test_a_tie_that_came_apart_is_noticed(tmp_path):
    from safetensors.torch import save_file

    weight = torch.zeros(4, 4)
    state = {"a": weight, "b": weight}
    save_file({"a": weight}, tmp_path / "model.safetensors")
    checkpoint.check_bytes(tmp_path, state)
    save_file({"a": weight, "b": weight.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(checkpoint.ReloadError, match="128 bytes of weights were saved, but the model has 64"):
        checkpoint.check_bytes(tmp_path, state)


# --- the journey ---

SHORT = ["--tokens=256", "--window=32", "--tune-tokens=0", "--eval-tokens=256", "--no-speed", "--no-fold"]


@pytest.fixture(scope="module")
def quantized_run(texts, tmp_path_factory) -> Path:
    """A tied bfloat16 model, cut and quantized with embeddings in whole bytes."""
    folder = tmp_path_factory.mktemp("quantize")
    model = half(tiny.llama(6, vocab_size=folders.VOCABULARY, tie_word_embeddings=True))
    model.save_pretrained(folder / "model")
    folders.tokenizer().save_pretrained(folder / "model")
    flags = [*SHORT, "--segment=2:4", "--bits=4", "--embedding-bits=8"]
    argv = ["compress", str(folder / "model"), *flags, f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    with pytest.MonkeyPatch.context() as patch:
        quick.bring_back(patch, "verify_reload")
        assert main([*argv, f"--out={folder / 'run'}"]) == 0
    return folder / "run"


def read(run: Path, name: str) -> dict:
    return json.loads((run / f"{name}.json").read_text())


def test_a_run_measures_and_exports_the_quantized_model(quantized_run):
    summary, quantize = read(quantized_run, "summary"), read(quantized_run, "quantize")
    exported = read(quantized_run, "export")
    assert exported["check"]["logits"] == "equal to the bit"
    assert exported["check"]["perplexity"]["tokens"] == exported["perplexity"]["tokens"] == 256
    assert exported["perplexity"]["value"] == summary["perplexity"]["quantized"]
    # row by row and in float32 in the fresh process, all at once in the run
    assert exported["check"]["perplexity"]["value"] == pytest.approx(exported["perplexity"]["value"], rel=1e-3)
    file = quantized_run / "model" / "model.safetensors"
    assert summary["bytes"]["after"] == file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert quantize["bytes"]["after"] == file.stat().st_size - header
    assert quantize["bytes"]["after"] < 0.5 * quantize["bytes"]["before"]
    loaded = loading.load(checkpoints.resolve(str(quantized_run / "model")))
    assert perplexity(loaded.model, stored_blocks(quantized_run, "evaluation")) == summary["perplexity"]["quantized"]
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert sorted(loaded.model.state_dict()) == sorted(tiny.llama(4, tie_word_embeddings=True).state_dict())
    assert summary["perplexity"]["quantized"] != summary["perplexity"]["cut"]
    assert "pip install compressed-tensors" in (quantized_run / "model" / "README.md").read_text()


def test_a_quantized_model_is_loaded_as_a_plain_one_and_not_quantized_again(quantized_run, tmp_path, capsys):
    loaded = loading.load(checkpoints.resolve(str(quantized_run / "model")), dtype="bfloat16").model
    loaded.save_pretrained(tmp_path / "plain")
    again, packed = (AutoModelForCausalLM.from_pretrained(at) for at in (tmp_path / "plain", quantized_run / "model"))
    assert torch.equal(logits(again), logits(loaded))
    assert torch.equal(logits(packed), logits(loaded))
    assert main(["quantize", str(quantized_run), "--bits=8", f"--out={tmp_path / 'q'}"]) == 2
    assert "quantized already" in capsys.readouterr().err


def test_quantize_alone(tiny_model, texts, tmp_path, capsys):
    out = tmp_path / "int4"
    argv = ["quantize", str(tiny_model), "--bits=4", "--tokens=256", "--window=32", f"--data={texts[0]}"]
    assert main([*argv, f"--out={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert {(row["bits"], row["method"]) for row in read(out, "quantize")["layers"]} == {(4, "gptq")}
    dense, loaded = (loading.load(checkpoints.resolve(str(path))).model for path in (tiny_model, out))
    assert 0 < (logits(dense) - logits(loaded)).abs().mean() < 0.5 * logits(dense).std()
    assert main([*argv, f"--out={out}"]) == 2
    assert main(["quantize", str(tiny_model), f"--out={tmp_path / 'none'}"]) == 2
    assert "--bits 8 or --bits 4" in capsys.readouterr().err


@pytest.mark.parametrize(("bits", "kind"), [(8, "q8_0"), (6, "q6_k"), (4, "q4_k_m"), (3, "q3_k_m"), (2, "q2_k")])
def test_a_gguf_file_has_the_bits_that_are_asked_for(bits, kind, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("layercut.cli.single_stage.export", lambda _, config: asked.append(config))
    quantize_alone("model", QuantizeAloneConfig(out=tmp_path / "x.gguf", quantize=QuantizeConfig(bits=bits)))
    assert asked[0].gguf_type == kind
