"""What the gate foretells of long segments is put right by real cuts before sets are proposed."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch

import folders
import tiny
from layercut.data.probes import probe_rows
from layercut.layer_search import search
from layercut.layer_search.gate import Foretold, foretell
from layercut.layer_search.gate_corrected import corrected, corrected_proposals
from layercut.layer_search.prices import Prices
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.models.runner import DecoderRunner
from layercut.registries import objectives
from layercut.segments import Segment

LAYERS = 12
EACH = torch.tensor([9, 0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 9, 0.30, 0.31, 0.32, 9], dtype=torch.float64)


def told(price: Any) -> Foretold:
    table = torch.zeros(LAYERS + 1, LAYERS + 1, dtype=torch.float64)
    for a in range(LAYERS):
        for b in range(a + 1, LAYERS + 1):
            table[a, b] = price(a, b)
    return Foretold(table)


def by_gate(a: int, b: int) -> float:
    """What layers cost alone, added up, of text and tests."""
    return EACH[a:b].sum().item()


def by_cut(a: int, b: int) -> float:
    """The real price: of more than three layers in a row many times as much, of six less so, where a climb stays."""
    return by_gate(a, b) * {4: 80, 5: 40}.get(b - a, 1 if b - a <= 3 else 20)


def test_what_segments_have_in_common_corrects_those_that_were_not_cut():
    gate = Foretold(told(by_gate).table, told(by_gate).table / 2)
    known = {Segment(1, 5): (3.0, 1.0), Segment(2, 4): (0.2, 0.3)}
    found = corrected(gate, known)
    for kind, table, own in ((0, found.table, gate.table), (1, found.text, gate.text)):
        for a in range(LAYERS):
            for b in range(a + 1, LAYERS + 1):
                pulls, weights = 0.0, 1.0
                for segment, prices in known.items():
                    ours, theirs = set(range(a, b)), set(range(segment.start, segment.stop))
                    weight = (len(ours & theirs) / len(ours | theirs)) ** 4
                    weights += weight
                    pulls += weight * math.log(prices[kind] / own[segment.start, segment.stop])
                real = known.get(Segment(a, b))
                expected = real[kind] if real else own[a, b] * math.exp(pulls / weights)
                assert table[a, b] == pytest.approx(float(expected))
    assert corrected(told(by_gate), known).text is None


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that takes layers to do their work alone, and cuts which show that long segments cost far more."""

    def of_batch(self: Prices, sets: Any, batch: torch.Tensor, weights: Any, cost: Cost) -> torch.Tensor:
        prices = [sum(by_cut(s.start, s.stop) for s in cuts) for cuts in sets]
        return torch.tensor(prices, dtype=torch.float64)[:, None].expand(-1, len(batch))

    monkeypatch.setattr(Prices, "_of_batch", of_batch)
    monkeypatch.setattr(import_module("layercut.layer_search.clp"), "foretell", lambda *given: told(by_gate))


@pytest.mark.usefixtures("planted")
def test_two_short_segments_are_found_where_the_gate_sees_one_long_one(monkeypatch):
    model, tokens = tiny.llama(LAYERS), tiny.some_tokens(8, 16)
    found = search(model, tokens, n_layers=6, num_segments=2, method="clp")
    assert found.segments == [Segment(1, 4), Segment(8, 11)]
    clp = import_module("layercut.layer_search.clp")
    monkeypatch.setattr(clp, "corrected_proposals", lambda prices, *given: clp.proposals_of_each(*given))
    without = search(model, tokens, n_layers=6, num_segments=2, method="clp")
    assert without.segments == [Segment(1, 7)]
    assert without.candidates[0].kl > 10 * found.candidates[0].kl


@pytest.mark.usefixtures("planted")
def test_real_cuts_are_made_until_all_of_what_is_proposed_is_known(monkeypatch):
    prices = Prices(DecoderRunner(tiny.llama(LAYERS)), tiny.some_tokens(8, 16), Cost())
    limits, module = Restriction.none(LAYERS, 6), import_module("layercut.layer_search.gate_corrected")
    (proposed,) = corrected_proposals(prices, told(by_gate), limits, 2, [(1.0, 12)])
    singles = {segment for cuts in proposed for segment in cuts}
    assert all(len(prices.known[(segment,)]) == 1 for segment in singles), "on a few rows"
    sums = [sum(by_cut(s.start, s.stop) for s in cuts) for cuts in proposed]
    assert sums == sorted(sums), "in the order of what their segments really cost"
    cut, every = len(prices.known), len(module.all_lengths(6, LAYERS))
    assert len(singles) < cut < every, "not of all segments"
    monkeypatch.setattr(module, "MOST_ROUNDS", 1)
    few = Prices(DecoderRunner(tiny.llama(LAYERS)), tiny.some_tokens(8, 16), Cost())
    corrected_proposals(few, told(by_gate), limits, 2, [(1.0, 12)])
    assert 1 < len(few.known) < cut


def test_what_overflows_and_what_rounds_to_nothing_decides_nothing_else():
    gate = told(by_gate)
    alone = corrected(gate, {Segment(8, 10): 2 * (0.4,)}).table
    odd = {Segment(1, 5): 2 * (0.3e30,), Segment(8, 10): 2 * (0.4,)}
    assert torch.equal(corrected(gate, odd).table[2, 5], alone[2, 5]), "next to what overflowed"
    assert corrected(gate, odd).table[1, 5] == 0.3e30
    nothing = corrected(gate, {Segment(1, 5): 2 * (-1e-9,)}).table
    assert nothing[2, 5] > gate.table[2, 5] / 100


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(LAYERS, vocab_size=folders.VOCABULARY, max_position_embeddings=256)


def test_an_overflow_on_a_row_of_tests_leaves_the_text_alone(monkeypatch, model):
    probes = probe_rows(folders.tokenizer(), rows=4, window=64, capabilities=["sums"])
    prices = Prices(DecoderRunner(model), tiny.some_tokens(4, 64), Cost(), probes=probes)
    plain = Prices._of_batch

    def overflowing(self: Prices, sets: Any, *given: Any) -> torch.Tensor:
        found = plain(self, sets, *given)
        found[[len(cuts) == 1 and len(cuts[0]) == 2 for cuts in sets], 1] = torch.inf  # the second row is of tests
        return found

    monkeypatch.setattr(Prices, "_of_batch", overflowing)
    kinds = [(1.0, 6), (0.0, 6)]
    tables = []
    module = import_module("layercut.layer_search.gate_corrected")
    monkeypatch.setattr(module, "corrected", lambda *given: tables.append(corrected(*given)) or tables[-1])
    foretold = foretell(prices, 2, 0)
    corrected_proposals(prices, foretold, Restriction.none(LAYERS, 4), 2, kinds)
    assert (tables[-1].table > 1e20).any()
    assert tables[-1].text.isfinite().all()
    assert tables[-1].text.max() < 1e3


def test_an_objective_that_the_dense_model_does_not_have_at_0_is_counted_from_there(model):
    tokens, segments = tiny.some_tokens(8, 16), [Segment(2, 3), Segment(4, 7)]
    runner = DecoderRunner(model)
    prices = Prices(runner, tokens, Cost(), objectives.get("next-token")())
    dense, *cut = prices.of([(), *((segment,) for segment in segments)], 1)
    assert dense.item() > 1
    assert torch.equal(prices.of_singles(segments)[:, 0], torch.stack(cut)[:, 0] - dense)
    assert Prices(runner, tokens, Cost()).of([()], 1).item() < 1e-6, "of KL there is nothing to take off"


@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 2)])
def test_fewer_rows_than_single_segments_are_cut_on(model, rows):
    probes = probe_rows(folders.tokenizer(), rows=rows[1], window=128, capabilities=["sums"])
    found = search(model, tiny.some_tokens(rows[0], 64), n_layers=4, num_segments=2, probes=probes)
    assert sum(map(len, found.segments)) == 4
