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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from layercut.estimate.shape import Shape
from layercut.estimate.work import Work

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

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)

    def seconds(self, shape: Shape, work: Work) -> float:
        """What a stage's work takes."""
        logits = (work.head_rows + work.head_backward_rows) * shape.window * shape.vocabulary
        moved = logits * LOGIT_BYTES + work.moved_bytes
        disk = work.read_bytes / self.disk if self.disk else work.read_bytes / self.memory
        called = work.decoded_layers * shape.total("kernels") / shape.layers
        decoded = work.decoded_bytes / self.matvec + called * self.launch * CALL
        computed = work.flops / self.flops + work.flops64 / self.flops64
        return computed + moved / self.memory + disk + decoded + work.fixed_seconds


def calibrate(shape: Shape, dtype: torch.dtype, device: torch.device, folder: Path) -> Rates:
    """Measure the rates. folder: on the disk that the model is, or will be, read from."""
    rows = min(8 * shape.window, 2048)
    width = min(shape.hidden, 8192)
    inner = max(shape.read)
    return Rates(
        flops=_matrix_rate(rows, width, inner, dtype, device),
        flops64=_matrix_rate(min(width, 2048), min(width, 2048), min(width, 2048), torch.float64, device),
        matvec=width * inner * dtype.itemsize / _matrix_seconds(1, width, inner, dtype, device),
        launch=_launch_seconds(dtype, device),
        memory=_memory_rate(device),
        disk=_disk_rate(folder),
    )


def _matrix_rate(rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of [rows, D] x [D, I]."""
    return 2 * rows * width * inner / _matrix_seconds(rows, width, inner, dtype, device)


def _matrix_seconds(rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    if device.type == "mps" and dtype == torch.float64:
        device = torch.device("cpu")  # it has no float64
    a = torch.ones(rows, width, dtype=dtype, device=device)
    b = torch.ones(inner, width, dtype=dtype, device=device)
    return _median_seconds(lambda: a @ b.T, device)


def _launch_seconds(dtype: torch.dtype, device: torch.device) -> float:
    x = torch.ones(8, dtype=dtype, device=device)

    def hundred() -> None:
        for _ in range(100):
            x.add_(0)

    return _median_seconds(hundred, device) / 100


def _memory_rate(device: torch.device) -> float:
    """Bytes a second read and written by an elementwise product of 128 MB."""
    x = torch.ones(32 * 2**20, device=device)
    return 2 * x.numel() * 4 / _median_seconds(lambda: x.mul_(1.0), device)


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
