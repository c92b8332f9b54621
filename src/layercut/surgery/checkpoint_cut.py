"""Cut layers out of a checkpoint folder without loading the model.

The plan is made on models without weights; then the byte ranges of the tensors that stay are copied under their new
names, shard by shard. Memory does not grow with the model, and the time is that of copying the files.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from layercut.errors import ModelError, SurgeryError
from layercut.files import appearing, read_json
from layercut.models.checkpoints import INDEX, SINGLE, Checkpoint, check_folder, used_index, weight_files
from layercut.models.config_files import add_older_names_
from layercut.models.decoder_stack import OTHER_TOWERS
from layercut.models.loading import load_config
from layercut.segments import Segment
from layercut.surgery import config_cut
from layercut.surgery.cut_plan import CutPlan, plan_cut
from layercut.surgery.safetensors_io import Entry, Output, Shard, read_shard, write_shard
from layercut.surgery.tensor_names import DiskNames, Names, new_names

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
        jobs = [(shard, outputs) for shard, outputs in jobs if outputs]
        weight_map: dict[str, str] = {}
        for number, (shard, outputs) in enumerate(jobs, start=1):
            name = SINGLE if len(jobs) == 1 else f"model-{number:05d}-of-{len(jobs):05d}.safetensors"
            write_shard(work / name, outputs, shard.metadata or {"format": "pt"})
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


def _planned(
    folder: Path, segments: Sequence[Segment], healed: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[list[tuple[Shard, list[Output]]], dict[str, Any]]:
    """What to write in place of each shard, in the order the bytes lie in, and config.json."""
    check_folder(folder)
    config = load_config(Checkpoint(str(folder), folder))
    plan = plan_cut(config, model_class(config), segments)
    shards = [read_shard(file) for file in weight_files(folder)]
    _check_index(folder, shards)
    names = new_names([key for shard in shards for key in shard.entries], plan)
    raw = config_json(read_json(folder / "config.json"), config, plan)
    raw.pop("auto_map", None)  # names code that is left behind; the class is one of transformers' own
    dtype = dtype if _declare_(raw, config, dtype) else None
    before, homes = DiskNames(plan.before), dict[str, list[Entry]]()
    for entry in (entry for shard in shards for entry in shard.entries.values()) if plan.edits else ():
        homes.setdefault(before.to_memory(entry.name), []).append(entry)

    def read(name: str) -> torch.Tensor:
        """A tensor by its name in memory before the cut; only where disk and memory hold the same tensor."""
        if len(found := homes.get(name, [])) != 1:
            raise SurgeryError(
                f"{name} has to be changed, and the checkpoint stores it in {len(found)} pieces",
                "load the model and cut it in memory instead",
            )
        return _tensor(found[0])

    placed = set[str]()

    def output(entry: Entry) -> Output:
        """The entry's bytes; or a healed weight, an edited or a converted one, made when its turn comes."""
        name, in_memory = names.on_disk[entry.name], names.in_memory[entry.name]
        for one in (name, in_memory):
            if one in healed and tuple(healed[one].shape) == entry.shape:
                placed.add(one)
                return _made(name, entry, entry.shape, dtype, partial(healed.__getitem__, one))
        if (edit := plan.edits.get(in_memory)) is not None:  # worked out twice rather than held until its turn comes
            return _made(name, entry, tuple(edit(read).shape), dtype, partial(edit, read))
        if dtype is not None and FLOATS.get(entry.dtype, dtype) != dtype:
            return _made(name, entry, entry.shape, dtype, partial(_tensor, entry))
        return Output(name, entry.dtype, entry.shape, entry.size, entry)

    jobs = []
    for shard in shards:
        kept = (entry for entry in shard.entries.values() if entry.name in names.on_disk)
        jobs.append((shard, [output(entry) for entry in sorted(kept, key=lambda entry: entry.start)]))
    if unplaced := sorted(healed.keys() - placed):
        raise SurgeryError(
            f"the checkpoint stores {len(unplaced)} healed weights in another way than its class saves them "
            f"(first: {unplaced[0]})",
            "load the model and cut it in memory instead",
        )
    for name, shape in plan.added.items():
        _add_zeros_(jobs, names, name, shape)
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


def _add_zeros_(jobs: list[tuple[Shard, list[Output]]], names: Names, name: str, shape: torch.Size) -> None:
    """A tensor of zeros that a new position calls for joins the shard of its nearest neighbour, in its dtype."""
    memory = {names.on_disk[key]: in_memory for key, in_memory in names.in_memory.items()}
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


# --- config.json ---


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


def config_json(raw: dict[str, Any], old: Any, plan: CutPlan) -> dict[str, Any]:
    """The config.json of the cut model: the source's, with what the cut changed.

    Facts that the source left to rules or defaults are written out. Where the patched file would not read as
    planned (an old rule in it wins over the new list), the whole config is written instead.
    """
    wanted = config_cut.reread(plan.config).to_dict()
    if isinstance(quantized := raw.get("quantization_config"), dict):
        raw = raw | {"quantization_config": _renamed(quantized, plan)}
    patched = _patched(raw, old.to_dict(), json.loads(plan.config.to_json_string(use_diff=False)))
    _cut_unkept_(patched, old.to_dict(), plan)
    try:
        if config_cut.read_as(type(old), json.dumps(patched)).to_dict() == wanted:
            return patched
    except SurgeryError:  # the class refuses the mixture of old and new facts
        pass
    whole = json.loads(plan.config.to_json_string(use_diff=True))
    for name in ("architectures", "model_type", "torch_dtype", "dtype", "quantization_config", "auto_map"):
        if name in raw:
            whole[name] = raw[name]
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
    for name in patched.keys() - old.keys():
        patched[name] = config_cut.cut_value(name, patched[name], plan.kept, plan.layers)
    for name, value in patched.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            _cut_unkept_(value, old[name], plan)


def _renamed(value: Any, plan: CutPlan) -> Any:
    """A quantization config with the modules renumbered that it lists by name (`modules_to_not_convert`, `ignore`)."""
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
