"""The options of each stage: frozen dataclasses. Flags, YAML keys and --help are made from them and from nothing else.

A field's docstring is its help; its key in YAML is the flag's name with underscores, flat: `ratio: 0.2`. Those of each
command are in `config/commands.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Group, Parameter

from layercut.errors import ConfigError
from layercut.files import parse_bytes, parse_time
from layercut.registries import Registry, criteria, evaluations, objectives, quantizers
from layercut.segments import Segment

Placement = Literal["auto", "memory", "disk", "devices", "processes"]
"""Where the weights lie: in one device's memory, the layers on disk, or in parts on several devices or processes."""
Effort = Literal["low", "normal", "high"]
DEFAULT_TOKENS = 131072
"""To tune on, of a run on a CPU that names neither tokens nor a time."""
Train = Literal["endpoints", "all", "lora"]
"""What of the pruned model is trained."""
Bits = Literal[16, 8, 6, 4, 3, 2]
"""Of a weight. compressed-tensors packs 1 to 8; these are reloaded by transformers to the bit (tested)."""
AskedBits = Literal["auto", 16, 8, 6, 4, 3, 2]
"""The same, or chosen for each matrix."""
EmbeddingBits = Literal[16, 8, 6, 4, 3, 2]
GgufType = Literal[
    "finer", "same", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
    "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
]  # fmt: skip
GROUP_SIZES = (128, 64, 32)
"""Columns that share a scale in quantized weights: the sizes for which loaders have fast kernels, coarsest first."""
COARSE_BITS = 3
"""Up to which groups have zero points: for 1 % more bytes 8 and 10 % less perplexity of Qwen2.5-Coder-0.5B (measured),
and no engine but transformers reads so few bits."""
NEAR_ENOUGH = 8
"""Bits of a head from which on it is rounded to nearest, without calibration."""
ALL_BITS = "16,8,6,4,3,2"
"""What --bits auto chooses among unless it is told."""
TAKE_PROBES = ("auto", "fisher", "clp", "race", "exhaustive")
"""Criteria of layercut that take probes, several segments and other objectives."""
CONSUMER_NAMES = (
    "transformers", "vllm", "sglang", "llama.cpp", "ollama", "lm-studio", "mlx", "openvino", "onnxruntime",
)  # fmt: skip
"""Software by which a written model may have to be read right; `export/engines.py` has what each makes of it."""
HUB_SETS = {
    "wikitext2": "Salesforce/wikitext", "c4": "allenai/c4", "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "alpaca": "tatsu-lab/alpaca",
}  # fmt: skip
"""Texts that have a name here, and where the Hub has them; `data/sources.py` says how each is read."""
OF_NAMES = {"preserve", "consumers", "for", "bits_allowed", "tasks", "evaluations", "methods", "states"}
"""Options whose value is names, or numbers, separated by commas."""
WHAT, RUN, TEXT, SEARCH, HEALING, QUANTIZATION, MEASURING, LOADING, RARE = (
    Group(name, sort_key=place)
    for place, name in enumerate(
        ("What to remove", "Run", "Text", "Search", "Healing", "Quantization", "Measuring", "Loading", "Rarely needed")
    )
)
"""The boxes of --help, in their order."""
rare, rare_switch = Parameter(group=RARE), Parameter(group=RARE, negative="")
no_negative = Parameter(negative="")
flat = Parameter(name="*")


def options(group: Group) -> Callable[[type], type]:
    """A decorator of dataclasses whose fields are flags, in one box of --help unless a field says otherwise."""
    return Parameter(name="*", group=group)


def one_of(registry: Registry[Any], text: str) -> Parameter:
    """A name from a registry; the help lists them all, also those of installed packages."""
    return Parameter(help=f"{text} One of {', '.join(registry)}.")


def at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ConfigError(f"--{name.replace('_', '-')} {value:g} is too small", f"allowed is {least:g} or more")


def no_device(device: str) -> ConfigError:
    """The refusal of a name that torch gives to no device."""
    return ConfigError(f"no device {device!r}", "allowed are auto, cpu, cuda, cuda:N, mps, xpu")


def check_window(flag: str, window: int | None, positions: int | None) -> None:
    """Refuse rows of tokens that do not fit the positions that the model knows."""
    if positions and window and window > positions:
        raise ConfigError(
            f"{flag} {window} is longer than the model's {positions} positions",
            f"allowed is up to {positions}: {flag} {min(positions, 256)}",
        )


def refuse(*rules: tuple[bool, str, str]) -> None:
    """Of (is wrong, message, hint) raise the first that is wrong."""
    for is_wrong, message, hint in rules:
        if is_wrong:
            raise ConfigError(message, hint)


def split_names(text: str) -> list[str]:
    """Names separated by commas, each once, in the order given."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


Consumers = Annotated[
    str,
    Parameter(
        name=("--for", "--consumers"),
        help=f"Engines that must run the result correctly, separated by commas: {', '.join(CONSUMER_NAMES)}. "
        "Cuts that one of them would misread are not chosen, and number formats that it does not read are refused. "
        "Not given: the report names who would misread the cut.",
    ),
]


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
    place: Placement = "auto"
    """Where the weights lie. memory: all on the device. disk: each decoder layer is read when it is needed, for what is
    larger than memory. devices: the layers over all accelerators of the machine, in one process. processes: a part of
    every weight in each of several processes, which gather each layer when it runs. auto: memory, or where the weights
    would take more than 0.8 of it the first of processes, devices and disk that has room."""
    max_memory: Annotated[str | None, rare] = None
    """Memory of the device that a run may take, weights included, e.g. 20GB: it decides how many rows and tokens are
    done at once. Not given: what is free on a GPU; on a CPU what its caches bear."""

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_bytes("--max-memory", self.max_memory)


@options(TEXT)
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The calibration text, on which segments are scored."""

    data: str = "c4"
    """Calibration text: wikitext2 or c4 (their training splits), fineweb-edu, alpaca, python-docs, python-docstrings,
    self (text that the model writes), a Hub dataset OWNER/NAME:SPLIT:COLUMN, or .txt, .jsonl or .parquet files. Join
    several with +."""
    tokens: int = 16384
    """Calibration tokens."""
    window: int = 256
    """Tokens in a row, of calibration text and of what judges healing."""
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
    """START:STOP, to remove layers START to STOP - 1 without a search; 13:19 removes layers 13 to 18. Repeatable."""
    target_size: Annotated[str | None, Parameter(group=WHAT)] = None
    """Instead of --ratio: remove just enough layers for exported weights of this size, e.g. 200MB or 1.5GiB. With
    --bits auto: choose the bits of each matrix for this size, and how many layers go too, unless --ratio or --segment
    says it."""
    max_loss: Annotated[float | None, Parameter(group=WHAT)] = None
    """Instead of --ratio: remove layers as long as perplexity rises by no more than this share (0.1 is 10 %). It is
    measured before healing, on a quarter of --data that the search does not see. With --target-size: vary layers and
    bits until both are met, or say that they cannot be."""
    num_segments: int | Literal["auto"] = "auto"
    """Remove the layers as up to so many segments; for clp, fisher, race and exhaustive. auto: as one, or as two where
    that lowers what --preserve minimises by more than 5 %; as one with --preserve none."""
    preserve: str = "all"
    """Skills that the default search preserves, and clp, race and exhaustive: all, none, or of these, separated by
    commas: recall (keys hidden in text), lists (values by key), copy, labels (given by examples), sums, structure (of
    code) and format. What a cut costs of it is measured on probes, generated from the tokenizer, and
    added to the loss on text. Where weights of a checkpoint folder get fewer than 8 bits, they are rounded on such
    probes too."""
    method: Annotated[
        str,
        one_of(
            criteria,
            "clp: the concave gate of CLP, moved by gradient descent; at most four real cuts decide. fisher: a Fisher "
            "information estimate proposes, real cuts decide. auto: fisher. race: real cuts alone. "
            "exhaustive: every segment, in one sweep. The others are the baselines they are compared with; "
            "block-influence, perplexity, taylor, sleb and evolution may choose layers that are not neighbours.",
        ),
    ] = "auto"
    effort: Effort | None = None
    """What finding the layers may take. low: an estimate and real cuts. normal: a few cuts are folded as well, and
    the best of them taken. high: on more text, and the best are healed for a while, in several times as long. Not
    given: normal, or what --time leaves room for."""
    consumers: Consumers = ""

    def __post_init__(self) -> None:
        given, ratio, loss = [flag for flag in self.given if flag != "--target-size"], self.ratio, self.max_loss
        refuse(
            (len(given) > 1, f"both {' and '.join(given[:2])} are given", "give one of them"),
            (ratio is not None and not 0 <= ratio < 1, f"--ratio {ratio} is not between 0 and 1",
             "a fifth of the layers: --ratio 0.2"),
            (loss is not None and not 0 < loss < math.inf, f"--max-loss {loss or 0:g} is not above 0",
             "perplexity up by a tenth: --max-loss 0.1"),
        )  # fmt: skip
        if self.num_segments != "auto":
            at_least("num_segments", self.num_segments, 1)
        consumer_names(self.consumers)
        criteria.check(self.method, "--method")
        asked = {
            "--num-segments": self.num_segments not in (1, "auto"),
            "--preserve": self.preserve not in ("all", "none"),
        }
        for flag in [flag for flag, is_asked in asked.items() if is_asked]:
            # of other packages' criteria, the search itself asks whether they take it
            if self.method in criteria.own and self.method not in TAKE_PROBES:
                raise ConfigError(f"{flag} is not for --method {self.method}", f"leave out {flag}, or --method")
            if self.segment:
                raise ConfigError(f"{flag} is for a search, and --segment is given", "leave out one of them")
        _ = self.target_bytes, self.segments

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
    def two_budgets(self) -> bool:
        """Whether both a size and a loss are to be kept, for which layers and bits are varied."""
        return self.given == ["--target-size", "--max-loss"]

    @property
    def segments(self) -> list[Segment]:
        return [Segment.parse(text) for text in self.segment]


@options(HEALING)
@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How layers are trained, and towards what."""

    objective: Annotated[
        str, one_of(objectives, "kl: match the dense model's predictions. next-token: the text's.")
    ] = "kl"
    learning_rate: float | None = None
    """Peak rate of AdamW, quartered where the held-out loss rises above the start's by 1 %, or twice in a row. Not
    given: a 120th of the usual weight tuned (the median of the matrices' root mean squares), half of it in fewer than
    64 steps, 2 / N of it where N > 2 layers are."""
    batch_tokens: Annotated[int, rare] = 1024
    """Tokens in one optimizer step."""
    train: Train = "endpoints"
    """What is trained. endpoints: the layers beside the cut (CLP). all: every layer that stays. lora: LoRA of rank 32
    on every layer that stays, merged before saving (extra lora)."""
    radius: Annotated[int, rare] = 1
    """Layers tuned on each side of a cut, of --train endpoints. With more of them perplexity gets lower, and fewer keys
    are kept."""

    def __post_init__(self) -> None:
        if isinstance(self.objective, str):  # in Python also an objective itself
            objectives.check(self.objective, "--objective")
        at_least("batch_tokens", self.batch_tokens, 1)
        at_least("radius", self.radius, 1)
        if self.train != "endpoints" and self.radius != 1:
            raise ConfigError(
                f"--radius is for --train endpoints, and --train {self.train} is given", "leave out --radius"
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ConfigError(f"--learning-rate {self.learning_rate:g} is outside 0 to 1", "try 1e-4")


@options(HEALING)
@dataclass(frozen=True, kw_only=True)
class HealConfig(TuneSettings):
    """How the cut is healed, and what was rounded afterwards."""

    fold: bool = True
    """Fold a least-squares correction into the layer before the cut."""
    tune_data: str | None = None
    """Text to tune on; values as for --data. Not given: other tokens of the calibration text's source."""
    tune_tokens: int | None = None
    """Tokens to tune on; 0 leaves tuning out. Not given: what --time leaves room for, else 131,072 on a CPU and an
    hour's worth on an accelerator."""
    time: Annotated[str | None, Parameter(group=RUN)] = None
    """What the whole run may take on this machine: 30m, 2h, 8h. It decides --tune-tokens and --effort where these are
    not given. --tasks and --evaluations come on top."""
    tune_window: Annotated[int | None, Parameter(parse=False)] = None
    """Tokens in every second row to tune on, of text or probes; the others are as --window, of probes 256. Of a run
    1,024, or --batch-tokens where that is less, if 65,536 tokens or more are tuned on and the model has the positions;
    else as --window."""
    probe_share: float = 0.1
    """Share of these that are probes, to teach again what --preserve names, beside the text of --tune-data; 0, or
    --preserve none: none."""
    chat_share: float = 0.1
    """Share of these that are chats which the model writes before it is cut, the user's messages too, so that it still
    replies as it did; where it has a chat template, which opens with 128 tokens at most, and is in memory. 0: none."""
    tune_quantized: Annotated[Literal["auto", "scales", "rounding", "none"], Parameter(group=QUANTIZATION)] = "auto"
    """Train what was rounded towards what it was before, on the tokens to tune on: the groups' scales and the norms
    (scales), these and the rounding itself (rounding, 28 to 40 bytes a weight), or nothing. auto: scales below 8
    bits, the rounding too where packed weights have 3.5 bits or fewer on average and the device has such memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("tune_tokens", self.tune_tokens, 0)
        if self.time is not None:
            parse_time("--time", self.time)
        for flag, share in (("--probe-share", self.probe_share), ("--chat-share", self.chat_share)):
            if share and not 0.001 <= share <= 0.999:
                raise ConfigError(f"{flag} {share:g} is neither 0 nor from 0.001 to 0.999", f"a tenth: {flag} 0.1")

    @property
    def tokens(self) -> int:
        """Tokens to tune on, by the default where no other number was found."""
        return DEFAULT_TOKENS if self.tune_tokens is None else self.tune_tokens


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
        allowed, flag, auto = self.allowed, f"--embedding-bits {self.embedding_bits}", self.bits == "auto"
        refuse(
            (auto and self.embedding_bits not in (None, 16), f"--bits auto chooses bits, and {flag} is given",
             f"leave out {flag}"),
            (auto and allowed == (16,), "--bits auto has nothing to choose: --bits-allowed is 16",
             "--bits-allowed 16,8,4"),
            (self.embedding_bits not in (None, 16, 8, self.bits),
             f"{flag} beside --bits {self.bits} cannot be loaded by transformers",
             f"give --embedding-bits 8 or {self.bits}"),
        )  # fmt: skip
        at_least("group_size", self.group_size, 8)

    def check_allowed(self) -> None:
        """Refuse --bits-allowed where nothing is chosen."""
        if self.bits != "auto" and self.bits_allowed != ALL_BITS:
            raise ConfigError("--bits-allowed is what --bits auto chooses among", "give --bits auto, or leave it out")

    @property
    def rounds(self) -> bool:
        return self.bits != 16

    @property
    def how(self) -> list[str]:
        """The flags that are given beside --bits: they say how weights are rounded."""
        values = {
            "--quantizer": self.quantizer != "gptq", "--group-size": self.group_size is not None,
            "--embedding-bits": self.embedding_bits is not None, "--bits-allowed": self.bits_allowed != ALL_BITS,
        }  # fmt: skip
        return [flag for flag, is_given in values.items() if is_given]

    @property
    def allowed(self) -> tuple[int, ...]:
        """What `bits` auto chooses among, the most bits first. ConfigError: no such bits."""
        widths, given = get_args(Bits), split_names(self.bits_allowed)
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

    @property
    def small_head(self) -> bool:
        """Whether the head has so few bits that it is calibrated, or may be given them."""
        return self.bits == "auto" or (self.embedding_bits or 16) < NEAR_ENOUGH

    @property
    def small(self) -> bool:
        """Whether any weight has, or may be given, so few bits that scales are fitted to what it does."""
        return self.bits == "auto" or self.bits < NEAR_ENOUGH


@dataclass(frozen=True, kw_only=True)
class ReportedText:
    """The text that perplexity is reported on."""

    eval_data: Annotated[str, Parameter(group=MEASURING)] = "wikitext2"
    """Held-out text for perplexity; values as for --data; wikitext2 is then its test split, c4 its validation split."""
    eval_tokens: Annotated[int, Parameter(group=MEASURING)] = 16384
    """Tokens to measure perplexity on."""
    eval_window: Annotated[int | None, Parameter(group=MEASURING)] = None
    """Tokens in a window that perplexity is reported on: windows do not overlap, the first token of each is not
    predicted. Not given: 2048, or as many as the model has positions."""

    def __post_init__(self) -> None:
        at_least("eval_tokens", self.eval_tokens, 2)
        at_least("eval_window", self.eval_window, 8)


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ReportedText):
    """What the result is measured on."""

    speed: bool = True
    """Measure prefill and decode speed, the cache's size and the memory of generation."""
    long_context: int = 0
    """Measure perplexity by position and the recall of hidden keys up to this many tokens; 0 leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("long_context", self.long_context, 0)
        if self.long_context == 1:
            raise ConfigError("--long-context 1 has no token to predict", "allowed is 0, for none, or 2 and more")


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks, probes and evaluations of packages, run on the dense and on the pruned model."""

    tasks: str = ""
    """Tasks, groups or tags of lm-evaluation-harness, separated by commas: arc_easy,piqa. Not given: none."""
    limit: int | None = None
    """Items of each task, from its first; all where not given."""
    include_path: Annotated[Path | None, rare] = None
    """A folder with lm-eval task files of your own. They may hold Python code, which is run."""
    probes: Annotated[bool, no_negative] = False
    """Measure as well what is found of keys hidden in long text and of values in lists as long, up to 1,024 tokens, and
    what the cut costs on probes of each capability, all generated from the tokenizer; of a run also which layers hold
    which capability."""
    evaluations: Annotated[
        str,
        Parameter(
            help="Evaluations that packages bring, by name, separated by commas. Not given: none. Installed: "
            f"{', '.join(evaluations) or 'none'}."
        ),
    ] = ""

    def __post_init__(self) -> None:
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
