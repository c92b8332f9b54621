"""Writes the tables of docs/results.md, of two guides, and those of README.md, from benchmarks/results/: demo,
gate_ablation, stream, compare-RATIO, healing, recall, ingredients, recovery, frontier, tune_quantized, speed, shapes
and others, all .json; of those from recall on, one that is not there yet is said to be open. A table stands between
`<!-- NAME -->` and `<!-- /NAME -->`.

    layercut demo --out runs/demo
    python benchmarks/readme.py runs/demo        # takes the run over, then writes the tables
    python benchmarks/readme.py                  # writes the tables anew from the files that are there

demo.json is a run's summary; the others come from the benchmark of that name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gate_tables import headline_of_search, search_tables
from healing_tables import (
    headline_table,
    healing_table,
    ingredients_table,
    recall_table,
    recovery_table,
    tried_table,
)
from layercut.files.json_values import write_json, write_text
from layercut.report.comparison_views import measured_states
from layercut.report.formatting import Json, count, figure, label, short, size
from layercut.report.tables import by_kl, stage_rows
from stage_two import (
    fewer_bits_words,
    frontier_table,
    gguf_rounding_table,
    speed_table,
    tune_quantized_table,
)
from survival_tables import keep_table, map_table, map_words, survival_markdown, tenth_words, texts_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RESULT = RESULTS / "demo.json"
PAGES = tuple(
    ROOT / page
    for page in ("README.md", *(f"docs/{p}.md" for p in ("results", "guides/engines", "what-survives-measured")))
)


def take_over(run: Path) -> None:
    """Copy a run's summary and where it ran, without paths of this machine."""
    summary = json.loads((run / "summary.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    search = json.loads((run / "search.json").read_text())
    summary["model"] = Path(summary["model"]).name
    regret = (search["oracle"] or {}).get("regret")
    write_json(RESULT, {"summary": summary, "regret": regret, "environment": environment})


def table(result: dict) -> str:
    """The figures as Markdown."""
    summary, environment = result["summary"], result["environment"]
    perplexity, layers, size_of = summary["perplexity"], summary["layers"], summary["bytes"]
    segments = ", ".join(f"{start}:{stop}" for start, stop in summary["segments"])
    came = f", from a file of {size(size_of['source'])}" if "source" in size_of else ""
    lines = [
        f"`make demo`, {environment['date'][:10]}, {environment['cores']} CPU cores ({environment['cpu']}): "
        f"{summary['model']}, {layers['before']} -> {layers['after']} layers (removed {segments}; the gate's choice "
        f"costs {result['regret']:.2f} times the oracle's), {size(size_of['before'])} -> {size(size_of['after'])} in "
        f"bfloat16{came}. Perplexity on {perplexity['tokens']:,} tokens of {perplexity['dataset']}:",
        "",
        "| stage | perplexity | x dense | log gap closed |",
        "|---|---:|---:|---:|",
    ]
    for stage in stage_rows(Json(summary)):
        if stage.perplexity is not None:
            closed = "" if stage.gap_closed is None else f"{100 * stage.gap_closed:.0f} %"
            lines.append(f"| {stage.name} | {stage.perplexity:.2f} | {stage.factor:.2f} | {closed} |")
    return "\n".join(lines)


def compare_table(result: dict) -> str:
    """One comparison of methods as Markdown, from the cheapest cut to the dearest."""
    comparison, environment = result["comparison"], result["environment"]
    layers, tuning, evaluation = comparison["layers"], comparison["tuning"], comparison["evaluation"]
    states = measured_states(comparison)
    tuned = f", {tuning['tokens']:,} tuning" if tuning else ""
    headings = ["method", "removed", "KL", *states, "layer forwards", "s"]
    headings[-2:-2] = ["weights trained"] if tuning else []
    lines = [
        f"`layercut compare --ratio {result['ratio']:g}`, {environment['date'][:10]}, {environment['cores']} CPU cores "
        f"({environment['cpu']}): {comparison['model']}, {layers['before']} -> {layers['after']} layers. The same "
        f"{comparison['calibration']['tokens']:,} calibration{tuned} and {evaluation['tokens']:,} evaluation tokens "
        f"({evaluation['source']}) for all; perplexity, dense {figure(comparison['dense']['perplexity'])}:",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|---|{'---:|' * (len(headings) - 2)}",
    ]
    for row in by_kl(comparison):
        perplexities = ["–" if row["perplexity"].get(s) is None else short(row["perplexity"][s]) for s in states]
        if row["tuning"] and not row["tuning"]["from_fold"] and row["perplexity"]["folded"] is not None:
            perplexities[1] += " (dropped)"
        if row["refused"]:
            perplexities[0] = "refused"
        backwards = f" + {count(row['layer_backwards'])} back" if row["layer_backwards"] else ""
        cells = [f"`{row['method']}`", label(row["segments"]), figure(row["kl"]), *perplexities]
        if tuning:
            cells.append(count(row["tuning"]["trained_parameters"]) if row["tuning"] else "–")
        cells += [count(row["layer_forwards"]) + backwards, f"{row['search_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shapes_table(result: dict) -> str:
    """What larger models take. Without the export: it does with less where less is there."""
    lines = [
        f"`benchmarks/shapes.py`, computed by `layercut plan` from each model's published shape, ratio "
        f"{result['ratio']:g}, default settings; none of these was run. Memory with Python and its libraries, of the "
        f"stage that takes most; with the weights in memory, and with the layers left on disk (`--stream on`):",
        "",
        "| model | layers | bfloat16 | cut | cut, 4 bits | peak memory | from disk | 10^15 operations |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        before, after = row["bytes"]["before"], row["bytes"]["after"]
        peaks = []
        for way in ("off", "on"):
            stages = {name: bytes_ for name, bytes_ in row["peak_bytes"][way].items() if name != "export"}
            most = max(stages, key=stages.__getitem__)
            peaks.append(f"{size(stages[most])} ({most})")
        cells = [row["model"], "{before} -> {after}".format(**row["layers"]), size(before["saved"])]
        cells += [size(after["saved"]), size(after["4 bits"]), *peaks, f"{row['flops'] / 1e15:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def engines_table(result: dict) -> str:
    """What each engine makes of each model."""
    rows = result["rows"]
    models = list(dict.fromkeys(model for row in rows.values() for model in row["models"]))
    lines = [
        f"`make test-engines`, CPU ({result['machine']}); reference: {result['reference']}. In brackets the largest "
        "difference of a token's loss, in nats, and how many of the 24 greedy tokens are the reference's.",
        "",
        f"| engine | {' | '.join(models)} | date |",
        f"|---|{'---|' * len(models)}---|",
    ]
    notes: dict[str, int] = {}
    for name, row in rows.items():
        cells = [f"{name} {row['version']}".strip()]
        for model in models:
            found = row["models"].get(model, {"verdict": "not tried", "reason": row.get("not_installed", "")})
            cell = found["verdict"]
            if found.get("largest") is not None:
                cell += f" ({found['largest']:.0e}, {found['greedy']}/24)"
            said = found.get("layercut", "") if cell.startswith("misread") else ""
            if reason := "; ".join(filter(None, [found["reason"] if cell != "right" else "", said])):
                number = notes.setdefault(reason.replace("|", "¦"), len(notes) + 1)
                cell += f" [{number}]"
            cells.append(cell)
        lines.append(f"| {' | '.join([*cells, row['date']])} |")
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    return "\n".join(lines)


def each(pattern: str, made_by: Callable[[dict], str], wanted: Callable[[dict], bool] = bool) -> str:
    """The tables of several runs of a benchmark, of those that are wanted, one after the other."""
    results = map(read, sorted(RESULTS.glob(pattern), key=lambda file: file.stem))
    return "\n\n".join(made_by(result) for result in results if wanted(result))


def survives(whole: bool) -> str:
    """What the cuts of several methods keep, as far as it was measured.

    Args:
        whole: every state and task, and what a later comparison stands for; else what healed cuts keep by the latest.
    """
    made_by = partial(survival_markdown, whole=whole)
    found = [each("survives-*.json", made_by, lambda result: whole or "superseded_by" not in result)]
    found += [each("texts-*.json", texts_table)] * whole
    return "\n\n".join(filter(None, found)) or "Not measured yet: `benchmarks/compare.py --probes`."


def once_measured(name: str, made_by: Callable[[dict], str], script: str = "") -> str:
    """A table of a result file; before there is one, how to make it."""
    file, by = RESULTS / f"{name}.json", script or name
    return made_by(json.loads(file.read_text())) if file.is_file() else f"Not measured yet: `benchmarks/{by}.py`."


def headline() -> str:
    """The README's table and the words below it; before their results are there, how to make them."""
    made_by = {"default": "recall", "speed": "speed", "survives-0.1": "compare", "tune_quantized": "tune_quantized"}
    files = [RESULTS / f"{name}.json" for name in made_by]
    missing = [f"`benchmarks/{made_by[file.stem]}.py`" for file in files if not file.is_file()]
    if missing:
        return f"Not measured yet: {', '.join(missing)}."
    recall, speed, tenth, rounded = map(read, files)
    return f"{headline_table(recall, speed)} {tenth_words(tenth)}{fewer_bits_words(rounded)}"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def filled(text: str) -> str:
    """A page with its tables made anew."""
    regions = {
        "figures": table(json.loads(RESULT.read_text())),
        "search": search_tables(read(RESULTS / "gate_ablation.json"), read(RESULTS / "stream.json")),
    }
    regions |= {"gate": headline_of_search(read(RESULTS / "gate_ablation.json"))}
    regions |= {"results": headline(), "survives": survives(whole=False), "survives-all": survives(whole=True)}
    regions |= {"compare": each("compare-*.json", compare_table), "healing": each("healing*.json", healing_table)}
    later: dict[str, Callable[[dict], str]] = {"recovery": recovery_table, "frontier": frontier_table}
    later |= {
        "speed": speed_table,
        "shapes": shapes_table,
        "engines": engines_table,
        "recall": recall_table,
        "tune_quantized": tune_quantized_table,
        "tune_quantized-qwen": tune_quantized_table,
        "gguf_rounding": gguf_rounding_table,
        "frontier-qwen": partial(frontier_table, picture="frontier-qwen.svg"),
    }
    later |= {"keep_recall": keep_table}
    regions |= {name: once_measured(name, made_by) for name, made_by in later.items()}
    regions |= {"tried": once_measured("recall", tried_table)}
    regions |= {"ingredients": once_measured("ingredients", ingredients_table, "recall")}
    regions |= {"maps": each("maps*.json", map_words), "maps-all": each("maps*.json", map_table)}
    for region, tables in regions.items():
        text = with_inside(text, region, tables)
    return text


def with_inside(text: str, region: str, inside: str) -> str:
    """The text with other content between a region's marks, where it has that region."""
    between = re.compile(rf"(<!-- {region} -->).*?(<!-- /{region} -->)", re.DOTALL)
    return between.sub(lambda found: f"{found[1]}\n{inside}\n{found[2]}", text)


def main() -> None:
    if len(sys.argv) > 1:
        take_over(Path(sys.argv[1]))
    for drawn in (*RESULTS.glob("frontier*.svg"), *RESULTS.glob("maps*.svg")):  # drawn anew, for the documentation
        drawn.replace(ROOT / "docs" / drawn.name)
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
