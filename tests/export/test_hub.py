"""The Hub round trip, against a stand-in on this machine: push, then evaluate and load by the id; and what is refused.

huggingface_hub reads the Hub's address when it is imported, so a process of its own does all of it, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import folders
import hub_stand_in
from layercut.errors import ConfigError
from layercut.export import hub as hub_module

SCRIPT = """
import contextlib, gc, io, json, os, sys
import transformers.models.llama.modeling_llama
import hub_stand_in
from layercut.cli.command_line import main
from layercut.export import checkpoint

checkpoint.verify_reload = lambda *_: {}  # tested elsewhere, and slow
gc.freeze()  # see conftest.py

model, calibration, text, out = sys.argv[1:]
said = {}

def run(name, *arguments, token=hub_stand_in.GOOD, **environment):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= environment | ({"HF_TOKEN": token} if token else {})
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main([str(word) for word in arguments])
    said[name] = [code, printed.getvalue(), errors.getvalue()]

cut = ["cut", model, "--segment", "3:5", "--quiet"]
assert main([*cut, "--out", f"{out}/cut"]) == 0
run("no token", "push", f"{out}/cut", "small", token=None)
run("refused", "push", f"{out}/cut", "small", token="hf_bad")
run("reads", "push", f"{out}/cut", "small", token=hub_stand_in.READS)
run("stranger", "push", f"{out}/cut", "them/small")
run("watched", "push", f"{out}/cut", "watched/small")
run("name", "push", f"{out}/cut", "a b")
run("cut", "push", f"{out}/cut", "small", "--quiet")
run("private there", "push", f"{out}/cut", "small", "--private")
run("private", "push", f"{out}/cut", "lab/other", "--private", "--quiet")
run("evaluate", "evaluate", "me/small", "--eval-data", text, "--eval-tokens", "64", "--window", "16", "--quiet")
run("evaluate here", "evaluate", f"{out}/cut", "--eval-data", text, "--eval-tokens", "64", "--window", "16", "--quiet")

few = ["--data", calibration, "--eval-data", text, "--tokens", "64", "--window", "16", "--tune-tokens", "0"]
few += ["--eval-tokens", "64", "--no-fold", "--no-speed", "--segment", "3:5", "--preserve", "none", "--quiet"]
assert main(["compress", model, *few, "--out", f"{out}/run"]) == 0
run("run", "push", f"{out}/run", "run", "--private", "--quiet")

from transformers import AutoModelForCausalLM
said["layers"] = len(AutoModelForCausalLM.from_pretrained("me/small").model.layers)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub():
    state = hub_stand_in.Hub()
    with state.serve() as server:
        state.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


@pytest.fixture(scope="module")
def said(hub, tiny_model, texts, tmp_path_factory):
    """What each command printed, with its exit code."""
    out = tmp_path_factory.mktemp("hub")
    old = hub.repositories["me/small"] = hub_stand_in.Repository(private=False)
    old.files = {"model-00001-of-00002.safetensors": b"stale", "notes.txt": b"mine"}
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(out / "home"), "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(tiny_model), str(texts[0]), str(texts[1]), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"out": out}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no token", "needs a token, and there is none"),
        ("refused", "the token is refused (401)"),
        ("reads", "the token may only read"),
        ("stranger", "no member of 'them'"),
        ("watched", "me may only read in 'watched'"),
        ("name", "'a b' is no name for a repository"),
    ],
)
def test_what_cannot_be_pushed_is_refused(said, name, words):
    code, printed, errors = said[name]
    assert code == 2, errors
    assert words in errors
    assert "hint: " in errors
    assert not printed


def test_a_model_is_pushed_whole_and_its_old_weights_are_gone(said, hub):
    assert said["cut"][0] == 0, said["cut"][2]
    pushed = hub.repositories["me/small"].files
    kept = {path.name: path.read_bytes() for path in (said["out"] / "cut").iterdir()}
    assert set(pushed) == {*kept, "notes.txt"}
    assert all(pushed[name] == content for name, content in kept.items() if name != "README.md")
    assert hub.repositories["me/small"].commits == ["A model made smaller by layercut"]
    card = pushed["README.md"].decode()
    assert 'from_pretrained("me/small")' in card
    assert "vllm serve me/small" in card
    assert "path/to/this/folder" not in card
    assert "path/to/this/folder" in kept["README.md"].decode()


def test_a_private_repository_is_private_and_a_public_one_is_not_taken_for_it(said, hub):
    code, _, errors = said["private there"]
    assert code == 2
    assert "me/small is there and public" in errors
    code, printed, errors = said["private"]
    assert code == 0, errors
    assert printed.strip() == f"{hub.address}/lab/other"
    assert hub.repositories["lab/other"].private
    assert not hub.repositories["me/small"].private


def test_it_is_evaluated_and_loaded_by_its_id(said):
    assert said["layers"] == folders.LAYERS - 2
    code, printed, errors = said["evaluate"]
    assert code == 0, errors
    assert printed.split()[0] == "me/small"
    assert printed.split()[1] == said["evaluate here"][1].split()[1], "the same perplexity as of the folder"
    assert float(printed.split()[1]) > 1


def test_of_a_run_only_its_model_is_pushed(said, hub):
    code, _, errors = said["run"]
    assert code == 0, errors
    pushed, model = hub.repositories["me/run"], said["out"] / "run" / "model"
    assert pushed.private
    assert set(pushed.files) == {path.name for path in model.iterdir()}
    assert pushed.files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    front = yaml.safe_load(pushed.files["README.md"].decode().split("---\n")[1])
    (figure,) = front["model-index"][0]["results"]
    summary = json.loads((said["out"] / "run" / "summary.json").read_text())
    assert figure["metrics"][0]["value"] == summary["perplexity"]["cut"]
    assert str(said["out"]) not in pushed.files["README.md"].decode(), "no path of this machine"


def test_the_card_and_mergekits_slices_are_of_the_cut(said, hub):
    files = hub.repositories["lab/other"].files
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == "tiny-llama"
    assert {"layercut", "pruned"} <= set(front["tags"])
    config = yaml.safe_load(files["mergekit.yaml"])
    ranges = [source["layer_range"] for each in config["slices"] for source in each["sources"]]
    assert ranges == [[0, 3], [5, 8]]
    assert json.loads(files["config.json"])["original_layer_index"] == [0, 1, 2, 5, 6, 7]
    assert len(load_file(said["out"] / "cut" / "model.safetensors")) > 0


def test_nothing_is_pushed_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.GOOD)
    with pytest.raises(ConfigError, match="cannot be asked") as refused:
        hub_module.check_destination("me/small")
    assert "network" in refused.value.hint
