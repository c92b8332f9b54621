"""What a package beside layercut can bring, by entry points alone: tests/test_extensions.py runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import layercut as lc


def middle(runner: lc.DecoderRunner, tokens: torch.Tensor, length: int, **_: Any) -> list[lc.Segment]:
    """The segment in the middle of the stack."""
    start = (len(runner) - length) // 2
    return [lc.Segment(start, start + length)]


@torch.no_grad()
def norm(runner: lc.DecoderRunner, tokens: torch.Tensor, length: int, **_: Any) -> torch.Tensor:
    """How much each layer adds to the stream, [L]: the layers that add least go first."""
    hidden, calls = runner.enter(tokens[:1])
    added = []
    for i in range(len(runner)):
        after = runner.layer(i, hidden, calls)
        added.append((after - hidden).float().norm())
        hidden = after
    return torch.stack(added)


class ReverseKL(lc.Objective):
    """KL(q || p), where layercut's own is KL(p || q)."""

    label = "reverse KL"

    def loss(self, student: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        assert dense is not None
        log_p, log_q = dense.float().log_softmax(-1), student.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)


def nearest(weight: torch.Tensor, hessian: torch.Tensor | None, grid: Any) -> torch.Tensor:
    """Round to nearest, as layercut's `rtn` does."""
    from layercut.quantization.grid import encode

    return encode(weight, grid)


nearest.needs_calibration = False  # type: ignore[attr-defined]


@torch.no_grad()
def repeats(model: Any, tokenizer: Any, *, seed: int) -> Mapping[str, float]:
    """How many of a random sequence's tokens are predicted where it is given a second time."""
    half = torch.randint(model.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=torch.cat([half, half], 1), use_cache=False).logits[0, 8:-1]
    return {"hit_rate": (logits.argmax(-1) == half[0, 1:]).double().mean().item()}
