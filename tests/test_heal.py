"""Endpoint tuning changes the endpoints alone and never makes anything worse."""

import pytest
import torch

import tiny
from layercut import models
from layercut.cut import cut_segment_
from layercut.heal.endpoints import TuneSettings, endpoints, tune_, warmup_then_cosine
from layercut.segments import Segment
from layercut.sweep import Stack, mean_kl


def cut_copy(model, *segments):
    student = models.share(model)
    cut_segment_(student, list(segments))
    return student


def weights_of(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


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
    room._kl_step(Stack(model), Stack(student), 2, 3, tokens)
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
