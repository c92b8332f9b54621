"""One stage alone, on a model or on a finished run: cut, quantize.

Evaluation is in `cli/evaluate_alone.py`, export in `pipeline/handover.py`.
Beside `journey.compress`, by the same functions, for what is decided only when a run is done.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from layercut import surgery
from layercut.config import AskedBits, DataConfig, GgufType, consumer_names
from layercut.config.commands import CutConfig, ExportConfig, QuantizeAloneConfig
from layercut.data.blocks import load_blocks, stored_blocks
from layercut.errors import ModelError, RunError
from layercut.export import engines
from layercut.export.checkpoint import save, text_to_check
from layercut.files import check_replaceable, parse_bytes, write_json
from layercut.models import checkpoints, decoder_stack, loading, memory, placement
from layercut.models.checkpoints import source_card
from layercut.pipeline.handover import describe_, export
from layercut.pipeline.run_folder import is_run
from layercut.progress import say
from layercut.quantization import bit_choice, quantize_
from layercut.quantization.quantizers import calibrated
from layercut.report.formatting import layer_names
from layercut.report.model_card import Made, from_folder, layers_of, number_format_of, of_run, perplexity_again
from layercut.report.stage_lines import describe_quantization
from layercut.segments import kept_layers
from layercut.surgery import cut_checkpoint, cut_gguf

GGUF_OF_BITS: dict[AskedBits, GgufType] = {8: "q8_0", 6: "q6_k", 4: "q4_k_m", 3: "q3_k_m", 2: "q2_k"}
"""The number format of a GGUF file that --bits means where no --gguf-type is given."""


def cut(model: str, config: CutConfig) -> Path:
    """Cut given segments out of the files of a checkpoint.

    A folder is cut without loading it, a .gguf file too where --out is one; else it becomes a float checkpoint.
    """
    checkpoint = checkpoints.resolve(model, allow_pickle=config.allow_pickle)
    stock = loading.load_config(checkpoint)
    written: engines.Written = "gguf" if config.out.suffix == ".gguf" else "float"
    engines.check_cut(stock, config.segments, consumer_names(config.consumers), written)
    if not checkpoint.gguf:
        left = cut_checkpoint(checkpoint.folder, config.segments, config.out, force=config.force)
        if left:
            say("cut", f"not copied, since they are no known part of a model: {', '.join(left)}")
    elif config.out.suffix == ".gguf":
        cut_gguf(checkpoint.file, config.segments, config.out, force=config.force)
    else:
        if config.out.exists() and not config.force:
            raise RunError(f"--out {config.out} exists", "name another folder, or pass --force to replace it")
        check_replaceable(config.out, checkpoint.file)
        loaded = loading.load(checkpoint)
        save(surgery.cut(loaded.model, config.segments), loaded.tokenizer, config.out, overwrite=config.force)
    engines.warn_misread("cut", engines.readings(stock, config.segments, written))
    source, layers = source_card(model), decoder_stack.count_layers(stock)
    asked = [(segment.start, segment.stop) for segment in sorted(config.segments)]
    index = [] if written == "gguf" else kept_layers(config.segments, layers)
    made = layers_of(source, config.out, asked, index, layers)
    done = f"{source.name} without layers {layer_names([*map(list, made['segments'])])}, counted from 0. Nothing was "
    done += "healed or measured: as it is, it writes worse than it could."
    describe_(config.out, Made(**made, done=done, gguf=config.out.name if written == "gguf" else None))
    return config.out


def quantize_alone(target: str, config: QuantizeAloneConfig) -> Path:
    """Quantize a model, or a finished run's, into a new checkpoint with a quantize.json in it.

    A run's model is calibrated on the run's own calibration tokens, unless the text's flags say otherwise.
    """
    config.check()
    if config.out.suffix == ".gguf":
        kind = config.gguf_type or GGUF_OF_BITS[config.quantize.bits]
        asked = ExportConfig(out=config.out, consumers=config.consumers, force=config.force)
        return export(target, replace(asked, gguf_type=kind))
    engines.check_written(consumer_names(config.consumers), engines.written_by(config.quantize))
    if config.out.exists() and not config.force:
        raise RunError(f"--out {config.out} exists", "name another folder, or pass --force to replace it")
    run = Path(target) if is_run(Path(target)) and (Path(target) / "summary.json").is_file() else None
    source = checkpoints.resolve(str(run / "model") if run else target, allow_pickle=config.load.allow_pickle)
    check_replaceable(config.out, source.file)
    if getattr(loading.load_config(source), "quantization_config", None) and not source.gguf:
        raise ModelError(f"{source.name} is quantized already", "give the float checkpoint it was made from")
    decoder_stack.refuse_on_disk(placement.wanted(source, **asdict(config.load)))
    loaded = placement.load(source, **asdict(config.load))
    tokens, most = None, parse_bytes("--target-size", config.target_size) if config.target_size else None
    if most:
        bit_choice.check_target(loaded.model, config.quantize, most)
    text, needed = config.text, most or calibrated(config.quantize)
    if needed and run and text == DataConfig():
        tokens = stored_blocks(run, "calibration")
    elif needed:
        tokens = load_blocks(
            text.data, loaded.tokenizer, tokens=text.tokens, window=text.window, seed=text.seed,
            model=loaded.model,
        ).tokens  # fmt: skip
        decoder_stack.check_tokens(tokens, loaded.model.config, loaded.checkpoint.name)
    with memory.memory_limit(config.load.max_memory):  # in place: old weights leave memory
        found = quantize_(loaded.model, tokens, config.quantize, target=most)
    facts = found.to_dict()
    say("quantize", describe_quantization(facts))
    unseen = text_to_check(stored_blocks(run, "evaluation")) if run else None
    how: dict[str, Any] = {"text": unseen, "overwrite": config.force, "source": None if source.gguf else source.folder}
    exported = save(found, loaded.tokenizer, config.out, **how)
    write_json(config.out / "quantize.json", facts | {"exported_bytes": exported.bytes, "check": exported.check})
    again, bits = (exported.check or {}).get("perplexity"), config.quantize.bits
    chosen = f"Each matrix in its own bits, chosen for {config.target_size}"
    what = chosen if bits == "auto" else f"The decoder layers' weights in {bits} bits"
    made = replace(
        of_run(run) if run else from_folder(source.file),
        done=f"{what} ({config.quantize.quantizer}).",
        number_format=number_format_of(bits),
        packed=True,
        figures=[perplexity_again(run, again["value"], again["tokens"])] if run and again else [],
    )
    describe_(config.out, made, run)
    return config.out
