"""Where and in which number format a model is computed: picking a device and a dtype, and what devices differ in."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from layercut.distributed import processes
from layercut.errors import ModelError
from layercut.models.checkpoints import Checkpoint

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ()}
"""What a CPU must have to multiply matrices of a dtype as fast as of float32, by torch's names; any of them."""


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" takes the first accelerator that torch sees, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        place = (accelerator or CPU) if device == "auto" else torch.device(device)
    except RuntimeError:
        raise ModelError(f"no device {device!r}", "allowed are auto, cpu, cuda, cuda:N, mps, xpu") from None
    if place.type != "cpu" and (accelerator is None or place.type != accelerator.type):
        raise ModelError(f"device {device!r} is not available on this machine", "use --device cpu, or --device auto")
    if place.type != "cpu" and (place.index or 0) >= torch.accelerator.device_count():
        raise ModelError(
            f"device {device!r} is not there: this machine has {torch.accelerator.device_count()}",
            f"use --device {place.type}:0",
        )
    processes.check_device(place)
    return place


def accelerators(kind: torch.device) -> list[torch.device]:
    """The accelerators of this machine that a model may be placed over; one where the user named it, none on a CPU."""
    if kind.type == "cpu" or kind.index is not None:
        return [kind] if kind.type != "cpu" else []
    return [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]


def pick_dtype(dtype: str, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the weights are saved in: the checkpoint's own for "auto", bfloat16 where that is GGUF."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(f"--dtype {dtype!r} is unknown", f"allowed are auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if checkpoint.gguf:
        return torch.bfloat16
    own, text = (getattr(c, "dtype", None) for c in (config, config.get_text_config()))
    stored = own or text or torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored


def computing_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `stored`, or float32 where "auto" is asked of a CPU that cannot multiply it.

    Such a CPU takes nine times as long over bfloat16 as over float32 (AVX2).
    """
    if dtype != "auto" or device.type != "cpu" or stored not in INSTRUCTIONS:
        return stored
    return stored if any(cpu_has(feature) for feature in INSTRUCTIONS[stored]) else torch.float32


def cpu_has(feature: str) -> bool:
    """Whether this CPU has some instructions, by torch's names; none where torch cannot say."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get(feature))


def place_of_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64, as Apple's GPUs."""
    return device if _has_float64(device.type) else CPU


@cache
def _has_float64(kind: str) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; from the CPU's memory to a GPU's by way of pinned memory, for which nothing waits."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def sum_in_float32_() -> None:
    """From now on have GPUs sum products of float16 and bfloat16 in float32, and not round float32 to TF32.

    torch lets the first be summed in parts of the narrow format, which overflows in float16, and convolutions of
    recurrent layers be rounded. It costs little where memory is what a product waits for. Of the whole process: for a
    command's own, not for a library call.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
