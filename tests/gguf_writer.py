"""A tiny Llama, Qwen or Gemma 3 as a .gguf file, written by hand in llama.cpp's layout; a stand-in for its converter:

python gguf_writer.py FOLDER --outfile FILE --outtype f16
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def llama_name(parameter: str, names: dict[str, str] = NAMES) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    if parameter.startswith("model.layers."):
        number, rest = parameter.removeprefix("model.layers.").split(".", 1)
        role, kind = rest.rsplit(".", 1)
        return f"blk.{number}.{names[role]}.{kind}"
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return outside[parameter.removesuffix(".weight")] + ".weight"


def llama_layout(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Rows of q and k as llama.cpp keeps them (its converter's permutation)."""
    if "attn_q" not in name and "attn_k" not in name:
        return weight
    heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Any, tokenizer: Any, path: Path, kind: str = "F32", name: str | None = None) -> Path:
    """The model with its byte-level BPE tokenizer; matrices in `kind`, vectors in F32."""
    config = model.config
    gemma, qwen = config.model_type == "gemma3_text", config.model_type in ("qwen2", "qwen3")
    writer = gguf.GGUFWriter(path, "gemma3" if gemma else config.model_type)
    if name:
        writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if gemma or config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if gemma:
        writer.add_sliding_window(config.sliding_window)
    elif not qwen:
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"] if gemma else 10000.0)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {**core["model"]["vocab"], **{t["content"]: t["id"] for t in core["added_tokens"]}}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in core["model"]["merges"]]
    special = {t["content"] for t in core["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for parameter, weight in model.named_parameters():
        name = llama_name(parameter, GEMMA_NAMES if gemma else NAMES)
        data = weight.float().numpy() + (1 if gemma and "norm" in parameter else 0)
        data = np.ascontiguousarray(data if gemma or qwen else llama_layout(name, data, config))
        ggml = gguf.GGMLQuantizationType[kind] if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(data, ggml), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_metadata(source: Path, out: Path, more: dict[str, str | list[str]]) -> Path:
    """A copy of a .gguf file with further text in its metadata."""

    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in more.items():
            writer.add_string(key, value) if isinstance(value, str) else writer.add_array(key, value)

    return rewritten(source, out, add)


def rewritten(
    source: Path,
    out: Path,
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    *,
    fields: Callable[[str], bool] = lambda name: True,
    tensors: Callable[[str], bool] = lambda name: True,
) -> Path:
    """A copy of a .gguf file with some of its metadata and tensors, and what `add` writes."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture" and fields(field.name):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    add(writer)
    for tensor in reader.tensors:
        if tensors(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def as_converter(folder: Path) -> Path:
    """A folder with a converter in it: this file, which stands in for llama.cpp's."""
    folder.mkdir()
    shutil.copy(__file__, folder / "convert_hf_to_gguf.py")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype")
    parser.add_argument("--model-name")
    parser.add_argument("--vocab-only", action="store_true")
    args = parser.parse_args()
    kind = json.loads((args.folder / "config.json").read_text())["model_type"]
    if kind not in ("llama", "gemma3_text"):
        sys.exit(f"Model {kind} is not supported")
    if args.vocab_only:
        args.outfile.touch()
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.folder).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    write_gguf(model, tokenizer, args.outfile, args.outtype.upper(), name=args.model_name)


if __name__ == "__main__":
    main()
