"""The concave gate: closed it is the real cut, and its slopes move it to what is planted."""

from __future__ import annotations

import pytest
import torch

import folders
import tiny
from layercut.data.probes import probe_rows
from layercut.layer_search import concave_gate, search
from layercut.layer_search.concave_gate import Schedule, gated_losses, gates, hardened, settle_, slopes
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import set_costs
from layercut.models.losses import kl_divergence
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment

ROW, WHOLE = slice(0, 1), slice(0, 16)


def rugged(layers: int, planted: range, seed: int = 0, weak: float = 0.01):
    """A random Llama whose layers add a tenth to ten times as much as they did, and planted ones a hundredth."""
    model, draw = tiny.llama(layers=layers), torch.Generator().manual_seed(seed)
    for i, layer in enumerate(model.model.layers):
        factor = weak if i in planted else 10 ** (2 * torch.rand((), generator=draw).item() - 1)
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)
    return model


def limited(layers: int, length: int) -> Restriction:
    """Layer 3 may only come first, if it stays."""
    free = Restriction.none(layers, length).may
    return Restriction(tuple((True, *[False] * (len(may) - 1)) if i == 3 else may for i, may in enumerate(free)))


def test_a_well_is_closed_between_its_walls_and_open_outside():
    sharp = gates(torch.tensor([[2.0, 5.0], [6.0, 7.0]]), 8, sharpness=50.0)
    assert sharp.tolist() == [1, 1, 0, 0, 0, 1, 0, 1]
    soft = gates(torch.tensor([[2.5, 5.5]]), 8, sharpness=3.0)
    assert soft[2] == pytest.approx(1 - torch.sigmoid(torch.tensor(0.0)) * torch.sigmoid(torch.tensor(9.0)))
    assert (soft.diff()[:4] <= 0).all()
    assert (soft.diff()[4:] >= 0).all()


@pytest.mark.parametrize("walls", [[[2.0, 5.0]], [[0.0, 1.0], [3.0, 5.0]]])
def test_closed_gates_give_the_kl_of_the_real_cut(walls):
    stack, tokens = DecoderRunner(tiny.llama(layers=6)), tiny.some_tokens(1)
    loss = gated_losses(CutCosts(stack, tokens, Cost()), ROW, WHOLE, [torch.tensor(walls)], 60.0)
    cuts = tuple(Segment(int(a), int(b)) for a, b in walls)
    assert loss.item() == pytest.approx(set_costs(stack, tokens, [cuts], Cost())[0].kl, rel=1e-5)


def test_wells_that_share_the_dense_stream_give_the_losses_of_the_formula_and_their_slopes_are_differences():
    stack, tokens = DecoderRunner(tiny.llama(layers=6).double()), tiny.some_tokens(1)
    costs = CutCosts(stack, tokens, Cost())

    def plain(walls: torch.Tensor) -> float:
        h, calls = stack.enter(tokens)
        dense = stack.run(h, calls, 0, 6)
        for i, g in enumerate(gates(walls, 6, 3.0).double()):
            h = h + g * (stack.layer(i, h, calls) - h)
        return kl_divergence(stack.exit(dense, tokens), stack.exit(h, tokens)).mean().log().item()

    sets = [torch.tensor(w, requires_grad=True) for w in ([[0.7, 2.4]], [[2.2, 3.9]], [[0.4, 1.4], [3.6, 4.3]])]
    with torch.enable_grad():
        losses = gated_losses(costs, ROW, WHOLE, sets, 3.0)
        found = slopes(losses, sets, 1.0)
    assert losses.log().tolist() == pytest.approx([plain(w.detach()) for w in sets], abs=1e-5)
    for walls, slope in zip(sets, found, strict=True):
        for at in range(walls.numel()):  # a wall moves, and all walls outward or inward alike, so the length stays
            step = torch.zeros(walls.numel())
            step[at] = 1.0
            outward = torch.tensor([-1.0, 1.0]).repeat(len(walls))
            step -= outward * (step @ outward) / len(outward)
            ends = [plain(walls.detach() + sign * 1e-3 * step.view_as(walls)) for sign in (1, -1)]
            assert slope.flatten()[at].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3])
def test_walls_settle_within_the_model_at_the_length_that_is_asked_for(seed, count):
    walls = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 16 - 3
    settle_(walls, 4, 10)
    assert (walls[:, 1] - walls[:, 0]).sum().item() == pytest.approx(4, abs=1e-3)
    assert walls.min() >= -1e-3
    assert walls.max() <= 10 + 1e-3
    assert (walls.flatten().diff() >= -1e-3).all()


def test_hardening_takes_the_nearest_sets_of_whole_layers_that_are_allowed():
    free = Restriction.none(10, 3)
    assert hardened(torch.tensor([[2.3, 5.3]]), free) == [(Segment(2, 5),), (Segment(3, 6),)]
    assert hardened(torch.tensor([[1.2, 2.2], [5.9, 7.9]]), free)[:1] == [(Segment(1, 2), Segment(6, 8))]
    first = limited(10, 3)
    assert hardened(torch.tensor([[6.2, 9.2]]), first)[0] == (Segment(3, 6),)


@pytest.mark.parametrize("at", [3, 9])
def test_a_planted_segment_is_found_by_the_slopes_of_the_gate_and_not_without_them(at, monkeypatch):
    stack, tokens = DecoderRunner(rugged(16, range(at, at + 4))), tiny.some_tokens(4, 64)
    found = search(stack, tokens, n_layers=4, method="clp")
    assert found.segments == [Segment(at, at + 4)]
    assert len(found.candidates) <= 2
    assert len({tuple(c.segments) for c in found.candidates}) == len(found.candidates)
    true = concave_gate.slopes
    for turned in (0.0, -1.0):
        monkeypatch.setattr(concave_gate, "slopes", lambda *given, t=turned: [t * g for g in true(*given)])
        assert search(stack, tokens, n_layers=4, method="clp").segments != [Segment(at, at + 4)]


def test_the_same_seed_gives_the_same_and_the_trace_shows_a_well_that_sharpens():
    stack, tokens = DecoderRunner(rugged(16, range(6, 10))), tiny.some_tokens(8, 64)
    first, again = (search(stack, tokens, n_layers=4, method="clp", seed=3) for _ in range(2))
    assert first == again
    assert first.gate is not None
    assert {c.segments for c in first.candidates} <= {*first.gate.proposed}
    assert len(first.gate.proposed) <= 4
    shown = torch.tensor(first.gate.gates)
    assert shown.shape == (Schedule().steps, 16)
    assert len(first.gate.losses[0]) == Schedule().steps
    half_open = ((shown > 0) & (shown < 1)).sum(-1)
    assert half_open[-1] < half_open[0]
    assert shown[-1, 7:9].max() == 0  # the middle of what was chosen is closed
    assert first.to_dict()["gate"]["gates"] == first.gate.gates
    axes = first.plot()
    assert len(axes.figure.axes) == 3
    assert axes.images[0].get_array().shape == shown.T.shape


def test_probes_move_the_gate():
    tokenizer = folders.tokenizer()
    stack = DecoderRunner(tiny.llama(layers=8, vocab_size=len(tokenizer)))
    probes = probe_rows(tokenizer, rows=4, window=64, capabilities=["sums"])
    tokens = torch.randint(len(tokenizer), (4, 64), generator=torch.Generator().manual_seed(0))
    with_probes = search(stack, tokens, n_layers=3, method="clp", probes=probes)
    alone = search(stack, tokens, n_layers=3, method="clp")
    assert with_probes.gate
    assert alone.gate
    assert with_probes.gate.losses != alone.gate.losses
    assert with_probes.candidates[0].score is not None


@pytest.mark.parametrize("count", [1, 2])
def test_only_cuts_that_are_allowed_are_proposed(count):
    stack, tokens = DecoderRunner(rugged(12, range(7, 10))), tiny.some_tokens(4, 32)
    limits = limited(12, 3)
    assert not limits.allows([Segment(7, 10)])
    found = search(stack, tokens, n_layers=3, method="clp", restriction=limits, num_segments=count)
    assert limits.allows(found.segments)
    assert found.gate
    assert 2 <= len(found.gate.proposed) <= 4


def test_where_no_set_beside_the_walls_is_allowed_the_nearest_is_taken_if_asked():
    walls, limits = torch.tensor([[6.2, 7.2], [9.1, 11.1]]), limited(12, 3)
    assert hardened(walls, limits)[0] == (Segment(3, 4), Segment(9, 11))
    assert hardened(walls, limits, whatever=False) == []
