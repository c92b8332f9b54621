"""Perplexity on held-out text, as one figure, against another model's, and by how much text comes before."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from layercut.data.blocks import by_origin
from layercut.distributed import processes, sharding
from layercut.errors import ModelError
from layercut.models.decoder_stack import positions
from layercut.models.layer_reader import layers_on_disk
from layercut.models.losses import kl_divergence, next_token_loss, token_loss
from layercut.models.memory import ShrinkingParts, budget, slices
from layercut.models.runner import DecoderRunner, carry_, enter_all, shared_passes

Advance = Callable[[float], None]
MOST_LONG_WINDOWS = 8  # a CPU takes seconds for each


def perplexity(model: Any, tokens: torch.Tensor, *, advance: Advance = lambda rows: None) -> float:
    """exp of the mean negative log-likelihood over non-overlapping windows."""
    return of_losses(window_losses(model, tokens, advance=advance))


def of_losses(losses: torch.Tensor) -> float:
    """Perplexity of the mean losses of windows [N]."""
    return _exp(losses.mean().item())


def paired_error(losses: torch.Tensor, others: torch.Tensor) -> float | None:
    """Standard error of ln(perplexity / other perplexity) on the same windows: that of the mean paired difference.

    The windows are taken as a sample of such text.
    """
    differences = losses - others
    if len(differences) < 2 or not differences.isfinite().all():
        return None
    return (differences.std() / math.sqrt(len(differences))).item()


def perplexity_protocol(window: int) -> str:
    """How perplexity is measured, in words."""
    return f"perplexity of {window:,}-token windows, no overlap, the first token of each not predicted"


@torch.no_grad()
def window_losses(model: Any, tokens: torch.Tensor, *, advance: Advance = lambda rows: None) -> torch.Tensor:
    """Mean negative log-likelihood of each window.

    Each window predicts its T - 1 tokens after the first; every model is measured on the same tokens. Of several
    processes each takes a share of the windows. Of a model whose layers are on disk each is read once for all windows
    whose hidden states fit in memory. Where one window's logits are too large to have at once, the head is run on a
    part of its positions after the other.
    """
    model = sharding.runnable(model)
    rows = rows_per_chunk(model, tokens.shape[1])
    losses_of = _swept if layers_on_disk(model) else _whole
    losses = torch.zeros(len(tokens), dtype=torch.float64)
    for part, loss, counts in losses_of(model, tokens, rows, advance):
        if counts:
            losses[part] = loss.cpu().double().mean(1)
    return torch.tensor(processes.summed(losses.tolist()), dtype=torch.float64)


def _whole(model: Any, tokens: torch.Tensor, rows: int, advance: Advance) -> Iterator[tuple[slice, torch.Tensor, bool]]:
    """Losses [B, T - 1] of a few windows after the other, by the model's own forward, and whether they count."""
    device = next(model.parameters()).device
    stack = _opened(model, tokens.shape[1], model.dtype.itemsize)  # float32 is had of a few tokens at a time
    shared = sharding.in_step(model, processes.share_of_batches(len(tokens), rows), slice(0, 1))
    for one in (queue := ShrinkingParts("evaluate", shared, device, alone=not sharding.is_spread(model))):
        (part, counts), loss = one, None
        with queue.trying(one):
            batch = tokens[part].to(device)
            if stack is None:
                loss = next_token_loss(model(input_ids=batch, use_cache=False).logits, batch)
            else:
                loss = exit_losses(stack, stack.last(batch), batch)
        if loss is not None:
            yield part, loss, counts
            advance(part.stop - part.start)


@torch.no_grad()
def compared_losses(
    model: Any, baseline: Any, tokens: torch.Tensor, *, advance: Advance = lambda rows: None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of each window: the losses of both models, as `window_losses` gives them, and KL(baseline || model).

    Each model is run once over a window, and the KL is taken from the same logits: the mean over the T - 1 positions
    that the losses are of.
    """
    if layers_on_disk(model) or layers_on_disk(baseline):
        mine, theirs = (window_losses(each, tokens, advance=advance) for each in (model, baseline))
        return mine, theirs, None
    student, dense = models = [sharding.runnable(each) for each in (model, baseline)]
    stacks = [_opened(each, tokens.shape[1], 4) for each in models]
    rows, device, last = rows_per_chunk(student, tokens.shape[1]), _device(student), tokens.shape[1] - 1
    found = torch.zeros(3, len(tokens), dtype=torch.float64)
    shared = sharding.in_step(dense, processes.share_of_batches(len(tokens), rows), slice(0, 1))
    for one in (queue := ShrinkingParts("evaluate", shared, device, alone=not sharding.is_spread(dense))):
        with queue.trying(one):
            part, counts = one
            batch, terms = tokens[part].to(device), list[torch.Tensor]()
            q, p = (_next_logits(each, stack, batch) for each, stack in zip(models, stacks, strict=True))
            # the T - 1 positions that predict a token: all at once, or so many as the logits leave room for
            together = [positions_at_once(stack.model, len(batch)) for stack in stacks if stack]
            for where in slices(last, min(together, default=last)):
                both, targets = [q(where), p(where)], batch[:, 1:][:, where]
                losses = [token_loss(each, targets.to(each.device)).to(device) for each in both]
                terms.append(torch.stack([*losses, kl_divergence(both[1].to(both[0].device), both[0]).to(device)]))
            if counts:
                found[:, part] = torch.cat(terms, dim=2).cpu().double().mean(2)
            advance(2 * len(batch))
    mine, theirs, kl = torch.tensor(processes.summed(found.flatten().tolist()), dtype=torch.float64).view(3, -1)
    return mine, theirs, kl


def rows_per_chunk(model: Any, window: int) -> int:
    """Rows whose logits are had at once, by what is free on the model's device."""
    return budget(_device(model)).logit_rows(window, model.config.get_text_config().vocab_size)


def positions_at_once(model: Any, rows: int) -> int:
    """Positions of a few rows whose logits are had at once in float32, where those of a whole row are too many."""
    return max(1, budget(_device(model)).logit_tokens(model.config.get_text_config().vocab_size) // rows)


def _device(model: Any) -> torch.device:
    return next(p.device for p in model.parameters() if not p.is_meta)


def _next_logits(model: Any, stack: DecoderRunner | None, batch: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """Run a model over a batch [B, T]; its logits [B, n, V] at n positions are then had by their slice."""
    batch = batch.to(next(model.parameters()).device)
    if stack is None:
        logits = model(input_ids=batch, use_cache=False).logits
        return lambda where: logits[:, where]
    opened = stack  # for the type checker
    last = opened.last(batch)
    return lambda where: opened.exit(last, batch, where)


def _opened(model: Any, window: int, itemsize: int) -> DecoderRunner | None:
    """A runner of the model, where one window's logits are too large to have at once and its layers can be run.

    itemsize: bytes of a logit.
    """
    if (
        window * itemsize <= 4 * positions_at_once(model, 1)
        or "logits_to_keep" not in inspect.signature(model.forward).parameters
    ):
        return None
    try:
        return DecoderRunner(model)
    except ModelError:  # its layers exchange more than the hidden state: it is run whole
        return None


def exit_losses(stack: DecoderRunner, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Losses of next tokens from the last layer's output, by logits of a few positions at a time."""
    tokens, together = tokens.to(hidden.device), positions_at_once(stack.model, len(tokens))
    if together >= tokens.shape[1]:
        return next_token_loss(stack.exit(hidden, tokens), tokens)
    targets = tokens[:, 1:]
    parts = slices(targets.shape[1], together)
    return torch.cat([token_loss(stack.exit(hidden, tokens, part), targets[:, part]) for part in parts], dim=1)


def _swept(model: Any, tokens: torch.Tensor, rows: int, advance: Advance) -> Iterator[tuple[slice, torch.Tensor, bool]]:
    """The same, of which all windows go through a layer before the next is read."""
    stack = DecoderRunner(model)
    for parts in shared_passes(stack, tokens, rows, streams=2):
        batches = [tokens[part] for part in parts]
        hidden, calls = enter_all(stack, batches)
        for i in range(len(stack)):
            carry_(stack, hidden, calls, i, i + 1)
            advance(sum(map(len, batches)) / len(stack))
        for part, batch, last in zip(parts, batches, hidden, strict=True):
            yield part, exit_losses(stack, last, batch), True


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


# --- by position --------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_by_position(model: Any, row: torch.Tensor, *, advance: Advance = lambda tokens: None) -> torch.Tensor:
    """Loss of each next token of one long window, in one pass: its logits are had of a part of it at a time.

    Not through the cache: several families continue otherwise than they read (Mamba's convolution of a chunk).
    """
    model = sharding.runnable(model)
    losses_of = _swept if layers_on_disk(model) else _whole
    ((_, losses, _),) = losses_of(model, row[None], 1, lambda rows: advance(rows * len(row)))
    return losses[0]


def long_windows(blocks: torch.Tensor, longest: int, model: Any, origins: Sequence[str] = ("",)) -> torch.Tensor:
    """Blocks that follow each other in a text, as few long windows; of several texts as many of each, in turn.

    Shorter than asked for where the model's context or the longest text ends before.
    """
    rows_of = by_origin(torch.arange(len(blocks)), origins)
    texts = [blocks[rows.sort().values].flatten() for rows in rows_of.values()]
    window = min(longest, positions(model.config) or longest, max(map(len, texts)))
    windows = [text[: len(text) // window * window].view(-1, window) for text in texts]
    turns = [some[i] for i in range(max(map(len, windows))) for some in windows if i < len(some)]
    return torch.stack(turns[:MOST_LONG_WINDOWS])


def perplexity_by_position(
    model: Any, windows: torch.Tensor, *, advance: Advance = lambda tokens: None
) -> list[dict[str, Any]]:
    """Perplexity in buckets of position that double in width: 1, 64, 128, … T. Nothing predicts position 0."""
    losses = torch.stack([loss_by_position(model, row, advance=advance).cpu().double() for row in windows])
    edges = [1, *(64 << i for i in range(40) if 64 << i < windows.shape[1]), windows.shape[1]]
    return [
        # the loss at index i is that of the token at position i + 1
        {"start": a, "stop": b, "perplexity": _exp(losses[:, a - 1 : b - 1].mean().item())}
        for a, b in pairwise(edges)
    ]
