"""Streams of text, from which the uses of a run take rows one after the other; and how documents become tokens.

Part of `data/blocks.py`.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from layercut.data.chat_templates import render_chat
from layercut.data.documents import Document
from layercut.errors import DataError

PIECE = 2_000_000
"""Characters that are tokenized at once, so that a long text takes neither time nor memory beyond what is needed of it.
All of WikiText-2's test text is one piece, as the field has it."""


@dataclass(frozen=True)
class Marks:
    """What is known of probes and chats among N rows of T tokens, by the names in a run's file of them."""

    answers: torch.Tensor
    """bool [N, T]: whether the token after this one belongs to an answer that counts more than text; no copy does, of
    which every word is one, or most of what short probes teach would be to copy."""
    lengths: torch.Tensor
    """int64 [N]: as how long rows each is made (`ProbeRows.lengths`, `chat_length`), 0 where it is of text."""

    @classmethod
    def none(cls, rows: int, window: int) -> Marks:
        """Of rows of text."""
        return cls(torch.zeros(rows, window, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64))


@dataclass(frozen=True)
class Taken:
    """What a stream gave: rows [n, T], a key for each document they are of, and how many were passed over."""

    rows: torch.Tensor
    keys: list[int]
    passed_over: int = 0
    marks: Marks | None = None


class MadeStream:
    """Rows made one by one, each a document from a seed of its own, of which none is refused."""

    def __init__(self, make: Callable[[int, range], tuple[torch.Tensor, Marks | None]]) -> None:
        self._make, self._given = make, 0

    def take(self, span: range, window: int, refused: Callable[[int], bool]) -> Taken:
        """Rows `span` of those to come."""
        wanted = range(self._given + span.start, self._given + span.stop)
        self._given = wanted.stop
        rows, marks = self._make(window, wanted)
        return Taken(rows, [_hash(row.numpy().tobytes()) for row in rows], marks=marks)

    def skip_blocks(self, count: int, window: int, refused: Callable[[int], bool]) -> None:
        """Give the next rows to nobody: somebody has them."""
        self._given += count


class TextStream:
    """Concatenated documents, from which tokens are taken."""

    def __init__(self, name: str, texts: Iterator[Document], tokenizer: Any, chat_template: bool) -> None:
        self.name = name
        self._refused: Callable[[int], bool] = lambda key: False
        self._passed_over = self._given = 0
        self._encoded = encode(texts, tokenizer, chat_template=chat_template, passed_over=self._pass_over)
        self._ids = array("q")
        self._parts: list[list[int]] = []
        """[number, key, tokens] of the documents that the ids not yet taken are of."""

    def _pass_over(self, key: int) -> bool:
        refused = self._refused(key)
        self._passed_over += refused
        return refused

    def take(self, span: range, window: int, refused: Callable[[int], bool]) -> Taken:
        """Rows `span` of what is left, [len(span), T]; those before are dropped.

        `refused` says which documents to leave out, by their key. A document that was begun is continued.
        """
        self._refused, self._passed_over = refused, 0
        begin, end = span.start * window, span.stop * window
        while len(self._ids) < end:
            piece = next(self._encoded, None)
            if piece is None:
                raise self._too_short(end, begin)
            number, key, ids = piece
            self._ids.extend(ids)
            if self._parts and self._parts[-1][0] == number:
                self._parts[-1][2] += len(ids)
            else:
                self._parts.append([number, key, len(ids)])
        rows = torch.tensor(self._ids[begin:end], dtype=torch.int64).view(-1, window)
        keys, at = [], 0
        for _, key, length in self._parts:
            if at < end and at + length > begin:
                keys.append(key)
            at += length
        del self._ids[:end]
        self._given += end
        while self._parts and self._parts[0][2] <= end:
            end -= self._parts.pop(0)[2]
        if self._parts:
            self._parts[0][2] -= end
        return Taken(rows, keys, self._passed_over)

    def skip_blocks(self, count: int, window: int, refused: Callable[[int], bool]) -> None:
        """Give the next rows to nobody: somebody has them."""
        self.take(range(count), window, refused)

    def _too_short(self, end: int, begin: int) -> DataError:
        held, before = self._given + len(self._ids), self._given + begin
        others = ""
        if self._passed_over:
            others = f", beside {self._passed_over:,} documents that other text of this run holds as well"
        if not held:
            return DataError(f"{self.name!r} holds no text{others}", "give a source with text in it, or --data self")
        after = f", of which {before:,} are passed over" if before else ""
        return DataError(
            f"{self.name!r} holds {held:,} tokens{others}; {self._given + end:,} are needed{after}",
            "ask for fewer with --tokens, --tune-tokens, --eval-tokens or --eval-window, or add a source: --data A+B",
        )


# --- from documents to tokens -------------------------------------------------------------------------------


def encode(
    texts: Iterator[Document],
    tokenizer: Any,
    *,
    chat_template: bool = False,
    passed_over: Callable[[int], bool] = lambda key: False,
) -> Iterator[tuple[int, int, list[int]]]:
    """Token ids of each document that is not empty, a long one in pieces, separated as the model expects.

    Behind BOS where the tokenizer puts one by itself; else before EOS, if it has one. A separator that is already
    there, as chat templates may write it, is not doubled.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    for number, document in enumerate(texts):
        key = document_key(document)
        if passed_over(key):
            continue
        text = render(document, tokenizer if chat_template else None)
        if not text.strip():
            continue
        parts = [*pieces(text)]
        for i, piece in enumerate(parts):
            ids = list(tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False).input_ids)
            if adds_bos and i == 0 and ids[:1] != [bos]:
                ids.insert(0, bos)
            if not adds_bos and i == len(parts) - 1 and eos is not None and eos not in ids[-2:]:
                ids.append(eos)
            yield number, key, ids


def document_key(document: Document) -> int:
    """63 bits by which a document is recognised, whatever its source and line breaks."""
    return _hash(re.sub(r"\s+", " ", render(document)).strip().encode("utf-8", "surrogatepass"))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def pieces(text: str, longest: int | None = None) -> Iterator[str]:
    """The text in parts of bounded length, split before white space where there is some."""
    start, longest = 0, longest or PIECE
    while len(text) - start > longest:
        stop = start + longest
        from_ = start + longest // 2
        cut = max(text.rfind("\n", from_, stop), text.rfind(" ", from_, stop))
        cut = cut if cut > 0 else stop
        yield text[start:cut]
        start = cut
    yield text[start:]


def render(document: Document, chat_tokenizer: Any = None) -> str:
    """A document as text; messages through the chat template if one is given, else one below the other."""
    if isinstance(document, str):
        return document
    if chat_tokenizer is None:
        return "\n\n".join(message["content"] for message in document if message["content"])
    return render_chat(chat_tokenizer, document)
