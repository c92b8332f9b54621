"""Text becomes token blocks: the [N, T] integers on which layers are searched, healed and measured.

After loading, before search. A source of text (`data/sources.py`), or a mix of several ("c4+alpaca"), is cut into
blocks of exactly T tokens. The same source and seed always give the same stream of blocks.

A `Reader` draws for the several uses of a run (search, tuning, held-out, evaluation); no text is used twice. What is
the same text is decided by what is read, not by what it is called: one stream for each set, split or content of
files, from which every use takes what the one before left; and a document that another use has, from whatever source,
is skipped. What that cannot see, the same text split into other documents, `data/text_overlap.py` finds in the tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file

from layercut.data.probe_families import CAPABILITIES
from layercut.data.probes import probe_rows
from layercut.data.self_sampled import chat_length, sample, sample_chats
from layercut.data.sources import CHATS, SELF, SHARED, TESTS, Source, find, public_name, split_mix, turns
from layercut.data.streams import MadeStream, Marks, TextStream
from layercut.errors import DataError
from layercut.models.layer_reader import share
from layercut.models.runner import model_of

Order = Literal["shuffled", "as written"]


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """Where token blocks come from, for a run's provenance; fit to be published."""

    source: str
    """As the user named it; of a file its name alone."""
    reads: list[str]
    """What was read, each by its one name (`Source.reads`)."""
    origins: list[str]
    """The streams of the mix, in the order in which the rows come from them, as often as each has its turn."""
    tokens: int
    window: int
    """Tokens in a row."""
    documents: int
    """Of which the rows are; of text that is made anew every row is one."""
    passed_over: int
    """Documents that were left out, since another use of the run has them."""
    fingerprint: str
    """First 16 hex digits of the SHA-256 of the token ids."""


@dataclass(frozen=True)
class Blocks:
    """Token blocks and where they came from."""

    tokens: torch.Tensor
    """int64 [N, T], on the CPU."""
    facts: TextFacts
    keys: frozenset[int] = frozenset()
    """`document_key` of each document."""
    marks: Marks | None = None
    """None: the source has neither probes nor chats."""

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
    """The blocks that a run drew for a use."""
    return load_file(folder / f"tokens-{use}.safetensors")[use]


def stored_marks(folder: Path, use: str) -> Marks | None:
    """What is known of the probes and chats among these blocks."""
    found = load_file(folder / f"tokens-{use}.safetensors")
    return Marks(found["answers"], found["lengths"]) if "lengths" in found else None


def in_rows(blocks: torch.Tensor, window: int) -> torch.Tensor:
    """Blocks that follow each other in the text as shorter rows; as they are where they are no longer than that."""
    if blocks.shape[1] <= window:
        return blocks
    stream = blocks.flatten()
    return stream[: len(stream) // window * window].view(-1, window)


def fingerprint(blocks: torch.Tensor) -> str:
    """16 hex digits that change with any token id."""
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
            python-docs, python-docstrings, probes (synthetic tests), self (sampled from `model`), or chats (the same,
            by its template); several joined with +, row by row in turn, "c4+probes:0.25" for a quarter of probes.
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
    source: str, tokenizer: Any, *, seed: int, chat_template: bool = False, model: Any = None, **how: Any
) -> Blocks:
    """The blocks of a source for one use alone; `how` as of `Reader.draw`."""
    return Reader(tokenizer, seed=seed, model=model, chat_template=chat_template).draw("", source, **how)


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
    """Of probes to tune on. Those that are reported on are of all."""
    drawn: dict[str, set[int]] = field(default_factory=dict)
    """The keys of the documents that each use has."""
    _streams: dict[tuple[str, Order], TextStream | MadeStream] = field(default_factory=dict)

    def draw(
        self, use: str, source: str, *, tokens: int, window: int, order: Order = "shuffled", skip: int = 0
    ) -> Blocks:
        """N = ceil(tokens / window) blocks for this use, from where an earlier use of the source stopped.

        Documents come in an order shuffled by the seed, or "as written", which reported perplexities need. The blocks
        of a mix come from its parts in turn. `skip` blocks are passed over first.
        """
        if tokens < 1 or window < 1 or skip < 0:
            raise DataError(
                f"{tokens} tokens in windows of {window} after {skip} blocks make no block", "give at least 1"
            )
        if self.chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise DataError("the tokenizer has no chat template", "leave out chat_template=True, or use a chat model")
        parts = [find(part, reported=order == "as written") for part in split_mix(source)]
        count, order_of = math.ceil(tokens / window), turns(parts)
        blocks, marks = torch.empty(count, window, dtype=torch.int64), Marks.none(count, window)
        keys, documents, passed_over = set[int](), 0, 0
        for i, part in enumerate(parts):
            rows = [j for j in range(skip, skip + count) if order_of[j % len(order_of)] == i]
            if not rows:
                continue
            before = sum(order_of[j % len(order_of)] == i for j in range(skip))
            stream, span = self._stream(part, order), range(before, before + len(rows))
            taken = stream.take(span, window, lambda key: self._is_anothers(key, use))
            places = [j - skip for j in rows]
            blocks[places] = taken.rows
            if part.name == TESTS and len(parts) == 1 and not taken.marks:
                raise DataError(f"no generated test fits rows of {window} tokens", "give longer rows: --window 256")
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
            fingerprint=fingerprint(blocks),
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
                self._stream(part, order).skip_blocks(rows, window, lambda key: self._is_anothers(key, use))
        self.drawn[use] = keys

    def _is_anothers(self, key: int, use: str) -> bool:
        return any(key in keys for other, keys in self.drawn.items() if other != use)

    def _stream(self, part: Source, order: Order) -> TextStream | MadeStream:
        """What is left of a source, whatever it is called."""
        name = (part.stream, order)
        if name not in self._streams:
            shuffled = order == "shuffled"
            chat = self.chat_template and shuffled
            if part.name in (SELF, CHATS):
                # text that is reported on is from a seed of its own, never what is searched or tuned on
                seed = self.seed if shuffled else f"{self.seed}, as written"

                def written(window: int, span: range) -> tuple[torch.Tensor, Marks]:
                    if part.name == CHATS:
                        rows, length = sample_chats(self.model, self.tokenizer, window, span, seed), chat_length(window)
                    else:
                        rows, length = sample(self.model, self.tokenizer, window, span, seed, chat_template=chat), 0
                    return rows, Marks(Marks.none(*rows.shape).answers, torch.full((len(rows),), length))

                self._streams[name] = MadeStream(written)
            elif part.name == TESTS:
                how: dict[str, Any] = {"seed": self.seed, "family": "tuning" if shuffled else "judging"}
                how |= {"capabilities": self.capabilities} if shuffled else {}

                def tests(window: int, span: range) -> tuple[torch.Tensor, Marks | None]:
                    made = probe_rows(self.tokenizer, rows=len(span), window=window, first=span.start, **how)
                    if not made.names:  # filler alone, which is text
                        return made.tokens, None
                    of, copied = made.of(), made.names.index("copy") if "copy" in made.names else -1
                    return made.tokens, Marks((of >= 0) & (of != copied), made.lengths)

                self._streams[name] = MadeStream(tests)
            else:
                self._streams[name] = TextStream(
                    part.name, part.documents(self.seed if shuffled else None), self.tokenizer, chat
                )
        return self._streams[name]
