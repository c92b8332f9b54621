"""One of many values by its key: a list as long as the prompt, of which one entry is asked for.

Harder than one hidden key (`passkey.py`), since all entries look alike and only the right key tells. Cases are measured
as hidden keys are (`passkey_grid`): by length, and by the depth at which the entry stands.
"""

from __future__ import annotations

import random
from typing import Any

from layercut.data.probe_families import JUDGING
from layercut.evaluation.generation import prompt_ids
from layercut.evaluation.passkey import TRIALS, cases, most_that

HEAD = "Below is a register of who keeps what, with the number of each entry."
LINE = "{name} keeps the {thing} under number {key}."
QUESTION = "Under which number does {name} keep the {thing}?"
REPLY = "{name} keeps the {thing} under number"


def key_value_prompt(tokenizer: Any, length: int, depth: float, draw: random.Random) -> tuple[list[int], str] | None:
    """A list of as many entries as fit, one of which is asked for."""
    keys = [(name, thing) for name in JUDGING.people for thing in JUDGING.things]
    draw.shuffle(keys)
    values = draw.sample(range(10_000, 100_000), len(keys))
    entries = [LINE.format(name=n, thing=t, key=v) for (n, t), v in zip(keys, values, strict=True)]

    def render(count: int) -> tuple[list[int], str]:
        at = round(depth * (count - 1))
        asked = dict(zip(("name", "thing"), keys[at], strict=True))
        text = "\n".join([HEAD, "", *entries[:count], "", QUESTION.format(**asked)])
        return prompt_ids(tokenizer, text, REPLY.format(**asked)), str(values[at])

    most = most_that(lambda count: len(render(count)[0]) <= length, 1, len(entries))
    ids, value = render(most)
    return (ids, value) if len(ids) <= length and most > 1 else None


def key_value_cases(
    tokenizer: Any, longest: int, seed: int, trials: int = TRIALS
) -> list[tuple[int, float, list[int], str]]:
    """Every trial up to a length; the same for every model of that tokenizer."""
    return cases(tokenizer, longest, seed, trials, key_value_prompt)
