"""What each stage leaves in the run folder, by type: the keys that other stages and the report read.

A stage makes one of these, `Run.stage` writes it, and every later stage reads its attributes. The names of the fields
are the keys of the JSON files; `jsonable` writes them. `decode` turns JSON into these classes and raises Damaged where
a key is missing or of another type, so that the stage is run again; keys that a class does not name are passed over.
`seal` and `check_seal` find what types cannot, such as a number that was changed.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from layercut.data.blocks import TextFacts
from layercut.files.json_values import NOT_FINITE, OPTIONAL
from layercut.healing.least_squares import Fold
from layercut.healing.tuning_result import TuningResult
from layercut.segments import Segment

Kind = TypeVar("Kind")
SEAL = "content_hash"


class Damaged(ValueError):
    """JSON that is not what the stage wrote; the message says where."""


# --- from JSON -------------------------------------------------------------------------------------------------------


def decode(kind: type[Kind], content: Any, where: str = "") -> Kind:
    """`content`, as `json.loads` gives it, as a `kind`: a dataclass, or whatever its fields may be.

    Fields may be bool, int, float (also as one of NOT_FINITE), str, Any, dataclasses, Literal, X | None, list[X],
    dict[str, X], tuple[X, Y] and tuple[X, ...]. A key that is not there takes the field's default. Raises Damaged.
    """
    return _decoded(kind, content, where or getattr(kind, "__name__", "the artefact"))


def _decoded(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return content
    if is_dataclass(kind):
        return _dataclass(kind, content, where)
    if origin in (Union, types.UnionType):
        return _first_that_fits(arguments, content, where)
    if origin is Literal:
        return _checked(any(content is one or (content == one and type(content) is type(one)) for one in arguments),
                        content, kind, where)  # fmt: skip
    if origin in (list, tuple):
        return _sequence(kind, content, where)
    if origin is dict:
        _checked(isinstance(content, dict), content, kind, where)
        return {key: _decoded(arguments[1], value, f"{where}.{key}") for key, value in content.items()}
    if kind is float:
        return _float(content, where)
    # True is an int to Python and a bool to JSON
    return _checked(type(content) is kind, content, kind, where)


def _checked(right: bool, content: Any, kind: Any, where: str) -> Any:
    if not right:
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise Damaged(f"{where} is {str(content)[:40]!r}, and not of type {name}")
    return content


def _dataclass(kind: Any, content: Any, where: str) -> Any:
    _checked(isinstance(content, dict), content, kind, where)
    hints, found = _hints(kind), {}
    for each in fields(kind):
        if each.name in content:
            found[each.name] = _decoded(hints[each.name], content[each.name], f"{where}.{each.name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise Damaged(f"{where}.{each.name} is missing")
    return kind(**found)


def _first_that_fits(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    if content is None and type(None) in kinds:
        return None
    faults = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _decoded(kind, content, where)
        except Damaged as fault:
            faults.append(fault)
    raise faults[0]


def _sequence(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    _checked(isinstance(content, list | tuple), content, kind, where)
    if origin is list or arguments[1:] == (...,):
        return origin(_decoded(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(content))
    _checked(len(content) == len(arguments), content, kind, where)
    return tuple(_decoded(one, value, f"{where}[{i}]") for i, (one, value) in enumerate(zip(arguments, content)))  # noqa: B905


def _float(content: Any, where: str) -> float:
    right = type(content) in (int, float) or (isinstance(content, str) and content in NOT_FINITE)
    try:
        number = float(_checked(right, content, float, where))
    except OverflowError:
        raise Damaged(f"{where} is larger than any number of the processor") from None
    return content if type(content) is int else number  # whole numbers stay as they were written


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


# --- the seal --------------------------------------------------------------------------------------------------------


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of all that is in it."""
    return content | {SEAL: _hash(content)}


def check_seal(content: dict[str, Any]) -> None:
    """Damaged where a JSON object is not as it was sealed; an object without a seal is of an older layercut."""
    if SEAL in content and content[SEAL] != _hash(content):
        raise Damaged("it is not as it was written")


def _hash(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


# --- what stages leave -----------------------------------------------------------------------------------------------

Bounds = tuple[int, int]
"""A segment: its first layer, and the first one after it."""


Bits = Literal[16, 8, 4]


def bounds_of(segments: Iterable[Segment]) -> list[Bounds]:
    """Segments as artefacts hold them."""
    return [(s.start, s.stop) for s in segments]


def segments_of(bounds: Iterable[Bounds]) -> list[Segment]:
    """The inverse of `bounds_of`."""
    return [Segment(*each) for each in bounds]


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What every stage's JSON holds. A stage gives `files`; the rest is the run folder's."""

    files: list[str] = field(default_factory=list, metadata=OPTIONAL)
    """Files and folders of the run folder without which the stage is not whole."""
    seconds: Any = 0.0
    """Of the stage; in summary.json, by stage."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and the packages that it was made with."""
    config_hash: str = ""
    """Of all that went into the stage, earlier stages included."""
    record: dict[str, list[Any]] = field(default_factory=dict, metadata=OPTIONAL)
    """The size of each of the files, and of each file in such a folder."""


RUNS_OWN = {each.name for each in fields(Artefact)} | {SEAL}
"""Keys that the run folder adds to what a stage found."""


def _part(kind: type[Kind], whole: Any) -> Kind:
    """The fields of a dataclass that `whole` inherits from, as an instance of it alone."""
    return kind(**{each.name: getattr(whole, each.name) for each in fields(kind)})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class TextArtefact(Artefact, TextFacts):
    """text-USE.json"""

    @property
    def facts(self) -> TextFacts:
        """Without what the run folder adds, such as the seconds that it took: as later stages name it among inputs."""
        return _part(TextFacts, self)


@dataclass(frozen=True, kw_only=True)
class SharedText:
    """What the evaluation text has in common with what is searched and tuned on."""

    documents: int
    passages: float
    """Share of its passages, 0 to 1."""
    passed_over: int
    """Documents that were left out where another use has them."""


@dataclass(frozen=True, kw_only=True)
class SharedTextArtefact(Artefact, SharedText):
    """text-shared.json"""

    @property
    def facts(self) -> SharedText:
        """Without what the run folder adds."""
        return _part(SharedText, self)


@dataclass(frozen=True, kw_only=True)
class CandidateRecord:
    """Segments that could go together, and the KL of the real cut, in nats per token."""

    segments: list[Bounds]
    kl: float
    score: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """What a search spent, independent of the machine: see `layer_search.Cost`."""

    dense_tokens: int
    layer_forwards: int
    layer_backwards: int


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """The search of one round of several."""

    method: str
    segments: list[Bounds]
    cut: list[Bounds] | None
    candidates: list[CandidateRecord]
    seconds: float
    layer_forwards: int
    layer_backwards: int


@dataclass(frozen=True, kw_only=True)
class SearchArtefact(Artefact, SearchCost):
    """search.json"""

    method: str
    segments: list[Bounds]
    candidates: list[CandidateRecord]
    seed: int
    calibration: TextFacts
    cut: list[Bounds] | None = field(default=None, metadata=OPTIONAL)
    """Of one round of several: `segments` in the layers of the model that it cut."""
    path: list[dict[str, Any]] = field(default_factory=list)
    oracle: dict[str, Any] | None = None
    triangle: list[tuple[int, int, float]] | None = None
    budget: dict[str, Any] | None = None
    rounds: list[RoundRecord] | None = field(default=None, metadata=OPTIONAL)

    @property
    def kl(self) -> float:
        """Of the real cut that was chosen, in nats per token."""
        return self.candidates[0].kl


@dataclass(frozen=True, kw_only=True)
class SeedChoice:
    """What the search chose on the calibration text of one seed."""

    seed: int
    segments: list[Bounds]
    kl: float
    calibration: TextFacts


@dataclass(frozen=True, kw_only=True)
class SeedArtefact(Artefact, SeedChoice, SearchCost):
    """stability-SEED.json"""


@dataclass(frozen=True, kw_only=True)
class StabilityArtefact(Artefact):
    """stability.json; from `choices` on what `layer_search.stability.judge` returns"""

    method: str
    search: str
    """`config_hash` of the search that the others are compared with."""
    seeds: list[SeedChoice]
    choices: list[dict[str, Any]]
    best: dict[str, Any]
    worst: float
    sources: list[dict[str, Any]]
    tokens: int
    layer_forwards: int


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """A count of the dense model and of the smaller one."""

    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class CutArtefact(Artefact):
    """cut.json"""

    segments: list[Bounds]
    original_layer_index: list[int]
    parameters: BeforeAfter
    bytes: BeforeAfter


@dataclass(frozen=True, kw_only=True)
class FoldRecord(Fold):
    """One fold, and the held-out KL of the student before and after all of them, in nats per token."""

    kl_before: float
    kl_after: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class FoldArtefact(Artefact):
    """fold.json"""

    fold: list[FoldRecord]
    changed: list[str]


@dataclass(frozen=True, kw_only=True)
class TuningRecord(TuningResult):
    """What endpoint tuning did, and on what text."""

    data: TextFacts


@dataclass(frozen=True, kw_only=True)
class HealArtefact(Artefact):
    """heal.json"""

    fold: list[FoldRecord]
    tuning: TuningRecord | None
    changed: list[str]
    rounds: list[TuningRecord | None] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class FrontierRecord:
    """Size and loss of what is left, at one number of bits."""

    layers: int
    bits: Bits
    bytes: int
    rise: float
    """Of perplexity over the dense model's on held-out rows, as a share."""


@dataclass(frozen=True, kw_only=True)
class FrontierArtefact(Artefact):
    """frontier-ROUND.json"""

    points: list[FrontierRecord]


@dataclass(frozen=True, kw_only=True)
class QuantizeArtefact(Artefact):
    """quantize.json; at 16 bits nothing but `bits` and no layers"""

    bits: Bits
    layers: list[dict[str, Any]]
    quantizer: str | None = field(default=None, metadata=OPTIONAL)
    group_size: int | None = None
    asymmetric: bool | None = field(default=None, metadata=OPTIONAL)
    endpoint_bits: int | None = None
    quantize_embeddings: bool | None = field(default=None, metadata=OPTIONAL)
    left: list[Any] | None = field(default=None, metadata=OPTIONAL)
    bytes: BeforeAfter | None = field(default=None, metadata=OPTIONAL)
    quantization_config: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)


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
    standard_error: dict[str, float | None]
    """Of ln(perplexity / dense), paired over the windows, by state."""
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


@dataclass(frozen=True, kw_only=True)
class EvaluateArtefact(Artefact, CloserLook):
    """eval.json"""

    perplexity: Perplexities


@dataclass(frozen=True, kw_only=True)
class TasksArtefact(Artefact):
    """tasks.json: what `evaluation.compare_tasks` returns, and --limit"""

    tasks: dict[str, Any]
    retention: dict[str, Any]
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class LongContext:
    """Perplexity by position on long windows, hidden keys, and what such a length costs, dense and compressed."""

    window: int
    windows: int
    perplexity: dict[str, Any]
    passkey: dict[str, Any] | None
    cost: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class LongArtefact(Artefact, LongContext):
    """long.json"""

    @property
    def facts(self) -> LongContext:
        """Without what the run folder adds."""
        return _part(LongContext, self)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a user's evaluation; None where it was not returned for that model."""

    dense: float | None
    compressed: float | None
    higher_is_better: bool | None = None
    """None where the evaluation does not say."""


@dataclass(frozen=True, kw_only=True)
class EvaluationsArtefact(Artefact):
    """evaluations.json"""

    evaluations: dict[str, dict[str, Metric]]
    """By evaluation, then by metric."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class ExportArtefact(Artefact):
    """export.json"""

    bytes: int
    check: dict[str, Any]
    perplexity: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class SizeInBytes(BeforeAfter):
    """Of the dense model, of what was exported, and of the files that the dense model came in."""

    source: int


@dataclass(frozen=True, kw_only=True)
class SummaryArtefact(Artefact):
    """summary.json: the run on one page. What was not measured is null."""

    model: str
    layers: BeforeAfter
    segments: list[Bounds]
    original_layer_index: list[int]
    parameters: BeforeAfter
    bytes: SizeInBytes
    perplexity: Perplexities
    speed: dict[str, Any] | None
    generation_health: dict[str, Any] | None
    peak_rss_bytes: int
    tasks: dict[str, Any] | None
    retention: dict[str, Any] | None
    long_context: LongContext | None
    evaluations: dict[str, dict[str, Metric]] | None


# --- what a comparison of search methods leaves ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CompareDenseArtefact(Artefact):
    """compare-dense.json"""

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
    """compare-METHOD.json"""

    @property
    def facts(self) -> MethodChoice:
        """Without what the run folder adds."""
        return _part(MethodChoice, self)


@dataclass(frozen=True, kw_only=True)
class CompareTriangleArtefact(Artefact):
    """compare-triangle.json: KL of every segment up to some length on the calibration tokens"""

    triangle: list[tuple[int, int, float]]
    layer_forwards: int


@dataclass(frozen=True, kw_only=True)
class CompareCutArtefact(Artefact):
    """compare-at-SEGMENTS-cut.json: perplexity of what is left, plain and folded; None where it was not measured"""

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
    """compare-at-SEGMENTS-tuned.json"""

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
    """compare.json"""

    model: str
    layers: BeforeAfter
    calibration: TextFacts
    tuning: TextFacts | None
    evaluation: TextFacts
    dense: DensePerplexity
    methods: list[ComparedMethod]
    triangle: list[tuple[int, int, float]] | None
