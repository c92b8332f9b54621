"""Search: the sweep is brute force, the gate is exact at its ends, and both find what was planted."""

import itertools

import pytest
import torch

import tiny
from layercut.layer_search import search
from layercut.layer_search.clp import clp, schedule_for
from layercut.layer_search.gate import GateSchedule, concave_gate, descend, gated_forward, hard_gate
from layercut.layer_search.gate_walls import (
    all_sets,
    cuts_of,
    inside,
    neighbours,
    number_of_sets,
    onto_simplex,
    spans_of,
    step_of,
    walls_of,
)
from layercut.layer_search.prices import Prices, race
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import all_segments, segment_costs, set_costs, sweep_work
from layercut.models import loading
from layercut.models.losses import kl_divergence, next_token_loss
from layercut.models.objectives import Hidden
from layercut.models.runner import DecoderRunner
from layercut.report import charts
from layercut.segments import Segment, joined_segments
from layercut.surgery import cut_segment_


def brute_force(model, tokens, segment):
    """KL of the model that is really cut."""
    student = loading.share(model)
    cut_segment_(student, [segment])
    p, q = (m(input_ids=tokens, use_cache=False).logits for m in (model, student))
    return kl_divergence(p, q).mean().item()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_one_sweep_is_brute_force(make):
    model, tokens, cost = make(), tiny.some_tokens(), Cost()
    stack = DecoderRunner(model)
    segments = all_segments(2, len(stack))
    found = segment_costs(stack, tokens, segments, cost, rows=4)
    assert [c.kl for c in found] == sorted(c.kl for c in found)
    assert {c.segments[0] for c in found} == set(segments)
    for candidate in found:
        assert candidate.kl == pytest.approx(brute_force(model, tokens, candidate.segments[0]), rel=1e-4, abs=1e-6)
    assert cost.layer_forwards == sweep_work(segments, len(stack), len(tokens))
    assert cost.dense_tokens == tokens.numel()


def test_the_gate_is_a_well_of_the_segments_width():
    for start in range(7):
        walls = torch.tensor([[start, start + 2.0]])
        torch.testing.assert_close(concave_gate(walls, 8, 200.0), hard_gate([(Segment(start, start + 2),)], 8))
    soft = concave_gate(torch.tensor([[2.5, 5.5]]), 8, 4.0)[0]
    torch.testing.assert_close(soft, soft.flip(0))  # symmetric about the middle of the well


def test_several_wells_are_several_segments_and_touching_ones_are_one():
    two = concave_gate(torch.tensor([[1.0, 3.0, 5.0, 6.0]]), 8, 200.0)
    torch.testing.assert_close(two, hard_gate([(Segment(1, 3), Segment(5, 6))], 8))
    touching = concave_gate(torch.tensor([[1.0, 3.0, 3.0, 6.0]]), 8, 200.0)
    torch.testing.assert_close(touching, hard_gate([(Segment(1, 6),)], 8))


def test_open_gate_is_the_model_and_closed_gate_is_the_cut_to_the_bit():
    model = tiny.llama()
    stack, row = DecoderRunner(model), tiny.some_tokens(1)
    gates = torch.ones(3, len(stack))
    gates[1, 2:4] = 0
    gates[2, 5:8] = 0
    cost = Cost()
    dense, gated = gated_forward(stack, gates, row, cost)
    expected = model(input_ids=row, use_cache=False).logits
    assert torch.equal(stack.exit(dense, row), expected)
    logits = stack.exit(gated, row.expand(3, -1))
    torch.testing.assert_close(logits[:1], expected)
    assert torch.equal(gated[:1], dense)
    for particle, segment in ((1, Segment(2, 4)), (2, Segment(5, 8))):
        student = loading.share(model)
        cut_segment_(student, [segment])
        torch.testing.assert_close(logits[particle : particle + 1], student(input_ids=row, use_cache=False).logits)
    # the dense stream, and each particle from where it leaves that, its closed layers not entered
    assert cost.layer_forwards == 8 + 4 + 0


def test_gate_gradient_is_the_finite_difference():
    model = tiny.llama().double()
    stack, row = DecoderRunner(model), tiny.some_tokens(1)

    def loss(place):
        gates = concave_gate(torch.stack([place, place + 2], -1), 8, 3.0)
        dense, gated = gated_forward(stack, gates, row, Cost())
        return (gated - dense).square().mean()

    place = torch.tensor([3.3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(place), place)
    step = 1e-4
    with torch.no_grad():
        difference = (loss(place + step) - loss(place - step)) / (2 * step)
    # gates within CLOSED of 0 or 1 are taken as such, and their share of the slope is left out
    torch.testing.assert_close(slope[0], difference, rtol=2e-2, atol=1e-8)


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("method", ["clp", "exhaustive"])
def test_planted_identity_layers_are_found(start, method):
    model = tiny.llama()
    tiny.make_identity_(model, range(start, start + 2))
    result = search(DecoderRunner(model), tiny.some_tokens(), n_layers=2, method=method, oracle=method == "clp")
    assert result.segments == [Segment(start, start + 2)]
    assert result.candidates[0].kl == pytest.approx(0, abs=1e-6)
    if method == "clp":
        assert result.oracle["segments"] == [[start, start + 2]]


@pytest.mark.parametrize("cuts", [(Segment(0, 1), Segment(4, 5)), (Segment(2, 4), Segment(6, 7))])
def test_planted_identity_segments_are_found_two_at_a_time(cuts):
    model, length = tiny.llama(), sum(map(len, cuts))
    for segment in cuts:
        tiny.make_identity_(model, range(segment.start, segment.stop))
    result = search(DecoderRunner(model), tiny.some_tokens(), n_layers=length, method="clp", seed=0, num_segments=2)
    assert tuple(result.segments) == cuts
    assert result.candidates[0].kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_two_segments_by_the_gate_are_the_exhaustive_answer_at_the_price_of_brute_force(make):
    model, tokens = make(), tiny.some_tokens()
    result = search(DecoderRunner(model), tokens, n_layers=3, method="clp", seed=0, num_segments=2, oracle=True)
    assert result.oracle["regret"] == pytest.approx(1.0, abs=1e-5)
    split = next(c for c in result.candidates if len(c.segments) == 2)
    for candidate in (result.candidates[0], split):
        student = loading.share(model)
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


@pytest.mark.parametrize("cuts", [(Segment(0, 2),), (Segment(1, 2), Segment(5, 8)), (Segment(0, 1), Segment(2, 4))])
def test_spans_are_the_segments_and_moves_keep_the_number_of_layers(cuts):
    assert cuts_of(torch.tensor(spans_of(cuts, 8, 2))) == cuts
    generator = torch.Generator().manual_seed(0)
    spans = torch.tensor([spans_of(cuts, 8, 2)]).repeat(50, 1)
    for _ in range(5):
        move = step_of(torch.randn(spans.shape, generator=generator))
        torch.testing.assert_close(walls_of(move).abs().amax(-1), torch.ones(50))
        spans = inside(spans + move, 8, sum(map(len, cuts)))
    assert (spans[:, 0::2] >= 0).all()
    assert (spans[:, 1::2] >= 1 - 1e-5).all()
    torch.testing.assert_close(spans.sum(-1), torch.full((50,), 8.0))
    for row in spans:
        assert sum(map(len, cuts_of(row))) == sum(map(len, cuts))


def test_projection_onto_the_simplex_is_the_nearest_point():
    x = torch.tensor([[2.0, -1.0, 0.5]])
    grid = torch.tensor([[a, b, 2 - a - b] for a in torch.linspace(0, 2, 201) for b in torch.linspace(0, 2, 201)])
    grid = grid[(grid >= 0).all(-1)]
    nearest = grid[(grid - x).square().sum(-1).argmin()]
    torch.testing.assert_close(onto_simplex(x, 2.0)[0], nearest, atol=0.01, rtol=0)


def test_prices_are_those_of_the_sweep_and_no_row_is_priced_twice():
    model, tokens, cost = tiny.llama(), tiny.some_tokens(8), Cost()
    stack = DecoderRunner(model)
    sets = [(segment,) for segment in all_segments(2, len(stack))]
    prices = Prices(stack, tokens, cost)
    prices.of(sets[:3], 2)
    prices.of(sets, 5)
    exact = {c.segments: c.kl for c in set_costs(stack, tokens, sets, Cost())}
    means = prices.of(sets, 8).mean(-1).tolist()
    assert means == pytest.approx([exact[cuts] for cuts in sets], rel=1e-4)
    spent = cost.layer_forwards
    prices.of(sets, 8)
    assert cost.layer_forwards == spent
    # three sets on two rows, then the other four on these; all seven on the rest: the dense stream along each time
    assert spent == 2 * (8 + 6 + 5 + 4) + 2 * (8 + 3 + 2 + 1 + 0) + 6 * (8 + 21)


def test_a_race_ends_with_the_best_priced_on_all_rows():
    stack, tokens, cost = DecoderRunner(tiny.llama()), tiny.some_tokens(16), Cost()
    segments = all_segments(2, len(stack))
    exact = segment_costs(stack, tokens, segments, Cost())
    found = race(Prices(stack, tokens, cost), [(segment,) for segment in segments])
    assert found[0].segments == exact[0].segments
    assert found[0].kl == pytest.approx(exact[0].kl, rel=1e-4)
    assert cost.layer_forwards < 0.7 * sweep_work(segments, len(stack), len(tokens))


@pytest.mark.parametrize("objective", ["next-token", "hidden"])
@pytest.mark.parametrize("method", ["clp", "exhaustive"])
def test_other_objectives_choose_by_their_own_score(objective, method):
    model, tokens = tiny.llama(), tiny.some_tokens(8)
    stack = DecoderRunner(model)
    result = search(stack, tokens, n_layers=2, method=method, seed=0, objective=objective)
    scores = {}
    for segment in all_segments(2, len(stack)):
        student = loading.share(model)
        cut_segment_(student, [segment])
        if objective == "next-token":
            logits = student(input_ids=tokens, use_cache=False).logits
            scores[segment] = next_token_loss(logits, tokens).mean().item()
        else:
            ends = []
            for opened in (stack, DecoderRunner(student)):
                hidden, calls = opened.enter(tokens)
                ends.append(opened.run(hidden, calls, 0, len(opened)))
            error = (ends[1] - ends[0]).square().sum(-1) / ends[0].square().sum(-1)
            scores[segment] = error.mean().item()
    best = min(scores, key=scores.get)
    assert result.segments == [best]
    assert result.candidates[0].score == pytest.approx(scores[best], rel=1e-4)
    assert result.candidates[0].kl == pytest.approx(brute_force(model, tokens, best), rel=1e-4)


def test_same_seed_same_answer_and_the_path_is_recorded():
    model, tokens = tiny.llama(), tiny.some_tokens()
    runs = [clp(DecoderRunner(model), tokens, 2, cost=Cost(), seed=1, num_segments=2) for _ in range(2)]
    assert runs[0] == runs[1]
    path = runs[0].path
    assert clp(DecoderRunner(model), tokens, 2, cost=Cost(), seed=2, num_segments=2).path != path
    assert len(path) == schedule_for(8, 2, 2, len(tokens)).steps + 1
    for step in path:
        assert len(step["places"]) == len(step["stops"])
        assert all(0 <= start < stop <= 8 + 1e-5 for start, stop in zip(step["places"], step["stops"], strict=True))
    assert all(len(step["losses"]) == len(step["places"]) for step in path[:-1])
    assert charts.path_chart({"path": path, "segments": [[1, 3]]})


@pytest.mark.parametrize("relaxation", ["sigmoid", "straight-through"])
def test_walls_move_by_at_most_their_stride_and_recomputing_changes_nothing(relaxation):
    model, tokens = tiny.llama(), tiny.some_tokens()
    seeds = [(Segment(1, 3),), (Segment(5, 7),)]
    paths = []
    for recompute in (False, True):
        schedule = GateSchedule(particles=2, steps=5, stride=(0.5, 0.5), relaxation=relaxation, recompute=recompute)
        ends, path = descend(DecoderRunner(model), tokens, seeds, schedule, Cost())
        paths.append(path)
        for before, after in itertools.pairwise(path):
            moves = [abs(a - b) for a, b in zip(before["places"], after["places"], strict=True)]
            assert max(moves) <= 0.5 + 1e-6
        assert ends == [(Segment(round(p), round(p) + 2),) for p in path[-1]["places"]]
    assert paths[0] == paths[1]


def test_straight_through_runs_the_real_cut():
    model, tokens = tiny.llama(), tiny.some_tokens()
    schedule = GateSchedule(particles=1, steps=1, relaxation="straight-through")
    _, path = descend(DecoderRunner(model), tokens[:1], [(Segment(2, 4),)], schedule, Cost(), objective=Hidden())
    dense, gated = gated_forward(DecoderRunner(model), hard_gate([(Segment(2, 4),)], 8), tokens[:1], Cost())
    expected = (gated - dense).square().sum(-1) / dense.square().sum(-1)
    assert path[0]["losses"][0] == pytest.approx(expected.mean().item(), rel=1e-5)
