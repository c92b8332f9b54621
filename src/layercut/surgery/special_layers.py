"""Architectures whose layers differ by position in ways that no config states: what is refused, what weights become."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
