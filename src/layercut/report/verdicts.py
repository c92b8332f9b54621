"""Whether each stage of a run did its job, and whether its result is to be shipped: figures against limits.

At the end of the journey, over the rows of `tables.py`; the limits are in `thresholds.py`. Here a mark is decided and
the numbers are found; what a verdict says is a macro of its name in templates/verdicts.txt. A verdict that nothing was
measured for is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from layercut.report import tables
from layercut.report import thresholds as limits
from layercut.report.formatting import Json, finite, number, printable, short_name, source_name
from layercut.report.run_facts import RunFacts
from layercut.report.tables import STAGES, final_factor, last_stage, perplexities
from layercut.report.templating import words

KEPT_TYPE_BITS = 8.5
"""Bits a weight of q8_0, in which `export` writes what healing changed of a GGUF file."""


@dataclass(frozen=True)
class Verdict:
    """One stage, judged by its own numbers and the rule of its name (`thresholds.rules`)."""

    mark: str
    """good, fair, bad, or open: not known, or nothing that could be good or bad."""
    stage: str
    text: str

    @property
    def sign(self) -> str:
        """The mark as one character."""
        return limits.MARKS[self.mark]

    @property
    def words(self) -> str:
        """What the mark says, to be read aloud."""
        return limits.MARK_WORDS[self.mark]


def verdicts(run: RunFacts) -> list[Verdict]:
    """Did each stage do its job? Stages that did not run are left out."""
    judges: list[Callable[[RunFacts], Verdict | None]] = [
        _result, _cut,
        lambda run: budgets_verdict(tables.frontier(run.frontier)),
        lambda run: _healing(run, "Fold", "folded"), lambda run: _healing(run, "Tuning", "tuned"),
        _quantization, _size, _gguf,
        lambda run: _speed(run, "prefill"), lambda run: _speed(run, "decode"),
        _tasks, _long_context, _hidden_keys, _list_values, _capabilities,
        lambda run: generation_verdict(run.health),
    ]  # fmt: skip
    return [found for judge in judges if (found := judge(run))]


def _say(macro: str, **facts: Any) -> str:
    return words("verdicts.txt", macro, **facts)


def _judged(stage: str, mark: str, **facts: Any) -> Verdict:
    """A verdict in the words of the macro of its name."""
    return Verdict(mark, stage, _say(stage, **facts))


def _graded(value: float, good: float, fair: float) -> str:
    """The mark of a figure of which less is better; bad where it is no number."""
    return "good" if value <= good else "fair" if value <= fair else "bad"


def _retained(share: float) -> str:
    """The mark of a share that is left."""
    return _graded(-share, -limits.GOOD_RETENTION, -limits.FAIR_RETENTION)


# ---- the search --------------------------------------------------------------------------------------------


def _result(run: RunFacts) -> Verdict | None:
    factor, last, dense = final_factor(run.summary), last_stage(run.summary), perplexities(run.summary).get("dense")
    if factor is None or last is None:
        return None
    mark = _graded(factor, limits.CLOSE, limits.FAIR)
    return _judged("Result", mark, state=last[0], value=last[1], factor=factor, dense=dense)


# ---- surgery and healing -----------------------------------------------------------------------------------


def _cut(run: RunFacts) -> Verdict | None:
    found = perplexities(run.summary)
    if "cut" not in found or "dense" not in found:
        return None
    cut, dense = found["cut"], found["dense"]
    sound = math.isfinite(cut) and math.isfinite(dense) and dense > 0
    states = [value for name, value in found.items() if name != "dense" and math.isfinite(value)]
    healed = min(states, default=math.inf)  # what no state brought back is broken
    mark = "bad" if not sound or healed > limits.BROKEN_FACTOR * dense else "good" if cut <= dense else "open"
    return _judged("Cut", mark, cut=cut, dense=dense, sound=sound)


def budgets_verdict(found: tables.Frontier | None) -> Verdict | None:
    """Whether both budgets were met, and by what; None where there were none."""
    if found is None or found.loss is None or found.size is None:
        return None
    allowed = found.loss
    by_size = min((p for p in found.points if p.rise <= allowed), key=lambda p: (p.bytes, p.rise), default=None)
    small = [p for p in found.points if p.bytes <= found.size and not math.isnan(p.rise)]
    choice = next((p for p in found.points if p.chosen), None)
    return _judged("Budgets", "good" if choice else "bad", frontier=found, choice=choice, smallest=by_size,
                   least=min(small, key=lambda p: p.rise, default=None),
                   tiniest=min(p.bytes for p in found.points))  # fmt: skip


def _healing(run: RunFacts, stage: str, state: str) -> Verdict | None:
    """A healing stage against the last measured stage before it."""
    found = perplexities(run.summary)
    if state not in found and not (run.heal.fold if state == "folded" else run.heal.tuning):
        return None
    old = next((found[s] for s in reversed(STAGES[1 : STAGES.index(state)]) if s in found), None)
    new, dense, better, nearer = found.get(state), found.get("dense"), None, False
    if new is not None and old is not None:
        better = math.isfinite(new) and (not math.isfinite(old) or new < old)
        # a cut may stand below the dense model by chance
        nearer = not better and dense is not None and math.isfinite(new) and abs(new - dense) < abs(old - dense)
    row = next(row for row in tables.stage_rows(run.summary) if row.name == state)
    kept = state == "tuned" and finite(run.heal.tuning.best_step) == 0
    mark = "open" if better is None else "good" if better or nearer else "bad"
    facts = {"old": old, "new": new, "better": better, "row": row, "start_kept": kept}
    return Verdict(mark, stage, _say("healing", **facts, dense=dense if nearer else None))


def _quantization(run: RunFacts) -> Verdict | None:
    found, bits = perplexities(run.summary), finite(run.quantization.mixture.mean_bits)
    bits = finite(run.quantization.bits) if bits is None else bits
    if "quantized" not in found or len(found) < 2:
        return None
    old, new = list(found.values())[-2:]
    sound = math.isfinite(old) and math.isfinite(new) and old > 0
    mark = _graded(new / old, limits.ROUNDED, limits.ROUNDED_FAIR) if sound else "bad"
    return _judged("Quantization", mark, old=old, new=new, sound=sound, bits=bits, quantizer=run.quantization.quantizer)


# ---- the files ---------------------------------------------------------------------------------------------


def _size(run: RunFacts) -> Verdict | None:
    before, after = tables.bytes_that_came(run.summary), finite(run.summary.bytes.after)
    if not before or after is None:
        return None
    had, has = finite(run.summary.parameters.before), finite(run.summary.parameters.after)
    bits = (8 * before / had, 8 * after / has) if had and has and after / has > 1.05 * before / had else None
    mark = "good" if after < before else "bad"
    return _judged("Size", mark, before=before, after=after, bits=bits, better=better_way(run))


def better_way(run: RunFacts) -> str:
    """A sentence on how to get a smaller file of this run's model; empty where there is none to name.

    Of a GGUF file `export` keeps what healing left alone byte for byte. Its size is estimated: what came, less the
    share of parameters removed, and q8_0 for what healing changed.
    """
    parameters, came = run.summary.parameters, tables.bytes_that_came(run.summary)
    had, has, about = finite(parameters.before), finite(parameters.after), None
    if came and had and has:
        healed = finite(run.heal.tuning.trained_parameters) or 0.0
        about = came * has / had + healed * max(0.0, KEPT_TYPE_BITS - 8 * came / had) / 8
    return _say("better_way", place=run.place, from_gguf=printable(run.summary.model).endswith(".gguf"), about=about,
                exported=smaller_file(run), broken=bool(run.gguf.broken),
                bits=2 if run.quantization.bits == "auto" else finite(run.quantization.bits))  # fmt: skip


def smaller_file(run: RunFacts) -> float | None:
    """Bytes of the GGUF file last exported, where it is sound and smaller than what came."""
    came, weight = tables.bytes_that_came(run.summary), finite(run.gguf.bytes)
    return weight if came and weight is not None and weight < came and not run.gguf.broken else None


def _gguf(run: RunFacts) -> Verdict | None:
    """What became of the model in the GGUF file, and who has read it."""
    again, came, weight = run.gguf.again, tables.bytes_that_came(run.summary), finite(run.gguf.bytes)
    before, tokens, llama_cpp = number(again.perplexity.model), finite(again.tokens), again.llama_cpp
    after = number(llama_cpp.perplexity if llama_cpp else again.perplexity.file)
    if before is None or after is None or tokens is None:
        return None
    sound = math.isfinite(after) and math.isfinite(before) and before > 0
    mark = "bad" if run.gguf.broken or not sound else _graded(after / before, limits.ROUNDED, limits.ROUNDED_FAIR)
    larger = came is not None and weight is not None and weight >= came
    source = number(llama_cpp.source_perplexity) if llama_cpp else None
    worse = larger and source is not None and after > source
    mark = "bad" if worse else "fair" if mark == "good" and larger else mark
    return _judged("GGUF", mark, broken=run.gguf.broken, bytes=weight, llama_cpp=bool(llama_cpp), before=before,
                   after=after, tokens=tokens, came=came, larger=larger, source=source, worse=worse)  # fmt: skip


# ---- what survived -----------------------------------------------------------------------------------------


def _speed(run: RunFacts, phase: str) -> Verdict | None:
    table = run.speed[phase]
    ratio = finite(table.ratio)
    if ratio is None:
        return None
    mark = "good" if ratio > limits.FASTER else "fair" if ratio >= limits.SLOWER else "bad"
    return Verdict(mark, phase.capitalize(), _say("speed", mark=mark, ratio=ratio, table=table))


def _tasks(run: RunFacts) -> Verdict | None:
    """What is retained, and how many tasks got worse or better by more than chance."""
    retained, rows = run.scored.retention, [row.score for row in tables.task_rows(run.scored) if row.main]
    mean, above = finite(retained.mean), finite(retained.above_chance)
    if mean is None:
        return None
    changed = [row for row in rows if (p := finite(row.p_value)) is not None and p < limits.SIGNIFICANT]
    worse = sum((finite(row.lost) or 0) > (finite(row.gained) or 0) for row in changed)
    mark = "open" if above is None else _retained(above)
    return _judged("Tasks", mark, mean=mean, above=above, tasks=retained.tasks, worse=worse,
                   better=len(changed) - worse)  # fmt: skip


def _long_context(run: RunFacts) -> Verdict | None:
    """Whether far positions are close to the dense model's, or else have lost more than near ones."""
    rows = tables.positions(run.summary)
    if not rows:
        return None
    (_, first, *near_pair), (start, stop, *far_pair) = rows[0], rows[-1]
    known = [value for value in (*near_pair, *far_pair) if value is not None and value > 0]
    if len(known) < 4:
        return _judged("Long context", "bad", far=None)
    near, far = known[1] / known[0], known[3] / known[2]
    hurt = len(rows) > 1 and math.log(far) > math.log(near) + limits.LONG_LOSS
    mark = "good" if far <= limits.CLOSE else "bad" if hurt else "fair"
    return _judged("Long context", mark, near=near, far=far, first=first - 1, start=start, last=stop - 1,
                   dense=known[2], compressed=known[3])  # fmt: skip


def _hidden_keys(run: RunFacts) -> Verdict | None:
    return _found("Hidden keys", tables.hidden_keys(run.summary))


def _list_values(run: RunFacts) -> Verdict | None:
    return _found("List values", tables.list_values(run.summary))


def _found(stage: str, grid: dict[str, Any]) -> Verdict | None:
    if not grid:
        return None
    mark = _retained(grid["compressed"] / grid["dense"]) if grid["dense"] else "open"
    return _judged(stage, mark, grid=grid)


def _capabilities(run: RunFacts) -> Verdict | None:
    """Answers to generated tests beside the dense model's; each capability counts the same, few answers or many."""
    rows = [
        row for row in tables.capability_rows(run.capabilities.judged) if None not in (row["dense"], row["compressed"])
    ]
    if not rows:
        return None
    dense, compressed = (sum(row[name] for row in rows) / len(rows) for name in ("dense", "compressed"))
    lost = [row for row in rows if row["compressed"] < limits.FAIR_RETENTION * row["dense"]]
    mark = _retained(compressed / dense) if dense else "open"
    return _judged("Capabilities", mark, dense=dense, compressed=compressed, lost=lost)


def generation_verdict(health: Json) -> Verdict | None:
    """Whether generative quality survived, with how soon the two models part; of RunFacts.health."""
    if not health:
        return None
    if lost := _lost(health):
        return Verdict("bad", "Generation", lost)
    old, new = finite(health.dense.repeated_4grams), finite(health.compressed.repeated_4grams)
    likely, unlikely = finite(health.dense.dense_loss), finite(health.compressed.dense_loss)
    odd = likely is not None and unlikely is not None and unlikely > likely + limits.UNLIKELY
    long, left = finite(health.replies.dense), finite(health.replies.compressed)
    short = long is not None and left is not None and left < limits.SHORT_REPLIES * long
    if old is None or new is None:
        return _judged("Generation", "open", health=health, odd=False, short=False)
    mark = "good" if new <= old + limits.REPEATS and not odd and not short else "fair"
    return _judged("Generation", mark, health=health, odd=odd, short=short)


def generation_warning(health: Json) -> str:
    """In plain words, that generative quality did not survive; empty where it did, or where it was not measured."""
    return f"Generation did not survive: {lost}" if (lost := _lost(health)) else ""


def _lost(health: Json) -> str:
    """In what generation did not survive; empty where it did, or where it was not measured."""
    old, new = finite(health.dense.repeated_4grams), finite(health.compressed.repeated_4grams)
    likely, unlikely = finite(health.dense.dense_loss), number(health.compressed.dense_loss)
    circles = old is not None and new is not None and new > old + limits.CIRCLES
    nonsense = likely is not None and unlikely is not None and not unlikely <= likely + limits.NONSENSE
    return _say("generation_lost", health=health, circles=circles, nonsense=nonsense)


# ---- the last word -----------------------------------------------------------------------------------------


def broken(summary: Any, scored: Json | None = None) -> str | None:
    """In plain words, that the compressed model is ruined; None if it is not, or if that is not known."""
    summary = Json(summary)
    last, found, factor = last_stage(summary), perplexities(summary), final_factor(summary)
    if last and (not math.isfinite(last[1]) or (factor is not None and factor > limits.BROKEN_FACTOR)):
        earlier = [value for name, value in found.items() if name != "quantized"]
        sound = last[0] == "quantized" and "dense" in found and len(earlier) > 1
        sound = sound and earlier[-1] <= limits.BROKEN_FACTOR * found["dense"]
        return _say("broken", state=last[0], value=last[1], factor=factor, dense=found.get("dense"),
                    before=earlier[-1] if sound else None)  # fmt: skip
    scored = summary if scored is None else scored
    above = finite(scored.retention.above_chance)
    asked = sum(
        finite(row.items) or 0 for row in tables.task_rows(scored)
        if row.main and finite(row.score.retention_above_chance) is not None
    )  # fmt: skip
    if above is None or above >= limits.GUESSING or asked < limits.FEWEST_ITEMS:
        return None
    return _say("guessing", above=max(above, 0.0), tasks=scored.retention.tasks_above_chance)


def headline(summary: Json) -> str:
    """One sentence to quote: what was removed, how much smaller, what became of the perplexity."""
    last, name = last_stage(summary), short_name(summary.model).rpartition("/")[2]
    return _say("headline", name=name, layers=summary.layers, segments=summary.segments, parameters=summary.parameters,
                state=last[0] if last else None, value=last[1] if last else None, factor=final_factor(summary),
                dense=perplexities(summary).get("dense"), text=source_name(summary.perplexity.dataset))  # fmt: skip


JUDGED_BY_THE_RESULT = ("Result", "Cut", "Prefill", "Decode")
"""Verdicts that the conclusion counts in another way: by the final perplexity, and speed as one."""


def conclusion(run: RunFacts) -> Verdict:
    """What a careful engineer would say of the result: do not ship it, or where it is usable, and what is not known."""
    summary, factor, exported = run.summary, final_factor(run.summary), smaller_file(run)
    found = {verdict.stage: verdict for verdict in verdicts(run)}
    marks = {stage: verdict.mark for stage, verdict in found.items()}
    ruined = broken(summary, run.scored) or generation_warning(run.health)
    counted = {
        stage: mark for stage, mark in marks.items()
        if stage not in JUDGED_BY_THE_RESULT and (stage != "Size" or exported is None)
    }  # fmt: skip
    failed, weak = ([stage for stage, mark in counted.items() if mark == kind] for kind in ("bad", "fair"))
    if not any(marks.get(phase, "good") == "good" for phase in ("Prefill", "Decode")):
        weak.append("Speed")
    why = _why(run, marks, bool(ruined))
    mark = {"dense": "open", "unmeasured": "open", "usable": "fair"}.get(why, "bad")
    if why == "usable" and (factor or math.inf) <= limits.CLOSE and not failed and not weak:
        mark = "good"
    without = Json({"perplexity": {k: value for k, value in perplexities(summary).items() if k != "quantized"}})
    before = final_factor(without) if "quantized" in perplexities(summary) else None
    text = _say("conclusion", place=run.place, why=why, ruined=ruined, factor=factor,
                came=tables.bytes_that_came(summary), after=summary.bytes.after, better=better_way(run),
                rounded=before if before is not None and before <= limits.FAIR else None,
                tasks=found["Tasks"].text if "Tasks" in found else "", failed=failed, weak=weak,
                measured=bool(tables.task_rows(run.scored)), exported=exported,
                text=source_name(summary.perplexity.dataset))  # fmt: skip
    return Verdict(mark, "Conclusion", text)


def _why(run: RunFacts, marks: dict[str, str], ruined: bool) -> str:
    """What decides: dense, unmeasured, ruined, larger, worse, tasks, or usable."""
    factor = final_factor(run.summary)
    if ruined:
        return "ruined"
    if factor is None:
        return "dense" if last_stage(run.summary) and run.summary.perplexity.dense else "unmeasured"
    if marks.get("Size") == "bad" and smaller_file(run) is None and factor > 1:
        return "larger"
    return "worse" if factor > limits.FAIR else "tasks" if marks.get("Tasks") == "bad" else "usable"
