"""Search methods side by side: beside the journey, with its model, its tokens and its run folder.

Every method gets the same calibration tokens; what it removes is priced by the real cut on these, and measured by
perplexity on the same held-out tokens, plain and after the closed-form fold. One artefact a method,
`compare-METHOD.json`, none of which depends on another: more methods can be added later, and a run that was stopped
goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut import evaluate, figures, models
from layercut.config import CompareConfig, flattened
from layercut.cut import cut_segment_
from layercut.errors import SurgeryError
from layercut.heal.fold import fold_
from layercut.pipeline import Workbench, check_sources, check_window, default_folder, text_stage
from layercut.progress import bar, say
from layercut.runs import Run, versions
from layercut.search import find_segments
from layercut.segments import Segment, layers_to_remove
from layercut.sweep import Stack

if TYPE_CHECKING:
    from rich.table import Table


def compare(model: str, config: CompareConfig) -> Path:
    """Run every method on `model` and measure what it removes; returns the run folder, with compare.json in it."""
    journey, methods = config.journey(), config.compare.names
    checkpoint = models.resolve(model, allow_pickle=config.load.allow_pickle)
    architecture = models.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window(config.text.window, architecture)
    layers = models.count_layers(architecture)
    length = layers_to_remove(config.compare.ratio or 0, layers)
    check_sources(journey)
    folder = default_folder(model)

    with Run(config.run.out or folder.with_name(f"{folder.name}-compare"), force=config.run.force) as run:
        run.describe({"model": model, **flattened(config)})
        work = Workbench(checkpoint, journey, run)
        text = text_stage(work)

        reported = [work.source, text["evaluation"]]
        dense = run.stage("compare-dense", reported, lambda: {"perplexity": perplexity(work)})
        rows = []
        for method in methods:
            measure = partial(try_method, work, method, length)
            inputs = [*reported, text["calibration"], config.text.seed, method, length]
            rows.append(run.stage(f"compare-{method}", inputs, measure))
            say("compare", describe_row(rows[-1]))

        run.stage(
            "compare",
            [dense["config_hash"], *(row["config_hash"] for row in rows)],
            lambda: {
                "model": model,
                "layers": {"before": layers, "after": layers - length},
                "calibration": text["calibration"],
                "evaluation": text["evaluation"],
                "dense": {"perplexity": dense["perplexity"]},
                "methods": rows,
                "versions": versions(),
            },
        )
        draw_picks(run.read("compare") or {}, run / "compare.svg")
        return run.folder


def try_method(work: Workbench, method: str, length: int) -> dict[str, Any]:
    """One method's artefact: what it removes, what finding that took, and what is left of the model."""
    stack, tokens = work.stack, work.blocks["calibration"]
    result = find_segments(stack, tokens, length, method, seed=work.config.text.seed)
    row: dict[str, Any] = {
        "method": method,
        "segments": [[s.start, s.stop] for s in result.segments],
        "kl": result.candidates[0].kl,
        "perplexity": {"cut": None, "folded": None},
        "fold": [],
        "refused": None,
        "search_seconds": round(result.seconds, 3),
        "layer_forwards": result.cost.layer_forwards,
        "layer_backwards": result.cost.layer_backwards,
        "dense_tokens": result.cost.dense_tokens,
    }
    student = models.share(work.dense.model)
    try:
        cut_segment_(student, result.segments)
    except SurgeryError as error:  # layers apart from each other may leave what the architecture cannot express
        return row | {"refused": error.message}
    cut = perplexity(work, student)
    folded, folds = fold_and_measure(work, student, result.segments)
    return row | {"perplexity": {"cut": cut, "folded": folded}, "fold": folds}


def fold_and_measure(
    work: Workbench, student: Any, segments: Sequence[Segment]
) -> tuple[float | None, list[dict[str, Any]]]:
    """Perplexity after the fold, helpful or not, and what was folded; None where no cut could be."""
    tokens = work.blocks["calibration"]
    with bar("folding", len(segments) * len(tokens)) as advance:
        folds = [fold.to_json() for fold in fold_(work.stack, Stack(student), segments, tokens, advance=advance)]
    done = any(not fold["skipped"] for fold in folds)
    return perplexity(work, student) if done else None, folds


def perplexity(work: Workbench, student: Any = None) -> float:
    """Of the student, or of the dense model, on the held-out tokens."""
    tokens = work.blocks["evaluation"]
    with bar("perplexity", len(tokens)) as advance:
        return evaluate.perplexity(work.dense.model if student is None else student, tokens, advance=advance)


# --- what people see -------------------------------------------------------------------------------------------


def describe_row(row: dict[str, Any]) -> str:
    """One line about a method."""
    return f"{row['method']}: remove {figures.label(row['segments'])}, KL {figures.figure(row['kl'])}"


def by_kl(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The methods' rows, from the cheapest cut to the dearest; a KL that is no finite number comes last."""

    def kl(row: dict[str, Any]) -> float:
        found = figures.finite(row["kl"])
        return float("inf") if found is None else found

    return sorted(comparison["methods"], key=kl)


def comparison_table(comparison: dict[str, Any]) -> Table:
    """The methods from the lowest calibration KL, with their cost."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    layers, evaluation = comparison["layers"], comparison["evaluation"]
    dense = figures.figure(comparison["dense"]["perplexity"])
    table = Table(
        title=Text(f"{comparison['model']}: {layers['before']} -> {layers['after']} layers", style="bold"),
        caption=Text(
            f"KL on {comparison['calibration']['tokens']:,} calibration tokens, perplexity (dense {dense}) on "
            f"{evaluation['tokens']:,} tokens of {evaluation['source']}; fwd and bwd are layers times rows"
        ),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("removed", min_width=8)
    for heading in ("KL", "ppl\ncut", "ppl\nfolded", "s", "layers\nfwd", "layers\nbwd"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in by_kl(comparison):
        table.add_row(
            Text(row["method"]),
            Text(figures.label(row["segments"])),
            figures.figure(row["kl"]),
            "refused" if row["refused"] else short(row["perplexity"]["cut"]),
            "-" if row["perplexity"]["folded"] is None else short(row["perplexity"]["folded"]),
            f"{row['search_seconds']:.1f}",
            figures.count(row["layer_forwards"]),
            figures.count(row["layer_backwards"]),
        )
    return table


def short(perplexity: Any) -> str:
    """A perplexity in few characters, so that a ruined model's does not push columns off the table."""
    found = figures.finite(perplexity)
    return figures.count(found) if found is not None and found >= 1e5 else figures.figure(perplexity)


def draw_picks(comparison: dict[str, Any], path: Path) -> None:
    """What each method removes, on the layer axis, as an SVG file; cheapest cut on top, its KL at the right."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, layers = by_kl(comparison), comparison["layers"]["before"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layercut", "text.parse_math": False}):
        canvas = Figure(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
        axes = canvas.subplots()
        for y, row in enumerate(rows):
            spans = figures.spans(row["segments"])
            axes.broken_barh([(0, layers)], (y - 0.35, 0.7), color="#e4e4ea")
            axes.broken_barh([(start, stop - start) for start, stop in spans], (y - 0.35, 0.7), color="#e07b28")
            axes.text(layers * 1.01, y, figures.figure(row["kl"]), va="center", fontsize=9)
        axes.vlines(range(1, layers), -0.35, len(rows) - 0.65, color="white", lw=0.8)
        axes.text(layers * 1.01, -0.75, "KL, nats", fontsize=9)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, layers)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer (removed ones coloured)")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        partial = path.with_name(f".{path.name}.partial")
        canvas.savefig(partial, format="svg", metadata={"Date": None})
    partial.replace(path)
