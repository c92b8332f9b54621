"""The map of what each layer holds, and the search that weighs probes with text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config

import folders
import tiny
from layercut import layer_search
from layercut.data.probes import ProbeRows, probe_rows
from layercut.errors import ConfigError, DataError
from layercut.evaluation import capability_figures
from layercut.layer_search import search
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.fisher import estimate
from layercut.layer_search.race import least_sums
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.layer_search.skill_map import TEXT, capability_costs, capability_map
from layercut.layer_search.sweep import set_costs
from layercut.layer_search.weighted_rows import weighted_rows
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(5, vocab_size=folders.VOCABULARY, max_position_embeddings=512)


def test_the_map_holds_the_cost_of_every_window(model, probes, tokenizer):
    text = tiny.some_tokens(3, 16)
    found = capability_map(model, probes=probes, text=text, lengths=(1, 2))
    assert found.lengths() == [1, 2]
    assert len(found.costs) == 5 + 4
    assert found.names == (*probes.names, TEXT)
    direct = capability_figures(cut(model, [Segment(2, 4)]), model, probes).kl
    assert found.costs[2, 4] == pytest.approx(direct | {TEXT: found.costs[2, 4][TEXT]}, rel=1e-4)
    of_text = set_costs(DecoderRunner(model), text, [(Segment(2, 3),)], Cost())[0]
    assert found.costs[2, 3][TEXT] == pytest.approx(of_text.kl)
    assert len(found.to_dict()["windows"]) == 9
    assert len(found.words()) == len(probes.names)
    assert found.holders()["recall"][0] in range(5)
    shown = found.plot(length=2)
    assert shown.images[0].get_array().shape == (len(found.names), 4)
    assert found.plot(shown) is shown
    assert shown.images[-1].get_array().shape == (len(found.names), 5), "of single layers, where nothing is said"
    of_pairs = capability_map(model, probes=probes, lengths=(2,))
    assert (of_pairs.holders(), of_pairs.words(), len(of_pairs.to_dict()["windows"])) == ({}, [], 4)
    with pytest.raises(ConfigError, match="there are 2"):
        of_pairs.plot(length=1)
    short = probe_rows(tokenizer, rows=4, window=128)
    left_out = capability_map(model, probes=short).to_dict()["left_out"]
    assert "recall" in left_out
    assert left_out == list(short.left_out)


def test_words_name_the_holders_that_are_cheap_on_text():
    recall, text = [9.0, 8.0, 0.1, 0.1, 1.0, 0.9, 0.2, 9.0], [7.0, 3.0, 0.5, 0.6, 0.1, 0.55, 0.4, 2.0]
    costs = {(i, i + 1): {"recall": recall[i], TEXT: text[i]} for i in range(8)}

    def of(layers: int, *names: str, costs: Any) -> Any:
        return layer_search.CapabilityMap(layers, names, costs)

    found = of(8, "recall", TEXT, costs=costs)
    assert found.words() == ["recall: most at layer 4 (1.00 nats without it), then 5; cheap on text: 4 (0.10)"]
    dear = {span: row | {TEXT: 1.0} for span, row in costs.items()}
    assert "cheap" not in of(8, "recall", TEXT, costs=dear).words()[0]
    (line,) = of(12, "recall", costs={(i, i + 1): {"recall": 1.0} for i in range(12)}).words()
    assert line == "recall: most at layer 2 (1.00 nats without it), then 3, 4, 5, 6, 7"
    none = of(3, "recall", costs={(i, i + 1): {"recall": 0.0} for i in range(3)})
    assert (none.holders(), none.words()) == ({"recall": []}, ["recall: no layer alone"])
    infinite = of(2, "recall", costs={(i, i + 1): {"recall": float("inf")} for i in range(2)})
    assert infinite.plot().images[0].get_array().tolist() == [[1.0, 1.0]]


def test_what_cannot_be_mapped_or_searched_is_refused(model, probes, tokenizer):
    for lengths in ((), (0,), (1, 5)):
        with pytest.raises(ConfigError, match="allowed are 1 to 4"):
            capability_map(model, probes=probes, lengths=lengths)
    with pytest.raises(DataError, match="no probe fits rows of 16 tokens"):
        search(model, tiny.some_tokens(4, 16), n_layers=1, probes=probe_rows(tokenizer, rows=1, window=16))
    with pytest.raises(ConfigError, match="probes is not for the criterion 'cosine'"):
        search(model, tiny.some_tokens(), n_layers=2, method="cosine", probes=probes)
    short = tiny.tiny(GPT2Config(vocab_size=folders.VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128))
    assert capability_map(short, tokenizer).names, "of rows of 128 tokens"
    for act in (
        lambda: capability_map(short, tokenizer, window=256),
        lambda: search(short, tiny.some_tokens(4), n_layers=1, probes=probe_rows(tokenizer, rows=2)),
    ):
        with pytest.raises(DataError, match="rows of 256 tokens are longer than the model's 128 positions"):
            act()


# ---- the search ----------------------------------------------------------------------------------------------


def test_the_mean_cost_of_weighted_rows_is_the_objective(model, probes):
    text, weight = tiny.some_tokens(6, 16), 0.7
    heavier = ProbeRows(**(vars(probes) | {"weight": weight}))
    sets = [(Segment(1, 2),), (Segment(0, 1), Segment(3, 4))]
    stack = DecoderRunner(model)
    found = CutCosts(stack, text, Cost(), heavier).candidates(sets)
    kl = {c.segments: c.kl for c in set_costs(stack, text, sets, Cost())}
    costs = capability_costs(stack, probes, sets, Cost())
    for candidate in found:
        mean = sum(costs[candidate.segments].values()) / len(probes.names)
        assert candidate.kl == pytest.approx(kl[candidate.segments], rel=1e-4)
        assert candidate.probe_kl == pytest.approx(mean, rel=1e-4)
        assert candidate.score == pytest.approx(candidate.kl + weight * mean, rel=1e-4)


def test_probes_and_text_stand_in_turn_and_each_kind_has_its_own_mean(probes):
    rows = weighted_rows(tiny.some_tokens(12, 16), probes)
    assert rows.tokens.shape == (16, 512)
    assert rows.is_text.tolist() == [True, False] * 4 + [True] * 8
    costs = torch.where(rows.is_text, 1.0, 5.0)[None].double()
    for first in (2, 3, 8, 16):
        assert rows.mean(costs[:, :first]).item() == pytest.approx(costs.mean().item())
    alone = weighted_rows(tiny.some_tokens(12, 16), None)
    assert alone.weights is None
    assert alone.is_text.all()


def planted(monkeypatch: pytest.MonkeyPatch, single: dict[int, tuple[float, float]]) -> None:
    """Have every layer cost what a table says: (on text, on probes); sets cost their sum."""

    def of_batch(self: CutCosts, sets: Any, batch: torch.Tensor, weights: Any, cost: Cost) -> torch.Tensor:
        marked = [weights is not None and bool((row == 0).any()) for row in (weights if weights is not None else batch)]
        found = torch.zeros(len(sets), len(batch), dtype=torch.float64)
        for s, cuts in enumerate(sets):
            text, probe = (sum(single[i][k] for c in cuts for i in range(c.start, c.stop)) for k in (0, 1))
            for r, is_probe in enumerate(marked):
                scale = 1.0 if weights is None else float(weights[r].sum())
                found[s, r] = scale * (probe if is_probe else text)
        return found

    monkeypatch.setattr(CutCosts, "_of_batch", of_batch)


def test_what_few_rows_propose_has_seen_the_probes(monkeypatch, model, probes):
    """On the first row alone, which is text, nothing would tell the layers that hold recall from the others."""
    planted(monkeypatch, {0: (0.9, 0.1), 1: (0.1, 9.0), 2: (0.8, 0.1), 3: (0.1, 9.0), 4: (0.8, 0.1)})
    costs = CutCosts(DecoderRunner(model), tiny.some_tokens(4, 512), Cost(), probes=probes)
    proposed = least_sums(costs, Restriction.none(5, 2), 2)
    assert {layer for segment in proposed[0] for layer in range(segment.start, segment.stop)} <= {0, 2, 4}


@pytest.mark.parametrize("method", ["fisher", "race", "exhaustive"])
def test_a_layer_that_is_cheap_on_text_and_holds_recall_is_kept(monkeypatch, model, probes, method):
    planted(monkeypatch, {0: (9.0, 9.0), 1: (0.4, 0.1), 2: (0.5, 0.2), 3: (0.1, 8.0), 4: (0.2, 8.0)})
    text = tiny.some_tokens(8, 512)
    if method != "exhaustive":  # which without probes finds costs by a sweep of its own, which knows no table
        assert search(model, text, n_layers=2, method=method, seed=0).segments == [Segment(3, 5)]
    seeing = search(model, text, n_layers=2, method=method, seed=0, probes=probes)
    assert seeing.segments == [Segment(1, 3)]
    assert seeing.by_text is not None
    assert seeing.by_text.segments == (Segment(3, 5),)
    assert seeing.candidates[0].kl == pytest.approx(0.9)
    assert seeing.candidates[0].probe_kl == pytest.approx(0.3)


def test_two_segments_are_taken_where_they_spare_enough(monkeypatch, model, probes):
    planted(monkeypatch, {0: (9.0, 9.0), 1: (0.1, 0.1), 2: (2.0, 3.0), 3: (0.1, 0.1), 4: (2.0, 2.0)})
    text, asked = tiny.some_tokens(8, 512), {"n_layers": 2, "method": "exhaustive", "probes": probes}
    by_gate = search(model, text, n_layers=2, num_segments="auto", probes=probes)
    assert {sum(map(len, cuts)) for cuts in by_gate.lighter} == {2}, "proposals in which the probes count less"
    assert not search(model, text, n_layers=2).lighter
    found = search(model, text, num_segments="auto", **asked)
    assert found.segments == [Segment(1, 2), Segment(3, 4)]
    assert [len(candidate.segments) for candidate in found.by_number] == [1, 2]
    one = search(model, text, **asked)
    with monkeypatch.context() as few:  # left to itself, the search of a deep stack is not refused half-way
        few.setattr("layercut.layer_search.MOST_SETS", 5)
        few.setattr("layercut.layer_search.race.MOST_SETS", 5)
        found = search(model, text, num_segments="auto", **asked)
        assert len(found.segments) == 1
        assert found.segments == one.segments
        with pytest.raises(ConfigError, match="10 sets of 2 segments are too many"):
            search(model, text, num_segments=2, **asked)
    planted(monkeypatch, dict.fromkeys(range(5), (1.0, 1.0)) | {0: (0.99, 1.0), 2: (1.0, 0.99)})
    found = search(model, text, num_segments="auto", **asked)
    assert len(found.segments) == 1, "one per cent does not pay for two more boundaries"


def test_the_estimate_goes_by_the_answers(model, probes):
    stack, text = DecoderRunner(model), tiny.some_tokens(4, 64)
    seeing, blind = (estimate(CutCosts(stack, text, Cost(), probes=each), 2, 0) for each in (probes, None))
    only = CutCosts(stack, text, Cost(), probes=probes)
    only.weights = torch.where(only.weighted.is_text[:, None], only.weights, 0.0)  # as if no answer counted
    assert not torch.equal(seeing.table, blind.table)
    assert not torch.equal(seeing.table, estimate(only, 2, 0).table)
    found = search(model, text, n_layers=2, probes=probes)
    assert found.candidates[0].score == pytest.approx(found.kl + found.candidates[0].probe_kl, rel=1e-5)
