"""Bits by budget: for each weight the width that, all together, cost least KL within so many bytes.

    mixture = choose(model, tokens, config, target=60_000_000)     # .targets: what to quantize, and to how many bits

What can be loaded decides what can be mixed (docs/log.md): in the linear modules any widths beside each other,
embeddings then in 16 bits or as whole bytes; or all in one width with embeddings packed as well, with zero points or
without, and what is left out of it in 16 bits. Each of these formats is a multiple-choice knapsack over the costs of
`sensitivity.py`; the cheapest is taken. A sum of costs is the second-order estimate of what they cost together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import nn

from layercut.config import GROUP_SIZES, QuantizeConfig
from layercut.errors import ConfigError
from layercut.files.sizes import size, size_flag
from layercut.models import decoder_stack, model_weights
from layercut.quantization import sensitivity
from layercut.quantization.assignment import PACKED, WHOLE_BYTES, Assignment, Width, plan
from layercut.quantization.packing import stored_bytes, unpacks_while_loading

SEARCHED_GROUPS = 4
"""Bits up to which several group sizes are tried, and zero points: above it both are little of the size, and errors
small."""
CHOSEN_AMONG = ["zero points"]
"""What decides beside the options: an older run's bits are chosen anew."""
GROUP_STEP, LARGEST_GROUP = 32, 256
"""Where all weights share one group size, it may be any multiple of that, up to this."""
MOST_UNITS = 2**17
"""Into which the bytes to share out are divided at most."""
TENSOR_HEADER = 120
"""Bytes of a tensor in the header of a safetensors file, beside its name: dtype, shape, place, punctuation. At most."""
Costs = Mapping[str, Mapping[Width, float]]
"""Of each weight at each width, nats per token: the rise of KL when it alone is rounded."""


@dataclass(frozen=True)
class Storable:
    """A weight that can be stored in several ways."""

    targets: tuple[Assignment, ...]
    """Its module; of tied embeddings and head both."""
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """Of the first module."""
        return self.targets[0].name

    def stored(self, way: Assignment | None, dtype: torch.dtype) -> int:
        """Bytes in the file, its tensors' entries in the header included."""
        if way is None:
            return self.shape[0] * self.shape[1] * dtype.itemsize + TENSOR_HEADER + len(self.name)
        parts = stored_bytes(way, self.shape, dtype)
        if len(self.targets) > 1 and way.form == WHOLE_BYTES:
            parts |= {f"{self.targets[1].name}.weight_scale": parts[f"{self.name}.weight_scale"]}
        return sum(count + TENSOR_HEADER + len(name) for name, count in parts.items())


@dataclass(frozen=True)
class StoredFormat:
    """What can be mixed in one checkpoint: of each candidate the ways to store it; None: as it is, in 16 bits."""

    ways: tuple[tuple[Assignment | None, ...], ...]
    one_width: bool


@dataclass(frozen=True)
class Mixture:
    """What was chosen."""

    targets: tuple[Assignment, ...]
    """What is quantized, in the order the model uses it."""
    one_width: bool
    cost: float
    """Sum of the chosen costs, nats per token: the second-order estimate of the KL of all together."""
    bytes: int
    """Of the file, at most."""
    mean_bits: float
    """Of a weight among those that could be quantized, scales not counted."""
    costs: Costs

    def to_dict(self) -> dict[str, Any]:
        """What quantize.json records of the choice."""
        costs = {
            name: [
                {"bits": bits, "group_size": group, "zero_points": zeros, "kl": kl}
                for (bits, group, zeros), kl in each.items()
            ]
            for name, each in self.costs.items()
        }
        return {
            "predicted_kl": self.cost, "mean_bits": self.mean_bits, "bytes": self.bytes, "one_width": self.one_width,
            "costs": costs,
        }  # fmt: skip


def choose(model: Any, tokens: torch.Tensor, config: QuantizeConfig, target: int) -> Mixture:
    """For each weight the width that, all together, cost least KL within a size."""
    check_target(model, config, target)
    found = assigned(model, measured(model, tokens, config), config, target)
    assert found  # the target is possible
    return found


def measured(model: Any, tokens: torch.Tensor, config: QuantizeConfig) -> Costs:
    """What each weight costs in each way to store it that the config allows."""
    candidates = _candidates(model, config)
    formats = _formats(candidates, config)
    widths = {
        part.name: sorted({way.width for each in formats for way in each.ways[i] if way})
        for i, candidate in enumerate(candidates)
        for part in candidate.targets
    }
    return sensitivity.measure(model, tokens, widths, dtype=model_weights.stored_dtype(model))


def assigned(model: Any, costs: Costs, config: QuantizeConfig, target: int) -> Mixture | None:
    """The mixture of least cost within a size, from costs that are known. Needs no weights."""
    dtype, candidates = model_weights.stored_dtype(model), _candidates(model, config)
    rest = _rest(model, candidates, dtype)
    every = (_within(each, candidates, costs, target - rest, dtype) for each in _formats(candidates, config))
    best = min((each for each in every if each), key=lambda each: each.cost, default=None)
    return replace(best, bytes=best.bytes + rest) if best else None


def costs_after(costs: Costs, model: Any, cut: Any, removed: Container[int], config: QuantizeConfig) -> Costs:
    """Costs by the names that the weights have once layers are removed: those that stay keep their order."""
    before, after = ([part for each in _candidates(m, config) for part in each.targets] for m in (model, cut))
    stay = [part for part in before if part.layer is None or part.layer not in removed]
    return {now.name: costs[then.name] for now, then in zip(after, stay, strict=True)}


def check_target(model: Any, config: QuantizeConfig, target: int, *, without: int = 0) -> None:
    """Refuse a size that no choice of bits meets, or that the model has already. Needs no weights."""
    least, has = _sizes_between(model, config)(without)
    if least > target:
        more = "" if config.embedding_bits is None else "leave out --embedding-bits, "
        raise ConfigError(
            f"no choice of bits meets the target size of {size(target)}: the least possible is {size(least)}",
            f"{more}remove more layers, or allow --target-size {size_flag(least)}",
        )
    if target >= has:
        raise ConfigError(
            f"the target size of {size(target)} needs no quantization: the model's weights are {size(has)}",
            f"give a --target-size below {size(has)}",
        )


def _sizes_between(model: Any, config: QuantizeConfig) -> Callable[[int], tuple[int, int]]:
    """The least bytes that a choice of bits can make, and the bytes without any, by how many layers are removed."""
    dtype, candidates = model_weights.stored_dtype(model), _candidates(model, config)
    rest, layers = _rest(model, candidates, dtype), len(decoder_stack.find_decoder(model))
    every: list[Sequence[Sequence[Assignment | None]]] = [each.ways for each in _formats(candidates, config)]
    sizes = [
        [min(each.stored(way, dtype) for way in these) for each, these in zip(candidates, ways, strict=True)]
        for ways in (*every, [[None]] * len(candidates))
    ]

    def between(without: int) -> tuple[int, int]:
        shares = [1.0 if each.targets[0].layer is None else 1 - without / layers for each in candidates]
        *least, whole = (rest + round(sum(n * s for n, s in zip(each, shares, strict=True))) for each in sizes)
        return min(least), whole

    return between


def numbers_left_open(model: Any, config: QuantizeConfig, target: int) -> list[int]:
    """Numbers of layers that leave something to choose: with some bits they meet the size, and without they do not."""
    layers = len(decoder_stack.find_decoder(model))
    ends = list(map(_sizes_between(model, config), range(layers)))
    found = [n for n, (least, whole) in enumerate(ends) if least <= target < whole]
    if not found and target < (least := ends[-1][0]):
        raise ConfigError(
            f"no number of layers and bits meets the target size of {size(target)}: one layer in the fewest bits "
            f"leaves {size(least)}",
            f"allow --target-size {size_flag(least)}, or fewer bits by --bits-allowed",
        )
    if not found:
        check_target(model, config, target)
    return found


def _candidates(model: Any, config: QuantizeConfig) -> list[Storable]:
    """The weights among which bytes are shared out."""
    as_bytes = replace(config, bits=8, embedding_bits=config.embedding_bits or 8)
    together: dict[int, list[Assignment]] = {}
    for target in plan(model, as_bytes):
        module = model.get_submodule(target.name)
        if isinstance(module, nn.Linear) and id(module.weight) not in together:
            target = replace(target, form=PACKED)  # a head of its own is packed as any linear module
        together.setdefault(id(module.weight), []).append(target)
    shapes = [tuple(model.get_submodule(each[0].name).weight.shape) for each in together.values()]
    return [Storable(tuple(each), shape) for each, shape in zip(together.values(), shapes, strict=True)]


def _rest(model: Any, candidates: Sequence[Storable], dtype: torch.dtype) -> int:
    """Bytes of all that stays as it is, with its part of the header."""
    chosen = {id(model.get_submodule(part.name).weight) for each in candidates for part in each.targets}
    left = {id(p): (name, p) for name, p in model.named_parameters() if id(p) not in chosen}
    buffers = TENSOR_HEADER * len(list(model.buffers()))
    return buffers + sum(
        p.numel() * min(dtype.itemsize, p.itemsize) + TENSOR_HEADER + len(name) for name, p in left.values()
    )


def _formats(candidates: Sequence[Storable], config: QuantizeConfig) -> list[StoredFormat]:
    """All that stock transformers can load, of which one has to be taken."""
    plain: tuple[None, ...] = (None,) if 16 in config.allowed else ()
    allowed = [bits for bits in config.allowed if bits < 16]
    mixed = []
    for candidate in candidates:
        first, columns = candidate.targets[0], candidate.shape[1]
        whole = first.form == WHOLE_BYTES
        packed = _sizes(columns, config, first.group_size)
        widths = [(8, first.group_size)] if whole else [(b, g) for b in allowed for g in packed[: _tried(b, packed)]]
        ways = [replace(first, bits=bits, group_size=group) for bits, group in widths if bits in allowed]
        mixed.append((*(plain or ((None,) if whole and not ways else ())), *ways))
    formats = [StoredFormat(tuple(mixed), one_width=False)]
    if any(candidate.targets[0].form == WHOLE_BYTES for candidate in candidates) and unpacks_while_loading():
        for bits, group, zeros in _common_widths(candidates, config, allowed):
            ways = [
                replace(each.targets[0], bits=bits, group_size=group, form=PACKED, zero_points=zeros)
                for each in candidates
            ]
            formats.append(StoredFormat(tuple((*plain, way) for way in ways), one_width=True))
    return formats


def _common_widths(candidates: Sequence[Storable], config: QuantizeConfig, allowed: Sequence[int]) -> list[Width]:
    """What all weights may have alike; zero points, which no loader takes beside other widths, up to a few bits."""
    sizes, zeros = _common_sizes(candidates, config), (False, True)
    return [
        (bits, group, zero)
        for bits in allowed
        for zero in zeros[: 1 + (bits <= SEARCHED_GROUPS)]
        for group in sizes[: _tried(bits, sizes)]
    ]


def _tried(bits: int, sizes: Sequence[int]) -> int:
    """How many of these group sizes, the coarsest first, are tried at so many bits."""
    return len(sizes) if bits <= SEARCHED_GROUPS else 1


def _sizes(columns: int, config: QuantizeConfig, default: int) -> list[int]:
    """Group sizes of one weight, the coarsest first."""
    if config.group_size:
        return [config.group_size]
    return [each for each in GROUP_SIZES if columns % each == 0] or [default]


def _common_sizes(candidates: Sequence[Storable], config: QuantizeConfig) -> list[int]:
    """Group sizes that divide the columns of all, the coarsest first."""
    shared = gcd(*(candidate.shape[1] for candidate in candidates))
    if config.group_size:
        return [config.group_size] if shared % config.group_size == 0 else []
    return [each for each in range(LARGEST_GROUP, 0, -GROUP_STEP) if shared % each == 0]


def _within(
    form: StoredFormat,
    candidates: Sequence[Storable],
    costs: Costs,
    budget: int,
    dtype: torch.dtype,
) -> Mixture | None:
    """The cheapest mixture of one format; None where none is small enough."""
    sizes = [[each.stored(way, dtype) for way in ways] for each, ways in zip(candidates, form.ways, strict=True)]
    kl = [
        [sum(_cost(costs, part.name, way) for part in each.targets) if way else 0.0 for way in ways]
        for each, ways in zip(candidates, form.ways, strict=True)
    ]
    picked = cheapest(kl, sizes, budget)
    if picked is None:
        return None
    chosen = [ways[i] for ways, i in zip(form.ways, picked, strict=True)]
    targets = [
        replace(way, name=part.name, layer=part.layer)
        for each, way in zip(candidates, chosen, strict=True)
        if way
        for part in each.targets
    ]
    order = [part.name for each in candidates for part in each.targets]
    numbers = [each.shape[0] * each.shape[1] for each in candidates]
    bits = sum(count * (way.bits if way else 8 * dtype.itemsize) for count, way in zip(numbers, chosen, strict=True))
    return Mixture(
        tuple(sorted(targets, key=lambda target: order.index(target.name))),
        form.one_width,
        sum(row[i] for row, i in zip(kl, picked, strict=True)),
        sum(row[i] for row, i in zip(sizes, picked, strict=True)),
        bits / sum(numbers),
        costs,
    )


def _cost(costs: Costs, name: str, way: Assignment) -> float:
    """Of a weight stored in one way; infinite where that was not measured, as of groups that only a cut model has."""
    return costs[name].get(way.width, math.inf)


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """The multiple-choice knapsack: of each row one choice, such that sizes sum to the budget at most, costs to least.

    By dynamic programming over units of size: exact where these are common divisors, else sizes are rounded up to them.
    """
    import numpy as np

    spare = budget - sum(min(row) for row in sizes)
    if spare < 0:
        return None
    more = [[count - min(row) for count in row] for row in sizes]
    unit = max(gcd(*(count for row in more for count in row)), -(-spare // MOST_UNITS), 1)
    units = spare // unit
    least, picked = np.zeros(units + 1), []  # least[u]: the least cost of the rows so far with u units at most
    for row, counts in zip(costs, more, strict=True):
        with_row, best = np.full(units + 1, np.inf), np.zeros(units + 1, dtype=np.int16)
        for choice, (cost, count) in enumerate(zip(row, counts, strict=True)):
            taken = -(-count // unit)  # rounded up, so that the budget holds
            if taken > units:
                continue
            tried = least[: units + 1 - taken] + cost
            better = tried < with_row[taken:]
            with_row[taken:][better] = tried[better]
            best[taken:][better] = choice
        least = with_row
        picked.append(best)
    if not np.isfinite(least[-1]):
        return None
    found, left = list[int](), units
    for counts, best in zip(reversed(more), reversed(picked), strict=True):
        found.append(int(best[left]))
        left -= -(-counts[found[-1]] // unit)
    return found[::-1]
