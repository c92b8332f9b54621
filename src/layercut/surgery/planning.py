"""Works out what a cut changes, on models without weights, before anything is touched.

The stock class is built twice on the meta device, from the old config and from the cut one. What differs between the
two (`layer_differences.py`) is exactly what a loader would do differently after the cut; the plan says what has to
change for it, and a cut with a difference that nothing explains is refused.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layercut.errors import LayercutError, ModelError, SurgeryError, first_line
from layercut.models.decoder_stack import Decoder, find_decoder
from layercut.models.loading import quiet_transformers
from layercut.segments import Segment, checked_segments, kept_layers
from layercut.surgery import config_cut, layer_differences, weight_adjustments
from layercut.surgery.cut_plan import CutPlan

PATIENCE = 15.0
"""Seconds after which the search for segments that work instead of a refused one ends."""


def plan_cut(config: Any, cls: type, segments: Sequence[Segment]) -> CutPlan:
    """Everything that a cut of `cls(config)` has to change, worked out without weights."""
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
    attributes, others = layer_differences.moved(list(layer_differences.differences(plan)), plan, layers)
    adjustment = weight_adjustments.explain(others, plan, old_text, layers)
    if adjustment.unexplained:
        raise SurgeryError(layer_differences.describe(adjustment.unexplained))
    return replace(
        plan,
        attributes=attributes + adjustment.attributes,
        edits=adjustment.edits,
        dropped=frozenset(adjustment.dropped),
        added=adjustment.added,
    )


def skeleton(cls: type, config: Any, hint: str = "check that this version of transformers can load the model") -> Any:
    """The model class built from a config, without weights: every tensor on the meta device."""
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


# --- the nearest cuts that work -------------------------------------------------------------------


def nearby(config: Any, cls: type, before: Any, decoder: Decoder, segments: Sequence[Segment], most: int = 3) -> str:
    """Name segments near the wanted ones that can be cut; tried one after the other, nearest first."""
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
    """The same segments shifted together, and each of them longer or shorter at either end; nearest first."""
    moves: list[tuple[int, list[Segment]]] = []
    for shift in range(-layers, layers + 1):
        for grow in range(-4, 5):
            try:
                candidate = [Segment(s.start + shift, s.stop + shift + grow) for s in segments]
                moves.append((abs(shift) + abs(grow) + abs(shift + grow), checked_segments(candidate, layers)))
            except LayercutError:
                continue
    return [candidate for distance, candidate in sorted(moves, key=lambda move: move[0])[: tries + 1] if distance]
