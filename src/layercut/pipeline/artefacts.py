"""What each stage leaves in the run folder, by type: the keys that other stages and the report read. Ground.

`decode` turns JSON into these classes and raises Damaged where a key is missing or of another type, so that the stage
is run again; keys that a class does not name are passed over. `seal` and `check_seal` find what types cannot, such as
a number that was changed. The names of the fields are the keys of the JSON files.
"""

from __future__ import annotations

import hashlib
import json
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")
SEAL = "content_hash"
NOT_FINITE = ("inf", "-inf", "nan")
"""How JSON files spell numbers that JSON has no word for."""


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
        return float(_checked(right, content, float, where))
    except OverflowError:
        raise Damaged(f"{where} is larger than any number of the processor") from None


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


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What every stage's JSON holds."""

    config_hash: str
    """Of all that went into the stage, earlier stages included."""
    seconds: Any = 0.0
    """Of the stage; in summary.json, by stage."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and the packages that it was made with."""
    files: list[str] = field(default_factory=list)
    """Files and folders of the run folder without which the stage is not whole."""
    record: dict[str, list[Any]] = field(default_factory=dict)
    """The size of each of them, and of each file in such a folder."""


RUNS_OWN = {each.name for each in fields(Artefact)} | {SEAL}
"""Keys that the run folder adds to what a stage found."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Where tokens come from."""

    source: str
    tokens: int
    window: int
    documents: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class TextArtefact(Artefact, Text):
    """text-USE.json"""


@dataclass(frozen=True, kw_only=True)
class CandidateRecord:
    """Segments that could go together, and the KL of the real cut, in nats per token."""

    segments: list[Bounds]
    kl: float
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchArtefact(Artefact):
    """search.json"""

    method: str
    segments: list[Bounds]
    candidates: list[CandidateRecord]
    dense_tokens: int
    layer_forwards: int
    layer_backwards: int
    seed: int
    calibration: Text
    cut: list[Bounds] | None = None
    """Of one round of several: `segments` in the layers of the model that it cut."""
    path: list[dict[str, Any]] = field(default_factory=list)
    oracle: dict[str, Any] | None = None
    triangle: list[tuple[int, int, float]] | None = None
    budget: dict[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)


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
class Folded:
    """What one fold did, or why it could not be done."""

    segment: Bounds
    layer: int | None
    modules: list[str]
    kl_before: float
    kl_after: float
    kept: bool
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class FoldArtefact(Artefact):
    """fold.json"""

    fold: list[Folded]
    changed: list[str]


@dataclass(frozen=True, kw_only=True)
class HeldOutPoint:
    """A loss of tuning, in nats per token."""

    step: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class TuningRecord:
    """What endpoint tuning did."""

    tokens: int
    trained_layers: list[int]
    trained_parameters: int
    state_bytes: int
    heldout: list[HeldOutPoint]
    curve: list[HeldOutPoint]
    best_step: int
    setbacks: list[int]


@dataclass(frozen=True, kw_only=True)
class HealArtefact(Artefact):
    """heal.json"""

    fold: list[Folded]
    tuning: TuningRecord | None
    changed: list[str]
    rounds: list[TuningRecord | None] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class QuantizeArtefact(Artefact):
    """quantize.json"""

    bits: Literal[16, 8, 4]
    layers: list[dict[str, Any]]
    left: list[Any] = field(default_factory=list)
    bytes: BeforeAfter | None = None
    quantization_config: dict[str, Any] | None = None


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


@dataclass(frozen=True, kw_only=True)
class EvaluateArtefact(Artefact):
    """eval.json"""

    perplexity: Perplexities
    peak_rss_bytes: int
    generations: list[dict[str, Any]] | None = None
    health: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None


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
    perplexity: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SummaryArtefact(Artefact):
    """summary.json"""

    model: str
    layers: BeforeAfter
    segments: list[Bounds]
    original_layer_index: list[int]
    parameters: BeforeAfter
    bytes: BeforeAfter
    perplexity: Perplexities
    seconds: dict[str, float]
    tasks: dict[str, Any] | None = None
    retention: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    generation_health: dict[str, Any] | None = None
    long_context: dict[str, Any] | None = None
    evaluations: dict[str, dict[str, Metric]] | None = None


TEXTS = ("text-evaluation", "text-calibration", "text-heldout", "text-tuning")
KINDS: dict[str, type[Artefact]] = {
    "search": SearchArtefact,
    "cut": CutArtefact,
    "fold": FoldArtefact,
    "heal": HealArtefact,
    "quantize": QuantizeArtefact,
    "eval": EvaluateArtefact,
    "evaluations": EvaluationsArtefact,
    "export": ExportArtefact,
    "summary": SummaryArtefact,
}


def kind_of(stage: str) -> type[Artefact]:
    """The class of a stage's artefact; that of search-2, a round's, is that of search."""
    name, _, number = stage.partition("-")
    if stage in TEXTS:
        return TextArtefact
    return KINDS.get(name, Artefact) if not number or number.isdecimal() else Artefact
