"""The shortlist: costs after a quick fold propose and move on, and what healing leaves decides."""

from dataclasses import replace

import pytest

import tiny
from layercut.config.commands import from_flat
from layercut.layer_search import Candidate, Cost, Restriction, SearchResult
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.shortlist import CLOSE, EFFORTS, GAIN, LONGER, after_healing, differing, shortlist
from layercut.models.runner import DecoderRunner
from layercut.pipeline import resolve_options
from layercut.pipeline.resolve_options import resolve, shortlists
from layercut.segments import Segment

HIGH = EFFORTS["high"]
APART = [(Segment(i, i + 2),) for i in range(0, 20, 2)]


def cuts(words):
    return tuple(map(Segment.parse, words.split("+")))


def shortlisted(found, cost, *, limits=None, count=1, **more):
    """From a search that found these, the best first, by costs after the fold; by_text and lighter are the search's."""
    of_search = {name: more.pop(name) for name in ("by_text", "lighter") if name in more}
    result = SearchResult("fisher", [Candidate(cuts(one), float(i)) for i, one in enumerate(found)], Cost())
    plain = CutCosts(DecoderRunner(tiny.llama()), tiny.some_tokens(rows=2), Cost())
    return shortlist(replace(result, **of_search), plain, cost, limits or Restriction.none(8, 2), count, **more)


def test_the_cost_after_the_fold_decides_and_leads_to_moves_that_the_search_had_not():
    # the further from 5 the layers are, the dearer: 1:3 is the search's best, and 4:6 only moves lead to
    asked = []

    def cost(cuts):
        asked.append(cuts)
        return 1.0 + sum(abs(i - 4.5) for segment in cuts for i in range(segment.start, segment.stop))

    found = shortlisted(["1:3", "0:2"], cost)
    assert len(asked) == len(set(asked)), "none is folded twice"
    assert found.segments == [Segment(4, 6)]
    assert found.candidates[0].score == cost(cuts("4:6"))
    assert found.candidates[0].kl > 0, "its cost as a plain cut, on all rows, is there too"
    assert {c.segments for c in found.candidates[1:]} == {cuts("1:3"), cuts("0:2")}


def test_chance_is_no_gain_and_proposals_in_which_probes_count_less_are_folded_too():
    assert shortlisted(["1:3"], lambda cut: 1.0 - 0.9 * GAIN * (cut == cuts("2:4"))).segments == [Segment(1, 3)]
    found = shortlisted(["1:3"], lambda cut: {"5:7": 0.1, "1:3": 0.5}.get(str(cut[0]), 1.0), lighter=[cuts("5:7")])
    assert found.segments == [Segment(5, 7)]
    assert found.candidates[0].kl > 0


def test_moves_stay_within_what_is_allowed_and_within_the_number_of_segments():
    def asked(limits):
        found = []
        shortlisted(["1:4"], lambda cuts: found.append(cuts) or 1.0 / len(found), limits=limits, count=2)
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
    found = ["1:3", "2:4", "3:5", "4:6", "5:7", "6:8"]
    fold = {cuts(one): 1.0 + i for i, one in enumerate(found)}
    asked = []

    def healed(cuts, times):
        asked.append((str(cuts[0]), times))
        return 20 - fold[cuts] if times == 1 else {6.0: 12.1, 5.0: 12.0, 4.0: 12.2}[fold[cuts]]

    def folded(cuts):
        return fold.get(cuts, 9.0)

    result = shortlisted(found, folded, healed=healed)
    assert asked[:3] == [("1:3", 1), ("3:5", 1), ("5:7", 1)], "two layers are others"
    assert asked[3:6] == [("4:6", 1), ("6:8", 1), ("2:4", 1)], "the variants of 5:7, and of 3:5, of which 17 are left"
    assert asked[6:] == [("6:8", LONGER), ("5:7", LONGER), ("4:6", LONGER)], "14, 15 and 16; the next has 17"
    assert result.segments == [Segment(5, 7)], "of which least is left, though 4:6 falls by more"
    first = result.shortlist[0]
    assert (result.candidates[0].score, first.folded, first.healed, first.longer) == (5.0, 5.0, 15.0, 12.0)
    assert [one.healed for one in result.shortlist[:7]] == [15.0, 14.0, 16.0, 17.0, 18.0, 19.0, None]
    assert [one.longer for one in result.shortlist[:4]] == [12.0, 12.1, 12.2, None]
    assert shortlisted(found, folded).segments == [Segment(1, 3)], "without healing the fold decides"
    assert shortlisted(found, folded, healed=healed, effort=EFFORTS["normal"]).segments == [Segment(1, 3)]


@pytest.mark.parametrize(("left", "taken"), [(5.0, False), (0.5, True), (None, False)])
def test_what_the_text_alone_would_take_is_healed_as_well_whatever_it_promises(left, taken):
    of_text, asked = cuts("0:2"), {}
    more = {} if left is None else {"by_text": Candidate(of_text, 0.1)}
    found = shortlisted(
        ["4:6"], lambda cuts: 1.0 + 8 * (cuts == of_text), **more,
        healed=lambda cuts, times: asked.setdefault(cuts, left if cuts == of_text else 1.0),
    )  # fmt: skip
    assert asked.get(of_text) == left, "by the fold it is far behind"
    assert (found.segments == [*of_text]) == taken
    assert found.candidates[0].kl == 0.1 or not taken


def test_how_many_are_healed_and_where_none_is_close_to_the_best_none_longer():
    asked = []

    def healed(_, times):
        asked.append(times)
        return 1.0 + CLOSE + 0.01 if len(asked) > 1 else 1.0

    assert after_healing(APART[:4], healed, HIGH) == ({cut: 1.0 if cut == APART[0] else 1.16 for cut in APART[:4]}, {})
    assert asked == [1, 1, 1, 1]
    alone, beside = (after_healing(APART, lambda *_: 1.0, HIGH, by_text)[0] for by_text in ([], [APART[-1]]))
    assert {*beside} - {*alone} == {APART[-1]}
    assert differing(APART, HIGH.healed) == APART[: HIGH.healed]
    assert differing([APART[0], APART[0]], HIGH.healed) == [APART[0]]
    single = [(Segment(i, i + 1),) for i in range(3)]
    assert differing(single, HIGH.healed) == single, "of one layer all differ"


@pytest.mark.parametrize(("left", "tried_too"), [(1.01, True), (1.2, False)])
def test_variants_of_a_cut_close_behind_the_best_are_healed_as_well(left, tried_too):
    """Of SmolLM2-135M 5:8 and 12:15 heals a little faster at first than 3:6 and 13:16, whose variant heals furthest."""
    best, second, far, variant = map(cuts, ("5:8+12:15", "3:6+13:16", "3:7+25:27", "4:6+12:16"))
    short, longer = after_healing(
        [second, variant, best, far], lambda cuts, _: {best: 0.99, second: left, far: 1.5}.get(cuts, 1.07), HIGH
    )
    assert (variant in short) == (variant in longer) == tried_too
    assert far not in longer


@pytest.mark.parametrize(
    ("flags", "heals"),
    [
        ({}, True), ({"tune_tokens": 4095}, False), ({"fold": False}, False), ({"effort": "low"}, False),
        ({"preserve": "none"}, False), ({"method": "cosine"}, False), ({"ratio": None, "segment": ("1:2",)}, False),
        ({"ratio": None, "max_loss": 0.1}, False),
    ],
)  # fmt: skip
def test_there_is_one_where_probes_are_weighed_and_enough_is_tuned_on(flags, heals, monkeypatch):
    monkeypatch.setattr(resolve_options, "ENOUGH_TOKENS", 4096)
    assert shortlists(from_flat({"ratio": 0.25} | flags)) is heals


def test_there_is_none_where_the_layers_are_on_disk_and_what_was_found_stays(tiny_model):
    flags = {"ratio": 0.25, "window": 128}
    whole, streamed = (resolve(str(tiny_model), from_flat(flags | {"place": p}), "report") for p in ("memory", "disk"))
    assert (whole.shortlist, whole.shortlist_now) == (True, True)
    assert (streamed.shortlist, streamed.shortlist_now) == (True, False)
    assert not resolve(str(tiny_model), from_flat(flags), "search").shortlist
