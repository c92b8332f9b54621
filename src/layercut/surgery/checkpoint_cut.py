"""Cut layers out of a checkpoint folder without loading the model.

The plan is made on models without weights; then the byte ranges of the tensors that stay are copied under their new
names, shard by shard. Memory does not grow with the model, and the time is that of copying the files.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from layercut.errors import ModelError, SurgeryError
from layercut.files import appearing, read_json
from layercut.models.checkpoints import INDEX, SINGLE, Checkpoint, check_folder, used_index, weight_files
from layercut.models.config_files import add_older_names_
from layercut.models.loading import load_config
from layercut.segments import Segment
from layercut.surgery.config_cut import config_json
from layercut.surgery.cut_plan import CutPlan, plan_cut

COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "*.tiktoken", "tekken.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "README*", "LICENSE*", "LICENCE*", "COPYING*",
    "NOTICE*", "USE_POLICY*", "MODEL_CARD*",
)  # fmt: skip
"""Files that belong to a model and are copied beside its weights. Nothing else is: code would have to be trusted, and
other files may be private."""
BESIDE = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip
"""Those among them that neither model nor tokenizer writes."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of dtypes that weights are converted between."""
CHUNK = 1 << 26
IN_MEMORY = "load the model and cut it in memory instead"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def cut_checkpoint(
    folder: Path,
    segments: Sequence[Segment],
    out: Path,
    *,
    force: bool = False,
    healed: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write to `out` the checkpoint in `folder` without the layers of `segments`; returns the files not copied.

    Weights are copied as byte ranges (a tensor is read only where its values change), config and index rewritten,
    `COMPANIONS` copied. `out` appears at the end, whole; the source is only read.
    """
    folder, out = Path(folder).resolve(), Path(out)
    beside, left = companions(folder)
    jobs, raw = _planned(folder, segments, healed or {}, dtype)
    with appearing(out, force=force, need=sum(out.size for _, some in jobs for out in some), source=folder) as work:
        for path in beside:
            (work / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, work / path)
        (work / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        add_older_names_(work)
        jobs = [(about, outputs) for about, outputs in jobs if outputs]
        weight_map: dict[str, str] = {}
        for number, (about, outputs) in enumerate(jobs, start=1):
            name = SINGLE if len(jobs) == 1 else f"model-{number:05d}-of-{len(jobs):05d}.safetensors"
            write_shard(work / name, outputs, about or {"format": "pt"})
            weight_map |= {output.name: name for output in outputs}
        if len(jobs) != 1:
            listed = used_index(folder)
            every = [output for _, outputs in jobs for output in outputs]
            metadata = dict((read_json(listed) if listed else {}).get("metadata") or {})
            metadata["total_size"] = sum(output.size for output in every)
            if "total_parameters" in metadata:
                metadata["total_parameters"] = sum(prod(output.shape) for output in every)
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return left


def check_checkpoint_cut(folder: Path, segments: Sequence[Segment], healed: Mapping[str, torch.Tensor]) -> None:
    """Raise what `cut_checkpoint` would for this cut and weights of these names; no tensor is read."""
    _planned(folder, segments, healed, None)


def companions(folder: Path, patterns: Sequence[str] = COMPANIONS) -> tuple[list[Path], list[str]]:
    """Paths below a folder of the files to copy, and names of those that are not copied, weights and config aside."""
    wanted = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    home = folder.parent.parent if cached else folder  # the Hub's cache links to the blobs of the same repository
    for path in wanted:
        try:
            target = path.resolve()
            belongs = target.is_relative_to(home) and stat.S_ISREG(target.stat().st_mode)
        except OSError:
            belongs = False
        if not belongs:
            raise ModelError(
                f"{path} is not a file of this checkpoint: a link out of it, or no regular file",
                "put the file itself in the place of the link, or take it out of the folder",
            )
    weights = {INDEX, SINGLE, "config.json", *(file.name for file in weight_files(folder))}
    top = {path.relative_to(folder).parts[0] for path in wanted}
    left = sorted(p.name for p in folder.iterdir() if p.name not in weights | top and not p.name.startswith("."))
    return [path.relative_to(folder) for path in wanted], left


# --- what is written in place of each shard ---


class Entry(NamedTuple):
    """One tensor in a safetensors file; start: its first byte, counted from the start of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Output(NamedTuple):
    """A tensor to write: the bytes of one in a file, or bytes made when they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    content: Entry | Callable[[], bytes]


Jobs = list[tuple[dict[str, str], list[Output]]]
"""Of each shard: its metadata, and its tensors in the order the bytes lie in."""


def _planned(
    folder: Path, segments: Sequence[Segment], healed: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[Jobs, dict[str, Any]]:
    """What to write in place of each shard, and config.json."""
    check_folder(folder)
    config = load_config(Checkpoint(str(folder), folder))
    plan = plan_cut(config, model_class(config), segments)
    shards = [(file, *read_shard(file)) for file in weight_files(folder)]
    if index := used_index(folder):  # it must list exactly what its shards hold
        listed: dict[str, str] = read_json(index)["weight_map"]
        held = {name: file.name for file, entries, _ in shards for name in entries}
        for name in sorted(held.keys() - listed.keys()):
            raise ModelError(
                f"{folder / INDEX} does not list {name}, which {held[name]} holds", "fetch the index again"
            )
        for name, stated in sorted(listed.items()):
            if held.get(name) != stated:
                raise ModelError(f"{stated} does not hold {name}, as {INDEX} says", "fetch the checkpoint again")
    every = [entry for _, entries, _ in shards for entry in entries.values()]
    names = new_names([entry.name for entry in every], plan)
    raw = config_json(read_json(folder / "config.json"), config, plan)
    raw.pop("auto_map", None)  # names code that is left behind; the class is one of transformers' own
    stored = str(getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None))
    if dtype is not None and str(dtype).removeprefix("torch.") == stored.removeprefix("torch."):
        dtype = None
    if dtype is not None:
        for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
            for key in {"dtype", "torch_dtype"} & part.keys():
                part[key] = str(dtype).removeprefix("torch.")
        raw.pop("torch_dtype", None)
        raw["dtype"] = str(dtype).removeprefix("torch.")
    before, homes = DiskNames(plan.before), dict[str, list[Entry]]()
    for entry in every if plan.edits else ():
        homes.setdefault(before.to_memory(entry.name), []).append(entry)

    def read(name: str) -> torch.Tensor:
        """A tensor by its name in memory before the cut; only where disk and memory hold the same tensor."""
        if len(found := homes.get(name, [])) != 1:
            why = f"{name} has to be changed, and the checkpoint stores it in {len(found)} pieces"
            raise SurgeryError(why, IN_MEMORY)
        return _tensor(found[0])

    placed = set[str]()

    def output(entry: Entry) -> Output:
        """The entry's bytes; or a healed weight, an edited or a converted one, made when its turn comes."""
        name, in_memory = names[entry.name]
        for one in (name, in_memory):
            if one in healed and tuple(healed[one].shape) == entry.shape:
                placed.add(one)
                return _made(name, entry, entry.shape, dtype, partial(healed.__getitem__, one))
        if (edit := plan.edits.get(in_memory)) is not None:  # worked out twice rather than held until its turn comes
            return _made(name, entry, tuple(edit(read).shape), dtype, partial(edit, read))
        if dtype is not None and FLOATS.get(entry.dtype, dtype) != dtype:
            return _made(name, entry, entry.shape, dtype, partial(_tensor, entry))
        return Output(name, entry.dtype, entry.shape, entry.size, entry)

    jobs: Jobs = []
    for _, entries, metadata in shards:
        kept = (entry for entry in entries.values() if entry.name in names)
        jobs.append((metadata, [output(entry) for entry in sorted(kept, key=lambda entry: entry.start)]))
    if unplaced := sorted(healed.keys() - placed):
        raise SurgeryError(
            f"the checkpoint stores {len(unplaced)} healed weights in another way than its class saves them "
            f"(first: {unplaced[0]})",
            IN_MEMORY,
        )
    for name, shape in plan.added.items():
        _add_zeros_(jobs, dict(names.values()), name, shape)
    return jobs, raw


def _made(
    name: str, entry: Entry, shape: tuple[int, ...], dtype: torch.dtype | None, make: Callable[[], torch.Tensor]
) -> Output:
    """A tensor in the dtype of the entry whose place it takes, or in the one wanted."""
    found = FLOATS.get(entry.dtype)
    if found is not None and dtype is not None:
        found = dtype
    code = next((code for code, known in FLOATS.items() if known == found), entry.dtype)
    width = found.itemsize if found is not None else entry.size // prod(entry.shape)

    def content() -> bytes:
        return make().to("cpu", found).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return Output(name, code, shape, width * prod(shape), content)


def _tensor(entry: Entry) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(entry.file, framework="pt", backend="pread") as stream:
        return stream.get_tensor(entry.name)


def _add_zeros_(jobs: Jobs, memory: Mapping[str, str], name: str, shape: torch.Size) -> None:
    """A tensor of zeros that a new position calls for joins the shard of its nearest neighbour, in its dtype."""
    module = name
    while module := module.rpartition(".")[0]:
        for _, outputs in jobs:
            for beside in outputs:
                if (found := memory.get(beside.name, "")).startswith(module + "."):
                    disk = beside.name.replace(found, name) if found in beside.name else name
                    size = prod(shape) * (beside.size // max(prod(beside.shape), 1))
                    outputs.append(Output(disk, beside.dtype, tuple(shape), size, partial(bytes, size)))
                    return
    raise SurgeryError(f"the cut model calls for {name}, and no weight beside it was found on disk")


def model_class(config: Any) -> type:
    """The class a checkpoint was saved from, if this transformers has it; else the one its config stands for."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    for name in getattr(config, "architectures", None) or []:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and getattr(cls, "config_class", None) is type(config):
            return cls
    text_part = type(config.get_text_config(decoder=True))
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            cls = mapping[type(config)]
            cls = cls[0] if isinstance(cls, tuple) else cls
            if text_part is type(config) or cls.config_class is not text_part:
                return cls  # a class for the text part alone would not take this config
    raise ModelError(
        f"{config.model_type!r} is not a language model of this transformers", "pip install -U transformers"
    )


# --- names on disk and in memory ---
#
# Many checkpoints name their weights otherwise than the model does (`transformer.h.3` for `model.layers.3`, one tensor
# per expert for a fused one, two blocks for one layer). transformers maps disk names to memory; the inverse is found by
# trying: of the numbers in a disk name, the right ones to change are those that make it read as the wanted name.


class DiskNames:
    """How one model class reads the names in a checkpoint."""

    def __init__(self, model: Any) -> None:
        """model: on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._read: dict[str, str] = {}  # some renamings depend on what was read before: the first answer counts
        self.prefix = model.base_model_prefix
        self._optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
        self.known = dict(model.state_dict(keep_vars=True))
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        self.tied = {name: names for names in owners.values() for name in names}
        """All names of the parameter that has this name."""

    def to_memory(self, key: str) -> str:
        """The name in memory that a tensor of this name on disk is loaded into (of several, the first)."""
        from transformers.core_model_loading import rename_source_key

        if key not in self._read:
            name = rename_source_key(key, self._renamings, self._converters, self.prefix, self.known)[0]
            keeps = name not in self.known and key in self.known  # then a loader takes the name as it is
            self._read[key] = key if keeps else name
        return self._read[key]

    def lacking(self, keys: Sequence[str], besides: Sequence[str] = ()) -> list[str]:
        """What the class calls for and these tensors on disk do not fill."""
        have = {*besides}
        for key in keys:
            have.add(name := self.to_memory(key))
            for converter in self._converters:
                first, *others = converter.target_patterns
                if others and first in name:
                    have.update(name.replace(first, other) for other in others)
                    break
        have = have.union(*(self.tied.get(name, ()) for name in have))
        return [n for n in sorted(self.known.keys() - have) if not any(re.search(each, n) for each in self._optional)]


def new_names(keys: Sequence[str], plan: CutPlan) -> dict[str, tuple[str, str]]:
    """Of every tensor on disk that stays: its new names on disk and in memory."""
    from transformers.core_model_loading import dot_natural_key

    before, after = DiskNames(plan.before), DiskNames(plan.after)
    place = {old: new for new, old in enumerate(plan.kept)}
    found: dict[str, tuple[str, str]] = {}
    gone: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):  # the order in which transformers reads names
        name = before.to_memory(key)
        # tensors that the class does not know (old buffers, scales of a quantizer) still belong to their layer
        where = plan.layer_in(name) or plan.layer_in(f"{before.prefix}.{name}")
        if where is None:
            found[key] = key, after.to_memory(key)
        elif where[1] in place:
            wanted, new = plan.rename(name) or name, place[where[1]]
            if wanted in plan.dropped:
                continue
            if name not in before.known and wanted == name:  # without the base model's prefix, as GPT-2's old masks
                short = where[0].partition(".")[2]
                wanted = re.sub(rf"^{re.escape(short)}\.\d+(?=\.|$)", f"{short}.{new}", name)
            found[key] = _renumbered(key, where[1], new, after, wanted), wanted
        elif where[1] < plan.layers:
            gone[name] = key
    # weights shared between layers are stored under one of them; if that one goes, another takes them over (Zamba)
    there = {in_memory for _, in_memory in found.values()}
    for name, key in gone.items():
        heirs = [heir for other in before.tied.get(name, ()) if (heir := plan.rename(other)) is not None]
        if not heirs or there & set(heirs):
            continue
        old, new_place = plan.layer_in(name), plan.layer_in(heirs[0])
        if old is not None and new_place is not None:
            found[key] = _renumbered(key, old[1], new_place[1], after, heirs[0]), heirs[0]
    if any(key.endswith(".weight_packed") for key in keys):
        raise ModelError(
            "the checkpoint's weights are packed in few bits, and are cut before they are rounded",
            "cut the float checkpoint that it was made from, then layercut quantize the result",
        )
    if lacked := before.lacking(keys):
        raise ModelError(
            f"the checkpoint lacks {len(lacked)} weights that its config calls for (first: {lacked[0]})",
            "fetch the checkpoint again; if it is complete, its config.json does not fit it",
        )
    on_disk = [disk for disk, _ in found.values()]
    if missing := after.lacking(on_disk, [*plan.added]):
        raise SurgeryError(
            f"the cut checkpoint would lack {len(missing)} weights of its class (first: {missing[0]})", IN_MEMORY
        )
    if len({*on_disk}) != len(on_disk):
        raise SurgeryError("two weights would get the same name on disk", IN_MEMORY)
    return found


def _renumbered(key: str, old: int, new: int, read: DiskNames, wanted: str) -> str:
    """The disk name that reads as `wanted`, made from a name of layer `old` for layer `new`."""
    if old == new and read.to_memory(key) == wanted:
        return key
    steps = (new - old, 2 * (new - old))  # some checkpoints store a layer as two blocks
    for spot, step in itertools.product(NUMBER.finditer(key), steps):
        candidate = f"{key[: spot.start()]}{int(spot[0]) + step}{key[spot.end() :]}"
        if int(spot[0]) + step >= 0 and read.to_memory(candidate) == wanted:
            return candidate
    what = f"the weight {key!r} belongs to layer {old}, and no name was found for it as layer {new}"
    raise SurgeryError(what, IN_MEMORY)


# --- safetensors files: 8 bytes little-endian length of the header, the header in JSON, the data ---


def read_shard(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """A safetensors file's tensors and metadata, read from its header alone."""
    entries = {}
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            for name, facts in header.items():
                start, end = facts["data_offsets"]
                if not 0 <= start <= end:
                    raise ValueError(f"the byte range of {name} is {start} to {end}")
                shape = tuple(facts["shape"])
                entries[name] = Entry(file, name, facts["dtype"], shape, 8 + length + start, end - start)
            end = max((e.start + e.size for e in entries.values()), default=8 + length)
            if end > size:
                raise ValueError(f"it ends before byte {end:,}")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{file} is corrupt or truncated: {error}", "fetch this file again") from None
    return entries, metadata


def write_shard(file: Path, outputs: Sequence[Output], metadata: dict[str, str]) -> None:
    """Write a safetensors file of tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for out in outputs:
        place = [offset, offset + out.size]
        header[out.name] = {"dtype": out.dtype, "shape": list(out.shape), "data_offsets": place}
        offset += out.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb", buffering=0) as target:
        _write_all(target, struct.pack("<Q", len(text)) + text)
        for out in outputs:
            if not isinstance(out.content, Entry):
                _write_all(target, out.content())
                continue
            with out.content.file.open("rb", buffering=0) as source:
                _copy(source, target, out.content.start, out.size)


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    """Copy a range to the end of `target`, inside the kernel where the file system allows it."""
    end, in_kernel = start + size, hasattr(os, "copy_file_range")
    while start < end:
        want, done = min(CHUNK, end - start), 0
        if in_kernel:
            try:
                done = os.copy_file_range(source.fileno(), target.fileno(), want, offset_src=start)
            except OSError:  # another disk, or a file system without it; what else is wrong, writing says too
                in_kernel = False
        if not done:
            data = os.pread(source.fileno(), min(want, 1 << 22), start)
            if not data:
                raise OSError(f"the source ends at byte {start:,}")
            _write_all(target, data)
            done = len(data)
        start += done


def _write_all(target: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]
