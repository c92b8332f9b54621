"""Bits by budget: for each weight the width that, all together, cost least KL within so many bytes.

    mixture = choose(model, tokens, config, target=60_000_000)     # .targets: what to quantize, and to how many bits

What can be loaded decides what can be mixed: in the linear modules any widths beside each other, embeddings then in 16
bits or as whole bytes; or all in one width with embeddings packed as well, with zero points or without, and what is
left out of it in 16 bits. Each of these formats is a multiple-choice knapsack over the costs of `calibration.py`; the
cheapest is taken. A sum of costs is the second-order estimate of what they cost together.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import nn

from layercut.config import GROUP_SIZES, QuantizeConfig
from layercut.errors import ConfigError
from layercut.files import size, size_flag
from layercut.models import decoder_stack
from layercut.quantization import calibration
from layercut.quantization.packing import (
    PACKED,
    WHOLE_BYTES,
    Assignment,
    Width,
    plan,
    stored_bytes,
    unpacks_while_loading,
)

SEARCHED_GROUPS = 4
"""Bits up to which several group sizes are tried, and zero points: above it both are little of the size, and errors
small."""
CHOSEN_AMONG = ["zero points"]  # what decides beside the options: an older run's bits are chosen anew
GROUP_STEP, LARGEST_GROUP = 32, 256
"""Where all weights share one group size, it may be any multiple of that, up to this."""
MOST_UNITS = 2**17  # into which the bytes to share out are divided at most
TENSOR_HEADER = 120
"""Bytes of a tensor in the header of a safetensors file, beside its name: dtype, shape, place, punctuation. At most."""
Costs = Mapping[str, Mapping[Width, float]]
"""Of each weight at each width, nats per token: the rise of KL when it alone is rounded."""
Ways = tuple[Assignment | None, ...]  # to store a weight; None: as it is, in 16 bits


@dataclass(frozen=True)
class Mixture:
    """What was chosen."""

    targets: tuple[Assignment, ...]  # what is quantized, in the order the model uses it
    one_width: bool
    cost: float  # sum of the chosen costs, nats per token: the second-order estimate of the KL of all together
    bytes: int  # of the file, at most
    mean_bits: float  # of a weight among those that could be quantized, scales not counted
    costs: Costs

    def to_dict(self) -> dict[str, Any]:
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


@dataclass(frozen=True)
class _Storable:
    """A weight that can be stored in several ways."""

    targets: tuple[Assignment, ...]  # its module; of tied embeddings and head both
    shape: tuple[int, int]

    def stored(self, way: Assignment | None, dtype: torch.dtype) -> int:
        """Bytes in the file, its tensors' entries in the header included."""
        name = self.targets[0].name
        if way is None:
            return self.shape[0] * self.shape[1] * dtype.itemsize + TENSOR_HEADER + len(name)
        parts = stored_bytes(way, self.shape, dtype)
        if len(self.targets) > 1 and way.form == WHOLE_BYTES:
            parts |= {f"{self.targets[1].name}.weight_scale": parts[f"{name}.weight_scale"]}
        return sum(count + TENSOR_HEADER + len(name) for name, count in parts.items())


class _Choice:
    """What there is to choose for a model: its weights, and the formats that stock transformers can load."""

    def __init__(self, model: Any, config: QuantizeConfig) -> None:
        self.dtype = decoder_stack.stored_dtype(model)
        together: dict[int, list[Assignment]] = {}
        for target in plan(model, replace(config, bits=8, embedding_bits=config.embedding_bits or 8)):
            module = model.get_submodule(target.name)
            if isinstance(module, nn.Linear) and id(module.weight) not in together:
                target = replace(target, form=PACKED)  # a head of its own is packed as any linear module
            together.setdefault(id(module.weight), []).append(target)
        self.weights = [
            _Storable(tuple(each), tuple(model.get_submodule(each[0].name).weight.shape)) for each in together.values()
        ]
        left = [(name, p) for name, p in model.named_parameters() if id(p) not in together]
        self.rest = TENSOR_HEADER * len(list(model.buffers())) + sum(
            p.numel() * min(self.dtype.itemsize, p.itemsize) + TENSOR_HEADER + len(name) for name, p in left
        )
        """Bytes of all that stays as it is, with its part of the header."""
        plain: tuple[None, ...] = (None,) if 16 in config.allowed else ()
        allowed = [bits for bits in config.allowed if bits < 16]
        self.formats: list[tuple[list[Ways], bool]] = [([_mixed(each, config) for each in self.weights], False)]
        """The ways to store each weight, and whether all that are rounded must have one width."""
        if any(each.targets[0].form == WHOLE_BYTES for each in self.weights) and unpacks_while_loading():
            shared = gcd(*(each.shape[1] for each in self.weights))
            sizes = [config.group_size] if config.group_size else range(LARGEST_GROUP, 0, -GROUP_STEP)
            sizes = [each for each in sizes if shared % each == 0]
            for bits in allowed:
                few = bits <= SEARCHED_GROUPS
                for zeros in (False, True) if few else (False,):
                    for group in sizes if few else sizes[:1]:
                        width: dict[str, Any] = {
                            "bits": bits,
                            "group_size": group,
                            "form": PACKED,
                            "zero_points": zeros,
                        }
                        ways = [(*plain, replace(each.targets[0], **width)) for each in self.weights]
                        self.formats.append((ways, True))

    def cheapest(self, ways: Sequence[Ways], one_width: bool, costs: Costs, target: int) -> Mixture | None:
        """The cheapest mixture of one format; None where none is small enough."""
        sizes = [[each.stored(way, self.dtype) for way in of] for each, of in zip(self.weights, ways, strict=True)]
        kl = [  # infinite where that was not measured, as of groups that only a cut model has
            [sum(costs[part.name].get(way.width, math.inf) for part in each.targets) if way else 0.0 for way in of]
            for each, of in zip(self.weights, ways, strict=True)
        ]
        picked = cheapest(kl, sizes, target - self.rest)
        if picked is None:
            return None
        chosen = [of[i] for of, i in zip(ways, picked, strict=True)]
        order = [part.name for each in self.weights for part in each.targets]
        targets = [
            replace(way, name=part.name, layer=part.layer)
            for each, way in zip(self.weights, chosen, strict=True)
            if way
            for part in each.targets
        ]
        counts = [each.shape[0] * each.shape[1] for each in self.weights]
        bits = [way.bits if way else 8 * self.dtype.itemsize for way in chosen]
        return Mixture(
            tuple(sorted(targets, key=lambda target: order.index(target.name))),
            one_width,
            sum(row[i] for row, i in zip(kl, picked, strict=True)),
            self.rest + sum(row[i] for row, i in zip(sizes, picked, strict=True)),
            sum(count * each for count, each in zip(counts, bits, strict=True)) / sum(counts),
            costs,
        )

    def sizes(self, without: float) -> tuple[int, int]:
        """The least bytes that a choice can make, and the bytes without any, less a share of the layers."""
        shares = [1.0 if each.targets[0].layer is None else 1 - without for each in self.weights]

        def of(ways: Sequence[Ways]) -> int:
            least = (min(each.stored(way, self.dtype) for way in w) for each, w in zip(self.weights, ways, strict=True))
            return self.rest + round(sum(n * s for n, s in zip(least, shares, strict=True)))

        return min(of(ways) for ways, _ in self.formats), of([(None,)] * len(self.weights))


def _mixed(weight: _Storable, config: QuantizeConfig) -> Ways:
    """The ways to store a weight beside others of any bits."""
    first, columns = weight.targets[0], weight.shape[1]
    if first.form == WHOLE_BYTES:
        eight = 8 in config.allowed
        return (*((None,) if 16 in config.allowed or not eight else ()), *((first,) if eight else ()))
    sizes = [config.group_size] if config.group_size else [each for each in GROUP_SIZES if columns % each == 0]
    return (
        *((None,) if 16 in config.allowed else ()),
        *(
            replace(first, bits=bits, group_size=group)
            for bits in config.allowed
            if bits < 16
            for group in (sizes or [first.group_size])[: None if bits <= SEARCHED_GROUPS else 1]
        ),
    )


def choose(model: Any, tokens: torch.Tensor, config: QuantizeConfig, target: int) -> Mixture:
    """For each weight the width that, all together, cost least KL within a size."""
    check_target(model, config, target)
    found = assigned(model, measured(model, tokens, config), config, target)
    assert found  # the target is possible
    return found


def measured(model: Any, tokens: torch.Tensor, config: QuantizeConfig) -> Costs:
    choice = _Choice(model, config)
    widths = {
        part.name: sorted({way.width for ways, _ in choice.formats for way in ways[i] if way})
        for i, weight in enumerate(choice.weights)
        for part in weight.targets
    }
    return calibration.measure(model, tokens, widths, dtype=choice.dtype)


def assigned(model: Any, costs: Costs, config: QuantizeConfig, target: int) -> Mixture | None:
    """The mixture of least cost within a size, from costs that are known. Needs no weights."""
    choice = _Choice(model, config)
    every = [choice.cheapest(ways, one_width, costs, target) for ways, one_width in choice.formats]
    return min((each for each in every if each), key=lambda each: each.cost, default=None)


def costs_after(costs: Costs, model: Any, cut: Any, removed: Container[int], config: QuantizeConfig) -> Costs:
    """Costs by the names that the weights have once layers are removed: those that stay keep their order."""
    before, after = ([part for each in _Choice(m, config).weights for part in each.targets] for m in (model, cut))
    stay = [part for part in before if part.layer is None or part.layer not in removed]
    return {now.name: costs[then.name] for now, then in zip(after, stay, strict=True)}


def check_target(model: Any, config: QuantizeConfig, target: int, *, without: int = 0) -> None:
    """Refuse a size that no choice of bits meets, or that the model has already. Needs no weights."""
    least, has = _Choice(model, config).sizes(without / len(decoder_stack.find_decoder(model)))
    if least > target:
        more = "" if config.embedding_bits is None else "leave out --embedding-bits, "
        words = f"no choice of bits meets the target size of {size(target)}: the least possible is {size(least)}"
        raise ConfigError(words, f"{more}remove more layers, or allow --target-size {size_flag(least)}")
    if target >= has:
        words = f"the target size of {size(target)} needs no quantization: the model's weights are {size(has)}"
        raise ConfigError(words, f"give a --target-size below {size(has)}")


def numbers_left_open(model: Any, config: QuantizeConfig, target: int) -> list[int]:
    """Numbers of layers that leave something to choose: with some bits they meet the size, and without they do not."""
    choice, layers = _Choice(model, config), len(decoder_stack.find_decoder(model))
    ends = [choice.sizes(n / layers) for n in range(layers)]
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
