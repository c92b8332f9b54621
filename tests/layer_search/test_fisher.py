"""The Fisher estimate: its slopes are derivatives, their squares the curvature of the KL, real cuts correct it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import folders
import tiny
from layercut.data.probes import probe_rows
from layercut.layer_search import fisher, search
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.fisher import (
    Estimate,
    corrected,
    corrected_proposals,
    estimate,
    estimate_of_row,
    proposals,
    upstream_of,
)
from layercut.layer_search.race import least_sums
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.layer_search.segment_sets import all_sets
from layercut.layer_search.sweep import all_lengths
from layercut.models.losses import kl_divergence
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


@pytest.mark.parametrize("weighted", [False, True])
def test_an_estimate_is_made_of_the_derivatives_of_explicit_gates(weighted):
    stack, row = DecoderRunner(tiny.llama(layers=4).double()), tiny.some_tokens(1, 5)
    weights = torch.tensor([0.0, 0.1, 0.3, 0.0, 0.6]) if weighted else None
    table = estimate_of_row(stack, row, torch.Generator().manual_seed(3), weights=weights)

    def slopes(gates, h):
        """Of the same draw, in the gates."""
        drawn = torch.rand(h.shape[1], generator=torch.Generator().manual_seed(3))
        end, upstream = upstream_of(stack, h, row, drawn)
        share = torch.full((5,), 0.2) if weights is None else weights
        return torch.autograd.grad(end, gates, (upstream * share.sqrt()[:, None]).to(end.dtype))[0]

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
    drawn = torch.cat([upstream_of(stack, last, row, torch.rand(120, generator=draw))[1][0] for _ in range(40)])
    exact = p.diag() - p[:, None] * p  # of KL(p || q) in the logits, at q = p
    assert (drawn.T @ drawn / len(drawn) - exact).norm() < 0.15 * exact.norm()


def test_the_estimate_of_one_layer_is_the_kl_of_closing_its_gate_a_little():
    """One token, so that no products of positions are left out."""
    stack, row = DecoderRunner(tiny.llama(layers=3).double()), torch.tensor([[7]])
    draw = torch.Generator().manual_seed(0)
    table = torch.stack([estimate_of_row(stack, row, draw) for _ in range(100)]).mean(0)
    with torch.no_grad():
        for i in range(3):
            gates = torch.ones(3, 1, dtype=torch.float64)
            dense = stack.exit(gated(stack, row, gates), row)
            gates[i] -= 0.05
            kl = kl_divergence(dense.double(), stack.exit(gated(stack, row, gates), row).double())
            assert table[i, i + 1].item() == pytest.approx(kl.item() * 400, rel=0.4)


@pytest.mark.parametrize(("length", "layers", "most"), [(4, 9, 5), (9, 12, 1), (11, 12, 1), (1, 2, 1)])
def test_the_sets_of_least_estimate_are_those_of_brute_force(length, layers, most):
    table = torch.rand(layers + 1, layers + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for count in (1, 2, 3):
        best = sorted(all_sets(length, layers, count), key=Estimate(table).of)
        assert proposals(Estimate(table), Restriction.none(layers, length), count, most) == best[:most]


def test_three_segments_are_found_for_less_than_cutting_single_ones_takes():
    """24 layers, of which six, in three places, add a twentieth of what others add."""
    deep, model, tokens = (Segment(3, 5), Segment(11, 14), Segment(19, 20)), tiny.llama(layers=24), tiny.some_tokens()
    for i in (i for segment in deep for i in range(segment.start, segment.stop)):
        model.model.layers[i].self_attn.o_proj.weight.mul_(0.05)
        model.model.layers[i].mlp.down_proj.weight.mul_(0.05)
    prices, every = CutCosts(DecoderRunner(model), tokens, Cost()), Cost()
    found = estimate(prices, 2, 0)
    limits = Restriction.none(24, 6)
    assert proposals(found, limits, 3, 1) == [deep]
    least_sums(CutCosts(prices.stack, tokens, every), limits, 3)
    assert prices.cost.layer_forwards + 2 * prices.cost.layer_backwards < every.layer_forwards
    assert tuple(search(model, tokens, n_layers=6, num_segments=3, method="fisher").segments) == deep


def test_slopes_that_float16_does_not_hold_are_scaled_and_a_scale_that_overflows_is_halved(monkeypatch):
    exact, half = DecoderRunner(tiny.llama(layers=4)), DecoderRunner(tiny.llama(layers=4).half())
    row, weights = tiny.some_tokens(1, 12), torch.full((12,), 1e-14)

    def table(stack, scale):
        return estimate_of_row(stack, row, torch.Generator().manual_seed(0), weights=weights, scale=scale)

    wanted = table(exact, 1.0)
    assert torch.equal(table(exact, 2.0**16), wanted), "a power of two, undone, changes no bit"
    assert (table(half, 1.0) - wanted).norm() > 0.9 * wanted.norm(), "below 6e-8 there is nothing"
    assert (table(half, 2.0**16) - wanted).norm() < 0.05 * wanted.norm()
    found = estimate(CutCosts(half, tiny.some_tokens(2, 12), Cost()), 2, 0)
    monkeypatch.setattr(fisher, "LOSS_SCALE", 2.0**30)
    again = estimate(CutCosts(half, tiny.some_tokens(2, 12), Cost()), 2, 0)
    assert torch.allclose(again.table, found.table, rtol=0.02)


def test_what_probes_count_can_be_changed_afterwards():
    probes = probe_rows(folders.tokenizer(), rows=4, window=64, capabilities=["sums"])
    model = tiny.llama(vocab_size=folders.VOCABULARY)
    tokens = tiny.some_tokens(4, 64)
    prices = CutCosts(DecoderRunner(model), tokens, Cost(), probes=probes)
    found = estimate(prices, 8, seed=0)
    text = estimate(CutCosts(prices.stack, tokens, Cost()), 4, seed=0)
    torch.testing.assert_close(text.weighing(0).table, text.table)
    torch.testing.assert_close(found.weighing(1).table, found.table)
    double = found.weighing(0).table + found.weighing(2).table
    torch.testing.assert_close(double, 2 * found.table)
    assert not torch.allclose(found.weighing(0).table, found.table)


# --- estimates corrected by real cuts ---

LAYERS = 12
EACH = torch.tensor([9, 0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 9, 0.30, 0.31, 0.32, 9], dtype=torch.float64)


def estimated(a: int, b: int) -> float:
    """What layers cost alone, added up."""
    return EACH[a:b].sum().item()


def real(a: int, b: int) -> float:
    """Of more than three layers in a row many times as much, of six less so, where a climb stays."""
    return estimated(a, b) * {4: 80, 5: 40}.get(b - a, 1 if b - a <= 3 else 20)


def additive() -> Estimate:
    table = torch.zeros(LAYERS + 1, LAYERS + 1, dtype=torch.float64)
    for a, b in itertools.combinations(range(LAYERS + 1), 2):
        table[a, b] = estimated(a, b)
    return Estimate(table)


def test_what_segments_have_in_common_corrects_those_that_were_not_cut():
    given = Estimate(additive().table, additive().table / 2)
    known = {Segment(1, 5): (3.0, 1.0), Segment(2, 4): (0.2, 0.3)}
    found = corrected(given, known)
    for kind, table, own in ((0, found.table, given.table), (1, found.text, given.text)):
        for a, b in itertools.combinations(range(LAYERS + 1), 2):
            pulls, weights = 0.0, 1.0
            for segment, costs in known.items():
                ours, theirs = set(range(a, b)), set(range(segment.start, segment.stop))
                weight = (len(ours & theirs) / len(ours | theirs)) ** 4
                weights += weight
                pulls += weight * math.log(costs[kind] / own[segment.start, segment.stop])
            cut = known.get(Segment(a, b))
            expected = cut[kind] if cut else own[a, b] * math.exp(pulls / weights)
            assert table[a, b] == pytest.approx(float(expected))
    assert corrected(additive(), known).text is None


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate that takes layers to do their work alone, and cuts which show that long segments cost far more."""

    def of_batch(self: CutCosts, sets: Any, batch: torch.Tensor, weights: Any, cost: Cost) -> torch.Tensor:
        costs = [sum(real(s.start, s.stop) for s in cuts) for cuts in sets]
        return torch.tensor(costs, dtype=torch.float64)[:, None].expand(-1, len(batch))

    monkeypatch.setattr(CutCosts, "_of_batch", of_batch)
    monkeypatch.setattr(fisher, "estimate", lambda *given: additive())


@pytest.mark.usefixtures("planted")
def test_two_short_segments_are_found_where_the_estimate_sees_one_long_one():
    model, tokens = tiny.llama(LAYERS), tiny.some_tokens(8, 16)
    assert search(model, tokens, n_layers=6, num_segments=2).segments == [Segment(1, 4), Segment(8, 11)]
    limits = Restriction.none(LAYERS, 6)
    assert proposals(additive(), limits, 2, 1) == [(Segment(1, 7),)]
    prices = CutCosts(DecoderRunner(model), tokens, Cost())
    (proposed,) = corrected_proposals(prices, additive(), limits, 2, [(1.0, 12)])
    singles = {segment for cuts in proposed for segment in cuts}
    assert all(len(prices.known[(segment,)]) == 1 for segment in singles), "on a few rows"
    sums = [sum(real(s.start, s.stop) for s in cuts) for cuts in proposed]
    assert sums == sorted(sums), "in the order of what their segments really cost"
    assert len(singles) < len(prices.known) < len(all_lengths(6, LAYERS)), "not of all segments"


def test_what_overflows_and_what_rounds_to_nothing_decides_nothing_else():
    alone = corrected(additive(), {Segment(8, 10): 2 * (0.4,)}).table
    odd = {Segment(1, 5): 2 * (0.3e30,), Segment(8, 10): 2 * (0.4,)}
    assert torch.equal(corrected(additive(), odd).table[2, 5], alone[2, 5]), "next to what overflowed"
    assert corrected(additive(), odd).table[1, 5] == 0.3e30
    nothing = corrected(additive(), {Segment(1, 5): 2 * (-1e-9,)}).table
    assert nothing[2, 5] > additive().table[2, 5] / 100


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(LAYERS, vocab_size=folders.VOCABULARY, max_position_embeddings=256)


def test_an_overflow_on_a_row_of_probes_leaves_the_text_alone(monkeypatch, model):
    probes = probe_rows(folders.tokenizer(), rows=4, window=64, capabilities=["sums"])
    prices = CutCosts(DecoderRunner(model), tiny.some_tokens(4, 64), Cost(), probes=probes)
    plain, tables = CutCosts._of_batch, []

    def overflowing(self: CutCosts, sets: Any, *given: Any) -> torch.Tensor:
        found = plain(self, sets, *given)
        found[[len(cuts) == 1 and len(cuts[0]) == 2 for cuts in sets], 1] = torch.inf  # the second row is of probes
        return found

    monkeypatch.setattr(CutCosts, "_of_batch", overflowing)
    monkeypatch.setattr(fisher, "corrected", lambda *given: tables.append(corrected(*given)) or tables[-1])
    corrected_proposals(prices, estimate(prices, 2, 0), Restriction.none(LAYERS, 4), 2, [(1.0, 6), (0.0, 6)])
    assert (tables[-1].table > 1e20).any()
    assert tables[-1].text.isfinite().all()
    assert tables[-1].text.max() < 1e3


@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 2)])
def test_fewer_rows_than_single_segments_are_cut_on(model, rows):
    probes = probe_rows(folders.tokenizer(), rows=rows[1], window=128, capabilities=["sums"])
    found = search(model, tiny.some_tokens(rows[0], 64), n_layers=4, num_segments=2, probes=probes)
    assert sum(map(len, found.segments)) == 4
