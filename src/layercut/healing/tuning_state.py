"""The state of a tuning that is under way, on disk, so that a stopped one is resumed to the very same weights.

Beside endpoint tuning. One safetensors file: float32 masters, AdamW's moments, the best weights so far, and in its
header the step, the curves and a key. It is written by rename, every few minutes and when the process is asked to
stop; the pipeline removes it when the stage is done.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layercut.files.writing import write_atomically


class StateFile:
    """Where the state is kept, and when it is due again."""

    def __init__(self, path: Path, *, key: str = "", minutes: float = 5.0) -> None:
        self.path, self.key, self.minutes = path, key, minutes
        self._written = time.monotonic()

    def due(self) -> bool:
        """Whether the last write is so many minutes ago."""
        return time.monotonic() - self._written >= 60 * self.minutes

    def save(self, key: str, tensors: dict[str, Sequence[torch.Tensor]], facts: dict[str, Any]) -> None:
        """Write the state whole or not at all."""
        named = {f"{name}.{i}": t.detach().cpu() for name, many in tensors.items() for i, t in enumerate(many)}
        with write_atomically(self.path) as partial:
            save_file(named, partial, {"key": key, "facts": json.dumps(facts)})
        self._written = time.monotonic()

    def load(self, key: str) -> tuple[dict[str, list[torch.Tensor]], dict[str, Any]] | None:
        """What `save` was given, or None where there is no state of this key that can be read."""
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("key") != key:
                    return None
                tensors: dict[str, list[torch.Tensor]] = {}
                for name in sorted(file.keys(), key=lambda name: int(name.rpartition(".")[2])):
                    tensors.setdefault(name.rpartition(".")[0], []).append(file.get_tensor(name))
                return tensors, json.loads(header["facts"])
        except (OSError, SafetensorError):
            return None


class Stop:
    """Whether this process was asked to stop, and by which signal. Never, unless something sets it."""

    signal: int | None = None

    def now(self) -> None:
        """Raise the signal again, so that it acts as it would have at once."""
        if self.signal is not None:
            signal.raise_signal(self.signal)


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """While open, the first SIGINT or SIGTERM is only noted, so that a step can be finished; a second one acts."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python gives signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: Any) -> None:
        stop.signal = number
        restore()

    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
    stop.now()


def never_asked() -> AbstractContextManager[Stop]:
    """What a library call uses instead: no signal handler is installed, and signals act at once."""
    return nullcontext(Stop())
