"""One stage alone, on a model or on a finished run: cut, evaluate, quantize. (`to_gguf.py`: export.)

Beside `pipeline.compress`, over the same rooms, for what is decided only when a run is done.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from layercut import checkpoints, evaluate, models, opening, processes, sharding
from layercut.config import CutConfig, DataConfig, PerplexityConfig, QuantizeAloneConfig
from layercut.cut import cut_checkpoint, cut_gguf, cut_segment_
from layercut.data import load_blocks
from layercut.errors import ConfigError, ModelError, RunError
from layercut.export import export_checkpoint, text_to_check
from layercut.pipeline import check_window
from layercut.progress import bar, say
from layercut.remarks import describe_quantization
from layercut.runs import write_json
from layercut.sources import split_mix
from layercut.stages.quantize import quantization_facts, quantize_with_bar_
from layercut.stages.text import check_unseen


def cut(model: str, config: CutConfig) -> Path:
    """Cut given segments out of the files of a checkpoint; returns what was written.

    A folder is cut without loading it, a .gguf file too where --out is one; else it becomes a float checkpoint.
    """
    checkpoint = checkpoints.resolve(model, allow_pickle=config.allow_pickle)
    if not checkpoint.gguf:
        cut_checkpoint(checkpoint.folder, config.segments, config.out, force=config.force)
    elif config.out.suffix == ".gguf":
        cut_gguf(checkpoint.file, config.segments, config.out, force=config.force)
    else:
        if config.out.exists() and not config.force:
            raise RunError(f"--out {config.out} exists", "name another folder, or pass --force to replace it")
        loaded = models.load(checkpoint)
        cut_segment_(loaded.model, config.segments)
        export_checkpoint(loaded.model, loaded.tokenizer, config.out)
    return config.out


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `layercut evaluate` found, of one model or of a run's two."""

    perplexity: dict[str, float]
    """By the model's name; empty where only tasks were asked for."""
    tasks: dict[str, dict[str, Any]]
    """A row for each task; of one model alone, compared with itself."""
    ratio: tuple[float, float | None] | None
    """Of a run's two perplexities, compressed over dense, and the standard error of its logarithm over the windows."""
    retention: dict[str, Any] | None
    """Over the tasks; None of one model alone."""


def evaluate_only(target: str, config: PerplexityConfig) -> Evaluation:
    """Perplexity and tasks of a model, or of a run's dense and compressed model on the same tokens and items."""
    processes.start()
    run, cache = Path(target), None
    names = {target: target}
    asked, tasks = config.tasks, None
    if asked.names:
        evaluate.check_tasks(asked.names, asked.include_path)
    source_of_text = config.eval_data or (None if asked.names else "wikitext2")
    if (run / "config.yaml").is_file():
        if not (run / "summary.json").is_file():
            raise RunError(f"the run in {target} is not finished", "give its compress command again, then evaluate")
        names = {"dense": checkpoints.read_json(run / "summary.json")["model"], "compressed": str(run / "model")}
        cache = run / "tasks"
    losses: dict[str, torch.Tensor] = {}
    records, tokens = [], None
    for name, source in names.items():
        checkpoint = checkpoints.resolve(source, allow_pickle=config.load.allow_pickle)
        if source_of_text is not None:
            stock = models.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
            window = config.eval_window or models.reported_window(stock)
            check_window("--eval-window", window, stock)
        loaded = opening.load(checkpoint, **asdict(config.load))
        if sharding.is_spread(loaded.model) and (asked.names or "self" in split_mix(source_of_text or "")):
            raise ConfigError(
                "tasks, and text from the model itself, are of one process, and the weights are spread over several",
                "start one process",
            )
        if asked.names:
            tasks = tasks or evaluate.load_tasks(asked.names, asked.include_path)
            score = partial(
                evaluate.score_tasks,
                loaded.model, loaded.tokenizer, tasks, limit=asked.limit, name=name, cache=cache,
            )  # fmt: skip
            records.append(processes.on_main(score))
        if source_of_text is None:
            continue
        if tokens is None:
            drawn = partial(
                load_blocks,
                source_of_text,
                loaded.tokenizer,
                tokens=config.eval_tokens,
                window=window,
                seed=config.seed,
                order="as written",
                model=loaded.model,
            )
            blocks = processes.on_main(drawn)
            if cache:
                check_unseen(run, blocks)
            tokens = blocks.tokens
            say("evaluate", f"{tokens.numel():,} tokens of {source_of_text}: {evaluate.protocol(window)}")
        with bar(f"perplexity of {name}", len(tokens)) as advance:
            losses[name] = evaluate.window_losses(loaded.model, tokens, advance=advance)
    found = evaluate.compare_tasks(records[0], records[-1]) if records else {"tasks": {}, "retention": None}
    perplexities, ratio = {name: evaluate.of_losses(each) for name, each in losses.items()}, None
    if len(losses) == 2:
        error = evaluate.paired_error(losses["compressed"], losses["dense"])
        ratio = perplexities["compressed"] / perplexities["dense"], error
    return Evaluation(
        perplexity=perplexities,
        ratio=ratio,
        tasks=found["tasks"],
        retention=found["retention"] if len(records) == 2 else None,
    )


def quantize_alone(target: str, config: QuantizeAloneConfig) -> Path:
    """Quantize a model, or a finished run's, into a new checkpoint with a quantize.json in it; returns its folder.

    A run's model is calibrated on the run's own calibration tokens, unless the text's flags say otherwise.
    """
    config.check()
    if config.out.exists() and not config.force:
        raise RunError(f"--out {config.out} exists", "name another folder, or pass --force to replace it")
    run = Path(target)
    is_run = (run / "summary.json").is_file()
    source = checkpoints.resolve(str(run / "model") if is_run else target, allow_pickle=config.load.allow_pickle)
    if getattr(models.load_config(source), "quantization_config", None) and not source.gguf:
        raise ModelError(f"{source.name} is quantized already", "give the float checkpoint it was made from")
    if opening.wanted(source, **asdict(config.load)):
        raise ModelError(models.STREAMED, models.STREAMED_HINT)
    loaded = opening.load(source, **asdict(config.load))
    model = loaded.model
    if config.quantize.quantizer == "rtn":
        tokens = torch.empty(0, config.text.window, dtype=torch.long)
    elif is_run and config.text == DataConfig():
        tokens = load_file(run / "tokens.safetensors")["calibration"]
    else:
        text = config.text
        tokens = load_blocks(
            text.data, loaded.tokenizer, tokens=text.tokens, window=text.window, seed=text.seed,
            chat_template=text.chat_template, model=model,
        ).tokens  # fmt: skip
    found = quantize_with_bar_(model, tokens, config.quantize)
    facts = quantization_facts(found, model, config.quantize)
    say("quantize", describe_quantization(facts))
    with bar("saving and verifying", None):
        unseen = text_to_check(load_file(run / "tokens.safetensors")["evaluation"]) if is_run else None
        exported = export_checkpoint(
            model, loaded.tokenizer, config.out, packed=found.packed, quantization_config=found.config, text=unseen
        )
    write_json(config.out / "quantize.json", facts | {"exported_bytes": exported["bytes"], "check": exported["check"]})
    return config.out
