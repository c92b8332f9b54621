"""What tuning found; and its state while it is under way, on disk, from which it is resumed to the very same bits.

The state is one safetensors file: float32 masters, AdamW's moments, the best weights so far, and in its header the
step, the curves and a key. It is written every few minutes and when the process is asked to stop.
"""

from __future__ import annotations

import html
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layercut.files import write_atomically
from layercut.plotting import axes_or_new


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """What was trained and how it went. Losses are means per token, in nats for logits."""

    objective: str
    """Its name."""
    label: str
    """What reports call the objective."""
    tokens: int
    """Tokens trained on."""
    steps: int
    """Optimizer steps planned."""
    learning_rate: float
    """Peak rate of AdamW; of what was rounded, as a share of each unit (`tune_parameters_`)."""
    trained_layers: list[int]
    """Positions in the cut model."""
    trained_parameters: int
    train: str
    """Which: "endpoints", "all" layers, "lora", or what was "rounded"."""
    state_bytes: int
    """Bytes of masters, their gradients and AdamW's moments; the trained weights themselves come on top."""
    curve: list[dict[str, float]]
    """After each step: step, tokens, loss of its rows (each token's by its weight, where they have some), seconds and
    cpu_seconds so far."""
    heldout: list[dict[str, float]]
    """Before the first step and at each score: step, tokens, loss; of a mixture each term of it too, by its name."""
    best_step: int
    """After which the student was as it was left; 0 where no step was an improvement."""
    setbacks: list[int]
    """Steps after which the held-out loss stood above that of the start (`is_setback`): each time training went on from
    the best state, at a quarter of the rate."""
    tokens_per_second: float
    seconds: float
    """Of training, without scoring; over all processes where it was stopped and resumed."""
    cpu_seconds: float
    """The same, of processor time over all threads: other work on the machine does not stretch it."""
    pass_rows: int = 1
    """Rows of tokens in one forward and backward pass, in the end."""
    loss_scale: float = 1.0
    """What losses were multiplied by before a backward pass, in the end: above 1 in float16."""

    @property
    def best(self) -> float:
        """The lowest held-out loss."""
        return min(point["loss"] for point in self.heldout)

    def to_dict(self) -> dict[str, Any]:
        """Of JSON values alone, by the fields' names."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """What matters of it as a table, in a notebook."""
        rows = {
            "objective": self.label,
            "trained layers": ", ".join(map(str, self.trained_layers)),
            "trained parameters": f"{self.trained_parameters:,}",
            "tokens": f"{self.tokens:,}",
            f"held-out {self.label}": f"{self.heldout[0]['loss']:.4g} → {self.best:.4g}",
            "kept": f"after step {self.best_step} of {self.steps}",
        }
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{''.join(cells)}</table>"

    def plot(self, axes: Any = None) -> Any:
        """Training and held-out loss over the tokens trained on, the state that was kept marked.

        Args:
            axes: matplotlib Axes to draw into; new ones where not given.

        Returns:
            The Axes.
        """
        axes = axes_or_new(axes, xlabel="tokens trained on", ylabel=f"{self.label}, nats")
        for name, points in (("training", self.curve), ("held-out", self.heldout)):
            axes.plot([p["tokens"] for p in points], [p["loss"] for p in points], label=name)
        best = [(p["tokens"], p["loss"]) for p in self.heldout if p["step"] == self.best_step]
        axes.plot(*zip(*best, strict=True), "o", mfc="none", label="kept")
        axes.legend()
        return axes


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
