"""What `--probes` measures: keys hidden in long text, values in lists as long, and tests of every capability.

The same for every model of a tokenizer. Keys (`passkey.py`) and values (`key_values.py`) are asked for in free text and
found by greedy decoding; the tests (`capabilities.py`) are of the judging family, on which nothing is searched or
tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layercut.data.probes import ProbeRows, probe_rows
from layercut.evaluation.capabilities import CapabilityFigures, capability_figures
from layercut.evaluation.key_values import key_value_cases
from layercut.evaluation.passkey import TRIALS, cases, passkey_grid
from layercut.models.decoder_stack import positions
from layercut.progress import say

LONGEST_PROBE, TEST_ROWS, TEST_WINDOW = 1024, 16, 256
"""Tokens of the longest prompts; rows of tests of all capabilities, and tokens in one."""
Grid = list[dict[str, Any]]
"""[{"length", "depth", "found", "trials"}, …]."""


@dataclass(frozen=True)
class Probes:
    """What is asked of each model."""

    keys: list[tuple[int, float, list[int], str]]
    lists: list[tuple[int, float, list[int], str]]
    tests: ProbeRows
    longest: int

    @property
    def prompt_tokens(self) -> int:
        """In the prompts with keys and lists."""
        return sum(len(trial[2]) for trial in (*self.keys, *self.lists))

    @property
    def tokens(self) -> int:
        """In all prompts and tests."""
        return self.prompt_tokens + self.tests.tokens.numel()


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a model made of them."""

    keys: Grid
    lists: Grid
    capabilities: dict[str, Any] | None
    """`CapabilityFigures.to_dict()`; None where no test fits a row."""


def longest_probe(config: Any, longest: int = LONGEST_PROBE) -> int:
    """Tokens of the longest prompts that a model's positions hold."""
    return min(longest, positions(config) or longest)


def probes_for(
    tokenizer: Any, config: Any, *, longest: int = LONGEST_PROBE, seed: int = 0, trials: int = TRIALS
) -> Probes:
    """The prompts and tests for all models of a tokenizer."""
    longest = longest_probe(config, longest)
    window = min(TEST_WINDOW, longest)
    tests = probe_rows(tokenizer, rows=TEST_ROWS, window=window, family="judging", seed=seed)
    keys, lists = (make(tokenizer, longest, seed, trials) for make in (cases, key_value_cases))
    for what, found in (("keys", keys), ("lists", lists)):
        if not found:
            say("probes", f"no prompt of {what} fits {longest} tokens: not asked for")
    return Probes(keys, lists, tests, longest)


def probed(
    model: Any, dense: Any, tokenizer: Any, probes: Probes, *, advance: Callable[[int], None] = lambda tokens: None
) -> Probed:
    """What a model makes of the probes."""
    keys, lists = found_in_text(model, tokenizer, probes, advance=advance)
    figures: CapabilityFigures | None = None
    if probes.tests.names:
        window = probes.tests.tokens.shape[1]
        figures = capability_figures(model, dense, probes.tests, advance=lambda rows: advance(rows * window))
    return Probed(keys=keys, lists=lists, capabilities=figures.to_dict() if figures else None)


def found_in_text(
    model: Any, tokenizer: Any, probes: Probes, *, advance: Callable[[int], None] = lambda tokens: None
) -> tuple[Grid, Grid]:
    """The keys and the values that greedy decoding finds."""
    keys, lists = (passkey_grid(model, tokenizer, each, advance=advance) for each in (probes.keys, probes.lists))
    return keys, lists


def found_of(grid: Grid) -> tuple[int, int]:
    """How many were found of how many, over all lengths and depths."""
    return sum(cell["found"] for cell in grid), sum(cell["trials"] for cell in grid)
