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
from layercut.quantization.gptq import gptq
from layercut.quantization.grid import Grid, encode
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
    """Codes and scales that make the outputs on calibration text nearest: `gptq.py`."""

    needs_calibration = True

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> tuple[Grid, torch.Tensor]:
        """As of `Quantizer`."""
        assert hessian is not None
        return gptq(weight, hessian, grid)


class RoundToNearest:
    """Each weight for itself: the nearest point of the grid."""

    needs_calibration = False

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        """As of `Quantizer`."""
        return encode(weight, grid)


def resolve(quantizer: str | Quantizer | Callable[..., Any]) -> tuple[str, Quantizer]:
    """A quantizer and what reports call it, from a registered name, a class or a function."""
    name = quantizer if isinstance(quantizer, str) else ""
    found: Any = quantizers.get(name) if name else quantizer
    if isinstance(found, type):
        found = found()
    name = name or getattr(found, "__name__", type(found).__name__)
    if not callable(found) or not isinstance(getattr(found, "needs_calibration", None), bool):
        raise ConfigError(
            f"the quantizer {name} is no quantizer: it has to be callable, with needs_calibration = True or False",
            "the protocol is in layercut/quantization/quantizers.py",
        )
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
