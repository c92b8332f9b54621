"""A model larger than one device, sharded over several processes, of which each holds a part of every weight.

A weight is a DTensor, sharded along its first dimension; torch's FSDP2 (`fully_shard`) gathers a decoder layer from all
processes when it runs and drops it afterwards, and what is no layer when the model itself is called.

FSDP2 changes a module's class, refuses copies of it, and keeps every parameter in one place. Here two models share
weights, and clones are cut and healed. So a model *at rest* is a plain one whose parameters happen to be DTensors: it
is shared, cut and compared by the identity of its parameters as any other. `runnable` makes of it the copy that
FSDP2 runs, over the very same shards.

A gather needs all processes: over a sharded model they must run the same layers equally often, whatever rows each has
(`in_step`), and none may run it alone.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from layercut.distributed import processes

Part = TypeVar("Part")
UNIT = "gathered_as_one"  # attribute of a module that is gathered by itself: the decoder layers
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where a module keeps what is done around its forward; FSDP2 gathers and drops its weights there."""


def is_spread(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


# --- parts ----------------------------------------------------------------------------------------------------------


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor: the memory itself. All of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, as it holds a parameter: rows as even as torch.chunk splits them."""
    if not isinstance(parameter, DTensor):
        return whole
    size = math.ceil(len(whole) / dist.get_world_size())
    return whole[dist.get_rank() * size :][:size]


def whole(parameter: torch.Tensor, part: torch.Tensor | None = None) -> torch.Tensor:
    """A parameter, or what each process has computed for its shard of it, gathered from all of them."""
    if not isinstance(parameter, DTensor):
        return parameter if part is None else part
    if part is not None:
        parameter = _assembled(part, parameter.shape, parameter.device_mesh)
    return parameter.full_tensor()


def like(parameter: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """A frozen parameter with another whole value, sharded as the one it is for."""
    value = value.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        return _spread(value, local(parameter).device, parameter.device_mesh, requires_grad=False)
    return nn.Parameter(value if parameter.is_meta else value.to(parameter.device), requires_grad=False)


def bytes_held(model: nn.Module) -> int:
    return sum(local(p).nbytes for p in model.parameters())


def _spread(value: torch.Tensor, device: torch.device, mesh: DeviceMesh, *, requires_grad: bool) -> nn.Parameter:
    size = math.ceil(len(value) / dist.get_world_size())
    part = value[dist.get_rank() * size :][:size].to(device, copy=True).contiguous()
    return nn.Parameter(_assembled(part, value.shape, mesh), requires_grad=requires_grad)


def _assembled(part: torch.Tensor, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


# --- a model at rest ------------------------------------------------------------------------------------------------


def spread_(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Keep this process's shard of every weight, and drop the rest.

    Layers are taken one at a time, what is no layer at the end, so that no more need be whole than the layer that
    `layers` yields. Single numbers are not sharded.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in chain(layers, [model]):
        if module is not model:
            setattr(module, UNIT, True)
        parts: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for owner in module.modules():
            for name, p in owner._parameters.items():
                if p is None or isinstance(p, DTensor):
                    continue
                if p.dim() == 0:
                    p.data = p.data.to(device)
                    continue
                if id(p) not in parts:
                    parts[id(p)] = _spread(p.data, device, mesh, requires_grad=p.requires_grad)
                owner._parameters[name] = parts[id(p)]
            for buffer in owner._buffers.values():
                if buffer is not None:
                    buffer.data = buffer.data.to(device)


def whole_copy(layer: nn.Module) -> nn.Module:
    """A plain copy of a layer at rest with all of its weights in this process; `origin` says where they came from."""
    values = {id(p): nn.Parameter(whole(p.detach()), requires_grad=False) for p in layer.parameters()}
    for p in layer.parameters():
        values[id(p)].spread_as = p  # type: ignore[attr-defined]
    return copy.deepcopy(layer, values | {id(b): b for b in layer.buffers()})


def origin(parameter: nn.Parameter) -> nn.Parameter:
    """The sharded weight that a whole one was gathered from; else itself."""
    return getattr(parameter, "spread_as", parameter)


# --- a model that runs ----------------------------------------------------------------------------------------------


def runnable(model: Any) -> Any:
    """A copy of a sharded model at rest that can be called, over the same shards; any other model as it is."""
    if not is_spread(model) or isinstance(model, FSDPModule):
        return model
    running = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for module in [module for module in running.modules() if getattr(module, UNIT, False)]:
        _attach_(module)
    _attach_(running)
    return running


def trainable_copy(layer: nn.Module) -> nn.Module:
    """A layer at rest as one that runs, with trainable weights of its own; a backward pass sums their gradients over
    all processes, in float32, and leaves each its shard.
    """
    own = {
        id(p): nn.Parameter(p.detach().clone(), requires_grad=True) if p.is_floating_point() else p
        for p in layer.parameters()
    }
    running = copy.deepcopy(layer, own | {id(b): b for b in layer.buffers()})
    _attach_(running)
    return running


def _attach_(module: nn.Module) -> None:
    """Have FSDP2 gather this module's parameters, but for those of modules inside that it gathers already.

    FSDP2 parts whole parameters itself, so it is given empty ones of their shapes, in whose place the parts then go
    (as after `load_state_dict(assign=True)`; it looks again when it first runs). A part of fewer rows than that of
    the first process is then copied, to be padded, and lies elsewhere: never hold on to `local` of what has not run.
    """
    inside = {id(m) for unit in module.modules() if isinstance(unit, FSDPModule) for m in unit.modules()}
    owners = [owner for owner in module.modules() if id(owner) not in inside]
    held: list[tuple[nn.Module, str, Any]] = [
        (owner, name, p) for owner in owners for name, p in owner._parameters.items() if isinstance(p, DTensor)
    ]
    if not held:
        return
    empty = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for _, _, p in held
    }
    for owner, name, p in held:
        owner._parameters[name] = empty[id(p)]
    fully_shard(
        module,
        mesh=held[0][2].device_mesh,
        reshard_after_forward=True,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        ignored_params={p for owner in owners for p in owner.parameters(recurse=False) if p.dim() == 0},
    )
    for owner, name, p in held:
        owner._parameters[name] = p
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)  # a sum: each process weighs its rows
    module.set_force_sum_reduction_for_comms(True)  # else one that scales, which gloo does not know
    module.set_reduce_scatter_unused_params(True)  # an expert that one process's tokens do not reach


def gather_ahead(layer: nn.Module) -> None:
    if isinstance(layer, FSDPModule):
        layer.unshard(async_op=True)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """While open, the layer's weights are whole, for running its bare forward."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


@contextmanager
def not_gathering(layers: Iterable[nn.Module]) -> Iterator[None]:
    """While open, a call of these layers gathers nothing: for calls in which they do not compute."""
    found = [layer for layer in layers if isinstance(layer, FSDPModule)]
    before = [{name: vars(layer)[name] for name in HOOKS} for layer in found]
    try:
        for layer in found:
            vars(layer).update({name: OrderedDict() for name in HOOKS})
        yield
    finally:
        for layer, hooks in zip(found, before, strict=True):
            vars(layer).update(hooks)


def in_step(model: nn.Module, parts: Sequence[Part], spare: Part) -> list[tuple[Part, bool]]:
    """This process's parts of the work, each with whether it counts: over a sharded model as many as the process with
    the most has, `spare` being run without counting, or the others would wait for weights that this one has parts of.
    """
    mine = [(part, True) for part in parts]
    if not is_spread(model):
        return mine
    return mine + [(spare, False)] * (processes.most(len(mine)) - len(mine))
