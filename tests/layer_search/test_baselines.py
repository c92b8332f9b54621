"""Baselines: each formula is a direct computation on a stock model, and each method finds what was planted."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

import tiny
from layercut.layer_search import baselines, search
from layercut.layer_search.baselines import cosines, sleb, sleb_work, taylor_scores
from layercut.layer_search.criteria import one_shot
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import set_costs, set_work
from layercut.models import decoder_stack
from layercut.models.losses import kl_divergence, next_token_loss
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment, joined_segments
from layercut.surgery import cut_segment_

BASELINES = [
    "random", "reverse-order", "block-influence", "angular", "cosine", "perplexity", "taylor", "sleb", "evolution",
]  # fmt: skip


def without(model, cuts):
    """The model that is really cut."""
    student = decoder_stack.share(model)
    cut_segment_(student, cuts)
    return student


def logits(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


def loss_without(model, tokens, cuts):
    return next_token_loss(logits(without(model, cuts), tokens), tokens).mean().item()


def test_cosines_are_those_of_the_stock_models_hidden_states(monkeypatch):
    model, tokens, cost, last = tiny.llama(), tiny.some_tokens(), Cost(), []
    monkeypatch.setattr(baselines, "BUDGET_BYTES", 4 * 9 * 16 * 32 * 4)  # four rows at a time
    everywhere, at_the_end = cosines(DecoderRunner(model), tokens, cost)
    # h_0 … h_L [L + 1, B, T, D]; the stock model's own last one is behind the final norm
    hook = model.model.layers[-1].register_forward_hook(lambda _, __, out: last.append(out))
    states = torch.stack([*model(input_ids=tokens, output_hidden_states=True).hidden_states[:-1], last[0]]).double()
    hook.remove()
    expected = F.cosine_similarity(states[:, None], states[None], dim=-1)  # [L + 1, L + 1, B, T]
    torch.testing.assert_close(everywhere, expected.mean((-1, -2)), rtol=1e-5, atol=1e-6)
    angles = expected[..., -1].clamp(-1, 1).arccos() / torch.pi
    torch.testing.assert_close(at_the_end, angles.mean(-1), rtol=1e-4, atol=1e-6)
    assert (cost.layer_forwards, cost.dense_tokens, cost.layer_backwards) == (8 * 6, tokens.numel(), 0)

    runner, influence = DecoderRunner(model), 1 - torch.stack([expected[i, i + 1].mean() for i in range(8)])
    found = search(runner, tokens, n_layers=3, method="block-influence")
    assert tuple(found.segments) == joined_segments(influence.argsort()[:3].tolist())
    for length in (1, 3, 7):
        starts = range(8 - length + 1)
        near = min(starts, key=lambda s, n=length: angles[s, s + n].mean().item())
        alike = max(starts, key=lambda s, n=length: expected[s, s + n].mean().item())
        for method, start in (("angular", near), ("cosine", alike)):
            found = search(runner, tokens, n_layers=length, method=method)
            assert found.segments == [Segment(start, start + length)]


def test_taylor_is_weight_times_gradient_of_the_whole_models_loss():
    model, tokens, cost = tiny.llama(), tiny.some_tokens(), Cost()
    model.model.layers[3].self_attn.q_proj.weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    found = taylor_scores(DecoderRunner(model), tokens, cost)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert (cost.layer_forwards, cost.layer_backwards) == (2 * 8 * 6, 8 * 6)
    model.requires_grad_(True)
    next_token_loss(logits(model, tokens), tokens).mean().backward()
    for i, layer in enumerate(model.model.layers):
        expected = sum((p * p.grad).abs().sum().item() for p in layer.parameters() if p.ndim > 1)
        assert found[i].item() == pytest.approx(expected, rel=1e-4)


def test_perplexity_takes_the_layers_whose_loss_rises_least_but_the_first_and_the_last():
    model, tokens = tiny.llama(), tiny.some_tokens()
    rise = {i: loss_without(model, tokens, [Segment(i, i + 1)]) for i in range(2, 7)}
    result = search(DecoderRunner(model), tokens, n_layers=3, method="perplexity", seed=0)
    assert tuple(result.segments) == joined_segments(sorted(rise, key=rise.__getitem__)[:3])


def test_protected_layers_are_taken_only_where_nothing_else_is_left():
    for layers, free in ((32, range(4, 30)), (12, range(4, 10)), (8, range(2, 7))):
        few = Restriction.none(layers, len(free))
        assert one_shot(torch.zeros(layers), few) == (Segment(free[0], free[-1] + 1),)
    scores = torch.tensor([0.0, 1, 9, 8, 7, 6, 5, 4])
    assert one_shot(scores, Restriction.none(8, 2)) == (Segment(5, 7),)
    assert one_shot(scores, Restriction.none(8, 6)) == (Segment(0, 1), Segment(2, 7))


def test_reverse_order_keeps_the_last_layer_and_random_is_uniform():
    runner, tokens, limits = DecoderRunner(tiny.llama()), tiny.some_tokens(), Restriction.none(8, 3)
    assert baselines.reverse_order(runner, tokens, 3, restriction=limits) == (Segment(4, 7),)
    assert baselines.reverse_order(runner, tokens, 7, restriction=Restriction.none(8, 7)) == (Segment(0, 7),)
    drawn = [baselines.random_segment(runner, tokens, 3, seed=s, restriction=limits)[0].start for s in range(600)]
    assert min(drawn.count(start) for start in range(6)) > 60


def test_sleb_is_greedy_and_costs_what_its_rounds_cost():
    model, tokens, cost = tiny.llama(6), tiny.some_tokens(), Cost()
    removed, forwards = [], 0
    for _ in range(3):
        sets = {i: joined_segments([*removed, i]) for i in set(range(6)) - set(removed)}
        forwards += set_work(sets.values(), 6, len(tokens))
        removed.append(min(sets, key=lambda i, sets=sets: loss_without(model, tokens, sets[i])))
    found = sleb(DecoderRunner(model), tokens, 3, cost=cost, restriction=Restriction.none(6, 3))
    assert found == joined_segments(removed)
    assert cost.layer_forwards == forwards == sleb_work(3, 6, len(tokens))


def test_evolution_finds_nearly_the_best_of_all_sets():
    stack, tokens = DecoderRunner(tiny.llama()), tiny.some_tokens(8)
    found, again, other = (search(stack, tokens, n_layers=2, method="evolution", seed=seed) for seed in (0, 0, 1))
    exact = set_costs(stack, tokens, [joined_segments(pair) for pair in combinations(range(8), 2)], Cost())
    assert tuple(found.segments) in [candidate.segments for candidate in exact[:4]]
    assert again == found
    assert other.cost != found.cost


def test_evolution_finds_planted_layers_for_the_work_of_sleb():
    model, tokens, planted = tiny.llama(16), tiny.some_tokens(16), [3, 6, 7, 12]
    for i in planted:
        tiny.make_identity_(model, range(i, i + 1))
    found = search(model, tokens, n_layers=4, method="evolution", seed=0)
    assert tuple(found.segments) == joined_segments(planted)
    assert 0.8 * sleb_work(4, 16, 16) < found.cost.layer_forwards <= sleb_work(4, 16, 16)


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
def test_a_pick_is_cut_for_real_and_that_is_not_charged(method):
    model, tokens = tiny.llama(), tiny.some_tokens()
    found = search(DecoderRunner(model), tokens, n_layers=3, method=method, seed=3)
    assert (found.method, sum(map(len, found.segments))) == (method, 3)
    expected = kl_divergence(logits(model, tokens), logits(without(model, found.segments), tokens)).mean()
    assert found.candidates[0].kl == pytest.approx(expected.item(), rel=1e-4)
    assert (found.cost == Cost()) == (method in ("random", "reverse-order"))
    assert (found.cost.layer_backwards > 0) == (method == "taylor")
