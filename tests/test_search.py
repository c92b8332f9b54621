"""Search: the sweep is brute force, the gate is exact at its ends, and both find what was planted."""

import itertools

import pytest
import torch

import tiny
from layercut import models
from layercut.cut import cut_segment_
from layercut.losses import kl_divergence
from layercut.search import find_segments
from layercut.search.exhaustive import all_segments, segment_costs, sweep_work
from layercut.search.gate import GateSchedule, clp_search, concave_gate, descend, gated_forward, schedule_for
from layercut.search.result import Cost
from layercut.segments import Segment
from layercut.sweep import Stack


def brute_force(model, tokens, segment):
    """KL of the model that is really cut."""
    student = models.share(model)
    cut_segment_(student, [segment])
    p, q = (m(input_ids=tokens, use_cache=False).logits for m in (model, student))
    return kl_divergence(p, q).mean().item()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_one_sweep_is_brute_force(make):
    model, tokens, cost = make(), tiny.some_tokens(), Cost()
    stack = Stack(model)
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
        gate = concave_gate(torch.tensor([float(start)]), 2, 8, 200.0)[0]
        closed = torch.tensor([float(not start <= i < start + 2) for i in range(8)])
        torch.testing.assert_close(gate, closed)
    soft = concave_gate(torch.tensor([2.5]), 3, 8, 4.0)[0]
    assert soft.argmin() == 4 - 1 or soft.argmin() == 3
    torch.testing.assert_close(soft[:8], soft.flip(0)[0:8])  # symmetric about the middle of the well


def test_open_gate_is_the_model_and_closed_gate_is_the_cut_to_the_bit():
    model = tiny.llama()
    stack, row = Stack(model), tiny.some_tokens(1)
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
        student = models.share(model)
        cut_segment_(student, [segment])
        torch.testing.assert_close(logits[particle : particle + 1], student(input_ids=row, use_cache=False).logits)
    # the dense stream, and each particle from where it leaves that, its closed layers not entered
    assert cost.layer_forwards == 8 + 4 + 0


def test_gate_gradient_is_the_finite_difference():
    model = tiny.llama().double()
    stack, row = Stack(model), tiny.some_tokens(1)

    def loss(place):
        dense, gated = gated_forward(stack, concave_gate(place, 2, 8, 3.0), row, Cost())
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
    result = find_segments(Stack(model), tiny.some_tokens(), 2, method, seed=0, oracle=method == "clp")
    assert result.segments == [Segment(start, start + 2)]
    assert result.candidates[0].kl == pytest.approx(0, abs=1e-6)
    if method == "clp":
        assert result.oracle["segments"] == [[start, start + 2]]


def test_same_seed_same_answer_and_the_path_is_recorded():
    model, tokens = tiny.llama(), tiny.some_tokens()
    runs = [clp_search(Stack(model), tokens, 2, Cost(), seed=1) for _ in range(2)]
    assert runs[0] == runs[1]
    other = descend(Stack(model), tokens, 2, schedule_for(2, 8), Cost(), seed=2)
    path = runs[0][1]
    assert other != path
    schedule = schedule_for(2, 8)
    assert len(path) == schedule.steps + 1
    assert all(0 <= place <= 6 for step in path for place in step["places"])


def test_places_move_by_at_most_their_stride():
    model, tokens = tiny.llama(), tiny.some_tokens()
    schedule = GateSchedule(particles=2, steps=5, stride=(0.5, 0.5))
    path = descend(Stack(model), tokens, 2, schedule, Cost(), seed=0)
    for before, after in itertools.pairwise(path):
        moves = [abs(a - b) for a, b in zip(before["places"], after["places"], strict=True)]
        assert max(moves) <= 0.5 + 1e-6
