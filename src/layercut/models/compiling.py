"""torch.compile of what runs most often, a decoder layer and the losses of logits: fewer kernels, of more work each.

    with compiled():                       # opened by the run where --compile is given
        search(model, tokens)              # wherever `fused(function)(...)` is called, compiled code runs

Layers of one class share one function, compiled once for all of them: their weights are its inputs. Sizes are dynamic,
so that a last, smaller batch needs no other code. A graph that breaks is an error, never a part that quietly runs as
before. What is compiled belongs to the `compiled` that is open and is dropped with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch

from layercut.errors import LayercutError, ModelError, first_line
from layercut.models.memory import ran_out

Found = TypeVar("Found")

WITHOUT = "leave out --compile"


class CompiledFunctions:
    """Functions compiled for one run, by what they are called with."""

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._known: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def call(self, function: Any, first: Any, *more: Any) -> Any:
        """The function's result, by compiled code."""
        key = (function, type(first), torch.is_grad_enabled())
        try:
            if key not in self._known:
                # torch keeps what it compiles with the code, and drops it with it: a copy leaves callers' caches alone
                copied = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
                self._known[key] = torch.compile(  # type: ignore[call-overload]
                    copied, fullgraph=True, dynamic=True, backend=self.backend, recompile_limit=16
                )  # fmt: skip
            with torch._dynamo.config.patch(specialize_float=True):  # else torch finds out, and compiles again
                return self._known[key](first, *more)
        except Exception as error:
            if ran_out(error) or isinstance(error, LayercutError):
                raise
            raise _failed(error) from error


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
        raise _failed(error) from error
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


def _failed(error: Exception) -> ModelError:
    """What is raised in the place of an error of torch's compiler."""
    return ModelError(f"torch.compile fails: {type(error).__name__}: {first_line(error)}", WITHOUT)
