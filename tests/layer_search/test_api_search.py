"""`layercut.search` on a model in memory: what it returns, refuses and leaves alone, and one's own parts."""

import json
import threading
from dataclasses import FrozenInstanceError, replace

import matplotlib as mpl
import pytest
import torch

import tiny
from layercut import registries
from layercut.cli.command_line import main
from layercut.errors import ConfigError, DataError
from layercut.layer_search import Candidate, Cost, SearchResult, search
from layercut.layer_search.sweep import set_costs
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture
def registered(monkeypatch):
    """Registries whose additions are forgotten again."""
    for registry in (registries.criteria, registries.objectives):
        monkeypatch.setattr(registry, "registered", dict(registry.registered))
    return registries.criteria


def state(model):
    """All that a search might leave changed."""
    parts = [(part.training, sorted(part.__dict__), len(part._forward_hooks)) for part in model.modules()]
    weights = {name: (p.requires_grad, p.grad, p.data_ptr(), p.sum().item()) for name, p in model.named_parameters()}
    return parts, weights, model.config.to_dict()


@pytest.mark.parametrize("method", list(registries.criteria))
def test_the_model_is_as_it_was_and_the_answer_that_of_one_at_rest(model, method):
    """A model as from_pretrained gives it, and one in training mode with dropout, in which nothing else may change."""
    at_rest = search(model, tiny.some_tokens(), n_layers=2, method=method, seed=3)
    busy = tiny.llama(attention_dropout=0.5)
    busy.train().requires_grad_(True)
    busy.model.layers[2].eval()
    busy.model.norm.weight.requires_grad_(False)
    before, threads = state(busy), threading.active_count()
    with torch.no_grad():
        found = search(busy, tiny.some_tokens(), n_layers=2, method=method, seed=3)
    assert state(busy) == before
    assert threading.active_count() == threads
    assert found == at_rest
    assert found.method == ("fisher" if method == "auto" else method)


def test_a_share_a_number_and_a_runner_are_the_same_search(model):
    tokens = tiny.some_tokens()
    found = search(model, tokens, ratio=0.25)
    assert found == search(DecoderRunner(model), tokens, n_layers=2)
    assert sum(map(len, found.segments)) == 2
    assert found.kl == found.candidates[0].kl


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "none of ratio, n_layers and segments"), ({"ratio": 0.2, "n_layers": 2}, "ratio and n_layers of ratio"),
        ({"ratio": 0.01}, "is 0 layers"), ({"n_layers": 8}, "8 of 8 layers cannot be removed"),
        ({"ratio": "0.2"}, "ratio='0.2' is no number"), ({"n_layers": 2.0}, "n_layers=2.0 is no whole number"),
        ({"segments": [Segment(6, 9)]}, "beyond the model's 8 layers"), ({"segments": 5}, "5 is no segment"),
        ({"n_layers": 2, "num_segments": 0}, "num_segments=0"),
        ({"n_layers": 2, "num_segments": "two"}, "num_segments='two'"),
        ({"n_layers": 2, "method": None}, "method=None is no criterion"),
        ({"n_layers": 2, "method": "sled"}, "'sled' is unknown"),
        ({"n_layers": 2, "method": "sleb", "num_segments": 2}, "num_segments is not for the criterion 'sleb'"),
    ],
)  # fmt: skip
def test_what_does_not_make_sense_is_refused_with_a_hint(model, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        search(model, tiny.some_tokens(), **changes)
    assert caught.value.hint


def test_given_segments_are_spelt_as_for_a_cut(model):
    expected = search(model, tokens := tiny.some_tokens(), segments=[Segment(1, 2), Segment(3, 5)])
    assert expected.segments == [Segment(1, 2), Segment(3, 5)]
    assert search(model, tokens, segments=[(1, 2), "3:5"]) == expected
    assert search(model, tokens, segments="3:5").segments == [Segment(3, 5)]


@pytest.mark.parametrize(
    "tokens",
    [
        [[1, 2, 3]], torch.zeros(16, dtype=torch.long), torch.zeros(2, 1).long(), torch.rand(2, 16),
        torch.zeros(1, 999).long(),
    ],
)  # fmt: skip
def test_tokens_that_are_no_rows_of_ids_are_refused(model, tokens):
    with pytest.raises(DataError):
        search(model, tokens, n_layers=2)


def test_a_result_is_frozen_serialises_and_shows_itself(model):
    mpl.use("agg")
    found = search(model, tiny.some_tokens(), n_layers=2)
    with pytest.raises(FrozenInstanceError):
        found.method = "mine"
    told = json.loads(json.dumps(found.to_dict()))
    assert told["segments"] == [[s.start, s.stop] for s in found.segments]
    assert set(told) == {
        "method", "segments", "candidates", "cost", "budget", "by_text", "by_number", "lighter", "shortlist",
        "first_by",
    }  # fmt: skip
    assert list(told["first_by"]) == ["the Fisher estimate", "real cuts"]
    assert told["first_by"]["real cuts"] == told["segments"]
    table = replace(found, method="<b>")._repr_html_()
    assert "&lt;b&gt;" in table
    assert str(found.segments[0]) in table
    axes = found.plot()
    assert str(found.segments[0]) in axes.get_title()
    assert len(axes.lines) == sum(len(c.segments) for c in found.candidates)
    assert found.plot(axes) is axes


# --- criteria of one's own ---


def test_a_criterion_by_decorator_or_as_a_function_is_priced_by_the_real_cut(model, registered):
    tokens = tiny.some_tokens()

    @registered.register("test-middle")
    def middle(runner, tokens, length, **_):
        start = (len(runner) - length) // 2
        return [Segment(start, start + length)]

    found = search(model, tokens, n_layers=2, method="test-middle")
    assert found.method == "test-middle"
    assert found.segments == [Segment(3, 5)]
    assert found.candidates == set_costs(DecoderRunner(model), tokens, [(Segment(3, 5),)], Cost())
    assert search(model, tokens, n_layers=2, method=middle).candidates == found.candidates


def test_a_criterion_is_given_what_it_names(model):
    given = {}

    def curious(runner, tokens, length, *, seed, cost, advance):
        given.update(seed=seed, length=length)
        cost.layer_forwards += 7
        advance(1)
        return torch.arange(8.0)

    found = search(model, tiny.some_tokens(), n_layers=3, method=curious, seed=5)
    assert given == {"seed": 5, "length": 3}
    assert found.segments == [Segment(0, 3)], "scores: the lowest go"
    assert found.cost == Cost(layer_forwards=7)


def test_a_criterion_may_price_its_own_candidates_and_search_several_segments(model):
    def pairs(runner, tokens, length, *, num_segments, cost):
        assert num_segments == length == 2
        best = Candidate((Segment(1, 2), Segment(4, 5)), 0.5)
        return SearchResult("whatever", [best, Candidate((Segment(1, 3),), 0.75)], cost)

    found = search(model, tiny.some_tokens(), n_layers=2, method=pairs, num_segments=3)
    assert (found.method, found.kl, len(found.candidates)) == ("pairs", 0.5, 2)


@pytest.mark.parametrize("picked", [[(1, 3)], ["1:3"], "1:3", (1, 3), (Segment(1, 2), Segment(2, 3))])
def test_a_criterion_may_return_segments_in_any_form(model, picked):
    found = search(model, tiny.some_tokens(), n_layers=2, method=lambda runner, tokens, length: picked)
    assert found.segments == [Segment(1, 3)]


@pytest.mark.parametrize(
    ("picked", "message"),
    [
        ([Segment(1, 2)], "picked 1 layers"), ([], r"picked 0 layers \(none\)"), ([Segment(7, 9)], "beyond"),
        (torch.zeros(3), r"scores of shape \[3\]; allowed is \[8\]"),
        (None, "'<lambda>' returned what None is no segment"), ([0.5] * 8, "returned what 0.5 is no segment"),
    ],
)  # fmt: skip
def test_what_a_criterion_may_not_pick(model, picked, message):
    with pytest.raises(ConfigError, match=message):
        search(model, tiny.some_tokens(), n_layers=2, method=lambda runner, tokens, length: picked)


def test_the_command_asks_a_criterion_of_ones_own_whether_it_takes_several_segments(
    tiny_model, texts, tmp_path, registered, capsys
):
    registered.register("test-one")(lambda runner, tokens, length: [Segment(0, length)])
    settings = [f"--data={texts[0]}", "--tokens=128", "--window=16", "--ratio=0.4", f"--out={tmp_path / 'run'}"]
    assert main(["search", str(tiny_model), *settings, "--method=test-one", "--num-segments=2"]) == 2
    assert "num_segments is not for the criterion 'test-one'" in capsys.readouterr().err
    assert main(["search", str(tiny_model), *settings, "--method=sleb", "--num-segments=2"]) == 2
    assert "--num-segments is not for --method sleb" in capsys.readouterr().err
