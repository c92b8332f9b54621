"""The card of a model: what the Hub reads at its top, from where it is known, and how to load the model."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import folders
from layercut.cli.command_line import main
from layercut.models.checkpoints import SourceCard, source_card
from layercut.report.formatting import layer_names
from layercut.report.model_card import Figure, Made, addressed, checkpoint_card, from_folder, layers_of, model_card
from report_runs import MODEL, make_run, with_perplexity

README = """---
license: other
license_name: own-licence
license_link: https://example.org/licence
language: [en, no]
tags: [chat]
base_model: someone/before
---
# A model
"""


def front(card: str) -> dict[str, Any]:
    """What the Hub reads, after huggingface_hub has read and written it as well."""
    empty, header, _ = card.split("---\n", 2)
    assert empty == ""
    found = yaml.safe_load(header)
    assert ModelCard(card).data.to_dict() == found
    return found


def test_a_runs_card_says_what_the_hub_asks_for(tmp_path):
    tasks = {"piqa": {"metric": "acc", "dense": 0.68, "compressed": 0.61, "items": 100}}
    card = model_card(make_run(tmp_path, summary={"tasks": tasks}))
    found = front(card)
    assert (found["base_model"], found["base_model_relation"]) == (MODEL, "finetune")
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"layercut", "pruned"} <= set(found["tags"])
    (index,) = found["model-index"]
    assert index["name"] == "SmolLM2-135M-Instruct-24-layers"
    measured = {result["metrics"][0]["type"]: result["metrics"][0]["value"] for result in index["results"]}
    assert measured == {"perplexity": 67.4, "acc": 0.61}
    named = {"type": "Salesforce/wikitext", "name": "wikitext2", "config": "wikitext-2-raw-v1", "split": "test"}
    found = front(model_card(make_run(tmp_path / "named", summary=with_perplexity(dataset="wikitext2"))))
    assert found["model-index"][0]["results"][0]["dataset"] == named, "as the Hub knows it"
    for line in ("AutoModelForCausalLM.from_pretrained", "vllm serve", "llama-cli", "ollama create", "mlx_lm.generate"):
        assert line in card, line
    assert "vllm serve org/small" in addressed(card, "org/small")


def test_what_was_not_measured_is_no_figure(tmp_path):
    nothing = dict.fromkeys(("cut", "folded", "tuned", "quantized"))
    assert "model-index" not in front(model_card(make_run(tmp_path, summary={"perplexity": {"dense": 2.0, **nothing}})))
    ruined = {"dataset": "c4", "window": 64, "tokens": 128, "dense": 2.0, "tuned": 2.5, "quantized": float("inf")}
    of_quantized = front(model_card(make_run(tmp_path / "ruined", summary={"perplexity": ruined})))
    assert "model-index" not in of_quantized, "2.5 is another model's"


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("x\n---\nlicense: mit\ntags: [evil]", None),
        ("org/name: {a: b} # c", None),
        ("/home/someone/models/SmolLM2.Q4_K_M.gguf", "SmolLM2"),
        ("/home/someone/.cache/hub/models--org--name/snapshots/abc", "org/name"),
        ("gpt2", "gpt2"),
        ("no", "no"),
    ],
)
def test_a_local_path_is_never_a_base_model_and_no_name_breaks_the_yaml(tmp_path, model, base):
    card = model_card(make_run(tmp_path, summary={"model": model}))
    found = front(card)
    assert found.get("base_model") == base
    assert ("base_model_relation" in found) == (base is not None)
    assert "license" not in found
    assert "/home/" not in card.partition("## Data and provenance")[0]


def test_licence_and_languages_are_those_of_the_source(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "source")
    (folder / "README.md").write_text(README)
    found = source_card(str(folder))
    assert found == SourceCard(
        name="source", license="other", license_name="own-licence", license_link="https://example.org/licence",
        languages=("en", "no"),
    )  # fmt: skip
    assert found.base_model == "source", "what a card calls its own base is not what this folder is"
    shown = front(checkpoint_card(Made(source=found, done="Cut.")))
    assert (shown["license"], shown["license_name"], shown["language"]) == ("other", "own-licence", ["en", "no"])


def test_what_layercut_made_stands_for_the_model_it_was_made_from(tmp_path):
    made = Made(source=SourceCard(name="name", hub_id="org/name", license="mit"), done="Cut.", segments=[(3, 5)])
    (tmp_path / "README.md").write_text(checkpoint_card(made))
    (tmp_path / "config.json").write_text(json.dumps({"original_layer_index": [0, 1, 2, 5, 6, 7]}))
    found = from_folder(tmp_path)
    assert (found.source.hub_id, found.source.license) == ("org/name", "mit")
    assert found.segments == [(3, 5)]


@pytest.mark.parametrize(
    "text", ["", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: [1]\nlanguage: {a: b}\n---\n"]
)
def test_a_card_that_is_none_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert source_card(str(tmp_path)) == SourceCard(name=tmp_path.name)


def test_names_of_files_are_quoted_in_what_is_to_be_run():
    evil = 'a"; rm -rf ~; $(x) `y`.gguf'
    card = checkpoint_card(Made(source=SourceCard(name='x"$(y)'), done="Written.", gguf=evil, number_format="Q8_0"))
    blocks = re.findall(r"```(?:sh|python)\n(.*?)```", card, re.DOTALL)
    assert f"llama-cli -m 'path/to/this/folder/{evil}'\n" in blocks[0]
    assert "ollama create x-y--q8_0 -f 'a\"; rm -rf ~; $(x) `y`.Modelfile'\n" in blocks[1]
    assert f"gguf_file={json.dumps(evil)}" in blocks[2]
    assert front(card)["base_model_relation" if "base_model" in front(card) else "library_name"] == "gguf"


@pytest.mark.parametrize(
    ("made", "relation", "library", "tags"),
    [
        ({"number_format": "int4", "packed": True}, "quantized", "transformers", ["compressed-tensors"]),
        ({"gguf": "n.gguf"}, "finetune", "gguf", ["gguf"]),
        ({"figures": [Figure(metric="perplexity", value=float("inf"), dataset="c4")]}, "finetune", "transformers", []),
    ],
)
def test_tags_and_relation_say_what_kind_of_file_it_is(made, relation, library, tags):
    found = front(checkpoint_card(Made(source=SourceCard(name="n", hub_id="o/n"), done="", **made)))
    assert (found["base_model_relation"], found["library_name"]) == (relation, library)
    assert found["tags"] == ["layercut", *tags]
    assert "model-index" not in found, "a figure that is no number is none"


def test_a_gguf_file_says_its_licence_itself(tmp_path):
    pytest.importorskip("gguf")
    import tiny
    from gguf_writer import with_metadata, write_gguf

    model = tiny.llama(2, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    plain = write_gguf(model, folders.tokenizer(), tmp_path / "Small-1B.Q4_1.gguf", "Q4_1")
    assert source_card(str(plain)) == SourceCard(name="Small-1B")
    with_metadata(plain, tmp_path / "named.gguf", {
        "general.source.repo_url": "https://huggingface.co/org/name", "general.license": "apache-2.0",
        "general.languages": ["en", "de"],
    })  # fmt: skip
    assert source_card(str(tmp_path / "named.gguf")) == SourceCard(
        name="named", hub_id="org/name", license="apache-2.0", languages=("en", "de")
    )


@pytest.mark.parametrize(("second", "gone"), [("1:3", [(1, 5)]), ("4:6", [(1, 3), (6, 8)])])
def test_the_card_of_a_second_cut_is_of_the_first_model(second, gone, tiny_model, tmp_path):
    once, twice, quantized = tmp_path / "once", tmp_path / "twice", tmp_path / "quantized"
    assert main(["cut", str(tiny_model), "--segment=1:3", f"--out={once}"]) == 0
    assert main(["cut", str(once), f"--segment={second}", f"--out={twice}"]) == 0
    kept = json.loads((twice / "config.json").read_text())["original_layer_index"]
    ranges = [source["layer_range"] for part in yaml.safe_load((twice / "mergekit.yaml").read_text())["slices"]
              for source in part["sources"]]  # fmt: skip
    assert [i for start, stop in ranges for i in range(start, stop)] == kept
    dense, cut = load_file(tiny_model / "model.safetensors"), load_file(twice / "model.safetensors")
    for place, layer in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(cut[name.format(place)], dense[name.format(layer)])
    card = (twice / "README.md").read_text()
    assert f"{tiny_model.name} without layers {layer_names(gone)}," in card
    assert json.dumps(kept) in card
    assert main(["quantize", str(once), "--bits=8", "--quantizer=rtn", f"--out={quantized}"]) == 0
    assert from_folder(quantized).segments == [(1, 3)]
    card = (quantized / "README.md").read_text()
    assert "pruned" in front(card)["tags"]
    assert "`1:3`" in card


def test_a_run_on_what_was_cut_before_is_described_in_the_first_models_layers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"original_layer_index": [0, 5, 6]}))
    first, given = SourceCard(name="name", is_first=True), SourceCard(name="name")
    found = layers_of(first, tmp_path, [(1, 3), (5, 6)], [0, 3, 4], 6)
    assert found == {"source": first, "segments": [(1, 5), (7, 8)], "original_layer_index": [0, 5, 6]}
    found = layers_of(given, tmp_path, [(1, 3), (5, 6)], [0, 3, 4], 6)
    assert found == {"source": given, "segments": [(1, 3), (5, 6)], "original_layer_index": [0, 3, 4]}


def test_a_runs_card_holds_its_figures_and_no_name_breaks_it(tmp_path):
    card = model_card(make_run(tmp_path))
    assert "`13:19`" in card
    assert json.dumps([*range(13), *range(19, 30)]) in card
    assert "| tuned | 67.40 | – | 50.4% |" in card
    assert "| parameters | 134,515,008 | 113,276,160 | −15.8% |" in card
    assert "| tuning | self | 120,832 | 88b1c0aa42fe |" in card
    assert "\n\n\n" not in card
    evil = "a|b`<script>`\n# title [x](http://y) *z*"
    changed = {"model": evil, **with_perplexity(dataset=evil)}
    run = make_run(tmp_path / "evil", summary=changed, search={"calibration": {"source": evil}})
    body = model_card(run).split("---\n", 2)[2]
    outside = re.sub(r"`[^`\n]*`", "", body.replace("\\`", ""))
    assert "<script" not in outside
    assert "\n# title" not in body
    assert "[x](" not in outside.replace("\\[", "").replace("\\]", "")
