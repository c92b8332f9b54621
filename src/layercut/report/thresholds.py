"""By which limits a run is judged: every one of them, and the table that tells people.

`report/verdicts.py` judges by them; the words of the table are in templates/rules.txt, and it is shown in the report
and in docs/reference.md. Apart from the arithmetic of chance, the limits are conventions and not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from layercut.report.templating import lines

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
"""Share of the dense model's score above chance, or of the keys, values and answers it finds, that is left."""
REPEATS, CIRCLES = 0.05, 0.2
"""Share of repeated 4-grams beyond the dense model's: more than the first is a warning, more than the second means
that generation did not survive."""
UNLIKELY, NONSENSE = 1.0, 2.0
"""Nats per token that the dense model gives the continuations beyond its own: likewise."""
SHORT_REPLIES = 0.5
"""Of the tokens of the dense model's replies: less is a warning."""
LONG_LOSS = 0.1
"""Log-perplexity that the last positions may lose beyond what the first ones lose; more is called hurt."""

MARKS = {"good": "✓", "fair": "!", "bad": "✗", "open": "–"}
MARK_WORDS = {"good": "passed", "fair": "caution", "bad": "failed", "open": "not judged"}
"""What a mark is called where it is read aloud, and in the terminal."""


@dataclass(frozen=True)
class Rule:
    """When what is named is judged good, fair or bad, in words."""

    name: str
    good: str
    fair: str
    bad: str


def rules() -> list[Rule]:
    """Those of all verdicts. Where the dense model itself shows nothing, or a figure is missing, none applies."""
    limits = {name: value for name, value in globals().items() if name.isupper()}
    return [Rule(*cells) for cells in lines("rules.txt", **limits)]


def table() -> str:
    """The rules as a Markdown table, for docs/reference.md."""
    head = ["judged", *(f"{MARKS[mark]} {MARK_WORDS[mark]}" for mark in ("good", "fair", "bad"))]
    rows = [head, ["---"] * len(head), *([rule.name, rule.good, rule.fair, rule.bad] for rule in rules())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
