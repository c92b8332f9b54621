"""Hostile and broken checkpoint folders: what is refused before a class is built, what is copied, what is noticed.

The first test is a small part of `python -m tests.fuzz`, by fixed seeds; the others are one mechanism each.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import folders
from fuzz import bounded, of_folder, sound_folders
from layercut import files
from layercut.cli import single_stage
from layercut.cli.command_line import main
from layercut.config.commands import CutConfig, PerplexityConfig
from layercut.errors import LayercutError, ModelError
from layercut.models import checkpoints, config_files, decoder_stack, layer_reader, loading
from layercut.models.checkpoints import resolve
from layercut.pipeline.run_folder import Run


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_spoiled_folders_end_well_or_in_a_refusal(tmp_path):
    sound = sound_folders(tmp_path / "sound")
    found = {end for number in range(6) for end in of_folder(sound, tmp_path, random.Random(f"1 {number}"))}
    assert found <= {"ok", "refused"}


# --- JSON within limits -------------------------------------------------------------------------------------

BAD_JSON = [
    (b"[" * 100_000 + b"]" * 100_000, "nests deeper"), (b"[" * 70 + b"]" * 70, "nests deeper than 64"),
    (b'{"a": ' + b"9" * 5000 + b"}", "5,000 digits"), (b'{"a": "\\ud800"}', "surrogates not allowed"),
    (b'{"a": "\xff"}', "not valid JSON"),
]  # fmt: skip


def test_json_beyond_the_limits_is_refused(tmp_path):
    for raw, words in BAD_JSON:
        (tmp_path / "x.json").write_bytes(raw)
        with pytest.raises(ModelError, match=words):
            files.read_json(tmp_path / "x.json")


def test_only_regular_files_of_some_size_are_read(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    none = dict.fromkeys(("folder", "pipe", "device"), "no regular file")
    for name, words in (none | {"loop": "cannot be read", "nothing": "no file"}).items():
        with bounded(5), pytest.raises(ModelError, match=words):
            files.read_json(tmp_path / name)
    (tmp_path / "long").write_text("[1, 2, 3]")
    monkeypatch.setattr(files, "LARGEST_JSON", 5)
    with pytest.raises(ModelError, match="9 bytes; allowed are 5"):
        files.read_json(tmp_path / "long")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, folder):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with bounded(20), pytest.raises(ModelError):
        loading.load(resolve(str(folder)))


# --- config.json --------------------------------------------------------------------------------------------

BAD_CONFIGS: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**5}, {"num_hidden_layers": 0}, {"num_hidden_layers": "8"}, {"num_hidden_layers": [8]},
    {"num_attention_heads": 0}, {"head_dim": 0}, {"hidden_size": 0}, {"hidden_size": -4}, {"vocab_size": 1.5},
    {"intermediate_size": [64, 0]}, {"max_position_embeddings": "long"}, {"num_labels": 10**9}, {"n_head": True},
    {"architectures": [1, 2]}, {"architectures": "Llama"}, {"dtype": "int8"}, {"dtype": 7}, {"torch_dtype": "layout"},
    {"attn_implementation": "owner/kernel"}, {"_attn_implementation": 3}, {"experts_implementation": "x"},
    {"original_layer_index": "text"}, {"original_layer_index": [0, "1"]}, {"original_layer_index": {}},
    {"text_config": {"num_hidden_layers": 0}}, {"vision_config": {"num_hidden_layers": 10**6}},
    {"num_experts": 10**9}, {"model_type": ["llama"]}, {"auto_map": "x"}, {"bos_token_id": "1"},
    {"decoder_sparse_step": 0}, {"transformers_weights": "other.safetensors"},
]  # fmt: skip


def test_what_no_class_should_be_built_from_is_refused(tiny_model):
    sound = json.loads((tiny_model / "config.json").read_text())
    config_files.check_config(sound, "config.json")
    for changes in BAD_CONFIGS:
        with pytest.raises(ModelError, match=r"config\.json"):
            config_files.check_config(sound | changes, "config.json")


def test_usual_ways_to_say_things_are_not_refused():
    for fine in (
        {"num_hidden_layers": None, "head_dim": None, "intermediate_size": [64, 32], "dtype": None},
        {"torch_dtype": "bfloat16", "attn_implementation": "sdpa", "eos_token_id": [1, 2], "pad_token_id": -1},
        {"time_step_limit": [0.0, float("inf")], "vision_config": {"num_hidden_layers": 0, "layers": [1, 2]}},
        {"quantization_config": {"num_heads": 0}, "dtype": {"": "float32", "text_config": "bfloat16"}},
    ):
        config_files.check_config(fine, "config.json")


def test_a_config_for_far_more_weights_is_refused_before_memory_is_taken(folder, monkeypatch):
    edit(folder / "config.json", vocab_size=10**9)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    for load in (loading.load, layer_reader.open_on_disk):
        with pytest.raises(ModelError, match=r"calls for 64,000,\d+,\d+ weights, and its files hold 93,472"):
            load(resolve(str(folder)))


# --- index and tokenizer ------------------------------------------------------------------------------------


def test_an_index_that_is_none_is_refused():
    for content in (
        [], {}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "b\0"}},
        {"weight_map": {"a": "../b"}}, {"weight_map": {"a": "b"}, "metadata": "text"},
    ):  # fmt: skip
        with pytest.raises(ModelError, match=r"index\.json"):
            config_files.shards_of(content, "index.json")


def test_a_tokenizer_config_of_the_wrong_kinds_is_refused(folder):
    file = folder / "tokenizer_config.json"
    for changes in (
        {"model_max_length": "512"}, {"model_max_length": -1}, {"tokenizer_class": 3}, {"chat_template": 7},
        {"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"9" * 30: {}}}, {"added_tokens_decoder": []},
    ):  # fmt: skip
        content = json.loads(file.read_text()) | changes
        with pytest.raises(ModelError, match="tokenizer_config"):
            config_files.check_tokenizer_config(content, "tokenizer_config.json")
    edit(file, model_max_length="512")
    with pytest.raises(ModelError, match="model_max_length '512'"):
        loading.load_tokenizer(resolve(str(folder)))


def test_tokens_beyond_the_vocabulary_are_refused(tiny_model, folder, texts):
    config = loading.load_config(resolve(str(tiny_model)))
    decoder_stack.check_tokens(torch.tensor([[0, folders.VOCABULARY - 1]]), config, "m")
    with pytest.raises(ModelError, match="gives token 300, and the model's vocabulary has 300"):
        decoder_stack.check_tokens(torch.tensor([[0, folders.VOCABULARY]]), config, "m")
    asked = PerplexityConfig(eval_data=str(texts[1]), eval_tokens=64, eval_window=16)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {token: i + 5000 for token, i in vocabulary.items() if i >= 258}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"gives token 5,\d+, and the model's vocabulary has 300"):
        single_stage.evaluate_only(str(folder), asked)


# --- which files are the model ------------------------------------------------------------------------------


def test_of_two_layouts_all_take_the_one_that_transformers_takes(folder, tmp_path):
    """model.safetensors, and an index whose shard holds other weights."""
    weights = load_file(folder / "model.safetensors")
    other = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (folder / checkpoints.INDEX).write_text(json.dumps(index))
    single_stage.cut(str(folder), CutConfig(segment=("3:5",), out=tmp_path / "cut"))
    name = "model.layers.0.self_attn.q_proj.weight"
    opened = layer_reader.open_on_disk(resolve(str(folder))).model
    opened.layers_on_disk.enter_(opened.layers_on_disk.layers[0])
    found = [
        loading.load(resolve(str(folder))).model.get_parameter(name),
        opened.get_parameter(name),
        load_file(tmp_path / "cut" / "model.safetensors")[name],
    ]
    assert all(torch.equal(weight, weights[name]) for weight in found)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    with pytest.raises(ModelError, match="holds an adapter"):
        checkpoints.check_folder(folder)


def test_the_fingerprint_is_of_the_content(folder, tmp_path):
    memo, file = tmp_path / "memo.json", folder / "model.safetensors"
    before = resolve(str(folder)).fingerprint(memo)
    assert resolve(str(shutil.copytree(folder, tmp_path / "copy"))).fingerprint() == before
    reads: list[Path] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints, "content_digest", lambda path: reads.append(path))
        assert resolve(str(folder)).fingerprint(memo) == before
    assert not reads, "nothing is read that has not changed"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert resolve(str(folder)).fingerprint(memo) != before
    memo.write_text('{"model.safetensors": 3}')
    assert resolve(str(folder)).fingerprint(memo) != before


def test_what_no_model_is_read_from_is_no_part_of_its_fingerprint(folder):
    before = resolve(str(folder)).fingerprint()
    (folder / "additional_chat_templates").mkdir()
    templates = ("chat_template.jinja", "additional_chat_templates/tools.jinja")
    read = ("vocab.txt", "merges.txt", *templates, "modeling_x.py", "words.txt")
    for name in ("LICENSE.txt", "log.txt", "eval_results.json", "trainer_state.json", "README.md", *read):
        (folder / name).write_text("text")
        after = resolve(str(folder)).fingerprint()
        assert (after != before) == (name in read), name
        before = after


# --- what a cut copies --------------------------------------------------------------------------------------


def test_a_cut_copies_what_belongs_to_a_model_and_nothing_else(folder, tmp_path, caplog):
    for name in ("LICENSE.txt", "modeling_x.py", "notes.json", "run.sh"):
        (folder / name).write_text("text")
    (folder / "private").mkdir()
    (folder / "private" / "key").write_text("secret")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    with caplog.at_level("INFO", "layercut"):
        single_stage.cut(str(folder), CutConfig(segment=("3:5",), out=tmp_path / "cut"))
    there = {file.name for file in (tmp_path / "cut").iterdir()}
    assert {"LICENSE.txt", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= there
    assert not there & {"modeling_x.py", "notes.json", "run.sh", "private"}
    assert "auto_map" not in json.loads((tmp_path / "cut" / "config.json").read_text())
    assert "modeling_x.py, notes.json, private, run.sh" in caplog.text


@pytest.mark.parametrize("kind", ["out of the folder", "by its own folder", "of the Hub's cache, out of it", "a pipe"])
def test_a_companion_that_leads_out_of_the_checkpoint_is_refused(kind, folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    if kind == "of the Hub's cache, out of it":
        home = tmp_path / "models--owner--name" / "snapshots"
        home.mkdir(parents=True)
        folder = folder.rename(home / "0123")
    if kind == "a pipe":
        os.mkfifo(folder / "LICENSE.txt")
    elif kind == "by its own folder":
        (tmp_path / "templates").mkdir()
        (tmp_path / "templates" / "x.jinja").write_text("secret")
        (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    else:
        (folder / "LICENSE.txt").symlink_to(tmp_path / "secret")
    with bounded(20), pytest.raises(ModelError, match="not a file of this checkpoint"):
        single_stage.cut(str(folder), CutConfig(segment=("3:5",), out=tmp_path / "cut"))
    assert not (tmp_path / "cut").exists()


# --- a run folder made by somebody else, and the terminal ---------------------------------------------------


def test_the_lock_is_never_written_through_a_link(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    run.mkdir()
    (run / "config.yaml").touch()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(LayercutError):
        Run(run)
    assert victim.read_text() == "precious"


def test_errors_are_printed_without_control_characters(folder, tmp_path, capsys):
    bad = folder.rename(tmp_path / "\x1b[31mred")
    (bad / "config.json").write_text("{")
    assert main(["cut", str(bad), "--segment=1:2", f"--out={tmp_path / 'out'}"]) == 2
    assert "\x1b" not in (said := capsys.readouterr().err)
    assert "\\x1b[31mred" in said


# --- what is written ----------------------------------------------------------------------------------------


def test_a_record_tells_damage(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.zeros(4)}, model / "x.safetensors")
    (model / "config.json").write_text("{}")
    recorded = json.loads(json.dumps(files.record([model], tmp_path)))
    assert files.differing(tmp_path, recorded) is None
    (model / "README.md").write_text("more files do not matter")
    assert files.differing(tmp_path, recorded) is None
    assert files.differing(tmp_path, recorded | {"model/gone": [0, ""]})
    (model / "config.json").write_text("[]")
    assert files.differing(tmp_path, recorded)
