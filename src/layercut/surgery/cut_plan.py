"""What a cut changes, worked out on models without weights before anything is touched; and the cut in memory.

The stock class is built twice on the meta device, from the old config and from the cut one. What differs between the
two, layer by kept layer, is exactly what a loader would do differently after the cut:

    an integer that moved as the layer did     a layer index (`layer_idx`, a shared layer's source): to be set
    a count                                     to be set
    anything else                               a fact the cut config does not carry over: the cut is refused, unless
                                                `config_cut.explain_` can explain it

So a per-layer fact that is not listed anywhere is not missed: it shows as a difference, and is named in the refusal.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from layercut.distributed.sharding import is_spread
from layercut.errors import LayercutError, ModelError, SurgeryError, first_line
from layercut.models.decoder_stack import Decoder, find_decoder, share
from layercut.models.loading import quiet_transformers
from layercut.models.runner import model_of
from layercut.segments import Segment, as_segments, checked_segments, kept_layers
from layercut.surgery import config_cut

Read = Callable[[str], torch.Tensor]  # a weight by its name in memory before the cut
Edit = Callable[[Read], torch.Tensor]
"""A weight as it must be after the cut, made from weights as they were; never in place."""
PATIENCE = 15.0  # seconds after which the search for segments that work instead of a refused one ends


@dataclass(kw_only=True)
class CutPlan:
    """A cut that stock transformers can express."""

    kept: list[int]  # original indices of the layers that stay
    config: Any  # the whole of it, after the cut
    before: Any  # the model before and after the cut, on the meta device
    after: Any
    stacks: tuple[str, ...]  # names of all lists with one entry per layer; the first is that of decoder layers
    layers: int  # before the cut
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)  # module before the cut, attribute, new value
    # tensors, by name after the cut: whose values change; that the new position must not have; zeros that it must have
    edits: dict[str, Edit] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    added: dict[str, torch.Size] = field(default_factory=dict)

    def layer_in(self, name: str) -> tuple[str, int, str] | None:
        """Stack, layer index and rest of a name in memory before the cut; None: it is of no layer."""
        for stack in self.stacks:
            index, dot, rest = name[len(stack) + 1 :].partition(".")
            if name.startswith(stack + ".") and index.isdigit():
                return stack, int(index), dot + rest
        return None

    def rename(self, name: str) -> str | None:
        """Name after the cut of a module or tensor in memory; None if it goes with its layer."""
        if (found := self.layer_in(name)) is None:
            return name
        stack, layer, rest = found
        return f"{stack}.{self.kept.index(layer)}{rest}" if layer in self.kept else None


@dataclass(frozen=True)
class Difference:
    """Something the stock class does differently at a kept layer's new place."""

    module: str  # its name before the cut
    what: str  # attribute or tensor name within it; "" for the module itself
    old: Any  # of a parameter or buffer its shape, or None where there is none
    new: Any

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.old, torch.Size) or isinstance(self.new, torch.Size)

    def __str__(self) -> str:
        where = f"{self.module}.{self.what}".strip(".")
        if not self.is_tensor:
            return f"{where} is {self.old!r} and would become {self.new!r} at its new place"
        old, new = ("absent" if size is None else "x".join(map(str, size)) for size in (self.old, self.new))
        return f"weight {where} is {old} and would have to be {new}"


def plan_cut(config: Any, cls: type, segments: Sequence[Segment]) -> CutPlan:
    """Everything that a cut of `cls(config)` has to change, worked out without weights."""
    before = _skeleton(cls, config, "check that this version of transformers can load the model")
    try:
        decoder = find_decoder(before)
    except ModelError as error:
        raise SurgeryError(error.message, error.hint) from None
    segments = checked_segments(segments, len(decoder))
    try:
        return _plan(config, cls, before, decoder, kept_layers(segments, len(decoder)))
    except SurgeryError as error:
        text = ", ".join(map(str, segments))
        hint = error.hint or nearby(
            segments, len(decoder), lambda kept: _plan(config, cls, before, decoder, kept),
            "no segment near this one can be cut out of this architecture",
        )  # fmt: skip
        raise SurgeryError(f"{cls.__name__}: layers {text} cannot be cut out: {error.message}", hint) from error


def _plan(config: Any, cls: type, before: Any, decoder: Decoder, kept: list[int]) -> CutPlan:
    layers = len(decoder)
    config_cut.refuse(decoder.config, kept, layers)
    # the part of the caller's config that decoder.config (of a copy) stands for
    named = (vars(config)[name] for name, value in vars(before.config).items() if value is decoder.config)
    own = config if decoder.config is before.config else next(named, None) or config.get_text_config(decoder=True)
    new = config_cut.cut_config(config, own, kept, layers)
    loaded = config_cut.reread(new)
    _copy_unsaved_(config, loaded)
    after = _skeleton(cls, loaded, "")
    lists, now = (nn.ModuleList, nn.ParameterList, nn.ModuleDict), dict(after.named_modules())

    def is_cut(name: str) -> bool:
        return isinstance(now.get(name), lists) and len(now[name]) == len(kept)

    if not is_cut(decoder.path):
        raise SurgeryError(f"the config after the cut does not make {len(kept)} layers")
    beside = (
        name for name, module in before.named_modules()
        if name != decoder.path and not name.startswith(decoder.path + ".") and isinstance(module, lists)
        and len(module) == layers and is_cut(name)
    )  # fmt: skip
    stacks = (decoder.path, *beside)
    plan = CutPlan(kept=kept, config=new, before=before, after=after, stacks=stacks, layers=layers)
    unexplained = []
    for difference in _differences(plan):
        if _is_left_over(difference, plan):
            continue
        if _is_moved(difference, plan):
            module = after.get_submodule(plan.rename(difference.module) or "")
            value = copy.copy(vars(module).get(difference.what))
            plan.attributes.append((difference.module, difference.what, value))
        elif not config_cut.explain_(difference, plan, own):
            unexplained.append(difference)
    if unexplained:
        more = f" (and {len(unexplained) - 2} more such facts)" if len(unexplained) > 2 else ""
        raise SurgeryError("; ".join(map(str, unexplained[:2])) + more)
    return plan


def _skeleton(cls: type, config: Any, hint: str) -> Any:
    """The model class built from a config, without weights: every tensor on the meta device."""
    config = copy.deepcopy(config)
    parts = [config]
    for part in parts:
        parts += [value for value in vars(part).values() if hasattr(value, "to_dict")]
        if isinstance(dtype := vars(part).get("dtype"), str):  # as read from JSON; loaders resolve it, classes do not
            vars(part)["dtype"] = getattr(torch, dtype)
    with quiet_transformers(), torch.device("meta"):
        try:
            return cls(config)
        except LayercutError:
            raise
        except Exception as error:
            raise SurgeryError(f"{cls.__name__} cannot be built from the config: {first_line(error)}", hint) from error


def _copy_unsaved_(old: Any, new: Any) -> None:
    """Choices of the caller that config.json does not hold, such as the attention implementation."""
    for name in ("_attn_implementation_internal", "_experts_implementation_internal", "dtype"):
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    for name in getattr(old, "sub_configs", {}):
        if (a := getattr(old, name, None)) is not None and (b := getattr(new, name, None)) is not None:
            _copy_unsaved_(a, b)


# --- what differs ---

_ASIDE = vars(nn.Module()).keys() | {"config", "generation_config", "name_or_path", "_is_hf_initialized"}


def _differences(plan: CutPlan) -> Iterator[Difference]:
    """Everything in which the model after the cut differs from the one before, at the same layer."""
    every = plan.before.named_modules(remove_duplicate=False)  # layers may share a module, such as an activation
    old = {name: module for name, module in every if plan.rename(name) is not None}
    new = dict(plan.after.named_modules(remove_duplicate=False))
    for name in sorted(new.keys() - {plan.rename(name) for name in old}):
        yield Difference(name, "", None, type(new[name]).__name__)
    for name, module in old.items():
        other = new.get(plan.rename(name) or "") if name else plan.after
        if other is None or type(module) is not type(other):
            yield Difference(name, "", type(module).__name__, None if other is None else type(other).__name__)
            continue
        left, right = (
            {key: tensor.shape for key, tensor in {**one._parameters, **one._buffers}.items() if tensor is not None}
            for one in (module, other)
        )
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                yield Difference(name, key, left.get(key), right.get(key))
        for key in sorted((vars(module).keys() | vars(other).keys()) - _ASIDE):
            a, b = _plain(vars(module).get(key)), _plain(vars(other).get(key))
            if not _same(a, b):
                yield Difference(name, key, a, b)


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


def _is_left_over(difference: Difference, plan: CutPlan) -> bool:
    """Whether something outside the layers serves a kind of layer that is removed, such as its RoPE: it may stay."""
    if not difference.what or any(difference.module.startswith(stack + ".") for stack in plan.stacks):
        return False
    if difference.is_tensor:
        module = plan.before.get_submodule(difference.module)
        return difference.new is None and difference.what in module._non_persistent_buffers_set
    return difference.what not in vars(plan.after.get_submodule(difference.module))


def _is_moved(difference: Difference, plan: CutPlan) -> bool:
    """Whether a difference only says where a layer sits, how many there are, or of what kinds."""
    old, new, kept = difference.old, difference.new, plan.kept
    if difference.is_tensor or not difference.what:
        return False
    if isinstance(old, list | dict) and not any(difference.module.startswith(stack + ".") for stack in plan.stacks):
        return True  # a summary of the stack
    if isinstance(old, bool) or isinstance(new, bool):
        return False
    if isinstance(old, int) and isinstance(new, int):
        if (old in kept and kept.index(old) == new) or (old == plan.layers and new == len(kept)):
            return True
        # one of several caches of a layer, index * n + r (LongCat has two attentions a layer)
        at = plan.layer_in(difference.module)
        slot = difference.what == "layer_idx" and at is not None and at[0] == plan.stacks[0]
        return slot and at is not None and old - new == 2 * (at[1] - kept.index(at[1]))
    if isinstance(old, list) and len(old) == plan.layers:  # a layer that carries the whole stack's list about
        return new == [old[i] for i in kept]
    if isinstance(old, list) and all(isinstance(i, int) for i in old):  # a list of layers
        return new == [kept.index(i) for i in old if i in kept]
    if isinstance(old, dict) and isinstance(new, dict) and all(i.isdigit() for i in old):  # a table by layer
        return new == {str(kept.index(int(i))): value for i, value in old.items() if int(i) in kept}
    return False


# --- the nearest cuts that work ---


def nearby(segments: Sequence[Segment], layers: int, attempt: Callable[[list[int]], Any], none: str) -> str:
    """Name up to three cuts near a refused one that can be made, nearest first; `none` where there are none.

    Tried are the same segments shifted together, and each of them longer or shorter at either end. attempt: raises for
    kept layers that cannot be left alone.
    """
    moves: list[tuple[int, list[Segment]]] = []
    for shift in range(-layers, layers + 1):
        for grow in range(-4, 5):
            try:
                candidate = [Segment(s.start + shift, s.stop + shift + grow) for s in segments]
                moves.append((abs(shift) + abs(grow) + abs(shift + grow), checked_segments(candidate, layers)))
            except LayercutError:
                continue
    found: list[str] = []
    until = time.monotonic() + PATIENCE
    for candidate in [one for distance, one in sorted(moves, key=lambda move: move[0])[:41] if distance]:
        try:
            attempt(kept_layers(candidate, layers))
        except LayercutError:
            continue
        found.append(" ".join(f"--segment {segment}" for segment in candidate))
        if len(found) == 3 or time.monotonic() > until:
            break
    return f"segments near it that can: {', or '.join(found)}" if found else none


# --- in memory ---


def cut(model: Any, segments: Any) -> Any:
    """A clone of the model without some of its layers, which shares all weights; `model` stays as it is.

    The clone can be run, trained and saved at once. What is trained in it has to be its own parameters first:
    `layercut.fold_` and `layercut.tune_` see to that.

    Args:
        model: a causal LM of transformers, in memory or with its layers on disk, or a DecoderRunner of one.
        segments: the layers to remove, each a Segment, a pair (13, 19) or "13:19" (19 stays), in any order. None at
            all: a clone with all layers.

    Returns:
        The clone; `config.original_layer_index` says where its layers stood in the first model of all.

    Raises:
        ConfigError: a segment outside the stack, overlapping ones, or all layers.
        ModelError: `model` is no model of transformers.
        SurgeryError: stock transformers cannot express what would be left.
    """
    clone = share(model_of(model))
    if removed := as_segments(segments):
        cut_segment_(clone, removed)
    return clone


def cut_segment_(model: Any, segments: Sequence[Segment]) -> None:
    """`cut` in place. Tensors that must change are replaced, never written to: a model that shares them stays as it
    was.
    """
    plan = plan_cut(model.config, type(model), segments)
    weights = model.state_dict(keep_vars=True)
    real, plain = (
        {name: tuple(tensor.shape) for name, tensor in held.items()} for held in (weights, plan.before.state_dict())
    )
    if odd := sorted(name for name in real.keys() | plain.keys() if real.get(name) != plain.get(name)):
        raise SurgeryError(  # the plan was made on a fresh model of the class
            f"this {type(model).__name__} is not what its class makes of its config "
            f"({len(odd)} tensors differ, first: {odd[0]})",
            "take off adapters, wrappers and quantization before cutting",
        )
    edits = plan.edits | config_cut.rescaled(model, plan)
    if (edits or plan.added) and is_spread(model):
        words = f"cutting a {type(model).__name__} changes weights, and they are sharded over several processes"
        raise SurgeryError(words, "where the model fits each process's memory: --place memory")
    modules = dict(model.named_modules(remove_duplicate=False))
    configs = _configs(modules, plan)
    edited = {name: edit(lambda key: weights[key].detach()) for name, edit in edits.items()}
    for name, attribute, value in plan.attributes:
        setattr(modules[name], attribute, value)
    for stack in (modules[name] for name in plan.stacks):
        for table in (stack._modules, stack._parameters):
            if entries := [*table.values()]:
                table.clear()
                table.update({str(new): entries[old] for new, old in enumerate(plan.kept)})
        if isinstance(stack, nn.ParameterList):
            stack._size = len(plan.kept)
    like = next(model.parameters())
    edited |= {name: like.new_zeros(shape) for name, shape in plan.added.items()}
    for name, new in (edited | dict.fromkeys(plan.dropped)).items():
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = like if name in plan.added else getattr(owner, leaf)
        if new is not None and isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            module.layers_are_rescaled = False
    for part, facts in configs:
        vars(part).clear()
        vars(part).update(facts)


def _configs(modules: dict[str, nn.Module], plan: CutPlan) -> list[tuple[Any, dict[str, Any]]]:
    """Every config object the model holds, with what it must say after the cut.

    Most modules share the parts of one config; some keep a private copy, which follows the freshly built model's.
    Nested config objects, which modules share, stay; each is brought up to date on its own.
    """
    after = dict(plan.after.named_modules(remove_duplicate=False))
    pairs = [*_pairs(modules[""].config, plan.config)]
    for name, module in modules.items():
        renamed = plan.rename(name)
        if hasattr(module, "config") and renamed in after:
            pairs += _pairs(module.config, getattr(after[renamed], "config", None))
    found: dict[int, tuple[Any, dict[str, Any]]] = {}
    for old, new in pairs:
        facts = {k: vars(old).get(k, v) if hasattr(v, "to_dict") else v for k, v in vars(new).items()}
        found.setdefault(id(old), (old, facts))
    return [*found.values()]


def _pairs(old: Any, new: Any) -> Iterator[tuple[Any, Any]]:
    """A config and those nested in it, each with its counterpart."""
    if type(old) is type(new) and hasattr(old, "to_dict"):
        yield old, new
        for name, value in vars(old).items():
            yield from _pairs(value, vars(new).get(name))
