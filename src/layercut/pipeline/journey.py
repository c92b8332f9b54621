"""The journey, from a model's name to a smaller checkpoint and its report. Read this file first.

    model + text -> search -> cut -> fold -> tune -> quantize -> evaluate -> export -> report

Each stage leaves an artefact in the run folder (`pipeline/run_store.py`); a stage whose artefact is there is not run
again, and the model is not loaded before a stage needs it. The dense model and the cut one (the *student*) share all
weights but those that healing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from layercut import evaluation
from layercut.config import CompressConfig, flattened
from layercut.distributed import processes
from layercut.files.json_values import write_text
from layercut.models import checkpoints
from layercut.pipeline import stages
from layercut.pipeline.artefacts import RUNS_OWN
from layercut.pipeline.iterative import heal_stages, in_rounds, search_stage
from layercut.pipeline.resolve import ResolvedRun, Stage, default_folder, resolve
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_store import Run
from layercut.progress import say
from layercut.quantization.quantizers import resolve as quantizer_of
from layercut.report.formatting import label
from layercut.report.model_card import model_card
from layercut.report.page import write_report
from layercut.report.stage_lines import describe_export, describe_quantization, describe_retention, describe_shared
from layercut.report.verdicts import stability_words
from layercut.segments import Removal, Segment


def compress(model: str, config: CompressConfig, *, until: Stage = "report", own_process: bool = False) -> Path:
    """Search, cut, heal, measure and export `model`; a run that was stopped goes on where it was.

    Args:
        model: a Hub id, a folder, or a .gguf file.
        config: every option; checked here, once, before anything is loaded (`resolve`).
        until: "search" stops when the segments are known, "tune" saves the healed checkpoint and leaves out the rest.
        own_process: whether this process is the command's own, so that SIGINT and SIGTERM may be caught while tuning,
            to keep its state first, and the C library told to keep freed memory. A library call changes neither.

    Returns:
        The run folder. Several processes that a launcher started do it together (`distributed/processes.py`).

    Raises:
        LayercutError: wrong input, named with the way to mend it.
    """
    processes.start()
    asked = resolve(model, config, until)
    with Run(asked.config.run.out or default_folder(model), force=asked.config.run.force) as run:
        run.describe({"model": model, **flattened(asked.config)})
        work = RunContext(asked.checkpoint, asked.config, run, spread=asked.spread, own_process=own_process)
        text = text_stage(work, stages.text.uses(asked.config, until))
        if asked.config.number_of_rounds > 1:
            removal = in_rounds(work, text, asked.length)
        else:
            removal = search_stage(work, text, asked.wanted, asked.length)
            if asked.config.stability.seeds > 1:
                say("stability", stability_words(stability_stage(work, removal)))
            if until == "search":
                return run.folder
            heal_stages(work, text, removal)
        stages.heal.forget_tuning_(work)
        quantize_stage(work, text, removal.all)
        if until == "tune":
            export_stage(work, text, removal.all)
            return run.folder
        report_stages(work, asked, text, removal.all)
        return run.folder


def quantize_stage(work: RunContext, text: dict[str, Any], segments: Sequence[Segment]) -> None:
    """The healed model in fewer bits, where that is asked."""
    config = work.config.quantize
    calibrated = text["calibration"] if quantizer_of(config.quantizer)[1].needs_calibration else None
    stored = [asdict(config), calibrated] if config.bits < 16 else None
    quantized = work.run.stage("quantize", stored, partial(stages.quantize.quantize, work, segments), after=["heal"])
    if quantized["bits"] < 16:
        say("quantize", describe_quantization(quantized))


def export_stage(work: RunContext, text: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
    """The stock checkpoint, verified by a fresh process."""
    measured = text[stages.export.checked_on(text)]
    exported = work.run.stage("export", measured, partial(stages.export.export, work, segments), after=["quantize"])
    say("export", describe_export(exported, work.run / "model"))
    return exported


def report_stages(work: RunContext, asked: ResolvedRun, text: dict[str, Any], segments: Sequence[Segment]) -> None:
    """What survived, the checkpoint, and the page, card and summary that tell of both."""
    run, reported = work.run, [asdict(work.config.evaluate), text["evaluation"]]
    judged = partial(stages.evaluate.evaluate, work, segments)
    measured = run.stage("eval", reported, judged, after=["quantize"], together=True)
    proofs = further_proofs(work, segments)
    exported = export_stage(work, text, segments)
    after = [*(f"text-{use}" for use in text), "search", "eval", *proofs, "export"]
    source = checkpoints.weight_bytes(asked.checkpoint)
    run.stage(
        "summary",
        [asked.model, source],
        lambda: summarise(work, asked, measured, exported, source) | summarise_proofs(proofs),
        after=after,
    )
    processes.on_main(lambda: write_text(run / "model" / "README.md", model_card(run.folder)))
    processes.on_main(lambda: write_report(run.folder))


def text_stage(work: RunContext, uses: Sequence[stages.text.Use]) -> dict[str, Any]:
    """Draw the tokens of these uses, each an artefact of its own, and say where they come from.

    The facts of each use, as the stages that use them name them among their inputs; also `work.text`.
    """
    done: list[stages.text.Use] = []
    for use in uses:
        drawing = partial(stages.text.draw, work, use, tuple(done))
        drawn = work.run.stage(f"text-{use}", stages.text.inputs(work, use, done), drawing)
        work.text[use] = stages.text.facts(drawn)
        done.append(use)
        if use != "heldout":
            say(use, "{tokens:,} tokens of {source}".format(**drawn))
    if "evaluation" in uses:
        say("evaluation", evaluation.perplexity_protocol(work.text["evaluation"]["window"]))
        after = [f"text-{use}" for use in uses]
        common = work.run.stage("text-shared", None, partial(stages.text.in_common, work), after=after)
        say("evaluation", describe_shared(common))
    return work.text


def stability_stage(work: RunContext, removal: Removal) -> dict[str, Any]:
    """Search again, on other text from other seeds, and judge all choices on a common set; one artefact a seed."""
    text, run, length = work.config.text, work.run, sum(map(len, removal.all))
    search = run.read("search") or {}
    again, asked = [], asdict(replace(work.config.search, oracle=False))
    for seed in range(text.seed + 1, text.seed + work.config.stability.seeds):
        inputs = [work.source, asdict(replace(text, seed=seed)), asked, length]
        searched = partial(stages.search.search_again, work, seed, length)
        again.append(run.stage(f"stability-{seed}", inputs, searched, together=True))
        say("stability", f"seed {seed}: remove {label(again[-1]['segments'])}")
    hashes = [found["config_hash"] for found in again]
    judged = partial(stages.search.stability, work, search, again, length)
    return run.stage("stability", hashes, judged, after=["search"], together=True)


def further_proofs(work: RunContext, segments: Sequence[Segment]) -> dict[str, dict[str, Any]]:
    """The artefacts of tasks, of long context and of packages' evaluations, as far as they were asked for."""
    config, run = work.config, work.run
    found: dict[str, dict[str, Any]] = {}
    if config.tasks.names:
        asked = [config.tasks.names, config.tasks.limit, evaluation.harness_version(config.tasks.include_path)]
        found["tasks"] = run.stage("tasks", asked, lambda: stages.evaluate.score(work, segments), after=["quantize"])
        say("tasks", describe_retention(found["tasks"]["retention"]))
    if config.long.long_context:
        asked = [config.long.long_context, config.text.seed, work.text["evaluation"]]
        found["long"] = run.stage("long", asked, lambda: stages.evaluate.long(work, segments), after=["quantize"])
        say("long", "up to {window:,} tokens".format(**found["long"]))
    if functions := evaluation.named(config.tasks.evaluation_names):
        asked = [[name, evaluation.source_digest(each)] for name, each in functions.items()]
        measured = partial(stages.evaluate.others, work, segments, functions)
        found["evaluations"] = run.stage("evaluations", [asked, config.text.seed], measured, after=["quantize"])
        say("evaluations", ", ".join(functions))
    return found


def summarise(
    work: RunContext, asked: ResolvedRun, measured: dict[str, Any], exported: dict[str, Any], source: int
) -> dict[str, Any]:
    """summary.json: the run on one page. What was not measured is null. source: bytes of the files that came."""
    run = work.run
    cut, search = run.read("cut") or {}, run.read("search") or {}
    return {
        "model": asked.model,
        "layers": {"before": asked.layers, "after": len(cut["original_layer_index"])},
        "segments": search["segments"],
        "original_layer_index": cut["original_layer_index"],
        "parameters": cut["parameters"],
        "bytes": {"before": cut["bytes"]["before"], "after": exported["bytes"], "source": source},
        "perplexity": measured["perplexity"],
        "speed": measured["speed"],
        "generation_health": measured.get("health"),
        "seconds": run.seconds.copy(),
        "peak_rss_bytes": measured["peak_rss_bytes"],
    }


def summarise_proofs(proofs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the summary takes over of these artefacts; null where they were not measured."""
    tasks, long = proofs.get("tasks"), proofs.get("long")
    return {
        "tasks": tasks["tasks"] if tasks else None,
        "retention": tasks["retention"] if tasks else None,
        "long_context": {k: v for k, v in long.items() if k not in RUNS_OWN} if long else None,
        "evaluations": proofs["evaluations"]["evaluations"] if "evaluations" in proofs else None,
    }
