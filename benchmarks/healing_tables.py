"""The tables of healing in README.md and docs/results.md, Markdown from result files; for readme.py."""

from __future__ import annotations

from statistics import fmean

from layercut.report.formatting import count, figure, size, times


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


DEFAULT, BY_TEXT = "5:7,12:16", "13:19"
"""What the trial of `compress` puts first of SmolLM2-135M by default, and what goes with `--preserve none`."""
AS_BY_DEFAULT = {
    "tokens": 131072, "mix": 0.3, "rate": 0.0, "radius": 1, "window": 1024, "parted": 1, "beside": "wiki_passages.txt",
}  # fmt: skip
"""How it heals, of recall.py's settings."""
WITH_TESTS = {"share": 0.1, "chats": 0.1, "answer_weight": 4.0}
"""And where recall is to be kept."""


def headline_table(recall: dict, speed: dict) -> str:
    """The README's table: what the default cut and its healing leave, beside the cut and healing by the text alone."""
    environment = recall["environment"]
    asked: dict[str, dict] = {
        "dense": {"segments": "nothing"},
        f"without {named_cut(DEFAULT)}": {"segments": DEFAULT, "tokens": 0},
        "**healed**": {"segments": DEFAULT} | WITH_TESTS | AS_BY_DEFAULT,
        f"chosen and healed by the text alone: without {BY_TEXT}": {
            "segments": BY_TEXT, "share": 0.0,
        } | AS_BY_DEFAULT,
    }  # fmt: skip
    found = {name: [row for row in recall["rows"] if how.items() <= row.items()] for name, how in asked.items()}
    if missing := [name for name, rows in found.items() if not rows]:
        return f"Not measured yet: `benchmarks/recall.py`, {', '.join(missing)}."
    dense = found["dense"][0]
    counted = f"keys found of {dense['keys_asked']} | list values found of {dense['lists_asked']}"
    lines = [
        f"`benchmarks/recall.py`, {environment['date'][:10]}, {environment['cores']} CPU cores: {recall['model']} "
        f"without a fifth of its layers, folded on {recall['fold_tokens']:,} and healed on {AS_BY_DEFAULT['tokens']:,} "
        f"tokens of C4 and Wikipedia, else as by default (12:16: layers 12 to 15); "
        f"{recall['eval_tokens']:,} tokens of each text in windows of {recall['window']}.",
        "",
        f"| | {' | '.join(f'perplexity, {text}' for text in dense['perplexity'])} | {counted} |",
        f"|---|{'---:|' * (len(dense['perplexity']) + 2)}",
        *(headline_row(name, rows[0]) for name, rows in found.items()),
    ]
    return "\n".join([*lines, "", headline_words(speed)])


def headline_row(name: str, row: dict) -> str:
    """One state: perplexity of each text, keys and values found."""
    found = [figure(value) for value in row["perplexity"].values()]
    return f"| {' | '.join([name, *found, str(row['keys_found']), str(row['lists_found'])])} |"


def named_cut(segments: str) -> str:
    """ "3:6,13:16" in words."""
    return segments.replace(",", " and ")


def headline_words(speed: dict) -> str:
    """Bytes and speed of a cut of as many layers."""
    fifth = next(row for row in speed["rows"] if row["ratio"] == 0.2 and "backend" not in row)
    sizes = fifth["weight_bytes"]
    return (
        f"Weights in bfloat16: {size(sizes['dense'])} to {size(sizes['compressed'])}. "
        f"Decoding: {times(fifth['decode']['ratio'])} as fast."
    )


def lengths_of(row: dict, window: int) -> str:
    """Tokens in the rows that are tuned on."""
    longest = row["window"] or window
    return f"{longest:,} and {window}" if row["parted"] else f"{longest:,}"


WRITERS = {
    "text": "in two rounds",
    "student": "in two rounds, the second of what the healed model wrote",
    "dense": "in two rounds, the second of what the dense model wrote",
    "chat": "in two rounds, the second of chats that the dense model wrote",
}
"""What recall.py's second round of tuning is on, where there is one; tests stay among it."""


def taught_otherwise(row: dict) -> str:
    """What recall.py's tokens to tune on are, where they are not text as it comes."""
    hurt = f", of {row['hurt']} rows the one that the cut hurt most" if row["hurt"] != 1 else ""
    return hurt + (f", {WRITERS[row['writer']]}" if row["writer"] else "")


def recall_table(result: dict) -> str:
    """What cuts and healings keep of recall, beside perplexity, as Markdown."""
    rows, environment = result["rows"], result["environment"]
    texts, asked = list(rows[0]["perplexity"]), rows[0]["keys_asked"]
    damages = ("recall", "lists", "copy", "labels", "sums", "structure", "format")
    tasks = next((list(row["tasks"]) for row in rows if "tasks" in row), [])
    shown = [f"tasks ({len(tasks)})"] if tasks else []
    lines = [
        f"`benchmarks/recall.py`, {environment['date'][:10]}, {environment['cores']} CPU cores: {result['model']}, "
        f"each cut folded and tuned anew; perplexity of {result['eval_tokens']:,} tokens in windows of "
        f"{result['window']}; keys hidden in, and values of a list of, up to {result['longest']:,} tokens, found "
        f"of {asked}; {f'share of the dense scores of {names} that is left; ' if (names := ', '.join(tasks)) else ''}"
        "then damage to tests of the judging family, nats per answer token:",
        "",
        "| removed | layers tuned | tuned on | rows of | tests among it | next-token share | rate | "
        f"{' | '.join([*texts, 'keys', 'lists', *shown, *damages])} |",
        f"|---|{'---:|' * (6 + len(texts) + 2 + len(shown) + len(damages))}",
    ]
    for row in rows:
        dense = row["segments"] == "nothing"
        how = [""] * 6
        if tuning := row.get("tuning"):
            beside = (", half of them Wikipedia" if row["beside"] else "") + taught_otherwise(row)
            counted = f", answers x {row['answer_weight']:g}" if row["answer_weight"] != 1 else ""
            how = [f"{row['tokens']:,}{beside}", lengths_of(row, result["window"]), f"{row['share']:.0%}{counted}"]
            how += [f"{row['mix']:g}", f"{tuning['learning_rate']:g}"]
            how.insert(0, "LoRA on all" if row["lora"] else str(len(tuning["trained_layers"])))
        cells = [named_cut(row["segments"]), *how]
        cells += [f"{row['perplexity'][text]:.1f}" for text in texts]
        cells += [str(row["keys_found"]), str(row["lists_found"])]
        cells += [f"{kept['mean']:.1%} ± {kept['error']:.1%}" if (kept := row.get("retained")) else ""] * len(shown)
        cells += ["" if dense else f"{row['damage'][name]:.2f}" for name in damages]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


LEFT_OUT = {
    "fold": "the fold",
    "share": "the generated tests",
    "answer_weight": "the weight of answers (4)",
    "mix": "the text's own next tokens (0.3)",
    "beside": "the second text, Wikipedia",
    "window": "rows of 1,024 tokens and, with them, long tests",
}
"""What ingredients.json's rows lack, by the first of recall.py's settings in which they differ from the first healed
row."""


def ingredients_table(result: dict) -> str:
    """What each part of the healing brings: all of it, then each part left out, then what may be added, as Markdown."""
    rows, environment = result["rows"], result["environment"]
    dense = next(row for row in rows if row["segments"] == "nothing")
    unhealed = [row for row in rows if row is not dense and not row["tokens"]]
    whole, *others = [row for row in rows if row["tokens"] and row is not dense]
    named = [("dense", dense), *(("cut, not healed", row) for row in unhealed), ("**healed**", whole)]
    named += [(without_or_with(whole, row), row) for row in others]
    texts = list(dense["perplexity"])
    lines = [
        f"`benchmarks/recall.py`, {environment['date'][:10]}, {environment['cores']} CPU cores: {result['model']} "
        f"without {named_cut(whole['segments'])}, folded on {result['fold_tokens']:,} tokens and healed on "
        f"{whole['tokens']:,}; perplexity of {result['eval_tokens']:,} tokens of each text in windows of "
        f"{result['window']}; keys hidden in, and values of a list of, up to {result['longest']:,} tokens, found of "
        f"{dense['keys_asked']}; damage to tests of the judging family, nats per answer token, "
        "mean of all seven and of two:",
        "",
        f"| | {' | '.join(texts)} | keys | list values | damage | to recall | to lists |",
        f"|---|{'---:|' * (len(texts) + 5)}",
    ]
    for name, row in named:
        cells = [name, *(f"{row['perplexity'][text]:.1f}" for text in texts)]
        cells += [str(row["keys_found"]), str(row["lists_found"])]
        harm = row["damage"]
        cells += [f"{each:.2f}" for each in (fmean(harm.values()), harm["recall"], harm["lists"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def without_or_with(whole: dict, row: dict) -> str:
    """What a healing leaves out of the whole, or adds to it."""
    name = changed(whole, row)[0]
    added = {
        "by_kl": "with tokens of text counted by their KL",
        "epochs": f"with the tokens gone over {row['epochs']} times",
        "also": f"with {row['also'].replace('+', ', ')} trained as well",
        "writer": WRITERS.get(row["writer"], ""),
    }
    return added[name] if name in added else f"without {LEFT_OUT[name]}"


HOW = (
    "fold", "segments", "tokens", "share", "answer_weight", "mix", "radius", "window", "beside", "lora", "writer",
    "hurt", "by_kl", "also", "epochs",
)  # fmt: skip
"""recall.py's settings, in the order in which they name a row; but for the rate, which is chosen for the others, and
for `parted`, which follows `window`."""


def changed(row: dict, other: dict) -> list[str]:
    """The settings in which two rows of recall.py differ."""
    return [name for name in HOW if row[name] != other[name]]


TRIED = (
    (1, 2), (31, 37), (3, 18), (18, 22), (20, 21), (17, 18), (3, 6), (3, 4), (3, 5), (3, 10), (3, 11), (18, 20),
    (22, 23), (24, 30), (32, 33), (35, 34), (24, 25), (24, 26),
)  # fmt: skip
"""Rows of recall.json, which are only ever added to: one, and what was healed otherwise in one respect."""


def tried_table(result: dict) -> str:
    """What else was tried: pairs of healings that differ in one respect, as Markdown."""
    rows, environment = result["rows"], result["environment"]
    texts, asked = list(rows[0]["perplexity"]), rows[0]["keys_asked"]
    lines = [
        f"`benchmarks/recall.py`, {environment['date'][:10]}, {environment['cores']} CPU cores: {result['model']}; "
        f"perplexity of {result['eval_tokens']:,} tokens of each text in windows of {result['window']}; keys and list "
        f"values found of {asked}; damage to tests of the judging family, mean of all seven, nats per answer token. "
        "What was tried; of the healing without it what was removed, the layers and the tokens that were trained; "
        "each figure without and with it. The learning rate goes with the number of layers, or with LoRA.",
        "",
        f"| tried | removed | layers tuned | tuned on | {' | '.join(texts)} | keys | list values | damage |",
        f"|---|---|---:|---:|{'---:|' * (len(texts) + 3)}",
    ]
    for one, other in ((rows[a], rows[b]) for a, b in TRIED):
        pairs = [(one["perplexity"][text], other["perplexity"][text], ".1f") for text in texts]
        pairs += [(one[f"{name}_found"], other[f"{name}_found"], "d") for name in ("keys", "lists")]
        pairs.append((fmean(one["damage"].values()), fmean(other["damage"].values()), ".2f"))
        cells = [otherwise(one, other, result["window"]), named_cut(one["segments"])]
        cells += [str(len(one["tuning"]["trained_layers"])), f"{one['tokens']:,}"]
        lines.append(f"| {' | '.join([*cells, *(f'{a:{as_}} → {b:{as_}}' for a, b, as_ in pairs)])} |")
    return "\n".join(lines)


def otherwise(one: dict, other: dict, window: int) -> str:
    """In what the second row was healed otherwise."""
    counts = f"an answer counts {other['answer_weight']:g} times"
    layers = f"{len(other['tuning']['trained_layers'])} layers tuned"
    words = {
        "segments": f"{named_cut(other['segments'])} removed instead",
        "tokens": f"{other['tokens']:,} tokens",
        "share": f"{other['share']:.0%} of tests, not {one['share']:.0%}",
        "answer_weight": counts,
        "mix": f"next tokens of the text at {other['mix']:g}",
        "radius": layers,
        "window": f"rows of {lengths_of(other, window)} tokens, not {lengths_of(one, window)}",
        "beside": "half of it Wikipedia",
        "lora": "LoRA of rank 32 on all layers",
        "writer": WRITERS[other["writer"] or "text"],
        "hurt": taught_otherwise(other).removeprefix(", "),
        "epochs": f"gone over {other['epochs']} times",
    }
    return ", ".join(words[name] for name in changed(one, other))
