"""The result of endpoint tuning (`endpoint_tuning.py`)."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any

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
