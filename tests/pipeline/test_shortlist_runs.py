"""The shortlist in a run: what healing leaves of a candidate, on which rows, and how a stopped one goes on."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import families
import folders
import tiny
from layercut import layer_search, surgery
from layercut.cli.command_line import main
from layercut.config import DataConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig
from layercut.data.blocks import fingerprint
from layercut.data.probes import probe_rows
from layercut.errors import SurgeryError
from layercut.healing import fold_, tune_
from layercut.healing.quick_fold import FoldCosts
from layercut.layer_search.shortlist import EFFORTS, LONGER, shortlist
from layercut.layer_search.weighted_rows import weighted_rows
from layercut.models import checkpoints, loading
from layercut.models.losses import KL, mean_kl
from layercut.models.runner import DecoderRunner
from layercut.pipeline import resolve_options
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import KnownCosts, Run
from layercut.pipeline.stages import heal, shortlisting
from layercut.pipeline.stages.heal import DEFAULT_MIX
from layercut.progress import progress_to
from layercut.report.formatting import layer_names
from layercut.segments import Segment
from layercut.surgery import cut

HIGH = EFFORTS["high"]
SEARCH = ["--tokens=1024", "--window=128", "--ratio=0.25", "--preserve=sums"]
TUNE = ["--tune-tokens=4096", "--learning-rate=3e-3", "--probe-share=0"]


@pytest.fixture(autouse=True, scope="module")
def candidates_are_healed_with_few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve_options, "ENOUGH_TOKENS", 4096)
        yield


def read(run, stage="search"):
    return json.loads((run / f"{stage}.json").read_text())


def test_it_depends_on_what_its_healing_depends_on():
    def inputs_of(shortlist=True, **heal):
        kept = {"text": {"heldout": "held", "tuning": "tuned"}, "held_out_text": tiny.some_tokens(2)}
        return shortlisting.inputs(
            SimpleNamespace(shortlist=shortlist, config=SimpleNamespace(heal=HealConfig(**heal)), **kept)
        )

    assert inputs_of(shortlist=False) == []
    assert {"tuned", "held", fingerprint(tiny.some_tokens(2))} <= {x for x in inputs_of() if isinstance(x, str)}
    assert inputs_of() != inputs_of(learning_rate=1e-3)


# --- the cost of a healed candidate ---


@torch.no_grad()
def healed_costs(dense, student, rows, tests):
    """KL on rows of text, and the mean of two sets of probes."""

    def kl(tokens):
        p, q = (model(tokens).logits.float().log_softmax(-1) for model in (dense, student))
        return (p.exp() * (p - q)).sum(-1)

    cost = [(kl(each.tokens) * each.weights()).sum(-1).mean() for each in tests]
    return [float(kl(rows).mean()), float(sum(cost) / len(cost))]


def test_what_is_left_is_what_healing_it_by_hand_leaves(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.layer_search.shortlist.CLOSE", 9.0)
    monkeypatch.setattr(heal, "FOLD_TOKENS", 1024 + 4 * 128)  # beside the calibration text 4 rows, as a run folds
    flags = [*SEARCH, *TUNE, "--effort=high", f"--data={texts[0]}", f"--out={tmp_path}"]
    assert main(["tune", str(tiny_model), *flags]) == 0
    found = read(tmp_path)
    healed = [one for one in found["shortlist"] if "longer" in one]
    assert 1 < len(healed) <= HIGH.finalists
    least = min(healed, key=lambda one: one["longer"])
    assert found["segments"] == least["segments"] == healed[0]["segments"] == read(tmp_path, "cut")["segments"]

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
        costs = [healed_costs(opened.model, each, heldout, others) for each in (student, folded)]
        assert healed[-1][name] == pytest.approx(sum(costs[0]), rel=1e-3)
        if times == 1:
            assert healed[-1]["text"] == pytest.approx(costs[0][0], rel=1e-3)
        assert abs(sum(costs[1]) / sum(costs[0]) - 1) > 2e-3, "tuning that does nothing would pass"


def test_what_is_healed_costs_several_models_takes_one_run_of_the_dense_one(monkeypatch):
    dense, tokens = DecoderRunner(tiny.llama()), tiny.some_tokens(rows=5, seed=1)
    students = [DecoderRunner(cut(dense.model, [Segment(*bounds)])) for bounds in ((2, 4), (5, 6))]
    ran = []
    monkeypatch.setattr(dense, "layer", lambda i, *rest: ran.append(i) or DecoderRunner.layer(dense, i, *rest))
    healed_costs = shortlisting.HealedCosts(dense, [weighted_rows(tokens, None), weighted_rows(tokens[:2, :8], None)])
    found = [healed_costs(student) for student in students]
    for value, student in zip(found, students, strict=True):
        apart = [mean_kl(dense, student, rows) for rows in (tokens, tokens[:2, :8])]
        assert value == pytest.approx(apart, rel=1e-4)
    assert found[0] != found[1]
    ran.clear()
    assert healed_costs(students[0]) == found[0]
    assert not ran


# --- the rows ---


def test_where_longer_rows_are_tuned_on_half_of_what_judges_is_as_long():
    work = SimpleNamespace(
        config=CompressConfig(text=DataConfig(window=128), heal=HealConfig(tune_window=512),
            search=SearchConfig(effort="high")),
        tokenizer=folders.tokenizer(), held_out_text=tiny.some_tokens(4),
    )  # fmt: skip
    tests = probe_rows(work.tokenizer, rows=4, window=128, weight=0.5)
    text, long, short = shortlisting.unseen_rows(work, tests)
    assert torch.equal(text.tokens, work.held_out_text)
    sizes = [(HIGH.long_tests, 512), (HIGH.short_tests, 128)]
    assert [tuple(each.tokens.shape) for each in (long, short)] == sizes
    assert long.probe_weight == short.probe_weight == 0.25, "both together count what was asked for"
    seen = {tuple(row) for row in tests.tokens.tolist()}
    assert not seen & {tuple(row) for row in short.tokens.tolist()}


def test_no_probe_that_is_tuned_on_judges_a_cut_as_text(tiny_model, tmp_path):
    checkpoint, rows = checkpoints.resolve(str(tiny_model)), tiny.some_tokens(12)
    work = RunContext(
        checkpoint, CompressConfig(text=DataConfig(window=16), search=SearchConfig(effort="high")), Run(tmp_path)
    )
    work.blocks = {"heldout": rows}
    of_text, all_tests = rows[[i for i in range(12) if i % 5 != 4]], rows
    for origins, judged in ((["web", "wiki", "web", "wiki", "probes"], of_text), (["probes"], all_tests)):
        work.text["heldout"] = SimpleNamespace(origins=origins)
        work.__dict__.pop("heldout_perplexity", None)
        assert torch.equal(shortlisting.unseen_rows(work, None)[0].tokens, judged)
        assert torch.equal(shortlisting.fold_costs(work, rows, None).judged.tokens, judged[: HIGH.judged])


def test_each_source_has_its_share_of_what_heals_a_candidate():
    """Of a mix the probes are one row in ten: the first rows, or every sixteenth, may hold none."""
    rows = torch.arange(64)[:, None]
    origins = ["text"] * 5 + ["probes"] + ["text"] * 4
    work = SimpleNamespace(blocks={"tuning": rows}, text={"tuning": SimpleNamespace(origins=origins)})
    assert shortlisting.some_of_each(work).tolist() == [0, 1, 2, 5, 15], "of probes a short and a long one"


# --- runs that go on ---


def test_with_a_normal_effort_the_quick_fold_decides(tiny_model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(shortlisting, "healed_for_a_while", None)
    told = []
    with progress_to(lambda *step: told.append(step)):
        assert main(["tune", str(tiny_model), *SEARCH, *TUNE, f"--data={texts[0]}", f"--out={tmp_path}"]) == 0
    found = read(tmp_path)
    last = [words for name, _, _, words in told if name == "measuring cuts after a quick fold"][-1]
    assert last.startswith(f"best of {len(found['shortlist'])}: without layers {layer_names(found['segments'])}, ")
    least = min(found["shortlist"], key=lambda one: one["folded"])
    assert found["segments"] == least["segments"]
    assert len({one["folded"] for one in found["shortlist"]}) > 3


@pytest.fixture(scope="module")
def flags(texts):
    return [*SEARCH, *TUNE, "--effort=high", f"--data={texts[0]}"]


@pytest.fixture(scope="module")
def whole(tiny_model, texts, flags, tmp_path_factory):
    """The folder of a run that nothing disturbed, which went on from a search by itself."""
    run = tmp_path_factory.mktemp("whole")
    assert main(["search", str(tiny_model), *SEARCH, "--effort=high", f"--data={texts[0]}", f"--out={run}"]) == 0
    plain = read(run)
    assert not plain["shortlist"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_search, "search", None)
        assert main(["tune", str(tiny_model), *flags, f"--out={run}"]) == 0
    assert plain["candidates"][0]["segments"] in [one["segments"] for one in read(run)["shortlist"]]
    return run


def test_a_cut_that_cannot_be_expressed_is_not_taken_and_ends_no_run(
    whole, tiny_model, flags, tmp_path, monkeypatch, capsys
):
    best = read(whole)["segments"]
    real, refused = surgery.cut, "these layers cannot be cut out"

    def cut_some(model, segments):
        if [[s.start, s.stop] for s in segments] == best:
            raise SurgeryError(refused, "take others")
        return real(model, segments)

    monkeypatch.setattr(surgery, "cut", cut_some)
    assert main(["tune", str(tiny_model), *flags, f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().err.count(refused) == 1
    found = read(tmp_path)
    assert found["segments"] != best
    (one,) = [one for one in found["shortlist"] if one["segments"] == best]
    assert "text" not in one


def test_of_a_model_that_has_no_fold_candidates_are_healed_at_once(flags, tmp_path):
    model = families.tiny("xmod", vocab_size=folders.VOCABULARY, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    folders.tokenizer().save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    assert main(["tune", str(tmp_path / "model"), *flags, f"--out={run}"]) == 0
    found, folds = read(run), read(run, "fold")
    assert {one["folded"] for one in found["shortlist"]} == {None}
    assert sum("healed" in one for one in found["shortlist"]) > 1
    assert all(one["skipped"] and one["kl_before"] is one["kl_after"] is None for one in folds["fold"])
    assert not folds["changed"]


class Killed(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_with_the_next_cut(whole, tiny_model, flags, tmp_path, monkeypatch):
    lighter = read(whole, "search-plain")["lighter"]
    assert lighter, "proposals in which probes count less"
    searched, folded, healed, given = [], [], [], []
    search, fold, heal, most = layer_search.search, FoldCosts.__call__, shortlisting.healed_for_a_while, 1

    def killed_heal(this, cuts, tokens, times):
        if len(healed) == most:
            raise Killed
        healed.append((tuple(cuts), times))
        return heal(this, cuts, tokens, times)

    def watched(result, *args, **how):
        given.append([[[s.start, s.stop] for s in cuts] for cuts in result.lighter])
        return shortlist(result, *args, **how)

    monkeypatch.setattr(shortlisting, "shortlist", watched)
    monkeypatch.setattr(layer_search, "search", lambda *args, **how: searched.append(1) or search(*args, **how))
    monkeypatch.setattr(FoldCosts, "__call__", lambda self, cuts: folded.append(tuple(cuts)) or fold(self, cuts))
    monkeypatch.setattr(shortlisting, "healed_for_a_while", killed_heal)
    argv = ["tune", str(tiny_model), *flags, f"--out={tmp_path}"]
    with pytest.raises(Killed):
        main(argv)
    assert (tmp_path / "search-shortlist-costs.json").is_file()
    assert not (tmp_path / "search.json").exists()
    most = 99
    assert main(argv) == 0
    found, of_whole = read(tmp_path), read(whole)
    same = ("segments", "candidates", "by_number", "lighter", "shortlist")
    assert {name: found[name] for name in same} == {name: of_whole[name] for name in same}
    assert len(healed) == len(set(healed)) > 1
    assert len(folded) == len(set(folded)) == len(found["shortlist"])
    assert searched == [1]
    assert given == [lighter, lighter], "also of a search that an earlier command made"
    assert not (tmp_path / "search-shortlist-costs.json").exists()


class Folder(Run):
    """A run folder with a stage of some inputs, as far as costs need one."""

    def __init__(self, path, inputs):
        self.folder, self.hashes, self.took = path, {"search": inputs}, []

    def took_before(self, seconds):
        self.took.append(seconds)


def test_costs_of_other_inputs_or_damaged_ones_are_found_again(tmp_path):
    cuts, path = [Segment(1, 3), Segment(5, 6)], tmp_path / "search-costs.json"

    def asked(inputs, kind, cost):
        return KnownCosts(Folder(tmp_path, inputs), "search")(kind, cuts, lambda: cost)

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


def test_seconds_that_a_cost_took_before_count_once(tmp_path, monkeypatch):
    clock = iter([1.0, 8.0])
    monkeypatch.setattr("layercut.pipeline.run_folder.time.perf_counter", lambda: next(clock))
    first, later = Folder(tmp_path, "a"), Folder(tmp_path, "a")
    for folder in (first, later):
        known = KnownCosts(folder, "search")
        assert [known("folded", [Segment(1, 3)], lambda: 2.0) for _ in range(2)] == [2.0, 2.0]
    assert (first.took, later.took) == ([], [7.0])
