"""Search methods side by side: beside the journey, with its model, its tokens and its run folder.

Every method gets the same calibration tokens; what it removes is priced by the real cut on these, and measured by
perplexity on the same held-out tokens: plain, after the closed-form fold, and after endpoint tuning, or LoRA, on as
many and the same tokens for every one (`compare_states.py`). One artefact a method, `compare-METHOD.json`, says
what it removes and what finding that took; what is left of the model is measured once for each set of layers,
`compare-at-SEGMENTS-….json`, also where several methods remove the same. None depends on another method's: more can
be added later, and a run that was stopped is resumed with the next one. What is left does more than predict text:
with `--tasks` and `--probes` it is measured what each cut still does, in every state (`compare_judged.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from layercut import evaluation, layer_search
from layercut.config import COMPARED_STATES, TRAINED_STATES, CompareConfig, MethodsConfig, flattened
from layercut.data.probes import capability_names
from layercut.distributed import processes
from layercut.errors import ConfigError, ModelError
from layercut.healing.lora import check_lora
from layercut.models import checkpoints, decoder_stack, loading, memory, model_weights, placement
from layercut.pipeline.artefacts import BeforeAfter, bounds_of, segments_of
from layercut.pipeline.compare_artefacts import (
    CompareArtefact,
    CompareDenseArtefact,
    ComparedMethod,
    CompareMethodArtefact,
    DensePerplexity,
    MethodChoice,
)
from layercut.pipeline.compare_judged import DENSE, CutJudge, asked_tasks, with_retention
from layercut.pipeline.compare_states import (
    WINDOWS,
    by_text,
    cut_row,
    in_state,
    stem,
    trained_row,
    window_losses,
)
from layercut.pipeline.resolve_options import check_sources, check_window, default_folder, with_windows
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_store import Run
from layercut.pipeline.stages.search import edition, generated_tests
from layercut.pipeline.stages.text import Use, draw_all
from layercut.progress import say
from layercut.report import formatting
from layercut.report.compare_page import write_comparison
from layercut.segments import checked_segments, layers_to_remove


def compare(model: str, config: CompareConfig, *, own_process: bool = False) -> Path:
    """Run every method on a model and measure what it removes."""
    processes.start()
    if config.load.shard == "on":
        raise ConfigError("compare needs a whole model in every process", "leave out --shard on")
    journey = config.journey()
    checkpoint = checkpoints.resolve(model, allow_pickle=config.load.allow_pickle)
    if placement.wanted(checkpoint, **asdict(config.load)):
        raise ModelError(model_weights.STREAMED, model_weights.STREAMED_HINT)
    if config.tasks.names:
        evaluation.check_tasks(tuple(config.tasks.names), config.tasks.include_path)
    architecture = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window("--window", config.text.window, architecture)
    journey = with_windows(journey, architecture)
    config = replace(config, compare=replace(config.compare, eval_window=journey.evaluate.eval_window))
    if "lora" in config.compare.state_names:
        check_lora(loading.skeleton(architecture, torch.float32))
    layers = decoder_stack.count_layers(architecture)
    length = layers_to_remove(config.compare.ratio or 0, layers)
    check_methods(config.compare, layers, length)
    check_sources(journey)
    folder = default_folder(model)

    folder, limit = folder.with_name(f"{folder.name}-compare"), memory.memory_limit(config.load.max_memory)
    with limit, Run(config.run.out or folder, force=config.run.force) as run:
        run.describe({"model": model, **flattened(config)}, checkpoint)
        compare_methods(RunContext(checkpoint, journey, run, own_process=own_process), model, config.compare, length)
        return run.folder


def compare_methods(work: RunContext, model: str, config: MethodsConfig, length: int) -> None:
    """Search by every method, measure every cut, and write compare.json with its page."""
    run, layers = work.run, work.layers
    judged: list[Use] = ["heldout", "tuning"] if work.config.heal.tune_tokens else []
    draw_all(work, ["calibration", *judged, "evaluation"])
    with run.stage(
        CompareDenseArtefact, "compare-dense", [work.source, work.text["evaluation"], WINDOWS], together=True
    ) as stage:
        if stage.open:
            losses = window_losses(work, work.dense.model)
            stage.found = CompareDenseArtefact(perplexity=evaluation.of_losses(losses), losses=losses.tolist())
    dense = stage.artefact
    choices = [search_by(work, config, method, length) for method in config.names]
    judge = CutJudge(work)
    judged_dense = judge.judge(DENSE, lambda: work.dense.model) if judge.is_asked else None
    rows = measured(work, choices, dense, config.state_names, judge)
    with run.stage(CompareArtefact, "compare", [dense.config_hash, rows, judged_dense]) as comparison:
        if comparison.open:
            comparison.found = CompareArtefact(
                model=model,
                layers=BeforeAfter(before=layers, after=layers - length),
                dense=DensePerplexity(perplexity=dense.perplexity, texts=by_text(work, dense.losses)),
                methods=rows,
                tasks=asked_tasks(judge.records(DENSE)) if work.config.tasks.names else {},
                judged_dense=judged_dense,
                calibration=work.text["calibration"],
                tuning=work.text.get("tuning"),
                evaluation=work.text["evaluation"],
            )
    processes.on_main(lambda: write_comparison(run.folder))


def check_methods(config: MethodsConfig, layers: int, length: int) -> None:
    """Refuse what no method can search for, before anything is loaded."""
    for name in config.names:
        search = config.search(name)
        capability_names(search.preserve)
        if search.segments and (got := sum(map(len, checked_segments(search.segments, layers)))) != length:
            raise ConfigError(
                f"--methods {name} removes {got} layers, and --ratio {config.ratio:g} is {length} of {layers}",
                "all methods remove as many layers",
            )


def measured(
    work: RunContext,
    choices: Sequence[MethodChoice],
    dense: CompareDenseArtefact,
    states: Sequence[str],
    judge: CutJudge,
) -> list[ComparedMethod]:
    """Every method's row: the plain cuts of all first, then their folds, then what is tuned, which takes longest."""
    rows = [cut_row(work, chosen, dense.losses) for chosen in choices]
    trained = {"tuned", *states}.intersection(TRAINED_STATES) if work.config.heal.tune_tokens else set[str]()
    for state in COMPARED_STATES:
        if state in trained:
            rows = [row if row.refused else trained_row(work, row, dense.losses, state) for row in rows]
        if judge.is_asked and state in states:
            rows = [judged_row(work, judge, row, state) for row in rows]
    return with_retention(rows, judge) if work.config.tasks.names else rows


def judged_row(work: RunContext, judge: CutJudge, row: ComparedMethod, state: str) -> ComparedMethod:
    """The row with what its cut still does in a state, where it has that state."""
    if row.perplexity.get(state) is None:
        return row
    segments = segments_of(row.segments)
    after = f"{stem(segments)}-{state if state in TRAINED_STATES else 'cut'}"
    found = judge.judge(f"{stem(segments)}-{state}", lambda: in_state(work, segments, state), [after])
    return replace(row, judged=row.judged | {state: found})


# --- stages ------------------------------------------------------------------------------------------------------


def search_by(work: RunContext, asked: MethodsConfig, method: str, length: int) -> MethodChoice:
    """What one method removes, its KL on the calibration tokens, and what finding it took."""
    config, seed = asked.search(method), work.config.text.seed
    heeds = config.preserve != "none"
    inputs = [work.source, work.text["calibration"], seed, method, length]
    inputs += edition(config)
    with work.run.stage(CompareMethodArtefact, f"compare-{method.replace(':', '-')}", inputs, together=True) as stage:
        if stage.open:
            tokens, tests = work.blocks["calibration"], generated_tests(work, config=config) if heeds else None
            how: dict[str, Any] = {"probes": tests, "num_segments": "auto"} if tests else {}
            how |= {"segments": config.segments} if config.segments else {"n_layers": length, "method": config.method}
            result = layer_search.search(work.stack, tokens, seed=seed, **how)
            stage.found = CompareMethodArtefact(
                method=method,
                segments=bounds_of(result.segments),
                kl=result.kl,
                damage=result.candidates[0].probe_kl if tests else None,
                search_seconds=round(result.seconds, 3),
                layer_forwards=result.cost.layer_forwards,
                layer_backwards=result.cost.layer_backwards,
                dense_tokens=result.cost.dense_tokens,
            )
    found = stage.artefact
    removed = ", ".join(map(str, segments_of(found.segments)))
    say("compare", f"{found.method}: remove {removed}, KL {formatting.figure(found.kl)}")
    return found.facts
