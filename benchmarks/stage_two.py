"""The tables of quantization, of the frontier of size and loss, and of speed in docs/results.md; for readme.py.

Each takes the content of its result file and gives Markdown.
"""

from __future__ import annotations

from typing import Any

from fronts import AS_PRINTED, BUDGETS, SMALLER, answers, loss, smallest_within
from layercut.report.formatting import figure, size, times


def frontier_table(result: dict[str, Any]) -> str:
    """The smallest size within each loss, the loss at the goal, what is better at equal bytes, and GGUF as it came."""
    points = result["rows"]
    told = answers([p for p in points if p["points"] == "control"])  # anew, by the rules as they are now
    dense = next(p for p in points if p["points"] == "control" and p["way"] == "dense")
    texts = list(dense["perplexity"])
    lines = [
        f"`benchmarks/frontier.py`, {made(result)}: {result['model']}, {result['weights']}, perplexity on "
        f"{result['eval_tokens']:,} tokens each of {' and '.join(result['texts'].values())} (dense "
        f"{' and '.join(figure(dense['perplexity'][text]) for text in texts)}), every cut healed with "
        f"{result['tune_tokens']:,} tokens. Bytes of all weights, embeddings included; dense bf16 "
        f"{size(dense['bytes'])}. The rise is that of the worse text.",
        "",
        "| asked | bytes | of dense | rise | layers | stored as |",
        "|---|---:|---:|---:|---:|---|",
    ]
    by_point: dict[tuple[Any, ...], tuple[list[str], dict[str, Any]]] = {}
    for budget, point in told["smallest_within"].items():
        key = point["ratio"], point["setting"]
        by_point.setdefault(key, ([], point))[0].append(f"{float(budget):.0%}")
    for budgets, point in by_point.values():  # one row where several budgets allow no more than the same point
        lines.append(frontier_row(f"smallest within {', '.join(budgets)}", point))
    goal = told["goal"]
    best = goal["best_that_fits"]
    lines.append(frontier_row("best that is 80.0% smaller" if best else "smallest", best or goal["smallest"]))
    lines += ["", "- " + "\n- ".join(told["words"])]
    lines += ["", *quantize_lines(result)]
    whole = [point for point in points if point["points"] == "gguf"]
    if any(point["ratio"] for point in whole):
        lines += ["", *gguf_lines(whole)]
    elif whole:
        found = " and ".join(map(figure, whole[0]["perplexity"].values()))
        words = f"{size(whole[0]['bytes'])}, perplexity {found}."
        lines += ["", f"The `.gguf` file itself was measured uncut only (no dithering): {words}"]
    return "\n".join([*lines, "", "![Rise of perplexity over bytes](frontier.svg)"])


def frontier_row(asked: str, point: dict[str, Any]) -> str:
    rise = max(point["rise"].values())
    cells = [asked, size(point["bytes"]), f"{point['share']:.1%}", f"{rise:+.1%}", point["layers"], point["setting"]]
    return "| " + " | ".join(map(str, cells)) + " |"


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


def quantize_lines(result: dict[str, Any]) -> list[str]:
    """Extra loss of quantizing, cut and healed over dense."""
    cut = [row for row in result["quantizing"] if row["ratio"]]
    dense = {row["setting"]: row["extra"] for row in result["quantizing"] if not row["ratio"]}
    texts = list(cut[0]["extra"]) if cut else []
    lines = [
        "Extra loss of quantizing, nats a token, of the dense model and of the cut and healed ones, and the ratio of "
        "the two:",
        "",
        f"| removed | stored as | {' | '.join(f'{text}: dense | cut | ratio' for text in texts)} |",
        f"|---:|---|{'---:|' * 3 * len(texts)}",
    ]
    for row in cut:
        cells = [f"{row['ratio']:.0%}", row["setting"]]
        for text in texts:
            cells += [f"{extra[text]:.4f}" for extra in (dense[row["setting"]], row["extra"])]
            ratio = row["over_dense"][text]
            cells.append("–" if ratio is None else f"{ratio:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tune_quantized_table(result: dict[str, Any]) -> str:
    """What training after rounding brings back at the same bytes; before that, the smallest within each rise."""
    dense = next(row["perplexity"] for row in result["rows"] if row["bits"] == 16)
    rows = [
        row | {"rise": {text: row["perplexity"][text] / value - 1 for text, value in dense.items()}}
        for row in result["rows"] if row["bits"] != 16
    ]  # fmt: skip
    lines = [
        f"Trained after rounding (`--tune-quantized`): `benchmarks/tune_quantized.py`, {made(result)}, "
        f"{result['model']}, {result['weights']}; perplexity of {result['eval_tokens']:,} tokens of each "
        f"text (dense {' and '.join(figure(value) for value in dense.values())}), the rise that of the worse; seconds "
        "with the rounding. Of the rows below:",
        "",
        "| asked | of the dense bytes | rise | bits | embeddings | trained | tokens |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    best = min((row for row in rows if row["of_dense"] <= 1 - SMALLER + AS_PRINTED), key=loss)
    met = [budget for budget in BUDGETS if min(map(loss, rows)) <= budget]
    lines += [answer(f"smallest within {budget:.0%}", smallest_within(rows, budget)) for budget in met]
    lines += [
        answer(f"best at {1 - SMALLER:.0%}", best),
        "",
        f"| of the dense bytes | bits | embeddings | trained | tokens | CPU seconds | {' | '.join(dense)} | rise |",
        f"|---:|---:|---:|---|{'---:|' * (3 + len(dense))}",
    ]
    for row in rows:
        spent = row["quantize_cpu_seconds"] + row.get("tuning", {}).get("cpu_seconds", 0)
        cells = [f"{row['of_dense']:.1%}", *described(row), f"{spent:.0f}", *map(figure, row["perplexity"].values())]
        lines.append(f"| {' | '.join(cells)} | {loss(row):+.1%} |")
    return "\n".join(lines)


def answer(asked: str, row: dict[str, Any]) -> str:
    """The row that answers a question, as a line."""
    return f"| {asked} | {row['of_dense']:.1%} | {loss(row):+.1%} | {' | '.join(described(row))} |"


def described(row: dict[str, Any]) -> list[str]:
    """Bits, bits of embeddings, what is trained, on how many tokens."""
    auto = row["bits"] == "auto"
    bits = f"auto, {row['mean_bits']:.1f} on average" if auto else str(row["bits"])
    bits += ", zero points" if row.get("asymmetric") else ""
    bits += f", without layers {row['removed']}" if "removed" in row else ""
    by = f"auto-round, {row['iterations']} steps" if row["quantizer"] == "auto-round" else row["train"]
    by += f", {row['mix']:g} of it the next token's loss" if "mix" in row else ""
    by += f", rate {row['rate']:g}" if "rate" in row else ""
    by += f", {row['batch']} tokens a step" if "batch" in row else ""
    tokens = [f"{row['tokens']:,}"] if row["tokens"] else []
    tokens += [f"{' and '.join(row['beside'].split('+'))} beside C4"] if "beside" in row else []
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
