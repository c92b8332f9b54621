"""Text becomes token blocks: the [N, T] integers on which layers are searched, healed and measured.

After loading, before search. A source of text (`sources.py`), a mix of several ("c4+alpaca"), or `self`, text
sampled from the dense model for users who have none, is cut into blocks of exactly T tokens. The same source
and seed always give the same stream of blocks; `skip` passes over its beginning, so that calibration, tuning
and held-out blocks of one source never overlap.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from layercut.errors import DataError, first_line
from layercut.models import quiet_transformers
from layercut.progress import bar
from layercut.sources import NAMED, PYTHON, Document, documents, looks_local, matching_files

Order = Literal["shuffled", "as written"]
ROWS = 32
"""Rows sampled from the model in one batch."""


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

    def facts(self) -> dict[str, Any]:
        """For the run's provenance."""
        return {
            "source": self.source,
            "tokens": self.tokens.numel(),
            "window": self.tokens.shape[1],
            "documents": self.documents,
            "fingerprint": self.fingerprint,
        }


def stored_blocks(folder: Path, use: str) -> torch.Tensor:
    """The blocks [N, T] that a run drew for a use: calibration, heldout, tuning or evaluation."""
    return load_file(folder / f"tokens-{use}.safetensors")[use]


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
    """Blocks [skip, skip + N) of the source's stream, N = ceil(tokens / window), T = window.

    Documents come in an order shuffled by the seed, or "as written", which reported perplexities need. In a
    mix, the blocks are dealt in turn from its parts. `skip` counts blocks of this window: calls whose blocks
    must not overlap use one window and one order. `chat_template` renders records with messages or
    instructions by the tokenizer's template. `model` is needed for "self" only.
    Raises DataError: no such source, unreadable, unreachable, too short.
    """
    if tokens < 1 or window < 1 or skip < 0:
        raise DataError(
            f"{tokens} tokens in windows of {window} after {skip} blocks make no block", "give at least 1"
        )
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template", "leave out --chat-template, or use a chat model"
        )
    parts = split_mix(source)
    count = math.ceil(tokens / window)
    blocks = torch.empty(count, window, dtype=torch.int64)
    used = 0
    for i, part in enumerate(parts):
        # block j of the mix is block j // len(parts) of part j % len(parts)
        first, stop = (math.ceil((bound - i) / len(parts)) for bound in (skip, skip + count))
        if first == stop:
            continue
        if part == "self":
            rows = sample(model, tokenizer, window, range(first, stop), seed, chat_template=chat_template)
            drawn = stop - first
        else:
            texts = documents(part, seed if order == "shuffled" else None)
            ids = encode(texts, tokenizer, chat_template=chat_template)
            rows, drawn = pack(ids, part, window, range(first, stop))
        blocks[(i - skip) % len(parts) :: len(parts)] = rows
        used += drawn
    return Blocks(blocks, source, used, fingerprint(blocks))


def split_mix(source: str) -> list[str]:
    """The sources that "a+b" or "a,b" names, unless a file is called so."""
    if os.path.exists(source):
        return [source]
    parts = [part.strip() for part in re.split(r"[+,]", source)]
    if not all(parts):
        raise DataError(
            f"--data {source!r} names an empty source", "for example: --data wikitext2, or --data self"
        )
    if len({*parts}) < len(parts):
        raise DataError(f"--data {source!r} names a source twice", "name each part of a mix once")
    return parts


def origins(source: str) -> set[str]:
    """What a source reads, by one name however it is spelled: files by their real path, sets by theirs."""
    found: set[str] = set()
    for part in split_mix(source):
        named = part == "self" or part in PYTHON or part.partition(":")[0] in NAMED
        files = matching_files(part)[0] if not named and looks_local(part) else []
        found |= {str(file.resolve()) for file in files} or {part}
    return found


def fingerprint(blocks: torch.Tensor) -> str:
    """16 hex digits that change with any token id."""
    return hashlib.sha256(blocks.numpy().astype("<i8").tobytes()).hexdigest()[:16]


# --- from documents to blocks -------------------------------------------------------------------------------


def encode(texts: Iterator[Document], tokenizer: Any, *, chat_template: bool = False) -> Iterator[list[int]]:
    """Token ids of each document that is not empty, marked off from the others as the model expects.

    Behind BOS where the tokenizer puts one by itself; else before EOS, if it has one. A mark that is already
    there, as chat templates may write it, is not doubled.
    """
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    for document in texts:
        text = render(document, tokenizer if chat_template else None)
        if not text.strip():
            continue
        ids = list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
        if adds_bos:
            yield ids if ids[:1] == [bos] else [bos, *ids]
        elif tokenizer.eos_token_id is None or tokenizer.eos_token_id in ids[-2:]:
            yield ids
        else:
            yield [*ids, tokenizer.eos_token_id]


def render(document: Document, chat_tokenizer: Any = None) -> str:
    """A document as text; messages through the chat template if one is given, else one below the other."""
    if isinstance(document, str):
        return document
    if chat_tokenizer is None:
        return "\n\n".join(message["content"] for message in document if message["content"])
    try:
        return chat_tokenizer.apply_chat_template(document, tokenize=False)
    except Exception as error:  # templates raise what they like, e.g. for roles that do not alternate
        roles = ", ".join(message["role"] for message in document)
        raise DataError(
            f"the chat template refuses a record with the roles {roles}: {first_line(error)}",
            "leave out --chat-template, or correct the data",
        ) from error


def pack(encoded: Iterator[list[int]], name: str, window: int, span: range) -> tuple[torch.Tensor, int]:
    """Blocks `span` of the documents laid end to end, [len(span), T], and how many documents they touch."""
    begin, end = span.start * window, span.stop * window
    ids, drawn = array("q"), 0
    for document in encoded:
        ids.extend(document)
        drawn += len(ids) > begin
        if len(ids) >= end:
            return torch.tensor(ids[begin:end], dtype=torch.int64).view(-1, window), drawn
    if not ids:
        raise DataError(f"{name!r} holds no text", "give a source with text in it, or --data self")
    after = f", of which {begin:,} are passed over" if begin else ""
    raise DataError(
        f"{name!r} holds {len(ids):,} tokens; {end:,} are needed{after}",
        "ask for fewer with --tokens, --tune-tokens or --eval-tokens, or add a source: --data A+B",
    )


# --- text sampled from the model itself ---------------------------------------------------------------------


def sample(
    model: Any, tokenizer: Any, window: int, span: range, seed: int, *, chat_template: bool = False
) -> torch.Tensor:
    """Rows `span` of the model's own text, [len(span), T]: its plain distribution, temperature 1, past EOS.

    Each batch is seeded by the run's seed and its first row's place, so that rows of disjoint spans differ.
    """
    from transformers import GenerationConfig

    if model is None:
        raise DataError(
            "--data self samples text from the model, and none is loaded", "give a file or a named set"
        )
    prefix = chat_prefix(tokenizer, window) if chat_template else None
    plain = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=window,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    rows = []
    total = len(span) * (window - len(prefix or [0]))
    with bar("sampling text from the model", total) as advance, generating(model, plain):

        def step(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            # generate calls it after every token: where the bar moves; it never stops a row
            advance(len(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        for first in range(span.start, span.stop, ROWS):
            batch = min(ROWS, span.stop - first)
            draw = random.Random(f"{seed}/{first}")
            torch.manual_seed(draw.getrandbits(32))
            heads = [prefix or [first_token(tokenizer, draw)] for _ in range(batch)]
            prompt = torch.tensor(heads, device=model.device)
            ids = prompt
            if prompt.shape[1] < window:
                ids = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), use_cache=True, stopping_criteria=[step]
                )
            rows.append(ids.cpu())
    return torch.cat(rows).clone()  # cloned outside inference mode, or autograd would refuse these tokens


@contextmanager
def generating(model: Any, plain: Any) -> Iterator[None]:
    """Set aside the model's generation config (its EOS, penalties, cut-offs) and torch's random state."""
    kind, own = model.device.type, model.generation_config
    forked = torch.random.fork_rng(
        devices=[model.device] if kind == "cuda" else [], device_type="cuda" if kind == "cpu" else kind
    )
    model.generation_config = plain
    try:
        with forked, torch.inference_mode(), quiet_transformers():
            yield
    finally:
        model.generation_config = own


def first_token(tokenizer: Any, draw: random.Random) -> int:
    """BOS, or where there is none, a random token that is not a special one."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    special = {*tokenizer.all_special_ids}
    return draw.choice([i for i in range(tokenizer.vocab_size) if i not in special])


def chat_prefix(tokenizer: Any, window: int) -> list[int]:
    """What the chat template writes before a user's first words: the model writes these and what follows."""
    mark = "USERS-WORDS"
    text = render([{"role": "user", "content": mark}], tokenizer)
    if mark not in text:
        raise DataError("the chat template leaves out the user's message", "leave out --chat-template")
    ids = tokenizer(text[: text.index(mark)], add_special_tokens=False).input_ids
    if len(ids) >= window:
        raise DataError(
            f"the chat template opens with {len(ids)} tokens; the window has {window}",
            f"use a longer one: --window {4 * len(ids)}",
        )
    return list(ids)
