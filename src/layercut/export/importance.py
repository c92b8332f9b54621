"""How much each column of a matrix matters: llama.cpp's importance matrix, measured on a model of transformers.

The mean over tokens of the square of what a column is multiplied with. Rounding minimises the error of weights times
these, which is that of what the matrix puts out if columns are independent. Used by `export/gguf_export.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layercut.models.memory import place_of_float64
from layercut.progress import bar

LEAST = 1e-12
"""Columns that no token touches still count a little, or llama.cpp would round them to anything."""


@torch.no_grad()
def importance(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean squares of what goes into every linear layer."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def adding(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            found = rows.square().sum(0)
            found = found.to(place_of_float64(found.device)).double()
            sums[name] = sums[name] + found if name in sums else found
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_pre_hook(adding(f"{name}.weight")) for name, module in linear.items()]
    try:
        with bar("measuring importance", len(tokens)) as advance:
            for row in tokens.split(1):
                model(input_ids=row.to(next(model.parameters()).device), use_cache=False)
                advance(1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).float().cpu().clamp(min=LEAST) for name, total in sums.items()}
