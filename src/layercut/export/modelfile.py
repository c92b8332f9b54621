"""A Modelfile for Ollama, from what a GGUF file says of its tokenizer and chat template.

    ollama create NAME -f small.Modelfile

Ollama takes templates of Go, not of Jinja. A chat template is a program; but most write fixed text before and after
every message. Chats whose messages are marks are rendered, what stands between the marks is taken as that text, and
further chats must come out the same from it. A template that does anything else (another text for the last message,
the date of the day) is left out, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from layercut.data.chat_templates import render_template
from layercut.errors import DataError, LayercutError
from layercut.models.gguf_header import read_header

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
CONTROL = 3  # type of a token that no text is tokenized to
ENDS = ("eos", "eot", "eom")
MARK = "QxZ{}ZxQ"
Message = dict[str, str]
Render = Callable[[list[Message]], str]  # a chat as the template writes it, up to where the model is to answer


def modelfile(file: Path) -> str:
    """FROM, TEMPLATE where the file's chat template can be said in Go's, and PARAMETER stop for the ends of a turn."""
    values = read_header(file, texts={TOKENS}).values
    tokens, template = values.get(TOKENS, []), values.get("tokenizer.chat_template")
    numbers = {name: values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", *ENDS)}
    special = {name: tokens[n] for name, n in numbers.items() if isinstance(n, int) and 0 <= n < len(tokens)}
    stops, lines = [special.get(name) for name in ENDS], [f"FROM ./{file.name}"]
    try:
        if not isinstance(template, str):
            raise DataError("the file has no chat template")
        named = {f"{name}_token": special[name] for name in ("bos", "eos") if special.get(name)}
        try:
            found = chat_format(template, lambda chat: render_template(template, chat, named, prompt=True))
        except LayercutError as error:
            why = " ".join(error.message.split())
            raise DataError(f"the file's chat template cannot be said in Go's: {why}") from None
        if special.get("bos") and values.get("tokenizer.ggml.add_bos_token") is not False:  # the engine writes it
            found = found.without_first(special["bos"])
        lines.append(f'TEMPLATE """{found.to_go()}"""')
        control = {text for text, kind in zip(tokens, values.get(TYPES, []), strict=False) if text and kind == CONTROL}
        stops.append(max(filter(found.asked.lstrip().startswith, control), key=len, default=None))
    except DataError as error:
        own = "Ollama then looks for the one of its own templates that is nearest to the file's."
        lines.append(f"# No TEMPLATE: {error.message}. {own}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops) if stop]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The text around the messages of a chat in which user and assistant take turns."""

    opening: str  # before the first message of the user, where there is no system message
    system: tuple[str, str] | None  # before a system message, and behind it; None: the template refuses one
    answered: str  # between a message of the user and the answer to it
    asked: str  # between an answer and the user's next message
    answering: str  # between the user's last message and the answer that the model is to give

    def render(self, messages: Sequence[Message]) -> str:
        text = self.opening
        if messages[0]["role"] == "system":
            assert self.system
            text, messages = self.system[0] + messages[0]["content"] + self.system[1], messages[1:]
        between = {"user": self.asked, "assistant": self.answered}
        text += messages[0]["content"]
        return text + "".join(between[m["role"]] + m["content"] for m in messages[1:]) + self.answering

    def without_first(self, token: str) -> ChatFormat:
        system = (self.system[0].removeprefix(token), self.system[1]) if self.system else None
        return replace(self, opening=self.opening.removeprefix(token), system=system)

    def to_go(self) -> str:
        """The same as a template of Go's text/template over .System and .Messages, as Ollama takes it."""
        opening, asked, answered, answering = map(_written, (self.opening, self.asked, self.answered, self.answering))
        if self.system:
            before, after = map(_written, self.system)
            opening = "{{ if .System }}" + before + "{{ .System }}" + after + "{{ else }}" + opening + "{{ end }}"
        user = "{{ if $asked }}" + asked + "{{ end }}{{ $asked = true }}{{ .Content }}"
        turn = '{{ if eq .Role "user" }}' + user
        turn += '{{ else if eq .Role "assistant" }}' + answered + "{{ .Content }}{{ end }}"
        return opening + "{{ $asked := false }}{{ range .Messages }}" + turn + "{{ end }}" + answering


def chat_format(template: str, render: Render) -> ChatFormat:
    """Find the text that a chat template writes around messages. DataError: it is not of that kind."""
    if "strftime_now" in template:
        raise DataError("it writes the date of the day")
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    system, *talk = ({"role": role, "content": MARK.format(number)} for number, role in enumerate(roles))
    opening, answering = _around(render, talk[:1])
    begun, answered, asked, ended = _around(render, talk[:3])
    if (begun, ended) != (opening, answering):
        raise DataError("what it writes around a message depends on how many there are")
    chats = [talk[:1], talk[:5]]
    try:
        before, after, _ = _around(render, [system, talk[0]])
        found: tuple[str, str] | None = (before, after)
        chats += [[system, *talk[:1]], [system, *talk[:3]]]
    except LayercutError:
        found = None
    made = ChatFormat(opening=opening, system=found, answered=answered, asked=asked, answering=answering)
    if any(made.render(chat) != render(chat) for chat in chats):
        raise DataError("what it writes around a message depends on where it stands")
    return made


def _around(render: Render, chat: list[Message]) -> list[str]:
    """What is written before, between and after the messages, which must all be there, once and in their order."""
    text = render(chat)
    places = [(0, 0)]
    for message in chat:
        found = [hit.span() for hit in re.finditer(re.escape(message["content"]), text)]
        if len(found) != 1 or found[0][0] < places[-1][1]:
            raise DataError(f"it does not write the message of the {message['role']} once, in its place")
        places += found
    return [text[end:start] for (_, end), (start, _) in pairwise([*places, (len(text), len(text))])]


def _written(text: str) -> str:
    """A template of Go that writes this text: a string literal, in which no white space is lost."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '{{ "' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '" }}'
