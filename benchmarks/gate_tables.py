"""The tables about the search, of docs/results.md and of README.md, from gate_ablation.json and stream.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from layercut.layer_search.sweep import all_segments, sweep_work
from layercut.report.formatting import size

WAYS = {"gate": "gate alone", "race": "race alone", "clp": "`clp`: gate and race", "exhaustive": "sweep of all"}
BACKWARD = 1.61
"""Forwards that a backward through a frozen layer costs, where it was not measured beside (docs/log.md)."""


def spent(case: dict[str, Any], method: str) -> float:
    """Layer-forwards, a backward counted as those that it costs."""
    row = case["methods"][method]
    return row["layer_forwards"] + case.get("backward_over_forward", BACKWARD) * row["layer_backwards"]


def search_tables(ablation: dict, stream: dict) -> str:
    """One segment by every way of searching, several segments, deep stacks, and a model larger than memory."""
    kinds = {kind: [case for case in ablation["cases"] if case["kind"] == kind]
             for kind in ("one", "families", "pairs", "several", "deep")}  # fmt: skip
    run = stream["rows"][0]
    parts = [
        f"`benchmarks/gate_ablation.py`, {ablation['environment']['date'][:10]}. Regret is KL over the best segment's, "
        "on all calibration rows; work is in layer-forwards over those of one sweep of all segments, or of all sets of "
        "two (a backward as what it costs), median and most; CPU seconds over the sweep's.",
        *map(beside_all, by_model(kinds["one"])),
        *(beside_all(kinds[kind]) for kind in ("families", "pairs") if kinds[kind]),
        *(several(kinds[kind]) for kind in ("several", "deep") if kinds[kind]),
        f"A checkpoint of Llama-3-8B's shape ({size(stream['checkpoint_bytes'])}, random weights) searched from disk: "
        f"peak memory {size(run['peak_rss_bytes'])}, each layer read {run['times_each_layer_was_read'][0]} time, "
        f"{run['seconds']['search']:.0f} s on {stream['tokens']['rows']} x {stream['tokens']['window']} tokens.",
    ]
    return "\n\n".join(parts)


def by_model(cases: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The cases of each model, in the order in which models come first."""
    models = dict.fromkeys(case["model"] for case in cases)
    return [[case for case in cases if case["model"] == model] for model in models]


def headline_of_search(ablation: dict) -> str:
    """The README's table: what each part finds and costs, of one segment in all cases."""
    cases = [case for case in ablation["cases"] if case["kind"] in ("one", "families")]
    lines = [f"| search by | best found, of {len(cases)} | worst regret | work |", "|---|---:|---:|---:|"]
    for method in ("gate", "race", "clp"):
        regrets = [case["methods"][method]["regret"] for case in cases]
        work = statistics.median(spent(case, method) / swept(case) for case in cases)
        found = sum(regret < 1.0005 for regret in regrets)
        lines.append(f"| {WAYS[method]} | {found} | {max(regrets):.2f} | {work:.2f} |")
    return "\n".join(lines)


def beside_all(cases: Sequence[dict[str, Any]]) -> str:
    """Regret and work of every way, where the price of everything is known."""
    models = ", ".join(dict.fromkeys(case["model"] for case in cases))
    ratios = sorted({case["ratio"] for case in cases})
    what = "One segment" if cases[0]["segments"] == 1 else "Two segments at most"
    lines = [
        f"{what}, {models}, ratios {ratios[0]:g} to {ratios[-1]:g}, {cases[0]['rows']} rows, {len(cases)} cases:",
        "",
        "| | regret, median | worst | best found | work | at most | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, name in WAYS.items():
        regrets = [case["methods"][method]["regret"] for case in cases]
        work = [spent(case, method) / swept(case) for case in cases]
        seconds = [case["methods"][m]["cpu_seconds"] for m in (method, "exhaustive") for case in cases]
        share = sum(seconds[: len(cases)]) / sum(seconds[len(cases) :])
        lines.append(row(name, regrets, work, f"{share:.2f}"))
    if cases[0]["segments"] == 1:
        brute = [whole(case) / swept(case) for case in cases]
        lines.append(row("brute force (computed)", [1.0] * len(cases), brute, "–"))
    return "\n".join(lines)


def row(name: str, regrets: Sequence[float], work: Sequence[float], seconds: str) -> str:
    """One line of the table."""
    found = sum(regret < 1.0005 for regret in regrets)
    cells = [name, f"{statistics.median(regrets):.2f}", f"{max(regrets):.2f}", f"{found} of {len(regrets)}"]
    cells += [f"{statistics.median(work):.2f}", f"{max(work):.2f}", seconds]
    return f"| {' | '.join(cells)} |"


def swept(case: dict[str, Any]) -> int:
    """Layer-forwards of a sweep of all segments, or sets of them."""
    if case["segments"] > 1:
        return case["methods"]["exhaustive"]["layer_forwards"]
    return sweep_work(all_segments(case["length"], case["layers"]), case["layers"], case["rows"])


def whole(case: dict[str, Any]) -> int:
    """Layer-forwards of running the dense model and every cut one whole."""
    layers, kept = case["layers"], case["layers"] - case["length"]
    return case["rows"] * (layers + (kept + 1) * kept)


def several(cases: Sequence[dict[str, Any]]) -> str:
    """What each method finds with several segments, and what that takes."""
    deep = cases[0]["kind"] == "deep"
    head = (
        "Segments planted in random stacks; price over the planted set's (below 1: a better one)"
        if deep else "Three segments at most; price over the best that any method found"
    )  # fmt: skip
    ways = ("gate", "clp", "race", "sleb", "evolution")
    methods = [way for way in ways if any(way in case["methods"] for case in cases)]
    lines = [
        f"{head}, and layer-forwards:",
        "",
        f"| | {' | '.join(methods)} |{' SLEB would take |' if deep else ''}",
        f"|---|{'---:|' * (len(methods) + deep)}",
    ]
    for case in cases:
        planted = f"{case['segments']} in {case['layers']} layers, seed {case['seed']}"
        name = planted if deep else f"{case['model']}, {case['ratio']:g}"
        found = case["methods"]
        over = case["planted_kl"] if deep else min(row["kl"] for row in found.values())
        cells = [f"{found[m]['kl'] / over:.2f}, {spent(case, m):,.0f}" if m in found else "–" for m in methods]
        cells += [f"{case['sleb_layer_forwards']:,}"] if deep else []
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)
