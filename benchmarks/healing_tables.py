"""The README's tables of healing; for readme.py. Each takes the content of its result file and gives Markdown."""

from __future__ import annotations

from layercut.figures import count, figure, size


def healing_table(result: dict) -> str:
    """Every healing of one cut as Markdown: what it trains, costs, and brings back."""
    settings, environment, rows = result["settings"], result["environment"], result["rows"]
    dense, cut = (next(row for row in rows if row["method"] == name)["perplexity"] for name in ("dense", "cut"))
    headings = ["method", "weights trained", "tokens per CPU second", "peak memory above the weights", "held-out KL"]
    headings += [f"gap closed, {text}" for text in dense]
    headings += ["in the CPU seconds of `endpoints`"]
    from_to = "; ".join(f"{text} {figure(dense[text])} dense, {figure(cut[text])} cut" for text in dense)
    plain = [f"`{row['method']}`" for row in rows if row["method"] in ("patch", "no-fold", "optipfair")]
    machine = f"{environment['cores']} CPU cores ({environment['cpu']})"
    lines = [
        f"`benchmarks/healing.py`, {environment['date'][:10]}, {machine}: {settings['model']} without layers "
        f"{settings['segment']}, healed on the same {settings['tune_tokens']:,} tokens "
        f"({settings['data'].replace('+', ', ')}) after a fold on {settings['calibration_tokens']:,} "
        f"({', '.join(plain)} without it); gap closed, (ln cut - ln healed) / (ln cut - ln dense) of perplexities, on "
        f"{settings['eval_tokens']:,} tokens of "
        f"each text ({from_to}). The last column: the same, trained anew on as many tokens as fit there:",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|{'---:|' * (len(headings) - 1)}",
    ]
    for row in rows:
        if row["method"] not in ("dense", "cut"):
            trained = count(row["trained_parameters"]) if "trained_parameters" in row else ""
            speed = f"{row['tokens_per_cpu_second']:,.0f}" if "tokens_per_cpu_second" in row else ""
            gaps = [f"{100 * gap:.0f} %" for gap in row["gap_closed"].values()]
            anew = row.get("equal_time") or {"gap_closed": {}}
            equal = ", ".join(f"{100 * gap:.0f} %" for gap in anew["gap_closed"].values())
            cells = [f"`{row['method']}`", trained, speed, size(row["peak_above_weights_bytes"]), f"{row['kl']:.3f}"]
            cells += [*gaps, equal]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recovery_table(result: dict) -> str:
    """How far fold and tuning go with more tokens, each budget a run of its own."""
    rows = {row["state"]: row["perplexity"] for row in result["rows"]}
    texts = result["reported"]
    dense, cut = rows["dense"], rows["cut"]
    from_to = "; ".join(f"{text} {figure(dense[text])} dense, {figure(cut[text])} cut" for text in texts)
    lines = [
        f"How far that goes, `benchmarks/recovery.py`, {result['environment']['date'][:10]}: the same cut, fold on "
        f"{result['calibration_tokens']:,} tokens, then tuning; gap closed on {result['eval_tokens']:,} tokens of each "
        f"text ({from_to}):",
        "",
        f"| | trained layers | tokens a step | CPU seconds, fold included | held-out KL | {' | '.join(texts)} |",
        f"|---|---|{'---:|' * (3 + len(texts))}",
    ]
    for row in result["rows"][2:]:
        name = "fold alone" if row["state"] == "folded" else f"tuned on {row['tune_tokens']:,}"
        if (epochs := row.get("epochs", 1)) > 1:
            name += f" ({epochs} x {row['tune_tokens'] // epochs:,})"
        if row.get("radius", 1) > 1:
            name += f", `--radius {row['radius']}`"
        if row.get("mix"):
            name += f", `--mix {row['mix']:g}`"
        trained = ", ".join(map(str, row.get("trained_layers", [])))
        seconds = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:,.0f}"
        gaps = [f"{100 * row['gap_closed'][text]:.0f} %" for text in texts]
        kl = f"{row['heldout_kl']:.3f}"
        step = f"{row['batch_tokens']:,}" if "batch_tokens" in row else ""
        lines.append(f"| {' | '.join([name, trained, step, seconds, kl, *gaps])} |")
    return "\n".join(lines)
