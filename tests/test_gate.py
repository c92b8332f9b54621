"""The gate: its slopes are derivatives, their squares are the curvature of the KL, and what they foretell is found."""

import itertools

import pytest
import torch

import folders
import tiny
from layercut.data.probes import probe_rows
from layercut.layer_search import gate, search
from layercut.layer_search.clp import priced_sums
from layercut.layer_search.gate import Foretold, draws, foretell, foretold_of_row, proposals, upstream_of
from layercut.layer_search.gate_walls import all_sets
from layercut.layer_search.prices import Prices
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.models.losses import kl_divergence
from layercut.models.objectives import KL, Hidden
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment


def gated(stack, row, gates, jump=None):
    """Hidden states after the last layer, with gates [L, T] of the layers, or one [T] on a whole segment."""
    h, calls = stack.enter(row)
    before = [h]
    for i in range(len(stack)):
        after = stack.layer(i, h, calls)
        h = h + gates[i][None, :, None] * (after - h)
        before.append(h)
        if jump and i == jump[0].stop - 1:
            g = jump[1][None, :, None]
            h = g * h + (1 - g) * before[jump[0].start]
    return h


@pytest.mark.parametrize("objective", [KL(), Hidden()])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_foretold_is_made_of_the_derivatives_of_explicit_gates(objective, weighted):
    stack, row = DecoderRunner(tiny.llama(layers=4).double()), tiny.some_tokens(1, 5)
    weights = torch.tensor([0.0, 0.1, 0.3, 0.0, 0.6]) if weighted else None
    draw = torch.Generator().manual_seed(3)
    table = foretold_of_row(stack, row, objective, draw, weights=weights)

    def slopes(gates, h):
        """Of what is differentiated, with the same draw, in the gates."""
        drawn = draws(objective, h.shape, torch.Generator().manual_seed(3))
        end, upstream = upstream_of(stack, h, row, objective, drawn)
        share = torch.full((5,), 0.2) if weights is None else weights
        (found,) = torch.autograd.grad(end, gates, (upstream * share.sqrt()[:, None]).to(end.dtype))
        return found

    gates = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    alone = slopes(gates, gated(stack, row, gates)).square().sum(-1)  # [L]
    for segment in map(Segment, *zip(*itertools.combinations(range(5), 2), strict=True)):
        jump = torch.ones(5, dtype=torch.float64, requires_grad=True)
        together = slopes(jump, gated(stack, row, gates.detach(), (segment, jump))).square().sum()
        expected = (alone[segment.start : segment.stop].sum() + together) / 4
        assert table[segment.start, segment.stop].item() == pytest.approx(expected.item(), rel=1e-5)
    assert table.tril().eq(0).all()


def test_the_drawn_gradient_has_the_curvature_of_the_kl():
    stack, row = DecoderRunner(tiny.llama(layers=2)), tiny.some_tokens(1, 120)
    hidden, calls = stack.enter(row)
    last = stack.run(hidden, calls, 0, 2)[:, 5:6].expand(-1, 120, -1)  # 120 draws from the same p at once
    p = stack.exit(last, row)[0, 0].softmax(-1)
    draw = torch.Generator().manual_seed(0)
    drawn = torch.cat([upstream_of(stack, last, row, KL(), draws(KL(), last.shape, draw))[1][0] for _ in range(40)])
    exact = p.diag() - p[:, None] * p  # of KL(p || q) in the logits, at q = p
    assert (drawn.T @ drawn / len(drawn) - exact).norm() < 0.15 * exact.norm()


def test_a_layer_alone_is_foretold_the_kl_of_closing_its_gate_a_little():
    """One token, so that no products of positions are left out."""
    stack, row = DecoderRunner(tiny.llama(layers=3).double()), torch.tensor([[7]])
    draw = torch.Generator().manual_seed(0)
    table = torch.stack([foretold_of_row(stack, row, KL(), draw) for _ in range(100)]).mean(0)
    with torch.no_grad():
        for i in range(3):
            gates = torch.ones(3, 1, dtype=torch.float64)
            dense = stack.exit(gated(stack, row, gates), row)
            gates[i] -= 0.05
            kl = kl_divergence(dense.double(), stack.exit(gated(stack, row, gates), row).double())
            assert table[i, i + 1].item() == pytest.approx(kl.item() * 400, rel=0.4)


def test_the_least_foretold_sets_are_those_of_brute_force():
    table = torch.rand(10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    foretold = Foretold(table)
    for count in (1, 2, 3):
        best = sorted(all_sets(4, 9, count), key=foretold.of)
        assert proposals(foretold, Restriction.none(9, 4), count, 5) == best[:5]


@pytest.mark.parametrize(("length", "layers"), [(9, 12), (11, 12), (1, 2)])
def test_all_but_a_few_layers_can_be_proposed(length, layers):
    table = torch.rand(layers + 1, layers + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for count in (1, 2):
        best = min(all_sets(length, layers, count), key=Foretold(table).of)
        assert proposals(Foretold(table), Restriction.none(layers, length), count, 1) == [best]


DEEP = (Segment(3, 5), Segment(11, 14), Segment(19, 20))


def deep():
    """24 layers, of which six, in three places, add a twentieth of what others add."""
    model = tiny.llama(layers=24)
    for i in (i for segment in DEEP for i in range(segment.start, segment.stop)):
        model.model.layers[i].self_attn.o_proj.weight.mul_(0.05)
        model.model.layers[i].mlp.down_proj.weight.mul_(0.05)
    return DecoderRunner(model)


def test_the_gate_finds_three_segments_for_less_than_it_takes_to_price_single_ones(monkeypatch):
    stack, tokens = deep(), tiny.some_tokens(4, 8)
    asked = {"n_layers": 6, "num_segments": 3, "method": "gate"}
    found = search(stack, tokens, **asked)
    assert tuple(found.segments) == DEEP
    priced_sums(Prices(stack, tokens, cost := Cost()), Restriction.none(24, 6), 3)
    assert found.cost.layer_forwards + 2 * found.cost.layer_backwards < cost.layer_forwards, "the coarse pricing alone"
    # without what its gradients foretell the same race finds nothing
    monkeypatch.setattr(gate, "foretold_of_row", lambda stack, *_, **__: torch.ones(25, 25, dtype=torch.float64))
    assert search(stack, tokens, **asked).kl > 2 * found.kl


def test_same_seed_same_answer_and_another_draw_another_price():
    stack, tokens = DecoderRunner(tiny.llama()), tiny.some_tokens()
    for method in ("gate", "clp", "race"):
        runs = [search(stack, tokens, n_layers=2, method=method, seed=1, num_segments=2) for _ in range(2)]
        assert runs[0] == runs[1]
    prices = Prices(stack, tokens, Cost())
    assert not torch.equal(foretell(prices, 2, 0).table, foretell(prices, 2, 1).table)


def test_slopes_that_float16_does_not_hold_are_scaled():
    exact, half = DecoderRunner(tiny.llama(layers=4)), DecoderRunner(tiny.llama(layers=4).half())
    row, weights = tiny.some_tokens(1, 12), torch.full((12,), 1e-14)

    def table(stack, scale):
        return foretold_of_row(stack, row, KL(), torch.Generator().manual_seed(0), weights=weights, scale=scale)

    wanted = table(exact, 1.0)
    assert torch.equal(table(exact, 2.0**16), wanted), "a power of two, undone, changes no bit"
    assert (table(half, 1.0) - wanted).norm() > 0.9 * wanted.norm(), "below 6e-8 there is nothing"
    assert (table(half, 2.0**16) - wanted).norm() < 0.05 * wanted.norm()


def test_a_scale_that_overflows_is_halved(monkeypatch):
    stack, tokens = DecoderRunner(tiny.llama(layers=4).half()), tiny.some_tokens(2, 12)
    found = foretell(Prices(stack, tokens, Cost()), 2, 0)
    monkeypatch.setattr(gate, "LOSS_SCALE", 2.0**30)
    assert torch.allclose(foretell(Prices(stack, tokens, Cost()), 2, 0).table, found.table, rtol=0.02)


def test_what_tests_count_can_be_changed_afterwards():
    probes = probe_rows(folders.tokenizer(), rows=4, window=64, capabilities=["sums"])
    model = tiny.llama(vocab_size=folders.VOCABULARY)
    prices = Prices(DecoderRunner(model), tiny.some_tokens(4, 64), Cost(), probes=probes)
    found = foretell(prices, 8, seed=0)
    text = foretell(Prices(prices.stack, prices.text, Cost()), 4, seed=0)
    torch.testing.assert_close(text.weighing(0).table, text.table)
    torch.testing.assert_close(found.weighing(1).table, found.table)
    double = found.weighing(0).table + found.weighing(2).table
    torch.testing.assert_close(double, 2 * found.table)
    assert not torch.allclose(found.weighing(0).table, found.table)
