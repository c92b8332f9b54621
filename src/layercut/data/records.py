"""From a record of a data set, a line of JSON or a row of a table, to a document: a text, or the messages of a chat.

Part of `data/sources.py`. A record comes from anywhere: what is no text ends in a DataError that says where it stands.
"""

from __future__ import annotations

from typing import Any

from layercut.errors import DataError

Message = dict[str, str]
Document = str | list[Message]
Record = dict[str, Any]

CHAT, TEXTS = ("instruction", "output"), ("messages", "text", "page")
FIELDS = {*CHAT, "input", *TEXTS}
"""Fields that are read where no column is named."""


def as_document(record: Any, column: str | None, where: str) -> Document:
    """Read a record by its fields: the column asked for, else instruction, messages, text or page."""
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a {type(record).__name__}, not an object with fields", 'write {"text": "…"}')
    if column is None and all(key in record for key in CHAT):
        question = [str(record[key]) for key in ("instruction", "input") if record.get(key)]
        turns = {"user": "\n\n".join(question), "assistant": str(record["output"] or "")}
        return [{"role": role, "content": checked(text, where)} for role, text in turns.items()]
    allowed = [column] if column else TEXTS
    field = next((key for key in allowed if key in record), None)
    if field is None:
        raise DataError(
            f"{where} has no field {' or '.join(map(repr, allowed))}; its fields are {_names(record)}",
            "name the field that holds the text: FILE:FIELD, or owner/name:split:FIELD for a Hub set",
        )
    value = record[field]
    if value is None or isinstance(value, str):
        return checked(value or "", where)
    try:
        return [_message(turn, where) for turn in value]
    except (TypeError, KeyError):
        raise DataError(
            f"{where}: field {field!r} holds neither a text nor chat messages, but a {type(value).__name__}",
            "a chat is a list of messages with a role and a content",
        ) from None


def _message(turn: Any, where: str) -> Message:
    """A message of a chat. TypeError or KeyError where it is none."""
    role, content = turn["role"], turn["content"]
    if not isinstance(role, str):
        raise TypeError("a role is a word")
    if content is not None and not isinstance(content, str):  # typed parts, of which only the texts count
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(text for text in texts if text is not None)
    return {"role": checked(role, where), "content": checked(content or "", where)}


def checked(text: str, where: str) -> str:
    """A text that a tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character",
            "write the text as UTF-8, or leave the record out",
        ) from None
    return text


def _names(record: Record) -> str:
    """The fields of a record, as far as they fit on a line."""
    shown = [str(key)[:40].encode("ascii", "backslashreplace").decode() for key in list(record)[:12]]
    return ", ".join(shown + ["…"] * (len(record) > len(shown))) or "none"
