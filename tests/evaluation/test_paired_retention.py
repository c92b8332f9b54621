"""Retention of several models on the same items: points as counted by hand, errors paired over the items."""

import numpy as np
import pytest

from layercut.errors import RunError
from layercut.evaluation.paired_retention import retained
from layercut.evaluation.retention import compare_records


def record(values, choices=2, metric="acc", name="one"):
    values = [float(v) for v in values]
    return {
        "metrics": {metric: {"values": values, "score": sum(values) / len(values), "higher_is_better": True}},
        "choices": [choices] * len(values), "items": len(values), "document_hash": name,
    }  # fmt: skip


def items(right, of=400):
    return [1] * right + [0] * (of - right)


def test_points_are_those_of_the_paper_and_above_chance():
    dense = {"a": record(items(300)), "b": record(items(200), choices=4)}
    kept = retained(dense, {"same": dense, "worse": {"a": record(items(240)), "b": record(items(150), choices=4)}})
    assert kept["same"].mean == kept["same"].above_chance == 1
    assert kept["same"].error == 0
    assert kept["same"].behind is kept["same"].behind_error is None
    assert kept["worse"].mean == pytest.approx((0.8 + 0.75) / 2)
    assert kept["worse"].above_chance == pytest.approx((0.1 / 0.25 + 0.125 / 0.25) / 2)
    assert kept["worse"].behind == pytest.approx(1 - kept["worse"].mean)


def test_errors_are_paired_over_the_items():
    draw = np.random.default_rng(1)
    hard = draw.random(400) < 0.4  # items that neither model gets right
    first, second = (np.where(hard, 0, draw.random(400) < 0.9) for _ in range(2))
    dense = {"a": record(np.where(hard, 0, 1))}
    kept = retained(dense, {"first": {"a": record(first)}, "second": {"a": record(second)}})["second"]
    difference = (first - second) / dense["a"]["metrics"]["acc"]["score"]
    expected = difference.std(ddof=1) / np.sqrt(400)
    assert kept.behind_error == pytest.approx(expected, rel=0.1)
    # as a share of the dense score, the hard items do not count: unpaired, the error would be half as large again
    unpaired = second.std(ddof=1) / dense["a"]["metrics"]["acc"]["score"] / np.sqrt(400)
    assert kept.error < 0.8 * unpaired


def test_a_large_difference_is_significant_and_a_small_one_is_not():
    dense = {"a": record(items(300))}
    shifted = [*items(296)[4:], 1, 0, 1, 0]
    kept = retained(
        dense, {"x": {"a": record(items(296))}, "y": {"a": record(items(200))}, "z": {"a": record(shifted)}}
    )
    assert kept["y"].p_value < 0.01
    assert kept["z"].p_value > 0.05


def test_few_items_that_differ_are_never_significant():
    dense = {"a": record(items(1, of=100))}
    other = {"a": record(items(0, of=100))}
    assert retained(dense, {"x": dense, "y": other})["y"].p_value == 1
    alone = {"a": record([1])}
    assert retained(alone, {"x": alone, "y": {"a": record([0])}})["y"].p_value == 1
    dense = {"a": record(items(60, of=100))}
    p_values = [retained(dense, {"x": dense, "y": {"a": record(items(60 - k, of=100))}})["y"].p_value for k in (5, 7)]
    assert p_values[0] >= 0.0625, "the sign test's"
    assert p_values[1] < 0.05


def test_what_is_no_mean_of_items_has_a_score_and_no_error():
    dense = {"a": record(items(200))}
    dense["a"]["metrics"]["acc"]["values"] = None
    worse = {"a": record(items(150)) | {"document_hash": dense["a"]["document_hash"]}, "b": record(items(200))}
    worse["a"]["metrics"]["acc"]["values"] = None
    found = retained(dense | {"b": record(items(200))}, {"x": dense | {"b": record(items(200))}, "y": worse})
    assert (found["x"].mean, found["x"].error, found["x"].above_chance_error) == (1, None, None)
    assert found["y"].behind == pytest.approx(0.125)
    assert found["y"].behind_error is found["y"].p_value is None, "a tenth of a BLEU is no significant difference"


def test_an_accuracy_that_is_no_share_of_right_answers_counts_above_chance_for_nothing():
    """TruthfulQA's mass on all true answers: of six choices with three true ones guessing has a half, not a sixth."""
    dense, other = ({"a": record([value] * 400, choices=6)} for value in (0.55, 0.5))
    found = retained(dense, {"x": other})["x"]
    assert (found.mean, found.above_chance) == (pytest.approx(0.5 / 0.55), None)
    row = compare_records(dense["a"], other["a"])
    assert (row["chance"], row["retention_above_chance"]) == (0, None)


def test_records_of_other_items_are_refused():
    with pytest.raises(RunError, match="same items of a"):
        retained({"a": record([1, 0])}, {"x": {"a": record([1, 0], name="two")}})


@pytest.mark.parametrize(("right", "counts"), [(200, False), (219, False), (221, True)])
def test_a_task_that_the_dense_model_guesses_counts_above_chance_for_nothing(right, counts):
    dense = {"a": record(items(right)), "b": record(items(300))}
    kept = retained(dense, {"x": {"a": record(items(100)), "b": record(items(250))}})["x"]
    guessed = [(100 - 200) / (right - 200)] if counts else []  # 20 of 400 are two standard errors
    assert kept.above_chance == pytest.approx(np.mean([(250 - 200) / (300 - 200), *guessed]))
    assert kept.mean == pytest.approx((100 / right + 250 / 300) / 2)


def test_of_a_perplexity_nothing_is_retained():
    def perplexity(value):
        found = record([value] * 4, metric="word_perplexity", name="w")
        found["metrics"]["word_perplexity"]["higher_is_better"] = False
        return found

    dense = {"a": record(items(300)), "w": perplexity(20.0)}
    kept = retained(dense, {"far": {"a": record(items(300)), "w": perplexity(60.0)}, "near": dense})
    assert kept["far"].mean == kept["near"].mean == 1
    assert kept["near"].behind == 0
    alone = retained({"w": dense["w"]}, {"x": {"w": perplexity(60.0)}})["x"]
    assert alone.mean is alone.above_chance is None
