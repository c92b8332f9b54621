"""By which limits a run is judged: every one of them, the table that tells people, and what a verdict is.

Ground for `report/verdicts.py`, `report/survival.py` and `report/rounds.py`, which judge; the table is shown in the
report and in docs/reference.md. Apart from the arithmetic of chance, the limits are conventions and not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

CLOSE, FAIR, BROKEN_FACTOR = 1.10, 1.5, 3.0
"""Perplexity of the result over the dense model's: up to the first it is close, up to the second usable with care,
beyond the third the model is called broken."""
NEAR_BEST = 1.05
"""KL of what the search chose over that of the best segment, up to which the search is said to have found it."""
ROUNDED, ROUNDED_FAIR = 1.05, 1.25
"""Perplexity after a change of number format over that before it."""
FASTER, SLOWER = 1.02, 0.98
"""Tokens a second over the dense model's. Between them lies the noise of a short timing; a guess."""
GUESSING, FEWEST_ITEMS = 0.1, 50
"""A model that keeps less than this share of the dense model's score above chance, over at least so many items, is
called broken."""
SIGNIFICANT = 0.05
"""A task counts as changed where so uneven a split of its flipped items has less than this probability."""
GOOD_RETENTION, FAIR_RETENTION = 0.9, 0.5
"""Share of the dense model's score above chance, or of the hidden keys it finds, that is left."""
REPEATS, CIRCLES = 0.05, 0.2
"""Share of repeated 4-grams beyond the dense model's: more than the first is a warning, more than the second means
that generation did not survive."""
UNLIKELY, NONSENSE = 1.0, 2.0
"""Nats per token that the dense model gives the continuations beyond its own: likewise."""
LONG_LOSS = 0.1
"""Log-perplexity that the last positions may lose beyond what the first ones lose; more is called hurt."""

MARKS = {"good": "✓", "fair": "!", "bad": "✗", "open": "–"}
MARK_WORDS = {"good": "passed", "fair": "caution", "bad": "failed", "open": "not judged"}
"""What a mark is called where it is read aloud, and in the terminal."""


@dataclass(frozen=True)
class Verdict:
    """One stage, judged by its own numbers and the rule of its name (`RULES`)."""

    mark: str
    """good, fair, bad, or open: not known, or nothing that could be good or bad."""
    stage: str
    text: str

    @property
    def sign(self) -> str:
        return MARKS[self.mark]

    @property
    def words(self) -> str:
        """What the mark says, to be read aloud."""
        return MARK_WORDS[self.mark]


def graded(value: float, good: float, fair: float) -> str:
    """The mark of a figure of which less is better; bad where it is no number."""
    return "good" if value <= good else "fair" if value <= fair else "bad"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a verdict is which."""

    good: str
    fair: str = "never"
    bad: str = "otherwise"


_RETAINED = {
    "good": f"{GOOD_RETENTION:.0%} or more is left",
    "fair": f"{FAIR_RETENTION:.0%} or more",
    "bad": "less",
}
_HEALS = Rule(good="perplexity is lower than after the stage before", bad="it is not")
_SPEED = Rule(
    good=f"more than {FASTER:g} times the dense model's tokens a second",
    fair=f"{SLOWER:g} to {FASTER:g} times, which a short timing cannot tell from 1",
    bad="slower",
)

RULES = {
    "Result": Rule(
        good=f"perplexity at the end is at most {CLOSE:g} times the dense model's",
        fair=f"at most {FAIR:g} times",
        bad=f"above {FAIR:g} times; above {BROKEN_FACTOR:g} times, or not finite, the model is called broken",
    ),
    "Search": Rule(
        good=f"KL of the choice is at most {NEAR_BEST:g} times that of the best segment, which --oracle finds",
        bad="more",
    ),
    "Stability": Rule(good=f"any seed's choice costs at most {NEAR_BEST:g} times the best on common text", bad="more"),
    "Cut": Rule(
        good="perplexity did not rise",
        bad=f"above {BROKEN_FACTOR:g} times the dense model's, or not finite; between, it is the price before healing",
    ),
    "Rounds": Rule(good="tuning lowered the held-out loss in every round", bad="not in every round"),
    "Budgets": Rule(good="something measured is inside every budget that was given", bad="nothing is"),
    "Fold": _HEALS,
    "Tuning": _HEALS,
    "Quantization": Rule(
        good=f"perplexity is at most {ROUNDED:g} times that before it",
        fair=f"at most {ROUNDED_FAIR:g} times",
        bad="more",
    ),
    "Size": Rule(
        good="the weight files are smaller than those that came, whatever their number format",
        bad="they are not; larger and worse in perplexity as well is not to be shipped",
    ),
    "GGUF": Rule(
        good=f"smaller than what came, and perplexity of the file at most {ROUNDED:g} times that of the model",
        fair=f"at most {ROUNDED_FAIR:g} times, or not smaller",
        bad="more, or broken",
    ),
    "Prefill": _SPEED,
    "Decode": _SPEED,
    "Tasks": Rule(
        good=f"of the score above chance {_RETAINED['good']}",
        fair=_RETAINED["fair"],
        bad=f"less; less than {GUESSING:.0%} over {FEWEST_ITEMS} items or more is called broken. A task got worse by "
        f"more than chance where p < {SIGNIFICANT:g}, with no correction for several tasks",
    ),
    "Long context": Rule(
        good=f"the last positions lost at most {LONG_LOSS:g} nats more than the first, and perplexity there is at most "
        f"{CLOSE:g} times the dense model's",
        fair="the first holds, the second does not",
        bad="the last positions lost more, or are not finite",
    ),
    "Hidden keys": Rule(
        good=f"of the keys the dense model finds, {_RETAINED['good']}", fair=_RETAINED["fair"], bad="less"
    ),
    "Generation": Rule(
        good=f"4-grams repeat at most {REPEATS:.0%} points more than the dense model's, and the dense model gives the "
        f"text at most {UNLIKELY:g} nats a token more than its own",
        fair=f"at most {CIRCLES:.0%} points and {NONSENSE:g} nats more",
        bad="beyond either: generation did not survive",
    ),
}  # fmt: skip
"""By the name of what is judged. Where the dense model itself shows nothing, or a figure is missing, none applies."""


def table() -> str:
    """The rules as a Markdown table, for docs/reference.md."""
    head = ["judged", *(f"{MARKS[mark]} {MARK_WORDS[mark]}" for mark in ("good", "fair", "bad"))]
    rows = [head, ["---"] * len(head), *([name, rule.good, rule.fair, rule.bad] for name, rule in RULES.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
