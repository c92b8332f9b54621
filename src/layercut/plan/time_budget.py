"""How much healing fits a time: tokens to tune on, and the effort of the search, by what a run with them would take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from layercut.config.commands import CompressConfig
from layercut.errors import ConfigError
from layercut.files import parse_time
from layercut.progress import duration

FEWEST, MOST, STEP = 16384, 2**24, 8192
"""Tokens to tune on, and in what steps. The most is four times the longest run measured (research/healing.md)."""
CHOOSING = 0.25
"""Share of the time that a high effort may take more than a normal one. A guess."""
ON_ACCELERATOR = "1h"
"""The time of a run on an accelerator that names neither a time nor tokens."""
Seconds = Callable[[CompressConfig], float]
"""What a run takes."""


def fitted(asked: CompressConfig, seconds: Seconds) -> CompressConfig:
    """The run with the most tokens that ends in its time; with a high effort where healing keeps most of the time.

    Tokens and effort that are given stay. ConfigError: the time is too short for the fewest tokens.
    """
    time, heal = str(asked.heal.time), asked.heal
    limit = parse_time("--time", time)

    def with_effort(effort: Any) -> CompressConfig:
        def run(tokens: int) -> CompressConfig:
            search = replace(asked.search, effort=effort)
            return replace(asked, search=search, heal=replace(heal, tune_tokens=tokens))

        if heal.tune_tokens is not None:
            return run(heal.tune_tokens)
        low, high = FEWEST // STEP, MOST // STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if seconds(run(middle * STEP)) <= limit else (low, middle - 1)
        return run(low * STEP)

    plain = with_effort(asked.search.effort or "normal")
    if heal.tune_tokens is None and (least := seconds(plain)) > limit:
        words = f"--time {time} is too short: tuned on {FEWEST:,} tokens, a run takes some {duration(least)} here"
        raise ConfigError(words, f"allowed is --time {math.ceil(least / 60)}m or more, or name --tune-tokens")
    if asked.search.effort:
        return plain
    high = with_effort("high")
    with_plain_tokens = replace(plain, search=high.search)
    fits = seconds(high) <= limit and seconds(with_plain_tokens) - seconds(plain) <= CHOOSING * limit
    return high if fits else plain


def describe_fitted(run: CompressConfig, seconds: float) -> str:
    """The line that says what was decided."""
    heal = run.heal
    trained = {"endpoints": f"radius {heal.radius}", "all": "all layers", "lora": "LoRA"}[heal.train]
    how = f"{heal.tokens:,} tokens, {trained}, effort {run.search.effort}"
    return f"{heal.time} on this machine: {how}; planned {duration(seconds)}"
