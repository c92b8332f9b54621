"""Search methods side by side: beside the journey, with its model, its tokens and its run folder.

Every method gets the same calibration tokens; what it removes is priced by the real cut on these, and measured by
perplexity on the same held-out tokens: plain, after the closed-form fold, and after endpoint tuning on as many and
the same tokens for every one. One artefact a method, `compare-METHOD.json`, says what it removes and what finding
that took; what is left of the model is measured once for each set of layers, `compare-at-SEGMENTS-….json`, also
where several methods remove the same. None depends on another method's: more can be added later, and a run that was
stopped is resumed with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from layercut import evaluation, layer_search
from layercut.config import CompareConfig, flattened
from layercut.distributed import processes
from layercut.errors import ConfigError, ModelError, SurgeryError
from layercut.files.json_values import jsonable, restored
from layercut.files.writing import write_atomically
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.least_squares import fold_cut_
from layercut.healing.tuning_state import asked_to_stop
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import all_lengths, segment_costs, sweep_work
from layercut.models import checkpoints, loading, memory
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
from layercut.pipeline.resolve_options import check_sources, check_window, default_folder, with_reported_window
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_store import Run
from layercut.pipeline.stages.heal import tune_settings
from layercut.pipeline.stages.text import Use, draw_all
from layercut.progress import bar, say
from layercut.report import charts, formatting
from layercut.report.formatting import short
from layercut.report.page import write_comparison
from layercut.report.tables import by_kl
from layercut.segments import Segment, layers_to_remove
from layercut.surgery import cut

if TYPE_CHECKING:
    from rich.table import Table

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
    journey, methods = config.journey(), config.compare.names
    checkpoint = checkpoints.resolve(model, allow_pickle=config.load.allow_pickle)
    if placement.wanted(checkpoint, **asdict(config.load)):
        raise ModelError(loading.STREAMED, loading.STREAMED_HINT)
    architecture = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window("--window", config.text.window, architecture)
    journey = with_reported_window(journey, architecture)
    config = replace(config, compare=replace(config.compare, eval_window=journey.evaluate.eval_window))
    layers = loading.count_layers(architecture)
    length = layers_to_remove(config.compare.ratio or 0, layers)
    check_sources(journey)
    folder = default_folder(model)

    with Run(config.run.out or folder.with_name(f"{folder.name}-compare"), force=config.run.force) as run:
        run.describe({"model": model, **flattened(config)})
        work = RunContext(checkpoint, journey, run)
        judged: list[Use] = ["heldout", "tuning"] if journey.heal.tune_tokens else []
        draw_all(work, ["calibration", *judged, "evaluation"])
        with run.stage(
            CompareDenseArtefact, "compare-dense", [work.source, work.text["evaluation"], WINDOWS], together=True
        ) as stage:
            if stage.open:
                losses = window_losses(work, work.dense.model)
                stage.found = CompareDenseArtefact(perplexity=evaluation.of_losses(losses), losses=losses.tolist())
        dense = stage.artefact
        rows = [what_is_left(work, search_by(work, method, length), dense.losses) for method in methods]
        prices = triangle(work, length) if config.compare.triangle else None
        with run.stage(CompareArtefact, "compare", [dense.config_hash, rows, prices]) as comparison:
            if comparison.open:
                comparison.found = CompareArtefact(
                    model=model,
                    layers=BeforeAfter(before=layers, after=layers - length),
                    calibration=work.text["calibration"],
                    tuning=work.text.get("tuning"),
                    evaluation=work.text["evaluation"],
                    dense=DensePerplexity(perplexity=dense.perplexity),
                    methods=rows,
                    triangle=prices.triangle if prices else None,
                )
        found = restored(jsonable(comparison.artefact))
        processes.on_main(lambda: draw_picks(found, run / "compare.svg"))
        processes.on_main(lambda: write_comparison(run.folder))
        return run.folder


# --- stages ------------------------------------------------------------------------------------------------------


def search_by(work: RunContext, method: str, length: int) -> MethodChoice:
    """What one method removes, its KL on the calibration tokens, and what finding it took.

    Args:
        work: of the run.
        method: a name in `layercut.criteria`.
        length: n, layers to remove.

    Returns:
        The method's choice.
    """
    seed = work.config.text.seed
    inputs = [work.source, work.text["calibration"], seed, method, length]
    with work.run.stage(CompareMethodArtefact, f"compare-{method}", inputs, together=True) as stage:
        if stage.open:
            tokens = work.blocks["calibration"]
            result = layer_search.search(work.stack, tokens, n_layers=length, method=method, seed=seed)
            stage.found = CompareMethodArtefact(
                method=method,
                segments=bounds_of(result.segments),
                kl=result.kl,
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


def what_is_left(work: RunContext, chosen: MethodChoice, dense: list[float]) -> ComparedMethod:
    """A method's row: the same stages, and so the same figures, for all methods that remove the same.

    Args:
        work: of the run.
        chosen: what the method removes.
        dense: the dense model's mean loss of each window, with which the standard errors are paired.

    Returns:
        The row.
    """
    segments = segments_of(chosen.segments)
    at = "compare-at-" + "-".join(f"{s.start}.{s.stop}" for s in segments)
    inputs = [work.source, work.text["calibration"], work.text["evaluation"], chosen.segments, WINDOWS]
    with work.run.stage(CompareCutArtefact, f"{at}-cut", inputs, together=True) as cutting:
        if cutting.open:
            cutting.found = cut_and_fold(work, segments, f"{at}-folded")
    cut = cutting.artefact
    row = ComparedMethod(
        **vars(chosen),
        perplexity={"cut": cut.cut, "folded": cut.folded, "tuned": None},
        standard_error={state: error_of(losses, dense) for state, losses in cut.losses.items()},
        fold=cut.fold,
        tuning=None,
        refused=cut.refused,
    )
    if not work.config.heal.tune_tokens or cut.refused:
        return row
    inputs = [*inputs, work.config.heal, work.text["tuning"], work.text["heldout"]]
    with work.run.stage(CompareTunedArtefact, f"{at}-tuned", inputs, together=True) as tuning:
        if tuning.open:
            tuning.found = tune(work, segments, cut.files)
    tuned = tuning.artefact
    return replace(
        row,
        perplexity=row.perplexity | {"tuned": tuned.tuned},
        standard_error=row.standard_error | {"tuned": error_of(tuned.losses, dense)},
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
    report = tune_(student, stack, tokens, heldout=heldout, files=files, **vars(settings))
    start = report.heldout[0]["loss"]
    say("tune", f"{', '.join(map(str, segments))}: held-out loss {start:.4f} -> {report.best:.4f}")
    losses = window_losses(work, student)
    return CompareTunedArtefact(
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


# --- what people see -------------------------------------------------------------------------------------------


def comparison_table(comparison: dict[str, Any]) -> Table:
    """The methods from the lowest calibration KL, with their cost."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    layers, evaluation, tuning = comparison["layers"], comparison["evaluation"], comparison["tuning"]
    dense = formatting.figure(comparison["dense"]["perplexity"])
    table = Table(
        title=Text(f"{comparison['model']}: {layers['before']} -> {layers['after']} layers", style="bold"),
        caption=Text(
            f"KL on {comparison['calibration']['tokens']:,} calibration tokens, perplexity (dense {dense}) on "
            f"{evaluation['tokens']:,} tokens of {evaluation['source']}"
            + (f", each tuned on the same {tuning['tokens']:,} tokens" if tuning else "")
            + "; ± one standard error of the last ppl, paired with the dense model's windows"
            + "; fwd and bwd are layers times rows"
        ),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,  # eighty columns are enough for every column
    )
    table.add_column("method", no_wrap=True)
    table.add_column("removed", min_width=8)
    states = ["cut", "folded", *(["tuned"] if tuning else [])]
    for heading in ("KL", *(f"ppl\n{state}" for state in states), "±", "s", "layers\nfwd+bwd"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in by_kl(comparison):
        perplexities = ["-" if row["perplexity"][s] is None else short(row["perplexity"][s]) for s in states]
        table.add_row(
            Text(row["method"]),
            Text(formatting.label(row["segments"])),
            formatting.figure(row["kl"]),
            *(["refused", *perplexities[1:]] if row["refused"] else perplexities),
            error_beside(row, states),
            f"{row['search_seconds']:.0f}",
            "+".join(formatting.count(n) for n in (row["layer_forwards"], row["layer_backwards"]) if n) or "0",
        )
    return table


def error_beside(row: dict[str, Any], states: list[str]) -> str:
    """Standard error of the last state's perplexity that was measured.

    Args:
        row: of a method.
        states: in their order.

    Returns:
        As text; "-" where there is none.
    """
    known = [s for s in states if row["perplexity"][s] is not None]
    both = ("perplexity", "standard_error")
    value, error = (formatting.finite(row[key].get(known[-1])) if known else None for key in both)
    return "-" if value is None or error is None else formatting.deviation(value * error)


def draw_picks(comparison: dict[str, Any], path: Path) -> None:
    """What each method removes, on the layer axis, as an SVG file; cheapest cut on top, its KL at the right.

    Under it, on the same axis, the price of every segment where the triangle is known.

    Args:
        comparison: compare.json.
        path: the file to write.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, layers = by_kl(comparison), comparison["layers"]["before"]
    prices = charts.prices(comparison)
    heights = [0.3 * len(rows), *([1.2 + 0.28 * max(stop - start for start, stop in prices)] if prices else [])]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layercut", "text.parse_math": False}):
        canvas = Figure(figsize=(7, 1 + sum(heights)), layout="constrained")
        axes, *below = canvas.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        for y, row in enumerate(rows):
            spans = formatting.spans(row["segments"])
            axes.broken_barh([(0, layers)], (y - 0.35, 0.7), color="#e4e4ea")
            axes.broken_barh([(start, stop - start) for start, stop in spans], (y - 0.35, 0.7), color="#e07b28")
            axes.text(layers * 1.01, y, formatting.figure(row["kl"]), va="center", fontsize=9)
        axes.vlines(range(1, layers), -0.35, len(rows) - 0.65, color="white", lw=0.8)
        axes.text(layers * 1.01, -0.75, "KL, nats", fontsize=9)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, layers)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer (removed ones coloured)")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        for lower in below:
            place = {"location": "bottom", "fraction": 0.05, "aspect": 50}
            charts.paint_prices(lower, prices, left=0, ink="black", **place)
            lower.set_xlim(0, layers)
            lower.set_xlabel("first layer removed")
            lower.set_ylabel("layers removed")
            lower.spines[["top", "right", "left"]].set_visible(False)
            lower.tick_params(length=0)
        with write_atomically(path) as partial:
            canvas.savefig(partial, format="svg", metadata={"Date": None})
