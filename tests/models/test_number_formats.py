"""A CPU without instructions for a checkpoint's number format computes in float32, and saves in that format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import folders
import quick
import tiny
from layercut.cli.command_line import main
from layercut.data.blocks import stored_blocks
from layercut.evaluation import perplexity
from layercut.healing import endpoint_tuning, tune_
from layercut.models import checkpoints, decoder_stack, loading
from layercut.segments import Segment
from layercut.surgery import cut_segment_

SHORT = ["--tokens=512", "--window=32", "--tune-tokens=512", "--eval-tokens=512", "--no-speed", "--segment=2:4"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tied model of 6 layers, saved in bfloat16."""
    model = tiny.llama(6, vocab_size=folders.VOCABULARY, tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lacking(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """A CPU that has what is named, and nothing else."""
    monkeypatch.setattr(loading, "cpu_has", lambda feature: feature in features)


def load(folder: Path, **how: str) -> loading.LanguageModel:
    return loading.load(checkpoints.resolve(str(folder)), device="cpu", **how)


@pytest.mark.parametrize(("features", "asked", "computed", "stored"), [
    ((), "auto", torch.float32, torch.bfloat16), (("avx512_bf16",), "auto", torch.bfloat16, torch.bfloat16),
    ((), "bfloat16", torch.bfloat16, torch.bfloat16), ((), "float32", torch.float32, torch.float32),
])  # fmt: skip
def test_what_is_computed_in_and_what_is_saved_in(checkpoint, monkeypatch, features, asked, computed, stored):
    lacking(monkeypatch, *features)
    loaded = load(checkpoint, dtype=asked)
    assert (loaded.dtype, loaded.model.dtype, decoder_stack.stored_dtype(loaded.model)) == (computed, computed, stored)
    count = decoder_stack.parameter_count(loaded.model)
    assert decoder_stack.parameter_bytes(loaded.model) == count * stored.itemsize


def test_float16_is_computed_in_float32_and_stays_float16(tmp_path):
    folders.write_model(tmp_path, layers=3)
    model = load(tmp_path, dtype="float16").model
    model.save_pretrained(tmp_path)
    model = load(tmp_path).model
    assert (model.dtype, decoder_stack.stored_dtype(model)) == (torch.float32, torch.float16)
    assert decoder_stack.as_stored(model).dtype == torch.float16


def test_as_stored_loses_nothing_and_leaves_the_model_alone(checkpoint, monkeypatch):
    lacking(monkeypatch)
    model = load(checkpoint).model
    model.model.norm.weight.data[0] = 1 + 2**-20  # bfloat16 does not hold it: as weights that a class keeps wide
    narrow = decoder_stack.as_stored(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    wide = [name for name, p in narrow.named_parameters() if p.dtype == torch.float32]
    assert wide == ["model.norm.weight"]
    assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    for (name, p), (_, q) in zip(model.named_parameters(), narrow.named_parameters(), strict=True):
        assert torch.equal(p, q.float()), name


@pytest.mark.parametrize("bits", [[], ["--bits=4", "--embedding-bits=8"]], ids=["16 bits", "4 bits"])
def test_a_run_measures_in_float32_what_it_saves_in_bfloat16(checkpoint, texts, tmp_path, monkeypatch, bits):
    lacking(monkeypatch)
    quick.bring_back(monkeypatch, "verify_reload")
    run = tmp_path / "run"
    flags = [*SHORT, *bits, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={run}"]
    assert main(["compress", str(checkpoint), *flags]) == 0
    summary, export = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "export"))
    assert export["check"]["logits"] == "equal to the bit"
    saved = load_file(run / "model" / "model.safetensors")
    assert torch.float32 not in {tensor.dtype for tensor in saved.values()}
    assert summary["bytes"]["after"] == (run / "model" / "model.safetensors").stat().st_size
    last = "quantized" if bits else "tuned"
    again = load(run / "model").model
    assert again.dtype == torch.float32
    assert perplexity(again, stored_blocks(run, "evaluation")) == summary["perplexity"][last]
    stock = AutoModelForCausalLM.from_pretrained(run / "model")
    assert stock.dtype == torch.bfloat16


def test_float16_keeps_gradients_that_it_has_no_numbers_for(monkeypatch):
    """256 tokens and 8,192 words: an entry of the logits' gradient is 5e-7 and less, the least of float16 is 6e-8."""
    tokens, best = torch.randint(8192, (5, 64), generator=torch.Generator().manual_seed(0)), {}
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**16), (torch.float16, 2.0**30)):
        model = tiny.llama(4, vocab_size=8192, initializer_range=0.02)
        decoder_stack.convert_parameters_(model, dtype)
        cut_segment_(student := decoder_stack.share(model), [Segment(1, 3)])
        monkeypatch.setattr(endpoint_tuning, "LOSS_SCALE", scale)
        rate = {"batch_tokens": 256, "learning_rate": 3e-3}
        found = tune_(student, model, tokens[:-1].repeat(4, 1), heldout=tokens[-1:], **rate)
        best[scale] = found.best
        assert found.best < 0.9 * found.heldout[0]["loss"]
    assert 1 < found.loss_scale < 2.0**30, "what overflows is taken again by half"
    assert best[2.0**16] == pytest.approx(best[1.0], rel=0.01)


def test_no_kernels_of_the_hub_take_a_layers_place(checkpoint: Path):
    """They are code that was not asked for, and their numbers differ; transformers takes them unless told not to."""
    assert not getattr(load(checkpoint).model, "use_kernels", False)
