"""What a GGUF file says of itself under `general.`, made true of a file that was made from another.

Used where such a file is written (`surgery/gguf_writer.py`). The licence, the languages and what describes the model's
kind stay as they came. A cut model is another model: what names its source goes to `general.base_model.0`, its own name
says how many layers are left, and the size is counted anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from layercut import __version__
from layercut.models.gguf_header import raw_value

OF_THE_SOURCE = ("organization", "author", "version", "url", "doi", "uuid", "repo_url")
"""Keys that name one model, its maker and its place."""
TAGS = ("layercut", "layer-pruning")
_LAYERS = re.compile(r" \((\d+) of (\d+) layers\)$")

Entry = tuple[Any, Any, Any]
"""Value, GGUF type, type of the items of an array."""


def general_entries(
    fields: Mapping[str, Any], writer: Any, *, layers: int, left: int, replaced: bool, tied: bool = False
) -> dict[str, Entry | None]:
    """What has to stand in a file that was made from another."""
    found: dict[str, Entry | None] = {}
    if left < layers:
        found |= _another_model(fields, layers, left)
    if left < layers or tied:
        found |= _size(fields, writer)
    if replaced:
        found |= _number_formats(fields, writer)
    return found


def _another_model(fields: Mapping[str, Any], layers: int, left: int) -> dict[str, Entry | None]:
    """Name, tags and the model that this one was made from."""
    from gguf import GGUFValueType

    text = GGUFValueType.STRING
    found: dict[str, Entry | None] = {}
    name = _text(fields, "general.name")
    earlier = _LAYERS.search(name or "")
    base, first = (name[: earlier.start()], int(earlier[2])) if name and earlier else (name, layers)
    if base:
        found["general.name"] = (f"{base} ({left} of {first} layers)", text, None)
    tags = _texts(fields, "general.tags")
    found["general.tags"] = ([*tags, *(tag for tag in TAGS if tag not in tags)], GGUFValueType.ARRAY, text)
    index = fields["layercut.original_layer_index"].contents() if "layercut.original_layer_index" in fields else None
    if earlier or index not in (None, [*range(layers)]):  # what it names is the model before the first cut
        return found
    about = {key: _text(fields, f"general.{key}") for key in OF_THE_SOURCE} | {"name": base}
    found |= {f"general.{key}": None for key in OF_THE_SOURCE if f"general.{key}" in fields}
    found |= {key: None for key in fields if key.startswith("general.base_model.")}
    if any(about.values()):
        found["general.base_model.count"] = (1, GGUFValueType.UINT32, None)
        found |= {f"general.base_model.0.{key}": (value, text, None) for key, value in about.items() if value}
    return found


def _size(fields: Mapping[str, Any], writer: Any) -> dict[str, Entry | None]:
    """The size label, and the number of parameters where the source gives it."""
    from gguf import GGUFValueType
    from gguf.utility import size_label

    total, shared, experts, number = writer.get_total_parameter_count()
    label = size_label(total, shared, experts, number)
    found: dict[str, Entry | None] = {"general.size_label": (label, GGUFValueType.STRING, None)}
    if "general.parameter_count" in fields:
        found["general.parameter_count"] = (total, GGUFValueType.UINT64, None)
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
    name = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    came = fields["general.file_type"].contents() if "general.file_type" in fields else None
    if name in LlamaFileType.__members__:
        found["general.file_type"] = (int(LlamaFileType[name]), GGUFValueType.UINT32, None)
    elif came is None or not _mixes(came, kind):
        found["general.file_type"] = (int(LlamaFileType.GUESSED), GGUFValueType.UINT32, None)
    return found


def _mixes(file_type: int, kind: str) -> bool:
    """Whether a file type, such as MOSTLY_Q4_K_M, is a mixture whose first type is `kind`."""
    from gguf import LlamaFileType

    return any(int(each) == file_type and each.name.startswith(f"MOSTLY_{kind}") for each in LlamaFileType)


def _text(fields: Mapping[str, Any], key: str) -> str | None:
    """A value that is text; None where there is none."""
    value = raw_value(fields[key]) if key in fields else None
    return value.decode(errors="replace") if isinstance(value, bytes) else None


def _texts(fields: Mapping[str, Any], key: str) -> list[str]:
    value = raw_value(fields[key]) if key in fields else None
    return (
        [each.decode(errors="replace") for each in value if isinstance(each, bytes)] if isinstance(value, list) else []
    )
