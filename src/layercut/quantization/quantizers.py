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

With `fits_scales = True` beside `needs_calibration = True`, below 8 bits scales are fitted to its codes and it is asked
again (`scales.py`), or its method `again(weight, hessian, grid, codes)` is, with the codes there are. Everything around
it is layercut's: which weights, the grid of points that a weight may take (`grid.py`), the Hessians, packing, the
errors of the report. The codes are stored as compressed-tensors stores them, so stock loaders read them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from layercut.errors import ConfigError
from layercut.quantization.coordinate_descent import descended
from layercut.quantization.gptq import gptq
from layercut.quantization.grid import Grid, encode
from layercut.registries import quantizers


class Quantizer(Protocol):
    """Chooses the codes of one weight, after its grid is fitted and before it is packed.

    It may have `fits_scales` and `again` besides, as said above.
    """

    needs_calibration: bool
    """Whether it asks for the Hessian. True: calibration tokens must be given, the model is run on them layer by
    layer, and a weight without one (embeddings that are no head, an expert to which no token was sent) is rounded to
    nearest."""

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        """The codes of a weight."""
        ...


class Gptq:
    """GPTQ: column by column; the columns not yet rounded compensate each error (Frantar et al., 2210.17323).

    Below 8 bits by turns with fitted scales, its codes exchanged for better ones by coordinate descent.
    """

    needs_calibration = True
    fits_scales = True

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        """Codes by GPTQ; as of `Quantizer.__call__`."""
        assert hessian is not None
        return gptq(weight, hessian, grid)

    def again(
        self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid, codes: torch.Tensor
    ) -> torch.Tensor:
        """Codes from those [O, I] that there are; else as of `Quantizer.__call__`."""
        assert hessian is not None
        return descended(weight, hessian, grid, codes)


class RoundToNearest:
    """Each weight for itself: the nearest point of the grid."""

    needs_calibration = False

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        """Codes of the nearest grid points; as of `Quantizer.__call__`."""
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


def codes(
    name: str,
    quantizer: Quantizer,
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    grid: Grid,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a quantizer makes of a weight, checked."""
    again = None if before is None else getattr(quantizer, "again", None)
    found = again(weight, hessian, grid, before) if again else quantizer(weight, hessian, grid)
    wanted = f"wanted are whole numbers {list(weight.shape)} from {grid.lowest} to {grid.highest}"
    hint = "correct the quantizer, or use --quantizer gptq"
    if not isinstance(found, torch.Tensor) or found.shape != weight.shape:
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(f"the quantizer {name} gave {got}; {wanted}", hint)
    low, high = found.min().item(), found.max().item()
    whole = found.to(torch.int8)
    if not grid.lowest <= low <= high <= grid.highest or not torch.equal(whole.to(found.dtype), found):
        raise ConfigError(f"the quantizer {name} gave codes from {low:g} to {high:g}; {wanted}", hint)
    return whole
