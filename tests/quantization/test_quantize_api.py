"""The API from tokens to files: token_blocks, cut, quantize, save, and exporters and quantizers of a package."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import folders
import layercut as lc
import quick
import tiny
from layercut.cli.command_line import main
from layercut.config import QuantizeConfig
from layercut.data.blocks import load_blocks
from layercut.errors import ConfigError, DataError, ModelError, RunError
from layercut.models import checkpoints, decoder_stack, loading
from layercut.quantization import quantize_, quantized_weights
from layercut.registries import exporters
from layercut.segments import Segment, as_segments

TOKENS = tiny.some_tokens(16)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


class Unchanged:
    """A model as a caller may hold it: in training mode, some weights trainable, a hook; asserts that it stays so."""

    def __init__(self, **changes) -> None:
        self.model = tiny.llama(6, **changes)
        self.model.train()
        self.model.lm_head.weight.requires_grad_(True)
        self.model.model.norm.register_forward_hook(lambda *_: None)
        self.before = self._state()
        self.values = copy.deepcopy(self.model.state_dict())

    def _state(self) -> list:
        modules = [
            (name, m.training, len(m._forward_hooks), sorted(vars(m)), "forward" in vars(m))
            for name, m in self.model.named_modules()
        ]
        weights = [(name, id(p), p.requires_grad, p.grad) for name, p in self.model.named_parameters()]
        return [modules, weights, self.model.config.to_dict(), self.model.generation_config.to_dict()]

    def check(self) -> None:
        assert self._state() == self.before
        assert all(torch.equal(value, self.values[name]) for name, value in self.model.state_dict().items())


def test_token_blocks_are_those_of_the_command_and_leave_the_model_as_it_is(texts):
    tokenizer = folders.tokenizer()
    for order in ("shuffled", "as written"):
        blocks = lc.token_blocks(texts[0], tokenizer, tokens=100, window=32, order=order)
        expected = load_blocks(str(texts[0]), tokenizer, tokens=100, window=32, seed=0, order=order).tokens
        assert torch.equal(blocks, expected)
        assert blocks.shape == (4, 32)
    with pytest.raises(DataError, match="order='sorted' is unknown"):
        lc.token_blocks(texts[0], tokenizer, tokens=100, order="sorted")
    given = Unchanged(vocab_size=folders.VOCABULARY, attention_dropout=0.5)
    rows = lc.token_blocks("self", tokenizer, tokens=32, window=16, model=given.model)
    given.check()
    evaluated = copy.deepcopy(given.model).eval()
    assert torch.equal(rows, lc.token_blocks("self", tokenizer, tokens=32, window=16, model=evaluated))


def test_segments_as_a_person_writes_them():
    for given in ((3, 5), [(3, 5)], [[3, 5]], "3:5", ["3:5"], Segment(3, 5), ("3:5",)):
        assert as_segments(given) == [Segment(3, 5)]
    for wrong in ([3, 5], [(3, 5, 7)], [3.5], ["3-5"], [(3, "x")]):
        with pytest.raises(ConfigError, match="segment"):
            as_segments(wrong)
    given = Unchanged()
    small = lc.cut(given.model, [(1, 3), "4:5"])
    given.check()
    assert small.config.original_layer_index == [0, 3, 5]
    assert {id(p) for p in small.parameters()} < {id(p) for p in given.model.parameters()}
    with pytest.raises(ConfigError, match="reaches beyond"):
        lc.cut(tiny.llama(4), (3, 9))


# --- quantizing ---


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_quantize_leaves_the_model_and_is_what_the_command_does(quantizer):
    given = Unchanged(attention_dropout=0.5)
    found = lc.quantize(given.model, TOKENS, bits=4, quantizer=quantizer, embedding_bits=8)
    given.check()
    in_place = decoder_stack.share(given.model).eval()
    command = quantize_(in_place, TOKENS, QuantizeConfig(bits=4, quantizer=quantizer, embedding_bits=8))
    assert torch.equal(logits(found.model), logits(in_place))
    assert found.packed.keys() == command.packed.keys()
    assert all(torch.equal(tensor, command.packed[name]) for name, tensor in found.packed.items())
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts == json.loads(json.dumps(command.to_dict()))
    assert (facts["bits"], facts["quantizer"], facts["group_size"]) == (4, quantizer, None)
    assert facts["bytes"] == {"before": decoder_stack.parameter_bytes(given.model), "after": found.bytes_after}
    assert found.bytes_after < 0.5 * found.bytes_before
    runner = lc.DecoderRunner(copy.deepcopy(given.model).eval())
    again = lc.quantize(runner, TOKENS, bits=4, quantizer=quantizer, embedding_bits=8)
    assert torch.equal(logits(again.model), logits(found.model))


def floor(weight, hessian, grid):
    scaled = weight.float() / grid.scale.float().repeat_interleave(grid.group_size, 1)
    return scaled.floor().clamp(grid.lowest, grid.highest)


floor.needs_calibration = False


def test_a_quantizer_of_the_callers_own():
    model, seen = tiny.llama(2), []
    found = lc.quantize(model, bits=4, quantizer=floor)
    assert {row.method for row in found.weights} == {"floor"}
    name = "model.layers.1.mlp.up_proj.weight"
    weight, rounded = (dict(m.named_parameters())[name] for m in (model, found.model))
    assert (rounded <= weight + 1e-6).all()
    assert torch.equal(rounded, quantized_weights(found.packed, found.config)[name])

    class Recording:
        needs_calibration = True

        def __call__(self, weight, hessian, grid):
            seen.append(hessian)
            return grid, floor(weight, hessian, grid).to(torch.int8)

    lc.quantize(model, TOKENS, bits=4, quantizer=Recording, embedding_bits=8)
    assert len(seen) == 2 * 7, "embeddings and head have no Hessian and are rounded to nearest"
    assert all(h.shape[0] == h.shape[1] and h.dtype == torch.float64 for h in seen)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda weight, *_: weight[:1], r"gave \[1, 32\]; wanted are whole numbers"),
        (lambda weight, *_: torch.full_like(weight, 9), "codes from 9 to 9; wanted are whole numbers .* from -8 to 7"),
        (lambda weight, *_: torch.full_like(weight, 0.5), "codes from 0.5"),
        (lambda weight, *_: torch.full_like(weight, float("nan")), "codes from nan"),
    ],
)
def test_codes_that_are_none_are_refused(make, words):
    make.needs_calibration = False
    with pytest.raises(ConfigError, match=words):
        lc.quantize(tiny.llama(2), bits=4, quantizer=make)


@pytest.mark.parametrize(
    ("error", "words", "tokens", "asked"),
    [
        (ConfigError, "needs_calibration", TOKENS, {"quantizer": lambda *_: None}),
        (ConfigError, "gptq is calibrated on tokens, and none are given", None, {}),
        (ConfigError, "'gtpq' is unknown", TOKENS, {"quantizer": "gtpq"}), (ConfigError, "bits=5", TOKENS, {"bits": 5}),
        (DataError, r"\[16\] of int64", TOKENS[0], {}), (DataError, "of float32", TOKENS.float(), {}),
        (ModelError, "token 96", TOKENS.clamp(min=96), {}),
    ],
)  # fmt: skip
def test_what_cannot_be_quantized_is_refused(error, words, tokens, asked):
    with pytest.raises(error, match=words):
        lc.quantize(tiny.llama(2), tokens, **{"bits": 4} | asked)


# --- saving ---


def test_saved_as_a_caller_holds_it_and_verified(tmp_path, monkeypatch):
    """In training mode, with an attention of the caller's choice: neither may make the fresh process differ."""
    quick.bring_back(monkeypatch, "verify_reload")
    given = Unchanged(vocab_size=folders.VOCABULARY, attention_dropout=0.5, attn_implementation="eager")
    monkeypatch.chdir(tmp_path)
    text = tiny.some_tokens(4)
    found = lc.save(given.model, folders.tokenizer(), "out/model", text=text)
    given.check()
    assert found.folder == tmp_path / "out" / "model"
    assert found.check["logits"] == "equal to the bit"
    assert found.check["perplexity"]["tokens"] == text.numel()
    assert found.bytes == (found.folder / "model.safetensors").stat().st_size
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_what_is_quantized_is_saved_packed_and_exported_as_float(tmp_path, monkeypatch):
    packed = lc.quantize(tiny.llama(4, vocab_size=folders.VOCABULARY), TOKENS, bits=4)
    monkeypatch.setattr("layercut.export.checkpoint._verified", lambda *_: pytest.fail("a process was started"))
    found = lc.save(packed, folders.tokenizer(), tmp_path / "packed", verify=False)
    assert found.check is None
    assert torch.equal(logits(loading.load(checkpoints.resolve(str(tmp_path / "packed"))).model), logits(packed.model))
    assert found.bytes < 1.1 * packed.bytes_after + 20_000
    assert not hasattr(packed.model.config, "quantization_config")
    monkeypatch.undo()
    monkeypatch.setattr("layercut.export.checkpoint.verify_reload", lambda *_: {"logits": "equal to the bit"})
    out = tmp_path / "float"
    assert main(["export", str(tmp_path / "packed"), "--format=safetensors", f"--out={out}"]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(logits(loading.load(checkpoints.resolve(str(out))).model), logits(packed.model))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    model, tokenizer, folder = tiny.llama(2, vocab_size=folders.VOCABULARY), folders.tokenizer(), tmp_path / "full"
    folder.mkdir()
    lc.save(model, tokenizer, folder, verify=False)  # empty
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        lc.save(model, tokenizer, folder, verify=False)
    assert (folder / "mine.txt").read_text() == "mine"
    lc.save(model, tokenizer, folder, verify=False, overwrite=True)
    assert not (folder / "mine.txt").exists()
    with pytest.raises(ModelError, match="a Sequential is no model of transformers"):
        lc.save(nn.Sequential(), tokenizer, tmp_path / "none", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_an_exporter_runs_by_name(tiny_model, tmp_path, monkeypatch, capsys):
    def count(source, out, options):
        out.write_text(json.dumps(sorted(file.name for file in source.model.iterdir())))
        return {"files": 3}

    def fails(source, out, options):
        out.write_text("half")
        raise OSError("no more")

    monkeypatch.setattr(exporters, "registered", {})
    for name, each in (("my-count", count), ("my-fails", fails), ("my-nothing", lambda *_: {})):
        exporters.register(name)(each)
    out = tmp_path / "out" / "files.json"
    argv = ["export", str(tiny_model), f"--out={out}"]
    assert main([*argv, "--format=my-count"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert "config.json" in json.loads(out.read_text())
    assert main([*argv, "--format=my-count"]) == 2
    assert "exists already" in capsys.readouterr().err
    for wrong in ("my-fails", "my-nothing", "my-cont"):
        assert main([*argv, "--force", f"--format={wrong}"]) == 2
    assert [path.name for path in out.parent.iterdir()] == ["files.json"], "what was there stays"
    assert "config.json" in json.loads(out.read_text())
