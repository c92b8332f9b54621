"""What a checkpoint's config files may say, checked before a class of transformers is built from them.

A class takes what it is given: 100,000 layers are built for minutes, a billion labels listed, a width of 0 divided by.
Checked is what such classes are sized by and what layercut computes with; whether the facts fit each other, the class
and the weights decide.
"""

from __future__ import annotations

from typing import Any

from layercut.errors import ModelError

COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers",
    "num_decoder_layers", "layers",
)  # fmt: skip
"""Names under which configs count their decoder layers."""
MOST_LAYERS = 2048
"""Sixteen times as many as the deepest published model has; such a stack is built without weights in seconds."""
SIZES = (
    "hidden_size", "n_embd", "d_model", "embed_dim", "vocab_size", "intermediate_size", "ffn_dim", "d_ff",
    "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads", "head_dim",
    "attention_head_dim", "v_head_dim", "max_position_embeddings", "n_positions", "n_ctx",
    "attn_layer_period", "expert_layer_period", "decoder_sparse_step", "moe_layer_interval",
    "interleave_moe_layer_step", "no_rope_layer_interval", "full_attention_interval",
)  # fmt: skip
"""Widths, heads, positions, and periods of layers: whole numbers above 0, or lists of them, or null."""
LARGEST_SIZE = 2**31 - 1
EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "num_hash_layers", "num_nextn_predict_layers",
)  # fmt: skip
MOST_EXPERTS = 2**16
MOST_LABELS = 100_000
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NAMED = {
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
}  # fmt: skip
OPEN = ("quantization_config", "compression_config", "per_layer_config")
"""Parts whose numbers mean something else."""


def check_config(config: Any, name: str) -> None:
    """Refuse a config.json that is none, or that no class should be built from."""
    if not isinstance(config, dict):
        raise ModelError(f"{name} does not hold an object", "use the model's own config.json")
    if config.get("transformers_weights") is not None:
        raise ModelError(
            f"{name} names the file of weights to take (transformers_weights), which layercut does not follow",
            "rename that file to model.safetensors, and take transformers_weights out of config.json",
        )
    _check_part(config, name, True)
    index = config.get("original_layer_index")
    if index is not None and not (
        isinstance(index, list) and index and all(_is_whole(i, 0, LARGEST_SIZE) for i in index)
    ):
        raise _wrong(name, "original_layer_index", index, "a list of one whole number per layer")


def _check_part(part: dict[str, Any], name: str, text: bool) -> None:
    """Check a config and those nested in it. text: whether it is, or may be, the decoder's."""
    least = 1 if text else 0
    numbers = dict.fromkeys(COUNTS, (least, MOST_LAYERS)) | dict.fromkeys(SIZES, (least, LARGEST_SIZE))
    numbers |= dict.fromkeys(EXPERTS, (0, MOST_EXPERTS)) | dict.fromkeys(TOKENS, (-1, LARGEST_SIZE))
    for key, (low, high) in (numbers | {"num_labels": (0, MOST_LABELS)}).items():
        value = part.get(key)
        ones = value if isinstance(value, list) else [value]
        fine = all(one is None or isinstance(one, dict | list) or _is_whole(one, low, high) for one in ones)
        if not fine or (low > 0 and (isinstance(value, dict) or (isinstance(value, list) and key in COUNTS))):
            raise _wrong(name, key, value, f"whole numbers from {low} to {high:,}")
    heads = part.get("architectures")
    if heads is not None and not (isinstance(heads, list) and all(isinstance(h, str) for h in heads)):
        raise _wrong(name, "architectures", heads, "a list of names of classes")
    texts, objects = ("model_type", "transformers_version", "name_or_path", "_name_or_path"), ("auto_map", *OPEN)
    for key in (*texts, *objects):
        if part.get(key) is not None and not isinstance(part[key], str if key in texts else dict):
            raise _wrong(name, key, part[key], "text" if key in texts else "an object")
    _check_named(part, name)
    for key, value in part.items():
        if isinstance(value, dict) and key.endswith("config") and key not in OPEN:
            of_text = text and any(word in key for word in ("text", "llm", "language", "decoder"))
            _check_part(value, f"{name}: {key}", of_text)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check_named(part: dict[str, Any], name: str) -> None:
    """Number formats that torch has, and implementations that transformers has; others it would fetch and run."""
    import torch

    for key in [key for key in part if key in NAMED and part[key] is not None]:
        if "dtype" in key:
            known = {one for one, it in vars(torch).items() if isinstance(it, torch.dtype) and it.is_floating_point}
            known |= {f"torch.{one}" for one in known}
        elif "attn" in key:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
        else:
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

            known = {"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()}
        for one in part[key].values() if isinstance(part[key], dict) else [part[key]]:  # perhaps one for each part
            if one is not None and not (isinstance(one, str) and one in known):
                raise _wrong(name, key, part[key], ", ".join(sorted(known)))


# --- the files beside config.json ---------------------------------------------------------------------------


def check_tokenizer_config(content: Any, name: str) -> None:
    """Refuse a tokenizer_config.json whose values are of another kind than any tokenizer's."""
    check_object(content, name)
    most, template = content.get("model_max_length"), content.get("chat_template")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int | float) or not most > 0):
        raise _wrong(name, "model_max_length", most, "a number above 0")
    if not isinstance(content.get("tokenizer_class"), str | None):
        raise _wrong(name, "tokenizer_class", content["tokenizer_class"], "text")
    fine = isinstance(template, str | dict | None) or (
        isinstance(template, list)
        and all(isinstance(one, dict) and all(isinstance(v, str) for v in one.values()) for one in template)
    )
    if not fine:
        raise _wrong(name, "chat_template", template, "text, or a list of objects with a name and a template")
    added = content.get("added_tokens_decoder")
    if added is not None and not (
        isinstance(added, dict)
        and all(key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= LARGEST_SIZE for key in added)
        and all(isinstance(token, str | dict) for token in added.values())
    ):
        raise _wrong(name, "added_tokens_decoder", added, "an object of tokens by their whole numbers")


def check_object(content: Any, name: str) -> None:
    """Refuse what is no JSON object."""
    if not isinstance(content, dict):
        raise ModelError(f"{name} does not hold an object", "fetch this file again, or remove it")


def shards_of(content: Any, name: str) -> list[str]:
    """The files that an index of shards names. ModelError: it is no index, or they are outside its own folder."""
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{name} has no weight_map", "fetch the checkpoint's index again")
    if not isinstance(content.get("metadata"), dict | None):
        raise ModelError(f"the metadata of {name} are no object", "fetch the checkpoint's index again")
    for shard in (shards := sorted(set(weight_map.values()))):
        if "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            raise ModelError(
                f"{name} names the shard {shard!r}, which lies outside the model folder",
                "do not use this checkpoint, or correct the index by hand if you made it",
            )
    return shards


def _wrong(name: str, key: str, value: Any, allowed: str) -> ModelError:
    got = repr(value)
    got = got if len(got) <= 60 else f"{got[:57]}..."
    return ModelError(f"{name} has {key} {got}; allowed: {allowed}", "use the model's own config.json; fetch it again")
