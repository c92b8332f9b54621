"""What probes of a model's abilities are made of: three families that share no template, name or noun.

Layers are chosen on `SEARCHING`, healed on `TUNING` and judged on `JUDGING`, so that what is judged was neither
searched nor tuned on. `data/probes.py` makes rows of tokens of them. A capability is a function of a family and a
random generator that writes one `Item`: a text in which some parts are answers.

Between families these differ: every sentence and form, all names, nouns and places, the letters of made-up words, the
length of keys, the sums, and the kinds of brackets that are nested. But one: of a list with more entries than things
SEARCHING's keys are as those of one of TUNING's lists ("Mara's lantern").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layercut.errors import ConfigError

EDITION = 6  # of what is written here and in `data/probes.py`: a run's rows of another one are drawn anew
MANY = 8  # entries of a list that is asked about thoroughly


@dataclass(frozen=True)
class Item:
    """One probe: `parts` are text and answer in turn, beginning with text."""

    parts: tuple[str, ...]
    told: str = ""
    """Where a chat asks for each answer in a turn of its own: what its user tells before the first question."""
    turns: tuple[tuple[str, str], ...] = ()
    """Of each answer in such a chat: what the user asks, and what the reply begins with ("The code is")."""
    closes: str = ""  # what stands behind each answer in such a reply

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Words and forms of one use."""

    name: str
    people: tuple[str, ...]
    things: tuple[str, ...]
    filler: tuple[str, ...]  # sentences that keys are hidden in
    key: Callable[[random.Random], str]
    needles: tuple[tuple[str, str, str], ...]
    """What is told, what is asked, and how the reply begins; with {name} and {key}."""
    lists: tuple[tuple[str, str, str, str, str, str], ...]
    """Head of a list, its line, its end, what is asked, how the reply begins and closes; with {thing} and {key}, and
    {name} where a key is a person and a thing, each of which other keys have too."""
    owned: str = ""  # of a family without such lists: the {thing} of a list that is longer than there are things
    syllables: tuple[str, ...]  # of made-up words
    repeats: tuple[tuple[str, str], ...]  # what stands before a sequence and before its repetition
    classes: tuple[tuple[str, tuple[str, ...]], ...]  # two labels, each with the words that carry it
    labelled: tuple[str, ...]  # a line with {word}; the label follows
    sums: tuple[tuple[str, str], ...]  # a sum with {a} and {b}, and what comes before its result
    adds: Callable[[int, int], bool]  # whether a sum of these two numbers is of this family, in whichever order
    brackets: tuple[tuple[str, str], ...]
    code: tuple[tuple[str, str], ...]  # text and the answer that its structure demands; with {x}, {y} and {z}
    formats: tuple[tuple[str, str, str], ...]
    """What is told, the demanded form, both with {x} and {y}, and a line that states the demand."""
    thorough: bool = False
    """Whether of a list of MANY entries every second one is asked for, and its ends, which models know best; else one
    in four is."""


def _digits(*lengths: int) -> Callable[[random.Random], str]:
    def key(draw: random.Random) -> str:
        length = draw.choice(lengths)
        return f"{draw.randrange(10 ** (length - 1), 10**length)}"

    return key


def _tuning_key(draw: random.Random) -> str:
    kind = draw.randrange(5)
    if kind == 0:
        return _digits(3, 6, 7, 9)(draw)
    if kind == 4:
        return "-".join(f"{draw.randrange(16**4):04x}" for _ in range(draw.choice((2, 2, 4))))
    letters = "".join(draw.choices("BDFGHKLMNPRSTVZ", k=3))
    if kind == 1:
        return f"{letters}-{draw.randrange(10, 100)}"
    return pseudo_word(TUNING, draw) if kind == 2 else f"{pseudo_word(TUNING, draw)} {pseudo_word(TUNING, draw)}"


def pseudo_word(family: Family, draw: random.Random) -> str:
    """Two or three syllables, which mean nothing."""
    return "".join(draw.choices(family.syllables, k=draw.choice((2, 2, 3))))


SEARCHING = Family(
    name="searching",
    people=("Mara", "Tobias", "Ingrid", "Felix", "Nadia", "Oscar", "Petra", "Ruben", "Selma", "Viktor", "Wanda",
            "Yusuf"),
    things=("lantern", "kettle", "anvil", "ladder", "compass", "barrel", "mirror", "candle", "hammer", "basket",
            "whistle", "saddle", "shovel", "feather"),
    filler=(
        "The road along the valley is closed in winter.", "Most of the guests arrived before supper.",
        "A light wind came up from the south.", "The old mill has not been used for years.",
        "He had left his coat on the chair.", "Nobody could say when the letter was written.",
        "The soup was too hot to eat at once.", "In spring the fields turn yellow.",
        "They talked about the weather for a while.", "The door was painted green last year.",
        "Some of the older pupils were allowed to leave.", "It took two hours to reach the village.",
    ),
    key=_digits(4),
    needles=(
        ("The locker number of {name} is {key}.", "Which locker number does {name} have?",
         "The locker number of {name} is"),
        ("{name} chose {key} as the code of the gate.", "Which code of the gate did {name} choose?",
         "As the code of the gate {name} chose"),
        ("Note that the badge of {name} says {key}.", "What does the badge of {name} say?", "The badge of {name} says"),
        ("Whoever needs {name} should dial {key} at noon.", "What should be dialled for {name}?", "For {name} dial"),
        ("{key} coins were counted in the purse of {name}.", "How many coins were in the purse of {name}?",
         "The coins in the purse of {name} were"),
    ),
    lists=(
        ("Stock in the shed:\n", "{thing}: {key}\n", "", "How many of one kind are there?\n", "{thing}:", ""),
        ("Weights as measured. ", "The {thing} has {key} grams. ", "", "Repeat one of them. ", "The {thing} has", ""),
        ("Today's prices\n", "- {thing}, {key}\n", "", "One price again\n", "- {thing},", ""),
        ("Chalk marks: ", "{key} is on the {thing}; ", "nothing else. ", "Chalk on the {thing}: ", "on the {thing} is",
         ";"),
        ("(stock\n", "  ({thing} . {key})\n", ")\n", "; as above\n", "({thing} .", ")"),
        ("", "move the {thing} to place {key}\n", "", "where is it now?\n", "the {thing} is at place", ""),
    ),
    owned="{name}'s {thing}",
    syllables=("ta", "lo", "mi", "re", "nu", "sol", "ker", "vi"),
    repeats=(("Sequence:", "\nAgain:"), ("First line:", "\nSame line:"), ("She sang", ". The choir answered"),
             ("[1]", "\n[2] see [1]:")),
    classes=(
        ("north", ("horse", "tiger", "rabbit", "goat", "sheep", "wolf", "monkey", "donkey")),
        ("south", ("table", "sofa", "shelf", "desk", "bench", "cupboard", "bed", "stool")),
    ),
    labelled=("{word} ->", "{word} belongs", "with a {word} go", "* {word},"),
    sums=(("{a} + {b}", " ="), ("Sum of {a} and {b}", ":"), ("add({a}, {b})", " #"),
          ("{a} steps, {b} steps:", " in all")),
    adds=lambda a, b: a % 3 == b % 3,
    brackets=(("(", ")"), ("[", "]")),
    code=(
        ("def {x}({y}):\n    {z} = {y}\n    return", " {z}\n"),
        ("for {x} in {y}:\n    print(", "{x})\n"),
        ('{x} = "{y}"\nassert {x} ==', ' "{y}"\n'),
        ("<{x}>\n  <{y}>{z}</{y}>\n</", "{x}>\n"),
        ("try {{\n  {x}();\n}} catch ({y}) {{\n  throw", " {y};\n"),
    ),
    formats=(
        ("Input: {x}, {y}\nOutput:", " <{x}> <{y}>\n", "Each word stands in angle signs.\n"),
        ("Words {x} and {y} give", " {y}/{x}.\n", "The second word comes first, then a slash.\n"),
        ("From: {x}, {y}\nTo:", " {x}::{y}::\n", "A double colon follows either word.\n"),
        ("{x}? {y}?", " {x} no, {y} yes\n", "The first one is denied and the second one is affirmed.\n"),
    ),
)  # fmt: skip

TUNING = Family(
    name="tuning",
    people=("Anton", "Bella", "Caspar", "Dora", "Emil", "Fiona", "Georg", "Hanna", "Ivan", "Julia", "Konrad", "Lena",
            "Milan", "Nora", "Olaf", "Paula", "Quentin", "Rosa", "Simon", "Tilda", "Ulla", "Vera", "Walter", "Xenia"),
    things=("bottle", "carpet", "drawer", "envelope", "fiddle", "goblet", "helmet", "inkwell", "jacket", "keg",
            "locket", "mitten", "napkin", "oven", "pillow", "quilt", "ribbon", "scarf", "teapot", "urn", "violin",
            "wallet", "zipper", "button"),
    filler=(
        "Several engineers discussed the plans on Tuesday.", "The river had risen during the night.",
        "Her brother works in a bank near the station.", "New shoes are often a little tight.",
        "After lunch the meeting continued without a break.", "The film was longer than anybody expected.",
        "Dust had settled on every surface in the attic.", "We were told to wait outside until ten.",
        "The captain ordered the crew to lower the sails.", "Fewer people buy printed newspapers today.",
        "On the second floor a radio was playing.", "The dog barked at the postman again.",
        "Prices went up slightly in the third quarter.", "She opened the window and listened.",
        "Heavy trucks are not permitted on this street.", "The recipe calls for butter and fresh cream.",
        "Their garden borders on a small forest.", "The professor wrote a formula on the board.",
        "Two lamps in the corridor were broken.", "A strange smell came from the cellar.",
        "Everyone clapped when the curtain fell.", "The tickets had been sold out for weeks.",
        "Snowfall delayed the bus by forty minutes.", "It was the quietest room in the hotel.",
    ),
    key=_tuning_key,
    needles=(
        ("{name}'s secret word is {key}.", "Tell me {name}'s secret word.", "{name}'s secret word is"),
        ("The account of {name} has the number {key}.", "What number has the account of {name}?",
         "The account of {name} has the number"),
        ("Remember this: {name} lives in room {key}.", "In which room does {name} live?", "{name} lives in room"),
        ("One fact matters here, which is that {name} was given the token {key}.",
         "Which token was given to {name}?", "{name} was given the token"),
        ("Dear {name}, your reference is {key}, please keep it.", "What is {name}'s reference?",
         "The reference for {name} is"),
        ("Ticket {key} was issued to {name}.", "Which ticket was issued to {name}?", "It was ticket"),
    ),
    lists=(
        ("The columns below have names and values.\n", "{thing} = {key}\n", "", "Look up {thing}.\n", "{thing} =", ""),
        ('{{"of": "values"', ', "{thing}": "{key}"', '}}\n', 'The value under "{thing}", as text: ', '"{thing}": "',
         '"'),
        ("Inventory follows. ", "For the {thing} we paid {key}; ", "that was all. ", "What did the {thing} cost? ",
         "For the {thing} we paid", ";"),
        ("| item | mark |\n", "| {thing} | {key} |\n", "", "The row of {thing} once more:\n", "| {thing} |", " |"),
        ("", "set {thing} to {key}\n", "", "to which value is {thing} set?\n", "{thing} is", ""),
        ("", "{name}'s {thing} costs {key}.\n", "", "What does {name}'s {thing} cost?\n", "{name}'s {thing} costs",
         "."),
        ("", "({name}, {thing}) has mark {key}\n", "", "Which mark has ({name}, {thing})?\n",
         "({name}, {thing}) has mark", ""),
        ("Racks.\n", "On the rack of {name} the {thing} lies at {key}.\n", "",
         "Where on the rack of {name} does the {thing} lie?\n", "On the rack of {name} the {thing} lies at", "."),
        ("Orders: ", "{name} ordered the {thing}, {key}; ", "end. ",
         "Which code had the order of {name} for the {thing}? ", "{name} ordered the {thing},", ";"),
    ),
    syllables=("bra", "dun", "fel", "gri", "hos", "jum", "pla", "quo", "sti", "wex", "yon", "zab"),
    repeats=(("Copy what follows.\n", "\nCopied:\n"), ("<a>", "</a>\n<a>"), ("Original -", "\nDuplicate -"), ("",
             "\n\n")),
    classes=(
        ("alpha", ("apricot", "pear", "plum", "cherry", "grape", "lemon", "peach", "melon", "fig", "mango")),
        ("omega", ("car", "truck", "bicycle", "wagon", "tractor", "taxi", "scooter", "van", "sled", "canoe")),
    ),
    labelled=("Word {word} has class", "{word} |", "The label for {word} is"),
    sums=(("{a} plus {b}", " makes"), ("If you add {b} to {a} you get", ""), ("{a} more than {b} is", "")),
    adds=lambda a, b: a % 3 != b % 3 and (a + b) % 2 == 0,
    brackets=(("<", ">"), ("{", "}")),
    code=(
        ("let {x} = {y};\nlet {z} = {x};\nconsole.log({z}) // prints the value of", " {y}\n"),
        ("if ({x} > {y}) {{\n  {z} = {x};\n}} else {{\n  {z} =", " {y};\n}}\n"),
        ("<div><b>{x}</b><i>{y}</i></div>\n<p><u>{z}</u><b>{x}", "</b></p>\n"),
        ("struct {x} {{ int {y}; }};\n{x}.", "{y}\n"),
    ),
    formats=(
        ("Terms: {x} {y}\nResult:", " [{x}; {y}]\n", "Write the terms in square form with a semicolon.\n"),
        ("Given {x} with {y}, write", " {x}={y}&\n", "Pairs are written with an equals sign and an ampersand.\n"),
        ("Task ({x}, {y})\nReply:", ' {{"a": "{x}", "b": "{y}"}}\n', "Replies are JSON with the keys a and b.\n"),
    ),
    thorough=True,
)  # fmt: skip

JUDGING = Family(
    name="judging",
    people=("Abigail", "Bernard", "Celeste", "Dmitri", "Esther", "Florian", "Greta", "Hector", "Isolde", "Jasper",
            "Kirsten",
            "Leopold"),
    things=("acorn", "banner", "cannon", "dagger", "emerald", "flute", "guitar", "harbor", "island", "jewel", "kitchen",
            "lemonade", "magnet", "notebook", "orchid", "parrot", "rocket", "statue", "tunnel", "umbrella"),
    filler=(
        "Every autumn the geese fly over the marsh.", "The committee will publish its report next month.",
        "An elderly couple was dancing in the square.", "Electric fences need more care than one thinks.",
        "The translation was checked by three editors.", "Beyond the hills lies a desert of red sand.",
        "Volunteers collected plastic from the shore.", "The pianist practised the same passage all morning.",
        "Modern bridges are built to sway in storms.", "A shy student asked about the exam.",
        "The harvest festival attracts many visitors.", "Ancient coins were found beneath the chapel.",
    ),
    key=_digits(5),
    needles=(
        ("The serial number given to {name} reads {key}.", "Which serial number was given to {name}?",
         "The serial number given to {name} reads"),
        ("By the way, {name} uses the password {key} at work.", "Which password does {name} use at work?",
         "At work {name} uses the password"),
    ),
    lists=(
        ("Here is a register of entries.\n", "entry {thing} holds {key}\n", "",
         "What does the following entry hold?\n", "entry {thing} holds", ""),
        ("Dictionary: ", "{thing} => {key}, ", "end of dictionary. ", "Lookup: ", "{thing} =>", ""),
    ),
    owned="{thing} of {name}",
    syllables=("cho", "nge", "pim", "rud", "xa", "gol", "wi", "shu"),
    repeats=(("Tokens to echo:", "\nEcho:"), ("Verse one.", "\nVerse one, repeated."),),
    classes=(
        ("cobalt", ("doctor", "lawyer", "baker", "pilot", "sailor", "farmer", "tailor", "nurse")),
        ("amber", ("oak", "birch", "maple", "willow", "cedar", "pine", "elm", "beech")),
    ),
    labelled=("Q: {word} A:", "category of {word} ="),
    sums=(("Calculate {a} and {b} together", " ->"), ("Total for {a}, {b} equals", "")),
    adds=lambda a, b: a % 3 != b % 3 and (a + b) % 2 == 1,
    brackets=(("(", ">"), ("{", "]")),
    code=(
        ("class {x}:\n    def __init__(self, {y}):\n        self.{y} =", " {y}\n"),
        ("SELECT {x} FROM {y} WHERE {y}.", "{x}\n"),
        ("import {x} as {y}\n{z} =", " {y}."),
    ),
    formats=(
        ("Pair {x} + {y} becomes", " {x}_{y}!\n", "Join the pair with an underscore and an exclamation mark.\n"),
        ("Source: {y} {x}; target:", " ~{x}~{y}~\n", "Tildes surround and part the words, last word first.\n"),
    ),
)  # fmt: skip

FAMILIES = {family.name: family for family in (SEARCHING, TUNING, JUDGING)}

Writer = Callable[[Family, random.Random, int], Item]
"""Writes one item; `size`, of those that grow: sentences of filler, lines of a list, words to repeat."""


def recall(family: Family, draw: random.Random, size: int) -> Item:
    """Keys hidden in filler, one for every six sentences and one more, of which each is asked for; in any order."""
    filler = [draw.choice(family.filler) for _ in range(size)]
    told, asked, begins = draw.choice(family.needles)
    people = draw.sample(family.people, min(len(family.people), 1 + size // 6))
    keys = {name: family.key(draw) for name in people}
    for name, key in keys.items():
        filler.insert(draw.randint(0, len(filler)), told.format(name=name, key=key))
    order = draw.sample(people, len(people))
    turns = tuple((asked.format(name=name), begins.format(name=name)) for name in order)
    told = " ".join(filler) + "\n\n"
    parts, text = [], told
    for name, (question, start) in zip(order, turns, strict=True):
        parts += [f"{text}{question} {start}", f" {keys[name]}"]
        text = ".\n\n"
    return Item((*parts, ".\n"), told, turns, ".")


def lists(family: Family, draw: random.Random, size: int) -> Item:
    """A list of keys and values, of which some are asked for again."""
    head, line, end, asked, begins, closes = draw.choice(family.lists)
    size = max(3, size)
    keys = _pairs(family, draw, size) if "{name}" in line else [{"thing": thing} for thing in family.things]
    if size > len(keys) and family.owned:
        keys = [{"thing": family.owned.format(**pair)} for pair in _pairs(family, draw, size)]
    entries = [(key, family.key(draw)) for key in draw.sample(keys, min(len(keys), size))]
    told = "".join([head.format(), *(line.format(**key, key=value) for key, value in entries), end.format()])
    thorough = family.thorough and len(entries) >= MANY
    wanted = draw.sample(entries, max(1, len(entries) // (2 if thorough else 4)))
    if thorough:
        wanted += [entry for entry in (entries[0], entries[-1]) if entry not in wanted]
        draw.shuffle(wanted)
    turns = tuple((asked.format(**key), begins.format(**key)) for key, _ in wanted)
    parts, text = [], told + turns[0][0]
    for (_, value), (_, start) in zip(wanted, turns, strict=True):
        parts += [text + start, value if begins.endswith('"') else f" {value}"]
        text = f"{closes}\n"
    return Item((*parts, text), told, turns, closes)


def _pairs(family: Family, draw: random.Random, size: int) -> list[dict[str, str]]:
    """So many keys or some more, each a person and a thing, of so few that most are in several keys."""
    people = draw.sample(family.people, min(len(family.people), max(2, round(size**0.5))))
    things = draw.sample(family.things, min(len(family.things), 1 + size // len(people)))
    return [{"name": name, "thing": thing} for name in people for thing in things]


def copy(family: Family, draw: random.Random, size: int) -> Item:
    """A sequence of made-up words and nouns, and its repetition, of which all but two words are answers."""
    before, again = draw.choice(family.repeats)
    count = max(5, size)
    made = [pseudo_word(family, draw) if draw.random() < 0.5 else draw.choice(family.things) for _ in range(count)]
    parts = [f"{before} {' '.join(made)}{again} {' '.join(made[:2])}"]
    for word in made[2:]:
        parts += [f" {word}", ""]  # each word an answer of its own; nothing but induction tells the next
    return Item((*parts[:-1], "\n"))


def labels(family: Family, draw: random.Random, size: int) -> Item:
    """Words of two classes with labels that only the examples explain; the last three labels are the answers."""
    line, classes = draw.choice(family.labelled), list(family.classes)
    names = [name for name, _ in classes]
    draw.shuffle(names)  # which label a class carries changes from item to item
    words = [(word, name) for name, (_, own) in zip(names, classes, strict=True) for word in draw.sample(own, 4)]
    draw.shuffle(words)
    told = text = "".join(f"{line.format(word=word)} {name}\n" for word, name in words[:-3])
    lines, parts = [line.format(word=word) for word, _ in words[-3:]], list[str]()
    for asked, (_, name) in zip(lines, words[-3:], strict=True):
        parts += [text + asked, f" {name}"]
        text = "\n"
    return Item((*parts, text), told, tuple((asked, asked) for asked in lines))


def sums(family: Family, draw: random.Random, size: int) -> Item:
    """Three sums of numbers below ten as examples, and one to solve."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10) if family.adds(a, b)]
    form, equals = draw.choice(family.sums)
    some = draw.sample(pairs, 4)
    lines = [form.format(a=a, b=b) + equals for a, b in some]
    shown = "".join(f"{line} {a + b}\n" for line, (a, b) in zip(lines[:3], some, strict=False))
    return Item((shown + lines[3], f" {sum(some[3])}", "\n"))


def structure(family: Family, draw: random.Random, size: int) -> Item:
    """Code of which the last words follow from what stands before, or brackets that are to be closed."""
    if draw.random() < 0.5:
        names = draw.sample(family.things, 3)
        text, answer = (part.format(**dict(zip("xyz", names, strict=True))) for part in draw.choice(family.code))
        return Item((text, answer))
    shown = ""
    for last in (False, False, True):
        nested = [draw.choice(family.brackets) for _ in range(draw.choice((3, 4)))]
        inner = draw.choice(family.things)
        opened, closed = " ".join(a for a, _ in nested), " ".join(b for _, b in reversed(nested))
        shown += f"{opened} {inner}" if last else f"{opened} {inner} {closed}\n"
    return Item((shown, f" {closed}", "\n"))


def formats(family: Family, draw: random.Random, size: int) -> Item:
    """A form that is stated and shown twice, and then to be kept with other words."""
    told, form, demand = draw.choice(family.formats)
    text = demand
    for number in range(3):
        x, y = draw.sample(family.things, 2)
        text += told.format(x=x, y=y)
        answer = form.format(x=x, y=y)
        text += answer if number < 2 else ""
    return Item((text, answer.rstrip("\n"), "\n"))


CAPABILITIES: dict[str, Writer] = {
    "recall": recall, "lists": lists, "copy": copy, "labels": labels, "sums": sums, "structure": structure,
    "format": formats,
}  # fmt: skip
"""What is probed, in the order of tables."""
GROWING: Sequence[str] = ("recall", "lists", "copy")  # those that may be of any length


def capability_names(asked: str) -> tuple[str, ...]:
    """The capabilities that "all", "none" or names separated by commas mean, in the order of tables."""
    if asked in ("all", "none"):
        return tuple(CAPABILITIES) if asked == "all" else ()
    names = [name.strip() for name in asked.split(",")]
    if unknown := [name for name in names if name not in CAPABILITIES]:
        words = f"no capability is called {', '.join(map(repr, unknown))}"
        raise ConfigError(words, f"allowed are all, none, or some of {','.join(CAPABILITIES)}")
    return tuple(name for name in CAPABILITIES if name in names)
