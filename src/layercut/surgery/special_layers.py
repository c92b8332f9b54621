"""Architectures whose layers differ by position in ways that no config states: what is refused, what weights become.

`explain_` turns a difference that is understood into a change of the plan. A cut with any other difference is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from layercut.errors import SurgeryError

if TYPE_CHECKING:
    from layercut.surgery.cut_plan import CutPlan, Difference, Edit, Read

ATTENTION_FREE_FAILS = frozenset({
    "bailing_hybrid", "bamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "recurrent_gemma", "zamba",
    "zamba2",
})  # fmt: skip
"""Hybrids whose cached generation asks an attention layer for the length so far, and raises where there is none."""


def refuse(text_config: Any, kept: Sequence[int], layers: int) -> None:
    """Refuse, before anything is built, what is known to run wrong although a config can be written for it."""
    types = getattr(text_config, "layer_types", None)
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
    indexers = getattr(text_config, "indexer_types", None)
    if indexers and len(indexers) == layers:
        # GLM-MoE-DSA, HY-V4: a "shared" layer attends to the tokens that the last "full" one before it picked
        for i in kept:
            source = max((j for j in range(i + 1) if indexers[j] == "full"), default=i)
            if source not in kept:
                raise SurgeryError(
                    f"layer {i} uses the tokens that layer {source}'s indexer picks, which would be removed"
                )
    modes = getattr(text_config, "kv_sharing_modes", None)
    if modes and types and len(modes) == layers:
        # Gemma 3n and 4: later layers reuse the keys and values of the last layer of their kind that stores them
        for i in kept:
            stored = [j for j in range(i) if modes[j] == "store" and types[j] == types[i]]
            if str(modes[i]).startswith("reuse") and stored and stored[-1] not in kept:
                raise SurgeryError(
                    f"layer {i} reuses the keys and values of layer {stored[-1]}, which would be removed"
                )


def explain_(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """Have the plan make up for a difference; False: it is not understood."""
    return any(explains(difference, plan, text_config) for explains in EXPLANATIONS)


def _set_(plan: CutPlan, difference: Difference) -> bool:
    """Have the attribute say what it says in the new place."""
    plan.attributes.append((difference.module, difference.what, difference.new))
    return True


PACKED = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
"""Gemma 3n and 4: modules whose weight is packed by layer, and the dimension: [V, L * d] and [L * d, D]."""


def _packed(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    leaf = difference.module.rpartition(".")[2]
    if leaf not in PACKED:
        return False
    if not difference.is_tensor:
        return _set_(plan, difference)
    name = f"{difference.module}.{difference.what}"

    def edit(read: Read) -> torch.Tensor:
        parts = read(name).chunk(plan.layers, PACKED[leaf])
        return torch.cat([parts[i] for i in plan.kept], PACKED[leaf])

    plan.edits[name] = edit
    return True


def _kv_store(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """Gemma 3n and 4: let another layer of a kind store keys and values, where no kept layer of it reuses any.

    The last layer of each kind that computes its own keys and values stores them for those that reuse them.
    """
    modes, types = getattr(text_config, "kv_sharing_modes", None), getattr(text_config, "layer_types", None)
    if not modes or not types:
        return False
    reused = {types[i] for i in plan.kept if str(modes[i]).startswith("reuse")}
    at = plan.layer_in(difference.module)
    inside = at is not None and at[0] == plan.stacks[0]
    storing = difference.what == "store_full_length_kv" and at is not None and inside and types[at[1]] not in reused
    return (storing or (difference.what == "first_kv_shared_layer_idx" and not inside)) and _set_(plan, difference)


# --- constants made from the layer index: folded into weights ---


def _scaled(name: str, factor: float, rows: slice = slice(None), dim: int = 0) -> Edit:
    """The weight with a range of rows (dim 0) or columns (dim 1) multiplied by a number."""

    def edit(read: Read) -> torch.Tensor:
        weight = read(name).clone()
        part = weight[rows] if dim == 0 else weight[:, rows]
        part.copy_((part.double() * factor).to(weight.dtype))
        return weight

    return edit


def _add_edit_(plan: CutPlan, name: str, edit: Edit) -> None:
    if (after := plan.rename(name)) is not None:
        plan.edits[after] = edit


def _inverse_layer_scale(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """GPT-2 with scale_attn_by_inverse_layer_idx divides scores by index + 1: multiplied into the queries."""
    if not getattr(text_config, "scale_attn_by_inverse_layer_idx", False):
        return False
    if difference.what != "scaling" or not difference.module.endswith(".attn"):
        return False
    queries = slice(0, text_config.hidden_size)
    for what, dim in (("weight", 1), ("bias", 0)):
        name = f"{difference.module}.c_attn.{what}"
        _add_edit_(plan, name, _scaled(name, difference.old / difference.new, queries, dim))
    return _set_(plan, difference)


def _lambda_init(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """DiffLlama: lambda = exp(q1 k1) - exp(q2 k2) + init(index), and the output is scaled by 1 - init(index).

    With init' at the new index: q1' = q1 log(exp(q1 k1) + init - init') / (q1 k1), and o_proj takes
    (1 - init) / (1 - init').
    """
    if difference.what != "lambda_init":
        return False
    old, new, module = difference.old, difference.new, difference.module

    def shifted(read: Read) -> torch.Tensor:
        q, k = read(f"{module}.lambda_q1"), read(f"{module}.lambda_k1").double()
        product = (q.double() @ k).item()
        inside = math.exp(product) + (old - new)
        if inside <= 0 or float(k @ k) == 0:
            raise SurgeryError(f"{module}: lambda_init cannot be folded into lambda_q1, whose lambda would be negative")
        return (q.double() + k * ((math.log(inside) - product) / (k @ k))).to(q.dtype)

    _add_edit_(plan, f"{module}.lambda_q1", shifted)
    for what in ("weight", "bias"):
        if (name := f"{module}.o_proj.{what}") in plan.before.state_dict():
            _add_edit_(plan, name, _scaled(name, (1 - old) / (1 - new)))
    return _set_(plan, difference)


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


# --- weights that a position lacks or must have ---


def _last_bias(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """GPT-NeoX-Japanese: only the last layer has `dense_bias`; where it is called for, zeros are exact."""
    if text_config.model_type != "gpt_neox_japanese":
        return False
    if difference.what == "dense_bias" and difference.old is None and difference.is_tensor:
        plan.added[plan.rename(f"{difference.module}.dense_bias") or ""] = difference.new
        return True
    turned_on = difference.what == "use_bias" and (difference.old, difference.new) == (False, True)
    return turned_on and _set_(plan, difference)


def _first_router(difference: Difference, plan: CutPlan, text_config: Any) -> bool:
    """Zaya: the first layer has no scale, since a router adds the previous layer's scores, scaled."""
    if text_config.model_type != "zaya":
        return False
    if difference.what == "router_states_scale" and difference.new is None:
        plan.dropped.add(plan.rename(f"{difference.module}.router_states_scale") or "")
        return True
    turned_off = difference.what == "use_eda" and (difference.old, difference.new) == (True, False)
    return turned_off and _set_(plan, difference)


EXPLANATIONS: tuple[Callable[[Difference, CutPlan, Any], bool], ...] = (
    _packed, _kv_store, _inverse_layer_scale, _lambda_init, _last_bias, _first_router,
)  # fmt: skip
