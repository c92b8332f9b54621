"""What a stage costs, in terms that hold on any machine, and the model's figures that this is said from.

Every stage says it beside its own code, by its own constants: a function `…_cost` of a `PlannedRun` gives what it
holds at its peak and what it computes. `estimate/` measures the model's `Shape`, adds up, and compares with the
machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from layercut.config import CompressConfig
from layercut.models.memory import Budget
from layercut.segments import Segment

Peak = dict[str, int]
"""Bytes that are held at once, by what takes them."""


def total(peak: Peak) -> int:
    """Bytes of a peak."""
    return sum(peak.values())


# --- a model's figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parameters by where they sit, tied ones counted once, and the cache."""

    embedding: int
    layers: list[int]
    """Of every decoder layer."""
    matrices: int
    """Those in matrices of decoder layers, which weight-only quantization makes smaller."""
    head: int
    """0 where the head is the embedding."""
    other: int
    """Final norm, position tables, and towers other than the decoder."""
    tied: bool
    kv_bytes_per_token: int | None
    """Bytes the cache grows by with each token; None where the class cannot be run without weights."""
    caches: dict[str, int]
    """Layers by the kind of their cache: full, sliding WINDOW, linear."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + sum(self.layers) + self.head + self.other


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One row of T tokens through one decoder layer."""

    flops: int
    """Floating-point operations forwards: 2 a multiplication and addition. Attention is counted in full, masked or
    not, as `torch.utils.flop_counter` does. A backward pass to the input is taken as as many."""
    live: int
    """Bytes of what is alive at once inside the layer, beside its input and its weights, forwards without gradients."""
    saved: int
    """Bytes that autograd keeps for the backward pass, weights frozen."""
    saved_trained: int
    """The same where the weights take gradients: each matrix keeps its input as well."""
    kept: int
    """Bytes that a token leaves for the way back, as tuning reckons before it has run (`memory.kept_bytes`)."""
    kernels: int
    """Operations on tensors that one call of the layer issues, however few the tokens."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's figures, in one number format and for rows of one length."""

    hidden: int
    """D, the width of the residual stream."""
    vocabulary: int
    itemsize: int
    """Bytes of a number."""
    window: int
    """T, tokens in a row."""
    dense: Parts
    costs: list[LayerCost]
    """Of every decoder layer."""
    read: tuple[int, int]
    """What the output projections of attention and MLP read, numbers a token: what the fold solves them anew from."""

    @property
    def layers(self) -> int:
        """L."""
        return len(self.costs)

    @property
    def outside(self) -> int:
        """Parameters that are in no decoder layer."""
        return self.dense.total - sum(self.dense.layers)

    @property
    def head_flops(self) -> int:
        """One row through the head."""
        return 2 * self.window * self.hidden * self.vocabulary

    def rows_of(self, tokens: int) -> int:
        """N, rows of T tokens that hold so many."""
        return -(-tokens // self.window)

    def mean(self, name: str) -> float:
        """Of one figure of LayerCost, over all layers."""
        return sum(getattr(cost, name) for cost in self.costs) / self.layers

    def most(self, name: str) -> int:
        """The largest of one figure of LayerCost."""
        return max(getattr(cost, name) for cost in self.costs)

    def stream(self, rows: int) -> int:
        """Bytes of one hidden state of so many rows."""
        return rows * self.window * self.hidden * self.itemsize

    def chunk_logits(self, rows: int, budget: Budget) -> int:
        """Numbers in one chunk of the logits."""
        return min(rows, budget.logit_rows(self.window, self.vocabulary)) * self.window * self.vocabulary


# --- what a stage computes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """A number that depends on what the search finds: what it is if places stay where they start, and its limits."""

    expected: float = 0
    least: float = 0
    most: float = 0

    @classmethod
    def exactly(cls, value: float) -> Bounds:
        """One that is known."""
        return cls(value, value, value)

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.expected + other.expected, self.least + other.least, self.most + other.most)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one stage computes. One layer applied to one row counts one, as in `layer_search.Cost`."""

    layer_forwards: Bounds = field(default_factory=Bounds)
    layer_backwards: Bounds = field(default_factory=Bounds)
    head_rows: float = 0
    """Rows of logits made and compared, forwards and backwards."""
    flops: float = 0
    """In the model's number format, of layers and head."""
    flops64: float = 0
    """In float64."""
    read_bytes: float = 0
    """From and to the disk."""
    moved_bytes: float = 0
    """Copied through memory, where that and not arithmetic is what takes the time."""
    decoded_bytes: float = 0
    """Weights read by tokens that are generated one by one."""
    decoded_layers: float = 0
    """Layers called for them."""
    fixed_seconds: float = 0
    """What takes its time on any machine, roughly."""

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @classmethod
    def of(
        cls,
        shape: Shape,
        forwards: float | Bounds,
        backwards: float | Bounds = 0,
        *,
        heads: float,
        trained: float = 0,
        **more: Any,
    ) -> Work:
        """Work of layers and head."""
        there, back = (n if isinstance(n, Bounds) else Bounds.exactly(n) for n in (forwards, backwards))
        flops = (there.expected + back.expected + trained) * shape.mean("flops") + heads * shape.head_flops
        return cls(layer_forwards=there, layer_backwards=back, head_rows=heads, flops=flops, **more)


# --- what is asked, and what a stage answers -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run that is told beforehand: how large the model is, and what is done with it."""

    config: CompressConfig
    shape: Shape
    """Of the dense model, for rows of the calibration window."""
    reported: Shape
    """The same for the window that perplexity is reported on."""
    tuned: Shape
    """The same for the window that is tuned on."""
    segments: list[Segment]
    """What is removed: given, or assumed."""
    after: Parts
    """The cut model."""
    heldout: int
    """Rows that judge healing."""
    folded: int
    """Rows that the fold is solved on."""
    budget: Budget = field(default_factory=Budget.of_cpu)
    """What one pass may take on the device."""
    tests: int = 0
    """Rows of generated tests that are searched on beside the text."""
    rounding_tests: int = 0
    """The same that weights are rounded on."""
    libraries: int = 0
    """Bytes that a fresh process holds from the start, where it computes on the CPU."""

    @property
    def length(self) -> int:
        """n, layers that go."""
        return sum(map(len, self.segments))

    @property
    def calibration(self) -> int:
        """Rows of text that are searched on."""
        return self.shape.rows_of(self.config.text.tokens)

    @property
    def searched(self) -> int:
        """Rows that are searched on, of text and of tests."""
        return self.calibration + self.tests

    @property
    def rounded(self) -> int:
        """Rows that weights are rounded on, of text and of tests."""
        return self.calibration + self.rounding_tests

    @property
    def kinds(self) -> int:
        """Of these rows: text alone, or text and tests."""
        return 1 + (self.tests > 0)

    @property
    def tuning(self) -> int:
        """Rows that are tuned on."""
        return self.tuned.rows_of(self.config.heal.tune_tokens)

    @property
    def evaluation(self) -> int:
        """Rows that perplexity is reported on."""
        return self.reported.rows_of(self.config.evaluate.eval_tokens)

    @property
    def on_disk(self) -> bool:
        """Whether the layers are left there, so that all rows go through each together."""
        return self.config.load.stream == "on"


@dataclass(frozen=True)
class Spent:
    """What a stage costs."""

    peak: Peak
    """What it holds beside the dense weights."""
    work: Work | None
    """What it computes; None where that cannot be told."""

    def then(self, other: Spent) -> Spent:
        """One after the other: the larger peak, and all work."""
        work = self.work + other.work if self.work and other.work else None
        return Spent(max(self.peak, other.peak, key=total), work)
