"""Prompts that ask for a key hidden in long text, or for one of many values by its key: at any depth, of any length.

The first is the passkey retrieval task of Mohtashami and Jaggi (2305.16300), with words and filler of layercut's own.
The second is harder: all entries of the list look alike, and only the right key tells. Long context is what depth
pruning may spoil unseen: perplexity averages over tokens that need no distant ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from layercut.data.chat_templates import prompt_ids
from layercut.data.probe_families import JUDGING

Trial = tuple[int, float, list[int], str]
"""Length in tokens at most, depth, token ids of the prompt, and what the reply should hold."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 2
ANSWER = 8  # new tokens: enough for five digits, one a token, with a blank before them
FILLER = (
    "The bakery on the corner opens before sunrise.", "A tram rattles past the old town hall.",
    "Rain has been falling on the harbour since noon.", "The gardener waters the tomatoes in the evening.",
    "Two children are flying a kite on the beach.", "The library closes early on Fridays.",
    "A cat sleeps on the warm roof of the garage.", "The train to the mountains leaves from platform four.",
    "Fresh snow covers the path behind the school.", "The market sells apples, honey and cheese.",
    "An orchestra is rehearsing in the great hall.", "The ferry crosses the river every half hour.",
    "Somebody left an umbrella in the waiting room.", "The clock on the tower is a few minutes slow.",
    "Swallows build their nests under the bridge.", "The museum shows maps of forgotten islands.",
)  # fmt: skip


def passkey(tokenizer: Any, length: int, depth: float, draw: random.Random) -> tuple[list[int], str] | None:
    """A prompt with a key hidden in it, filled up as far as whole sentences go; None: too short for any."""
    key = f"{draw.randrange(10_000, 100_000)}"

    def render(sentences: list[str]) -> list[int]:
        at = round(depth * len(sentences))
        needle = f"The pass key is {key}. Remember it: {key} is the pass key."
        text = " ".join([*sentences[:at], needle, *sentences[at:]])
        told = f"A pass key is hidden in the text below. Find it and remember it.\n\n{text}\n\n"
        return prompt_ids(tokenizer, f"{told}What is the pass key that the text mentions?", "The pass key is")

    room = length - len(render([]))
    if room < 0:
        return None
    per_sentence = max(1, min(len(tokenizer(" " + s, add_special_tokens=False).input_ids) for s in FILLER))
    sentences = [draw.choice(FILLER) for _ in range(room // per_sentence)]
    return render(sentences[: _most(lambda count: len(render(sentences[:count])) <= length, 0, len(sentences))]), key


def key_value(tokenizer: Any, length: int, depth: float, draw: random.Random) -> tuple[list[int], str] | None:
    """A list of as many entries as fit, one of which is asked for."""
    keys = [(name, thing) for name in JUDGING.people for thing in JUDGING.things]
    draw.shuffle(keys)
    values = draw.sample(range(10_000, 100_000), len(keys))
    entries = [f"{n} keeps the {t} under number {v}." for (n, t), v in zip(keys, values, strict=True)]

    def render(count: int) -> tuple[list[int], str]:
        at = round(depth * (count - 1))
        name, thing = keys[at]
        head = "Below is a register of who keeps what, with the number of each entry."
        text = "\n".join([head, "", *entries[:count], "", f"Under which number does {name} keep the {thing}?"])
        return prompt_ids(tokenizer, text, f"{name} keeps the {thing} under number"), str(values[at])

    most = _most(lambda count: len(render(count)[0]) <= length, 1, len(entries))
    ids, value = render(most)
    return (ids, value) if len(ids) <= length and most > 1 else None


def _most(fits: Callable[[int], bool], fewest: int, most: int) -> int:
    """How many fit, by halving: tokens merge across borders, so that sizes do not add up."""
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
    return fewest


def lengths(longest: int, steps: int = 4, shortest: int = 128) -> list[int]:
    """`longest` and its halves, ascending."""
    return sorted({longest >> i for i in range(steps) if longest >> i >= shortest} or {longest})


def trials(
    make: Callable[[Any, int, float, random.Random], tuple[list[int], str] | None],
    tokenizer: Any,
    longest: int,
    seed: int,
    each: int = TRIALS,
) -> list[Trial]:
    """`each` prompts by `passkey` or `key_value` of every length and depth; the same for every model of a tokenizer."""
    draw, found = random.Random(seed), list[Trial]()
    for length in lengths(longest):
        for depth in DEPTHS:
            for _ in range(each):
                if made := make(tokenizer, length - ANSWER, depth, draw):
                    found.append((length, depth, *made))
    return found
