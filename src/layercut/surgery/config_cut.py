"""What a config says about single layers, and how to say it about the layers that stay.

First step of surgery. Configs describe their layers in four ways, and each is cut differently:

    lists by layer     layer_types = ["sliding_attention", "full_attention", ...]    slice
    lists of indices   mlp_only_layers = [0, 3]                                      re-map
    dicts by layer     per_layer_config = {"3": {...}}                               re-map the keys
    rules              first_k_dense_replace = 3, attn_layer_period = 8, ...         count, solve or spell out

`cut_config` is a pure function. It refuses what the architecture cannot express, and it checks its own work:
the new config is written to JSON, read back as a loader would, and every per-layer fact compared with the old
one's.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layercut.errors import SurgeryError

COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "decoder_layers",
    "num_decoder_layers",
    "layers",
)
"""Names under which configs count their decoder layers."""

BY_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "indexer_types",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "intermediate_size",  # Gemma 3n: a list
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "compress_ratios",
    "hybrid_layer_pattern",
    "moe_layer_freq",
    "layers_num_experts",
)
"""One value per layer: sliced. Some classes derive a few of them from rules; then they serve as a check."""

LETTERS = "hybrid_override_pattern"
"""A letter per layer, in one word: Nemotron-H's name of its `layers_block_type`."""

INDICES = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "rope_scaling_layers",
    "no_rope_layer_indices",
)
"""Lists of 0-based layer indices: re-mapped."""

INDICES_FROM_ONE = ("ple_layer_ids",)
"""Lists of 1-based layer indices."""

COUNTED_FROM_FRONT = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers")
"""Rules of the form "the first k layers are ..."."""

COUNTED_FROM_BACK = ("num_kv_shared_layers",)
"""Rules of the form "the last k layers are ..."."""

NOT_BY_LAYER = frozenset(
    {
        "architectures", "original_layer_index", "block_types", "attention_types", "mtp_layer_types",
        "mtp_mlp_layer_types", "mtp_layers_block_type", "mtp_local_layer_ids", "ssm_multipliers",
        "mlp_multipliers", "time_step_limit", "axial_pos_shape", "axial_pos_embds_dim",
        "begin_suppress_tokens", "suppress_tokens", "eos_token_id", "bos_token_id", "languages",
        "relative_bias_args", "encoder_hash_byte_group_size", "L_bp_cycles",
        "keys_to_ignore_at_inference", "deepstack_visual_indexes", "moe_intermediate_size",
        "moe_num_experts", "freeze_text_module_exceptions", "freeze_vision_module_exceptions", "cycles",
        "ngram_vocab_size", "kv_source_layers", "attn_hash_chunk_lengths", "attention_chunk_sizes",
        "mrope_section", "deepstack_layer_map", "spatial_target_layers", "vision_feature_layer",
    }
)  # fmt: skip
"""Lists that may happen to be as long as the stack without being about its layers."""


def parts(config: Any) -> list[Any]:
    """A config and those nested in it, outermost first."""
    nested = [part for value in vars(config).values() if hasattr(value, "to_dict") for part in parts(value)]
    return [config, *nested]


def count_names(text_config: Any, layers: int) -> list[str]:
    """The attributes that count the decoder layers and would have to change with them."""
    stored = vars(text_config)
    return [name for name in COUNTS if isinstance(stored.get(name), int) and stored[name] == layers]


def facts_by_layer(text_config: Any, layers: int) -> dict[str, list[Any]]:
    """Every list with one value per layer that the config holds or derives."""
    found = {}
    for name in BY_LAYER:
        value = getattr(text_config, name, None)
        if isinstance(value, list | tuple) and len(value) == layers:
            found[name] = list(value)
    return found


def cut_config(config: Any, text_config: Any, kept: Sequence[int], layers: int) -> Any:
    """The config of the model that keeps only some layers; the argument is left as it is."""
    memo: dict[int, Any] = {}
    new = copy.deepcopy(config, memo)
    text: Any = memo.get(id(text_config), new)
    _refuse_unknown_lists(text, layers)
    for rule in (_cut_lists, _cut_indices, _cut_dicts, _cut_counted, *SPECIAL_RULES):
        rule(text, kept, layers)
    _set_counts(text, text_config, kept, layers)
    new.original_layer_index = original_layer_index(config, kept, layers)
    _check(new, text, text_config, kept, layers)
    return new


def original_layer_index(config: Any, kept: Sequence[int], layers: int) -> list[int]:
    """Where the kept layers stood in the model this one was cut from, through all earlier cuts."""
    before = getattr(config, "original_layer_index", None)
    if before and len(before) != layers:
        raise SurgeryError(
            f"the config's original_layer_index is of {len(before)} layers, and the model has {layers}",
            "take original_layer_index out of config.json: it is not of this model",
        )
    return [before[i] for i in kept] if before else list(kept)


def cut_value(name: str, value: Any, kept: Sequence[int], layers: int) -> Any:
    """A value of a config.json after the cut, by its name alone."""
    if name in COUNTS and value == layers:
        return len(kept)
    if name in COUNTED_FROM_FRONT and isinstance(value, int) and 0 <= value < layers:
        return sum(i < value for i in kept)
    if name in (*BY_LAYER, LETTERS) and isinstance(value, list | str) and len(value) == layers:
        left = [value[i] for i in kept]
        return left if isinstance(value, list) else "".join(left)
    return value


# --- the general kinds ----------------------------------------------------------------------------


def _refuse_unknown_lists(text: Any, layers: int) -> None:
    known = {*BY_LAYER, *INDICES, *INDICES_FROM_ONE, *NOT_BY_LAYER}
    for name, value in vars(text).items():
        if name.startswith("_") or name in known or not isinstance(value, list | tuple):
            continue
        if len(value) == layers and layers > 4:  # shorter lists are as long as the stack by chance too often
            raise SurgeryError(
                f"the config's {name!r} holds {layers} values, perhaps one per layer, unknown to layercut",
                "report this model type: layercut has to know such a list before it can cut it",
            )


def _cut_lists(text: Any, kept: Sequence[int], layers: int) -> None:
    for name, values in facts_by_layer(text, layers).items():
        if name in vars(text):  # else derived from a rule by a property
            _set(text, name, [values[i] for i in kept])


def _cut_indices(text: Any, kept: Sequence[int], layers: int) -> None:
    place = {old: new for new, old in enumerate(kept)}
    for names, base in ((INDICES, 0), (INDICES_FROM_ONE, 1)):
        for name in names:
            value = vars(text).get(name)
            if isinstance(value, list | tuple):
                _set(text, name, [place[i - base] + base for i in value if i - base in place])


def _cut_dicts(text: Any, kept: Sequence[int], layers: int) -> None:
    """transformers keeps `per_layer_config` in a private spec, whose keys are layer indices."""
    spec = vars(text).get("_heterogeneity_spec")
    if spec is not None:
        place = {old: new for new, old in enumerate(kept)}
        overrides = spec.per_layer_overrides
        spec.per_layer_overrides = {place[i]: facts for i, facts in overrides.items() if i in place}


def _cut_counted(text: Any, kept: Sequence[int], layers: int) -> None:
    stored = vars(text)
    for name in COUNTED_FROM_FRONT:
        if isinstance(stored.get(name), int) and 0 <= stored[name] < layers:
            _set(text, name, sum(i < stored[name] for i in kept))
    for name in COUNTED_FROM_BACK:
        if isinstance(stored.get(name), int):
            _set(text, name, sum(i >= layers - stored[name] for i in kept))


def _set_counts(text: Any, old: Any, kept: Sequence[int], layers: int) -> None:
    for name in count_names(old, layers):
        _set(text, name, len(kept))


def _set(text: Any, name: str, value: Any) -> None:
    """Set a stored attribute past the class's validation, which may compare it with others not yet cut."""
    vars(text)[name] = value


# --- rules of single architectures ----------------------------------------------------------------


def _decoder_sparse_step(text: Any, kept: Sequence[int], layers: int) -> None:
    """Qwen-MoE: layer i is sparse where (i + 1) % step == 0. Spelled out in `mlp_only_layers`, with step 1."""
    step = vars(text).get("decoder_sparse_step")
    if isinstance(step, int) and step > 1 and "mlp_only_layers" in vars(text):
        dense = {new for new, old in enumerate(kept) if (old + 1) % step}
        _set(text, "mlp_only_layers", sorted(dense | set(text.mlp_only_layers)))
        _set(text, "decoder_sparse_step", 1)


def _period_and_offset(text: Any, kept: Sequence[int], layers: int) -> None:
    """Jamba: layer i has attention (experts) where i % period == offset. Find another pair that fits."""
    if "layers_block_type" in vars(text):
        return  # Zamba spells the list out
    for kind in ("attn", "expert"):
        period, offset = f"{kind}_layer_period", f"{kind}_layer_offset"
        if not {period, offset} <= vars(text).keys():
            continue
        wanted = [i % vars(text)[period] == vars(text)[offset] for i in kept]
        found = solve_period(wanted, vars(text)[period])
        if found is None:
            what = "attention" if kind == "attn" else "expert"
            where = [new for new, hit in enumerate(wanted) if hit]
            raise SurgeryError(
                f"the config places {what} layers by one period and offset, and none fits "
                f"the layers that stay (their {what} layers would be {where} of {len(kept)})"
            )
        _set(text, period, found[0])
        _set(text, offset, found[1])


def solve_period(wanted: Sequence[bool], period: int) -> tuple[int, int] | None:
    """(period, offset) with wanted[i] == (i % period == offset) for all i, nearest to the old period."""
    fits = [
        (p, o)
        for p in range(1, max(len(wanted), period) + 2)
        for o in range(p)
        if all(hit == (i % p == o) for i, hit in enumerate(wanted))
    ]
    return min(fits, key=lambda pair: (abs(pair[0] - period), pair[1]), default=None)


def _moe_interval(text: Any, kept: Sequence[int], layers: int) -> None:
    """Ernie 4.5: layer i is sparse where (i + 1) % interval == 0 and start <= i <= end."""
    names = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")
    values = [vars(text).get(name) for name in names]
    if not all(isinstance(value, int) for value in values):
        return
    interval, start, end = values
    wanted = [(i + 1) % interval == 0 and start <= i <= end for i in kept]
    hits = [i for i, hit in enumerate(wanted) if hit]
    for every in sorted(range(1, len(kept) + 2), key=lambda n: abs(n - interval)):
        first, last = (hits[0], hits[-1]) if hits else (len(kept), len(kept))
        if wanted == [(i + 1) % every == 0 and first <= i <= last for i in range(len(kept))]:
            for name, value in zip(names, (every, first, last), strict=True):
                _set(text, name, value)
            return
    raise SurgeryError(
        f"the config places expert layers by one interval, and none fits the layers that stay ({hits} of {len(kept)})"
    )


def _spelled_out(text: Any, kept: Sequence[int], layers: int) -> None:
    """Short patterns that the class repeats; both classes accept one as long as the stack."""
    if isinstance(blocks := vars(text).get("block_types"), list | tuple):  # RecurrentGemma
        _set(text, "block_types", [blocks[i % len(blocks)] for i in kept])
    if isinstance(vars(text).get("attention_types"), list | tuple):  # GPT-Neo; attention_layers is cut by now
        _set(text, "attention_types", [[[kind], 1] for kind in text.attention_layers])


def _sections(text: Any, kept: Sequence[int], layers: int) -> None:
    """Dory: an input, a recurrent and an output section, each counted."""
    if not {"n_input_layers", "n_recurrent_layers", "n_output_layers"} <= vars(text).keys():
        return
    first, last = text.n_input_layers, layers - text.n_output_layers
    _set(text, "n_input_layers", sum(i < first for i in kept))
    _set(text, "n_recurrent_layers", sum(first <= i < last for i in kept))
    _set(text, "n_output_layers", sum(i >= last for i in kept))


def _scale_depth(text: Any, kept: Sequence[int], layers: int) -> None:
    """MiniCPM3 multiplies residuals by scale_depth / sqrt(layers), a product that must stay the same to the bit."""
    scale = vars(text).get("scale_depth")
    if not isinstance(scale, int | float):
        return
    wanted = scale / math.sqrt(layers)
    guess = wanted * math.sqrt(len(kept))
    for value in (
        guess,
        math.nextafter(guess, 0),
        math.nextafter(guess, math.inf),
        scale * math.sqrt(len(kept) / layers),
    ):
        if value / math.sqrt(len(kept)) == wanted:
            guess = value
            break
    _set(text, "scale_depth", guess)


def _kv_sources(text: Any, kept: Sequence[int], layers: int) -> None:
    """Mistral Large 4: for each layer, the layer whose keys and values it uses."""
    sources = vars(text).get("kv_source_layers")
    if not isinstance(sources, list | tuple) or len(sources) != layers:
        return
    place = {old: new for new, old in enumerate(kept)}
    for i in kept:
        if sources[i] not in place:
            raise SurgeryError(f"layer {i} reuses the keys and values of layer {sources[i]}, which would be removed")
    _set(text, "kv_source_layers", [place[sources[i]] for i in kept])


def _no_multi_token_prediction(text: Any, kept: Sequence[int], layers: int) -> None:
    """Remove multi-token-prediction blocks, which loaders ignore by their fixed number behind the last layer."""
    if vars(text).get("num_nextn_predict_layers"):
        _set(text, "num_nextn_predict_layers", 0)


SPECIAL_RULES: tuple[Callable[[Any, Sequence[int], int], None], ...] = (
    _decoder_sparse_step,
    _period_and_offset,
    _moe_interval,
    _spelled_out,
    _sections,
    _scale_depth,
    _kv_sources,
    _no_multi_token_prediction,
)


# --- the check ------------------------------------------------------------------------------------


def reread(config: Any) -> Any:
    """The config as a loader would see it after `save_pretrained`."""
    return read_as(type(config), config.to_json_string(use_diff=True))


def read_as(cls: type, text: str) -> Any:
    """A config class's reading of a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(text, encoding="utf-8")
        try:
            return cls.from_json_file(file)  # type: ignore[attr-defined]
        except Exception as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise SurgeryError(f"{cls.__name__} does not accept the layers that would stay: {last.strip()}") from error


def _check(new: Any, text: Any, old_text: Any, kept: Sequence[int], layers: int) -> None:
    """What a loader will read must say of every kept layer what the old config said of it."""
    loaded = reread(new)
    loaded_text = loaded if new is text else loaded.get_text_config(decoder=True)
    for facts in (loaded_text, text):
        for name, values in facts_by_layer(old_text, layers).items():
            got = getattr(facts, name, None)
            if (wanted := [values[i] for i in kept]) != (None if got is None else list(got)):
                at = next((i for i, (a, b) in enumerate(zip(wanted, got or [], strict=False)) if a != b), None)
                where = (
                    f": layer {kept[at]} is {wanted[at]!r} and would become {got[at]!r}"
                    if at is not None and got
                    else ""
                )
                raise SurgeryError(f"{type(text).__name__} cannot hold {name!r} of the layers that stay{where}")
