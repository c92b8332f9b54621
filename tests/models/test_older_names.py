"""Configs and tokenizers that transformers 5 writes, and loaders that are older read too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

import folders
import tiny
from layercut.export.checkpoint import save
from layercut.models.config_files import add_older_names_, older_tokenizer, unsaid, with_older_names
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 8192}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
OLD: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 100000.0},
    "llama 3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    "phi3": {"rope_theta": 20000.0, "rope_scaling": LONG, "original_max_position_embeddings": 4096},
    "gpt_neox": {"rotary_emb_base": 20000, "rotary_pct": 0.25},
    "stablelm": {"rope_theta": 20000, "partial_rotary_factor": 0.25},
    "gemma3_text": {
        "rope_theta": 2e6, "rope_local_base_freq": 20000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "olmo3": {"rope_theta": 500000.0, "rope_scaling": YARN | {"rope_type": "yarn"}, "max_position_embeddings": 65536},
    "qwen2_vl_text": {"rope_theta": 2e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
}  # fmt: skip
"""Configs as transformers 4 wrote them; `rope_parameters` is what transformers 5 makes of their keys."""


def read(config: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", OLD)
def test_what_an_old_config_said_is_said_again(name, tmp_path):
    old = SIZES | {"model_type": name.split()[0], "torch_dtype": "bfloat16"} | OLD[name]
    written = json.loads(read(old, tmp_path).to_json_string())
    assert "rope_parameters" in written
    new = with_older_names(written)
    assert {key: new.get(key) for key in old} | {"torch_dtype": "bfloat16"} == old
    assert unsaid(written) == []
    assert with_older_names(new) == new
    assert read(new, tmp_path).to_dict()["rope_parameters"] == read(written, tmp_path).to_dict()["rope_parameters"]


def test_the_text_part_of_a_larger_config_too(tmp_path):
    text = SIZES | {"model_type": "gemma3_text"} | OLD["gemma3_text"]
    written = json.loads(read({"model_type": "gemma3", "text_config": text}, tmp_path).to_json_string())
    new = with_older_names(written)
    assert {key: new["text_config"][key] for key in OLD["gemma3_text"]} == OLD["gemma3_text"]
    assert new["vision_config"] == written["vision_config"]


@pytest.mark.parametrize(
    ("full", "given", "period"),
    [([5], 6, 6), ([1, 3, 5, 7], None, 2), ([5], None, 6), ([4], None, 5), ([2, 5], 6, 3), ([4, 5], None, None)],
)
def test_a_period_is_said_where_there_is_one(full, given, period):
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(8)]
    config = {"model_type": "gemma3_text", "layer_types": kinds} | ({"sliding_window_pattern": given} if given else {})
    assert with_older_names(config).get("sliding_window_pattern") == period
    linear = {"model_type": "qwen3_next", "layer_types": [kind.replace("sliding", "linear") for kind in kinds]}
    assert with_older_names(linear).get("full_attention_interval") == (period if full != [5] else 6)


def test_what_no_old_name_says_is_named():
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    rope["full_attention"] = {"rope_type": "default", "rope_theta": 1e6}
    config = {"model_type": "gemma3_text", "rope_parameters": rope}
    assert unsaid(config) == ["rope_parameters"]
    assert with_older_names(config) == config


def test_a_tokenizer_keeps_its_class_unless_it_has_none(tmp_path):
    assert older_tokenizer({"tokenizer_class": "Qwen2Tokenizer"}) == {"tokenizer_class": "Qwen2Tokenizer"}
    tokenizer = folders.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    tiny.llama(2).config.save_pretrained(tmp_path)
    add_older_names_(tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (said["tokenizer_class"], said["additional_special_tokens"]) == ("PreTrainedTokenizerFast", ["<tool>"])
    assert "extra_special_tokens" not in said
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert (type(after), after.all_special_tokens) == (type(before), before.all_special_tokens)
    found, wanted = ([*(ids := each("<s>ba korin<tool> telmu").input_ids), each.decode(ids, skip_special_tokens=True)]
                     for each in (after, before))  # fmt: skip
    assert found == wanted


@pytest.mark.parametrize("way", ["cut", "saved"])
def test_every_way_out_writes_both(way, tmp_path):
    model = tiny.llama(4, vocab_size=folders.VOCABULARY, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    if way == "saved":
        save(model, folders.tokenizer(), tmp_path / way, verify=False)
    else:
        model.save_pretrained(tmp_path / "source")
        folders.tokenizer().save_pretrained(tmp_path / "source")
        cut_checkpoint(tmp_path / "source", [Segment(1, 2)], tmp_path / way)
    folder = tmp_path / way
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 777.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~mask}
