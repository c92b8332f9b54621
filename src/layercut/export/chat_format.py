"""A chat template as the few pieces of text around each message, found by rendering it, for programs without Jinja.

A template is a program; but most write fixed text before and after every message. Chats whose messages are marks are
rendered, what stands between the marks is taken as that text, and further chats must come out the same from it. A
template that does anything else (another text for the last message, the date of the day) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from layercut.errors import DataError, LayercutError

Message = dict[str, str]
Render = Callable[[list[Message]], str]
"""A chat as the template writes it, up to where the model is to answer."""
MARK = "QxZ{}ZxQ"


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The text around the messages of a chat in which user and assistant take turns."""

    opening: str
    """Before the first message of the user, where there is no system message."""
    system: tuple[str, str] | None
    """Before a system message, and between it and the user's first; None: the template refuses one."""
    answered: str
    """Between a message of the user and the answer to it."""
    asked: str
    """Between an answer and the user's next message."""
    answering: str
    """Between the user's last message and the answer that the model is to give."""

    def render(self, messages: Sequence[Message]) -> str:
        """The chat, up to where the model is to answer."""
        begun = self.opening
        if messages[0]["role"] == "system":
            assert self.system
            begun = self.system[0] + messages[0]["content"] + self.system[1]
            messages = messages[1:]
        between = {"user": self.asked, "assistant": self.answered}
        text = begun + messages[0]["content"]
        return text + "".join(between[m["role"]] + m["content"] for m in messages[1:]) + self.answering

    def without_first(self, token: str) -> ChatFormat:
        """Without a token at the very beginning, which the engine writes by itself."""
        system = (self.system[0].removeprefix(token), self.system[1]) if self.system else None
        return ChatFormat(
            opening=self.opening.removeprefix(token),
            system=system,
            answered=self.answered,
            asked=self.asked,
            answering=self.answering,
        )

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
    """Find the text that a chat template writes around messages."""
    if "strftime_now" in template:
        raise DataError("it writes the date of the day")
    system, *talk = (
        {"role": role, "content": MARK.format(number)}
        for number, role in enumerate(["system", "user", "assistant", "user", "assistant", "user"])
    )
    opening, answering = _around(render, talk[:1])
    begun, answered, asked, ended = _around(render, talk[:3])
    if (begun, ended) != (opening, answering):
        raise DataError("what it writes around a message depends on how many there are")
    try:
        before, after, _ = _around(render, [system, talk[0]])
    except LayercutError:
        found = None
    else:
        found = (before, after)
    made = ChatFormat(opening=opening, system=found, answered=answered, asked=asked, answering=answering)
    for chat in ([talk[0]], talk[:5], *([[system, talk[0]], [system, *talk[:3]]] if found else [])):
        if made.render(chat) != render(chat):
            raise DataError("what it writes around a message depends on where it stands")
    return made


def _around(render: Render, chat: list[Message]) -> list[str]:
    """What is written before, between and after the messages, which must all be there, once and in their order."""
    text = render(chat)
    places = [(0, 0)]
    for message in chat:
        found = [(hit.start(), hit.end()) for hit in re.finditer(re.escape(message["content"]), text)]
        if len(found) != 1 or found[0][0] < places[-1][1]:
            raise DataError(f"it does not write the message of the {message['role']} once, in its place")
        places += found
    return [text[end:start] for (_, end), (start, _) in pairwise([*places, (len(text), len(text))])]


def _written(text: str) -> str:
    """A template of Go that writes this text: a string literal, in which no white space is lost."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '{{ "' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '" }}'
