"""What each stage leaves in the run folder, by type: the keys that other stages and the report read.

A stage makes one of these, or a dataclass of another package such as `TextFacts`; `Run.stage` writes it, and later
stages read its attributes. The names of the fields are the keys of the JSON files (`files.py`): of CutArtefact in
cut.json, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from layercut.config import AskedBits
from layercut.data.blocks import TextFacts
from layercut.evaluation.probe_scores import CapabilityFigures, Grid
from layercut.export.engines import Reading
from layercut.healing import TuningResult
from layercut.healing.least_squares import Fold
from layercut.layer_search import SearchResult
from layercut.quantization.packing import QuantizedWeight
from layercut.segments import Segment


@dataclass(frozen=True, kw_only=True)
class SharedText:
    """text-shared.json: what the evaluation text has in common with what is searched and tuned on."""

    documents: int
    passages: float  # share of its passages, 0 to 1
    passed_over: int  # documents that were left out where another use has them


@dataclass(frozen=True, kw_only=True)
class SearchArtefact(SearchResult):
    seed: int
    calibration: TextFacts
    tests: dict[str, Any] | None = None  # which probes were weighed: {"rows", "window", "capabilities"}


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """A count of the dense model and of the smaller one."""

    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class CutArtefact:
    segments: list[Segment]
    original_layer_index: list[int]
    parameters: BeforeAfter
    bytes: BeforeAfter


@dataclass(frozen=True, kw_only=True)
class FoldRecord(Fold):
    """One fold, and the student's held-out KL before and after all, nats per token; None where none was fitted."""

    kl_before: float | None
    kl_after: float | None
    kept: bool


@dataclass(frozen=True, kw_only=True)
class FoldArtefact:
    fold: list[FoldRecord]
    changed: list[str]


@dataclass(frozen=True, kw_only=True)
class TuningRecord(TuningResult):
    """What endpoint tuning did, and on what text."""

    data: TextFacts


@dataclass(frozen=True, kw_only=True)
class HealArtefact:
    fold: list[FoldRecord]
    tuning: TuningRecord | None
    changed: list[str]


@dataclass(frozen=True, kw_only=True)
class QuantizeArtefact:
    """quantize.json; at 16 bits nothing but `bits` and no layers."""

    bits: AskedBits
    layers: list[QuantizedWeight]
    quantizer: str | None = None
    group_size: int | None = None
    zero_points: bool | None = None
    embedding_bits: int | None = None
    bits_allowed: str | None = None
    mixture: dict[str, Any] | None = None
    """Where bits were chosen for a size: the estimated KL of all together, and of each weight at each width."""
    tests: dict[str, Any] | None = None
    """`ProbeRows.facts()` of what weights were rounded on beside the calibration text."""
    left: list[Any] | None = None
    bytes: BeforeAfter | None = None
    quantization_config: dict[str, Any] | None = None
    gguf: dict[str, Any] | None = None
    """Of a run that writes a GGUF file: number format, how many matrices have "importance" (of columns, or of pairs of
    columns by GPTQ), and names of the parameters that were "healed" and "rounded"."""
    tuning: TuningRecord | None = None
    """How scales, norms and rounding were trained afterwards; the errors of `layers` are those before."""


@dataclass(frozen=True, kw_only=True)
class Perplexities:
    """Perplexity of every state that there was, on the same tokens."""

    dataset: str
    window: int
    tokens: int
    dense: float | None
    cut: float | None
    folded: float | None
    tuned: float | None
    quantized: float | None
    protocol: str
    fingerprint: str
    standard_error: dict[str, float | None]  # of ln(perplexity / dense), paired over the windows, by state
    shared: SharedText


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What both models write after a prompt."""

    prompt: str
    dense: str
    compressed: str


@dataclass(frozen=True, kw_only=True)
class CloserLook:
    """What the first and the last model write, and how fast; None where it was not measured."""

    generations: list[Generation] | None
    health: dict[str, Any] | None
    speed: dict[str, Any] | None
    peak_rss_bytes: int
    peak_device_bytes: int | None = None
    """The most that tensors took of the accelerator, of several the fullest; None on a CPU."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArtefact(CloserLook):
    perplexity: Perplexities


@dataclass(frozen=True, kw_only=True)
class TasksArtefact:
    """tasks.json: what `evaluation.compare_tasks` returns, and --limit."""

    tasks: dict[str, Any]
    retention: dict[str, Any]
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class LongContext:
    """long.json: perplexity by position on long windows, hidden keys, and what such a length costs, of both models."""

    window: int
    windows: int
    perplexity: dict[str, Any]
    passkey: dict[str, Any] | None
    cost: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class HitsByLength:
    """Share of the answers that are found in rows of some length, greedily."""

    capability: str
    length: int
    dense: float
    compressed: float
    answers: int


@dataclass(frozen=True, kw_only=True)
class FoundByLength:
    """probes.json: what greedy decoding finds of hidden keys and of values in lists, by length and depth."""

    keys: dict[str, Grid]  # of "dense" and "compressed"
    lists: dict[str, Grid]
    longest: int  # tokens of the longest prompts
    seed: int


@dataclass(frozen=True, kw_only=True)
class CapabilitiesArtefact:
    map: dict[str, Any] | None
    """`CapabilityMap.to_dict()` of the dense model: what the removal of each layer does to what; with --probes."""
    words: list[str]  # which layers hold what, in sentences
    judged: CapabilityFigures
    by_length: list[HitsByLength]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a user's evaluation; None where it was not returned for that model."""

    dense: float | None
    compressed: float | None
    higher_is_better: bool | None = None  # None where the evaluation does not say


@dataclass(frozen=True, kw_only=True)
class EvaluationsArtefact:
    evaluations: dict[str, dict[str, Metric]]  # by evaluation, then by metric
    seed: int


@dataclass(frozen=True, kw_only=True)
class ExportArtefact:
    bytes: int
    check: dict[str, Any]
    perplexity: dict[str, Any] | None = None
    gguf: dict[str, Any] | None = None  # of a GGUF file: what was written, compared and measured


@dataclass(frozen=True, kw_only=True)
class SizeInBytes(BeforeAfter):
    """Of the dense model, of what was exported, and of the files that the dense model came in."""

    source: int


@dataclass(frozen=True, kw_only=True)
class SummaryArtefact:
    """summary.json: the run on one page. What was not measured is null."""

    model: str  # a name of the Hub, or where on this machine the model was
    layers: BeforeAfter
    segments: list[Segment]
    original_layer_index: list[int]
    parameters: BeforeAfter
    bytes: SizeInBytes
    perplexity: Perplexities
    speed: dict[str, Any] | None
    generation_health: dict[str, Any] | None
    peak_rss_bytes: int
    peak_device_bytes: int | None = None
    """The most that tensors took of the accelerator, of several the fullest; None on a CPU."""
    tasks: dict[str, Any] | None
    retention: dict[str, Any] | None
    long_context: LongContext | None
    evaluations: dict[str, dict[str, Metric]] | None
    consumers: list[Reading] = field(default_factory=list)  # what software that may load the exported model makes of it
    capabilities: CapabilityFigures | None = None
    """What the compressed model can still do of probes, beside the dense one."""
    probes: FoundByLength | None = None  # hidden keys and values in lists, where --probes asked for them
