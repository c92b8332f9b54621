"""Search methods side by side: beside the journey, with its model, its tokens and its run folder.

Every method gets the same calibration tokens; what it removes is priced by the real cut on these, and measured by
perplexity on the same held-out tokens: plain, after the closed-form fold, and after endpoint tuning on as many and
the same tokens for every one. One artefact a method, `compare-METHOD.json`, says what it removes and what finding
that took; what is left of the model is measured once for each set of layers, `compare-at-SEGMENTS-….json`, also
where several methods remove the same. None depends on another method's: more can be added later, and a run that was
stopped goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from layercut import evaluation, layer_search
from layercut.config import CompareConfig, flattened
from layercut.distributed import processes
from layercut.errors import ConfigError, ModelError, SurgeryError
from layercut.files.writing import write_atomically
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.least_squares import fold_cut_
from layercut.healing.tuning_state import asked_to_stop
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import all_segments, segment_costs, sweep_work
from layercut.models import checkpoints, loading, memory
from layercut.models.runner import DecoderRunner, mean_kl
from layercut.offload import placement
from layercut.pipeline.artefacts import RUNS_OWN
from layercut.pipeline.journey import text_stage
from layercut.pipeline.resolve import check_sources, check_window, default_folder, with_reported_window
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_store import Run
from layercut.pipeline.stages.heal import tune_settings
from layercut.pipeline.stages.text import Use
from layercut.progress import bar, say
from layercut.report import charts, formatting
from layercut.report.formatting import short
from layercut.report.page import write_comparison
from layercut.report.verdicts import by_kl
from layercut.segments import Segment, layers_to_remove
from layercut.surgery import cut

if TYPE_CHECKING:
    from rich.table import Table

TRIANGLE_ROWS = 2
"""Rows of tokens in one sweep of the triangle, in which the hidden states of all segments live at once."""
WINDOWS = "losses of each window"
"""Among a stage's inputs, since artefacts of earlier versions do not hold them."""


def compare(model: str, config: CompareConfig) -> Path:
    """Run every method on `model` and measure what it removes; returns the run folder, with compare.json in it."""
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
        text = text_stage(work, ["calibration", *judged, "evaluation"])

        calibrated = [work.source, text["calibration"]]
        dense = run.stage(
            "compare-dense", [work.source, text["evaluation"], WINDOWS], lambda: measured(work), together=True
        )
        rows = []
        for method in methods:
            search = partial(search_by, work, method, length)
            inputs = [*calibrated, config.text.seed, method, length]
            found = run.stage(f"compare-{method}", inputs, search, together=True)
            say("compare", describe_search(found))
            chosen = {key: value for key, value in found.items() if key not in RUNS_OWN}
            rows.append(chosen | what_is_left(work, found["segments"], text, dense["losses"]))
        prices = None
        if config.compare.triangle:
            priced = partial(triangle, work, length)
            prices = run.stage("compare-triangle", [*calibrated, length], priced, together=True)

        run.stage(
            "compare",
            [dense["config_hash"], rows, prices],
            lambda: {
                "model": model,
                "layers": {"before": layers, "after": layers - length},
                "calibration": text["calibration"],
                "tuning": text.get("tuning"),
                "evaluation": text["evaluation"],
                "dense": {"perplexity": dense["perplexity"]},
                "methods": rows,
                "triangle": prices and prices["triangle"],
            },
        )
        processes.on_main(lambda: draw_picks(run.read("compare") or {}, run / "compare.svg"))
        processes.on_main(lambda: write_comparison(run.folder))
        return run.folder


# --- stages: each returns its artefact ---


def search_by(work: RunContext, method: str, length: int) -> dict[str, Any]:
    """What one method removes, its KL on the calibration tokens, and what finding it took."""
    stack, tokens = work.stack, work.blocks["calibration"]
    result = layer_search.search(stack, tokens, n_layers=length, method=method, seed=work.config.text.seed)
    return {
        "method": method,
        "segments": [[s.start, s.stop] for s in result.segments],
        "kl": result.candidates[0].kl,
        "search_seconds": round(result.seconds, 3),
        "layer_forwards": result.cost.layer_forwards,
        "layer_backwards": result.cost.layer_backwards,
        "dense_tokens": result.cost.dense_tokens,
    }


def triangle(work: RunContext, length: int) -> dict[str, Any]:
    """KL of every segment of 1 … `length` layers on the calibration tokens, [[start, stop, kl], …], in one sweep."""
    stack, tokens, cost = work.stack, work.blocks["calibration"], Cost()
    segments = [s for n in range(1, length + 1) for s in all_segments(n, len(stack))]
    work_ahead = sweep_work(segments, len(stack), len(tokens))
    with bar(f"sweeping {len(segments)} segments", work_ahead) as advance:
        priced = segment_costs(stack, tokens, segments, cost, rows=TRIANGLE_ROWS, advance=advance)
    found = sorted((c.segments[0].start, c.segments[0].stop, c.kl) for c in priced)
    return {"triangle": [list(price) for price in found], "layer_forwards": cost.layer_forwards}


def what_is_left(work: RunContext, bounds: list[list[int]], text: dict[str, Any], dense: list[float]) -> dict[str, Any]:
    """The measured part of a row: the same stages, and so the same figures, for all methods that remove the same.

    dense: the dense model's mean loss of each window, beside which the standard errors are taken.
    """
    segments = [Segment(*pair) for pair in bounds]
    at = "compare-at-" + "-".join(f"{s.start}.{s.stop}" for s in segments)
    inputs = [work.source, text["calibration"], text["evaluation"], bounds, WINDOWS]
    cut = work.run.stage(f"{at}-cut", inputs, partial(cut_and_fold, work, segments, f"{at}-folded"), together=True)
    row = {
        "perplexity": {"cut": cut["cut"], "folded": cut["folded"], "tuned": None},
        "standard_error": {state: error_of(losses, dense) for state, losses in cut["losses"].items()},
        "fold": cut["fold"],
        "tuning": None,
        "refused": cut["refused"],
    }
    if not work.config.heal.tune_tokens or cut["refused"]:
        return row
    inputs = [*inputs, asdict(work.config.heal), text["tuning"], text["heldout"]]
    tuned = work.run.stage(f"{at}-tuned", inputs, partial(tune, work, segments, cut["files"]), together=True)
    return row | {
        "perplexity": row["perplexity"] | {"tuned": tuned["tuned"]},
        "standard_error": row["standard_error"] | {"tuned": error_of(tuned["losses"], dense)},
        "tuning": tuned["tuning"],
    }


def cut_and_fold(work: RunContext, segments: Sequence[Segment], name: str) -> dict[str, Any]:
    """Perplexity of the cut model, and after the fold, helpful or not; the folded weights are kept for tuning."""
    nothing: dict[str, Any] = {"cut": None, "folded": None, "losses": {}, "fold": [], "files": [], "refused": None}
    try:
        student = cut(work.dense.model, segments)
    except SurgeryError as error:  # layers apart from each other may leave what the architecture cannot express
        return nothing | {"refused": error.message}
    found, tokens = measured(work, student), work.blocks["calibration"]
    bare = nothing | {"cut": found["perplexity"], "losses": {"cut": found["losses"]}}
    runner = DecoderRunner(student)
    with bar("folding", len(segments) * len(tokens)) as advance:
        folds = [
            fold_cut_(runner, work.stack, segment, tokens, advance=advance).to_dict() for segment in sorted(segments)
        ]
    if all(fold["skipped"] for fold in folds):
        return bare | {"fold": folds}
    work.save_changes(student, name)
    folded = measured(work, student)
    return bare | {
        "folded": folded["perplexity"], "losses": bare["losses"] | {"folded": folded["losses"]},
        "fold": folds, "files": [f"{name}.safetensors"],
    }  # fmt: skip


def tune(work: RunContext, segments: Sequence[Segment], folded: list[str]) -> dict[str, Any]:
    """Endpoint tuning as the journey does it: from the fold where that helps on the held-out rows."""
    stack, heldout, tokens = work.stack, work.blocks["heldout"], work.blocks["tuning"]
    student = cut(work.dense.model, segments)
    kept = False
    if folded:
        mended = cut(work.dense.model, segments)
        loading.replace_parameters_(mended, load_file(work.run / folded[0]))
        kept = mean_kl(stack, DecoderRunner(mended), heldout) < mean_kl(stack, DecoderRunner(student), heldout)
        student = mended if kept else student
    settings, files = tune_settings(work.config.heal), TuningFiles(stopping=asked_to_stop)
    memory.reuse_freed()
    report = tune_(student, stack, tokens, heldout=heldout, files=files, **vars(settings))
    losses = [point["loss"] for point in report.heldout]
    say("tune", f"{', '.join(map(str, segments))}: held-out loss {losses[0]:.4f} -> {min(losses):.4f}")
    found = measured(work, student)
    return {
        "tuned": found["perplexity"],
        "losses": found["losses"],
        "tuning": {
            "tokens": report.tokens,
            "trained_layers": report.trained_layers,
            "trained_parameters": report.trained_parameters,
            "from_fold": kept,
            "heldout": {"start": losses[0], "best": min(losses)},
            "best_step": report.best_step,
            "tokens_per_second": report.tokens_per_second,
        },
    }


def measured(work: RunContext, student: Any = None) -> dict[str, Any]:
    """Of the student, or of the dense model, on the held-out tokens: perplexity, and the mean loss of each window."""
    tokens = work.blocks["evaluation"]
    with bar("perplexity", len(tokens)) as advance:
        losses = evaluation.window_losses(work.dense.model if student is None else student, tokens, advance=advance)
    return {"perplexity": evaluation.of_losses(losses), "losses": losses.tolist()}


def error_of(losses: list[Any], dense: list[Any]) -> float | None:
    """Standard error of ln(perplexity / dense), paired over the windows; None where it cannot be told."""
    ours, theirs = (torch.tensor([float(x) for x in each], dtype=torch.float64) for each in (losses, dense))
    return evaluation.paired_error(ours, theirs)


# --- what people see -------------------------------------------------------------------------------------------


def describe_search(row: dict[str, Any]) -> str:
    """One line about a method."""
    return f"{row['method']}: remove {formatting.label(row['segments'])}, KL {formatting.figure(row['kl'])}"


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
    """Standard error of the last state's perplexity that was measured."""
    known = [s for s in states if row["perplexity"][s] is not None]
    both = ("perplexity", "standard_error")
    value, error = (formatting.finite(row[key].get(known[-1])) if known else None for key in both)
    return "-" if value is None or error is None else formatting.deviation(value * error)


def draw_picks(comparison: dict[str, Any], path: Path) -> None:
    """What each method removes, on the layer axis, as an SVG file; cheapest cut on top, its KL at the right.

    Under it, on the same axis, the price of every segment where the triangle is known.
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
