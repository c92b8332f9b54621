"""GPTQ: round one column after another, and let the columns not yet rounded compensate each error.

Frantar et al., arXiv 2210.17323, for one linear layer y = W x with calibration inputs X [N, I]: minimise
||(W - Q) X'||^2 row by row, whose Hessian H = 2 X'X is the same for every row. Pure functions of tensors.

The grid is fitted before any column is rounded, so that columns may be taken in any order without an index stored
for each; the order is by falling diagonal of H. Rounding to nearest uses the same grid, so a row for which it is
better keeps it: the error is never above that of rounding to nearest.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from layercut.models.memory import slices
from layercut.quantization.grid import ROWS, Grid, decode, encode

DAMPING, BLOCK = 0.01, 128
"""Share of H's mean diagonal that is added to the diagonal, and columns updated at once; both as in the paper."""
RIDGE = 0.2
"""Share that is added before, below 8 bits: of some thousand tokens H holds much that other text does not share, and
what follows it to the end is worse there (docs/log.md)."""


def gram(inputs: torch.Tensor) -> torch.Tensor:
    """2 X'X [I, I] of inputs X [..., I], in float32: what they add to H."""
    x = inputs.flatten(0, -2).float()
    return (x.T @ x).mul_(2)


def with_ridge(hessian: torch.Tensor) -> torch.Tensor:
    """H [I, I] with `RIDGE` of its mean diagonal on its diagonal: nearer to all inputs counting alike."""
    found = hessian.clone()
    found.diagonal().add_(RIDGE * hessian.diagonal().mean())
    return found


def output_errors(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """||(w - w') X'||^2 of each row: (w - w') H (w - w')' / 2."""
    found = []
    for part in slices(len(weight), ROWS):
        delta = weight[part].to(hessian.dtype) - other[part].to(hessian.dtype)
        found.append(((delta @ hessian) * delta).sum(1) / 2)
    return torch.cat(found)


def gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The codes that GPTQ chooses (Frantar et al., 2210.17323, algorithm 1)."""
    order, factor = _factored(hessian)
    parts = slices(len(weight), ROWS)
    found = torch.cat([_compensated(weight[part], grid.rows(part), order, factor) for part in parts])
    return _better_rows(weight, found, encode(weight, grid), hessian, grid)


_FACTORED = WeakTensorKeyDictionary()
"""The last Hessian, while it lives: what is solved once for all grids of a weight."""


def _factored(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of H's columns [I], and U [I, I] of H in that order, U'U = H^-1."""
    version = None if hessian.is_inference() else hessian._version  # whether it was written to since
    kept, order, factor = _FACTORED.get(hessian, (None, None, None))
    if version is None or version != kept:
        _FACTORED.clear()
        order = hessian.diagonal().argsort(descending=True)  # columns of the largest inputs first: most can compensate
        factor = inverse_factor(hessian[order][:, order]).float()
        _FACTORED[hessian] = version, order, factor
    return order, factor


def _compensated(weight: torch.Tensor, grid: Grid, order: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Codes of some rows [O, I], their columns rounded in an order."""
    open_columns = weight.float()[:, order].T.contiguous()  # [I, O], so that a column is contiguous
    group = order // grid.group_size
    scale = grid.scale.float().T[group]  # [I, O]
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float().T[group]
    codes = torch.empty_like(open_columns)
    columns = len(order)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(open_columns[start:stop])
        for j in range(start, stop):
            column = open_columns[j]
            codes[j] = (column / scale[j] + zero[j]).round_().clamp_(grid.lowest, grid.highest)
            error = errors[j - start] = (column - (codes[j] - zero[j]) * scale[j]) / factor[j, j]  # [O]
            # w_k -= e_j U_jk for the columns k > j of this block; those beyond it are updated once for the whole block
            open_columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        open_columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty_like(codes, dtype=torch.int8)
    found[order] = codes.to(torch.int8)
    return found.T.contiguous()


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """H [I, I] with `DAMPING` of its mean diagonal on its diagonal; an input that never occurs gets 1 beside."""
    found = hessian.clone()
    diagonal = found.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return found


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U [I, I] upper triangular with U'U = H^-1, H damped."""
    lower = torch.linalg.cholesky(damped(hessian))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _better_rows(
    weight: torch.Tensor, found: torch.Tensor, nearest: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Row by row, those codes that make the smaller error at the output."""
    seen = hessian.float()
    error = output_errors(weight, decode(found, grid), seen)  # [O]
    error_of_nearest = output_errors(weight, decode(nearest, grid), seen)
    return torch.where((error <= error_of_nearest)[:, None], found, nearest)
