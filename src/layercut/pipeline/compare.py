"""Search methods side by side: beside the journey, with its model, its tokens and its run folder.

Every method gets the same calibration tokens; what it removes is priced by the real cut on these, and measured by
perplexity on the same held-out tokens: plain, after the closed-form fold, and after endpoint tuning on as many and
the same tokens for every one. One artefact a method, `compare-METHOD.json`, says what it removes and what finding
that took; what is left of the model is measured once for each set of layers, `compare-at-SEGMENTS-….json`, also
where several methods remove the same. None depends on another method's: more can be added later, and a run that was
stopped is resumed with the next one. What is left does more than predict text: with `--tasks` and `--probes` it is
measured what each cut still does, in every state (`compare_judged.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from layercut import evaluation, layer_search
from layercut.config import COMPARED_STATES, CompareConfig, MethodsConfig, flattened
from layercut.data.probes import capability_names
from layercut.data.sources import split_mix
from layercut.data.text_overlap import by_origin
from layercut.distributed import processes
from layercut.errors import ConfigError, ModelError, SurgeryError
from layercut.files.json_values import jsonable, restored
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.least_squares import fold_cut_
from layercut.healing.tuning_state import asked_to_stop
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import all_lengths, segment_costs, sweep_work
from layercut.models import checkpoints, loading, memory
from layercut.models.compiling import compiled
from layercut.models.runner import DecoderRunner, mean_kl
from layercut.offload import placement
from layercut.pipeline.artefacts import BeforeAfter, bounds_of, segments_of
from layercut.pipeline.compare_artefacts import (
    CompareArtefact,
    CompareCutArtefact,
    CompareDenseArtefact,
    ComparedMethod,
    ComparedTuning,
    CompareMethodArtefact,
    CompareTriangleArtefact,
    CompareTunedArtefact,
    DensePerplexity,
    MethodChoice,
    StartAndBest,
)
from layercut.pipeline.compare_judged import DENSE, CutJudge, asked_tasks, with_retention
from layercut.pipeline.resolve_options import check_sources, check_window, default_folder, with_windows
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_store import Run
from layercut.pipeline.stages.heal import tune_settings
from layercut.pipeline.stages.search import edition, generated_tests
from layercut.pipeline.stages.text import Use, draw_all, tuning_treatment
from layercut.progress import bar, say
from layercut.report import formatting
from layercut.report.comparison_views import draw_picks, draw_survival
from layercut.report.page import write_comparison
from layercut.segments import Segment, checked_segments, layers_to_remove
from layercut.surgery import cut

TRIANGLE_ROWS = 2
"""Rows of tokens in one sweep of the triangle, in which the hidden states of all segments live at once."""
WINDOWS = "losses of each window"
"""Among a stage's inputs, since artefacts of earlier versions do not hold them."""


def compare(model: str, config: CompareConfig) -> Path:
    """Run every method on a model and measure what it removes.

    Args:
        model: a Hub id, a folder, or a .gguf file.
        config: every option.

    Returns:
        The run folder, with compare.json in it.

    Raises:
        LayercutError: wrong input; the hint says how to correct it.
    """
    processes.start()
    if config.load.shard == "on":
        raise ConfigError("compare needs a whole model in every process", "leave out --shard on")
    journey = config.journey()
    checkpoint = checkpoints.resolve(model, allow_pickle=config.load.allow_pickle)
    if placement.wanted(checkpoint, **asdict(config.load)):
        raise ModelError(loading.STREAMED, loading.STREAMED_HINT)
    if config.tasks.names:
        evaluation.check_tasks(config.tasks.names, config.tasks.include_path)
    architecture = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window("--window", config.text.window, architecture)
    journey = with_windows(journey, architecture)
    config = replace(config, compare=replace(config.compare, eval_window=journey.evaluate.eval_window))
    layers = loading.count_layers(architecture)
    length = layers_to_remove(config.compare.ratio or 0, layers)
    check_methods(config.compare, layers, length)
    check_sources(journey)
    folder = default_folder(model)

    folder, limit = folder.with_name(f"{folder.name}-compare"), memory.memory_limit(config.load.max_memory)
    with limit, compiled(config.compiled.compile), Run(config.run.out or folder, force=config.run.force) as run:
        run.describe({"model": model, **flattened(config)})
        compare_methods(RunContext(checkpoint, journey, run), model, config.compare, length)
        return run.folder


def compare_methods(work: RunContext, model: str, config: MethodsConfig, length: int) -> None:
    """Search by every method, measure every cut, and write compare.json with its plots and page.

    Args:
        work: of the run.
        model: as it was named.
        config: the methods.
        length: n, layers to remove.
    """
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
    prices = triangle(work, length) if config.triangle else None
    rows, judge = measured(work, choices, dense, config.state_names)
    judged_dense = judge.judge(DENSE, lambda: work.dense.model) if judge.is_asked else None
    with run.stage(CompareArtefact, "compare", [dense.config_hash, rows, prices, judged_dense]) as comparison:
        if comparison.open:
            comparison.found = CompareArtefact(
                model=model,
                layers=BeforeAfter(before=layers, after=layers - length),
                dense=DensePerplexity(perplexity=dense.perplexity, texts=by_text(work, dense.losses)),
                methods=rows,
                triangle=prices.triangle if prices else None,
                tasks=asked_tasks(judge.records(DENSE)) if work.config.tasks.names else {},
                judged_dense=judged_dense,
                calibration=work.text["calibration"],
                tuning=work.text.get("tuning"),
                evaluation=work.text["evaluation"],
            )
    found = restored(jsonable(comparison.artefact))
    processes.on_main(lambda: draw_and_write(found, run.folder))


def draw_and_write(found: dict[str, Any], folder: Path) -> None:
    """The plots and the page of a comparison.

    Args:
        found: compare.json.
        folder: of the run.
    """
    draw_picks(found, folder / "compare.svg")
    if found["judged_dense"]:
        draw_survival(found, folder / "compare-survival.svg")
    write_comparison(folder)


def check_methods(config: MethodsConfig, layers: int, length: int) -> None:
    """Refuse what no method can search for, before anything is loaded.

    Args:
        config: names the methods.
        layers: L.
        length: n, layers to remove.

    Raises:
        ConfigError: a capability is unknown, or given segments do not have n layers.
    """
    for name in config.names:
        search = config.search(name)
        capability_names(search.preserve)
        if search.segments and (got := sum(map(len, checked_segments(search.segments, layers)))) != length:
            raise ConfigError(
                f"--methods {name} removes {got} layers, and --ratio {config.ratio:g} is {length} of {layers}",
                "all methods remove as many layers",
            )


def measured(
    work: RunContext, choices: Sequence[MethodChoice], dense: CompareDenseArtefact, states: Sequence[str]
) -> tuple[list[ComparedMethod], CutJudge]:
    """Every method's row: the plain cuts of all first, then their folds, then what is tuned, which takes longest.

    Args:
        work: of the run.
        choices: what each method removes.
        dense: the dense model's perplexity.
        states: that are measured by tasks and probes.

    Returns:
        The rows, and what measured them.
    """
    rows, judge = [cut_row(work, chosen, dense.losses) for chosen in choices], CutJudge(work)
    if judge.is_asked:
        judge.judge(DENSE, lambda: work.dense.model)
    for state in COMPARED_STATES:
        if state == "tuned" and work.config.heal.tune_tokens:
            rows = [row if row.refused else tuned_row(work, row, dense.losses) for row in rows]
        if judge.is_asked and state in states:
            rows = [judged_row(work, judge, row, state) for row in rows]
    if work.config.tasks.names:
        rows = with_retention(rows, judge, {row.method: stem(segments_of(row.segments)) for row in rows})
    return rows, judge


def judged_row(work: RunContext, judge: CutJudge, row: ComparedMethod, state: str) -> ComparedMethod:
    """The row with what its cut still does in a state, where it has that state.

    Args:
        work: of the run.
        judge: measures.
        row: of a method.
        state: of `COMPARED_STATES`.

    Returns:
        The row.
    """
    if row.perplexity.get(state) is None:
        return row
    segments = segments_of(row.segments)
    after = f"{stem(segments)}-{'tuned' if state == 'tuned' else 'cut'}"
    found = judge.judge(f"{stem(segments)}-{state}", lambda: in_state(work, segments, state), [after])
    return replace(row, judged=row.judged | {state: found})


def in_state(work: RunContext, segments: Sequence[Segment], state: str) -> Any:
    """The model without the segments, in a state whose weights the run folder has.

    Args:
        work: of the run.
        segments: that are removed.
        state: of `COMPARED_STATES`.

    Returns:
        A causal LM of transformers.
    """
    student = cut(work.dense.model, segments)
    if state != "cut":
        loading.replace_parameters_(student, load_file(work.run / f"{stem(segments)}-{state}.safetensors"))
    return student


def stem(segments: Sequence[Segment]) -> str:
    """What the artefacts of a set of removed layers begin with."""
    return "compare-at-" + "-".join(f"{s.start}.{s.stop}" for s in segments)


def by_text(work: RunContext, losses: Sequence[float]) -> dict[str, float]:
    """Perplexity of each text, where the evaluation text is a mix of several.

    Args:
        work: of the run.
        losses: of each window, in the order of the mix.

    Returns:
        By the text's name; empty where there is one.
    """
    text = work.text["evaluation"]
    named = split_mix(text.source)  # what streams are called; of files that is less telling than their names
    origins = named if len(named) == len(text.origins) else text.origins
    parts = by_origin(torch.tensor(losses, dtype=torch.float64), origins)
    if len(parts) == 1:
        return {}
    return {formatting.source_name(name): evaluation.of_losses(part) for name, part in parts.items()}


# --- stages ------------------------------------------------------------------------------------------------------


def search_by(work: RunContext, asked: MethodsConfig, method: str, length: int) -> MethodChoice:
    """What one method removes, its KL on the calibration tokens, and what finding it took.

    Args:
        work: of the run.
        asked: says how a method searches.
        method: one of its names.
        length: n, layers to remove.

    Returns:
        The method's choice.
    """
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
                damage=result.candidates[0].damage if tests else None,
                search_seconds=round(result.seconds, 3),
                layer_forwards=result.cost.layer_forwards,
                layer_backwards=result.cost.layer_backwards,
                dense_tokens=result.cost.dense_tokens,
            )
    found = stage.artefact
    removed = ", ".join(map(str, segments_of(found.segments)))
    say("compare", f"{found.method}: remove {removed}, KL {formatting.figure(found.kl)}")
    return found.facts


def triangle(work: RunContext, length: int) -> CompareTriangleArtefact:
    """KL of every segment of 1 … `length` layers on the calibration tokens, in one sweep.

    Args:
        work: of the run.
        length: layers of the longest segments.

    Returns:
        The artefact.
    """
    inputs = [work.source, work.text["calibration"], length]
    with work.run.stage(CompareTriangleArtefact, "compare-triangle", inputs, together=True) as stage:
        if stage.open:
            stack, tokens, cost = work.stack, work.blocks["calibration"], Cost()
            segments = all_lengths(length, len(stack))
            total = sweep_work(segments, len(stack), len(tokens))
            with bar(f"sweeping {len(segments)} segments", total) as advance:
                priced = segment_costs(stack, tokens, segments, cost, rows=TRIANGLE_ROWS, advance=advance)
            prices = sorted((c.segments[0].start, c.segments[0].stop, c.kl) for c in priced)
            stage.found = CompareTriangleArtefact(triangle=prices, layer_forwards=cost.layer_forwards)
    return stage.artefact


def cut_row(work: RunContext, chosen: MethodChoice, dense: list[float]) -> ComparedMethod:
    """A method's row, cut and folded: the same stages, so the same figures, for all methods that remove the same.

    Args:
        work: of the run.
        chosen: what the method removes.
        dense: the dense model's mean loss of each window, with which the standard errors are paired.

    Returns:
        The row.
    """
    segments, at = segments_of(chosen.segments), stem(segments_of(chosen.segments))
    inputs = cut_inputs(work, chosen)
    with work.run.stage(CompareCutArtefact, f"{at}-cut", inputs, together=True) as cutting:
        if cutting.open:
            cutting.found = cut_and_fold(work, segments, f"{at}-folded")
    cut = cutting.artefact
    return ComparedMethod(
        **vars(chosen),
        perplexity={"cut": cut.cut, "folded": cut.folded, "tuned": None},
        standard_error={state: error_of(losses, dense) for state, losses in cut.losses.items()},
        texts={state: by_text(work, losses) for state, losses in cut.losses.items()},
        fold=cut.fold,
        tuning=None,
        refused=cut.refused,
    )


def cut_inputs(work: RunContext, chosen: MethodChoice) -> list[Any]:
    """What a cut and its fold depend on.

    Args:
        work: of the run.
        chosen: what is removed.

    Returns:
        JSON values.
    """
    return [work.source, work.text["calibration"], work.text["evaluation"], chosen.segments, WINDOWS]


def tuned_row(work: RunContext, row: ComparedMethod, dense: list[float]) -> ComparedMethod:
    """A method's row with what tuning did.

    Args:
        work: of the run.
        row: cut and folded.
        dense: the dense model's mean loss of each window.

    Returns:
        The row.
    """
    segments, at = segments_of(row.segments), stem(segments_of(row.segments))
    inputs = [*cut_inputs(work, row), work.config.heal, work.text["tuning"], work.text["heldout"]]
    with work.run.stage(CompareTunedArtefact, f"{at}-tuned", inputs, together=True) as tuning:
        if tuning.open:
            files = work.run.artefact(CompareCutArtefact, f"{at}-cut").files
            tuning.found = tune(work, segments, files)
    tuned = tuning.artefact
    return replace(
        row,
        perplexity=row.perplexity | {"tuned": tuned.tuned},
        standard_error=row.standard_error | {"tuned": error_of(tuned.losses, dense)},
        texts=row.texts | {"tuned": by_text(work, tuned.losses)},
        tuning=tuned.tuning,
    )


def cut_and_fold(work: RunContext, segments: Sequence[Segment], name: str) -> CompareCutArtefact:
    """Perplexity of the cut model, and after the fold, helpful or not; the folded weights are kept for tuning.

    Args:
        work: of the run.
        segments: that are removed.
        name: of the file of folded weights.

    Returns:
        The artefact; of a cut that cannot be expressed, the reason.
    """
    try:
        student = cut(work.dense.model, segments)
    except SurgeryError as error:  # layers apart from each other may leave what the architecture cannot express
        return CompareCutArtefact(refused=error.message)
    losses, tokens = {"cut": window_losses(work, student)}, work.blocks["calibration"]
    runner = DecoderRunner(student)
    with bar("folding", len(segments) * len(tokens)) as advance:
        folds = [fold_cut_(runner, work.stack, segment, tokens, advance=advance) for segment in sorted(segments)]
    is_folded = not all(fold.skipped for fold in folds)
    if is_folded:
        work.save(work.changed(student), name)
        losses["folded"] = window_losses(work, student)
    return CompareCutArtefact(
        cut=evaluation.of_losses(losses["cut"]),
        folded=evaluation.of_losses(losses["folded"]) if is_folded else None,
        losses={state: each.tolist() for state, each in losses.items()},
        fold=folds,
        files=[f"{name}.safetensors"] if is_folded else [],
    )


def tune(work: RunContext, segments: Sequence[Segment], folded: list[str]) -> CompareTunedArtefact:
    """Endpoint tuning as the journey does it: from the fold where that helps on the held-out rows.

    Args:
        work: of the run.
        segments: that are removed.
        folded: the file of folded weights, or nothing.

    Returns:
        The artefact.
    """
    stack, heldout, tokens = work.stack, work.blocks["heldout"], work.blocks["tuning"]
    student = cut(work.dense.model, segments)
    kept = False
    if folded:
        with_fold = cut(work.dense.model, segments)
        loading.replace_parameters_(with_fold, load_file(work.run / folded[0]))
        kept = mean_kl(stack, DecoderRunner(with_fold), heldout) < mean_kl(stack, DecoderRunner(student), heldout)
        student = with_fold if kept else student
    settings, files = tune_settings(work.config.heal), TuningFiles(stopping=asked_to_stop)
    memory.reuse_freed()
    treated = tuning_treatment(work)
    report = tune_(student, stack, tokens, heldout=heldout, files=files, **vars(treated), **vars(settings))
    start = report.heldout[0]["loss"]
    say("tune", f"{', '.join(map(str, segments))}: held-out loss {start:.4f} -> {report.best:.4f}")
    losses, name = window_losses(work, student), f"{stem(segments)}-tuned"
    work.save(work.changed(student), name)
    return CompareTunedArtefact(
        files=[f"{name}.safetensors"],
        tuned=evaluation.of_losses(losses),
        losses=losses.tolist(),
        tuning=ComparedTuning(
            tokens=report.tokens,
            trained_layers=report.trained_layers,
            trained_parameters=report.trained_parameters,
            from_fold=kept,
            heldout=StartAndBest(start=start, best=report.best),
            best_step=report.best_step,
            tokens_per_second=report.tokens_per_second,
        ),
    )


def window_losses(work: RunContext, model: Any) -> torch.Tensor:
    """The mean loss of each window of the evaluation tokens.

    Args:
        work: of the run.
        model: a causal LM of transformers.

    Returns:
        [N], float64, nats per token.
    """
    tokens = work.blocks["evaluation"]
    with bar("perplexity", len(tokens)) as advance:
        return evaluation.window_losses(model, tokens, advance=advance)


def error_of(losses: list[float], dense: list[float]) -> float | None:
    """Standard error of ln(perplexity / dense), paired over the windows.

    Args:
        losses: of each window, nats per token.
        dense: the same of the dense model.

    Returns:
        Nats per token; None where it is not defined.
    """
    of_model, of_dense = (torch.tensor(each, dtype=torch.float64) for each in (losses, dense))
    return evaluation.paired_error(of_model, of_dense)
