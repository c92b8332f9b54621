"""The words of reports: Jinja templates from templates/, and the filters that show a value in them.

`words` says one thing, `lines` gives a table's cells, `page` a whole document. All of `report/` speaks through these.
Pages escape everything; Markdown and the terminal take strings of users through `code`, `prose` or `printable`.
"""

from __future__ import annotations

import html
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.report import formatting
from layercut.report.formatting import NOT_MEASURED, finite, printable

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def words(file: str, macro: str, *values: Any, **facts: Any) -> str:
    """One line that a template's macro says."""
    said = getattr(_environment(escape=False).get_template(file).module, macro.lower().replace(" ", "_"))
    return " ".join(said(*values, **facts).split())


def lines(file: str, **facts: Any) -> list[list[str]]:
    """The cells of a table in plain text."""
    text = _environment(escape=False).get_template(file).render(facts).strip()
    return [[cell.strip() for cell in line.split("|")] if line.strip() else [] for line in text.splitlines()]


def page(file: str, **facts: Any) -> str:
    """A document: HTML, in which everything is escaped, or Markdown."""
    return _environment(escape=not file.endswith(".md")).get_template(file).render(facts)


@cache
def _environment(*, escape: bool) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,  # a name that no fact has is an error; what a run lacks is an empty Json
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in (
        "change", "count", "deviation", "duration", "figure", "finite", "label", "layer_names", "number", "percent",
        "printable", "short", "signed", "size", "source_name", "times", "with_error",
    ):  # fmt: skip
        env.filters[name] = getattr(formatting, name)
    for function in (cell, code, plus_minus, probability, prose, whole):
        env.filters[function.__name__] = function
    env.tests["known"] = lambda value: finite(value) is not None
    env.globals["change"] = formatting.change
    return env


def plus_minus(score: Any, error: Any) -> str:
    """A score and its standard error: 0.430 ± 0.050."""
    value, deviation = finite(score), finite(error)
    if value is None:
        return NOT_MEASURED
    shown = f"{value:.3f}" if abs(value) < 10 else formatting.figure(value)
    return shown + (f" ± {deviation:.3f}" if deviation is not None else "")


def probability(value: Any) -> str:
    """A p-value to three places; a dash where there is none."""
    found = finite(value)
    return "–" if found is None else "<0.001" if found < 0.001 else f"{found:.3f}"


def whole(value: Any, otherwise: str = NOT_MEASURED) -> str:
    """A whole number: 1234567 -> 1,234,567."""
    found = finite(value)
    return otherwise if found is None else f"{found:,.0f}"


def cell(value: Any) -> str:
    """Text in a line of cells with | between them."""
    return printable(value).replace("|", "¦")


def code(value: Any) -> str:
    """Text as a Markdown code span that cannot end early, hold markup, break a table or start a new line."""
    text = cell(value).replace("`", "'")
    return f"`{text}`" if text else NOT_MEASURED


def prose(value: Any) -> str:
    """Text inside a Markdown sentence, with everything that HTML or Markdown would act on made harmless."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(printable(value), quote=False))
