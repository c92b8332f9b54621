"""Reading files that come from elsewhere, within limits, and digests by which a changed file is recognised.

For `models/checkpoints.py` and `pipeline/run_folder.py`. A checkpoint's JSON files are read by `read_json` alone:
regular files of bounded size, depth and numbers, whose text is Unicode.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from layercut.errors import ModelError, first_line

LARGEST_JSON = 256 * 2**20
"""Bytes. The largest tokenizer.json seen has 33 MB, the largest index 8 MB."""
DEEPEST = 64
"""Levels of lists and objects in each other. Real configs have five; `copy.deepcopy` fails at some 300."""
MOST_DIGITS = 64
"""Of a whole number. tokenizer_config.json writes "no limit" with 31."""
REFETCH = "fetch this file again"


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a folder, pipe or device in its place is refused, and never waited for."""
    try:
        # a pipe without a writer would block without O_NONBLOCK, which does nothing to regular files
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {_reason(error)}", "give a complete model folder") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path} is no regular file", REFETCH)
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, need: str = "") -> Any:
    """What a JSON file holds."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_JSON:
                raise ModelError(f"{path} has {size:,} bytes; allowed are {LARGEST_JSON:,}", REFETCH)
            raw = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        raise ModelError(f"no file {path}{f': {need}' if need else ''}", "give a complete model folder") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {_reason(error)}", "give a complete model folder") from None
    return parse_json(raw, str(path))


def parse_json(raw: bytes, name: str) -> Any:
    """JSON text within the limits above."""
    try:
        content = json.loads(raw.decode("utf-8"), parse_int=_whole)
        _check(content)
    except RecursionError:
        raise ModelError(f"{name} nests deeper than {DEEPEST} levels", REFETCH) from None
    except ValueError as error:  # not UTF-8, not JSON, or one of the limits
        raise ModelError(f"{name} is not valid JSON: {first_line(error)}", REFETCH) from None
    return content


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits; allowed are {MOST_DIGITS}")
    return int(digits)


def _check(content: Any) -> None:
    """ValueError or RecursionError for nesting too deep, and for text that no file can hold (half a surrogate pair)."""
    level = [content]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode("utf-8")
            elif isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise RecursionError


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


# --- what a file is -----------------------------------------------------------------------------------------


def content_digest(path: Path) -> str:
    """SHA-256 of a whole file: 1.8 GB/s on one core (measured), less than reading it from most disks takes."""
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 22):
            digest.update(part)
        return digest.hexdigest()


def outline_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's header, which says where each tensor lies; of any other file, of all of it."""
    if path.suffix != ".safetensors":
        return content_digest(path)
    with open_regular(path) as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), LARGEST_JSON))).hexdigest()


def record(paths: Iterable[Path], base: Path) -> dict[str, list[Any]]:
    """Size and digest of each file, and of every file in each folder."""
    files = [file for path in paths for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    return {str(file.relative_to(base)): [file.stat().st_size, outline_digest(file)] for file in files}


def differing(folder: Path, recorded: Mapping[str, Any]) -> str | None:
    """The first file that is missing, or no longer has the size and digest that `record` noted."""
    for name, noted in recorded.items():
        try:
            if [(folder / name).stat().st_size, outline_digest(folder / name)] != noted:
                return name
        except (OSError, ValueError, ModelError):
            return name
    return None
