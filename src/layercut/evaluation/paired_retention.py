"""What several models retain of one dense model's task scores, with errors that are paired over the items.

For `layercut compare`. All models answer the same items, which are drawn anew together: an item that is hard is hard
for all, so the error of a difference between two models is smaller than that of either. Records are those of
`retention.py`, and retention is counted as there: the mean over tasks of score / dense score, and the same above
chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercut.errors import RunError
from layercut.evaluation.retention import guessing, representative_metric

DRAWS = 2000
"""Bootstrap samples of the items."""
Records = Mapping[str, Mapping[str, Any]]
"""By task."""


@dataclass(frozen=True, kw_only=True)
class Retained:
    """Of one model; None where no task counts, or where it is the first itself."""

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
    dense: Records, models: Mapping[str, Records], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Retained]:
    """What each model retains, and how far it is behind the first of them."""
    names, generator = list(models), np.random.default_rng(seed)
    shares, above, apart = [], [], np.zeros(len(names))
    for task, record in dense.items():
        of_models = [models[name][task] for name in names]
        check_items(task, record, of_models)
        metric = representative_metric(record)
        points, samples, differ = _scores([record, *of_models], metric, draws, generator)
        floor, clear = guessing(record, metric)
        if not record["metrics"][metric]["higher_is_better"]:
            continue  # of a perplexity nothing is retained, as `retention.py` counts
        if points[0] > 0:
            apart += differ
            shares.append((points[1:] / points[0], _over(samples[:, 1:], samples[:, :1])))
        if points[0] > clear:
            point = (points[1:] - floor) / (points[0] - floor)
            above.append((point, _over(samples[:, 1:] - floor, samples[:, :1] - floor)))
    mean, drawn = _means(shares, len(names), draws)
    mean_above, drawn_above = _means(above, len(names), draws)
    found = {}
    for i, name in enumerate(names):
        found[name] = Retained(
            mean=_known(mean[i]), error=_spread(drawn[:, i]), above_chance=_known(mean_above[i]),
            above_chance_error=_spread(drawn_above[:, i]), **(_behind(mean, drawn, i, apart[i]) if i else {}),
        )  # fmt: skip
    return found


def check_items(task: str, record: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Refuse records of a task that are not of the same items."""
    if any(other["document_hash"] != record["document_hash"] for other in others):
        raise RunError(f"models were not scored on the same items of {task}", "run again with --force")


def _scores(
    records: Sequence[Mapping[str, Any]], metric: str, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [M] of M models, and those of bootstrap samples of the items [draws, M]; NaN where no items are known.

    And on how many items each but the dense one was scored otherwise than the first after it [M - 1].
    """
    of_models = [record["metrics"][metric] for record in records]
    points = np.array([each["score"] for each in of_models], dtype=float)
    if any(each["values"] is None for each in of_models):
        return points, np.full((draws, len(points)), np.nan), np.zeros(len(points) - 1)
    values = np.array([each["values"] for each in of_models], dtype=float)  # [M, items]
    items = values.shape[1]
    counts = generator.multinomial(items, np.full(items, 1 / items), size=draws)
    return points, counts @ values.T / items, (values[1:] != values[1]).sum(axis=1)


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A quotient of samples; NaN where the dense model's sample is not above the floor."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def _means(parts: Sequence[tuple[np.ndarray, np.ndarray]], models: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean over tasks of the points [M] and of the samples [draws, M]; NaN without tasks."""
    if not parts:
        return np.full(models, np.nan), np.full((draws, models), np.nan)
    return np.mean([point for point, _ in parts], axis=0), np.mean([samples for _, samples in parts], axis=0)


def _behind(mean: np.ndarray, drawn: np.ndarray, i: int, apart: float) -> dict[str, float | None]:
    """How far model i is behind the first, from which it was scored otherwise on so many items."""
    difference = drawn[:, 0] - drawn[:, i]
    known = difference[np.isfinite(difference)]
    if not len(known):
        return {"behind": _known(mean[0] - mean[i]), "behind_error": None, "p_value": None}
    tail = min(np.mean(known <= 0), np.mean(known >= 0))
    p_value = min(1.0, 2 * max(float(tail), 1 / len(known), 0.5**apart))
    return {"behind": _known(mean[0] - mean[i]), "behind_error": _spread(difference), "p_value": p_value}


def _spread(samples: np.ndarray) -> float | None:
    """Half of the central 68 % of the samples: the standard deviation where they are normal, and not ruled by tails."""
    known = samples[np.isfinite(samples)]
    if len(known) < 2:
        return None
    low, high = np.percentile(known, [15.865, 84.135])
    return float(high - low) / 2


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
