"""What a model makes of probes: of each capability, of keys hidden in long text, and of values in long lists.

Beside perplexity, which does not show it: a model may lose every key hidden in its context at a loss of text that looks
like any other cut's (research/what-survives.md). Probes are the same for every model of a tokenizer, and of the judging
family, on which nothing is searched or tuned.

Keys in text are the passkey retrieval task of Mohtashami and Jaggi (2305.16300), with words and filler of layercut's
own. Lists are harder: all entries look alike, and only the right key tells.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercut.data.chat_templates import prompt_ids
from layercut.data.probe_families import JUDGING
from layercut.data.probes import ProbeRows, probe_rows
from layercut.evaluation.generation import greedy, padding
from layercut.models.decoder_stack import positions
from layercut.models.losses import as_cost, kl_divergence
from layercut.models.memory import slices
from layercut.models.runner import prepared
from layercut.progress import say

ROWS = 4  # rows of probes in one forward pass
LONGEST_PROBE, TEST_ROWS, TEST_WINDOW = 1024, 48, 256
"""Tokens of the longest prompts; rows of probes, and tokens in one: twenty answers of each capability."""
Trial = tuple[int, float, list[int], str]
"""Length in tokens at most, depth, token ids of the prompt, and the right answer."""
Grid = list[dict[str, Any]]  # [{"length", "depth", "found", "trials"}, …]
DEPTHS, TRIALS = (0.0, 0.25, 0.5, 0.75, 1.0), 2
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
NUMBER = re.compile(r"(?<!\w)(\d{1,3}(?:[,.'’ \u00a0\u202f]\d{3})+|\d(?: \d)+)(?!\w)|\w*\d\w*(?:\.\d+)?")
"""12345 and 12,345, and the digits that some tokenizers part by blanks; A12345 and 12345.6 are words of their own."""
DENIAL = re.compile(r"\b(?:not|never)\b|n't\b", re.IGNORECASE)
Advance = Callable[[int], None]


# --- rows of probes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CapabilityFigures:
    """What a cut did to each capability."""

    kl: dict[str, float]
    """KL(dense || cut), mean over the answers' tokens, in nats: the distance to the dense model, good or bad."""
    hits: dict[str, float]
    """Share of the answers that the cut model's greedy decoding gives."""
    dense_hits: dict[str, float]
    """The same of the dense model."""
    answers: dict[str, int]
    """How many answers that is."""
    loss: dict[str, float] = field(default_factory=dict)
    """-log p of the right answers' tokens by the cut model, mean, in nats: lower is better."""
    dense_loss: dict[str, float] = field(default_factory=dict)
    """The same of the dense model."""


@torch.no_grad()
def capability_figures(
    model: Any, dense: Any, probes: ProbeRows, *, advance: Advance = lambda rows: None
) -> CapabilityFigures:
    """KL, hit rates and losses of a model beside the dense one's, on the same rows of probes.

    Args:
        model: a causal LM of transformers, or a `DecoderRunner` of one.
        dense: the model that it came from.
        probes: what is asked.
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
    apart, *losses = ({name: as_cost(mean, 0.0) for name, mean in probes.means(x).items()} for x in (kl, *loss))
    answers = dict(zip(probes.names, counts, strict=True))
    return CapabilityFigures(apart, probes.hit_rates(right[0]), probes.hit_rates(right[1]), answers, *losses)


# --- keys and lists -----------------------------------------------------------------------------------------


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


def trials(make: Callable[..., Any], tokenizer: Any, longest: int, seed: int, each: int = TRIALS) -> list[Trial]:
    """`each` prompts by `passkey` or `key_value` of every length and depth; the same for every model of a tokenizer."""
    draw, places = random.Random(seed), [(length, depth) for length in lengths(longest) for depth in DEPTHS]
    made = ((*place, make(tokenizer, place[0] - ANSWER, place[1], draw)) for place in places for _ in range(each))
    return [(length, depth, *prompt) for length, depth, prompt in made if prompt]


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
    return [{"length": n, "depth": d, "found": sum(hits), "trials": len(hits)} for (n, d), hits in grid.items()]


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


# --- all that `--probes` measures ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Probes:
    """What is asked of each model."""

    keys: list[Trial]
    lists: list[Trial]
    rows: ProbeRows
    longest: int  # tokens of the longest prompts

    @property
    def prompt_tokens(self) -> int:
        """In the prompts with keys and lists."""
        return sum(len(trial[2]) for trial in (*self.keys, *self.lists))

    @property
    def tokens(self) -> int:
        """In all prompts and rows."""
        return self.prompt_tokens + self.rows.tokens.numel()


def probes_for(
    tokenizer: Any, config: Any, *, longest: int = LONGEST_PROBE, seed: int = 0, each: int = TRIALS
) -> Probes:
    """The prompts and rows for all models of a tokenizer, no longer than the model has positions for."""
    longest = min(longest, positions(config) or longest)
    rows = probe_rows(tokenizer, rows=TEST_ROWS, window=min(TEST_WINDOW, longest), family="judging", seed=seed)
    keys, lists = (trials(make, tokenizer, longest, seed, each) for make in (passkey, key_value))
    for name, found in (("keys", keys), ("lists", lists)):
        if not found:
            say("probes", f"no prompt of {name} fits {longest} tokens: not asked for")
    return Probes(keys, lists, rows, longest)


def probed(
    model: Any, dense: Any, tokenizer: Any, probes: Probes, *, advance: Advance = lambda tokens: None
) -> dict[str, Any]:
    """What a model makes of the probes: grids of "keys" and "lists", and "capabilities", None where no probe fits.

    advance: told the tokens that are done.
    """
    asked, figures, window = {"keys": probes.keys, "lists": probes.lists}, None, probes.rows.tokens.shape[1]
    grids = {name: retrieval_grid(model, tokenizer, each, advance=advance) for name, each in asked.items()}
    if probes.rows.names:
        figures = vars(capability_figures(model, dense, probes.rows, advance=lambda rows: advance(rows * window)))
    return grids | {"capabilities": figures}
