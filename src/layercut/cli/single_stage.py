"""One stage alone, on a model or on a finished run: cut, quantize, evaluate; export is in `pipeline/handover.py`.

Beside `journey.compress`, by the same functions, for what is decided only when a run is done.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from layercut import evaluation, surgery
from layercut.config import AskedBits, DataConfig, GgufType, check_window, consumer_names
from layercut.config.commands import CutConfig, ExportConfig, PerplexityConfig, QuantizeAloneConfig
from layercut.data.blocks import Blocks, load_blocks, stored_blocks
from layercut.data.sources import CHATS, SELF, has
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError, ModelError, RunError
from layercut.evaluation.probe_scores import probed, probes_for
from layercut.export import engines
from layercut.export.checkpoint import save, text_to_check
from layercut.files import check_new, check_replaceable, digest, is_run, jsonable, parse_bytes, write_json
from layercut.models import checkpoints, decoder_stack, loading, memory, placement
from layercut.models.checkpoints import source_card
from layercut.models.layer_reader import layers_on_disk
from layercut.pipeline.environment import versions
from layercut.pipeline.handover import describe_, export
from layercut.pipeline.resolve_options import needs_memory
from layercut.pipeline.run_folder import models_of
from layercut.pipeline.stages.text import check_unseen
from layercut.progress import bar, say
from layercut.quantization import bit_choice, quantize_
from layercut.quantization.quantizers import calibrated
from layercut.report.formatting import layer_names
from layercut.report.model_card import Made, from_folder, layers_of, number_format_of, of_run, perplexity_again
from layercut.report.run_facts import model_key
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
        check_new(config.out, config.force)
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
    check_new(config.out, config.force)
    run = Path(target) if is_run(Path(target)) and (Path(target) / "summary.json").is_file() else None
    source = checkpoints.resolve(str(run / "model") if run else target, allow_pickle=config.load.allow_pickle)
    check_replaceable(config.out, source.file)
    if getattr(loading.load_config(source), "quantization_config", None) and not source.gguf:
        raise ModelError(f"{source.name} is quantized already", "give the float checkpoint it was made from")
    decoder_stack.refuse_on_disk(placement.place_of(source, alone=True, **asdict(config.load)) == "disk")
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


# --- evaluate ---


def evaluate_only(target: str, config: PerplexityConfig) -> dict[str, Any]:
    """Measure a model, or a run's dense and compressed model alike; what --json prints.

    What was found of a run is kept in its evaluations/, where `layercut report` finds it. Figures stand by the model's
    name. "ratio" is that of a run's two perplexities, with its standard error over the windows; "tasks" of one model
    alone are compared with itself.
    """
    run = Path(target) if is_run(Path(target)) else None
    with memory.memory_limit(config.load.max_memory):
        found = _evaluate(target, config, run)
    if run:
        named: list[Any] = [found["text"], sorted(found["tasks"]), found["limit"]]
        named += [sorted(found["evaluations"]), found["seed"]] if "evaluations" in found else []
        named += ["probes", found["seed"]] if "probes" in found else []
        of = model_key(run)
        file = run / "evaluations" / f"{digest([named, of])}.json"  # measured again, it is replaced

        def keep() -> None:
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"run": of} | found)

        try:
            processes.on_main(keep)
        except RunError as error:  # a full disk, or one that is read alone: the figures are told all the same
            say("evaluate", f"not kept for the report: {error.message}")
    return found


def _evaluate(target: str, config: PerplexityConfig, run: Path | None) -> dict[str, Any]:
    processes.start()
    wanted, seed, functions = config.tasks, config.seed, evaluation.named(config.tasks.evaluation_names)
    if wanted.names:
        evaluation.check_tasks(tuple(wanted.names), wanted.include_path)
    models = models_of(run, "evaluate", allow_pickle=config.load.allow_pickle) if run else {target: target}
    source = config.eval_data or (None if wanted.names or functions or wanted.probes else "wikitext2")
    tasks = evaluation.load_tasks(wanted.names, wanted.include_path) if wanted.names else {}
    losses, records, figures, probes = dict[str, Any](), dict[str, Any](), dict[str, Any](), dict[str, Any]()
    blocks: Blocks | None = None
    dense: Any = None

    def measure(name: str, path: str) -> None:
        """All that is asked for, of one model; it leaves memory with this call."""
        nonlocal blocks, dense
        checkpoint = checkpoints.resolve(path, allow_pickle=config.load.allow_pickle)
        window = 0
        if source is not None:
            stock = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
            window = config.eval_window or decoder_stack.reported_window(stock)
            check_window("--eval-window", window, decoder_stack.positions(stock))
        loaded = placement.load(checkpoint, **asdict(config.load))
        model, tokenizer = loaded.model, loaded.tokenizer
        by_one = wanted.names or functions or wanted.probes or (source is not None and has(source, SELF, CHATS))
        if by_one and sharding.is_spread(model):
            raise ConfigError(
                "tasks, evaluations, and text from the model itself are of one process, and the weights are sharded",
                "start one process",
            )
        if source is not None and blocks is None:
            blocks = processes.on_main(lambda: evaluation_blocks(source, loaded, config, window, run))
        if tasks:
            how: dict[str, Any] = {"limit": wanted.limit, "name": name, "cache": run / "tasks" if run else None}
            records[name] = processes.on_main(lambda: evaluation.score_tasks(model, tokenizer, tasks, **how))
        if blocks:
            with bar(f"perplexity of {name}", len(blocks.tokens)) as advance:
                losses[name] = evaluation.window_losses(model, blocks.tokens, advance=advance)
        if (functions or wanted.probes) and layers_on_disk(model):
            raise needs_memory("--evaluations" if functions else "--probes")

        def measured(title: str) -> dict[str, float]:
            say("evaluate", f"{title} of {name}")
            return evaluation.measure(title, functions[title], model, tokenizer, seed=seed)

        figures[name] = {one: processes.on_main(lambda one=one: measured(one)) for one in functions}  # type: ignore[misc]
        if wanted.probes:
            dense = model if dense is None else dense  # the KL is taken beside it: it stays in memory
            asked = probes_for(tokenizer, model.config, seed=seed)
            with bar(f"probes of {name}", asked.tokens) as advance:
                probes[name] = processes.on_main(lambda: probed(model, dense, tokenizer, asked, advance=advance))

    for name, path in models.items():
        measure(name, path)
        memory.release_freed()

    perplexity, ratio = {name: evaluation.of_losses(each) for name, each in losses.items()}, None
    if len(losses) == 2:
        error = evaluation.paired_error(losses["compressed"], losses["dense"])  # of the ratio's logarithm
        value = perplexity["compressed"] / perplexity["dense"]
        ratio = {"value": value, "standard_error": None if error is None else value * error}
    scored = list(records.values())
    compared = evaluation.compare_tasks(scored[0], scored[-1]) if scored else {"tasks": {}}
    by_function = {
        one: evaluation.metric_rows(function, {name: each[one] for name, each in figures.items()})
        for one, function in functions.items()
    }
    found: dict[str, Any] = jsonable({
        "text": asdict(blocks.facts) if blocks else None,
        "perplexity": perplexity,
        "ratio": ratio,
        "tasks": compared["tasks"],
        "retention": compared["retention"] if len(scored) == 2 else None,
        "limit": wanted.limit,
        **({"evaluations": by_function} if functions else {}),
        **({"probes": probes} if probes else {}),
        **({"seed": seed} if functions or probes else {}),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": versions(),
    })  # fmt: skip
    return found


def evaluation_blocks(
    source: str, loaded: loading.LanguageModel, config: PerplexityConfig, window: int, run: Path | None
) -> Blocks:
    """The text that perplexity is measured on; of a run none that it was searched or tuned on."""
    tokenizer, model = loaded.tokenizer, loaded.model
    how: dict[str, Any] = {"tokens": config.eval_tokens, "window": window, "seed": config.seed, "order": "as written"}
    drawn = load_blocks(source, tokenizer, model=model, **how)
    decoder_stack.check_tokens(drawn.tokens, model.config, loaded.checkpoint.name)
    if run:
        check_unseen(run, drawn, tokenizer)
    say("evaluate", f"{drawn.tokens.numel():,} tokens of {source}: {evaluation.perplexity_protocol(window)}")
    return drawn
