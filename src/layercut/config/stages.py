"""Options of loading, text, search and healing, and what options are made of."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from layercut.errors import ConfigError
from layercut.files import parse_bytes
from layercut.registries import Registry, criteria, objectives
from layercut.segments import Segment

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
Qwen2.5-Coder-0.5B (measured), and no engine but transformers reads so few bits."""
NEAR_ENOUGH = 8
"""Bits of a head from which on it is rounded to nearest, without calibration."""
Bits = Literal[16, 8, 6, 4, 3, 2]
"""Of a weight. compressed-tensors packs 1 to 8; these are reloaded by transformers to the bit (tried)."""
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
More tokens heal more (measured); how many are enough is a guess."""
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
    effort: Literal["low", "normal", "high"] = "normal"
    """What finding the layers may take. low: an estimate and real cuts. normal: a few cuts are folded, and the best of
    them healed for a while, in the time that tuning takes. high: more of both, in several times as long."""
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
class TuneSettings:
    """How layers are trained, and towards what."""

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
        if isinstance(self.objective, str):  # in Python also an objective itself
            objectives.check(self.objective, "--objective")
        at_least("batch_tokens", self.batch_tokens, 1)
        at_least("radius", self.radius, 1)
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ConfigError(f"--learning-rate {self.learning_rate:g} is outside 0 to 1", "try 1e-4")


@options(HEALING)
@dataclass(frozen=True, kw_only=True)
class HealConfig(TuneSettings):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("tune_tokens", self.tune_tokens, 0)
        if self.tune_window is not None:
            at_least("tune_window", self.tune_window, 8)
        for flag, share in (("--probe-share", self.probe_share), ("--chat-share", self.chat_share)):
            if share and not 0.001 <= share <= 0.999:
                raise ConfigError(f"{flag} {share:g} is neither 0 nor from 0.001 to 0.999", f"a tenth: {flag} 0.1")
