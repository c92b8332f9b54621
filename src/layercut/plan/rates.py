"""What a machine does in a second: measured on one layer of the model itself, or by a GPU's data sheet."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from layercut.data.self_sampled import ROWS, ROWS_OF_ACCELERATOR
from layercut.models import memory
from layercut.models.decoder_stack import find_decoder
from layercut.models.loading import build, quiet_transformers, skeleton
from layercut.models.losses import Teacher
from layercut.models.runner import hidden_of, intercepted
from layercut.plan.costs import Work
from layercut.plan.shape import Shape, without_cache

CARDS = {"t4": (16, 0.32, 65, 0.25), "l4": (24, 0.3, 121, 0.5), "rtx4090": (24, 1.01, 165, 1.3),
         "l40s": (48, 0.86, 362, 1.4), "a100": (80, 2.04, 312, 9.7), "h100": (80, 3.35, 989, 34),
         "h200": (141, 4.8, 989, 34), "b200": (180, 8.0, 2250, 37)}  # fmt: skip
"""GPUs by their data sheets: GB of memory, TB/s, dense TFLOP/s in 16 bits and in float64."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine does in a second, and seconds of what a model repeats."""

    forward: float  # floating-point operations of layers, on rows of tokens, in the model's number format
    backward: float  # the same of gradients of layers' inputs
    trained: float  # and of their weights
    flops64: float
    logit: float  # seconds of one logit of a token, from the hidden state to the divergence
    step: float  # seconds of a layer on one token of one row
    wide_step: float  # on one token each of the rows that chats are sampled in
    memory: float  # bytes moved, read and written, by an elementwise operation
    disk: float | None
    """Bytes read from a file that is in no cache; None where the system does not let one be dropped from it."""

    @classmethod
    def computed(cls, shape: Shape, *, flops: float, flops64: float, memory: float, launch: float) -> Rates:
        """By products and bytes in a second. An operation in a model is three launches, a logit 28 bytes: guesses."""
        step = max(shape.dense.layers) * shape.itemsize / memory + 3 * shape.mean("kernels") * launch
        return cls(
            forward=flops, backward=flops, trained=flops, flops64=flops64, logit=2 * shape.hidden / flops + 28 / memory,
            step=step, wide_step=step, memory=memory, disk=1e9,
        )  # fmt: skip

    @classmethod
    def of_card(cls, name: str, shape: Shape) -> Rates:
        """A GPU's: 40 % of its data sheet's products, 70 % of its bandwidth, a disk of 1 GB/s. Guesses."""
        _, bandwidth, flops, flops64 = CARDS[name]
        return cls.computed(
            shape, flops=0.4e12 * flops, flops64=0.4e12 * flops64, memory=0.7e12 * bandwidth, launch=6e-6
        )

    @classmethod
    def of_some_core(cls, shape: Shape) -> Rates:
        """One of a server: what stages take of each other, not how long."""
        return cls.computed(shape, flops=1.5e11, flops64=2e10, memory=8e9, launch=1e-6)

    @classmethod
    def measured(
        cls, config: Any, shape: Shape, dtype: torch.dtype, device: torch.device, folder: Path, limit: float = 0.4
    ) -> Rates | None:
        """This machine's, each figure within so many seconds or three tries; None where it has no room for a layer."""
        if 4 * max(shape.dense.layers) * shape.itemsize > memory.available_bytes(device):
            return None

        def seconds(work: Callable[[], object]) -> float:
            """Median of repeats, the first left out."""
            found, begun = list[float](), time.perf_counter()
            while len(found) < 3 or (time.perf_counter() - begun < limit and len(found) < 1000):
                started = time.perf_counter()
                work()
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                found.append(time.perf_counter() - started)
            return statistics.median(found[1:])

        rows = max(1, memory.PASS_TOKENS // shape.window)
        layer, call, hidden = real_layer(config, dtype, device, rows, shape.window)
        leaf, ones = hidden.clone().requires_grad_(True), torch.ones_like(hidden)
        batch = ROWS if device.type == "cpu" else ROWS_OF_ACCELERATOR
        with torch.no_grad():
            there = seconds(lambda: call(hidden))
            single, wide = (real_layer(config, dtype, device, count, 1, layer) for count in (1, batch))
            step, wide_step = (seconds(lambda each=each: each[1](each[2])) for each in (single, wide))  # type: ignore[misc]
        back = seconds(lambda: torch.autograd.grad(call(leaf), leaf, ones)) - there
        layer.requires_grad_(True)
        weights = [p for p in layer.parameters() if p.is_floating_point()]
        all_of_it = seconds(lambda: torch.autograd.grad(call(leaf), [leaf, *weights], ones, allow_unused=True))
        layer.requires_grad_(False)
        flops, least = rows * shape.mean("flops"), there / 10  # a difference of two times may be next to nothing

        some = min(shape.vocabulary, 2**15)
        head = (0.02 * torch.randn(some, shape.hidden, device=device)).to(dtype)
        last, square = hidden[:1].flatten(0, 1), min(shape.hidden, 2048)
        doubles = torch.ones(square, square, dtype=torch.float64, device=memory.place_of_float64(device))
        large = torch.ones(32 * 2**20, device=device)

        def compared() -> None:
            of_both = zip(
                *((last @ head.T).split(memory.budget(device).float_tokens(some)) for _ in range(2)), strict=True
            )
            for dense, cut in of_both:
                Teacher(dense).kl(cut.float())

        return cls(
            forward=flops / there, backward=flops / max(least, back),
            trained=flops / max(least, all_of_it - there - back),
            flops64=2 * square**3 / seconds(lambda: doubles @ doubles.T),
            logit=seconds(compared) / (2 * len(last) * some), step=step, wide_step=wide_step,
            memory=2 * large.nbytes / seconds(lambda: large.mul_(1.0)), disk=_disk_rate(folder),
        )  # fmt: skip

    def seconds(self, work: Work) -> float:
        """What a stage's work takes."""
        layers = work.flops / self.forward + work.back / self.backward + work.trained / self.trained
        decoded = work.steps * self.step + work.wide_steps * self.wide_step + work.moved / self.memory
        read = work.read / (self.disk or self.memory)
        return layers + work.logits * self.logit + work.flops64 / self.flops64 + decoded + read + work.fixed


class _Seen(Exception):
    """What the middle layer of a model is called with."""


def real_layer(
    config: Any, dtype: torch.dtype, device: torch.device, rows: int, window: int, layer: Any = None
) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """The middle layer of a model with random weights, what calls it as the model does, and hidden states [B, T, D]."""

    def seen(i: int, run: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if i == middle:
            raise _Seen(hidden, *without_cache(args, kwargs))
        return run(hidden, *args, **kwargs)

    def real(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, device=device).to(dtype if value.dtype == torch.bfloat16 else value.dtype)
        return (torch.ones if value.dtype == torch.bool else torch.zeros)(value.shape, dtype=value.dtype, device=device)

    with FakeTensorMode(), torch.device("cpu"):
        model = build(config, torch.bfloat16)  # fake tensors know the experts' grouped product in no other
        layers = list(find_decoder(model).layers.children())
        middle = len(layers) // 2
        try:
            with torch.no_grad(), quiet_transformers(), intercepted(layers, seen):
                model(input_ids=torch.zeros(rows, window, dtype=torch.long), use_cache=True)
        except _Seen as found:
            caught = found.args
    hidden, args, kwargs = tree_map(real, caught)
    if layer is None:
        layer = list(find_decoder(skeleton(config, dtype)).layers.children())[middle].to_empty(device=device)
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.detach().copy_(0.02 * real(tensor) if tensor.is_floating_point() else real(tensor))
    return layer, lambda h: hidden_of(layer(h, *args, **kwargs)), hidden


def _disk_rate(folder: Path, size: int = 64 * 2**20) -> float | None:
    """Bytes a second of reading a file that was just written and then dropped from the cache."""
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=folder if os.access(folder, os.W_OK) else None) as file:
            file.write(os.urandom(2**20) * (size // 2**20))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begun = time.perf_counter()
            with open(file.name, "rb", buffering=0) as again:
                while again.read(2**22):
                    pass
            return size / (time.perf_counter() - begun)
    except OSError:
        return None
