"""Tables of what cuts keep, as Markdown, from the results of compare.py (of several texts, tasks and probes), of
keep_recall.py and of maps.py.

`readme.py` puts them into docs/results.md, and the short ones into docs/what-survives-measured.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from layercut.config import TRAINED_STATES
from layercut.report.comparison_views import answered, damage, repeats, retention_cells, survivals
from layercut.report.comparison_views import found as found_of
from layercut.report.formatting import figure, label, number, percent, short
from layercut.report.tables import by_kl

REPEATS = "; repeats: 4-grams of eight greedy continuations by 64 tokens that had occurred in them"


def tenth_words(result: dict) -> str:
    """The README's: what the first cut of a comparison, of a tenth, costs on the first text once it is healed."""
    comparison = result["comparison"]
    first, dense = comparison["methods"][0], comparison["dense"]["texts"]
    text, before = next(iter(dense.items()))
    removed = label(first["segments"]).replace(", ", " and ")
    keys = found_of(first["judged"]["tuned"]["keys"]).replace("/", " of ")
    return (
        f"Without a tenth, {removed}, healed on {comparison['tuning']['tokens']:,} tokens: "
        f"{first['texts']['tuned'][text] / before - 1:+.1%} of perplexity, {keys} keys. "
    )


def survival_markdown(result: dict, whole: bool) -> str:
    """What the cuts of one comparison still do, as Markdown, and what was not measured.

    Args:
        result: of compare.py.
        whole: every task and every state; otherwise their means, of healed cuts.
    """
    comparison, environment = result["comparison"], result["environment"]
    layers, tuning, tasks = comparison["layers"], comparison["tuning"], comparison["tasks"]
    kept = ["kept, %", "above chance, %", "behind, %"] if tasks else []
    names = [name.removeprefix("local_") for name in tasks]
    probed = bool(comparison["judged_dense"]["keys"])
    found = ["keys", "lists", "answers", "damage, nats", "repeats"] if probed else []
    texts = list(comparison["dense"]["texts"])
    each_task = names if whole else []
    headings = ["method", "removed", "state", *(f"ppl {text}" for text in texts), *kept, *each_task, *found]
    tuned = f", tuned on {tuning['tokens']:,} tokens (healing {result['healing']})" if tuning else ", nothing tuned"
    by_items: dict[int, list[str]] = {}
    for name, of in zip(names, tasks.values(), strict=True):
        by_items.setdefault(of["items"], []).append(name)
    each = [f"{n} items {'each ' * (len(those) > 1)}of {', '.join(those)}" for n, those in by_items.items()]
    asked = f" {'; '.join(each)};" if tasks else ""
    read = comparison["evaluation"]
    of = f"{read['tokens'] // len(texts):,} tokens of each text in windows of {read['window']}"
    lines = [
        f"`layercut compare --ratio {result['ratio']:g}`, {environment['date'][:10]}, {environment['cores']} cores: "
        f"{comparison['model']}, {layers['before']} -> {layers['after']} layers, searched on "
        f"{comparison['calibration']['tokens']:,} tokens{tuned}; perplexity of {of};"
        f"{asked} ± one standard error over the "
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
        if row and not (whole or state in TRAINED_STATES):
            continue
        perplexity = row["texts"][state] if row else comparison["dense"]["texts"]
        cells = [", ".join(f"`{name}`" for name in those) if row else method]
        cells += [label(row["segments"]) if row else "", state]
        cells += [short(perplexity[text]) for text in texts]
        if tasks:
            cells += retention_cells(comparison, state, judged)
            scores = [number(judged.scores[name]) for name in tasks] * whole
            cells += ["–" if score is None else f"{100 * score:.1f}" for score in scores]
        if probed:
            cells += [found_of(judged["keys"]), found_of(judged.lists)]
            cells += [answered(comparison, state, judged), damage(judged) if row else "–"]
            cells.append(repeats(judged) if row else dense_repeats(comparison["methods"]))
        lines.append(f"| {' | '.join(cell if cell != '-' else '–' for cell in cells)} |")
    if whole:
        lines += ["", *hits_table(comparison)] if probed else []
        lines += ["", result["note"]] if result.get("note") else []
    return "\n".join(lines)


def hits_table(comparison: dict) -> list[str]:
    """The share of the generated tests' answers that greedy decoding gives, by capability, dense and healed."""
    healed = {
        (label(row["segments"]), state): judged["capabilities"]
        for row in comparison["methods"]
        for state, judged in row["judged"].items()
        if state in TRAINED_STATES and judged.get("capabilities")
    }
    if not healed:
        return []
    answers = next(iter(healed.values()))["answers"]
    lines = [
        "Answers to tests of the judging family that greedy decoding gives, % (and how many are asked):",
        "",
        f"| removed | {' | '.join(f'{name} ({count})' for name, count in answers.items())} |",
        f"|---|{'---:|' * len(answers)}",
    ]
    rows = {("nothing", ""): next(iter(healed.values()))["dense_hits"]}
    rows |= {key: found["hits"] for key, found in healed.items()}
    for (removed, state), hits in rows.items():
        name = f"{removed}, {state}" if state == "lora" else removed
        lines.append(f"| {name} | {' | '.join(f'{100 * hits[each]:.0f}' for each in answers)} |")
    return lines


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
            damages = (harm["recall"], harm["lists"], fmean(harm.values()))
            cells += [label(row["segments"]), *map(figure, (row["kl"], *damages))]
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


def map_words(result: dict) -> str:
    """A capability map: its picture, and in words which layers hold what."""
    picture = "maps-qwen.svg" if "qwen" in result["model"].lower() else "maps.svg"
    lines = [map_caption(result), "", f"![damage by capability and layer]({picture})", ""]
    return "\n".join([*lines, *(f"* {line}" for line in result["words"])])


def map_table(result: dict) -> str:
    """A capability map as a table, layers down."""
    names = result["names"]
    lines = [map_caption(result), "", f"| without layer | {' | '.join(names)} |", f"|---:|{'---:|' * len(names)}"]
    for row in result["rows"]:
        damages = [f"{row['damage'][name]:.2f}" for name in names]
        lines.append(f"| {row['start']} | {' | '.join(damages)} |")
    return "\n".join(lines)


def map_caption(result: dict) -> str:
    """What a map was made of."""
    answers = ", ".join(f"{name} {count}" for name, count in result["answers"].items())
    return (
        f"`benchmarks/maps.py`, {result['environment']['date'][:10]}, {result['model']}: each layer removed alone; "
        f"nats per answer token, answers ({answers}) in {result['tests']} rows of {result['window']} tokens of tests "
        f"(the family that searches), and KL on {result['text_rows']} rows of text:"
    )
