"""Memory of this machine, of this process and of its accelerator, in bytes; what of it a pass may take, and no more.

Stages ask `budget` how much they do at once. Where memory runs out all the same, they go on in smaller parts:

    with memory_limit(None):               # opened by the run, and by public functions
        for part in (parts := ShrinkingParts("search", work, device)):
            with parts.trying(part):
                ...                        # a part that runs out of memory comes again, as two halves
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from layercut import progress
from layercut.distributed import processes
from layercut.errors import ModelError
from layercut.files.sizes import parse_bytes
from layercut.models.batch_sizes import Budget

Part = TypeVar("Part", bound=Any)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: an accelerator's, or the machine's without swapping.

    The machine's within a container's limit: of several processes on it each has an even part, within the limits that
    the process has by itself (`ulimit -v`, `ulimit -d`).
    """
    import psutil

    free = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")  # cgroup v2, as seen from inside a container
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = int((group / "memory.current").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(cache["inactive_file"]))
    except (OSError, ValueError, KeyError):
        pass
    here = min([min(free) // processes.on_this_machine(), *_within_limits()])
    if device.type != "cpu" and (own := accelerator_bytes(device)) is not None:
        return own
    return here if (most := most_bytes()) is None else min(here, max(0, most - (resident_bytes() or 0)))


def accelerator_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on an accelerator, what torch keeps for reuse counted as free."""
    try:
        used, kept = torch.accelerator.memory_allocated(device), torch.accelerator.memory_reserved(device)
        free = torch.accelerator.get_memory_info(device)[0] + kept - used
    except (RuntimeError, NotImplementedError, AttributeError):  # some backends do not count
        return None
    return max(0, free if (most := most_bytes()) is None else min(free, most - used))


def _within_limits() -> Iterator[int]:
    """Bytes that this process may still ask the kernel for, by each limit that is set on it."""
    for limit, counted in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        allowed, _ = resource.getrlimit(limit)
        with contextlib.suppress(OSError):  # where there is no /proc, limits are not counted
            if allowed != resource.RLIM_INFINITY:
                lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                yield max(0, allowed - 1024 * int(lines[counted].split()[0]))


def resident_bytes() -> int | None:
    """What this process holds now: Python and its libraries, as in any run. None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def memory_bytes() -> int | None:
    """The machine's memory."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def whole_bytes(device: torch.device) -> int | None:
    """All memory that a device has, used or not, within a container's limit and what `memory_limit` allows.

    Unlike what is available it is the same whenever it is asked.
    """
    found = [each for each in (memory_bytes(), most_bytes()) if each is not None]
    with contextlib.suppress(OSError, ValueError):
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
            own = int(torch.accelerator.get_memory_info(device)[1])
            return own if (most := most_bytes()) is None else min(own, most)
    return min(found, default=None)


def release_freed() -> None:
    """Return freed memory to the system: the C library keeps it otherwise, where it has `malloc_trim` (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""What glibc's malloc.h calls by these names."""


def reuse_freed(most: int = 256 * 2**20) -> None:
    """From now on let glibc keep up to so many freed bytes for later allocations.

    For work whose steps allocate and free the same again and again: otherwise it returns pages and has each zeroed
    again, which took 5 % of tuning on a CPU (docs/log.md). `release_freed` still returns all.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc, whose numbers these are
        library.mallopt(_M_TRIM_THRESHOLD, most)
        library.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest there is: larger pieces are returned at once


# --- what a pass may take ---


@dataclass
class _Limits:
    most: int | None = None
    halvings: int = 0
    most_rows: int = sys.maxsize


_limits: ContextVar[_Limits | None] = ContextVar("layercut_memory", default=None)


@contextlib.contextmanager
def memory_limit(most: int | str | None = None) -> Iterator[None]:
    """While open, stages take no more memory than this on the device that computes, and remember where it ran out.

    One that is opened within another keeps the other's limit where it gives none.

    Args:
        most: bytes, or a size such as "20GB", weights included; None: what is free.

    Yields:
        Nothing.

    Raises:
        ConfigError: text that is no size.
    """
    most = parse_bytes("--max-memory", most) if isinstance(most, str) else most
    if most is None and _limits.get() is not None:
        yield
        return
    token = _limits.set(_Limits(most))
    try:
        yield
    finally:
        _limits.reset(token)


def most_bytes() -> int | None:
    """The limit of the innermost `memory_limit`; None where there is none."""
    limits = _limits.get()
    return limits.most if limits else None


def budget(device: torch.device, free: int | None = None) -> Budget:
    """What one pass may take on a device, its weights being there.

    That of a CPU is the same whatever is free, so that results are, unless a limit is given; both are halved for each
    time that memory ran out.
    """
    limits = _limits.get()
    if device.type != "cpu":
        found = Budget.of_accelerator(available_bytes(device) if free is None else free)
    else:
        found = Budget.of_cpu()
        if limits and limits.most is not None:
            found = found.least(Budget.of_accelerator(available_bytes(device)))
    return found.divided(2**limits.halvings, limits.most_rows) if limits and limits.halvings else found


OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""Words of the errors of devices whose own class of error is not torch's."""
MOST_HALVINGS = 16


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def halve_(error: BaseException, stage: str, device: torch.device, rows: int) -> None:
    """After an error that says so: halve the budget for what follows, and say it. Any other error is raised again."""
    limits = _limits.get()
    if not ran_out(error) or limits is None:
        raise error
    if limits.halvings == MOST_HALVINGS:
        raise ModelError(
            f"{stage} runs out of memory on {device} even with the least that can be done at once",
            f"read the layers from disk: --stream on; or give shorter rows: {rows_of(stage)} 128",
        ) from error
    limits.halvings += 1
    limits.most_rows = min(limits.most_rows, max(1, rows // 2))
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    release_freed()
    progress.warn(stage, f"out of memory on {device}: going on with 1/{2**limits.halvings} as much at once")


def rows_of(stage: str) -> str:
    """The flags by which the rows of a stage are made shorter."""
    return "--tune-window 128 --window" if stage == "tune" else "--window"


class ShrinkingParts(Generic[Part]):
    """Work in parts; one that runs out of memory is taken again as two halves, by half the budget."""

    def __init__(self, stage: str, parts: Iterable[Part], device: torch.device, *, alone: bool = True) -> None:
        """Nothing is done yet."""
        self.stage, self.device, self.alone = stage, device, alone
        self.left = deque(parts)

    def __iter__(self) -> Iterator[Part]:
        while self.left:
            yield self.left.popleft()

    @contextlib.contextmanager
    def trying(self, part: Part) -> Iterator[None]:
        """While open, work on a part, to whose results nothing was added yet when it fails."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not self.alone:
                raise
            failed: BaseException | None = error
        else:
            failed = None
        if failed is not None:  # out of the handler: the error's traceback would keep the part's tensors
            failed.__traceback__ = failed.__traceback__ if not ran_out(failed) else None
            halve_(failed, self.stage, self.device, rows_in(part))
            self.left.extendleft(reversed(halves(part)))


def rows_in(part: Any) -> int:
    """Rows of what `halves` takes."""
    if isinstance(part, tuple):
        return rows_in(part[0])
    if isinstance(part, list):
        return sum(map(rows_in, part))
    if isinstance(part, int):
        return 1
    return part.stop - part.start if isinstance(part, slice) else len(part)


def halves(part: Any) -> list[Any]:
    """Two parts of a part, or itself where it is one row: a slice, rows [N, …], a list of these, a tuple with one."""
    if isinstance(part, tuple):
        return [(half, *part[1:]) for half in halves(part[0])]
    if isinstance(part, list):
        middle = len(part) // 2
        return [part[:middle], part[middle:]] if middle else [[half] for half in halves(part[0])]
    if isinstance(part, int):
        return [part]
    if isinstance(part, slice):
        middle = (part.start + part.stop + 1) // 2
        return [slice(part.start, middle), slice(middle, part.stop)] if middle < part.stop else [part]
    return list(part.split((len(part) + 1) // 2))
