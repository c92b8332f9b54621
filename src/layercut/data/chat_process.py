"""Renders chats in a process of its own: a template that never ends, or fills the memory, ends there.

Started by `data/chat_templates.py`, which waits for it so long and no longer. Knows nothing of layercut. Reads a line
of JSON for each chat, {"template", "messages", "special", "prompt", "today"}, and writes one, {"text"} or {"error"}
or {"limit"}.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

MEMORY = 2**30
"""Bytes that rendering may take beyond what the libraries do."""
LONGEST = 2**26
"""Characters of a rendered chat."""


class Clock:
    """What templates that write the date see, as SmolLM3's does: one day in all text, today where a person chats."""

    real = False

    @classmethod
    def now(cls) -> datetime:
        """The time, or the beginning of that day."""
        return datetime.now() if cls.real else datetime(2024, 7, 26)


def bound_memory() -> None:
    """Let allocations fail beyond what is mapped now and MEMORY, where the system has such a limit."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        return


def answer(asked: dict[str, Any]) -> dict[str, str]:
    """One chat, rendered as `apply_chat_template` would."""
    from transformers.utils.chat_template_utils import render_jinja_template

    Clock.real = asked["today"]
    try:
        (text,), _ = render_jinja_template(
            conversations=[asked["messages"]],
            chat_template=asked["template"],
            add_generation_prompt=asked["prompt"],
            **asked["special"],
        )
    except MemoryError:
        return {"limit": f"it takes more than {MEMORY / 1e9:.1f} GB"}
    except Exception as error:  # templates raise what they like, e.g. for roles that do not alternate
        lines = str(error).splitlines()
        return {"error": lines[0][:300] if lines else type(error).__name__}
    return {"text": text} if len(text) <= LONGEST else {"limit": f"it writes {len(text):,} characters"}


def main() -> None:
    """Read a chat a line from stdin, and write it rendered to stdout."""
    from transformers.utils import chat_template_utils  # before the memory is bounded

    chat_template_utils.datetime = Clock
    bound_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
