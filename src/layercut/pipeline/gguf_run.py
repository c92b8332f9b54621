"""Runs whose result is a GGUF file: what is checked before they begin, their sizes, and the stages that differ.

Beside `journey.py`. A model that was a .gguf file becomes one again: kept tensors byte for byte, healed ones in the
number formats of `--gguf-type` (`export/formats.py`). A checkpoint folder is converted when its run is done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from layercut.config import refuse
from layercut.config.commands import CompressConfig
from layercut.errors import ConfigError, RunError
from layercut.export.checkpoint import text_to_check
from layercut.export.formats import (
    AS_THEY_CAME,
    FINER,
    FLOATS,
    SAME,
    CutGguf,
    check_cut,
    healed_type,
    is_mixture,
    write_cut,
)
from layercut.export.gguf_check import speed_by_llama_cpp
from layercut.export.gguf_tensors import (
    PLAIN,
    architecture_of,
    check_converts,
    possible_names,
    require_llama_cpp,
    tensor_types,
)
from layercut.files import partial_of, replace_folder, writing
from layercut.layer_search import length_for_size
from layercut.layer_search.criteria import most_segments
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.gguf_header import block_of, open_gguf
from layercut.pipeline.artefacts import ExportArtefact, QuantizeArtefact
from layercut.pipeline.handover import say_gguf
from layercut.pipeline.run_context import QUANTIZED_GGUF, RunContext
from layercut.pipeline.run_folder import is_run
from layercut.progress import say
from layercut.registries import criteria
from layercut.segments import Segment

METADATA_GROWTH = 1024
"""Bytes that the metadata may grow by, beside 4 a layer for their index: the source's name, tags, padding."""


def keeps_gguf(config: CompressConfig, checkpoint: checkpoints.Checkpoint) -> bool:
    """Whether a run writes the .gguf file that its model was, without some layers."""
    return checkpoint.gguf is not None and config.output.format != "safetensors"


def check_output(config: CompressConfig, checkpoint: checkpoints.Checkpoint, *, chooses: bool = True) -> None:
    """Refuse options that do not go with the format of the result."""
    output, file, given = config.output, config.run.file, config.output.gguf_type
    gguf = keeps_gguf(config, checkpoint)
    packs = config.quantize.rounds or config.search.two_budgets
    flag = "--bits" if config.quantize.rounds else "--target-size with --max-loss"
    mends = f"{'' if config.search.target_size else '--gguf-type q4_k_m, or '}for a checkpoint folder: "
    refuse(
        (output.format == "gguf" and not (gguf or file), "--format gguf is given, and --out names no .gguf file",
         "--out NAME.gguf"),
        (output.format == "safetensors" and bool(file), f"--format safetensors is given, and --out is {file}",
         "name a folder, or leave out --format"),
        (bool(given) and not (gguf or file), "--gguf-type is given, and the result is a checkpoint folder",
         "--out NAME.gguf"),
        (packs and bool(gguf or file), f"{flag} packs weights for transformers and vLLM, and the result is a GGUF file",
         f"{'' if chooses else 'layercut compress: '}{mends}--format safetensors"),
    )  # fmt: skip
    if not (gguf or file):
        return
    if output.gguf_type and is_mixture(output.gguf_type):
        require_llama_cpp()
        if config.search.target_size:
            raise ConfigError(
                f"--target-size cannot be counted beforehand in the mixture {output.gguf_type}",
                "give --ratio, or leave out --gguf-type",
            )
    if gguf and output.gguf_type in (None, *AS_THEY_CAME) and (config.heal.fold or config.heal.tune_tokens):
        # nothing is healed before it is known that llama.cpp is there, where only it writes the healed layers' formats
        tensors, kind = open_gguf(checkpoint.file)[1].tensors, type_of_healed(config)
        within = {one.tensor_type.name.lower() for one in tensors if block_of(one.name) is not None}
        if any(healed_type(kind, came) not in PLAIN for came in within):
            require_llama_cpp()
    if not gguf and output.gguf_type in AS_THEY_CAME:
        raise ConfigError(
            f"--gguf-type {output.gguf_type} is given, and MODEL is in no number format of GGUF",
            "give another, or leave it out for q8_0",
        )
    folder = config.run.folder
    if file and file.exists() and not config.run.force and not (folder and is_run(folder)):
        raise RunError(f"--out {file} exists", "name another file, or pass --force to replace it")
    if not gguf:
        check_converts(checkpoint.folder)


def type_of_healed(config: CompressConfig) -> str:
    """What --gguf-type means: where it is not given, one step finer, but where bytes are short.

    Of a --target-size the bytes are better spent on a layer more.
    """
    return config.output.gguf_type or (SAME if config.search.target_size else FINER)


def check_names(config: CompressConfig, checkpoint: checkpoints.Checkpoint, architecture: Any) -> None:
    """Refuse, before anything is healed, a file whose layers could not be written back once they are tuned."""
    if not keeps_gguf(config, checkpoint) or not config.heal.tune_tokens:
        return
    kind, bare = architecture_of(checkpoint.file), loading.skeleton(architecture, torch.float32)
    names, layers = possible_names(bare, kind), f"{decoder_stack.find_decoder(bare).path}."
    nameless = [name for name, known in names.items() if known is None and name.startswith(layers)]
    if nameless:
        raise ConfigError(
            f"tuned layers of a {kind} file cannot be written back: llama.cpp has no single tensor for {nameless[0]}",
            "for a checkpoint folder: --format safetensors; or without tuning: --tune-tokens 0",
        )


class BlockBytes(NamedTuple):
    """Bytes of a .gguf file, of each block, and what a block grows by where it is healed."""

    whole: int
    blocks: list[int]
    growth: list[int]


def bytes_by_block(config: CompressConfig, checkpoint: checkpoints.Checkpoint) -> BlockBytes:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header, reader = open_gguf(checkpoint.file, as_loaded=True)
    blocks, growth = [0] * header.layers, [0] * header.layers
    kind = type_of_healed(config)
    for tensor in reader.tensors:
        block = block_of(tensor.name)
        if block is None or block >= header.layers:
            continue
        size = int(tensor.n_bytes)
        blocks[block] += size
        if kind != SAME and len(tensor.shape) > 1:
            becomes = healed_type(kind, tensor.tensor_type.name.lower())
            per_block, packed = GGML_QUANT_SIZES[GGMLQuantizationType[becomes.upper()]]
            growth[block] += max(0, int(tensor.n_elements) // per_block * packed - size)
    aligned = (-(-int(tensor.n_bytes) // reader.alignment) * reader.alignment for tensor in reader.tensors)
    return BlockBytes(int(reader.data_offset) + sum(aligned), blocks, growth)


def length_for_target(config: CompressConfig, checkpoint: checkpoints.Checkpoint, target: int) -> int:
    """Layers to remove for --target-size, counted from the tensors of the .gguf file."""
    file, search, radius = bytes_by_block(config, checkpoint), config.search, config.heal.radius
    dearest, criterion, layers = sorted(file.growth, reverse=True), criteria.get(search.method), len(file.blocks)

    def beside(n: int) -> int:
        segments = most_segments(criterion, search.num_segments, n)
        return sum(dearest[: min(2 * radius * segments, layers - n)])

    if target >= file.whole:
        return length_for_size(file.blocks, file.whole, target)  # which refuses it: the file is as small already
    return length_for_size(file.blocks, file.whole + METADATA_GROWTH + 4 * layers, target, beside=beside)


# --- the stages ---


def cut_of(work: RunContext, segments: Sequence[Segment]) -> CutGguf:
    """The run's .gguf file without segments, and what healing changed."""
    healed = work.changed(work.student(segments, "folded", "tuned"))
    return CutGguf(checkpoint=work.checkpoint, segments=[*segments], healed=healed)


def quantize(work: RunContext, segments: Sequence[Segment]) -> QuantizeArtefact:
    """The .gguf file of the healed student, its tensors rounded as they will be in the result."""
    kind = type_of_healed(work.config)
    inputs = [kind, work.text["calibration"]]
    with work.run.stage(QuantizeArtefact, "quantize", inputs, after=["heal"]) as stage:
        if stage.open:
            file, student = work.run / QUANTIZED_GGUF, work.student(segments, "folded", "tuned")
            file.unlink(missing_ok=True)
            source = cut_of(work, segments)
            written = write_cut(source, file, kind, student, work.blocks["calibration"])
            written["rounded"] = sorted(
                name
                for name, p in student.named_parameters()
                if name in source.healed or (is_mixture(kind) and p.dim() > 1)
            )
            stage.found = QuantizeArtefact(bits=16, layers=[], gguf=written)
            stage.files = [QUANTIZED_GGUF]
    found = stage.artefact.gguf or {}
    if found["rounded"]:
        how = f", {found['importance']} with an importance matrix" if found["importance"] else ""
        say("quantize", f"{len(found['rounded'])} tensors written again ({found['kind']}{how}), the others kept")
    return stage.artefact


def export(work: RunContext, segments: Sequence[Segment]) -> ExportArtefact:
    """Compare the .gguf file with the healed student in transformers and llama.cpp, and put it into its place.

    It is called as --out names it, else after the source.
    """
    used, named = work.verified_on, work.config.run.file
    name = named.name if named else f"{Path(work.checkpoint.gguf or 'model').stem}-cut.gguf"
    with work.run.stage(ExportArtefact, "export", [work.text[used], name], after=["quantize"]) as stage:
        if stage.open:
            file = work.run / QUANTIZED_GGUF
            facts = check_cut(cut_of(work, segments), file, text_to_check(work.blocks[used]))
            partial = partial_of(work.run / "model")
            shutil.rmtree(partial, ignore_errors=True)
            with writing(partial):
                partial.mkdir()
                put(file, partial / name)
                replace_folder(partial, work.run / "model")
            if theirs := facts["again"]["llama_cpp"]:
                theirs["speed"] = speed_by_llama_cpp(work.checkpoint.file, file)
            kinds = (kind for kind in tensor_types(work.checkpoint.file) if kind not in FLOATS)
            facts |= {"tensor_types": tensor_types(file), "file": name, "bytes": file.stat().st_size}
            facts["source_type"] = next(kinds, None)
            written = (work.run.artefact(QuantizeArtefact, "quantize").gguf or {}) | facts
            stage.found = ExportArtefact(bytes=written["bytes"], check={}, gguf=written)
            stage.files = ["model"]
    say_gguf(stage.artefact.gguf or {}, f": {work.run / 'model' / name}")
    return stage.artefact


def put(source: Path, target: Path) -> None:
    """Have a file under a second name: the same bytes on disk where that can be, else a copy."""
    partial = partial_of(target)
    with writing(target):
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, partial)
        partial.replace(target)
