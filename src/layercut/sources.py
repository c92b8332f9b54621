"""Where text comes from: named sets, any Hub set, files of this machine, and the documentation inside Python.

The ground under `data.py`, which packs these documents into token blocks. Every source is opened by
`documents(name, seed)` and yields documents one by one, so that nothing is read that is not needed: in an
order shuffled by the seed, or as written where there is none. A document is a text or the messages of a chat.
Data is only ever read: loading scripts of data sets are not run.
"""

from __future__ import annotations

import glob
import itertools
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from layercut.errors import DataError, first_line
from layercut.pythontext import in_order, python_docs, python_docstrings

Message = dict[str, str]
Document = str | list[Message]
Record = dict[str, Any]

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SHUFFLE_BUFFER = 2_000
"""Records held to shuffle a stream; the files of a Hub set are shuffled too (the size is a guess)."""


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face Hub."""

    path: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    """Field to read; None looks for the fields that `as_document` knows."""
    streamed: bool = True
    """Read over the network as far as needed; a small set is fetched whole and kept for the next run."""
    lines: bool = False
    """The records are the lines of a running text with wiki headings."""


NAMED = {
    "wikitext2": HubSet(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", streamed=False, lines=True
    ),
    "c4": HubSet("allenai/c4", "en", column="text"),
    "fineweb-edu": HubSet("HuggingFaceFW/fineweb-edu", "sample-10BT", column="text"),
    "alpaca": HubSet("tatsu-lab/alpaca", streamed=False),
}
PYTHON = {"python-docs": python_docs, "python-docstrings": python_docstrings}
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w.-]*))?(?::([\w.-]+))?")


def documents(name: str, seed: int | None) -> Iterator[Document]:
    """The documents of one source, in written order where `seed` is None. DataError: no such source."""
    head, _, split = name.partition(":")
    if name in PYTHON:
        return PYTHON[name](seed)
    if head in NAMED and ":" not in split:
        return from_hub(replace(NAMED[head], split=split or NAMED[head].split), seed)
    if looks_local(name):
        return from_files(*matching_files(name), seed)
    if match := HUB_NAME.fullmatch(name):
        path, config, split, column = match.groups()
        return from_hub(HubSet(path, config, split or "train", column or "text"), seed)
    raise DataError(
        f"no source of text is called {name!r}; there are {', '.join([*NAMED, *PYTHON, 'self'])}",
        "a file is given by its path (.txt, .jsonl, .parquet), a Hub set as owner/name:split:column",
    )


# --- from a record to a document ----------------------------------------------------------------------------


def as_document(record: Any, column: str | None, where: str) -> Document:
    """Read a record by its fields: the column asked for, else instruction, messages, text or page."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where} holds a {type(record).__name__}, not an object with fields", 'write {"text": "…"}'
        )
    if column is None and "instruction" in record and "output" in record:
        question = [str(record[key]) for key in ("instruction", "input") if record.get(key)]
        return [
            {"role": "user", "content": "\n\n".join(question)},
            {"role": "assistant", "content": str(record["output"] or "")},
        ]
    allowed = [column] if column else ["messages", "text", "page"]
    field = next((key for key in allowed if key in record), None)
    if field is None:
        wanted, there = " or ".join(map(repr, allowed)), ", ".join(record) or "none"
        raise DataError(
            f"{where} has no field {wanted}; its fields are {there}",
            "name the field that holds the text: FILE:FIELD, or owner/name:split:FIELD for a Hub set",
        )
    value = record[field]
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return [{"role": turn["role"], "content": _content(turn["content"])} for turn in value]
    except (TypeError, KeyError):
        raise DataError(
            f"{where}: field {field!r} holds neither a text nor chat messages, but a {type(value).__name__}",
            "a chat is a list of messages with a role and a content",
        ) from None


def _content(content: Any) -> str:
    """The text of a message, which may come in typed parts of which only the texts count."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)


# --- files --------------------------------------------------------------------------------------------------


def looks_local(name: str) -> bool:
    """Whether a name is meant as a path: it exists, is rooted, has wildcards, or ends as one of our files."""
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
            f'give the files inside: --data "{wrong[0]}/*.jsonl"'
            if wrong[0].is_dir()
            else "convert it to .jsonl",
        )
    return files, column


def _expand(pattern: str) -> list[Path]:
    """Files that exist under this name, taken literally if there is one, else as a glob."""
    full = os.path.expanduser(pattern)
    return [Path(full)] if os.path.exists(full) else sorted(map(Path, glob.glob(full, recursive=True)))


def from_files(files: list[Path], column: str | None, seed: int | None) -> Iterator[Document]:
    """Documents of .txt, .json and .jsonl files, read when their turn comes, or of .parquet files."""
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


def _from_parquet(files: list[Path], column: str | None, seed: int | None) -> Iterator[Document]:
    from datasets import load_dataset

    where = str(files[0])
    try:
        # not streamed: mapped from disk, so that all rows can be shuffled
        rows = load_dataset("parquet", data_files=list(map(str, files)), split="train")
        if seed is not None:
            rows = rows.shuffle(seed=seed)
        for row in rows:
            yield as_document(row, column, where)
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets each have their own
        raise DataError(
            f"{where!r} cannot be read: {first_line(error)}", "check that the file is complete"
        ) from error


def _places(file: Path) -> list[Callable[[], tuple[str | Record, str]]]:
    """A reader for each document of a file."""
    try:
        with file.open("rb") as handle:
            if file.stat().st_size == 0:
                return []
            if file.suffix == ".json" and handle.read(64).lstrip()[:1] == b"[":
                rows = enumerate(json.loads(file.read_text("utf-8")), 1)
                return [partial(lambda row, where: (row, where), row, f"{file}, item {n}") for n, row in rows]
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
                if file.suffix == ".txt":  # two blank lines part documents
                    return [partial(_read_text, file, *span) for span in _spans(view, rb"(?:\r?\n){3,}")]
                lines = enumerate(_spans(view, rb"\n"), 1)
                return [partial(_read_json, file, *line, n) for n, line in lines if line[0] < line[1]]
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {first_line(error)}", "check the file") from error


def _spans(view: mmap.mmap, separator: bytes) -> list[tuple[int, int]]:
    """Start and stop, in bytes, of what stands between the separators."""
    marks = [match.span() for match in re.finditer(separator, view)]
    starts = [0, *(stop for _, stop in marks)]
    stops = [*(start for start, _ in marks), len(view)]
    return list(zip(starts, stops, strict=True))


def _read_text(file: Path, start: int, stop: int) -> tuple[str, str]:
    with file.open("rb") as handle:
        handle.seek(start)
        raw = handle.read(stop - start)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n"), str(file)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(file)!r} is not UTF-8 text (byte {start + error.start})", "convert it: iconv -t utf-8"
        ) from None


def _read_json(file: Path, start: int, stop: int, line: int) -> tuple[str | Record, str]:
    text, _ = _read_text(file, start, stop)
    where = f"{file}, line {line}"
    if not text.strip():
        return "", where
    try:
        return json.loads(text), where
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}", "each line must hold one object") from None


# --- the Hub ------------------------------------------------------------------------------------------------


def from_hub(dataset: HubSet, seed: int | None) -> Iterator[Document]:
    """Documents of a Hub set, streamed and shuffled through a buffer, or whole where the set is small."""
    rows = _hub_rows(dataset, None if dataset.lines else seed)
    if not dataset.lines:
        for row in rows:
            yield as_document(row, dataset.column, dataset.path)
        return
    lines = [row[dataset.column or "text"] for row in rows]
    if seed is None:  # reported perplexities join all lines by blank lines and read them as one text
        yield "\n\n".join(lines)
    else:
        yield from in_order(articles(lines), seed)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Group the lines of a wiki text into articles, each from one top heading (" = Title = ") to the next."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=](?:.*[^=])? = \n?", line) and article:
            yield "\n\n".join(article)
            article = []
        article.append(line)
    if article:
        yield "\n\n".join(article)


def _hub_rows(dataset: HubSet, seed: int | None) -> Iterator[Record]:
    from datasets import load_dataset

    _check_reachable(dataset)
    try:
        rows = load_dataset(dataset.path, dataset.config, split=dataset.split, streaming=dataset.streamed)
        if seed is not None:
            rows = rows.shuffle(seed=seed, **({"buffer_size": SHUFFLE_BUFFER} if dataset.streamed else {}))
        yield from rows
    except ConnectionError as error:
        raise _unreachable(dataset) from error
    except Exception as error:  # an unknown split or config, a set of scripts, a broken shard
        raise DataError(
            f"Hub set {dataset.path!r} (split {dataset.split}) cannot be read: {first_line(error)}",
            "check configuration and split: owner/name@config:split:column",
        ) from error


def _check_reachable(dataset: HubSet) -> None:
    """Ask the Hub once before `datasets` does: without a network that would try for 23 seconds (measured)."""
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(dataset.path, timeout=10)
    except GatedRepoError:
        raise DataError(
            f"Hub set {dataset.path!r} is gated: its owner must grant you access first",
            f"accept the terms at https://huggingface.co/datasets/{dataset.path}, then run `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"no data set {dataset.path!r} on the Hub, and no such file here",
            "check the spelling; for a private set run `hf auth login` first",
        ) from None
    except Exception as error:  # no network, offline mode, a proxy's refusal: an earlier run's copy will do
        kept = Path(config.HF_DATASETS_CACHE) / dataset.path.replace("/", "___")
        if dataset.streamed or not kept.exists():
            raise _unreachable(dataset) from error


def _unreachable(dataset: HubSet) -> DataError:
    return DataError(
        f"Hub set {dataset.path!r} is not on this machine and the Hub cannot be reached",
        "give a local file (.txt, .jsonl, .parquet), or --data self",
    )
