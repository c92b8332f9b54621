"""Write a GGUF file from another one, without some layers and with other tensors in their place.

Used where a file is cut (`gguf_cut.py`) and where a healed one is exported (`export/gguf_export.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.errors import ModelError
from layercut.models.gguf_header import Header, block_of, raw_value
from layercut.segments import Segment, kept_layers
from layercut.surgery.gguf_metadata import Entry, general_entries

COUNTED_FROM_FRONT = ("leading_dense_block_count", "hash_layer_count")
COUNTED_FROM_BACK = ("attention.shared_kv_layers",)
NOT_BY_LAYER = ("rope.dimension_sections",)


def write_gguf(
    reader: Any,
    out: Path,
    name: str,
    kept: list[int],
    layers: int,
    blocks: int,
    changes: Mapping[str, Any],
    replaced: Mapping[str, tuple[Any, Any]],
) -> None:
    """Write the file: the source's metadata, adapted to the layers that stay, and their tensors byte for byte."""
    from gguf import GGUFWriter

    kept_blocks = kept + list(range(layers, blocks))
    place = {old: new for new, old in enumerate(kept_blocks)}
    writer = GGUFWriter(out, name, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    tensors = [(t, _renamed(t.name, place)) for t in reader.tensors]
    contents = {new: replaced.get(new, (t.data, t.tensor_type)) for t, new in tensors if new is not None}
    if unknown := replaced.keys() - contents.keys():
        raise ModelError(f"the GGUF file has no tensor {min(unknown)}", "give the file that the run began from")
    for new, (data, kind) in contents.items():
        writer.add_tensor_info(new, data.shape, data.dtype, data.nbytes, kind)
    fewer = len(reader.tensors) < int(reader.fields["GGUF.tensor_count"].contents())  # embeddings kept twice are one
    general = general_entries(reader.fields, writer, layers=layers, left=len(kept), replaced=bool(replaced), tied=fewer)
    _write_metadata(writer, reader, name, kept, layers, kept_blocks, blocks, changes, general)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for new, (data, _) in contents.items():
        order = None if new in replaced else reader.endianess
        writer.write_tensor_data(data, tensor_endianess=order)
    writer.close()


def _write_metadata(
    writer: Any,
    reader: Any,
    name: str,
    kept: list[int],
    layers: int,
    kept_blocks: list[int],
    blocks: int,
    changes: Mapping[str, Any],
    general: Mapping[str, Entry | None],
) -> None:
    """Keys and values: the source's, cut where they count or list layers, `changes`, and what is `general`."""
    from gguf import GGUFValueType

    earlier: Any = None
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == "layercut.original_layer_index":
            earlier = field.contents()
            continue
        key = field.name.removeprefix(f"{name}.")
        if (key != field.name and key in changes) or field.name in general:
            continue
        value = raw_value(field)
        if key != field.name:
            value = _cut_value(key, value, kept, kept_blocks, layers, blocks)
        kind = field.types[0]
        item = GGUFValueType(int(field.parts[3][0])) if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=item)
    for field_name, entry in general.items():
        if entry is not None:
            writer.add_key_value(field_name, entry[0], entry[1], sub_type=entry[2])
    for key, value in changes.items():
        is_list = isinstance(value, list)
        kind = GGUFValueType.ARRAY if is_list else GGUFValueType.FLOAT32
        writer.add_key_value(f"{name}.{key}", value, kind, sub_type=GGUFValueType.BOOL if is_list else None)
    index = [earlier[i] for i in kept] if _is_index(earlier, layers) else kept
    writer.add_key_value("layercut.original_layer_index", index, GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32)


def _is_index(earlier: Any, layers: int) -> bool:
    """Whether an earlier cut left an index for each of the layers."""
    return isinstance(earlier, list) and len(earlier) == layers and all(isinstance(i, int) for i in earlier)


def _cut_value(key: str, value: Any, kept: list[int], kept_blocks: list[int], layers: int, blocks: int) -> Any:
    if key == "block_count":
        return len(kept_blocks)
    if key in COUNTED_FROM_FRONT and isinstance(value, int):
        return sum(i < value for i in kept)
    if key in COUNTED_FROM_BACK and isinstance(value, int):
        return sum(i >= layers - value for i in kept)
    if isinstance(value, list) and key not in NOT_BY_LAYER:
        if len(value) == blocks:
            return [value[i] for i in kept_blocks]
        if len(value) == layers:
            return [value[i] for i in kept]
    return value


def names_after(header: Header, segments: Sequence[Segment]) -> dict[str, str]:
    """What the tensors that stay are called once segments are cut out of a file."""
    kept = kept_layers(segments, header.layers)
    place = {old: new for new, old in enumerate([*kept, *range(header.layers, header.blocks)])}
    return {name: new for name in header.tensors if (new := _renamed(name, place)) is not None}


def _renamed(tensor: str, place: dict[int, int]) -> str | None:
    block = block_of(tensor)
    if block is None:
        return tensor
    return f"blk.{place[block]}.{tensor.split('.', 2)[2]}" if block in place else None
