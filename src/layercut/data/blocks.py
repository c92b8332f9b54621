"""Text becomes token blocks: the [N, T] integers on which layers are searched, healed and measured.

After loading, before search. A source of text (`data/sources.py`), a mix of several ("c4+alpaca"), or `self`, text
sampled from the dense model (`data/self_sampled.py`), is cut into blocks of exactly T tokens. The same source and seed
always give the same stream of blocks.

A `Reader` draws for the several uses of a run (search, tuning, held-out, evaluation); no text is used twice. What is
the same text is decided by what is read, not by what it is called: one stream for each set, split or content of
files, from which every use takes what the one before left; and a document that another use has, from whatever source,
is skipped. What that cannot see, the same text split into other documents, `data/text_overlap.py` finds in the tokens.
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
from layercut.data.probe_families import CAPABILITIES
from layercut.data.probes import probe_rows
from layercut.data.records import Document
from layercut.data.self_sampled import chat_length, sample, sample_chats
from layercut.data.sources import CHATS, SELF, SHARED, TESTS, Source, find, public_name, split_mix, turns
from layercut.errors import DataError
from layercut.models.layer_reader import share
from layercut.models.runner import model_of

Order = Literal["shuffled", "as written"]
PIECE = 2_000_000
"""Characters that are tokenized at once, so that a long text takes neither time nor memory beyond what is needed of it.
All of WikiText-2's test text is one piece, as the field has it."""


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """Where token blocks come from, for a run's provenance; fit to be published."""

    source: str
    """As the user named it; of a file its name alone."""
    reads: list[str]
    """What was read, each by its one name (`Source.reads`)."""
    origins: list[str]
    """The streams of the mix, in the order in which the rows come from them."""
    tokens: int
    window: int
    """Tokens in a row."""
    documents: int
    passed_over: int
    """Documents that were left out, since another use of the run has them."""
    fingerprint: str
    """First 16 hex digits of the SHA-256 of the token ids."""


@dataclass(frozen=True)
class Marks:
    """What is known of generated tests and chats among N rows of T tokens, by the names in a run's file of them."""

    answers: torch.Tensor
    """bool [N, T]: whether the token after this one belongs to an answer that counts more than text; no copy does, of
    which every word is one, or most of what short tests teach would be to copy."""
    lengths: torch.Tensor
    """int64 [N]: as how long rows each is made (`ProbeRows.lengths`, `chat_length`), 0 where it is of text."""

    @classmethod
    def none(cls, rows: int, window: int) -> Marks:
        """Of rows of text, which has no tests."""
        return cls(torch.zeros(rows, window, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64))


@dataclass(frozen=True)
class Blocks:
    """Token blocks and where they came from."""

    tokens: torch.Tensor
    """int64 [N, T], on the CPU."""
    source: str
    """As the user named it."""
    documents: int
    """How many documents the blocks were drawn from; of `self`, every row is one."""
    fingerprint: str
    """First 16 hex digits of the SHA-256 of the token ids."""
    reads: tuple[str, ...] = ()
    """What was read, each by its one name (`Source.reads`)."""
    origins: tuple[str, ...] = ("",)
    """The streams that the rows come from in turn, as often as each has its turn."""
    keys: frozenset[int] = frozenset()
    """`document_key` of each document."""
    passed_over: int = 0
    """Documents that were left out, since another use of the run has them."""
    marks: Marks | None = None
    """None: the source has neither tests nor chats."""

    def facts(self) -> TextFacts:
        """All but the tokens and the documents' keys."""
        return TextFacts(
            source=public_name(self.source), reads=list(self.reads), origins=list(self.origins),
            tokens=self.tokens.numel(), window=self.tokens.shape[1], documents=self.documents,
            passed_over=self.passed_over, fingerprint=self.fingerprint,
        )  # fmt: skip

    def rows_by_origin(self) -> dict[str, torch.Tensor]:
        """The rows of each stream, {stream: [n, T]}."""
        return by_origin(self.tokens, self.origins)


def by_origin(rows: torch.Tensor, origins: Sequence[str]) -> dict[str, torch.Tensor]:
    """Split what there is for each row of blocks whose rows come from several streams in turn."""
    found: dict[str, list[torch.Tensor]] = {}
    for i, origin in enumerate(origins):
        found.setdefault(origin, []).append(rows[i :: len(origins)])
    return {origin: torch.cat(parts) for origin, parts in found.items()}


def stored_blocks(folder: Path, use: str) -> torch.Tensor:
    """The blocks that a run drew for a use."""
    return load_file(folder / f"tokens-{use}.safetensors")[use]


def stored_marks(folder: Path, use: str) -> Marks | None:
    """What is known of the tests among these blocks."""
    found = load_file(folder / f"tokens-{use}.safetensors")
    return Marks(found["answers"], found["lengths"]) if "lengths" in found else None


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
            python-docs, python-docstrings, probes (generated tests), self (sampled from `model`), or chats (the same,
            by its template); several joined with +, row by row in turn, "c4+probes:0.25" for a quarter of tests.
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
    return load_blocks(
        str(source), tokenizer, tokens=tokens, window=window, seed=seed, chat_template=chat_template, model=model,
        order=order,
    ).tokens  # fmt: skip


def load_blocks(
    source: str,
    tokenizer: Any,
    *,
    tokens: int,
    window: int,
    seed: int,
    skip: int = 0,
    order: Order = "shuffled",
    chat_template: bool = False,
    model: Any = None,
) -> Blocks:
    """Blocks [skip, skip + N) of the source's stream, N = ceil(tokens / window), T = window, for one use alone.

    Documents come in an order shuffled by the seed, or "as written", which reported perplexities need. The blocks of a
    mix come from its parts in turn.
    """
    reader = Reader(tokenizer, seed=seed, model=model, chat_template=chat_template)
    return reader.draw("", source, tokens=tokens, window=window, skip=skip, order=order)


@dataclass
class Reader:
    """Draws the blocks of several uses, so that no text is used twice."""

    tokenizer: Any
    seed: int
    model: Any = None
    """For "self" and "chats" only."""
    chat_template: bool = False
    """Whether shuffled chats are rendered by the tokenizer's template. Text that is reported on never is."""
    capabilities: Sequence[str] = tuple(CAPABILITIES)
    """Of generated tests to tune on. Those that are reported on are of all."""
    drawn: dict[str, set[int]] = field(default_factory=dict)
    """The keys of the documents that each use has."""
    _streams: dict[tuple[Any, ...], _Text | _Own | _Generated] = field(default_factory=dict)

    def draw(
        self, use: str, source: str, *, tokens: int, window: int, order: Order = "shuffled", skip: int = 0
    ) -> Blocks:
        """N = ceil(tokens / window) blocks of the source for this use, from where an earlier use of it stopped."""
        if tokens < 1 or window < 1 or skip < 0:
            raise DataError(
                f"{tokens} tokens in windows of {window} after {skip} blocks make no block", "give at least 1"
            )
        if self.chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise DataError("the tokenizer has no chat template", "leave out --chat-template, or use a chat model")
        parts = [find(part, reported=order == "as written") for part in split_mix(source)]
        count, order_of = math.ceil(tokens / window), turns(parts)
        blocks = torch.empty(count, window, dtype=torch.int64)
        keys: set[int] = set()
        documents = passed_over = 0
        marks = Marks.none(count, window) if any(part.name in SHARED for part in parts) else None
        for i, part in enumerate(parts):
            rows = [j for j in range(skip, skip + count) if order_of[j % len(order_of)] == i]
            if not rows:
                continue
            before = sum(order_of[j % len(order_of)] == i for j in range(skip))
            stream = self._stream(part, order)
            taken = stream.take(
                range(before, before + len(rows)), window, lambda key: self._is_anothers(key, use)
            )  # fmt: skip
            places = [j - skip for j in rows]
            blocks[places] = taken.rows
            if part.name == TESTS and len(parts) == 1 and not taken.marks:
                raise DataError(f"no generated test fits rows of {window} tokens", "give longer rows: --window 256")
            if marks and taken.marks:
                marks.answers[places], marks.lengths[places] = taken.marks.answers, taken.marks.lengths
            keys |= {*taken.keys}
            documents += len(taken.keys)
            passed_over += taken.passed_over
        self.drawn.setdefault(use, set()).update(keys)
        return Blocks(
            blocks, source, documents, fingerprint(blocks), tuple(read for part in parts for read in part.reads),
            tuple(_origin(parts[order_of[(skip + j) % len(order_of)]]) for j in range(len(order_of))),
            frozenset(keys), passed_over, marks,
        )  # fmt: skip

    def skip_blocks(
        self, use: str, source: str, *, tokens: int, window: int, keys: set[int], order: Order = "shuffled"
    ) -> None:
        """Skip blocks that a use has from an earlier run, so that later draws are the same as if they were drawn now.

        Text is read again to find where it stops; nothing is sampled from the model.
        """
        parts = [find(part, reported=order == "as written") for part in split_mix(source)]
        count, order_of = math.ceil(tokens / window), turns(parts)
        for i, part in enumerate(parts):
            rows = sum(order_of[j % len(order_of)] == i for j in range(count))
            if rows and order == "shuffled":
                self._stream(part, order).skip_blocks(rows, window, lambda key: self._is_anothers(key, use))
        self.drawn[use] = keys

    def _is_anothers(self, key: int, use: str) -> bool:
        return any(key in keys for other, keys in self.drawn.items() if other != use)

    def _stream(self, part: Source, order: Order) -> _Text | _Own | _Generated:
        """What is left of a source, whatever it is called."""
        name = (_origin(part), order)
        if name not in self._streams:
            if part.name in (SELF, CHATS):
                # text that is reported on is from a seed of its own, never what is searched or tuned on
                seed = self.seed if order == "shuffled" else f"{self.seed}, as written"
                of_chats, by_template = part.name == CHATS, self.chat_template and order == "shuffled"
                how = sample_chats if of_chats else partial(sample, chat_template=by_template)
                self._streams[name] = _Own(partial(how, self.model, self.tokenizer), seed, of_chats)
            elif part.name == TESTS:
                family, named = ("tuning", self.capabilities) if order == "shuffled" else ("judging", [*CAPABILITIES])
                self._streams[name] = _Generated(self.tokenizer, family, self.seed, named)
            else:
                texts = part.documents(self.seed if order == "shuffled" else None)
                chat = self.chat_template and order == "shuffled"
                self._streams[name] = _Text(part.name, texts, self.tokenizer, chat)
        return self._streams[name]


def _origin(part: Source) -> str:
    """The stream of a source: what is read, and which field of it."""
    return " ".join([*part.reads, part.column or ""]).strip()


def in_rows(blocks: torch.Tensor, window: int) -> torch.Tensor:
    """Blocks that follow each other in the text as shorter rows; as they are where they are no longer than that."""
    if blocks.shape[1] <= window:
        return blocks
    stream = blocks.flatten()
    return stream[: len(stream) // window * window].view(-1, window)


def fingerprint(blocks: torch.Tensor) -> str:
    """16 hex digits that change with any token id."""
    return hashlib.sha256(blocks.numpy().astype("<i8").tobytes()).hexdigest()[:16]


# --- streams ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taken:
    """What a stream gave: rows [n, T], a key for each document they are of, and how many were passed over."""

    rows: torch.Tensor
    keys: list[int]
    passed_over: int
    marks: Marks | None = None
    """As of `Blocks`."""


class _Text:
    """Concatenated documents, from which tokens are taken."""

    def __init__(self, name: str, texts: Iterator[Document], tokenizer: Any, chat_template: bool) -> None:
        self.name = name
        self._refused: Callable[[int], bool] = lambda key: False
        self._passed_over = 0
        self._encoded = encode(texts, tokenizer, chat_template=chat_template, passed_over=self._pass_over)
        self._given = 0
        self._ids = array("q")
        self._parts: list[list[int]] = []
        """[number, key, tokens] of the documents that the ids not yet taken are of."""

    def _pass_over(self, key: int) -> bool:
        refused = self._refused(key)
        self._passed_over += refused
        return refused

    def take(self, span: range, window: int, refused: Callable[[int], bool]) -> _Taken:
        """Rows `span` of what is left, [len(span), T]; those before are skipped.

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
        self._forget(end)
        return _Taken(rows, keys, self._passed_over)

    def skip_blocks(self, count: int, window: int, refused: Callable[[int], bool]) -> None:
        """Skip the next rows."""
        self.take(range(count), window, refused)

    def _forget(self, count: int) -> None:
        """Drop the first tokens: they are taken."""
        del self._ids[:count]
        self._given += count
        while self._parts and self._parts[0][2] <= count:
            count -= self._parts.pop(0)[2]
        if self._parts:
            self._parts[0][2] -= count

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


class _Own:
    """The model's own text or chats, of which each row is a document."""

    def __init__(self, write: Callable[[int, range, int | str], torch.Tensor], seed: int | str, of_chats: bool) -> None:
        self._write, self._seed, self._of_chats = write, seed, of_chats
        self._given = 0

    def take(self, span: range, window: int, refused: Callable[[int], bool]) -> _Taken:
        """Rows `span` of those to come. None is refused: each is from a seed of its own."""
        wanted = range(self._given + span.start, self._given + span.stop)
        self._given = wanted.stop
        rows = self._write(window, wanted, self._seed)
        lengths = torch.full((len(rows),), chat_length(window) if self._of_chats else 0, dtype=torch.int64)
        marks = Marks(torch.zeros_like(rows, dtype=torch.bool), lengths)
        return _Taken(rows, [_hash(row.numpy().tobytes()) for row in rows], 0, marks)

    def skip_blocks(self, count: int, window: int, refused: Callable[[int], bool]) -> None:
        """Skip the next rows."""
        self._given += count


class _Generated:
    """Rows of generated tests, of which each is a document."""

    def __init__(self, tokenizer: Any, family: str, seed: int, capabilities: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._how: dict[str, Any] = {"family": family, "seed": seed, "capabilities": capabilities}
        self._given = 0

    def take(self, span: range, window: int, refused: Callable[[int], bool]) -> _Taken:
        """Rows `span` of those to come. None is refused: each is from a seed of its own.

        Without marks where no test fits them: filler alone, which is text.
        """
        first = self._given + span.start
        self._given += span.stop
        made = probe_rows(self._tokenizer, rows=len(span), window=window, first=first, **self._how)
        keys = [_hash(row.numpy().tobytes()) for row in made.tokens]
        if not made.names:
            return _Taken(made.tokens, keys, 0)
        of, copied = made.of(), made.names.index("copy") if "copy" in made.names else -1
        return _Taken(made.tokens, keys, 0, Marks((of >= 0) & (of != copied), made.lengths))

    def skip_blocks(self, count: int, window: int, refused: Callable[[int], bool]) -> None:
        """Give the next rows to nobody: somebody has them."""
        self._given += count


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
