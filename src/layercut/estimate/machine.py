"""This machine, measured for a few seconds: how fast it multiplies, moves memory and reads its disk.

And what a stage's work takes at these rates: the arithmetic of layers and head, the passes over the logits that a
divergence makes, and what comes from the disk.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from layercut.models.cost import Shape, Work
from layercut.models.devices import place_of_float64

ENOUGH = 0.4
"""Seconds spent on each rate."""

LOGIT_BYTES = 28
"""Bytes moved for each number of a compared set of logits: a guess from the passes it takes (written by the head,
copied to float32, read for the maximum, exponentials written and read, read again against p)."""


CALL = 3
"""An operation inside a model costs so many times one in a loop: modules, hooks and the generation loop are Python
too. A guess."""


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    flops: float
    """Floating-point operations of a matrix product at the model's widths, in its number format."""
    flops64: float
    matvec: float
    """Bytes of weights that go by when one token is multiplied with a matrix of the model's widths."""
    launch: float
    """Seconds of an operation on a tensor that is next to nothing."""
    memory: float
    """Bytes moved, read and written, by an elementwise operation."""
    disk: float | None
    """Bytes read from a file that is in no cache; None where the system does not let one be dropped from it."""

    def seconds(self, shape: Shape, work: Work) -> float:
        """What a stage's work takes."""
        moved = work.head_rows * shape.window * shape.vocabulary * LOGIT_BYTES + work.moved_bytes
        disk = work.read_bytes / self.disk if self.disk else work.read_bytes / self.memory
        called = work.decoded_layers * shape.mean("kernels")
        decoded = work.decoded_bytes / self.matvec + called * self.launch * CALL
        computed = work.flops / self.flops + work.flops64 / self.flops64
        return computed + moved / self.memory + disk + decoded + work.fixed_seconds


def calibrate(shape: Shape, dtype: torch.dtype, device: torch.device, folder: Path) -> Rates:
    """Measure the rates."""
    width, inner = min(shape.hidden, 8192), max(shape.read)
    rows, square = min(8 * shape.window, 2048), min(width, 2048)
    place64 = place_of_float64(device)
    small, large = torch.ones(8, dtype=dtype, device=device), torch.ones(32 * 2**20, device=device)
    return Rates(
        flops=2 * rows * width * inner / _product_seconds(rows, width, inner, dtype, device),
        flops64=2 * square**3 / _product_seconds(square, square, square, torch.float64, place64),
        matvec=width * inner * dtype.itemsize / _product_seconds(1, width, inner, dtype, device),
        launch=_median_seconds(lambda: [small.add_(0) for _ in range(100)], device) / 100,
        memory=2 * large.nbytes / _median_seconds(lambda: large.mul_(1.0), device),
        disk=_disk_rate(folder),
    )


def _product_seconds(rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of [rows, D] x [D, I]."""
    a = torch.ones(rows, width, dtype=dtype, device=device)
    b = torch.ones(inner, width, dtype=dtype, device=device)
    return _median_seconds(lambda: a @ b.T, device)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of repeats within `ENOUGH` seconds, the first left out."""
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < 3 or (time.perf_counter() - begun < ENOUGH and len(seconds) < 1000):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _disk_rate(folder: Path, size: int = 64 * 2**20) -> float | None:
    """Bytes a second of reading a file that was just written and then dropped from the cache."""
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=folder if os.access(folder, os.W_OK) else None) as file:
            file.write(os.urandom(2**20) * (size // 2**20))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            with open(file.name, "rb", buffering=0) as again:
                while again.read(2**22):
                    pass
            return size / (time.perf_counter() - begun)
    except OSError:
        return None
