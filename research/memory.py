"""Resident memory, as Linux counts it; no dependencies, so that a peer's interpreter can read it too."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from pathlib import Path


def status(key: str, pid: int | str = "self") -> int:
    """Bytes of a line of /proc/PID/status; 0 where the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


def reset_peak() -> int:
    """Set the high-water mark back to what is resident now; that."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def high_water() -> int:
    return status("VmHWM")


def settled_bytes() -> int:
    """Resident bytes once what is unused is given back, and the peak counted anew from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return reset_peak()


class Children:
    """The peak of this process and its children together, sampled."""

    def __init__(self) -> None:
        self.peak, self.running = 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        me = os.getpid()
        while self.running:
            pids = Path(f"/proc/{me}/task/{me}/children").read_text().split()
            self.peak = max(self.peak, status("VmRSS") + sum(status("VmRSS", pid) for pid in pids))
            time.sleep(0.02)

    def stop(self) -> int:
        self.running = False
        self.thread.join()
        return self.peak
