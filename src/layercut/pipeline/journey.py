"""The journey, from a model's name to a smaller checkpoint and its report. Read this file first.

    model + text -> search -> cut -> fold -> tune -> quantize -> evaluate -> export -> report

Each stage leaves an artefact in the run folder (`pipeline/run_store.py`); a stage whose artefact is there is not run
again, and the model is not loaded before a stage needs it. The dense model and the cut one (the *student*) share all
weights but those that healing changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from layercut import evaluation
from layercut.config import CompressConfig, SearchConfig, flattened
from layercut.data.sources import SELF, what_is_read
from layercut.distributed import processes
from layercut.errors import ConfigError, ModelError
from layercut.files.json_values import write_text
from layercut.files.sizes import parse_bytes
from layercut.healing.stored_teacher import check_topk
from layercut.layer_search import length_for_size, length_for_speedup
from layercut.models import checkpoints, loading
from layercut.offload import placement
from layercut.pipeline import stages
from layercut.pipeline.artefacts import RUNS_OWN
from layercut.pipeline.context import RunContext
from layercut.pipeline.iterative import heal_stages, in_rounds, search_stage
from layercut.pipeline.run_store import Run
from layercut.progress import say
from layercut.report.formatting import label
from layercut.report.lines import describe_export, describe_quantization, describe_retention, describe_shared
from layercut.report.page import model_card, write_report
from layercut.report.verdicts import stability_words
from layercut.segments import Removal, Segment, checked_segments, layers_to_remove

Stage = Literal["search", "tune", "report"]


def compress(model: str, config: CompressConfig, *, until: Stage = "report") -> Path:
    """Search, cut, heal, measure and export `model`; returns the run folder. Goes on where a run was stopped.

    until: "search" stops when the segments are known, "tune" saves the healed checkpoint and leaves out the rest.
    Several processes that a launcher started do it together (`distributed/processes.py`); each returns the folder.
    """
    processes.start()
    config.check()
    if until == "search" and config.number_of_rounds > 1:
        raise ConfigError("a search in rounds needs each to be healed", "use tune or compress")
    checkpoint = checkpoints.resolve(model, allow_pickle=config.load.allow_pickle)
    architecture = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window("--window", config.text.window, architecture)
    config = with_reported_window(config, architecture)
    stages.heal.objective(config.heal)  # one of a package is imported now, so that what is wrong with it is said first
    if config.heal.teacher_topk:
        check_topk(config.heal.teacher_topk, architecture.get_text_config().vocab_size)
    layers = loading.count_layers(architecture)
    wanted = checked_segments(config.search.segments, layers)
    length = wanted_length(config.search, layers)
    check_target(config, checkpoint, architecture)
    check_sources(config, until)
    loading.pick_device(config.load.device)
    spread = placement.spread(checkpoint, **asdict(config.load))
    if spread:
        check_spread(config)
    if until != "search" and placement.wanted(checkpoint, **asdict(config.load)):
        check_streamed(config, spread)
    if config.tasks.names and until == "report":
        evaluation.check_tasks(config.tasks.names, config.tasks.include_path)

    with Run(config.run.out or default_folder(model), force=config.run.force) as run:
        run.describe({"model": model, **flattened(config)})
        work = RunContext(checkpoint, config, run, spread=spread)

        text = text_stage(work, stages.text.uses(config, until))
        if config.number_of_rounds > 1:
            removal = in_rounds(work, text, length)
        else:
            removal = search_stage(work, text, wanted, length)
            if config.stability.seeds > 1:
                say("stability", stability_words(stability_stage(work, removal)))
            if until == "search":
                return run.folder
            heal_stages(work, text, removal)
        stages.heal.forget_tuning_(work)
        segments, config = removal.all, work.config
        cut, search = run.read("cut") or {}, run.read("search") or {}
        calibrated = text["calibration"] if config.quantize.quantizer == "gptq" else None
        stored = [asdict(config.quantize), calibrated] if config.quantize.bits < 16 else None
        quantized = run.stage("quantize", stored, lambda: stages.quantize.quantize(work, segments), after=["heal"])
        if quantized["bits"] < 16:
            say("quantize", describe_quantization(quantized))

        export = partial(stages.export.export, work, segments)
        if until == "tune":
            exported = run.stage("export", text[stages.export.checked_on(text)], export, after=["quantize"])
            say("export", describe_export(exported, run / "model"))
            return run.folder

        reported = [asdict(config.evaluate), text["evaluation"]]
        judged = partial(stages.evaluate.evaluate, work, segments)
        measured = run.stage("eval", reported, judged, after=["quantize"], together=True)
        proofs = further_proofs(work, segments)
        exported = run.stage("export", text["evaluation"], export, after=["quantize"])
        say("export", describe_export(exported, run / "model"))
        source = checkpoints.weight_bytes(checkpoint)
        run.stage(
            "summary",
            [model, source],
            lambda: summarise(run, model, layers, search, cut, measured, exported, source) | summarise_proofs(proofs),
            after=[*(f"text-{use}" for use in text), "search", "eval", *proofs, "export"],
        )
        processes.on_main(lambda: write_text(run / "model" / "README.md", model_card(run.folder)))
        processes.on_main(lambda: write_report(run.folder))
        return run.folder


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
        say("evaluation", evaluation.protocol(work.text["evaluation"]["window"]))
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
    """The artefacts of tasks and of long context, as far as they were asked for."""
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
    return found


def wanted_length(search: SearchConfig, layers: int) -> int | None:
    """How many layers the user wants removed; None where that depends on the model's weights or on its loss."""
    if search.ratio is not None:
        return layers_to_remove(search.ratio, layers)
    return length_for_speedup(layers, search.target_speedup) if search.target_speedup is not None else None


def check_target(config: CompressConfig, checkpoint: checkpoints.Checkpoint, architecture: Any) -> None:
    """ConfigError where no number of layers meets --target-size, told from the config before weights are loaded.

    With --max-loss the bits count as well, and it is told when they have been tried. A class that cannot be built
    without its own code is counted when it is loaded.
    """
    if config.search.target_size is None or config.search.two_budgets:
        return
    stored = loading.pick_dtype(config.load.dtype, architecture, checkpoint)
    try:
        bare = loading.skeleton(architecture, stored)
    except ModelError:
        return
    weights = [loading.parameter_bytes(layer, stored) for layer in loading.find_decoder(bare).layers]
    total = loading.parameter_bytes(bare, stored)
    length_for_size(weights, total, parse_bytes("--target-size", config.search.target_size))


def check_sources(config: CompressConfig, until: Stage = "report") -> None:
    """What is reported on must not be what is searched or tuned on; nothing is, of a run that ends before."""
    if until != "report":
        return
    reported = what_is_read(config.evaluate.eval_data, reported=True)
    used = what_is_read(config.text.data) | what_is_read(config.heal.tune_data or config.text.data)
    # the model's own text is of another seed where it is reported on
    both = {(used[read], reported[read]) for read in reported.keys() & used.keys() - {SELF}}
    if both:
        words = [name if name == again else f"{name} (the same as {again})" for name, again in sorted(both)]
        raise ConfigError(
            f"{', '.join(words)} would be searched or tuned on and reported on as well",
            "give --eval-data another text than --data and --tune-data",
        )


def check_spread(config: CompressConfig) -> None:
    """Refuse what cannot be done over weights that are spread over several processes."""
    refused = {
        "--rounds": config.number_of_rounds > 1,
        "--teacher-topk": config.heal.teacher_topk > 0,
        "--method taylor": config.search.method == "taylor",
    }
    for flag, is_asked in refused.items():
        if is_asked:
            raise ConfigError(
                f"{flag} needs a whole model in every process, and its weights are spread over them",
                f"leave out {flag}; where the model fits each process's memory: --shard off",
            )


def check_streamed(config: CompressConfig, spread: bool) -> None:
    """ConfigError for what a run cannot do whose layers are left on disk; before anything long is run.

    spread: where the weights are spread over several processes, so it is for what the main process does by itself.
    """
    asked = {
        "--bits": config.quantize.bits < 16,
        "--tasks": bool(config.tasks.names),
        "--long-context": config.long.long_context > 0,
        "--teacher-topk": config.heal.teacher_topk > 0,
        "--target-size with --max-loss": config.search.two_budgets,
    }
    for flag in (flag for flag, is_asked in asked.items() if is_asked):
        raise ConfigError(
            f"{flag} needs the model in memory, and its layers are left on disk",
            f"leave out {flag}; with enough memory: --stream off",
        )
    if processes.world() > 1 and not spread:
        raise ConfigError(
            f"{processes.world()} processes would heal a model whose layers are left on disk, each reading all of them",
            "start one process; search and evaluate share their work; with enough memory: --stream off",
        )


def check_window(flag: str, window: int, architecture: Any) -> None:
    """Rows of tokens must fit the positions that the model knows."""
    limit = loading.positions(architecture)
    if limit and window > limit:
        raise ConfigError(
            f"{flag} {window} is longer than the model's {limit} positions",
            f"allowed is up to {limit}: {flag} {min(limit, 256)}",
        )


def with_reported_window(config: CompressConfig, architecture: Any) -> CompressConfig:
    """The config with the window that perplexity is reported on filled in. ConfigError where the model is too short."""
    window = config.evaluate.eval_window or loading.reported_window(architecture)
    check_window("--eval-window", window, architecture)
    return replace(config, evaluate=replace(config.evaluate, eval_window=window))


def default_folder(model: str) -> Path:
    """runs/NAME, from the last part of the model's name."""
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", Path(model).name.removesuffix(".gguf")).strip(".-") or "run")


def summarise(
    run: Run,
    model: str,
    layers: int,
    search: dict[str, Any],
    cut: dict[str, Any],
    measured: dict[str, Any],
    exported: dict[str, Any],
    source: int,
) -> dict[str, Any]:
    """summary.json: the run on one page. What was not measured is null."""
    return {
        "model": model,
        "layers": {"before": layers, "after": len(cut["original_layer_index"])},
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
    """What the summary takes over of tasks and long context; null where they were not measured."""
    tasks, long = proofs.get("tasks"), proofs.get("long")
    return {
        "tasks": tasks["tasks"] if tasks else None,
        "retention": tasks["retention"] if tasks else None,
        "long_context": {k: v for k, v in long.items() if k not in RUNS_OWN} if long else None,
    }
