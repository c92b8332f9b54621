"""Text in files of this machine: .txt, .json, .jsonl and .parquet, by path or glob.

Part of `data/sources.py`. Files are read in place: nothing is copied, no server is asked. A document is read when its
turn comes. Whatever a file holds, what cannot be read ends in a DataError.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from layercut.data.python_docs import in_order
from layercut.data.records import FIELDS, Document, Record, as_document
from layercut.errors import DataError, first_line

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SHUFFLED_TOGETHER = 2**30
"""Bytes of text, unpacked, of a .parquet source that are held and shuffled at once. A guess."""


def looks_local(name: str) -> bool:
    """Whether a name is meant as a path: it exists, is rooted, has wildcards, or ends as a file of text does."""
    bare = re.sub(r":[^:/\\]*$", "", name)
    return (
        name.startswith((".", "/", "~"))
        or glob.has_magic(name)
        or any(Path(part).suffix in SUFFIXES or os.path.exists(part) for part in (name, bare))
    )


def matching_files(name: str) -> tuple[list[Path], str | None]:
    """The files that a path or glob names, and the column after its last colon."""
    files, column = _expand(name), None
    if not files and ":" in name:
        path, _, column = name.rpartition(":")
        files = _expand(path)
    if not files and glob.has_magic(name):
        raise DataError(f"no file matches {name!r}", "put the pattern in quotes and check its folder")
    if not files:
        raise DataError(f"no file {name!r}", "check the path; without any data at hand use --data self")
    wrong = [f for f in files if f.suffix not in SUFFIXES or not f.is_file()]
    if wrong:
        kind = "a folder" if wrong[0].is_dir() else f"a {wrong[0].suffix or 'file without a suffix'}"
        raise DataError(
            f"{str(wrong[0])!r} is {kind}; files of text are {', '.join(SUFFIXES)}",
            f'give the files inside: --data "{wrong[0]}/*.jsonl"' if wrong[0].is_dir() else "convert it to .jsonl",
        )
    return files, column


def _expand(pattern: str) -> list[Path]:
    """Files that exist under this name, taken literally if there is one, else as a glob."""
    full = os.path.expanduser(pattern)
    return [Path(full)] if os.path.exists(full) else sorted(map(Path, glob.glob(full, recursive=True)))


def content(file: Path) -> str:
    """32 hex digits of what a file holds, read again where its size, times or place have changed."""
    try:
        facts = file.stat()
        return _content(file.resolve(), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{str(file)!r} cannot be read: {error.strerror}", "check the file") from None


@lru_cache(maxsize=4096)
def _content(file: Path, *_: int) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()[:32]


def from_files(files: list[Path], column: str | None, seed: int | None) -> Iterator[Document]:
    """Documents of .txt, .json and .jsonl files, or of .parquet files."""
    parquet = [file for file in files if file.suffix == ".parquet"]
    if len(parquet) not in (0, len(files)):
        raise DataError("the pattern matches .parquet and other files", "give one pattern each: --data A+B")
    if parquet:
        yield from _from_parquet(parquet, column, seed)
        return
    places = itertools.chain.from_iterable(map(_places, files))
    for read in in_order(places, seed):
        record, where = read()
        yield record if isinstance(record, str) else as_document(record, column, where)


# --- .parquet -----------------------------------------------------------------------------------------------


def _from_parquet(files: list[Path], column: str | None, seed: int | None) -> Iterator[Document]:
    """Documents of tables.

    Shuffled are the row groups that a file is written in, then, of as many groups as fit in SHUFFLED_TOGETHER, the
    rows.
    """
    where = str(files[0])
    try:
        groups = in_order([(file, *group) for file in files for group in _row_groups(file, column)], seed)
        for together in _bundles(groups):
            tables = [(_rows(file, i, fields), str(file)) for file, i, fields, _ in together]
            places = [(table, row, name) for table, name in tables for row in range(table.num_rows)]
            for table, row, where in in_order(places, seed):
                yield as_document(table.slice(row, 1).to_pylist()[0], column, where)
    except DataError:
        raise
    except Exception as error:  # pyarrow has many of its own
        raise DataError(f"{where!r} cannot be read: {first_line(error)}", "check that the file is complete") from error


def _row_groups(file: Path, column: str | None) -> Iterator[tuple[int, list[str], int]]:
    """(index, fields to read, bytes they take unpacked) of each group of rows."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        fields = [name for name in names if name == column or (column is None and name in FIELDS)]
        if not fields:
            as_document(dict.fromkeys(names), column, str(file))  # says what fields there are
        for i in range(opened.metadata.num_row_groups):
            group = opened.metadata.row_group(i)
            chunks = [group.column(j) for j in range(group.num_columns)]
            wanted = [c for c in chunks if c.path_in_schema.split(".")[0] in fields or c.path_in_schema in fields]
            yield i, fields, sum(chunk.total_uncompressed_size for chunk in wanted)


def _rows(file: Path, group: int, fields: list[str]) -> Any:
    """A group of rows as a table."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=fields, use_threads=False)


def _bundles(groups: list[tuple[Path, int, list[str], int]]) -> Iterator[list[tuple[Path, int, list[str], int]]]:
    """Groups in their order, as many at a time as fit in SHUFFLED_TOGETHER; one at least."""
    together: list[tuple[Path, int, list[str], int]] = []
    for group in groups:
        if together and sum(size for *_, size in [*together, group]) > SHUFFLED_TOGETHER:
            yield together
            together = []
        together.append(group)
    if together:
        yield together


# --- .txt, .json, .jsonl ------------------------------------------------------------------------------------


def _places(file: Path) -> list[Callable[[], tuple[str | Record, str]]]:
    """A reader for each document of a file."""
    try:
        with file.open("rb") as handle:
            if file.stat().st_size == 0:
                return []
            if file.suffix == ".json" and handle.read(64).lstrip()[:1] == b"[":
                rows = enumerate(parsed(file.read_text("utf-8"), str(file), "check the file"), 1)
                return [partial(lambda row, where: (row, where), row, f"{file}, item {n}") for n, row in rows]
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
                if file.suffix == ".txt":  # two blank lines part documents
                    return [partial(_read_text, file, *span) for span in _spans(view, rb"(?:\r?\n){3,}")]
                lines = enumerate(_spans(view, rb"\n"), 1)
                return [partial(_read_json, file, *line, n) for n, line in lines if line[0] < line[1]]
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {first_line(error)}", "check the file") from error


def _spans(view: mmap.mmap, separator: bytes) -> list[tuple[int, int]]:
    """Start and stop, in bytes, of the parts between the separators."""
    marks = [match.span() for match in re.finditer(separator, view)]
    starts = [0, *(stop for _, stop in marks)]
    stops = [*(start for start, _ in marks), len(view)]
    return list(zip(starts, stops, strict=True))


def _read_text(file: Path, start: int, stop: int) -> tuple[str, str]:
    try:
        with file.open("rb") as handle:
            handle.seek(start)
            raw = handle.read(stop - start)
        return raw.decode("utf-8-sig").replace("\r\n", "\n"), str(file)
    except OSError as error:
        raise DataError(f"{str(file)!r} cannot be read: {error.strerror}", "check the file") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(file)!r} is not UTF-8 text (byte {start + error.start})", "convert it: iconv -t utf-8"
        ) from None


def _read_json(file: Path, start: int, stop: int, line: int) -> tuple[str | Record, str]:
    text, _ = _read_text(file, start, stop)
    where = f"{file}, line {line}"
    return (parsed(text, where) if text.strip() else ""), where


def parsed(text: str, where: str, hint: str = "each line must hold one object") -> Any:
    """A JSON value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}", hint) from None
    except (RecursionError, ValueError) as error:
        what = "nests too deep" if isinstance(error, RecursionError) else first_line(error)
        raise DataError(f"{where} cannot be read as JSON: {what}", hint) from None
