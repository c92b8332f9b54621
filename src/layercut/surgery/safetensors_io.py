"""Safetensors files as headers and byte ranges: tensors are copied by the kernel, not through Python.

Layout: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the
data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from layercut.errors import ModelError

CHUNK = 1 << 26


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file of which only the header was read."""

    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Output:
    """A tensor to write: a range of an existing file, or bytes made when they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    source: Entry | None = None
    make: Callable[[], bytes] | None = None


def read_shard(file: Path) -> Shard:
    """Read a file's header."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > os.fstat(stream.fileno()).st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(name, facts, 8 + length) for name, facts in header.items()}
            end = max((e.start + e.size for e in entries.values()), default=8 + length)
            if end > os.fstat(stream.fileno()).st_size:
                raise ValueError(f"it ends before byte {end:,}")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{file} is corrupt or truncated: {error}", "fetch this file again") from None
    return Shard(file, entries, metadata)


def _entry(name: str, facts: dict[str, Any], base: int) -> Entry:
    start, end = facts["data_offsets"]
    if not 0 <= start <= end:
        raise ValueError(f"the byte range of {name} is {start} to {end}")
    return Entry(name, facts["dtype"], tuple(facts["shape"]), base + start, end - start)


def write_shard(file: Path, source: Path, outputs: list[Output], metadata: dict[str, str]) -> None:
    """Write a safetensors file from ranges of `source` and computed bytes, in the order given."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for out in outputs:
        header[out.name] = {
            "dtype": out.dtype,
            "shape": list(out.shape),
            "data_offsets": [offset, offset + out.size],
        }
        offset += out.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb", buffering=0) as target, source.open("rb", buffering=0) as stream:
        _write_all(target, struct.pack("<Q", len(text)) + text)
        for start, size, make in _ranges(outputs):
            if make is None:
                _copy(stream, target, start, size)
            else:
                _write_all(target, make())


def _ranges(outputs: list[Output]) -> list[tuple[int, int, Callable[[], bytes] | None]]:
    """Neighbouring tensors are copied as one range."""
    ranges: list[tuple[int, int, Callable[[], bytes] | None]] = []
    for out in outputs:
        if out.source is None:
            ranges.append((0, out.size, out.make))
        elif ranges and ranges[-1][2] is None and sum(ranges[-1][:2]) == out.source.start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + out.size, None)
        else:
            ranges.append((out.source.start, out.size, None))
    return ranges


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    """Copy a range to the end of `target`, inside the kernel where the file system allows it."""
    end = start + size
    in_kernel = hasattr(os, "copy_file_range")
    while start < end:
        want = min(CHUNK, end - start)
        done = 0
        if in_kernel:
            try:
                done = os.copy_file_range(source.fileno(), target.fileno(), want, offset_src=start)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
            in_kernel = done > 0
        if not done:
            data = os.pread(source.fileno(), min(want, 1 << 22), start)
            if not data:
                raise OSError(f"the source ends at byte {start:,}")
            _write_all(target, data)
            done = len(data)
        start += done


def _write_all(target: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def _errnos() -> frozenset[int]:
    import errno

    return frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})


_NOT_HERE = _errnos()
