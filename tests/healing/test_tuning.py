"""Endpoint tuning changes the endpoints alone, is never worse than its start, and resumes to the same bits."""

import json
import signal
import threading
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import families
import tiny
from layercut.config import TuneSettings
from layercut.errors import ConfigError, ModelError
from layercut.evaluation import perplexity
from layercut.healing import endpoint_tuning, fold_, tune_
from layercut.healing.endpoint_tuning import TuningFiles, own_parameters_
from layercut.healing.inputs import Batch, Rows, removed_segments
from layercut.healing.recipe import endpoints, warmup_then_cosine
from layercut.healing.tuning_pass import HeldOut, Pair
from layercut.healing.tuning_state import StateFile
from layercut.models import decoder_stack, memory
from layercut.models.losses import KL, Objective, kl_divergence, mean_kl, next_token_loss, objective_of
from layercut.models.runner import DecoderRunner
from layercut.registries import objectives
from layercut.segments import Segment
from layercut.surgery import cut

CUT = [Segment(3, 5)]
HELDOUT = tiny.some_tokens(6, seed=3)
FROZEN = "model.layers.1.mlp.down_proj.weight"


@contextmanager
def advancing(call):
    """While open, the bar of tuning calls this with the tokens and the words of each step."""

    @contextmanager
    def bar(*_):
        yield call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint_tuning, "bar", bar)
        yield


def weights_of(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


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


# --- what is trained, and how fast ---


def test_endpoints_are_the_layers_beside_each_cut():
    assert endpoints([Segment(3, 5)], 8) == [2, 3]
    assert endpoints([Segment(0, 2)], 8) == [0]
    assert endpoints([Segment(6, 8)], 8) == [5]
    assert endpoints([Segment(3, 5)], 8, radius=2) == [1, 2, 3, 4]
    assert endpoints([Segment(1, 2), Segment(5, 6)], 8) == [0, 1, 3, 4]


def test_the_cuts_are_read_off_the_two_models_configs():
    model = tiny.llama()
    segments = (Segment(1, 2), Segment(4, 6))
    assert removed_segments(DecoderRunner(cut(model, segments)), DecoderRunner(model)) == segments
    # of a dense model that was cut before, in its own layers: it has 0 1 4 5 6 7, the student 0 4 7
    dense = cut(model, [Segment(2, 4)])
    student = cut(dense, [Segment(1, 2), Segment(3, 5)])
    assert removed_segments(DecoderRunner(student), DecoderRunner(dense)) == (Segment(1, 2), Segment(3, 5))
    found = fold_(student, dense, tiny.some_tokens(64), heldout=HELDOUT)
    assert [one.layer for one in found.cuts] == [0, 1]
    assert tune_(student, dense, tiny.some_tokens(4), heldout=HELDOUT).trained_layers == [0, 1, 2]


def test_the_rate_is_a_share_of_the_usual_weights_and_not_of_those_that_the_fold_made_large():
    rates = {}
    for scale, largest in ((1.0, 1.0), (0.1, 1.0), (1.0, 300.0)):
        model = tiny.llama()
        for parameter in (p for p in model.model.layers.parameters() if p.dim() > 1):
            parameter.data *= scale
        student = cut(model, [Segment(2, 4)])
        folded = student.model.layers[1].mlp.down_proj
        folded.weight = torch.nn.Parameter(folded.weight.detach().clone())
        folded.weight.data[0, :4] *= largest
        mean = torch.cat([p.flatten() for i in (1, 2) for p in student.model.layers[i].parameters() if p.dim() > 1])
        rates[scale, largest] = tune_(student, model, tiny.some_tokens(8), heldout=HELDOUT).learning_rate
        if largest == 1:  # half of a 120th in few steps
            assert rates[scale, 1.0] == pytest.approx(mean.square().mean().sqrt().item() / 120 / 2, rel=0.1)
    assert rates[0.1, 1.0] == pytest.approx(rates[1.0, 1.0] / 10)
    assert rates[1.0, 300.0] == pytest.approx(rates[1.0, 1.0], rel=0.05)


def test_the_schedule_rises_then_falls():
    rates = [warmup_then_cosine(step, 100) for step in range(100)]
    assert (rates[0], max(rates), rates.index(1.0)) == (pytest.approx(0.2), 1.0, 4)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


def test_what_cannot_be_healed_is_refused():
    model, tokens = tiny.llama(), tiny.some_tokens(8)
    student = cut(model, CUT)
    refused = [
        ((tokens[:, 0],), {}, ConfigError), ((tokens,), {"heldout": tokens.float()}, ConfigError),
        ((tokens[:1],), {}, ConfigError), ((tokens.tolist(),), {}, ConfigError), ((tokens > 3,), {}, ConfigError),
        ((tokens + tiny.VOCABULARY,), {}, ModelError), ((tokens - tiny.VOCABULARY,), {}, ModelError),
    ]  # fmt: skip
    for heal in (fold_, tune_):
        with pytest.raises(ConfigError, match="has all 8 layers"):
            heal(decoder_stack.share(model), model, tokens)
        for rows, more, error in refused:
            with pytest.raises(error):
                heal(student, model, *rows, **more)
    some, lengths = torch.rand(tokens.shape), torch.full((8,), 16)
    for wrong in (
        {"row_lengths": [16] * 8}, {"row_lengths": lengths[:2]}, {"row_lengths": lengths - 11},
        {"row_lengths": lengths // 16}, {"token_weights": [[1.0]]}, {"token_weights": some[:2]},
        {"token_weights": -some}, {"token_weights": some / 0}, {"answers": some}, {"radius": 0}, {"learning_rate": 7.0},
        {"batch_tokens": 0}, {"objective": "kk"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            tune_(student, model, tokens, **wrong)
    del student.config.original_layer_index
    with pytest.raises(ConfigError, match="cannot be seen"):
        fold_(student, model, tokens)


# --- rows: their lengths, weights and answers ---


def tuned(model, rows, heldout=None, **settings):
    student = cut(model, CUT)
    return tune_(student, model, rows, heldout=rows if heldout is None else heldout, **settings), weights_of(student)


@pytest.mark.parametrize("objective", ["kl", "next-token"])
def test_a_row_of_a_shorter_length_is_done_as_several(objective):
    model, tokens, heldout = tiny.llama(), tiny.some_tokens(8, 16), tiny.some_tokens(2, 16, seed=1)
    settings = {"objective": objective, "learning_rate": 3e-3, "batch_tokens": 16, "heldout": heldout}
    lengths = torch.full((8,), 4)
    whole, parted = (tuned(model, tokens, **settings, **more) for more in ({}, {"row_lengths": lengths}))
    alone, weights = tuned(model, tokens.view(-1, 4), **settings)
    assert [point["loss"] for point in parted[0].curve] == pytest.approx([point["loss"] for point in alone.curve])
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in parted[1].items())
    assert parted[0].curve[0]["loss"] != pytest.approx(whole[0].curve[0]["loss"], rel=1e-3)
    assert tune_(cut(model, CUT), model, tokens, row_lengths=lengths).tokens == 7 * 16, "an eighth is held out"


def test_rows_of_two_lengths_in_a_step_count_by_their_tokens():
    model, tokens, first = tiny.llama(), tiny.some_tokens(2, 16), {}
    for name, rows, lengths in (("both", tokens, [16, 4]), ("whole", tokens[:1], [16]), ("parted", tokens[1:], [4])):
        report, _ = tuned(model, rows, HELDOUT, batch_tokens=32, row_lengths=torch.tensor(lengths))
        first[name] = report.curve[0]["loss"]
    assert first["both"] == pytest.approx((first["whole"] + first["parted"]) / 2, rel=1e-5)


@pytest.mark.parametrize("objective", ["kl", "next-token"])
def test_tokens_count_by_their_weights(objective):
    model, tokens, settings = tiny.llama(), tiny.some_tokens(4, 16), {"objective": objective, "learning_rate": 1e-3}
    # rows of weight 0 are as if they were not there: half the loss, and AdamW does not see its scale
    none = torch.ones(tokens.shape)
    none[1::2] = 0
    half = tuned(model, tokens, batch_tokens=32, token_weights=none, **settings)
    alone = tuned(model, tokens[::2], tokens, batch_tokens=16, **settings)
    losses = [[point["loss"] for point in told.curve] for told, _ in (half, alone)]
    assert losses[0] == pytest.approx([loss / 2 for loss in losses[1]], rel=1e-3)
    start = weights_of(cut(model, CUT))
    pairs = ((alone[1], start), (half[1], alone[1]))
    moved, apart = (sum((a[name] - b[name]).square().sum() for name in start) for a, b in pairs)
    assert 0 <= apart < 0.02 * moved
    # each token by its own, in rows that are parted too
    some = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))

    def first(rows, **more):
        return tuned(model, rows, tokens, batch_tokens=64, **settings, **more)[0].curve[0]["loss"]

    ones = [first(tokens, token_weights=mask) for mask in (some, 1 - some)]
    assert sum(ones) == pytest.approx(first(tokens), rel=1e-4)
    assert ones[0] != pytest.approx(ones[1], rel=1e-3)
    parted = first(tokens, token_weights=some, row_lengths=torch.full((4,), 4))
    assert parted == pytest.approx(first(tokens.view(-1, 4), token_weights=some.view(-1, 4)), rel=1e-5)


# --- losses and gradients ---


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


@pytest.mark.parametrize(("objective", "mix"), [("kl", 0.0), ("kl", 0.3), ("next-token", 0.0)])
@pytest.mark.parametrize("piece", [4 * tiny.VOCABULARY * 5, 2**25])
@pytest.mark.parametrize("is_taught", [False, True])
def test_a_pass_has_the_gradient_of_both_full_models(objective, mix, piece, is_taught, monkeypatch):
    """Chunks of 5 tokens, or all at once; taught: at answers the next-token loss has the shares of all terms."""
    model, tokens, rows = tiny.llama(), tiny.some_tokens(4), torch.arange(4)
    monkeypatch.setattr(memory, "PIECE_BYTES", piece)
    student, reference = (cut(model, CUT) for _ in range(2))
    made = KL(mix=mix) if objective == "kl" else objective_of(objective)
    mix = 1.0 if objective == "next-token" else mix
    pair = Pair(dense=DecoderRunner(model), student=DecoderRunner(student), prefix=2, objective=made)
    trained = own_parameters_(pair.student, [2, 3])
    answers = None
    if is_taught:
        answers = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5)) < 0.4
        answers[:, -1] = False
    (loss,) = pair.backward([Batch(tokens, rows, torch.zeros_like(rows), answers=answers)])

    wanted = own_parameters_(DecoderRunner(reference), [2, 3])
    p, q = (m(input_ids=tokens, use_cache=False).logits for m in (model, reference))
    kl = (F.softmax(p, -1) * (F.log_softmax(p, -1) - F.log_softmax(q, -1))).sum(-1)
    following = F.pad(F.cross_entropy(q[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"), (0, 1))
    of_next = mix * tokens.shape[1] / (tokens.shape[1] - 1)
    expected = (1 - mix) * kl + of_next * following
    if answers is not None:
        expected = torch.where(answers, (1 - mix + of_next) * following, expected)
    expected.mean().backward()
    assert loss.sum().item() == pytest.approx(expected.mean().item(), rel=1e-5)
    for ours, theirs in zip(trained, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_a_step_of_several_passes_is_that_of_one(monkeypatch):
    model, results = tiny.llama(), []
    for tokens_in_pass in (16, 32, 1024):
        monkeypatch.setattr(memory, "PASS_TOKENS", tokens_in_pass)
        report, _ = tuned(model, tiny.some_tokens(6), HELDOUT, batch_tokens=80, learning_rate=1e-3)
        assert report.steps == 2  # of 5 rows and of 1
        results.append([report.curve[0]["loss"], report.curve[1]["loss"], report.heldout[-1]["loss"]])
    assert results[0] == pytest.approx(results[2], rel=1e-5)
    assert results[1] == pytest.approx(results[2], rel=1e-5)


@pytest.mark.parametrize(("objective", "mix"), [("kl", 0.0), ("kl", 0.25), ("kl", 1.0), ("next-token", 0.0)])
def test_a_student_is_judged_by_what_it_is_tuned_for(objective, mix):
    model = tiny.llama()
    dense, student = DecoderRunner(model), DecoderRunner(cut(model, CUT))
    own_parameters_(student, [2, 3])
    made = KL(mix=mix) if objective == "kl" else objective_of(objective)
    pair, share = Pair(dense=dense, student=student, prefix=2, objective=made), mix if objective == "kl" else 1.0
    terms = {"kl": mean_kl(dense, student, HELDOUT), "next-token": perplexity(student.model, HELDOUT)}
    terms["next-token"] = torch.tensor(terms["next-token"]).log().item()
    expected = {"loss": (1 - share) * terms["kl"] + share * terms["next-token"]} | (terms if 0 < mix < 1 else {})
    assert HeldOut(pair, Rows(tokens=HELDOUT), rows=4).score() == pytest.approx(expected, rel=1e-5)


def test_a_student_is_judged_by_the_tokens_that_count():
    model = tiny.llama()
    dense, student = DecoderRunner(model), DecoderRunner(cut(model, CUT))
    own_parameters_(student, [2, 3])
    weights = torch.zeros(HELDOUT.shape)
    weights[:, 5:8] = 2.0
    pair = Pair(dense=dense, student=student, prefix=2, objective=objective_of("next-token"))
    expected = next_token_loss(student.model(HELDOUT).logits, HELDOUT)[:, 5:8].mean().item()
    judge = HeldOut(pair, Rows(tokens=HELDOUT, token_weights=weights), rows=3)
    assert judge.score()["loss"] == pytest.approx(expected, rel=1e-5)


def test_tokens_that_do_not_count_are_left_out_of_loss_and_gradient(monkeypatch):
    model = tiny.llama()
    dense, student = DecoderRunner(model), DecoderRunner(cut(model, CUT))
    own = own_parameters_(student, [2, 3])
    rows = HELDOUT[:4]
    weights = torch.zeros(rows.shape)
    weights[:, 3:6] = torch.tensor([1.0, 2.0, 4.0])
    pair = Pair(dense=dense, student=student, prefix=2, objective=objective_of("kl"))
    settings = TuneSettings(batch_tokens=rows.numel())
    training = endpoint_tuning._Training(
        pair, [2, 3], Rows(tokens=rows, token_weights=weights), settings, [(p, 1.0) for p in own]
    )
    (batch,) = training._batches(torch.arange(4))
    through_head, exits = [], DecoderRunner.exit
    with monkeypatch.context() as patch, torch.enable_grad():
        patch.setattr(DecoderRunner, "exit", lambda *of: (through_head.append(of[2].numel()), exits(*of))[1])
        (loss,) = pair.backward([batch])
    assert {*through_head} == {12}, "3 of the tokens of each row have logits, of either model"
    found = [p.grad.clone() for p in own]
    for p in own:
        p.grad = None
    with torch.enable_grad():
        kl = kl_divergence(model(rows).logits.detach(), student.model(rows).logits)
        expected = (kl * weights).mean()
        expected.backward()
    assert loss.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, p in zip(found, own, strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-3, atol=1e-7)


def test_all_layers_of_a_model_that_lacks_none_can_be_trained():
    model = tiny.llama()
    student = cut(model, [])
    found = tune_(
        student, model, tiny.some_tokens(32), heldout=HELDOUT, train="all", objective="next-token", learning_rate=1e-3
    )
    assert found.trained_layers == [*range(len(DecoderRunner(model)))]
    assert min(point["loss"] for point in found.heldout) < found.heldout[0]["loss"]
    with pytest.raises(ConfigError, match="no cut to heal"):
        tune_(cut(model, []), model, HELDOUT, heldout=HELDOUT)
    with pytest.raises(ConfigError, match="all 0"):
        tune_(cut(model, CUT), model, HELDOUT, heldout=HELDOUT, heldout_weights=torch.zeros(HELDOUT.shape))


def test_an_objective_of_the_callers_own_tunes_as_the_built_in_one_does(monkeypatch):
    monkeypatch.setitem(objectives.registered, "mypackage-kl", AutogradKL)
    model, reports = tiny.llama(), []
    for objective in ("kl", AutogradKL(), "mypackage-kl"):
        reports.append(tuned(model, tiny.some_tokens(8), HELDOUT, objective=objective, learning_rate=1e-3)[0])
    built_in, *ours = ([point["loss"] for point in report.heldout] for report in reports)
    assert all(losses == pytest.approx(built_in, rel=1e-4) for losses in ours)
    assert [report.objective for report in reports] == ["kl", "AutogradKL", "mypackage-kl"]
    assert [report.label for report in reports] == ["KL to the dense model", *2 * ["divergence of my own"]]
    monkeypatch.setitem(objectives.registered, "mypackage-x", dict)
    with pytest.raises(ConfigError, match="is a dict"):
        objective_of("mypackage-x")
    with pytest.raises(ConfigError, match="cannot be made"):
        objective_of(type("Scaled", (KL,), {"__init__": lambda self, scale: None}))
    with pytest.raises(ConfigError):
        KL(mix=1.5)


# --- what tuning changes, and what it leaves ---


@pytest.mark.parametrize("objective", ["kl", "next-token"])
def test_only_the_endpoints_change_and_the_held_out_loss_falls(objective, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = users_model()
    student = cut(model, CUT)
    before, dense_before, threads = weights_of(student), state_of(model), threading.active_count()
    # text that the model itself finds likely, so that every objective has something to learn
    tokens = model.generate(tiny.some_tokens(64, 2, seed=1), max_new_tokens=14, do_sample=False, pad_token_id=0)
    dense_before = state_of(model)

    def refused(*_):
        raise AssertionError("a library call changes the process")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(signal, "signal", refused)
        patch.setattr("layercut.models.memory.reuse_freed", refused)
        settings = TuneSettings(objective=objective, learning_rate=3e-3)
        report = tune_(student, model, tokens[:48], heldout=tokens[48:], settings=settings, batch_tokens=64)
    assert report.trained_layers == [2, 3]
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in changed)
    assert state_of(model) == dense_before
    assert report.best < report.heldout[0]["loss"]
    assert report.heldout[0]["step"] == 0
    assert len(report.curve) == report.steps == 12
    # training state exists for the endpoints alone: masters, gradients and two moments in float32
    trained = sum(p.numel() for position in (2, 3) for p in student.model.layers[position].parameters())
    assert (report.trained_parameters, report.state_bytes) == (trained, 4 * 4 * trained)
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == [FROZEN]
    assert all(p.grad is None for p in student.parameters())
    assert (threading.active_count(), list(tmp_path.iterdir())) == (threads, [])
    with pytest.raises(AttributeError):
        report.tokens = 3
    assert json.loads(json.dumps(report.to_dict()))["heldout"] == report.heldout
    assert report.plot().get_ylabel() == f"{report.label}, nats"
    assert "<th>trained layers</th><td>2, 3</td>" in report._repr_html_()


def test_a_control_has_all_layers():
    model = users_model()
    tokens = tiny.some_tokens(64, 4, seed=1)
    with pytest.raises(ConfigError, match=r"beside is given, and the student has 6 of the dense model's 8"):
        tune_(cut(model, CUT), model, tokens, beside=CUT)


def test_a_failure_leaves_the_student_as_it_was(monkeypatch):
    model = users_model()
    student = cut(model, CUT)
    flags = [(name, p.requires_grad, p.clone()) for name, p in student.named_parameters()]
    modes = [module.training for module in student.modules()]
    monkeypatch.setattr(endpoint_tuning, "warmup_then_cosine", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune_(student, model, tiny.some_tokens(8), heldout=HELDOUT)
    for (name, flag, value), (ours, p) in zip(flags, student.named_parameters(), strict=True):
        assert (name, flag, None) == (ours, p.requires_grad, p.grad)
        assert torch.equal(p, value)
    assert [module.training for module in student.modules()] == modes


def test_what_a_class_keeps_in_float32_is_not_rounded_by_tuning():
    model, wide = tiny.llama().to(torch.bfloat16).float(), "model.layers.2.input_layernorm.weight"
    model.stored_dtype = torch.bfloat16
    before = model.get_parameter(wide).data.fill_(1 + 2**-20).clone()
    student = cut(model, CUT)
    tune_(student, model, tiny.some_tokens(32), heldout=HELDOUT, batch_tokens=64)
    assert [name for name, p in student.named_parameters() if not torch.equal(p, p.bfloat16().float())] == [wide]
    assert not torch.equal(student.get_parameter(wide), before), "it is tuned"


def test_what_layers_share_is_no_part_of_one_of_them():
    """Zamba 2 has one block of attention in several layers: trained in one, it would be put into all when saved."""
    student = DecoderRunner(decoder_stack.share(families.tiny("zamba2")))

    def shared():
        return {id(p) for p in student.layers[1].parameters()} & {id(p) for p in student.layers[5].parameters()}

    before = shared()
    assert before, "the hybrid layers"
    assert own_parameters_(student, [5]), "its own Mamba"
    assert shared() == before


# --- held-out loss, setbacks, resume ---


def test_an_eighth_of_the_rows_is_held_out_where_none_are_given():
    model, tokens = tiny.llama(), tiny.some_tokens(17)
    left, right = cut(model, CUT), cut(model, CUT)
    assert fold_(left, model, tokens).to_dict() == fold_(right, model, tokens[:15], heldout=tokens[15:]).to_dict()
    assert tune_(left, model, tokens).heldout == tune_(right, model, tokens[:15], heldout=tokens[15:]).heldout


def test_the_held_out_loss_is_taken_eight_times():
    model = tiny.llama()
    for steps, scored in ((3, [0, 1, 2, 3]), (19, [0, 3, 5, 8, 10, 12, 15, 17, 19])):
        report, _ = tuned(model, tiny.some_tokens(steps, 4), tiny.some_tokens(1, 4), batch_tokens=4)
        assert [point["step"] for point in report.heldout] == scored


@pytest.mark.parametrize("rate", [0.03, 0.9])
def test_a_rate_that_leads_astray_is_lowered(rate, tmp_path):
    """By a quarter, from the best state, as often as it takes; stopped after that and resumed to the same bits."""
    model, left = tiny.llama(), iter(range(10))

    class Stopped(Exception):
        pass

    def ten_steps(*_) -> None:
        if next(left, None) is None:
            raise Stopped

    def heal(**options):
        files = TuningFiles(**options)
        return tuned(model, tiny.some_tokens(64), HELDOUT, learning_rate=rate, batch_tokens=32, files=files)

    report, weights = heal()
    with pytest.raises(Stopped), advancing(ten_steps):
        heal(state=StateFile(tmp_path / "state", key="", minutes=0))
    resumed, again = heal(state=StateFile(tmp_path / "state", key="", minutes=60))
    losses = {point["step"]: point["loss"] for point in report.heldout}
    assert report.setbacks == [step for step in losses if losses[step] > losses[0]] != []
    assert report.setbacks[-1] > 10 or rate < 0.1, "some before the stop and, with the higher rate, one after it"
    assert report.best < losses[0]
    assert (resumed.setbacks, resumed.heldout) == (report.setbacks, report.heldout)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("start", "later", "setbacks"),
    [
        ({"loss": 1.0}, [1.009, 0.9, 1.009, 0.9], []), ({"loss": 1.0}, [1.009, 1.001, 1.009, 0.9], [2]),
        ({"loss": 1.0}, [1.011, 1.009, 1.001, 0.9], [1, 3]), ({"loss": 1.0, "kl": 0.5}, [1.006, 0.9, 1.004, 0.9], [1]),
    ],
    ids=["a small rise passes", "two in a row do not", "one after a setback is a first one", "a mixture's by its KL"],
)  # fmt: skip
def test_a_setback_is_more_than_a_small_rise(start, later, setbacks, monkeypatch):
    scores = iter([start, *({"loss": each} for each in later)])
    monkeypatch.setattr(HeldOut, "score", lambda self: next(scores))
    tokens = tiny.some_tokens(len(later))
    report, _ = tuned(tiny.llama(), tokens, batch_tokens=tokens.shape[1])
    assert [point["loss"] for point in report.heldout] == [start["loss"], *later]
    assert report.setbacks == setbacks


def test_a_ruinous_rate_leaves_the_start_as_it_was():
    """Too few steps for the rate to come down: whoever scores worst is not kept."""
    model = tiny.llama()
    before = weights_of(cut(model, CUT))
    report, after = tuned(model, tiny.some_tokens(4), HELDOUT, learning_rate=0.9, batch_tokens=32)
    assert (report.best_step, report.setbacks) == (0, [1]), "nothing follows the last step, so it has no setback"
    assert all(torch.equal(p, before[name]) for name, p in after.items())


def test_a_state_of_other_making_is_not_gone_on_with(tmp_path):
    model, path = tiny.llama(), tmp_path / "state.safetensors"

    def steps(key="a", seed=0, heldout_seed=1, fold=1.0, **settings):
        student, begun = cut(model, CUT), []
        folded = student.model.layers[2].mlp.down_proj
        folded.weight = torch.nn.Parameter(fold * folded.weight, requires_grad=False)
        files = TuningFiles(state=StateFile(path, key=key, minutes=0))
        tokens, heldout = tiny.some_tokens(8, seed=seed), tiny.some_tokens(4, seed=heldout_seed)
        with advancing(lambda count, _: begun.append(count)):
            tune_(student, model, tokens, heldout=heldout, batch_tokens=32, files=files, **settings)
        return begun

    fresh = [32] * 4
    assert steps() == fresh
    assert steps() == [128], "gone on with: nothing is left to do"
    for change in (
        {"key": "b"}, {"seed": 5}, {"heldout_seed": 6}, {"fold": 0.9}, {"learning_rate": 2e-3},
        {"objective": KL(mix=0.1)}, {"token_weights": torch.full((8, 16), 2.0)}, {"row_lengths": torch.full((8,), 8)},
    ):  # fmt: skip
        assert steps(**change) == fresh, change
    path.write_bytes(path.read_bytes()[:100])
    assert steps() == fresh, "a spoiled state counts as none"


# --- the command is a client of the same functions ---
