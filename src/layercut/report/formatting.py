"""Values of a run's JSON files, read with care, and figures as the text people see.

A file may be old, partial, or hold inf and nan; whatever is not a usable number becomes None here, and "not measured"
in words.
"""

from __future__ import annotations

import html
import math
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut import files, progress

if TYPE_CHECKING:
    from jinja2 import Environment

NOT_MEASURED = "not measured"
LOCAL = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".gguf", ".safetensors", ".yaml", ".yml")


class Json:
    """A value of a JSON file: an attribute or item that is not there is a Json of nothing.

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


# ---- figures as text -----------------------------------------------------------------------------------------


def count(value: Any) -> str:
    """A large number with its unit: 134515008 -> 134.5M."""
    found = finite(value)
    if found is None:
        return NOT_MEASURED
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(found) >= limit:
            return f"{found / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{found:,.0f}"


def whole(value: Any) -> str:
    """A whole number: 1234567 -> 1,234,567."""
    found = finite(value)
    return NOT_MEASURED if found is None else f"{found:,.0f}"


def size(value: Any) -> str:
    """Bytes with their unit: 269030016 -> 269.0 MB."""
    found = finite(value)
    return NOT_MEASURED if found is None else files.size(found)


def figure(value: Any) -> str:
    """A perplexity, loss or speed, to about four digits; inf and nan are said in words."""
    found = number(value)
    if found is None:
        return NOT_MEASURED
    if not math.isfinite(found):
        return "not finite"
    if abs(found) >= 1e5:
        return count(found)
    if abs(found) >= 1000:
        return f"{found:,.0f}"
    return f"{found:.1f}" if abs(found) >= 100 else f"{found:.2f}" if abs(found) >= 1 else f"{found:.4g}"


def dash(value: Any, show: Callable[[Any], str] | None = None) -> str:
    """A number as text; a dash where there is none."""
    return "–" if number(value) is None else (show or figure)(value)


def deviation(error: float) -> str:
    """A standard error to two digits: 0.7111 -> 0.71."""
    return f"{error:.2g}" if error < 99.5 else figure(error)


def plus_minus(score: Any, error: Any) -> str:
    """A score and its standard error: 0.430 ± 0.050."""
    value, off = finite(score), finite(error)
    if value is None:
        return figure(score)
    shown = f"{value:.3f}" if abs(value) < 10 else figure(value)
    return shown + (f" ± {off:.3f}" if off is not None else "")


def probability(value: Any) -> str:
    """A p-value to three places; a dash where there is none."""
    found = finite(value)
    return "–" if found is None else "<0.001" if found < 0.001 else f"{found:.3f}"


def percent(value: Any) -> str:
    """A share in percent: 0.158 -> 15.8%."""
    found = finite(value)
    return NOT_MEASURED if found is None else f"{100 * found:.1f}%".replace("-", "−")


def signed(rise: Any) -> str:
    """A relative change in percent, signed: 0.041 -> +4.1%."""
    found = finite(rise)
    return "not finite" if found is None else f"{100 * found:+,.1f}%".replace("-", "−")


def change(before: Any, after: Any) -> str:
    """Relative change, signed: 30, 24 -> −20.0%."""
    old, new = finite(before), finite(after)
    return signed(new / old - 1) if old and new is not None else ""


def times(value: Any, log_error: Any = None) -> str:
    """A ratio, with the standard error of its logarithm: 1.25 -> 1.25×, 1.25 and 0.008 -> 1.25× ± 0.01."""
    found, error = finite(value), finite(log_error)
    if found is None:
        return NOT_MEASURED
    plain_ratio = f"{found:,.0f}×" if found >= 100 else f"{found:.2f}×"
    if error is None:
        return plain_ratio
    return f"{plain_ratio} ± {found * error:.2f}" if found * error >= 0.005 else f"{found:.4f}× ± {found * error:.4f}"


def duration(value: Any) -> str:
    """Seconds in words: 83.2 -> 1 min 23 s."""
    found = finite(value)
    if found is None:
        return NOT_MEASURED
    return f"{found:.1f} s" if found < 60 else progress.duration(found)


def label(segments: Any) -> str:
    """Segments as the flags spell them: [[13, 19]] -> 13:19."""
    return ", ".join(f"{start}:{stop}" for start, stop in spans(segments)) or "none"


def layer_names(segments: Any) -> str:
    """The layers of segments: [[13, 19], [24, 25]] -> 13–18, 24."""
    return ", ".join(f"{a}–{b - 1}" if b - a > 1 else f"{a}" for a, b in spans(segments)) or "none"


# ---- names and texts of users --------------------------------------------------------------------------------


def printable(value: Any) -> str:
    """One line of text with no control characters, for terminals, titles and Markdown."""
    text = "" if value is None else str(value)  # of a Json of nothing, nothing
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def short_name(model: Any) -> str:
    """A Hub id as it is; of a path, the last part."""
    text = printable(model)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".") and not text.endswith(".gguf")
    return text if is_hub_id else re.split(r"[/\\]", text.rstrip("/\\"))[-1] or "the model"


def base_name(text: str) -> str:
    """Of a path on this machine its last part, since where it lies is private; a Hub id or a word as it is."""
    local = text.startswith(("/", "~", ".")) or "\\" in text or text.count("/") > 1
    local = local or text.partition(":")[0].lower().endswith(LOCAL)
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if local else text


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


def code(value: Any) -> str:
    """Text as a Markdown code span that cannot end early, hold markup, break a table or start a new line."""
    text = printable(value).replace("|", "¦").replace("`", "'")
    return f"`{text}`" if text else NOT_MEASURED


def prose(value: Any) -> str:
    """Text inside a Markdown sentence or cell, with all that HTML or Markdown would act on made harmless."""
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(printable(value), quote=False))


def page(file: str, **facts: Any) -> str:
    """A filled template of templates/: HTML, in which everything is escaped, or Markdown."""
    return _environment(escape=file.endswith(".html")).get_template(file).render(facts)


@cache
def _environment(*, escape: bool) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=escape,
        undefined=StrictUndefined,  # a name that no fact has is an error; what a run lacks is an empty Json
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {function.__name__: function for function in (code, figure, prose, source_name)}
    return env
