"""How fast and how large: prefill and decode speed, cache bytes, peak memory. Dense and compressed in one run."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from layercut.models.decoder_stack import as_just_loaded, parameter_bytes, positions, stored_dtype

PROMPT, DECODE, REPEATS = 512, 24, 5
"""Of `speed`: tokens of the prompt, single-token steps after it, and rounds beside the one that warms up. Of fewer
positions the first two are fewer."""


@dataclass(frozen=True)
class Seconds:
    """What one phase took, or what clocks say at one moment."""

    wall: float
    cpu: float  # processor time of this process: other processes hardly disturb it. Says nothing of an accelerator

    def since(self, earlier: Seconds) -> Seconds:
        """The difference; never 0, which nothing could be divided by."""
        return Seconds(max(self.wall - earlier.wall, 1e-9), max(self.cpu - earlier.cpu, 1e-9))


@torch.no_grad()
def speed(
    dense: Any, compressed: Any, *, prompt: int | None = None, decode: int | None = None, repeats: int = REPEATS
) -> dict[str, Any]:
    """Tokens per second of both models, interleaved so that a noisy machine is noisy for both; medians.

    Of each phase: "ratio" is the median of the repeats' own ratios, "cpu_ratio" the same of processor time; "ideal" is
    1 / (1 - r), r the share of layers removed, which embedding, head and the work around a token keep out of reach.
    """
    known = positions(dense.config) or PROMPT + DECODE + 1
    decode = min(DECODE, max(1, known // 4)) if decode is None else decode
    prompt = max(1, min(PROMPT, known - decode - 1)) if prompt is None else prompt
    both, found = {"dense": dense, "compressed": compressed}, dict[str, Any]()
    # the first round warms up and does not count
    rounds = [[time_once(model, prompt, decode) for model in both.values()] for _ in range(repeats + 1)][1:]
    had, has = (model.config.get_text_config().num_hidden_layers for model in both.values())
    for phase, tokens in (("prefill", prompt), ("decode", decode)):
        pairs = [(before[phase], after[phase]) for before, after in rounds]
        found[phase] = {
            "dense": median(tokens / a.wall for a, _ in pairs),
            "compressed": median(tokens / b.wall for _, b in pairs),
            "ratio": median(a.wall / b.wall for a, b in pairs),
            "cpu_ratio": median(a.cpu / b.cpu for a, b in pairs),
            "ideal": had / has,
        }
    return found | {
        "prompt_tokens": prompt,
        "decode_tokens": decode,
        "repeats": repeats,
        "device": str(next(dense.parameters()).device),
        "threads": torch.get_num_threads(),
        "kv_bytes_per_token": {name: cache_bytes(model) for name, model in both.items()},
        "weight_bytes": {name: parameter_bytes(model) for name, model in both.items()},
    }


@torch.no_grad()
def time_once(model: Any, prompt: int, decode: int) -> dict[str, Seconds]:
    """For a prompt of that many tokens, and for that many single-token steps after it, in one `generate`.

    The clock is read when the first new token is there and when the last is: a difference of two generations would
    put the noise of both prefills on the steps.
    """
    marks = [Seconds(_now(model), time.process_time())]

    def token(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if ids.shape[1] in (prompt + 1, prompt + 1 + decode):
            marks.append(Seconds(_now(model), time.process_time()))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    _generate(model, prompt, 1 + decode, stopping_criteria=[token])
    begun, first, last = marks
    return {"prefill": first.since(begun), "decode": last.since(first)}


def _generate(model: Any, prompt: int, new: int, **more: Any) -> Any:
    device = next(model.parameters()).device
    tokens = torch.arange(prompt, device=device)[None] % model.config.get_text_config().vocab_size
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with as_just_loaded(model):
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), return_dict_in_generate=True, **how, **more
        )


def _now(model: Any) -> float:
    for device in {p.device for p in model.parameters()}:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return time.perf_counter()


# --- memory --------------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_bytes(model: Any) -> int:
    """Bytes the cache grows by with each token, measured on the cache itself (0 for layers that only keep a state).

    In the dtype that the model is saved in, also where it computes in a wider one.
    """
    tokens = torch.zeros(1, 12, dtype=torch.long, device=next(model.parameters()).device)
    fewer, more = (_cached(model(input_ids=tokens[:, :length], use_cache=True)) for length in (8, 12))
    return (more - fewer) // 4 * stored_dtype(model).itemsize // model.dtype.itemsize


def _cached(output: Any) -> int:
    """Bytes of all tensors of the cache that came with a model's output."""
    cache = output.cache if "cache" in output else output.past_key_values  # the deprecated name
    tensors = [t for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def long_prompt(dense: Any, compressed: Any, *, tokens: int, repeats: int = 3) -> dict[str, Any]:
    """What a long prompt costs both models: seconds of its prefill (medians, interleaved), cache bytes.

    "kv_bytes" is what the cache held after it, "kv_bytes_computed" tokens times the bytes of one. They differ where
    layers keep a window or a state.
    """
    both = {"dense": dense, "compressed": compressed}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    held: dict[str, int] = {}
    for _ in range(repeats):
        for name, model in both.items():
            begun = _now(model)
            output = _generate(model, tokens, 1)
            seconds[name].append(_now(model) - begun)
            held[name] = _cached(output)
    return {
        "tokens": tokens,
        "prefill_seconds": {name: median(taken) for name, taken in seconds.items()},
        "kv_bytes": held,
        "kv_bytes_computed": {name: tokens * cache_bytes(model) for name, model in both.items()},
    }


def peak_device_bytes(device: torch.device) -> int | None:
    """The most that tensors have taken of an accelerator in this process; None of a CPU, or where nothing counts."""
    try:
        return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
    except (RuntimeError, NotImplementedError):
        return None


def peak_rss_bytes() -> int:
    """The largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
