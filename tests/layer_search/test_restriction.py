"""A search that may choose some cuts only: every method heeds it, and finds the best of those."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from layercut.errors import ConfigError
from layercut.layer_search import Restriction, search
from layercut.layer_search.criteria import lowest
from layercut.layer_search.segment_sets import all_sets, cheapest_sums
from layercut.models.runner import DecoderRunner
from layercut.pipeline.stages.search import lengths_to_try
from layercut.registries import criteria
from layercut.segments import Segment, joined_segments, kept_layers

LAYERS, PERIOD, LENGTH = 9, 3, 3


def period(length: int = LENGTH, layers: int = LAYERS, every: int = PERIOD) -> Restriction:
    """Every third layer, and no other, may stand at every third place."""
    rows = [[(i + 1) % every == 0 for _ in range(layers - length)] for i in range(layers)]
    may = [[apart == ((p + 1) % every == 0) for p, apart in enumerate(row)] for row in rows]
    return Restriction(tuple(map(tuple, may)), "every 3rd layer is taken for another")


def in_step(layers: tuple[int, ...]) -> bool:
    """By the definition."""
    kept = [i for i in range(LAYERS) if i not in layers]
    return all((i + 1) % PERIOD == (place + 1) % PERIOD or {(i + 1) % PERIOD, (place + 1) % PERIOD} == {1, 2}
               for place, i in enumerate(kept))  # fmt: skip


ALLOWED = [layers for layers in combinations(range(LAYERS), LENGTH) if in_step(layers)]


def test_allowed_cuts_are_those_of_the_definition():
    limits = period()
    assert 0 < len(ALLOWED) < 84
    for layers in combinations(range(LAYERS), LENGTH):
        assert limits.allows(joined_segments(layers)) == (layers in ALLOWED)
    assert limits.segments() == [Segment(s, s + 3) for s in range(7)]
    assert not limits.allows((Segment(0, 2),))  # another number of layers
    assert period(2).segments() == [Segment(7, 9)]
    assert not period(LENGTH).is_none
    assert Restriction.none(9, 3).is_none


def test_the_cheapest_allowed_cut_of_scores_is_found():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(LAYERS, generator=draw)
        best = min(ALLOWED, key=lambda layers: sum(scores[list(layers)].tolist()))
        assert lowest(scores, period()) == joined_segments(best)
    scores = torch.zeros(LAYERS)
    assert not {0, 1, 2} & {i for s in lowest(scores, period(), {0, 1, 2}) for i in range(s.start, s.stop)}
    drawn = {period().drawn(draw, {4}) for _ in range(30)}
    assert len(drawn) > 5
    assert all(period().allows(cuts) and any(4 in range(s.start, s.stop) for s in cuts) for cuts in drawn)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_of_segments_are_of_allowed_sets(count):
    draw = torch.Generator().manual_seed(1)
    singles = [Segment(a, b) for a in range(LAYERS) for b in range(a + 1, min(a + LENGTH, LAYERS) + 1)]
    costs = {one: torch.rand((), generator=draw).item() for one in singles}
    found = cheapest_sums(costs, period(), count)
    allowed = [cuts for cuts in all_sets(LENGTH, LAYERS, count) if period().allows(cuts)]
    assert found[0] == min(allowed, key=lambda cuts: sum(costs[one] for one in cuts))
    assert all(period().allows(cuts) for cuts in found)


@pytest.fixture(scope="module")
def model():
    return tiny.llama(LAYERS)


@pytest.mark.parametrize("method", list(criteria.own))
def test_every_method_heeds_it(method, model):
    result = search(model, tiny.some_tokens(), n_layers=LENGTH, method=method, restriction=period())
    assert all(period().allows(one.segments) for one in result.candidates)
    assert sum(map(len, result.segments)) == LENGTH


@pytest.mark.parametrize("count", [1, 2])
def test_the_gate_finds_the_best_allowed(model, count):
    asked = {"n_layers": LENGTH, "num_segments": count, "restriction": period()}
    exact = search(model, tiny.some_tokens(), method="exhaustive", **asked)
    assert len(exact.candidates) == sum(period().allows(cuts) for cuts in all_sets(LENGTH, LAYERS, count))
    assert search(model, tiny.some_tokens(), method="fisher", **asked).kl == pytest.approx(exact.kl)


def test_what_is_forbidden_is_refused(model):
    tokens = tiny.some_tokens()
    with pytest.raises(ConfigError, match="3:5 is not allowed: every 3rd layer") as refusal:
        search(model, tokens, segments=[Segment(3, 5)], restriction=period(2))
    assert refusal.value.hint == "allowed are --segment 7:9"
    with pytest.raises(ConfigError, match="is not allowed"):
        search(model, tokens, n_layers=2, method=lambda runner, tokens, length: [Segment(0, 2)], restriction=period(2))
    # the eighth layer may stay nowhere but behind whole periods
    none = Restriction(tuple((False,) * 8 for _ in range(9)), "nothing fits")
    for method in ("fisher", "race", "exhaustive", "block-influence", "sleb", "evolution", "random"):
        with pytest.raises(ConfigError, match="nothing fits"):
            search(model, tokens, n_layers=1, method=method, restriction=none)
    assert kept_layers([Segment(7, 9)], 9) == list(range(7))


@pytest.mark.parametrize(("consumers", "lengths"), [("", [*range(1, 14)]), ("mlx", [6, 10, 11, 12, 13])])
def test_within_a_budget_those_numbers_of_layers_are_tried_that_leave_a_choice(consumers, lengths):
    """Gemma 3 in MLX: one layer in six attends to everything, by its place, so that of five only the last ones go."""
    model = tiny.gemma3([5, 11], layers=14)
    stack = DecoderRunner(model)
    config = SimpleNamespace(search=SimpleNamespace(consumers=consumers))
    work: Any = SimpleNamespace(config=config, stack=stack)
    assert lengths_to_try(work) == lengths
