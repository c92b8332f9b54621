"""The tables of quantization, of the frontier of size and loss, and of speed in docs/results.md; for readme.py.

Each takes the content of its result file and gives Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from fronts import AS_PRINTED, BUDGETS, SMALLER, answers, loss, smallest_within, worded
from layercut.report.formatting import figure, size, times

NOTHING = 0.005
"""Nats that bits cost the dense model below which no ratio to them tells anything."""


def frontier_table(result: dict[str, Any], picture: str = "frontier.svg") -> str:
    """The smallest size within each loss, the loss at the goal, what is better at equal bytes, all points, and GGUF."""
    points = result["rows"]
    control, whole = ([p for p in points if p["points"] == kind] for kind in ("control", "gguf"))
    told = answers(control)  # anew, by the rules as they are now
    dense = next(p for p in control if p["way"] == "dense")
    texts = list(dense["perplexity"])
    chosen = "chosen by " + ("the text alone" if result.get("preserve", "none") == "none" else "text and tests")
    for ratio, cut in result.get("cuts", {}).items():
        chosen += f", those of {float(ratio):.0%} given ({cut.replace('+', ' and ')})"
    asked, tasks = "keys_asked" in dense, "retained" in dense  # results of before 2026-11-28 have no keys
    keys = f" Of {dense['keys_asked']} keys in up to {result['longest']:,} tokens so many are found." if asked else ""
    lines = [
        f"`benchmarks/frontier.py`, {made(result)}: {result['model']}, {result['weights']}, perplexity on "
        f"{result['eval_tokens']:,} tokens each of {' and '.join(result['texts'].values())} (dense "
        f"{' and '.join(figure(dense['perplexity'][text]) for text in texts)}); layers {chosen}, every cut "
        f"healed with {result['tune_tokens']:,} tokens. Bytes of all weights, embeddings included; dense bf16 "
        f"{size(dense['bytes'])}. The rise is that of the worse text.{keys}{tasks_words(result)}",
        "",
        f"| asked | bytes | of dense | rise |{' keys |' * asked}{' tasks, % |' * tasks} layers | stored as |",
        f"|---|---:|---:|---:|{'---:|' * (asked + tasks)}---:|---|",
    ]
    by_point: dict[tuple[Any, ...], tuple[list[str], dict[str, Any]]] = {}
    for budget, point in told["smallest_within"].items():
        key = point["ratio"], point["setting"]
        by_point.setdefault(key, ([], point))[0].append(f"{float(budget):.0%}")
    for budgets, point in by_point.values():  # one row where several budgets allow no more than the same point
        lines.append(frontier_row(f"smallest within {', '.join(budgets)}", point, tasks))
    goal = told["goal"]
    best = goal["best_that_fits"]
    lines.append(frontier_row("best that is 80.0% smaller" if best else "smallest", best or goal["smallest"], tasks))
    lines += ["", "- " + "\n- ".join([*told["words"], *quantize_words(result)])]
    lines += ["", "All points, of the dense bytes and the rise:", "", *grid(control, share_and_rise)]
    lines += ["", "Keys found:", "", *grid(control, lambda point: str(point["keys_found"]))] if asked else []
    lines += ["", "Of the tasks' scores, %, and above chance:", "", *grid(control, tasks_cell)] if tasks else []
    if any(point["ratio"] for point in whole):
        lines += ["", *gguf_lines(whole)]
    elif whole:
        found = " and ".join(map(figure, whole[0]["perplexity"].values()))
        words = f"{size(whole[0]['bytes'])}, perplexity {found}."
        lines += ["", f"The `.gguf` file itself was measured uncut only (no dithering): {words}"]
    return "\n".join([*lines, "", f"![Rise of perplexity over bytes]({picture})"])


def frontier_row(asked: str, point: dict[str, Any], tasks: bool) -> str:
    cells = [asked, size(point["bytes"]), f"{point['share']:.1%}", f"{loss(point):+.1%}"]
    cells += [point["keys_found"]] if "keys_found" in point else []
    cells += [tasks_cell(point)] * tasks  # empty where a training follows
    return "| " + " | ".join(map(str, [*cells, point["layers"], worded(point["setting"])])) + " |"


def grid(points: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table of settings by share of the layers removed."""
    ratios, settings = (list(dict.fromkeys(p[name] for p in points)) for name in ("ratio", "setting"))
    there = {(p["ratio"], p["setting"]): cell(p) for p in points}
    lines = [f"| layers removed: | {' | '.join(f'{ratio:.0%}' for ratio in ratios)} |", f"|---|{'---:|' * len(ratios)}"]
    return lines + [
        f"| {worded(setting)} | {' | '.join(there.get((ratio, setting), '') for ratio in ratios)} |"
        for setting in settings
        if any(there.get((ratio, setting)) for ratio in ratios)
    ]


def share_and_rise(point: dict[str, Any]) -> str:
    rise = f"{loss(point):+.1%}" if loss(point) < 1 else times(1 + loss(point))
    return f"{point['share']:.0%}: {rise}"


def tasks_cell(point: dict[str, Any]) -> str:
    """What is left of the tasks' scores and, after a comma, above chance; with errors over the items where any."""
    if not (kept := point.get("retained")):
        return ""
    figures = [(kept[name], kept[error]) for name, error in (("mean", "error"), ("above_chance", "above_chance_error"))]
    return ", ".join(
        f"{100 * share:.1f}" + (f" ± {100 * error:.1f}" if error else "") if share is not None else "–"
        for share, error in figures
    )


def tasks_words(result: dict[str, Any]) -> str:
    """Which tasks were asked; empty where none was."""
    if not (tasks := result.get("tasks")):
        return ""
    names = ", ".join(task.removeprefix("local_") for task in tasks)
    return (
        f" Of the scores of {result['items']} items each of {names} so much is left, on average and above chance; "
        "± one standard error over the items, paired."
    )


def gguf_lines(points: list[dict[str, Any]]) -> list[str]:
    """The file as it came, cut and healed."""
    texts = list(points[0]["perplexity"])
    lines = [
        "The `.gguf` file itself, as it came (no dithering): kept tensors byte for byte, healed layers in Q8_0:",
        "",
        f"| layers | file | of the dense file | {' | '.join(f'perplexity, {text} | rise' for text in texts)} |",
        f"|---:|---:|---:|{'---:|' * 2 * len(texts)}",
    ]
    for p in points:
        cells = [str(p["layers"]), size(p["bytes"]), f"{p['share']:.1%}"]
        for text in texts:
            cells += [figure(p["perplexity"][text]), f"{p['rise'][text]:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def quantize_words(result: dict[str, Any]) -> list[str]:
    """Whether few bits, not trained, cost a cut model more than the dense one, where they cost that something."""
    rows = [row for row in result["quantizing"] if "train=" not in row["setting"]]
    dense = {row["setting"]: row["extra"] for row in rows if not row["ratio"]}
    known = sorted(
        ratio for row in rows if row["ratio"] for text, ratio in row["over_dense"].items()
        if dense[row["setting"]][text] > NOTHING
    )  # fmt: skip
    if not known:
        return []
    return [
        f"The same bits cost a cut and healed model {median(known):.2f} times the nats that they cost the dense one "
        f"(median of {len(known)}, {known[0]:.2f} to {known[-1]:.2f})."
    ]


def tune_quantized_table(result: dict[str, Any]) -> str:
    """What training after rounding brings back at the same bytes; before that, the smallest within each rise."""
    dense, rows = with_rises(result)
    found = {as_it_was(row) for row in rows}
    marks = "; ".join(f"{mark} {means}" for mark, means in AS_IT_WAS.items() if mark in found)
    lines = [
        f"Trained after rounding (`--tune-quantized`): `benchmarks/tune_quantized.py`, {made(result)}, "
        f"{result['model']}, {result['weights']}; perplexity of {result['eval_tokens']:,} tokens of each "
        f"text (dense {' and '.join(figure(value) for value in dense.values())}), the rise that of the worse; seconds "
        f"with the rounding{'. ' * bool(marks)}{marks}. Of the rows below:",
        "",
        "| asked | of the dense bytes | rise | bits | embeddings | trained | tokens |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    lines += [answer(asked, row) for asked, row in asked_of(rows)]
    lines += [
        "",
        f"| of the dense bytes | bits | embeddings | trained | tokens | CPU seconds | {' | '.join(dense)} | rise |",
        f"|---:|---:|---:|---|{'---:|' * (3 + len(dense))}",
    ]
    for row in sorted(rows, key=lambda row: (-round(row["of_dense"], 3), loss(row))):
        spent = row["quantize_cpu_seconds"] + row.get("tuning", {}).get("cpu_seconds", 0)
        cells = [f"{row['of_dense']:.1%}", *described(row), f"{spent:.0f}", *map(figure, row["perplexity"].values())]
        lines.append(f"| {' | '.join(cells)} | {loss(row):+.1%} |")
    return "\n".join(lines)


def fewer_bits_words(result: dict[str, Any]) -> str:
    """The README's: what fewer bits cost where all layers stay."""
    _, rows = with_rises(result)
    found = [row for _, row in asked_of([row for row in rows if "removed" not in row])]
    asked = [row for row, before in zip(found, [None, *found], strict=False) if row is not before]
    units = [(" of the bytes", " of perplexity"), *([("", "")] * (len(asked) - 1))]
    listed = ", ".join(
        f"{row['of_dense']:.1%}{of} for {loss(row):+.1%}{on}" for row, (of, on) in zip(asked, units, strict=True)
    )
    most = max(row["tokens"] for row in asked)
    return (
        f"Fewer bits instead: {listed}, trained on up to {most:,} tokens "
        "([how](docs/results.md#size-against-perplexity))."
    )


def with_rises(result: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Of tune_quantized.py's results the dense model's perplexity, and all other rows, with how much theirs rose."""
    dense = next(row["perplexity"] for row in result["rows"] if row["bits"] == 16)
    rises = [{text: row["perplexity"][text] / value - 1 for text, value in dense.items()} for row in result["rows"]]
    return dense, [row | {"rise": rise} for row, rise in zip(result["rows"], rises, strict=True) if row["bits"] != 16]


def asked_of(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The smallest row within each rise that is met, and the best of those that are small enough."""
    met = [budget for budget in BUDGETS if min(map(loss, rows)) <= budget]
    best = min((row for row in rows if row["of_dense"] <= 1 - SMALLER + AS_PRINTED), key=loss)
    smallest = [(f"smallest within {budget:.0%}", smallest_within(rows, budget)) for budget in met]
    return [*smallest, (f"best at {1 - SMALLER:.0%}", best)]


def answer(asked: str, row: dict[str, Any]) -> str:
    """The row that answers a question, as a line."""
    return f"| {asked} | {row['of_dense']:.1%} | {loss(row):+.1%} | {' | '.join(described(row))} |"


AS_IT_WAS = {
    "*": "by GPTQ as it was, all tokens counting alike, scales not fitted to codes",
    "†": "with scales fitted, codes not exchanged, no ridge",
}
"""What the marks of rows say that were made before."""


def as_it_was(row: dict[str, Any]) -> str:
    """The mark of a row whose weights were rounded before it was done as it is now."""
    if row["quantizer"] != "gptq" or (row["bits"] != "auto" and row["bits"] >= 8) or "codes" in row:
        return ""
    return "†" if "scales" in row else "*"


def described(row: dict[str, Any]) -> list[str]:
    """Bits, bits of embeddings, what is trained, on how many tokens."""
    auto = row["bits"] == "auto"
    bits = f"auto, {row['mean_bits']:.1f} on average" if auto else str(row["bits"])
    bits += (", zero points" if row.get("asymmetric") else "") + (f", groups of {row['group']}" if row["group"] else "")
    bits += as_it_was(row) + (f", {row['turns']} turns" if "turns" in row else "")  # of a draft; there are more
    bits += f", without layers {row['removed']}" if "removed" in row else ""
    by = f"auto-round, {row['iterations']} steps" if row["quantizer"] == "auto-round" else row["train"]
    by += f", {row['mix']:g} of it the next token's loss" if "mix" in row else ""
    by += f", rate {row['rate']:g}" if "rate" in row else ""
    by += f", {row['batch']} tokens a step" if "batch" in row else ""
    tokens = [f"{row['tokens']:,}"] if row["tokens"] else []
    tokens += [f"{' and '.join(row['beside'].split('+'))} beside C4"] if "beside" in row else []
    short = "" if "rows" in row else ", rows of 256"
    tokens += [f"{row['tests']:.0%} of them tests{short}"] if "tests" in row else []
    tokens += [f"rounded on {row['calibration']:,}"] if "calibration" in row else []
    tokens += ["rounded on tests too"] if row.get("rounding_tests") else []
    embeddings = "chosen" if auto else str(row["embeddings"])
    small = row["embeddings"] < 8 or row.get("one_width")
    embeddings += ", to nearest" if small and "head" not in row else ""
    return [bits, embeddings, by, ", ".join(tokens)]


def gguf_rounding_table(result: dict[str, Any]) -> str:
    """What a GGUF file loses by its codes."""
    plain, *rows = result["rows"]
    dense = plain["perplexity"]
    lines = [
        f"GGUF files: `benchmarks/gguf_rounding.py`, {made(result)}, {result['model']}, {result['weights']}, all "
        f"layers; perplexity of {result['eval_tokens']:,} tokens of each text in llama.cpp (float32 "
        f"{' and '.join(figure(value) for value in dense.values())}):",
        "",
        f"| type | codes by | bytes | CPU seconds | {' | '.join(dense)} | rise |",
        f"|---|---|---:|---:|{'---:|' * (1 + len(dense))}",
    ]
    for row in rows:
        rise = max(row["perplexity"][text] / value - 1 for text, value in dense.items())
        cells = [row["kind"].upper(), row["rounded"], f"{row['bytes']:,}", f"{row['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join([*cells, *map(figure, row['perplexity'].values()), f'{rise:+.1%}'])} |")
    return "\n".join(lines)


def speed_table(result: dict[str, Any]) -> str:
    """How much faster, and how much of what can be reached that is."""
    lines = [
        f"`benchmarks/speed.py`, {made(result)}: {result['model']}, dense and cut timed in turn. "
        "Reachable: 1 / (1 - r s), r the share of layers removed, s that of the dense model's time spent in them, "
        f"which is timed too.{beyond(result['rows'])}",
        "",
        "| removed | by | prompt | prefill | of reachable | decode | of reachable |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        by = f"{row['backend']}, {row['gguf_type']}" if "backend" in row else f"transformers, {result['dtype']}"
        cells = [f"{row['ratio']:.0%}", by, f"{row['prompt_tokens']:,}"]
        for phase in ("prefill", "decode"):
            cells += [times(row[phase]["ratio"]), f"{row[phase]['reached']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beyond(rows: list[dict[str, Any]]) -> str:
    """A sentence on shares of the reachable above 1, where there are any: they show how large the noise is."""
    most = max((row[phase]["reached"] for row in rows for phase in ("prefill", "decode")), default=0.0)
    if most <= 1:
        return ""
    return (
        f" No cut is faster than that: shares above 1, here up to {most:.2f}, are the noise of both timings, and "
        f"differences up to {most - 1:.2f} tell nothing."
    )


def made(result: dict[str, Any]) -> str:
    """When and where."""
    environment = result["environment"]
    return f"{environment['date'][:10]}, {environment['cores']} CPU cores ({environment['cpu']})"
