"""Several processes that do one run together, started by torchrun or accelerate launch. Every stage may use it.

All run the same journey on the same arguments and hold the whole model. Each takes its part of the rows of tokens
(`share`), sums are all-reduced (`sum_`), and since all see the same sums all decide alike. What is no sum of rows the
main process does while the others wait (`on_main`). It writes the files, and all read them: the run folder lies on a
file system that all of them see. With one process every function here is the identity.

From torch rather than accelerate's PartialState come collectives on the CPU beside those on the GPU (sums in float64,
decisions), and their time limits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from layercut.errors import ConfigError, LayercutError

Result = TypeVar("Result")

LONGEST_SHARE, LONGEST_WAIT = timedelta(hours=6), timedelta(days=30)
"""A process may lag behind so far in shared work, or wait so long for the main one. A process that dies is noticed at
once, by its closed connections and by the launcher."""


@dataclass
class _Started:
    store: Any  # keys and values that all processes see, and that outlast a process
    control: Any  # the group in which decisions go round, on the CPU
    alone: int = 0  # while above 0 this process works by itself


_started: _Started | None = None


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_this_machine() -> int:
    """How many of the processes run on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _started else 1


def start() -> None:
    """Join the other processes, if there are any, by the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …)."""
    global _started
    if _started or not launched():
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        words = f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but {', '.join(missing)} not there"
        raise ConfigError(words, "start several processes with torchrun or accelerate launch, or unset WORLD_SIZE")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    store, rank, world = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=LONGEST_SHARE)
    control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    _started = _Started(dist.PrefixStore("layercut", store), control)


def stop() -> None:
    global _started
    if _started:
        _started = None
        dist.destroy_process_group()


def check_device(device: torch.device) -> None:
    here = on_this_machine()
    if device.type == "cpu" or here == 1:
        return
    if device.index is not None:
        hint = f"each takes its own: --device {device.type}"
        raise ConfigError(f"--device {device} is given to {here} processes", hint)
    if here > (count := torch.accelerator.device_count()):
        words = f"{here} processes were started on a machine with {count} {device.type} devices"
        raise ConfigError(words, f"start {count}, or give --device cpu")


# --- who is who ---------------------------------------------------------------------------------------------------


def _several() -> _Started | None:
    return None if _started is None or _started.alone else _started


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    """How many processes share the work that is being done now; 1 inside `on_main`."""
    return dist.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this process writes files and prints, also inside `on_main`."""
    return _started is None or dist.get_rank() == 0


# --- shared work --------------------------------------------------------------------------------------------------


def share(length: int) -> slice:
    """This process's part of range(length): in order, none twice, sizes differ by one at most; may be empty."""
    return slice(length * rank() // world(), length * (rank() + 1) // world())


def share_of_batches(length: int, batch: int) -> list[slice]:
    """This process's part of range(length), in batches; in smaller ones where some process would have none."""
    batch = max(1, min(batch, -(-length // world())))
    parts = [slice(begin, min(begin + batch, length)) for begin in range(0, length, batch)]
    return parts[share(len(parts))]


def sum_(*tensors: torch.Tensor) -> None:
    """All-reduce: replace tensors by their sums over all processes, the same bits in every one."""
    if _several():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def summed(values: list[float]) -> list[float]:
    """All-reduce of numbers, in float64."""
    if not _several():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    sum_(tensor)
    return tensor.tolist()


def most(value: int) -> int:
    """The largest of all processes' numbers (all-reduce with max)."""
    if not _several():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def barrier() -> None:
    if several := _several():
        dist.all_reduce(torch.zeros(1), group=several.control)


def from_main(value: Result) -> Result:
    """Broadcast the main process's value; for what might come out differently on another machine."""
    if not (several := _several()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=several.control, device=torch.device("cpu"))
    return box[0]


@contextmanager
def main_alone() -> Iterator[SimpleNamespace]:
    """Work that the main process alone does (where it is `mine`), while the others wait; all get its `value`, or fail.

    Inside `world()` is 1. Of its error, the others get a user's as it is, and a fault of layercut by its name.
    """
    work = SimpleNamespace(mine=is_main(), value=None)
    if not (several := _several()):
        yield work
        return
    barrier()
    error: Exception | None = None
    several.alone += work.mine
    try:
        yield work
    except Exception as caught:
        error = caught
    finally:
        several.alone -= work.mine
    told = error
    if error and not isinstance(error, LayercutError):
        told = RuntimeError(f"the main process failed: {type(error).__name__}")
    told, work.value = from_main((told, work.value))
    if failed := error or told:
        raise failed


def on_main(compute: Callable[[], Result]) -> Result:
    """Compute in the main process alone, and broadcast the value, or the error (`main_alone`)."""
    with main_alone() as work:
        if work.mine:
            work.value = compute()
    return work.value


# --- failing together ---------------------------------------------------------------------------------------------


@contextmanager
def first_to_fail(code: int) -> Iterator[int | None]:
    """Enter when this process is about to exit with `code`, and print the reason inside, if it yields None.

    Else another failed before, and its message is printed: it yields that one's exit code. For the launcher ends all
    processes as soon as one has ended.
    """
    if not _started:
        yield None
        return
    mine = f"{dist.get_rank()}:{code}"
    try:
        first = _started.store.compare_set("failed", "", mine).decode()
        if first != mine:
            _started.store.wait(["said"], timedelta(seconds=20))
    except RuntimeError:  # the store ended with the process that held it
        yield None
        return
    yield None if first == mine else int(first.partition(":")[2])
    if first == mine:
        _started.store.set("said", "yes")
