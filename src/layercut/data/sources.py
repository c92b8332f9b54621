"""What the name of a source of text means: a named set, any set of the Hub, files, Python's documentation, the model.

Two names of the same thing are recognised by what they read.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from pathlib import Path

from layercut.config import HUB_SETS
from layercut.config.commands import CompressConfig
from layercut.data import documents
from layercut.data.documents import SUFFIXES, Document, HubSet
from layercut.errors import ConfigError, DataError

NAMED = {
    "wikitext2": HubSet(HUB_SETS["wikitext2"], "wikitext-2-raw-v1", column="text", streamed=False, lines=True),
    "c4": HubSet(HUB_SETS["c4"], "en", column="text"),
    "fineweb-edu": HubSet(HUB_SETS["fineweb-edu"], "sample-10BT", column="text"),
    "alpaca": HubSet(HUB_SETS["alpaca"], streamed=False),
}
REPORTED = {"wikitext2": "test", "c4": "validation"}
"""The split that figures are reported on where the name says none, as the field does; else, and for all other use, it
is train."""
PYTHON = {"python-docs": documents.python_docs, "python-docstrings": documents.python_docstrings}
SELF = "self"  # text that the model writes itself: see `data/self_sampled.py`
CHATS = "chats"  # the same of chats, its own words and the user's; "chats:0.1" for a tenth of a mix's rows
TESTS = "probes"  # probes of what a model can do (`data/probes.py`); "probes:0.25" for a quarter of a mix's rows
SHARED = (CHATS, TESTS)  # what a mix has a share of, told behind a colon
MADE_ANEW = frozenset((SELF, CHATS, TESTS))
"""Where these are reported on they are of another seed, and probes of the judging family: no text that was tuned on."""
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w.-]*))?(?::([\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """One source of text: a set of the Hub, files, or, where it has neither, one of Python's or the model itself."""

    name: str  # as the user gave it
    hub: HubSet | None = None
    files: tuple[Path, ...] = ()
    column: str | None = None
    share: Fraction | None = None  # of a mix's rows; None: what others leave, in equal parts

    @property
    def reads(self) -> tuple[str, ...]:
        """What is read, by one name: a set by its id, configuration and split, a file by a hash of its content."""
        if self.hub:
            return (f"{self.hub.path.casefold()}@{self.hub.config or 'default'}:{self.hub.split}",)
        return tuple(f"file {documents.content(file)}" for file in self.files) or (self.name,)

    @property
    def stream(self) -> str:
        return " ".join([*self.reads, self.column or ""]).strip()

    def documents(self, seed: int | None) -> Iterator[Document]:
        if self.hub:
            return documents.from_hub(self.hub, seed)
        if self.files:
            return documents.from_files([*self.files], self.column, seed)
        return PYTHON[self.name](seed)


def find(name: str, *, reported: bool = False) -> Source:
    head, _, split = name.partition(":")
    if name in (*PYTHON, *MADE_ANEW):
        return Source(name)
    if head in SHARED:
        return Source(head, share=share_of(name))
    if head in NAMED and ":" not in split:
        usual = REPORTED.get(head, NAMED[head].split) if reported else NAMED[head].split
        return Source(name, hub=replace(NAMED[head], split=split or usual), column=NAMED[head].column)
    if looks_local(name):
        files, column = _matching_files(name)
        return Source(name, files=tuple(files), column=column)
    if match := HUB_NAME.fullmatch(name):
        path, config, split, column = match.groups()
        return Source(name, hub=HubSet(path, config, split or "train", column or "text"), column=column or "text")
    words = f"no source of text is called {name!r}; there are {', '.join([*NAMED, *PYTHON, SELF, *SHARED])}"
    raise DataError(words, "a file is given by its path (.txt, .jsonl, .parquet), a Hub set as owner/name:split:column")


def looks_local(name: str) -> bool:
    """Whether a name is meant as a path: it exists, is rooted, has wildcards, or ends as a file of text does."""
    bare = re.sub(r":[^:/\\]*$", "", name)
    return (
        name.startswith((".", "/", "~"))
        or glob.has_magic(name)
        or any(Path(part).suffix in SUFFIXES or os.path.exists(part) for part in (name, bare))
    )


def _matching_files(name: str) -> tuple[list[Path], str | None]:
    """The files that a path or glob names, and the column after its last colon."""

    def expanded(pattern: str) -> list[Path]:
        full = os.path.expanduser(pattern)
        return [Path(full)] if os.path.exists(full) else sorted(map(Path, glob.glob(full, recursive=True)))

    files, column = expanded(name), None
    if not files and ":" in name:
        path, _, column = name.rpartition(":")
        files = expanded(path)
    if not files and glob.has_magic(name):
        raise DataError(f"no file matches {name!r}", "put the pattern in quotes and check its folder")
    if not files:
        raise DataError(f"no file {name!r}", "check the path; without any text at hand: --data python-docstrings")
    if wrong := [f for f in files if f.suffix not in SUFFIXES or not f.is_file()]:
        kind = "a folder" if wrong[0].is_dir() else f"a {wrong[0].suffix or 'file without a suffix'}"
        raise DataError(
            f"{str(wrong[0])!r} is {kind}; files of text are {', '.join(SUFFIXES)}",
            f'give the files inside: --data "{wrong[0]}/*.jsonl"' if wrong[0].is_dir() else "convert it to .jsonl",
        )
    return files, column


# --- mixes --------------------------------------------------------------------------------------------------


def split_mix(source: str) -> list[str]:
    """The sources that "a+b" or "a,b" names, unless a file is called so ("a,b.txt", or "a,b.txt+probes:0.1")."""
    file, shares = source, list[str]()
    while not os.path.exists(file) and file.rpartition("+")[2].partition(":")[0] in SHARED and "+" in file:
        file, _, share = file.rpartition("+")
        shares.insert(0, share)
    if os.path.exists(file):
        return [file, *shares]
    parts = [part.strip() for part in re.split(r"[+,]", source)]
    if not all(parts):
        raise DataError(f"{source!r} names an empty source", "for example: --data wikitext2, or --data self")
    if len({*parts}) < len(parts):
        raise DataError(f"{source!r} names a source twice", "name each part of a mix once")
    return parts


def has(source: str, *names: str) -> bool:
    """Whether a mix has one of these parts, whatever its share: chats, probes, or self."""
    return any(part.partition(":")[0] in names for part in split_mix(source))


def share_of(part: str) -> Fraction | None:
    """Of "probes:0.25", a quarter, to a thousandth; None where a part of a mix names none."""
    name, colon, text = part.partition(":")
    if name not in SHARED or not colon:
        return None
    try:
        share = Fraction(text).limit_denominator(1000)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise DataError(f"the share {text!r} of {name} is not between 0 and 1", f"a quarter of the rows: {name}:0.25")
    return share


def turns(parts: Sequence[Source]) -> tuple[int, ...]:
    """Which part each row of a mix is of, until it repeats: all have their shares, as evenly as can be."""
    if len(parts) == 1:
        return (0,)
    told = sum((part.share for part in parts if part.share), Fraction(0))
    others = sum(part.share is None for part in parts)
    if told >= 1 or not others:
        raise DataError(f"shares of {told} in a mix leave no rows for its other parts", "give smaller shares")
    shares = [part.share or (1 - told) / others for part in parts]
    given, found = [0] * len(parts), list[int]()
    for row in range(1, lcm(*(share.denominator for share in shares)) + 1):
        behind = [share * row - count for share, count in zip(shares, given, strict=True)]
        found.append(behind.index(max(behind)))
        given[found[-1]] += 1
    return tuple(found)


def what_is_read(source: str, *, reported: bool = False) -> dict[str, str]:
    return {read: part for part in split_mix(source) for read in find(part, reported=reported).reads}


def check_sources(config: CompressConfig) -> None:
    """Refuse text that is reported on and also searched or tuned on."""
    reported = what_is_read(config.evaluate.eval_data, reported=True)
    used = what_is_read(config.text.data) | what_is_read(config.heal.tune_data or config.text.data)
    both = {(used[read], reported[read]) for read in reported.keys() & used.keys() - MADE_ANEW}
    if both:
        words = [name if name == again else f"{name} (the same as {again})" for name, again in sorted(both)]
        raise ConfigError(
            f"{', '.join(words)} would be searched or tuned on and reported on as well",
            "give --eval-data another text than --data and --tune-data",
        )


def public_name(source: str) -> str:
    """A source's name as it may be published: of files the last part of their path only."""

    def last(part: str) -> str:
        named = part in (*PYTHON, SELF) or part.partition(":")[0] in (*NAMED, *SHARED)
        return re.split(r"[/\\]", part)[-1] or part if not named and looks_local(part) else part

    return "+".join(map(last, split_mix(source)))
