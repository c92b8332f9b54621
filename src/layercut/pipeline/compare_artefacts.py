"""What each stage of a comparison of search methods leaves in the run folder, by type: see `pipeline/artefacts.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from layercut.data.blocks import TextFacts
from layercut.evaluation.paired_retention import Retained
from layercut.evaluation.probe_scores import Grid, Probed
from layercut.files.json_values import OPTIONAL
from layercut.healing.least_squares import Fold
from layercut.pipeline.artefacts import Artefact, BeforeAfter, Bounds, SearchCost, part_of


@dataclass(frozen=True, kw_only=True)
class CompareDenseArtefact(Artefact):
    """compare-dense.json."""

    perplexity: float
    losses: list[float]
    """Mean loss of each window, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class MethodChoice(SearchCost):
    """What one method removes, its KL on the calibration tokens, and what finding it took."""

    method: str
    segments: list[Bounds]
    kl: float
    search_seconds: float
    damage: float | None = None
    """To generated tests, where the method searched with them, in nats per answer token."""


@dataclass(frozen=True, kw_only=True)
class CompareMethodArtefact(Artefact, MethodChoice):
    """compare-METHOD.json."""

    @property
    def facts(self) -> MethodChoice:
        """Without what the run folder adds."""
        return part_of(MethodChoice, self)


@dataclass(frozen=True, kw_only=True)
class CompareCutArtefact(Artefact):
    """compare-at-SEGMENTS-cut.json: perplexity of what is left, plain and folded; None where it was not measured."""

    cut: float | None = None
    folded: float | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    """By state, as of the dense model."""
    fold: list[Fold] = field(default_factory=list)
    refused: str | None = None
    """Why these layers cannot be cut out."""


@dataclass(frozen=True, kw_only=True)
class StartAndBest:
    """A held-out loss before tuning and at its best, in nats per token."""

    start: float
    best: float


@dataclass(frozen=True, kw_only=True)
class ComparedTuning:
    """What endpoint tuning, or LoRA before it was merged in, did to what one method left."""

    tokens: int
    trained_layers: list[int]
    trained_parameters: int
    from_fold: bool
    heldout: StartAndBest
    best_step: int
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class CompareTunedArtefact(Artefact):
    """compare-at-SEGMENTS-tuned.json, and compare-at-SEGMENTS-lora.json."""

    tuned: float
    losses: list[float]
    tuning: ComparedTuning


@dataclass(frozen=True, kw_only=True)
class CompareTasksArtefact(Artefact):
    """compare-at-SEGMENTS-STATE-tasks.json, and compare-dense-tasks.json: records of `evaluation.score_tasks`."""

    records: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CompareProbesArtefact(Artefact, Probed):
    """compare-at-SEGMENTS-STATE-probes.json, and compare-dense-probes.json."""

    health: dict[str, Any] | None
    """`evaluation.generation_health` beside the dense model; None of the dense model itself."""


@dataclass(frozen=True, kw_only=True)
class CompareOthersArtefact(Artefact):
    """compare-at-SEGMENTS-STATE-others.json, and compare-dense-others.json: packages' evaluations."""

    figures: dict[str, dict[str, float]]
    """By evaluation and metric."""


@dataclass(frozen=True, kw_only=True)
class JudgedState:
    """What a cut in some state, or the dense model, still does; what was not asked for is empty or None."""

    scores: dict[str, float] = field(default_factory=dict)
    """By task."""
    flips: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    """By task: items lost and gained beside the dense model, and McNemar's p."""
    retained: Retained | None = None
    keys: Grid = field(default_factory=list)
    lists: Grid = field(default_factory=list)
    capabilities: dict[str, Any] | None = None
    health: dict[str, Any] | None = None
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComparedTask:
    """A task, as all models were asked it."""

    metric: str
    items: int
    chance: float
    share: bool = field(default=True, metadata=OPTIONAL)
    """Whether the score is a share of the items, or near one, and not a perplexity."""


@dataclass(frozen=True, kw_only=True)
class ComparedMethod(MethodChoice):
    """A method's row of the comparison: perplexity and its standard error by state."""

    perplexity: dict[str, float | None]
    standard_error: dict[str, float | None]
    fold: list[Fold]
    tuning: ComparedTuning | None
    refused: str | None
    lora: ComparedTuning | None = field(default=None, metadata=OPTIONAL)
    texts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Perplexity by state and text, where it was measured on several."""
    judged: dict[str, JudgedState] = field(default_factory=dict)
    """By state."""


@dataclass(frozen=True, kw_only=True)
class DensePerplexity:
    """Of the dense model, on the evaluation tokens."""

    perplexity: float
    texts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CompareArtefact(Artefact):
    """compare.json."""

    model: str
    layers: BeforeAfter
    calibration: TextFacts
    tuning: TextFacts | None
    evaluation: TextFacts
    dense: DensePerplexity
    methods: list[ComparedMethod]
    tasks: dict[str, ComparedTask] = field(default_factory=dict)
    judged_dense: JudgedState | None = None
