"""Claim: the gate finds the oracle's segment for less than the sweep costs.

    python benchmarks/search.py --data TEXT [--ratios 0.1 0.2 …] [--seeds 3] [--tokens 4096]

Regret is the calibration KL of the gate's segment over that of the best segment; cost is counted in layers applied
to a row of tokens (a backward through frozen weights counted as it was measured in the same run) and in seconds.
"""

from __future__ import annotations

import statistics
import time

import torch

from common import arguments, blocks, finish, open_model
from layercut.search import find_segments, regret
from layercut.segments import layers_to_remove
from layercut.sweep import Stack


def backward_cost(stack: Stack, tokens: torch.Tensor, repeats: int = 5) -> float:
    """Seconds of a backward through a frozen layer over seconds of its forward; median."""
    hidden, calls = stack.enter(tokens)
    middle, ratios = len(stack) // 2, []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        with torch.no_grad():
            stack.layer(middle, hidden, calls)
        forward = time.perf_counter() - begun
        leaf = hidden.detach().requires_grad_(True)
        out = stack.layer(middle, leaf, calls)
        begun = time.perf_counter()
        out.backward(torch.ones_like(out))
        ratios.append((time.perf_counter() - begun) / forward)
    return statistics.median(ratios[1:])


def main() -> None:
    args = arguments(__doc__, data="python-docstrings", ratios=[0.1, 0.2, 0.3, 0.4], seeds=3, tokens=4096, window=128)
    model = open_model(args.model)
    stack = Stack(model.model)
    rows = []
    for ratio in args.ratios:
        for seed in range(args.seeds):
            text = blocks(model, args.data, args.tokens, args.window, seed)
            length = layers_to_remove(ratio, len(stack))
            row = {"ratio": ratio, "length": length, "seed": seed, "fingerprint": text.fingerprint}
            results = {}
            for method in ("exhaustive", "clp"):
                begun = time.perf_counter()
                found = results[method] = find_segments(stack, text.tokens, length, method, seed=seed)
                row[method] = {
                    "segment": str(found.segments[0]),
                    "kl": found.candidates[0].kl,
                    "layer_forwards": found.cost.layer_forwards,
                    "layer_backwards": found.cost.layer_backwards,
                    "seconds": time.perf_counter() - begun,
                }
            row["regret"] = regret(results["clp"], results["exhaustive"])
            row["brute_force_layer_forwards"] = len(text.tokens) * (len(stack) - length + 1) * (len(stack) - length)
            rows.append(row)
            print(row, flush=True)
    regrets = [row["regret"] for row in rows]
    finish(
        args.out,
        model,
        __doc__.splitlines()[0],
        rows,
        data=args.data,
        tokens=args.tokens,
        window=args.window,
        regret={"median": statistics.median(regrets), "worst": max(regrets)},
        backward_over_forward=backward_cost(stack, text.tokens[:4]),
    )


if __name__ == "__main__":
    main()
