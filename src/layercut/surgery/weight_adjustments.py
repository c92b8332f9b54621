"""Architectures whose layers differ by position in ways that no config states: what to do with the weights.

`explain` turns those of a plan's differences that are understood into edits of weights. A cut with any other
difference is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layercut.errors import SurgeryError
from layercut.surgery.cut_plan import CutPlan, Edit, Read
from layercut.surgery.layer_differences import Difference


@dataclass
class Adjustment:
    """What `explain` made of a plan's differences."""

    unexplained: list[Difference]
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    edits: dict[str, Edit] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    added: dict[str, torch.Size] = field(default_factory=dict)


def refuse(text_config: Any, kept: Sequence[int], layers: int) -> None:
    """Refuse, before anything is built, what is known to run wrong although a config can be written for it."""
    _needs_attention(text_config, kept)
    _needs_attention_first(text_config, kept)
    _residual_blocks(text_config, kept, layers)
    _shared_indexers(text_config, kept, layers)
    _shared_kv(text_config, kept, layers)


def explain(differences: list[Difference], plan: CutPlan, text_config: Any, layers: int) -> Adjustment:
    """Turn the differences that are understood into edits; keep the others as unexplained."""
    result = Adjustment(unexplained=list(differences))
    for handler in HANDLERS:
        handler(result, plan, text_config, layers)
    return result


# --- hybrids --------------------------------------------------------------------------------------

ATTENTION_FREE_FAILS = frozenset(
    {
        "bailing_hybrid",
        "bamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2_moe",
        "recurrent_gemma",
        "zamba",
        "zamba2",
    }
)
"""Hybrids whose cached generation asks an attention layer for the length so far, and raises where there is none."""


def _needs_attention(text_config: Any, kept: Sequence[int]) -> None:
    types = getattr(text_config, "layer_types", None)
    if getattr(text_config, "model_type", "") not in ATTENTION_FREE_FAILS or not types:
        return
    attention = [i for i, kind in enumerate(types) if kind not in ("linear_attention", "conv", "moe", "mlp", "mamba")]
    if attention and not set(attention) & set(kept):
        raise SurgeryError(
            f"no attention layer would be left (they are {attention}), and generation with a cache needs one"
        )


def _needs_attention_first(text_config: Any, kept: Sequence[int]) -> None:
    """Refuse a linear layer in front of MiniMax, whose cache counts tokens in the first layer."""
    types = getattr(text_config, "layer_types", None)
    if getattr(text_config, "model_type", "") == "minimax" and types and types[kept[0]] == "linear_attention":
        raise SurgeryError(
            f"layer {kept[0]}, a linear attention layer, would come first, and cached generation fails then"
        )


def _residual_blocks(text_config: Any, kept: Sequence[int], layers: int) -> None:
    """Inkling 2 attends over the sums of blocks of layers: a cut must leave as many blocks as there were."""
    size = getattr(text_config, "n_layers_per_attn_res_block", None)
    if size and math.ceil(len(kept) / size) != math.ceil(layers / size):
        raise SurgeryError(f"residuals attend over blocks of {size} layers, and there would be fewer blocks")


def _shared_indexers(text_config: Any, kept: Sequence[int], layers: int) -> None:
    """GLM-MoE-DSA, HY-V4: a "shared" layer attends to the tokens that the last "full" one before it picked."""
    types = getattr(text_config, "indexer_types", None)
    if not types or len(types) != layers:
        return
    for i in kept:
        source = max((j for j in range(i + 1) if types[j] == "full"), default=i)
        if source not in kept:
            raise SurgeryError(f"layer {i} uses the tokens that layer {source}'s indexer picks, which would be removed")


def _shared_kv(text_config: Any, kept: Sequence[int], layers: int) -> None:
    """Gemma 3n and 4: later layers reuse the keys and values of the last layer of their kind that stores them."""
    modes, types = getattr(text_config, "kv_sharing_modes", None), getattr(text_config, "layer_types", None)
    if not modes or not types or len(modes) != layers:
        return
    for i in kept:
        if str(modes[i]).startswith("reuse"):
            source = max((j for j in range(i) if modes[j] == "store" and types[j] == types[i]), default=None)
            if source is not None and source not in kept:
                raise SurgeryError(f"layer {i} reuses the keys and values of layer {source}, which would be removed")


# --- tensors with one slice per layer -------------------------------------------------------------

PACKED = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
"""Gemma 3n and 4: modules whose weight is packed by layer, and the dimension: [V, L * d] and [L * d, D]."""


def _packed(result: Adjustment, plan: CutPlan, text_config: Any, layers: int) -> None:
    for difference in list(result.unexplained):
        leaf = difference.module.rpartition(".")[2]
        if leaf not in PACKED:
            continue
        result.unexplained.remove(difference)
        if difference.is_tensor:
            name = f"{difference.module}.{difference.what}"
            result.edits[name] = _slices(name, PACKED[leaf], plan.kept, layers)
        else:
            result.attributes.append((difference.module, difference.what, difference.new))


def _slices(name: str, dim: int, kept: Sequence[int], layers: int) -> Edit:
    def edit(read: Read) -> torch.Tensor:
        parts = read(name).chunk(layers, dim)
        return torch.cat([parts[i] for i in kept], dim)

    return edit


# --- shared keys and values -----------------------------------------------------------------------


def _kv_store(result: Adjustment, plan: CutPlan, text_config: Any, layers: int) -> None:
    """Gemma 3n and 4: let another layer of a kind store keys and values, where no kept layer of it reuses any.

    The last layer of each kind that computes its own keys and values stores them for those that reuse them.
    """
    modes, types = getattr(text_config, "kv_sharing_modes", None), getattr(text_config, "layer_types", None)
    if not modes or not types:
        return
    reused = {types[i] for i in plan.kept if str(modes[i]).startswith("reuse")}
    for difference in list(result.unexplained):
        index = difference.module.removeprefix(plan.path + ".").partition(".")[0]
        storing = difference.what == "store_full_length_kv" and index.isdigit() and types[int(index)] not in reused
        if storing or (difference.what == "first_kv_shared_layer_idx" and not index.isdigit()):
            result.unexplained.remove(difference)
            result.attributes.append((difference.module, difference.what, difference.new))


# --- constants made from the layer index: folded into weights -------------------------------------


def _scaled(name: str, factor: float, rows: slice = slice(None), dim: int = 0) -> Edit:
    """The weight with a range of rows (dim 0) or columns (dim 1) multiplied by a number."""

    def edit(read: Read) -> torch.Tensor:
        weight = read(name).clone()
        part = weight[rows] if dim == 0 else weight[:, rows]
        part.copy_((part.double() * factor).to(weight.dtype))
        return weight

    return edit


def _inverse_layer_scale(result: Adjustment, plan: CutPlan, text_config: Any, layers: int) -> None:
    """GPT-2 with scale_attn_by_inverse_layer_idx divides scores by index + 1: multiplied into the queries."""
    if not getattr(text_config, "scale_attn_by_inverse_layer_idx", False):
        return
    for difference in list(result.unexplained):
        if difference.what != "scaling" or not difference.module.endswith(".attn"):
            continue
        result.unexplained.remove(difference)
        result.attributes.append((difference.module, "scaling", difference.new))
        queries = slice(0, text_config.hidden_size)
        for what, dim in (("weight", 1), ("bias", 0)):
            name = f"{difference.module}.c_attn.{what}"
            _add_edit(result, plan, name, _scaled(name, difference.old / difference.new, queries, dim))


def _lambda_init(result: Adjustment, plan: CutPlan, text_config: Any, layers: int) -> None:
    """DiffLlama: lambda = exp(q1 k1) - exp(q2 k2) + init(index), and the output is scaled by 1 - init(index).

    With init' at the new index: q1' = q1 log(exp(q1 k1) + init - init') / (q1 k1), and o_proj takes
    (1 - init) / (1 - init').
    """
    for difference in list(result.unexplained):
        if difference.what != "lambda_init":
            continue
        result.unexplained.remove(difference)
        result.attributes.append((difference.module, "lambda_init", difference.new))
        old, new = difference.old, difference.new
        module = difference.module
        _add_edit(result, plan, f"{module}.lambda_q1", _shifted_lambda(module, old - new))
        for what in ("weight", "bias"):
            if (name := f"{module}.o_proj.{what}") in plan.before.state_dict():
                _add_edit(result, plan, name, _scaled(name, (1 - old) / (1 - new)))


def _shifted_lambda(module: str, shift: float) -> Edit:
    def edit(read: Read) -> torch.Tensor:
        q, k = read(f"{module}.lambda_q1"), read(f"{module}.lambda_k1").double()
        product = (q.double() @ k).item()
        inside = math.exp(product) + shift
        if inside <= 0 or float(k @ k) == 0:
            raise SurgeryError(f"{module}: lambda_init cannot be folded into lambda_q1, whose lambda would be negative")
        return (q.double() + k * ((math.log(inside) - product) / (k @ k))).to(q.dtype)

    return edit


def _add_edit(result: Adjustment, plan: CutPlan, name: str, edit: Edit) -> None:
    after = plan.rename(name)
    if after is not None:
        result.edits[after] = edit


def rescaled(model: Any, plan: CutPlan) -> dict[str, Edit]:
    """Undo, for the layers that stay, RWKV's in-place division of weights by 2 ** (index // n) in its first run.

    The weights are copied, also in a model that has not run: else its first run would change those of the original.
    """
    every = getattr(model.config, "rescale_every", 0)
    owners = [module for module in model.modules() if hasattr(module, "layers_are_rescaled")]
    if not every or not owners:
        return {}
    edits: dict[str, Edit] = {}
    for new, old in enumerate(plan.kept):
        factor = 2.0 ** (old // every) if owners[0].layers_are_rescaled else 1.0
        for leaf in ("attention.output.weight", "feed_forward.value.weight"):
            if old >= every:
                edits[f"{plan.path}.{new}.{leaf}"] = _scaled(f"{plan.path}.{old}.{leaf}", factor)
    return edits


# --- weights that a position lacks or must have ---------------------------------------------------


def _last_bias(result: Adjustment, plan: CutPlan, text_config: Any, layers: int) -> None:
    """GPT-NeoX-Japanese: only the last layer has `dense_bias`; where it is called for, zeros are exact."""
    if text_config.model_type != "gpt_neox_japanese":
        return
    for difference in list(result.unexplained):
        if difference.what == "dense_bias" and difference.old is None and difference.is_tensor:
            result.unexplained.remove(difference)
            result.added[plan.rename(f"{difference.module}.dense_bias") or ""] = difference.new
        elif difference.what == "use_bias" and (difference.old, difference.new) == (False, True):
            result.unexplained.remove(difference)
            result.attributes.append((difference.module, "use_bias", True))


def _first_router(result: Adjustment, plan: CutPlan, text_config: Any, layers: int) -> None:
    """Zaya: the first layer has no scale, since a router adds the previous layer's scores, scaled."""
    if text_config.model_type != "zaya":
        return
    for difference in list(result.unexplained):
        if difference.what == "router_states_scale" and difference.new is None:
            result.unexplained.remove(difference)
            result.dropped.add(plan.rename(f"{difference.module}.router_states_scale") or "")
        elif difference.what == "use_eda" and (difference.old, difference.new) == (True, False):
            result.unexplained.remove(difference)
            result.attributes.append((difference.module, "use_eda", False))


HANDLERS: tuple[Callable[[Adjustment, CutPlan, Any, int], None], ...] = (
    _packed,
    _kv_store,
    _inverse_layer_scale,
    _lambda_init,
    _last_bias,
    _first_router,
)
