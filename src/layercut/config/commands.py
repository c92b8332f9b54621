"""The options of each command, made of those of its stages, and their flat form in YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from cyclopts import Parameter

from layercut.config import (
    HEALING,
    MEASURING,
    OF_NAMES,
    RUN,
    SEARCH,
    TAKE_PROBES,
    WHAT,
    Consumers,
    DataConfig,
    EvaluateConfig,
    GgufType,
    HealConfig,
    ModelConfig,
    QuantizeConfig,
    ReportedText,
    SearchConfig,
    TasksConfig,
    at_least,
    consumer_names,
    flat,
    no_negative,
    one_of,
    options,
    rare,
    rare_switch,
    refuse,
    split_names,
)
from layercut.errors import ConfigError
from layercut.files import parse_bytes
from layercut.registries import criteria, exporters
from layercut.segments import Segment, as_segments


@flat
@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged on stderr while a command runs."""

    quiet: Annotated[bool, no_negative] = False
    """Log nothing but warnings and errors."""


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A file of options."""

    config: Annotated[Path | None, Parameter(group=RUN)] = None
    """A YAML file of flags; flags of the command win. Its keys are the flags' names, with underscores. Of the file of
    a compress run, the other commands take the keys they know."""


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class RunConfig(ConfigFile):
    """The run folder."""

    out: Path | None = None
    """Run folder, or the .gguf file to write; runs/NAME where not given. A run that was stopped is resumed there. Of
    NAME.gguf the run folder is NAME.gguf-run."""
    force: Annotated[bool, no_negative] = False
    """Run finished stages again, also where a finished run of other settings, text, model or code is there, which is
    then replaced."""

    @property
    def file(self) -> Path | None:
        """The .gguf file that --out names; None where it names none."""
        return self.out if self.out and self.out.suffix == ".gguf" else None

    @property
    def folder(self) -> Path | None:
        """The run folder: --out, or where that names a .gguf file, NAME.gguf-run beside it; None: not given."""
        return self.file.with_name(f"{self.file.name}-run") if self.file else self.out


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """In which file format the result is written."""

    format: Literal["auto", "gguf", "safetensors"] = "auto"
    """safetensors: a checkpoint folder for transformers. gguf: a file for llama.cpp; of a .gguf file, with the bytes of
    all that healing left alone. auto: gguf where MODEL is one or --out is named so, else safetensors."""
    gguf_type: GgufType | None = None
    """Number format of what is written in a GGUF file. Of a .gguf file, what healing changed is in the next finer
    format than it had, as Q5_1 for Q4_1 (finer; not given, unless --target-size is), in the format that it had (same)
    or in that of f32 to q4_0. Of a folder q8_0 where not given. q6_k to iq1_s: all weights, by llama.cpp with an
    importance matrix (extra gguf)."""


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

    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    heal: HealConfig = field(default_factory=HealConfig)


@flat
@dataclass(frozen=True, kw_only=True)
class CompressConfig(TuneConfig):
    """The whole journey."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def check(self) -> None:
        """Check what no stage can check alone; not on construction, so that a mistyped --ratoi is named first."""
        search, quantize, heal, fifth = self.search, self.quantize, self.heal, "a fifth of the layers: --ratio 0.2"
        given, auto, both, asked = search.given, quantize.bits == "auto", search.two_budgets, heal.tune_quantized
        if not given:
            raise ConfigError("neither --ratio nor --segment nor a budget is given", fifth)
        quantize.check_allowed()
        forced, trains = asked in ("scales", "rounding"), f"--tune-quantized {asked} is given, but"
        with_loss = "--target-size with --max-loss"
        refuse(
            (auto and search.target_size is None, "--bits auto is given without --target-size",
             "give the size: --target-size 60MB"),
            (auto and search.max_loss is not None, "--bits auto is given with --max-loss",
             "give --ratio in its place, or leave out --bits"),
            (len(given) > 1 and not auto and not both, f"both {given[0]} and {given[-1]} are given",
             "give one of them; both go with --bits auto"),
            (search.ratio == 0 and not quantize.rounds, "--ratio 0 is not between 0 and 1",
             f"{fifth}; none: give --bits"),
            (both and not heal.tokens, f"{with_loss} is measured after healing, and --tune-tokens is 0",
             "give --tune-tokens"),
            (forced and quantize.bits == 16 and not both, f"{trains} nothing is quantized", "give --bits too"),
            (forced and not heal.tokens, f"{trains} no tokens are tuned on", "give --tune-tokens too"),
            (both and quantize.rounds, f"--bits is given, and {with_loss} chooses among 16, 8 and 4 bits",
             "leave it out; --embedding-bits 8 goes with both budgets"),
            (bool(quantize.how) and not quantize.rounds and not both,
             f"{' '.join(quantize.how[:1])} is given, but nothing is quantized", "give --bits 4 or 8"),
        )  # fmt: skip

    @property
    def shares_size(self) -> bool:
        """Whether layers and bits share a size: then the number of layers that go is chosen too."""
        return self.quantize.bits == "auto" and self.search.given == ["--target-size"]


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class PlanConfig(ConfigFile):
    """What a run with these flags would take."""

    load: ModelConfig = field(default_factory=ModelConfig)
    text: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    on: Literal["t4", "l4", "rtx4090", "l40s", "a100", "h100", "h200", "b200"] | None = None
    """Plan for this GPU instead of this machine, from its data sheet. Not given, with --device cuda where there is
    none: a100."""
    calibrate: bool = True
    """Measure this machine for a few seconds, to estimate how long it will take."""
    json: Annotated[bool, no_negative] = False
    """Print everything as JSON instead of tables."""

    def journey(self) -> CompressConfig:
        """The run that is planned."""
        of_a_run = {one.name for one in fields(CompressConfig)}
        return CompressConfig(**{name: value for name, value in vars(self).items() if name in of_a_run})


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class WrittenConfig:
    """What is written to --out."""

    consumers: Consumers = ""
    force: Annotated[bool, no_negative] = False
    """Replace what is at --out."""

    def __post_init__(self) -> None:
        consumer_names(self.consumers)


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class CutConfig(WrittenConfig):
    """Surgery alone, on the files."""

    segment: Annotated[tuple[str, ...], Parameter(group=WHAT, negative="")]
    """A segment START:STOP to remove; 13:19 removes layers 13 to 18. Repeatable."""
    out: Path
    """The new checkpoint: a folder, or a .gguf file where MODEL is one."""
    allow_pickle: Annotated[bool, rare_switch] = False
    """Read pickled weights (*.bin), which can run code too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.segment:
            raise ConfigError(
                "no --segment is given", "for layers 13 to 18: --segment 13:19; to find one: layercut search"
            )

    @property
    def segments(self) -> list[Segment]:
        return [Segment.parse(text) for text in self.segment]


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class QuantizeAloneConfig(ConfigFile, WrittenConfig):
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

    def check(self) -> None:
        """Check the whole; not on construction, so that a mistyped --bit is named first."""
        chosen, to_gguf, how = self.quantize.bits == "auto", self.out.suffix == ".gguf", self.quantize.how
        self.quantize.check_allowed()
        given, missing = ("--bits auto", "--target-size") if chosen else ("--target-size", "--bits auto")
        refuse(
            (bool(self.gguf_type) and not to_gguf, "--gguf-type is given, and --out names no .gguf file",
             "--out NAME.gguf"),
            (self.quantize.bits == 16 and not self.gguf_type, "no --bits is given", "--bits 8 or --bits 4"),
            (chosen and to_gguf, "--bits auto packs weights for transformers, and --out is a GGUF file",
             "name a folder"),
            (to_gguf and bool(how), f"{' '.join(how[:1])} is given, and --out is a GGUF file, whose number format says "
             "how weights are rounded", f"leave out {' '.join(how[:1])}, or name a folder"),
            (chosen != (self.target_size is not None), f"{given} is given without {missing}",
             "--bits auto --target-size 60MB"),
        )  # fmt: skip
        if self.target_size is not None:
            parse_bytes("--target-size", self.target_size)


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class ExportConfig(WrittenConfig):
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
    (extra gguf). Not given, and no GGUF file came: q8_0."""
    converter: Annotated[Path | None, rare] = None
    """Folder that holds llama.cpp's convert_hf_to_gguf.py, for a model that is no .gguf file. Not given:
    $LAYERCUT_GGUF_CONVERTER, or that of the extra convert."""

    def __post_init__(self) -> None:
        super().__post_init__()
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


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(ConfigFile):
    """Measuring alone."""

    load: ModelConfig = field(default_factory=ModelConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    eval_data: str | None = None
    """Held-out text for perplexity; values as for --data; wikitext2 is its test split. Not given: wikitext2, or no text
    where --tasks, --evaluations or --probes is given."""
    eval_tokens: int = 16384
    """Tokens to measure perplexity on."""
    eval_window: Annotated[int | None, Parameter(alias="--window")] = None
    """Tokens in a window: windows do not overlap, the first token of each is not predicted. Not given: 2048, or as
    many as the model has positions."""
    seed: int = 0
    """Seed of the evaluations and of --probes, and of the text where --eval-data is self."""
    json: Annotated[bool, no_negative] = False
    """Print everything as one JSON object on stdout instead of lines."""

    def __post_init__(self) -> None:
        ReportedText(eval_tokens=self.eval_tokens, eval_window=self.eval_window)


COMPARED_STATES = ("cut", "folded", "tuned", "lora", "control")
"""What becomes of every method's cut, in this order; LoRA and the control where they are named."""
TRAINED_STATES = ("tuned", "lora", "control")
"""Of these, what is trained."""


@options(SEARCH)
@dataclass(frozen=True, kw_only=True)
class MethodsConfig(ReportedText):
    """What is compared, and on what it is measured."""

    ratio: Annotated[float | None, Parameter(group=WHAT)] = None
    """Share of the layers to remove, between 0 and 1."""
    methods: str = ",".join(("fisher:all", *(name for name in criteria if name != "auto")))
    """Search methods, separated by commas, each by text alone. NAME:all, or NAME:recall+lists: with probes of these
    capabilities as well, and as two segments where that pays, for fisher, race and exhaustive; unlike compress, it
    evaluates no shortlist. 3:6+12:15: these layers. The first is what the others are compared with."""
    states: Annotated[str, Parameter(group=MEASURING)] = "cut,folded,tuned"
    """States of every cut that --tasks, --probes and --evaluations are measured in, separated by commas. lora, of rank
    32 on all layers and merged in, and control, the dense model with the same layers trained and none removed, are
    trained only where they are named, on the same rows as the endpoints."""
    tune_tokens: Annotated[int, Parameter(group=HEALING)] = 0
    """Tokens of the calibration text's source to tune the endpoints of every method's cut on; 0: no tuning."""
    probe_share: Annotated[float, Parameter(group=HEALING)] = 0.1
    """Share of these that are probes, for every method; 0: none."""
    chat_share: Annotated[float, Parameter(group=HEALING)] = 0.1
    """Share of these that are chats which the dense model writes, where it has a chat template; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heal()
        unknown = [name for name in self.names if name.partition(":")[0] not in criteria and not name[0].isdigit()]
        wrong = [state for state in split_names(self.states) if state not in COMPARED_STATES]
        allowed = f"allowed are {', '.join(COMPARED_STATES)}"
        trained = {"lora", "control"}.intersection(self.state_names) or self.state_names == ["tuned"]
        refuse(
            (self.ratio is not None and not 0 < self.ratio < 1, f"--ratio {self.ratio} is not between 0 and 1",
             "a fifth of the layers: --ratio 0.2"),
            (bool(unknown) or not self.names, f"--methods names {', '.join(map(repr, unknown)) or 'no method'}",
             f"allowed are {', '.join(criteria)}"),
            (bool(wrong), f"--states names {', '.join(map(repr, wrong))}", allowed),
            (not self.state_names, "--states names none", allowed),
            (bool(trained) and not self.tune_tokens, f"--states {self.states} is given, and nothing is tuned",
             "give --tune-tokens, or --states cut"),
        )  # fmt: skip
        for name in self.names:
            self.search(name)

    def heal(self) -> HealConfig:
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
        """How a method of `names` is asked to search; segments such as 3:6+12:15 are no method."""
        if name[0].isdigit():
            return SearchConfig(segment=tuple(name.split("+")), preserve="none")
        method, _, preserved = name.partition(":")
        preserve = preserved.replace("+", ",") or "none"
        if preserve != "none" and method in criteria.own and method not in TAKE_PROBES:
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
        """The run with the same model and tokens."""
        asked = self.compare
        if asked.ratio is None:
            raise ConfigError("no --ratio is given", "a fifth of the layers: --ratio 0.2")
        return CompressConfig(
            load=self.load, text=self.text, search=SearchConfig(ratio=asked.ratio), tasks=self.tasks, run=self.run,
            heal=asked.heal(),
            evaluate=EvaluateConfig(**{one.name: getattr(asked, one.name) for one in fields(ReportedText)}),
        )  # fmt: skip


def keys(config: type) -> set[str]:
    """The YAML keys of a command's configuration."""
    found: set[str] = set()
    for name, kind in get_type_hints(config).items():
        found |= keys(kind) if isinstance(kind, type) and is_dataclass(kind) else {name}
    return found


def joined_names(key: str, value: Any) -> Any:
    """The value of an option, where it is names separated by commas also from a list, as a YAML file may give it."""
    return ",".join(map(str, value)) if key in OF_NAMES and isinstance(value, list | tuple) else value


def from_flat(options: Mapping[str, Any]) -> CompressConfig:
    """The configuration of a run from flat keys, which are the flags' names with underscores, as in a YAML file."""
    stages = get_type_hints(CompressConfig)
    owner = {key: stage for stage, kind in stages.items() for key in keys(kind)}
    given: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for key, value in options.items():
        if key not in owner:
            near = difflib.get_close_matches(key, owner, 1)
            raise ConfigError(
                f"there is no option {key!r}", f"did you mean {near[0]!r}?" if near else "see layercut compress --help"
            )
        if key == "segment":
            value = tuple(map(str, as_segments(value)))
        kind = get_type_hints(stages[owner[key]])[key]
        given[owner[key]][key] = _checked(key, joined_names(key, value), kind)
    return CompressConfig(**{stage: stages[stage](**values) for stage, values in given.items()})


def _checked(key: str, value: Any, kind: Any) -> Any:
    """A value that is of the type its field is annotated with; paths may be given as text, floats as whole numbers."""
    try:
        return msgspec.convert(str(value) if isinstance(value, Path) else value, kind, dec_hook=lambda to, it: to(it))
    except (msgspec.ValidationError, TypeError):
        allowed = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        words = [", ".join(map(repr, get_args(one))) or getattr(one, "__name__", str(one)) for one in allowed]
        hint = " or ".join("None" if word == "NoneType" else word for word in words)
        raise ConfigError(f"{key} is {value!r}", f"allowed is {hint}") from None


def flattened(config: CompressConfig | CompareConfig) -> dict[str, Any]:
    """A config as flat YAML keys, every default filled in; fit for --config. How it was run is left out."""
    found = {key: value for stage in asdict(config).values() for key, value in stage.items()}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    left = {"config", "force", "tune_window"}
    return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items() if k not in left}
