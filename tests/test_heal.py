"""Healing: the fold is least squares, tuning changes the endpoints alone and never makes anything worse."""

import pytest
import torch
from transformers import Gemma2Config

import tiny
from layercut import models
from layercut.cut import cut_segment_
from layercut.heal.endpoints import TuneSettings, endpoints, tune_, warmup_then_cosine
from layercut.heal.fold import RIDGES, Normal, fold_, output_projection
from layercut.heal.objectives import Pair
from layercut.segments import Segment
from layercut.sweep import Stack, mean_kl


def cut_copy(model, *segments):
    student = models.share(model)
    cut_segment_(student, list(segments))
    return student


def weights_of(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


# --- fold ---


def test_streamed_normal_equations_are_float64_least_squares():
    generator = torch.Generator().manual_seed(0)
    m, y = torch.randn(2, 200, 12, generator=generator).unbind(0)
    sums = Normal.zeros(12, torch.device("cpu"))
    for part in range(0, 200, 50):
        sums.add_(m[part : part + 50], y[part : part + 50])
    solution = torch.linalg.lstsq(m.double(), y.double()).solution
    torch.testing.assert_close(sums.solve(0.0), solution)
    left = (m.double() @ solution - y.double()).square().sum() / y.double().square().sum()
    assert sums.error(solution) == pytest.approx(left.item())
    assert sums.error(torch.zeros(12, 12, dtype=torch.float64)) == pytest.approx(1.0)
    # a larger ridge pulls the solution towards doing nothing
    assert sums.solve(10.0).norm() < sums.solve(0.1).norm() < sums.solve(0.0).norm()


@pytest.mark.parametrize(("make", "module"), [(tiny.llama, "mlp.down_proj"), (tiny.gpt2, "mlp.c_proj")])
def test_fold_is_the_best_linear_map_of_the_mlp_output(make, module):
    model = make()
    student = cut_copy(model, Segment(2, 4))
    dense, cut = Stack(model), Stack(student)
    tokens = tiny.some_tokens(64, 16)
    before = mean_kl(dense, cut, tokens)
    untouched = weights_of(model)
    (outcome,) = fold_(dense, cut, [Segment(2, 4)], tokens, rows=16)
    assert outcome.module == module
    assert outcome.layer == 1
    assert outcome.ridge in RIDGES
    assert outcome.error_after < 1
    assert mean_kl(dense, cut, tokens) < before

    # against a direct float64 solution with the same ridge and the same rows
    hidden, calls = dense.enter(tokens)
    target = dense.run(hidden, calls, 0, 4)
    plain = Stack(cut_copy(model, Segment(2, 4)))
    caught = []
    handle = plain.layers[1].get_submodule(module).register_forward_hook(lambda _m, _x, out: caught.append(out))
    hidden, calls = plain.enter(tokens)
    out = plain.run(hidden, calls, 0, 2)
    handle.remove()
    fit = torch.arange(64) % 8 != 7
    m, y = caught[-1][fit].flatten(0, 1).double(), (target - out)[fit].flatten(0, 1).double()
    scale = outcome.ridge * (m.T @ m).diagonal().mean()
    delta = torch.linalg.solve(m.T @ m + scale * torch.eye(32, dtype=torch.float64), m.T @ y)
    expected = out.double() + caught[-1].double() @ delta
    hidden, calls = cut.enter(tokens)
    torch.testing.assert_close(cut.run(hidden, calls, 0, 2).double(), expected, rtol=1e-3, atol=1e-4)

    changed = {name for name, p in student.named_parameters() if not any(p is q for q in model.parameters())}
    assert changed
    assert all(module in name for name in changed)
    assert all(torch.equal(p, untouched[name]) for name, p in model.named_parameters())


def test_fold_of_two_segments_and_of_the_stacks_ends():
    model, tokens = tiny.llama(), tiny.some_tokens(16)
    segments = [Segment(0, 1), Segment(3, 4), Segment(7, 8)]
    dense, cut = Stack(model), Stack(cut_copy(model, *segments))
    outcomes = fold_(dense, cut, segments, tokens)
    assert [o.skipped for o in outcomes] == ["no layer before the cut", None, "no layer after the cut"]
    assert outcomes[1].layer == 1


def test_fold_refuses_an_output_behind_a_norm():
    model = tiny.tiny(
        Gemma2Config(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_hidden_layers=6,
        )
    )
    stack = Stack(model)
    hidden, calls = stack.enter(tiny.some_tokens(1))
    assert output_projection(stack, 0, hidden, calls) is None
    (outcome,) = fold_(stack, Stack(cut_copy(model, Segment(2, 4))), [Segment(2, 4)], tiny.some_tokens())
    assert "no plain linear output" in outcome.skipped


# --- endpoint tuning ---


def test_endpoints_are_the_layers_beside_each_cut():
    assert endpoints([Segment(3, 5)], 8) == [2, 3]
    assert endpoints([Segment(0, 2)], 8) == [0]
    assert endpoints([Segment(6, 8)], 8) == [5]
    assert endpoints([Segment(3, 5)], 8, radius=2) == [1, 2, 3, 4]
    assert endpoints([Segment(1, 2), Segment(5, 6)], 8) == [0, 1, 3, 4]


@pytest.mark.parametrize("objective", ["kl", "next-token", "hidden"])
def test_only_the_endpoints_change_and_the_held_out_loss_falls(objective):
    model = tiny.llama()
    student = cut_copy(model, Segment(3, 5))
    dense, cut = Stack(model), Stack(student)
    before, dense_before = weights_of(student), weights_of(model)
    settings = TuneSettings(objective=objective, learning_rate=3e-3, batch_tokens=64)
    # text that the model itself finds likely, so that every objective has something to learn
    tokens = model.generate(tiny.some_tokens(64, 2, seed=1), max_new_tokens=14, do_sample=False, pad_token_id=0)
    report = tune_(dense, cut, [Segment(3, 5)], tokens[:48], tokens[48:], settings)
    assert report.trained_layers == [2, 3]
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in changed)
    assert all(torch.equal(p, dense_before[name]) for name, p in model.named_parameters())
    losses = [point["loss"] for point in report.heldout]
    assert min(losses) < losses[0]
    assert report.heldout[0]["step"] == 0
    assert len(report.curve) == report.steps == 12
    # training state exists for the endpoints alone: masters, gradients and two moments in float32
    trained = sum(p.numel() for position in (2, 3) for p in student.model.layers[position].parameters())
    assert report.trained_parameters == trained
    assert report.state_bytes == 4 * 4 * trained
    assert not any(p.requires_grad for p in student.parameters())


def test_a_ruinous_rate_leaves_the_start_as_it_was():
    model = tiny.llama()
    student = cut_copy(model, Segment(3, 5))
    dense, cut = Stack(model), Stack(student)
    before = weights_of(student)
    heldout = tiny.some_tokens(8, seed=3)
    start = mean_kl(dense, cut, heldout)
    report = tune_(
        dense, cut, [Segment(3, 5)], tiny.some_tokens(16), heldout, TuneSettings(learning_rate=0.9, batch_tokens=32)
    )
    assert report.best_step == 0
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert mean_kl(dense, cut, heldout) == pytest.approx(start)


def test_same_tokens_same_bits():
    model, results = tiny.llama(), []
    for _ in range(2):
        student = cut_copy(model, Segment(3, 5))
        tune_(Stack(model), Stack(student), [Segment(3, 5)], tiny.some_tokens(16), tiny.some_tokens(4), TuneSettings())
        results.append(weights_of(student))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_kl_step_gradient_is_the_full_models():
    """The chunked, prefix-sharing step gives the gradient that plain autograd through both models gives."""
    model, tokens = tiny.llama(), tiny.some_tokens(4)
    student = cut_copy(model, Segment(3, 5))
    reference = cut_copy(model, Segment(3, 5))
    from layercut.heal import endpoints as room
    from layercut.losses import kl_divergence

    trained = room.own_parameters_(Stack(student), [2, 3])
    pair = Pair(dense=Stack(model), student=Stack(student), prefix=2, last=3)
    pair.backward(tokens, torch.arange(4))
    wanted = room.own_parameters_(Stack(reference), [2, 3])
    p = model(input_ids=tokens, use_cache=False).logits
    kl_divergence(p, reference(input_ids=tokens, use_cache=False).logits).mean().backward()
    for ours, theirs in zip(trained, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_schedule_rises_then_falls():
    rates = [warmup_then_cosine(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 4
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
