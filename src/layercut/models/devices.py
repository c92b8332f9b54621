"""What devices differ in: whether they know float64, and how tensors get to them."""

from __future__ import annotations

from functools import cache

import torch

CPU = torch.device("cpu")


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
