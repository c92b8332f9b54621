"""The options of each command, made of those of its stages, and their flat form in YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from layercut.config.results import (
    AfterRoundingConfig,
    EvaluateConfig,
    LongConfig,
    OutputConfig,
    QuantizeConfig,
    RunConfig,
    TasksConfig,
)
from layercut.config.stages import (
    HEALING,
    MEASURING,
    RUN,
    SEARCH,
    TAKE_TESTS,
    WHAT,
    Consumers,
    DataConfig,
    GgufType,
    HealConfig,
    ModelConfig,
    SearchConfig,
    at_least,
    consumer_names,
    flat,
    joined_names,
    no_negative,
    one_of,
    options,
    rare,
    rare_switch,
    split_names,
)
from layercut.errors import ConfigError
from layercut.files import parse_bytes
from layercut.registries import criteria, exporters
from layercut.segments import Segment, as_segments


@flat
@dataclass(frozen=True, kw_only=True)
class FindConfig:
    """The journey as far as the search."""

    load: ModelConfig = field(default_factory=ModelConfig)
    text: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def journey(self) -> CompressConfig:
        """The run that begins so; what this part of it does not use is at its default."""
        return CompressConfig(**vars(self))


@flat
@dataclass(frozen=True, kw_only=True)
class TuneConfig(FindConfig):
    """The journey up to the checkpoint, with nothing measured."""

    heal: HealConfig = field(default_factory=HealConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    after_rounding: AfterRoundingConfig = field(default_factory=AfterRoundingConfig)


@flat
@dataclass(frozen=True, kw_only=True)
class CompressConfig(TuneConfig):
    """The whole journey."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    long: LongConfig = field(default_factory=LongConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def check(self) -> None:
        """Check what no stage can check alone; not on construction, so that a mistyped --ratoi is named first."""
        if not self.search.given:
            raise ConfigError(
                "neither --ratio nor --segment nor a budget is given", "a fifth of the layers: --ratio 0.2"
            )
        if self.quantize.bits == "auto":
            self._check_chosen_bits()
        elif len(given := self.search.given) > 1 and not self.search.two_budgets:
            raise ConfigError(f"both {given[0]} and {given[1]} are given", "give one of them; both go with --bits auto")
        elif self.search.ratio == 0 and not self.quantize.rounds:
            raise ConfigError("--ratio 0 is outside 0 to 1", "a fifth of the layers: --ratio 0.2; none: give --bits")
        if self.search.two_budgets and not self.heal.tune_tokens:
            raise ConfigError(
                "--target-size with --max-loss is measured after healing, and --tune-tokens is 0", "give --tune-tokens"
            )
        self._check_bits()

    def _check_chosen_bits(self) -> None:
        """Refuse --bits auto without a size, or with what chooses layers otherwise."""
        if self.search.target_size is None:
            raise ConfigError("--bits auto is given without --target-size", "give the size: --target-size 60MB")
        if self.search.max_loss is not None:
            raise ConfigError("--bits auto is given with --max-loss", "give --ratio in its place, or leave out --bits")

    @property
    def shares_size(self) -> bool:
        """Whether layers and bits share a size: then the number of layers that go is chosen too."""
        return self.quantize.bits == "auto" and not self.search.removing

    def _check_bits(self) -> None:
        """Refuse bits that would be ignored: with two budgets they are varied, beginning with the whole model's."""
        quantize, asked = self.quantize, self.after_rounding.tune_quantized
        if asked in ("scales", "rounding"):
            missing = "--bits" if quantize.bits == 16 and not self.search.two_budgets else "--tune-tokens"
            if missing == "--bits" or not self.heal.tune_tokens:
                what = "nothing is quantized" if missing == "--bits" else "no tokens are tuned on"
                raise ConfigError(f"--tune-quantized {asked} is given, but {what}", f"give {missing} too")
        quantize.check_allowed()
        if self.search.two_budgets and quantize.bits != 16:
            raise ConfigError(
                "--bits is given, and --target-size with --max-loss tries 16, 8 and 4 bits",
                "leave it out; --embedding-bits 8 goes with both budgets",
            )
        if quantize.bits == 16 and quantize.how and not self.search.two_budgets:
            raise ConfigError(f"{quantize.how[0]} is given, but nothing is quantized", "give --bits 4 or 8")


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a run with these flags would take."""

    load: ModelConfig = field(default_factory=ModelConfig)
    text: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    after_rounding: AfterRoundingConfig = field(default_factory=AfterRoundingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    calibrate: bool = True
    """Measure this machine for a few seconds, to estimate how long it will take."""
    json: Annotated[bool, no_negative] = False
    """Print everything as JSON instead of tables."""
    config: Path | None = None
    """A YAML file that fills the flags not given; its keys are the flags' names, with underscores. Of the file of
    a compress run, the other commands take the keys they know."""

    def journey(self) -> CompressConfig:
        """The run that is planned."""
        return CompressConfig(
            load=self.load, text=self.text, search=self.search, heal=self.heal, quantize=self.quantize,
            after_rounding=self.after_rounding, evaluate=self.evaluate, output=self.output,
        )  # fmt: skip


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """Surgery alone, on the files."""

    segment: Annotated[tuple[str, ...], Parameter(group=WHAT, negative="")]
    """A segment START:STOP to remove; 13:19 removes layers 13 to 18. Repeatable."""
    out: Path
    """The new checkpoint: a folder, or a .gguf file where MODEL is one."""
    consumers: Consumers = ""
    force: Annotated[bool, no_negative] = False
    """Replace what is at --out."""
    allow_pickle: Annotated[bool, rare_switch] = False
    """Read pickled weights (*.bin), which can run code too."""

    def __post_init__(self) -> None:
        consumer_names(self.consumers)
        if not self.segment:
            raise ConfigError(
                "no --segment is given", "for layers 13 to 18: --segment 13:19; to find one: layercut search"
            )

    @property
    def segments(self) -> list[Segment]:
        """The segments, read."""
        return [Segment.parse(text) for text in self.segment]


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class QuantizeAloneConfig:
    """Quantization alone."""

    out: Path
    """The new checkpoint: a folder, or NAME.gguf, which is written as by export, on the text that it takes."""
    gguf_type: GgufType | None = None
    """Number format of a GGUF file, as of export. Not given: of --bits 8, 6, 4, 3 and 2 q8_0, q6_k,
    q4_k_m, q3_k_m and q2_k."""
    target_size: str | None = None
    """With --bits auto: bytes of the checkpoint's weights, at most, e.g. 60MB."""
    load: ModelConfig = field(default_factory=ModelConfig)
    text: DataConfig = field(default_factory=DataConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    consumers: Consumers = ""
    force: Annotated[bool, no_negative] = False
    """Replace what is at --out."""
    config: Path | None = None
    """A YAML file that fills the flags not given; its keys are the flags' names, with underscores. Of the file of
    a compress run, the other commands take the keys they know."""

    def check(self) -> None:
        """Check the whole; not on construction, so that a mistyped --bit is named first."""
        consumer_names(self.consumers)
        if self.gguf_type and self.out.suffix != ".gguf":
            raise ConfigError("--gguf-type is given, and --out names no .gguf file", "--out NAME.gguf")
        if self.quantize.bits == 16 and not self.gguf_type:
            raise ConfigError("no --bits is given", "--bits 8 or --bits 4")
        self.quantize.check_allowed()
        chosen = self.quantize.bits == "auto"
        if chosen and self.out.suffix == ".gguf":
            raise ConfigError("--bits auto packs weights for transformers, and --out is a GGUF file", "name a folder")
        if self.out.suffix == ".gguf":
            self._check_gguf()
        if chosen != (self.target_size is not None):
            given, missing = ("--bits auto", "--target-size") if chosen else ("--target-size", "--bits auto")
            raise ConfigError(f"{given} is given without {missing}", "--bits auto --target-size 60MB")
        if self.target_size is not None:
            parse_bytes("--target-size", self.target_size)

    def _check_gguf(self) -> None:
        """Refuse flags of how weights are rounded: a GGUF file's number format says that."""
        for flag in self.quantize.how:
            raise ConfigError(
                f"{flag} is given, and --out is a GGUF file, whose number format says how weights are rounded",
                f"leave out {flag}, or name a folder",
            )


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A finished run or a model in another file format."""

    out: Path
    """What to write: NAME.gguf; of safetensors a folder."""
    format: Annotated[
        str,
        one_of(
            exporters,
            "gguf: for llama.cpp. safetensors: a checkpoint folder of float weights, also of a .gguf file or of a "
            "quantized checkpoint.",
        ),
    ] = "gguf"
    gguf_type: GgufType | None = None
    """Number format of the weights in a GGUF file. A run that began from one keeps the bytes of every weight that
    healing left alone, and writes the others in the next finer format than they came in, as Q5_1 for Q4_1 (finer, its
    default unless it had a --target-size), in the format that they came in (same) or in that of f32 to q4_0. q6_k to
    iq1_s are llama.cpp's mixtures, of all weights, with an importance matrix from the calibration text
    (extra gguf). Not given,
    and no GGUF file came: q8_0."""
    converter: Annotated[Path | None, rare] = None
    """Folder that holds llama.cpp's convert_hf_to_gguf.py, for a model that is no .gguf file. Not given:
    $LAYERCUT_GGUF_CONVERTER, or that of the extra convert."""
    consumers: Consumers = ""
    force: Annotated[bool, no_negative] = False
    """Replace what is at --out."""

    def __post_init__(self) -> None:
        consumer_names(self.consumers)
        exporters.check(self.format, "--format")
        if self.format == "gguf" and self.out.suffix != ".gguf":
            raise ConfigError(f"--out {self.out} is not named as a GGUF file", f"--out {self.out.with_suffix('.gguf')}")


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload alone."""

    private: Annotated[bool, no_negative] = False
    """Make the repository private."""


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A chat with a run's two models."""

    load: ModelConfig = field(default_factory=ModelConfig)
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens, 1)


def is_cut(method: str) -> bool:
    """Whether a method of `compare` is no criterion but segments, such as 3:6+12:15."""
    return method[:1].isdigit()


COMPARED_STATES = ("cut", "folded", "tuned", "lora")
"""What becomes of every method's cut, in this order; LoRA where it is named."""
TRAINED_STATES = ("tuned", "lora")
"""Of these, what is trained."""


@options(SEARCH)
@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """What is compared, and on what it is measured."""

    ratio: Annotated[float | None, Parameter(group=WHAT)] = None
    """Share of the layers to remove, between 0 and 1."""
    methods: str = ",".join(("fisher:all", *(name for name in criteria if name != "auto")))
    """Search methods, separated by commas, each by text alone. NAME:all, or NAME:recall+lists: with generated tests of
    these capabilities as well, and as two segments where that pays, for fisher, race and exhaustive; unlike
    compress, it heals no cut on trial. 3:6+12:15: these layers. The first is what the others are compared with."""
    states: Annotated[str, Parameter(group=MEASURING)] = "cut,folded,tuned"
    """States of every cut that --tasks, --probes and --evaluations are measured in, separated by commas. lora, of rank
    32 on all layers and merged in, is trained only where it is named, on the same rows as the endpoints."""
    eval_data: Annotated[str, Parameter(group=MEASURING)] = "wikitext2"
    """Held-out text for perplexity, named like --data; wikitext2 is then its test split, c4 its validation split."""
    eval_tokens: Annotated[int, Parameter(group=MEASURING)] = 32768
    """Tokens to measure perplexity on."""
    eval_window: Annotated[int | None, Parameter(group=MEASURING)] = None
    """Tokens in a window that perplexity is reported on: windows do not overlap, the first token of each is not
    predicted. Not given: 2048, or as many as the model has positions."""
    tune_tokens: Annotated[int, Parameter(group=HEALING)] = 0
    """Tokens of the calibration text's source to tune the endpoints of every method's cut on; 0: no tuning."""
    probe_share: Annotated[float, Parameter(group=HEALING)] = 0.1
    """Share of these that are generated tests, for every method; 0: none."""
    chat_share: Annotated[float, Parameter(group=HEALING)] = 0.1
    """Share of these that are chats which the dense model writes, where it has a chat template; 0: none."""

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(f"--ratio {self.ratio:g} is outside 0 to 1", "a fifth of the layers: --ratio 0.2")
        self.heal()
        EvaluateConfig(eval_tokens=self.eval_tokens, eval_window=self.eval_window)
        unknown = [name for name in self.names if name.partition(":")[0] not in criteria and not is_cut(name)]
        if unknown or not self.names:
            got = ", ".join(map(repr, unknown)) or "no method"
            raise ConfigError(f"--methods names {got}", f"allowed are {', '.join(criteria)}")
        for name in self.names:
            self.search(name)
        if wrong := [state for state in split_names(self.states) if state not in COMPARED_STATES]:
            raise ConfigError(f"--states names {wrong[0]!r}", f"allowed are {', '.join(COMPARED_STATES)}")
        if not self.state_names:
            raise ConfigError("--states names none", f"allowed are {', '.join(COMPARED_STATES)}")
        if not self.tune_tokens and (self.state_names == ["tuned"] or "lora" in self.state_names):
            raise ConfigError(
                f"--states {self.states} is given, and nothing is tuned", "give --tune-tokens, or --states cut"
            )

    def heal(self) -> HealConfig:
        """How the cut of every method is healed."""
        return HealConfig(tune_tokens=self.tune_tokens, probe_share=self.probe_share, chat_share=self.chat_share)

    @property
    def names(self) -> list[str]:
        """The methods, each once, in the order given."""
        return split_names(self.methods)

    @property
    def state_names(self) -> list[str]:
        """The states that are measured further, in the order in which a cut takes them."""
        return [state for state in COMPARED_STATES if state in split_names(self.states)]

    def search(self, name: str) -> SearchConfig:
        """How a method of `names` is asked to search."""
        if is_cut(name):
            return SearchConfig(segment=tuple(name.split("+")), preserve="none")
        method, _, preserved = name.partition(":")
        preserve = preserved.replace("+", ",") or "none"
        if preserve != "none" and method in criteria.own and method not in TAKE_TESTS:
            raise ConfigError(f"--methods {name}: {method} goes by text alone", f"--methods {method}")
        return SearchConfig(ratio=self.ratio, method=method, preserve=preserve)


@flat
@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Methods side by side."""

    load: ModelConfig = field(default_factory=ModelConfig)
    text: DataConfig = field(default_factory=DataConfig)
    compare: MethodsConfig = field(default_factory=MethodsConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def journey(self) -> CompressConfig:
        """The run with the same model and tokens, checked as a whole."""
        config = CompressConfig(
            load=self.load,
            text=self.text,
            search=SearchConfig(ratio=self.compare.ratio),
            heal=self.compare.heal(),
            tasks=self.tasks,
            evaluate=EvaluateConfig(
                eval_data=self.compare.eval_data,
                eval_tokens=self.compare.eval_tokens,
                eval_window=self.compare.eval_window,
            ),
            run=self.run,
        )
        if self.compare.ratio is None:
            raise ConfigError("no --ratio is given", "a fifth of the layers: --ratio 0.2")
        return config


def keys(config: type) -> set[str]:
    """The YAML keys of a command's configuration."""
    found: set[str] = set()
    hints = get_type_hints(config)
    for one in fields(config):
        found |= keys(hints[one.name]) if is_dataclass(hints[one.name]) else {one.name}
    return found


def from_flat(options: Mapping[str, Any]) -> CompressConfig:
    """The configuration of a run from flat keys, which are the flags' names with underscores, as in a YAML file."""
    hints = get_type_hints(CompressConfig)
    parts: dict[str, dict[str, Any]] = {one.name: {} for one in fields(CompressConfig)}
    owner = {key: part for part in parts for key in keys(hints[part])}
    for key, value in options.items():
        if key not in owner:
            near = difflib.get_close_matches(key, owner, 1)
            raise ConfigError(
                f"there is no option {key!r}", f"did you mean {near[0]!r}?" if near else "see layercut compress --help"
            )
        if key == "segment":
            value = tuple(map(str, as_segments(value)))
        value = joined_names(key, value)
        parts[owner[key]][key] = _checked(key, value, get_type_hints(hints[owner[key]])[key])
    return CompressConfig(**{part: hints[part](**given) for part, given in parts.items()})


def _checked(key: str, value: Any, kind: Any) -> Any:
    """A value that is of the type its field is annotated with; paths may be given as text, floats as whole numbers."""
    allowed = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for one in allowed:
        choices = get_args(one)
        if get_origin(one) is Literal and value in choices and type(value) is type(choices[choices.index(value)]):
            return value
        if one is Path and isinstance(value, str | Path):
            return Path(value)
        if one is float and type(value) in (int, float):
            return float(value)
        if (isinstance(one, type) and type(value) is one) or (get_origin(one) is tuple and isinstance(value, tuple)):
            return value
    words = [", ".join(map(repr, get_args(one))) or getattr(one, "__name__", str(one)) for one in allowed]
    raise ConfigError(
        f"{key} is {value!r}", f"allowed is {' or '.join('None' if w == 'NoneType' else w for w in words)}"
    )


def flattened(config: CompressConfig | CompareConfig) -> dict[str, Any]:
    """A config as flat YAML keys, every default filled in; fit for --config. How it was run is left out."""
    result: dict[str, Any] = {}
    for stage in asdict(config).values():
        result |= stage
    del result["config"], result["force"]
    return {key: _plain(value) for key, value in result.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
