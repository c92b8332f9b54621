"""What the stock class does differently at a kept layer's new place.

Of the class built on the meta device from the old config and from the cut one, layer by kept layer:

    an integer that moved as the layer did     a layer index (`layer_idx`, a shared layer's source): to be set
    a count                                     to be set
    anything else                               a fact the cut config does not carry over: the cut is refused, unless
                                                `weight_adjustments.py` can explain it

So a per-layer fact that is not listed anywhere is not missed: it shows as a difference, and is named in the
refusal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from layercut.surgery.cut_plan import CutPlan

_TORCH = frozenset(vars(nn.Module()))
_ASIDE = _TORCH | {"config", "generation_config", "name_or_path", "_is_hf_initialized"}


@dataclass(frozen=True)
class Difference:
    """Something the stock class does differently at a kept layer's new place."""

    module: str
    """Name of the module before the cut."""
    what: str
    """Attribute or tensor name within it; "" for the module itself."""
    old: Any
    new: Any

    @property
    def is_tensor(self) -> bool:
        """Whether a parameter or buffer differs; then old and new are shapes, or None where there is none."""
        return isinstance(self.old, torch.Size) or isinstance(self.new, torch.Size)


def differences(plan: CutPlan) -> Iterator[Difference]:
    """Everything in which the model after the cut differs from the one before, at the same layer."""
    every = plan.before.named_modules(remove_duplicate=False)  # layers may share a module, such as an activation
    old = {name: module for name, module in every if plan.rename(name) is not None}
    new = dict(plan.after.named_modules(remove_duplicate=False))
    names = {plan.rename(name): name for name in old}
    for name in new.keys() - names.keys():
        yield Difference(name, "", None, type(new[name]).__name__)
    for name, module in old.items():
        other = new.get(plan.rename(name) or "") if name else plan.after
        if other is None:
            yield Difference(name, "", type(module).__name__, None)
        elif type(module) is not type(other):
            yield Difference(name, "", type(module).__name__, type(other).__name__)
        else:
            yield from _module_differences(name, module, other)


def _module_differences(name: str, old: nn.Module, new: nn.Module) -> Iterator[Difference]:
    a, b = _tensors(old), _tensors(new)
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            yield Difference(name, key, a.get(key), b.get(key))
    for key in sorted((vars(old).keys() | vars(new).keys()) - _ASIDE):
        left, right = _plain(vars(old).get(key)), _plain(vars(new).get(key))
        if not _same(left, right):
            yield Difference(name, key, left, right)


def _tensors(module: nn.Module) -> dict[str, torch.Size]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor.shape for name, tensor in own.items() if tensor is not None}


def _plain(value: Any) -> Any:
    """A value that can be compared; None for objects that say nothing about a layer (modules, functions)."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.Size):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        # models compute in float32 at most, to which such numbers are rounded when they meet a tensor
        return bool(torch.tensor([a]).equal(torch.tensor([b]))) or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


def moved(
    found: Sequence[Difference], plan: CutPlan, layers: int
) -> tuple[list[tuple[str, str, Any]], list[Difference]]:
    """Split off the differences that only say where a layer sits, how many there are, or of what kinds."""
    attributes, rest = [], []
    for difference in found:
        inside = any(difference.module.startswith(stack + ".") for stack in plan.stacks)
        if difference.what and not inside and _is_left_over(difference, plan):
            continue
        known = not difference.is_tensor and difference.what
        summary = not inside and isinstance(difference.old, list | dict)
        if known and (
            summary or _is_move(difference.old, difference.new, plan.kept, layers) or _is_slot(difference, plan)
        ):
            module = plan.after.get_submodule(plan.rename(difference.module) or "")
            attributes.append((difference.module, difference.what, copy.copy(vars(module).get(difference.what))))
        else:
            rest.append(difference)
    return attributes, rest


def _is_left_over(difference: Difference, plan: CutPlan) -> bool:
    """Whether something outside the layers serves a kind of layer that is removed, such as its RoPE: it may stay."""
    module, other = plan.before.get_submodule(difference.module), plan.after.get_submodule(difference.module)
    if difference.is_tensor:
        return difference.new is None and difference.what in module._non_persistent_buffers_set
    return difference.what not in vars(other)


def _is_move(old: Any, new: Any, kept: Sequence[int], layers: int) -> bool:
    if isinstance(old, bool) or isinstance(new, bool):
        return False
    if isinstance(old, int) and isinstance(new, int):
        return (old in kept and kept.index(old) == new) or (old == layers and new == len(kept))
    if isinstance(old, list) and len(old) == layers:  # a layer that carries the whole stack's list about
        return new == [old[i] for i in kept]
    if isinstance(old, list) and all(isinstance(i, int) for i in old):  # a list of layers
        return new == [kept.index(i) for i in old if i in kept]
    if isinstance(old, dict) and isinstance(new, dict) and all(i.isdigit() for i in old):  # a table by layer
        return new == {str(kept.index(int(i))): value for i, value in old.items() if int(i) in kept}
    return False


def _is_slot(difference: Difference, plan: CutPlan) -> bool:
    """`layer_idx` of the several caches of one layer: index * n + r (LongCat has two attentions a layer)."""
    index = difference.module.removeprefix(plan.path + ".").partition(".")[0]
    if difference.what != "layer_idx" or not index.isdigit() or not isinstance(difference.new, int):
        return False
    old, new = int(index), plan.kept.index(int(index))
    return difference.old - difference.new == 2 * (old - new)


def describe(unexplained: Sequence[Difference]) -> str:
    """The differences that make a cut impossible, for its refusal."""
    named = []
    for difference in unexplained[:2]:
        where = f"{difference.module}.{difference.what}".strip(".")
        if difference.is_tensor:
            named.append(f"weight {where} is {_shape(difference.old)} and would have to be {_shape(difference.new)}")
        else:
            named.append(f"{where} is {difference.old!r} and would become {difference.new!r} at its new place")
    more = len(unexplained) - len(named)
    return "; ".join(named) + (f" (and {more} more such facts)" if more else "")


def _shape(size: Any) -> str:
    return "absent" if size is None else "x".join(map(str, size))
