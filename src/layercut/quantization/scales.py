"""Codes and scales by turns: for codes that stay, the scales of a weight that make its outputs nearest.

GPTQ chooses codes on a grid that was fitted to the weights alone. Once they are chosen, the error at the output,
||(W - Q) X'||^2, is a quadratic form of the scales, row by row, and least squares gives its minimum; on these scales
codes can be chosen again. Each turn keeps, row by row, what is better. Pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from layercut.models.batch_sizes import slices
from layercut.quantization.gptq import output_errors
from layercut.quantization.grid import Grid, decode

TURNS = 3
"""Times that scales are fitted and codes chosen again (docs/log.md)."""
DAMPING = 1e-3
"""Share of the mean diagonal of the normal equations that holds scales at what they were."""
WITHIN = 3.0
"""A scale that would grow or shrink by more stays: so do all of a group whose codes are zero."""
EQUATIONS_BYTES = 2**28
"""Of the normal equations that are in memory at once, in float32; solving them takes as much again."""
TINY = 1e-6
"""Where a row's codes are all zero there is nothing else to solve."""
LARGEST = 1e6
"""Of a code less its zero point: more is that of a group of a file that has no scale, and stands for one number."""
RECIPE = ["weighted tokens", TURNS, DAMPING, WITHIN]
"""What decides beside the options which codes and scales are found."""


def by_turns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    codes: torch.Tensor,
    choose: Callable[[Grid], torch.Tensor],
    stored: Callable[[Grid], Grid] = lambda grid: grid,
) -> tuple[Grid, torch.Tensor]:
    """A grid and codes on it that are nowhere worse at the output than those given.

    Args:
        weight: [O, I].
        hessian: H = 2 X'X [I, I].
        grid: fitted to the weight.
        codes: [O, I] on it.
        choose: codes [O, I] of the weight on another grid.
        stored: the grid that a file keeps for one, where its scales and zero points are rounded further.

    Returns:
        The grid, and codes [O, I] int8.
    """
    error = output_errors(weight, decode(codes, grid), hessian)  # [O]
    for _ in range(TURNS):
        fitted = stored(fitted_scales(weight, hessian, grid, codes))
        for tried in (codes, choose(fitted)):
            other = output_errors(weight, decode(tried, fitted), hessian)
            better = (other < error)[:, None]
            codes = torch.where(better, tried, codes)
            grid = _better(better, fitted, grid)
            error = torch.minimum(other, error)
    return grid, codes


def _better(rows: torch.Tensor, fitted: Grid, grid: Grid) -> Grid:
    """Of some rows [O, 1] the fitted grid, of the others the one before."""
    zero = None if fitted.zero is None or grid.zero is None else torch.where(rows, fitted.zero, grid.zero)
    return Grid(torch.where(rows, fitted.scale, grid.scale), zero, grid.bits, grid.group_size)


def fitted_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> Grid:
    """The scales with the least error at the output for these codes; zero points stay.

    Of a row w, with v_g its codes less zero points in the columns of group g and 0 elsewhere: A s = b,
    A_gh = v_g H v_h', b_g = v_g H w'.

    Args:
        weight: [O, I].
        hessian: H = 2 X'X [I, I].
        grid: of the codes.
        codes: [O, I].

    Returns:
        The grid, with scales in the dtype that they are stored in.
    """
    hessian = hessian.float() / hessian.diagonal().mean().clamp(min=TINY)
    found, groups = [], grid.scale.shape[1]
    for part in slices(len(weight), max(1, EQUATIONS_BYTES // (4 * groups**2))):
        some = grid.rows(part)
        old, rows = some.scale.float(), weight[part].float()
        steps = codes[part].float().unflatten(1, (-1, grid.group_size))  # V [O, G, group]
        if some.zero is not None:
            steps = steps - some.zero.float().unsqueeze(-1)
            still = steps.abs() > LARGEST
            rows = rows - torch.where(still, steps * old.unsqueeze(-1), 0).flatten(1)
            steps = torch.where(still, 0, steps)
        normal = old.new_empty(*old.shape, old.shape[1])  # A [O, G, G]
        right = torch.empty_like(old)  # b [O, G]
        for g, columns in enumerate(hessian.split(grid.group_size)):
            seen = steps[:, g] @ columns  # v_g H [O, I]
            normal[:, g] = (seen.unflatten(1, (-1, grid.group_size)) * steps).sum(-1)
            right[:, g] = (seen * rows).sum(-1)
        missing = right - (normal @ old.unsqueeze(-1)).squeeze(-1)  # A (s - s_old) = b - A s_old
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += DAMPING * diagonal.mean(1, keepdim=True) + TINY
        scale = old + torch.linalg.solve(normal, missing)
        share = scale / old
        kept = torch.isfinite(scale) & (share < WITHIN) & (share > 1 / WITHIN)
        found.append(torch.where(kept, scale, old).to(grid.scale.dtype))
    return Grid(torch.cat(found), grid.zero, grid.bits, grid.group_size)
