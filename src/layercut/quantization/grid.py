"""The points a weight may take: a scale, and where asked a zero point, for every group of columns.

Pure functions of tensors. Shapes: O outputs, I inputs of a linear layer y = W x,
G = I / group size. A weight is stored as codes q of b bits; it stands for (q - z) s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layercut.models.memory import slices

ROWS = 2**14  # rows that are worked on at once, of which none needs another: a head has as many as there are tokens
SEARCHED_BITS = 3
"""At so few bits and fewer, a grid that leaves a group's largest weights out is often nearer to all the others."""
SHARES = torch.linspace(1.0, 0.4, 13).tolist()
"""Of the range that would cover a group, from which its grid is then chosen."""


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one weight [O, I]."""

    scale: torch.Tensor
    """[O, G], in the dtype that the model is saved in: rounded before any weight is, as it will be stored."""
    zero: torch.Tensor | None  # [O, G], int8; None: symmetric, every zero point is 0
    bits: int  # of a code
    group_size: int  # columns that share a scale

    def rows(self, chosen: slice | torch.Tensor) -> Grid:
        zero = None if self.zero is None else self.zero[chosen]
        return Grid(self.scale[chosen], zero, self.bits, self.group_size)

    def to(self, device: torch.device) -> Grid:
        zero = None if self.zero is None else self.zero.to(device)
        return Grid(self.scale.to(device), zero, self.bits, self.group_size)

    def where(self, chosen: torch.Tensor, other: Grid) -> Grid:
        """This grid where `chosen` (broadcast over [O, G]), else the other."""
        zero = None if self.zero is None or other.zero is None else torch.where(chosen, self.zero, other.zero)
        return Grid(torch.where(chosen, self.scale, other.scale), zero, self.bits, self.group_size)

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1


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

    At `SEARCHED_BITS` and fewer, or with `counts` [I] of the columns, the range is that of `SHARES` of it with the
    least squared error of the group.
    """
    shares = SHARES if bits <= SEARCHED_BITS or counts is not None else []
    count = torch.ones(1) if counts is None else counts.float().unflatten(0, (-1, group_size))
    found = []
    for part in slices(len(weight), ROWS):
        grouped = weight[part].float().unflatten(1, (-1, group_size))
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        best, least = _covering(low, high, bits, group_size, asymmetric, dtype), None
        for share in shares:
            tried = _covering(share * low, share * high, bits, group_size, asymmetric, dtype)
            rounded = decode(encode(weight[part], tried), tried).float().unflatten(1, (-1, group_size))
            error = ((rounded - grouped).square() * count.to(grouped.device)).sum(-1)  # [O, G]
            nearer = error < (torch.inf if least is None else least)
            least = error if least is None else torch.where(nearer, error, least)
            best = tried.where(nearer, best)
        found.append(best)
    zeros = [grid.zero for grid in found if grid.zero is not None]
    return Grid(torch.cat([grid.scale for grid in found]), torch.cat(zeros) if zeros else None, bits, group_size)


def _covering(
    low: torch.Tensor, high: torch.Tensor, bits: int, group_size: int, asymmetric: bool, dtype: torch.dtype
) -> Grid:
    """The grid from `low` [O, G], 0 at most, to `high` [O, G], 0 at least.

    Symmetric: s = 2 max|w| / (2^b - 1), z = 0. Asymmetric: s = (max - min) / (2^b - 1), z = lowest - min / s.
    """
    steps, lowest = 2**bits - 1, -(2 ** (bits - 1))
    span = high - low if asymmetric else 2 * torch.maximum(high, -low)
    scale = (span / steps).to(dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # nothing but zeros, or too small to differ from 0
    if not asymmetric:
        return Grid(scale, None, bits, group_size)
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
