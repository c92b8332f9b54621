"""What a run is asked to do, checked once and in one place, before anything is loaded or written.

`resolve` turns a model's name and a configuration into a `ResolvedRun`; from there on nothing is checked again. Beside
`journey.py`, which begins with it; `plan/` and `compare.py` use its parts.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from layercut import evaluation
from layercut.config import SearchConfig, check_window, consumer_names, refuse
from layercut.config.commands import CompressConfig
from layercut.data.probe_families import capability_names
from layercut.data.sources import check_sources
from layercut.distributed import processes
from layercut.errors import ConfigError, ModelError
from layercut.export import engines
from layercut.export.formats import AS_THEY_CAME, FINER, SAME, healed_type, is_mixture
from layercut.export.gguf_tensors import PLAIN, architecture_of, check_converts, possible_names, require_llama_cpp
from layercut.files import check_new, is_run
from layercut.healing.lora import check_lora
from layercut.layer_search import length_for_size
from layercut.layer_search.criteria import most_segments, names
from layercut.models import checkpoints, decoder_stack, loading, placement
from layercut.models.gguf_header import block_of, open_gguf
from layercut.quantization import bit_choice
from layercut.quantization.packing import saved_bytes
from layercut.registries import criteria
from layercut.segments import Segment, checked_segments, layers_to_remove

METADATA_GROWTH = 1024
"""Bytes that the metadata may grow by, beside 4 a layer for their index: the source's name, tags, padding."""
ENOUGH_TOKENS = 65536
"""To tune on: from here on a share of them heals a shortlist of candidates, and their rows are long."""
LONG_ROW = 1024  # tokens in a long row to tune on: perplexity was 2 to 7 % lower than by rows of 256 alone (measured)
Stage = Literal["search", "tune", "report"]
"""How far a run goes: until the segments are known, the model is healed, or all is measured and reported."""


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run that can begin: everything that the config and the checkpoint's headers show has been checked."""

    checkpoint: checkpoints.Checkpoint
    architecture: Any  # the model's config
    config: CompressConfig  # with the windows that are tuned and reported on filled in
    spread: bool  # whether the weights are sharded over several processes
    shortlist: bool  # whether candidates are healed for a while before one is chosen: what is found depends on it
    shortlist_now: bool  # the same; not where the model is not whole in memory this time


def resolve(model: str, config: CompressConfig, until: Stage) -> ResolvedRun:
    """Check a configuration against a model's config and headers."""
    config.check()
    capability_names(config.search.preserve)
    if until == "search" and config.search.two_budgets:
        raise ConfigError("--target-size with --max-loss is measured after healing", "use tune or compress")
    checkpoint = checkpoints.resolve(model, allow_pickle=config.load.allow_pickle)
    architecture = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window("--window", config.text.window, decoder_stack.positions(architecture))
    config = with_windows(with_defaults(config), architecture)
    layers = decoder_stack.count_layers(architecture)
    wanted, length = checked_segments(config.search.segments, layers), wanted_length(config.search, layers)
    check_output(config, checkpoint, chooses=until == "report")
    if until != "search":
        check_names(config, checkpoint, architecture)
    check_target(config, checkpoint, architecture)
    check_consumers(config, architecture, wanted, length, gguf=keeps_gguf(config, checkpoint))
    if until == "report":  # a run that ends before reports on nothing
        check_sources(config)
    loading.pick_device(config.load.device)
    spread = placement.place_of(checkpoint, **asdict(config.load)) == "processes"
    alone = placement.place_of(checkpoint, alone=True, **asdict(config.load))
    on_disk = bool(processes.most(alone == "disk"))  # in one, in all
    shortlist = until != "search" and shortlists(config)
    if spread:
        check_spread(config)
    if until != "search" and on_disk:
        check_streamed(config, spread)
    if until != "search" and config.heal.tokens and config.heal.train == "lora":
        check_lora(loading.skeleton(architecture, torch.float32))
    if config.tasks.names and until == "report":
        evaluation.check_tasks(tuple(config.tasks.names), config.tasks.include_path)
    if until == "report":
        evaluation.named(config.tasks.evaluation_names)  # a package that cannot be imported is refused now
    return ResolvedRun(
        checkpoint=checkpoint, architecture=architecture, config=config, spread=spread, shortlist=shortlist,
        shortlist_now=shortlist and not (spread or on_disk),
    )  # fmt: skip


def shortlists(config: CompressConfig) -> bool:
    """Whether a run heals candidates for a while: where the search weighs probes and enough is tuned on to spare."""
    search, heal = config.search, config.heal
    weighs = search.preserve != "none" and names(criteria.get(search.method), "probes")
    enough = heal.fold and heal.tokens >= ENOUGH_TOKENS
    return bool(enough and weighs and search.effort != "low" and not search.segment and search.max_loss is None)


def wanted_length(search: SearchConfig, layers: int) -> int | None:
    """How many layers the user wants removed."""
    if search.ratio is None:
        return None
    return layers_to_remove(search.ratio, layers) if search.ratio else 0


def check_target(config: CompressConfig, checkpoint: checkpoints.Checkpoint, architecture: Any) -> None:
    """Refuse a --target-size that no number of layers meets, or with --bits auto no bits, by the config alone.

    With --max-loss the bits count as well, which is known only by measuring. A class that cannot be built without its
    own code is counted when it is loaded.
    """
    if not config.search.target_bytes or config.search.two_budgets:
        return
    if keeps_gguf(config, checkpoint):
        length_for_target(config, checkpoint, config.search.target_bytes)
        return
    stored = loading.pick_dtype(config.load.dtype, architecture, checkpoint)
    try:
        bare = loading.skeleton(architecture, stored)
    except ModelError:
        return
    target = config.search.target_bytes
    if config.quantize.bits != "auto":
        length_for_saved_size(config, bare, stored)
    elif config.shares_size:
        bit_choice.numbers_left_open(bare, config.quantize, target)
    else:
        layers = len(decoder_stack.find_decoder(bare))
        cut = sum(map(len, config.search.segments)) or wanted_length(config.search, layers) or 0
        bit_choice.check_target(bare, config.quantize, target, without=cut)


def length_for_saved_size(config: CompressConfig, model: Any, dtype: torch.dtype) -> int:
    """Layers to remove for --target-size of a checkpoint folder, in the bits that it is saved in."""
    saved = saved_bytes(model, config.quantize, dtype)
    what = f"the model's weights in {config.quantize.bits} bits" if config.quantize.rounds else "the model's weights"
    return length_for_size(saved.layers, saved.total, config.search.target_bytes, what)


def check_consumers(
    config: CompressConfig, architecture: Any, wanted: list[Segment], length: int | None, *, gguf: bool
) -> None:
    """Refuse what the consumers of --for would misread."""
    names = consumer_names(config.search.consumers)
    written: engines.Written = "gguf" if gguf else engines.written_by(config.quantize)
    engines.check_cut(architecture, wanted, names, written)
    if names and length:
        engines.restriction(architecture, names, length)


def check_spread(config: CompressConfig) -> None:
    """Refuse what cannot be done over weights that are sharded over several processes."""
    search, mends = config.search, "where the model fits each process's memory: --place memory"
    refused = {
        "--target-size with --max-loss": search.two_budgets,
        "--bits auto": config.quantize.bits == "auto",
        "--method taylor": search.method == "taylor",
        "--train lora": config.heal.train == "lora",
    }
    why = "needs a whole model in every process, and its weights are sharded over them"
    refuse(*((asked, f"{flag} {why}", f"leave out {flag}; {mends}") for flag, asked in refused.items()))


def check_streamed(config: CompressConfig, spread: bool) -> None:
    """Refuse what a run cannot do whose layers are left on disk; before anything long is run."""
    for flag in needing_memory(config):
        raise needs_memory(flag)
    if processes.world() > 1 and not spread:
        raise ConfigError(
            f"{processes.world()} processes would heal a model whose layers are left on disk, each reading all of them",
            "start one process; search and evaluate share their work; with enough memory: --place memory",
        )


def needing_memory(config: CompressConfig) -> list[str]:
    """The flags that are given and need the model in memory."""
    tasks = config.tasks
    asked = {
        "--bits": config.quantize.rounds, "--tasks": bool(tasks.names), "--evaluations": bool(tasks.evaluation_names),
        "--probes": tasks.probes, "--long-context": config.evaluate.long_context > 0,
        "--target-size with --max-loss": config.search.two_budgets,
        f"--train {config.heal.train}": config.heal.train != "endpoints",
    }  # fmt: skip
    return [flag for flag, is_asked in asked.items() if is_asked]


def needs_memory(flag: str) -> ConfigError:
    """The refusal of a flag where layers are left on disk."""
    hint = f"leave out {flag}; with enough memory: --place memory"
    return ConfigError(f"{flag} needs the model in memory, and its layers are left on disk", hint)


def with_defaults(config: CompressConfig) -> CompressConfig:
    """The config with the effort and the tokens to tune on filled in."""
    search, heal = config.search, config.heal
    search, heal = replace(search, effort=search.effort or "normal"), replace(heal, tune_tokens=heal.tokens)
    return replace(config, search=search, heal=heal)


def with_windows(config: CompressConfig, architecture: Any) -> CompressConfig:
    """The config with the windows that are tuned on and that perplexity is reported on filled in."""
    reported, heal = config.evaluate.eval_window or decoder_stack.reported_window(architecture), config.heal
    positions = decoder_stack.positions(architecture)
    fits = (positions or LONG_ROW) >= LONG_ROW and heal.tokens >= ENOUGH_TOKENS
    long = min(LONG_ROW, heal.batch_tokens) if fits else 0
    short = config.text.window
    tuned = heal.tune_window or max(short, long // short * short)
    check_window("--eval-window", reported, positions)
    evaluate, heal = replace(config.evaluate, eval_window=reported), replace(heal, tune_window=tuned)
    return replace(config, evaluate=evaluate, heal=heal)


def default_folder(model: str) -> Path:
    """runs/NAME, from the last part of the model's name."""
    name = Path(model).name
    if hub_file := checkpoints.HUB_FILE.fullmatch(model):
        name = Path(hub_file[2]).name
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", name.removesuffix(".gguf")).strip(".-") or "run")


# --- where a .gguf file is written ---


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
            words = f"--target-size cannot be counted beforehand in the mixture {output.gguf_type}"
            raise ConfigError(words, "give --ratio, or leave out --gguf-type")
    if gguf and output.gguf_type in (None, *AS_THEY_CAME) and (config.heal.fold or config.heal.tokens):
        # nothing is healed before it is known that llama.cpp is there, where only it writes the healed layers' formats
        tensors, kind = open_gguf(checkpoint.file)[1].tensors, type_of_healed(config)
        within = {one.tensor_type.name.lower() for one in tensors if block_of(one.name) is not None}
        if any(healed_type(kind, came) not in PLAIN for came in within):
            require_llama_cpp()
    if not gguf and output.gguf_type in AS_THEY_CAME:
        words = f"--gguf-type {output.gguf_type} is given, and MODEL is in no number format of GGUF"
        raise ConfigError(words, "give another, or leave it out for q8_0")
    folder = config.run.folder
    if file and not (folder and is_run(folder)):
        check_new(file, config.run.force)
    if not gguf:
        check_converts(checkpoint.folder)


def type_of_healed(config: CompressConfig) -> str:
    """What --gguf-type means: where it is not given, one step finer, but where bytes are short.

    Of a --target-size the bytes are better spent on a layer more. Where all layers are trained, the file would grow.
    """
    grows = config.search.target_size or config.heal.train != "endpoints"
    return config.output.gguf_type or (SAME if grows else FINER)


def check_names(config: CompressConfig, checkpoint: checkpoints.Checkpoint, architecture: Any) -> None:
    """Refuse, before anything is healed, a file whose layers could not be written back once they are tuned."""
    if not keeps_gguf(config, checkpoint) or not config.heal.tokens:
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
        healed = 2 * radius * segments if config.heal.train == "endpoints" else layers
        return sum(dearest[: min(healed, layers - n)])

    if target >= file.whole:
        return length_for_size(file.blocks, file.whole, target)  # which refuses it: the file is as small already
    return length_for_size(file.blocks, file.whole + METADATA_GROWTH + 4 * layers, target, beside=beside)
