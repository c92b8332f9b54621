"""The journey, from a model's name to a smaller checkpoint and its report. Read this file first.

    model + text -> search -> cut -> fold -> tune -> quantize -> evaluate -> export -> report

Each stage leaves an artefact in the run folder (`pipeline/run_store.py`); a stage whose artefact is there is not run
again, and the model is not loaded before a stage needs it. The dense model and the cut one (the *student*) share all
weights but those that healing changes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layercut.config import CompressConfig, ExportConfig, flattened
from layercut.distributed import processes
from layercut.models import checkpoints, memory
from layercut.models.devices import sum_in_float32_
from layercut.pipeline import gguf_run, stages
from layercut.pipeline.artefacts import (
    BeforeAfter,
    CapabilitiesArtefact,
    CutArtefact,
    EvaluateArtefact,
    EvaluationsArtefact,
    ExportArtefact,
    LongArtefact,
    ProbesArtefact,
    SearchArtefact,
    SizeInBytes,
    SummaryArtefact,
    TasksArtefact,
    bounds_of,
)
from layercut.pipeline.handover import describe_result_, destination, export, result_of, upload
from layercut.pipeline.resolve_options import ResolvedRun, Stage, default_folder, resolve
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_store import Run
from layercut.report.page import write_report
from layercut.segments import Segment


def compress(
    model: str, config: CompressConfig, *, until: Stage = "report", own_process: bool = False, shortlist: bool = True
) -> Path:
    """Search, cut, heal, measure and export `model`; a run that was stopped is resumed.

    Args:
        model: a Hub id, a folder, or a .gguf file.
        config: every option; checked here, once, before anything is loaded (`resolve`).
        until: "search" stops when the segments are known, "tune" saves the healed checkpoint and leaves out the rest.
        own_process: whether this process is the command's own, so that SIGINT and SIGTERM may be caught while tuning,
            to keep its state first, and the C library set to keep freed memory. A library call changes neither.
        shortlist: whether candidates may be healed for a while before one is chosen.

    Returns:
        The run folder. Several processes that a launcher started do it together (`distributed/processes.py`).

    Raises:
        LayercutError: wrong input, with a hint how to correct it.
    """
    processes.start()
    if own_process:
        sum_in_float32_()
    asked = resolve(model, config, until, shortlist=shortlist)
    repo_id = processes.on_main(lambda: destination(asked.config.hub))
    folder = gguf_run.run_folder(asked.config.run) or default_folder(model)
    with memory.memory_limit(config.load.max_memory), Run(folder, force=asked.config.run.force) as run:
        run.describe({"model": model, **flattened(asked.config)}, asked.checkpoint)
        work = RunContext(
            asked.checkpoint, asked.config, run, spread=asked.spread, own_process=own_process,
            shortlist=asked.shortlist, shortlist_now=asked.shortlist_now,
        )  # fmt: skip
        stages.text.draw_all(work, stages.text.uses(asked.config, until))
        length = stages.layers_or_bits.number_of_layers(work) if asked.config.shares_size else asked.length
        if asked.config.search.two_budgets:
            length, bits = stages.two_budgets.layers_and_bits(work)
            work.config = replace(work.config, quantize=replace(work.config.quantize, bits=bits))
        segments = stages.search.search(work, asked.wanted, length)
        if until == "search":
            return run.folder
        stages.heal.cut(work, segments)
        stages.heal.fold(work, segments)
        stages.heal.tune(work, segments)
        stages.heal.forget_tuning_(work)
        stages.quantize.quantize(work, segments)
        if until == "tune":
            stages.export.export(work, segments)
        else:
            measure_and_export(work, asked, segments)
        if repo_id:
            processes.on_main(lambda: upload(result_of(run.folder), repo_id, private=config.hub.private))
    if until == "report" and (file := gguf_run.file_of(asked.config.run)):
        processes.on_main(lambda: write_file(run.folder, file, asked.config))
    return run.folder


def write_file(run: Path, file: Path, config: CompressConfig) -> None:
    """Put the .gguf file of a finished run where --out names it; the model of a folder's run is converted."""
    found = result_of(run)
    if found.suffix == ".gguf":
        gguf_run.put(found, file)
    else:
        export(str(run), ExportConfig(out=file, force=True, gguf_type=config.output.gguf_type))


def measure_and_export(work: RunContext, asked: ResolvedRun, segments: Sequence[Segment]) -> None:
    """Measure what survived, and write the checkpoint, the report, the model card and the summary."""
    tasks, long = work.config.tasks, work.config.long.long_context
    measured = Measured(
        eval=stages.evaluate.evaluate(work, segments),
        capabilities=stages.evaluate.capabilities(work, segments),
        tasks=stages.evaluate.score(work, segments) if tasks.names else work.run.earlier(TasksArtefact, "tasks"),
        probes=stages.evaluate.probes(work, segments) if tasks.probes else work.run.earlier(ProbesArtefact, "probes"),
        long=stages.evaluate.long(work, segments) if long else work.run.earlier(LongArtefact, "long"),
        evaluations=(
            stages.evaluate.others(work, segments)
            if tasks.evaluation_names
            else work.run.earlier(EvaluationsArtefact, "evaluations")
        ),
    )
    exported = stages.export.export(work, segments)
    summarise(work, asked, segments, measured, exported)
    processes.on_main(lambda: describe_result_(work.run.folder))
    processes.on_main(lambda: write_report(work.run.folder))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The artefacts of what was measured, by their names, in their order; None: not asked for."""

    eval: EvaluateArtefact
    capabilities: CapabilitiesArtefact | None
    tasks: TasksArtefact | None
    probes: ProbesArtefact | None
    long: LongArtefact | None
    evaluations: EvaluationsArtefact | None


def summarise(
    work: RunContext,
    asked: ResolvedRun,
    segments: Sequence[Segment],
    measured: Measured,
    exported: ExportArtefact,
) -> SummaryArtefact:
    """summary.json, from the artefacts of the stages that were run."""
    run, source = work.run, checkpoints.weight_bytes(asked.checkpoint)
    evaluated = [name for name, found in vars(measured).items() if found is not None]
    after = [*(f"text-{use}" for use in work.text), "search", *evaluated, "export"]
    model = os.path.abspath(asked.model) if os.path.exists(asked.model) else asked.model  # from any folder
    with run.stage(SummaryArtefact, "summary", [model, source], after=after) as stage:
        if stage.open:
            cut, judged, tasks = run.artefact(CutArtefact, "cut"), measured.eval, measured.tasks
            stage.found = SummaryArtefact(
                model=model,
                layers=BeforeAfter(before=asked.layers, after=len(cut.original_layer_index)),
                segments=bounds_of(run.artefact(SearchArtefact, "search").segments),
                original_layer_index=cut.original_layer_index,
                parameters=cut.parameters,
                bytes=SizeInBytes(before=cut.bytes.before, after=exported.bytes, source=source),
                perplexity=judged.perplexity,
                speed=judged.speed,
                generation_health=judged.health,
                seconds=run.seconds.copy(),
                peak_rss_bytes=judged.peak_rss_bytes,
                peak_device_bytes=judged.peak_device_bytes,
                tasks=tasks.tasks if tasks else None,
                retention=tasks.retention if tasks else None,
                long_context=measured.long.facts if measured.long else None,
                evaluations=measured.evaluations.evaluations if measured.evaluations else None,
                capabilities=measured.capabilities.judged if measured.capabilities else None,
                probes=measured.probes.facts if measured.probes else None,
                consumers=stages.export.read_by(work, segments),
            )
    return stage.artefact
