"""Coordinate descent over codes: each column again, for itself the best while all the others stay.

GPTQ never comes back to a column. The error at the output, ||(W - Q) X'||^2, is a quadratic form of the codes, row by
row, of which the best single code is known: with R = W - Q and H = 2 X'X it is the grid point nearest to
q_j + (R H)_j / H_jj (QuantEase, Behdin et al., 2309.01885). No step makes it larger by the
damped H that is taken. Pure functions of tensors.
"""

from __future__ import annotations

import torch

from layercut.models.memory import slices
from layercut.quantization.gptq import BLOCK, damped
from layercut.quantization.grid import ROWS, Grid, decode

PASSES = 2
"""Over all columns, each time (docs/log.md)."""


def descended(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Codes of which some are exchanged, one after another, for better ones."""
    order = hessian.diagonal().argsort(descending=True)
    sorted_hessian = damped(hessian)[order][:, order].float()
    parts = slices(len(weight), ROWS)
    found = (_descended(weight[part], sorted_hessian, grid.rows(part), codes[part], order) for part in parts)
    return torch.cat(list(found))


def _descended(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Of some rows [O, I]; H in the order in which columns are taken."""
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
    found = torch.empty_like(steps, dtype=torch.int8)
    found[order] = steps.to(torch.int8)
    return found.T.contiguous()
