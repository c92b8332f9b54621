"""What each stage of a comparison of search methods leaves in the run folder, by type: see `pipeline/artefacts.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from layercut.data.blocks import TextFacts
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


@dataclass(frozen=True, kw_only=True)
class CompareMethodArtefact(Artefact, MethodChoice):
    """compare-METHOD.json."""

    @property
    def facts(self) -> MethodChoice:
        """Without what the run folder adds."""
        return part_of(MethodChoice, self)


@dataclass(frozen=True, kw_only=True)
class CompareTriangleArtefact(Artefact):
    """compare-triangle.json: KL of every segment up to some length on the calibration tokens."""

    triangle: list[tuple[int, int, float]]
    layer_forwards: int


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
    """What endpoint tuning did to what one method left."""

    tokens: int
    trained_layers: list[int]
    trained_parameters: int
    from_fold: bool
    heldout: StartAndBest
    best_step: int
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class CompareTunedArtefact(Artefact):
    """compare-at-SEGMENTS-tuned.json."""

    tuned: float
    losses: list[float]
    tuning: ComparedTuning


@dataclass(frozen=True, kw_only=True)
class ComparedMethod(MethodChoice):
    """A method's row of the comparison: perplexity and its standard error by state."""

    perplexity: dict[str, float | None]
    standard_error: dict[str, float | None]
    fold: list[Fold]
    tuning: ComparedTuning | None
    refused: str | None


@dataclass(frozen=True, kw_only=True)
class DensePerplexity:
    """Of the dense model, on the evaluation tokens."""

    perplexity: float


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
    triangle: list[tuple[int, int, float]] | None
