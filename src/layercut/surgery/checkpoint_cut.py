"""Cut layers out of a checkpoint folder without loading the model.

The plan is made on models without weights; then the byte ranges of the tensors that stay are copied under
their new names, shard by shard. Memory does not grow with the model, and the time is that of copying the
files.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from layercut.errors import ModelError, SurgeryError
from layercut.files.writing import appearing
from layercut.models.checkpoints import INDEX, SINGLE, Checkpoint, check_folder, read_json, used_index, weight_files
from layercut.models.decoder_stack import OTHER_TOWERS
from layercut.models.loading import load_config
from layercut.models.older_names import add_older_names_
from layercut.segments import Segment
from layercut.surgery import config_cut
from layercut.surgery.cut_plan import CutPlan, Read
from layercut.surgery.planning import plan_cut
from layercut.surgery.safetensors_io import Entry, Output, Shard, read_shard, write_shard
from layercut.surgery.tensor_names import DiskNames, in_reading_order, layer_of, renumbered

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


def cut_checkpoint(
    folder: Path,
    segments: Sequence[Segment],
    out: Path,
    *,
    force: bool = False,
    healed: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write to `out` the checkpoint in `folder` without the layers of `segments`.

    Weights are copied as byte ranges (a tensor is read only where its values change), config and index rewritten,
    `COMPANIONS` copied. `out` appears at the end, whole; the source is only read.
    """
    folder, out = Path(folder).resolve(), Path(out)
    beside, left = companions(folder)
    jobs, raw = _planned(folder, segments, healed or {}, dtype)
    need = sum(out.size for _, outputs in jobs for out in outputs)
    with appearing(out, force=force, need=need, source=folder) as work:
        for path in beside:
            (work / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / path, work / path)
        (work / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        add_older_names_(work)
        _write(work, [(shard, outputs) for shard, outputs in jobs if outputs], folder)
    return left


def check_checkpoint_cut(folder: Path, segments: Sequence[Segment], healed: Mapping[str, torch.Tensor]) -> None:
    """Raise what `cut_checkpoint` would for this cut and weights of these names; no tensor is read."""
    _planned(folder, segments, healed, None)


def _planned(
    folder: Path, segments: Sequence[Segment], healed: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[list[tuple[Shard, list[Output]]], dict[str, Any]]:
    """What to write in place of each shard, and config.json."""
    check_folder(folder)
    config = load_config(Checkpoint(str(folder), folder))
    plan = plan_cut(config, model_class(config), segments)
    shards = [read_shard(file) for file in weight_files(folder)]
    _check_index(folder, shards)
    names = _new_names([key for shard in shards for key in shard.entries], plan)
    read = _reader(shards, DiskNames(plan.before)) if plan.edits else None
    raw = config_json(read_json(folder / "config.json"), config, plan)
    raw.pop("auto_map", None)  # names code that is left behind; the class is one of transformers' own
    changes = Changes(plan, read, healed, dtype if _declare_(raw, config, dtype) else None)
    jobs = [(shard, _outputs(shard, names, changes)) for shard in shards]
    if unplaced := sorted(healed.keys() - changes.placed):
        raise SurgeryError(
            f"the checkpoint stores {len(unplaced)} healed weights in another way than its class saves them "
            f"(first: {unplaced[0]})",
            "load the model and cut it in memory instead",
        )
    return _with_added(jobs, names, plan), raw


def _declare_(raw: dict[str, Any], config: Any, dtype: torch.dtype | None) -> bool:
    """Have config.json name this dtype."""
    text = config.get_text_config()
    stored = str(getattr(config, "dtype", None) or getattr(text, "dtype", None)).removeprefix("torch.")
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name == stored:
        return False
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = name
    raw.pop("torch_dtype", None)
    raw["dtype"] = name
    return True


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


def _check_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index must list exactly what its shards hold."""
    if not (index := used_index(folder)):
        return
    listed: dict[str, str] = read_json(index)["weight_map"]
    held = {name: shard.file.name for shard in shards for name in shard.entries}
    for name in sorted(held.keys() - listed.keys()):
        raise ModelError(f"{folder / INDEX} does not list {name}, which {held[name]} holds", "fetch the index again")
    for name, file in sorted(listed.items()):
        if held.get(name) != file:
            raise ModelError(f"{file} does not hold {name}, as {INDEX} says", "fetch the checkpoint again")


# --- which tensor goes where ----------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Names of the kept tensors: by old disk name, the new disk name and the new name in memory."""

    on_disk: dict[str, str]
    in_memory: dict[str, str]


def _new_names(keys: Sequence[str], plan: CutPlan) -> Names:
    """Decide for every tensor on disk whether it stays, and under which name."""
    before, after = DiskNames(plan.before), DiskNames(plan.after)
    place = {old: new for new, old in enumerate(plan.kept)}
    layers = len(plan.before.get_submodule(plan.path))
    on_disk: dict[str, str] = {}
    in_memory: dict[str, str] = {}
    gone: dict[str, str] = {}
    for key in in_reading_order(keys):
        name = before.to_memory(key)
        where = before.layer(key, plan.stacks)
        if where is None:
            on_disk[key], in_memory[key] = key, after.to_memory(key)
        elif where[1] in place:
            wanted = plan.rename(name) or name
            if wanted in plan.dropped:
                continue
            new = place[where[1]]
            wanted = wanted if name in before.known or wanted != name else _unprefixed(name, where, new)
            on_disk[key], in_memory[key] = renumbered(key, where[1], new, after, wanted), wanted
        elif where[1] < layers:
            gone[name] = key
    _move_shared(gone, on_disk, in_memory, plan, after)
    _check_names(before, after, keys, on_disk, plan)
    if len(set(on_disk.values())) != len(on_disk):
        raise SurgeryError("two weights would get the same name on disk", "load the model and cut it in memory instead")
    return Names(on_disk, in_memory)


def _unprefixed(name: str, where: tuple[str, int], new: int) -> str:
    """A name the class does not know, which lacks the base model's prefix (GPT-2's old masks `h.0.attn.bias`)."""
    short = where[0].partition(".")[2]
    return re.sub(rf"^{re.escape(short)}\.\d+(?=\.|$)", f"{short}.{new}", name)


def _move_shared(
    gone: dict[str, str], on_disk: dict[str, str], in_memory: dict[str, str], plan: CutPlan, after: DiskNames
) -> None:
    """Keep weights that removed layers share with kept ones, under a kept layer's name.

    Weights shared between layers are stored under one of them; if that one is removed, another takes them over (Zamba).
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in plan.before.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    there = set(in_memory.values())
    for name, key in gone.items():
        shared = next((names for names in owners.values() if name in names), [])
        heirs = [heir for other in shared if (heir := plan.rename(other)) is not None]
        if not heirs or there & set(heirs):
            continue
        old, new = (layer_of(weight, plan.stacks) for weight in (name, heirs[0]))
        if old is None or new is None:
            continue
        on_disk[key], in_memory[key] = renumbered(key, old, new, after, heirs[0]), heirs[0]


def _check_names(
    before: DiskNames, after: DiskNames, keys: Sequence[str], on_disk: dict[str, str], plan: CutPlan
) -> None:
    """Every weight that the model calls for must be there, before the cut and after it."""
    had = {name for key in keys for name in before.all_in_memory(key)}
    have = {name for key in on_disk.values() for name in after.all_in_memory(key)} | set(plan.added)
    if any(key.endswith(".weight_packed") for key in keys):
        raise ModelError(
            "the checkpoint's weights are packed in few bits, and are cut before they are rounded",
            "cut the float checkpoint that it was made from, then layercut quantize the result",
        )
    if lacked := [n for n in sorted(before.known.keys() - _with_aliases(had, plan.before)) if not before.may_lack(n)]:
        raise ModelError(
            f"the checkpoint lacks {len(lacked)} weights that its config calls for (first: {lacked[0]})",
            "fetch the checkpoint again; if it is complete, its config.json does not fit it",
        )
    missing = [n for n in sorted(after.known.keys() - _with_aliases(have, plan.after)) if not after.may_lack(n)]
    if missing:
        raise SurgeryError(
            f"the cut checkpoint would lack {len(missing)} weights of its class (first: {missing[0]})",
            "load the model and cut it in memory instead",
        )


def _with_aliases(names: set[str], model: Any) -> set[str]:
    """The names, and those of tensors that the model ties to them."""
    aliases: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(name)
    return names.union(*(group for group in aliases.values() if group & names))


@dataclass(frozen=True)
class Changes:
    """What tensors are written otherwise than they were."""

    plan: CutPlan
    read: Read | None
    healed: Mapping[str, torch.Tensor]
    dtype: torch.dtype | None
    """Dtype to convert floating-point tensors to."""
    placed: set[str] = field(default_factory=set)
    """Names of healed weights that have found their place."""


def _outputs(shard: Shard, names: Names, changes: Changes) -> list[Output]:
    """What to write in place of one shard, in the order the bytes lie in."""
    outputs = []
    for entry in sorted(shard.entries.values(), key=lambda e: e.start):
        if entry.name in names.on_disk:
            output = _output(shard, entry, names, changes)
            outputs.append(output)
    return outputs


def _output(shard: Shard, entry: Entry, names: Names, changes: Changes) -> Output:
    """The entry's bytes; or a healed weight, an edited or a converted one, made when its turn comes."""
    name, in_memory = names.on_disk[entry.name], names.in_memory[entry.name]
    for healed in (name, in_memory):
        if healed in changes.healed and tuple(changes.healed[healed].shape) == entry.shape:
            changes.placed.add(healed)
            return _made(name, entry, entry.shape, changes, partial(changes.healed.__getitem__, healed))
    edit, read = changes.plan.edits.get(in_memory), changes.read
    if edit is not None and read is not None:
        # worked out twice rather than held until its turn comes
        return _made(name, entry, tuple(edit(read).shape), changes, partial(edit, read))
    if changes.dtype is not None and entry.dtype in FLOATS and FLOATS[entry.dtype] != changes.dtype:
        return _made(name, entry, entry.shape, changes, partial(_read_tensor, shard.file, entry.name))
    return Output(name, entry.dtype, entry.shape, entry.size, source=entry)


def _made(
    name: str, entry: Entry, shape: tuple[int, ...], changes: Changes, make: Callable[[], torch.Tensor]
) -> Output:
    """A tensor in the dtype of the entry whose place it takes, or in the one wanted."""
    dtype = FLOATS.get(entry.dtype)
    if dtype is not None and changes.dtype is not None:
        dtype = changes.dtype
    code = next((code for code, known in FLOATS.items() if known == dtype), entry.dtype)
    width = dtype.itemsize if dtype is not None else entry.size // prod(entry.shape)
    return Output(name, code, shape, width * prod(shape), make=lambda: _bytes(make().to("cpu", dtype)))


def _read_tensor(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt", backend="pread") as stream:
        return stream.get_tensor(name)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _reader(shards: Sequence[Shard], before: DiskNames) -> Read:
    """Read a tensor by its name in memory before the cut; only where disk and memory hold the same tensor."""
    homes: dict[str, list[tuple[Path, str]]] = {}
    for shard in shards:
        for key in shard.entries:
            homes.setdefault(before.to_memory(key), []).append((shard.file, key))

    def read(name: str) -> Any:
        from safetensors import safe_open

        found = homes.get(name, [])
        if len(found) != 1:
            raise SurgeryError(
                f"{name} has to be changed, and the checkpoint stores it in {len(found)} pieces",
                "load the model and cut it in memory instead",
            )
        with safe_open(found[0][0], framework="pt", backend="pread") as stream:
            return stream.get_tensor(found[0][1])

    return read


def _with_added(
    jobs: list[tuple[Shard, list[Output]]], names: Names, plan: CutPlan
) -> list[tuple[Shard, list[Output]]]:
    """Tensors of zeros that a new position calls for join the shard of a neighbour, in its dtype."""
    for name, shape in plan.added.items():
        module = name.rpartition(".")[0]
        neighbour = _neighbour(jobs, names, module)
        if neighbour is None:
            raise SurgeryError(f"the cut model calls for {name}, and no weight beside it was found on disk")
        outputs, beside, memory = neighbour
        disk = beside.name.replace(memory, name) if memory in beside.name else name
        width = beside.size // max(prod(beside.shape), 1)
        size = prod(shape) * width
        outputs.append(Output(disk, beside.dtype, tuple(shape), size, make=partial(bytes, size)))
    return jobs


def _neighbour(jobs: Any, names: Names, module: str) -> tuple[list[Output], Output, str] | None:
    memory = {names.on_disk[key]: name for key, name in names.in_memory.items()}
    while module:
        for _, outputs in jobs:
            for output in outputs:
                if memory.get(output.name, "").startswith(module + "."):
                    return outputs, output, memory[output.name]
        module = module.rpartition(".")[0]
    return None


# --- writing --------------------------------------------------------------------------------------


def _write(work: Path, jobs: list[tuple[Shard, list[Output]]], folder: Path) -> None:
    single = len(jobs) == 1
    weight_map: dict[str, str] = {}
    for number, (shard, outputs) in enumerate(jobs, start=1):
        name = SINGLE if single else f"model-{number:05d}-of-{len(jobs):05d}.safetensors"
        write_shard(work / name, shard.file, outputs, shard.metadata or {"format": "pt"})
        weight_map |= {output.name: name for output in outputs}
    if not single:
        listed = used_index(folder)
        old = read_json(listed) if listed else {}
        outputs = [output for _, some in jobs for output in some]
        metadata = dict(old.get("metadata") or {}) | {"total_size": sum(o.size for o in outputs)}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(prod(o.shape) for o in outputs)
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def companions(folder: Path, patterns: Sequence[str] = COMPANIONS) -> tuple[list[Path], list[str]]:
    """Paths below a folder of the files to copy, and the names of those that are not copied, weights and config
    aside.
    """
    wanted = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    for path in wanted:
        if not _belongs(path, folder):
            raise ModelError(
                f"{path} is not a file of this checkpoint: a link out of it, or no regular file",
                "put the file itself in the place of the link, or take it out of the folder",
            )
    weights = {INDEX, SINGLE, "config.json", *(file.name for file in weight_files(folder))}
    top = {path.relative_to(folder).parts[0] for path in wanted}
    left = sorted(p.name for p in folder.iterdir() if p.name not in weights | top and not p.name.startswith("."))
    return [path.relative_to(folder) for path in wanted], left


def _belongs(path: Path, folder: Path) -> bool:
    """Whether a path leads to a regular file in the folder, or in the Hub's cache in the same repository's blobs."""
    target = path.resolve()
    home = folder
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        home = folder.parent.parent
    try:
        return target.is_relative_to(home) and stat.S_ISREG(target.stat().st_mode)
    except OSError:
        return False


# --- config.json ----------------------------------------------------------------------------------


def config_json(raw: dict[str, Any], old: Any, plan: CutPlan) -> dict[str, Any]:
    """The config.json of the cut model: the source's, with what the cut changed.

    Facts that the source left to rules or defaults are written out. Where the patched file would not read as
    planned (an old rule in it wins over the new list), the whole config is written instead.
    """
    wanted = config_cut.reread(plan.config).to_dict()
    patched = _patched(raw, old.to_dict(), json.loads(plan.config.to_json_string(use_diff=False)))
    _cut_unkept_(patched, old.to_dict(), plan)
    _quantization_names_(patched, plan)
    try:
        if config_cut.read_as(type(old), json.dumps(patched)).to_dict() == wanted:
            return patched
    except SurgeryError:  # the class refuses the mixture of old and new facts
        pass
    whole = json.loads(plan.config.to_json_string(use_diff=True))
    for name in ("architectures", "model_type", "torch_dtype", "dtype", "quantization_config", "auto_map"):
        if name in raw:
            whole[name] = raw[name]
    _quantization_names_(whole, plan)
    return whole


def _patched(raw: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    result = dict(raw)
    old = json.loads(json.dumps(old, default=str))
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(raw.get(name), dict) and isinstance(old.get(name), dict):
            result[name] = _patched(raw[name], old[name], value)
        elif old.get(name) != value or name == "original_layer_index":
            result[name] = value
    for name in old.keys() - new.keys():
        result.pop(name, None)
    return result


def _cut_unkept_(patched: dict[str, Any], old: dict[str, Any], plan: CutPlan) -> None:
    """Cut what config.json says of the layers under names that the class reads and does not keep.

    Nemotron-H's `hybrid_override_pattern` is one. Other engines read them too.
    """
    layers = len(plan.before.get_submodule(plan.path))
    for name in patched.keys() - old.keys():
        patched[name] = config_cut.cut_value(name, patched[name], plan.kept, layers)
    for name, value in patched.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            _cut_unkept_(value, old[name], plan)


def _quantization_names_(config: dict[str, Any], plan: CutPlan) -> None:
    """Renumber the modules that a quantization config lists by name (`modules_to_not_convert`, `ignore`)."""
    if isinstance(config.get("quantization_config"), dict):
        config["quantization_config"] = _renamed(config["quantization_config"], plan)


def _renamed(value: Any, plan: CutPlan) -> Any:
    if isinstance(value, dict):
        pairs = {_renamed(k, plan): _renamed(v, plan) for k, v in value.items()}
        return {k: v for k, v in pairs.items() if k is not None}
    if isinstance(value, list):
        return [new for item in value if (new := _renamed(item, plan)) is not None]
    if isinstance(value, str) and (found := re.search(r"(^|\.)(layers|h|blocks)\.(\d+)(?=\.|$)", value)):
        if any(tower in value[: found.start(3)] for tower in OTHER_TOWERS):
            return value  # of images or sound: its layers all stay
        old = int(found[3])
        if old not in plan.kept:
            return None
        return f"{value[: found.start(3)]}{plan.kept.index(old)}{value[found.end(3) :]}"
    if isinstance(value, str) and value.startswith(("re:", "+:", "-:")) and re.search(r"\d", value):
        raise SurgeryError(
            f"the quantization config picks layers by the pattern {value!r}, which cannot be renumbered",
            "cut first, then quantize",
        )
    return value
