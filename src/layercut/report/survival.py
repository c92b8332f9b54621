"""What survived the cut, judged in plain words: tasks, long context, hidden keys, generations.

Under `report/verdicts.py`, which asks for these beside the stages' own verdicts. Every figure is the compressed model's
beside the dense one's on the same items; by which limits figures turn into words is in `report/thresholds.py`.
"""

from __future__ import annotations

import math
from typing import Any

from layercut.report.formatting import change, figure, finite, items, number, part, percent, times
from layercut.report.thresholds import (
    CIRCLES,
    CLOSE,
    FAIR_RETENTION,
    FEWEST_ITEMS,
    GOOD_RETENTION,
    GUESSING,
    LONG_LOSS,
    NONSENSE,
    REPEATS,
    SIGNIFICANT,
    UNLIKELY,
    Verdict,
)

# ---- tasks -------------------------------------------------------------------------------------------------


def task_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each task and metric that has numbers, the metric that speaks for its task first ("main")."""
    rows = []
    for task, scores in part(summary, "tasks").items():
        if not isinstance(scores, dict):
            continue
        metrics: dict[Any, Any] = {scores.get("metric"): scores, **part(scores, "others")}
        for metric, row in metrics.items():
            if finite(part(row).get("dense")) is not None or finite(part(row).get("compressed")) is not None:
                rows.append(
                    {**row, "task": task, "metric": metric, "items": scores.get("items"), "main": row is scores}
                )
    return rows


def guessing(summary: dict[str, Any]) -> str | None:
    """In plain words, that the compressed model hardly does the tasks better than by guessing; None if it does."""
    retained = part(summary, "retention")
    above = finite(retained.get("above_chance"))
    asked = sum(finite(row.get("items")) or 0 for row in task_rows(summary) if row["main"])
    if above is None or above >= GUESSING or asked < FEWEST_ITEMS:
        return None
    return (
        f"The compressed model is broken: of what the dense model scores above chance, {percent(max(above, 0.0))} "
        f"is left over {figure_of_tasks(retained.get('tasks_above_chance'))}. Do not use it as it is."
    )


def figure_of_tasks(count: Any) -> str:
    """3 -> 3 tasks"""
    found = finite(count)
    return "the tasks" if found is None else f"{found:.0f} task{'' if found == 1 else 's'}"


def tasks_verdict(summary: dict[str, Any]) -> Verdict | None:
    """What is retained, and how many tasks got worse or better by more than chance."""
    retained = part(summary, "retention")
    mean, above = finite(retained.get("mean")), finite(retained.get("above_chance"))
    if mean is None:
        return None
    main = [row for row in task_rows(summary) if row["main"]]
    changed = [row for row in main if (p := finite(row.get("p_value"))) is not None and p < SIGNIFICANT]
    worse = sum((finite(row.get("lost")) or 0) > (finite(row.get("gained")) or 0) for row in changed)
    text = f"{percent(mean)} of the dense model's score is left over {figure_of_tasks(retained.get('tasks'))}"
    text += f", {percent(above)} of what it has above chance" if above is not None else ""
    text += f"; {worse} got worse by more than chance" if worse else "; none got worse by more than chance"
    text += f", {len(changed) - worse} better" if len(changed) > worse else ""
    if above is None:
        return Verdict("open", "Tasks", f"{text}. The dense model itself is not above chance.")
    return Verdict(retained_mark(above), "Tasks", f"{text}.")


def retained_mark(kept: float) -> str:
    """The mark of a share that is left."""
    return "good" if kept >= GOOD_RETENTION else "fair" if kept >= FAIR_RETENTION else "bad"


# ---- evaluations of packages ---------------------------------------------------------------------------------


def evaluation_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each metric of each evaluation: name, metric, dense, compressed, and the change in words."""
    return [
        {"name": name, "metric": metric, "dense": row.get("dense"), "compressed": row.get("compressed"),
         "change": _change_words(part(row))}
        for name, metrics in part(summary, "evaluations").items()
        for metric, row in part(metrics).items()
        if isinstance(row, dict)
    ]  # fmt: skip


def _change_words(row: dict[str, Any]) -> str:
    """−20.0%, worse: the change, and what the evaluation says of its direction."""
    dense, compressed, higher = finite(row.get("dense")), finite(row.get("compressed")), row.get("higher_is_better")
    words = [change(dense, compressed)]
    if dense is not None and compressed is not None and dense != compressed and isinstance(higher, bool):
        words.append("better" if (compressed > dense) == higher else "worse")
    return ", ".join(filter(None, words))


# ---- long context --------------------------------------------------------------------------------------------


def positions(summary: dict[str, Any]) -> list[tuple[int, int, float | None, float | None]]:
    """(start, stop, dense, compressed) perplexity of each bucket of positions; None where it is no finite number."""
    table = part(summary, "long_context", "perplexity")
    dense, compressed = (
        {
            (row["start"], row["stop"]): finite(row.get("perplexity"))
            for row in map(part, items(table, name))
            if type(row.get("start")) is type(row.get("stop")) is int and 0 < row["start"] < row["stop"]
        }
        for name in ("dense", "compressed")
    )
    return [(*bounds, dense.get(bounds), value) for bounds, value in compressed.items()]


def long_verdict(summary: dict[str, Any]) -> Verdict | None:
    """Whether far positions lost more than near ones."""
    rows = positions(summary)
    if not rows:
        return None
    pairs = [(dense, compressed) for _, _, dense, compressed in (rows[0], rows[-1])]
    if any(value is None or value <= 0 for pair in pairs for value in pair):
        return Verdict("bad", "Long context", "a perplexity is not a finite number.")
    near, far = (compressed / dense for dense, compressed in pairs)  # type: ignore[operator]
    (_, first, *_), (start, stop, dense, compressed) = rows[0], rows[-1]
    text = (
        f"at positions {start:,} to {stop - 1:,} perplexity is {figure(compressed)}, {times(far)} the dense model's "
        f"{figure(dense)}; over the first {first - 1} it is {times(near)}."
    )
    hurt = len(rows) > 1 and math.log(far) > math.log(near) + LONG_LOSS
    return Verdict("bad" if hurt else "good" if far <= CLOSE else "fair", "Long context", text)


def keys(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The grid of hidden keys: {"lengths", "rows": [(depth, [(dense, compressed, trials) or None, …]), …], totals}."""
    table = part(summary, "long_context", "passkey")
    grid: dict[tuple[float, float], list[Any]] = {}
    for which, name in enumerate(("dense", "compressed")):
        for cell in map(part, items(table, name)):
            length, depth, found, trials = (finite(cell.get(k)) for k in ("length", "depth", "found", "trials"))
            if length is not None and depth is not None and found is not None and trials:
                grid.setdefault((depth, length), [None, None, trials])[which] = found
    whole = {place: cell for place, cell in grid.items() if None not in cell}
    if not whole:
        return None
    lengths = sorted({length for _, length in whole})
    depths = sorted({depth for depth, _ in whole})
    dense, compressed, trials = (sum(cell[i] for cell in whole.values()) for i in range(3))
    rows = [(depth, [whole.get((depth, length)) for length in lengths]) for depth in depths]
    return {"lengths": lengths, "rows": rows, "dense": dense, "compressed": compressed, "trials": trials}


def keys_verdict(summary: dict[str, Any]) -> Verdict | None:
    """How many hidden keys are found."""
    grid = keys(summary)
    if grid is None:
        return None
    text = (
        f"found {grid['compressed']:.0f} of {grid['trials']:.0f} keys hidden in up to "
        f"{grid['lengths'][-1]:,.0f} tokens; the dense model {grid['dense']:.0f}"
    )
    if grid["dense"] == 0:
        return Verdict("open", "Hidden keys", f"{text}: this task shows nothing about such a model.")
    kept = grid["compressed"] / grid["dense"]
    return Verdict(retained_mark(kept), "Hidden keys", f"{text}.")


# ---- generations ---------------------------------------------------------------------------------------------


def health(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of the generations, or nothing."""
    found = part(summary, "generation_health")
    return found if part(found, "dense") and part(found, "compressed") else {}


def generation_warning(summary: dict[str, Any]) -> str | None:
    """In plain words, that generative quality did not survive; None where it did, or where it was not measured."""
    found = health(summary)
    if not found:
        return None
    dense, compressed = found["dense"], found["compressed"]
    old, new = finite(dense.get("repeated_4grams")), finite(compressed.get("repeated_4grams"))
    reasons = []
    if old is not None and new is not None and new > old + CIRCLES:
        reasons.append(f"{percent(new)} of what it writes repeats, of what the dense model writes {percent(old)}")
    likely, unlikely = finite(dense.get("dense_loss")), number(compressed.get("dense_loss"))
    if likely is not None and unlikely is not None and not unlikely <= likely + NONSENSE:
        against = f"{figure(unlikely)} nats per token against {figure(likely)} of its own"
        reasons.append(f"the dense model finds its text unlikely, {against}")
    return f"Generation did not survive: {', and '.join(reasons)}. Read the samples." if reasons else None


def generation_verdict(summary: dict[str, Any]) -> Verdict | None:
    """Whether generative quality survived, with how soon the two models part."""
    found = health(summary)
    if not found:
        return None
    warning = generation_warning(summary)
    if warning:
        return Verdict("bad", "Generation", warning.partition(": ")[2])
    parted, tokens = finite(part(found, "agreement").get("first_divergence")), finite(found.get("tokens"))
    repeats = [percent(part(found, name).get("repeated_4grams")) for name in ("dense", "compressed")]
    text = f"repeats {repeats[1]} of its 4-grams, the dense model {repeats[0]}"
    if parted is not None and tokens is not None:
        text += f"; the two write the same for {parted:.1f} of {tokens:.0f} tokens on average"
    old, new = (finite(part(found, name).get("repeated_4grams")) for name in ("dense", "compressed"))
    likely, unlikely = (finite(part(found, name).get("dense_loss")) for name in ("dense", "compressed"))
    if old is None or new is None:
        return Verdict("open", "Generation", f"{text}.")
    if likely is not None and unlikely is not None and unlikely > likely + UNLIKELY:
        text += f"; the dense model gives its text {figure(unlikely)} nats per token, its own {figure(likely)}"
        return Verdict("fair", "Generation", f"{text}.")
    return Verdict("good" if new <= old + REPEATS else "fair", "Generation", f"{text}.")
