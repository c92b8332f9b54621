"""What llama.cpp takes from an architecture's name, a layer's index and the number of layers, and what a file can say.

llama.cpp distinguishes layers by tensors, by arrays in the metadata and by rules in its own source; a cut may break the
last. This is the table of those rules, by llama.cpp's load_hparams, b11739: entries marked "compared" were held against
transformers' logits past the sliding window with tiny random models, the others are by reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

PATTERN = "attention.sliding_window_pattern"
NEEDS_BUILD = "b11739 (2026-11)"  # the oldest build seen to read the array `PATTERN`; older ones were not tested


@dataclass(frozen=True)
class Period:
    """Of every `every` layers the last one attends to everything (and has or lacks rotary positions accordingly)."""

    every: int
    array: bool = False  # whether an array of bools under `PATTERN` (true: sliding) is read instead
    window_only: bool = False  # whether that holds only in files with a sliding window


PERIODS = {
    "gemma2": Period(2, array=True),  # compared
    "gemma3": Period(6, array=True),  # compared
    "cohere2": Period(4, array=True),  # compared
    "gpt-oss": Period(2, array=True),  # compared: read, but a tiny model stays 4 to 20 % off, the uncut one as well
    "olmo2": Period(4, array=True, window_only=True),  # compared, as OLMo 3
    "exaone4": Period(4, window_only=True),
    "smollm3": Period(4),  # compared: no key is read
    "gemma3n": Period(5), "llama4": Period(4), "exaone-moe": Period(4), "plamo3": Period(8), "afmoe": Period(4),
    "gemma-embedding": Period(6), "mellum": Period(4), "step35": Period(4),
}  # fmt: skip

PERIOD_KEYS = ("full_attention_interval", "interleave_moe_layer_step", "moe_every_n_layers")
"""Metadata numbers with the same meaning."""
INTERVAL_OF_4 = frozenset({"qwen3next", "qwen35", "qwen35moe"})
"""Architectures whose full_attention_interval is 4 where the file does not say."""


@dataclass(frozen=True)
class Counted:
    """What llama.cpp does at some numbers of layers and at no others."""

    at: range | frozenset[int]
    does: str
    unless: str = ""  # a metadata key that overrides the rule


COUNTED = {
    "gemma2": [Counted(frozenset({46}), "scales attention by the width over the heads instead of the head's width")],
    "gemma3": [Counted(frozenset({62}), "scales attention by the width over the heads instead of the head's width")],
    "exaone4": [Counted(frozenset({64}), "applies the sliding window")],  # compared: at 8 layers it does not
    "baichuan": [
        Counted(frozenset({32}), "applies rotary positions"),
        Counted(frozenset({40}), "applies ALiBi"),
    ],
    "command-r": [Counted(range(64, 1 << 31), "normalizes queries and keys")],
    "deepseek2": [
        Counted(frozenset({26, 27}), "takes queries that are not compressed"),
        Counted(frozenset({47, 48}), "may choose experts by a sigmoid", unless="expert_gating_func"),
    ],
}  # fmt: skip
SCALED_BY_COUNT = {"minicpm3": "scales its residuals by the number of layers"}


DEFAULTS: dict[str, dict[str, Callable[[int], float]]] = {
    "minicpm": {"residual_scale": lambda layers: 1.4 / math.sqrt(layers)}
}
"""Numbers that llama.cpp computes from the number of layers where the file does not give them."""

UNIFORM = frozenset({
    "llama", "llama-embed", "deci", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl",
    "qwen3vlmoe", "phi2", "phi3", "phimoe", "gpt2", "gptj", "gptneox", "falcon", "bloom", "mpt", "starcoder",
    "starcoder2", "stablelm", "olmo", "olmoe", "gemma", "granite", "granitemoe", "granitehybrid", "command-r",
    "deepseek", "deepseek2", "glm4", "glm4moe", "chatglm", "internlm2", "mistral3", "nemotron", "nemotron_h",
    "minicpm", "minicpm3", "bitnet", "refact", "xverse", "baichuan", "codeshell", "orion", "arctic", "exaone",
    "jais", "ernie4_5", "ernie4_5-moe", "hunyuan-dense", "hunyuan-moe", "dots1", "seed_oss", "apertus", "arcee",
    "lfm2", "lfm2moe", "falcon-h1", "mamba", "mamba2", "jamba", "dbrx", "grok", "plamo", "openelm", "dream",
    "llada", "bailingmoe", "bailingmoe2", "qwen3next", "qwen35", "qwen35moe", "minimax-m2", "mimo2",
    "kimi-linear",
})  # fmt: skip
"""Architectures whose layers differ only as their tensors, arrays in the metadata or the tables above say."""


def known(architecture: str) -> bool:
    """Whether this table has all that distinguishes the layers of an architecture."""
    return architecture in PERIODS or architecture in UNIFORM


def broken_by_count(architecture: str, facts: dict[str, Any], before: int, after: int) -> str:
    """What a change of the number of layers would change in llama.cpp, in words."""
    if architecture in SCALED_BY_COUNT and before != after:
        return f"llama.cpp {SCALED_BY_COUNT[architecture]}"
    for rule in COUNTED.get(architecture, ()):
        if rule.unless not in facts and (before in rule.at) != (after in rule.at):
            those = f"{rule.at.start} or more" if isinstance(rule.at, range) else " or ".join(map(str, sorted(rule.at)))
            return f"llama.cpp {rule.does} in {architecture} of {those} layers only, and {before} would become {after}"
    return ""


def full_layers(architecture: str, facts: dict[str, Any], layers: int) -> list[bool] | None:
    """Which layers attend to everything, as llama.cpp makes them of a file's metadata.

    The sliding window of EXAONE 4 is not applied but at 64 layers, whatever the file says.
    """
    pattern, rule = facts.get(PATTERN), PERIODS.get(architecture)
    if rule and rule.window_only and not facts.get("attention.sliding_window"):
        return None
    if architecture == "exaone4" and layers != 64:
        return None
    if isinstance(pattern, list) and (rule is None or rule.array):
        return [not sliding for sliding in pattern[:layers]]
    every = pattern if _is_number(pattern) else rule.every if rule else facts.get("full_attention_interval")
    if every is None and architecture in INTERVAL_OF_4:
        every = 4
    if isinstance(every, int) and every > 1:
        return [i % every == every - 1 for i in range(layers)]
    heads = facts.get("attention.head_count_kv")
    if isinstance(heads, list) and 0 in heads:
        return [count > 0 for count in heads[:layers]]
    return None


def periods(architecture: str, facts: dict[str, Any]) -> list[tuple[int, str]]:
    """Periods by which llama.cpp distinguishes layers, where no array overrides them, and in words."""
    pattern, rule = facts.get(PATTERN), PERIODS.get(architecture)
    found: list[tuple[int, str]] = []
    if _is_number(pattern) and pattern > 1:
        found.append((pattern, " differently (sliding_window_pattern)"))
    elif (
        rule
        and not (rule.window_only and "attention.sliding_window" not in facts)
        and not (rule.array and isinstance(pattern, list))
    ):
        found.append((rule.every, f" of {architecture} differently"))
    given = [(facts.get(key), f" differently ({key})") for key in PERIOD_KEYS]
    found += [(every, how) for every, how in given if _is_number(every) and every > 1]
    if architecture in INTERVAL_OF_4 and "full_attention_interval" not in facts:
        found.append((4, f" of {architecture} differently"))
    return [(every, f"llama.cpp treats every {ordinal(every)} layer{how}") for every, how in found]


def off_period(period: int, kept: Sequence[int]) -> list[int]:
    """The kept layers whose new index the period makes another kind of layer."""
    return [i for new, i in enumerate(kept) if (i % period == period - 1) != (new % period == period - 1)]


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    last = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{last}"


def attention_scale(architecture: str, width: int, heads: int, head_width: int, layers: int) -> float | None:
    """The number whose inverse root llama.cpp scales attention by, where it differs from the head's width by a rule."""
    if architecture not in ("gemma2", "gemma3"):
        return None
    return width / heads if any(layers in rule.at for rule in COUNTED[architecture]) else head_width


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
