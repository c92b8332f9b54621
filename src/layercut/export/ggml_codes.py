"""The codes of llama.cpp's block formats: which points a block's scales allow, and where codes and scales are.

A row of a matrix is blocks of 32 or 256 weights, each with scales and with a code of 4 or 5 bits a weight. Of scales
the points are known, and other codes, or other scales where they are halves of their own, can be put in: `gguf_gptq.py`
does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layercut.quantization.grid import Grid

SCALE, LEAST = 0, 1
"""Numbers of a block."""


@dataclass(frozen=True)
class BlockLayout:
    """Where a block keeps its codes."""

    bits: int
    """Of a code."""
    pairs: int
    """Runs of `n` bytes, each of which holds the low four bits of two runs of n weights."""
    n: int
    """Weights in such a run."""
    low: int
    """Byte at which the low four bits begin."""
    high: int | None = None
    """Byte at which the fifth bits begin."""
    scales: tuple[int, ...] = ()
    """Where each is a half of its own: which of SCALE and LEAST, the number that code 0 stands for."""

    @property
    def block(self) -> int:
        """Weights in a block."""
        return 2 * self.pairs * self.n


LAYOUTS = {
    "q4_0": BlockLayout(4, 1, 16, 2, scales=(SCALE,)),
    "q4_1": BlockLayout(4, 1, 16, 4, scales=(SCALE, LEAST)),
    "q5_0": BlockLayout(5, 1, 16, 6, 2, scales=(SCALE,)),
    "q5_1": BlockLayout(5, 1, 16, 8, 4, scales=(SCALE, LEAST)),
    "q4_k": BlockLayout(4, 4, 32, 16),
    "q5_k": BlockLayout(5, 4, 32, 48, 16),
}
"""By GGML type (ggml-common.h, ggml-quants.c, b11739); in all of them 32 weights share a scale."""
SHARED = 32
NO_SCALE = 1e-30
"""In the place of 0, by which nothing can be divided: all codes then stand for the same number, as with 0."""


def with_codes(packed: np.ndarray, kind: str, codes: np.ndarray) -> np.ndarray:
    """Rows with other codes beside the same scales."""
    layout, rows = LAYOUTS[kind], len(packed)
    blocks = packed.reshape(rows, codes.shape[1] // layout.block, -1).copy()
    runs = codes.astype(np.uint8).reshape(rows, blocks.shape[1], layout.pairs, 2, layout.n)
    low = (runs[..., 0, :] & 15) | ((runs[..., 1, :] & 15) << 4)  # [O, blocks, pairs, n]
    blocks[..., layout.low : layout.low + layout.pairs * layout.n] = low.reshape(*low.shape[:2], -1)
    if layout.high is not None:
        fifth = runs >> 4
        if layout.pairs == 1:  # bit i of 32 is the i-th weight's
            high = np.packbits(fifth.reshape(*fifth.shape[:2], -1), axis=-1, bitorder="little")
        else:  # bit r of byte l is that of weight l of run r
            high = np.packbits(fifth.reshape(*fifth.shape[:2], -1, layout.n), axis=-2, bitorder="little")[..., 0, :]
        blocks[..., layout.high : layout.high + high.shape[-1]] = high
    return blocks.reshape(rows, -1)


def with_scales(packed: np.ndarray, kind: str, grid: Grid) -> np.ndarray:
    """Rows with other scales beside the same codes; of a type whose scales are halves of their own."""
    assert grid.zero is not None
    blocks = packed.reshape(*grid.scale.shape, -1).copy()
    numbers = (grid.scale, (grid.lowest - grid.zero) * grid.scale)
    halves = torch.stack([numbers[which] for which in LAYOUTS[kind].scales], -1).half().numpy()
    blocks[..., : 2 * halves.shape[-1]] = halves.view(np.uint8)
    return blocks.reshape(len(packed), -1)


def grid_of(packed: np.ndarray, kind: Any, columns: int) -> Grid:
    """The points that the scales of rows allow: those of all codes 0 and of all codes 1, and so on at that distance."""
    from gguf import quants

    name, shape = kind.name.lower(), (len(packed), columns)
    none, one = (
        torch.from_numpy(quants.dequantize(with_codes(packed, name, np.full(shape, code)), kind))[:, ::SHARED]
        for code in (0, 1)
    )
    bits, scale = LAYOUTS[name].bits, one - none
    scale = torch.where(scale == 0, NO_SCALE, scale)
    symmetric = LAYOUTS[name].scales == (SCALE,)
    zero = torch.zeros_like(scale, dtype=torch.int8) if symmetric else -(2 ** (bits - 1)) - none / scale
    return Grid(scale, zero, bits, SHARED)
