"""What a run's result is worth: a verdict on each of a few questions, and whether it is to be shipped.

The limits are conventions, the same for every run. A question that nothing was measured for has no verdict, and fewer
than `FEWEST` items are shown without a mark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from layercut.report.formatting import (
    Json,
    change,
    figure,
    finite,
    layer_names,
    number,
    percent,
    printable,
    short_name,
    signed,
    size,
    source_name,
    times,
    whole_number,
)
from layercut.report.run_facts import (
    RunFacts,
    final_factor,
    interval_of,
    last_stage,
    main_tasks,
    perplexities,
    positions,
    recall,
    skills,
    source_bytes,
)

CLOSE, FAIR, BROKEN_FACTOR = 1.10, 1.5, 3.0
"""Perplexity of the result over the dense model's: close, usable with care, and beyond the third broken."""
ROUNDED, ROUNDED_FAIR = 1.05, 1.25
"""Perplexity of an exported GGUF file over that of the model written into it."""
FASTER, SLOWER = 1.02, 0.98
"""Tokens a second over the dense model's. Between them lies the noise of a short timing; a guess."""
KEPT, KEPT_FAIR = 0.9, 0.5
"""Share kept of the dense model's score above chance, or of the answers it gives to probes."""
FEWEST, GUESSING, FEWEST_GUESSED = 20, 0.1, 50
"""No verdict on fewer items than the first. A model that keeps less than the second of the score above chance, over at
least the third of items, is called broken."""
SIGNIFICANT = 0.05
"""A task counts as changed where so uneven a split of its flipped items has less than this probability."""
REPEATS, CIRCLES, UNLIKELY, NONSENSE = 0.05, 0.2, 1.0, 2.0
"""Repeated phrases beyond the dense model's, and nats per token that it gives the pruned model's text beyond its own:
of each a caution and a failure."""
LONG_LOSS = 0.1
"""Log-perplexity that the last positions may lose beyond what the first ones lose."""
LIMITS = (
    f"passed (✓), caution (!) and failed (✗) are conventions. Quality passes up to {CLOSE:g}× the dense model's "
    f"perplexity, with caution up to {FAIR:g}×; tasks and probes pass from {KEPT:.0%} of the dense answers, with "
    f"caution from {KEPT_FAIR:.0%}; speed passes above {FASTER:g}×; text passes up to {100 * REPEATS:.0f} points more "
    f"repetition, with caution up to {100 * CIRCLES:.0f} points. Fewer than {FEWEST} items are not judged (–). Above "
    f"{BROKEN_FACTOR:g}× the perplexity, or below {GUESSING:.0%} of the score above chance over {FEWEST_GUESSED} items "
    "or more, a model is called broken."
)
MARKS = {"good": ("✓", "passed"), "fair": ("!", "caution"), "bad": ("✗", "failed"), "open": ("–", "not judged")}
FORMATS = {"Q8_0": (8.5, 8.5, 0.0004), "Q6_K": (6.56, 8.5, 0.0035), "Q5_1": (6.0, 6.0, 0.017),
           "Q5_K_M": (5.69, 6.3, 0.009), "Q5_0": (5.5, 5.5, 0.021), "Q4_1": (5.0, 5.0, 0.024),
           "Q4_K_M": (4.85, 5.8, 0.028), "Q4_0": (4.5, 4.5, 0.075), "Q3_K_M": (3.91, 4.9, 0.105),
           "Q2_K": (2.96, 4.7, 0.565)}  # fmt: skip
"""Bits a weight; bits in matrices whose columns do not fill blocks of 256, for which llama.cpp takes another type; and
the rise of perplexity of Llama-3-8B (llama.cpp's own table; Q4_1: by stage-two.md, scaled)."""


@dataclass(frozen=True)
class Verdict:
    """The answer to one question."""

    name: str
    mark: str
    """good, fair, bad; or open: not known, or too few items."""
    figure: str
    text: str

    @property
    def sign(self) -> str:
        return MARKS[self.mark][0]

    @property
    def words(self) -> str:
        return MARKS[self.mark][1]


def verdicts(run: RunFacts) -> list[Verdict]:
    judges = (_size, _speed, _quality, _tasks, _probes, _text, _long_context, _gguf, _budgets)
    return [found for judge in judges if (found := judge(run))]


def _graded(value: float, good: float, fair: float) -> str:
    """The mark of a figure of which less is better; bad where it is no number."""
    return "good" if value <= good else "fair" if value <= fair else "bad"


# ---- one question each -----------------------------------------------------------------------------------------


def _quality(run: RunFacts) -> Verdict | None:
    summary, factor, last = run.summary, final_factor(run.summary), last_stage(run.summary)
    if factor is None or last is None:
        return None
    on = f" on {text}" if (text := source_name(summary.perplexity.dataset)) else ""
    words = f"the dense model's perplexity{on}; lower is better."
    figures = times(factor, summary.perplexity.standard_error[last[0]])
    return Verdict("Quality", _graded(factor, CLOSE, FAIR), figures, words)


def _size(run: RunFacts) -> Verdict | None:
    parameters, before, after = run.summary.parameters, source_bytes(run.summary), finite(run.summary.bytes.after)
    if not before or after is None:
        return None
    words, had, has = f"{size(before)} → {size(after)} on disk.", finite(parameters.before), finite(parameters.after)
    if had and has and after / has > 1.05 * before / had:
        words += f" {8 * after / has:.1f} bits a weight, the source {8 * before / had:.1f}."
    advice = size_alone(run) if after < before else better_way(run)
    return Verdict("Size", "good" if after < before else "bad", change(before, after), f"{words} {advice}".rstrip())


def size_alone(run: RunFacts) -> str:
    """What requantizing the dense model would give in as many bytes, by each format's bits a weight; an estimate.

    Small models lose more: the rise goes with N^-0.2, a guess that fits SmolLM2-135M's 17 % in Q4_0 (stage-two.md).
    """
    summary = run.summary
    before, after, had = source_bytes(summary), finite(summary.bytes.after), finite(summary.parameters.before)
    came = printable(run.export.gguf.source_type).replace("_K", "_K_M") if run.export.gguf else ""
    bits, _, rise = FORMATS.get(came.replace("Q6_K_M", "Q6_K"), (0.0, 0.0, 0.0))
    if not (before and after and had) or (run.export.gguf and not bits) or run.quantization.bits not in (None, 16):
        return ""
    bits = bits or 8 * before / had
    small = max(1.0, 8e9 / had) ** 0.2
    keys = ("blocks_of_256", "narrower", "head", "head_narrow", "other_bytes")
    wide, thin, head, head_narrow, other = (finite(run.export.gguf.weights[key]) or 0.0 for key in keys)
    least, words = before, ""
    for name, (width, narrow, its_rise) in FORMATS.items():
        found = before * width / bits
        if head:
            in_head = 8.5 if head_narrow or width == 8.5 else 6.56
            found = (wide * width + thin * narrow + head * in_head) / 8 + other
        factor = max(1.0, (1 + its_rise * small) / (1 + rise * small))
        if found < 0.999 * least:
            least, words = found, f"For size alone, requantizing to {name} would give about {size(found)}"
            words += f" at {factor:.2f}× the perplexity (estimated from its bits a weight)."
        if found <= after:
            return words
    return words.replace("would give about", "gets no further than") if head else ""


def better_way(run: RunFacts) -> str:
    """A sentence on how to get a smaller file of this run's model; empty where there is none to name."""
    if printable(run.summary.model).endswith(".gguf"):
        if exported := smaller_file(run):
            return f"The exported GGUF file is smaller: {size(exported)}."
        known = run.place is None or run.gguf.broken
        return "" if known else f"layercut export {run.place} --out FILE.gguf keeps the source's number formats."
    bits = 2 if run.quantization.bits == "auto" else finite(run.quantization.bits)
    fewer = run.place is not None and (bits is None or bits > 4)
    return f"Fewer bits make it smaller: layercut quantize {run.place} --bits 4 --out DIR." if fewer else ""


def smaller_file(run: RunFacts) -> float | None:
    """Bytes of the GGUF file exported after the run, where it is sound and smaller than the source."""
    came, weight = source_bytes(run.summary), finite(run.exported.bytes)
    return weight if came and weight is not None and weight < came and not run.exported.broken else None


def _gguf(run: RunFacts) -> Verdict | None:
    """The GGUF file that was exported after the run; of one that the run itself wrote only that it is broken."""
    if run.gguf.broken:
        return Verdict("GGUF file", "bad", size(run.gguf.bytes), printable(run.gguf.broken))
    again, came, weight = run.exported.again, source_bytes(run.summary), finite(run.exported.bytes)
    before, after = number(again.perplexity.model), number(again.llama_cpp.perplexity or again.perplexity.file)
    if before is None or after is None or weight is None:
        return None
    sound = math.isfinite(after) and math.isfinite(before) and before > 0
    mark = _graded(after / before, ROUNDED, ROUNDED_FAIR) if sound else "bad"
    where = "llama.cpp" if again.llama_cpp else "transformers, not read by llama.cpp"
    rounded = times(after / before) if sound else "not finite, not a multiple of"
    words = f"perplexity is {rounded} that of the model written into it, in {where}."
    if came is not None and weight >= came:
        mark, words = "fair" if mark == "good" else mark, f"no smaller than the source file ({size(came)}): {words}"
    return Verdict("GGUF file", mark, size(weight), words)


def _speed(run: RunFacts) -> Verdict | None:
    row, where = run.decoding
    if (ratio := finite(row.ratio)) is None:
        return None
    words = f"decoding in {where}"
    if finite(row.dense) and finite(row.compressed):
        words += f": {figure(row.dense)} → {figure(row.compressed)} tokens a second"
    return Verdict("Speed", _graded(-ratio, -FASTER, -SLOWER), times(ratio), f"{words}.")


def _few(items: int) -> str:
    return f" Fewer than {FEWEST} items are not judged." if items < FEWEST else ""


def _tasks(run: RunFacts) -> Verdict | None:
    rows, retained = main_tasks(run.scored), run.scored.retention
    mean, above = finite(retained.mean), finite(retained.above_chance)
    if mean is None:
        return None
    items = sum(int(finite(row["items"]) or 0) for _, row in rows)
    changed = [row for _, row in rows if (p := finite(row.p_value)) is not None and p < SIGNIFICANT]
    worse = sum((finite(row.lost) or 0) > (finite(row.gained) or 0) for row in changed)
    words = f"of the dense model's score on {len(rows)} task{'s' if len(rows) != 1 else ''}, n = {items:,}; "
    words += f"{percent(above)} of what is above chance; " if above is not None else "the dense model guesses; "
    words += f"{worse or 'none'} worse by more than chance, {len(changed) - worse or 'none'} better."
    mark = "open" if above is None or items < FEWEST else _graded(-above, -KEPT, -KEPT_FAIR)
    return Verdict("Tasks", mark, percent(mean), words + _few(items))


def _probes(run: RunFacts) -> Verdict | None:
    """Recall and skills: each kind of probe counts the same, whatever its number of answers."""
    kinds: dict[str, list[float]] = {}
    for probe in (*skills(run.capabilities.judged), *recall(run.summary)):
        if probe.dense is not None and probe.pruned is not None:
            n, kind = probe.items or 1, kinds.setdefault(probe.name.partition(",")[0], [0, 0, 0])
            kind[:] = kind[0] + n, kind[1] + n * probe.dense, kind[2] + n * probe.pruned
    if not kinds:
        return None
    total = int(sum(n for n, *_ in kinds.values()))
    dense, pruned = (sum(kind[i] / kind[0] for kind in kinds.values()) / len(kinds) for i in (1, 2))
    ends = [interval_of(kind[2] / kind[0], kind[0]) for kind in kinds.values()]
    off = 100 * math.hypot(*((high - low) / 2 for low, high in ends)) / len(kinds)
    lost = [f"{printable(name)} ({found:.0f} of {n:.0f}, dense {of:.0f})" for name, (n, of, found) in kinds.items()
            if found < KEPT_FAIR * of and n >= FEWEST]  # fmt: skip
    mark = "open" if not dense or total < FEWEST else _graded(-pruned / dense, -KEPT, -KEPT_FAIR)
    words = f"right, the mean of {len(kinds)} kinds of question (n = {total:,}), ± {off:.0f} points, "
    words += f"the dense model {percent(dense)}"
    words += f"; more than half lost: {', '.join(lost)}" if lost else ""
    mark = "fair" if lost and mark == "good" else mark
    return Verdict("Recall and skills", mark, percent(pruned), f"{words}.{_few(total)}")


def _text(run: RunFacts) -> Verdict | None:
    health, marks = run.health, list[str]()
    if not health:
        return None
    for key, good, fair in (("repeated_4grams", REPEATS, CIRCLES), ("dense_loss", UNLIKELY, NONSENSE)):
        dense, pruned = finite(health.dense[key]), number(health.compressed[key])
        if dense is not None and pruned is not None:
            marks.append(_graded(pruned - dense, good, fair))
    prompts = int(finite(health.prompts) or 0)
    mark = "open" if not marks or prompts < FEWEST else next(one for one in ("bad", "fair", "good") if one in marks)
    words = f"of the phrases it writes are repeated, the dense model's {percent(health.dense.repeated_4grams)}"
    words += f"; n = {prompts} texts."
    long, short = finite(health.replies.dense), finite(health.replies.compressed)
    if long and short is not None:
        words += f" Replies to {health.replies.prompts} chats have {short:.0f} tokens, the dense model's {long:.0f}."
    return Verdict("Text it writes", mark, percent(health.compressed.repeated_4grams), words)


def _long_context(run: RunFacts) -> Verdict | None:
    rows = positions(run.summary)
    if not rows:
        return None
    (_, first, *near_pair), (start, stop, *far_pair) = rows[0], rows[-1]
    known = [value for value in (*near_pair, *far_pair) if value is not None and value > 0]
    if len(known) < 4:
        return Verdict("Long context", "bad", "not finite", "a perplexity is not a finite number.")
    near, far = known[1] / known[0], known[3] / known[2]
    hurt = len(rows) > 1 and math.log(far) > math.log(near) + LONG_LOSS
    words = f"the dense model's perplexity at positions {start:,} to {stop - 1:,}, {times(near)} up to {first - 1:,}."
    return Verdict("Long context", "good" if far <= CLOSE else "bad" if hurt else "fair", times(far), words)


def _budgets(run: RunFacts) -> Verdict | None:
    """Whether a measured state is inside both budgets; None of a run without them."""
    found, chosen = run.frontier, run.frontier.chosen
    if not list(found.points):
        return None
    asked = f"asked: {printable(found.budgets.target_size)}, perplexity up by at most {percent(found.budgets.max_loss)}"
    if not chosen:
        return Verdict("Budgets", "bad", "missed", f"no measured state is inside both; {asked}.")
    return Verdict(
        "Budgets", "good", size(chosen.bytes), f"perplexity {signed(chosen.rise)} on held-out text; {asked}."
    )


# ---- the conclusion --------------------------------------------------------------------------------------------


def broken(summary: Any, scored: Json | None = None) -> str | None:
    """In plain words, that the pruned model is ruined; None if it is not, or if that is not known."""
    summary = Json(summary)
    last, found, factor = last_stage(summary), perplexities(summary), final_factor(summary)
    if last and (not math.isfinite(last[1]) or (factor is not None and factor > BROKEN_FACTOR)):
        is_what = "not finite."
        if factor is not None and math.isfinite(factor):
            is_what = f"{figure(last[1])}, {times(factor)} the dense model's {figure(found['dense'])}."
        words = f"The pruned model is broken: its perplexity ({last[0]}) is {is_what}"
        before = [value for name, value in found.items() if name not in ("dense", "quantized")]
        if last[0] == "quantized" and "dense" in found and before and before[-1] <= BROKEN_FACTOR * found["dense"]:
            words += f" Quantization broke it: before, its perplexity was {figure(before[-1])}. More bits may save it."
        return words
    scored = summary if scored is None else scored
    above = finite(scored.retention.above_chance)
    counted = [row for _, row in main_tasks(scored) if finite(row.retention_above_chance) is not None]
    if above is None or above >= GUESSING or sum(finite(row["items"]) or 0 for row in counted) < FEWEST_GUESSED:
        return None
    return f"The pruned model is broken: it keeps {percent(max(above, 0.0))} of the task score above chance."


def title(summary: Json) -> str:
    before, after = whole_number(summary.layers.before), whole_number(summary.layers.after)
    name, removed = short_name(summary.model).rpartition("/")[2], layer_names(summary.segments)
    if before is None or after is None:
        return f"{name}, removed layers {removed}"
    return f"{name} with {after} of its {before} layers" + (f", removed layers {removed}" if after < before else "")


def conclusion(run: RunFacts) -> Verdict:
    """Whether to ship it, where it is usable and what to look at first."""
    summary, factor, exported, place = run.summary, final_factor(run.summary), smaller_file(run), run.place
    found = {verdict.name: verdict for verdict in verdicts(run)}
    marks = {name: verdict.mark for name, verdict in found.items()}
    ruined, rise = broken(summary, run.scored), f"perplexity is {times(factor)} the dense model's"
    if not ruined and marks.get("Text it writes") == "bad":
        ruined = f"It goes in circles: {found['Text it writes'].figure} {found['Text it writes'].text}"
    if ruined:
        return Verdict("Conclusion", "bad", "", f"Do not ship this. {ruined}")
    if factor is None:
        text = f"Do not ship this before its perplexity is measured{f': layercut evaluate {place}' if place else ''}."
        if last_stage(summary) and summary.perplexity.dense:
            text = "The dense model's own perplexity is not finite: there is nothing to compare with it."
        return Verdict("Conclusion", "open", "", text)
    why = ""
    if marks.get("Size") == "bad" and exported is None and factor > 1:
        sizes = f"{size(source_bytes(summary))} → {size(summary.bytes.after)}"
        why = f"larger than the source ({sizes}), and {rise}. {better_way(run)}"
    elif factor > FAIR:
        rise += f" (limit {FAIR:g}×)"
        states = {name: value for name, value in perplexities(summary).items() if name != "quantized"}
        before, advice = final_factor(Json({"perplexity": states})), "Heal on more tokens, or remove fewer layers."
        if "quantized" in perplexities(summary) and before is not None and before <= FAIR:
            advice = f"Quantization did that ({times(before)} before): give it more bits."
        why = f"{rise}. {advice}"
    elif marks.get("Tasks") == "bad":
        why = f"it keeps {percent(run.scored.retention.above_chance)} of the task score above chance."
    if why:
        return Verdict("Conclusion", "bad", "", f"Do not ship this: {why}".rstrip())
    counted = {name: mark for name, mark in marks.items() if name != "Quality" and (name != "Size" or exported is None)}
    failed, weak = ([name for name, mark in counted.items() if mark == kind] for kind in ("bad", "fair"))
    mark = "good" if factor <= CLOSE and not failed and not weak else "fair"
    text = "Ship " + (f"the exported GGUF file ({size(exported)})" if exported else "it")
    text += f"{' with care' if mark == 'fair' else ''}: {rise}"
    text += f"; failed: {', '.join(failed)}" if failed else ""
    text += f"; look at: {', '.join(weak)}" if weak else ""
    if not main_tasks(run.scored):
        text += ". No task was measured" + (f": layercut evaluate {place} --tasks NAMES" if place else "")
    return Verdict("Conclusion", mark, "", f"{text}.")
