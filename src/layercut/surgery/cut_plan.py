"""What a cut changes, worked out on models without weights before anything is touched.

The stock class is built twice on the meta device, from the old config and from the cut one. What differs
between the two, layer by kept layer, is exactly what a loader would do differently after the cut:

    an integer that moved as the layer did     a layer index (`layer_idx`, a shared layer's source): to be set
    a count                                     to be set
    anything else                               a fact the cut config does not carry over: the cut is refused

So a per-layer fact that is not listed anywhere is not missed: it shows as a difference, and is named in the
refusal.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from layercut.errors import LayercutError, ModelError, SurgeryError, first_line
from layercut.models.loading import Decoder, find_decoder, quiet_transformers
from layercut.segments import Segment, checked_segments, kept_layers
from layercut.surgery import config_cut, weight_adjustments

PATIENCE = 15.0
"""Seconds after which the search for segments that work instead of a refused one ends."""

_TORCH = frozenset(vars(nn.Module()))
_ASIDE = _TORCH | {"config", "generation_config", "name_or_path", "_is_hf_initialized"}


@dataclass(frozen=True)
class CutPlan:
    """A cut that stock transformers can express."""

    kept: list[int]
    """Original indices of the layers that stay."""
    config: Any
    """The whole config after the cut."""
    before: Any
    """The model before the cut, on the meta device."""
    after: Any
    """The model after the cut, on the meta device."""
    path: str
    """Dotted name of the ModuleList of decoder layers."""
    stacks: tuple[str, ...]
    """Dotted names of all lists with one entry per layer; `path` is the first."""
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    """(module name before the cut, attribute, new value)"""
    edits: dict[str, weight_adjustments.Edit] = field(default_factory=dict)
    """Tensors, by name after the cut, whose values change; see `adjust`."""
    dropped: frozenset[str] = frozenset()
    """Tensors, by name after the cut, that the new position must not have."""
    added: dict[str, torch.Size] = field(default_factory=dict)
    """Tensors of zeros, by name after the cut, that the new position must have."""

    def rename(self, name: str) -> str | None:
        """Name after the cut of a module or tensor in memory; None if it goes with its layer."""
        return rename(name, self.stacks, self.kept)


def rename(name: str, stacks: Sequence[str], kept: Sequence[int]) -> str | None:
    """Renumber the layer in a dotted name.

    Args:
        name: of a module or tensor in memory.
        stacks: dotted names of the lists with one entry per layer.
        kept: the layers that stay.

    Returns:
        The new name, unchanged outside the stacks; None for a removed layer.
    """
    for stack in stacks:
        if name.startswith(stack + "."):
            index, dot, rest = name[len(stack) + 1 :].partition(".")
            if not index.isdigit():
                return name
            if int(index) not in kept:
                return None
            return f"{stack}.{kept.index(int(index))}{dot}{rest}"
    return name


def plan_cut(config: Any, cls: type, segments: Sequence[Segment]) -> CutPlan:
    """Everything that a cut of `cls(config)` has to change, worked out without weights.

    Args:
        config: of the model as it is.
        cls: its class.
        segments: the layers to remove.

    Raises:
        ConfigError: segments outside the stack, overlapping, or all of it.
        SurgeryError: stock transformers cannot express the cut; the hint names the nearest segments that work.

    Returns:
        The plan.
    """
    before = skeleton(cls, config)
    try:
        decoder = find_decoder(before)
    except ModelError as error:
        raise SurgeryError(error.message, error.hint) from None
    layers = len(decoder)
    segments = checked_segments(segments, layers)
    try:
        return _plan(config, cls, before, decoder, kept_layers(segments, layers))
    except SurgeryError as error:
        text = ", ".join(map(str, segments))
        hint = error.hint or nearby(config, cls, before, decoder, segments)
        raise SurgeryError(f"{cls.__name__}: layers {text} cannot be cut out: {error.message}", hint) from error


def _plan(config: Any, cls: type, before: Any, decoder: Decoder, kept: list[int]) -> CutPlan:
    layers = len(decoder)
    weight_adjustments.refuse(decoder.config, kept, layers)
    old_text = _own_part(config, decoder, before)
    new = config_cut.cut_config(config, old_text, kept, layers)
    loaded = config_cut.reread(new)
    _copy_unsaved(config, loaded)
    after = skeleton(cls, loaded, hint="")
    stacks = _stacks(before, after, decoder, kept)
    plan = CutPlan(kept=kept, config=new, before=before, after=after, path=decoder.path, stacks=stacks)
    differences = list(_differences(plan))
    attributes, differences = _moved(differences, plan, layers)
    adjustment = weight_adjustments.explain(differences, plan, old_text, layers)
    if adjustment.unexplained:
        raise SurgeryError(_describe(adjustment.unexplained))
    attributes += adjustment.attributes
    return CutPlan(
        kept=kept,
        config=new,
        before=before,
        after=after,
        path=decoder.path,
        stacks=stacks,
        attributes=attributes,
        edits=adjustment.edits,
        dropped=frozenset(adjustment.dropped),
        added=adjustment.added,
    )


def skeleton(cls: type, config: Any, hint: str = "check that this version of transformers can load the model") -> Any:
    """The model class built from a config, without weights: every tensor on the meta device.

    Args:
        cls: the class.
        config: left as it is.
        hint: of the error.

    Returns:
        The model.

    Raises:
        SurgeryError: the class cannot be built from the config.
    """
    config = copy.deepcopy(config)
    for part in config_cut.parts(config):
        if isinstance(dtype := vars(part).get("dtype"), str):  # as read from JSON; loaders resolve it, classes do not
            vars(part)["dtype"] = getattr(torch, dtype)
    with quiet_transformers(), torch.device("meta"):
        try:
            return cls(config)
        except LayercutError:
            raise
        except Exception as error:
            raise SurgeryError(f"{cls.__name__} cannot be built from the config: {first_line(error)}", hint) from error


def _own_part(config: Any, decoder: Decoder, before: Any) -> Any:
    """The part of the caller's config that `decoder.config` (of a copy) stands for."""
    if decoder.config is before.config:
        return config
    for name, value in vars(before.config).items():
        if value is decoder.config:
            return vars(config)[name]
    return config.get_text_config(decoder=True)


def _copy_unsaved(old: Any, new: Any) -> None:
    """Choices of the caller that config.json does not hold, such as the attention implementation."""
    for name in ("_attn_implementation_internal", "_experts_implementation_internal", "dtype"):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    for name in getattr(old, "sub_configs", {}):
        if (a := getattr(old, name, None)) is not None and (b := getattr(new, name, None)) is not None:
            _copy_unsaved(a, b)


def _stacks(before: Any, after: Any, decoder: Decoder, kept: list[int]) -> tuple[str, ...]:
    """Every list that had one entry per layer and has one per kept layer after the cut."""
    lists = (nn.ModuleList, nn.ParameterList, nn.ModuleDict)
    new = dict(after.named_modules())
    found = [decoder.path]
    for name, module in before.named_modules():
        if name == decoder.path or not isinstance(module, lists) or name.startswith(decoder.path + "."):
            continue
        if len(module) == len(decoder) and isinstance(new.get(name), lists) and len(new[name]) == len(kept):
            found.append(name)
    if not isinstance(new.get(decoder.path), lists) or len(new[decoder.path]) != len(kept):
        raise SurgeryError(f"the config after the cut does not make {len(kept)} layers")
    return tuple(found)


# --- differences ----------------------------------------------------------------------------------


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


def _differences(plan: CutPlan) -> Iterator[Difference]:
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


def _moved(
    differences: list[Difference], plan: CutPlan, layers: int
) -> tuple[list[tuple[str, str, Any]], list[Difference]]:
    """Split off the differences that only say where a layer sits, how many there are, or of what kinds."""
    moved, rest = [], []
    for difference in differences:
        inside = any(difference.module.startswith(stack + ".") for stack in plan.stacks)
        if difference.what and not inside and _is_left_over(difference, plan):
            continue
        known = not difference.is_tensor and difference.what
        summary = not inside and isinstance(difference.old, list | dict)
        if known and (
            summary or _is_move(difference.old, difference.new, plan.kept, layers) or _is_slot(difference, plan)
        ):
            module = plan.after.get_submodule(plan.rename(difference.module) or "")
            moved.append((difference.module, difference.what, copy.copy(vars(module).get(difference.what))))
        else:
            rest.append(difference)
    return moved, rest


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


def _describe(differences: Sequence[Difference]) -> str:
    """The differences that make the cut impossible, the first two in words."""
    named = []
    for difference in differences[:2]:
        where = f"{difference.module}.{difference.what}".strip(".")
        if difference.is_tensor:
            named.append(f"weight {where} is {_shape(difference.old)} and would have to be {_shape(difference.new)}")
        else:
            named.append(f"{where} is {difference.old!r} and would become {difference.new!r} at its new place")
    more = len(differences) - len(named)
    return "; ".join(named) + (f" (and {more} more such facts)" if more else "")


def _shape(size: Any) -> str:
    return "absent" if size is None else "x".join(map(str, size))


# --- the nearest cuts that work -------------------------------------------------------------------


def nearby(config: Any, cls: type, before: Any, decoder: Decoder, segments: Sequence[Segment], most: int = 3) -> str:
    """Name segments near the wanted ones that can be cut; tried one after the other, nearest first.

    Args:
        config: of the model as it is.
        cls: its class.
        before: the model on the meta device.
        decoder: its decoder layers.
        segments: the wanted ones.
        most: how many to name.

    Returns:
        A sentence for the error's hint.
    """
    found: list[str] = []
    until = time.monotonic() + PATIENCE
    for candidate in neighbours(segments, len(decoder)):
        try:
            _plan(config, cls, before, decoder, kept_layers(candidate, len(decoder)))
        except LayercutError:
            continue
        found.append(" ".join(f"--segment {segment}" for segment in candidate))
        if len(found) == most or time.monotonic() > until:
            break
    if not found:
        return "no segment near this one can be cut out of this architecture"
    return "segments near it that can: " + ", or ".join(found)


def neighbours(segments: Sequence[Segment], layers: int, tries: int = 40) -> list[list[Segment]]:
    """The same segments shifted together, and each of them longer or shorter at either end; nearest first.

    Args:
        segments: the wanted ones.
        layers: L.
        tries: how many at most.

    Returns:
        Sets of segments that fit the stack.
    """
    moves: list[tuple[int, list[Segment]]] = []
    for shift in range(-layers, layers + 1):
        for grow in range(-4, 5):
            try:
                candidate = [Segment(s.start + shift, s.stop + shift + grow) for s in segments]
                moves.append((abs(shift) + abs(grow) + abs(shift + grow), checked_segments(candidate, layers)))
            except LayercutError:
                continue
    return [candidate for distance, candidate in sorted(moves, key=lambda move: move[0])[: tries + 1] if distance]
