"""The fold where a norm stands between a layer's output and the stream: Gemma, OLMo-2, GLM-4 and others.

With z what the last linear map reads, u = W z, and y what the layer should add, W + X and the norm's gain g minimise

    sum_t w_t || c g n(u_t + X z_t) - y_t ||^2 + ridge || X ||^2,      n(u) = u / rms(u),      w_t = 1 / || h_et ||^2

in turns. With n held, g is closed for each channel. With g held, a step of X is the least squares of
`least_squares.py`, tokens weighted by w_t / rms(u_t)^2, on the part of what is lacking that does not change the size of
u_t (the rest a norm takes back):

    X_m <- X_m + s (Z'Z + ridge I)^-1 (Z'R - ridge X_m),      X_m = X diag(m),      r_t = P_t (c g (y_t - c g n)) / m,
    P_t = I - n n' / D

R is the slope itself, so that where the turns end nothing is better nearby; with u centred first, LayerNorm is the
same. m is |c g| where it began, with a floor, and makes one Z'Z do for all channels and steps. Steps
follow conjugate directions and are as long as lowers the sum. What is kept is what leaves least on rows kept out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch

from layercut.distributed import processes
from layercut.healing.linear_outputs import LinearOutput, OutputNorm

STEPS = 10  # turns of X and g, at most. Six leave 10 % more KL, sixteen 3 % less (research/healing.md)
ENOUGH = 1e-3  # the turns end where one lowers the sum by less than this share
TRIALS = 6  # lengths of a step that are tried, at most
FLOOR = 0.1
"""The least m of a channel, as a share of the root mean square of all: a channel of gain 0 moves all the same."""
SMALLEST = 1e-12  # the least mean square of a stream that an error is taken relative to


Visit = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor, torch.Tensor], None]


class FoldBatch(NamedTuple):
    """Some tokens, and whether each is kept out of the solving."""

    z: torch.Tensor  # [n, I], all targets side by side
    inputs: Sequence[torch.Tensor]  # u [n, D] of each norm, in the order of the targets
    out: torch.Tensor  # [n, D], the stream as it is
    wanted: torch.Tensor  # [n, D]
    held: torch.Tensor  # bool [n]


@dataclass
class Branch:
    """What one norm reads, or what is added as it is, and how it is to change."""

    columns: slice  # of z
    norm: OutputNorm | None
    x: torch.Tensor  # X_m [I, D], float64
    gain: torch.Tensor  # g [D]
    metric: torch.Tensor  # m [D], 1 of what is added as it is

    @classmethod
    def of(cls, columns: slice, norm: OutputNorm | None, hidden: int, place: torch.device) -> Branch:
        """With nothing changed."""
        x = torch.zeros(columns.stop - columns.start, hidden, dtype=torch.float64, device=place)
        gain = metric = torch.ones(hidden, dtype=torch.float64, device=place)
        if norm:
            gain = norm.gain.to(x)
            size = (norm.factor.to(x) * gain).abs()
            metric = size.clamp_min(FLOOR * size.square().mean().sqrt())
        return cls(columns, norm, x, gain, metric)

    def change(self, z: torch.Tensor, u: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is added to the stream beside what is [n, D], n and the root mean square that made it."""
        if self.norm is None or u is None:
            return z @ self.x.to(z), z, z
        before, _ = self.norm.normal(u)
        n, rms = self.norm.normal(u + z @ self.weights.to(z))
        return self.norm.factor.to(z) * (self.gain.to(z) * n - self.norm.gain.to(z) * before), n, rms

    @property
    def weights(self) -> torch.Tensor:
        """X [I, D], as the norm is to read it or the stream to receive it."""
        return self.x / self.metric


@dataclass
class Sums:
    """What one pass over all tokens finds, of those to fit; float64."""

    slope: torch.Tensor  # Z'R [I, D]
    gain_gain: torch.Tensor  # [D, K, K] of the K norms whose gain can change
    gain_gap: torch.Tensor  # [D, K]
    left: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    """Squared errors of the tokens to fit and of those kept out, and how many they are."""

    def sum_(self) -> None:
        """Add what other processes have summed."""
        processes.sum_(self.slope, self.gain_gain, self.gain_gap)
        self.left = processes.summed(self.left)


class Alternation:
    """The turns, on tokens that can be gone through again and again."""

    def __init__(
        self,
        targets: Sequence[LinearOutput],
        hidden: int,
        batches: Callable[[], Iterable[FoldBatch]],
        place: torch.device,
    ) -> None:
        """Nothing is run yet; `place` holds float64."""
        self.batches, self.place, self.hidden = batches, place, hidden
        self.branches: list[Branch] = []
        self.width = 0
        for norm, of_norm in groupby(targets, key=lambda target: target.norm):
            width = sum(target.width for target in of_norm)
            self.branches.append(Branch.of(slice(self.width, self.width + width), norm, hidden, place))
            self.width += width
        self.trainable = [each for each in self.branches if each.norm and each.norm.trainable]

    @torch.no_grad()
    def measure(self, visit: Visit | None = None) -> Sums:
        """One pass at the present X and g; `visit` is given Z and R of each branch, what is lacking, and `held`."""
        norms, none = len(self.trainable), torch.zeros((), dtype=torch.float64, device=self.place)
        sums = Sums(
            none.new_zeros(self.width, self.hidden),
            none.new_zeros(self.hidden, norms, norms),
            none.new_zeros(self.hidden, norms),
        )
        for batch in self.batches():
            z, out, wanted = (as_computed(each) for each in (batch.z, batch.out, batch.wanted))
            scale = wanted.square().mean(-1, keepdim=True).clamp_min(SMALLEST).rsqrt()
            gap, made, inputs = wanted - out, [], iter(batch.inputs)
            for branch in self.branches:
                u = as_computed(next(inputs)) if branch.norm else None
                change, n, rms = branch.change(z[:, branch.columns], u)
                gap = gap - change
                made.append((n, rms))
            gap, fit = gap * scale, (~batch.held).nonzero()[:, 0].to(z.device)
            read, slopes, in_gain = [], [], []
            for branch, (n, rms) in zip(self.branches, made, strict=True):
                if branch.norm is None:
                    read.append(z[:, branch.columns] * scale)
                    slopes.append(gap)
                    continue
                read.append(z[:, branch.columns] * (scale / rms))
                factor = branch.norm.factor.to(z)
                slope = factor * branch.gain.to(z) * gap
                slope = slope - n * (slope * n).mean(-1, keepdim=True)
                slope = slope - slope.mean(-1, keepdim=True) if branch.norm.centred else slope
                slopes.append(slope / branch.metric.to(z))
                if branch.norm.trainable:
                    in_gain.append((factor * n * scale)[fit])
            for branch, zs, slope in zip(self.branches, read, slopes, strict=True):
                sums.slope[branch.columns] += (zs[fit].T @ slope[fit]).to(sums.slope)
            if in_gain:
                gains = torch.stack(in_gain, dim=-1).to(sums.slope)  # [n, D, K]
                sums.gain_gain += torch.einsum("ndk,ndl->dkl", gains, gains)
                sums.gain_gap += torch.einsum("ndk,nd->dk", gains, gap[fit].to(gains))
            errors, held = gap.square().sum(-1).double(), batch.held.to(gap.device)
            found = [errors[~held].sum().item(), errors[held].sum().item(), len(fit), len(held) - len(fit)]
            sums.left = [a + b for a, b in zip(sums.left, found, strict=True)]
            if visit:
                visit(read, slopes, gap, batch.held)
        sums.sum_()
        return sums

    def solve_(
        self, solve: Callable[[torch.Tensor], torch.Tensor], pull: float, start: Sums, steps: int = STEPS
    ) -> list[float]:
        """Take the turns, end at the best of them, and tell what the sum was, ridge included, after each.

        Args:
            solve: makes (Z'Z + ridge I)^-1 Y of Y [I, D].
            pull: the ridge, absolute.
            start: what a pass found with nothing changed.
            steps: turns at most.
        """
        judged = 1 if start.left[3] else 0
        best, self.least, now = self._state(), start.left[judged], start
        path, size = [self._sum(now, pull)], 1.0
        way = slope = solved = torch.zeros_like(self._x())
        for _ in range(steps):
            began, x, before, solved_before = path[-1], self._x(), slope, solved
            slope = now.slope - pull * x
            solved = solve(slope)
            norm = (before * solved_before).sum().item()  # conjugate directions, after Polak and Ribière
            share = ((slope - before) * solved).sum().item() / norm if norm else 0.0
            way = solved + max(0.0, share) * way
            if (rise := (way * slope).sum().item()) <= 0:
                way, rise = solved, (solved * slope).sum().item()
            after, size = self._along(x, way, size, path[-1], rise, pull)
            if after is None and way is not solved:
                way, rise = solved, (solved * slope).sum().item()
                after, size = self._along(x, way, 1.0, path[-1], rise, pull)
            if after is None:
                break
            now = after
            if self.trainable:
                self._add_to_gains_(now)
                now = self.measure()
            path.append(self._sum(now, pull))
            if not judged or now.left[judged] < self.least:  # with no rows kept out, the sum says it, and it falls
                best, self.least = self._state(), now.left[judged]
            if not began - path[-1] > ENOUGH * began:
                break
        for branch, (x, gain) in zip(self.branches, best, strict=True):
            branch.x, branch.gain = x, gain
        return path

    def _along(
        self, x: torch.Tensor, way: torch.Tensor, size: float, began: float, rise: float, pull: float
    ) -> tuple[Sums | None, float]:
        """The lower of a step's end and of where the parabola through it is lowest; None where no step is lower."""
        lowest, found = began, None
        for _ in range(TRIALS):
            self._move_(x + size * way)
            sums = self.measure()
            left = self._sum(sums, pull) - self._won_by_gains(sums)
            bend = (left - began + 2 * rise * size) / size**2
            better = rise / bend if bend > 0 else 4 * size
            if left < lowest:
                lowest, found = left, (sums, size)
                if 0.5 < better / size < 2:
                    break
            elif found:
                break
            size = min(max(better, size / 10), 4 * size) if left < began else min(max(better, size / 10), size / 2)
        self._move_(x + (found[1] * way if found else 0.0))
        return found or (None, size)

    def _x(self) -> torch.Tensor:
        return torch.cat([branch.x for branch in self.branches])

    def _sum(self, sums: Sums, pull: float) -> float:
        return sums.left[0] + pull * sum(branch.x.square().sum().item() for branch in self.branches)

    def _move_(self, x: torch.Tensor) -> None:
        for branch in self.branches:
            branch.x = x[branch.columns]

    def _better_gains(self, sums: Sums) -> torch.Tensor:
        """What to add to the gains [D, K]: closed for each channel, with a ridge for those in which nothing is read."""
        diagonal = sums.gain_gain.diagonal(dim1=1, dim2=2).mean()
        eye = torch.eye(len(self.trainable), dtype=torch.float64, device=self.place)
        return torch.linalg.solve(sums.gain_gain + 1e-9 * diagonal * eye, sums.gain_gap)

    def _won_by_gains(self, sums: Sums) -> float:
        """How much lower the sum is with them, to within that ridge."""
        return (self._better_gains(sums) * sums.gain_gap).sum().item() if self.trainable else 0.0

    def _add_to_gains_(self, sums: Sums) -> None:
        for branch, more in zip(self.trainable, self._better_gains(sums).T, strict=True):
            branch.gain = branch.gain + more

    def _state(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(branch.x, branch.gain) for branch in self.branches]


def as_computed(values: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that."""
    return values if values.dtype == torch.float64 else values.float()
