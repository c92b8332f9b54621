"""A package outside src/ brings a criterion, an objective, a quantizer and an evaluation, by entry points alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layercut as lc
from layercut import registries
from layercut.cli import main
from layercut.errors import ConfigError

PACKAGE = Path(__file__).with_name("extension")
KINDS = ("criteria", "objectives", "quantizers", "evaluations", "exporters")
FLAGS = ["--method=mypackage-middle", "--objective=mypackage-reverse-kl", "--bits=8", "--quantizer=mypackage-nearest"]
FLAGS += ["--evaluations=mypackage-repeats", "--ratio=0.25"]
FEW = ["--tokens=64", "--window=16", "--eval-window=16", "--tune-tokens=64", "--eval-tokens=64", "--no-speed"]


@pytest.fixture
def installed(monkeypatch):
    """The package's entry points, as pip would have left them."""
    monkeypatch.syspath_prepend(PACKAGE)
    for forget in ("before", "after"):
        for kind in KINDS:
            vars(getattr(registries, kind)).pop("installed", None)
        if forget == "before":
            yield


def test_the_command_runs_with_parts_of_another_package(installed, tiny_model, texts, tmp_path):
    out = tmp_path / "run"
    where = [f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={out}"]
    assert main(["compress", str(tiny_model), *where, *FEW, *FLAGS]) == 0
    search, heal, quantized, summary = (
        json.loads((out / f"{name}.json").read_text()) for name in ("search", "heal", "quantize", "summary")
    )
    assert (search["method"], search["segments"]) == ("mypackage-middle", [[3, 5]])
    assert heal["tuning"]["objective"] == "mypackage-reverse-kl"
    assert {row["method"] for row in quantized["layers"]} == {"mypackage-nearest"}
    figures = summary["evaluations"]["mypackage-repeats"]["hit_rate"]
    assert 0 <= figures["dense"] <= 1 >= figures["compressed"]
    page = (out / "report.html").read_text()
    assert "mypackage-repeats" in page
    assert "reverse KL" in page


def test_the_api_runs_with_parts_of_another_package(installed, tiny_model):
    model, tokenizer = (each.from_pretrained(tiny_model) for each in (AutoModelForCausalLM, AutoTokenizer))
    tokens = torch.randint(90, (8, 16), generator=torch.Generator().manual_seed(0))
    found = lc.search(model, tokens, ratio=0.25, method="mypackage-norm")
    assert sum(map(len, found.segments)) == 2
    small = lc.cut(model, found.segments)
    tuned = lc.tune_(small, model, tokens, heldout=tokens, objective="mypackage-reverse-kl", batch_tokens=64)
    assert min(point["loss"] for point in tuned.heldout) <= tuned.heldout[0]["loss"]
    packed = lc.quantize(small, bits=8, quantizer="mypackage-nearest")
    measured = lc.evaluate(packed, tokens, baseline=model, evaluations=["mypackage-repeats"], tokenizer=tokenizer)
    assert "mypackage-repeats" in json.dumps(measured.to_dict())


def test_the_help_knows_installed_parts_without_loading_them():
    code = "import sys; from layercut.cli import main; main(sys.argv[1:]); sys.exit('mypackage' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE), *sys.path])}
    command = [sys.executable, "-c", code, "compress", "--help-all"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for name in ("mypackage-middle", "mypackage-reverse-kl", "mypackage-nearest", "mypackage-repeats"):
        assert name in "".join(done.stdout.split("│")).replace("\n", "").replace(" ", ""), name


def test_a_part_of_this_process_is_registered_by_a_decorator():
    @lc.criteria.register("here-first")
    def first(runner, tokens, length, **_):
        return [lc.Segment(0, length)]

    try:
        assert "here-first" in list(lc.criteria)
        assert lc.criteria.get("here-first") is first
        with pytest.raises(ConfigError, match="is a criterion of layercut itself"):
            lc.criteria.register("fisher")
        with pytest.raises(ConfigError) as caught:
            lc.criteria.check("here-frist", "--method")
        assert caught.value.hint == "did you mean --method here-first?"
    finally:
        del lc.criteria.registered["here-first"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_layercut_can_be_imported(kind):
    registry = getattr(registries, kind)
    for name in registry.own:
        assert callable(registry.get(name))


def test_a_part_that_was_edited_is_another_one(tiny_model, texts, tmp_path):
    """Of one's own parts the source is among what a stage depends on; of layercut's own the version is."""

    def chosen(*more: str) -> list[list[int]]:
        where = [f"--data={texts[0]}", f"--out={tmp_path / 'run'}", "--tokens=64", "--window=16", "--preserve=none"]
        assert main(["search", str(tiny_model), "--ratio=0.25", "--method=here-edited", *where, *more]) == 0
        return json.loads((tmp_path / "run" / "search.json").read_text())["segments"]

    try:
        lc.criteria.registered["here-edited"] = lambda runner, tokens, length, **_: [lc.Segment(1, 1 + length)]
        assert chosen() == chosen() == [[1, 3]]
        lc.criteria.registered["here-edited"] = lambda runner, tokens, length, **_: [lc.Segment(3, 3 + length)]
        assert chosen("--force") == [[3, 5]], "without it what a finished command made is not replaced"
    finally:
        del lc.criteria.registered["here-edited"]
    assert lc.criteria.edition("fisher") == []
    assert len(lc.quantizers.edition("gptq")) == 0
