"""Values of a run's JSON files, read with care, and figures as the text people see.

Used by all of `report/`, at the end of the journey. A file may be old, partial, or hold inf and nan; whatever is not a
usable number becomes None here, and "not measured" in words.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from typing import Any

from layercut.files import sizes

NOT_MEASURED = "not measured"


class Json:
    """A value of a JSON file, read with care: an attribute or item that is not there is a Json of nothing.

    It is true where the value is, and prints as the value, or as nothing. A list gives its elements.
    """

    def __init__(self, value: Any = None) -> None:
        self._value: Any = value._value if isinstance(value, Json) else value

    def __getattr__(self, name: str) -> Json:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Json:
        return Json(self._value.get(name) if isinstance(self._value, dict) else None)

    def __iter__(self) -> Iterator[Json]:
        return map(Json, self._value if isinstance(self._value, list) else [])

    def entries(self) -> list[tuple[str, Json]]:
        """Keys and values of an object."""
        return [(str(k), Json(v)) for k, v in self._value.items()] if isinstance(self._value, dict) else []

    def __eq__(self, other: object) -> bool:
        return bool(self._value == Json(other)._value)

    def __hash__(self) -> int:
        return hash(str(self._value))

    def __bool__(self) -> bool:
        return bool(self._value)

    def __str__(self) -> str:
        return "" if self._value is None else str(self._value)


def plain(value: Any) -> Any:
    """The value in a Json; anything else as it is."""
    return value._value if isinstance(value, Json) else value


def number(value: Any) -> float | None:
    """A JSON value as a float, also from a string, and also inf or nan; None if it is no number."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def finite(value: Any) -> float | None:
    """As `number`, but None for inf and nan as well."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def whole_number(value: Any) -> int | None:
    """A JSON value that is an int, such as a count of layers; None if it is not."""
    value = plain(value)
    return value if type(value) is int else None


def spans(value: Any) -> list[tuple[int, int]]:
    """[[13, 19], …] as half-open pairs; anything that is not a pair of whole numbers is dropped."""
    pairs = plain(value) if isinstance(plain(value), list) else []
    return [
        (pair[0], pair[1])
        for pair in map(plain, pairs)
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
    ]


def count(value: Any) -> str:
    """A large number with its unit: 134515008 -> 134.5M."""
    found = finite(value)
    if found is None:
        return NOT_MEASURED
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(found) >= limit:
            return f"{found / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{found:,.0f}"


def size(value: Any) -> str:
    """Bytes with their unit: 269030016 -> 269.0 MB."""
    found = finite(value)
    return NOT_MEASURED if found is None else sizes.size(found)


def figure(value: Any) -> str:
    """A perplexity, loss or speed, to about four digits; inf and nan are said in words."""
    found = number(value)
    if found is None:
        return NOT_MEASURED
    if not math.isfinite(found):
        return "not finite"
    if abs(found) >= 1000:
        return f"{found:,.0f}"
    return f"{found:.1f}" if abs(found) >= 100 else f"{found:.2f}" if abs(found) >= 1 else f"{found:.4g}"


def short(perplexity: Any) -> str:
    """A perplexity in few characters, so that a ruined model's does not push columns off the table."""
    found = finite(perplexity)
    return count(found) if found is not None and found >= 1e5 else figure(perplexity)


def deviation(error: float) -> str:
    """A standard error to two digits, from 100 on to a whole one: 0.7111 -> 0.71, 115.2 -> 115."""
    return f"{error:.2g}" if error < 99.5 else f"{error:,.0f}" if error < 1e5 else short(error)


def percent(value: Any) -> str:
    """A share in percent: 0.158 -> 15.8%."""
    found = finite(value)
    return NOT_MEASURED if found is None else f"{100 * found:.1f}%".replace("-", "−")


def signed(rise: Any) -> str:
    """A relative change in percent, signed: 0.041 -> +4.1%."""
    found = finite(rise)
    return "not finite" if found is None else f"{100 * found:+,.1f}%".replace("-", "−")


def times(value: Any) -> str:
    """A ratio: 1.25 -> 1.25×."""
    found = finite(value)
    return NOT_MEASURED if found is None else f"{found:,.0f}×" if found >= 100 else f"{found:.2f}×"


def with_error(factor: float, error: float) -> str:
    """A ratio with its standard error: 1.25, 0.008 -> 1.25× ± 0.01."""
    absolute = factor * error
    return f"{times(factor)} ± {absolute:.2f}" if absolute >= 0.005 else f"{factor:.4f}× ± {absolute:.4f}"


def change(before: Any, after: Any) -> str:
    """Relative change, signed: 30, 24 -> −20.0%."""
    old, new = finite(before), finite(after)
    if not old or new is None:
        return ""
    return f"{100 * (new / old - 1):+.1f}%".replace("-", "−")


def duration(value: Any) -> str:
    """Seconds in words: 83.2 -> 1 min 23 s."""
    found = finite(value)
    if found is None:
        return NOT_MEASURED
    if found < 60:
        return f"{found:.1f} s"
    minutes, seconds = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def label(segments: Any) -> str:
    """Segments as the flags spell them: [[13, 19]] -> 13:19."""
    return ", ".join(f"{start}:{stop}" for start, stop in spans(segments)) or "none"


def layer_names(segments: Any) -> str:
    """The layers of segments: [[13, 19], [24, 25]] -> 13–18, 24."""
    names = [f"{a}–{b - 1}" if b - a > 1 else f"{a}" for a, b in spans(segments)]
    return ", ".join(names)


def printable(value: Any) -> str:
    """One line of text with no control characters, for terminals, titles and Markdown."""
    text = "" if value is None else str(value)  # of a Json of nothing, nothing
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def short_name(model: Any) -> str:
    """A Hub id as it is; of a path, the last part."""
    text = printable(model)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".") and not text.endswith(".gguf")
    return text if is_hub_id else re.split(r"[/\\]", text.rstrip("/\\"))[-1] or "the model"


LOCAL = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".gguf", ".safetensors", ".yaml", ".yml")


def is_local(text: str) -> bool:
    """Whether a word is a path on this machine rather than a Hub id or a word."""
    bare = text.partition(":")[0].lower()
    return text.startswith(("/", "~", ".")) or "\\" in text or text.count("/") > 1 or bare.endswith(LOCAL)


def base_name(text: str) -> str:
    """Of a path its last part, for where it lies is nobody's business; anything else as it is."""
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if is_local(text) else text


def source_name(source: Any) -> str:
    """A text source that may be published: files by their base names, A+B part by part."""
    return "+".join(map(base_name, printable(source).split("+")))


def command_line(command: Any) -> str:
    """A command that may be published: every path in it by its base name; --flag=PATH and A+B too."""
    words = []
    for word in map(str, Json(command)):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(shlex.quote(f"{flag}{equals}{source_name(value)}"))
    return printable(" ".join(words))
