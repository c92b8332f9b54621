"""fold_ and tune_ on a caller's model in memory, and objectives of the caller's own."""

from __future__ import annotations

import json
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from layercut.cli.command_line import main
from layercut.data.blocks import stored_blocks
from layercut.errors import ConfigError, ModelError
from layercut.healing import FoldResult, TuningResult, endpoint_tuning, fold_, tune_
from layercut.healing.inputs import removed_segments, with_held_out
from layercut.models import model_weights
from layercut.models.objectives import KL, Objective, objective_of
from layercut.models.passes import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.registries import objectives
from layercut.segments import Segment
from layercut.surgery import cut, cut_segment_

HELDOUT = tiny.some_tokens(6, seed=3)
FROZEN = "model.layers.1.mlp.down_proj.weight"


def cut_copy(model, *segments):
    student = model_weights.share(model)
    cut_segment_(student, list(segments))
    return student


def users_model():
    """As a user may hold it: weights require gradients, some modules train, the forward has a hook."""
    model = tiny.llama().requires_grad_(True)
    model.model.layers[6].mlp.train()
    model.get_parameter(FROZEN).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    return model


def state_of(model):
    """All of a model that a caller could notice a change of."""
    weights = {name: (id(p), p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()}
    modules = [(type(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    return weights, modules, model.config.to_dict()


# --- the fold ---


def test_a_fold_is_kept_where_held_out_kl_falls_and_leaves_the_dense_model():
    model = users_model()
    student = cut_copy(model, Segment(3, 5))
    before, dense_kl = state_of(model), mean_kl(DecoderRunner(model), DecoderRunner(student), HELDOUT)
    found = fold_(student, model, tiny.some_tokens(64), heldout=HELDOUT)
    assert isinstance(found, FoldResult)
    assert found.kept
    assert found.kl_before == pytest.approx(dense_kl)
    assert found.kl_after == pytest.approx(mean_kl(DecoderRunner(model), DecoderRunner(student), HELDOUT))
    assert found.kl_after < found.kl_before
    assert [(cut.segment, cut.layer, cut.skipped) for cut in found.cuts] == [([3, 5], 2, None)]
    assert state_of(model) == before
    assert json.dumps(found.to_dict())
    assert "self_attn.o_proj, mlp.down_proj of layer 2" in found._repr_html_()
    # a new weight is trainable where the one before it was
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == [FROZEN]
    assert student.model.layers[4].mlp.training  # layer 6 of the dense model


def test_a_fold_that_does_not_help_is_undone_to_the_bit(monkeypatch):
    model = users_model()
    student = cut_copy(model, Segment(1, 2), Segment(5, 6))
    before, values = state_of(student), [p.clone() for p in student.parameters()]
    kls = iter([1.0, 1.0])
    monkeypatch.setattr("layercut.healing.least_squares.mean_kl", lambda *_: next(kls))
    found = fold_(student, model, tiny.some_tokens(32))
    assert not found.kept
    assert [cut.layer for cut in found.cuts] == [0, 3], "both were folded before that was undone"
    assert state_of(student) == before, "the very same parameters"
    assert all(map(torch.equal, student.parameters(), values))


def test_the_cuts_are_read_off_the_two_models_configs():
    model = tiny.llama()
    segments = (Segment(1, 2), Segment(4, 6))
    assert removed_segments(DecoderRunner(cut_copy(model, *segments)), DecoderRunner(model)) == segments
    # of a dense model that was cut before, in its own layers: it has 0 1 4 5 6 7, the student 0 4 7
    dense = cut_copy(model, Segment(2, 4))
    student = cut_copy(dense, Segment(1, 2), Segment(3, 5))
    assert removed_segments(DecoderRunner(student), DecoderRunner(dense)) == (Segment(1, 2), Segment(3, 5))
    found = fold_(student, dense, tiny.some_tokens(64), heldout=HELDOUT)
    assert [cut.layer for cut in found.cuts] == [0, 1]
    assert tune_(student, dense, tiny.some_tokens(4), heldout=HELDOUT).trained_layers == [0, 1, 2]


def test_what_cannot_be_healed_is_refused():
    model, tokens = tiny.llama(), tiny.some_tokens(8)
    student = cut_copy(model, Segment(3, 5))
    for heal in (fold_, tune_):
        with pytest.raises(ConfigError, match="has all 8 layers"):
            heal(model_weights.share(model), model, tokens)
        with pytest.raises(ConfigError, match=r"\[8\].*token ids \[N, T\]"):
            heal(student, model, tokens[:, 0])
        with pytest.raises(ConfigError, match="float32"):
            heal(student, model, tokens, heldout=tokens.float())
        with pytest.raises(ConfigError, match="one row"):
            heal(student, model, tokens[:1])
        with pytest.raises(ConfigError, match="tokens is a list"):
            heal(student, model, tokens.tolist())
        with pytest.raises(ConfigError, match=r"torch\.bool"):
            heal(student, model, tokens > 3)
        for wrong in (tokens + tiny.VOCABULARY, tokens - tiny.VOCABULARY):
            with pytest.raises(ModelError, match="vocabulary"):
                heal(student, model, wrong)
    with pytest.raises(ConfigError, match="row_lengths are a list"):
        tune_(student, model, tokens, row_lengths=[16] * 8)
    with pytest.raises(ConfigError, match="token_weights are a list"):
        tune_(student, model, tokens, token_weights=[[1.0]])
    del student.config.original_layer_index
    with pytest.raises(ConfigError, match="cannot be seen"):
        fold_(student, model, tokens)
    with pytest.raises(ConfigError, match="radius is 0"):
        tune_(student, model, tokens, radius=0)
    with pytest.raises(ConfigError, match="learning_rate is 7"):
        tune_(student, model, tokens, learning_rate=7.0)


def test_the_rate_is_a_share_of_the_weights_that_are_trained():
    """By the width instead, a model of small weights is torn apart (measured)."""
    rates = []
    for scale in (1.0, 0.1):
        model = tiny.llama()
        for parameter in (p for p in model.model.layers.parameters() if p.dim() > 1):
            parameter.data *= scale
        student = cut(model, [Segment(2, 4)])
        rates.append(tune_(student, model, tiny.some_tokens(8), heldout=HELDOUT).learning_rate)
        tuned = [p for i in (1, 2) for p in student.model.layers[i].parameters() if p.dim() > 1]
    assert rates[1] == pytest.approx(rates[0] / 10)
    mean = torch.cat([p.detach().flatten() for p in tuned]).square().mean().sqrt().item()
    assert rates[1] == pytest.approx(mean / 120 / 2, rel=0.1), (
        "half of it in few steps; the mean before was a little less"
    )


def test_the_rate_is_that_of_usual_weights_and_not_of_what_the_fold_made_large():
    """The fold writes what removed layers wrote, with entries hundreds of times the others; these ruined the rest."""
    model = tiny.llama()
    rates = []
    for largest in (1.0, 300.0):
        student = cut(model, [Segment(2, 4)])
        folded = student.model.layers[1].mlp.down_proj
        folded.weight = torch.nn.Parameter(folded.weight.detach().clone())
        folded.weight.data[0, :4] *= largest
        rates.append(tune_(student, model, tiny.some_tokens(8), heldout=HELDOUT).learning_rate)
    assert rates[1] == pytest.approx(rates[0], rel=0.05)


def test_an_eighth_of_the_rows_is_held_out_where_none_are_given():
    tokens = tiny.some_tokens(17)
    ours, held = with_held_out(tokens, None, tiny.llama())
    assert torch.equal(torch.cat([ours, held]), tokens)
    assert len(held) == 2
    model = tiny.llama()
    left, right = cut_copy(model, Segment(3, 5)), cut_copy(model, Segment(3, 5))
    assert fold_(left, model, tokens).to_dict() == fold_(right, model, ours, heldout=held).to_dict()
    assert tune_(left, model, tokens).heldout == tune_(right, model, ours, heldout=held).heldout


# --- tuning ---


def test_tuning_leaves_the_process_and_the_dense_model_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = users_model()
    student = cut_copy(model, Segment(3, 5))
    before, threads = state_of(model), threading.active_count()

    def refused(*_):
        raise AssertionError("a library call changes the process")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(signal, "signal", refused)
        patch.setattr("layercut.models.memory.reuse_freed", refused)
        found = tune_(student, model, tiny.some_tokens(16), heldout=HELDOUT, learning_rate=3e-3, batch_tokens=64)
    assert isinstance(found, TuningResult)
    assert found.best < found.heldout[0]["loss"]
    assert state_of(model) == before
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []
    assert all(p.grad is None for p in student.parameters())
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == [FROZEN]
    with pytest.raises(AttributeError):
        found.tokens = 3
    keys = {
        "objective", "tokens", "steps", "learning_rate", "trained_layers", "trained_parameters", "state_bytes", "curve",
        "heldout", "best_step", "setbacks", "tokens_per_second", "seconds", "cpu_seconds",
    }  # fmt: skip
    assert keys < json.loads(json.dumps(found.to_dict())).keys()
    assert found.plot().get_ylabel() == "KL to the dense model, nats"
    assert "<th>trained layers</th><td>2, 3</td>" in found._repr_html_()


def test_a_failure_leaves_the_student_as_it_was(monkeypatch):
    model = users_model()
    student = cut_copy(model, Segment(3, 5))
    flags = [(name, p.requires_grad, p.clone()) for name, p in student.named_parameters()]
    modes = [module.training for module in student.modules()]
    monkeypatch.setattr(endpoint_tuning, "warmup_then_cosine", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune_(student, model, tiny.some_tokens(8), heldout=HELDOUT)
    for (name, flag, value), (ours, p) in zip(flags, student.named_parameters(), strict=True):
        assert (name, flag, None) == (ours, p.requires_grad, p.grad)
        assert torch.equal(p, value)
    assert [module.training for module in student.modules()] == modes


# --- objectives ---


class AutogradKL(Objective):
    """KL(p || q) as a user would write it."""

    label = "divergence of my own"

    def loss(self, student, dense, targets):
        p, q = dense.log_softmax(-1), student.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_losses_are_those_of_the_formulas(mix):
    draw = torch.Generator().manual_seed(0)
    z, p = (torch.randn(7, 20, generator=draw) for _ in range(2))
    targets = torch.tensor([3, 0, -1, 19, 3, 5, -1])

    def direct(leaf):
        kl = (F.softmax(p, -1) * (F.log_softmax(p, -1) - F.log_softmax(leaf, -1))).sum(-1)
        following = -F.log_softmax(leaf, -1)[torch.arange(7), targets] * (targets >= 0)
        return (1 - mix) * kl + mix * following

    objective, found = KL(mix=mix), []
    for loss_of in (direct, lambda leaf: objective.loss(leaf, p, targets)):
        leaf = z.clone().requires_grad_(True)
        loss = loss_of(leaf)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.against(p[None], targets[None])(z[None])[0], found[0][0])
    assert objective.needs_dense == (mix < 1)


def test_an_objective_of_the_callers_own_tunes_as_the_built_in_one_does(monkeypatch):
    """The same loss by autograd, given as an instance and by name."""
    monkeypatch.setitem(objectives.registered, "mypackage-kl", AutogradKL)
    model, reports = tiny.llama(), []
    for objective in ("kl", AutogradKL(), "mypackage-kl"):
        student = cut_copy(model, Segment(3, 5))
        reports.append(
            tune_(student, model, tiny.some_tokens(8), heldout=HELDOUT, objective=objective, learning_rate=1e-3)
        )
    built_in, *ours = ([point["loss"] for point in report.heldout] for report in reports)
    for losses in ours:
        assert losses == pytest.approx(built_in, rel=1e-4)
    assert [report.objective for report in reports] == ["kl", "AutogradKL", "mypackage-kl"]
    assert [report.label for report in reports] == ["KL to the dense model", *2 * ["divergence of my own"]]


def test_what_is_no_objective_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'kk' is unknown"):
        objective_of("kk")
    with pytest.raises(ConfigError, match=r"mix 0.2.*takes no mix"):
        objective_of("next-token", mix=0.2)
    monkeypatch.setitem(objectives.registered, "mypackage-x", dict)
    with pytest.raises(ConfigError, match="is a dict"):
        objective_of("mypackage-x")
    with pytest.raises(ConfigError):
        KL(mix=1.5)


# --- the command is a client of the same functions ---


@pytest.mark.parametrize("objective", ["kl", "mypackage-kl"])
def test_the_command_heals_to_the_same_bits(objective, tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(objectives.registered, "mypackage-kl", AutogradKL)
    monkeypatch.setattr("layercut.export.checkpoint.verify_reload", lambda *_: {})
    run = tmp_path / "run"
    argv = ["tune", str(tiny_model), "--segment=1:3", f"--data={texts[0]}", "--tokens=512", "--window=16"]
    argv += ["--tune-tokens=256", "--batch-tokens=64", f"--objective={objective}", f"--out={run}"]
    assert main(argv) == 0
    told = {stage: json.loads((run / f"{stage}.json").read_text()) for stage in ("fold", "heal")}
    blocks = {use: stored_blocks(run, use) for use in ("calibration", "heldout", "tuning")}

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    small = cut_copy(model, Segment(1, 3))
    both = torch.cat([blocks["calibration"], blocks["tuning"]])
    folded = fold_(small, model, both, heldout=blocks["heldout"])
    minimised = KL(mix=0.3) if objective == "kl" else objective
    tuned = tune_(small, model, blocks["tuning"], heldout=blocks["heldout"], objective=minimised, batch_tokens=64)
    assert told["fold"]["fold"][0]["kl_after"] == folded.kl_after
    assert told["heal"]["tuning"]["heldout"] == tuned.heldout
    assert (told["heal"]["tuning"]["objective"], told["heal"]["tuning"]["label"]) == (objective, tuned.label)
    stored = load_file(run / "tuned.safetensors")
    weights = dict(small.named_parameters())
    assert stored
    assert all(torch.equal(weights[name], value) for name, value in stored.items())
    assert F.softmax(small(input_ids=HELDOUT).logits, -1).isfinite().all()
