"""What every search returns: the segments, the candidates that it cut for real, and what that took."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import Any

from layercut.distributed import processes
from layercut.files import OPTIONAL, jsonable
from layercut.plotting import axes_or_new
from layercut.segments import Segment


@dataclass(frozen=True)
class Candidate:
    """Segments removed together, and KL(p || q) of the real cut on the calibration tokens, in nats per token."""

    segments: tuple[Segment, ...]
    kl: float
    score: float | None = field(default=None, metadata=OPTIONAL)
    """What the search minimised, where that is not the KL; lower is better."""
    probe_kl: float | None = field(default=None, metadata=OPTIONAL)
    """Mean KL over the capabilities that probes measure, in nats per answer token; where the search sees probes."""

    @property
    def merit(self) -> tuple[float, tuple[Segment, ...]]:
        """What candidates are sorted by: score, or KL where there is none; the earlier of equals."""
        return self.kl if self.score is None else self.score, self.segments

    def __str__(self) -> str:
        return ", ".join(map(str, self.segments))


@dataclass(frozen=True)
class Shortlisted:
    """Segments that were healed before the choice, and the KL left, in nats per token of text and of probes."""

    segments: tuple[Segment, ...]
    folded: float | None  # after a quick fold (`healing/quick_fold.py`); None where no layer of the model has one
    healed: float | None = field(default=None, metadata=OPTIONAL)
    """After a short healing; None where it went no further."""
    longer: float | None = field(default=None, metadata=OPTIONAL)
    """After a longer one; None where it was not among the close ones."""
    text: float | None = field(default=None, metadata=OPTIONAL)  # the part of `healed` that text has


@dataclass
class Cost:
    """What a search spent, independent of the machine. A criterion adds to it while it works."""

    dense_tokens: int = 0
    """Tokens that went through the whole dense model."""
    layer_forwards: int = 0
    """Layers applied to rows of tokens: one layer applied to one row [1, T] counts one."""
    layer_backwards: int = 0
    """Backward passes of one layer for one row."""

    def __add__(self, other: Cost) -> Cost:
        """What both spent."""
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def add_(self, share: Cost) -> None:
        """Add what every process spent on its share of the rows: on all of its parts, of which one may have more."""
        spent = processes.summed([share.dense_tokens, share.layer_forwards, share.layer_backwards])
        self.dense_tokens += int(spent[0])
        self.layer_forwards += int(spent[1])
        self.layer_backwards += int(spent[2])


@dataclass(frozen=True, kw_only=True)
class GateTrace:
    """The concave gate while it was trained (`concave_gate.py`)."""

    gates: list[list[float]]  # g of every step and layer, 0 (closed) to 1, of the wells from which the choice came
    losses: list[list[float]]
    """KL of the gated model by step, in nats per token, of all sets of wells until they were dropped; the choice's
    first."""
    proposed: list[tuple[Segment, ...]]
    """Whole layers nearest to the trained walls, from the least loss: what real cuts decided among."""


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search."""

    method: str
    """The criterion's name; "given" where the segments were given."""
    candidates: list[Candidate]
    """All that were cut for real on all tokens, from the best; at least one."""
    cost: Cost
    """What the criterion spent, without the real cut of what it picked."""
    budget: dict[str, Any] | None = None
    """What a loss budget allowed: {"max_loss", "rise", "lengths": [{"length", "segments", "rise"}]}, as shares."""
    by_text: Candidate | None = None
    """The best by the text alone, where probes were weighed with it."""
    by_number: list[Candidate] = field(default_factory=list)
    """The best of one segment, and of two at most, where the search compared them."""
    lighter: list[tuple[Segment, ...]] = field(default_factory=list)
    """Sets that would have been proposed if probes counted less; they raced too."""
    shortlist: list[Shortlisted] = field(default_factory=list)
    """Where candidates were healed before the choice: the choice, the others that were, the rest, from the best."""
    gate: GateTrace | None = field(default=None, metadata=OPTIONAL)
    """How the concave gate was trained, where it was."""
    first_by: dict[str, tuple[Segment, ...]] = field(default_factory=dict, metadata=OPTIONAL)
    """What each part of the search, where it has several, put first, in their order."""
    seconds: Any = field(default=0.0, compare=False)
    """Wall-clock time of the whole search, real cuts included."""
    segments: list[Segment] = field(init=False, compare=False)
    """The segments to remove, in order: those of the best candidate."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", list(self.candidates[0].segments))

    @property
    def kl(self) -> float:
        """KL(p || q) of the best candidate's real cut, in nats per token."""
        return self.candidates[0].kl

    def to_dict(self) -> dict[str, Any]:
        """All but the seconds as JSON values; segments are [start, stop]."""
        return {name: value for name, value in jsonable(self).items() if name != "seconds"}

    def plot(self, axes: Any = None) -> Any:
        """Draw each candidate as a bar over the layers that it removes, at the height of its KL; the best is marked.

        Of the concave gate, where no `axes` are given, two panels come before: the gates by step, and the losses.

        Args:
            axes: matplotlib Axes to draw on; new ones where not given.

        Returns:
            The Axes; of three panels the first.
        """
        first = None
        if self.gate and axes is None:
            first, losses, axes = gate_panels()
            draw_gate(self.gate, first, losses)
        best, finite = self.candidates[0], [c for c in self.candidates if math.isfinite(c.kl)]
        axes = axes_or_new(axes, xlabel="layers removed", ylabel="KL, nats per token", title=f"{self.method}: {best}")
        for candidate in reversed(finite):
            colour, width = ("tab:red", 3.0) if candidate is best else ("tab:gray", 1.0)
            for s in candidate.segments:
                axes.plot([s.start - 0.5, s.stop - 0.5], [candidate.kl] * 2, color=colour, linewidth=width)
        if finite and min(c.kl for c in finite) > 0:
            axes.set_yscale("log")
        return axes if first is None else first

    def _repr_html_(self, most: int = 10) -> str:
        """A table of the best candidates, for notebooks."""
        scored = any(c.score is not None for c in self.candidates)
        rows = [["remove", "KL (nats per token)", *(["score"] if scored else [])]]
        for c in self.candidates[:most]:
            rows.append([str(c), f"{c.kl:.4g}", *([f"{c.score:.4g}"] if c.score is not None else [])])
        head, *body = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        left = len(self.candidates) - most
        foot = f", {left} more candidates" if left > 0 else ""
        caption = f"{html.escape(self.method)}: {self.cost.layer_forwards:,} layer-forwards{foot}"
        head = head.replace("td>", "th>")
        return f"<table><caption>{caption}</caption><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def gate_panels() -> tuple[Any, Any, Any]:
    """Axes of three panels side by side."""
    import matplotlib.pyplot as plt

    return tuple(plt.figure(figsize=(11, 3.2), layout="constrained").subplots(1, 3))


def draw_gate(trace: GateTrace, gates: Any, losses: Any) -> None:
    """A heat map of the gates by step and layer, and the loss of every set of wells."""
    gates.imshow(list(zip(*trace.gates, strict=True)), aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
    gates.set(xlabel="step", ylabel="layer", title="gate: open (yellow) to closed (dark)")
    for well in reversed(trace.losses):
        losses.plot(well, color="tab:red" if well is trace.losses[0] else "tab:gray")
    losses.set(xlabel="step", ylabel="KL of the gated model, nats per token", yscale="log", title="loss by well")
