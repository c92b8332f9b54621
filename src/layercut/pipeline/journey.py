"""The journey, from a model's name to a smaller checkpoint and its report. Read this file first.

    model + text -> search -> cut -> fold -> tune -> quantize -> evaluate -> export -> report

Each stage leaves an artefact in the run folder (`pipeline/run_folder.py`). A stage whose artefact is there is not run
again, and the model is not loaded before a stage needs it. The dense model and the pruned one (the *student*) share all
weights but those that healing changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from layercut import progress
from layercut.config.commands import CompressConfig, ExportConfig, flattened
from layercut.distributed import processes
from layercut.models import checkpoints, memory
from layercut.models.memory import sum_in_float32_
from layercut.pipeline import stages
from layercut.pipeline.artefacts import (
    BeforeAfter,
    CutArtefact,
    EvaluationsArtefact,
    FoundByLength,
    LongContext,
    SizeInBytes,
    SummaryArtefact,
    TasksArtefact,
)
from layercut.pipeline.handover import describe_result_, export, result_of
from layercut.pipeline.resolve_options import ResolvedRun, Stage, default_folder, resolve, wanted_length
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import Run
from layercut.report.page import write_report
from layercut.segments import checked_segments


def compress(
    model: str,
    config: CompressConfig,
    *,
    until: Stage = "report",
    own_process: bool = False,
    in_time: Callable[[str, CompressConfig, Stage], CompressConfig] | None = None,
    planned: Callable[[ResolvedRun], Mapping[str, float]] | None = None,
) -> Path:
    """Search, cut, heal, measure and export `model`; a run that was stopped is resumed.

    Args:
        model: a Hub id, a folder, or a .gguf file.
        config: every option; checked here, once, before anything is loaded (`resolve`).
        until: "search" stops when the segments are known, "tune" saves the healed checkpoint and leaves out the rest.
        own_process: whether this process is the command's own, so that SIGINT and SIGTERM may be caught while tuning,
            to keep its state first, and the C library set to keep freed memory. A library call changes neither.
        in_time: fills in what `--time` decides (`plan/in_time.py`).
        planned: says how long each stage takes, in any unit, for what progress tells of the whole run.

    Returns:
        The run folder. Several processes that a launcher started do it together (`distributed/processes.py`).

    Raises:
        LayercutError: wrong input, with a hint how to correct it.
    """
    processes.start()
    if own_process:
        sum_in_float32_()
        memory.reuse_freed()
    asked = resolve(model, in_time(model, config, until) if in_time else config, until)
    config, checkpoint = asked.config, asked.checkpoint
    folder = config.run.folder or default_folder(model)
    with (
        memory.memory_limit(config.load.max_memory),
        Run(folder, force=config.run.force) as run,
        progress.whole_run(lambda: planned(asked) if planned else {}),
    ):
        run.describe({"model": model, **flattened(config)}, checkpoint)
        work = RunContext(
            checkpoint, config, run, spread=asked.spread, own_process=own_process,
            shortlist=asked.shortlist, shortlist_now=asked.shortlist_now,
        )  # fmt: skip
        stages.text.draw_all(work, stages.text.uses(config, until))

        # which layers go
        length = wanted_length(config.search, work.layers)
        if config.shares_size:
            length = stages.size_budgets.number_of_layers(work)
        elif config.search.two_budgets:
            length, bits = stages.size_budgets.layers_and_bits(work)
            work.config = config = replace(config, quantize=replace(config.quantize, bits=bits))
        segments = stages.search.search(work, checked_segments(config.search.segments, work.layers), length)
        if until == "search":
            # where compress evaluates a shortlist as well, it goes on from the plain search
            run.finished(*(["search"] if "search-plain" in run.hashes else []))
            return folder

        # the pruned model
        stages.heal.cut(work, segments)
        stages.heal.fold(work, segments)
        stages.heal.tune(work, segments)
        stages.heal.forget_tuning_(work)
        stages.quantize.quantize(work, segments)
        if until == "tune":
            stages.export.export(work, segments)
        else:
            # what it can do
            tasks = config.tasks
            evaluated = stages.evaluate.evaluate(work, segments)
            capabilities = stages.evaluate.capabilities(work, segments)
            scored = stages.evaluate.score(work, segments) if tasks.names else run.earlier(TasksArtefact, "tasks")
            probes = stages.evaluate.probes(work, segments) if tasks.probes else run.earlier(FoundByLength, "probes")
            wants_long, wants_others = config.evaluate.long_context, tasks.evaluation_names
            long = stages.evaluate.long(work, segments) if wants_long else run.earlier(LongContext, "long")
            others = (
                stages.evaluate.others(work, segments)
                if wants_others else run.earlier(EvaluationsArtefact, "evaluations")
            )  # fmt: skip

            # what the user gets
            exported = stages.export.export(work, segments)
            name = os.path.abspath(model) if os.path.exists(model) else model  # from any folder
            source = checkpoints.weight_bytes(checkpoint)
            with run.stage(SummaryArtefact, "summary", [name, source], after=[*run.seconds]) as stage:
                if stage.open:
                    cut = run.artefact(CutArtefact, "cut")
                    stage.found = SummaryArtefact(
                        model=name,
                        layers=BeforeAfter(before=work.layers, after=len(cut.original_layer_index)),
                        segments=segments,
                        original_layer_index=cut.original_layer_index,
                        parameters=cut.parameters,
                        bytes=SizeInBytes(before=cut.bytes.before, after=exported.bytes, source=source),
                        perplexity=evaluated.perplexity,
                        speed=evaluated.speed,
                        generation_health=evaluated.health,
                        peak_rss_bytes=evaluated.peak_rss_bytes,
                        peak_device_bytes=evaluated.peak_device_bytes,
                        tasks=scored.tasks if scored else None,
                        retention=scored.retention if scored else None,
                        long_context=long,
                        evaluations=others.evaluations if others else None,
                        capabilities=capabilities.judged if capabilities else None,
                        probes=probes,
                        consumers=stages.export.read_by(work, segments),
                    )
            processes.on_main(lambda: describe_result_(folder))
            processes.on_main(lambda: write_report(folder))
        run.finished()
    if until == "report" and (file := config.run.file):
        processes.on_main(lambda: write_file(folder, file, config))
    return folder


def write_file(run: Path, file: Path, config: CompressConfig) -> None:
    """Put the .gguf file of a finished run where --out names it; the model of a folder's run is converted."""
    found = result_of(run)
    if found.suffix == ".gguf":
        stages.export.put(found, file)
    else:
        export(str(run), ExportConfig(out=file, force=True, gguf_type=config.output.gguf_type))
