"""Cut layers out of a model in memory: `cut` in a clone, `cut_segment_` in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from layercut.distributed.sharding import is_spread
from layercut.errors import SurgeryError
from layercut.models.model_in_memory import model_of
from layercut.models.weight_sharing import share
from layercut.segments import Segment, as_segments
from layercut.surgery.cut_plan import CutPlan
from layercut.surgery.planning import plan_cut
from layercut.surgery.weight_adjustments import rescaled


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
    removed = as_segments(segments)
    if removed:
        cut_segment_(clone, removed)
    return clone


def cut_segment_(model: Any, segments: Sequence[Segment]) -> None:
    """Remove the layers of `segments` from a transformers model, in place; it can be run and saved at once.

    The layers leave every list that has one entry per layer; layer indices, counts and per-layer facts of the
    config follow; tensors that must change are replaced, never written to, so a model that shares them stays
    as it was.
    `model.config.original_layer_index` says where the kept layers stood in the first model of all.
    """
    plan = plan_cut(model.config, type(model), segments)
    _check_same(model, plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = _configs(modules, plan)
    weights = model.state_dict(keep_vars=True)
    edits = plan.edits | rescaled(model, plan)
    if (edits or plan.added) and is_spread(model):
        raise SurgeryError(
            f"cutting a {type(model).__name__} changes weights, and they are sharded over several processes",
            "where the model fits each process's memory: --shard off",
        )
    edited = {name: edit(lambda key: weights[key].detach()) for name, edit in edits.items()}
    for name, attribute, value in plan.attributes:
        setattr(modules[name], attribute, value)
    for stack in plan.stacks:
        _keep_(modules[stack], plan.kept)
    for name, tensor in edited.items():
        _replace_(model, name, tensor)
    for name in plan.dropped:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, None)
    for name, shape in plan.added.items():
        owner, _, leaf = name.rpartition(".")
        like = next(model.parameters())
        setattr(
            model.get_submodule(owner),
            leaf,
            nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad),
        )
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            module.layers_are_rescaled = False
    for part, facts in parts:
        vars(part).clear()
        vars(part).update(facts)


def _check_same(model: Any, plan: CutPlan) -> None:
    """Refuse a model that was changed since its class built it: the plan was made on a fresh model of the class."""
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    plain = {name: tuple(tensor.shape) for name, tensor in plan.before.state_dict(keep_vars=True).items()}
    odd = sorted(name for name in real.keys() | plain.keys() if real.get(name) != plain.get(name))
    if odd:
        raise SurgeryError(
            f"this {type(model).__name__} is not what its class makes of its config "
            f"({len(odd)} tensors differ, first: {odd[0]})",
            "take off adapters, wrappers and quantization before cutting",
        )


def _configs(modules: dict[str, nn.Module], plan: CutPlan) -> list[tuple[Any, dict[str, Any]]]:
    """Every config object the model holds, with what it must say after the cut.

    Most modules share the parts of one config; some keep a private copy, which follows the freshly built
    model's.
    """
    seen: dict[int, tuple[Any, dict[str, Any]]] = {}
    after = dict(plan.after.named_modules(remove_duplicate=False))
    pairs = list(_pairs(modules[""].config, plan.config))
    for name, module in modules.items():
        renamed = plan.rename(name)
        if hasattr(module, "config") and renamed is not None and renamed in after:
            pairs += _pairs(module.config, getattr(after[renamed], "config", None))
    for old, new in pairs:
        seen.setdefault(id(old), (old, _with_children(vars(new), old)))
    return list(seen.values())


def _pairs(old: Any, new: Any) -> Iterator[tuple[Any, Any]]:
    """A config and those nested in it, each with its counterpart."""
    if type(old) is type(new) and hasattr(old, "to_dict"):
        yield old, new
        for name, value in vars(old).items():
            yield from _pairs(value, vars(new).get(name))


def _with_children(facts: dict[str, Any], old: Any) -> dict[str, Any]:
    """Keep the nested config objects themselves, which modules share; each is brought up to date on its own."""
    return {k: vars(old).get(k, v) if hasattr(v, "to_dict") else v for k, v in facts.items()}


def _keep_(stack: nn.Module, kept: Sequence[int]) -> None:
    """Leave only the entries `kept` in a list of modules or parameters, renumbered from 0."""
    tables: tuple[dict[str, Any], ...] = (stack._modules, stack._parameters)
    for table in tables:
        if table:
            entries = list(table.values())
            table.clear()
            table.update({str(new): entries[old] for new, old in enumerate(kept)})
    if isinstance(stack, nn.ParameterList):
        stack._size = len(kept)


def _replace_(model: Any, name: str, new: Any) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    setattr(
        owner,
        leaf,
        nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new,
    )
