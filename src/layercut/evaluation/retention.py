"""How much of the dense model's task scores a pruned model keeps: arithmetic on results paired by item.

A *record* is what one model made of one task, item by item (`lm_eval_harness.score_tasks` makes them):

    {"metrics": {"acc": {"values": [1.0, 0.0, …] or None, "score": 0.5, "higher_is_better": true}, …},
     "choices": [4, 4, 3, …] or None, "items": 100, "document_hash": "…"}

Scores near chance flatter a broken model, so retention comes twice: score / dense score, and
(score - chance) / (dense score - chance), the latter of tasks on which the dense model does not guess. Models answer
the same items: two of them differ by the items that flipped, and errors come from samples of the items, drawn for all
together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercut.errors import RunError

Record = Mapping[str, Any]
Row = dict[str, Any]
PREFERRED = ("acc_norm", "acc", "exact_match")
"""Which metric represents a task: the first of these that it reports, else the first one where higher is better."""
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics by which guessing among n choices scores 1 / n."""
CLEAR = 2.0
"""Standard errors of guessing by which a score is above it, where it is no guessing."""
DRAWS = 2000
"""Bootstrap samples of the items."""


def guessing(record: Record, metric: str) -> tuple[float, float]:
    """The score of guessing by a metric of a task, and the score above which a model does not guess.

    The first is the mean of 1 / n over the items, 0 where nothing is chosen from a list. The second is `CLEAR` standard
    errors above it, sqrt(sum of p (1 - p)) / N with p = 1 / n of each of the N items. An accuracy that is no share of
    right answers, as TruthfulQA's mass on all true ones, has another score of guessing, which is not known: no such
    score is above it.
    """
    choices = record["choices"] if metric.partition(",")[0] in ACCURACIES else None
    if not choices:
        return 0.0, 0.0
    if not {*(record["metrics"][metric]["values"] or [])} <= {0.0, 1.0}:
        return 0.0, math.inf
    guess = sum(1 / n for n in choices) / len(choices)
    return guess, guess + CLEAR * (math.sqrt(sum((1 - 1 / n) / n for n in choices)) / len(choices))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample variance; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def flips(dense: Sequence[float], pruned: Sequence[float]) -> tuple[int, int] | None:
    """Items that went from right to wrong, and from wrong to right; None where they are not right or wrong."""
    if not {*dense, *pruned} <= {0.0, 1.0}:
        return None
    pairs = list(zip(dense, pruned, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact binomial p-value of McNemar's test: how likely so uneven a split of the flips is by chance."""
    n, fewer = lost + gained, min(lost, gained)
    tail = term = 1  # term: n over k
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)  # whole numbers until the division: exact however many items


def representative_metric(record: Record) -> str:
    """The metric that represents a task; a name may carry a filter, as in "exact_match,strict-match"."""
    metrics = record["metrics"]
    preferred = (name for wanted in PREFERRED for name in metrics if name.partition(",")[0] == wanted)
    return next(preferred, next((name for name, m in metrics.items() if m["higher_is_better"]), next(iter(metrics))))


def check_items(task: str, record: Record, others: Iterable[Record]) -> None:
    """Refuse records of a task that are not of the same items."""
    if any((other["document_hash"], other["items"]) != (record["document_hash"], record["items"]) for other in others):
        raise RunError(
            f"models were not scored on the same items{f' of {task}' * bool(task)}",
            "run again with --force; if that does not help, the task draws its items at random",
        )


# --- one model, as a row a task -----------------------------------------------------------------------------


def compare_records(dense: Record, compressed: Record) -> Row:
    """One task's row: both scores with standard errors, flips and p-value, retention; the other metrics beside it."""
    check_items(dense.get("task", ""), dense, [compressed])
    metric = representative_metric(dense)
    rows = {name: _compare(dense, compressed, name) for name in dense["metrics"]}
    return {"metric": metric, "items": dense["items"], **rows.pop(metric), "others": rows}


def compare_tasks(dense: Mapping[str, Record], compressed: Mapping[str, Record]) -> Row:
    """Compare the records of two models, task by task."""
    rows = {name: compare_records(dense[name], compressed[name]) for name in dense}
    return {"tasks": rows, "retention": retention(rows.values())}


def _compare(dense: Record, compressed: Record, metric: str) -> Row:
    before, after = dense["metrics"][metric], compressed["metrics"][metric]
    (guess, clear), better = guessing(dense, metric), before["higher_is_better"]
    paired = before["values"] is not None and after["values"] is not None
    flipped = flips(before["values"], after["values"]) if paired else None
    above = better and before["score"] > clear
    return {
        "chance": guess,
        "dense": before["score"],
        "dense_stderr": standard_error(before["values"]) if paired else None,
        "compressed": after["score"],
        "compressed_stderr": standard_error(after["values"]) if paired else None,
        "lost": flipped[0] if flipped else None,
        "gained": flipped[1] if flipped else None,
        "p_value": mcnemar(*flipped) if flipped else None,
        "retention": after["score"] / before["score"] if better and before["score"] > 0 else None,
        "retention_above_chance": (after["score"] - guess) / (before["score"] - guess) if above else None,
        "higher_is_better": better,
    }


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


# --- several models, with paired errors ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Retained:
    """What one of several models retains; None where no task counts, or where it is the first itself."""

    mean: float | None
    """Mean over tasks of score / dense score."""
    error: float | None
    """Its standard error over the items; None where a task has a score that is no mean of its items, such as BLEU."""
    above_chance: float | None
    """Mean of (score - chance) / (dense score - chance) over the tasks on which the dense model does not guess."""
    above_chance_error: float | None
    behind: float | None = None
    """The first model's mean less this one's."""
    behind_error: float | None = None
    p_value: float | None = None
    """How often so large a difference, either way, has the other sign in the samples; two-sided, and not below what a
    sign test could give on as many items as the two models were scored differently on."""


def retained(
    dense: Mapping[str, Record],
    models: Mapping[str, Mapping[str, Record]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Retained]:
    """What each model retains, and how far it is behind the first of them."""
    names, generator = list(models), np.random.default_rng(seed)
    shares, above, apart = list[tuple[Any, Any]](), list[tuple[Any, Any]](), np.zeros(len(names))
    for task, record in dense.items():
        of_models = [models[name][task] for name in names]
        check_items(task, record, of_models)
        metric = representative_metric(record)
        of_metric = [each["metrics"][metric] for each in (record, *of_models)]
        points = np.array([each["score"] for each in of_metric], dtype=float)  # [1 + M]
        samples, differ = np.full((draws, len(points)), np.nan), np.zeros(len(names))
        if all(each["values"] is not None for each in of_metric):
            values = np.array([each["values"] for each in of_metric], dtype=float)  # [1 + M, items]
            items = values.shape[1]
            counts = generator.multinomial(items, np.full(items, 1 / items), size=draws)
            samples, differ = counts @ values.T / items, (values[1:] != values[1]).sum(axis=1)
        floor, clear = guessing(record, metric)
        if not of_metric[0]["higher_is_better"]:
            continue  # of a perplexity nothing is retained
        if points[0] > 0:
            apart += differ
            shares.append((points[1:] / points[0], _over(samples[:, 1:], samples[:, :1])))
        if points[0] > clear:
            point = (points[1:] - floor) / (points[0] - floor)
            above.append((point, _over(samples[:, 1:] - floor, samples[:, :1] - floor)))
    nothing = (np.full(len(names), np.nan), np.full((draws, len(names)), np.nan))
    (mean, drawn), (mean_above, drawn_above) = (
        tuple(np.mean(each, axis=0) for each in zip(*parts, strict=True)) if parts else nothing
        for parts in (shares, above)
    )
    found = {}
    for i, name in enumerate(names):
        difference, behind, p_value = drawn[:, 0] - drawn[:, i], _known(mean[0] - mean[i]), None
        if len(known := difference[np.isfinite(difference)]):
            tail = min(np.mean(known <= 0), np.mean(known >= 0))
            p_value = min(1.0, 2 * max(float(tail), 1 / len(known), 0.5 ** apart[i]))
        found[name] = Retained(
            mean=_known(mean[i]), error=_spread(drawn[:, i]), above_chance=_known(mean_above[i]),
            above_chance_error=_spread(drawn_above[:, i]), behind=behind if i else None,
            behind_error=_spread(difference) if i else None, p_value=p_value if i else None,
        )  # fmt: skip
    return found


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A quotient of samples; NaN where the dense model's sample is not above the floor."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def _spread(samples: np.ndarray) -> float | None:
    """Half of the central 68 % of the samples: the standard deviation where they are normal, and not ruled by tails."""
    known = samples[np.isfinite(samples)]
    if len(known) < 2:
        return None
    low, high = np.percentile(known, [15.865, 84.135])
    return float(high - low) / 2


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
