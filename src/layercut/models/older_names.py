"""config.json and tokenizer_config.json as loaders older than transformers 5 read them, beside what is there.

transformers 5 writes `rope_parameters`, `dtype` and the tokenizer class `TokenizersBackend`. transformers 4, mlx-lm and
OpenVINO's exporter read `rope_theta`, `torch_dtype` and `PreTrainedTokenizerFast`, and take their defaults where these
are missing: silently another model. So every folder that layercut writes holds both, last of all
(`surgery/checkpoint_cut.py`, `export/checkpoint.py`). Which old names a config has, the class in transformers 5 tells
itself: only those are written from which alone it reads the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layercut.files.reading import read_json
from layercut.files.writing import write_atomically

NEW_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}
"""Tokenizer classes of no model in particular, by their names in transformers 5, and those in 4; 5 reads both."""
TEXT_PARTS = ("text", "llm", "language", "decoder", "thinker")
"""What the keys of nested configs of text models have in them."""
BASES = {"rope_theta", "rotary_emb_base", "global_rope_theta"}
"""Old names of the base of rotary positions."""
PERIODS = {
    "gemma3_text": ("sliding_window_pattern", 6), "cohere2": ("sliding_window_pattern", 4),
    "qwen3_next": ("full_attention_interval", 4), "qwen3_5_text": ("full_attention_interval", 4),
}  # fmt: skip
"""Model types whose configs had a period in the place of `layer_types`: its key, and their class's default."""
MACHINES_OWN = ("is_local", "local_files_only")
"""What transformers 5 writes into tokenizer_config.json about how the tokenizer was loaded."""


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says the same, to older loaders too.

    By `rope_theta`, `rope_scaling`, …, by `torch_dtype`, and by `sliding_window_pattern` or `full_attention_interval`
    where one period says which layers attend to everything.

    The argument is left as it is. What no old name can say is left out: see `unsaid`.
    """
    new = copy.deepcopy(config)
    for part in _parts(new):
        if isinstance(part.get("dtype"), str):
            part.setdefault("torch_dtype", part["dtype"])
        for key, value in (_rope_in_old_names(part) or {}).items():
            part[key] = value
        key = PERIODS.get(part.get("model_type", ""), ("", 0))[0]
        period = period_of(part.get("model_type"), part.get("layer_types"), part.get(key))
        if period is not None:
            part[key] = period
    return new


def unsaid(config: dict[str, Any]) -> list[str]:
    """Keys of a config.json that older loaders do not read and no old name says; they need transformers 5."""
    return ["rope_parameters"] if any(_rope_in_old_names(part) is None for part in _parts(config)) else []


def add_older_names_(folder: Path) -> None:
    """Write them into the config.json and the tokenizer_config.json of a checkpoint folder."""
    for name, change in (("config.json", with_older_names), ("tokenizer_config.json", older_tokenizer)):
        content = read_json(folder / name) if (folder / name).is_file() else None
        if isinstance(content, dict) and (changed := change(content)) != content:
            with write_atomically(folder / name) as partial:
                partial.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json whose class and lists of tokens transformers 4 knows too."""
    new = {key: value for key, value in config.items() if key not in MACHINES_OWN}
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
    tried = (given if isinstance(given, int) and given > 0 else usual, usual, *range(1, len(kinds) + 1))
    full = [kind == "full_attention" for kind in kinds]
    return next((p for p in tried if full == [(i + 1) % p == 0 for i in range(len(kinds))]), None)


def _rope_in_old_names(part: dict[str, Any]) -> dict[str, Any] | None:
    """The old names that say a part's `rope_parameters`; {}: there is nothing to say; None: none do.

    Tried are the names that model types have used. They count where the part's class reads the same from them without
    `rope_parameters`, and from both.
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
    kind = rest.get("type", rest.get("rope_type", "default"))
    if "type" in rest:  # as the source had it; some classes of transformers 4 count the keys
        rest.pop("rope_type", None)
    if kind == "longrope":
        rest.pop("original_max_position_embeddings", None)  # stands beside it
    part = rope.get("partial_rotary_factor", 1.0)
    scaled = kind != "default" or rest.keys() - {"rope_type", "type"}
    return (
        rope.get("rope_theta"),
        {"partial_rotary_factor": part} if part != 1.0 else {},
        {"rope_scaling": rest} if scaled else {},
    )


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
    return {
        part: {k: v for k, v in rope.items() if k != "type" and usual.get(k) != v} for part, rope in parts.items()
    }
