"""Codes and scales by turns: for codes that stay, the scales of a weight that make its outputs nearest.

GPTQ chooses codes on a grid that was fitted to the weights alone. Once they are chosen, the error at the output,
||(W - Q) X'||^2, is a quadratic form of the scales, row by row, and least squares gives its minimum; on these scales
codes can be chosen again. Each turn keeps, row by row, what is better. Pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from layercut.models.memory import slices
from layercut.quantization.gptq import RIDGE, output_errors
from layercut.quantization.grid import ROWS, Grid, decode

TURNS = 4
"""Times that scales are fitted, with codes chosen again before and after each (docs/log.md)."""
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
RECIPE = ["weighted tokens", "two ranges, coordinate descent", RIDGE, TURNS, DAMPING, WITHIN]
"""What decides beside the options which codes and scales are found."""


def better_start(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fit: Callable[[torch.Tensor], Grid],
    choose: Callable[[Grid], torch.Tensor],
) -> tuple[Grid, torch.Tensor]:
    """Of two grids with codes on them the better one, row by row: fitted to all weights alike, and to those
    that count.
    """
    alike = fit(torch.ones_like(hessian.diagonal()))
    kept = _Kept(weight, hessian, alike, choose(alike))
    counted = fit(hessian.diagonal())
    kept.or_(counted, choose(counted))
    return kept.grid, kept.codes


def by_turns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    codes: torch.Tensor,
    again: Callable[[Grid, torch.Tensor], torch.Tensor],
    stored: Callable[[Grid], Grid] | None = lambda grid: grid,
) -> tuple[Grid, torch.Tensor]:
    """A grid and codes on it that are nowhere worse at the output than those given."""
    kept = _Kept(weight, hessian, grid, codes)
    kept.or_(kept.grid, again(kept.grid, kept.codes))
    if stored is None:
        return kept.grid, kept.codes
    for _ in range(TURNS):
        kept.or_(stored(fitted_scales(weight, hessian, kept.grid, kept.codes)), kept.codes)
        kept.or_(kept.grid, again(kept.grid, kept.codes))
    return kept.grid, kept.codes


class _Kept:
    """Of the grids and codes that were tried, row by row, those with the least error at the output."""

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> None:
        self.weight, self.hessian, self.grid, self.codes = weight, hessian.float(), grid, codes
        self.error = output_errors(weight, decode(codes, grid), self.hessian)  # [O]

    def or_(self, grid: Grid, codes: torch.Tensor) -> None:
        """Other codes on another grid, or on the same one."""
        error = output_errors(self.weight, decode(codes, grid), self.hessian)
        better = (error < self.error)[:, None]
        self.error = torch.minimum(error, self.error)
        self.codes = torch.where(better, codes, self.codes)
        if grid is not self.grid:
            self.grid = _better(better, grid, self.grid)


def _better(rows: torch.Tensor, fitted: Grid, grid: Grid) -> Grid:
    """Of some rows [O, 1] the fitted grid, of the others the one before."""
    zero = None if fitted.zero is None or grid.zero is None else torch.where(rows, fitted.zero, grid.zero)
    return Grid(torch.where(rows, fitted.scale, grid.scale), zero, grid.bits, grid.group_size)


def fitted_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> Grid:
    """The scales with the least error at the output for these codes; zero points stay, but such as need be no codes.

    Of a row w, with v_g its codes less zero points in the columns of group g and 0 elsewhere: A s = b,
    A_gh = v_g H v_h', b_g = v_g H w'. A zero point that may be any number moves all that a group stands for by d_g,
    whose v is 1 in the columns of the group: as many unknowns more, the codes then less the middle one of the group.
    """
    hessian = hessian.float() / hessian.diagonal().mean().clamp(min=TINY)
    unknowns = (1 + _moves(grid)) * grid.scale.shape[1]
    parts = slices(len(weight), min(ROWS, max(1, EQUATIONS_BYTES // (4 * unknowns**2))))
    found = [_fitted(weight[part].float(), hessian, grid.rows(part), codes[part]) for part in parts]
    zero = grid.zero
    if _moves(grid):
        zero = torch.cat([some.zero for some in found if some.zero is not None])
    return Grid(torch.cat([some.scale for some in found]), zero, grid.bits, grid.group_size)


def _moves(grid: Grid) -> bool:
    """Whether its zero points need be no codes."""
    return grid.zero is not None and grid.zero.is_floating_point()


def _fitted(rows: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> Grid:
    """Of some rows w [O, I] in float32; H divided by its mean diagonal."""
    old, moves = grid.scale.float(), _moves(grid)
    zero = torch.zeros_like(old) if grid.zero is None else grid.zero.float()
    codes = codes.float().unflatten(1, (-1, grid.group_size))  # [O, G, group]
    steps = codes - zero.unsqueeze(-1)
    still = steps.abs().amax(-1) > LARGEST  # [O, G]
    rows = rows - torch.where(still.unsqueeze(-1), steps * old.unsqueeze(-1), 0).flatten(1)
    terms, before = [steps], [old]  # v [O, G, group], [O, G]
    if moves:  # about the middle of the codes, that the two unknowns of a group have little to do with each other
        middle = codes.mean(-1).round()
        terms = [codes - middle.unsqueeze(-1), torch.ones_like(codes)]
        before = [old, torch.where(still, 0, (middle - zero) * old)]
    seen = torch.where(still.unsqueeze(-1), 0, torch.stack(terms))
    scale, *moved = _least_squares(seen, torch.stack(before), rows, hessian)
    share = scale / old
    kept = torch.isfinite(scale) & (share < WITHIN) & (share > 1 / WITHIN)
    if moves:
        kept &= torch.isfinite(moved[0]) & ~still
        zero = torch.where(kept, middle - moved[0] / scale, zero)
    scale = torch.where(kept, scale, old).to(grid.scale.dtype)
    return Grid(scale, zero if moves else grid.zero, grid.bits, grid.group_size)


def _least_squares(
    terms: torch.Tensor, before: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """How much of each term makes rows w [O, I] the nearest, held a little at what it was."""
    kinds, outputs, groups, size = terms.shape
    normal = terms.new_empty(outputs, kinds, groups, kinds, groups)  # A
    right = terms.new_empty(outputs, kinds, groups)  # b
    for g, columns in enumerate(hessian.split(size)):
        for p in range(kinds):
            seen = terms[p, :, g] @ columns  # v_g H [O, I]
            normal[:, p, g] = torch.einsum("ogc,pogc->opg", seen.unflatten(1, (-1, size)), terms)
            right[:, p, g] = (seen * rows).sum(-1)
    normal = normal.flatten(3).flatten(1, 2)  # [O, P G, P G]
    old = before.movedim(0, 1).flatten(1)  # [O, P G]
    missing = right.flatten(1) - (normal @ old.unsqueeze(-1)).squeeze(-1)  # A (s - s_old) = b - A s_old
    diagonal = normal.diagonal(dim1=1, dim2=2)
    of_kinds = diagonal.unflatten(1, (kinds, groups)).mean(2, keepdim=True).expand(-1, -1, groups).flatten(1)
    diagonal += DAMPING * of_kinds + TINY
    return (old + torch.linalg.solve(normal, missing)).unflatten(1, (kinds, groups)).movedim(1, 0)
