"""A stand-in accelerator: devices standin:0 and standin:1, whose tensors the CPU's own kernels compute.

What a GPU would refuse or make wait is refused or counted here, on any machine:

* an operation on tensors of several devices is refused, but for 0-dimensional ones of the CPU, as torch allows;
* there is no float64, as on Apple's GPUs;
* `counts` holds operations on the device and bytes copied between devices;
* memory is counted by device, so that its peak can be asked for as of CUDA.

torch's Python backend over PrivateUse1 makes the tensors that are created on the device; they are a tensor subclass
over a CPU tensor, whose every operation comes to `__torch_dispatch__`. `present()` is how tests use it: outside it no
accelerator is there. A process that is started inside finds the device too, by the entry point that torch loads
backends from.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

NAME = "standin"
AVAILABLE = "LAYERCUT_STAND_IN"
"""Set, in the environment, to how many devices there are."""
MEMORY = 4 * 2**30
"""Bytes of each device."""
WIDE = (torch.float64, torch.complex128)


@dataclass
class Counts:
    """What has happened on all devices since they are present."""

    launches: int = 0
    between: int = 0
    """Bytes."""


counts = Counts()
_held: dict[int, int] = {}
_peak: dict[int, int] = {}


class CrossedDevicesError(RuntimeError):
    """An operation on tensors of several devices."""


class StandInTensor(torch.Tensor):
    """A tensor of the device, over a CPU tensor with its numbers."""

    raw: torch.Tensor
    on: torch.device

    @staticmethod
    def __new__(cls, raw: torch.Tensor, on: torch.device) -> Any:
        if raw.dtype in WIDE:
            raise TypeError(f"{NAME} has no {raw.dtype}")
        self = torch.Tensor._make_subclass(cls, raw, False, dispatch_device=True, device_for_backend_keys=on)
        self.raw, self.on = raw, on
        _account(raw.untyped_storage(), on.index)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw} on {self.on}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone()
            parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.name().partition("::")[2].partition(".")[0]
    if func is torch.ops.prim.device.default:
        return args[0].on
    if name in ("copy_", "_to_copy"):
        return _copied(func, args, kwargs)
    if name.startswith("_foreach_") and len({t.device for t in args[0]}) > 1:
        return _by_device(func, args, kwargs)
    own: list[StandInTensor] = []
    foreign: list[torch.Tensor] = []
    cpu_args = _unwrapped(args, own, foreign)
    cpu_kwargs = {name: _unwrapped(value, own, foreign) for name, value in kwargs.items()}
    places = {tensor.on for tensor in own}
    if len(places) > 1 or (places and foreign):
        raise CrossedDevicesError(f"{func} of tensors on {sorted(map(str, places | {x.device for x in foreign}))}")
    on = _place(kwargs["device"]) if kwargs.get("device") is not None else places.pop()
    counts.launches += 1
    if "device" in cpu_kwargs:
        cpu_kwargs["device"] = torch.device("cpu")
    out = func(*cpu_args, **cpu_kwargs)
    if on.type != NAME:
        return out
    raws = {id(tensor.raw): tensor for tensor in own}  # in-place operations return what they were given
    if isinstance(out, torch.Tensor):
        return raws[id(out)] if id(out) in raws else StandInTensor(out, on)
    return tree_map_only(torch.Tensor, lambda t: raws[id(t)] if id(t) in raws else StandInTensor(t, on), out)


def _by_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on lists of tensors: for each place in the lists by itself, as torch does over several devices."""
    found = [func(*([each[i]] if type(each) is list else each for each in args), **kwargs) for i in range(len(args[0]))]
    return None if None in found else [one for (one,) in found]


def _unwrapped(value: Any, own: list[StandInTensor], foreign: list[torch.Tensor]) -> Any:
    """An argument as the CPU takes it. Tensors of the device are added to `own`, those of the CPU to `foreign`."""
    if isinstance(value, StandInTensor):
        own.append(value)
        return value.raw
    if isinstance(value, torch.Tensor) and value.dim():
        foreign.append(value)
    return type(value)(_unwrapped(one, own, foreign) for one in value) if type(value) in (list, tuple) else value


def _copied(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`copy_` and `_to_copy`, the operations that may cross devices."""
    counts.launches += 1
    if func._schema.name == "aten::copy_":
        target, source = args[0], args[1]
        _count_copy(source, target.device)
        _raw(target).copy_(_raw(source))
        return target
    source = args[0]
    on = _place(kwargs["device"]) if kwargs.get("device") is not None else source.device
    _count_copy(source, on)
    out = func(raw := _raw(source), *args[1:], **{**kwargs, "device": torch.device("cpu")})
    out = out.clone() if out is raw else out
    return StandInTensor(out, on) if on.type == NAME else out


def _count_copy(source: torch.Tensor, to: torch.device) -> None:
    if source.device != to and NAME == to.type == source.device.type:
        counts.between += source.nbytes


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.raw if isinstance(tensor, StandInTensor) else tensor


def _place(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(NAME, device.index or 0) if device.type == NAME else device


# --- memory ---------------------------------------------------------------------------------------------------------


_storages: dict[int, int] = {}


def _account(storage: Any, index: int) -> None:
    key = storage._cdata
    if key in _storages:
        return
    size = _storages[key] = storage.nbytes()
    _held[index] = _held.get(index, 0) + size
    _peak[index] = max(_peak.get(index, 0), _held[index])
    weakref.finalize(storage, _freed, key, index)


def _freed(key: int, index: int) -> None:
    _held[index] -= _storages.pop(key, 0)


class _Module:
    """torch.standin: what torch.cuda has, as far as anyone asks."""

    is_initialized = is_available = lambda self: self.device_count() > 0
    device_count = lambda self: int(os.environ.get(AVAILABLE, "0"))  # noqa: E731
    current_device = lambda self: 0  # noqa: E731
    _is_in_bad_fork = lambda self: False  # noqa: E731
    set_device = manual_seed_all = synchronize = lambda self, given=None: None
    empty_cache = lambda self: None  # noqa: E731
    get_rng_state = lambda self, device=None: torch.get_rng_state()  # noqa: E731  random numbers are the CPU's
    set_rng_state = lambda self, state, device=None: torch.set_rng_state(state)  # noqa: E731
    get_amp_supported_dtype = lambda self: [torch.float16, torch.bfloat16]  # noqa: E731
    get_device_name = lambda self, device=None: "stand-in accelerator"  # noqa: E731
    memory_allocated = memory_reserved = lambda self, device=0: _held.get(_index(device), 0)
    max_memory_allocated = lambda self, device=0: _peak.get(_index(device), 0)  # noqa: E731
    mem_get_info = lambda self, device=0: (MEMORY - self.memory_allocated(device), MEMORY)  # noqa: E731

    def reset_peak_memory_stats(self, device: Any = 0) -> None:
        _peak[_index(device)] = _held.get(_index(device), 0)


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device or NAME).index or 0


def _answer_for_accelerator_(module: _Module) -> None:
    """While devices are there, torch.accelerator asks the module what it would ask an allocator written in C++."""
    asked = {name: name for name in ("synchronize", "empty_cache", "memory_allocated", "memory_reserved",
                                     "max_memory_allocated", "reset_peak_memory_stats")}  # fmt: skip

    def either(own: Any, torchs: Any) -> Any:
        return lambda *args: (own if module.is_available() else torchs)(*args)

    for name, own in {**asked, "get_memory_info": "mem_get_info", "set_device_index": "set_device"}.items():
        setattr(torch.accelerator, name, either(getattr(module, own), getattr(torch.accelerator, name)))


# --- registration ---------------------------------------------------------------------------------------------------


_libraries: list[Any] = []


def register() -> None:
    """Have torch know the device; once for a process. It is there only where the environment says so."""
    if _libraries:
        return
    from torch.utils import backend_registration

    module = _Module()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _answer_for_accelerator_(module)
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    aten.impl("copy_", lambda *args: _copied(torch.ops.aten.copy_.default, args, {}), "PrivateUse1")
    _libraries.extend((every, aten))


@contextmanager
def present(folder: Path, devices: int = 1) -> Iterator[Counts]:
    """While open, so many devices are there, also for processes that are started.

    Autograd's threads by device are switched off: torch's Python backend has one of them.
    """
    register()
    info = folder / "stand_in-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\n{NAME} = {__name__}:register\n")
    before, swapped = list(sys.path), torch.__future__.get_swap_module_params_on_conversion()
    sys.path[:0] = [str(folder), str(Path(__file__).parent)]
    os.environ[AVAILABLE] = str(devices)
    # parameters keep their identity when a module is moved, as between the CPU and CUDA
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            counts.launches = counts.between = 0
            yield counts
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        del os.environ[AVAILABLE]
        sys.path[:] = before
