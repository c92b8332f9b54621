"""compare: every method on the same tokens, one artefact each, resumed one by one."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import folders
from layercut import evaluation
from layercut.cli.command_line import main
from layercut.config.commands import CompareConfig, MethodsConfig
from layercut.data.blocks import stored_blocks
from layercut.errors import SurgeryError
from layercut.healing.recipe import endpoints
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.losses import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.pipeline import compare as module
from layercut.pipeline.compare import MethodChoice
from layercut.pipeline.stages import search as search_stage
from layercut.pipeline.stages.heal import DEFAULT_MIX
from layercut.registries import criteria
from layercut.report import formatting
from layercut.segments import Segment
from layercut.surgery import cut_segment_

METHODS = ["fisher:all", *(name for name in criteria if name != "auto")]
RUNS_OWN = {"seconds", "versions", "config_hash", "files", "record", "content_hash"}
"""What the run folder adds to what a method found."""
FAIR = ["--tune-tokens=64"]


@pytest.fixture(scope="module")
def arguments(tiny_model, texts):
    text, heldout = texts
    return [
        "compare", str(tiny_model), "--ratio=0.25", f"--data={text}", f"--eval-data={heldout}",
        "--tokens=64", "--window=16", "--eval-tokens=64", "--eval-window=16", "--dtype=float32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A run with every method, tuned, and the price of every segment."""
    out = tmp_path_factory.mktemp("compare") / "run"
    assert main([*arguments, *FAIR, f"--out={out}"]) == 0
    return out


def test_every_method_is_measured_on_the_same_tokens(finished, tiny_model):
    comparison = json.loads((finished / "compare.json").read_text())
    assert [row["method"] for row in comparison["methods"]] == METHODS
    assert comparison["layers"] == {"before": 8, "after": 6}
    model = loading.load(checkpoints.resolve(str(tiny_model)), dtype="float32").model
    heldout = stored_blocks(finished, "evaluation")
    dense = evaluation.window_losses(model, heldout)
    assert comparison["dense"]["perplexity"] == pytest.approx(evaluation.of_losses(dense))
    best = {row["method"]: row for row in comparison["methods"]}["exhaustive"]
    for row in comparison["methods"]:
        segments = [Segment(*bounds) for bounds in row["segments"]]
        assert sum(map(len, segments)) == 2
        student = decoder_stack.share(model)
        cut_segment_(student, segments)
        losses = evaluation.window_losses(student, heldout)
        assert row["perplexity"]["cut"] == pytest.approx(evaluation.of_losses(losses), rel=1e-5)
        assert row["standard_error"]["cut"] == pytest.approx(evaluation.paired_error(losses, dense), rel=1e-4)
        known = {state for state, value in row["perplexity"].items() if value is not None}
        assert {state for state, error in row["standard_error"].items() if error is not None} == known
        assert "losses" not in row, "the windows' losses stay in the artefacts of the stages"
        assert (row["perplexity"]["folded"] is None) == all(fold["skipped"] for fold in row["fold"])
        assert len(segments) > 1 or row["kl"] >= best["kl"]
        found = json.loads((finished / f"compare-{row['method'].replace(':', '-')}.json").read_text())
        assert [row[key] for key in found.keys() - RUNS_OWN] == [found[key] for key in found.keys() - RUNS_OWN]


def test_every_cut_is_tuned_on_the_same_tokens(finished, tiny_model):
    comparison = json.loads((finished / "compare.json").read_text())
    assert comparison["tuning"]["tokens"] == 64
    blocks = {use: stored_blocks(finished, use) for use in ("calibration", "heldout", "tuning", "evaluation")}
    rows = {use: {tuple(row.tolist()) for row in blocks[use]} for use in blocks}
    assert not rows["tuning"] & rows["calibration"] | rows["tuning"] & rows["heldout"]
    model = loading.load(checkpoints.resolve(str(tiny_model)), dtype="float32").model
    apart = 0
    for row in comparison["methods"]:
        segments, tuning = [Segment(*bounds) for bounds in row["segments"]], row["tuning"]
        apart += len(segments) > 1
        assert tuning["tokens"] == 64
        assert tuning["trained_layers"] == endpoints(segments, 8)
        # the start is the fold where that helps on held-out rows, and else the bare cut
        student = decoder_stack.share(model)
        cut_segment_(student, segments)
        bare = (1 - DEFAULT_MIX) * mean_kl(DecoderRunner(model), DecoderRunner(student), blocks["heldout"])
        bare += DEFAULT_MIX * math.log(evaluation.perplexity(student, blocks["heldout"]))
        state = json.loads((finished / f"{module.stem(segments)}-tuned.json").read_text())
        start = tuning["heldout"][0]["loss"]
        assert start <= bare * (1 + 1e-5)
        assert state["from_fold"] or start == pytest.approx(bare, rel=1e-5)
        # what else is measured of the tuned state is measured of these weights
        decoder_stack.replace_parameters_(student, load_file(finished / f"{module.stem(segments)}-tuned.safetensors"))
        assert evaluation.perplexity(student, blocks["evaluation"]) == pytest.approx(row["perplexity"]["tuned"])
        if tuning["best_step"] == 0:
            began = "folded" if state["from_fold"] else "cut"
            assert row["perplexity"]["tuned"] == pytest.approx(row["perplexity"][began], rel=1e-5)
        else:
            assert row["perplexity"]["tuned"] not in (row["perplexity"]["cut"], row["perplexity"]["folded"])
    assert apart, "no method chose layers apart from each other"


def test_the_control_is_the_dense_model_trained_alike(arguments, tiny_model, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--methods=2:4", "--states=tuned,control", f"--out={out}"]
    assert main([*arguments, *FAIR, *flags]) == 0
    assert "control" in capsys.readouterr().out
    (row,) = json.loads((out / "compare.json").read_text())["methods"]
    model = loading.load(checkpoints.resolve(str(tiny_model)), dtype="float32").model
    heldout = evaluation.perplexity(model, stored_blocks(out, "heldout"))
    # the dense model stands where the training begins: no KL, and its own next-token loss
    assert row["control"]["heldout"][0]["loss"] == pytest.approx(DEFAULT_MIX * math.log(heldout), rel=1e-5)
    assert row["tuning"]["trained_layers"] == [1, 2]
    assert row["control"]["trained_layers"] == [1, 4]
    assert row["control"]["tokens"] == row["tuning"]["tokens"]
    weights = load_file(out / "compare-at-2.4-control.safetensors")
    assert {name.split(".")[2] for name in weights} == {"1", "4"}
    student = decoder_stack.share(model)
    decoder_stack.replace_parameters_(student, weights)
    measured = evaluation.perplexity(student, stored_blocks(out, "evaluation"))
    assert row["perplexity"]["control"] == pytest.approx(measured, rel=1e-6)
    assert row["standard_error"]["control"] is not None


def test_of_a_mix_each_text_has_its_perplexity():
    facts = SimpleNamespace(source="one.txt+two.txt", origins=["file 1", "file 2"])
    work = SimpleNamespace(text={"evaluation": facts})
    assert module.by_text(work, [1.0, 3.0, 2.0, 3.0]) == {
        "one.txt": pytest.approx(math.exp(1.5)), "two.txt": pytest.approx(math.exp(3.0)),
    }  # fmt: skip
    facts.source, facts.origins = "one.txt", ["file 1"]
    assert module.by_text(work, [1.0, 3.0]) == {}


def test_every_method_is_on_the_page_and_in_the_terminal(arguments, finished, texts, capsys):
    assert main([*arguments, *FAIR, f"--out={finished}"]) == 0
    shown = capsys.readouterr().out
    assert [method for method in METHODS if method not in shown] == []
    page = finished / "compare.html"
    html = page.read_text(encoding="utf-8")
    comparison = json.loads((finished / "compare.json").read_text())
    for row in comparison["methods"]:
        assert f'<th scope="row">{row["method"]}</th>' in html
        value, error = row["perplexity"]["tuned"], row["standard_error"]["tuned"]
        assert f"<td>{formatting.figure(value)}</td><td>{formatting.deviation(value * error)}</td>" in html
    assert "<svg" in html
    assert str(texts[0].parent) not in html, "texts by their names alone"
    assert texts[1].name in html
    page.unlink()
    assert main(["report", str(finished)]) == 0
    assert page.read_text(encoding="utf-8") == html


def test_the_same_cut_is_measured_and_tuned_once(arguments, tmp_path, monkeypatch):
    tuned, train = [], module.trained
    monkeypatch.setattr(module, "trained", lambda work, student, *a: tuned.append(a[0]) or train(work, student, *a))
    same = MethodChoice(
        method="", segments=[Segment(2, 3), Segment(5, 6)], kl=1.0, search_seconds=0.0, layer_forwards=0,
        layer_backwards=0, dense_tokens=0,
    )  # fmt: skip
    monkeypatch.setattr(module, "search_by", lambda work, asked, method, length: replace(same, method=method))
    run = tmp_path / "run"
    command = [*arguments, f"--out={run}", "--methods=sleb,evolution"]
    assert main([*command, "--tune-tokens=32"]) == 0
    assert tuned == [[Segment(2, 3), Segment(5, 6)]]
    sleb, evolution = json.loads((run / "compare.json").read_text())["methods"]
    assert sleb | {"method": ""} == evolution | {"method": ""}
    assert main([*command, "--tune-tokens=48"]) == 2, "a finished comparison is not replaced"


def test_methods_resume_one_by_one(arguments, tmp_path, monkeypatch):
    tried = []
    real = module.layer_search.search

    def recorded(*args, method, **how):
        if method == stop_at:
            raise KeyboardInterrupt
        tried.append(method)
        return real(*args, method=method, **how)

    monkeypatch.setattr(module.layer_search, "search", recorded)
    out = f"--out={tmp_path / 'run'}"
    stop_at = "cosine"
    assert main([*arguments, out, "--methods=random,cosine,angular"]) == 130
    assert tried == ["random"]
    stop_at = None
    assert main([*arguments, out, "--methods=random,cosine,angular"]) == 0
    assert tried == ["random", "cosine", "angular"]
    # one more, and in another order: the others stay
    assert main([*arguments, out, "--methods=angular, reverse-order,random"]) == 0
    assert tried == ["random", "cosine", "angular", "reverse-order"]


def test_methods_that_take_probes_search_again_by_probes_of_another_edition(arguments, tmp_path, monkeypatch):
    tried, real = [], module.layer_search.search
    monkeypatch.setattr(module.layer_search, "search", lambda *args, **how: tried.append(how) or real(*args, **how))
    command = [*arguments, f"--out={tmp_path / 'run'}", "--methods=random,fisher:all"]
    for edition, searched in ((0, 2), (0, 2), (1, 3)):
        monkeypatch.setattr(search_stage, "EDITION", edition)
        if edition:
            assert main(command) == 2, "what is finished is not replaced"
            (tmp_path / "run" / "compare-fisher-all.json").unlink()
        assert main(command) == 0
        assert len(tried) == searched, "fisher:all alone sees tests"


def test_a_finished_comparison_is_not_replaced_by_edits_in_place(tiny_model, texts, tmp_path, capsys):
    """Nor where more methods are asked for: those that there are would be of another text."""
    data, run, more = shutil.copy(texts[0], tmp_path / "data.txt"), tmp_path / "run", ",block-influence"
    command = ["compare", str(tiny_model), "--ratio=0.25", f"--data={data}", f"--eval-data={texts[1]}", f"--out={run}"]
    command += ["--tokens=64", "--window=16", "--eval-tokens=64", "--tune-tokens=0"]
    methods = "--methods=reverse-order,random"
    assert main([*command, methods]) == 0
    sound, names = Path(data).read_bytes(), ["compare.json", "config.yaml", "env.json", "text-calibration.json"]
    before = {name: (run / name).read_bytes() for name in names}
    Path(data).write_bytes(sound[::-1])
    assert main([*command, methods + more]) == 2
    assert "--force" in capsys.readouterr().err.partition("hint:")[2]
    assert {name: (run / name).read_bytes() for name in names} == before
    Path(data).write_bytes(sound)
    assert main([*command, methods + more]) == 0


def test_a_pick_that_cannot_be_cut_is_told_and_the_others_go_on(arguments, tmp_path, monkeypatch, capsys):
    as_it_was = module.cut

    def refuse(model, segments):
        if segments == [Segment(5, 7)]:
            raise SurgeryError("layers 5 and 6 must stay", "")
        return as_it_was(model, segments)

    monkeypatch.setattr(module, "cut", refuse)
    assert main([*arguments, f"--out={tmp_path / 'run'}", "--methods=reverse-order,random", "--tune-tokens=32"]) == 0
    refused, other = json.loads((tmp_path / "run" / "compare.json").read_text())["methods"]
    assert refused["refused"] == "layers 5 and 6 must stay"
    assert refused["perplexity"] == {"cut": None, "folded": None, "tuned": None}
    assert other["refused"] is None
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--methods=fisher,magic", "'magic'"), ("--methods=,", "no method"),
        ("--methods=cosine:recall", "goes by text alone"), ("--methods=fisher:music", "'music'"),
        ("--states=cut,healed", "'healed'"), ("--states=,", "names none"), ("--states=tuned", "give --tune-tokens"),
        ("--methods=fisher,2:5", "2:5 removes 3 layers"), ("--ratio=1.5", "not between 0 and 1"), ("", "no --ratio"),
        ("--eval-tokens=1", "too small"), ("--tune-tokens=-1", "too small"), ("--place=disk", "has to be in memory"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused(arguments, tmp_path, capsys, flags, words):
    kept = [a for a in arguments if a.partition("=")[0] != (flags.partition("=")[0] or "--ratio")]
    assert main([*kept, *flags.split(), f"--out={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_what_each_cut_still_does_is_measured_in_every_state_and_resumed(arguments, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")
    (tmp_path / "tasks").mkdir()
    tasks = folders.write_tasks(tmp_path / "tasks")
    out = tmp_path / "run"
    command = [*arguments, f"--out={out}", "--methods=2:4,3:5,cosine", "--tune-tokens=32", "--tasks=tiny_choices"]
    command += [f"--include-path={tasks}", "--limit=9", "--probes", "--states=cut,tuned"]
    scored, real = [], evaluation.score_tasks
    monkeypatch.setattr(evaluation, "generation_health", lambda *_: {"compressed": {"repeated_4grams": 0.25}})

    def score(*args, name, **how):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(name)
        return real(*args, name=name, **how)

    monkeypatch.setattr(evaluation, "score_tasks", score)
    assert main(command) == 130
    assert scored[0] == "dense"
    monkeypatch.setattr(evaluation, "score_tasks", lambda *a, **how: scored.append(how["name"]) or real(*a, **how))
    capsys.readouterr()
    assert main(command) == 0
    assert len(scored) == len(set(scored)), "nothing is scored twice, also where two methods remove the same"
    found = json.loads((out / "compare.json").read_text())
    asked = {"metric": "acc_norm", "items": 9, "chance": pytest.approx(13 / 36), "share": True}
    assert found["tasks"]["tiny_choices"] == asked
    for row in found["methods"]:
        assert list(row["judged"]) == ["cut", "tuned"]
        for judged in row["judged"].values():
            dense = found["judged_dense"]["scores"]["tiny_choices"]
            assert judged["retained"]["mean"] == pytest.approx(judged["scores"]["tiny_choices"] / dense)
            assert (judged["retained"]["behind"] is None) == (row["method"] == "2:4")
            assert judged["health"] == {"compressed": {"repeated_4grams": 0.25}}
    shown, told = capsys.readouterr()
    assert "no prompt of keys fits 128 tokens" in told
    assert "0 of 0" not in told
    assert "What each cut still does" in shown
    assert "tuned" in shown
    page = (out / "compare.html").read_text()
    assert "25.0%" in page.partition('id="survives"')[2].partition("</section>")[0]

    files = {file: file.stat().st_mtime_ns for file in (out / "tasks").iterdir()}
    assert main([part.replace("tiny_choices", "tiny_choices,tiny_sums") for part in command]) == 0, "no --force"
    assert list(json.loads((out / "compare.json").read_text())["tasks"]) == ["tiny_choices", "tiny_sums"]
    assert files.items() <= {file: file.stat().st_mtime_ns for file in (out / "tasks").iterdir()}.items(), "kept"


def test_every_method_is_healed_on_the_shares_that_are_given():
    heal = CompareConfig(compare=MethodsConfig(ratio=0.2, probe_share=0.2, chat_share=0.3)).journey().heal
    assert (heal.probe_share, heal.chat_share) == (0.2, 0.3)
