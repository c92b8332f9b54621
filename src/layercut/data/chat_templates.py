"""Chat templates, rendered within bounds of time and memory; used for text and by evaluation.

A template is a program that comes with the checkpoint. jinja2's sandbox keeps it from files and attributes, but it can
loop for ever or build a string larger than memory. So this file, run by itself, is a process that renders: it reads a
line of JSON for each chat, {"template", "messages", "special", "prompt", "today"}, and writes one, {"text"}, {"error"}
or {"limit"}; the process is ended when a chat takes too long.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from layercut.errors import DataError, ModelError

START, LONGEST = 300.0, 10.0
"""Seconds that the process may take to start, and to render one chat; a chat of a thousand messages takes 0.01 s."""
MEMORY, CHARACTERS = 2**30, 2**26
"""Bytes that rendering may take beyond what the libraries do, and characters of a rendered chat."""
HINT = "leave out chat_template=True, or correct the data"
PROMPT_HINT = "correct the checkpoint's chat template (chat_template.jinja or tokenizer_config.json), or delete it"


class _Renderer:
    """The process that renders, started when it is first needed and again after it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.end)

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """The process's answer; "limit" where there was none in time."""
        try:
            process = self._process or self._start()
            assert process.stdin
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
            found = self._line(process, LONGEST)
        except OSError:  # it was ended from outside, or has run out of memory
            found = b""
        if found:
            return json.loads(found)
        self.end()
        return {"limit": f"it did not end in {LONGEST:g} seconds" if found is None else "it ended its process"}

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of the file is no place to import from
        environment, pipe = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment
        )
        if not self._line(self._process, START):
            self.end()
            raise ModelError("chat templates cannot be rendered: the process for it does not start", HINT)
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line it writes; None where it takes longer, empty where it has ended."""
        assert process.stdout
        found, until = bytearray(), time.monotonic() + seconds
        while not found.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            if not (read := process.stdout.raw.read(2**20)):  # type: ignore[attr-defined]
                return b""
            found += read
        return bytes(found)

    def end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


_renderer = _Renderer()


def render_chat(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False, today: bool = False) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # none, or several of which none is the default
        hint = PROMPT_HINT if prompt else HINT
        raise DataError(f"the tokenizer's chat template cannot be used: {str(error)[:300]}", hint) from None
    return render_template(template, messages, tokenizer.special_tokens_map, prompt=prompt, today=today)


def render_template(
    template: str,
    messages: list[dict[str, str]],
    special: Mapping[str, Any],
    *,
    prompt: bool = False,
    today: bool = False,
) -> str:
    roles, hint = ", ".join(message["role"] for message in messages), PROMPT_HINT if prompt else HINT
    asked = {"template": template, "messages": messages, "special": dict(special), "prompt": prompt, "today": today}
    found = _renderer.ask(asked)
    if "limit" in found:
        raise ModelError(f"the chat template cannot render a chat with the roles {roles}: {found['limit']}", hint)
    if "error" in found:
        raise DataError(f"the chat template refuses a record with the roles {roles}: {found['error']}", hint)
    return found["text"]


def prompt_ids(tokenizer: Any, prompt: str, answer: str = "") -> list[int]:
    """A prompt as tokens, through the chat template where there is one."""
    if not tokenizer.chat_template:
        return open_ended(tokenizer, f"{prompt} {answer}" if answer else prompt)
    text = render_chat(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
    return tokenizer(text + answer, add_special_tokens=False).input_ids


def open_ended(tokenizer: Any, text: str) -> list[int]:
    """Plain text as tokens that can be gone on with: some tokenizers close every text by themselves."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


# --- the process that renders -------------------------------------------------------------------------------


class Clock:
    """What templates that write the date see, as SmolLM3's does: one day in all text, today where a person chats."""

    real = False

    @classmethod
    def now(cls) -> datetime:
        return datetime.now() if cls.real else datetime(2024, 7, 26)


def _rendered(asked: dict[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    Clock.real, how = asked["today"], {"chat_template": asked["template"], "add_generation_prompt": asked["prompt"]}
    try:
        (text,), _ = render_jinja_template(conversations=[asked["messages"]], **how, **asked["special"])
    except MemoryError:
        return {"limit": f"it takes more than {MEMORY / 1e9:.1f} GB"}
    except Exception as error:  # templates raise what they like, e.g. for roles that do not alternate
        lines = str(error).splitlines()
        return {"error": lines[0][:300] if lines else type(error).__name__}
    return {"text": text} if len(text) <= CHARACTERS else {"limit": f"it writes {len(text):,} characters"}


def _render_all() -> None:
    """Read a chat a line from stdin, and write it rendered to stdout."""
    from transformers.utils import chat_template_utils  # before the memory is bounded

    chat_template_utils.datetime = Clock
    try:  # allocations fail beyond what is mapped now and MEMORY, where the system has such a limit
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_rendered(json.loads(line))), flush=True)


if __name__ == "__main__":
    _render_all()
