"""Who reads what is written here, by name: what each takes from a layer's place, and which number formats it reads.

A cut model is right in transformers, which reads every layer's kind from a list in the config. Other software derives
some of it from the layer's index ("every sixth layer attends to everything") and gives the kept layers other kinds,
silently. `export/consumer_rules.py` is the table of that knowledge. Here `readings` says what each makes of one cut,
and `restriction` which cuts stay right in some of them, for the search (`--for`). Used by `compress`, `cut`, `export`,
the report and the card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

from layercut.config import CONSUMER_NAMES, QuantizeConfig
from layercut.errors import ConfigError
from layercut.export.consumer_rules import ARCHITECTURES, CONSUMERS, Aspect, Consumer, IndexRule, Written, every
from layercut.layer_search import Restriction
from layercut.models import llama_cpp_rules
from layercut.models.loading import count_layers
from layercut.models.older_names import READ_BY_4, period_of, unsaid
from layercut.progress import warn
from layercut.quantization.assignment import WHOLE_BYTES
from layercut.segments import Segment, kept_layers


@dataclass(frozen=True)
class Reading:
    """What one consumer makes of one cut."""

    consumer: str
    verdict: Literal["right", "note", "misread", "refused"]
    words: str = ""
    """Why; empty: nothing to say."""


# --- what a consumer makes of a cut ---


def readings(
    config: Any, segments: Iterable[Segment], written: Written = "float", names: Sequence[str] = CONSUMER_NAMES
) -> list[Reading]:
    """What each consumer makes of a model without some of its layers."""
    text, layers = config.get_text_config(decoder=True), count_layers(config)
    kept = kept_layers(list(segments), layers)
    return [_reading(name, text, layers, kept, written) for name in names]


def misread(found: Iterable[Reading]) -> list[str]:
    """Lines for the terminal: who would misread a cut, and why."""
    return [
        f"{CONSUMERS[one.consumer].title} would misread it: {one.words}" for one in found if one.verdict == "misread"
    ]


def warn_misread(stage: str, found: Iterable[Reading]) -> None:
    """Warn of every consumer that would misread a cut."""
    for words in misread(found):
        warn(stage, words)


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
    """Which layers are of the rarer kind: attend to everything, or have no rotary positions."""
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
    name = ARCHITECTURES.get(text.model_type, "")
    return llama_cpp_rules.broken_by_count(name, facts, layers, len(kept))


_WORDS = {
    "float": "folders", "int8": "int8 weights of compressed-tensors", "int4": "int4 weights of compressed-tensors",
    "few bits": "weights of 2, 3 or 6 bits", "packed embeddings": "packed embeddings",
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
    name = ARCHITECTURES.get(text.model_type, "")
    period, apart = llama_cpp_rules.PERIODS.get(name), layers_apart(text, "layer_types")
    if not period or not period.array or not apart or not getattr(text, "sliding_window", None):
        return ""
    theirs = every(period.every)(text, len(kept))
    return "" if [apart[i] for i in kept] == theirs else f"{name}.{llama_cpp_rules.PATTERN}"


# --- for the search and the formats ---


def restriction(config: Any, names: Sequence[str], length: int) -> Restriction:
    """Which cuts of so many layers stay right in these consumers."""
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
    """Refuse a number format that one of these consumers does not read."""
    for name in names:
        consumer = CONSUMERS[name]
        if not consumer.takes(written):
            allowed = ", ".join(_WORDS[one] for one in consumer.reads)
            folder = ", and folders of float weights by way of layercut export" if "float" not in consumer.reads else ""
            raise ConfigError(
                f"{consumer.title} does not read {_WORDS[written]}; it reads {allowed}{folder}",
                "leave out --bits and --quantize-embeddings, or leave it out of --for; of --bits auto it may read "
                "--bits-allowed 8,4 --embedding-bits 16",
            )


def check_cut(config: Any, segments: Sequence[Segment], names: Sequence[str], written: Written) -> None:
    """Refuse a cut, or a number format, that one of these consumers would misread or not read."""
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
    """What all consumers make of a model as it is, once those of `names` read it right."""
    check_written(names, written)
    found = readings(config, [], written)
    for one in found:
        if one.consumer in names and one.verdict in ("misread", "refused"):
            hint = "leave it out of --for, or cut the whole model again with the same --for"
            raise ConfigError(f"{CONSUMERS[one.consumer].title} would not read this model right: {one.words}", hint)
    return found


def written_by(quantize: QuantizeConfig) -> Written:
    """What a folder holds that is quantized so, or where bits are chosen may hold."""
    if quantize.bits == 16:
        return "float"
    if quantize.bits == "auto":
        few = set(quantize.allowed) - {16}
        return "packed embeddings" if quantize.embedding_bits != 16 else _of_linear(few)
    if quantize.one_width:  # packed embeddings or zero points, which transformers reads by unpacking all weights
        return "packed embeddings"
    if quantize.quantize_embeddings:
        return "int8 embeddings"
    return _of_linear({quantize.bits})


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


def _titles(names: Sequence[str]) -> str:
    return " and ".join(CONSUMERS[name].title for name in names)
