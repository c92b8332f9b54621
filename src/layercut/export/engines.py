"""The engines that load what layercut writes: a table of what each takes from a layer's index, and `readings` of it.

A cut model is right in transformers, which reads every layer's kind from a list in the config. Other engines derive
some of it from the layer's index ("every sixth layer attends to everything") and give the kept layers other kinds,
silently. Every rule names where it was read or tried; a later version may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from layercut.config import CONSUMER_NAMES, QuantizeConfig
from layercut.errors import ConfigError
from layercut.layer_search import Restriction
from layercut.models import llama_cpp_rules
from layercut.models.config_files import period_of, unsaid
from layercut.models.decoder_stack import count_layers
from layercut.progress import warn
from layercut.quantization.packing import WHOLE_BYTES
from layercut.segments import Segment, kept_layers

Written = Literal["float", "int8", "int4", "few bits", "int8 embeddings", "packed embeddings", "gguf"]
"""What a model is written as: a folder of float weights, of packed ones, of those with packed embeddings; a file."""
WORDS: dict[Written, str] = {
    "float": "folders", "int8": "int8 weights of compressed-tensors", "int4": "int4 weights of compressed-tensors",
    "few bits": "weights of 2, 3 or 6 bits", "int8 embeddings": "int8 embeddings",
    "packed embeddings": "packed embeddings", "gguf": "GGUF files",
}  # fmt: skip
Places = Callable[[Any, int], list[bool]]
"""(text config, number of layers) -> of each place whether an engine takes its layer for one of the rarer kind: that
attends to everything, or has no rotary positions."""


@dataclass(frozen=True)
class IndexRule:
    """What an engine derives from a layer's index instead of reading it.

    words: what it does, after "it". source: where that was read. no_rope: the rarer kind is layers without rotary
    positions, instead of those that attend to everything. reads_period: it reads the period from the config, which is
    written where one describes the kept layers.
    """

    model_types: tuple[str, ...]
    places: Places
    words: str
    source: str
    no_rope: bool = False
    reads_period: bool = False


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Software that loads what layercut writes.

    tried: version and how. refuses: by model type that it does not load, and says so: why. columns: of packed weights,
    its kernels take widths that are multiples of this.
    """

    title: str
    reads: tuple[Written, ...]
    tried: str
    rules: tuple[IndexRule, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    columns: int = 1

    def takes(self, written: Written) -> bool:
        """Whether it reads that, or a GGUF file that `layercut export` makes of it."""
        return written in self.reads or (written == "float" and "gguf" in self.reads)


# --- the table ---


_ALL, _NO_ROPE, _NO_ROPES = "attend to everything", "have no rotary positions", ("smollm3", "llama4")


def _every(number: int, model_types: str, source: str, key: str = "", does: str = _ALL) -> IndexRule:
    """The last of every so many layers is of the rarer kind. key: of the period in the config, where it is read."""

    def places(config: Any, layers: int) -> list[bool]:
        found = getattr(config, key, None) if key else None
        period = found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else number
        return [(i + 1) % period == 0 for i in range(layers)]

    words = f"lets every {llama_cpp_rules.ordinal(number)} layer {does}"
    return IndexRule(tuple(model_types.split()), places, words, source, "rotary" in does, bool(key))


def _by_length_of_pattern(config: Any, layers: int) -> list[bool]:
    """The last of every len(sliding_window_pattern) layers is apart; without a pattern all are."""
    pattern = getattr(config, "sliding_window_pattern", None)
    return [not pattern or (i + 1) % len(str(pattern)) == 0 for i in range(layers)]


def _by_letters(config: Any, layers: int) -> list[bool]:
    """sliding_window_pattern is text such as LLLG, repeated; G is apart."""
    pattern = getattr(config, "sliding_window_pattern", None)
    return [not isinstance(pattern, str) or pattern[i % len(pattern)] == "G" for i in range(layers)]


def _llama_cpp(model_type: str, name: str) -> IndexRule | None:
    """`models/llama_cpp_rules.py` of an architecture that no array in the file can tell otherwise."""
    period = llama_cpp_rules.PERIODS.get(name)
    number = 4 if name in llama_cpp_rules.INTERVAL_OF_4 else period.every if period and not period.array else 0
    if not number:
        return None

    def places(config: Any, layers: int) -> list[bool]:
        window = getattr(config, "sliding_window", None)
        facts = {"attention.sliding_window": window} if window else {}
        return llama_cpp_rules.full_layers(name, facts, layers) or [True] * layers

    rule = _every(number, model_type, "llama.cpp b11739, load_hparams", does=_NO_ROPE if name in _NO_ROPES else _ALL)
    return replace(rule, places=places)


ARCHITECTURES = {
    "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3", "cohere2": "cohere2", "gpt_oss": "gpt-oss",
    "olmo3": "olmo2", "exaone4": "exaone4", "smollm3": "smollm3", "gemma3n_text": "gemma3n", "llama4_text": "llama4",
    "exaone_moe": "exaone-moe", "afmoe": "afmoe", "mellum": "mellum", "qwen3_next": "qwen3next",
    "minicpm3": "minicpm3", "baichuan": "baichuan", "cohere": "command-r", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}  # fmt: skip
"""llama.cpp's names of the architectures for which it has a rule, by transformers' model types."""
LLAMA_CPP = tuple(rule for each in ARCHITECTURES.items() if (rule := _llama_cpp(*each)))
_MLX = "mlx-lm 0.32.2, models/"
_SGLANG = "SGLang 0.5.23, srt/models/"
_OLLAMA = "Ollama's own engine, model/models/"

ENGINES: dict[str, Engine] = {
    "transformers": Engine(title="transformers", reads=tuple(WORDS), tried="5.24 and 4.57.6: logits equal to the bit"),
    "vllm": Engine(
        title="vLLM", reads=("float", "int8", "int4"), columns=128,
        tried="0.32.0 on a CPU: float right, int4 in bfloat16, int8 refused there; by reading: Marlin",
        rules=(_every(2, "gpt_oss", "vLLM 0.32.0, gpt_oss.py"),),
    ),
    "sglang": Engine(
        title="SGLang", reads=("float", "int8", "int4"), columns=128, tried="0.5.23, by reading",
        rules=(
            _every(2, "gemma2", _SGLANG + "gemma2.py"),
            IndexRule(("exaone4",), _by_length_of_pattern,
                 "takes the last layer of every sliding_window_pattern for one that attends to everything",
                 _SGLANG + "exaone4.py"),
            _every(4, "llama4_text", _SGLANG + "llama4.py", does=_NO_ROPE),
        ),
    ),
    "llama.cpp": Engine(
        title="llama.cpp", reads=("gguf",), rules=LLAMA_CPP,
        tried="b11739: logits, losses and greedy tokens; older builds may not read the array of sliding layers",
    ),
    "ollama": Engine(
        title="Ollama", reads=("gguf",), tried="by reading; it has its own engine for some models, else llama.cpp",
        rules=(
            *LLAMA_CPP,
            _every(6, "gemma3_text gemma3", _OLLAMA + "gemma3/model_text.go"),
            _every(2, "gpt_oss gemma2", _OLLAMA + "gptoss/model.go, gemma2/model.go"),
        ),
    ),
    "lm-studio": Engine(
        title="LM Studio", reads=("gguf",), rules=LLAMA_CPP, tried="not tried; it loads GGUF files by llama.cpp",
    ),
    "mlx": Engine(
        title="MLX", reads=("float",),
        tried="mlx-lm 0.32.2 on mlx[cpu]: Gemma 3, Cohere 2, right on the period, wrong off it",
        rules=(
            _every(6, "gemma3_text gemma3", _MLX + "gemma3_text.py", "sliding_window_pattern"),
            _every(4, "cohere2", _MLX + "cohere2.py", "sliding_window_pattern"),
            IndexRule(("exaone4",), _by_letters, "repeats the letters of sliding_window_pattern", _MLX + "exaone4.py"),
            _every(4, "llama4_text", _MLX + "llama4.py", does=_NO_ROPE),
            _every(4, "qwen3_next qwen3_5_text", _MLX + "qwen3_next.py, qwen3_5.py", "full_attention_interval",
                   "be one of attention"),
        ),
    ),
    "openvino": Engine(
        title="OpenVINO", reads=("float",), tried="optimum-intel, transformers 4: right, Gemma 3 off its period too",
    ),
    "onnxruntime": Engine(
        title="ONNX Runtime", reads=("float",), tried="onnxruntime-genai 0.18.0: exact",
        rules=(_every(2, "gpt_oss", "onnxruntime-genai 0.18.0, builders/gptoss.py"),),
        refuses=dict.fromkeys(("gemma3_text", "gemma3"), "its builder stops at rope_type"),
    ),
}  # fmt: skip


# --- what an engine makes of a cut ---


@dataclass(frozen=True)
class Reading:
    """What one engine, by its name in `ENGINES`, makes of one cut, and why."""

    consumer: str
    verdict: Literal["right", "note", "misread", "refused"]
    words: str = ""


def readings(
    config: Any, segments: Iterable[Segment], written: Written = "float", names: Sequence[str] = CONSUMER_NAMES
) -> list[Reading]:
    """What each engine makes of a model without some of its layers."""
    text, layers = config.get_text_config(decoder=True), count_layers(config)
    kept = kept_layers(list(segments), layers)
    found = []
    for name in names:
        engine = ENGINES[name]
        refused = engine.refuses.get(text.model_type)
        if not refused and not engine.takes(written):
            refused = f"it does not read {WORDS[written]}"
        if refused:
            found.append(Reading(name, "refused", refused))
        elif misread := _misread(engine, text, layers, kept):
            found.append(Reading(name, "misread", misread))
        else:
            notes = _notes(engine, text, kept, written)
            found.append(Reading(name, "note" if notes else "right", "; ".join(notes)))
    return found


def _misread(engine: Engine, text: Any, layers: int, kept: list[int]) -> str:
    for rule in engine.rules:
        kinds = _kinds(text, rule)
        if not kinds or (rule.reads_period and period_of(text.model_type, [text.layer_types[i] for i in kept])):
            continue
        theirs = rule.places(text, len(kept))
        odd = next((place for place, i in enumerate(kept) if kinds[i] != theirs[place]), None)
        if odd is not None:
            before = "" if kept[odd] == odd else f" (layer {kept[odd]} of the whole model)"
            return f"it {rule.words}, and layer {odd} is otherwise{before} ({rule.source})"
    return _broken_by_count(text, layers, len(kept)) if engine.reads == ("gguf",) else ""


def _notes(engine: Engine, text: Any, kept: list[int], written: Written) -> list[str]:
    notes = []
    if written.startswith("int"):
        heads = getattr(text, "num_attention_heads", 0) or 0
        head = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
        widths = [text.hidden_size, getattr(text, "intermediate_size", 0), heads * head]
        if narrow := sorted({width for width in widths if isinstance(width, int) and width % engine.columns}):
            those = ", ".join(map(str, narrow))
            notes.append(
                f"on NVIDIA its Marlin kernels take widths that are multiples of {engine.columns}, not {those}"
            )
    if engine.title == "transformers" and unsaid(text.to_dict()):
        notes.append("from 5.0 on, not by 4.57")
    if engine.reads == ("gguf",):  # a period of llama.cpp's that an array in the file takes the place of
        name = ARCHITECTURES.get(text.model_type, "")
        period, full = llama_cpp_rules.PERIODS.get(name), attends_to_everything(text)
        slides = full if period and period.array and getattr(text, "sliding_window", None) else None
        if slides and period and any(slides[i] != ((p + 1) % period.every == 0) for p, i in enumerate(kept)):
            key, since = f"{name}.{llama_cpp_rules.PATTERN}", llama_cpp_rules.NEEDS_BUILD
            notes.append(f"which layers slide stands in the file as {key}, which it reads from {since} on")
    return notes


def attends_to_everything(text: Any) -> list[bool] | None:
    """By layer, as `layer_types` says; None: it says nothing, or no layer slides."""
    types = getattr(text, "layer_types", None)
    if not types or ("sliding_attention" in types and not getattr(text, "sliding_window", None)):
        return None
    return [each in ("full_attention", "attention") for each in types]


def _kinds(text: Any, rule: IndexRule) -> list[bool] | None:
    """Which layers are of the rarer kind that a rule is about; None: the rule is not about this model."""
    if text.model_type not in rule.model_types:
        return None
    if rule.no_rope:
        return [not each for each in getattr(text, "no_rope_layers", None) or ()]  # 1: with rotary positions
    slides = getattr(text, "sliding_window", None) or "linear_attention" in (getattr(text, "layer_types", None) or ())
    return attends_to_everything(text) if slides else None


def _broken_by_count(text: Any, layers: int, left: int) -> str:
    """What llama.cpp would do otherwise because of the number of layers; empty: nothing."""
    facts = {"expert_gating_func": 2} if text.model_type == "deepseek_v3" else {}
    return llama_cpp_rules.broken_by_count(ARCHITECTURES.get(text.model_type, ""), facts, layers, left)


def warn_misread(stage: str, found: Iterable[Reading]) -> None:
    """Warn of every engine that would misread a cut."""
    for one in found:
        if one.verdict == "misread":
            warn(stage, f"{ENGINES[one.consumer].title} would misread it: {one.words}")


# --- `--for`: what is refused, and among which cuts is searched ---


def restriction(config: Any, names: Sequence[str], length: int) -> Restriction:
    """Which cuts of so many layers stay right in these engines."""
    text, layers = config.get_text_config(decoder=True), count_layers(config)
    found = _restriction(text, layers, names, length)
    if found.cheapest([0.0] * layers) is None:
        near = sorted(range(1, layers), key=lambda n: abs(n - length))
        fitting = (n for n in near if _restriction(text, layers, names, n).segments())
        hint = next((f"{n} layers can go: --ratio {n / layers:.3f}" for n in fitting), "")
        titles = " and ".join(ENGINES[name].title for name in names)
        words = f"no cut of {length} layers stays right in {titles}: {found.why}"
        raise ConfigError(words, hint or "leave out --for, and see what the report says")
    return found


def _restriction(text: Any, layers: int, names: Sequence[str], length: int) -> Restriction:
    left = layers - length
    may = [[True] * left for _ in range(layers)]
    why = []
    for engine in (ENGINES[name] for name in names):
        if words := engine.refuses.get(text.model_type):
            raise ConfigError(f"{engine.title} does not load {text.model_type}: {words}", "leave it out of --for")
        for rule in engine.rules:
            if kinds := _kinds(text, rule):
                theirs = rule.places(text, left)
                may = [[m and kinds[i] == theirs[p] for p, m in enumerate(row)] for i, row in enumerate(may)]
                why.append(f"{engine.title} {rule.words}")
        if engine.reads == ("gguf",) and (words := _broken_by_count(text, layers, left)):
            may = [[False] * left for _ in range(layers)]
            why.append(words)
    return Restriction(tuple(map(tuple, may)), "; ".join(dict.fromkeys(why)))


def check_written(names: Sequence[str], written: Written) -> None:
    """Refuse a number format that one of these engines does not read."""
    for engine in (ENGINES[name] for name in names):
        if not engine.takes(written):
            allowed = ", ".join(WORDS[one] for one in engine.reads)
            folder = ", and folders of float weights by way of layercut export" if "float" not in engine.reads else ""
            raise ConfigError(
                f"{engine.title} does not read {WORDS[written]}; it reads {allowed}{folder}",
                "leave out --bits and --embedding-bits, or leave it out of --for; of --bits auto it may read "
                "--bits-allowed 8,4 --embedding-bits 16",
            )


def check_cut(config: Any, segments: Sequence[Segment], names: Sequence[str], written: Written) -> None:
    """Refuse a cut, a number format, or without segments a model, that one of these engines would misread."""
    check_written(names, written)
    for one in readings(config, segments, written, names):
        if one.verdict not in ("misread", "refused"):
            continue
        title = ENGINES[one.consumer].title
        if not segments:
            hint = "leave it out of --for, or cut the whole model again with the same --for"
            raise ConfigError(f"{title} would not read this model right: {one.words}", hint)
        left = restriction(config, [one.consumer], sum(map(len, segments))).segments()
        near = sorted(left, key=lambda each: abs(each.start - min(segments).start))[:3]
        those = ", or ".join(f"--segment {each}" for each in near)
        raise ConfigError(
            f"{title} would misread the cut {', '.join(map(str, segments))}: {one.words}",
            f"segments of as many layers that it reads right: {those}" if near else "leave out --for",
        )


def written_by(quantize: QuantizeConfig) -> Written:
    """What a folder holds that is quantized so, or where bits are chosen may hold."""
    if quantize.bits == 16:
        return "float"
    if quantize.bits == "auto":
        return "packed embeddings" if quantize.embedding_bits != 16 else _of_linear({*quantize.allowed} - {16})
    if quantize.one_width:  # packed embeddings or zero points, which transformers reads by unpacking all weights
        return "packed embeddings"
    return "int8 embeddings" if quantize.embedding_bits == 8 else _of_linear({quantize.bits})


def written_as(described: Mapping[str, Any]) -> Written:
    """What a folder holds, told from the `quantization_config` in its config."""
    groups = described.get("config_groups", {}).values()
    if described.get("dequantize"):
        return "packed embeddings"
    if any(group["format"] == WHOLE_BYTES for group in groups):
        return "int8 embeddings"
    return _of_linear({group["weights"]["num_bits"] for group in groups})


def _of_linear(bits: AbstractSet[int]) -> Written:
    """Packed linear modules of these widths."""
    return "float" if not bits else "int8" if bits == {8} else "int4" if bits <= {8, 4} else "few bits"
