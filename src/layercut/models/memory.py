"""Memory of this machine and of this process, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from layercut.distributed import processes


def available_bytes(device: torch.device) -> int:
    """Memory that can be allocated without swapping: of the machine, within a container's limit, and of the device.

    Of several processes on a machine each has an even part of it, within the limits that the process has by itself
    (`ulimit -v`, `ulimit -d`).
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
    return min(here, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else here


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
