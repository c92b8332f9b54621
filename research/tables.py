"""Writes the tables between `<!-- NAME -->` and `<!-- /NAME -->` in the pages that hold one.

python research/tables.py      # each from the file of research/results that its function names
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks_kept import behind

ROOT = Path(__file__).parents[1]
NAMES = (
    "README.md",
    "docs/results.md",
    "docs/engines.md",
    "research/search.md",
    "research/cost.md",
    "research/healing.md",
)
PAGES = [ROOT / name for name in NAMES]


def read(name: str) -> Any:
    return json.loads((ROOT / "research" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(headings: list[str], rows: list[list[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *rows])


def removed(segments: list[list[int]]) -> str:
    """[[5, 7], [12, 16]] -> 5–6, 12–15."""
    return ", ".join(str(start) if stop == start + 1 else f"{start}–{stop - 1}" for start, stop in segments)


def kept(retained: dict[str, Any]) -> str:
    return f"{100 * retained['mean']:.1f} ± {100 * retained['error']:.1f}"


def found(rows: list[dict[str, Any]]) -> str:
    return str(sum(row["found"] for row in rows))


def headline() -> str:
    """README's: SmolLM2-135M without a fifth of its layers."""
    rows, speed = read("default")["rows"], read("speed")["rows"][0]["decode"]["ratio"]
    dense = next(row for row in rows if row["segments"] == "nothing")
    cut = next(row for row in rows if row["segments"] == "5:7,12:16" and not row["tokens"])
    healed = next(row for row in rows if row["segments"] == "5:7,12:16" and row.get("chats"))
    tasks = kept(read("survives-0.2-chats")["comparison"]["methods"][0]["judged"]["tuned"]["retained"])
    ways = (dense, cut, healed)
    table = [
        ["perplexity, WikiText-2 (lower is better)", *(f"{row['perplexity']['wiki']:.1f}" for row in ways)],
        ["score on seven tasks, % of the dense score", "100 %", "", f"{tasks} %"],
        ["numbers hidden in the prompt that are found, of 120", *(str(row["keys_found"]) for row in ways)],
        ["size in bfloat16", "269 MB", "227 MB", "227 MB"],
        ["decoding speed", "1×", f"{speed:.2f}×", f"{speed:.2f}×"],
    ]
    return markdown(["", "dense", "pruned", "pruned and healed"], table)


def methods() -> str:
    """Cuts of several methods, healed alike."""
    table = []
    for row in read("survives-0.2-chats")["comparison"]["methods"]:
        judged, behind = row["judged"]["tuned"], ""
        if judged["retained"]["behind"] is not None:
            retained = judged["retained"]
            p = max(retained["p_value"], 0.001)
            behind = f"{100 * retained['behind']:.1f} ± {100 * retained['behind_error']:.1f} (p = {p:.2g})"
        perplexity = [f"{value:.1f}" for value in row["texts"]["tuned"].values()]
        recall = [found(judged["keys"]), found(judged["lists"])]
        table.append([removed(row["segments"]), kept(judged["retained"]), behind, *recall, *perplexity])
    headings = ["removed", "tasks kept, %", "behind, %", "keys of 40", "list values of 40", "WikiText-2", "C4"]
    return markdown(headings, table)


def healing() -> str:
    """Ways to heal one cut on the same tokens."""
    names = {
        "fold": "fold alone", "endpoints": "endpoints, after the fold", "no-fold": "endpoints, without the fold",
        "mix": "endpoints, next-token loss at 0.3", "lora": "LoRA on all layers",
        "last-3-head": "last 3 layers and head", "full": "all weights",
    }  # fmt: skip
    rows = {row["method"]: row for row in read("healing")["rows"]}
    table = []
    for name, label in names.items():
        row = rows[name]
        weights = f"{row['trained_parameters'] / 1e6:.1f}M" if row.get("trained_parameters") else ""
        closed = [f"{100 * share:.0f} %" for share in row["gap_closed"].values()]
        table.append([label, weights, *closed])
    return markdown(["method", "weights trained", "WikiText-2", "C4"], table)


def speed() -> str:
    """What fewer layers make faster, by two engines."""
    table = [
        [
            f"{100 * row['ratio']:.0f} %", row.get("backend", "transformers, bfloat16"), str(row["prompt_tokens"]),
            f"{row['prefill']['ratio']:.2f}×", f"{row['decode']['ratio']:.2f}×",
        ]
        for row in read("speed")["rows"]
        if row["prompt_tokens"] == 512 and row.get("gguf_type", "as it came") == "as it came"
    ]  # fmt: skip
    return markdown(["removed", "engine", "prompt", "prefill", "decode"], table, left=2)


def engines() -> str:
    """What each engine makes of each model."""
    result = read("engines")
    names = list(dict.fromkeys(model for row in result["rows"].values() for model in row["models"]))
    table, notes = [], dict[str, int]()
    for name, row in result["rows"].items():
        cells = [f"{name} {row['version']}".strip()]
        for model in names:
            each = row["models"].get(model, {"verdict": "not tried", "reason": row.get("not_installed", "")})
            cell = each["verdict"]
            if each.get("largest") is not None:
                cell += f" ({each['largest']:.0e}, {each['greedy']}/24)"
            said = each.get("layercut", "") if cell.startswith("misread") else ""
            if reason := "; ".join(filter(None, [each["reason"] if cell != "right" else "", said])):
                cell += f" [{notes.setdefault(reason.replace('|', '¦'), len(notes) + 1)}]"
            cells.append(cell)
        table.append([*cells, row["date"]])
    intro = (
        f"CPU ({result['machine']}); reference: {result['reference']}. In brackets: the largest difference of a "
        "token's loss, in nats, and how many of 24 greedy tokens agree."
    )
    ends = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join([intro, "", markdown(["engine", *names, "date"], table, left=len(names) + 2), "", *ends])


KINDS = {
    "one": "{}", "families": "random stacks of four architectures", "pairs": "the same, two segments",
    "two": "{}, two segments", "several": "{}, three segments",
    "planted": "one segment planted in 30, 80 and 126 layers", "deep": "three or four planted in 80 and 126 layers",
}  # fmt: skip


def gates() -> str:
    """Each search method on each kind of model: regret, and work over that of cutting all candidates in one sweep."""
    table, groups = [], dict[str, list[dict[str, Any]]]()
    for case in read("gates")["cases"]:
        groups.setdefault(
            KINDS[case["kind"]].format(case["model"].split("-Instruct")[0].split("-instruct")[0]), []
        ).append(case)
    for kind, cases in groups.items():
        for method in dict.fromkeys(name for case in cases for name in case["methods"]):
            rows = [(case, case["methods"][method]) for case in cases if method in case["methods"]]
            regrets = sorted(row["regret"] for _, row in rows)
            work, seconds = [], []
            for case, row in rows:
                if whole := case["methods"].get("exhaustive"):
                    backward = case.get("backward_over_forward", 1.0)
                    layers = row["layer_forwards"] + backward * row["layer_backwards"]
                    work.append(layers / whole["layer_forwards"])
                    if row["cpu_seconds"] is not None:
                        seconds.append(row["cpu_seconds"] / whole["cpu_seconds"])
            best = f"{sum(regret < 1.0005 for regret in regrets)} of {len(regrets)}"
            cells = [f"{statistics.median(some):.2f}" if some else "–" for some in (work, seconds)]
            most = f"{max(work):.2f}" if work else "–"
            table.append([kind, f"`{method}`", f"{statistics.median(regrets):.2f}", f"{regrets[-1]:.2f}", best,
                          cells[0], most, cells[1]])  # fmt: skip
    heads = ["model", "method", "regret, median", "worst", "best found", "work, median", "most", "seconds"]
    return markdown(heads, table, left=2)


def account() -> str:
    """Of each run: passes of tokens through the whole dense stack, tokens at the head, and seconds, by part."""
    table = []
    for model, run in read("account").items():
        of_tuning = sum(row["cpu_seconds"] for row in run["rows"] if row["stage"] == "tune")
        for row in run["rows"]:
            if row["cpu_seconds"] >= 5:
                counts = (f"{row[name]:,}" for name in ("tokens_of_a_pass", "with_gradient", "head_tokens"))
                share = f"{row['cpu_seconds'] / of_tuning:.2f}"
                cpu = f"{row['cpu_seconds']:.0f}"
                table.append([model, row["stage"], row["part"] or "itself", *counts, cpu, share])
        total = sum(row["cpu_seconds"] for row in run["rows"])
        table.append([model, "all", "", "", "", "", f"{total:.0f}", f"{total / of_tuning:.2f}"])
    heads = ["run", "stage", "part", "tokens through all layers", "with gradients", "at the head", "CPU seconds",
             "of tuning"]  # fmt: skip
    return markdown(heads, table, left=3)


def dose() -> str:
    """Tokens and what is trained: tasks, recall, formats, replies and perplexity."""
    first, *rows = read("dose")["rows"]
    best, of_way = max(rows, key=lambda row: row["retained"]["mean"]), {row["way"]: row for row in rows}
    table = []
    for row in rows:
        tokens, *options = row["way"].split()
        trained = {"train=all": "all layers", "train=lora": "LoRA on all"}.get(" ".join(options))
        apart = "{:.1f} ± {:.1f}".format(*(100 * each for each in behind(first, best, row)))
        less = of_way.get(" ".join([str(int(tokens) // 4), *options]))
        gained = "{:+.1f} ± {:.1f}".format(*(100 * each for each in behind(first, row, less))) if less else ""
        perplexity = [f"{row['perplexity'][text] / first['perplexity'][text]:.2f}" for text in ("wiki", "c4")]
        tuning = row["tuning"]
        table.append([
            f"{int(tokens):,}", trained or " ".join(["endpoints", *options]).replace("=", " "), kept(row["retained"]),
            "" if row is best else apart, gained,
            str(row["keys_found"]), str(row["lists_found"]), f"{row['hits']['format'] / first['hits']['format']:.1f}",
            f"{row['replies']['compressed'] / first['replies']['dense']:.2f}", *perplexity,
            f"{min(point['kl'] for point in tuning['heldout']):.3f}", f"{tuning['cpu_seconds'] / 60:.0f}",
            f"{tuning['trained_parameters'] / 1e6:.1f}M",
        ])  # fmt: skip
    heads = ["tokens", "trained", "tasks kept, %", "behind the best, %", "ahead of a quarter of the text, %",
             f"keys of {first['keys_asked']}",
             f"list values (dense {first['lists_found']})", "formats", "length of replies", "WikiText-2", "C4",
             "held-out KL", "CPU minutes of tuning", "weights trained"]  # fmt: skip
    return markdown(heads, table, left=2)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline, "methods": methods, "healing": healing, "speed": speed, "engines": engines,
    "gates": gates, "account": account, "dose": dose,
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its tables made anew."""
    for name, made_by in TABLES.items():
        if f"<!-- {name} -->" in text:
            between = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
            table = made_by().replace("\\", r"\\")
            text = between.sub(rf"\1\n{table}\n\2", text)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
