"""torch.compile of what runs most often, a decoder layer and the losses of logits: fewer kernels, of more work each.

    with compiled():                       # opened by the run where --compile is given
        search(model, tokens)              # wherever `fused(function)(...)` is called, compiled code runs

Layers of one class share one function, compiled once for all of them: their weights are its inputs. Sizes are dynamic,
so that a last, smaller batch needs no other code; torch makes another one for a batch of one row, for weights that
take gradients, and for each kind of mask. A graph that breaks is an error, never a part that quietly runs as before,
and the first results of each are compared with those of the plain function.

What is compiled belongs to the `compiled` that is open and is dropped with it: it hangs on copies of the functions'
code, so that a caller's own compiled functions, limits and caches are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from layercut.errors import ConfigError, LayercutError, ModelError, first_line
from layercut.models.memory import ran_out

Found = TypeVar("Found")

WITHOUT = "leave out --compile"
MOST_VERSIONS = 16
"""Of one function for one class of layer; torch's own limit is 8."""


class CompiledFunctions:
    """Functions compiled for one run, by what they are called with."""

    def __init__(self, backend: str = "inductor") -> None:
        """Nothing is compiled yet."""
        self.backend = backend
        self._known: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def call(self, function: Callable[..., Found], first: Any, *more: Any) -> Found:
        """The function's result, by compiled code."""
        key = (function, type(first), torch.is_grad_enabled())
        known = key in self._known
        try:
            if not known:
                if self.backend == "inductor":
                    need_compiler(_device_of(first, *more))
                self._known[key] = self._compiled(function)
            with torch._dynamo.config.patch(specialize_float=True):  # else torch finds out, and compiles again
                found = self._known[key](first, *more)
        except Exception as error:
            if ran_out(error) or isinstance(error, LayercutError):
                raise
            raise failed(error) from error
        if not known:
            with torch.no_grad(), not_compiled():
                check_same(function(first, *more), found, type(first).__name__)
        return found

    def _compiled(self, function: Any) -> Callable[..., Any]:
        """The function with code of its own: torch keeps what it compiles with the code, and drops it with it."""
        copied = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        return torch.compile(  # type: ignore[call-overload]
            copied, fullgraph=True, dynamic=True, backend=self.backend, recompile_limit=MOST_VERSIONS
        )  # fmt: skip


_open: ContextVar[CompiledFunctions | None] = ContextVar("layercut_compiled", default=None)


@contextmanager
def compiled(wanted: bool = True, *, backend: str = "inductor") -> Iterator[None]:
    """While open, layers and losses are compiled as they are first called, in searches, tuning and evaluations.

    One that is opened within another shares what that has compiled.

    Args:
        wanted: False leaves all as it is.
        backend: of torch.compile.

    Yields:
        Nothing.

    Raises:
        ModelError: something cannot be compiled, also where torch finds that out only in a backward pass.
    """
    if not wanted or _open.get() is not None:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError

    token = _open.set(CompiledFunctions(backend))
    try:
        yield
    except (BackendCompilerFailed, CppCompileError) as error:  # of a backward pass, compiled when it first runs
        raise failed(error) from error
    finally:
        _open.reset(token)


@contextmanager
def not_compiled() -> Iterator[None]:
    """While open, everything runs as without `compiled`: for a few tokens of another shape, which would not pay."""
    token = _open.set(None)
    try:
        yield
    finally:
        _open.reset(token)


def opened() -> CompiledFunctions | None:
    """What is compiled now; None where nothing is to be."""
    return _open.get()


def fused(function: Callable[..., Found]) -> Callable[..., Found]:
    """A function: as compiled code where `compiled` is open, else itself."""
    if torch.compiler.is_compiling():  # one within another is part of it
        return function
    functions = _open.get()
    return function if functions is None else partial(functions.call, function)


def failed(error: Exception) -> ModelError:
    """What is raised in the place of an error of torch's compiler."""
    return ModelError(f"torch.compile fails: {type(error).__name__}: {first_line(error)}", WITHOUT)


def need_compiler(device: torch.device) -> None:
    """See whether torch has what it compiles with."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ConfigError(
                "--compile needs a C++ compiler for the CPU, and there is none", f"install g++ or clang, or {WITHOUT}"
            ) from error
    elif device.type in ("cuda", "xpu"):
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                f"--compile needs Triton for {device.type}, and it is not there or does not know the device",
                f"install triton, or {WITHOUT}",
            )


def most_rounding(expected: torch.Tensor) -> float:
    """By how much a result may differ where it is computed in another order.

    2^10 units of its largest number's last bit, and a twentieth of that number at most.
    """
    return min(2**10 * torch.finfo(expected.dtype).eps, 0.05) * expected.float().nan_to_num().abs().max().item()


def check_same(expected: Any, got: Any, name: str) -> None:
    """Compare what compiled code returned with what the plain function does."""
    for one, other in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if not isinstance(one, torch.Tensor) or not one.is_floating_point() or not one.numel():
            continue
        away = (one.float() - other.detach().float()).nan_to_num().abs().max().item()
        if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()) or away > most_rounding(one):
            raise ModelError(
                f"compiled, {name} gives other results: they differ by up to {away:.2g}, more than rounding", WITHOUT
            )


def _device_of(*arguments: Any) -> torch.device:
    """That of the first tensor among arguments."""
    leaves = tree_leaves(arguments)
    return next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
