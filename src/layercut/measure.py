"""How fast and how large: prefill and decode speed, cache bytes, peak memory. Dense and compressed in one run."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import torch


@torch.no_grad()
def speed(
    dense: Any, compressed: Any, *, prompt: int = 512, decode: int = 24, repeats: int = 5
) -> dict[str, Any]:
    """Tokens per second of both models, interleaved so that a noisy machine is noisy for both; medians.

    "ratio" is the median of the repeats' own ratios; "ideal" is 1 / (1 - r), r the share of layers removed.
    """
    layers = [_layers(model) for model in (dense, compressed)]
    times: dict[str, list[list[float]]] = {"prefill": [[], []], "decode": [[], []]}
    for repeat in range(-1, repeats):  # the first round warms up and does not count
        for which, model in enumerate((dense, compressed)):
            prefill, step = _time_once(model, prompt, decode)
            if repeat >= 0:
                times["prefill"][which].append(prompt / prefill)
                times["decode"][which].append(decode / step)
    result: dict[str, Any] = {}
    for name, (slow, fast) in times.items():
        result[name] = {
            "dense": statistics.median(slow),
            "compressed": statistics.median(fast),
            "ratio": statistics.median(f / s for s, f in zip(slow, fast, strict=True)),
            "ideal": layers[0] / layers[1],
        }
    device = next(dense.parameters()).device
    return result | {
        "prompt_tokens": prompt,
        "decode_tokens": decode,
        "repeats": repeats,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "kv_bytes_per_token": {"dense": cache_bytes(dense), "compressed": cache_bytes(compressed)},
    }


def _layers(model: Any) -> int:
    return model.config.get_text_config().num_hidden_layers


def _time_once(model: Any, prompt: int, decode: int) -> tuple[float, float]:
    """Seconds for a prompt of that many tokens, and for that many single-token steps after it, by `generate`."""
    device = next(model.parameters()).device
    tokens = torch.arange(prompt, device=device)[None] % model.config.get_text_config().vocab_size
    settings = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}
    marks = [_now(device)]
    for new in (1, 1 + decode):
        model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **settings)
        marks.append(_now(device))
    prefill, both = marks[1] - marks[0], marks[2] - marks[1]
    return prefill, max(both - prefill, 1e-9)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def cache_bytes(model: Any) -> int:
    """Bytes the cache grows by with each token, measured on the cache itself (0 for layers that only keep a state)."""
    device = next(model.parameters()).device

    def held(length: int) -> int:
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        output = model(input_ids=tokens, use_cache=True)
        cache = output.cache if "cache" in output else output.past_key_values
        tensors = [t for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in tensors)

    return (held(12) - held(8)) // 4


def peak_rss_bytes() -> int:
    """The largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
