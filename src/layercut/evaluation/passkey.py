"""A key hidden in long text: whether the model can still retrieve it, from any depth, at any length.

After the passkey retrieval task of Mohtashami and Jaggi (2305.16300), with words and filler of layercut's own. Long
context is what depth pruning may spoil unseen: perplexity averages over tokens that need no distant ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layercut.evaluation.generation import greedy, padding, prompt_ids

MakePrompt = Callable[[Any, int, float, random.Random], tuple[list[int], str] | None]
"""(tokenizer, tokens at most, depth, draw) -> token ids and what the reply should hold, or None: too short for any."""
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
TASK = "A pass key is hidden in the text below. Find it and remember it."
QUESTION = "What is the pass key that the text mentions?"
REPLY = "The pass key is"


def prompt(tokenizer: Any, length: int, depth: float, draw: random.Random) -> tuple[list[int], str] | None:
    """A prompt with a key hidden in it, filled up as far as whole sentences go."""
    key = f"{draw.randrange(10_000, 100_000)}"
    needle = f"The pass key is {key}. Remember it: {key} is the pass key."

    def render(sentences: Sequence[str]) -> list[int]:
        at = round(depth * len(sentences))
        text = " ".join([*sentences[:at], needle, *sentences[at:]])
        return prompt_ids(tokenizer, f"{TASK}\n\n{text}\n\n{QUESTION}", REPLY)

    room = length - len(render([]))
    if room < 0:
        return None
    per_sentence = max(1, min(len(tokenizer(" " + s, add_special_tokens=False).input_ids) for s in FILLER))
    sentences = [draw.choice(FILLER) for _ in range(room // per_sentence)]
    most = most_that(lambda count: len(render(sentences[:count])) <= length, 0, len(sentences))
    return render(sentences[:most]), key


def most_that(fits: Callable[[int], bool], fewest: int, most: int) -> int:
    """How many fit, by halving: tokens merge across borders, so that sizes do not add up."""
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
    return fewest


def lengths(longest: int, steps: int = 4, shortest: int = 128) -> list[int]:
    """`longest` and its halves, ascending."""
    return sorted({longest >> i for i in range(steps) if longest >> i >= shortest} or {longest})


def cases(
    tokenizer: Any, longest: int, seed: int, trials: int = TRIALS, make: MakePrompt = prompt
) -> list[tuple[int, float, list[int], str]]:
    """The prompts of every trial; the same for every model of that tokenizer."""
    draw, found = random.Random(seed), []
    for length in lengths(longest):
        for depth in DEPTHS:
            for _ in range(trials):
                made = make(tokenizer, length - ANSWER, depth, draw)
                if made is not None:
                    found.append((length, depth, *made))
    return found


@torch.no_grad()
def passkey_grid(
    model: Any,
    tokenizer: Any,
    trials: Sequence[tuple[int, float, list[int], str]],
    *,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[dict[str, Any]]:
    """How often the model's greedy reply gives the key."""
    grid: dict[tuple[int, float], list[bool]] = {}
    for length, depth, ids, key in trials:
        reply = tokenizer.decode(greedy(model, torch.tensor([ids]), ANSWER, padding(tokenizer))[0])
        grid.setdefault((length, depth), []).append(key in reply.replace(" ", ""))
        advance(len(ids))
    return [
        {"length": length, "depth": depth, "found": sum(hits), "trials": len(hits)}
        for (length, depth), hits in grid.items()
    ]
