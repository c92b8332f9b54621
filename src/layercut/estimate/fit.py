"""What fits where, and which flags would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from layercut.config import CompressConfig

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

    def room(self) -> int:
        return self.bytes - RESERVED if self.accelerator else self.bytes


def targets(memory: int | None) -> list[Device]:
    """This machine's CPU, one 24 GB accelerator, and eight of 80 GB."""
    here = [Device("this machine's CPU", memory, accelerator=False)] if memory else []
    return [*here, Device("one 24 GB GPU", 24 * GB), Device("8 x 80 GB GPUs", 80 * GB, devices=8)]


def judge(
    target: Device, config: CompressConfig, needs: Callable[[CompressConfig, Device], dict[str, int]], weights: int
) -> dict[str, Any]:
    """Does every stage fit, and if not, the flags that make it fit; None where no flag does.

    needs: bytes of every stage by name, on that target. weights: bytes of the dense model. One device is used where
    the weights fit it; else they are spread over all.
    """
    several = target.devices > 1 and not target.spread and config.load.stream != "on"
    if weights > target.room() and several:
        return judge(replace(target, spread=True), config, needs, weights // target.devices)
    stages = needs(config, target)
    worst = max(stages, key=lambda name: stages[name])
    found: dict[str, Any] = {
        "target": target.name,
        "bytes_per_device": target.bytes,
        "devices": target.devices,
        "devices_used": target.devices if target.spread else 1,
        "needs_bytes": stages[worst],
        "stage": worst,
        "fits": stages[worst] <= target.room(),
        "flags": [],
        "why": None,
    }
    if found["fits"]:
        return found
    if weights > target.room() and target.spread:
        return found | {"flags": None, "why": "the weights alone are larger than the device"}
    for flags, changed in savings(config):
        if target.spread and changed.load.stream == "on":
            break
        stages = needs(changed, target)
        if max(stages.values()) <= target.room():
            return found | {"flags": flags}
    if weights > target.room():
        why = "the weights alone are larger than the device, and one device is used; nor does it fit from disk"
        return found | {"flags": None, "why": why}
    return found | {"flags": None, "why": "no setting makes it fit"}


def savings(config: CompressConfig) -> Iterator[tuple[list[str], CompressConfig]]:
    """Settings that need less and less: first what costs nothing but time, in memory and then with the layers left on
    disk, each on top of those before; then a smaller window as well."""
    flags, changed = list[str](), config
    for flags, changed in _cumulative([], config):
        yield flags, changed
    if config.load.stream != "on":
        flags, changed = ["--stream on"], replace(config, load=replace(config.load, stream="on"))
        yield flags, changed
        for more in _cumulative(flags, changed):
            flags, changed = more
            yield flags, changed
    window = changed.text.window
    while window > 64:
        window //= 2
        changed = replace(changed, text=replace(changed.text, window=window))
        yield [*flags, f"--window {window}"], changed


def _cumulative(flags: list[str], config: CompressConfig) -> Iterator[tuple[list[str], CompressConfig]]:
    """Each of `_STEPS` that changes something, on top of those before."""
    for flag, change in _STEPS:
        changed = change(config)
        if changed != config:
            flags, config = [*flags, flag], changed
            yield flags, config


def _heal(**changes: Any) -> Callable[[CompressConfig], CompressConfig]:
    return lambda config: replace(config, heal=replace(config.heal, **changes))


def _sweep(config: CompressConfig) -> CompressConfig:
    method = "exhaustive" if config.search.method == "clp" else config.search.method
    return replace(config, search=replace(config.search, method=method))


_STEPS: list[tuple[str, Callable[[CompressConfig], CompressConfig]]] = [
    ("--batch-tokens 1", _heal(batch_tokens=1)),
    ("--method exhaustive", _sweep),
    ("--radius 1", _heal(radius=1)),
]
"""One row in an optimizer step; the sweep, which keeps nothing for a backward pass; fewer trained layers."""
