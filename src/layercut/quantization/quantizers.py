"""Quantizers: how the codes of one weight are chosen. The protocol of a quantizer, and layercut's own two.

A quantizer is a function, or a class without arguments whose instances can be called:

    @layercut.quantizers.register("mypackage-floor")
    class Floor:
        needs_calibration = False

        def __call__(self, weight, hessian, grid):
            scaled = weight.float() / grid.scale.float().repeat_interleave(grid.group_size, 1)
            if grid.zero is not None:
                scaled = scaled + grid.zero.float().repeat_interleave(grid.group_size, 1)
            return scaled.floor().clamp(grid.lowest, grid.highest)

Everything around it is layercut's: which weights, the grid of points that a weight may take (`grid.py`), the Hessians,
packing, the errors of the report. The codes are stored as compressed-tensors stores them, so stock loaders read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from layercut.config import QuantizeConfig
from layercut.errors import ConfigError
from layercut.models.memory import slices
from layercut.quantization.grid import ROWS, Grid, decode, encode, fit_grid
from layercut.registries import quantizers


class Quantizer(Protocol):
    """Chooses the codes of one weight, after its grid is fitted and before it is packed."""

    needs_calibration: bool
    """Whether it asks for the Hessian. True: calibration tokens must be given, the model is run on them layer by
    layer, and a weight without one (of 8 bits, embeddings that are no head, an expert to which no token was sent) is
    rounded to nearest."""

    def __call__(
        self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid
    ) -> torch.Tensor | tuple[Grid, torch.Tensor]:
        """The codes of a weight; or another grid of the same kind, and the codes on that."""
        ...


class Gptq:
    """Codes and scales that make the outputs on calibration text nearest: `gptq`."""

    needs_calibration = True

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> tuple[Grid, torch.Tensor]:
        assert hessian is not None
        return gptq(weight, hessian, grid)


class RoundToNearest:
    """Each weight for itself: the nearest point of the grid."""

    needs_calibration = False

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        return encode(weight, grid)


def resolve(quantizer: str | Quantizer | Callable[..., Any]) -> tuple[str, Quantizer]:
    name = quantizer if isinstance(quantizer, str) else ""
    found: Any = quantizers.get(name) if name else quantizer
    if isinstance(found, type):
        found = found()
    name = name or getattr(found, "__name__", type(found).__name__)
    if not callable(found) or not isinstance(getattr(found, "needs_calibration", None), bool):
        words = f"the quantizer {name} is no quantizer: it has to be callable, with needs_calibration = True or False"
        raise ConfigError(words, "the protocol is in layercut/quantization/quantizers.py")
    return name, found


def calibrated(config: QuantizeConfig) -> bool:
    """Whether weights are rounded on text: below 8 bits, by a quantizer that asks for it."""
    return config.small and resolve(config.quantizer)[1].needs_calibration


def quantized(
    name: str, quantizer: Quantizer, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid
) -> tuple[Grid, torch.Tensor]:
    """The grid and codes that a quantizer makes of a weight, checked; to nearest where it lacks a Hessian."""
    if hessian is None and quantizer.needs_calibration:
        return grid, encode(weight, grid)
    found: Any = quantizer(weight, hessian, grid)
    grid, found = found if isinstance(found, tuple) else (grid, found)
    wanted = f"wanted are whole numbers {list(weight.shape)} from {grid.lowest} to {grid.highest}"
    hint = "correct the quantizer, or use --quantizer gptq"
    if not isinstance(found, torch.Tensor) or found.shape != weight.shape:
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(f"the quantizer {name} gave {got}; {wanted}", hint)
    low, high = found.min().item(), found.max().item()
    whole = found.to(torch.int8)
    if not grid.lowest <= low <= high <= grid.highest or not torch.equal(whole.to(found.dtype), found):
        raise ConfigError(f"the quantizer {name} gave codes from {low:g} to {high:g}; {wanted}", hint)
    return grid, whole


# --- gptq with fitted scales ---

# For y = W x with calibration inputs X [N, I] the error at the output, ||(W - Q) X'||^2, is a quadratic form with the
# Hessian H = 2 X'X, the same for every row of W [O, I]. Four steps, each row by row kept only where it lowers that
# error: GPTQ on two grids (`compensated`), exchanges of single codes (`descended`), scales by least squares
# (`fitted_scales`), and the last two by turns. Pure functions of tensors.

DAMPING, BLOCK = 0.01, 128
"""Share of H's mean diagonal that is added to the diagonal, and columns updated at once; both as in the paper."""
RIDGE = 0.2
"""Share that is added before: of some thousand tokens H holds much that other text does not share, and what follows it
to the end is worse there."""
TURNS, PASSES = 4, 2
"""Times that scales are fitted and codes exchanged, and passes of exchanges over all columns in each."""
SCALE_DAMPING = 1e-3  # share of the mean diagonal of the normal equations that holds scales at what they were
WITHIN = 3.0  # a scale that would grow or shrink by more stays: so do all of a group whose codes are zero
EQUATIONS_BYTES = 2**28
"""Of the normal equations that are in memory at once, in float32; solving them takes as much again."""
TINY = 1e-6  # where a row's codes are all zero there is nothing else to solve
RECIPE = ["weighted tokens", "two ranges, coordinate descent", RIDGE, TURNS, SCALE_DAMPING, WITHIN]
"""What decides beside the options which codes and scales are found."""


def gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> tuple[Grid, torch.Tensor]:
    """A grid as the one given and codes on it, nowhere worse at the output than rounding to nearest."""
    order, factor = factored(hessian)
    kept = _Kept(weight, hessian)
    for counts in (torch.ones_like(hessian.diagonal()), hessian.diagonal()):
        start = fit_grid(
            weight, grid.bits, grid.group_size, asymmetric=grid.zero is not None, dtype=grid.scale.dtype, counts=counts
        )
        kept.or_(start, encode(weight, start))
        kept.or_(start, compensated(weight, start, order, factor))
    kept.or_(kept.grid, descended(weight, hessian, kept.grid, kept.codes))
    for _ in range(TURNS):
        kept.or_(fitted_scales(weight, hessian, kept.grid, kept.codes), kept.codes)
        kept.or_(kept.grid, descended(weight, hessian, kept.grid, kept.codes))
    return kept.grid, kept.codes


class _Kept:
    """Of grids and codes, row by row, those with the least error at the output."""

    grid: Grid
    codes: torch.Tensor

    def __init__(self, weight: torch.Tensor, hessian: torch.Tensor) -> None:
        self.weight, self.hessian = weight, hessian.float()
        self.error = self.hessian.new_full((len(weight),), torch.inf)

    def or_(self, grid: Grid, codes: torch.Tensor) -> None:
        error = output_errors(self.weight, decode(codes, grid), self.hessian)
        if not hasattr(self, "grid"):
            self.grid, self.codes = grid, codes
        better = (error < self.error)[:, None]
        self.error = torch.minimum(error, self.error)
        self.codes, self.grid = torch.where(better, codes, self.codes), grid.where(better, self.grid)


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


# --- codes column by column, the open columns compensating each error (Frantar et al., 2210.17323, algorithm 1) ---


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """H [I, I] with `DAMPING` of its mean diagonal on its diagonal; an input that never occurs gets 1 beside."""
    found = hessian.clone()
    diagonal = found.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return found


def factored(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of H's columns [I], and U [I, I] upper triangular of H damped in that order, U'U = H^-1.

    The grid is fitted before any column is rounded, so that columns may be taken in any order without an index stored
    for each: those of the largest inputs first, as most others can compensate them.
    """
    order = hessian.diagonal().argsort(descending=True)
    return order, inverse_factor(damped(hessian[order][:, order]))


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U [I, I] in float32, upper triangular, of H [I, I]: U'U = H^-1."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()


def compensated(weight: torch.Tensor, grid: Grid, order: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    found = (_compensated(weight[part], grid.rows(part), order, factor) for part in slices(len(weight), ROWS))
    return torch.cat(list(found))


def _compensated(weight: torch.Tensor, grid: Grid, order: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    open_columns = weight.float()[:, order].T.contiguous()  # [I, O], so that a column is contiguous
    group = order // grid.group_size
    scale = grid.scale.float().T[group]  # [I, O]
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float().T[group]
    codes = torch.empty_like(open_columns)
    for block in slices(len(order), BLOCK):
        errors = torch.empty_like(open_columns[block])
        for j in range(block.start, block.stop):
            column = open_columns[j]
            codes[j] = (column / scale[j] + zero[j]).round_().clamp_(grid.lowest, grid.highest)
            error = errors[j - block.start] = (column - (codes[j] - zero[j]) * scale[j]) / factor[j, j]  # [O]
            # w_k -= e_j U_jk for the columns k > j of this block; those beyond it are updated once for the whole block
            open_columns[j + 1 : block.stop].addr_(factor[j, j + 1 : block.stop], error, alpha=-1)
        open_columns[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return _in_their_order(codes, order)


def _in_their_order(codes: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(codes, dtype=torch.int8)
    found[order] = codes.to(torch.int8)
    return found.T.contiguous()


# --- each code again, the best one while all others stay (QuantEase, Behdin et al., 2309.01885) ---


def descended(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Codes [O, I] of which some are exchanged: with R = W - Q the nearest to q_j + (R H)_j / H_jj, H damped."""
    order = hessian.diagonal().argsort(descending=True)
    ordered = damped(hessian)[order][:, order].float()
    parts = slices(len(weight), ROWS)
    return torch.cat([_descended(weight[part], ordered, grid.rows(part), codes[part], order) for part in parts])


def _descended(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    scale = grid.scale.float().T[order // grid.group_size]  # [I, O], so that a column is contiguous
    missing = (weight.float() - decode(codes, Grid(grid.scale.float(), grid.zero, grid.bits, grid.group_size))).T[order]
    slope = hessian @ missing  # H R' [I, O]
    steps = codes.float().T[order].contiguous()
    for _ in range(PASSES):
        for part in slices(len(order), BLOCK):
            inside, near = hessian[part, part].contiguous(), slope[part].clone()
            moved = torch.empty_like(near)
            for j, (at, unit) in enumerate(zip(steps[part], scale[part], strict=True)):
                better = (at + near[j] / inside[j, j] / unit).round_().clamp_(grid.lowest, grid.highest)
                moved[j] = (better - at) * unit
                at.copy_(better)
                near[j + 1 :].addr_(inside[j, j + 1 :], moved[j], alpha=-1)
            slope.addmm_(hessian[:, part], moved, alpha=-1)  # once for the whole block
    return _in_their_order(steps, order)


# --- scales by least squares, codes staying ---


def fitted_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> Grid:
    """The scales with the least error at the output for these codes; zero points stay.

    Of a row w, with v_g its codes less zero points in the columns of group g and 0 elsewhere: A s = b,
    A_gh = v_g H v_h', b_g = v_g H w'.
    """
    hessian = hessian.float() / hessian.diagonal().mean().clamp(min=TINY)
    groups = grid.scale.shape[1]
    parts = slices(len(weight), min(ROWS, max(1, EQUATIONS_BYTES // (4 * groups**2))))
    scales = [_fitted(weight[part].float(), hessian, grid.rows(part), codes[part]) for part in parts]
    return Grid(torch.cat(scales), grid.zero, grid.bits, grid.group_size)


def _fitted(rows: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    old, size = grid.scale.float(), grid.group_size
    steps = codes.float().unflatten(1, (-1, size))  # [O, G, group]
    if grid.zero is not None:
        steps = steps - grid.zero.float().unsqueeze(-1)
    normal, right = steps.new_empty(*old.shape, old.shape[1]), torch.empty_like(old)  # A [O, G, G], b [O, G]
    for g, columns in enumerate(hessian.split(size)):
        seen = steps[:, g] @ columns  # v_g H [O, I]
        normal[:, g] = torch.einsum("ogc,ogc->og", seen.unflatten(1, (-1, size)), steps)
        right[:, g] = (seen * rows).sum(-1)
    missing = right - (normal @ old.unsqueeze(-1)).squeeze(-1)  # A (s - s_old) = b - A s_old
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += SCALE_DAMPING * diagonal.mean(1, keepdim=True) + TINY
    scale = old + torch.linalg.solve(normal, missing)
    share = scale / old
    kept = torch.isfinite(scale) & (share < WITHIN) & (share > 1 / WITHIN)
    return torch.where(kept, scale, old).to(grid.scale.dtype)
