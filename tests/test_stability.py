"""Stability: the same search from other seeds, its choices priced exactly on rows that all their texts gave to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quick
import tiny
from folders import write_text
from layercut.cli.command_line import main
from layercut.layer_search.stability import common_rows, judge, stability_work
from layercut.models import loading
from layercut.models.losses import kl_divergence
from layercut.models.runner import DecoderRunner
from layercut.pipeline import stages
from layercut.report.verdicts import stability_words
from layercut.segments import Segment
from layercut.surgery import cut_segment_


def real_kl(model, cuts, tokens):
    student = loading.share(model)
    cut_segment_(student, cuts)
    with torch.no_grad():
        dense, cut = (m(input_ids=tokens, use_cache=False).logits for m in (model, student))
    return kl_divergence(dense, cut).mean().item()


def test_every_seed_and_every_part_gives_the_same_number_of_rows():
    texts = [torch.arange(12)[:, None] + 100 * seed for seed in range(3)]
    assert [rows.flatten().tolist() for rows in common_rows(texts, [0])] == [
        [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]
    ]
    even, odd = common_rows(texts, [0, 1])
    assert even.flatten().tolist() == [0, 2, 100, 102, 200, 202]
    assert odd.flatten().tolist() == [1, 3, 101, 103, 201, 203]
    assert [len(rows) for rows in common_rows([text[:1] for text in texts], [0, 1])] == [3, 0]


def test_choices_are_judged_by_the_real_cuts_on_the_common_set():
    model = tiny.llama()
    tiny.make_identity_(model, range(4, 5))
    stack = DecoderRunner(model)
    blocks = {"web": tiny.some_tokens(4), "wiki": tiny.some_tokens(2, seed=1)}
    first, apart = (Segment(3, 5),), (Segment(2, 3), Segment(4, 5))
    steps = []
    found = judge(stack, blocks, [first, apart, first], 2, advance=steps.append)
    assert sum(steps) == found.layer_forwards == stability_work([first, apart], 2, 8, 6)
    everything = torch.cat(list(blocks.values()))
    prices = {cuts: real_kl(model, cuts, everything) for cuts in [*((Segment(s, s + 2),) for s in range(7)), apart]}
    best = min(prices, key=prices.__getitem__)
    assert [(row.segments, row.seeds) for row in found.choices] == [([(3, 5)], 2), ([(2, 3), (4, 5)], 1)]
    for row in [*found.choices, found.best]:
        kl = prices[tuple(Segment(*bounds) for bounds in row.segments)]
        assert row.kl == pytest.approx(kl, rel=1e-4)
        assert row.relative == pytest.approx(kl / prices[best], rel=1e-4)
    assert found.best.segments == [(s.start, s.stop) for s in best]
    assert found.worst == pytest.approx(max(prices[first], prices[apart]) / prices[best], rel=1e-4)
    for row in found.sources:
        rows = blocks[row.source]
        assert row.tokens == rows.numel()
        assert row.chosen.kl == pytest.approx(real_kl(model, first, rows), rel=1e-4)
        assert row.best.kl == pytest.approx(min(real_kl(model, cuts, rows) for cuts in prices), rel=1e-4)
    assert found.tokens == everything.numel()


def test_a_choice_that_costs_nothing_is_not_divided_by_zero():
    model = tiny.llama()
    tiny.make_identity_(model, range(3, 5))
    free, dear = (Segment(3, 5),), (Segment(0, 2),)
    found = judge(DecoderRunner(model), {"web": tiny.some_tokens(2)}, [free, dear], 2)
    assert [row.relative for row in found.choices] == [1.0, float("inf")]


@pytest.fixture
def command(tiny_model, texts, tmp_path):
    usual = ["--tokens=64", "--window=16", "--ratio=0.25"]
    return ["search", str(tiny_model), *usual, f"--out={tmp_path / 'run'}"]


def artefact(tmp_path: Path, name: str):
    return json.loads((tmp_path / "run" / f"{name}.json").read_text())


def test_seeds_search_again_where_a_file_was_edited(command, texts, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text(texts[0].read_text())
    command += [f"--data={mine}", "--seeds=2"]
    fingerprints = []
    for _ in range(2):
        assert main(command) == 0
        found = artefact(tmp_path, "stability")["seeds"]
        fingerprints.append([one["calibration"]["fingerprint"] for one in found])
        mine.write_text(texts[1].read_text())
    assert all(before != after for before, after in zip(*fingerprints, strict=True))


def test_seeds_search_on_other_text_and_resume_one_by_one(command, texts, tmp_path, monkeypatch, capsys):
    tried, draw_ = [], stages.search.draw_again
    counts, judge_ = [], stages.search.judged

    def draw_again(work, seed):
        if seed == stop_at:
            raise KeyboardInterrupt
        tried.append(seed)
        return draw_(work, seed)

    def judged(*args):
        counts.append(len(tried))
        return judge_(*args)

    monkeypatch.setattr(stages.search, "draw_again", draw_again)
    monkeypatch.setattr(stages.search, "judged", judged)
    command.append(f"--data={texts[0]}")
    stop_at = 2
    assert main([*command, "--seeds=3"]) == 130
    assert not (tmp_path / "run" / "stability.json").exists()
    stop_at, search = None, artefact(tmp_path, "search")
    for _ in range(2):
        assert main([*command, "--seeds=3"]) == 0
        assert tried == [1, 2]
    assert artefact(tmp_path, "search") == search, "asking for more seeds leaves the search as it is"
    found = artefact(tmp_path, "stability")
    assert [one["seed"] for one in found["seeds"]] == [0, 1, 2]
    assert found["seeds"][0]["segments"] == search["segments"]
    assert len({one["calibration"]["fingerprint"] for one in found["seeds"]}) == 3
    assert sum(row["seeds"] for row in found["choices"]) == 3
    assert stability_words(found) in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--seeds=4"]) == 0
    assert (tried, counts) == ([1, 2, 3], [2, 3])
    # a seed asked for by its own name chooses what it chose here
    elsewhere = [flag for flag in command if not flag.startswith("--out")]
    assert main([*elsewhere, "--seed=2", f"--out={tmp_path / 'other'}"]) == 0
    other = json.loads((tmp_path / "other" / "search.json").read_text())
    assert other["segments"] == artefact(tmp_path, "stability-2")["segments"]
    assert other["calibration"] == artefact(tmp_path, "stability-2")["calibration"]
    assert main([*command, "--force"]) == 0
    assert not list((tmp_path / "run").glob("stability*.json"))


def test_cuts_of_other_seeds_go_on_trial_too(command, texts, tmp_path, monkeypatch):
    last, go_on = {}, stages.trial.go_on

    def turned_round(this, result, tokens, how, stage):
        found = go_on(this, result, tokens, how, stage)
        assert found.tried
        turned = replace(found, candidates=found.candidates[::-1])
        last[stage] = [[[s.start, s.stop] for s in each.segments] for each in (turned, found)]
        return turned

    monkeypatch.setattr(stages.trial, "go_on", turned_round)
    command = [flag for flag in command if not flag.startswith(("--tokens", "--window"))]
    assert main([*command, f"--data={texts[0]}", "--tokens=512", "--window=64", "--score=folded", "--seeds=2"]) == 0
    assert [*last] == ["search-tried", "stability-1"]
    assert artefact(tmp_path, "search")["segments"] == artefact(tmp_path, "search-tried")["segments"]
    for stage, (taken, left) in last.items():
        assert artefact(tmp_path, stage)["segments"] == taken != left


def test_a_mix_is_told_by_source(command, texts, tmp_path):
    more = write_text(tmp_path / "more.txt", 3)
    assert main([*command, f"--data={texts[0]}+{more}", "--seeds=2", "--method=exhaustive"]) == 0
    found = artefact(tmp_path, "stability")
    assert [row["source"] for row in found["sources"]] == [texts[0].name, more.name]
    assert [row["tokens"] for row in found["sources"]] == [32, 32]


def test_text_that_does_not_change_with_the_seed_is_owned_up_to(command, tmp_path):
    words = write_text(tmp_path / "long.txt", 3).read_text()
    (tmp_path / "one.txt").write_text(" ".join(words.split()))  # a single document has no other order
    assert main([*command, f"--data={tmp_path / 'one.txt'}", "--seeds=2", "--method=cosine"]) == 0
    assert "The source had but 1 different text for them" in stability_words(artefact(tmp_path, "stability"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--seeds=0"], "too small"), (["--seeds=2", "--segment=3:5"], "--seeds repeats a search")],
)
def test_seeds_that_make_no_sense_are_refused(command, texts, flags, words, capsys):
    kept = [a for a in command if not a.startswith("--ratio")] if "--segment=3:5" in flags else command
    assert main([*kept, f"--data={texts[0]}", *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_verdict_reaches_the_report_and_goes_with_its_search(command, texts, tmp_path, monkeypatch):
    quick.leave_out(monkeypatch)
    whole = ["compress", *command[1:], f"--data={texts[0]}", "--no-speed", "--no-fold", "--method=cosine"]
    whole += [f"--eval-data={texts[1]}", "--eval-tokens=64", "--tune-tokens=0"]
    page = tmp_path / "run" / "report.html"
    assert main([*whole, "--seeds=2"]) == 0
    words = stability_words(artefact(tmp_path, "stability"))
    assert words in page.read_text(encoding="utf-8")
    assert main(whole) == 0
    assert words in page.read_text(encoding="utf-8"), "the same search: what was found of it still holds"
    for name in ("export.json", "summary.json"):  # what a run that was stopped before its end lacks
        (tmp_path / "run" / name).unlink()
    assert main([*whole, "--seed=7"]) == 0
    assert words not in page.read_text(encoding="utf-8")
