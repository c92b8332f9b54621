"""Text that the model writes itself: for users who have none, and chats, so that a healed model replies as it did."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from layercut.data.chat_templates import render_chat
from layercut.data.probes import SHORT_ROW
from layercut.errors import DataError
from layercut.models.decoder_stack import as_just_loaded
from layercut.models.loading import quiet_transformers
from layercut.models.memory import ran_out
from layercut.progress import bar

ROWS, ROWS_OF_ACCELERATOR = 32, 256  # rows sampled from the model in one batch, fewer where memory runs out
CHAT_HEAT = 0.7  # temperature of chats: at 1 a small model loses the thread, and nobody asks it so (measured)


def sample(
    model: Any, tokenizer: Any, window: int, span: range, seed: int | str, *, chat_template: bool = False,
    heat: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Rows of the model's own text: its plain distribution, past EOS.

    Each batch is seeded by the run's seed and its first row's place, so that rows of disjoint spans differ.
    """
    if model is None:
        words = "self and chats are sampled from the model, and none is loaded"
        raise DataError(words, "give model=, or a file or a named set")
    prefix = chat_prefix(tokenizer, window) if chat_template else None
    plain, rows = plain_distribution(window, tokenizer.pad_token_id or 0, heat), list[torch.Tensor]()
    total = len(span) * (window - len(prefix or [0]))
    with bar("sampling text from the model", total) as advance, generating(model, plain):

        def step(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            # generate calls it after every token: where the bar moves; it never stops a row
            advance(len(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        first, most = span.start, ROWS if model.device.type == "cpu" else ROWS_OF_ACCELERATOR
        while first < span.stop:
            batch, draw = min(most, span.stop - first), random.Random(f"{seed}/{first}")
            torch.manual_seed(draw.getrandbits(32))
            ids = torch.tensor([prefix or [first_token(tokenizer, draw)] for _ in range(batch)])
            try:
                if ids.shape[1] < window:
                    ids = ids.to(model.device)
                    mask = torch.ones_like(ids)
                    ids = model.generate(ids, attention_mask=mask, use_cache=True, stopping_criteria=[step]).cpu()
            except (RuntimeError, MemoryError) as error:
                if batch == 1 or not ran_out(error):
                    raise
                most = batch // 2
            else:
                rows.append(ids)
                first += batch
                continue
            if model.device.type != "cpu":  # out of the handler: the error's traceback would keep tensors
                torch.accelerator.empty_cache()
    return torch.cat(rows).clone()  # cloned outside inference mode, or autograd would refuse these tokens


def sample_chats(model: Any, tokenizer: Any, window: int, span: range, seed: int | str) -> torch.Tensor:
    """Rows of chats that the model writes from their first word on, the user's messages too (Magpie, 2406.08464).

    A row is several chats laid end to end, of `chat_length` tokens each, cut there.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("--data chats needs a chat template, which the tokenizer has not", "use a chat model, or self")
    length = chat_length(window)
    chats = range(span.start * (window // length), span.stop * (window // length))
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
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=True, temperature=heat, top_k=0, top_p=1.0, max_length=length, pad_token_id=pad)


@contextmanager
def generating(model: Any, plain: Any) -> Iterator[None]:
    """While open, another generation config, and a random state that is put back afterwards."""
    kind, own = model.device.type, model.generation_config
    devices, of_kind = [model.device] if kind == "cuda" else [], "cuda" if kind == "cpu" else kind
    model.generation_config = plain
    try:
        apart = torch.random.fork_rng(devices, device_type=of_kind)
        with as_just_loaded(model), apart, torch.inference_mode(), quiet_transformers():
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
        words = "the chat template leaves out the user's message"
        raise DataError(words, "give another source of text, or leave out chat_template=True")
    opening = text[: text.index(mark)].rstrip(" ")  # a blank there is part of the first word's token
    ids = list(tokenizer(opening, add_special_tokens=False).input_ids)
    if len(ids) >= window:
        words = f"the chat template opens with {len(ids)} tokens; the window has {window}"
        raise DataError(words, f"use a longer one: --window {4 * len(ids)}")
    return ids
