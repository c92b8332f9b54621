"""Capability probes: rows of tokens generated from the tokenizer alone, in which some tokens are answers.

Plain text hardly needs what a user needs: a layer that finds a name again in the context may be among the cheapest by
every loss on text. A row holds probes of several capabilities laid end to end like text, and goes through search and
tuning as any row does; what is special are the answers, tokens that can be known from the row. The cost of a cut to a
capability is the mean over the tokens of its answers of KL(dense || cut), in nats; its hit rate is the share of answers
of which every token is the likeliest (which is when greedy decoding gives the answer).

Rows are of one family of `data/probe_families.py`: "searching", "tuning" or "judging", which share no form, person or
thing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from layercut.data.chat_templates import render_chat
from layercut.data.probe_families import CAPABILITIES, FAMILIES, GROWING, Family, Item, capability_names
from layercut.errors import ConfigError, DataError

FOCUS_SHARE = 0.6  # share of a row that one or two growing capabilities have; the short ones share the rest
SHORT_ROW = 256  # tokens of the rows for tuning that a longer one may be made of
LONG = ("recall", "lists", "lists")
"""Of what long probes are: what is found again by its key is harder the more other keys there are."""
LEAST_SIZE = {"recall": 3, "lists": 4, "copy": 6}  # the smallest items of the growing capabilities
KEPT = 0.9
"""Of an item's signs, blanks aside, the share that a tokenizer has to give back: others drop what they do not know."""
PLACE = "[reply {}]"  # what a template is given instead of a reply, to find out where it puts it
DEFAULT_WEIGHT = 1.0  # a nat per answer token, mean over capabilities, counts as one nat per token of text
Mark = tuple[str, int] | None  # the answer that a token belongs to: (capability, number)


@dataclass(frozen=True)
class ProbeRows:
    """M rows of T tokens with A answers."""

    tokens: torch.Tensor
    """int64 [M, T], on the CPU."""
    answers: torch.Tensor
    """int64 [M, T]: which answer the token *after* this one belongs to, -1 where to none."""
    capability: torch.Tensor
    """int64 [A]: the capability of each answer, as an index of `names`."""
    names: tuple[str, ...]
    """C capabilities, of which each has an answer here."""
    lengths: torch.Tensor
    """int64 [M]: as how long rows each is made, T or, of P short ones laid end to end, T // P."""
    weight: float = DEFAULT_WEIGHT
    """What a nat of cost, mean over the capabilities, counts in a search beside a nat of KL on text."""
    left_out: tuple[str, ...] = ()
    """Capabilities that were asked for and of which no probe fits a row."""
    closings: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of tokens that end an answer, those that end it as well: "!" with one line end, with two, or with none."""

    def check(self) -> None:
        if not self.names:
            window = self.tokens.shape[1]
            raise DataError(f"no probe fits rows of {window} tokens", "probe_rows(tokenizer, window=256)")

    def of(self) -> torch.Tensor:
        """int64 [M, T]: the capability of the answer token after this one, -1 where there is none."""
        none = torch.full_like(self.answers, -1)
        return torch.where(self.answers >= 0, self.capability[self.answers.clamp_min(0)], none)

    def weights(self) -> torch.Tensor:
        """float32 [M, T]: the mean over rows of sum_t w_t KL_t is the mean over capabilities of their cost.

        Every answer token of a capability counts alike, and every capability.
        """
        of, (rows, _) = self.of(), self.tokens.shape
        counts = torch.bincount(of[of >= 0], minlength=len(self.names)).clamp_min(1)
        return torch.where(of >= 0, rows / (len(self.names) * counts[of.clamp_min(0)]), 0.0)

    def means(self, losses: torch.Tensor) -> dict[str, float]:
        """The mean over its answer tokens of each capability; losses: [M, T], read where there is an answer."""
        of, losses = self.of(), losses.cpu().double()
        return {name: losses[of == c].mean().item() for c, name in enumerate(self.names)}

    def hit_rates(self, right: torch.Tensor) -> dict[str, float]:
        """The share of each capability's answers of which all tokens are right; right: bool [M, T]."""
        missed = torch.zeros(len(self.capability), dtype=torch.bool)
        missed[self.answers[(self.answers >= 0) & ~right.cpu()]] = True
        return {name: 1 - missed[self.capability == c].double().mean().item() for c, name in enumerate(self.names)}

    def right(self, row: int, given: torch.Tensor) -> torch.Tensor:
        """Whether the answer tokens of a row are what was given, the likeliest tokens there: int64 [K] -> bool [K].

        What follows an answer does not count: some tokenizers write its last sign and the line's end as one token.
        """
        at = (self.answers[row] >= 0).nonzero()[:, 0]
        wanted, given = self.tokens[row, at + 1], given.cpu()
        found = given == wanted
        for k, place in enumerate(at.tolist()):
            if not found[k] and self.answers[row, place + 1] != self.answers[row, place]:
                found[k] = int(given[k]) in self.closings.get(int(wanted[k]), ())
        return found

    def asking(self) -> torch.Tensor:
        """The rows that hold an answer, token ids [N, T], N <= M: what to round on."""
        return self.tokens[(self.answers >= 0).any(1)]

    def facts(self) -> dict[str, Any]:
        return {"rows": len(self.tokens), "window": self.tokens.shape[1], "capabilities": list(self.names)}


def probe_rows(
    tokenizer: Any,
    *,
    rows: int = 32,
    window: int = 256,
    capabilities: Sequence[str] = tuple(CAPABILITIES),
    family: str = "searching",
    seed: int = 0,
    first: int = 0,
    weight: float = DEFAULT_WEIGHT,
) -> ProbeRows:
    """Rows of probes, each of several capabilities; row i depends on the seed and i alone.

    Most of a row is one or two capabilities that can be of any length (recall, lists and copy in turn), the rest short
    items of the others, in random order. What does not fit a row is left out. For tuning, of two rows of twice
    SHORT_ROW tokens or more one is T // SHORT_ROW short ones laid end to end and the other holds probes as long as it
    or as half of it; and half of the short ones, as half of the long ones, are chats, where the tokenizer has a
    template. By turns and not by chance: a tenth of 32,768 tokens is three rows.

    Args:
        tokenizer: a tokenizer of transformers.
        rows: M.
        window: T, tokens in a row.
        capabilities: what is probed; names in `CAPABILITIES`.
        family: searching, tuning or judging.
        seed: of all that is drawn.
        first: the number of the first row.
        weight: of their cost in a search.

    Returns:
        The rows; `names` are the capabilities that fit, none of them where the window is too short, `left_out` the
        others.

    Raises:
        ConfigError: no such family or capability, or not one row or token is asked for.
    """
    writer = _Writer(tokenizer, family, rows, window)
    capability_names(",".join(capabilities) or "none")
    pieces = max(1, window // SHORT_ROW) if family == "tuning" else 1
    long = [name for name in LONG if name in capabilities and pieces > 1]
    marked, lengths = list[_Marked](), list[int]()
    for number in range(first, first + rows):
        writer.draw, writer.chat = random.Random(f"{family} {seed} {number}"), writer.can_chat and number // 2 % 2 == 1
        found = writer.long_row(long, window) if long and number % 2 else None
        lengths.append(window if found else window // pieces)
        if not found:
            found = writer.short_rows(capabilities, window, pieces, number // 2 if long else number)
        marked.append(found)
    made = writer.joined(marked, lengths)
    return replace(made, weight=weight, left_out=tuple(name for name in capabilities if name not in made.names))


def judging_rows(
    tokenizer: Any,
    *,
    rows: int = 16,
    window: int = 256,
    capability: str = "recall",
    family: str = "judging",
    seed: int = 0,
) -> ProbeRows:
    """Rows of one capability that fill the window, to judge by; of "recall" and "lists" they are as long as it is."""
    writer, marked = _Writer(tokenizer, family, rows, window), []
    for number in range(rows):
        writer.draw, found = random.Random(f"{family} {capability} {seed} {number}"), writer.begun()
        if capability in GROWING:
            if grown := writer.grown(capability, window - 1 - len(found.ids)):
                found.extend(grown)
        else:
            while len(found.ids) < window and (item := writer.item(capability)).fits(window - len(found.ids)):
                found.extend(item)
        marked.append(writer.filled(found, window))
    return writer.joined(marked, [window] * rows)


@lru_cache(maxsize=2)
def _with_blanks_after(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Tokens that hold a sign and blanks, or nothing, after it, by the sign; where several do."""
    found: dict[str, list[int]] = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        found.setdefault(text.rstrip() or text[:1], []).append(token)
    return {sign: tuple(tokens) for sign, tokens in found.items() if len(tokens) > 1}


def _signs(text: str) -> str:
    """A text without its blanks, and in small letters, as some tokenizers have it."""
    return "".join(text.split()).casefold()


# --- from items to rows -------------------------------------------------------------------------------------


@dataclass
class _Marked:
    """Token ids, and for each the answer it belongs to."""

    ids: list[int]
    of: list[Mark]
    answers: int = 0

    def extend(self, other: _Marked) -> None:
        self.ids += other.ids
        self.of += [mark and (mark[0], mark[1] + self.answers) for mark in other.of]
        self.answers += other.answers

    def fits(self, room: int) -> bool:
        """Whether it takes no more than so many tokens, and any."""
        return 0 < len(self.ids) <= room


class _Writer:
    """Writes items of one family as tokens, drawn by `draw`, as chats where `chat` is set."""

    def __init__(self, tokenizer: Any, family: str, rows: int = 1, window: int = 1, *, chat: bool = False) -> None:
        if family not in FAMILIES:
            raise ConfigError(f"there is no family {family!r} of probes", f"allowed are {', '.join(FAMILIES)}")
        if rows < 1 or window < 1:
            raise ConfigError(f"{rows} rows of {window} tokens hold no probes", "the least is 1 of each")
        self.tokenizer, self.draw, self.chat = tokenizer, random.Random(0), chat
        self.family: Family = FAMILIES[family]
        bos = tokenizer.bos_token_id
        self.head = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
        self.can_chat = family == "tuning" and bool(getattr(tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens, but those that the text spells."""
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    def begun(self) -> _Marked:
        return _Marked([*self.head], [None] * len(self.head))

    def item(self, capability: str) -> _Marked:
        return self.marked(capability, self.written(capability))

    def written(self, capability: str, size: int = 0) -> Item:
        """A fresh item and what parts it from the next, as text."""
        made = CAPABILITIES[capability](self.family, self.draw, size)
        if self.chat and (chat := self.as_chat(made)):
            return chat
        *rest, last = made.parts
        return replace(made, parts=(*rest, last + "\n") if len(made.parts) % 2 else (*made.parts, "\n"))

    def as_chat(self, item: Item) -> Item | None:
        """The item by the tokenizer's template: every answer is a reply of its own to the question for it.

        Items that ask for nothing are one question and one reply. None where the template has no place for the words
        of a reply as they are, or not for every turn: one that leaves out earlier turns, or allows none.
        """
        if item.turns:  # of each: what is asked, what the reply begins with, and its answers and the text between
            answers = item.parts[1::2]
            turns = [(asked, begins, [answer]) for (asked, begins), answer in zip(item.turns, answers, strict=True)]
        else:
            asked, *said = item.parts[: len(item.parts) // 2 * 2]  # without the text behind the last answer
            said[0] = said[0].lstrip()
            said[-1] = said[-1].rstrip()  # which may be the same one
            turns = [(asked, "", said)]
        chat: list[dict[str, str]] = []
        for number, (question, begins, replied) in enumerate(turns):
            chat.append({"role": "user", "content": (question if number else item.told + question).strip()})
            chat.append({"role": "assistant", "content": begins + "".join(replied) + item.closes})
        places = [{**turn, "content": PLACE.format(i)} if i % 2 else turn for i, turn in enumerate(chat)]
        begin = self.tokenizer.bos_token if self.head else ""  # a row begins with it already
        try:
            whole, left = (render_chat(self.tokenizer, each).removeprefix(begin) for each in (chat, places))
        except DataError:
            return None
        parts, closes = list[str](), ""
        for user, reply, (_, begins, replied) in zip(chat[::2], places[1::2], turns, strict=True):
            before, _, left = left.partition(reply["content"])
            if user["content"] not in before:
                return None
            parts += [closes + before + begins, *replied]
            closes = item.closes
        made = Item((*parts, closes + left))
        return made if made.text == whole else None

    def marked(self, capability: str, item: Item) -> _Marked:
        """Tokens of an item: an answer's are those that change the tokens of the text before it, and their like.

        The text is tokenized up to the end of each part, as it would be written: no border is put between parts that
        the tokenizer would not put. A token of an answer's end and of what follows ("]" and a line break) is the
        answer's. What the tokenizer has no token for, or drops, is no answer, nor is any of an item that it drops too
        much of.
        """
        decode = self.tokenizer.decode
        ids, text, found = list[int](), "", _Marked([], [])
        for number, part in enumerate(item.parts):
            text += part
            longer = self.encode(text)
            common = len(ids)
            if longer[:common] != ids:
                common = next((i for i, (a, b) in enumerate(zip(ids, longer, strict=False)) if a != b), common)
            new = len(longer) - common
            if number % 2:  # an answer
                marks: list[Mark] = [(capability, found.answers)] * new
                found.answers += 1
            else:  # tokens that hold anew, with some of this part, what an answer's end held stay the answer's
                held = 0
                if common < len(ids):
                    held, end = 1, len(decode(ids))
                    while common + held < len(longer) and len(decode(longer[: common + held])) < end:
                        held += 1
                marks = found.of[common : common + 1] * held + [None] * (new - held)
            found.of[common:] = marks
            ids = longer
        lost = {of for token, of in zip(ids, found.of, strict=True) if token == self.tokenizer.unk_token_id}
        if len(_signs(decode(ids))) < KEPT * len(_signs(item.text)):
            lost = {*found.of}
        spelled: dict[tuple[str, int], list[int]] = {}
        for token, answer in zip(ids, found.of, strict=True):
            if answer:
                spelled.setdefault(answer, []).append(token)
        said = item.parts[1::2]
        lost |= {of for of, held in spelled.items() if _signs(said[of[1]]) not in _signs(decode(held))}
        found.ids, found.of = ids, [None if of in lost else of for of in found.of]
        return found

    def grown(self, capability: str, room: int, *, one_form: bool = False) -> _Marked | None:
        """The longest item of a growing capability that fits, as far as one of its sizes does.

        Every size is drawn anew, so that short forms are the likelier the more room there is; with `one_form` all
        sizes are of the same form.
        """
        size, state = LEAST_SIZE[capability], self.draw.getstate()

        def drawn(size: int) -> tuple[Item, int]:
            if one_form:
                self.draw.setstate(state)
            item = self.written(capability, size)
            return item, len(self.encode(item.text))

        found, length = drawn(size)
        if length > room:
            return None
        per = max(1.0, drawn(size + 8)[1] - length) / 8
        size += max(0, int((room - length) / per))
        while size > LEAST_SIZE[capability]:
            item, length = drawn(size)
            if length <= room:
                found = item
                break
            size -= 1 + size // 16
        return self.marked(capability, found)

    def filled(self, found: _Marked, window: int) -> _Marked:
        """Exactly T tokens: sentences of filler after the items, or nothing of them that does not fit.

        No probe at all where the tokenizer has no token for any word of them.
        """
        while len(found.ids) < window:
            rest = self.encode(" ".join(self.draw.choices(self.family.filler, k=8)) + "\n")
            if not rest:
                return _Marked([0] * window, [None] * window)
            found.extend(_Marked(rest, [None] * len(rest)))
        return _Marked(found.ids[:window], found.of[:window], found.answers)

    def short_rows(self, capabilities: Sequence[str], window: int, pieces: int, number: int) -> _Marked:
        """So many rows laid end to end, half of them chats where these can be; the last has what is left over.

        Of eight rows the last four are chats where the first are not: what a row holds goes by its number in turns of
        four.
        """
        found = _Marked([], [])
        for turn in range(number * pieces, (number + 1) * pieces):
            self.chat = self.can_chat and (turn + turn // 4) % 2 == 1
            length = (window - len(found.ids)) // ((number + 1) * pieces - turn)
            row = self.row(capabilities, length, turn)
            if self.chat and not row.answers:  # a template that begins with a long text leaves no room for a probe
                self.chat = False
                row = self.row(capabilities, length, turn)
            found.extend(row)
        return found

    def row(self, capabilities: Sequence[str], window: int, number: int) -> _Marked:
        """One row: one or two growing capabilities for FOCUS_SHARE of it, a short item of each other one that fits.

        Of chats, which take more tokens, one.
        """
        growing = [name for name in GROWING if name in capabilities]
        several = min(len(growing), 1 if self.chat else 1 + number % 2)
        long = [growing[(number + i) % len(growing)] for i in range(several)]
        short = [name for name in capabilities if name not in GROWING]
        turn = number % max(1, len(short))
        found, items = self.begun(), list[_Marked]()
        room = window - len(found.ids)
        left = room * (1 - FOCUS_SHARE if long else 1)
        more = True
        while more:
            more = False
            for name in short[turn:] + short[:turn]:
                if (item := self.item(name)).fits(int(left)):
                    items.append(item)
                    left -= len(item.ids)
                    more = not long  # where nothing grows, as many as fit
        for name in long:
            left = (room - sum(len(item.ids) for item in items)) / (1 + (name != long[-1]))
            items += [grown] if (grown := self.grown(name, int(left))) else []
        self.draw.shuffle(items)
        for item in items:
            found.extend(item)
        return self.filled(found, window)

    def long_row(self, capabilities: Sequence[str], window: int) -> _Marked | None:
        """One row of probes of these growing capabilities, up to as long as what is left of the row or as half of it.

        None where none fits.
        """
        found = self.begun()
        while (left := window - len(found.ids)) > SHORT_ROW // 2:
            name, room = self.draw.choice(capabilities), self.draw.choice((left, left // 2))
            if not (item := self.grown(name, room, one_form=True) or self.grown(name, left)):
                break
            found.extend(item)
        return self.filled(found, window) if found.answers else None

    def joined(self, marked: Sequence[_Marked], lengths: Sequence[int]) -> ProbeRows:
        """Rows with their marks as tensors; the mark of a token stands where it is predicted, one place before."""
        seen = {mark[0] for row in marked for mark in row.of[1:] if mark}
        names = tuple(name for name in CAPABILITIES if name in seen)
        tokens = torch.tensor([row.ids for row in marked], dtype=torch.int64)
        answers, capability = torch.full_like(tokens, -1), list[int]()
        numbers: dict[tuple[int, int], int] = {}
        for i, row in enumerate(marked):
            for t, mark in enumerate(row.of[1:]):
                if mark:
                    if (i, mark[1]) not in numbers:
                        numbers[i, mark[1]] = len(capability)
                        capability.append(names.index(mark[0]))
                    answers[i, t] = numbers[i, mark[1]]
        # of each token that holds the last sign of an answer and blanks after it, those with other blanks or none;
        # where the line's end is that sign, all that hold it with blanks after it
        ends = (answers[:, :-1] >= 0) & (answers[:, 1:] != answers[:, :-1])
        last = {token: self.tokenizer.decode([token]) for token in tokens[:, 1:][ends].unique().tolist()}
        signs = {token: text.rstrip() or text[:1] for token, text in last.items() if text != text.rstrip()}
        alike = _with_blanks_after(self.tokenizer) if signs else {}
        closings = {token: alike.get(sign, ()) for token, sign in signs.items()}
        of = torch.tensor(capability, dtype=torch.int64)
        return ProbeRows(tokens, answers, of, names, torch.tensor(lengths), closings=closings)
