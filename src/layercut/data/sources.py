"""Where text comes from: named sets, any Hub set, files of this machine, and the documentation inside Python.

Below `data/blocks.py`, which packs these documents into token blocks. `find` says what a name means: which set,
configuration and split, or which files; two names of the same thing are recognised by what they read.
`documents` yields one after the other, so that nothing is read that is not needed: in an order shuffled by the seed,
or as written where there is none. Data is only ever read: loading scripts of data sets are not run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from pathlib import Path

from layercut.data.python_docs import in_order, python_docs, python_docstrings
from layercut.data.records import Document, Record, as_document
from layercut.data.text_files import content, from_files, looks_local, matching_files
from layercut.errors import DataError, first_line

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
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", column="text", streamed=False, lines=True),
    "c4": HubSet("allenai/c4", "en", column="text"),
    "fineweb-edu": HubSet("HuggingFaceFW/fineweb-edu", "sample-10BT", column="text"),
    "alpaca": HubSet("tatsu-lab/alpaca", streamed=False),
}
REPORTED = {"wikitext2": "test", "c4": "validation"}
"""The split that figures are reported on where the name says none, as the field does; else, and for all other use, it
is train."""
PYTHON = {"python-docs": python_docs, "python-docstrings": python_docstrings}
SELF = "self"
"""Text that the model writes itself: see `data/self_sampled.py`."""
CHATS = "chats"
"""The same of chats, its own words and the user's; "chats:0.1" for a tenth of a mix's rows."""
TESTS = "probes"
"""Generated tests of what a model can do (`data/probes.py`); "probes:0.25" for a quarter of a mix's rows."""
SHARED = (CHATS, TESTS)
"""What a mix has a share of, told behind a colon."""
MADE_ANEW = frozenset((SELF, CHATS, TESTS))
"""Where these are reported on they are of another seed, and tests of the judging family: no text that was tuned on."""
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w.-]*))?(?::([\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """One source of text: a set of the Hub, files, or, where it has neither, one of Python's or the model itself."""

    name: str
    """As the user gave it."""
    hub: HubSet | None = None
    files: tuple[Path, ...] = ()
    column: str | None = None
    share: Fraction | None = None
    """Of a mix's rows; None: what others leave, in equal parts."""

    @property
    def reads(self) -> tuple[str, ...]:
        """What is read, by one name however it is spelled.

        A set by its id, configuration and split, a file by a hash of its content.
        """
        if self.hub:
            return (f"{self.hub.path.casefold()}@{self.hub.config or 'default'}:{self.hub.split}",)
        return tuple(f"file {content(file)}" for file in self.files) or (self.name,)

    def documents(self, seed: int | None) -> Iterator[Document]:
        """The documents, in written order where `seed` is None."""
        if self.hub:
            return from_hub(self.hub, seed)
        if self.files:
            return from_files([*self.files], self.column, seed)
        return PYTHON[self.name](seed)


def find(name: str, *, reported: bool = False) -> Source:
    """What a source's name means."""
    head, _, split = name.partition(":")
    if name in PYTHON or name in MADE_ANEW:
        return Source(name)
    if head in SHARED:
        return Source(head, share=share_of(name))
    if head in NAMED and ":" not in split:
        usual = REPORTED.get(head, NAMED[head].split) if reported else NAMED[head].split
        return Source(name, hub=replace(NAMED[head], split=split or usual), column=NAMED[head].column)
    if looks_local(name):
        files, column = matching_files(name)
        return Source(name, files=tuple(files), column=column)
    if match := HUB_NAME.fullmatch(name):
        path, config, split, column = match.groups()
        hub = HubSet(path, config, split or "train", column or "text")
        return Source(name, hub=hub, column=hub.column)
    raise DataError(
        f"no source of text is called {name!r}; there are {', '.join([*NAMED, *PYTHON, SELF, *SHARED])}",
        "a file is given by its path (.txt, .jsonl, .parquet), a Hub set as owner/name:split:column",
    )


def documents(name: str, seed: int | None) -> Iterator[Document]:
    """The documents of one source."""
    return find(name, reported=seed is None).documents(seed)


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
        raise DataError(f"--data {source!r} names an empty source", "for example: --data wikitext2, or --data self")
    if len({*parts}) < len(parts):
        raise DataError(f"--data {source!r} names a source twice", "name each part of a mix once")
    return parts


def written_by_model(source: str) -> bool:
    """Whether the model writes some of a mix itself, for which it has to be there."""
    return any(part.partition(":")[0] in (SELF, CHATS) for part in split_mix(source))


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
    """Whose turn it is in a mix, row by row, until it repeats: each part has its share of the rows as evenly as
    can be.
    """
    if len(parts) == 1:
        return (0,)
    told = sum((part.share for part in parts if part.share), Fraction(0))
    others = sum(part.share is None for part in parts)
    if told >= 1 or not others:
        raise DataError(f"shares of {told} in a mix leave no rows for its other parts", "give smaller shares")
    shares = [part.share or (1 - told) / others for part in parts]
    period, given = lcm(*(share.denominator for share in shares)), [0] * len(parts)
    found = []
    for row in range(1, period + 1):
        behind = [share * row - count for share, count in zip(shares, given, strict=True)]
        found.append(behind.index(max(behind)))
        given[found[-1]] += 1
    return tuple(found)


def what_is_read(source: str, *, reported: bool = False) -> dict[str, str]:
    """What a source or a mix reads, and how the user named it."""
    return {
        read: part for part in split_mix(source) for read in find(part, reported=reported).reads
    }  # fmt: skip


def public_name(source: str) -> str:
    """A source's name as it may be published: of files the last part of their path only."""

    def last(part: str) -> str:
        named = part in (*PYTHON, SELF) or part.partition(":")[0] in (*NAMED, *SHARED)
        local = not named and looks_local(part)
        return re.split(r"[/\\]", part)[-1] or part if local else part

    return "+".join(map(last, split_mix(source)))


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
