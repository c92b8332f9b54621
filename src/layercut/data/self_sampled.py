"""Text that the model writes itself: for users who have none, and chats, so that a healed model replies as it did.

Part of `data/blocks.py`, which draws blocks from it as from any other source.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from layercut.data.chat_templates import render_chat
from layercut.data.probes import SHORT_ROW
from layercut.errors import DataError
from layercut.models.loading import quiet_transformers
from layercut.models.memory import ran_out
from layercut.progress import bar

ROWS = 32
"""Rows sampled from the model in one batch."""
CHAT_HEAT = 0.7
"""Temperature of chats: at 1 a small model loses the thread, and nobody asks it so (measured)."""


def sample(
    model: Any,
    tokenizer: Any,
    window: int,
    span: range,
    seed: int | str,
    *,
    chat_template: bool = False,
    heat: float = 1.0,
) -> torch.Tensor:
    """Rows of the model's own text: its plain distribution, past EOS.

    Each batch is seeded by the run's seed and its first row's place, so that rows of disjoint spans differ.
    """
    if model is None:
        raise DataError(
            "self and chats are sampled from the model, and none is loaded", "give model=, or a file or a named set"
        )
    prefix = chat_prefix(tokenizer, window) if chat_template else None
    plain = plain_distribution(window, tokenizer.pad_token_id or 0, heat)
    rows = []
    total = len(span) * (window - len(prefix or [0]))
    with bar("sampling text from the model", total) as advance, generating(model, plain):

        def step(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            # generate calls it after every token: where the bar moves; it never stops a row
            advance(len(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        first, most = span.start, ROWS
        while first < span.stop:
            batch, draw = min(most, span.stop - first), random.Random(f"{seed}/{first}")
            torch.manual_seed(draw.getrandbits(32))
            prompt = torch.tensor([prefix or [first_token(tokenizer, draw)] for _ in range(batch)])
            ids = prompt if prompt.shape[1] >= window else _continued(model, prompt, step)
            if ids is None:
                most = batch // 2
                continue
            rows.append(ids)
            first += batch
    return torch.cat(rows).clone()  # cloned outside inference mode, or autograd would refuse these tokens


def _continued(model: Any, prompt: torch.Tensor, step: Any) -> torch.Tensor | None:
    """Rows [B, T] that begin so; None where memory is too short for as many at once, and fewer are to be tried."""
    prompt = prompt.to(model.device)
    try:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, use_cache=True, stopping_criteria=[step]).cpu()
    except (RuntimeError, MemoryError) as error:
        if len(prompt) == 1 or not ran_out(error):
            raise
    if model.device.type != "cpu":
        torch.accelerator.empty_cache()
    return None


def sample_chats(model: Any, tokenizer: Any, window: int, span: range, seed: int | str) -> torch.Tensor:
    """Rows of chats that the model writes from their first word on, the user's messages too (Magpie, 2406.08464).

    A row is several chats laid end to end, of `chat_length` tokens each, cut there.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("--data chats needs a chat template, which the tokenizer has not", "use a chat model, or self")
    length = chat_length(window)
    each = window // length
    chats = range(span.start * each, span.stop * each)
    rows = sample(model, tokenizer, length, chats, f"{seed}, {length} of {window}", chat_template=True, heat=CHAT_HEAT)
    return rows.view(len(span), window)


def chat_length(window: int) -> int:
    """As how many tokens each chat is written of those that fill a row: those of a short row, or the least above."""
    return next(window // parts for parts in range(max(1, window // SHORT_ROW), 0, -1) if window % parts == 0)


def writes_chats(tokenizer: Any, window: int) -> bool:
    """Whether a model with this tokenizer can write chats in rows of T tokens, half of each its own words."""
    try:
        return bool(tokenizer.chat_template) and 2 * len(chat_prefix(tokenizer, window)) <= chat_length(window)
    except DataError:
        return False


def plain_distribution(length: int, pad: int = 0, heat: float = 1.0) -> Any:
    """Generation by the model's own distribution, past EOS."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=True, temperature=heat, top_k=0, top_p=1.0, max_length=length, pad_token_id=pad)


@contextmanager
def generating(model: Any, plain: Any) -> Iterator[None]:
    """While open, another generation config, and a random state that is put back afterwards."""
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
    text = render_chat(tokenizer, [{"role": "user", "content": mark}])
    if mark not in text:
        raise DataError(
            "the chat template leaves out the user's message",
            "give another source of text, or leave out chat_template=True",
        )
    opening = text[: text.index(mark)].rstrip(" ")  # a blank there is part of the first word's token
    ids = tokenizer(opening, add_special_tokens=False).input_ids
    if len(ids) >= window:
        raise DataError(
            f"the chat template opens with {len(ids)} tokens; the window has {window}",
            f"use a longer one: --window {4 * len(ids)}",
        )
    return list(ids)
