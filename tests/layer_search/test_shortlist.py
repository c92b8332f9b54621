"""Cuts on trial: the price after a quick fold is that of the fold in the weights, and what healing leaves decides."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import families
import folders
import tiny
from layercut import layer_search, surgery
from layercut.cli.command_line import main
from layercut.config import DataConfig, HealConfig
from layercut.config.commands import CompressConfig, from_flat
from layercut.data.blocks import fingerprint
from layercut.data.probes import probe_rows
from layercut.errors import SurgeryError
from layercut.healing import fold_, fold_prices, tune_
from layercut.healing.fold_prices import RIDGES, FoldPrices
from layercut.healing.least_squares import HELD_OUT
from layercut.layer_search import Candidate, Cost, Restriction, SearchResult
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.shortlist import (
    CLOSE,
    EFFORTS,
    GAIN,
    LONGER,
    after_healing,
    differing,
    shortlist,
)
from layercut.layer_search.weighted_rows import weighted_rows
from layercut.models import checkpoints, loading
from layercut.models.losses import KL, mean_kl
from layercut.models.runner import DecoderRunner
from layercut.pipeline import resolve_options
from layercut.pipeline.resolve_options import resolve, shortlists
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import KnownCosts, Run
from layercut.pipeline.stages import heal, trial
from layercut.pipeline.stages.heal import DEFAULT_MIX
from layercut.segments import Segment
from layercut.surgery import cut

ENOUGH = 4096
NORMAL, HIGH = EFFORTS["normal"], EFFORTS["high"]


@pytest.fixture(autouse=True, scope="module")
def candidates_are_healed_with_few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve_options, "ENOUGH_TOKENS", ENOUGH)
        yield


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
        wanted = dense.run(hidden, calls, 0, segment.stop).double()
        size = wanted.square().mean(-1, keepdim=True).sqrt()
        z, y = z / size, (wanted - out) / size
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


def test_a_trial_depends_on_what_its_healing_depends_on():
    def inputs_of(shortlist=True, **heal):
        kept = {"text": {"heldout": "held", "tuning": "tuned"}, "held_out_text": tiny.some_tokens(2)}
        return trial.inputs(
            SimpleNamespace(shortlist=shortlist, config=SimpleNamespace(heal=HealConfig(**heal)), **kept)
        )

    assert inputs_of(shortlist=False) == []
    assert {"tuned", "held", fingerprint(tiny.some_tokens(2))} <= {x for x in inputs_of() if isinstance(x, str)}
    assert inputs_of() != inputs_of(learning_rate=1e-3)


def plain_prices():
    return CutCosts(DecoderRunner(tiny.llama()), tiny.some_tokens(rows=2), Cost())


def result_of(*cuts):
    return SearchResult("fisher", [Candidate((Segment.parse(one),), float(i)) for i, one in enumerate(cuts)], Cost())


def test_the_price_after_the_fold_decides_and_leads_to_moves_that_the_search_had_not():
    # the further from 5 the layers are, the dearer: 1:3 is the search's best, and 4:6 only moves lead to
    asked = []

    def price(cuts):
        asked.append(cuts)
        return 1.0 + sum(abs(i - 4.5) for segment in cuts for i in range(segment.start, segment.stop))

    found = shortlist(result_of("1:3", "0:2"), plain_prices(), price, Restriction.none(8, 2), 1)
    assert found.segments == [Segment(4, 6)]
    assert found.candidates[0].score == price((Segment(4, 6),))
    assert found.candidates[0].kl > 0, "priced on all rows as a plain cut too"
    assert {c.segments for c in found.candidates[1:]} == {(Segment(1, 3),), (Segment(0, 2),)}
    assert len(asked) - 1 == len(set(asked[:-1])), "none is priced twice"


def test_what_gains_no_more_than_chance_is_not_taken():
    def price(cuts):
        return 1.0 - 0.9 * GAIN * (cuts == (Segment(2, 4),))

    assert shortlist(result_of("1:3"), plain_prices(), price, Restriction.none(8, 2), 1).segments == [Segment(1, 3)]


def test_moves_stay_within_what_is_allowed_and_within_the_number_of_segments():
    def asked(limits):
        found = []

        def price(cuts):
            found.append(cuts)
            return 1.0 / len(found)

        shortlist(result_of("1:4"), plain_prices(), price, limits, 2)
        return found

    free = asked(Restriction.none(8, 3))
    assert {len(cuts) for cuts in free} == {1, 2}
    assert all(sum(map(len, cuts)) == 3 for cuts in free)
    within = Restriction(tuple(tuple(i != 6 or at == 3 for at in range(5)) for i in range(8)))  # 6 at place 3, or gone
    bound = asked(within)
    assert len(bound) > 1
    assert all(map(within.allows, bound))
    assert not all(map(within.allows, free))


def test_the_best_that_differ_are_healed_then_variants_of_the_best_and_then_the_close_ones_longer():
    # by the fold 1:3 is best; healing turns the order round, and a longer healing of the close ones once more
    cuts = ["1:3", "2:4", "3:5", "4:6", "5:7", "6:8"]
    fold = {(Segment.parse(one),): 1.0 + i for i, one in enumerate(cuts)}
    asked = []

    def healed(cuts, times):
        asked.append((str(cuts[0]), times))
        return 20 - fold[cuts] if times == 1 else {6.0: 12.1, 5.0: 12.0, 4.0: 12.2}[fold[cuts]]

    def by(**more):
        return shortlist(
            result_of(*cuts), plain_prices(), lambda c: fold.get(c, 9.0), Restriction.none(8, 2), 1, **more
        )  # fmt: skip

    found = by(healed=healed)
    assert asked[:3] == [("1:3", 1), ("3:5", 1), ("5:7", 1)], "two layers are others"
    assert asked[3:6] == [("4:6", 1), ("6:8", 1), ("2:4", 1)], "the variants of 5:7, and of 3:5, of which 17 are left"
    assert asked[6:] == [("6:8", LONGER), ("5:7", LONGER), ("4:6", LONGER)], "14, 15 and 16; the next has 17"
    assert found.segments == [Segment(5, 7)], "of which least is left, though 4:6 falls by more"
    first = found.shortlist[0]
    assert (found.candidates[0].score, first.folded, first.healed, first.longer) == (5.0, 5.0, 15.0, 12.0)
    assert [one.healed for one in found.shortlist[:7]] == [15.0, 14.0, 16.0, 17.0, 18.0, 19.0, None]
    assert [one.longer for one in found.shortlist[:4]] == [12.0, 12.1, 12.2, None]
    assert by().segments == [Segment(1, 3)], "without healing the fold decides"


def test_what_the_text_alone_would_take_is_healed_as_well_whatever_it_promises():
    by_text, asked = Candidate((Segment(0, 2),), 0.1), []

    def tried_with(left, **more):
        asked.clear()
        return shortlist(
            replace(result_of("4:6"), **more), plain_prices(), lambda c: 1.0 + 8 * (c == by_text.segments),
            Restriction.none(8, 2), 1, healed=lambda cuts, times: asked.append((cuts, times)) or left.get(cuts, 1.0),
        )  # fmt: skip

    dear = tried_with({by_text.segments: 5.0}, by_text=by_text)
    assert (by_text.segments, 1) in asked
    assert [one.healed for one in dear.shortlist if one.segments == by_text.segments] == [5.0]
    tried_with({})
    assert (by_text.segments, 1) not in asked, "by the fold it is far behind"
    cheap = tried_with({by_text.segments: 0.5}, by_text=by_text)
    assert cheap.segments == [Segment(0, 2)], "and may win"
    assert cheap.candidates[0].kl == 0.1


def test_where_none_is_close_to_the_best_none_is_healed_longer():
    asked = []

    def healed(cuts, times):
        asked.append(times)
        return 1.0 + CLOSE + 0.01 if len(asked) > 1 else 1.0

    apart = [(Segment(i, i + 2),) for i in range(0, 8, 2)]
    assert after_healing(apart, healed, HIGH) == ({cuts: 1.0 if cuts == apart[0] else 1.16 for cuts in apart}, {})
    assert asked == [1, 1, 1, 1]


@pytest.mark.parametrize(("left", "tried_too"), [(1.01, True), (1.2, False)])
def test_variants_of_a_cut_close_behind_the_best_are_healed_as_well(left, tried_too):
    """Of SmolLM2-135M 5:8 and 12:15 heals a little faster at first than 3:6 and 13:16, whose variant heals furthest."""
    best, second, far, variant = (
        tuple(map(Segment.parse, each.split("+"))) for each in ("5:8+12:15", "3:6+13:16", "3:7+25:27", "4:6+12:16")
    )
    short, longer = after_healing(
        [second, variant, best, far], lambda cuts, _: {best: 0.99, second: left, far: 1.5}.get(cuts, 1.07), HIGH
    )
    assert (variant in short) == (variant in longer) == tried_too
    assert far not in longer


def test_a_normal_effort_heals_fewer_and_none_again():
    apart = [(Segment(i, i + 2),) for i in range(0, 20, 2)]
    short, longer = after_healing(apart, lambda *_: 1.0, NORMAL)
    assert len(short) == NORMAL.healed < HIGH.healed
    assert not longer


def test_a_cut_by_text_is_healed_that_nothing_else_would_have_healed():
    apart = [(Segment(i, i + 2),) for i in range(0, 20, 2)]
    alone, beside = (after_healing(apart, lambda *_: 1.0, HIGH, by_text)[0] for by_text in ([], [apart[-1]]))
    assert apart[-1] not in alone
    assert {*beside} == {*alone, apart[-1]}


def test_no_more_are_healed_than_said():
    apart = [(Segment(i, i + 2),) for i in range(0, 20, 2)]
    assert differing(apart, HIGH.healed) == apart[: HIGH.healed]
    assert differing([apart[0], apart[0]], HIGH.healed) == [apart[0]]
    single = [(Segment(i, i + 1),) for i in range(3)]
    assert differing(single, HIGH.healed) == single, "of one layer all differ"


def test_proposals_in_which_tests_count_less_are_tried_too():
    lighter = (Segment(5, 7),)
    result = replace(result_of("1:3"), lighter=[lighter])
    price = {lighter: 0.1, (Segment(1, 3),): 0.5}
    found = shortlist(result, plain_prices(), lambda cuts: price.get(cuts, 1.0), Restriction.none(8, 2), 1)
    assert found.segments == list(lighter)
    assert found.candidates[0].kl > 0, "priced as a plain cut then"


@pytest.mark.parametrize(
    ("flags", "heals"),
    [
        ({}, True),
        ({"tune_tokens": ENOUGH - 1}, False),
        ({"fold": False}, False),
        ({"effort": "low"}, False),
        ({"preserve": "none"}, False),
        ({"method": "cosine"}, False),
        ({"ratio": None, "segment": ("1:2",)}, False),
        ({"ratio": None, "max_loss": 0.1}, False),
    ],
)
def test_cuts_are_healed_on_trial_where_tests_are_weighed_and_enough_is_tuned_on(flags, heals):
    assert shortlists(from_flat({"ratio": 0.25} | flags)) is heals


def test_auto_is_no_trial_where_the_layers_are_on_disk_and_what_was_found_stays(tiny_model):
    flags = {"ratio": 0.25, "window": 128}
    whole, streamed = (resolve(str(tiny_model), from_flat(flags | {"stream": s}), "report") for s in ("off", "on"))
    assert (whole.shortlist, whole.shortlist_now) == (True, True)
    assert (streamed.shortlist, streamed.shortlist_now) == (True, False)
    assert not resolve(str(tiny_model), from_flat(flags), "search").shortlist


def test_what_is_left_of_a_cut_on_trial_is_what_healing_it_by_hand_leaves(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.layer_search.shortlist.CLOSE", 9.0)
    monkeypatch.setattr(heal, "FOLD_TOKENS", 1024 + 4 * 128)  # beside the calibration text 4 rows, as a run folds
    flags = [f"--data={texts[0]}", "--tokens=1024", "--window=128", "--ratio=0.25", f"--out={tmp_path}"]
    flags += ["--tune-tokens=4096", "--preserve=sums", "--learning-rate=3e-3", "--probe-share=0", "--effort=high"]
    assert main(["tune", str(tiny_model), *flags]) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    healed = [one for one in found["shortlist"] if "longer" in one]
    assert 1 < len(healed) <= HIGH.finalists
    least = min(healed, key=lambda one: one["longer"])
    assert found["segments"] == least["segments"] == healed[0]["segments"]
    assert json.loads((tmp_path / "cut.json").read_text())["segments"] == found["segments"]

    opened = loading.load(checkpoints.resolve(str(tiny_model)))
    text = {use: load_file(tmp_path / f"tokens-{use}.safetensors")[use] for use in ("calibration", "tuning", "heldout")}
    kept = {"rows": HIGH.short_tests, "window": 128, "capabilities": ["sums"], "first": 8}
    others = [probe_rows(opened.tokenizer, **kept)]
    heldout = text["heldout"]
    for times, name in ((1, "healed"), (LONGER, "longer")):
        student = cut(opened.model, [Segment(*bounds) for bounds in healed[-1]["segments"]])
        rows = text["tuning"][: times * 4096 // 128 // 16]
        fold_(student, opened.model, torch.cat([text["calibration"], rows[:4]]), heldout=heldout[:8])
        folded = copy.deepcopy(student)
        objective = KL(mix=DEFAULT_MIX)
        tune_(student, opened.model, rows, heldout=heldout[:8], learning_rate=3e-3, objective=objective)
        prices = [left_of(opened.model, each, heldout, others) for each in (student, folded)]
        assert healed[-1][name] == pytest.approx(sum(prices[0]), rel=1e-3)
        if times == 1:
            assert healed[-1]["text"] == pytest.approx(prices[0][0], rel=1e-3)
        assert abs(sum(prices[1]) / sum(prices[0]) - 1) > 2e-3, "tuning that does nothing would pass"


def test_where_longer_rows_are_tuned_on_half_of_what_judges_is_as_long():
    work = SimpleNamespace(
        config=CompressConfig(text=DataConfig(window=128), heal=HealConfig(tune_window=512)),
        tokenizer=folders.tokenizer(), held_out_text=tiny.some_tokens(4),
    )  # fmt: skip
    tests = probe_rows(work.tokenizer, rows=4, window=128, weight=0.5)
    text, long, short = trial.unseen_rows(work, tests)
    assert torch.equal(text.tokens, work.held_out_text)
    sizes = [(NORMAL.long_tests, 512), (NORMAL.short_tests, 128)]
    assert [tuple(each.tokens.shape) for each in (long, short)] == sizes
    assert long.probe_weight == short.probe_weight == 0.25, "both together count what was asked for"
    seen = {tuple(row) for row in tests.tokens.tolist()}
    assert not seen & {tuple(row) for row in short.tokens.tolist()}


def test_no_test_that_is_tuned_on_judges_a_cut_as_text(tiny_model, tmp_path):
    checkpoint, rows = checkpoints.resolve(str(tiny_model)), tiny.some_tokens(12)
    work = RunContext(checkpoint, CompressConfig(text=DataConfig(window=16)), Run(tmp_path))
    work.blocks = {"heldout": rows}
    of_text, all_tests = rows[[i for i in range(12) if i % 5 != 4]], rows
    for origins, judged in ((["web", "wiki", "web", "wiki", "probes"], of_text), (["probes"], all_tests)):
        work.text["heldout"] = SimpleNamespace(origins=origins)
        work.__dict__.pop("heldout_perplexity", None)
        assert torch.equal(trial.unseen_rows(work, None)[0].tokens, judged)
        assert torch.equal(trial.fold_prices(work, rows, None).judged.tokens, judged[: NORMAL.judged])


@pytest.fixture(scope="module")
def of_trial(tiny_model, texts):
    """The words of a run that has cuts on trial, but for its folder."""
    flags = ["tune", str(tiny_model), f"--data={texts[0]}", "--tokens=1024", "--window=128", "--ratio=0.25"]
    flags += ["--tune-tokens=4096", "--preserve=sums", "--learning-rate=3e-3", "--probe-share=0"]
    return flags


@pytest.fixture(scope="module")
def whole(of_trial, tmp_path_factory):
    """The folder of that run, which nothing disturbed."""
    run = tmp_path_factory.mktemp("whole")
    assert main([*of_trial, f"--out={run}"]) == 0
    return run


def test_a_cut_that_cannot_be_expressed_is_not_taken_and_ends_no_trial(whole, of_trial, tmp_path, monkeypatch, capsys):
    best = json.loads((whole / "search.json").read_text())["segments"]
    real, refused = surgery.cut, "these layers cannot be cut out"

    def cut_some(model, segments):
        if [[s.start, s.stop] for s in segments] == best:
            raise SurgeryError(refused, "take others")
        return real(model, segments)

    monkeypatch.setattr(surgery, "cut", cut_some)
    capsys.readouterr()
    assert main([*of_trial, f"--out={tmp_path / 'some'}"]) == 0
    assert capsys.readouterr().err.count(refused) == 1
    found = json.loads((tmp_path / "some" / "search.json").read_text())
    assert found["segments"] != best
    (one,) = [one for one in found["shortlist"] if one["segments"] == best]
    assert "text" not in one


def test_a_model_that_has_no_fold_has_no_quick_folds_and_candidates_are_healed_at_once(of_trial, tmp_path):
    model = families.tiny("xmod", vocab_size=folders.VOCABULARY, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    assert main(["tune", str(tmp_path / "model"), *of_trial[2:], f"--out={run}"]) == 0
    found, folds = (json.loads((run / f"{stage}.json").read_text()) for stage in ("search", "fold"))
    assert {one["folded"] for one in found["shortlist"]} == {None}
    assert sum("healed" in one for one in found["shortlist"]) > 1
    assert all(one["skipped"] and one["kl_before"] is one["kl_after"] is None for one in folds["fold"])
    assert not folds["changed"]


class Killed(Exception):
    pass


def test_a_trial_that_was_stopped_goes_on_with_the_next_cut(whole, of_trial, tmp_path, monkeypatch):
    of_whole = json.loads((whole / "search.json").read_text())
    lighter = json.loads((whole / "search-plain.json").read_text())["lighter"]
    assert lighter, "proposals in which tests count less"
    asked = {"search": 0, "folded": [], "healed": [], "lighter": []}
    search, folded, heal = layer_search.search, FoldPrices.__call__, trial.healed_for_a_while
    most = 1

    def counted_search(*args, **how):
        asked["search"] += 1
        return search(*args, **how)

    def counted_fold(self, cuts):
        asked["folded"].append(tuple(cuts))
        return folded(self, cuts)

    def killed_heal(this, cuts, tokens, times):
        if len(asked["healed"]) == most:
            raise Killed
        asked["healed"].append((tuple(cuts), times))
        return heal(this, cuts, tokens, times)

    def watched_trial(result, *args, **how):
        asked["lighter"].append([[[s.start, s.stop] for s in cuts] for cuts in result.lighter])
        return shortlist(result, *args, **how)

    monkeypatch.setattr(trial, "shortlist", watched_trial)
    monkeypatch.setattr(layer_search, "search", counted_search)
    monkeypatch.setattr(FoldPrices, "__call__", counted_fold)
    monkeypatch.setattr(trial, "healed_for_a_while", killed_heal)
    run = tmp_path / "killed"
    with pytest.raises(Killed):
        main([*of_trial, f"--out={run}"])
    assert (run / "search-tried-costs.json").is_file()
    assert not (run / "search.json").exists()
    most = 99
    assert main([*of_trial, f"--out={run}"]) == 0
    found = json.loads((run / "search.json").read_text())
    same = ("segments", "candidates", "by_number", "lighter", "shortlist")
    assert {name: found[name] for name in same} == {name: of_whole[name] for name in same}
    assert len(asked["healed"]) == len(set(asked["healed"])) > 1
    assert len(asked["folded"]) == len(set(asked["folded"])) == len(found["shortlist"])
    assert asked["search"] == 1
    assert asked["lighter"] == [lighter, lighter], "they go on trial, also of a search that an earlier command made"
    assert not (run / "search-tried-costs.json").exists()


def test_what_a_search_by_itself_found_is_where_a_trial_goes_on(tiny_model, texts, tmp_path, monkeypatch):
    flags = [str(tiny_model), f"--data={texts[0]}", "--tokens=1024", "--window=128", "--ratio=0.25", "--preserve=sums"]
    flags.append(f"--out={tmp_path}")
    assert main(["search", *flags]) == 0
    plain = json.loads((tmp_path / "search.json").read_text())
    assert not plain["shortlist"]
    monkeypatch.setattr(layer_search, "search", None)
    assert main(["tune", *flags, "--tune-tokens=4096", "--probe-share=0"]) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["shortlist"]
    assert plain["candidates"][0]["segments"] in [one["segments"] for one in found["shortlist"]]


class Folder(Run):
    """A run folder with a stage of some inputs, as far as costs need one."""

    def __init__(self, path, inputs):
        self.folder, self.hashes, self.took = path, {"search": inputs}, []

    def took_before(self, seconds):
        self.took.append(seconds)


def test_costs_of_other_inputs_or_damaged_ones_are_found_again(tmp_path):
    cuts, path = [Segment(1, 3), Segment(5, 6)], tmp_path / "search-costs.json"

    def asked(inputs, kind, price):
        return KnownCosts(Folder(tmp_path, inputs), "search")(kind, cuts, lambda: price)

    assert asked("a", "folded", math.inf) == math.inf
    assert asked("a", "folded", 2.0) == math.inf
    assert asked("a", "healed", 3.0) == 3.0
    KnownCosts(Folder(tmp_path, "b"), "search").forget_()
    assert asked("a", "healed", 9.0) == 3.0, "another's are not removed"
    assert asked("b", "folded", 4.0) == 4.0
    path.write_text("{")
    assert asked("b", "folded", 5.0) == 5.0
    KnownCosts(Folder(tmp_path, "b"), "search").forget_()
    assert not path.exists()


def test_seconds_that_a_price_took_before_count_once(tmp_path, monkeypatch):
    clock = iter([1.0, 8.0])
    monkeypatch.setattr("layercut.pipeline.run_folder.time.perf_counter", lambda: next(clock))
    first, later = Folder(tmp_path, "a"), Folder(tmp_path, "a")
    for folder in (first, later):
        known = KnownCosts(folder, "search")
        assert [known("folded", [Segment(1, 3)], lambda: 2.0) for _ in range(2)] == [2.0, 2.0]
    assert (first.took, later.took) == ([], [7.0])


@torch.no_grad()
def left_of(dense, student, rows, tests):
    """KL on rows of text and the mean damage to two sets of tests, per token of either."""

    def kl(tokens):
        p, q = (model(tokens).logits.float().log_softmax(-1) for model in (dense, student))
        return (p.exp() * (p - q)).sum(-1)

    damage = [(kl(each.tokens) * each.weights()).sum(-1).mean() for each in tests]
    return [float(kl(rows).mean()), float(sum(damage) / len(damage))]


def test_each_source_has_its_share_of_what_heals_a_cut_on_trial():
    """Of a mix the tests are one row in ten: the first rows, or every sixteenth, may hold none.

    One of two is short, the other long.
    """
    rows = torch.arange(64)[:, None]
    origins = ["text"] * 5 + ["probes"] + ["text"] * 4
    work = SimpleNamespace(blocks={"tuning": rows}, text={"tuning": SimpleNamespace(origins=origins)})
    taken = trial.some_of_each(work).tolist()
    assert [number for number in taken if origins[number % 10] == "probes"] == [5, 15]
    assert taken == [0, 1, 2, 5, 15], "in their order"


def test_what_is_left_of_several_models_takes_one_run_of_the_dense_one(monkeypatch):
    dense, tokens = DecoderRunner(tiny.llama()), tiny.some_tokens(rows=5, seed=1)
    students = [DecoderRunner(cut(dense.model, [Segment(*bounds)])) for bounds in ((2, 4), (5, 6))]
    ran = []
    monkeypatch.setattr(dense, "layer", lambda i, *rest: ran.append(i) or DecoderRunner.layer(dense, i, *rest))
    left_of = trial.Left(dense, [weighted_rows(tokens, None), weighted_rows(tokens[:2, :8], None)])
    found = [left_of(student) for student in students]
    for value, student in zip(found, students, strict=True):
        apart = [mean_kl(dense, student, rows) for rows in (tokens, tokens[:2, :8])]
        assert value == pytest.approx(apart, rel=1e-4)
    assert found[0] != found[1]
    ran.clear()
    assert left_of(students[0]) == found[0]
    assert not ran
