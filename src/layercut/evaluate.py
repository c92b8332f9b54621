"""What survived: perplexity on held-out text, and a few generations to look at.

The last look at a model before it is handed over; never fed back into search or tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layercut.losses import next_token_loss, rows_per_chunk

PROMPTS = (
    "The capital of France is",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that returns the largest of three numbers.",
)


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor, *, advance: Callable[[int], None] = lambda rows: None) -> float:
    """exp of the mean negative log-likelihood over non-overlapping windows [N, T].

    Each window predicts its T - 1 tokens after the first; every model is measured on the same tokens. `inf`
    where the mean overflows or the model yields NaN: a ruined model never looks good.
    """
    device = next(model.parameters()).device
    rows = rows_per_chunk(tokens.shape[1], model.config.get_text_config().vocab_size)
    total = 0.0
    for batch in tokens.split(rows):
        batch = batch.to(device)
        total += next_token_loss(model(input_ids=batch, use_cache=False).logits, batch).double().sum().item()
        advance(len(batch))
    mean = total / (tokens.numel() - len(tokens))
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def generations(model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, *, tokens: int = 48) -> list[str]:
    """Greedy continuations with the cache; through the chat template where the model has one."""
    return [_generate(model, tokenizer, prompt, tokens) for prompt in prompts]


def _generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    ids = ids.to(next(model.parameters()).device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
