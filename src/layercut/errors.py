"""Everything that can be wrong with a user's input.

Raised anywhere, caught in one place (`cli.command_line.main`), which prints two lines and exits with 2:

    error: what was got, and what is allowed
    hint: the command or step that corrects it

Any other exception is a fault of layercut and exits with 1.
"""

from __future__ import annotations

from unicodedata import category


class LayercutError(Exception):
    """A wrong input. `message` says what was got and what is allowed, `hint` how to correct it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(LayercutError):
    """A flag, a YAML key or a combination of them that does not make sense."""


class ModelError(LayercutError):
    """A model that cannot be found, read, trusted or used."""


class DataError(LayercutError):
    """Text that cannot be found or read, or that is too short."""


class SurgeryError(LayercutError):
    """Layers that cannot be cut out of this architecture without changing what the others compute."""


class RunError(LayercutError):
    """A run folder that cannot be written, resumed or reported on."""


def shown(text: str) -> str:
    """Text for a terminal: control and formatting characters, which names of files and tensors may hold, escaped."""
    return "".join(f"\\x{ord(c):02x}" if category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
