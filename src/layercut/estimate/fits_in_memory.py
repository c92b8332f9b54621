"""What fits where, and which flags would make it fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from layercut.config import CompressConfig
from layercut.pipeline.provenance import accelerator_name
from layercut.pipeline.resolve_options import needing_memory

GB = 10**9
RESERVED = 1 * GB
"""Left alone on an accelerator: its runtime and what the allocator cannot use. A guess."""


@dataclass(frozen=True)
class Device:
    """A machine to run on."""

    name: str
    bytes: int
    """Memory of the one device that holds the model."""
    devices: int = 1
    accelerator: bool = True
    spread: bool = False
    """Whether the weights are spread over all of the devices."""
    one_process: bool = False
    """Whether they are spread layer by layer, in one process (`models/placement.py`); else by torchrun."""

    @property
    def room(self) -> int:
        """Bytes of it that a run may take."""
        return self.bytes - RESERVED if self.accelerator else self.bytes


def targets(memory: int | None) -> list[Device]:
    """This machine's CPU and its accelerators, one of 24 GB, and eight of 80 GB."""
    here = [Device("this machine's CPU", memory, accelerator=False)] if memory else []
    if found := present_accelerators(memory):
        here.append(found)
    return [*here, Device("one 24 GB GPU", 24 * GB), Device("8 x 80 GB GPUs", 80 * GB, devices=8)]


def present_accelerators(memory: int | None) -> Device | None:
    """This machine's accelerators as one place to run."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return None
    with contextlib.suppress(RuntimeError, NotImplementedError):
        memory = torch.accelerator.get_memory_info(kind)[1]
    count = torch.accelerator.device_count()
    name = f"this machine's {f'{count} x ' if count > 1 else ''}{accelerator_name()}"
    return Device(name, memory or 0, devices=count, one_process=True)


def judge(
    target: Device, config: CompressConfig, needs: Callable[[CompressConfig, Device], dict[str, int]], weights: int
) -> dict[str, Any]:
    """Whether every stage fits, and if not, the flags that make it fit; None where no flag does.

    One device is used where the weights fit it; else they are spread over all.
    """
    if weights > target.room and target.devices > 1 and config.load.stream != "on":
        target, weights = replace(target, spread=True), weights // target.devices
    stages = needs(config, target)
    worst = max(stages, key=lambda name: stages[name])
    flags, why = _advice(target, config, needs, weights) if stages[worst] > target.room else ([], None)
    return {
        "target": target.name,
        "bytes_per_device": target.bytes,
        "devices": target.devices,
        "devices_used": target.devices if target.spread else 1,
        "one_process": target.one_process,
        "needs_bytes": stages[worst],
        "stage": worst,
        "fits": stages[worst] <= target.room,
        "flags": flags,
        "why": why,
    }


def _advice(
    target: Device, config: CompressConfig, needs: Callable[..., dict[str, int]], weights: int
) -> tuple[list[str] | None, str | None]:
    """The flags that make it fit, or why there are none."""
    too_large = weights > target.room
    if too_large and target.spread:
        return None, "the weights alone are larger than the device"
    for flags, changed in savings(config):
        if target.spread and changed.load.stream == "on":
            break
        if max(needs(changed, target).values()) <= target.room:
            return flags, None
    if too_large:
        return None, "the weights alone are larger than the device, and one device is used; nor does it fit from disk"
    return None, "no setting makes it fit"


def savings(config: CompressConfig) -> Iterator[tuple[list[str], CompressConfig]]:
    """Settings that need less and less, each on top of those before.

    First what costs nothing but time, in memory and then with the layers left on disk; then a smaller window as well.
    """
    disk: list[Step] = [("--stream on", "load", {"stream": "on"})]
    for place in [[]] if config.load.stream == "on" or needing_memory(config) else [[], disk]:
        flags, changed = list[str](), config
        window, shorter = config.text.window, list[Step]()
        if (config.heal.tune_window or window) > window:
            shorter = [(f"--tune-window {window}", "heal", {"tune_window": window})]
        for flag, group, values in [*place, *shorter, *STEPS]:
            less = replace(changed, **{group: replace(getattr(changed, group), **values)})
            if less != changed:
                flags, changed = [*flags, flag], less
                yield flags, changed
    kept = [flag for flag in flags if not flag.startswith("--tune-window")]
    while window > 64:
        window //= 2
        text, heal = replace(changed.text, window=window), replace(changed.heal, tune_window=window)
        changed = replace(changed, text=text, heal=heal)
        yield [*kept, f"--tune-window {window}", f"--window {window}"], changed


Step = tuple[str, str, dict[str, Any]]
STEPS: list[Step] = [
    ("--batch-tokens 1", "heal", {"batch_tokens": 1}),
    ("--radius 1", "heal", {"radius": 1}),
]
"""One row in an optimizer step; fewer trained layers."""
