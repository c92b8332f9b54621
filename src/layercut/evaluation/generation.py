"""Greedy continuations: a few to read, and figures of whether they are still language.

Perplexity and multiple choice overstate what survives a cut (2602.01997): a model may rank sentences well and yet
repeat itself, or write nothing that makes sense. Three figures show it, each beside the dense model's own:
how much of the text repeats, how varied it is, and how likely the dense model finds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layercut.data.chat_templates import prompt_ids
from layercut.models.decoder_stack import as_just_loaded
from layercut.models.losses import kl_divergence, next_token_loss

PROMPTS = (
    "The capital of France is",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that returns the largest of three numbers.",
    "What are the benefits of exercise?",
    "Who was Marie Curie?",
    "Write an email asking my boss for a day off.",
    "How do I boil an egg?",
    "Tell me a story about a dragon and a baker.",
)
SAMPLE = 64  # tokens written after each of them, at most
LONGEST_PROMPT, CONTINUATION, FEWEST_PROMPTS = 32, 64, 24
"""Tokens of a prompt and of its continuation when health is measured, and over how many prompts."""
PLAIN: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None,
                         "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip
"""What a generation config may say of tokens other than that the likeliest one follows, set aside."""


@torch.no_grad()
def generations(model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, *, tokens: int = SAMPLE) -> list[str]:
    """Greedy continuations with the cache; through the chat template where the model has one."""
    texts = []
    for prompt in prompts:
        out = greedy(model, torch.tensor([prompt_ids(tokenizer, prompt)]), tokens, padding(tokenizer))
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


@torch.no_grad()
def replies(
    dense: Any, compressed: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], prompts: Sequence[str] = PROMPTS
) -> dict[str, float]:
    """How chat models reply: how long, and how far the compressed one is from the dense one on that one's replies.

    Lengths count a reply in circles as a long one; the KL, of every token of a dense reply and of what follows the
    last, does not.
    """
    written = {
        name: [tokenizer(text, add_special_tokens=False).input_ids for text in told] for name, told in texts.items()
    }
    found, device = list[torch.Tensor](), next(dense.parameters()).device
    for prompt, reply in zip(prompts, written["dense"], strict=True):
        ids = prompt_ids(tokenizer, prompt)
        row = torch.tensor([[*ids, *reply]], device=device)
        both = [model(input_ids=row, use_cache=False).logits[:, len(ids) - 1 :] for model in (dense, compressed)]
        found.append(kl_divergence(both[0], both[1])[0].double().cpu())
    return {name: _mean([*map(len, told)]) for name, told in written.items()} | {"kl": torch.cat(found).mean().item()}


def padding(tokenizer: Any) -> int:
    """A token to pad with; it is never read, since all prompts of a batch are equally long."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def greedy(
    model: Any, ids: torch.Tensor, tokens: int, pad: int | None, *, exactly: bool = False, streamer: Any = None
) -> list[list[int]]:
    """The most likely next tokens, up to the end of the text.

    What is measured goes by the likeliest token alone; to who reads along (`streamer`) the model writes as its
    generation config has it, penalties on repetition for example, but without sampling.
    """
    ids = ids.to(next(model.parameters()).device)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": pad}
    settings |= PLAIN if streamer is None else {"streamer": streamer}
    settings |= {"min_new_tokens": tokens} if exactly else {}
    with as_just_loaded(model):
        return model.generate(ids, max_new_tokens=tokens, **settings)[:, ids.shape[1] :].tolist()


@torch.no_grad()
def generation_health(
    dense: Any, compressed: Any, blocks: torch.Tensor, *, tokens: int = CONTINUATION
) -> dict[str, Any]:
    """Both models continue the beginnings of the blocks greedily, each by exactly `tokens`; figures of both.

    "dense" and "compressed": `repeated_4grams` (share of 4-grams that have occurred before in the same
    continuation), `distinct_1`, `distinct_2` (different n-grams / n-grams), `dense_loss` (nats per token that
    the dense model gives the continuation).
    """
    prompts, device = blocks[:FEWEST_PROMPTS, : min(LONGEST_PROMPT, blocks.shape[1])], next(dense.parameters()).device
    figures: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": prompts.shape[1], "tokens": tokens}
    for name, model in (("dense", dense), ("compressed", compressed)):
        rows = greedy(model, prompts, tokens, 0, exactly=True)
        whole = torch.cat([prompts, torch.tensor(rows)], dim=1).to(device)
        losses = next_token_loss(dense(input_ids=whole, use_cache=False).logits, whole)[:, prompts.shape[1] - 1 :]
        figures[name] = {
            "repeated_4grams": _mean([1 - distinct(row, 4) for row in rows]),
            "distinct_1": _mean([distinct(row, 1) for row in rows]),
            "distinct_2": _mean([distinct(row, 2) for row in rows]),
            "dense_loss": losses.cpu().double().mean().item(),
        }
    return figures


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams / n-grams; 1 where there are none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
