"""JSON as dataclasses: whether a file of a run is what was written, and of the type that is asked for.

`decode` turns JSON into dataclasses and raises Damaged where a key is missing or of another type; `jsonable`
(`files/json_values.py`) is its inverse. `seal` and `check_seal` find what types cannot, such as a number that was
changed.
"""

from __future__ import annotations

import hashlib
import json
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from layercut.files.json_values import NOT_FINITE

Kind = TypeVar("Kind")
SEAL = "content_hash"


class Damaged(ValueError):
    """JSON that is not what the stage wrote; the message says where."""


# --- from JSON -------------------------------------------------------------------------------------------------------


def decode(kind: type[Kind], content: Any, where: str = "") -> Kind:
    """JSON as a `kind`: a dataclass, or whatever its fields may be.

    Fields may be bool, int, float (also as one of NOT_FINITE), str, Any, dataclasses, Literal, X | None, list[X],
    dict[str, X], tuple[X, Y] and tuple[X, ...]. A key that is not there takes the field's default.
    """
    return _decoded(kind, content, where or getattr(kind, "__name__", "the artefact"))


def _decoded(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return content
    if is_dataclass(kind):
        return _dataclass(kind, content, where)
    if origin in (Union, types.UnionType):
        return _first_that_fits(arguments, content, where)
    if origin is Literal:
        return _checked(any(content is one or (content == one and type(content) is type(one)) for one in arguments),
                        content, kind, where)  # fmt: skip
    if origin in (list, tuple):
        return _sequence(kind, content, where)
    if origin is dict:
        _checked(isinstance(content, dict), content, kind, where)
        return {key: _decoded(arguments[1], value, f"{where}.{key}") for key, value in content.items()}
    if kind is float:
        return _float(content, where)
    # True is an int to Python and a bool to JSON
    return _checked(type(content) is kind, content, kind, where)


def _checked(right: bool, content: Any, kind: Any, where: str) -> Any:
    if not right:
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise Damaged(f"{where} is {str(content)[:40]!r}, and not of type {name}")
    return content


def _dataclass(kind: Any, content: Any, where: str) -> Any:
    _checked(isinstance(content, dict), content, kind, where)
    hints, found = _hints(kind), {}
    for each in fields(kind):
        if each.name in content:
            found[each.name] = _decoded(hints[each.name], content[each.name], f"{where}.{each.name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise Damaged(f"{where}.{each.name} is missing")
    return kind(**found)


def _first_that_fits(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    if content is None and type(None) in kinds:
        return None
    faults = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _decoded(kind, content, where)
        except Damaged as fault:
            faults.append(fault)
    raise faults[0]


def _sequence(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    _checked(isinstance(content, list | tuple), content, kind, where)
    if origin is list or arguments[1:] == (...,):
        return origin(_decoded(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(content))
    _checked(len(content) == len(arguments), content, kind, where)
    return tuple(_decoded(one, value, f"{where}[{i}]") for i, (one, value) in enumerate(zip(arguments, content)))  # noqa: B905


def _float(content: Any, where: str) -> float:
    right = type(content) in (int, float) or (isinstance(content, str) and content in NOT_FINITE)
    try:
        number = float(_checked(right, content, float, where))
    except OverflowError:
        raise Damaged(f"{where} is larger than any number of the processor") from None
    return content if type(content) is int else number  # whole numbers stay as they were written


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


# --- the seal --------------------------------------------------------------------------------------------------------


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of all that is in it."""
    return content | {SEAL: _hash(content)}


def check_seal(content: dict[str, Any]) -> None:
    """Damaged where a JSON object is not as it was sealed; an object without a seal is of an older layercut."""
    if SEAL in content and content[SEAL] != _hash(content):
        raise Damaged("it is not as it was written")


def _hash(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
