"""Every option there is: frozen dataclasses, one per stage.

Flags, YAML keys and --help are made from these fields and from nothing else; a field's docstring is its help.
In YAML the keys are the flags' names with underscores, flat: `ratio: 0.2`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from layercut.errors import ConfigError
from layercut.files.sizes import parse_bytes
from layercut.registries import Registry, criteria, evaluations, exporters, objectives, quantizers
from layercut.segments import Segment, as_segments

StreamMode = Literal["auto", "on", "off"]
ShardMode = Literal["auto", "on", "off"]
DeviceMapMode = Literal["auto", "on", "off"]
CONSUMER_NAMES = (
    "transformers", "vllm", "sglang", "llama.cpp", "ollama", "lm-studio", "mlx", "openvino", "onnxruntime",
)  # fmt: skip
"""Software by which a written model may have to be read right; `export/engines.py` has what each makes of it."""
Consumers = Annotated[
    str,
    Parameter(
        name=("--for", "--consumers"),
        help=f"Software that has to read the result right, names separated by commas: {', '.join(CONSUMER_NAMES)}. "
        "Cuts that one of them would misread are not chosen, and number formats that it does not read are refused. "
        "Not given: the report names who would misread the cut.",
    ),
]
GROUP_SIZES = (128, 64, 32)
"""Columns that share a scale in quantized weights: the sizes for which loaders have fast kernels, coarsest first."""
COARSE_BITS = 3
"""Up to which groups have zero points by themselves: for 1 % more bytes 8 and 10 % less perplexity of
Qwen2.5-Coder-0.5B (docs/log.md), and no engine but transformers reads so few bits."""
NEAR_ENOUGH = 8
"""Bits of a head from which on it is rounded to nearest, without calibration."""
Bits = Literal[16, 8, 6, 4, 3, 2]
"""Of a weight. compressed-tensors packs 1 to 8; these are reloaded by transformers to the bit (tried, docs/log.md)."""
AskedBits = Literal["auto", 16, 8, 6, 4, 3, 2]
"""The same, or chosen for each matrix."""
EmbeddingBits = Literal[16, 8, 6, 4, 3, 2]
GgufType = Literal[
    "finer", "same", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
    "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
]  # fmt: skip
TAKE_TESTS = ("auto", "fisher", "clp", "race", "exhaustive")
"""Criteria of layercut that take generated tests, several segments and other objectives."""
OF_NAMES = {"preserve", "consumers", "for", "bits_allowed", "tasks", "evaluations", "methods", "states"}
"""Options whose value is names, or numbers, separated by commas."""
Preset = Literal["fast", "balanced", "best"]
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "tokens": 8192, "tune_tokens": 32768, "eval_tokens": 16384, "speed": False,
    },
    "balanced": {},
    "best": {"tokens": 65536, "tune_tokens": 1048576, "eval_tokens": 131072},
}  # fmt: skip
"""What the command's --preset fills in where neither a flag nor --config does, as flat YAML keys; balanced is the
defaults. Nothing that another flag could forbid is here, and no other method: fast is less text, not another way.
More tokens heal more (docs/log.md); how many are enough is a guess."""
WHAT, RUN, TEXT, SEARCH, HEALING, QUANTIZATION, MEASURING, LOADING, RARE = (
    Group(name, sort_key=place)
    for place, name in enumerate(
        (
            "What to remove", "Run", "Text", "Search", "Healing", "Quantization", "Measuring", "Loading",
            "Rarely needed",
        )
    )
)  # fmt: skip
"""The boxes of --help, in their order."""
rare = Parameter(group=RARE)
no_negative = Parameter(negative="")


def one_of(registry: Registry[Any], text: str, group: Group | None = None) -> Parameter:
    """A name from a registry; the help lists them all, also those of installed packages."""
    help = f"{text} One of {', '.join(registry)}."
    return Parameter(help=help, group=group) if group else Parameter(help=help)


rare_switch = Parameter(group=RARE, negative="")
flat = Parameter(name="*")


def options(group: Group) -> Callable[[type], type]:
    """A decorator of dataclasses whose fields are flags, in one box of --help unless a field says otherwise."""
    return Parameter(name="*", group=group)


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a value that is too small."""
    if not value >= least:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} {value:g} is too small", f"allowed is {least:g} or more")


def split_names(text: str) -> list[str]:
    """Names separated by commas, each once, in the order given."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def joined_names(key: str, value: Any) -> Any:
    """The value of an option, where it is names separated by commas also from a list, as a YAML file may give it."""
    return ",".join(map(str, value)) if key in OF_NAMES and isinstance(value, list | tuple) else value


def consumer_names(text: str) -> tuple[str, ...]:
    """The names after --for, each once. ConfigError: a name that is unknown."""
    names = tuple(split_names(text))
    for name in names:
        if name not in CONSUMER_NAMES:
            near = difflib.get_close_matches(name, CONSUMER_NAMES, 1)
            hint = f"did you mean --for {near[0]}?" if near else "leave it out, and see what the report says of the cut"
            raise ConfigError(f"--for {name!r} is unknown; there are {', '.join(CONSUMER_NAMES)}", hint)
    return names


@options(LOADING)
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How the model is loaded."""

    device: str = "auto"
    """auto (the first accelerator, else the CPU), cpu, cuda, cuda:N, mps or xpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype to compute and save in. auto: the checkpoint's own, bfloat16 for GGUF; where the CPU has no
    instructions for it, computed in float32 and saved in it all the same."""
    trust_remote_code: Annotated[bool, rare_switch] = False
    """Run modelling code that comes with the checkpoint."""
    allow_pickle: Annotated[bool, rare_switch] = False
    """Read pickled weights (*.bin), which can run code too."""
    stream: StreamMode = "auto"
    """Leave the decoder layers on disk and read each when it is needed, for what is larger than memory.
    auto: where the weights would take more than 0.8 of the memory available."""
    shard: Annotated[ShardMode, rare] = "auto"
    """Shard the weights over several processes, which gather each layer when it runs, to heal what is larger than
    one device. auto: where there are several and the weights would take more than 0.8 of one's memory."""
    max_memory: Annotated[str | None, rare] = None
    """Memory of the device that a run may take, weights included, e.g. 20GB: it decides how many rows and tokens are
    done at once. Not given: what is free on a GPU; on a CPU what its caches bear."""
    device_map: Annotated[DeviceMapMode, rare] = "auto"
    """Place the layers over all accelerators of the machine, in one process; hidden states follow them.
    auto: where the weights would take more than 0.8 of one's memory, and not of all."""

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_bytes("--max-memory", self.max_memory)
        places = {"--stream on": self.stream, "--shard on": self.shard, "--device-map on": self.device_map}
        on = [flag for flag, mode in places.items() if mode == "on"]
        if len(on) > 1:
            raise ConfigError(f"both {' and '.join(on)} are given", "give one of them")


@options(TEXT)
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The calibration text, on which segments are scored."""

    data: str = "c4"
    """Calibration text: wikitext2, c4 (both: the training split), fineweb-edu, alpaca, OWNER/NAME:SPLIT:COLUMN, a
    .txt/.jsonl/.parquet file or glob, python-docs, python-docstrings, or self (sampled from the model). Join several
    with +."""
    tokens: int = 16384
    """Calibration tokens."""
    window: int = 256
    """Tokens in a row, of calibration text and of what judges healing."""
    chat_template: Annotated[bool, rare_switch] = False
    """Render instruction data through the model's chat template."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        at_least("tokens", self.tokens, 1)
        at_least("window", self.window, 8)
        at_least("seed", self.seed, 0)


@options(SEARCH)
@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What to remove, and how to find it."""

    ratio: Annotated[float | None, Parameter(group=WHAT)] = None
    """Share of the layers to remove, between 0 and 1."""
    segment: Annotated[tuple[str, ...], Parameter(group=WHAT, negative="")] = ()
    """A segment START:STOP to remove instead of searching; 13:19 removes layers 13 to 18. Repeatable."""
    target_size: Annotated[str | None, Parameter(group=WHAT)] = None
    """Instead of --ratio: remove as few layers as bring the exported weights down to this, e.g. 200MB or 1.5GiB. With
    --bits auto: choose the bits of each matrix for this size, and how many layers go too, unless --ratio or --segment
    says it."""
    max_loss: Annotated[float | None, Parameter(group=WHAT)] = None
    """Instead of --ratio: remove as many layers as raise perplexity by no more than this share (0.1 is 10 %). In one
    round: before healing, on a quarter of the calibration text that is not searched on. In several: after healing,
    on held-out rows. With --target-size: vary layers and bits until both are met, or say that they cannot be."""
    num_segments: int | Literal["auto"] = "auto"
    """Remove the layers as up to so many segments; for fisher, race and exhaustive. auto: as one, or as two where
    that lowers what --preserve minimises by more than 5 %; as one with --preserve none."""
    preserve: str = "all"
    """What the search keeps beside text, for the same methods: all, none, or names separated by commas of recall
    (keys hidden in text), lists (values by key), copy, labels (given by examples), sums, structure (of code) and
    format. Its damage is measured on tests that are generated from the tokenizer, and added to the loss on text. Where
    weights of a checkpoint folder get fewer than 8 bits, they are rounded on such tests too."""
    method: Annotated[
        str,
        one_of(
            criteria,
            "clp: the concave gate of CLP, moved by gradient descent. fisher: a Fisher information estimate proposes, "
            "real cuts decide. auto: fisher. race: real cuts alone. "
            "exhaustive: every segment, in one sweep. The others are the baselines they are compared with; "
            "block-influence, perplexity, taylor, sleb and evolution may choose layers that are not neighbours.",
        ),
    ] = "auto"
    consumers: Consumers = ""

    def __post_init__(self) -> None:
        if len(given := [flag for flag in self.given if flag != "--target-size"]) > 1:
            raise ConfigError(f"both {given[0]} and {given[1]} are given", "give one of them")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ConfigError(f"--ratio {self.ratio:g} is outside 0 to 1", "a fifth of the layers: --ratio 0.2")
        _ = self.target_bytes
        if self.max_loss is not None and not 0 < self.max_loss < math.inf:
            raise ConfigError(
                f"--max-loss {self.max_loss:g} is not above 0", "perplexity up by a tenth: --max-loss 0.1"
            )
        if self.num_segments != "auto":
            at_least("num_segments", self.num_segments, 1)
        consumer_names(self.consumers)
        self._check_method()
        _ = self.segments

    def _check_method(self) -> None:
        """Refuse a name that is unknown, and options that a method would ignore."""
        criteria.check(self.method, "--method")
        asked = {
            "--num-segments": self.num_segments not in (1, "auto"),
            "--preserve": self.preserve not in ("all", "none"),
        }
        for flag, is_asked in asked.items():
            # of other packages' criteria, the search itself asks whether they take it
            if is_asked and self.method in criteria.own and self.method not in TAKE_TESTS:
                raise ConfigError(f"{flag} is not for --method {self.method}", f"leave out {flag}, or --method")
            if is_asked and self.segment:
                raise ConfigError(f"{flag} is for a search, and --segment is given", "leave out one of them")

    @property
    def target_bytes(self) -> int:
        """What --target-size allows; 0 where it is not given."""
        return parse_bytes("--target-size", self.target_size) if self.target_size is not None else 0

    @property
    def given(self) -> list[str]:
        """The flags among those that say what to remove; one of them is needed, and no more."""
        values = {
            "--ratio": self.ratio, "--segment": self.segment or None, "--target-size": self.target_size,
            "--max-loss": self.max_loss,
        }  # fmt: skip
        return [flag for flag, value in values.items() if value is not None]

    @property
    def removing(self) -> list[str]:
        """Those of `given` that say how many layers go, where --bits auto makes the size."""
        return [flag for flag in self.given if flag in ("--ratio", "--segment")]

    @property
    def two_budgets(self) -> bool:
        """Whether both a size and a loss are to be kept, for which layers and bits are tried."""
        return self.given == ["--target-size", "--max-loss"]

    @property
    def segments(self) -> list[Segment]:
        """The segments given by hand."""
        return [Segment.parse(text) for text in self.segment]


@options(HEALING)
@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """How the cut is healed."""

    fold: bool = True
    """Fold a least-squares correction into the layer before the cut."""
    tune_data: str | None = None
    """Text to tune on, named like --data. Not given: other tokens of the calibration text's source."""
    tune_tokens: int = 131072
    """Tokens to tune the endpoint layers on; 0 leaves tuning out."""
    tune_window: Annotated[int | None, rare] = None
    """Tokens in every second row to tune on, of text or tests; the others are as --window, of tests 256. Not given:
    1,024, or --batch-tokens where that is less, if 65,536 tokens or more are tuned on and the model has the positions;
    else as --window."""
    probe_share: float = 0.1
    """Share of these that are generated tests, to teach again what --preserve names, beside the text of --tune-data;
    0, or --preserve none: none."""
    chat_share: float = 0.1
    """Share of these that are chats which the model writes before it is cut, the user's messages too, so that it still
    replies as it did; where it has a chat template, which opens with 128 tokens at most, and is in memory. 0: none."""
    objective: Annotated[
        str,
        one_of(
            objectives,
            "kl: match the dense model's predictions. next-token: the text's.",
        ),
    ] = "kl"
    learning_rate: float | None = None
    """Peak rate of AdamW, quartered where the held-out loss rises above the start's by 1 %, or twice in a row. Not
    given: a 120th of the usual weight tuned (the median of the matrices' root mean squares), half of it in fewer than
    64 steps, 2 / N of it where N > 2 layers are."""
    batch_tokens: Annotated[int, rare] = 1024
    """Tokens in one optimizer step."""
    radius: Annotated[int, rare] = 1
    """Layers tuned on each side of a cut. With more of them perplexity gets lower, and fewer keys are kept."""

    def __post_init__(self) -> None:
        objectives.check(self.objective, "--objective")
        at_least("tune_tokens", self.tune_tokens, 0)
        if self.tune_window is not None:
            at_least("tune_window", self.tune_window, 8)
        for flag, share in (("--probe-share", self.probe_share), ("--chat-share", self.chat_share)):
            if share and not 0.001 <= share <= 0.999:
                raise ConfigError(f"{flag} {share:g} is neither 0 nor from 0.001 to 0.999", f"a tenth: {flag} 0.1")
        at_least("batch_tokens", self.batch_tokens, 1)
        at_least("radius", self.radius, 1)
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ConfigError(f"--learning-rate {self.learning_rate:g} is outside 0 to 1", "try 1e-4")


ALL_BITS = "16,8,6,4,3,2"
"""What --bits auto chooses among unless it is told."""


@options(QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """In how many bits the weights are stored."""

    bits: AskedBits = 16
    """Bits for each weight of the decoder layers. 16: not quantized. vLLM reads 8 and 4. auto: each matrix, embeddings
    and head too, in the bits of --bits-allowed that keep KL to the model least within --target-size."""
    bits_allowed: Annotated[str, rare] = ALL_BITS
    """What --bits auto chooses among, separated by commas. For vLLM: 8,4 with --embedding-bits 16."""
    quantizer: Annotated[
        str,
        one_of(
            quantizers,
            "gptq: calibrated on the calibration text, column by column. rtn: round to nearest, without text.",
        ),
    ] = "gptq"
    group_size: Annotated[int | None, rare] = None
    """Columns that share a scale. Not given: for each weight the largest of 128, 64 and 32 that divides its columns,
    where all weights have the same the largest that divides all."""
    embedding_bits: Annotated[EmbeddingBits | None, rare] = None
    """Bits of embeddings and head: 8, or the same as --bits, and then in the same groups as all other weights; only
    transformers reads those. Not given, or 16: they stay as they are; with --bits auto not given means chosen too."""

    def __post_init__(self) -> None:
        quantizers.check(self.quantizer, "--quantizer")
        _ = self.allowed
        if self.bits == "auto" and self.embedding_bits not in (None, 16):
            flag = f"--embedding-bits {self.embedding_bits}"
            raise ConfigError(f"--bits auto chooses bits, and {flag} is given", f"leave out {flag}")
        if self.bits == "auto" and self.allowed == (16,):
            raise ConfigError("--bits auto has nothing to choose: --bits-allowed is 16", "--bits-allowed 16,8,4")
        if self.embedding_bits not in (None, 16, 8, self.bits):  # stock transformers cannot load others
            raise ConfigError(
                f"--embedding-bits {self.embedding_bits} beside --bits {self.bits} cannot be loaded by transformers",
                f"give --embedding-bits 8 or {self.bits}",
            )
        if self.group_size is not None:
            at_least("group_size", self.group_size, 8)

    @property
    def rounds(self) -> bool:
        """Whether anything is quantized."""
        return self.bits != 16

    @property
    def how(self) -> list[str]:
        """The flags that are given beside --bits: they say how weights are rounded."""
        plain = QuantizeConfig()
        values = {
            "--quantizer": self.quantizer != plain.quantizer, "--group-size": self.group_size is not None,
            "--embedding-bits": self.embedding_bits is not None, "--bits-allowed": self.bits_allowed != ALL_BITS,
        }  # fmt: skip
        return [flag for flag, is_given in values.items() if is_given]

    @property
    def allowed(self) -> tuple[int, ...]:
        """What `bits` auto chooses among, the most bits first. ConfigError: no such bits."""
        widths = get_args(Bits)
        given = split_names(self.bits_allowed)
        if not given or any(name not in map(str, widths) for name in given):
            raise ConfigError(
                f"--bits-allowed is {self.bits_allowed!r}",
                f"allowed are {', '.join(map(str, widths))}, separated by commas",
            )
        return tuple(width for width in widths if str(width) in given)

    @property
    def zero_points(self) -> bool:
        """Whether every group has a zero point: up to `COARSE_BITS` where all weights that are rounded have as many."""
        same = self.embedding_bits in (None, 16, self.bits)
        return self.bits != "auto" and self.bits <= COARSE_BITS and same

    @property
    def packs_embeddings(self) -> bool:
        """Whether embeddings are packed as the other weights are, and not stored as whole bytes."""
        return self.embedding_bits == self.bits and self.embedding_bits not in (8, 16)

    @property
    def one_width(self) -> bool:
        """Whether all weights must have the same bits and groups, since a loader takes the first group's for all."""
        return self.zero_points or self.packs_embeddings

    def check_allowed(self) -> None:
        """Refuse --bits-allowed where nothing is chosen."""
        if self.bits != "auto" and self.bits_allowed != ALL_BITS:
            raise ConfigError("--bits-allowed is what --bits auto chooses among", "give --bits auto, or leave it out")

    @property
    def small_head(self) -> bool:
        """Whether the head has so few bits that it is calibrated, or may be given them."""
        return self.bits == "auto" or (self.embedding_bits or 16) < NEAR_ENOUGH

    @property
    def small(self) -> bool:
        """Whether any weight has, or may be given, so few bits that scales are fitted to what it does."""
        return self.bits == "auto" or self.bits < NEAR_ENOUGH


@options(QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class AfterRoundingConfig:
    """What is trained once the weights are rounded."""

    tune_quantized: Literal["auto", "scales", "rounding", "none"] = "auto"
    """Train what was rounded towards what it was before, on the tokens to tune on: the groups' scales and the norms
    (scales), these and the rounding itself (rounding, 28 to 40 bytes a weight), or nothing. auto: scales below 8
    bits, the rounding too where packed weights have 3.5 bits or fewer on average and the device has such memory."""


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the result is measured on."""

    eval_data: str = "wikitext2"
    """Held-out text for perplexity, named like --data; wikitext2 is then its test split, c4 its validation split."""
    eval_tokens: int = 32768
    """Tokens to measure perplexity on."""
    eval_window: int | None = None
    """Tokens in a window that perplexity is reported on: windows do not overlap, the first token of each is not
    predicted. Not given: 2048, or as many as the model has positions."""
    speed: bool = True
    """Measure prefill and decode speed, the cache's size and the memory of generation."""

    def __post_init__(self) -> None:
        at_least("eval_tokens", self.eval_tokens, 2)
        if self.eval_window is not None:
            at_least("eval_window", self.eval_window, 8)


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks, generated tests and evaluations of packages, run on the dense and on the compressed model."""

    tasks: str = ""
    """Tasks, groups or tags of lm-evaluation-harness, separated by commas: arc_easy,piqa. Not given: none."""
    limit: int | None = None
    """Items of each task, from its first; all where not given."""
    include_path: Annotated[Path | None, rare] = None
    """A folder with lm-eval task files of your own. They may hold Python code, which is run."""
    probes: Annotated[bool, Parameter(negative="")] = False
    """Measure as well what is found of keys hidden in long text and of values in lists as long, up to 1,024 tokens, and
    the damage to tests of each capability, all generated from the tokenizer."""
    evaluations: Annotated[
        str,
        Parameter(
            help="Evaluations that packages bring, by name, separated by commas. Not given: none. Installed: "
            f"{', '.join(evaluations) or 'none'}."
        ),
    ] = ""

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least("limit", self.limit, 1)
        for name in self.evaluation_names:
            evaluations.check(name, "--evaluations")

    @property
    def names(self) -> list[str]:
        """The tasks, each once, in the order given."""
        return split_names(self.tasks)

    @property
    def evaluation_names(self) -> list[str]:
        """The evaluations, each once, in the order given."""
        return split_names(self.evaluations)


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class LongConfig:
    """Long context."""

    long_context: int = 0
    """Measure perplexity by position and the recall of hidden keys up to this many tokens; 0 leaves it out."""

    def __post_init__(self) -> None:
        at_least("long_context", self.long_context, 0)
        if self.long_context == 1:
            raise ConfigError("--long-context 1 has no token to predict", "allowed is 0, for none, or 2 and more")


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """Measuring alone."""

    load: ModelConfig = field(default_factory=ModelConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    eval_data: str | None = None
    """Held-out text for perplexity, named like --data; wikitext2 is its test split. Not given: wikitext2, or no text
    where --tasks, --evaluations or --probes is given."""
    eval_tokens: int = 32768
    """Tokens to measure perplexity on."""
    eval_window: Annotated[int | None, Parameter(alias="--window")] = None
    """Tokens in a window: windows do not overlap, the first token of each is not predicted. Not given: 2048, or as
    many as the model has positions."""
    seed: int = 0
    """Seed of the evaluations and of --probes, and of the text where --eval-data is self."""
    config: Annotated[Path | None, Parameter(group=RUN)] = None
    """A YAML file that fills the flags not given; its keys are the flags' names, with underscores. Of the file of
    a compress run, the other commands take the keys they know."""
    json: Annotated[bool, no_negative] = False
    """Print everything as one JSON object on stdout instead of lines."""

    def __post_init__(self) -> None:
        EvaluateConfig(eval_tokens=self.eval_tokens, eval_window=self.eval_window)


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder."""

    out: Path | None = None
    """Run folder; runs/NAME where not given. A run that was stopped is resumed there. NAME.gguf: the file to write; the
    run folder is then NAME.gguf-run."""
    force: Annotated[bool, Parameter(negative="")] = False
    """Run finished stages again, also where a finished run of other settings, text, model or code is there, which is
    then replaced."""
    config: Path | None = None
    """A YAML file that fills the flags not given; its keys are the flags' names, with underscores. Of the file of
    a compress run, the other commands take the keys they know."""


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
    importance matrix (extra llamacpp)."""


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Upload of the result."""

    push_to_hub: str | None = None
    """Upload the result to the Hub under this name: owner/name, or name for your own. The token is checked before any
    work begins; uploaded are the model and its card, and nothing else of a run."""
    private: Annotated[bool, no_negative] = False
    """Make that repository private."""

    def __post_init__(self) -> None:
        if self.private and self.push_to_hub is None:
            raise ConfigError("--private is given without --push-to-hub", "--push-to-hub NAME --private")


@flat
@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged on stderr while a command runs."""

    quiet: Annotated[bool, Parameter(negative="")] = False
    """Log nothing but warnings and errors."""


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
    hub: HubConfig = field(default_factory=HubConfig)

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
    hub: HubConfig = field(default_factory=HubConfig)

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
    hub: HubConfig = field(default_factory=HubConfig)
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
    (extra llamacpp). Not given,
    and no GGUF file came: q8_0."""
    converter: Annotated[Path | None, rare] = None
    """Folder that holds llama.cpp's convert_hf_to_gguf.py, for a model that is no .gguf file. Not given:
    $LAYERCUT_GGUF_CONVERTER, or that of the extra convert."""
    consumers: Consumers = ""
    force: Annotated[bool, no_negative] = False
    """Replace what is at --out."""
    hub: HubConfig = field(default_factory=HubConfig)

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
