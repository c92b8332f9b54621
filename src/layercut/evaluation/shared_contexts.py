"""Log-likelihoods of continuations, with every context run once: the choices of a question share theirs.

Below lm-eval's adapter (`lm_eval_harness.py`). A question with four choices is one context and four continuations; read
as four rows, the context is computed four times, and the logits of all its tokens, of which the last one's are needed.
Here the contexts of a batch are run into the cache, once each, and the continuations from there.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layercut.errors import first_line
from layercut.models.losses import next_token_loss
from layercut.models.memory import budget
from layercut.models.runner import logits_at
from layercut.progress import debug

Request = tuple[list[int], list[int]]
"""A context, of one token at least, and what continues it, of one token at least."""
Answer = tuple[float, bool]
"""The sum of the continuation's log-probabilities, and whether greedy decoding would give it."""
TRIED: tuple[tuple[int, int], ...] = ((5, 1), (5, 3), (2, 2), (3, 1))
"""Lengths of the contexts and the continuations by which a model is tried, the first two of one context."""
NEAR = 0.01, 0.01
"""How far apart likelihoods may be that are the same but for rounding: nats, and of their size in half precision."""
CACHED_TOKENS, MOST_REQUESTS = 16384, 128
"""Tokens of contexts whose keys and values are held at once, one copy for each continuation, and so many of these."""


def shares_contexts(model: Any) -> bool:
    """Whether continuations can be run from a copied cache: all layers attend to everything, through stock arguments.

    And it is tried: that positions begin elsewhere than at 0 (RoBERTa's) or a cache is built otherwise no config says.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    taken = inspect.signature(model.forward).parameters
    return (
        kinds == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and {"position_ids", "logits_to_keep"} <= set(taken)
        and bool({"cache", "past_key_values"} & set(taken))
        and _as_by_itself(model)
    )


@torch.no_grad()
def _as_by_itself(model: Any) -> bool:
    """Whether a few short requests together have the likelihoods that each has in a plain pass of its own."""
    first = model.config.get_text_config().vocab_size // 2  # special tokens stand at the ends
    context, continuation = ([(first + 7 * i) % (2 * first) for i in range(n)] for n in (5, 4))
    requests = [(context[:length], continuation[1 : 1 + more]) for length, more in TRIED]
    device = next(model.parameters()).device
    try:
        together = [score for score, _ in log_likelihoods(model, requests)]
        alone = []
        for before, after in requests:
            ids = torch.tensor([before + after], device=device)
            losses = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)[0]
            alone.append(-losses[len(before) - 1 :].sum().item())
    except Exception as error:  # whatever the model's own code raises: lm-eval's way is plain passes
        debug("tasks", f"contexts are not shared: {first_line(error)}")
        return False
    most = [NEAR[0] + (NEAR[1] * abs(b) if model.dtype != torch.float32 else 0.0) for b in alone]
    return all(abs(a - b) <= near for a, b, near in zip(together, alone, most, strict=True))


def requests_at_once(context: int) -> int:
    """How many requests of contexts of up to so many tokens are answered together."""
    return max(1, min(MOST_REQUESTS, CACHED_TOKENS // context))


@torch.no_grad()
def log_likelihoods(model: Any, requests: Sequence[Request]) -> list[Answer]:
    """The likelihood of each continuation after its context; equal contexts are run once."""
    contexts = {tuple(context): i for i, context in enumerate(dict.fromkeys(tuple(c) for c, _ in requests))}
    row_of = [contexts[tuple(context)] for context, _ in requests]
    run = _run_contexts(model, list(contexts))
    first = torch.log_softmax(run.last.float(), -1)
    answers: list[Answer] = [(0.0, False)] * len(requests)
    longer = []
    for i, (_, continuation) in enumerate(requests):
        token, scores = continuation[0], first[row_of[i]]
        answers[i] = float(scores[token]), int(scores.argmax()) == token
        if len(continuation) > 1:
            longer.append(i)
    longer.sort(key=lambda i: len(requests[i][1]))  # continuations of one length go together: little is padded
    room, vocabulary = budget(run.last.device), run.last.shape[-1]
    while longer:
        rows = room.logit_rows(len(requests[longer[-1]][1]), vocabulary)
        part, longer = longer[-rows:], longer[:-rows]
        followed = _continue(model, run, [row_of[i] for i in part], [requests[i][1] for i in part])
        for i, (score, greedy) in zip(part, followed, strict=True):
            answers[i] = answers[i][0] + score, answers[i][1] and greedy
    return answers


@dataclass(frozen=True)
class _Contexts:
    """Contexts that were run, padded on the left to one length."""

    cache: Any
    mask: torch.Tensor
    """[B, T]: 1 where a token is."""
    last: torch.Tensor
    """Logits [B, V] after the last token."""


def _run_contexts(model: Any, contexts: Sequence[Sequence[int]]) -> _Contexts:
    width = max(map(len, contexts))
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (width - len(c)) + list(c) for c in contexts], device=device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=device)
    last: dict[str, Any] = logits_at(model, torch.tensor([width - 1], device=device)) or {"logits_to_keep": 1}
    out = model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, **last)
    return _Contexts(out[_cache_name(out)], mask, out.logits[:, -1])


def _cache_name(names: Container[str]) -> str:
    """What the cache is called among these: newer transformers renamed it."""
    return "cache" if "cache" in names else "past_key_values"


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _continue(model: Any, run: _Contexts, rows: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Answer]:
    """What follows the first token of each continuation, from a copy of its context's cache."""
    chosen = torch.tensor(rows, device=run.mask.device)
    cache = _copied(run.cache, chosen)
    width = max(map(len, continuations)) - 1
    inputs = torch.tensor([list(c[:-1]) + [0] * (width + 1 - len(c)) for c in continuations], device=chosen.device)
    targets = torch.tensor([list(c[1:]) + [0] * (width + 1 - len(c)) for c in continuations], device=chosen.device)
    real = torch.tensor([[1] * (len(c) - 1) + [0] * (width + 1 - len(c)) for c in continuations], device=chosen.device)
    mask = torch.cat([run.mask[chosen], torch.ones_like(real)], 1)  # what is padded behind is seen by nothing before
    out = model(
        input_ids=inputs, attention_mask=mask, position_ids=_positions(mask)[:, -width:], use_cache=True,
        **{_cache_name(inspect.signature(model.forward).parameters): cache},
    )  # fmt: skip
    scores = torch.log_softmax(out.logits.float(), -1)
    sums = (scores.gather(-1, targets[..., None])[..., 0] * real).sum(-1).tolist()
    greedy = ((scores.argmax(-1) == targets) | (real == 0)).all(-1).tolist()
    return list(zip(sums, greedy, strict=True))


def _copied(cache: Any, rows: torch.Tensor) -> Any:
    """A cache that holds these rows of another, which stays as it is."""
    new = type(cache)()
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys[rows], layer.values[rows], index)
    return new
