"""Statistics of the layers from one pass of the calibration tokens through the dense model.

The baselines of `criteria.py` are functions of these sums. Only the hidden states of a few rows are held at once;
where the layers are on disk, those of all rows, so that each layer is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from layercut.distributed import processes
from layercut.errors import ModelError
from layercut.layer_search.result import Cost
from layercut.models.devices import place_of_float64
from layercut.models.losses import next_token_loss
from layercut.models.model_weights import taking_gradients
from layercut.models.passes import passes, passes_in_step
from layercut.models.runner import Calls, DecoderRunner

BUDGET_BYTES = 512 * 2**20
"""Hidden states held at once, [L + 1, B, T, D] in float32; one row at least."""


@dataclass(frozen=True)
class Similarity:
    """How much alike the hidden states at all depths are, h_0 (embeddings) to h_L (before the final norm)."""

    cosine: torch.Tensor
    """E[cos(h_i, h_j)] over all tokens, along the hidden dimension. [L + 1, L + 1], float64."""
    angular: torch.Tensor
    """E[arccos(cos(h_i, h_j)) / pi] over the last token of each row. [L + 1, L + 1], float64, in [0, 1]."""


@torch.no_grad()
def similarity(
    stack: DecoderRunner, tokens: torch.Tensor, cost: Cost, *, advance: Callable[[int], None] = lambda rows: None
) -> Similarity:
    """Both matrices from one pass through the dense model: L layer-forwards a row."""
    depth = len(stack) + 1
    cosine = torch.zeros(depth, depth, dtype=torch.float64)
    angular = torch.zeros(depth, depth, dtype=torch.float64)
    rows = max(1, BUDGET_BYTES // (4 * depth * tokens.shape[1] * stack.hidden_size))
    spent = Cost()
    for batches, counts in passes_in_step(stack, tokens, rows, depth):
        found = _all_states(stack, batches)
        if not counts:
            continue
        for batch, (states, _) in zip(batches, found, strict=True):
            states = [h.to(stack.device) for h in states]  # layers may be on several devices
            cosine += cosine_sums(torch.stack(states))
            angular += angular_sums(torch.stack([h[:, -1] for h in states])).cpu()
            spent.layer_forwards += len(stack) * len(batch)
            spent.dense_tokens += batch.numel()
            advance(len(batch))
    cost.add_(spent)
    processes.sum_(cosine, angular)
    return Similarity(cosine / tokens.numel(), angular / len(tokens))


def _all_states(stack: DecoderRunner, batches: list[torch.Tensor]) -> list[tuple[list[torch.Tensor], Calls]]:
    """h_0 … h_L [B, T, D] of each batch [B, T], and the layers' arguments. Each layer is entered once for all."""
    entered = [stack.enter(batch) for batch in batches]
    found = [([hidden], calls) for hidden, calls in entered]
    for i in range(len(stack)):
        for states, calls in found:
            states.append(stack.layer(i, states[-1], calls))
    return found


def cosine_sums(states: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of cos(h_i, h_j): [L + 1, B, T, D] -> [L + 1, L + 1], float64.

    Along the hidden dimension D, one cosine a token; along the tokens (a fault of some re-implementations)
    it would be another criterion, which chooses other segments.
    """
    unit = F.normalize(states.float(), dim=-1).flatten(1)
    return (unit @ unit.T).cpu().double()


def angular_sums(last: torch.Tensor) -> torch.Tensor:
    """Sum over rows of arccos(cos(h_i, h_j)) / pi: [L + 1, B, D] -> [L + 1, L + 1], float64."""
    # float64: arccos is steep where two states are nearly the same
    unit = F.normalize(last.to(place_of_float64(last.device)).double(), dim=-1)
    return torch.einsum("ibd,jbd->bij", unit, unit).clamp(-1, 1).arccos().sum(0) / torch.pi


@torch.enable_grad()
def taylor_scores(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    cost: Cost,
    *,
    rows: int = 4,
    advance: Callable[[int], None] = lambda rows: None,
) -> torch.Tensor:
    """sum_w |w dL/dw| over the weight matrices of each layer, L being the next-token loss.

    First-order estimate of what removing each weight costs (Taylor+ of Shortened LLaMA, 2402.02834). The backward pass
    goes layer by layer, each recomputed from its input; gradients, summed over rows, are in float32. 2 L layer-
    forwards and L layer-backwards a row; every process computes all of it, since the sums are as large as the model.
    Layers on disk are read twice, and all rows go in one pass.
    """
    scores = torch.zeros(len(stack), dtype=torch.float64)
    sums: list[list[torch.Tensor]] = [[] for _ in range(len(stack))]
    predictions = tokens.numel() - len(tokens)
    groups = passes(stack, tokens, rows, len(stack) + 2)
    if stack.on_disk and len(groups) > 1:
        raise ModelError(
            f"the hidden states of {tokens.numel():,} tokens at {len(stack)} layers do not fit in memory",
            f"give fewer tokens: --tokens {groups[0][0].shape[1] * sum(map(len, groups[0]))}",
        )
    for batches in groups:
        found, slopes = _loss_slopes(stack, batches)
        for i in reversed(range(len(stack))):
            matrices = [p for p in stack.loaded(i).parameters() if p.ndim > 1]
            sums[i] = sums[i] or [torch.zeros_like(p, dtype=torch.float32) for p in matrices]
            for b, (states, calls) in enumerate(found):
                slopes[b], grads = _layer_backward(stack, i, states[i], calls, slopes[b], matrices)
                for total, grad in zip(sums[i], grads, strict=True):
                    if grad is not None:
                        total += grad.float() / predictions
            if batches is groups[-1]:
                scores[i] = sum(
                    (p.detach().float() * g).abs().to(place_of_float64(g.device)).sum(dtype=torch.float64).item()
                    for p, g in zip(matrices, sums[i], strict=True)
                )
                sums[i] = []
            del matrices  # a reference would keep a layer on disk in memory
        for batch in batches:
            cost.layer_forwards += 2 * len(stack) * len(batch)
            cost.layer_backwards += len(stack) * len(batch)
            cost.dense_tokens += batch.numel()
            advance(len(batch))
    return processes.from_main(scores)


def _loss_slopes(
    stack: DecoderRunner, batches: list[torch.Tensor]
) -> tuple[list[tuple[list[torch.Tensor], Calls]], list[torch.Tensor]]:
    """`_all_states` of each batch, and the gradient at its h_L of the loss summed over its tokens."""
    with torch.no_grad():
        found = _all_states(stack, batches)
    slopes: list[torch.Tensor] = []
    for batch, (states, _) in zip(batches, found, strict=True):
        last = states.pop().detach().requires_grad_(True)
        loss = next_token_loss(stack.exit(last, batch), stack.place(batch)).sum()
        slopes += torch.autograd.grad(loss, last)
    return found, slopes


def _layer_backward(
    stack: DecoderRunner, i: int, hidden: torch.Tensor, calls: Calls, slope: torch.Tensor, weights: list[nn.Parameter]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The gradients at layer i's input and at its weights, from the one at its output."""
    hidden = hidden.detach().requires_grad_(True)
    with taking_gradients(weights, True):
        output = stack.plain_layer(i, hidden, calls)
        grads = torch.autograd.grad(output, [hidden, *weights], slope, allow_unused=True)
    return grads[0], list(grads[1:])
