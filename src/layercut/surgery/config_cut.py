"""What a config says about single layers, and how to say it about the layers that stay.

First step of surgery. Configs describe their layers in four ways, and each is cut differently:

    lists by layer     layer_types = ["sliding_attention", "full_attention", ...]    slice
    lists of indices   mlp_only_layers = [0, 3]                                      re-map
    dicts by layer     per_layer_config = {"3": {...}}                               re-map the keys
    rules              first_k_dense_replace = 3, attn_layer_period = 8, ...         count, solve or spell out

`cut_config` refuses what the architecture cannot express, and checks its own work: the new config is written to JSON,
read back as a loader would, and every per-layer fact compared with the old one's. What layers differ in by position
without any config saying so is at the end: `refuse` what would run wrong, `explain_` what weights have to become.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layercut.errors import SurgeryError
from layercut.models.config_files import COUNTS
from layercut.models.decoder_stack import OTHER_TOWERS

if TYPE_CHECKING:
    from layercut.surgery.cut_plan import CutPlan, Difference, Edit, Read

BY_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta", "indexer_types",
    "num_attention_heads_per_layer", "num_key_value_heads_per_layer",
    "intermediate_size",  # Gemma 3n: a list
    "activation_sparsity_pattern", "attention_layers", "attn_layers", "compress_ratios", "hybrid_layer_pattern",
    "moe_layer_freq", "layers_num_experts",
)  # fmt: skip
"""One value per layer: sliced. Some classes derive a few of them from rules; then they serve as a check."""
LETTERS = "hybrid_override_pattern"  # a letter per layer, in one word: Nemotron-H's name of its `layers_block_type`
INDICES = (
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs",
    "hybrid_layer_ids", "local_layer_ids", "rope_scaling_layers", "no_rope_layer_indices",
)  # fmt: skip
"""Lists of 0-based layer indices: re-mapped."""
INDICES_FROM_ONE = ("ple_layer_ids",)  # lists of 1-based layer indices
COUNTED_FROM_FRONT = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers")
"""Rules of the form "the first k layers are ..."."""
COUNTED_FROM_BACK = ("num_kv_shared_layers",)  # rules of the form "the last k layers are ..."
NOT_BY_LAYER = (
    "architectures", "original_layer_index", "block_types", "attention_types", "mtp_layer_types",
    "mtp_mlp_layer_types", "mtp_layers_block_type", "mtp_local_layer_ids", "ssm_multipliers",
    "mlp_multipliers", "time_step_limit", "axial_pos_shape", "axial_pos_embds_dim",
    "begin_suppress_tokens", "suppress_tokens", "eos_token_id", "bos_token_id", "languages",
    "relative_bias_args", "encoder_hash_byte_group_size", "L_bp_cycles",
    "keys_to_ignore_at_inference", "deepstack_visual_indexes", "moe_intermediate_size",
    "moe_num_experts", "freeze_text_module_exceptions", "freeze_vision_module_exceptions", "cycles",
    "ngram_vocab_size", "kv_source_layers", "attn_hash_chunk_lengths", "attention_chunk_sizes",
    "mrope_section", "deepstack_layer_map", "spatial_target_layers", "vision_feature_layer",
)  # fmt: skip
"""Lists that may happen to be as long as the stack without being about its layers."""


def cut_config(config: Any, text_config: Any, kept: Sequence[int], layers: int) -> Any:
    """The config of the model that keeps only some layers; the argument is left as it is."""
    memo: dict[int, Any] = {}
    new = copy.deepcopy(config, memo)
    text: Any = memo.get(id(text_config), new)
    facts = vars(text)  # written to past the class's validation, which may compare a value with others not yet cut
    for name, value in facts.items():
        known = name.startswith("_") or name in {*BY_LAYER, *INDICES, *INDICES_FROM_ONE, *NOT_BY_LAYER}
        # shorter lists are as long as the stack by chance too often
        if not known and isinstance(value, list | tuple) and len(value) == layers > 4:
            words = f"the config's {name!r} holds {layers} values, perhaps one per layer, unknown to layercut"
            raise SurgeryError(words, "report this model type: layercut has to know such a list before it can cut it")
    place = {old: new for new, old in enumerate(kept)}
    for name, values in _facts_by_layer(text, layers).items():
        if name in facts:  # else derived from a rule by a property
            facts[name] = [values[i] for i in kept]
    for names, base in ((INDICES, 0), (INDICES_FROM_ONE, 1)):
        for name in names:
            if isinstance(value := facts.get(name), list | tuple):
                facts[name] = [place[i - base] + base for i in value if i - base in place]
    if (spec := facts.get("_heterogeneity_spec")) is not None:  # where transformers keeps `per_layer_config`
        overrides = spec.per_layer_overrides
        spec.per_layer_overrides = {place[i]: one for i, one in overrides.items() if i in place}
    for name in COUNTED_FROM_FRONT:
        if isinstance(count := facts.get(name), int) and 0 <= count < layers:
            facts[name] = sum(i < count for i in kept)
    for name in COUNTED_FROM_BACK:
        if isinstance(count := facts.get(name), int):
            facts[name] = sum(i >= layers - count for i in kept)
    _cut_rules_(facts, kept, layers)
    for name in COUNTS:
        if isinstance(count := vars(text_config).get(name), int) and count == layers:
            facts[name] = len(kept)
    before = getattr(config, "original_layer_index", None)
    if before and len(before) != layers:
        words = f"the config's original_layer_index is of {len(before)} layers, and the model has {layers}"
        raise SurgeryError(words, "take original_layer_index out of config.json: it is not of this model")
    new.original_layer_index = [before[i] for i in kept] if before else list(kept)
    _check(new, text, text_config, kept, layers)
    return new


def _facts_by_layer(text_config: Any, layers: int) -> dict[str, list[Any]]:
    """Every list with one value per layer that the config holds or derives."""
    found = {name: getattr(text_config, name, None) for name in BY_LAYER}
    return {n: list(value) for n, value in found.items() if isinstance(value, list | tuple) and len(value) == layers}


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


# --- rules of single architectures ---


def _cut_rules_(facts: dict[str, Any], kept: Sequence[int], layers: int) -> None:
    """Count again, solve or spell out the rules by which the text config's attributes place layers of a kind."""
    place = {old: new for new, old in enumerate(kept)}
    # Qwen-MoE: layer i is sparse where (i + 1) % step == 0. Spelled out in `mlp_only_layers`, with step 1
    step = facts.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1 and "mlp_only_layers" in facts:
        dense = {new for new, old in enumerate(kept) if (old + 1) % step}
        facts |= {"mlp_only_layers": sorted(dense | set(facts["mlp_only_layers"])), "decoder_sparse_step": 1}
    # Jamba: layer i has attention (experts) where i % period == offset: the pair nearest to the old period that fits
    for kind, what in (("attn", "attention"), ("expert", "expert")):
        period_name, offset_name = f"{kind}_layer_period", f"{kind}_layer_offset"
        if "layers_block_type" in facts or not {period_name, offset_name} <= facts.keys():
            continue  # Zamba spells the list out
        period, offset = facts[period_name], facts[offset_name]
        wanted = [i % period == offset for i in kept]
        pairs = [(p, o) for p in range(1, max(len(wanted), period) + 2) for o in range(p)]
        fits = [(abs(p - period), o, p) for p, o in pairs if wanted == [i % p == o for i in range(len(wanted))]]
        if not fits:
            where = [new for new, hit in enumerate(wanted) if hit]
            raise SurgeryError(
                f"the config places {what} layers by one period and offset, and none fits "
                f"the layers that stay (their {what} layers would be {where} of {len(kept)})"
            )
        _, facts[offset_name], facts[period_name] = min(fits)
    # Ernie 4.5: layer i is sparse where (i + 1) % interval == 0 and start <= i <= end
    names = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")
    if all(isinstance(facts.get(name), int) for name in names):
        interval, start, end = (facts[name] for name in names)
        wanted = [(i + 1) % interval == 0 and start <= i <= end for i in kept]
        hits = [i for i, hit in enumerate(wanted) if hit]
        first, last = (hits[0], hits[-1]) if hits else (len(kept), len(kept))
        for every in sorted(range(1, len(kept) + 2), key=lambda n: abs(n - interval)):
            if wanted == [(i + 1) % every == 0 and first <= i <= last for i in range(len(kept))]:
                facts |= zip(names, (every, first, last), strict=True)
                break
        else:
            raise SurgeryError(
                "the config places expert layers by one interval, and none fits the layers that stay "
                f"({hits} of {len(kept)})"
            )
    # short patterns that the class repeats; both classes accept one as long as the stack
    if isinstance(blocks := facts.get("block_types"), list | tuple):  # RecurrentGemma
        facts["block_types"] = [blocks[i % len(blocks)] for i in kept]
    if isinstance(facts.get("attention_types"), list | tuple):  # GPT-Neo; attention_layers is cut by now
        facts["attention_types"] = [[[kind], 1] for kind in facts["attention_layers"]]
    # Dory: an input, a recurrent and an output section, each counted
    names = ("n_input_layers", "n_recurrent_layers", "n_output_layers")
    if {*names} <= facts.keys():
        first, last = facts["n_input_layers"], layers - facts["n_output_layers"]
        inside = [0 if i < first else 1 if i < last else 2 for i in kept]
        facts |= {name: inside.count(section) for section, name in enumerate(names)}
    # MiniCPM3 multiplies residuals by scale_depth / sqrt(layers), a product that must stay the same to the bit
    scale = facts.get("scale_depth")
    if isinstance(scale, int | float):
        product = scale / math.sqrt(layers)
        guess = product * math.sqrt(len(kept))
        near = (math.nextafter(guess, 0), math.nextafter(guess, math.inf), scale * math.sqrt(len(kept) / layers))
        exact = (value for value in (guess, *near) if value / math.sqrt(len(kept)) == product)
        facts["scale_depth"] = next(exact, guess)
    # Mistral Large 4: for each layer, the layer whose keys and values it uses
    sources = facts.get("kv_source_layers")
    if isinstance(sources, list | tuple) and len(sources) == layers:
        for i in kept:
            if sources[i] not in place:
                why = f"layer {i} reuses the keys and values of layer {sources[i]}, which would be removed"
                raise SurgeryError(why)
        facts["kv_source_layers"] = [place[sources[i]] for i in kept]
    # multi-token-prediction blocks, which loaders ignore by their fixed number behind the last layer, are removed
    if facts.get("num_nextn_predict_layers"):
        facts["num_nextn_predict_layers"] = 0


# --- the check ---


def reread(config: Any) -> Any:
    """The config as a loader would see it after `save_pretrained`."""
    return read_as(type(config), config.to_json_string(use_diff=True))


def read_as(cls: type, text: str) -> Any:
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
        for name, values in _facts_by_layer(old_text, layers).items():
            wanted, got = [values[i] for i in kept], getattr(facts, name, None)
            if got is not None and list(got) == wanted:
                continue
            pairs = enumerate(zip(wanted, got or [], strict=False))
            odd = next((f": layer {kept[i]} is {a!r} and would become {b!r}" for i, (a, b) in pairs if a != b), "")
            raise SurgeryError(f"{type(text).__name__} cannot hold {name!r} of the layers that stay{odd}")


# --- config.json ---


def config_json(raw: dict[str, Any], old: Any, plan: CutPlan) -> dict[str, Any]:
    """The config.json of the cut model: the source's, with what the cut changed.

    Facts that the source left to rules or defaults are written out. Where the patched file would not read as
    planned (an old rule in it wins over the new list), the whole config is written instead.
    """
    wanted = reread(plan.config).to_dict()
    if isinstance(quantized := raw.get("quantization_config"), dict):
        raw = raw | {"quantization_config": _renamed(quantized, plan)}
    patched = _patched(raw, old.to_dict(), json.loads(plan.config.to_json_string(use_diff=False)))
    _cut_unkept_(patched, old.to_dict(), plan)
    try:
        if read_as(type(old), json.dumps(patched)).to_dict() == wanted:
            return patched
    except SurgeryError:  # the class refuses the mixture of old and new facts
        pass
    whole = json.loads(plan.config.to_json_string(use_diff=True))
    for name in ("architectures", "model_type", "torch_dtype", "dtype", "quantization_config", "auto_map"):
        if name in raw:
            whole[name] = raw[name]
    return whole


def _patched(raw: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    result = dict(raw)
    old = json.loads(json.dumps(old, default=str))
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(raw.get(name), dict) and isinstance(old.get(name), dict):
            result[name] = _patched(raw[name], old[name], value)
        elif old.get(name) != value or name == "original_layer_index":
            result[name] = value
    for name in old.keys() - new.keys():
        result.pop(name, None)
    return result


def _cut_unkept_(patched: dict[str, Any], old: dict[str, Any], plan: CutPlan) -> None:
    """Cut what config.json says of the layers under names that the class reads and does not keep.

    Nemotron-H's `hybrid_override_pattern` is one. Other engines read them too.
    """
    for name in patched.keys() - old.keys():
        patched[name] = cut_value(name, patched[name], plan.kept, plan.layers)
    for name, value in patched.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            _cut_unkept_(value, old[name], plan)


def _renamed(value: Any, plan: CutPlan) -> Any:
    """A quantization config with the modules renumbered that it lists by name (`modules_to_not_convert`, `ignore`)."""
    if isinstance(value, dict):
        pairs = {_renamed(k, plan): _renamed(v, plan) for k, v in value.items()}
        return {k: v for k, v in pairs.items() if k is not None}
    if isinstance(value, list):
        return [new for item in value if (new := _renamed(item, plan)) is not None]
    if isinstance(value, str) and (found := re.search(r"(^|\.)(layers|h|blocks)\.(\d+)(?=\.|$)", value)):
        if any(tower in value[: found.start(3)] for tower in OTHER_TOWERS):
            return value  # of images or sound: its layers all stay
        old = int(found[3])
        if old not in plan.kept:
            return None
        return f"{value[: found.start(3)]}{plan.kept.index(old)}{value[found.end(3) :]}"
    if isinstance(value, str) and value.startswith(("re:", "+:", "-:")) and re.search(r"\d", value):
        words = f"the quantization config picks layers by the pattern {value!r}, which cannot be renumbered"
        raise SurgeryError(words, "cut first, then quantize")
    return value


# --- architectures whose layers differ by position in ways that no config states ---

ATTENTION_FREE_FAILS = frozenset({
    "bailing_hybrid", "bamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "recurrent_gemma", "zamba",
    "zamba2",
})  # fmt: skip
"""Hybrids whose cached generation asks an attention layer for the length so far, and raises where there is none."""
PACKED = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
"""Gemma 3n and 4: modules whose weight is packed by layer, and the dimension: [V, L * d] and [L * d, D]."""


def refuse(text_config: Any, kept: Sequence[int], layers: int) -> None:
    """Refuse, before anything is built, what is known to run wrong although a config can be written for it."""
    types: Any = getattr(text_config, "layer_types", None)
    model_type = getattr(text_config, "model_type", "")
    if model_type in ATTENTION_FREE_FAILS and types:
        others = ("linear_attention", "conv", "moe", "mlp", "mamba")
        attention = [i for i, kind in enumerate(types) if kind not in others]
        if attention and not set(attention) & set(kept):
            raise SurgeryError(
                f"no attention layer would be left (they are {attention}), and generation with a cache needs one"
            )
    if model_type == "minimax" and types and types[kept[0]] == "linear_attention":  # its cache counts tokens there
        raise SurgeryError(
            f"layer {kept[0]}, a linear attention layer, would come first, and cached generation fails then"
        )
    size = getattr(text_config, "n_layers_per_attn_res_block", None)  # Inkling 2 attends over sums of such blocks
    if size and math.ceil(len(kept) / size) != math.ceil(layers / size):
        raise SurgeryError(f"residuals attend over blocks of {size} layers, and there would be fewer blocks")
    indexers: Any = getattr(text_config, "indexer_types", None)
    modes: Any = getattr(text_config, "kv_sharing_modes", None)
    for i in kept if indexers and len(indexers) == layers else ():
        # GLM-MoE-DSA, HY-V4: a "shared" layer attends to the tokens that the last "full" one before it picked
        source = max((j for j in range(i + 1) if indexers[j] == "full"), default=i)
        if source not in kept:
            raise SurgeryError(f"layer {i} uses the tokens that layer {source}'s indexer picks, which would be removed")
    for i in kept if modes and types and len(modes) == layers else ():
        # Gemma 3n and 4: later layers reuse the keys and values of the last layer of their kind that stores them
        stored = [j for j in range(i) if modes[j] == "store" and types[j] == types[i]]
        if str(modes[i]).startswith("reuse") and stored and stored[-1] not in kept:
            raise SurgeryError(f"layer {i} reuses the keys and values of layer {stored[-1]}, which would be removed")


def explain_(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """Have the plan make up for a difference; False: it is not understood, and the cut is refused."""
    module, what, old, new = difference.module, difference.what, difference.old, difference.new
    leaf, model_type = module.rpartition(".")[2], text_config.model_type
    name = f"{module}.{what}"

    def edit_(name: str, edit: Edit) -> None:
        if (after := plan.rename(name)) is not None:
            plan.edits[after] = edit

    if leaf in PACKED and difference.is_tensor:

        def packed(read: Read) -> torch.Tensor:
            parts = read(name).chunk(plan.layers, PACKED[leaf])
            return torch.cat([parts[i] for i in plan.kept], PACKED[leaf])

        plan.edits[name] = packed
        return True
    # GPT-NeoX-Japanese: only the last layer has `dense_bias`; where it is called for, zeros are exact
    if model_type == "gpt_neox_japanese" and what == "dense_bias" and old is None and difference.is_tensor:
        plan.added[plan.rename(name) or ""] = new
        return True
    # Zaya: the first layer has no scale, since a router adds the previous layer's scores, scaled
    if model_type == "zaya" and what == "router_states_scale" and new is None:
        plan.dropped.add(plan.rename(name) or "")
        return True
    inverse = getattr(text_config, "scale_attn_by_inverse_layer_idx", False)
    if inverse and what == "scaling" and module.endswith(".attn"):
        # GPT-2 then divides scores by index + 1: multiplied into the queries
        queries = slice(0, text_config.hidden_size)
        for part, dim in (("weight", 1), ("bias", 0)):
            edit_(f"{module}.c_attn.{part}", _scaled(f"{module}.c_attn.{part}", old / new, queries, dim))
    elif what == "lambda_init":
        # DiffLlama: lambda = exp(q1 k1) - exp(q2 k2) + init(index), and the output is scaled by 1 - init(index).
        # With init' at the new index: q1' = q1 log(exp(q1 k1) + init - init') / (q1 k1), and o_proj takes
        # (1 - init) / (1 - init')
        def shifted(read: Read) -> torch.Tensor:
            q, k = read(f"{module}.lambda_q1"), read(f"{module}.lambda_k1").double()
            product = (q.double() @ k).item()
            inside = math.exp(product) + (old - new)
            if inside <= 0 or float(k @ k) == 0:
                why = "lambda_init cannot be folded into lambda_q1, whose lambda would be negative"
                raise SurgeryError(f"{module}: {why}")
            return (q.double() + k * ((math.log(inside) - product) / (k @ k))).to(q.dtype)

        edit_(f"{module}.lambda_q1", shifted)
        for part in ("weight", "bias"):
            if (weight := f"{module}.o_proj.{part}") in plan.before.state_dict():
                edit_(weight, _scaled(weight, (1 - old) / (1 - new)))
    elif not (
        leaf in PACKED
        or (model_type == "gpt_neox_japanese" and what == "use_bias" and (old, new) == (False, True))
        or (model_type == "zaya" and what == "use_eda" and (old, new) == (True, False))
        or _stores_for_others(difference, plan, text_config)
    ):
        return False
    plan.attributes.append((module, what, new))
    return True


def _stores_for_others(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """Gemma 3n and 4: whether another layer of a kind may store keys and values, as no kept layer of it reuses any.

    The last layer of each kind that computes its own keys and values stores them for those that reuse them.
    """
    modes, types = getattr(text_config, "kv_sharing_modes", None), getattr(text_config, "layer_types", None)
    if not modes or not types:
        return False
    reused = {types[i] for i in plan.kept if str(modes[i]).startswith("reuse")}
    at = plan.layer_in(difference.module)
    if at is not None and at[0] == plan.stacks[0]:
        return difference.what == "store_full_length_kv" and types[at[1]] not in reused
    return difference.what == "first_kv_shared_layer_idx"


def _scaled(name: str, factor: float, rows: slice = slice(None), dim: int = 0) -> Edit:
    """The weight with a range of rows (dim 0) or columns (dim 1) multiplied by a number."""

    def edit(read: Read) -> torch.Tensor:
        weight = read(name).clone()
        part = weight[rows] if dim == 0 else weight[:, rows]
        part.copy_((part.double() * factor).to(weight.dtype))
        return weight

    return edit


def rescaled(model: Any, plan: CutPlan) -> dict[str, Edit]:
    """Undo, for the layers that stay, RWKV's in-place division of weights by 2 ** (index // n) in its first run.

    The weights are copied, also in a model that has not run: else its first run would change those of the original.
    """
    every = getattr(model.config, "rescale_every", 0)
    owners = [module for module in model.modules() if hasattr(module, "layers_are_rescaled")]
    edits: dict[str, Edit] = {}
    for new, old in enumerate(plan.kept if every and owners else ()):
        factor = 2.0 ** (old // every) if owners[0].layers_are_rescaled else 1.0
        for leaf in ("attention.output.weight", "feed_forward.value.weight"):
            if old >= every:
                edits[f"{plan.stacks[0]}.{new}.{leaf}"] = _scaled(f"{plan.stacks[0]}.{old}.{leaf}", factor)
    return edits
