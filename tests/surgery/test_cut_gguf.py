"""Cutting GGUF files: bytes untouched, arrays sliced, and what llama.cpp could not know refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layercut.cli.command_line import main
from layercut.cli.demo import cache_folder
from layercut.errors import ConfigError, ModelError, RunError, SurgeryError
from layercut.models import checkpoints, loading
from layercut.models.gguf_header import read_header
from layercut.models.llama_cpp_rules import broken_by_count
from layercut.segments import Segment
from layercut.surgery import cut_gguf, cut_segment_

gguf = pytest.importorskip("gguf")

from gguf_writer import rewritten  # noqa: E402 - it needs gguf

LAYERS, HIDDEN, HEADS, FFN, VOCAB = 6, 32, 4, 64, 64


def write(
    path: Path, arch: str = "llama", facts: dict[str, Any] | None = None, blocks: int = LAYERS, quantized: bool = False
) -> Path:
    """A GGUF file of a tiny model in llama.cpp's layout."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(blocks)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    for key, value in (facts or {}).items():
        writer.add_array(f"{arch}.{key}", value) if isinstance(value, list) else writer.add_uint32(
            f"{arch}.{key}", value
        )
    shapes = {
        "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "attn_q.weight": (HIDDEN, HIDDEN),
        "attn_k.weight": (HIDDEN, HIDDEN), "attn_v.weight": (HIDDEN, HIDDEN), "attn_output.weight": (HIDDEN, HIDDEN),
        "ffn_gate.weight": (FFN, HIDDEN), "ffn_up.weight": (FFN, HIDDEN), "ffn_down.weight": (HIDDEN, FFN),
    }  # fmt: skip
    named = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    named |= {f"blk.{i}.{name}": shape for i in range(blocks) for name, shape in shapes.items()}
    for name, shape in named.items():
        data = rng.standard_normal(shape).astype(np.float32)
        if quantized and len(shape) == 2:
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path: Path) -> dict[str, tuple[Any, bytes]]:
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def test_kept_blocks_are_byte_identical_and_renumbered(tmp_path):
    source, out = write(tmp_path / "a.gguf", quantized=True), tmp_path / "b.gguf"
    cut_gguf(source, [Segment(1, 2), Segment(3, 5)], out)
    old, new = tensors(source), tensors(out)
    kept = [0, 2, 5]
    wanted = {n: v for n, v in old.items() if not n.startswith("blk.")}
    for place, layer in enumerate(kept):
        wanted |= {
            n.replace(f"blk.{layer}.", f"blk.{place}.", 1): v for n, v in old.items() if n.startswith(f"blk.{layer}.")
        }
    assert new == wanted
    reader = gguf.GGUFReader(out)
    assert reader.get_field("llama.block_count").contents() == 3
    assert reader.get_field("layercut.original_layer_index").contents() == kept
    assert reader.get_field("tokenizer.ggml.tokens").contents() == [f"t{i}" for i in range(VOCAB)]
    assert reader.get_field("llama.attention.head_count").contents() == HEADS


def described(path: Path, out: Path) -> Path:
    """The file with what models from the Hub say of themselves."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_name("Tiny Llama")
        writer.add_organization("A House")
        writer.add_size_label("99B")
        writer.add_license("apache-2.0")
        writer.add_uuid("1234")
        writer.add_tags(["text-generation"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    return rewritten(path, out, add, fields=lambda name: not name.startswith("general."))


def about(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.values()
    found = {f.name.removeprefix("general."): f.contents() for f in fields if f.name.startswith("general.")}
    del found["architecture"]
    return found


def test_a_cut_file_says_what_it_is(tmp_path):
    source = described(write(tmp_path / "a.gguf", quantized=True), tmp_path / "b.gguf")
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    cut_gguf(source, [Segment(1, 2)], once)
    parameters = sum(t.n_elements for t in gguf.GGUFReader(once).tensors)
    wanted = {
        "name": "Tiny Llama (5 of 6 layers)", "license": "apache-2.0", "size_label": f"{parameters / 1000:.0f}K",
        "file_type": 7, "tags": ["text-generation", "layercut", "layer-pruning"], "base_model.count": 1,
        "base_model.0.name": "Tiny Llama", "base_model.0.organization": "A House", "base_model.0.uuid": "1234",
    }  # fmt: skip
    assert about(once) == wanted
    data = np.ones((HIDDEN, HIDDEN), np.float32)
    cut_gguf(once, [Segment(0, 1)], twice, replaced={"blk.0.attn_q.weight": (data, gguf.GGMLQuantizationType.F32)})
    assert gguf.GGUFReader(twice).get_field("layercut.original_layer_index").contents() == [2, 3, 4, 5]
    again = about(twice)
    assert again.pop("quantized_by").startswith("layercut ")
    assert again.pop("quantization_version") == 2
    fewer = sum(t.n_elements for t in gguf.GGUFReader(twice).tensors)
    assert again == wanted | {"name": "Tiny Llama (4 of 6 layers)", "size_label": f"{fewer / 1000:.0f}K"}


def test_a_file_that_is_not_cut_keeps_its_name(tmp_path):
    source = described(write(tmp_path / "a.gguf", quantized=True), tmp_path / "b.gguf")
    cut_gguf(source, [], tmp_path / "c.gguf")
    assert about(tmp_path / "c.gguf") == about(source)
    halves = {t.name: (gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float16), gguf.GGMLQuantizationType.F16)
              for t in gguf.GGUFReader(source).tensors if len(t.shape) > 1}  # fmt: skip
    cut_gguf(source, [], tmp_path / "d.gguf", replaced=halves)
    assert about(tmp_path / "d.gguf")["file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert about(tmp_path / "d.gguf")["name"] == "Tiny Llama"


def test_arrays_with_a_value_per_layer_are_sliced(tmp_path):
    heads, sections = "attention.head_count_kv", "rope.dimension_sections"
    facts = {heads: [0, 4, 0, 2, 0, 1], "leading_dense_block_count": 3, sections: [1, 1, 2, 0]}
    cut_gguf(write(tmp_path / "a.gguf", "lfm2", facts), [Segment(1, 3)], tmp_path / "b.gguf")
    found = read_header(tmp_path / "b.gguf").facts()
    assert (found[heads], found["leading_dense_block_count"], found[sections]) == ([0, 2, 0, 1], 1, [1, 1, 2, 0])


def test_prediction_blocks_stay_behind_the_layers(tmp_path):
    out = tmp_path / "b.gguf"
    cut_gguf(write(tmp_path / "a.gguf", "glm4moe", {"nextn_predict_layers": 1}), [Segment(3, 5)], out)
    assert gguf.GGUFReader(out).get_field("glm4moe.block_count").contents() == 4
    assert tensors(out)["blk.3.attn_q.weight"] == tensors(tmp_path / "a.gguf")["blk.5.attn_q.weight"]
    with pytest.raises(ConfigError, match="beyond the model's 5 layers"):
        cut_gguf(tmp_path / "a.gguf", [Segment(4, 6)], tmp_path / "c.gguf")


def test_a_rule_in_llama_cpp_that_the_cut_breaks_is_refused(tmp_path):
    source = write(tmp_path / "a.gguf", "smollm3")
    with pytest.raises(SurgeryError, match="every 4th layer of smollm3 differently, and layer 3 would") as refusal:
        cut_gguf(source, [Segment(1, 2)], tmp_path / "b.gguf")
    assert "--segment" in refusal.value.hint
    cut_gguf(source, [Segment(4, 6)], tmp_path / "b.gguf")
    assert gguf.GGUFReader(tmp_path / "b.gguf").get_field("smollm3.block_count").contents() == 4


@pytest.mark.parametrize(("arch", "full"), [("gemma2", [1, 3, 5]), ("gemma3", [5]), ("cohere2", [3]), ("gpt-oss", [1])])
def test_an_array_takes_the_place_of_a_period_that_the_cut_breaks(tmp_path, arch, full):
    source, key = write(tmp_path / "a.gguf", arch), f"{arch}.attention.sliding_window_pattern"
    cut_gguf(source, [Segment(2, 3)], tmp_path / "b.gguf")
    slides = [i not in (full if arch != "gpt-oss" else [1, 3, 5]) for i in (0, 1, 3, 4, 5)]
    assert read_header(tmp_path / "b.gguf").values[key] == slides
    cut_gguf(tmp_path / "b.gguf", [Segment(0, 2)], tmp_path / "c.gguf")  # the array is cut along
    assert read_header(tmp_path / "c.gguf").values[key] == slides[2:]
    cut_gguf(source, [Segment(4, 6)] if arch == "gemma2" else [Segment(0, 2)], tmp_path / "d.gguf", force=True)
    assert (key in read_header(tmp_path / "d.gguf").values) == (arch in ("gemma3", "cohere2"))


def test_rules_on_the_number_of_layers():
    """llama.cpp's, each with a cut that changes what it does and one that does not."""
    breaks = [
        ("gemma2", 46, 44), ("gemma2", 48, 46), ("gemma3", 62, 56), ("exaone4", 64, 60), ("baichuan", 32, 28),
        ("baichuan", 40, 36), ("command-r", 64, 63), ("deepseek2", 27, 25), ("deepseek2", 60, 26),
        ("deepseek2", 60, 48), ("minicpm3", 62, 61),
    ]  # fmt: skip
    for name, before, after in breaks:
        assert str(before) in (words := broken_by_count(name, {}, before, after)) or name == "minicpm3", words
    keeps = [
        ("gemma2", 42, 40), ("gemma3", 48, 42), ("exaone4", 30, 24), ("command-r", 80, 64), ("command-r", 40, 30),
        ("deepseek2", 27, 26), ("deepseek2", 60, 50), ("llama", 32, 26), ("gemma2", 46, 46),
    ]  # fmt: skip
    for name, before, after in keeps:
        assert broken_by_count(name, {}, before, after) == ""
    assert broken_by_count("deepseek2", {"expert_gating_func": 2}, 60, 48) == ""


def test_a_number_of_layers_that_llama_cpp_takes_for_another_model_is_refused(tmp_path):
    source = write(tmp_path / "a.gguf", "baichuan", blocks=32)
    with pytest.raises(SurgeryError, match="applies rotary positions in baichuan of 32 layers only") as refusal:
        cut_gguf(source, [Segment(1, 3)], tmp_path / "b.gguf")
    assert refusal.value.hint.startswith("cut the original")
    source = write(tmp_path / "c.gguf", "command-r", blocks=66)
    with pytest.raises(SurgeryError, match="of 64 or more layers only, and 66 would become 63") as refusal:
        cut_gguf(source, [Segment(1, 4)], tmp_path / "b.gguf")
    assert refusal.value.hint.startswith("remove 2 layers instead of 3")
    assert not (tmp_path / "b.gguf").exists()


def test_a_default_that_depends_on_the_number_of_layers_is_written(tmp_path):
    cut_gguf(write(tmp_path / "a.gguf", "minicpm"), [Segment(1, 3)], tmp_path / "b.gguf")
    assert read_header(tmp_path / "b.gguf").values["minicpm.residual_scale"] == pytest.approx(1.4 / LAYERS**0.5)


def test_tensors_that_are_missing_are_named(tmp_path):
    source = write(tmp_path / "a.gguf")
    cases = {
        "blk.3.ffn_down.weight": {"blk.3.ffn_down.weight"},
        r"blk\.5\.\*": {name for name in tensors(source) if name.startswith("blk.5.")},
        "output_norm.weight": {"output_norm.weight"},
    }
    for words, missing in cases.items():
        damaged = without(source, missing, tmp_path / "damaged.gguf")
        with pytest.raises(ModelError, match=f"incomplete: it lacks {words}"):
            cut_gguf(damaged, [Segment(1, 2)], tmp_path / "b.gguf")
        with pytest.raises(ModelError, match=f"incomplete: it lacks {words}"):
            loading.load(checkpoints.resolve(str(damaged)))
    nowhere = without(source, {f"blk.{i}.ffn_up.weight" for i in range(LAYERS)}, tmp_path / "damaged.gguf")
    with pytest.raises(ModelError, match=r"lacks 6 weights .* model\.layers\.0\.mlp\.up_proj\.weight"):
        loading.load(checkpoints.resolve(str(nowhere)))


@pytest.mark.parametrize(("arch", "lacks"), [("lfm2", "token_embd_norm.weight"), ("olmo", None)])
def test_a_final_norm_under_another_name_or_none(arch, lacks, tmp_path):
    source = without(write(tmp_path / "a.gguf", arch), {"output_norm.weight"}, tmp_path / "without.gguf")
    if not lacks:
        assert read_header(source).layers == LAYERS
        return
    with pytest.raises(ModelError, match=f"incomplete: it lacks {lacks}"):
        read_header(source)
    norm = np.ones(HIDDEN, np.float32)
    whole = rewritten(source, tmp_path / "b.gguf", add=lambda writer: writer.add_tensor(lacks, norm))
    assert read_header(whole).layers == LAYERS


def without(source: Path, names: set[str], out: Path) -> Path:
    """The file without some tensors, its metadata as it was."""
    return rewritten(source, out, tensors=lambda name: name not in names)


def test_a_files_config_is_the_callers_own_and_read_again_where_the_file_changed(tmp_path):
    file = write(tmp_path / "a.gguf", "llama")
    loading.load_config(checkpoints.resolve(str(file))).num_hidden_layers = 77
    assert loading.load_config(checkpoints.resolve(str(file))).num_hidden_layers == LAYERS
    cut_gguf(file, [Segment(1, 2)], tmp_path / "b.gguf")
    (tmp_path / "b.gguf").replace(file)
    assert loading.load_config(checkpoints.resolve(str(file))).num_hidden_layers == LAYERS - 1


def test_bad_files_and_targets(tmp_path):
    source = write(tmp_path / "a.gguf")
    (tmp_path / "bad.gguf").write_bytes(source.read_bytes()[:200])
    with pytest.raises(ModelError, match="corrupt, truncated"):
        cut_gguf(tmp_path / "bad.gguf", [Segment(1, 2)], tmp_path / "b.gguf")
    with pytest.raises(RunError, match="exists already"):
        cut_gguf(source, [Segment(1, 2)], source)
    with pytest.raises(SurgeryError, match=r"does not know how llama\.cpp distinguishes the layers of 'future'"):
        cut_gguf(write(tmp_path / "bad.gguf", "future"), [Segment(1, 2)], tmp_path / "b.gguf")
    with pytest.raises(ConfigError, match="not named as a GGUF file"):
        cut_gguf(source, [Segment(1, 2)], tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "bad.gguf"]


def test_transformers_reads_the_same_model_as_after_a_cut_in_memory(tmp_path):
    from transformers import AutoModelForCausalLM

    source, out = write(tmp_path / "a.gguf", facts={"attention.head_count_kv": HEADS}), tmp_path / "b.gguf"
    segments = [Segment(2, 4)]
    cut_gguf(source, segments, out)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    cut_segment_(whole, segments)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="b.gguf", dtype=torch.float32).eval()
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_a_real_q4_k_m_file_is_cut_to_one_of_the_same_types(tmp_path):
    """Qwen2.5-Coder-0.5B, where it has been fetched."""
    source = cache_folder() / "qwen2.5-coder-0.5b-instruct.gguf"
    if not source.is_file():
        pytest.skip(f"the real model is not to be had: {source} is missing")
    assert main(["cut", str(source), "--segment=10:12", f"--out={tmp_path / 'small.gguf'}"]) == 0
    before, after = (read_header(file) for file in (source, tmp_path / "small.gguf"))  # gguf's takes 15 s for each
    assert after.values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert after.layers == 22
    assert {gguf.GGMLQuantizationType(place.kind).name for place in after.tensors.values()} >= {"Q4_K", "Q6_K"}

    def stored(header, name):
        place = header.tensors[name]
        numbers, size = gguf.GGML_QUANT_SIZES[place.kind]
        return np.memmap(header.file, np.uint8, "r", place.start, (math.prod(place.shape) // numbers * size,))

    for name, place in after.tensors.items():
        block = int(name.split(".")[1]) if name.startswith("blk.") else 0
        twin = name.replace(f"blk.{block}.", f"blk.{block + 2}.") if block >= 10 else name
        assert (place.kind, place.shape) == (before.tensors[twin].kind, before.tensors[twin].shape)
        assert np.array_equal(stored(after, name), stored(before, twin))
