"""What a checkpoint's config files may say, checked before a class of transformers is built from them; and what a
written one says to loaders older than transformers 5.

A class takes what it is given: 100,000 layers are built for minutes, a billion labels listed, a width of 0 divided by.
Checked is what such classes are sized by and what layercut computes with; whether the facts fit each other, the class
and the weights decide.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layercut.errors import ModelError
from layercut.files import read_json, write_atomically

COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers",
    "num_decoder_layers", "layers",
)  # fmt: skip
"""Names under which configs count their decoder layers."""
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configs call their number of positions: MPT the second, the decoders of Whisper the third."""
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
MOST_EXPERTS, MOST_LABELS = 2**16, 100_000
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NAMED = {
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
}  # fmt: skip
USUAL = (None, "float32", "bfloat16", "float16", "eager")
"""Values of these that are known without importing torch."""
OPEN = ("quantization_config", "compression_config", "per_layer_config")  # parts whose numbers mean something else


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
    whole = isinstance(index, list) and index and all(_is_whole(i, 0, LARGEST_SIZE) for i in index)
    if index is not None and not whole:
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
    for key in [key for key in part if key in NAMED and part[key] is not None]:
        for one in part[key].values() if isinstance(part[key], dict) else [part[key]]:  # perhaps one for each part
            if one not in USUAL and not (isinstance(one, str) and one in _known(key)):
                raise _wrong(name, key, part[key], ", ".join(sorted(_known(key))))
    for key, value in part.items():
        if isinstance(value, dict) and key.endswith("config") and key not in OPEN:
            of_text = text and any(word in key for word in ("text", "llm", "language", "decoder"))
            _check_part(value, f"{name}: {key}", of_text)


def stated_sizes(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Decoder layers and positions that a config.json states; None where it does not, or not clearly."""
    part = [config, *_parts(config)][-1]
    counts = {part[name] for name in COUNTS if isinstance(part.get(name), int)}
    limits = (part[name] for name in POSITIONS if isinstance(part.get(name), int))
    return counts.pop() if len(counts) == 1 else None, next(limits, None)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _known(key: str) -> set[str]:
    """Number formats that torch has, or implementations that transformers has; others it would fetch and run."""
    if "dtype" in key:
        import torch

        known = {one for one, it in vars(torch).items() if isinstance(it, torch.dtype) and it.is_floating_point}
        return known | {f"torch.{one}" for one in known}
    if "attn" in key:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS
    else:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as FUNCTIONS
    return {"eager", *FUNCTIONS.valid_keys()}


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
            words = f"{name} names the shard {shard!r}, which lies outside the model folder"
            raise ModelError(words, "do not use this checkpoint, or correct the index by hand if you made it")
    return shards


def _wrong(name: str, key: str, value: Any, allowed: str) -> ModelError:
    got = repr(value)
    got = got if len(got) <= 60 else f"{got[:57]}..."
    return ModelError(f"{name} has {key} {got}; allowed: {allowed}", "use the model's own config.json; fetch it again")


# --- for older loaders ----------------------------------------------------------------------------------------------

# transformers 5 writes `rope_parameters`, `dtype` and the tokenizer class `TokenizersBackend`. transformers 4, mlx-lm
# and OpenVINO's exporter read `rope_theta`, `torch_dtype` and `PreTrainedTokenizerFast`, and take their defaults where
# these are missing: silently another model. So every folder that layercut writes holds both. Which old names a config
# has, the class in transformers 5 tells itself: only those are written from which alone it reads the same.

NEW_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}
"""Tokenizer classes of no model in particular, by their names in transformers 5, and those in 4; 5 reads both."""
TEXT_PARTS = ("text", "llm", "language", "decoder", "thinker")
"""What the keys of nested configs of text models have in them."""
BASES = {"rope_theta", "rotary_emb_base", "global_rope_theta"}  # old names of the base of rotary positions
PERIODS = {
    "gemma3_text": ("sliding_window_pattern", 6), "cohere2": ("sliding_window_pattern", 4),
    "qwen3_next": ("full_attention_interval", 4), "qwen3_5_text": ("full_attention_interval", 4),
}  # fmt: skip
"""Model types whose configs had a period in the place of `layer_types`: its key, and their class's default."""


def add_older_names_(folder: Path) -> None:
    """Write them into the config.json and the tokenizer_config.json of a checkpoint folder."""
    for name, change in (("config.json", with_older_names), ("tokenizer_config.json", older_tokenizer)):
        content = read_json(folder / name) if (folder / name).is_file() else None
        if isinstance(content, dict) and (changed := change(content)) != content:
            with write_atomically(folder / name) as partial:
                partial.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says the same, to older loaders too; what no old name can say is left out (`unsaid`).

    By `rope_theta`, `rope_scaling`, …, by `torch_dtype`, and by `sliding_window_pattern` or `full_attention_interval`
    where one period says which layers attend to everything.
    """
    new = copy.deepcopy(config)
    for part in _parts(new):
        if isinstance(part.get("dtype"), str):
            part.setdefault("torch_dtype", part["dtype"])
        part.update(_rope_in_old_names(part) or {})
        key = PERIODS.get(part.get("model_type", ""), ("", 0))[0]
        period = period_of(part.get("model_type"), part.get("layer_types"), part.get(key))
        if period is not None:
            part[key] = period
    return new


def unsaid(config: dict[str, Any]) -> list[str]:
    """Keys of a config.json that older loaders do not read and no old name says; they need transformers 5."""
    return ["rope_parameters"] if any(_rope_in_old_names(part) is None for part in _parts(config)) else []


def older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json whose class and lists of tokens transformers 4 knows too.

    Without what transformers 5 says of how the tokenizer was loaded on this machine.
    """
    new = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if (name := config.get("tokenizer_class")) in NEW_CLASSES:
        new["tokenizer_class"] = NEW_CLASSES[name]
    if isinstance(extra := config.get("extra_special_tokens"), list):  # in 4 this is a dict of named tokens
        del new["extra_special_tokens"]
        new.setdefault("additional_special_tokens", extra)
    return new


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and those nested in it that describe text models; those of vision have no old names."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value and any(word in key for word in TEXT_PARTS):
            yield from _parts(value)


def period_of(model_type: str | None, kinds: Sequence[str] | None, given: Any = None) -> int | None:
    """The number by which mlx-lm and older configs say which layers attend to everything: the last of every so many."""
    usual = PERIODS.get(model_type or "", ("", None))[1]
    known = {"sliding_attention", "linear_attention", "full_attention"}
    if usual is None or not isinstance(kinds, list) or not {*kinds} <= known:
        return None
    periods = (given if isinstance(given, int) and given > 0 else usual, usual, *range(1, len(kinds) + 1))
    full = [kind == "full_attention" for kind in kinds]
    return next((p for p in periods if full == [(i + 1) % p == 0 for i in range(len(kinds))]), None)


def _rope_in_old_names(part: dict[str, Any]) -> dict[str, Any] | None:
    """The old names that say a part's `rope_parameters`; {}: there is nothing to say; None: none do.

    They count where the part's class reads the same from them without `rope_parameters`, and from both.
    """
    from transformers import CONFIG_MAPPING

    wanted = part.get("rope_parameters")
    if not isinstance(wanted, dict) or not wanted or part.get("model_type") not in CONFIG_MAPPING:
        return {}
    cls = CONFIG_MAPPING[part["model_type"]]
    read = _rope_read(cls, part)
    as_it_is: list[dict[str, Any]] = [{}] if BASES & part.keys() else []
    for names in (*as_it_is, *_candidates(wanted)):
        both = part | names
        alone = {key: value for key, value in both.items() if key != "rope_parameters"}
        if read == _rope_read(cls, alone) == _rope_read(cls, both):
            return names
    return None


def _candidates(rope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`rope_parameters` under the names that older configs had, most common first."""
    if not all(isinstance(value, dict) for value in rope.values()):
        theta, share, scaling = _in_three(rope)
        yield {"rope_theta": theta} | share | scaling
        yield {"rotary_emb_base": theta, "rotary_pct": rope.get("partial_rotary_factor", 1.0)} | scaling  # GPT-NeoX
    elif (whole := rope.get("full_attention")) and (local := rope.get("sliding_attention")):
        theta, share, scaling = _in_three(whole)
        base = local.get("rope_theta")
        if base == theta:
            yield {"rope_theta": theta} | share | scaling  # OLMo 3
        if base is not None:
            yield {"rope_theta": theta, "rope_local_base_freq": base} | share | scaling  # Gemma 3
            yield {"global_rope_theta": theta, "local_rope_theta": base} | share | scaling  # ModernBERT


def _in_three(rope: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The base, and what is said by the keys `partial_rotary_factor` and `rope_scaling`, where there is something."""
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    kind, part = rest.get("type", rest.get("rope_type", "default")), rope.get("partial_rotary_factor", 1.0)
    if "type" in rest:  # as the source had it; some classes of transformers 4 count the keys
        rest.pop("rope_type", None)
    if kind == "longrope":
        rest.pop("original_max_position_embeddings", None)  # stands beside it
    scaled = kind != "default" or rest.keys() - {"rope_type", "type"}
    share = {"partial_rotary_factor": part} if part != 1.0 else {}
    return rope.get("rope_theta"), share, {"rope_scaling": rest} if scaled else {}


def _rope_read(cls: Any, config: dict[str, Any]) -> Any:
    """What a class makes of the rotary positions in a config.json, without what repeats or is the default."""
    try:
        found = cls.from_dict(copy.deepcopy(config)).rope_parameters
    except Exception:  # classes refuse values by many kinds of errors
        return None
    if not isinstance(found, dict):
        return found
    parts = {key: value for key, value in found.items() if isinstance(value, dict)} or {"": found}
    usual = {"partial_rotary_factor": 1.0}
    return {part: {k: v for k, v in rope.items() if k != "type" and usual.get(k) != v} for part, rope in parts.items()}
