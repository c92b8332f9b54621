"""Architectures whose layers differ by position in ways that no config states: what to do with the weights.

`explain` looks at the differences a plan found and turns those that are understood into edits of weights. Whatever
it does not explain makes the cut be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from layercut.errors import SurgeryError

if TYPE_CHECKING:
    from layercut.cut.plan import Difference, Plan

Edit = Callable[[torch.Tensor], torch.Tensor]
"""From a tensor as it was to the tensor as it must be; never in place."""


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


def explain(differences: list[Difference], plan: Plan, text_config: Any, layers: int) -> Adjustment:
    """Turn the differences that are understood into edits; keep the others as unexplained."""
    result = Adjustment(unexplained=list(differences))
    for handler in HANDLERS:
        handler(result, plan, text_config, layers)
    return result


# --- hybrids --------------------------------------------------------------------------------------------------

ATTENTION_FREE_FAILS = frozenset({"bailing_hybrid", "granitemoehybrid", "kimi_linear", "lfm2_moe", "recurrent_gemma"})
"""Hybrids whose cached generation asks an attention layer for the length so far, and raises where there is none."""


def _needs_attention(text_config: Any, kept: Sequence[int]) -> None:
    types = getattr(text_config, "layer_types", None)
    if getattr(text_config, "model_type", "") not in ATTENTION_FREE_FAILS or not types:
        return
    attention = [i for i, kind in enumerate(types) if kind.endswith("attention") and kind != "linear_attention"]
    if attention and not set(attention) & set(kept):
        raise SurgeryError(
            f"no attention layer would be left (they are {attention}), and generation with a cache needs one"
        )


# --- tensors with one slice per layer -------------------------------------------------------------------------

PACKED = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
"""Gemma 3n and 4: modules whose weight is packed by layer, and the dimension: [V, L * d] and [L * d, D]."""


def _packed(result: Adjustment, plan: Plan, text_config: Any, layers: int) -> None:
    for difference in list(result.unexplained):
        leaf = difference.module.rpartition(".")[2]
        if leaf not in PACKED:
            continue
        result.unexplained.remove(difference)
        if difference.is_tensor:
            result.edits[f"{difference.module}.{difference.what}"] = _slices(PACKED[leaf], plan.kept, layers)
        else:
            result.attributes.append((difference.module, difference.what, difference.new))


def _slices(dim: int, kept: Sequence[int], layers: int) -> Edit:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        parts = tensor.chunk(layers, dim)
        return torch.cat([parts[i] for i in kept], dim)

    return edit


HANDLERS: tuple[Callable[[Adjustment, Plan, Any, int], None], ...] = (_packed,)
