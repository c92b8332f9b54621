"""JSON of a run: strict on disk, numbers that are not finite as text, and read back as the dataclass it was."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from layercut.errors import LayercutError
from layercut.files.writing import write_atomically

Kind = TypeVar("Kind")
OPTIONAL = {"optional": True}
"""Metadata of a dataclass's field that JSON leaves out where it has its default."""
NOT_FINITE = {str(number): number for number in (math.inf, -math.inf, math.nan)}
SEAL = "content_hash"


class Damaged(ValueError):
    """JSON that is not what the stage wrote; the message says where."""


def digest(content: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(jsonable(content), sort_keys=True).encode()).hexdigest()[:16]


def jsonable(content: Any) -> Any:
    """Dataclasses as objects without OPTIONAL fields at their default, structs as lists, paths and infinite numbers as
    text.
    """
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [jsonable(value) for value in content]
    if isinstance(content, msgspec.Struct):
        return [jsonable(value) for value in msgspec.structs.astuple(content)]
    if is_dataclass(content) and not isinstance(content, type):
        held = ((each, getattr(content, each.name)) for each in fields(content))
        return {each.name: jsonable(value) for each, value in held if not _is_left_out(each, value)}
    return str(content) if isinstance(content, Path) else content


def _is_left_out(field: Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(field.metadata.get("optional")) and value == default


def restored(content: Any) -> Any:
    """The inverse of `jsonable` for numbers: "inf", "-inf" and "nan" in what was read from JSON are floats again."""
    if isinstance(content, str):
        return NOT_FINITE.get(content, content)
    if isinstance(content, dict):
        return {key: restored(value) for key, value in content.items()}
    return [restored(value) for value in content] if isinstance(content, list) else content


def decode(kind: type[Kind], content: Any) -> Kind:
    """JSON as a dataclass. Damaged: a key is missing or of another type."""
    try:
        return msgspec.convert(restored(content), kind)
    except (msgspec.ValidationError, LayercutError) as error:
        raise Damaged(str(error)) from None


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of all that is in it, which shows a changed number as types cannot."""
    return content | {SEAL: digest({key: value for key, value in content.items() if key != SEAL})}


def check_seal(content: dict[str, Any]) -> None:
    """Damaged where a JSON object is not as it was sealed."""
    if content.get(SEAL) != seal(content)[SEAL]:
        raise Damaged("it is not as it was written")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, so that the file is there whole or not at all."""
    write_text(path, json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write text so that the file is there whole or not at all."""
    with write_atomically(path) as partial:
        partial.write_text(content, encoding="utf-8")
