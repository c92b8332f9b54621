"""Tables of what cuts keep, as Markdown, from the results of compare.py (of several texts, tasks and probes) and of
keep_recall.py.

`readme.py` puts them into docs/guides/what-survives.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from layercut.report.comparison_views import damage, repeats, retention_words, survivals
from layercut.report.comparison_views import found as found_of
from layercut.report.formatting import figure, label, number, percent, short
from layercut.report.tables import by_kl

REPEATS = "; repeats: 4-grams of eight greedy continuations by 64 tokens that had occurred in them"


def survival_markdown(result: dict) -> str:
    """What the cuts of one comparison still do, as Markdown, and what was not measured."""
    comparison, environment = result["comparison"], result["environment"]
    layers, tuning, tasks = comparison["layers"], comparison["tuning"], comparison["tasks"]
    kept = ["kept, %", "above chance, %", "behind, %"] if tasks else []
    names = [name.removeprefix("local_") for name in tasks]
    probed = bool(comparison["judged_dense"]["keys"])
    found = ["keys", "lists", "damage, nats", "repeats"] if probed else []
    texts = list(comparison["dense"]["texts"])
    headings = ["method", "removed", "state", *(f"ppl {text}" for text in texts), *kept, *names, *found]
    tuned = f", tuned on {tuning['tokens']:,} tokens" if tuning else ", nothing tuned"
    by_items: dict[int, list[str]] = {}
    for name, of in zip(names, tasks.values(), strict=True):
        by_items.setdefault(of["items"], []).append(name)
    each = [f"{n} items {'each ' * (len(those) > 1)}of {', '.join(those)}" for n, those in by_items.items()]
    asked = f" {'; '.join(each)};" if tasks else ""
    lines = [
        f"`layercut compare --ratio {result['ratio']:g}`, {environment['date'][:10]}, {environment['cores']} cores: "
        f"{comparison['model']}, {layers['before']} -> {layers['after']} layers, searched on "
        f"{comparison['calibration']['tokens']:,} tokens{tuned};{asked} ± one standard error over the "
        f"items, paired; * p < 0.05 against the first method in the same state{REPEATS * probed}.",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|---|---|{'---:|' * (len(headings) - 3)}",
    ]
    rows = {row["method"]: row for row in comparison["methods"]}
    alike = methods_of(comparison["methods"])
    for method, state, judged in survivals(comparison):
        row = rows.get(method)
        those = alike[label(row["segments"])] if row else ["dense"]
        if row and method != those[0]:  # the same layers, so the same figures
            continue
        perplexity = row["texts"][state] if row else comparison["dense"]["texts"]
        cells = [", ".join(f"`{name}`" for name in those) if row else method]
        cells += [label(row["segments"]) if row else "", state]
        cells += [short(perplexity[text]) for text in texts]
        if tasks:
            words = [retention_words(judged, key) for key in ("mean", "above_chance", "behind")]
            cells += words if row else ["100", "100", "–"]
            scores = [number(judged.scores[name]) for name in tasks]
            cells += ["–" if score is None else f"{100 * score:.1f}" for score in scores]
        if probed:
            cells += [found_of(judged["keys"]), found_of(judged.lists)]
            cells += [damage(judged), repeats(judged)] if row else ["–", dense_repeats(comparison["methods"])]
        lines.append(f"| {' | '.join(cell if cell != '-' else '–' for cell in cells)} |")
    return "\n".join([*lines, *(["", result["note"]] if result.get("note") else [])])


def dense_repeats(rows: Iterable[dict]) -> str:
    """`repeats` of the dense model, which was measured beside every cut."""
    health = next(state["health"] for row in rows for state in row["judged"].values() if state["health"])
    return percent(health["dense"]["repeated_4grams"])


def methods_of(rows: Iterable[dict]) -> dict[str, list[str]]:
    """The methods that remove the same layers, by these, in the order of the rows."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(label(row["segments"]), []).append(row["method"])
    return found


def keep_table(result: dict) -> str:
    """What each criterion removes freely and where some layers have to stay, as Markdown."""
    kept = " and ".join(map(str, result["keep"]))
    lines = [
        f"`benchmarks/keep_recall.py`, {result['environment']['date'][:10]}, {result['model']}, ratio "
        f"{result['ratio']:g}, chosen on {result['tokens']:,} tokens; unhealed. KL on {result['priced']} rows of "
        f"{result['window']} tokens of these; damage: KL per answer token, nats, to {result['tests']} rows of tests "
        "that no criterion sees.",
        "",
        f"| criterion | picks | KL | recall | lists | all | with {kept} kept | KL | recall | lists | all |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    by_method: dict[str, list[dict]] = {}
    for row in result["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    for method, rows in by_method.items():
        cells = [f"`{method}`"]
        for row in sorted(rows, key=lambda row: row["keeps"]):
            harm = row["damage"]
            mean = sum(harm.values()) / len(harm)
            cells += [label(row["segments"]), *map(figure, (row["kl"], harm["recall"], harm["lists"], mean))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def texts_table(result: dict) -> str:
    """Perplexity of every cut on each of several texts, cut and folded, as Markdown."""
    comparison, environment = result["comparison"], result["environment"]
    dense, layers = comparison["dense"]["texts"], comparison["layers"]
    states = [s for s in ("cut", "folded", "tuned") if any(row["texts"].get(s) for row in comparison["methods"])]
    of_dense = ", ".join(f"{short(value)} on {text}" for text, value in dense.items())
    lines = [
        f"`layercut compare --ratio {result['ratio']:g}`, {environment['date'][:10]}, {environment['cores']} cores: "
        f"{comparison['model']}, {layers['before']} -> {layers['after']} layers, chosen and folded on "
        f"{comparison['calibration']['tokens']:,} tokens. Perplexity in windows of "
        f"{comparison['evaluation']['window']}, dense {of_dense}:",
        "",
        f"| {' | '.join(['removed', 'method', 'KL', *(f'{text}, {state}' for text in dense for state in states)])} |",
        f"|---|---|---:|{'---:|' * (len(dense) * len(states))}",
    ]
    methods = methods_of(by_kl(comparison))
    for row in {label(row["segments"]): row for row in by_kl(comparison)}.values():
        who = ", ".join(f"`{name}`" for name in methods[label(row["segments"])] if not name[0].isdigit())
        cells = [label(row["segments"]), who or result.get("given", {}).get(label(row["segments"]), "given")]
        cells.append(figure(row["kl"]))
        cells += [short(row["texts"][s][text]) if row["texts"].get(s) else "–" for text in dense for s in states]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", result["note"]] if result.get("note") else [])])
