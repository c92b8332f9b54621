"""Writes GGUF files: layers cut out, blocks renumbered, their bytes untouched, per-layer metadata cut along.

llama.cpp describes layers by arrays in the metadata (sliced here), by a few numbers (counted again), and for some
architectures by rules in its own source (`models/llama_cpp_rules.py`), such as "every sixth layer attends to
everything". Where a file can say otherwise it is made to say so; cuts that break any other rule are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut import __version__
from layercut.errors import ConfigError, ModelError, SurgeryError
from layercut.files import appearing
from layercut.models import llama_cpp_rules as rules
from layercut.models.gguf_header import Header, block_of, open_gguf, raw_value
from layercut.progress import say
from layercut.segments import Segment, checked_segments, kept_layers
from layercut.surgery.cut_plan import nearby

PACKED_TENSORS = ("per_layer_token_embd.weight", "per_layer_model_proj.weight")
COUNTED_FROM_FRONT = ("leading_dense_block_count", "hash_layer_count")
COUNTED_FROM_BACK = ("attention.shared_kv_layers",)
NOT_BY_LAYER = ("rope.dimension_sections",)
INDEX = "layercut.original_layer_index"
OF_THE_SOURCE = ("organization", "author", "version", "url", "doi", "uuid", "repo_url")
"""Keys under `general.` that name one model, its maker and its place."""
TAGS = ("layercut", "layer-pruning")
_LAYERS = re.compile(r" \((\d+) of (\d+) layers\)$")
_CUT_FOLDER = "cut the original checkpoint folder instead, then convert it"

Entry = tuple[Any, Any, Any]  # of metadata: value, GGUF type, type of the items of an array


def cut_gguf(
    file: Path,
    segments: Sequence[Segment],
    out: Path,
    *,
    force: bool = False,
    replaced: Mapping[str, tuple[Any, Any]] | None = None,
    full: Sequence[bool] | None = None,
    as_loaded: bool = False,
) -> None:
    """Write to `out` the GGUF file without the blocks of `segments`; kept tensors are copied byte for byte.

    replaced: other tensors, with their GGML types, in the place of those of these names after the cut. full: which
    layers attend to everything, to be written. as_loaded: embeddings that are kept twice are written once.
    """
    file, out, replaced = Path(file), Path(out), replaced or {}
    if out.suffix != ".gguf":
        raise ConfigError(f"{out} is not named as a GGUF file", f"--out {out.with_suffix('.gguf')}")
    header, reader = open_gguf(file, as_loaded=as_loaded)
    name, layers, facts = header.architecture, header.layers, header.facts()
    if header.count("split.count", 0) > 1:
        hint = "join them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        raise SurgeryError(f"{file.name} is one of several parts", hint)
    segments = checked_segments(segments, layers)
    kept = kept_layers(segments, layers)
    changes: dict[str, Any] = {}
    if segments:
        try:
            _refuse(reader, name, facts, kept, layers)
        except SurgeryError as error:
            text = ", ".join(map(str, segments))
            hint = error.hint or nearby(
                segments, layers, lambda left: _refuse(reader, name, facts, left, layers), _CUT_FOLDER
            )
            words = f"{file.name} ({name}): layers {text} cannot be cut out: {error.message}"
            raise SurgeryError(words, hint) from None
        # what llama.cpp would derive otherwise from the number of layers that is left
        defaults = rules.DEFAULTS.get(name, {}).items()
        changes = {key: value(layers) for key, value in defaults if key not in facts}
        period = rules.full_layers(name, facts, layers)
        if period and _pattern_can_say(name, facts) and not isinstance(facts.get(rules.PATTERN), list):
            left = [period[i] for i in kept]
            if left != rules.full_layers(name, facts, len(kept)):
                changes[rules.PATTERN] = [not each for each in left]
    if full is not None:
        changes[rules.PATTERN] = [not each for each in full]
    need = sum(t.n_bytes for t in reader.tensors if block_of(t.name) in {None, *kept})
    with appearing(out, force=force, need=need, source=file) as work:
        if rules.PATTERN in changes and segments:
            note = f"which layers slide is written as {rules.PATTERN}, which llama.cpp reads"
            say("note", f"{note} from {rules.NEEDS_BUILD} on")
        _write(reader, work / out.name, header, names_after(header, segments), kept, changes, replaced)


def names_after(header: Header, segments: Sequence[Segment]) -> dict[str, str]:
    """What the tensors that stay are called once segments are cut out of a file."""
    kept = kept_layers(segments, header.layers)
    place = {old: new for new, old in enumerate([*kept, *range(header.layers, header.blocks)])}
    blocks = {name: block_of(name) for name in header.tensors}
    return {
        name: name if block is None else f"blk.{place[block]}.{name.split('.', 2)[2]}"
        for name, block in blocks.items()
        if block is None or block in place
    }


# --- what cannot be expressed, and what has to be said ---


def _refuse(reader: Any, name: str, facts: dict[str, Any], kept: Sequence[int], layers: int) -> None:
    if why := rules.broken_by_count(name, facts, layers, len(kept)):
        sound = [n for n in range(1, layers) if not rules.broken_by_count(name, facts, layers, n)]
        nearest = min(sound, key=lambda n: (abs(n - len(kept)), -n), default=0)
        other = f"remove {layers - nearest} layers instead of {layers - len(kept)}, or {_CUT_FOLDER}"
        raise SurgeryError(why, other if sound else _CUT_FOLDER)
    if packed := [t.name for t in reader.tensors if t.name in PACKED_TENSORS]:
        raise SurgeryError(f"{packed[0]} packs a slice for every layer", _CUT_FOLDER)
    if not rules.known(name):
        raise SurgeryError(f"layercut does not know how llama.cpp distinguishes the layers of {name!r}", _CUT_FOLDER)
    for period, why in rules.periods(name, facts):
        odd = rules.off_period(period, kept)
        if odd and not _pattern_can_say(name, facts):
            raise SurgeryError(f"{why}, and layer {odd[0]} would get the index {list(kept).index(odd[0])}")


def _pattern_can_say(name: str, facts: dict[str, Any]) -> bool:
    """Whether an array may take the place of the architecture's own period."""
    return name in rules.PERIODS and rules.PERIODS[name].array and not any(key in facts for key in rules.PERIOD_KEYS)


# --- the file ---


def _write(
    reader: Any,
    out: Path,
    header: Header,
    names: Mapping[str, str],
    kept: list[int],
    changes: Mapping[str, Any],
    replaced: Mapping[str, tuple[Any, Any]],
) -> None:
    from gguf import GGUFValueType, GGUFWriter
    from gguf.utility import size_label

    name, layers, fields = header.architecture, header.layers, reader.fields
    writer = GGUFWriter(out, name, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    contents = {
        names[t.name]: replaced.get(names[t.name], (t.data, t.tensor_type)) for t in reader.tensors if t.name in names
    }
    if unknown := replaced.keys() - contents.keys():
        raise ModelError(f"the GGUF file has no tensor {min(unknown)}", "give the file that the run began from")
    for new, (data, kind) in contents.items():
        writer.add_tensor_info(new, data.shape, data.dtype, data.nbytes, kind)
    index = fields[INDEX].contents() if INDEX in fields else None  # of an earlier cut
    earlier = index if isinstance(index, list) and len(index) == layers else None
    earlier = earlier if earlier and all(isinstance(i, int) for i in earlier) else None
    general: dict[str, Entry | None] = {}
    if len(kept) < layers:
        general |= _another_model(fields, index, layers, len(kept))
    if len(kept) < layers or len(reader.tensors) < int(fields["GGUF.tensor_count"].contents()):  # once, for twice
        total, *counts = writer.get_total_parameter_count()
        general["general.size_label"] = (size_label(total, *counts), GGUFValueType.STRING, None)
        if "general.parameter_count" in fields:
            general["general.parameter_count"] = (total, GGUFValueType.UINT64, None)
    if replaced:
        general |= _number_formats(fields, writer)
    kept_blocks = [*kept, *range(layers, header.blocks)]
    for key, field in fields.items():
        own = key.removeprefix(f"{name}.")
        skipped = key.startswith("GGUF.") or key in ("general.architecture", INDEX) or key in general
        if skipped or (own != key and own in changes):
            continue
        value = raw_value(field)
        if own == key:
            pass
        elif own == "block_count":
            value = len(kept_blocks)
        elif own in COUNTED_FROM_FRONT and isinstance(value, int):
            value = sum(i < value for i in kept)
        elif own in COUNTED_FROM_BACK and isinstance(value, int):
            value = sum(i >= layers - value for i in kept)
        elif isinstance(value, list) and own not in NOT_BY_LAYER and len(value) in (header.blocks, layers):
            value = [value[i] for i in (kept_blocks if len(value) == header.blocks else kept)]
        kind = field.types[0]
        item = GGUFValueType(int(field.parts[3][0])) if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, sub_type=item)
    for key, value in changes.items():
        entry: Entry = (value, GGUFValueType.FLOAT32, None)
        general[f"{name}.{key}"] = (
            (value, GGUFValueType.ARRAY, GGUFValueType.BOOL) if isinstance(value, list) else entry
        )
    index = [earlier[i] for i in kept] if earlier else kept
    general[INDEX] = (index, GGUFValueType.ARRAY, GGUFValueType.INT32)
    for key, found in general.items():
        if found is not None:
            writer.add_key_value(key, found[0], found[1], sub_type=found[2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for new, (data, _) in contents.items():
        writer.write_tensor_data(data, tensor_endianess=None if new in replaced else reader.endianess)
    writer.close()


# --- what it says of itself under `general.` ---
#
# Licence, languages and what describes the model's kind stay as they came. A cut model is another model: what names its
# source goes to `general.base_model.0`, its own name says how many layers are left, and the size is counted anew.


def _another_model(fields: Mapping[str, Any], index: Any, layers: int, left: int) -> dict[str, Entry | None]:
    from gguf import GGUFValueType

    text = GGUFValueType.STRING
    raw = {key: raw_value(field) for key, field in fields.items() if key.startswith("general.")}
    about = {key: value.decode(errors="replace") for key, value in raw.items() if isinstance(value, bytes)}
    found: dict[str, Entry | None] = {}
    base = about.get("general.name")
    earlier, first = _LAYERS.search(base or ""), layers
    if base and earlier:
        base, first = base[: earlier.start()], int(earlier[2])
    if base:
        found["general.name"] = (f"{base} ({left} of {first} layers)", text, None)
    tags = raw.get("general.tags")
    tags = [one.decode(errors="replace") for one in tags if isinstance(one, bytes)] if isinstance(tags, list) else []
    found["general.tags"] = ([*tags, *(tag for tag in TAGS if tag not in tags)], GGUFValueType.ARRAY, text)
    if earlier or index not in (None, [*range(layers)]):  # what it names is the model before the first cut
        return found
    origin = {key: about.get(f"general.{key}") for key in OF_THE_SOURCE} | {"name": base}
    found |= {f"general.{key}": None for key in OF_THE_SOURCE if f"general.{key}" in fields}
    found |= {key: None for key in fields if key.startswith("general.base_model.")}
    if any(origin.values()):
        found["general.base_model.count"] = (1, GGUFValueType.UINT32, None)
        found |= {f"general.base_model.0.{key}": (value, text, None) for key, value in origin.items() if value}
    return found


def _number_formats(fields: Mapping[str, Any], writer: Any) -> dict[str, Entry | None]:
    """Who quantized, and the type that most of the matrices' bytes have, where that is no longer the source's."""
    from gguf import GGUFValueType, LlamaFileType

    found: dict[str, Entry | None] = {
        "general.quantized_by": (f"layercut {__version__}", GGUFValueType.STRING, None),
        "general.quantization_version": (2, GGUFValueType.UINT32, None),
    }
    kinds: Counter[str] = Counter()
    for tensors in writer.tensors:
        for info in tensors.values():
            kinds[info.dtype.name] += info.nbytes if len(info.shape) > 1 else 0
    kind = kinds.most_common(1)[0][0] if kinds else "F32"
    now = LlamaFileType.__members__.get("ALL_F32" if kind == "F32" else f"MOSTLY_{kind}")
    came = fields["general.file_type"].contents() if "general.file_type" in fields else None
    mixtures = [int(each) for each in LlamaFileType if each.name.startswith(f"MOSTLY_{kind}")]  # such as MOSTLY_Q4_K_M
    if now is not None or came not in mixtures:
        now = LlamaFileType.GUESSED if now is None else now
        found["general.file_type"] = (int(now), GGUFValueType.UINT32, None)
    return found
