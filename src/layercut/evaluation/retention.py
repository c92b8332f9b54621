"""How much of a score survived: paired arithmetic on per-item results. Pure, and without lm-eval.

A *record* is what one model made of one task, item by item (`lm_eval_harness.score_tasks` makes them):

    {"metrics": {"acc": {"values": [1.0, 0.0, …] or None, "score": 0.5, "higher_is_better": true}, …},
     "choices": [4, 4, 3, …] or None, "items": 100, "document_hash": "…"}

Scores near chance flatter a broken model, so retention comes twice: score / dense score, and
(score - chance) / (dense score - chance), the latter of tasks on which the dense model does not guess. What differs
between two models on the same items is judged by the items that flipped, not by the two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from layercut.errors import RunError

Row = dict[str, Any]
PREFERRED = ("acc_norm", "acc", "exact_match")
"""Which metric represents a task: the first of these that it reports, else the first one where higher is better."""
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics by which guessing among n choices scores 1 / n."""
CLEAR = 2.0
"""Standard errors of guessing by which a score is above it, where it is no guessing."""


def chance(choices: Sequence[int] | None) -> float:
    """Expected accuracy of guessing: the mean of 1 / n over the items; 0 where nothing is chosen from a list."""
    return sum(1 / n for n in choices) / len(choices) if choices else 0.0


def guessing(record: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """The score of guessing by a metric of a task, and the score above which a model does not guess.

    The second is `CLEAR` standard errors above the first, sqrt(sum of p (1 - p)) / N with p = 1 / n of each of the N
    items: what chance makes of as many. An accuracy that is no share of right answers, as TruthfulQA's mass on all true
    ones, has another score of guessing, which is not known: no such score is above it.
    """
    choices = record["choices"] if metric.partition(",")[0] in ACCURACIES else None
    if choices and not {*(record["metrics"][metric]["values"] or [])} <= {0.0, 1.0}:
        return 0.0, math.inf
    guess = chance(choices)
    spread = math.sqrt(sum((1 - 1 / n) / n for n in choices)) / len(choices) if choices else 0.0
    return guess, guess + CLEAR * spread


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample variance; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def flips(dense: Sequence[float], compressed: Sequence[float]) -> tuple[int, int] | None:
    """Items that went from right to wrong, and from wrong to right."""
    if len(dense) != len(compressed):
        raise ValueError(f"{len(dense)} and {len(compressed)} items are not paired")
    if not {*dense, *compressed} <= {0.0, 1.0}:
        return None
    pairs = list(zip(dense, compressed, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact binomial p-value of McNemar's test: how likely so uneven a split of the flips is by chance."""
    n, fewer = lost + gained, min(lost, gained)
    tail = term = 1  # term: n over k
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)  # whole numbers until the division: exact however many items


def kept(score: float, dense: float, floor: float = 0.0) -> float | None:
    """(score - floor) / (dense - floor): the share of a score above some floor that was retained."""
    return (score - floor) / (dense - floor) if dense > floor else None


def representative_metric(record: Mapping[str, Any]) -> str:
    """The metric that represents a task; a name may carry a filter, as in "exact_match,strict-match"."""
    metrics = record["metrics"]
    for wanted in PREFERRED:
        for name in metrics:
            if name.partition(",")[0] == wanted:
                return name
    return next((name for name, m in metrics.items() if m["higher_is_better"]), next(iter(metrics)))


def compare_records(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> Row:
    """One task's row: both scores with standard errors, flips and p-value, retention; the other metrics beside it."""
    if dense["document_hash"] != compressed["document_hash"] or dense["items"] != compressed["items"]:
        raise RunError(
            "the dense and the compressed model were not scored on the same items",
            "run again with --force; if that does not help, the task draws its items at random",
        )
    metric = representative_metric(dense)
    rows = {name: _compare(dense, compressed, name) for name in dense["metrics"]}
    others = {name: row for name, row in rows.items() if name != metric}
    return {"metric": metric, "items": dense["items"], **rows[metric], "others": others}


def compare_tasks(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> Row:
    """Compare the records of two models, task by task."""
    rows = {name: compare_records(dense[name], compressed[name]) for name in dense}
    return {"tasks": rows, "retention": retention(rows.values())}


def _compare(dense: Mapping[str, Any], compressed: Mapping[str, Any], metric: str) -> Row:
    before, after = dense["metrics"][metric], compressed["metrics"][metric]
    guess, clear = guessing(dense, metric)
    row: Row = {
        "chance": guess,
        "dense": before["score"],
        "dense_stderr": None,
        "compressed": after["score"],
        "compressed_stderr": None,
        "lost": None,
        "gained": None,
        "p_value": None,
        "retention": None,
        "retention_above_chance": None,
        "higher_is_better": before["higher_is_better"],
    }
    if before["values"] is not None and after["values"] is not None:
        row["dense_stderr"] = standard_error(before["values"])
        row["compressed_stderr"] = standard_error(after["values"])
        flipped = flips(before["values"], after["values"])
        if flipped is not None:
            row |= {"lost": flipped[0], "gained": flipped[1], "p_value": mcnemar(*flipped)}
    if before["higher_is_better"]:
        row["retention"] = kept(after["score"], before["score"])
        if before["score"] > clear:
            row["retention_above_chance"] = kept(after["score"], before["score"], guess)
    return row


def retention(rows: Iterable[Row]) -> Row:
    """Means over tasks: "mean" of score / dense, "above_chance" of the share above guessing; null where none counts.

    "tasks" and "tasks_above_chance" say over how many.
    """
    every = list(rows)
    plain = [row["retention"] for row in every if row["retention"] is not None]
    above = [row["retention_above_chance"] for row in every if row["retention_above_chance"] is not None]
    return {
        "mean": math.fsum(plain) / len(plain) if plain else None,
        "above_chance": math.fsum(above) / len(above) if above else None,
        "tasks": len(plain),
        "tasks_above_chance": len(above),
    }
