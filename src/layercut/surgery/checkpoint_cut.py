"""Cut layers out of a checkpoint folder without loading the model.

The plan is made on models without weights; then the byte ranges of the tensors that stay are copied under their new
names, shard by shard. Memory does not grow with the model, and the time is that of copying the files.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from layercut.errors import ModelError, SurgeryError
from layercut.files import appearing, read_json
from layercut.models.checkpoints import (
    INDEX,
    SINGLE,
    Checkpoint,
    Stored,
    check_folder,
    stored_tensors,
    used_index,
    weight_files,
)
from layercut.models.config_files import add_older_names_
from layercut.models.layer_reader import DiskNames
from layercut.models.loading import load_config
from layercut.models.memory import slices
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
            words = f"{path} is not a file of this checkpoint: a link out of it, or no regular file"
            raise ModelError(words, "put the file itself in the place of the link, or take it out of the folder")
    weights = {INDEX, SINGLE, "config.json", *(file.name for file in weight_files(folder))}
    top = {path.relative_to(folder).parts[0] for path in wanted}
    left = sorted(p.name for p in folder.iterdir() if p.name not in weights | top and not p.name.startswith("."))
    return [path.relative_to(folder) for path in wanted], left


# --- what is written in place of each shard ---


class Output(NamedTuple):
    """A tensor to write: the bytes of one in a file, or bytes made when they are written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    content: Stored | Callable[[], bytes]


Jobs = list[tuple[dict[str, str], list[Output]]]
"""Of each shard: its metadata, and its tensors in the order the bytes lie in."""


def _planned(
    folder: Path, segments: Sequence[Segment], healed: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[Jobs, dict[str, Any]]:
    check_folder(folder)
    config = load_config(Checkpoint(str(folder), folder))
    plan = plan_cut(config, model_class(config), segments)
    stored = stored_tensors(folder)
    if index := used_index(folder):  # it must list exactly what its shards hold
        listed: dict[str, str] = read_json(index)["weight_map"]
        held = {name: entry.file.name for name, entry in stored.items()}
        for name in sorted(held.keys() - listed.keys()):
            words = f"{folder / INDEX} does not list {name}, which {held[name]} holds"
            raise ModelError(words, "fetch the index again")
        for name, stated in sorted(listed.items()):
            if held.get(name) != stated:
                raise ModelError(f"{stated} does not hold {name}, as {INDEX} says", "fetch the checkpoint again")
    names = new_names(list(stored), plan)
    raw = config_json(read_json(folder / "config.json"), config, plan)
    raw.pop("auto_map", None)  # names code that is left behind; the class is one of transformers' own
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    wanted = str(dtype).removeprefix("torch.")
    if wanted == str(own).removeprefix("torch."):
        dtype = None
    if dtype is not None:
        for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
            part.update(dict.fromkeys({"dtype", "torch_dtype"} & part.keys(), wanted))
        raw.pop("torch_dtype", None)
        raw["dtype"] = wanted
    before, homes = DiskNames(plan.before), dict[str, list[Stored]]()
    for entry in stored.values() if plan.edits else ():
        homes.setdefault(before.to_memory(entry.name), []).append(entry)

    def read(name: str) -> torch.Tensor:
        """A tensor by its name in memory before the cut; only where disk and memory hold the same tensor."""
        if len(found := homes.get(name, [])) != 1:
            why = f"{name} has to be changed, and the checkpoint stores it in {len(found)} pieces"
            raise SurgeryError(why, IN_MEMORY)
        return _tensor(found[0])

    placed = set[str]()

    def output(entry: Stored) -> Output:
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
    for file in weight_files(folder):
        kept = (entry for entry in stored.values() if entry.file == file and entry.name in names)
        with safe_open(file, framework="pt", backend="pread") as shard:
            metadata = shard.metadata() or {}
        jobs.append((metadata, [output(entry) for entry in sorted(kept, key=lambda entry: entry.start)]))
    if unplaced := sorted(healed.keys() - placed):
        words = f"the checkpoint stores {len(unplaced)} healed weights in another way than its class saves them"
        raise SurgeryError(f"{words} (first: {unplaced[0]})", IN_MEMORY)
    for name, shape in plan.added.items():
        _add_zeros_(jobs, dict(names.values()), name, shape)
    return jobs, raw


def _made(
    name: str, entry: Stored, shape: tuple[int, ...], dtype: torch.dtype | None, make: Callable[[], torch.Tensor]
) -> Output:
    found = FLOATS.get(entry.dtype)
    if found is not None and dtype is not None:
        found = dtype
    code = next((code for code, known in FLOATS.items() if known == found), entry.dtype)
    width = found.itemsize if found is not None else entry.size // prod(entry.shape)

    def content() -> bytes:
        return make().to("cpu", found).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return Output(name, code, shape, width * prod(shape), content)


def _tensor(entry: Stored) -> torch.Tensor:
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
    words = f"{config.model_type!r} is not a language model of this transformers"
    raise ModelError(words, "pip install -U transformers")


# --- names on disk and in memory ---
#
# Many checkpoints name their weights otherwise than the model does (`transformer.h.3` for `model.layers.3`, one tensor
# per expert for a fused one, two blocks for one layer). transformers maps disk names to memory; the inverse is found by
# trying: of the numbers in a disk name, the right ones to change are those that make it read as the wanted name.


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
        words = "the checkpoint's weights are packed in few bits, and are cut before they are rounded"
        raise ModelError(words, "cut the float checkpoint that it was made from, then layercut quantize the result")
    if lacked := before.lacking(keys):
        words = f"the checkpoint lacks {len(lacked)} weights that its config calls for (first: {lacked[0]})"
        raise ModelError(words, "fetch the checkpoint again; if it is complete, its config.json does not fit it")
    on_disk = [disk for disk, _ in found.values()]
    if missing := after.lacking(on_disk, [*plan.added]):
        words = f"the cut checkpoint would lack {len(missing)} weights of its class (first: {missing[0]})"
        raise SurgeryError(words, IN_MEMORY)
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


def write_shard(file: Path, outputs: Sequence[Output], metadata: dict[str, str]) -> None:
    """Write a safetensors file, with tensors in the order given: the header's length, the header in JSON, the data."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for out in outputs:
        place = [offset, offset + out.size]
        header[out.name] = {"dtype": out.dtype, "shape": list(out.shape), "data_offsets": place}
        offset += out.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for out in outputs:
            if not isinstance(out.content, Stored):
                target.write(out.content())
                continue
            with out.content.file.open("rb") as source:
                source.seek(out.content.start)
                for part in slices(out.size, CHUNK):
                    target.write(source.read(part.stop - part.start))
