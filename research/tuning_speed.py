"""Claim: endpoint tuning runs within twice the time of the matrix products that it cannot do without.

    OMP_NUM_THREADS=2 python research/tuning_speed.py --data TEXT [--segment 13:19] [--tokens 4096] [--repeats 3]

The floor, in floating-point operations a token, w the weights of a layer's linear maps, V D those of the head:

    2 (sum of w over all dense layers + V D)          dense forward
    2 (sum of w from the first endpoint on + V D)     student forward, its prefix shared
    2 (sum of w from the first endpoint on + V D)     gradient of the hidden states
    2 (sum of w over the endpoints)                   gradient of their weights

over the rate of this machine at a product of 2048 x 2048 x 2048 in the model's number format, its best of several,
taken in every repeat. Attention's own products, norms, the loss over the vocabulary, the optimizer and scoring the
held-out rows are no part of the floor. Beside it, in turn in the same process: "plain", the same step as autograd
does it (both models whole, KL in float32). CPU seconds are counted as well, since a shared machine stretches the
others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from common import arguments, blocks, finish, open_model
from healers import autograd_
from layercut.config import TuneSettings
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import own_parameters_
from layercut.healing.recipe import endpoints
from layercut.models import decoder_stack
from layercut.models.memory import reuse_freed
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut_segment_


def operations(dense: DecoderRunner, student: DecoderRunner, positions: list[int]) -> dict[str, float]:
    """Floating-point operations a token, by part."""

    def linear(layers: Any) -> int:
        return sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)

    head = dense.vocabulary * dense.hidden_size
    suffix = linear(student.layers[min(positions) :]) + head
    return {
        "dense forward": 2.0 * (linear(dense.layers) + head),
        "student forward": 2.0 * suffix,
        "gradient of hidden states": 2.0 * suffix,
        "gradient of weights": 2.0 * linear(student.layers[p] for p in positions),
    }


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 2048, repeats: int = 5) -> float:
    """Operations a second."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def timed(work: Callable[[], Any]) -> dict[str, float]:
    begun, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}


def where_time_goes(work: Callable[[], Any], rows: int = 14) -> list[dict[str, Any]]:
    """The operators with the largest share of CPU time, as torch's profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(e.self_cpu_time_total for e in events)
    return [
        {"operator": e.key, "share": round(e.self_cpu_time_total / whole, 4), "calls": e.count} for e in events[:rows]
    ]


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", segment="13:19", tokens=4096, window=256, repeats=3,
        batch_tokens=TuneSettings.batch_tokens,
    )  # fmt: skip
    model = open_model(args.model)
    segment = [Segment.parse(args.segment)]
    dense = DecoderRunner(model.model)

    def cut() -> DecoderRunner:
        student = decoder_stack.share(model.model)
        cut_segment_(student, segment)
        return DecoderRunner(student)

    tokens = blocks(model, args.data, args.tokens + args.window, args.window, 0).tokens
    tokens, heldout = tokens[:-1], tokens[-1:]
    positions = endpoints(segment, len(dense))
    parts = operations(dense, cut(), positions)
    other = cut()
    trained = own_parameters_(other, positions)
    plain = tokens[: max(1, 1024 // args.window)]
    reuse_freed()

    def tune(student: DecoderRunner, rows: torch.Tensor) -> float:
        return tune_(student, dense, rows, heldout=heldout, batch_tokens=args.batch_tokens).seconds

    tune(cut(), tokens[:1])  # the first call is slower
    rows: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        rate = matrix_rate(model.dtype, model.device)
        by_plain = timed(lambda: autograd_(dense.model, other.model, plain))
        for p in trained:
            p.grad = None
        training: list[float] = []
        fresh = cut()
        whole = timed(lambda: training.append(tune(fresh, tokens)))  # noqa: B023
        rows.append(
            {
                "matrix_rate_gflops": rate / 1e9,
                "floor_ms_per_token": 1e3 * sum(parts.values()) / rate,
                "tuning_ms_per_token": 1e3 * training[0] / tokens.numel(),
                "with_scoring_ms_per_token": 1e3 * whole["seconds"] / tokens.numel(),
                "with_scoring_cpu_ms_per_token": 1e3 * whole["cpu_seconds"] / tokens.numel(),
                "plain_ms_per_token": 1e3 * by_plain["seconds"] / plain.numel(),
                "plain_cpu_ms_per_token": 1e3 * by_plain["cpu_seconds"] / plain.numel(),
            }
        )
        print(rows[-1], flush=True)
    fresh = cut()
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    finish(
        args.out,
        model,
        __doc__.splitlines()[0],
        rows,
        segment=args.segment,
        data=args.data,
        tokens=tokens.numel(),
        window=args.window,
        batch_tokens=args.batch_tokens,
        operations_per_token=parts,
        median=median,
        tokens_per_second=1e3 / median["tuning_ms_per_token"],
        over_floor=statistics.median(r["tuning_ms_per_token"] / r["floor_ms_per_token"] for r in rows),
        plain_over_tuning=statistics.median(r["plain_ms_per_token"] / r["tuning_ms_per_token"] for r in rows),
        profile=where_time_goes(lambda: tune(fresh, tokens[: args.batch_tokens // args.window])),
    )


if __name__ == "__main__":
    main()
