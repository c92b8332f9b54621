"""The API on a model in memory gives what the command gives, to the bit, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import layercut as lc
from layercut.config.commands import from_flat
from layercut.errors import ConfigError, ModelError
from layercut.models.losses import KL

OPTIONS = {
    "ratio": 0.25, "tokens": 64, "window": 16, "tune_tokens": 96, "batch_tokens": 32, "eval_tokens": 64,
    "eval_window": 16, "speed": False, "dtype": "float32",
}  # fmt: skip


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(scope="module")
def run(tiny_model, texts, tmp_path_factory):
    out, before, told = tmp_path_factory.mktemp("api") / "run", handlers(), set()
    with lc.progress_to(lambda description, *_: told.add((description, handlers() == before))):
        run = lc.compress(tiny_model, data=str(texts[0]), eval_data=str(texts[1]), out=out, **OPTIONS)
    assert all(same for _, same in told)
    assert [words for words, _ in told if "tuning" in words], "the handlers were looked at while it was tuned"
    return run


@pytest.fixture(scope="module")
def blocks(run):
    uses = ("calibration", "heldout", "tuning", "evaluation")
    return {use: load_file(run.folder / f"tokens-{use}.safetensors")[use] for use in uses}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def test_step_by_step_gives_what_the_command_gives(run, blocks, model, tokenizer, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration, heldout = blocks["calibration"], blocks["heldout"]
    found = lc.search(model, calibration, ratio=0.25)
    assert [(s.start, s.stop) for s in found.segments] == run.segments
    assert found.candidates[0].kl == json.loads((run.folder / "search.json").read_text())["candidates"][0]["kl"]
    small = lc.cut(model, found.segments)
    folded = lc.fold_(small, model, torch.cat([calibration, blocks["tuning"]]), heldout=heldout)
    recorded = json.loads((run.folder / "fold.json").read_text())["fold"][0]
    assert all(getattr(folded, key) == recorded[key] for key in ("kept", "kl_before", "kl_after"))
    lc.tune_(small, model, blocks["tuning"], heldout=heldout, batch_tokens=32, objective=KL(mix=0.3))
    measured = lc.evaluate(small, blocks["evaluation"], baseline=model)
    assert measured.perplexity == run.summary["perplexity"]["tuned"]
    assert measured.baseline_perplexity == run.summary["perplexity"]["dense"]
    lc.save(small, tokenizer, tmp_path / "out")
    saved, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run.model))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the dense model"


def test_a_call_changes_nothing_of_the_process_and_writes_nothing(blocks, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def state():
        loggers = [list(logging.getLogger(name).handlers) for name in (None, "layercut", "transformers")]
        modules = [(dict(m._forward_hooks), set(vars(m))) for m in model.modules()]
        return handlers(), loggers, modules, [p.requires_grad for p in model.parameters()]

    before, threads, told = state(), set(threading.enumerate()), []
    with lc.progress_to(lambda *_: told.append(handlers())):
        found = lc.search(model, blocks["calibration"], ratio=0.25)
        small = lc.cut(model, found.segments)
        lc.fold_(small, model, blocks["calibration"], heldout=blocks["heldout"])
        lc.tune_(small, model, blocks["tuning"], heldout=blocks["heldout"], batch_tokens=32)
        packed = lc.quantize(small, blocks["calibration"], bits=8)
        lc.evaluate(packed, blocks["evaluation"], baseline=model)
    assert told == [before[0]] * (steps := len(told)) != []
    lc.search(model, blocks["calibration"], ratio=0.25)
    assert len(told) == steps, "the callback is forgotten"
    assert list(tmp_path.iterdir()) == []
    assert state() == before
    assert set(threading.enumerate()) <= threads, "a pool of a test before may have ended meanwhile"
    assert capfd.readouterr() == ("", "")


def test_compress_refuses_what_no_flag_has_and_what_is_of_another_kind(tiny_model, model, tmp_path):
    for options, words in [
        ({"ratoi": 0.2}, "there is no option 'ratoi'"), ({"ratio": "much"}, "ratio is 'much'"),
        ({"ratio": 0.2, "bits": 5}, "bits is 5"), ({"ratio": 0.2, "method": "none"}, "--method 'none' is unknown"),
        ({"segment": 5}, "5 is no segment"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            lc.compress(tiny_model, out=tmp_path / "run", **options)
    for spelt in ("3:5", (3, 5), [(3, 5)], lc.Segment(3, 5), ["3:5"]):
        assert from_flat({"segment": spelt}).search.segments == [lc.Segment(3, 5)]
    with pytest.raises(ConfigError, match="takes a model's name or path"):
        lc.compress(model, ratio=0.2)
    with pytest.raises(ConfigError, match="both config and bits are given"):
        lc.compress(tiny_model, config=from_flat({"ratio": 0.2}), bits=4)
    assert not os.listdir(tmp_path)


CALLS = {
    "cut": lambda bad, model, rows: lc.cut(bad, (1, 2)),
    "search": lambda bad, model, rows: lc.search(bad, rows, n_layers=1),
    "fold": lambda bad, model, rows: lc.fold_(bad, model, rows),
    "fold's dense": lambda bad, model, rows: lc.fold_(lc.cut(model, (1, 2)), bad, rows),
    "tune's dense": lambda bad, model, rows: lc.tune_(lc.cut(model, (1, 2)), bad, rows),
    "quantize": lambda bad, model, rows: lc.quantize(bad, rows, bits=4),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model_is_refused(call, blocks, model):
    for given in ("org/name", None, torch.nn.Linear(2, 2)):
        with pytest.raises(ModelError, match=f"a {type(given).__name__} is given as a model"):
            CALLS[call](given, model, blocks["calibration"])


def test_what_stands_around_a_model_or_has_no_head_is_refused_with_what_mends_it(blocks, model, tiny_model):
    with pytest.raises(ModelError, match="has no language-model head"):
        lc.search(AutoModel.from_pretrained(tiny_model), blocks["calibration"], n_layers=1)
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[lora]'")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for call in ("cut", "search"):
        with pytest.raises(ModelError, match="is given as a model") as caught:
            CALLS[call](wrapped, model, blocks["calibration"])
        assert "merge_and_unload" in caught.value.hint
    assert lc.cut(wrapped.merge_and_unload(), (1, 2))


def test_what_is_found_and_tuned_in_inference_mode_is_what_is_found_out_of_it(blocks, model):
    rows, results = blocks["calibration"], []
    for opened in (torch.inference_mode, nullcontext):
        with opened():
            found = lc.search(model, rows, n_layers=2)
            small = lc.cut(model, found.segments)
            told = lc.tune_(small, model, rows, batch_tokens=32)
        results.append((found.segments, found.kl, told.heldout))
    assert results[0] == results[1]


IMPORTING = """
import random, sys
random.seed(0)
before = random.getstate()
import layercut
assert "torch" not in sys.modules and dir(layercut)
for name in layercut.__all__:
    getattr(layercut, name)
    assert random.getstate() == before, name
"""


def test_the_package_is_imported_without_torch_leaves_random_numbers_alone_and_names_what_it_has():
    subprocess.run([sys.executable, "-c", IMPORTING], check=True)
    for name in lc.__all__:
        assert getattr(lc, name).__doc__ or name == "__version__", f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lc.nothing  # noqa: B018
