"""Behind a norm the fold lowers one sum at every step, ends where a generic optimizer ends, and writes W and g."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers

import tiny
from layercut.healing import least_squares, normalised
from layercut.healing.least_squares import fold_cut_, sums_of_turns
from layercut.healing.linear_outputs import LinearOutput, OutputNorm, find_targets
from layercut.healing.normalised import Alternation, FoldBatch
from layercut.healing.quick_fold import FoldCosts
from layercut.models import decoder_stack
from layercut.models.losses import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut_segment_

SHAPE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3,
    "num_key_value_heads": 3, "num_hidden_layers": 5, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=8),
    "olmo2": transformers.Olmo2Config(**SHAPE),
    "glm4": transformers.Glm4Config(**SHAPE, head_dim=8),
}
CUT = Segment(2, 4)


@pytest.fixture(autouse=True)
def to_the_end(monkeypatch):
    monkeypatch.setattr(normalised, "ENOUGH", 0.0)


def family(name):
    model = tiny.tiny(FAMILIES[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def cut_copy(model):
    student = decoder_stack.share(model)
    cut_segment_(student, [CUT])
    return student


def random_turns(*, centred, seed=0):
    """z, u = z W, and a target that another W and g reach but for some noise."""
    draw, tokens, read, hidden = torch.Generator().manual_seed(seed), 400, 24, 16

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    gain, bias = 1 + 0.5 * normal(hidden), 0.1 * normal(hidden)
    factor = torch.full((hidden,), 0.7, dtype=torch.float64)
    norm = OutputNorm("norm", 0.0, gain, True, bias, centred, 1e-6, factor)
    z, rest = normal(tokens, read), normal(tokens, hidden)
    u = z @ normal(read, hidden) / read**0.5
    changed = u + 0.5 * z @ normal(read, hidden) / read**0.5
    out = rest + factor * (gain * norm.normal(u)[0] + bias)
    wanted = rest + factor * (1.3 * gain * norm.normal(changed)[0] + bias) + 0.05 * normal(tokens, hidden)
    batch = FoldBatch(z, [u], out, wanted, torch.zeros(tokens, dtype=torch.bool))
    return Alternation([LinearOutput("w", True, (), read, norm=norm)], hidden, lambda: [batch], z.device)


def objective(turns, xs, gains, pull):
    """The sum, written as it stands, of all tokens to fit."""
    total = pull * sum(x.square().sum() for x in xs)
    for batch in turns.batches():
        z, out, wanted = (each.double()[~batch.held] for each in (batch.z, batch.out, batch.wanted))
        gap, inputs = wanted - out, iter(batch.inputs)
        for branch, x, gain in zip(turns.branches, xs, gains, strict=True):
            norm, u = branch.norm, next(inputs).double()[~batch.held]
            new = u + z[:, branch.columns] @ (x / branch.metric)

            def added(u, gain, norm=norm):
                centred = u - u.mean(-1, keepdim=True) if norm.centred else u
                return (
                    norm.factor.double() * gain * centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
                )

            gap = gap - added(new, gain) + added(u, norm.gain.double())
        total = total + (gap.square().sum(-1) / wanted.square().mean(-1)).sum()
    return total


def by_lbfgs(turns, xs, gains, pull, steps=3000):
    """The sum at which torch's own optimizer ends from there."""
    parameters = [each.clone().requires_grad_() for each in (*xs, *gains)]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, max_eval=2 * steps, tolerance_grad=1e-10, tolerance_change=1e-13, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = objective(turns, parameters[: len(xs)], parameters[len(xs) :], pull)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


def check_path(turns, of_optimizer=3000, ridge=0.03, steps=150):
    start, fit, _ = sums_of_turns(turns)
    pull = ridge * fit.zz.diagonal().mean().item()
    began = [(branch.x, branch.gain) for branch in turns.branches]
    assert start.left[0] == pytest.approx(objective(turns, *zip(*began, strict=True), 0.0).item(), rel=1e-6)
    path = turns.solve_(fit.factored(ridge), pull, start, steps=steps)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(path))
    ended = [[branch.x for branch in turns.branches], [branch.gain for branch in turns.branches]]
    assert path[-1] == pytest.approx(objective(turns, *ended, pull).item(), rel=1e-6)
    assert path[-1] < 0.9 * path[0]
    nearby, reference = (by_lbfgs(turns, *start, pull, of_optimizer) for start in (ended, zip(*began, strict=True)))
    return path, nearby, reference


@pytest.mark.parametrize("centred", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_the_turns_end_where_a_generic_optimizer_ends(centred):
    """Nothing better is nearby. From the start it may find a lower minimum: of this draw one at most 2 % lower."""
    path, nearby, reference = check_path(random_turns(centred=centred))
    assert path[-1] == pytest.approx(nearby, rel=1e-4)
    assert path[-1] == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_on_what_models_compute_too(name):
    model, tokens = family(name), tiny.some_tokens(48, 16)
    dense, student = DecoderRunner(model.double()), DecoderRunner(cut_copy(model))
    targets = find_targets(student, 1, tokens[:2])
    ends = least_squares._Ends(dense, student, CUT, 1, kept=True)
    read = [*least_squares._read(ends, targets, tokens, 16, lambda rows: None)]
    batches = [
        FoldBatch(z.flatten(0, 1), [u.flatten(0, 1) for u in inputs], out.flatten(0, 1), wanted.flatten(0, 1), held)
        for _, z, inputs, out, wanted in read
        for held in [torch.zeros(z.shape[0] * z.shape[1], dtype=torch.bool)]
    ]
    turns = Alternation(targets, 24, lambda: batches, torch.device("cpu"))
    # a tenth of the steps leaves 0.1 % of what all would find, which take a minute
    path, nearby, reference = check_path(turns, of_optimizer=300)
    assert path[-1] == pytest.approx(nearby, rel=0.01), "of ill-conditioned sums the last per cent takes too long"
    assert path[-1] == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_computes_what_was_solved(name, dtype, monkeypatch):
    model, tokens, seen = family(name).to(dtype), tiny.some_tokens(64, 16), []

    class Seen(Alternation):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr(least_squares, "Alternation", Seen)
    student = cut_copy(model)
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    fold_cut_(cut, dense, CUT, tokens, rows=16)
    last = seen[-1]  # the MLP's, with the attention as it was folded
    added = torch.cat(
        [last.branches[0].change(batch.z.float(), batch.inputs[0].float())[0] for batch in last.batches()]
    )
    wanted = torch.cat([batch.out for batch in last.batches()]).float() + added
    hidden, calls = cut.enter(tokens)
    got = cut.run(hidden, calls, 0, 2).flatten(0, 1).float()
    torch.testing.assert_close(
        got, wanted, **({"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1})
    )
    assert all(p.dtype == dtype for p in student.parameters())


def test_a_quick_fold_costs_what_the_fold_of_the_mlp_leaves(monkeypatch):
    model, tokens = family("gemma3"), tiny.some_tokens(96, 16)
    dense, student = DecoderRunner(model), DecoderRunner(cut_copy(model))
    plain = mean_kl(dense, student, tokens[:8])
    quick = FoldCosts(dense, tokens[8:], tokens[:8])([CUT])
    monkeypatch.setattr(least_squares, "find_targets", lambda *given: find_targets(*given)[-1:])
    monkeypatch.setattr(least_squares, "STEPS", 3)
    fold_cut_(student, dense, CUT, tokens[8:])
    assert quick < 0.8 * plain
    assert quick == pytest.approx(mean_kl(dense, student, tokens[:8]), rel=0.1)


def test_a_norm_without_a_weight_keeps_its_gain():
    turns = random_turns(centred=False)
    fixed = Alternation(
        [LinearOutput("w", True, (), 24, norm=replace(turns.branches[0].norm, trainable=False))], 16, turns.batches,
        torch.device("cpu"),
    )  # fmt: skip
    start, fit, _ = sums_of_turns(fixed)
    path = fixed.solve_(fit.factored(0.03), 0.03 * fit.zz.diagonal().mean().item(), start)
    assert path[-1] < path[0]
    assert torch.equal(fixed.branches[0].gain, turns.branches[0].gain)
