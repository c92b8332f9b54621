"""Text becomes token blocks: the [N, T] integers on which layers are searched, healed and measured.

A source (`data/sources.py`), or a mix of several ("c4+alpaca"), is cut into blocks of exactly T tokens; the same source
and seed always give the same stream of them. A `Reader` draws for the several uses of a run (search, tuning, held-out,
evaluation), and no text is used twice: what is the same text is decided by what is read, not by what it is called. Of
each set, split or content of files there is one stream, from which every use takes what the one before left, and a
document that another use has is skipped. The same text split into other documents is found by `data/text_overlap.py`.
"""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file

from layercut.data.chat_templates import render_chat
from layercut.data.documents import Document
from layercut.data.probe_families import CAPABILITIES
from layercut.data.probes import probe_rows
from layercut.data.self_sampled import chat_length, sample, sample_chats
from layercut.data.sources import CHATS, SELF, SHARED, TESTS, Source, find, public_name, split_mix, turns
from layercut.errors import DataError
from layercut.models.decoder_stack import share
from layercut.models.runner import model_of

Order = Literal["shuffled", "as written"]
PIECE = 2_000_000
"""Characters that are tokenized at once, so that a long text takes neither time nor memory beyond what is needed of it.
All of WikiText-2's test text is one piece, as the field has it."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """Where token blocks come from, for a run's provenance; fit to be published."""

    source: str  # as the user named it; of a file its name alone
    reads: list[str]  # what was read, each by its one name (`Source.reads`)
    origins: list[str]
    """The streams of the mix, in the order in which the rows come from them, as often as each has its turn."""
    tokens: int
    window: int  # tokens in a row
    documents: int  # of which the rows are; of text that is made anew every row is one
    passed_over: int  # documents that were left out, since another use of the run has them
    fingerprint: str  # first 16 hex digits of the SHA-256 of the token ids
    passes: float = 1.0
    """How often the text is gone over, of a mix the part that runs out first; more than once where it is too short."""


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
        return cls(torch.zeros(rows, window, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64))


@dataclass(frozen=True)
class Blocks:
    """Token blocks and where they came from."""

    tokens: torch.Tensor  # int64 [N, T], on the CPU
    facts: TextFacts
    keys: frozenset[int] = frozenset()  # `document_key` of each document
    marks: Marks | None = None  # None: the source has neither probes nor chats

    def rows_by_origin(self) -> dict[str, torch.Tensor]:
        """The rows of each stream, {stream: [n, T]}."""
        return by_origin(self.tokens, self.facts.origins)


def by_origin(rows: torch.Tensor, origins: Sequence[str]) -> dict[str, torch.Tensor]:
    """Split what there is for each row of blocks whose rows come from several streams in turn."""
    found: dict[str, list[torch.Tensor]] = {}
    for i, origin in enumerate(origins):
        found.setdefault(origin, []).append(rows[i :: len(origins)])
    return {origin: torch.cat(parts) for origin, parts in found.items()}


def stored_blocks(folder: Path, use: str) -> torch.Tensor:
    return load_file(folder / f"tokens-{use}.safetensors")[use]


def stored_marks(folder: Path, use: str) -> Marks | None:
    found = load_file(folder / f"tokens-{use}.safetensors")
    return Marks(found["answers"], found["lengths"]) if "lengths" in found else None


def in_rows(blocks: torch.Tensor, window: int) -> torch.Tensor:
    """Blocks that follow each other in the text as shorter rows; as they are where they are no longer than that."""
    if blocks.shape[1] <= window:
        return blocks
    stream = blocks.flatten()
    return stream[: len(stream) // window * window].view(-1, window)


def fingerprint(blocks: torch.Tensor) -> str:
    return hashlib.sha256(blocks.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def token_blocks(
    source: str | Path,
    tokenizer: Any,
    *,
    tokens: int,
    window: int = 256,
    seed: int = 0,
    chat_template: bool = False,
    model: Any = None,
    order: Order = "shuffled",
) -> torch.Tensor:
    """Text as token ids, to search, heal, quantize or measure on.

    Documents are concatenated, each separated as the tokenizer does it (BOS or EOS), and cut into rows of equal
    length. The same source, seed and tokenizer always give the same rows.

    Args:
        source: wikitext2, c4, fineweb-edu, alpaca, OWNER/NAME:SPLIT:COLUMN, a .txt/.jsonl/.parquet file or glob,
            python-docs, python-docstrings, probes (of recall and skills), self (sampled from `model`), or chats (the
            same, by its template); several joined with +, row by row in turn, "c4+probes:0.25" for a quarter of probes.
        tokenizer: a tokenizer of transformers.
        tokens: token ids in all, rounded up to whole rows.
        window: T, tokens in a row.
        seed: of the order of documents, and of what is sampled.
        chat_template: render chats and instructions by the tokenizer's template.
        model: the causal LM that "self" and "chats" are sampled from.
        order: "shuffled" documents, of the training split where a source has splits; or "as written", of the split
            that perplexities are reported on (wikitext2: test, c4: validation).

    Returns:
        int64 [N, T] on the CPU, N = ceil(tokens / window).

    Raises:
        DataError: no such source, unreadable, unreachable or too short; a template that is missing.
    """
    if order not in get_args(Order):
        raise DataError(f"order={order!r} is unknown", f"allowed are {', '.join(map(repr, get_args(Order)))}")
    if model is not None:  # a clone: dropout is off in it, and its generation config is set for sampling
        model = share(model_of(model)).eval()
    how: dict[str, Any] = {"tokens": tokens, "window": window, "order": order}
    return load_blocks(str(source), tokenizer, seed=seed, chat_template=chat_template, model=model, **how).tokens


def load_blocks(
    source: str, tokenizer: Any, *, seed: int, chat_template: bool = False, model: Any = None, **how: Any
) -> Blocks:
    return Reader(tokenizer, seed=seed, model=model, chat_template=chat_template).draw("", source, **how)


@dataclass
class Reader:
    """Draws the blocks of several uses, so that no text is used twice."""

    tokenizer: Any
    seed: int
    model: Any = None  # for "self" and "chats" only
    chat_template: bool = False
    """Whether shuffled chats are rendered by the tokenizer's template. Text that is reported on never is."""
    capabilities: Sequence[str] = tuple(CAPABILITIES)  # of probes to tune on. Those that are reported on are of all
    drawn: dict[str, set[int]] = field(default_factory=dict)  # the keys of the documents that each use has
    _streams: dict[tuple[str, Order], TextStream | MadeStream] = field(default_factory=dict)

    def draw(
        self, use: str, source: str, *, tokens: int, window: int, order: Order = "shuffled", skip: int = 0,
        repeats: bool = False,
    ) -> Blocks:  # fmt: skip
        """N = ceil(tokens / window) blocks for this use, from where an earlier use of the source stopped.

        Documents come in an order shuffled by the seed, or "as written", which reported perplexities need. The blocks
        of a mix come from its parts in turn. `skip` blocks are passed over first. repeats: text that runs out is gone
        over again, and not refused.
        """
        if tokens < 1 or window < 1 or skip < 0:
            words = f"{tokens} tokens in windows of {window} after {skip} blocks make no block"
            raise DataError(words, "give at least 1")
        if self.chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise DataError("the tokenizer has no chat template", "leave out chat_template=True, or use a chat model")
        parts = [find(part, reported=order == "as written") for part in split_mix(source)]
        count, order_of = math.ceil(tokens / window), turns(parts)
        blocks, marks = torch.empty(count, window, dtype=torch.int64), Marks.none(count, window)
        keys, documents, passed_over, passes = set[int](), 0, 0, 1.0
        for i, part in enumerate(parts):
            places = [j for j in range(count) if order_of[(skip + j) % len(order_of)] == i]
            if not places:
                continue
            before = sum(order_of[j % len(order_of)] == i for j in range(skip))
            stream = self._stream(part, order)
            taken = stream.take(range(before, before + len(places)), window, partial(self._is_anothers, use), repeats)
            passes = max(passes, len(places) / len(taken.rows))
            blocks[places] = taken.rows[torch.arange(len(places)) % len(taken.rows)]
            if part.name == TESTS and len(parts) == 1 and not taken.marks:
                raise DataError(f"no probe fits rows of {window} tokens", "give longer rows: --window 256")
            if taken.marks:
                marks.answers[places], marks.lengths[places] = taken.marks.answers, taken.marks.lengths
            keys |= {*taken.keys}
            documents += len(taken.keys)
            passed_over += taken.passed_over
        self.drawn.setdefault(use, set()).update(keys)
        facts = TextFacts(
            source=public_name(source), reads=[read for part in parts for read in part.reads],
            origins=[parts[order_of[(skip + j) % len(order_of)]].stream for j in range(len(order_of))],
            tokens=blocks.numel(), window=window, documents=documents, passed_over=passed_over,
            fingerprint=fingerprint(blocks), passes=passes,
        )  # fmt: skip
        return Blocks(blocks, facts, frozenset(keys), marks if any(part.name in SHARED for part in parts) else None)

    def skip_blocks(
        self, use: str, source: str, *, tokens: int, window: int, keys: set[int], order: Order = "shuffled"
    ) -> None:
        """Pass over blocks that a use has from an earlier run, so that later draws are as if they were drawn now.

        Text is read again to find where it stops; nothing is sampled from the model.
        """
        parts = [find(part, reported=order == "as written") for part in split_mix(source)]
        order_of = turns(parts)
        for i, part in enumerate(parts):
            rows = sum(order_of[j % len(order_of)] == i for j in range(math.ceil(tokens / window)))
            if rows and order == "shuffled":
                stream = self._stream(part, order)
                if isinstance(stream, MadeStream):
                    stream.given += rows
                else:
                    stream.take(range(rows), window, partial(self._is_anothers, use))
        self.drawn[use] = keys

    def _is_anothers(self, use: str, key: int) -> bool:
        return any(key in keys for other, keys in self.drawn.items() if other != use)

    def _stream(self, part: Source, order: Order) -> TextStream | MadeStream:
        """What is left of a source, whatever it is called."""
        name, shuffled = (part.stream, order), order == "shuffled"
        chat = self.chat_template and shuffled
        # text that is reported on is from a seed of its own, never what is searched or tuned on
        seed: int | str = self.seed if shuffled else f"{self.seed}, as written"

        def of_the_model(window: int, span: range) -> tuple[torch.Tensor, Marks]:
            if part.name == CHATS:
                rows, length = sample_chats(self.model, self.tokenizer, window, span, seed), chat_length(window)
            else:
                rows, length = sample(self.model, self.tokenizer, window, span, seed, chat_template=chat), 0
            return rows, Marks(Marks.none(*rows.shape).answers, torch.full((len(rows),), length))

        def probes(window: int, span: range) -> tuple[torch.Tensor, Marks | None]:
            how: dict[str, Any] = {"capabilities": self.capabilities} if shuffled else {}
            how |= {"seed": self.seed, "family": "tuning" if shuffled else "judging", "first": span.start}
            made = probe_rows(self.tokenizer, rows=len(span), window=window, **how)
            if not made.names:  # filler alone, which is text
                return made.tokens, None
            of, copied = made.of(), made.names.index("copy") if "copy" in made.names else -1
            return made.tokens, Marks((of >= 0) & (of != copied), made.lengths)

        if name not in self._streams:
            if part.name in (SELF, CHATS):
                self._streams[name] = MadeStream(of_the_model)
            elif part.name == TESTS:
                self._streams[name] = MadeStream(probes)
            else:
                documents = part.documents(self.seed if shuffled else None)
                self._streams[name] = TextStream(part.name, documents, self.tokenizer, chat)
        return self._streams[name]


# --- streams ------------------------------------------------------------------------------------------------


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
        self._make, self.given = make, 0

    def take(self, span: range, window: int, refused: Callable[[int], bool], repeats: bool = False) -> Taken:
        wanted = range(self.given + span.start, self.given + span.stop)
        self.given = wanted.stop
        rows, marks = self._make(window, wanted)
        return Taken(rows, [_hash(row.numpy().tobytes()) for row in rows], marks=marks)


class TextStream:
    """Concatenated documents, from which tokens are taken."""

    def __init__(self, name: str, documents: Iterator[Document], tokenizer: Any, chat_template: bool) -> None:
        self.name, self._tokenizer, self._chat = name, tokenizer, chat_template
        self._refused: Callable[[int], bool] = lambda key: False
        self._passed_over = self._given = 0
        self._encoded = self.encoded(documents)
        self._ids = array("q")
        self._parts: list[list[int]] = []
        """[number, key, tokens] of the documents that the ids not yet taken are of."""

    def take(self, span: range, window: int, refused: Callable[[int], bool], repeats: bool = False) -> Taken:
        """Rows `span` of what is left, [len(span), T]; those before are dropped. With `repeats` fewer where it ends.

        `refused` says which documents to leave out, by their key. A document that was begun is continued.
        """
        self._refused, self._passed_over = refused, 0
        begin, end = span.start * window, span.stop * window
        while len(self._ids) < end:
            piece = next(self._encoded, None)
            if piece is None:
                if not repeats or len(self._ids) < begin + window:
                    raise self._too_short(end, begin)
                end = begin + (len(self._ids) - begin) // window * window
                break
            number, key, ids = piece
            self._ids.extend(ids)
            if not self._parts or self._parts[-1][0] != number:
                self._parts.append([number, key, 0])
            self._parts[-1][2] += len(ids)
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

    def encoded(self, documents: Iterator[Document]) -> Iterator[tuple[int, int, list[int]]]:
        """Number, key and token ids of each document that is not empty, a long one in pieces.

        Separated as the model expects: behind BOS where the tokenizer puts one by itself; else before EOS, if it has
        one. A separator that is already there, as chat templates may write it, is not doubled.
        """
        tokenizer = self._tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        for number, document in enumerate(documents):
            key = document_key(document)
            if self._refused(key):
                self._passed_over += 1
                continue
            text = render(document, tokenizer if self._chat else None)
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

    def _too_short(self, end: int, begin: int) -> DataError:
        held, before, others = self._given + len(self._ids), self._given + begin, ""
        if self._passed_over:
            others = f", beside {self._passed_over:,} documents that other text of this run holds as well"
        if not held:
            return DataError(f"{self.name!r} holds no text{others}", "give a source with text in it, or --data self")
        after = f", of which {before:,} are passed over" if before else ""
        return DataError(
            f"{self.name!r} holds {held:,} tokens{others}; {self._given + end:,} are needed{after}",
            "ask for fewer with --tokens, --tune-tokens, --eval-tokens or --eval-window, or add a source: --data A+B",
        )


def document_key(document: Document) -> int:
    """63 bits by which a document is recognised, whatever its source and line breaks."""
    return _hash(re.sub(r"\s+", " ", render(document)).strip().encode("utf-8", "surrogatepass"))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def pieces(text: str) -> Iterator[str]:
    """The text in parts of at most PIECE characters, split before white space where there is some."""
    start = 0
    while len(text) - start > PIECE:
        stop, from_ = start + PIECE, start + PIECE // 2
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
