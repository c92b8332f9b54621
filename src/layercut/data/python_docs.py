"""Text that every Python carries: the topics of its reference and the docstrings of its standard library.

Part of `data/sources.py`: two sources for machines without a network. No paragraph is in both, or in one of them
twice, so that what is trained on one can be measured on the other, or further on in the same one. Modules are
parsed, never imported. The text differs between versions of Python.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from layercut.errors import DataError

T = TypeVar("T")
SHORTEST = 200
"""Characters; what is left of a document after its repeated paragraphs are out is dropped when shorter."""
SKIPPED = re.compile(r"(^|/)(tests?|idle_test|site-packages|dist-packages|pydoc_data|__pycache__)/")


def python_docs(seed: int | None) -> Iterator[str]:
    """The topics of the language reference that CPython ships for `help()`, without what they repeat."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python comes without its documentation topics", "use --data self, or a file") from None
    seen: set[str] = set()
    # topics overlap: the longest keeps a paragraph that several have
    unique = {name: fresh(topics[name], seen) for name in sorted(topics, key=lambda n: (-len(topics[n]), n))}
    yield from in_order((unique[name] for name in sorted(unique) if len(unique[name]) >= SHORTEST), seed)


def python_docstrings(seed: int | None) -> Iterator[str]:
    """The docstrings of the standard library, a document a module, without what the topics or others have."""
    seen = {key for topic in python_docs(None) for key in map(_key, paragraphs(topic))}
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in in_order(sorted(name for name in names if not SKIPPED.search(name)), seed):
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse((root / name).read_bytes())
        except (SyntaxError, ValueError, OSError):  # a module kept for an older Python
            continue
        text = fresh("\n\n".join(docstrings(tree)), seen)
        if len(text) >= SHORTEST:
            yield text


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, outer ones first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and text.strip():
                yield text


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines."""
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def fresh(text: str, seen: set[str]) -> str:
    """The text without paragraphs that were seen before."""
    kept = []
    for part in paragraphs(text):
        if (key := _key(part)) not in seen:
            seen.add(key)
            kept.append(part)
    return "\n\n".join(kept)


def _key(paragraph: str) -> str:
    """A paragraph, however it is wrapped and indented."""
    return " ".join(paragraph.split())


def in_order(items: Iterable[T], seed: int | None) -> list[T]:
    """A list of the items, shuffled by the seed if there is one."""
    items = list(items)
    if seed is not None:
        random.Random(seed).shuffle(items)
    return items
