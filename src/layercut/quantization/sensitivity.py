"""What it costs to round one weight: by how much KL to the model as it is rises, in nats per token, at each width.

    costs = measure(model, tokens, {"model.layers.0.mlp.up_proj": [(4, 64), (3, 64)]}, seed=0)

Second order: with F the Fisher information of what the model predicts, KL(p || p_dW) = 1/2 <dW, F dW>. Of a linear
module y = W x, with d the gradient of ln p(v) in y for v drawn from p, F is taken as Kronecker product of E[x x'] and
the diagonal of E[d d'] (K-FAC, 1503.05671), so that one backward pass serves all widths:

    KL = 1/2 sum_o E[d_o^2] E[(dW_o x)^2]

The sum over the rows o of W is estimated from `ROWS` of them, drawn with probability E[d_o^2]. Of embeddings the rows
of the tokens that occur are taken, and (d, dW_t)^2 as it is. How well this ranks weights is in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from layercut.models.losses import likelihood_slope_
from layercut.models.runner import DecoderRunner, intercepted
from layercut.progress import bar
from layercut.quantization.grid import decode, encode, fit_grid

TOKENS = 2048
"""Calibration tokens that are enough: the costs of weights differ by orders of magnitude."""
ROWS = 128
"""Rows of a matrix that are rounded to tell what all would cost."""
Width = tuple[int, int]
"""Bits, and columns that share a scale."""


def measure(
    model: Any, tokens: torch.Tensor, widths: Mapping[str, Sequence[Width]], *, dtype: torch.dtype, seed: int = 0
) -> dict[str, dict[Width, float]]:
    """The rise of KL when one weight alone is rounded to nearest, for each weight and width.

    Args:
        model: a causal LM of transformers in memory; as it was on return.
        tokens: calibration token ids [N, T]; the first rows of about `TOKENS` tokens are taken.
        widths: by the name of a linear module or an embedding.
        dtype: of the scales, as they are stored.
        seed: of the tokens and rows drawn.

    Returns:
        Nats per token, by name and width; of a module that no token reached 0.
    """
    stack, draw = DecoderRunner(model), torch.Generator().manual_seed(seed)
    window = tokens.shape[1]
    tokens = stack.place(tokens[: max(1, TOKENS // window)])
    vocabulary = model.config.get_text_config().vocab_size
    rows = min(stack.budget.pass_rows(window, 0), stack.budget.logit_rows(window, vocabulary))
    modules = [model.get_submodule(name) for name in widths]
    sums = {name: dict.fromkeys(each, 0.0) for name, each in widths.items()}
    with bar("what each width costs", len(modules) * -(-len(tokens) // rows)) as advance:

        def forward(which: int, run: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output = run(x, *args, **kwargs)
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            name, module = list(widths)[which], modules[which]

            def backward(slope: torch.Tensor) -> None:
                found = rise(module, x.detach(), slope, widths[name], dtype=dtype, draw=draw)
                for width, value in zip(widths[name], found, strict=True):
                    sums[name][width] += value
                advance(1)

            output.register_hook(backward)
            return output

        with torch.enable_grad(), intercepted(modules, forward):
            for batch in tokens.split(rows):
                _drawn_log_likelihood_(model(batch, use_cache=False).logits, draw)
    return {name: {width: value / tokens.numel() for width, value in each.items()} for name, each in sums.items()}


def _drawn_log_likelihood_(logits: torch.Tensor, draw: torch.Generator) -> None:
    """Backward pass of sum ln p(v), v drawn from p = softmax(logits) at each position of [B, T, V]."""
    p = logits.detach().float().softmax(-1)
    drawn = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=draw).view(p.shape[:2]).to(p.device)
    logits.backward(likelihood_slope_(p, drawn).to(logits.dtype))


@torch.no_grad()
def rise(
    module: Any,
    x: torch.Tensor,
    slope: torch.Tensor,
    widths: Sequence[Width],
    *,
    dtype: torch.dtype,
    draw: torch.Generator,
) -> list[float]:
    """1/2 <dW, F dW> of one module, summed over tokens.

    Args:
        module: linear or an embedding, weight W [O, I].
        x: its inputs [..., I], or token ids [...].
        slope: d [..., O] at its outputs.
        widths: that W is rounded to.
        dtype: of the scales.
        draw: of the rows.

    Returns:
        Nats, for each width.
    """
    d: torch.Tensor = slope.flatten(0, -2).float()  # [N, O]
    if isinstance(module, nn.Embedding):
        ids, place = x.flatten().unique(return_inverse=True)
        weight = module.weight[ids]
        errors = (_error(weight, width, dtype) for width in widths)
        return [((error[place] * d).sum(-1).square().sum() / 2).item() for error in errors]
    squares = d.square().sum(0)  # [O]
    total = squares.sum().item()
    if not total > 0:
        return [0.0] * len(widths)
    chosen = torch.multinomial(squares.cpu(), ROWS, replacement=True, generator=draw).to(x.device)
    weight, inputs = module.weight[chosen], x.flatten(0, -2)
    found = []
    for width in widths:
        outputs = F.linear(inputs, _error(weight, width, dtype).to(x.dtype)).float()  # [N, ROWS]
        found.append(total * outputs.square().mean().item() / 2)
    return found


def _error(weight: torch.Tensor, width: Width, dtype: torch.dtype) -> torch.Tensor:
    """W - round(W) of some rows [R, I], float32."""
    grid = fit_grid(weight, *width, asymmetric=False, dtype=dtype)
    return weight.float() - decode(encode(weight, grid), grid).float()
