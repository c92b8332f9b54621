"""The table of who reads what is written here, by name: its rules for a layer's place, and the dtypes it reads.

Data for `export/consumers.py`. Every rule names where it was read or tried; a later version may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from layercut.config import CONSUMER_NAMES
from layercut.models import llama_cpp_rules

Written = Literal["float", "int8", "int4", "few bits", "int8 embeddings", "packed embeddings", "gguf"]
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


# --- how places are told apart ---


def every(number: int, key: str = "") -> Places:
    """A rule by a period: the last of every so many layers is apart."""

    def places(config: Any, layers: int) -> list[bool]:
        found = getattr(config, key, None) if key else None
        period = found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else number
        return [(i + 1) % period == 0 for i in range(layers)]

    return places


def by_llama_cpp(architecture: str) -> Places:
    """A rule as `models/llama_cpp_rules.py` has it, for a file in which no array says otherwise."""

    def places(config: Any, layers: int) -> list[bool]:
        window = getattr(config, "sliding_window", None)
        facts = {"attention.sliding_window": window} if window else {}
        return llama_cpp_rules.full_layers(architecture, facts, layers) or [True] * layers

    return places


def by_length_of_pattern(config: Any, layers: int) -> list[bool]:
    """The last of every len(sliding_window_pattern) layers is apart; without a pattern all are."""
    pattern = getattr(config, "sliding_window_pattern", None)
    return [not pattern or (i + 1) % len(str(pattern)) == 0 for i in range(layers)]


def by_letters(config: Any, layers: int) -> list[bool]:
    """sliding_window_pattern is text such as LLLG, repeated; G is apart."""
    pattern = getattr(config, "sliding_window_pattern", None)
    return [not isinstance(pattern, str) or pattern[i % len(pattern)] == "G" for i in range(layers)]


_APART = "attend to everything"
_MLX = "mlx-lm 0.32.2, models/"
_SGLANG = "SGLang 0.5.23, srt/models/"
_OLLAMA = "Ollama's own engine, model/models/"
ARCHITECTURES = {
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
    for model_type, name in ARCHITECTURES.items():
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
        title="transformers",
        reads=("float", "int8", "int4", "few bits", "int8 embeddings", "packed embeddings", "gguf"),
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
