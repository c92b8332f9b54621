"""A Modelfile for Ollama, from what a GGUF file says of its tokenizer and chat template.

ollama create NAME -f small.Modelfile
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercut.data.chat_templates import render_template
from layercut.errors import LayercutError
from layercut.export.chat_format import ChatFormat, chat_format
from layercut.models.gguf_header import read_header

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
CONTROL = 3
"""Type of a token that no text is tokenized to."""
ENDS = ("eos", "eot", "eom")
OWN = "Ollama then looks for the one of its own templates that is nearest to the file's."


def modelfile(file: Path) -> str:
    """FROM, TEMPLATE where the file's chat template can be said in Go's, and PARAMETER stop for the ends of a turn."""
    header = read_header(file, texts={TOKENS})
    values, tokens = header.values, header.values.get(TOKENS, [])
    special = {name: _token(values, tokens, name) for name in ("bos", "unknown", *ENDS, "padding")}
    found, why = _format(values, special)
    lines = [f"FROM ./{file.name}"]
    if found:
        lines.append(f'TEMPLATE """{found.to_go()}"""')
    else:
        lines.append(f"# No TEMPLATE: {why}. {OWN}")
    control = {text for text, kind in zip(tokens, values.get(TYPES, []), strict=False) if kind == CONTROL}
    stops = [special[name] for name in ENDS] + ([_first(found.asked, control)] if found else [])
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops) if stop]
    return "\n".join(lines) + "\n"


def _token(values: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    number = values.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _format(values: Mapping[str, Any], special: Mapping[str, str | None]) -> tuple[ChatFormat | None, str]:
    """The chat format, or why there is none."""
    template = values.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return None, "the file has no chat template"
    named = {f"{name}_token": text for name, text in special.items() if name in ("bos", "eos") and text}
    try:
        found = chat_format(template, lambda messages: render_template(template, messages, named, prompt=True))
    except LayercutError as error:
        return None, f"the file's chat template cannot be said in Go's: {' '.join(error.message.split())}"
    written_by_engine = values.get("tokenizer.ggml.add_bos_token") is not False and special["bos"]
    return found.without_first(special["bos"] or "") if written_by_engine else found, ""


def _first(text: str, control: set[str]) -> str | None:
    """The control token with which a text begins, white space aside."""
    text = text.lstrip()
    return max((token for token in control if token and text.startswith(token)), key=len, default=None)
