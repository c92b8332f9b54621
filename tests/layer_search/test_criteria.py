"""Baselines: each formula is a direct computation on a stock model, and each method finds what was planted."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

import tiny
from layercut.layer_search import criteria, search
from layercut.layer_search.greedy import distinct, evolution, level_switch, sleb, sleb_work
from layercut.layer_search.result import Cost
from layercut.layer_search.statistics import Similarity, cosine_sums, similarity, taylor_scores
from layercut.layer_search.sweep import DENSE, set_costs, set_losses, set_work
from layercut.models import model_weights
from layercut.models.losses import kl_divergence, next_token_loss
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment, joined_segments
from layercut.surgery import cut_segment_

BASELINES = [
    "random", "reverse-order", "block-influence", "angular", "cosine", "perplexity", "taylor", "sleb", "evolution",
]  # fmt: skip
SETS = [
    (Segment(0, 1), Segment(2, 3)),
    (Segment(0, 1), Segment(2, 3), Segment(4, 6)),
    (Segment(1, 2), Segment(2, 4)),  # side by side
    (Segment(2, 3), Segment(5, 6)),
    (Segment(2, 3),),
]


def without(model, cuts):
    """The model that is really cut."""
    student = model_weights.share(model)
    cut_segment_(student, cuts)
    return student


def logits(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


def hidden_states(model, tokens):
    """h_0 … h_L of the stock model [L + 1, B, T, D]; its own last one is behind the final norm."""
    last = []
    hook = model.model.layers[-1].register_forward_hook(lambda _, __, out: last.append(out))
    states = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    return torch.stack([*states[:-1], last[0]])


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_sets_of_segments_cost_what_the_real_cuts_do(make):
    model, tokens, cost = make(layers=6), tiny.some_tokens(), Cost()
    steps = []
    found = set_costs(DecoderRunner(model), tokens, SETS, cost, rows=4, advance=steps.append)
    assert {c.segments for c in found} == set(SETS)
    assert [c.kl for c in found] == sorted(c.kl for c in found)
    for candidate in found:
        expected = kl_divergence(logits(model, tokens), logits(without(model, candidate.segments), tokens)).mean()
        assert candidate.kl == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    # dense: 6; 0:1 alone as far as layer 2, and with 2:3 to the end: 1 + 3; 4:6 leaves that at 4 and enters nothing;
    # 1:2 is left at once, with 2:4 beside it: 2; 2:3 to the end: 3; with 5:6: 0
    assert cost.layer_forwards == len(tokens) * (6 + 4 + 2 + 3) == set_work([DENSE, *SETS], 6, len(tokens))
    assert sum(steps) == cost.layer_forwards
    assert cost.dense_tokens == tokens.numel()


def test_losses_of_sets_carry_the_dense_stream_no_further_than_needed():
    model, tokens, cost = tiny.llama(6), tiny.some_tokens(), Cost()
    losses = set_losses(DecoderRunner(model), tokens, SETS, cost, rows=4)
    for cuts in SETS:
        expected = next_token_loss(logits(without(model, cuts), tokens), tokens).mean()
        assert losses[cuts] == pytest.approx(expected.item(), rel=1e-5)
    assert cost.layer_forwards == len(tokens) * (2 + 4 + 2 + 3)
    assert cost.dense_tokens == 0


def test_several_given_segments_are_priced_as_one_cut():
    model, tokens = tiny.llama(6), tiny.some_tokens()
    result = search(DecoderRunner(model), tokens, segments=[Segment(4, 5), Segment(1, 2)])
    assert result.segments == [Segment(1, 2), Segment(4, 5)]
    expected = kl_divergence(logits(model, tokens), logits(without(model, result.segments), tokens)).mean()
    assert result.candidates[0].kl == pytest.approx(expected.item(), rel=1e-4)


def test_layers_join_to_segments():
    assert joined_segments([7, 2, 3]) == (Segment(2, 4), Segment(7, 8))
    assert joined_segments([]) == ()


def test_similarities_are_those_of_the_stock_models_hidden_states(monkeypatch):
    model, tokens, cost = tiny.llama(), tiny.some_tokens(), Cost()
    monkeypatch.setattr("layercut.layer_search.statistics.BUDGET_BYTES", 4 * 9 * 16 * 32 * 4)  # four rows at a time
    found = similarity(DecoderRunner(model), tokens, cost)
    states = hidden_states(model, tokens).double()
    cosines = F.cosine_similarity(states[:, None], states[None], dim=-1)  # [L + 1, L + 1, B, T]
    torch.testing.assert_close(found.cosine, cosines.mean((-1, -2)), rtol=1e-5, atol=1e-6)
    angles = cosines[..., -1].clamp(-1, 1).arccos() / torch.pi
    torch.testing.assert_close(found.angular, angles.mean(-1), rtol=1e-4, atol=1e-6)
    assert (cost.layer_forwards, cost.dense_tokens, cost.layer_backwards) == (8 * 6, tokens.numel(), 0)

    influence = 1 - torch.stack([cosines[i, i + 1].mean() for i in range(8)])
    runner = DecoderRunner(model)
    scores = criteria.block_influence(runner, tokens, 3, cost=Cost())
    assert criteria.lowest(scores, 3) == joined_segments(influence.argsort()[:3].tolist())
    for length in (1, 3, 8):
        starts = range(8 - length + 1)
        near = min(starts, key=lambda s, n=length: angles[s, s + n].mean().item())
        alike = max(starts, key=lambda s, n=length: cosines[s, s + n].mean().item())
        assert criteria.angular(runner, tokens, length, cost=Cost()) == (Segment(near, near + length),)
        assert criteria.cosine(runner, tokens, length, cost=Cost()) == (Segment(alike, alike + length),)


def test_cosine_is_along_the_hidden_dimension_not_along_the_tokens():
    # h_1 is h_0 with its tokens' scales changed: the same directions, so layer 0 does nothing that cosine sees.
    # h_2 is h_1 with its channels scaled: along the tokens each channel points where it did.
    generator = torch.Generator().manual_seed(0)
    h0 = torch.randn(1, 12, 8, generator=generator)
    h1 = h0 * torch.logspace(-2, 2, 12)[None, :, None]
    h2 = h1 * torch.logspace(-2, 2, 8)
    states = torch.stack([h0, h1, h2])
    right = Similarity(cosine_sums(states) / 12, torch.zeros(3, 3))
    wrong = Similarity(cosine_sums(states.transpose(-1, -2)) / 8, torch.zeros(3, 3))
    assert right.cosine[0, 1] == pytest.approx(1)
    assert criteria.best_start(-right.cosine.diagonal(1), 1) == (Segment(0, 1),)
    assert wrong.cosine[1, 2] == pytest.approx(1)
    assert criteria.best_start(-wrong.cosine.diagonal(1), 1) == (Segment(1, 2),)


def test_taylor_is_weight_times_gradient_of_the_whole_models_loss():
    model, tokens, cost = tiny.llama(), tiny.some_tokens(), Cost()
    model.model.layers[3].self_attn.q_proj.weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    found = taylor_scores(DecoderRunner(model), tokens, cost, rows=4)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert (cost.layer_forwards, cost.layer_backwards) == (2 * 8 * 6, 8 * 6)

    model.requires_grad_(True)
    next_token_loss(logits(model, tokens), tokens).mean().backward()
    for i, layer in enumerate(model.model.layers):
        expected = sum((p * p.grad).abs().sum().item() for p in layer.parameters() if p.ndim > 1)
        assert found[i].item() == pytest.approx(expected, rel=1e-4)


def test_one_shot_perplexity_takes_the_layers_whose_loss_rises_least():
    model, tokens = tiny.llama(), tiny.some_tokens()
    one_less = {i: logits(without(model, [Segment(i, i + 1)]), tokens) for i in range(8)}
    rise = {i: next_token_loss(without_i, tokens).mean().item() for i, without_i in one_less.items()}
    free = [i for i in range(8) if i not in criteria.protected_layers(8)]
    result = search(DecoderRunner(model), tokens, n_layers=3, method="perplexity", seed=0)
    assert tuple(result.segments) == joined_segments(sorted(free, key=rise.__getitem__)[:3])


def test_protected_layers_are_taken_only_where_nothing_else_is_left():
    assert criteria.protected_layers(32) == {0, 1, 2, 3, 30, 31}
    assert criteria.protected_layers(12) == {0, 1, 2, 3, 10, 11}
    assert criteria.protected_layers(8) == {0, 1, 7}
    scores = torch.tensor([0.0, 1, 9, 8, 7, 6, 5, 4])
    assert criteria.one_shot(scores, 2) == (Segment(5, 7),)
    assert criteria.one_shot(scores, 6) == (Segment(0, 1), Segment(2, 7))


def test_reverse_order_keeps_the_last_layer_and_random_is_uniform():
    runner, tokens = DecoderRunner(tiny.llama()), tiny.some_tokens()
    assert criteria.reverse_order(runner, tokens, 3) == (Segment(4, 7),)
    assert criteria.reverse_order(runner, tokens, 7) == (Segment(0, 7),)
    starts = [criteria.random_segment(runner, tokens, 3, seed=seed)[0].start for seed in range(600)]
    counts = [starts.count(s) for s in range(6)]
    assert sum(counts) == 600
    assert min(counts) > 60
    assert criteria.random_segment(runner, tokens, 3, seed=5) == criteria.random_segment(runner, tokens, 3, seed=5)


def test_sleb_is_greedy_and_costs_what_its_rounds_cost():
    model, tokens, cost = tiny.llama(6), tiny.some_tokens(), Cost()
    removed, forwards = [], 0
    for _ in range(3):
        losses = {}
        for i in set(range(6)) - set(removed):
            student = without(model, joined_segments([*removed, i]))
            losses[i] = next_token_loss(logits(student, tokens), tokens).mean().item()
        forwards += set_work([joined_segments([*removed, i]) for i in losses], 6, len(tokens))
        removed.append(min(losses, key=losses.__getitem__))
    assert sleb(DecoderRunner(model), tokens, 3, cost) == joined_segments(removed)
    assert cost.layer_forwards == forwards == sleb_work(3, 6, len(tokens))


def test_evolution_finds_nearly_the_best_of_all_sets():
    model, tokens, cost = tiny.llama(), tiny.some_tokens(8), Cost()
    stack = DecoderRunner(model)
    found = evolution(stack, tokens, 2, cost, seed=0)
    exact = set_costs(stack, tokens, [joined_segments(pair) for pair in combinations(range(8), 2)], Cost())
    assert found in [candidate.segments for candidate in exact[:4]]
    again, other = Cost(), Cost()
    assert evolution(stack, tokens, 2, again, seed=0) == found
    assert again == cost
    evolution(stack, tokens, 2, other, seed=1)
    assert other != cost


@pytest.mark.parametrize("seed", [0, 1])
def test_evolution_finds_planted_layers_within_its_budget(seed):
    model, tokens, cost = tiny.llama(16), tiny.some_tokens(16), Cost()
    planted = [3, 6, 7, 12]
    for i in planted:
        tiny.make_identity_(model, range(i, i + 1))
    steps = []
    found = evolution(DecoderRunner(model), tokens, 4, cost, seed=seed, advance=steps.append)
    assert found == joined_segments(planted)
    budget = sleb_work(4, 16, len(tokens))
    assert 0.8 * budget < cost.layer_forwards <= budget
    assert sum(steps) == budget, "what shows how far it is ends at its end"


def test_evolution_stops_at_a_budget_of_ones_own():
    stack, tokens = DecoderRunner(tiny.llama(12)), tiny.some_tokens(8)
    least, some = Cost(), Cost()
    evolution(stack, tokens, 3, least, seed=0, budget=0)
    evolution(stack, tokens, 3, some, seed=0, budget=4000)
    assert 0 < least.layer_forwards < some.layer_forwards <= 4000


def test_children_differ_and_are_fewer_where_there_are_no_more():
    generator = torch.Generator().manual_seed(0)
    parent = joined_segments([0])
    children = distinct(lambda: level_switch(parent, 4, generator), 8, parent)
    assert sorted(children) == [(Segment(1, 2),), (Segment(2, 3),), (Segment(3, 4),)]


def test_a_level_switch_keeps_the_number_of_layers():
    generator = torch.Generator().manual_seed(0)
    parent = joined_segments([1, 2, 5])
    sizes = set()
    for _ in range(40):
        child = level_switch(parent, 8, generator)
        assert sum(map(len, child)) == 3
        sizes.add(len({i for s in child for i in range(s.start, s.stop)} - {1, 2, 5}))
    assert sizes == {1, 2, 3}


@pytest.mark.parametrize("method", BASELINES[2:])
def test_planted_identity_layers_are_found(method):
    model = tiny.llama()
    apart = method not in ("angular", "cosine")
    tiny.make_identity_(model, [2, 5] if apart else range(3, 5))
    # the model's own words: on random tokens a random model's loss falls when layers go
    tokens = model.generate(tiny.some_tokens(8, 4), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    result = search(DecoderRunner(model), tokens, n_layers=2, method=method, seed=0)
    assert result.segments == ([Segment(2, 3), Segment(5, 6)] if apart else [Segment(3, 5)])
    assert result.candidates[0].kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", BASELINES)
def test_a_pick_is_priced_by_its_real_cut_and_that_is_not_charged(method):
    model, tokens = tiny.llama(), tiny.some_tokens()
    first, second = (search(DecoderRunner(model), tokens, n_layers=3, method=method, seed=3) for _ in range(2))
    assert first == second
    assert first.method == method
    assert sum(map(len, first.segments)) == 3
    expected = kl_divergence(logits(model, tokens), logits(without(model, first.segments), tokens)).mean()
    assert first.candidates[0].kl == pytest.approx(expected.item(), rel=1e-4)
    cost = first.cost
    free = method in ("random", "reverse-order")
    assert (cost == Cost()) == free
    assert (cost.layer_backwards > 0) == (method == "taylor")
