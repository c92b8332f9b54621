"""Endpoint tuning changes the endpoints alone and never makes anything worse."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import families
import tiny
from layercut.errors import ConfigError
from layercut.evaluation import perplexity
from layercut.healing import endpoint_tuning as room
from layercut.healing import fold_, tune_
from layercut.healing.endpoint_tuning import (
    TuningFiles,
    endpoints,
    own_parameters_,
    warmup_then_cosine,
)
from layercut.healing.tuning_pass import Batch, HeldOut, Pair
from layercut.healing.tuning_state import StateFile
from layercut.models import losses, memory, model_weights
from layercut.models.memory import Budget
from layercut.models.objectives import KL, objective_of
from layercut.models.passes import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut_segment_


def cut_copy(model, *segments):
    student = model_weights.share(model)
    cut_segment_(student, list(segments))
    return student


@contextmanager
def advancing(call):
    """While open, the bar of tuning calls this with the tokens and the words of each step."""

    @contextmanager
    def bar(*_):
        yield call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "bar", bar)
        yield


def weights_of(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


# --- endpoint tuning ---


def test_endpoints_are_the_layers_beside_each_cut():
    assert endpoints([Segment(3, 5)], 8) == [2, 3]
    assert endpoints([Segment(0, 2)], 8) == [0]
    assert endpoints([Segment(6, 8)], 8) == [5]
    assert endpoints([Segment(3, 5)], 8, radius=2) == [1, 2, 3, 4]
    assert endpoints([Segment(1, 2), Segment(5, 6)], 8) == [0, 1, 3, 4]


@pytest.mark.parametrize("objective", ["kl", "next-token"])
def test_a_row_of_a_shorter_length_is_done_as_several(objective):
    model, segment = tiny.llama(), Segment(3, 5)
    tokens, heldout = tiny.some_tokens(8, 16), tiny.some_tokens(2, 16, seed=1)
    settings = {"objective": objective, "learning_rate": 3e-3, "batch_tokens": 16, "heldout": heldout}

    def tuned(rows, **more):
        student = cut_copy(model, segment)
        return tune_(student, model, rows, **settings, **more), weights_of(student)

    whole, parted = (tuned(tokens, **more) for more in ({}, {"row_lengths": torch.full((8,), 4)}))
    alone, weights = tuned(tokens.view(-1, 4))
    assert [point["loss"] for point in parted[0].curve] == pytest.approx([point["loss"] for point in alone.curve])
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in parted[1].items())
    assert parted[0].curve[0]["loss"] != pytest.approx(whole[0].curve[0]["loss"], rel=1e-3)
    for lengths in ([16, 4], [16] * 7 + [5], [16] * 7 + [1]):
        with pytest.raises(ConfigError, match="row_lengths"):
            tune_(cut_copy(model, segment), model, tokens, row_lengths=torch.tensor(lengths))
    assert tune_(cut_copy(model, segment), model, tokens, row_lengths=torch.full((8,), 4)).tokens == 7 * 16


def test_rows_of_two_lengths_in_a_step_count_by_their_tokens():
    model, segment = tiny.llama(), Segment(3, 5)
    tokens, heldout = tiny.some_tokens(2, 16), tiny.some_tokens(2, 16, seed=1)
    first = {}
    for name, rows, lengths in (("both", tokens, [16, 4]), ("whole", tokens[:1], [16]), ("parted", tokens[1:], [4])):
        report = tune_(
            cut_copy(model, segment), model, rows, heldout=heldout, batch_tokens=32, row_lengths=torch.tensor(lengths)
        )  # fmt: skip
        first[name] = report.curve[0]["loss"]
    assert first["both"] == pytest.approx((first["whole"] + first["parted"]) / 2, rel=1e-5)


@pytest.mark.parametrize("objective", ["kl", "next-token"])
def test_tokens_count_by_their_weights(objective):
    model, segment, tokens = tiny.llama(), Segment(3, 5), tiny.some_tokens(4, 16)
    settings = {"objective": objective, "heldout": tokens, "learning_rate": 1e-3}

    def tuned(rows, batch, **more):
        student = cut_copy(model, segment)
        return tune_(student, model, rows, batch_tokens=batch, **settings, **more), weights_of(student)

    # rows of weight 0 are as if they were not there: half the loss, and AdamW does not see its scale
    none = torch.ones(tokens.shape)
    none[1::2] = 0
    half, alone = tuned(tokens, 32, token_weights=none), tuned(tokens[::2], 16)
    losses = [[point["loss"] for point in told.curve] for told, _ in (half, alone)]
    assert losses[0] == pytest.approx([loss / 2 for loss in losses[1]], rel=1e-3)
    start = weights_of(cut_copy(model, segment))
    moved, apart = (
        sum((a[1][name] - b[name]).square().sum() for name in start) for a, b in ((alone, start), (half, alone[1]))
    )
    assert 0 <= apart < 0.02 * moved
    # each token by its own, in rows that are parted too
    some = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0))
    ones = [tuned(tokens, 64, token_weights=mask)[0].curve[0]["loss"] for mask in (some, 1 - some)]
    whole, lengths = tuned(tokens, 64), torch.full((4,), 4)
    assert sum(ones) == pytest.approx(whole[0].curve[0]["loss"], rel=1e-4)
    assert ones[0] != pytest.approx(ones[1], rel=1e-3)
    parted = tuned(tokens, 64, token_weights=some, row_lengths=lengths)[0]
    apart = tuned(tokens.view(-1, 4), 64, token_weights=some.view(-1, 4))[0]
    assert parted.curve[0]["loss"] == pytest.approx(apart.curve[0]["loss"], rel=1e-5)
    for wrong in (some[:2], -some, torch.full(tokens.shape, torch.nan)):
        with pytest.raises(ConfigError, match="token_weights"):
            tuned(tokens, 64, token_weights=wrong)


@pytest.mark.parametrize("objective", ["kl", "next-token"])
def test_only_the_endpoints_change_and_the_held_out_loss_falls(objective):
    model = tiny.llama()
    student = cut_copy(model, Segment(3, 5))
    before, dense_before = weights_of(student), weights_of(model)
    settings = {"objective": objective, "learning_rate": 3e-3, "batch_tokens": 64}
    # text that the model itself finds likely, so that every objective has something to learn
    tokens = model.generate(tiny.some_tokens(64, 2, seed=1), max_new_tokens=14, do_sample=False, pad_token_id=0)
    report = tune_(student, model, tokens[:48], heldout=tokens[48:], **settings)
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


@pytest.mark.parametrize("rate", [0.03, 0.9])
def test_a_rate_that_leads_astray_is_lowered(rate, tmp_path):
    """By a quarter, from the best state, as often as it takes; stopped after that and resumed to the same bits."""
    model, segment, ends, left = tiny.llama(), [Segment(3, 5)], [], iter(range(10))

    class Stopped(Exception):
        pass

    def ten_steps(*_) -> None:
        if next(left, None) is None:
            raise Stopped

    def tuned(**options):
        student = cut_copy(model, *segment)
        report = tune_(
            student, model, tiny.some_tokens(64), heldout=tiny.some_tokens(8, seed=3), learning_rate=rate,
            batch_tokens=32, files=TuningFiles(**options),
        )  # fmt: skip
        ends.append((report, weights_of(student)))

    tuned()
    with pytest.raises(Stopped), advancing(ten_steps):
        tuned(state=StateFile(tmp_path / "state", key="", minutes=0))
    tuned(state=StateFile(tmp_path / "state", key="", minutes=60))
    (report, weights), (resumed, again) = ends
    losses = {point["step"]: point["loss"] for point in report.heldout}
    assert report.setbacks == [step for step in losses if losses[step] > losses[0]] != []
    assert report.setbacks[-1] > 10 or rate < 0.1, "some before the stop and, with the higher rate, one after it"
    assert report.best < losses[0]
    assert resumed.setbacks == report.setbacks
    assert resumed.heldout == report.heldout
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("start", "later", "setbacks"),
    [
        ({"loss": 1.0}, [1.009, 0.9, 1.009, 0.9], []),
        ({"loss": 1.0}, [1.009, 1.001, 1.009, 0.9], [2]),
        ({"loss": 1.0}, [1.011, 1.009, 1.001, 0.9], [1, 3]),
        ({"loss": 1.0, "kl": 0.5}, [1.006, 0.9, 1.004, 0.9], [1]),
    ],
    ids=["a small rise passes", "two in a row do not", "one after a setback is a first one", "a mixture's by its KL"],
)
def test_a_setback_is_more_than_a_small_rise(start, later, setbacks, monkeypatch):
    scores = iter([start, *({"loss": each} for each in later)])
    monkeypatch.setattr("layercut.healing.tuning_pass.HeldOut.score", lambda self: next(scores))
    model = tiny.llama()
    student, tokens = cut_copy(model, Segment(3, 5)), tiny.some_tokens(len(later))
    report = tune_(student, model, tokens, heldout=tiny.some_tokens(2, seed=3), batch_tokens=tokens.shape[1])
    assert [point["loss"] for point in report.heldout] == [start["loss"], *later]
    assert report.setbacks == setbacks


def test_a_ruinous_rate_leaves_the_start_as_it_was():
    """Too few steps for the rate to come down: whoever scores worst is not kept."""
    model = tiny.llama()
    student = cut_copy(model, Segment(3, 5))
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    before = weights_of(student)
    heldout = tiny.some_tokens(8, seed=3)
    start = mean_kl(dense, cut, heldout)
    report = tune_(student, model, tiny.some_tokens(4), heldout=heldout, learning_rate=0.9, batch_tokens=32)
    assert report.best_step == 0
    assert report.setbacks == [1], "nothing follows the last step, so it has no setback"
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert mean_kl(dense, cut, heldout) == pytest.approx(start)


def test_same_tokens_same_bits():
    model, results = tiny.llama(), []
    for _ in range(2):
        student = cut_copy(model, Segment(3, 5))
        tune_(student, model, tiny.some_tokens(16), heldout=tiny.some_tokens(4))
        results.append(weights_of(student))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_kl_step_gradient_is_the_full_models():
    """The chunked, prefix-sharing step gives the gradient that plain autograd through both models gives."""
    model, tokens = tiny.llama(), tiny.some_tokens(4)
    student = cut_copy(model, Segment(3, 5))
    reference = cut_copy(model, Segment(3, 5))
    trained = own_parameters_(DecoderRunner(student), [2, 3])
    pair = Pair(dense=DecoderRunner(model), student=DecoderRunner(student), prefix=2, last=3)
    list(pair.backward([Batch(tokens, torch.arange(4), torch.zeros(4, dtype=torch.int64), 1.0)]))
    wanted = own_parameters_(DecoderRunner(reference), [2, 3])
    p = model(input_ids=tokens, use_cache=False).logits
    losses.kl_divergence(p, reference(input_ids=tokens, use_cache=False).logits).mean().backward()
    for ours, theirs in zip(trained, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_schedule_rises_then_falls():
    rates = [warmup_then_cosine(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 4
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("budget", [1, 4 * 20 * 2, 2**20])
def test_pieces_cover_all_tokens_once_and_fit(budget):
    seen = torch.zeros(6, 16, dtype=torch.int64)
    for rows, columns in replace(Budget.of_cpu(), piece=budget).logit_pieces(6, 16, 10):
        seen[rows, columns] += 1
        assert seen[rows, columns].numel() * 10 <= max(10, budget)
    assert (seen == 1).all()


# --- one pass, against plain autograd through both models ---

DIRECT = {"kl": {}, "mix": {"mix": 0.3}, "next-token": {}}


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("budget", [4 * tiny.VOCABULARY * 5, 2**25])
@pytest.mark.parametrize("is_taught", [False, True])
def test_gradient_of_every_objective_is_the_full_models(name, budget, is_taught, monkeypatch):
    """Chunks of 5 tokens, or all at once; taught: at answers the next-token loss has the shares of all terms."""
    model, tokens, rows = tiny.llama(), tiny.some_tokens(4), torch.arange(4)
    monkeypatch.setattr(memory, "PIECE_BYTES", budget)
    student, reference = (cut_copy(model, Segment(3, 5)) for _ in range(2))
    options = DIRECT[name]
    mix = options.get("mix", 1.0 if name == "next-token" else 0.0)
    objective = objective_of("next-token" if name == "next-token" else "kl", **options)
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    pair = Pair(dense=dense, student=cut, prefix=2, last=3, objective=objective)
    trained = own_parameters_(pair.student, [2, 3])
    answers = None
    if is_taught:
        answers = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5)) < 0.4
        answers[:, -1] = False
    (loss,) = pair.backward([Batch(tokens, rows, torch.zeros_like(rows), 1.0, None, answers)])

    wanted = own_parameters_(DecoderRunner(reference), [2, 3])
    p, q = (m(input_ids=tokens, use_cache=False).logits for m in (model, reference))
    kl = (F.softmax(p, -1) * (F.log_softmax(p, -1) - F.log_softmax(q, -1))).sum(-1)
    following = F.pad(F.cross_entropy(q[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"), (0, 1))
    of_next = mix * tokens.shape[1] / (tokens.shape[1] - 1)
    expected = (1 - mix) * kl + of_next * following
    if answers is not None:
        expected = torch.where(answers, (1 - mix + of_next) * following, expected)
    expected = expected.mean()
    expected.backward()
    assert loss.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(trained, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_a_step_of_several_passes_is_that_of_one(monkeypatch):
    model, results = tiny.llama(), []
    for tokens_in_pass in (16, 32, 1024):
        monkeypatch.setattr(memory, "PASS_TOKENS", tokens_in_pass)
        student = cut_copy(model, Segment(3, 5))
        heldout = tiny.some_tokens(2, seed=1)
        report = tune_(student, model, tiny.some_tokens(6), heldout=heldout, batch_tokens=80, learning_rate=1e-3)
        assert report.steps == 2  # of 5 rows and of 1
        results.append([report.curve[0]["loss"], report.curve[1]["loss"], report.heldout[-1]["loss"]])
    assert results[0] == pytest.approx(results[2], rel=1e-5)
    assert results[1] == pytest.approx(results[2], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "mix"), [("kl", 0.0), ("kl", 0.25), ("kl", 1.0), ("next-token", 0.0)]
)
def test_a_student_is_judged_by_what_it_is_tuned_for(objective, mix):
    model, heldout = tiny.llama(), tiny.some_tokens(6, seed=1)
    dense, student = DecoderRunner(model), DecoderRunner(cut_copy(model, Segment(3, 5)))
    own_parameters_(student, [2, 3])
    made = objective_of(objective, **({"mix": mix} if objective == "kl" else {}))
    pair = Pair(dense=dense, student=student, prefix=2, last=3, objective=made)
    share = 1.0 if objective == "next-token" else mix
    terms = {"kl": mean_kl(dense, student, heldout), "next-token": math.log(perplexity(student.model, heldout))}
    expected = {"loss": (1 - share) * terms["kl"] + share * terms["next-token"]}
    expected |= terms if 0 < mix < 1 else {}
    assert HeldOut(pair, heldout, rows=4).score() == pytest.approx(expected, rel=1e-5)


# --- what tuning keeps and changes ---


def test_what_a_class_keeps_in_float32_is_not_rounded_by_tuning():
    model, wide = tiny.llama().to(torch.bfloat16).float(), "model.layers.2.input_layernorm.weight"
    model.stored_dtype = torch.bfloat16
    before = model.get_parameter(wide).data.fill_(1 + 2**-20).clone()
    student = cut_copy(model, Segment(3, 5))
    tune_(student, model, tiny.some_tokens(32), heldout=tiny.some_tokens(4, seed=1), batch_tokens=64)
    rounded = [name for name, p in student.named_parameters() if not torch.equal(p, p.bfloat16().float())]
    assert rounded == [wide]
    assert not torch.equal(student.get_parameter(wide), before), "it is tuned"


def test_only_the_endpoints_differ_from_the_folded_model_to_the_bit():
    model, segment = tiny.llama().to(torch.bfloat16), [Segment(3, 5)]
    student = cut_copy(model, *segment)
    assert fold_(student, model, tiny.some_tokens(32), heldout=tiny.some_tokens(4, seed=1)).kept
    folded, owners = weights_of(student), {id(p) for p in model.parameters()}
    optimizers = []
    with pytest.MonkeyPatch.context() as patch:
        adamw = torch.optim.AdamW
        patch.setattr(torch.optim, "AdamW", lambda *a, **k: optimizers.append(adamw(*a, **k)) or optimizers[-1])
        heldout = tiny.some_tokens(4, seed=1)
        report = tune_(student, model, tiny.some_tokens(32), heldout=heldout, batch_tokens=64, learning_rate=3e-3)
    assert report.best_step > 0
    own = {name for name, p in student.named_parameters() if id(p) not in owners}
    assert {name.split(".")[2] for name in own} == {"2", "3"}
    for name, p in student.named_parameters():
        assert name in own or torch.equal(p.view(torch.int16), folded[name].view(torch.int16))
        assert p.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(p, folded[name]) for name, p in student.named_parameters())
    # AdamW's state is that of the trained parameters, in float32, and no other
    (optimizer,) = optimizers
    for moment in ("exp_avg", "exp_avg_sq"):
        assert sum(state[moment].numel() for state in optimizer.state.values()) == report.trained_parameters
        assert all(state[moment].dtype == torch.float32 for state in optimizer.state.values())
    assert sum(p.numel() for name, p in student.named_parameters() if name in own) == report.trained_parameters


def test_a_state_of_other_making_is_not_gone_on_with(tmp_path):
    model, path = tiny.llama(), tmp_path / "state.safetensors"

    def tuned(key="a", seed=0, heldout_seed=1, fold=1.0, **settings):
        tokens, heldout = tiny.some_tokens(8, seed=seed), tiny.some_tokens(4, seed=heldout_seed)
        student = cut_copy(model, Segment(3, 5))
        student.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(
            fold * student.model.layers[2].mlp.down_proj.weight, requires_grad=False
        )
        begun, files = [], TuningFiles(state=StateFile(path, key=key, minutes=0))
        with advancing(lambda count, _: begun.append(count)):
            tune_(student, model, tokens, heldout=heldout, batch_tokens=32, files=files, **settings)
        return begun

    fresh = [32] * 4
    assert tuned() == fresh
    assert tuned() == [128], "gone on with: nothing is left to do"
    for change in (
        {"key": "b"}, {"seed": 5}, {"heldout_seed": 6}, {"fold": 0.9},
        {"learning_rate": 2e-3}, {"objective": KL(mix=0.1)},
    ):  # fmt: skip
        assert tuned(**change) == fresh, change
    path.write_bytes(path.read_bytes()[:100])
    assert tuned() == fresh, "a spoiled state counts as none"


def test_what_layers_share_is_no_part_of_one_of_them():
    """Zamba 2 has one block of attention in several layers: trained in one, it would be put into all when saved."""
    model = families.tiny("zamba2")
    student = DecoderRunner(model_weights.share(model))
    shared = {id(p) for p in student.layers[1].parameters()} & {id(p) for p in student.layers[5].parameters()}
    assert shared, "the hybrid layers"
    trained = own_parameters_(student, [5])
    assert trained, "its own Mamba"
    assert shared == {id(p) for p in student.layers[1].parameters()} & {id(p) for p in student.layers[5].parameters()}
