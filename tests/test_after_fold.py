"""A search that goes on by quick folds: their price is that of the fold in the weights, and it decides."""

import json

import pytest
import torch

import tiny
from layercut.cli.command_line import main
from layercut.healing import fold_prices
from layercut.healing.fold_prices import RIDGES, FoldPrices
from layercut.healing.least_squares import HELD_OUT
from layercut.layer_search import Candidate, Cost, Restriction, SearchResult
from layercut.layer_search.after_fold import GAIN, after_fold
from layercut.layer_search.prices import Prices
from layercut.models.runner import DecoderRunner, mean_kl
from layercut.segments import Segment
from layercut.surgery import cut

FIT = 16


def caught(stack, tokens, position, module):
    """(what a layer's last projection reads, what leaves the layer), float64."""
    seen = []
    hook = stack.layers[position].get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden, calls = stack.enter(tokens)
    out = stack.run(hidden, calls, 0, position + 1)
    hook.remove()
    return seen[-1].double(), out.double()


@torch.no_grad()
def folded_by_hand(model, cuts, tokens, module):
    """The cut model, the last projection before each cut solved in float64; cuts from the first."""
    student, dense = cut(model, cuts), DecoderRunner(model)
    stack = DecoderRunner(student)
    held = torch.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    gone = 0
    for segment in cuts:
        position = segment.start - gone - 1
        gone += len(segment)
        if position < 0:
            continue
        z, out = caught(stack, tokens, position, module)
        hidden, calls = dense.enter(tokens)
        y = dense.run(hidden, calls, 0, segment.stop).double() - out
        a, b = (z[~held].flatten(0, 1), y[~held].flatten(0, 1))
        eye = torch.eye(a.shape[1], dtype=torch.float64)
        solved = [torch.linalg.solve(a.T @ a + r * (a * a).sum() / a.shape[1] * eye, a.T @ b) for r in RIDGES]
        x = min(solved, key=lambda x: (y[held] - z[held] @ x).square().sum())
        projection = stack.layers[position].get_submodule(module)
        plus = x.T if isinstance(projection, torch.nn.Linear) else x
        projection.weight = torch.nn.Parameter((projection.weight.double() + plus).float())
    return student


@pytest.mark.parametrize("cuts", ["1:2", "1:2,4:6", "0:1,3:4"])
def test_its_price_is_that_of_the_model_with_the_fold_in_its_weights(cuts):
    model, cuts = tiny.llama(), [Segment.parse(one) for one in cuts.split(",")]
    fit, judged = tiny.some_tokens(rows=FIT), tiny.some_tokens(rows=5, seed=1)
    prices = FoldPrices(DecoderRunner(model), fit, judged)
    by_hand = folded_by_hand(model, cuts, fit, "mlp.down_proj")
    expected = mean_kl(DecoderRunner(model), DecoderRunner(by_hand), judged)
    assert prices(cuts) == pytest.approx(expected, rel=1e-3)
    plain = mean_kl(DecoderRunner(model), DecoderRunner(cut(model, cuts)), judged)
    assert abs(plain / expected - 1) > 0.01, "a fold that does nothing would pass"


def test_weights_say_what_each_position_counts():
    model, judged = tiny.llama(), tiny.some_tokens(rows=4, seed=1)
    fit, segment = tiny.some_tokens(rows=FIT), [Segment(2, 4)]
    first = torch.zeros(judged.shape)
    first[:2] = 1 / judged.shape[1]
    half = FoldPrices(DecoderRunner(model), fit, judged, first)(segment)
    assert half == pytest.approx(FoldPrices(DecoderRunner(model), fit, judged[:2])(segment) / 2, rel=1e-4)


def test_states_beyond_memory_are_in_files_that_vanish(tmp_path, monkeypatch):
    model, fit, judged = tiny.llama(), tiny.some_tokens(rows=FIT), tiny.some_tokens(rows=4, seed=1)
    expected = FoldPrices(DecoderRunner(model), fit, judged)([Segment(2, 4)])
    monkeypatch.setattr(fold_prices, "IN_MEMORY", 0)
    prices = FoldPrices(DecoderRunner(model), fit, judged, folder=tmp_path)
    assert prices([Segment(2, 4)]) == expected
    assert not list(tmp_path.iterdir())


def test_what_it_takes_is_planned(tiny_model, texts, tmp_path, capsys):
    flags = [str(tiny_model), f"--data={texts[0]}", "--tokens=1024", "--window=128", "--ratio=0.25", "--preserve=sums"]
    flags.append("--score=folded")
    assert main(["plan", *flags, "--json", "--no-calibrate"]) == 0
    planned = json.loads(capsys.readouterr().out)["stages"]["search"]["layer_forwards"]
    assert main(["search", *flags, f"--out={tmp_path / 'run'}"]) == 0
    taken = json.loads((tmp_path / "run" / "search.json").read_text())["layer_forwards"]
    assert planned["least"] <= taken <= planned["most"]
    assert planned["expected"] / 3 < taken < 3 * planned["expected"]


def plain_prices():
    return Prices(DecoderRunner(tiny.llama()), tiny.some_tokens(rows=2), Cost())


def result_of(*cuts):
    return SearchResult("clp", [Candidate((Segment.parse(one),), float(i)) for i, one in enumerate(cuts)], Cost())


def test_the_price_after_the_fold_decides_and_leads_to_moves_that_the_search_had_not():
    # the further from 5 the layers are, the dearer: 1:3 is the search's best, and 4:6 only moves lead to
    asked = []

    def price(cuts):
        asked.append(cuts)
        return 1.0 + sum(abs(i - 4.5) for segment in cuts for i in range(segment.start, segment.stop))

    found = after_fold(result_of("1:3", "0:2"), plain_prices(), price, Restriction.none(8, 2), 1)
    assert found.segments == [Segment(4, 6)]
    assert found.candidates[0].score == price((Segment(4, 6),))
    assert found.candidates[0].kl > 0, "priced on all rows as a plain cut too"
    assert {c.segments for c in found.candidates[1:]} == {(Segment(1, 3),), (Segment(0, 2),)}
    assert len(asked) - 1 == len(set(asked[:-1])), "none is priced twice"


def test_what_gains_no_more_than_chance_is_not_taken():
    def price(cuts):
        return 1.0 - 0.9 * GAIN * (cuts == (Segment(2, 4),))

    assert after_fold(result_of("1:3"), plain_prices(), price, Restriction.none(8, 2), 1).segments == [Segment(1, 3)]


def test_moves_stay_within_what_is_allowed_and_within_the_number_of_segments():
    asked = []

    def price(cuts):
        asked.append(cuts)
        return 1.0 / len(asked)

    after_fold(result_of("1:4"), plain_prices(), price, Restriction.none(8, 3), 2)
    assert {len(cuts) for cuts in asked} == {1, 2}
    assert all(sum(map(len, cuts)) == 3 for cuts in asked)
