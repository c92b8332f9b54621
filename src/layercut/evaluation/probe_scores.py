"""What a model makes of probes: generated tests of each capability, keys in long text, values in long lists.

Beside perplexity, which does not show it: a model may lose every key hidden in its context at a loss of text that looks
like any other cut's (research/what-survives.md). Tests go through both models once, and greedy decoding answers what is
asked for in free text. They are the same for every model of a tokenizer, and of the judging family, on which nothing is
searched or tuned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercut.data.probes import ProbeRows, probe_rows
from layercut.data.retrieval import ANSWER, TRIALS, Trial, key_value, passkey, trials
from layercut.evaluation.generation import greedy, padding
from layercut.models.decoder_stack import positions
from layercut.models.losses import as_price, kl_divergence
from layercut.models.memory import slices
from layercut.models.runner import prepared
from layercut.progress import say

ROWS = 4
"""Rows of tests in one forward pass."""
LONGEST_PROBE, TEST_ROWS, TEST_WINDOW = 1024, 16, 256
"""Tokens of the longest prompts; rows of tests of all capabilities, and tokens in one."""
Grid = list[dict[str, Any]]
"""[{"length", "depth", "found", "trials"}, …]."""
NUMBER = re.compile(r"(?<!\w)(\d{1,3}(?:[,.'’ \u00a0\u202f]\d{3})+|\d(?: \d)+)(?!\w)|\w*\d\w*(?:\.\d+)?")
"""12345 and 12,345, and the digits that some tokenizers part by blanks; A12345 and 12345.6 are words of their own."""
DENIAL = re.compile(r"\b(?:not|never)\b|n't\b", re.IGNORECASE)
Advance = Callable[[int], None]


@dataclass(frozen=True)
class CapabilityFigures:
    """Of each capability: what the cut did to it."""

    damage: dict[str, float]
    """KL(dense || cut), mean over the answers' tokens, in nats: the distance to the dense model, good or bad."""
    hits: dict[str, float]
    """Share of the answers that the cut model's greedy decoding gives."""
    dense_hits: dict[str, float]
    """The same of the dense model."""
    answers: dict[str, int]
    """How many answers that is."""
    loss: dict[str, float] = field(default_factory=dict)
    """What the right answers cost the cut model, -log p of their tokens, mean, in nats: lower is better."""
    dense_loss: dict[str, float] = field(default_factory=dict)
    """The same of the dense model."""

    def to_dict(self) -> dict[str, Any]:
        """{"damage", "hits", "dense_hits", "answers", "loss", "dense_loss"}, each by capability."""
        return {name: dict(value) for name, value in vars(self).items()}


@torch.no_grad()
def capability_figures(
    model: Any, dense: Any, probes: ProbeRows, *, advance: Advance = lambda rows: None
) -> CapabilityFigures:
    """KL, hit rates and losses of a model beside the dense one's, on the same rows of probes.

    Args:
        model: a causal LM of transformers, or a `DecoderRunner` of one.
        dense: the model that it came from.
        probes: what is tested.
        advance: told the rows that are done.

    Returns:
        The figures, by capability.
    """
    kl = torch.zeros(probes.tokens.shape, dtype=torch.float64)
    loss, right = (torch.zeros(2, *probes.tokens.shape, dtype=dtype) for dtype in (torch.float64, torch.bool))
    with prepared(model, dense) as stacks:
        for part in (queue := stacks[0].parts("evaluate", slices(len(probes.tokens), ROWS))):
            with queue.trying(part):
                tokens = probes.tokens[part]
                ends = [stack.last(tokens) for stack in stacks]
                for row, number in enumerate(range(part.start, part.stop)):
                    at = (probes.answers[number] >= 0).nonzero()[:, 0]
                    if not len(at):
                        continue
                    shown, wanted = tokens[row : row + 1, at], tokens[row, at + 1]
                    both = [
                        stack.exit(h[row : row + 1, at.to(h.device)], shown)[0].float()
                        for stack, h in zip(stacks, ends, strict=True)
                    ]
                    kl[number, at] = kl_divergence(both[1], both[0]).cpu().double()
                    for i, logits in enumerate(both):
                        nll = cross_entropy(logits, wanted.to(logits.device), reduction="none")
                        loss[i, number, at] = nll.cpu().double()
                        right[i, number, at] = probes.right(number, logits.argmax(-1))
                advance(part.stop - part.start)
    counts = torch.bincount(probes.capability, minlength=len(probes.names)).tolist()
    apart, *losses = ({name: as_price(mean, 0.0) for name, mean in probes.means(x).items()} for x in (kl, *loss))
    answers = dict(zip(probes.names, counts, strict=True))
    return CapabilityFigures(apart, probes.hit_rates(right[0]), probes.hit_rates(right[1]), answers, *losses)


@torch.no_grad()
def retrieval_grid(
    model: Any, tokenizer: Any, asked: Sequence[Trial], *, advance: Advance = lambda tokens: None
) -> Grid:
    """How often the model's greedy reply gives what a prompt asks for, by length and depth."""
    grid: dict[tuple[int, float], list[bool]] = {}
    for length, depth, ids, key in asked:
        reply = tokenizer.decode(greedy(model, torch.tensor([ids]), ANSWER, padding(tokenizer))[0])
        grid.setdefault((length, depth), []).append(first_answer(reply) == key)
        advance(len(ids))
    return [
        {"length": length, "depth": depth, "found": sum(hits), "trials": len(hits)}
        for (length, depth), hits in grid.items()
    ]


def first_answer(reply: str) -> str:
    """The first whole number of a reply without its separators of thousands, or the first word where it has none.

    Nothing where the reply denies it ("not 12345, it is 99999").
    """
    number = NUMBER.search(reply)
    if number is None:
        return next(iter(re.findall(r"\w+", reply)), "")
    return "" if DENIAL.search(reply[: number.start()]) else re.sub(r"\W", "", number[1]) if number[1] else number[0]


def found_of(grid: Grid) -> tuple[int, int]:
    """How many were found of how many, over all lengths and depths."""
    return sum(cell["found"] for cell in grid), sum(cell["trials"] for cell in grid)


# --- what `--probes` measures --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probes:
    """What is asked of each model."""

    keys: list[Trial]
    lists: list[Trial]
    tests: ProbeRows
    longest: int
    """Tokens of the longest prompts."""

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


def probes_for(
    tokenizer: Any, config: Any, *, longest: int = LONGEST_PROBE, seed: int = 0, each: int = TRIALS
) -> Probes:
    """The prompts and tests for all models of a tokenizer, no longer than the model has positions for."""
    longest = min(longest, positions(config) or longest)
    tests = probe_rows(tokenizer, rows=TEST_ROWS, window=min(TEST_WINDOW, longest), family="judging", seed=seed)
    keys, lists = (trials(make, tokenizer, longest, seed, each) for make in (passkey, key_value))
    for what, found in (("keys", keys), ("lists", lists)):
        if not found:
            say("probes", f"no prompt of {what} fits {longest} tokens: not asked for")
    return Probes(keys, lists, tests, longest)


def probed(model: Any, dense: Any, tokenizer: Any, probes: Probes, *, advance: Advance = lambda tokens: None) -> Probed:
    """What a model makes of the probes."""
    keys, lists = (retrieval_grid(model, tokenizer, asked, advance=advance) for asked in (probes.keys, probes.lists))
    figures, window = None, probes.tests.tokens.shape[1]
    if probes.tests.names:
        figures = capability_figures(model, dense, probes.tests, advance=lambda rows: advance(rows * window)).to_dict()
    return Probed(keys=keys, lists=lists, capabilities=figures)
