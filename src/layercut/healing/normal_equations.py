"""Sums of a least-squares problem over tokens that are streamed, in float64, and its solutions by a ridge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from layercut.distributed import processes
from layercut.healing.normalised import SMALLEST
from layercut.models.losses import as_cost
from layercut.models.memory import place_of_float64

HELD_OUT = 8  # one row in this many is kept out of the statistics and chooses the ridge
COLUMNS = 1024  # columns of Z'Z that are added to at once, below its diagonal alone: it is symmetric


@dataclass
class Normal:
    """Streamed sums of a least-squares problem z -> y, float64: Z'Z [I, I], Z'Y [I, D], |Y|^2 and tokens."""

    zz: torch.Tensor  # right on and below its diagonal; above it after `whole_`
    zy: torch.Tensor
    yy: float = 0.0
    tokens: int = 0

    @classmethod
    def zeros(cls, read: int, written: int, device: torch.device) -> Normal:
        """Sums of no tokens yet."""
        place = place_of_float64(device)
        zz, zy = (torch.zeros(read, width, dtype=torch.float64, device=place) for width in (read, written))
        return cls(zz, zy)

    def add_(self, z: torch.Tensor, y: torch.Tensor) -> None:
        """Add the products of some tokens to the sums."""
        z, y = z.flatten(0, -2).to(self.zz), y.flatten(0, -2).to(self.zz)
        for start, block in self._columns():
            block.addmm_(z[:, start:].T, z[:, start : start + COLUMNS])
        self.zy.addmm_(z.T, y)
        self.yy += y.square().sum().item()
        self.tokens += len(z)

    def _columns(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The columns of Z'Z from `start` on, from the diagonal downwards [I - start, COLUMNS]."""
        for start in range(0, len(self.zz), COLUMNS):
            yield start, self.zz[start:, start : start + COLUMNS]

    def whole_(self) -> torch.Tensor:
        """Z'Z, filled in above its diagonal."""
        for start, block in self._columns():
            own, below = block.split([block.shape[1], len(block) - block.shape[1]])
            own.copy_(own.tril() + own.tril(-1).T)
            self.zz[start : start + COLUMNS, start + COLUMNS :] = below.T
        return self.zz

    def sum_(self) -> None:
        """All-reduce: add what other processes have summed."""
        processes.sum_(self.zz, self.zy)
        self.yy, tokens = processes.summed([self.yy, self.tokens])
        self.tokens = int(tokens)

    def solve(self, ridge: float) -> torch.Tensor:
        """X [I, D] minimising |Z X - Y|^2 + ridge * mean(diag Z'Z) * |X|^2."""
        return self.factored(ridge)(self.zy)

    def factored(self, ridge: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes (Z'Z + ridge * mean(diag Z'Z) I)^-1 Y of Y [I, D]."""
        regular = self.zz.clone()  # [I, I], positive semi-definite; the ridge makes it definite, but for rounding
        regular.diagonal().add_(self.zz.diagonal().mean() * ridge)
        factor, failed = torch.linalg.cholesky_ex(regular)  # reads nothing above the diagonal
        if not failed:
            return lambda y: torch.cholesky_solve(y, factor)
        whole = regular.tril() + regular.tril(-1).T
        return lambda y: torch.linalg.solve(whole, y)

    def solve_best(self, ridges: Sequence[float], check: Normal) -> tuple[float, torch.Tensor]:
        """The ridge that leaves least of what the sums have not seen.

        What is left falls up to that ridge and rises behind it (measured), so that half of them need no solving: the
        middle one is, then larger ones as long as less is left, or else smaller ones.
        """
        middle = len(ridges) // 2
        best = ridges[middle], self.solve(ridges[middle])
        if not check.tokens:
            return best
        least = check.left(best[1])
        for way in (ridges[middle + 1 :], ridges[:middle][::-1]):
            before = least
            for ridge in way:
                x = self.solve(ridge)
                if (left := check.left(x)) >= least:
                    break
                best, least = (ridge, x), left
            if least < before:
                break
        return best

    def left(self, x: torch.Tensor) -> float:
        """|Z X - Y|^2, the squared error that X leaves; infinite where it is not finite."""
        return as_cost(self.yy - 2 * (x * self.zy).sum().item() + (x * (self.whole_() @ x)).sum().item(), 0.0)

    @property
    def finite(self) -> bool:
        """Whether no sum has overflowed or is undefined, as where the cut model overflows."""
        return math.isfinite(self.yy) and all(bool(sums.isfinite().all()) for sums in (self.zz, self.zy))


def kept_out(rows: slice) -> torch.Tensor:
    """Which rows check what the others are solved for, one in HELD_OUT: bool [rows]."""
    return torch.arange(rows.start, rows.stop) % HELD_OUT == HELD_OUT - 1


def add_split_(
    fit: Normal, check: Normal, rows: slice, z: torch.Tensor, out: torch.Tensor, wanted: torch.Tensor
) -> None:
    """Add rows to the sums to fit, one in HELD_OUT to those that check; each token over the size of what is wanted."""
    wanted = wanted.to(out.device).float()
    scale = wanted.square().mean(-1, keepdim=True).clamp_min(SMALLEST).rsqrt()
    z, y = z.float() * scale, (wanted - out.float()) * scale
    held = kept_out(rows)
    for sums, chosen in ((fit, ~held), (check, held)):
        which = chosen.nonzero()[:, 0].to(z.device)  # found on the CPU: no device is waited for
        sums.add_(z[which], y[which])
