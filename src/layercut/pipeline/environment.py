"""With what a run is made: versions, hardware and the command, for env.json and for results of benchmarks."""

from __future__ import annotations

import os
import platform
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from layercut import __version__

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "numpy", "compressed-tensors", "peft")
PROGRAM = "layercut"  # what `python -m layercut.cli` is called, as a launcher of several processes starts it


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of layercut, and of the packages that results depend on; read once."""
    found = {"python": platform.python_version(), "layercut": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    import torch

    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [PROGRAM if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name, *sys.argv[1:]],
        "platform": platform.platform(),
        "hardware": accelerator_name() or cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }


def accelerator_name() -> str | None:
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    named = getattr(torch.get_device_module(kind), "get_device_name", None) if kind else None
    if kind is None:
        return None
    return named() if named else kind.type  # Apple's has no name


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
