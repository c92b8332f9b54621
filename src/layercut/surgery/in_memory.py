"""Cut layers out of a model in memory: `cut` in a clone, `cut_segment_` in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from layercut.distributed.sharding import is_spread
from layercut.errors import SurgeryError
from layercut.models.decoder_stack import share
from layercut.models.runner import model_of
from layercut.segments import Segment, as_segments
from layercut.surgery.cut_plan import CutPlan, plan_cut
from layercut.surgery.special_layers import rescaled


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
    """`cut` in place. Tensors that must change are replaced, never written to: a model that shares them stays as it
    was.
    """
    plan = plan_cut(model.config, type(model), segments)
    weights = model.state_dict(keep_vars=True)
    real = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    plain = {name: tuple(tensor.shape) for name, tensor in plan.before.state_dict(keep_vars=True).items()}
    if odd := sorted(name for name in real.keys() | plain.keys() if real.get(name) != plain.get(name)):
        raise SurgeryError(  # the plan was made on a fresh model of the class
            f"this {type(model).__name__} is not what its class makes of its config "
            f"({len(odd)} tensors differ, first: {odd[0]})",
            "take off adapters, wrappers and quantization before cutting",
        )
    edits = plan.edits | rescaled(model, plan)
    if (edits or plan.added) and is_spread(model):
        raise SurgeryError(
            f"cutting a {type(model).__name__} changes weights, and they are sharded over several processes",
            "where the model fits each process's memory: --shard off",
        )
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
