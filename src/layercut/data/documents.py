"""Documents, one after the other: of the Hugging Face Hub, of files of this machine, and of Python's documentation.

A document is read when its turn comes, in an order shuffled by a seed, or as written where that is None. Files are
read in place, loading scripts of data sets are not run, and what holds no text ends in a DataError that says where.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import mmap
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from layercut.errors import DataError, first_line

T = TypeVar("T")
Message = dict[str, str]
Document = str | list[Message]  # a text, or the messages of a chat

CHAT, TEXTS = ("instruction", "output"), ("messages", "text", "page")
"""Fields that are read where no column is named; "input" of the first, too."""
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SHUFFLED_TOGETHER = 2**30  # bytes of text, unpacked, of a .parquet source that are held and shuffled at once. A guess
SHUFFLE_BUFFER = 2_000
"""Records held to shuffle a stream; the files of a Hub set are shuffled too (the size is a guess)."""
SHORTEST = 200
"""Characters of Python's documentation; what is left of a document without its repeated paragraphs may be dropped."""
SKIPPED = re.compile(r"(^|/)(tests?|idle_test|site-packages|dist-packages|pydoc_data|__pycache__)/")


# --- records: lines of JSON, rows of tables -----------------------------------------------------------------


def as_document(record: Any, column: str | None, where: str) -> Document:
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a {type(record).__name__}, not an object with fields", 'write {"text": "…"}')
    if column is None and all(key in record for key in CHAT):
        question = "\n\n".join(str(record[key]) for key in ("instruction", "input") if record.get(key))
        said = {"user": question, "assistant": str(record["output"] or "")}
        return [{"role": role, "content": _utf8(text, where)} for role, text in said.items()]
    allowed = [column] if column else TEXTS
    field = next((key for key in allowed if key in record), None)
    if field is None:
        shown = [str(key)[:40].encode("ascii", "backslashreplace").decode() for key in list(record)[:12]]
        names = ", ".join(shown + ["…"] * (len(record) > len(shown))) or "none"
        raise DataError(
            f"{where} has no field {' or '.join(map(repr, allowed))}; its fields are {names}",
            "name the field that holds the text: FILE:FIELD, or owner/name:split:FIELD for a Hub set",
        )
    value = record[field]
    if value is None or isinstance(value, str):
        return _utf8(value or "", where)
    messages = list[Message]()
    try:
        for turn in value:
            role, text = turn["role"], turn["content"] or ""
            if not isinstance(text, str):  # typed parts, of which only the texts count
                texts = [part.get("text") if isinstance(part, dict) else part for part in text]
                text = "".join(text for text in texts if text is not None)
            messages.append({"role": _utf8(role, where), "content": _utf8(text, where)})
    except (TypeError, KeyError, AttributeError):
        words = f"{where}: field {field!r} holds neither a text nor chat messages, but a {type(value).__name__}"
        raise DataError(words, "a chat is a list of messages with a role and a content") from None
    return messages


def _utf8(text: str, where: str) -> str:
    """A text that a tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        words = f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character"
        raise DataError(words, "write the text as UTF-8, or leave the record out") from None
    return text


# --- files --------------------------------------------------------------------------------------------------


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


def in_order(items: Iterable[T], seed: int | None) -> list[T]:
    items = list(items)
    if seed is not None:
        random.Random(seed).shuffle(items)
    return items


def from_files(files: list[Path], column: str | None, seed: int | None) -> Iterator[Document]:
    tables = [file for file in files if file.suffix == ".parquet"]
    if len(tables) not in (0, len(files)):
        raise DataError("the pattern matches .parquet and other files", "give one pattern each: --data A+B")
    if tables:
        yield from _from_parquet(tables, column, seed)
        return
    for read in in_order(itertools.chain.from_iterable(map(_places, files)), seed):
        record, where = read()
        yield record if isinstance(record, str) else as_document(record, column, where)


def _from_parquet(files: list[Path], column: str | None, seed: int | None) -> Iterator[Document]:
    """Documents of tables. Shuffled are the groups of rows, then the rows of as many as fit in SHUFFLED_TOGETHER."""
    from pyarrow import parquet

    where, groups, wanted = str(files[0]), list[tuple[Path, int, list[str], int]](), [column]
    if column is None:
        wanted = [*CHAT, "input", *TEXTS]
    try:
        for file in files:
            with parquet.ParquetFile(file) as opened:
                names = opened.schema_arrow.names
                fields = [name for name in names if name in wanted]
                if not fields:
                    as_document(dict.fromkeys(names), column, str(file))  # says what fields there are
                for i in range(opened.metadata.num_row_groups):
                    group = opened.metadata.row_group(i)
                    chunks = [group.column(j) for j in range(group.num_columns)]
                    sizes = {chunk.path_in_schema: chunk.total_uncompressed_size for chunk in chunks}
                    size = sum(size for path, size in sizes.items() if {path, path.split(".")[0]} & {*fields})
                    groups.append((file, i, fields, size))
        together, held = list[tuple[Any, str]](), 0
        for k, (file, i, fields, size) in enumerate(groups := in_order(groups, seed)):
            with parquet.ParquetFile(file) as opened:
                together.append((opened.read_row_group(i, columns=fields, use_threads=False), str(file)))
            held += size
            if k + 1 == len(groups) or held + groups[k + 1][3] > SHUFFLED_TOGETHER:
                places = [(table, row, name) for table, name in together for row in range(table.num_rows)]
                for table, row, where in in_order(places, seed):
                    yield as_document(table.slice(row, 1).to_pylist()[0], column, where)
                together, held = [], 0
    except DataError:
        raise
    except Exception as error:  # pyarrow has many of its own
        raise DataError(f"{where!r} cannot be read: {first_line(error)}", "check that the file is complete") from error


def _places(file: Path) -> list[Callable[[], tuple[Any, str]]]:
    """A reader for each document of a .txt, .json or .jsonl file: of its text or record, and where it stands."""
    try:
        with file.open("rb") as handle:
            if file.stat().st_size == 0:
                return []
            if file.suffix == ".json" and handle.read(64).lstrip()[:1] == b"[":
                rows = enumerate(_parsed(file.read_text("utf-8"), str(file), "check the file"), 1)
                return [partial(lambda row, where: (row, where), row, f"{file}, item {n}") for n, row in rows]
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
                is_text = file.suffix == ".txt"  # two blank lines part documents
                marks = [match.span() for match in re.finditer(rb"(?:\r?\n){3,}" if is_text else rb"\n", view)]
                spans = zip([0, *(b for _, b in marks)], [*(a for a, _ in marks), len(view)], strict=True)
            numbered = enumerate(spans, 1)
            return [partial(_read, file, a, b, 0 if is_text else n) for n, (a, b) in numbered if is_text or a < b]
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {first_line(error)}", "check the file") from error


def _read(file: Path, start: int, stop: int, line: int) -> tuple[Any, str]:
    """The text between two bytes of a file, or what a line of JSON holds."""
    try:
        with file.open("rb") as handle:
            handle.seek(start)
            text = handle.read(stop - start).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{str(file)!r} cannot be read: {error.strerror}", "check the file") from None
    except UnicodeDecodeError as error:
        words = f"{str(file)!r} is not UTF-8 text (byte {start + error.start})"
        raise DataError(words, "convert it: iconv -t utf-8") from None
    if not line:
        return text, str(file)
    where = f"{file}, line {line}"
    return (_parsed(text, where) if text.strip() else ""), where


def _parsed(text: str, where: str, hint: str = "each line must hold one object") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}", hint) from None
    except (RecursionError, ValueError) as error:
        why = "nests too deep" if isinstance(error, RecursionError) else first_line(error)
        raise DataError(f"{where} cannot be read as JSON: {why}", hint) from None


# --- the Hub ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face Hub."""

    path: str
    config: str | None = None
    split: str = "train"
    column: str | None = None  # field to read; None looks for the fields that `as_document` knows
    streamed: bool = True
    """Read over the network as far as needed; a small set is fetched whole and kept for the next run."""
    lines: bool = False  # the records are the lines of a running text with wiki headings


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
        return
    articles: list[list[str]] = []
    for line in lines:  # an article goes from one top heading (" = Title = ") to the next
        if not articles or re.fullmatch(r" = [^=](?:.*[^=])? = \n?", line):
            articles.append([])
        articles[-1].append(line)
    yield from in_order(map("\n\n".join, articles), seed)


def _hub_rows(dataset: HubSet, seed: int | None) -> Iterator[dict[str, Any]]:
    from datasets import config, load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    unreachable = DataError(
        f"Hub set {dataset.path!r} is not on this machine and the Hub cannot be reached",
        "give a local file (.txt, .jsonl, .parquet), or --data self",
    )
    try:  # once before `datasets` does: without a network that would try for 23 seconds (measured)
        HfApi().dataset_info(dataset.path, timeout=10)
    except GatedRepoError:
        raise DataError(
            f"Hub set {dataset.path!r} is gated: its owner must grant you access first",
            f"accept the terms at https://huggingface.co/datasets/{dataset.path}, then run `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        words = f"no data set {dataset.path!r} on the Hub, and no such file here"
        raise DataError(words, "check the spelling; for a private set run `hf auth login` first") from None
    except Exception as error:  # no network, offline mode, a proxy's refusal: an earlier run's copy will do
        if dataset.streamed or not (Path(config.HF_DATASETS_CACHE) / dataset.path.replace("/", "___")).exists():
            raise unreachable from error
    try:
        rows = load_dataset(dataset.path, dataset.config, split=dataset.split, streaming=dataset.streamed)
        if seed is not None:
            rows = rows.shuffle(seed=seed, **({"buffer_size": SHUFFLE_BUFFER} if dataset.streamed else {}))
        yield from rows
    except ConnectionError as error:
        raise unreachable from error
    except Exception as error:  # an unknown split or config, a set of scripts, a broken shard
        words = f"Hub set {dataset.path!r} (split {dataset.split}) cannot be read: {first_line(error)}"
        raise DataError(words, "check configuration and split: owner/name@config:split:column") from error


# --- Python's documentation, for machines without a network -------------------------------------------------
# No paragraph is in both sources, or in one of them twice, so that one can judge what is tuned on the other. Modules
# are parsed, never imported. The text differs between versions of Python.


def python_docs(seed: int | None) -> Iterator[str]:
    """The topics of the language reference that CPython ships for `help()`, without what they repeat."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without its documentation topics", "use --data self, or a file") from None
    seen: set[str] = set()
    # topics overlap: the longest keeps a paragraph that several have
    unique = {name: _fresh(topics[name], seen) for name in sorted(topics, key=lambda n: (-len(topics[n]), n))}
    yield from in_order((unique[name] for name in sorted(unique) if len(unique[name]) >= SHORTEST), seed)


def python_docstrings(seed: int | None) -> Iterator[str]:
    """The docstrings of the standard library, a document a module, without what the topics or others have."""
    seen: set[str] = set()
    for topic in python_docs(None):
        _fresh(topic, seen)
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in in_order(sorted(name for name in names if not SKIPPED.search(name)), seed):
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse((root / name).read_bytes())
        except (SyntaxError, ValueError, OSError):  # a module kept for an older Python
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = (ast.get_docstring(node, clean=True) for node in ast.walk(tree) if isinstance(node, documented))
        text = _fresh("\n\n".join(text for text in texts if text and text.strip()), seen)
        if len(text) >= SHORTEST:
            yield text


def _fresh(text: str, seen: set[str]) -> str:
    """The text without paragraphs that were seen before, however they are wrapped and indented."""
    kept = []
    for part in re.split(r"\n\s*\n", text):
        key = " ".join(part.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(part)
    return "\n\n".join(kept)
