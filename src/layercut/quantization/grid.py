"""The points a weight may take: a scale, and where asked a zero point, for every group of columns.

Pure functions of tensors. Shapes: O outputs, I inputs of a linear layer y = W x,
G = I / group size. A weight is stored as codes q of b bits; it stands for (q - z) s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from layercut.models.memory import slices


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one weight [O, I]."""

    scale: torch.Tensor
    """[O, G], in the dtype that the model is saved in: rounded before any weight is, as it will be stored."""
    zero: torch.Tensor | None
    """[O, G]: int8, or float32 where it need not be a code; None: symmetric, every zero point is 0."""
    bits: int
    """Of a code."""
    group_size: int
    """Columns that share a scale."""

    def rows(self, chosen: slice | torch.Tensor) -> Grid:
        """The grid of some of the weight's outputs."""
        zero = None if self.zero is None else self.zero[chosen]
        return Grid(self.scale[chosen], zero, self.bits, self.group_size)

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1


ROWS = 2**14
"""Rows that are worked on at once, of which none needs another: a head has as many as there are tokens."""
SEARCHED_BITS = 3
"""At so few bits and fewer, a grid that leaves a group's largest weights out is often nearer to all the others."""
SHARES = torch.linspace(1.0, 0.4, 13).tolist()
"""Of the range that would cover a group, from which its grid is then chosen."""


def fit_grid(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    *,
    asymmetric: bool,
    dtype: torch.dtype,
    counts: torch.Tensor | None = None,
) -> Grid:
    """The grid that just covers each group of `weight` [O, I]; 0 is always one of its points.

    Symmetric: s = max|w| / (2^b - 1) * 2, z = 0. Asymmetric: s = (max - min) / (2^b - 1), z = lowest - min / s. At
    `SEARCHED_BITS` and fewer, or with `counts`, the range is that of `SHARES` of it with the least squared error of
    the group.
    """
    shares = SHARES if bits <= SEARCHED_BITS or counts is not None else []
    cover = partial(_covering, bits=bits, group_size=group_size, asymmetric=asymmetric, dtype=dtype)
    found = [_of_least_error(weight[part], cover, group_size, shares, counts) for part in slices(len(weight), ROWS)]
    zeros = [grid.zero for grid in found if grid.zero is not None]
    return Grid(torch.cat([grid.scale for grid in found]), torch.cat(zeros) if zeros else None, bits, group_size)


def _of_least_error(
    weight: torch.Tensor,
    cover: Callable[[torch.Tensor, torch.Tensor], Grid],
    group_size: int,
    shares: Sequence[float],
    counts: torch.Tensor | None,
) -> Grid:
    """Of some rows: the covering grid, or that of the share of its range with the least error."""
    grouped = weight.float().unflatten(1, (-1, group_size))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    best, least = cover(low, high), None
    counted = None if counts is None else counts.float().unflatten(0, (-1, group_size))
    for share in shares:
        tried = cover(share * low, share * high)
        rounded = decode(encode(weight, tried), tried).float().unflatten(1, (-1, group_size))
        squared = (rounded - grouped).square()
        error = (squared if counted is None else squared * counted).sum(-1)  # [O, G]
        nearer = error < (torch.inf if least is None else least)
        least = error if least is None else torch.where(nearer, error, least)
        zero = None if best.zero is None or tried.zero is None else torch.where(nearer, tried.zero, best.zero)
        best = Grid(torch.where(nearer, tried.scale, best.scale), zero, best.bits, group_size)
    return best


def _covering(
    low: torch.Tensor, high: torch.Tensor, *, bits: int, group_size: int, asymmetric: bool, dtype: torch.dtype
) -> Grid:
    """The grid from `low` [O, G], 0 at most, to `high` [O, G], 0 at least."""
    steps = 2**bits - 1
    span = high - low if asymmetric else 2 * torch.maximum(high, -low)
    scale = (span / steps).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # nothing but zeros, or too small to differ from 0
    if not asymmetric:
        return Grid(scale, None, bits, group_size)
    lowest = -(2 ** (bits - 1))
    zero = (lowest - low / scale.float()).round().clamp(lowest, lowest + steps)
    return Grid(scale, zero.to(torch.int8), bits, group_size)


def encode(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of the nearest grid points: round to nearest (RTN)."""
    scaled = weight.float().unflatten(1, (-1, grid.group_size)) / grid.scale.float().unsqueeze(-1)
    if grid.zero is not None:
        scaled = scaled + grid.zero.float().unsqueeze(-1)
    return scaled.round().clamp(grid.lowest, grid.highest).to(torch.int8).flatten(1)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight that codes encode, (q - z) s, in the scale's dtype, by the arithmetic that loaders use."""
    grouped = codes.unflatten(1, (-1, grid.group_size)).to(grid.scale.dtype)
    if grid.zero is not None:
        grouped = grouped - grid.zero.to(grid.scale.dtype).unsqueeze(-1)
    return (grouped * grid.scale.unsqueeze(-1)).flatten(1)
