"""Training what was quantized: scales, norms and the rounding, towards what it was; the format stays stock."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PhiConfig, Qwen2Config

import folders
import quick
import tiny
from layercut import quantization, surgery
from layercut.cli.command_line import main
from layercut.config import QuantizeConfig, TuneSettings
from layercut.config.commands import from_flat
from layercut.errors import ConfigError
from layercut.export import checkpoint
from layercut.healing import endpoint_tuning
from layercut.healing.endpoint_tuning import TuningFiles, tune_parameters_
from layercut.healing.inputs import Batch, Rows
from layercut.healing.tuning_pass import Pair
from layercut.healing.tuning_state import StateFile
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.losses import KL
from layercut.models.memory import Budget
from layercut.models.runner import DecoderRunner, prepared
from layercut.pipeline.stages import quantize as stage
from layercut.quantization import Quantized, quantize_, quantized_weights, trainable
from layercut.quantization.grid import decode, encode, fit_grid
from layercut.quantization.trainable import Rounded, Scaled, Trainable
from layercut.run import compress
from layercut.segments import Segment

TOKENS, HELDOUT = tiny.some_tokens(16), tiny.some_tokens(4, seed=1)
STOPPED = 130
"""Exit status of a command that Ctrl-C ended."""
WAYS: list[dict[str, Any]] = [{"bits": 4}, {"bits": 3, "embedding_bits": 3}, {"bits": 2, "embedding_bits": 8}]


def half(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def rounded(dense: Any, **options: Any) -> Quantized:
    return quantize_(decoder_stack.share(dense), None, QuantizeConfig(quantizer="rtn", **options))


def logits(model: Any) -> torch.Tensor:
    return model(HELDOUT, use_cache=False).logits


@torch.no_grad()
def kl(dense: Any, student: Any, tokens: torch.Tensor) -> float:
    p, q = (model(tokens, use_cache=False).logits.float().log_softmax(-1) for model in (dense, student))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("learned", [False, True], ids=["scales", "rounding"])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_nothing_changes_before_the_first_step(options, learned):
    dense = half(tiny.llama(2, tie_word_embeddings=True))
    found = rounded(dense, **options)
    before, packed = logits(found.model), {name: tensor.clone() for name, tensor in found.packed.items()}
    plain = weakref.ref(found.model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    parts = Trainable.of_(found, dense if learned else None)
    assert plain() is None, "what is computed anew is not kept beside"
    assert {type(module) for module in parts.modules.values()} == {Rounded if learned else Scaled}
    assert torch.equal(logits(parts.model), before)
    done = parts.finished_()
    assert torch.equal(logits(done.model), before)
    assert all(torch.equal(done.packed[name], tensor) for name, tensor in packed.items())
    assert {type(m) for n, m in done.model.named_modules() if n.endswith("_proj")} == {nn.Linear}
    assert done.model.lm_head.weight is done.model.model.embed_tokens.weight


@pytest.mark.parametrize("block", [64, 2**16])
def test_gradients_are_those_of_the_decoded_weight(monkeypatch, block):
    """block: weights that are rounded at once; 64 is one row."""
    monkeypatch.setattr(trainable, "BLOCK", block)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    plain = nn.Linear(64, 6, bias=False)
    plain.weight.data = weight
    for bits, asymmetric in ((4, False), (2, True)):
        grid = fit_grid(weight, bits, 32, asymmetric=asymmetric, dtype=torch.float32)
        codes, slope = encode(weight, grid), torch.randn(6, 64)
        zero = 0 if grid.zero is None else grid.zero.float()[..., None]
        steps = codes.float().unflatten(1, (-1, 32)) - zero
        expected = (slope.unflatten(1, (-1, 32)) * steps).sum(-1)
        scaled = Scaled(plain, codes, grid, torch.float32)
        scaled().backward(slope)
        assert torch.allclose(scaled.scale.grad, expected, atol=1e-5)
        learned = Rounded(plain, codes, grid, torch.float32, weight)
        assert torch.equal(learned(), decode(codes, grid))
        learned().backward(slope)
        place = (learned.latent.detach() / grid.scale.repeat_interleave(32, 1)).unflatten(1, (-1, 32)) + zero
        inside = (place.round() >= grid.lowest) & (place.round() <= grid.highest)
        assert torch.equal(learned.latent.grad.unflatten(1, (-1, 32)) != 0, inside)
        lsq = (slope.unflatten(1, (-1, 32)) * torch.where(inside, place.round() - place, steps)).sum(-1)
        assert torch.allclose(learned.scale.grad, lsq, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True], ids=["scales", "rounding"])
def test_tuning_brings_it_nearer_and_transformers_reloads_it(learned, tmp_path):
    dense = half(tiny.llama(2, tie_word_embeddings=True))
    kept = {name: weight.clone() for name, weight in dense.named_parameters()}
    found = rounded(dense, bits=3, embedding_bits=3)
    size = sum(tensor.nbytes for tensor in found.packed.values())
    codes = found.packed["model.layers.0.mlp.up_proj.weight_packed"].clone()
    parts = Trainable.of_(found, dense if learned else None)
    settings = TuneSettings(batch_tokens=64, learning_rate=0.02)
    tokens = Rows(tokens=TOKENS.repeat(4, 1))
    told = tune_parameters_(parts.model, dense, parts.parameters, tokens, heldout=HELDOUT, settings=settings)
    trained = logits(parts.model)
    done = parts.finished_()
    assert torch.equal(logits(done.model), trained), "what was judged is what is saved"
    assert told.best < 0.95 * told.heldout[0]["loss"]
    assert kl(dense, done.model, HELDOUT) == pytest.approx(told.best, rel=5e-2), "the best state is kept"
    assert all(torch.equal(weight, kept[name]) for name, weight in dense.named_parameters()), "the dense model"
    assert torch.equal(done.packed["model.layers.0.mlp.up_proj.weight_packed"], codes) == (not learned)
    norms = sum(tensor.nbytes for name, tensor in done.packed.items() if "norm" in name)
    assert sum(tensor.nbytes for tensor in done.packed.values()) == size + norms, "no byte beside what was there"
    packing = {"packed": dict(done.packed), "quantization_config": dict(done.config)}
    written = checkpoint.export_checkpoint(done.model, folders.tokenizer(), tmp_path / "model", **packing)
    assert written["bytes"] < done.bytes_after + 8192
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(done.model))
    again = decoder_stack.share(dense)  # as a run puts it together from its files
    decoder_stack.replace_parameters_(again, quantized_weights(done.packed, done.config))
    assert torch.equal(logits(again), logits(done.model))


def test_a_head_is_rounded_once_for_all_pieces_of_logits(monkeypatch):
    """Its gradient is that of all pieces: the same as of logits in one piece."""
    dense = half(tiny.llama(2, tie_word_embeddings=True)).float()
    gradients, counts, calls = [], list[int](), list[int]()
    rounds = Rounded.forward
    monkeypatch.setattr(
        Rounded, "forward", lambda self, *rows: calls.extend([] if rows else [len(self.latent)]) or rounds(self, *rows)
    )
    for piece in (2**30, 4 * dense.config.vocab_size * 5):  # five tokens
        parts = Trainable.of_(rounded(dense, bits=3, embedding_bits=3), dense)
        monkeypatch.setattr(DecoderRunner, "budget", replace(Budget.of_cpu(), piece=piece))
        with prepared(parts.model, dense) as (cut, whole), torch.enable_grad():
            own = [parameter.requires_grad_() for parameter, _ in parts.parameters]
            pair = Pair(dense=whole, student=cut, prefix=0, objective=KL(), apart=True)
            calls.clear()
            list(pair.backward([Batch(TOKENS[:4], torch.arange(4), torch.zeros(4, dtype=torch.int64))]))
        counts.append(calls.count(dense.config.vocab_size))
        gradients.append([parameter.grad for parameter in own])
    assert counts[0] == counts[1]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("learned", "later", "setbacks"),
    [
        (False, [1.05, 0.9, 0.9, 0.9], [1]), (True, [1.05, 0.9, 0.9, 0.9], []), (True, [1.2, 0.9, 0.9, 0.9], [1]),
        (True, [1.05, 1.05, 0.9, 0.9], [2]),
    ],
    ids=["of scales", "of the rounding", "of the rounding, far above", "of the rounding, twice"],
)  # fmt: skip
def test_where_the_rounding_is_trained_a_first_rise_is_no_setback(learned, later, setbacks, monkeypatch):
    """Codes that lay near an edge fall over it first, and the rate that a setback takes does not come back."""
    scores = iter([1.0, *later])
    monkeypatch.setattr("layercut.healing.tuning_pass.HeldOut.score", lambda self: {"loss": next(scores)})
    dense = half(tiny.llama(2))
    parts = Trainable.of_(rounded(dense, bits=3), dense if learned else None)
    told = tune_parameters_(
        parts.model, dense, parts.parameters, Rows(tokens=TOKENS[: len(later)]), heldout=HELDOUT,
        tolerated=parts.tolerated, settings=TuneSettings(batch_tokens=TOKENS.shape[1], learning_rate=parts.rate),
    )  # fmt: skip
    assert told.setbacks == setbacks


def test_a_stopped_one_is_resumed_to_the_same_bits(tmp_path, monkeypatch):
    """At a rate by the KL before, which is one term of what is judged."""
    dense, settings = half(tiny.llama(2)), TuneSettings(objective=KL(mix=0.25), batch_tokens=64)
    weights: list[dict[str, torch.Tensor]] = []
    step = endpoint_tuning._Training.step_

    def stop_after_two(self: Any) -> int:
        if self.report.step == 2:
            raise KeyboardInterrupt
        return step(self)

    for stops in (False, True):
        for attempt in range(1 + stops):
            parts = Trainable.of_(rounded(dense, bits=3), dense)
            files = TuningFiles(state=StateFile(tmp_path / f"{stops}", minutes=0.0))
            with monkeypatch.context() as patch:
                if stops and not attempt:
                    patch.setattr(endpoint_tuning._Training, "step_", stop_after_two)
                try:
                    given = parts.parameters
                    more: dict[str, Any] = {"settings": settings, "rate_from": lambda kl: 0.02 * kl, "files": files}
                    told = tune_parameters_(parts.model, dense, given, Rows(tokens=TOKENS), heldout=HELDOUT, **more)
                    assert told.learning_rate == 0.02 * told.heldout[0]["kl"] < 0.02 * told.heldout[0]["loss"]
                except KeyboardInterrupt:
                    assert stops
                    assert not attempt
        weights.append(dict(parts.finished_().packed))
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    untouched = rounded(dense, bits=3).packed
    assert any(not torch.equal(weights[0][name], tensor) for name, tensor in untouched.items())


def test_a_run_that_is_stopped_while_it_trains_does_not_round_again(texts, tmp_path, monkeypatch):
    half(tiny.llama(3, vocab_size=folders.VOCABULARY, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--segment=1:2", "--bits=4", "--embedding-bits=4", "--no-speed", "--no-fold"]
    flags += ["--tokens=256", "--window=32", "--tune-tokens=256", "--batch-tokens=64", "--eval-tokens=256"]
    argv = ["compress", str(tmp_path / "model"), *flags, f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    assert main([*argv, f"--out={tmp_path / 'whole'}"]) == 0
    rounds, quantize = list[str](), quantization.quantize
    monkeypatch.setattr(
        quantization, "quantize", lambda *args, **more: rounds.append("anew") or quantize(*args, **more)
    )
    stopped = [*argv, f"--out={tmp_path / 'stopped'}"]
    for way in ("stopped", "with another training", "to the end"):
        with monkeypatch.context() as patch:
            if way != "to the end":
                patch.setattr(stage, "tune_parameters_", stop)
                more = ["--tune-quantized=rounding"] if way == "with another training" else []
                assert main([*stopped, *more]) == STOPPED
            else:
                assert main(stopped) == 0
    assert rounds == ["anew"]
    a, b = (tmp_path / way / "quantized.safetensors" for way in ("whole", "stopped"))
    assert a.read_bytes() == b.read_bytes()
    a, b = (json.loads((tmp_path / way / "quantize.json").read_text()) for way in ("whole", "stopped"))
    once = ("seconds", "content_hash", "tuning")
    assert {name: a[name] for name in a if name not in once} == {name: b[name] for name in b if name not in once}
    other = [*argv, f"--out={tmp_path / 'other'}"]
    with monkeypatch.context() as patch:
        patch.setattr(stage, "tune_parameters_", stop)
        assert main([*other, "--group-size=32"]) == STOPPED
    assert main(other) == 0
    assert rounds == ["anew"] * 3, "what was kept is of other groups"


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def losses_of_rounding(model: Path, run: Path, removed: Segment) -> tuple[float, float]:
    """KL on the held-out rows of a run's rounded model, from the dense model and from the healed one."""
    dense = loading.load(checkpoints.resolve(str(model))).model
    healed, small = (surgery.cut(dense, [removed]) for _ in range(2))
    decoder_stack.replace_parameters_(healed, load_file(run / "tuned.safetensors"))
    packing = json.loads((run / "quantize.json").read_text())["quantization_config"]
    decoder_stack.replace_parameters_(small, quantized_weights(load_file(run / "quantized.safetensors"), packing))
    (heldout,) = load_file(run / "tokens-heldout.safetensors").values()
    return kl(dense, small, heldout), kl(healed, small, heldout)


def test_a_run_tunes_after_rounding_and_a_fresh_process_finds_the_same(texts, tmp_path, monkeypatch):
    asked, tune_parameters_ = list[Any](), stage.tune_parameters_
    monkeypatch.setattr(
        stage,
        "tune_parameters_",
        lambda *args, **more: asked.append((args, more)) or tune_parameters_(*args, **more),
    )
    model = half(tiny.llama(5, vocab_size=folders.VOCABULARY, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    options = {
        "segment": "2:3", "bits": 3, "embedding_bits": 3, "quantizer": "rtn", "speed": False, "tokens": 256,
        "window": 32, "tune_tokens": 2048, "tune_window": 64, "batch_tokens": 32, "fold": False, "eval_tokens": 256,
        "preserve": "none", "data": str(texts[0]), "eval_data": str(texts[1]),
    }  # fmt: skip
    runs = {}
    for way in ("auto", "none"):
        out = tmp_path / way
        with monkeypatch.context() as patch:
            if way == "auto":
                quick.bring_back(patch, "verify_reload")
            compress(tmp_path / "model", **options, out=out, tune_quantized=way)
        runs[way] = {name: json.loads((out / f"{name}.json").read_text()) for name in ("quantize", "export", "summary")}
        assert not {file.name for file in out.glob("*-state.safetensors")}
    trained = trainable.Trainable.of_(rounded(half(tiny.llama(2)), bits=3), half(tiny.llama(2)))
    assert trained.rate < Trainable.of_(rounded(half(tiny.llama(2)), bits=3)).rate, "of rounding, and of scales alone"
    tuning = runs["auto"]["quantize"]["tuning"]
    assert tuning["trained_parameters"] > sum(p.numel() for p in model.parameters() if p.dim() > 1) * 4 / 5, (
        "at 3 bits the rounding is trained by itself, of all layers but the one removed"
    )
    assert tuning["learning_rate"] == trained.rate_from(tuning["heldout"][0]["loss"]) < trained.rate
    assert min(point["loss"] for point in tuning["heldout"]) < tuning["heldout"][0]["loss"]
    assert runs["none"]["quantize"].get("tuning") is None
    (((*_, rows), how),) = asked
    assert rows.row_lengths.tolist() == [64, 32] * 16, "rows are done as healing does them"
    assert how["tolerated"] == trainable.ROUNDING_RISE, "a first rise below a tenth is no setback"
    found = {way: run["summary"]["perplexity"]["quantized"] for way, run in runs.items()}
    assert found["auto"] != found["none"], "what was tuned is what is measured"
    from_dense, from_healed = losses_of_rounding(tmp_path / "model", tmp_path / "none", Segment(2, 3))
    assert tuning["heldout"][0]["loss"] == pytest.approx(from_healed, rel=1e-3), (
        "it is trained towards the healed model"
    )
    assert tuning["label"] == "KL to what was rounded"
    assert tuning["heldout"][0]["loss"] < 0.8 * from_dense, "which is another figure than from the dense one"
    exported = runs["auto"]["export"]
    assert exported["check"]["logits"] == "equal to the bit"
    assert exported["check"]["perplexity"]["value"] == pytest.approx(found["auto"], rel=5e-3)
    assert exported["bytes"] < runs["none"]["export"]["bytes"] + 64, "not a byte more for it"


@pytest.mark.parametrize(
    ("given", "words"),
    [({}, "but nothing is quantized"), ({"bits": 4, "tune_tokens": 0}, "but no tokens are tuned on")],
    ids=str,
)
def test_what_would_be_ignored_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        from_flat({"ratio": 0.2, "tune_quantized": "rounding", **given}).check()
    from_flat({"ratio": 0.2, "tune_quantized": "rounding", "bits": 4}).check()


BIASED: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.15,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "options"),
    [(Qwen2Config(**BIASED, num_key_value_heads=2), {"bits": 4}), (PhiConfig(**BIASED), {"bits": 4})],
    ids=["biases beside projections", "a head with a bias"],
)  # fmt: skip
def test_weights_beside_a_bias_that_are_not_rounded_stay_in_the_checkpoint(config, options, tmp_path):
    dense = half(tiny.tiny(config))
    found = quantize_(decoder_stack.share(dense), None, QuantizeConfig(quantizer="rtn", **options))
    parts = Trainable.of_(found)
    assert parts.norms
    assert all("norm" in name for name in parts.norms), "no bias of a linear module is trained"
    with torch.no_grad():
        for norm in parts.norms.values():
            norm += 0.25
    done = parts.finished_()
    packing = {"packed": dict(done.packed), "quantization_config": dict(done.config)}
    checkpoint.export_checkpoint(done.model, folders.tokenizer(), tmp_path / "model", **packing)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(done.model))


def test_a_norm_that_its_class_keeps_in_float32_is_not_rounded():
    dense, wide = half(tiny.llama(2)).float(), "model.layers.0.input_layernorm.weight"
    dense.stored_dtype = torch.bfloat16
    before = dense.get_parameter(wide).data.fill_(1 + 2**-20).clone()
    parts = Trainable.of_(rounded(dense, bits=4))
    settings = TuneSettings(batch_tokens=64, learning_rate=0.02)
    tune_parameters_(parts.model, dense, parts.parameters, Rows(tokens=TOKENS), heldout=HELDOUT, settings=settings)
    done = parts.finished_()
    assert torch.equal(done.model.get_parameter(wide), before)
    assert not torch.equal(done.model.model.norm.weight, dense.model.norm.weight), "the others are trained"


def test_scales_below_float16s_normal_numbers_stay_as_they_are():
    dense = tiny.llama(2, initializer_range=0.0005).to(torch.float16)
    dense.config.dtype = torch.float16
    found = rounded(dense, bits=8)
    name = "model.layers.0.mlp.up_proj.weight"
    before = found.model.get_parameter(name).clone()
    assert found.packed[f"{name}_scale"].min() < torch.finfo(torch.float16).tiny
    assert torch.equal(Trainable.of_(found).finished_().model.get_parameter(name), before)
