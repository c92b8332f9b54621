"""Cutting checkpoint folders: the same model as in memory, whatever the layout, and never half a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import census
import families
from layercut.errors import LayercutError, ModelError, RunError, SurgeryError
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint, cut_segment_

SEGMENTS = [Segment(1, 2), Segment(4, 6)]
KEPT = [0, 2, 3, 6, 7]
INDEX = "model.safetensors.index.json"


def save(folder: Path, model_type: str = "llama", shard_size: str = "5GB", **facts) -> Path:
    families.tiny(model_type, **facts).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def loaded(folder: Path, model_type: str = "llama"):
    model, info = families.model_class(model_type).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sharded checkpoint, with the files that come with one."""
    folder = save(tmp_path / "source", shard_size="40KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"the uncut model once more")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    return folder


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "qwen3_moe", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_equals_the_cut_in_memory(tmp_path, model_type, shard_size):
    folder = save(tmp_path / "source", model_type, shard_size)
    cut_checkpoint(folder, SEGMENTS, tmp_path / "out")
    model = families.tiny(model_type)
    cut_segment_(model, SEGMENTS)
    assert torch.equal(census.logits_of(loaded(tmp_path / "out", model_type)), census.logits_of(model))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["original_layer_index"] == KEPT


def test_index_and_other_files(tmp_path, source):
    cut_checkpoint(source, SEGMENTS, tmp_path / "out")
    out = tmp_path / "out"
    index = json.loads((out / INDEX).read_text())
    held = {file.name: set(load_file(file)) for file in out.glob("*.safetensors")}
    assert {name: {k for k, v in index["weight_map"].items() if v == name} for name in held} == held
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in weights(out).values())
    assert len(held) > 1
    assert sorted(held)[-1].startswith(f"model-{len(held):05d}-of-{len(held):05d}")
    assert (out / "tokenizer.json").exists()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert (out / "generation_config.json").exists()
    assert not (out / "pytorch_model.bin").exists()


def test_shards_without_an_index_are_refused_as_by_transformers(tmp_path, source):
    (source / INDEX).unlink()
    with pytest.raises(ModelError, match="transformers does not read"):
        cut_checkpoint(source, SEGMENTS, tmp_path / "out")


def test_the_source_is_only_read_and_may_be_links(tmp_path, source):
    def digests() -> dict[Path, str]:
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in source.rglob("*") if p.is_file()}

    before = digests()
    links = tmp_path / "models--owner--name" / "snapshots" / "0123"
    blobs = shutil.copytree(source, tmp_path / "models--owner--name" / "blobs")
    for file in filter(Path.is_file, blobs.rglob("*")):
        (links / file.relative_to(blobs)).parent.mkdir(parents=True, exist_ok=True)
        (links / file.relative_to(blobs)).symlink_to(file)
    cut_checkpoint(links, SEGMENTS, tmp_path / "out")
    assert digests() == before
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_tensors_the_class_does_not_know_follow_their_layer(tmp_path):
    """Old buffers are renumbered or go; blocks behind the last layer (multi-token prediction) go."""
    folder = save(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    for i in range(families.LAYERS):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float(i))
    tensors[f"model.layers.{families.LAYERS}.eh_proj.weight"] = torch.ones(2, 2)
    tensors["mtp.norm.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    cut_checkpoint(folder, SEGMENTS, tmp_path / "out")
    got = weights(tmp_path / "out")
    frequencies = {k: v[0].item() for k, v in got.items() if "inv_freq" in k}
    assert frequencies == {f"model.layers.{new}.self_attn.rotary_emb.inv_freq": old for new, old in enumerate(KEPT)}
    assert not any("eh_proj" in k for k in got)
    assert "mtp.norm.weight" in got


def test_quantizer_names_follow_their_layer_and_those_of_another_tower_stay(tmp_path):
    folder = save(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())

    def cut_with(**quantization: object) -> dict[str, object]:
        content = config | {"quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(content))
        cut_checkpoint(folder, SEGMENTS, tmp_path / "out")
        return json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    towers = ["lm_head", "model.visual.blocks.6.attn", "vision_tower.encoder.layers.26.mlp.fc1"]
    names = [*towers, "model.layers.1.mlp", "model.layers.6.mlp"]
    found = cut_with(quant_method="fp8", modules_to_not_convert=names)
    assert found["modules_to_not_convert"] == [*towers, "model.layers.3.mlp"]
    with pytest.raises(SurgeryError, match="cannot be renumbered"):
        cut_with(quant_method="compressed-tensors", ignore=["re:.*layers\\.(0|1)\\..*"])


def test_an_old_config_that_carries_a_rule_gets_the_list(tmp_path):
    folder = save(tmp_path / "source", "gemma3_text")
    model = families.tiny("gemma3_text", layer_types=None, sliding_window_pattern=3)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    config["sliding_window_pattern"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    cut_checkpoint(folder, [Segment(1, 2)], tmp_path / "out")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [i for i, kind in enumerate(out["layer_types"]) if kind == "full_attention"] == [1, 4]
    wanted = census.reference_logits(model, [Segment(1, 2)])
    assert torch.equal(census.logits_of(loaded(tmp_path / "out", "gemma3_text")), wanted)


# --- failures -------------------------------------------------------------------------------------


def refused(source: Path, out: Path, error: type[LayercutError], match: str, *, force: bool = False) -> None:
    """The cut fails with this error, and leaves neither a folder nor a trace beside it."""
    beside = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        cut_checkpoint(source, SEGMENTS, out, force=force)
    assert caught.value.hint
    assert sorted(p.name for p in out.parent.iterdir()) == beside


def test_corrupt_shard(tmp_path, source):
    shard = sorted(source.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(source, tmp_path / "out", ModelError, "corrupt or truncated")
    shard.write_bytes(b"\xff" * 8 + whole[8:])
    refused(source, tmp_path / "out", ModelError, "corrupt or truncated")


def test_missing_index_entry(tmp_path, source):
    index = json.loads((source / INDEX).read_text())
    gone = index["weight_map"].pop("model.layers.2.mlp.up_proj.weight")
    (source / INDEX).write_text(json.dumps(index))
    refused(source, tmp_path / "out", ModelError, "does not list")
    index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = "model-00001-of-00099.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    refused(source, tmp_path / "out", ModelError, "is not there")
    index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = gone
    index["weight_map"]["model.layers.9.nothing"] = gone
    (source / INDEX).write_text(json.dumps(index))
    refused(source, tmp_path / "out", ModelError, "does not hold")


def test_missing_weight(tmp_path):
    folder = save(tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.6.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, tmp_path / "out", ModelError, r"model\.layers\.6\.mlp\.up_proj\.weight")


def test_target_exists(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    refused(source, out, RunError, "exists already")
    assert (out / "mine").read_text() == "precious"
    cut_checkpoint(source, SEGMENTS, out, force=True)
    assert not (out / "mine").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_disk_full(source, small_disk, monkeypatch):
    refused(source, small_disk / "out", RunError, "No space left")
    # and where the space runs out only while writing
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(source, small_disk / "out", RunError, "No space left")


def test_read_only_target(source, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(source, small_disk / "out", RunError, "cannot be written: Read-only file system")


def test_what_the_class_reads_and_does_not_keep_is_cut_too(tmp_path):
    """Keys of Nemotron-H's files on the Hub, for which its class in transformers has others; engines read them."""
    folder = tmp_path / "source"
    families.tiny("nemotron_h").save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    letters = "".join({"linear_attention": "M", "moe": "E", "full_attention": "*"}.get(kind, "-")
                      for kind in config.pop("layers_block_type"))  # fmt: skip
    file.write_text(
        json.dumps(config | {"hybrid_override_pattern": letters, "num_hidden_layers": 8, "theirs": "x" * 8})
    )
    cut_checkpoint(folder, [Segment(3, 4)], tmp_path / "out")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (out["hybrid_override_pattern"], out["num_hidden_layers"]) == (letters[:3] + letters[4:], 7)
    assert out["theirs"] == "x" * 8
    assert len(AutoConfig.from_pretrained(tmp_path / "out").layers_block_type) == 7


def test_what_is_read_and_runs_are_never_replaced(tmp_path, source):
    """--force is for what is at --out, not for the model that is read, nor for all that a run holds."""
    folder = tmp_path / "all" / "model"
    shutil.copytree(source, folder)
    for out in (folder, folder.parent):
        refused(folder, out, RunError, "is or holds what is read", force=True)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "env.json").write_text("{}")
    for out in (run, run.parent):
        refused(folder, out, RunError, "is or holds a run folder", force=True)
    assert (run / "env.json").exists()
    assert (folder / "config.json").exists()
