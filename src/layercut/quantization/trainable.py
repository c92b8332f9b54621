"""Quantized weights whose scales, and where asked whose rounding, can be trained; after rounding, before export.

    parts = Trainable.of_(found)            # found: Quantized; its model now computes from codes and scales
    …                                       # train parts.parameters by any loss of parts.model
    found = parts.finished_()               # plain weights again, and the tensors for the checkpoint

What is computed at every step is to the bit what a loader will compute from the tensors as they are then: codes and
scales are decoded in the format in which they are saved. The result is in the same stock format.

Frozen codes (`scales`): w = (q - z) s, dL/ds = Σ_group dL/dw (q - z) (end-to-end training of step sizes, as in
EfficientQAT, 2407.11062). Learned rounding: w = s (clamp(round(v / s + z)) - z) with a weight v that is trained
straight through the rounding, and s by LSQ's gradient (1902.08153). v starts as the point nearest to the weight before
rounding among those that round to the codes chosen, so that nothing changes before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from layercut.models.decoder_stack import find_decoder, replace_parameters_, stored_dtype, weight_as_stored
from layercut.models.memory import slices
from layercut.quantization.grid import Grid, decode, encode
from layercut.quantization.packing import Quantized, grids, pack

RATE, ROUNDING_RATE = 5e-3, 2e-3
"""Peak rate of AdamW as a share of each unit, the mean scale or the mean entry of a norm: where codes are frozen, and
the highest where the rounding is trained too."""
RATE_PER_NAT = 8e-4
"""That for each nat per token of KL that rounding left. 0.2 % was right where it left 2.6; where it left 1.3 or 0.5 it
first ruined what there was."""
RISE, ROUNDING_RISE = 0.01, 0.1
"""Rise of the held-out loss, as a share of it, that is no setback the first time: of scales and norms, where one of a
tenth does not pass by itself, and where the rounding is trained too. There the codes that lay near an edge fall over
it in the first steps, at any rate, and what that costs is won back."""
MARGIN = 0.49
"""How far from its code, in steps of the grid, a trained weight may start: beyond a half it would round otherwise."""
BLOCK = 2**16  # weights that are rounded at once on a CPU
Shares = list[tuple[nn.Parameter, float]]
"""Trained parameters, each with the size of one unit of it, of which the learning rate is a share."""
ALL = slice(None)


class Scaled(nn.Module):
    """A weight [O, I] that is computed from frozen codes and a trainable scale for each group of columns."""

    def __init__(self, plain: Any, codes: torch.Tensor, grid: Grid, stored: torch.dtype) -> None:
        super().__init__()
        self.codes, self.grid, self.stored = codes, grid, stored
        self.scale = nn.Parameter(grid.scale.to(plain.weight.dtype))

    def forward(self, rows: torch.Tensor | slice = ALL) -> torch.Tensor:
        return _Decoded.apply(self.scale[rows], self.codes[rows], self.grid.rows(rows), self.stored)

    def current(self) -> tuple[torch.Tensor, Grid]:
        return self.codes, _with_scale(self.grid, self.scale, self.stored)

    def units(self) -> Shares:
        return [(self.scale, self.scale.detach().abs().mean().item())]


class Rounded(Scaled):
    """The same from a trainable weight that is rounded in every pass."""

    def __init__(
        self, plain: Any, codes: torch.Tensor, grid: Grid, stored: torch.dtype, original: torch.Tensor
    ) -> None:
        super().__init__(plain, codes[:0], grid, stored)
        zero = 0.0 if grid.zero is None else grid.zero.float().unsqueeze(-1)
        step = grid.scale.float().unsqueeze(-1)
        middle = codes.float().unflatten(1, (-1, grid.group_size))
        place = original.float().unflatten(1, (-1, grid.group_size)) / step + zero
        start = ((place.clamp(middle - MARGIN, middle + MARGIN) - zero) * step).flatten(1).to(stored)
        moved = encode(start, grid) != codes  # the format's own rounding took it over the edge: the code's middle then
        self.latent = nn.Parameter(torch.where(moved, decode(codes, grid), start).to(plain.weight.dtype))

    def forward(self, rows: torch.Tensor | slice = ALL) -> torch.Tensor:
        return _Rounded.apply(self.latent[rows], self.scale[rows], self.grid.rows(rows), self.stored)

    def current(self) -> tuple[torch.Tensor, Grid]:
        grid = _with_scale(self.grid, self.scale, self.stored)
        return encode(self.latent.detach(), grid), grid

    def units(self) -> Shares:
        (scale, size), *_ = super().units()
        return [(scale, size), (self.latent, size)]


class QuantizedModule(nn.Module):
    """A linear module or an embedding that reads its weight from where it is trained; a tied head reads the same."""

    def __init__(self, plain: Any, source: Scaled) -> None:
        super().__init__()
        self.source, self.plain = source, [plain]  # in a list: no part of the model
        self.bias = getattr(plain, "bias", None)
        self._once: list[torch.Tensor] | None = None

    @property
    def weight(self) -> torch.Tensor:
        if self._once is None:
            return self.source()
        if not self._once:
            weight = self.source()
            self._once += [weight, weight.detach().requires_grad_(weight.requires_grad)]
        return self._once[1]

    @contextmanager
    def weight_once(self) -> Iterator[None]:
        """While open, W is computed once, and at the end its gradient is passed on once: of a head, for all pieces."""
        self._once = []
        try:
            yield
            if self._once and self._once[1].grad is not None:
                self._once[0].backward(self._once[1].grad)
        finally:
            self._once = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (plain,) = self.plain
        if isinstance(plain, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        ids, places = x.unique(return_inverse=True)
        return F.embedding(places, self.source(ids))  # a plain one: others are not quantized


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of [O, I] that are worked on at once: on a CPU as many as its cache holds, twice as fast as all."""
    rows = max(1, BLOCK // weight.shape[1]) if weight.device.type == "cpu" else max(1, len(weight))
    return slices(len(weight), rows)


def _with_scale(grid: Grid, scale: torch.Tensor, stored: torch.dtype) -> Grid:
    """The grid with another scale, in the format it is saved in; never 0 or below, where nothing could be rounded.

    The least of float16 is below its normal numbers, among which scales of 8 bits may be.
    """
    kind = torch.finfo(stored)
    least = max(kind.tiny * kind.eps, torch.finfo(torch.float32).tiny)
    return replace(grid, scale=scale.detach().to(stored).clamp_min(least))


class _Decoded(torch.autograd.Function):
    """Scales [O, G] -> weight [O, I], codes frozen."""

    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor, codes: torch.Tensor, grid: Grid, stored: torch.dtype) -> torch.Tensor:
        ctx.codes, ctx.grid = codes, grid
        return decode(codes, _with_scale(grid, scale, stored)).to(scale.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        steps = ctx.codes.unflatten(1, (-1, ctx.grid.group_size)).float()
        if ctx.grid.zero is not None:
            steps = steps - ctx.grid.zero.float().unsqueeze(-1)
        slope = grads[0].unflatten(1, (-1, ctx.grid.group_size)).float()
        return (slope * steps).sum(-1).to(grads[0].dtype), None, None, None


class _Rounded(torch.autograd.Function):
    """Weight [O, I] and scales [O, G] -> rounded weight; straight through the rounding (LSQ, 1902.08153)."""

    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor, scale: torch.Tensor, grid: Grid, stored: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(latent)
        ctx.grid = now = _with_scale(grid, scale, stored)
        weight = torch.empty_like(latent, dtype=scale.dtype)
        for part in _blocks(latent):
            some = now.rows(part)
            weight[part] = decode(encode(latent[part], some), some)
        return weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (latent,), grid, slopes = ctx.saved_tensors, ctx.grid, grads[0]
        to_latent, to_scale = torch.empty_like(slopes), torch.empty_like(grid.scale, dtype=slopes.dtype)
        for part in _blocks(latent):
            some = grid.rows(part)
            slope = slopes[part].unflatten(1, (-1, grid.group_size)).float()
            place = latent[part].float().unflatten(1, (-1, grid.group_size)) / some.scale.float().unsqueeze(-1)
            zero = 0.0 if some.zero is None else some.zero.float().unsqueeze(-1)
            code = (place + zero).round_()
            steps = code.clamp(grid.lowest, grid.highest)
            inside = 1 - (steps - code).abs_().clamp_(max=1)  # 1 or 0; a comparison would take five times as long
            to_latent[part] = (slope * inside).flatten(1)
            # dL/ds: of a code inside the grid q - z - v / s, of one at its end q - z
            to_scale[part] = steps.sub_(zero).sub_(place.mul_(inside)).mul_(slope).sum(-1)
        return to_latent, to_scale, None, None


@dataclass
class Trainable:
    """A quantized model taken apart: what can be trained, and how it is put together again."""

    found: Quantized
    modules: dict[str, Scaled]  # by dotted name of the module that they are the weight of
    places: dict[str, nn.Module]
    """The plain modules, without a weight, in whose places the model has others now, by dotted name; a tied head's
    too."""
    norms: dict[str, nn.Parameter]
    """Weights and biases of the decoder's norms and of the one after it, with parameters of their own; without those
    that their class keeps in float32, which stay as they are."""

    @classmethod
    def of_(cls, found: Quantized, before: Any = None) -> Trainable:
        """Have the model of `found` compute from codes and scales; tensors that another model shares stay."""
        model, stored = found.model, stored_dtype(found.model)
        modules: dict[str, Scaled] = {}
        places: dict[str, Any] = {}
        by_weight: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                by_weight.setdefault(id(module.weight), []).append(name)
        for name, (codes, grid) in grids(found.packed, found.config).items():
            if f"{name}.weight_packed" not in found.packed:
                continue  # embeddings in whole bytes: near enough, and a tied head has scales of its own
            plain = model.get_submodule(name)
            device = plain.weight.device
            codes, grid = codes.to(device), grid.to(device)
            if before is None:
                modules[name] = Scaled(plain, codes, grid, stored)
            else:
                modules[name] = Rounded(plain, codes, grid, stored, before.get_submodule(name).weight.detach())
            weight = plain.weight
            none = nn.Parameter(weight.new_empty(0), requires_grad=False)  # while it is trained, nothing reads it
            for place in by_weight[id(weight)]:
                places[place] = module = model.get_submodule(place)
                model.set_submodule(place, QuantizedModule(module, modules[name]))
                module.weight = none
        norms = {name: value.detach().clone() for name, value in _norms(model, stored).items()}
        replace_parameters_(model, {name: nn.Parameter(value) for name, value in norms.items()})
        return cls(found, modules, places, {name: model.get_parameter(name) for name in norms})

    @property
    def model(self) -> Any:
        return self.found.model

    @property
    def parameters(self) -> Shares:
        """All that can be trained, each with its unit."""
        units: Shares = [unit for module in self.modules.values() for unit in module.units()]
        return [*units, *((p, max(p.detach().abs().mean().item(), 1e-3)) for p in self.norms.values())]

    @property
    def learns_rounding(self) -> bool:
        """Whether the codes are trained, and not scales and norms alone."""
        return any(isinstance(module, Rounded) for module in self.modules.values())

    @property
    def rate(self) -> float:
        """Peak rate of AdamW for them, as a share of each unit; the highest where the rounding is trained."""
        return ROUNDING_RATE if self.learns_rounding else RATE

    def rate_from(self, kl: float) -> float:
        """The same by the KL to the model before that rounding left."""
        return min(ROUNDING_RATE, RATE_PER_NAT * kl) if self.learns_rounding else RATE

    @property
    def tolerated(self) -> float:
        """Rise of the held-out loss, as a share of it, that is no setback the first time."""
        return ROUNDING_RISE if self.learns_rounding else RISE

    @torch.no_grad()
    def finished_(self) -> Quantized:
        model, stored = self.model, stored_dtype(self.model)
        packed, weights = dict(self.found.packed), dict[str, torch.Tensor]()
        for name, plain in self.places.items():
            model.set_submodule(name, plain)
        for name, module in self.modules.items():
            codes, grid = module.current()
            packed |= pack(name, codes, grid)
            weights[f"{name}.weight"] = decode(codes, grid).to(module.scale.dtype)
        for name, norm in self.norms.items():
            packed[name] = norm.detach().to(stored).cpu().clone()
            weights[name] = packed[name].to(norm.dtype)
        replace_parameters_(model, {name: nn.Parameter(weight, False) for name, weight in weights.items()})
        return replace(self.found, packed=packed)


def _norms(model: nn.Module, stored: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights and biases of the text model's norms that are saved in one dtype: of modules that have vectors alone.

    Biases of linear modules stay as they are, and so do another tower's norms, which no text passes.
    """
    tower = find_decoder(model).path.rpartition(".")[0]
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in model.get_submodule(tower).named_modules(prefix=tower)
        if not isinstance(module, QuantizedModule) and all(own.dim() == 1 for own in module.parameters(recurse=False))
        for name, parameter in module.named_parameters(recurse=False)
        if name in ("weight", "bias") and weight_as_stored(parameter.detach(), stored).dtype == stored
    }
