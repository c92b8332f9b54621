"""Safetensors files as headers and byte ranges: tensors are copied by the kernel, not through Python.

Layout: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from layercut.errors import ModelError

CHUNK = 1 << 26


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file."""

    file: Path
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
    """A tensor to write: the bytes of one in a file, or bytes made when they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    content: Entry | Callable[[], bytes]


def read_shard(file: Path) -> Shard:
    """Read a file's header."""
    entries = {}
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            for name, facts in header.items():
                start, end = facts["data_offsets"]
                if not 0 <= start <= end:
                    raise ValueError(f"the byte range of {name} is {start} to {end}")
                shape = tuple(facts["shape"])
                entries[name] = Entry(file, name, facts["dtype"], shape, 8 + length + start, end - start)
            end = max((e.start + e.size for e in entries.values()), default=8 + length)
            if end > size:
                raise ValueError(f"it ends before byte {end:,}")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{file} is corrupt or truncated: {error}", "fetch this file again") from None
    return Shard(file, entries, metadata)


def write_shard(file: Path, outputs: Sequence[Output], metadata: dict[str, str]) -> None:
    """Write a safetensors file of tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for out in outputs:
        place = [offset, offset + out.size]
        header[out.name] = {"dtype": out.dtype, "shape": list(out.shape), "data_offsets": place}
        offset += out.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb", buffering=0) as target:
        _write_all(target, struct.pack("<Q", len(text)) + text)
        for out in outputs:
            if not isinstance(out.content, Entry):
                _write_all(target, out.content())
                continue
            with out.content.file.open("rb", buffering=0) as source:
                _copy(source, target, out.content.start, out.size)


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    """Copy a range to the end of `target`, inside the kernel where the file system allows it."""
    end, in_kernel = start + size, hasattr(os, "copy_file_range")
    while start < end:
        want, done = min(CHUNK, end - start), 0
        if in_kernel:
            try:
                done = os.copy_file_range(source.fileno(), target.fileno(), want, offset_src=start)
            except OSError:  # another disk, or a file system without it; what else is wrong, writing says too
                in_kernel = False
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
