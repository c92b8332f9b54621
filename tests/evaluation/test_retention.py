"""Retention: arithmetic against figures made by hand, errors paired over the items."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from layercut.errors import RunError
from layercut.evaluation.tasks import (
    FEWEST,
    compare_records,
    compare_tasks,
    guessing,
    mcnemar,
    representative_metric,
    retained,
    standard_error,
)
from layercut.report.stage_lines import describe_retention


def record(values: Any, choices: Any = 2, metric: str = "acc", name: str = "one", **more: Any) -> dict[str, Any]:
    values = [float(v) for v in values]
    score = sum(values) / len(values)
    choices = [choices] * len(values) if isinstance(choices, int) else choices
    metrics = {metric: {"values": values, "score": score, "higher_is_better": True}, **more}
    return {"metrics": metrics, "choices": choices, "items": len(values), "document_hash": name}


def of_text(perplexity: float) -> dict[str, Any]:
    metrics = {"word_perplexity": {"values": None, "score": perplexity, "higher_is_better": False}}
    return {"metrics": metrics, "choices": None, "items": 2, "document_hash": "w"}


def items(right: int, of: int = 400) -> list[int]:
    return [1] * right + [0] * (of - right)


def test_guessing_flips_and_their_p_value():
    assert guessing(record([1] * 2, [2, 4]), "acc")[0] == 0.375, "the mean of 1/2 and 1/4, not 1/3"
    assert guessing(record([1] * 2, None), "acc") == guessing(record([1], 4, metric="f1"), "f1") == (0, 0)
    # two-sided exact binomial, by counting all 2^4 splits of the four flips: at least 3 on one side
    uneven = sum(1 for bits in range(16) if max(bits.bit_count(), 4 - bits.bit_count()) >= 3)
    assert mcnemar(3, 1) == mcnemar(1, 3) == Fraction(uneven, 16)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    for lost, gained in ((1100, 900), (1001, 1000), (0, 1000), (2400, 300)):  # 2^2700 is no float, nor the last p
        tail = sum(math.comb(lost + gained, k) for k in range(min(lost, gained) + 1))
        assert mcnemar(lost, gained) == float(min(Fraction(1), Fraction(2 * tail, 2 ** (lost + gained))))
    assert compare_records(record([0.5, 1]), record([1, 1]))["lost"] is None, "an F1 score does not flip"
    assert standard_error([1, 0, 0, 1, 1]) == pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / 5**0.5)
    assert standard_error([1.0]) is None


def test_a_row_compares_two_models_on_the_same_items():
    row = compare_records(record([1, 1, 1, 0], [2, 2, 4, 4]), record([1, 0, 0, 1], [2, 2, 4, 4]))
    assert (row["dense"], row["compressed"], row["chance"]) == (0.75, 0.5, 0.375)
    assert (row["lost"], row["gained"], row["p_value"]) == (2, 1, 1.0)
    assert row["retention"] == pytest.approx(2 / 3)
    assert row["retention_above_chance"] is None, "four items tell three right ones from guessing no more than that"
    many = [record(right * 8, [2, 2, 4, 4] * 8) for right in ([1, 1, 1, 0], [1, 0, 0, 1])]
    assert compare_records(*many)["retention_above_chance"] == pytest.approx(1 / 3)
    below = compare_records(record([1] * 9), record([0] * 9))
    assert below["retention_above_chance"] == -1, "below chance is below zero"
    for compared in (compare_records, lambda a, b: retained({"a": a}, {"x": {"a": b}})):
        with pytest.raises(RunError, match="not scored on the same items"):
            compared(record([1, 0]), record([1, 0], name="two"))


def test_retention_is_the_mean_over_tasks_that_count():
    dense = {
        "a": record([1, 1, 1, 1], 4), "b": record([1, 0, 0, 0], 4), "c": record([1, 1], None, "exact_match"),
        "w": of_text(30.0),
    }  # fmt: skip
    pruned = {
        "a": record([1, 1, 1, 0], 4), "b": dense["b"], "c": record([1, 0], None, "exact_match"), "w": of_text(60.0)
    }  # fmt: skip
    found = compare_tasks(dense, pruned)
    assert found["retention"] == {
        "mean": pytest.approx((0.75 + 1 + 0.5) / 3), "tasks": 3, "items": 10, "error": None,
        "above_chance": pytest.approx(((0.75 - 0.25) / 0.75 + 0.5) / 2), "tasks_above_chance": 2,
    }  # fmt: skip
    text = found["tasks"]["w"]
    assert (text["dense"], text["compressed"], text["retention"], text["p_value"]) == (30.0, 60.0, None, None)
    assert compare_tasks({}, {})["retention"]["mean"] is None


@pytest.mark.parametrize("count", [1, FEWEST - 1, FEWEST, 400])
def test_a_share_says_of_how_many_items_it_is_and_few_have_no_error(count):
    """Of one item, or of few that agree, resampling would find no error at all."""
    dense, half = record([1] * count, 4), record([i % 2 for i in range(count)], 4)
    found = compare_tasks({"a": dense}, {"a": half})["retention"]
    assert found["items"] == count
    assert f"{count} items" in describe_retention(found)
    if count < FEWEST:
        assert found["error"] is None
        assert retained({"a": dense}, {"x": {"a": half}})["x"].above_chance_error is None
    else:
        assert found["error"] == pytest.approx((0.25 / count) ** 0.5, rel=0.15)
        assert "±" in describe_retention(found)


def test_the_metric_that_speaks():
    both = record([1, 0], acc_norm={"values": [1, 1], "score": 1.0, "higher_is_better": True})
    assert representative_metric(both) == "acc_norm"
    assert representative_metric(record([1, 0], metric="exact_match,strict-match")) == "exact_match,strict-match"
    assert representative_metric(record([1, 0], metric="f1")) == "f1"


def test_points_are_those_of_the_paper_and_above_chance():
    dense = {"a": record(items(300)), "b": record(items(200), choices=4), "w": of_text(20.0)}
    worse = {"a": record(items(240)), "b": record(items(150), choices=4), "w": of_text(60.0)}
    kept = retained(dense, {"same": dense, "worse": worse})
    assert kept["same"].mean == kept["same"].above_chance == 1
    assert kept["same"].error == 0
    assert kept["same"].behind is kept["same"].behind_error is None
    assert kept["worse"].mean == pytest.approx((0.8 + 0.75) / 2), "of a perplexity nothing is retained"
    assert kept["worse"].above_chance == pytest.approx((0.1 / 0.25 + 0.125 / 0.25) / 2)
    assert kept["worse"].behind == pytest.approx(1 - kept["worse"].mean)
    alone = retained({"w": dense["w"]}, {"x": {"w": worse["w"]}})["x"]
    assert alone.mean is alone.above_chance is None
    for each in (dense, worse):  # a corpus's BLEU has a score and no error
        each["a"]["metrics"]["acc"]["values"] = None
    found = retained(dense, {"x": dense, "y": worse})
    assert (found["x"].mean, found["x"].error, found["x"].above_chance_error) == (1, None, None)
    assert found["y"].behind_error is found["y"].p_value is None


def test_errors_are_paired_over_the_items():
    draw = np.random.default_rng(1)
    hard = draw.random(400) < 0.4  # items that neither model gets right
    first, second = (np.where(hard, 0, draw.random(400) < 0.9) for _ in range(2))
    dense = {"a": record(np.where(hard, 0, 1))}
    kept = retained(dense, {"first": {"a": record(first)}, "second": {"a": record(second)}})["second"]
    score = dense["a"]["metrics"]["acc"]["score"]
    assert kept.behind_error == pytest.approx(((first - second) / score).std(ddof=1) / 20, rel=0.1)
    # as a share of the dense score, the hard items do not count: unpaired, the error would be half as large again
    assert kept.error < 0.8 * second.std(ddof=1) / score / 20


def test_a_large_difference_is_significant_and_few_items_that_differ_are_not():
    def p_value(dense: Any, first: Any, other: Any) -> float:
        of = ({"a": record(values)} for values in (dense, first, other))
        return retained(next(of), {"x": next(of), "y": next(of)})["y"].p_value

    assert p_value(items(300), items(296), items(200)) < 0.01
    assert p_value(items(300), items(296), [*items(296)[4:], 1, 0, 1, 0]) > 0.05
    assert p_value(items(1, 100), items(1, 100), items(0, 100)) == p_value([1], [1], [0]) == 1
    assert p_value(items(60, 100), items(60, 100), items(55, 100)) >= 0.0625, "the sign test's"
    assert p_value(items(60, 100), items(60, 100), items(53, 100)) < 0.05


def test_an_accuracy_that_is_no_share_of_right_answers_counts_above_chance_for_nothing():
    """TruthfulQA's mass on all true answers: of six choices with three true ones guessing has a half, not a sixth."""
    dense, other = ({"a": record([value] * 400, choices=6)} for value in (0.55, 0.5))
    found = retained(dense, {"x": other})["x"]
    assert (found.mean, found.above_chance) == (pytest.approx(0.5 / 0.55), None)
    row = compare_records(dense["a"], other["a"])
    assert (row["chance"], row["retention_above_chance"]) == (0, None)


@pytest.mark.parametrize(("right", "counts"), [(200, False), (219, False), (221, True)])
def test_a_task_that_the_dense_model_guesses_counts_above_chance_for_nothing(right, counts):
    dense = {"a": record(items(right)), "b": record(items(300))}
    kept = retained(dense, {"x": {"a": record(items(100)), "b": record(items(250))}})["x"]
    guessed = [(100 - 200) / (right - 200)] if counts else []  # 20 of 400 are two standard errors
    assert kept.above_chance == pytest.approx(np.mean([(250 - 200) / (300 - 200), *guessed]))
    assert kept.mean == pytest.approx((100 / right + 250 / 300) / 2)
