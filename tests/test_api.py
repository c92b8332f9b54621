"""The API on a model in memory gives what the command gives, to the bit, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import layercut as lc
from layercut.config import from_flat
from layercut.errors import ConfigError, ModelError
from layercut.models.losses import KL

OPTIONS = {
    "ratio": 0.25, "tokens": 64, "window": 16, "tune_tokens": 96, "batch_tokens": 32, "eval_tokens": 64,
    "eval_window": 16, "speed": False, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_model, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("api") / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    told: list[str] = []

    def during(description: str, *_: object) -> None:
        told.append(description)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    with lc.progress_to(during):
        run = lc.compress(tiny_model, data=str(texts[0]), eval_data=str(texts[1]), out=out, **OPTIONS)
    assert [words for words in told if "tuning" in words], "the handlers were looked at while it was tuned"
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
    assert (folded.kept, folded.kl_before, folded.kl_after) == tuple(
        recorded[key] for key in ("kept", "kl_before", "kl_after")
    )
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [list(logging.getLogger(name).handlers) for name in (None, "layercut", "transformers")]
    threads, hooks = set(threading.enumerate()), [dict(m._forward_hooks) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def during(*_: object) -> None:
        assert {number: signal.getsignal(number) for number in handlers} == handlers

    with lc.progress_to(during):
        found = lc.search(model, blocks["calibration"], ratio=0.25)
        small = lc.cut(model, found.segments)
        lc.fold_(small, model, blocks["calibration"], heldout=blocks["heldout"])
        lc.tune_(small, model, blocks["tuning"], heldout=blocks["heldout"], batch_tokens=32)
        packed = lc.quantize(small, blocks["calibration"], bits=8)
        lc.evaluate(packed, blocks["evaluation"], baseline=model)
    assert list(Path(tmp_path).iterdir()) == []
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert [list(logging.getLogger(name).handlers) for name in (None, "layercut", "transformers")] == loggers
    assert set(threading.enumerate()) <= threads, "a pool of a test before may have ended meanwhile"
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert capfd.readouterr() == ("", "")


def test_progress_is_told_to_a_callback(blocks, model):
    seen: list[tuple] = []
    with lc.progress_to(lambda *step: seen.append(step)):
        lc.search(model, blocks["calibration"], ratio=0.25)
    assert seen
    told = len(seen)
    lc.search(model, blocks["calibration"], ratio=0.25)
    assert len(seen) == told


def test_compress_refuses_what_no_flag_has_and_what_is_of_another_kind(tiny_model, model, tmp_path):
    for options, words in [
        ({"ratoi": 0.2}, "there is no option 'ratoi'"), ({"ratio": "much"}, "ratio is 'much'"),
        ({"ratio": 0.2, "bits": 5}, "bits is 5"), ({"ratio": 0.2, "method": "none"}, "--method 'none' is unknown"),
        ({"ratio": 0.2, "preset": "slow"}, "preset 'slow'"), ({"segment": 5}, "5 is no segment"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            lc.compress(tiny_model, out=tmp_path / "run", **options)
    for spelt in ("3:5", (3, 5), [(3, 5)], lc.Segment(3, 5), ["3:5"]):
        assert from_flat({"segment": spelt}).search.segments == [lc.Segment(3, 5)]
    with pytest.raises(ConfigError, match="takes a model's name or path"):
        lc.compress(model, ratio=0.2)
    with pytest.raises(ConfigError, match="both config and preset are given"):
        lc.compress(tiny_model, config=from_flat({"ratio": 0.2}), preset="fast")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("given", ["org/name", None, torch.nn.Linear(2, 2)], ids=["name", "none", "module"])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad, model, rows: lc.cut(bad, (1, 2)),
        lambda bad, model, rows: lc.search(bad, rows, n_layers=1),
        lambda bad, model, rows: lc.fold_(bad, model, rows),
        lambda bad, model, rows: lc.fold_(lc.cut(model, (1, 2)), bad, rows),
        lambda bad, model, rows: lc.tune_(lc.cut(model, (1, 2)), bad, rows),
        lambda bad, model, rows: lc.quantize(bad, rows, bits=4),
    ],
    ids=["cut", "search", "fold", "fold's dense", "tune's dense", "quantize"],
)
def test_what_is_no_model_is_refused(given, call, blocks, model):
    with pytest.raises(ModelError, match=f"a {type(given).__name__} is given as a model"):
        call(given, model, blocks["calibration"])


@pytest.mark.parametrize(
    "call", [lambda bad, rows: lc.cut(bad, (1, 2)), lambda bad, rows: lc.search(bad, rows, n_layers=1)]
)
def test_what_stands_around_a_model_or_has_no_head_is_refused_with_what_mends_it(call, blocks, model):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[lora]'")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="is given as a model") as caught:
        call(wrapped, blocks["calibration"])
    assert "merge_and_unload" in caught.value.hint
    assert lc.cut(wrapped.merge_and_unload(), (1, 2))


def test_a_model_without_a_head_is_not_searched(blocks, tiny_model):
    with pytest.raises(ModelError, match="has no language-model head"):
        lc.search(AutoModel.from_pretrained(tiny_model), blocks["calibration"], n_layers=1)


def test_what_is_found_and_tuned_in_inference_mode_is_what_is_found_out_of_it(blocks, model):
    rows, results = blocks["calibration"], []
    for opened in (torch.inference_mode, nullcontext):
        with opened():
            found = lc.search(model, rows, n_layers=2)
            small = lc.cut(model, found.segments)
            told = lc.tune_(small, model, rows, batch_tokens=32)
        results.append((found.segments, found.kl, told.heldout))
    assert results[0] == results[1]


def test_the_package_is_imported_without_torch_and_names_what_it_has():
    import subprocess
    import sys

    code = "import sys, layercut; dir(layercut); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for name in lc.__all__:
        assert getattr(lc, name).__doc__ or name == "__version__", f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lc.nothing  # noqa: B018
