"""What a run's result is worth: a verdict on each of a few questions, and whether it is to be shipped.

The limits are conventions, the same for every run; apart from the arithmetic of chance none was measured. A question
that nothing was measured for has no verdict, and fewer than `FEWEST` items are shown without a mark.
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
    ProbeShare,
    RunFacts,
    final_factor,
    last_stage,
    main_tasks,
    perplexities,
    positions,
    recall,
    skills,
    source_bytes,
)

CLOSE, FAIR, BROKEN_FACTOR = 1.10, 1.5, 3.0
"""Perplexity of the result over the dense model's: up to the first it is close, up to the second usable with care,
beyond the third the model is called broken."""
ROUNDED, ROUNDED_FAIR = 1.05, 1.25
"""Perplexity of a GGUF file over that of the model written into it."""
FASTER, SLOWER = 1.02, 0.98
"""Tokens a second over the dense model's. Between them lies the noise of a short timing; a guess."""
KEPT, KEPT_FAIR = 0.9, 0.5
"""Share kept of the dense model's score above chance, or of the answers it gives to probes."""
FEWEST, GUESSING, FEWEST_GUESSED = 20, 0.1, 50
"""No verdict on fewer items than the first. A model that keeps less than the second of the score above chance, over at
least the third of items, is called broken."""
SIGNIFICANT = 0.05
"""A task counts as changed where so uneven a split of its flipped items has less than this probability."""
REPEATS, CIRCLES = 0.05, 0.2
"""Share of repeated 4-grams beyond the dense model's: above the first a caution, above the second a failure."""
UNLIKELY, NONSENSE = 1.0, 2.0
"""Nats per token that the dense model gives the pruned model's text beyond its own: likewise."""
LONG_LOSS = 0.1
"""Log-perplexity that the last positions may lose beyond what the first ones lose."""
LIMITS = (
    f"passed (✓), caution (!) and failed (✗) are conventions. Quality passes up to {CLOSE:g}× the dense model's "
    f"perplexity, with caution up to {FAIR:g}×; tasks and probes pass from {KEPT:.0%} of the dense answers, with "
    f"caution from {KEPT_FAIR:.0%}; speed passes above {FASTER:g}×; generation passes up to {REPEATS:.0%} points more "
    f"repetition and {UNLIKELY:g} nat more loss, with caution up to {CIRCLES:.0%} points and {NONSENSE:g}. Fewer than "
    f"{FEWEST} items are not judged (–). Above {BROKEN_FACTOR:g}× the perplexity, or below {GUESSING:.0%} of the score "
    f"above chance over {FEWEST_GUESSED} items or more, a model is called broken."
)
MARKS = {"good": ("✓", "passed"), "fair": ("!", "caution"), "bad": ("✗", "failed"), "open": ("–", "not judged")}


@dataclass(frozen=True)
class Verdict:
    """The answer to one question."""

    name: str
    mark: str
    """good, fair, bad; or open: not known, or too few items."""
    figure: str
    """The number it is about."""
    text: str

    @property
    def sign(self) -> str:
        """The mark as one character."""
        return MARKS[self.mark][0]

    @property
    def words(self) -> str:
        """The mark, to be read aloud."""
        return MARKS[self.mark][1]


def verdicts(run: RunFacts) -> list[Verdict]:
    """All that something was measured for."""
    judges = (_quality, _size, _speed, _tasks, _probes, _generation, _long_context, _gguf, _budgets)
    return [found for judge in judges if (found := judge(run))]


def _graded(value: float, good: float, fair: float) -> str:
    """The mark of a figure of which less is better; bad where it is no number."""
    return "good" if value <= good else "fair" if value <= fair else "bad"


# ---- one question each -----------------------------------------------------------------------------------------


def _quality(run: RunFacts) -> Verdict | None:
    summary, factor, last = run.summary, final_factor(run.summary), last_stage(run.summary)
    if factor is None or last is None:
        return None
    found, text = perplexities(summary), source_name(summary.perplexity.dataset)
    words = f"perplexity {figure(last[1])}{f' on {text}' if text else ''}, the dense model's {figure(found['dense'])}"
    if last[0] != "cut" and "cut" in found:
        words += f"; {figure(found['cut'])} before healing"
    error = summary.perplexity.standard_error[last[0]]
    return Verdict("Quality", _graded(factor, CLOSE, FAIR), times(factor, error), f"{words}.")


def _size(run: RunFacts) -> Verdict | None:
    parameters, before, after = run.summary.parameters, source_bytes(run.summary), finite(run.summary.bytes.after)
    if not before or after is None:
        return None
    words = f"{size(after)} on disk, the source {size(before)}"
    had, has = finite(parameters.before), finite(parameters.after)
    if had and has:
        words += f"; {change(had, has)} parameters" if had != has else ""
        if after / has > 1.05 * before / had:
            words += f"; {8 * after / has:.1f} bits a weight, the source {8 * before / had:.1f}"
    advice = "" if after < before else f" {better_way(run)}"
    return Verdict("Size", "good" if after < before else "bad", change(before, after), f"{words}.{advice}".rstrip())


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
    """Bytes of the GGUF file last exported, where it is sound and smaller than the source."""
    came, weight = source_bytes(run.summary), finite(run.gguf.bytes)
    return weight if came and weight is not None and weight < came and not run.gguf.broken else None


def _gguf(run: RunFacts) -> Verdict | None:
    again, came, weight = run.gguf.again, source_bytes(run.summary), finite(run.gguf.bytes)
    theirs, before = again.llama_cpp, number(again.perplexity.model)
    after, source = number(theirs.perplexity if theirs else again.perplexity.file), number(theirs.source_perplexity)
    if before is None or after is None or weight is None:
        return None
    if run.gguf.broken:
        return Verdict("GGUF file", "bad", size(weight), printable(run.gguf.broken))
    sound = math.isfinite(after) and math.isfinite(before) and before > 0
    mark = _graded(after / before, ROUNDED, ROUNDED_FAIR) if sound else "bad"
    words = f"perplexity {figure(after)} in {'llama.cpp' if theirs else 'transformers, not read by llama.cpp'}"
    words += f" on {figure(again.tokens)} tokens, {figure(before)} before it was written"
    words += f"; the source file {size(came)} and {figure(source)}" if source is not None else ""
    if came is not None and weight >= came:
        worse = source is not None and after > source
        mark = "bad" if worse else "fair" if mark == "good" else mark
        words = f"{'larger and worse' if worse else 'no smaller'} than the source file: {words}"
    return Verdict("GGUF file", mark, size(weight), f"{words}.")


def _speed(run: RunFacts) -> Verdict | None:
    names = {"decode": "decoding", "prefill": "reading a prompt"}
    known = [(name, ratio, run.speed[phase]) for phase, name in names.items()
             if (ratio := finite(run.speed[phase].ratio)) is not None]  # fmt: skip
    if not known:
        return None
    name, ratio, row = known[0]
    mark = "good" if ratio > FASTER else "fair" if ratio >= SLOWER else "bad"
    words = "".join([name, *(f", {times(other)} {its_name}" for its_name, other, _ in known[1:])])
    most = finite(row.reachable) or finite(row.ideal)
    return Verdict("Speed", mark, times(ratio), words + (f"; at most {times(most)} is possible." if most else "."))


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
    words = f"of the dense model's score kept on {len(rows)} task{'s' if len(rows) != 1 else ''}, {items:,} items; "
    words += f"{percent(above)} of what is above chance; " if above is not None else "the dense model guesses; "
    words += f"{worse or 'none'} worse by more than chance, {len(changed) - worse or 'none'} better."
    mark = "open" if above is None or items < FEWEST else _graded(-above, -KEPT, -KEPT_FAIR)
    return Verdict("Tasks", mark, percent(mean), words + _few(items))


def _probes(run: RunFacts) -> Verdict | None:
    """Recall and skills: each kind of probe counts the same, whatever its number of answers."""
    kinds: dict[str, list[ProbeShare]] = {}
    for probe in (*skills(run.capabilities.judged), *recall(run.summary)):
        if probe.dense is not None and probe.pruned is not None:
            kinds.setdefault(probe.name.partition(",")[0], []).append(probe)
    rows: list[tuple[str, int, float, float]] = []
    for name, each in kinds.items():
        counts = [probe.items or 1 for probe in each]
        means = [sum(n * (value or 0) for n, value in zip(counts, shares, strict=True)) / sum(counts)
                 for shares in ([p.dense for p in each], [p.pruned for p in each])]  # fmt: skip
        rows.append((name, sum(probe.items or 0 for probe in each), means[0], means[1]))
    if not rows:
        return None
    total = sum(row[1] for row in rows)
    dense, pruned = sum(row[2] for row in rows) / len(rows), sum(row[3] for row in rows) / len(rows)
    lost = [row for row in rows if row[3] < KEPT_FAIR * row[2] and row[1] >= FEWEST]
    mark = "open" if not dense or total < FEWEST else _graded(-pruned / dense, -KEPT, -KEPT_FAIR)
    words = f"of the answers to probes, the dense model {percent(dense)}; {len(rows)} kinds, {total:,} answers"
    words += "; more than half lost: " if lost else ""
    words += ", ".join(f"{printable(name)} ({percent(found)}, dense {percent(of)})" for name, _, of, found in lost)
    return Verdict(
        "Recall and skills", "fair" if lost and mark == "good" else mark, percent(pruned), f"{words}.{_few(total)}"
    )


def _generation(run: RunFacts) -> Verdict | None:
    health, marks = run.health, list[str]()
    if not health:
        return None
    loss, own = figure(health.compressed.dense_loss), figure(health.dense.dense_loss)
    words = f"of its 4-grams repeat, of the dense model's {percent(health.dense.repeated_4grams)}; the dense model's "
    words += f"loss on the text is {loss} nats a token, on its own {own}."
    for key, good, fair in (("repeated_4grams", REPEATS, CIRCLES), ("dense_loss", UNLIKELY, NONSENSE)):
        dense, pruned = finite(health.dense[key]), number(health.compressed[key])
        if dense is not None and pruned is not None:
            marks.append(_graded(pruned - dense, good, fair))
    tokens = int((finite(health.prompts) or 0) * (finite(health.tokens) or 0))
    mark = "open" if not marks or tokens < FEWEST else next(one for one in ("bad", "fair", "good") if one in marks)
    return Verdict("Generation", mark, percent(health.compressed.repeated_4grams), words)


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
        words = f"The pruned model is broken: its perplexity ({last[0]}) is "
        sound = factor is not None and math.isfinite(factor)
        words += (
            f"{figure(last[1])}, {times(factor)} the dense model's {figure(found['dense'])}."
            if sound
            else "not finite."
        )
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
    """What was removed of what."""
    before, after = whole_number(summary.layers.before), whole_number(summary.layers.after)
    name, removed = short_name(summary.model).rpartition("/")[2], layer_names(summary.segments)
    if before is None or after is None:
        return f"{name}, removed layers {removed}"
    return f"{name} with {after} of its {before} layers" + (f", removed layers {removed}" if after < before else "")


def conclusion(run: RunFacts) -> Verdict:
    """Whether the result is to be shipped: no, or where it is usable and what to look at first."""
    summary, factor, exported, place = run.summary, final_factor(run.summary), smaller_file(run), run.place
    found = {verdict.name: verdict for verdict in verdicts(run)}
    marks = {name: verdict.mark for name, verdict in found.items()}
    ruined = broken(summary, run.scored)
    if not ruined and marks.get("Generation") == "bad":
        ruined = f"Generation did not survive: {found['Generation'].figure} {found['Generation'].text}"
    rise, why = f"perplexity is {times(factor)} the dense model's", "Do not ship this: "
    if ruined:
        return Verdict("Conclusion", "bad", "", f"Do not ship this. {ruined}")
    if factor is None:
        text = f"Do not ship this before its perplexity is measured{f': layercut evaluate {place}' if place else ''}."
        if last_stage(summary) and summary.perplexity.dense:
            text = "The dense model's own perplexity is not finite: there is nothing to compare with it."
        return Verdict("Conclusion", "open", "", text)
    if marks.get("Size") == "bad" and exported is None and factor > 1:
        why += f"larger than the source ({size(source_bytes(summary))} → {size(summary.bytes.after)}), and {rise}. "
        return Verdict("Conclusion", "bad", "", f"{why}{better_way(run)}".rstrip())
    if factor > FAIR:
        states = {name: value for name, value in perplexities(summary).items() if name != "quantized"}
        before, advice = final_factor(Json({"perplexity": states})), "Heal on more tokens, or remove fewer layers."
        if "quantized" in perplexities(summary) and before is not None and before <= FAIR:
            advice = f"Quantization did that ({times(before)} before): give it more bits."
        return Verdict("Conclusion", "bad", "", f"{why}{rise}. {advice}")
    if marks.get("Tasks") == "bad":
        why += f"it keeps {percent(run.scored.retention.above_chance)} of the task score above chance."
        return Verdict("Conclusion", "bad", "", why)
    counted = {name: mark for name, mark in marks.items() if name != "Quality" and (name != "Size" or exported is None)}
    failed, weak = ([name for name, mark in counted.items() if mark == kind] for kind in ("bad", "fair"))
    text = f"The exported GGUF file ({size(exported)}) is usable" if exported else "Usable"
    where = f"where {times(factor)} the dense model's perplexity is acceptable"
    text += f" {where}" if factor > 1 else f", with {times(factor)} the dense model's perplexity"
    text += f"; failed: {', '.join(failed)}" if failed else ""
    text += f"; with caution: {', '.join(weak)}" if weak else ""
    if not main_tasks(run.scored):
        text += ". No task was measured" + (f": layercut evaluate {place} --tasks NAMES" if place else "")
    mark = "good" if factor <= CLOSE and not failed and not weak else "fair"
    return Verdict("Conclusion", mark, "", f"{text}.")
