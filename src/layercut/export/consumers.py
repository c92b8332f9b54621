"""Who reads what is written here, by name: what each takes from a layer's place, and which number formats it reads.

A cut model is right in transformers, which reads every layer's kind from a list in the config. Other software derives
some of it from the layer's index ("every sixth layer attends to everything") and gives the kept layers other kinds,
silently. `CONSUMERS` is the table of that knowledge, `readings` says what each makes of one cut, and `restriction`
which cuts stay right in some of them, for the search (`--for`). Every rule names where it was read or tried; a later
version may differ. Used by `compress`, `cut`, `export`, the report and the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from layercut.config import CONSUMER_NAMES, QuantizeConfig
from layercut.errors import ConfigError
from layercut.layer_search import Restriction
from layercut.models import llama_cpp_rules
from layercut.models.loading import count_layers
from layercut.models.older_names import READ_BY_4, period_of, unsaid
from layercut.segments import Segment, kept_layers

Written = Literal["float", "int8", "int4", "int8 embeddings", "gguf"]
"""What a model is written as: a folder of float weights, of packed ones, of those with packed embeddings; a file."""
Aspect = Literal["layer_types", "no_rope_layers"]
"""In which list of the config a layer's kind stands."""
Places = Callable[[Any, int], list[bool]]
"""(text config, number of layers) -> of each place whether a consumer takes its layer for one that is apart: that
attends to everything, or has no rotary positions."""


@dataclass(frozen=True, kw_only=True)
class IndexRule:
    """What a consumer derives from a layer's place instead of reading it."""

    model_types: tuple[str, ...]
    """In transformers' names."""
    places: Places
    words: str
    """What it does, after "it": "lets every 6th layer attend to everything"."""
    source: str
    """Where that was read, with the version."""
    aspect: Aspect = "layer_types"
    reads_period: bool = False
    """Whether it reads the period from the config, which is written where one says which of the kept layers slide."""


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """Software that loads what layercut writes."""

    title: str
    reads: tuple[Written, ...]
    """Without "float": it reads a GGUF file, into which a folder of float weights is exported."""
    rules: tuple[IndexRule, ...] = ()
    refuses: tuple[tuple[str, str], ...] = ()
    """(model type, why) of what it does not load, and says so."""
    columns: int = 1
    """Of packed weights: its kernels take widths that are multiples of this."""
    tried: str = ""
    """Version and how; what was only read says so."""

    def takes(self, written: Written) -> bool:
        """Whether it reads that, or a GGUF file that `layercut export` makes of it."""
        return written in self.reads or (written == "float" and "gguf" in self.reads)


@dataclass(frozen=True)
class Reading:
    """What one consumer makes of one cut."""

    consumer: str
    verdict: Literal["right", "note", "misread", "refused"]
    words: str = ""
    """Why; empty: nothing to say."""


# --- how places are told apart ---


def every(number: int, key: str = "") -> Places:
    """A rule by a period: the last of every so many layers is apart.

    Args:
        number: the period.
        key: a key of the config under which a whole number replaces it.

    Returns:
        The rule.
    """

    def places(config: Any, layers: int) -> list[bool]:
        found = getattr(config, key, None) if key else None
        period = found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else number
        return [(i + 1) % period == 0 for i in range(layers)]

    return places


def by_llama_cpp(architecture: str) -> Places:
    """A rule as `models/llama_cpp_rules.py` has it, for a file in which no array says otherwise.

    Args:
        architecture: in llama.cpp's names.

    Returns:
        The rule.
    """

    def places(config: Any, layers: int) -> list[bool]:
        window = getattr(config, "sliding_window", None)
        facts = {"attention.sliding_window": window} if window else {}
        return llama_cpp_rules.full_layers(architecture, facts, layers) or [True] * layers

    return places


def by_length_of_pattern(config: Any, layers: int) -> list[bool]:
    """The last of every len(sliding_window_pattern) layers is apart; without a pattern all are.

    Args:
        config: of the decoder.
        layers: how many there are.

    Returns:
        Of each place whether its layer is apart.
    """
    pattern = getattr(config, "sliding_window_pattern", None)
    return [not pattern or (i + 1) % len(str(pattern)) == 0 for i in range(layers)]


def by_letters(config: Any, layers: int) -> list[bool]:
    """sliding_window_pattern is text such as LLLG, repeated; G is apart.

    Args:
        config: of the decoder.
        layers: how many there are.

    Returns:
        Of each place whether its layer is apart.
    """
    pattern = getattr(config, "sliding_window_pattern", None)
    return [not isinstance(pattern, str) or pattern[i % len(pattern)] == "G" for i in range(layers)]


_APART = "attend to everything"
_MLX = "mlx-lm 0.32.2, models/"
_SGLANG = "SGLang 0.5.23, srt/models/"
_OLLAMA = "Ollama's own engine, model/models/"
_ARCHITECTURES = {
    "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3", "cohere2": "cohere2", "gpt_oss": "gpt-oss",
    "olmo3": "olmo2", "exaone4": "exaone4", "smollm3": "smollm3", "gemma3n_text": "gemma3n", "llama4_text": "llama4",
    "exaone_moe": "exaone-moe", "afmoe": "afmoe", "mellum": "mellum", "qwen3_next": "qwen3next",
    "minicpm3": "minicpm3", "baichuan": "baichuan", "cohere": "command-r", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}  # fmt: skip
"""llama.cpp's names of the architectures for which it has a rule, by transformers' model types."""


def _llama_cpp_rules() -> tuple[IndexRule, ...]:
    """`models/llama_cpp_rules.py` for those that no array in the file can tell otherwise; it writes the others."""
    found = []
    for model_type, name in _ARCHITECTURES.items():
        period = llama_cpp_rules.PERIODS.get(name)
        number = 4 if name in llama_cpp_rules.INTERVAL_OF_4 else period.every if period and not period.array else 0
        if number:
            nope = name in ("smollm3", "llama4")
            does = "have no rotary positions" if nope else _APART
            found.append(
                IndexRule(
                    model_types=(model_type,),
                    places=by_llama_cpp(name),
                    words=f"lets every {llama_cpp_rules.ordinal(number)} layer {does}",
                    source="llama.cpp b11739, load_hparams",
                    aspect="no_rope_layers" if nope else "layer_types",
                )
            )
    return tuple(found)


LLAMA_CPP = _llama_cpp_rules()
_EVEN = IndexRule(
    model_types=("gpt_oss",), places=every(2), words=f"lets every 2nd layer {_APART}",
    source="vLLM 0.32.0, gpt_oss.py",
)  # fmt: skip

CONSUMERS: dict[str, Consumer] = {
    "transformers": Consumer(
        title="transformers", reads=("float", "int8", "int4", "int8 embeddings", "gguf"),
        tried="5.24 and 4.57.6: logits equal to the bit",
    ),
    "vllm": Consumer(
        title="vLLM", reads=("float", "int8", "int4"), columns=128, rules=(_EVEN,),
        tried="0.32.0 on a CPU: float right, int4 in bfloat16, int8 refused there; by reading: Marlin",
    ),
    "sglang": Consumer(
        title="SGLang", reads=("float", "int8", "int4"), columns=128, tried="0.5.23, by reading",
        rules=(
            IndexRule(model_types=("gemma2",), places=every(2), words=f"lets every 2nd layer {_APART}",
                      source=_SGLANG + "gemma2.py"),
            IndexRule(model_types=("exaone4",), places=by_length_of_pattern,
                      words="takes the last layer of every sliding_window_pattern for one that attends to everything",
                      source=_SGLANG + "exaone4.py"),
            IndexRule(model_types=("llama4_text",), places=every(4), aspect="no_rope_layers",
                      words="lets every 4th layer have no rotary positions", source=_SGLANG + "llama4.py"),
        ),
    ),
    "llama.cpp": Consumer(
        title="llama.cpp", reads=("gguf",), rules=LLAMA_CPP,
        tried="b11739: logits, losses and greedy tokens; older builds may not read the array of sliding layers",
    ),
    "ollama": Consumer(
        title="Ollama", reads=("gguf",), tried="by reading; it has its own engine for some models, else llama.cpp",
        rules=(
            *LLAMA_CPP,
            IndexRule(model_types=("gemma3_text", "gemma3"), places=every(6), words=f"lets every 6th layer {_APART}",
                      source=_OLLAMA + "gemma3/model_text.go"),
            IndexRule(model_types=("gpt_oss", "gemma2"), places=every(2), words=f"lets every 2nd layer {_APART}",
                      source=_OLLAMA + "gptoss/model.go, gemma2/model.go"),
        ),
    ),
    "lm-studio": Consumer(
        title="LM Studio", reads=("gguf",), rules=LLAMA_CPP, tried="not tried; it loads GGUF files by llama.cpp",
    ),
    "mlx": Consumer(
        title="MLX", reads=("float",),
        tried="mlx-lm 0.32.2 on mlx[cpu]: Gemma 3, Cohere 2, right on the period, wrong off it",
        rules=(
            IndexRule(model_types=("gemma3_text", "gemma3"), reads_period=True,
                      places=every(6, "sliding_window_pattern"),
                      words=f"lets every 6th layer {_APART}", source=_MLX + "gemma3_text.py"),
            IndexRule(model_types=("cohere2",), reads_period=True,
                      places=every(4, "sliding_window_pattern"),
                      words=f"lets every 4th layer {_APART}", source=_MLX + "cohere2.py"),
            IndexRule(model_types=("exaone4",), places=by_letters,
                      words="repeats the letters of sliding_window_pattern", source=_MLX + "exaone4.py"),
            IndexRule(model_types=("llama4_text",), places=every(4), aspect="no_rope_layers",
                      words="lets every 4th layer have no rotary positions", source=_MLX + "llama4.py"),
            IndexRule(model_types=("qwen3_next", "qwen3_5_text"), reads_period=True,
                      places=every(4, "full_attention_interval"),
                      words="lets every 4th layer be one of attention", source=_MLX + "qwen3_next.py, qwen3_5.py"),
        ),
    ),
    "openvino": Consumer(
        title="OpenVINO", reads=("float",), tried="optimum-intel, transformers 4: right, Gemma 3 off its period too",
    ),
    "onnxruntime": Consumer(
        title="ONNX Runtime", reads=("float",), tried="onnxruntime-genai 0.18.0: exact",
        rules=(
            IndexRule(model_types=("gpt_oss",), places=every(2), words=f"lets every 2nd layer {_APART}",
                      source="onnxruntime-genai 0.18.0, builders/gptoss.py"),
        ),
        refuses=(("gemma3_text", "its builder stops at rope_type"), ("gemma3", "its builder stops at rope_type")),
    ),
}  # fmt: skip
assert tuple(CONSUMERS) == CONSUMER_NAMES


# --- what a consumer makes of a cut ---


def readings(
    config: Any, segments: Iterable[Segment], written: Written = "float", names: Sequence[str] = CONSUMER_NAMES
) -> list[Reading]:
    """What each consumer makes of a model without some of its layers.

    Args:
        config: of the whole model, before the cut.
        segments: the layers to remove.
        written: as what the cut model is written.
        names: the consumers.

    Returns:
        A reading of each, in the order of the names.
    """
    text, layers = config.get_text_config(decoder=True), count_layers(config)
    kept = kept_layers(list(segments), layers)
    return [_reading(name, text, layers, kept, written) for name in names]


def misread(found: Iterable[Reading]) -> list[str]:
    """Lines for the terminal: who would misread a cut, and why."""
    return [
        f"{CONSUMERS[one.consumer].title} would misread it: {one.words}" for one in found if one.verdict == "misread"
    ]


def _reading(name: str, text: Any, layers: int, kept: list[int], written: Written) -> Reading:
    consumer = CONSUMERS[name]
    for model_type, why in consumer.refuses:
        if text.model_type == model_type:
            return Reading(name, "refused", why)
    if not consumer.takes(written):
        return Reading(name, "refused", f"it does not read {_WORDS[written]}")
    for rule in _rules_for(consumer, text):
        odd = _odd_layer(rule, text, kept)
        if odd is not None:
            before = "" if kept[odd] == odd else f" (layer {kept[odd]} of the whole model)"
            where = f"layer {odd} is otherwise{before}"
            return Reading(name, "misread", f"it {rule.words}, and {where} ({rule.source})")
    if "gguf" in consumer.reads and "float" not in consumer.reads and (why := _broken_by_count(text, layers, kept)):
        return Reading(name, "misread", why)
    return Reading(name, *_noted(consumer, text, kept, written))


def _odd_layer(rule: IndexRule, text: Any, kept: Sequence[int]) -> int | None:
    """The first kept layer, by its new place, that a rule takes for another; None: all are right."""
    apart = layers_apart(text, rule.aspect)
    if apart is None:
        return None
    if rule.reads_period and period_of(text.model_type, [text.layer_types[i] for i in kept]) is not None:
        return None
    theirs = rule.places(text, len(kept))
    return next((place for place, i in enumerate(kept) if apart[i] != theirs[place]), None)


def layers_apart(text: Any, aspect: Aspect) -> list[bool] | None:
    """Which layers are of the rarer kind: attend to everything, or have no rotary positions.

    Args:
        text: the config of the decoder.
        aspect: which of the two.

    Returns:
        Of each layer whether it is; None: the config does not tell layers apart.
    """
    if aspect == "no_rope_layers":
        listed = getattr(text, "no_rope_layers", None)
        return [not each for each in listed] if listed else None  # 1: with rotary positions
    types = getattr(text, "layer_types", None)
    if not types or ("sliding_attention" in types and not getattr(text, "sliding_window", None)):
        return None
    return [each in ("full_attention", "attention") for each in types]


def _rules_for(consumer: Consumer, text: Any) -> list[IndexRule]:
    return [rule for rule in consumer.rules if text.model_type in rule.model_types and _applies(rule, text)]


def _applies(rule: IndexRule, text: Any) -> bool:
    """Whether sliding layers slide at all."""
    types = getattr(text, "layer_types", None) or ()
    return rule.aspect != "layer_types" or "linear_attention" in types or bool(getattr(text, "sliding_window", None))


def _broken_by_count(text: Any, layers: int, kept: Sequence[int]) -> str:
    """What llama.cpp would do otherwise because of the number of layers; empty: nothing."""
    facts = {"expert_gating_func": 2} if text.model_type == "deepseek_v3" else {}
    name = _ARCHITECTURES.get(text.model_type, "")
    return llama_cpp_rules.broken_by_count(name, facts, layers, len(kept))


_WORDS = {
    "float": "folders", "int8": "int8 weights of compressed-tensors", "int4": "int4 weights of compressed-tensors",
    "int8 embeddings": "int8 embeddings", "gguf": "GGUF files",
}  # fmt: skip


def _noted(consumer: Consumer, text: Any, kept: list[int], written: Written) -> tuple[Literal["right", "note"], str]:
    notes = []
    if written.startswith("int") and (narrow := _narrow(text, consumer.columns)):
        those = ", ".join(map(str, narrow))
        notes.append(f"on NVIDIA its Marlin kernels take widths that are multiples of {consumer.columns}, not {those}")
    if consumer.title == "transformers" and (text.model_type not in READ_BY_4 or unsaid(text.to_dict())):
        notes.append("from 5.0 on, not by 4.57")
    if "gguf" in consumer.reads and consumer.title != "transformers" and (key := _array(text, kept)):
        notes.append(
            f"which layers slide stands in the file as {key}, which it reads from {llama_cpp_rules.NEEDS_BUILD} on"
        )
    return ("note" if notes else "right"), "; ".join(notes)


def _narrow(text: Any, columns: int) -> list[int]:
    """Widths of the decoder's matrices that are no multiple of a number."""
    heads = getattr(text, "num_attention_heads", 0) or 0
    head = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    widths = [text.hidden_size, getattr(text, "intermediate_size", 0), heads * head]
    return sorted({width for width in widths if isinstance(width, int) and width % columns})


def _array(text: Any, kept: Sequence[int]) -> str:
    """The key of the array by which a GGUF file tells llama.cpp otherwise than its period; empty: it needs none."""
    name = _ARCHITECTURES.get(text.model_type, "")
    period, apart = llama_cpp_rules.PERIODS.get(name), layers_apart(text, "layer_types")
    if not period or not period.array or not apart or not getattr(text, "sliding_window", None):
        return ""
    theirs = every(period.every)(text, len(kept))
    return "" if [apart[i] for i in kept] == theirs else f"{name}.{llama_cpp_rules.PATTERN}"


# --- for the search and the formats ---


def restriction(config: Any, names: Sequence[str], length: int) -> Restriction:
    """Which cuts of so many layers stay right in these consumers.

    Args:
        config: of the whole model, before the cut.
        names: the consumers.
        length: n, layers to remove.

    Returns:
        The restriction, for `layer_search.search`.

    Raises:
        ConfigError: none does, or one of them does not load this architecture.
    """
    text, layers = config.get_text_config(decoder=True), count_layers(config)
    found = _restriction(text, layers, names, length)
    if found.cheapest([0.0] * layers) is None:
        near = sorted(range(1, layers), key=lambda n: abs(n - length))
        fitting = (n for n in near if _restriction(text, layers, names, n).segments())
        hint = next((f"{n} layers can go: --ratio {n / layers:.3f}" for n in fitting), "")
        raise ConfigError(
            f"no cut of {length} layers stays right in {_titles(names)}: {found.why}",
            hint or "leave out --for, and see what the report says",
        )
    return found


def _restriction(text: Any, layers: int, names: Sequence[str], length: int) -> Restriction:
    left = layers - length
    may = [[True] * left for _ in range(layers)]
    why = []
    for name in names:
        consumer = CONSUMERS[name]
        for model_type, words in consumer.refuses:
            if text.model_type == model_type:
                raise ConfigError(f"{consumer.title} does not load {model_type}: {words}", "leave it out of --for")
        for rule in _rules_for(consumer, text):
            apart, theirs = layers_apart(text, rule.aspect), rule.places(text, left)
            if apart is not None:
                may = [[m and apart[i] == theirs[p] for p, m in enumerate(row)] for i, row in enumerate(may)]
                why.append(f"{consumer.title} {rule.words}")
        if "float" not in consumer.reads and (words := _broken_by_count(text, layers, range(left))):
            may = [[False] * left for _ in range(layers)]
            why.append(words)
    return Restriction(tuple(map(tuple, may)), "; ".join(dict.fromkeys(why)))


def check_written(names: Sequence[str], written: Written) -> None:
    """Refuse a number format that one of these consumers does not read.

    Args:
        names: the consumers.
        written: as what a model is written.

    Raises:
        ConfigError: which one, and what it reads.
    """
    for name in names:
        consumer = CONSUMERS[name]
        if not consumer.takes(written):
            allowed = ", ".join(_WORDS[one] for one in consumer.reads)
            folder = ", and folders of float weights by way of layercut export" if "float" not in consumer.reads else ""
            raise ConfigError(
                f"{consumer.title} does not read {_WORDS[written]}; it reads {allowed}{folder}",
                "leave out --bits and --quantize-embeddings, or leave it out of --for",
            )


def check_cut(config: Any, segments: Sequence[Segment], names: Sequence[str], written: Written) -> None:
    """Refuse a cut, or a number format, that one of these consumers would misread or not read.

    Args:
        config: of the whole model, before the cut.
        segments: the layers to remove.
        names: the consumers; none: nothing is refused.
        written: as what the cut model is written.

    Raises:
        ConfigError: which one and why; the hint names cuts or formats that are right.
    """
    if not names:
        return
    check_written(names, written)
    for one in readings(config, segments, written, names):
        if one.verdict in ("misread", "refused"):
            left = restriction(config, [one.consumer], sum(map(len, segments))).segments()
            near = sorted(left, key=lambda each: abs(each.start - min(segments).start))[:3]
            those = ", or ".join(f"--segment {each}" for each in near)
            raise ConfigError(
                f"{CONSUMERS[one.consumer].title} would misread the cut {', '.join(map(str, segments))}: {one.words}",
                f"segments of as many layers that it reads right: {those}" if near else "leave out --for",
            )


def check_model(config: Any, names: Sequence[str], written: Written) -> list[Reading]:
    """What all consumers make of a model as it is, once those of `names` read it right.

    Args:
        config: of the model that is written.
        names: the consumers that have to read it right.
        written: as what it is written.

    Returns:
        What each of all consumers makes of it.

    Raises:
        ConfigError: one of `names` does not.
    """
    check_written(names, written)
    found = readings(config, [], written)
    for one in found:
        if one.consumer in names and one.verdict in ("misread", "refused"):
            hint = "leave it out of --for, or cut the whole model again with the same --for"
            raise ConfigError(f"{CONSUMERS[one.consumer].title} would not read this model right: {one.words}", hint)
    return found


def written_by(quantize: QuantizeConfig) -> Written:
    """What a folder holds that is quantized so."""
    if quantize.bits == 16:
        return "float"
    return "int8 embeddings" if quantize.quantize_embeddings else "int8" if quantize.bits == 8 else "int4"


def _titles(names: Sequence[str]) -> str:
    return " and ".join(CONSUMERS[name].title for name in names)


def table() -> str:
    """The consumers as Markdown, for the documents."""
    lines = ["| consumer | `--for` | reads | takes from a layer's place | seen in |", "|---|---|---|---|---|"]
    for name, consumer in CONSUMERS.items():
        as_llama_cpp = name != "llama.cpp" and set(LLAMA_CPP) <= set(consumer.rules)
        own = [rule for rule in consumer.rules if not (as_llama_cpp and rule in LLAMA_CPP)]
        words = {rule.words: [t for one in own if one.words == rule.words for t in one.model_types] for rule in own}
        told = ["what llama.cpp does"] if as_llama_cpp else []
        told += [f"{', '.join(types)}: {each}" for each, types in words.items()]
        seen = "; ".join(dict.fromkeys([consumer.tried, *(rule.source for rule in own)]))
        lines.append(
            f"| {consumer.title} | `{name}` | {', '.join(consumer.reads)} | {'; '.join(told) or 'nothing'} | {seen} |"
        )
    return "\n".join(lines) + "\n"
