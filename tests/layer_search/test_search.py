"""Search: the sweep is brute force, a race ends with exact costs, and all find what was planted."""

import itertools

import pytest

import tiny
from layercut.layer_search import search
from layercut.layer_search.cut_costs import CutCosts, halving
from layercut.layer_search.result import Cost
from layercut.layer_search.segment_sets import all_sets, neighbours, number_of_sets
from layercut.layer_search.sweep import DENSE, all_segments, set_costs, set_work
from layercut.models import decoder_stack
from layercut.models.losses import kl_divergence
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment, joined_segments
from layercut.surgery import cut_segment_


def brute_force(model, tokens, segment):
    """KL of the model that is really cut."""
    student = decoder_stack.share(model)
    cut_segment_(student, [segment])
    p, q = (m(input_ids=tokens, use_cache=False).logits for m in (model, student))
    return kl_divergence(p, q).mean().item()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_one_sweep_is_brute_force(make):
    model, tokens, cost = make(), tiny.some_tokens(), Cost()
    stack = DecoderRunner(model)
    segments = all_segments(2, len(stack))
    found = set_costs(stack, tokens, [(s,) for s in segments], cost, rows=4)
    assert [c.kl for c in found] == sorted(c.kl for c in found)
    assert {c.segments[0] for c in found} == set(segments)
    for candidate in found:
        assert candidate.kl == pytest.approx(brute_force(model, tokens, candidate.segments[0]), rel=1e-4, abs=1e-6)
    assert cost.layer_forwards == set_work([DENSE, *((s,) for s in segments)], len(stack), len(tokens))
    assert cost.dense_tokens == tokens.numel()


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("method", ["fisher", "race", "exhaustive"])
def test_planted_identity_layers_are_found(start, method):
    model = tiny.llama()
    tiny.make_identity_(model, range(start, start + 2))
    result = search(DecoderRunner(model), tiny.some_tokens(), n_layers=2, method=method)
    assert result.segments == [Segment(start, start + 2)]
    assert result.candidates[0].kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["fisher", "race"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_two_segments_by_the_gate_are_the_exhaustive_answer_at_the_price_of_brute_force(make, method):
    model, tokens = make(), tiny.some_tokens()
    result = search(DecoderRunner(model), tokens, n_layers=3, method=method, seed=0, num_segments=2)
    every = search(DecoderRunner(model), tokens, n_layers=3, method="exhaustive", num_segments=2)
    assert result.kl == pytest.approx(every.kl, rel=1e-5)
    split = next(c for c in result.candidates if len(c.segments) == 2)
    for candidate in (result.candidates[0], split):
        student = decoder_stack.share(model)
        cut_segment_(student, list(candidate.segments))
        p, q = (m(input_ids=tokens, use_cache=False).logits for m in (model, student))
        assert candidate.kl == pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-4)


def test_all_sets_are_those_of_brute_force():
    subsets = [joined_segments(layers) for layers in itertools.combinations(range(9), 4)]
    for count in (1, 2, 3):
        expected = sorted(cuts for cuts in subsets if len(cuts) <= count)
        assert sorted(all_sets(4, 9, count)) == expected
        assert number_of_sets(4, 9, count) == len(expected)


def test_neighbours_are_the_sets_one_layer_away_that_move_a_wall():
    assert neighbours((Segment(2, 4),), 8, 1) == [(Segment(1, 3),), (Segment(3, 5),)]
    assert neighbours((Segment(0, 2),), 8, 1) == [(Segment(1, 3),)]
    cuts = (Segment(1, 3), Segment(5, 6))
    removed = {1, 2, 5}
    for moved in neighbours(cuts, 8, 2):
        layers = {i for segment in moved for i in range(segment.start, segment.stop)}
        assert len(layers & removed) == 2
        assert len(layers) == 3
        assert len(moved) <= 2
    assert (Segment(1, 4),) in neighbours(cuts, 8, 2)


def test_prices_are_those_of_the_sweep_and_no_row_is_priced_twice():
    model, tokens, cost = tiny.llama(), tiny.some_tokens(8), Cost()
    stack = DecoderRunner(model)
    sets = [(segment,) for segment in all_segments(2, len(stack))]
    costs = CutCosts(stack, tokens, cost)
    costs.of(sets[:3], 2)
    costs.of(sets, 5)
    exact = {c.segments: c.kl for c in set_costs(stack, tokens, sets, Cost())}
    means = costs.of(sets, 8).mean(-1).tolist()
    assert means == pytest.approx([exact[cuts] for cuts in sets], rel=1e-4)
    spent = cost.layer_forwards
    costs.of(sets, 8)
    assert cost.layer_forwards == spent
    # three sets on two rows, then the other four on these; all seven on the rest: the dense stream along each time
    assert spent == 2 * (8 + 6 + 5 + 4) + 2 * (8 + 3 + 2 + 1 + 0) + 6 * (8 + 21)


def test_a_race_ends_with_the_best_priced_on_all_rows():
    stack, tokens, cost = DecoderRunner(tiny.llama()), tiny.some_tokens(16), Cost()
    segments = all_segments(2, len(stack))
    exact = set_costs(stack, tokens, [(s,) for s in segments], Cost())
    found = halving(CutCosts(stack, tokens, cost), [(segment,) for segment in segments])
    assert found[0].segments == exact[0].segments
    assert found[0].kl == pytest.approx(exact[0].kl, rel=1e-4)
    assert cost.layer_forwards < 0.7 * set_work([DENSE, *((s,) for s in segments)], len(stack), len(tokens))
