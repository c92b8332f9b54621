"""The report, its verdicts and the closing table, from made-up run folders."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from layercut.errors import RunError
from layercut.report import formatting, sections, verdicts
from layercut.report.charts import bit_map, cost_chart, probe_maps, tuning_chart
from layercut.report.formatting import Json
from layercut.report.model_card import model_card
from layercut.report.page import closing, search_lines, write_report
from layercut.report.run_facts import ProbeShare, RunFacts, gap_closed, read_run
from report_runs import MODEL, frontier, make_run, skill_figures, survival, with_perplexity

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Ids, addresses and visible text of a page."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.tags, self.ids, self.addresses, words = [""], [], [], list[str]()
        self.html = write_report(run).read_text(encoding="utf-8")
        self.handle_data = lambda data: words.append(data) if self.tags[-1] != "style" else None
        self.feed(self.html)
        self.text = " ".join(" ".join(words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]


@pytest.fixture
def drawn() -> None:
    """For a test of the charts themselves."""


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes nearly all the time of a page."""
    if "drawn" not in request.fixturenames:
        for name in ("cost_chart", "tuning_chart", "probe_maps"):
            monkeypatch.setattr(sections.charts, name, lambda *_: [])


def judged(run: Path | RunFacts, **how: Any) -> dict[str, verdicts.Verdict]:
    found = read_run(run, **how) if isinstance(run, Path) else run
    return {verdict.name: verdict for verdict in [*verdicts.verdicts(found), verdicts.conclusion(found)]}


def of_summary(**summary: Any) -> RunFacts:
    return RunFacts(summary=Json({"perplexity": {"dense": 45.1, "tuned": 46.0}, **summary}))


def ended(run: Path) -> list[str]:
    """The lines that the terminal shows."""
    return [line.plain for line in closing(run, run / "model")]


def table_of(run: Path, section: str) -> list[list[str]]:
    (found,) = [one for one in sections.of(read_run(run), sections.PAGE) if one.name == section]
    return [list(row) for table in found.tables for row in table.rows]


# ---- the page ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_a_full_run_fills_every_section_and_needs_nothing_outside_the_page(tmp_path: Path) -> None:
    skills = skill_figures(recall=(1.0, 0.5), copying=(1.0, 0.75))
    windows = [{"start": i, "stop": i + n, "costs": {"recall": 0.1 + i}} for n in (1, 6) for i in range(12)]
    page = Page(make_run(
        tmp_path, summary=survival(capabilities=skills), export={"check": {"how": "to the bit"}},
        capabilities={"judged": skills, "map": {"names": ["recall"], "windows": windows}, "words": ["layer 3 recalls"]},
    ))  # fmt: skip
    assert {one.name for one in sections.of(read_run(tmp_path), sections.PAGE)} | {"samples", "stack"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.html.count("<svg") == 4 + 2, "cost, tuning, two maps; the stack with its bands"
    assert page.html.count("<title>layer ") == 30 + 24, "each layer of both stacks has a hover title"
    assert "<title>layer 12, now layer 12: folded, tuned</title>" in page.html
    assert "<title>removed: 13–18</title>" in page.html
    assert not re.search(r"#0(?:10203|40506|70809|a0b0c|d0e0f)|#101112", page.html), "charts follow the page's colours"
    references = {found for form in re.findall(r'href="#([^"]+)|url\(#([^)]+)\)', page.html) for found in form if found}
    assert references <= set(page.ids)
    assert all(address.startswith("#") for address in page.addresses)
    assert "://" not in page.html.replace("http-equiv", "")
    assert all(f"{who} answer {i}." in page.text for who in ("Dense", "Pruned") for i in range(3))
    assert all(re.search(r'scope="(col|row)"', heading) for heading in re.findall(r"<th\b[^>]*>", page.html))
    first, second = page.html.split("For the engineer")
    assert 'id="samples"' in first
    assert 'id="healing"' in second


def test_strings_of_users_and_models_are_escaped(tmp_path: Path) -> None:
    page = Page(make_run(
        tmp_path,
        summary={"model": EVIL, "tasks": {EVIL: {"dense": 1, "compressed": 1}}, **with_perplexity(dataset=EVIL),
                 "evaluations": {EVIL: {EVIL: {"dense": 1, "compressed": 2}}}},
        search={"method": EVIL, "calibration": {"source": EVIL}}, env={"command": [EVIL], "hardware": EVIL},
        heal={"tuning": {"trained_layers": [EVIL], "label": EVIL, "heldout": []}},
        eval={"generations": [{"prompt": EVIL, "dense": EVIL, "compressed": EVIL}]},
    ))  # fmt: skip
    assert "<script" not in page.html.lower()
    assert page.text.count("alert(1)") >= 8


def test_a_bare_summary_is_enough_and_nothing_is_invented(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"model": "[red]x\x1b[31m"}))
    page = Page(tmp_path)
    assert set(page.ids) == {"provenance"}
    assert judged(tmp_path).keys() == {"Conclusion"}
    assert judged(tmp_path)["Conclusion"].mark == "open"
    assert not re.search(r"\d%|×\s*\d", page.text.partition("Marks:")[0])
    assert "\x1b" not in str(ended(tmp_path))
    assert "[red]x" in str(ended(tmp_path))


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("value", [math.inf, "nan", None, -1, "x", [], 10**400])
def test_figures_that_are_no_numbers_do_not_stop_the_report(tmp_path: Path, value: Any) -> None:
    """Every number in every artefact at once."""

    def spoiled(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: spoiled(inside) for key, inside in found.items()}
        if isinstance(found, list):
            return [spoiled(inside) for inside in found]
        return value if isinstance(found, int | float) and not isinstance(found, bool) else found

    skills = skill_figures(recall=(1.0, 0.5))
    summary = survival(capabilities=skills, **with_perplexity(quantized=70.0))
    run = make_run(tmp_path, summary=summary, frontier=frontier(),
                   capabilities={"judged": skills})  # fmt: skip
    if value is None:  # each artefact may be missing, too
        (run / "search.json").unlink()
        (run / "heal.json").unlink()
    for file in run.glob("*.json"):
        whole = {"layers": {"before": 30, "after": 24}} if file.stem == "summary" else {}
        file.write_text(json.dumps(spoiled(json.loads(file.read_text())) | whole))
    assert Page(run).text
    assert model_card(run)
    assert ended(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for write in (write_report, model_card):
        with pytest.raises(RunError, match=r"has no summary\.json") as missing:
            write(tmp_path)
        assert "layercut compress" in missing.value.hint
    for content in (b"{", b"[1]", b"", b"\xff\xfe"):
        (tmp_path / "summary.json").write_bytes(content)
        with pytest.raises(RunError, match="JSON"):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_files_are_named_without_their_folders(tmp_path: Path) -> None:
    place = "/home/someone/secret-client"
    run = make_run(
        tmp_path,
        summary={"model": f"{place}/model", **with_perplexity(dataset=f"{place}/heldout.txt+wikitext2")},
        search={"calibration": {"source": f"{place}/a.jsonl:text+{place}/b/*.txt", "tokens": 1}},
        heal={"tuning": {"data": {"source": "../up/c.parquet", "tokens": 1}}},
        env={"command": ["layercut", "compress", f"{place}/model", f"--data={place}/a.jsonl", "--tune-data",
                         f"{place}/a b.txt+c4", "--out", f"{place}/runs/x", "--eval-data", "org/set:test:text"]},
    )  # fmt: skip
    (run / "evaluations").mkdir()
    text = {"source": f"{place}/later.txt", "tokens": 64, "window": 16}
    (run / "evaluations" / "x.json").write_text(json.dumps({"text": text, "perplexity": {"dense": 4, "compressed": 5}}))
    page = Page(run)
    for shown in (page.html, model_card(run)):
        assert "someone" not in shown
        assert "../up" not in shown
        assert "heldout.txt+wikitext2" in shown
    command = "layercut compress model --data=a.jsonl --tune-data 'a b.txt+c4' --out x --eval-data org/set:test:text"
    assert command in page.text
    assert table_of(run, "evaluations")[0][:5] == ["later.txt", "64", "16", "4.00", "5.00"]


# ---- the tables ----------------------------------------------------------------------------------------------


def test_stages_and_the_gap_that_they_close(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary=with_perplexity(standard_error={"tuned": 0.01}, folded=120.0))
    assert table_of(run, "healing") == [
        ["dense", "45.10", "–", "–"], ["cut", "101.3", "–", "–"], ["folded", "120.0", "–", "none"],
        ["tuned", "67.40", "0.67", "50.4%"],
    ]  # fmt: skip
    gap = (math.log(101.3) - math.log(67.4)) / (math.log(101.3) - math.log(45.1))
    assert gap_closed(read_run(run).summary, "tuned") == pytest.approx(gap)


def test_probes_have_their_number_and_interval(tmp_path: Path) -> None:
    skills = skill_figures(20, recall=(1.0, 0.5))
    lengths = [{"capability": "recall", "length": 512, "dense": 1.0, "compressed": 0.25, "answers": 23}]
    run = make_run(
        tmp_path, summary=survival(capabilities=skills), capabilities={"judged": skills, "by_length": lengths}
    )
    assert table_of(run, "probes") == [
        ["recall", "20", "100.0%", "50.0%", "30–70%", "0.25"],
        ["recall, 512 tokens", "23", "100.0%", "25.0%", "12–45%", "–"],
        ["hidden keys, 1,024 tokens", "6", "100.0%", "100.0%", "61–100%", "–"],
        ["hidden keys, 2,048 tokens", "6", "100.0%", "50.0%", "19–81%", "–"],
    ]  # fmt: skip
    assert ProbeShare(name="x", items=20, dense=1, pruned=0.5).interval == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert ProbeShare(name="x", items=5, dense=1, pruned=0.0).interval[0] == 0.0  # type: ignore[index]
    (run / "summary.json").write_text(json.dumps(survival(capabilities=None)))
    assert not read_run(run).capabilities, "of another cut in this folder"


def test_tasks_and_packages_evaluations(tmp_path: Path) -> None:
    rows = {
        "score": {"dense": 0.8, "compressed": 0.6, "higher_is_better": True},
        "errors": {"dense": 4, "compressed": 2, "higher_is_better": False},
        "open": {"dense": 2, "compressed": 3, "higher_is_better": None},
        "ruined": {"dense": 2, "compressed": "inf", "higher_is_better": False},
    }
    run = make_run(tmp_path, summary=survival(evaluations={"pack<b>age": rows, "broken": 3}))
    found = table_of(run, "tasks")
    assert found[0] == ["arc_easy", "acc_norm", "100", "0.490 ± 0.050", "0.400 ± 0.048", "14", "5", "0.064"]
    assert found[1][:2] == ["", "acc"]
    assert [row[-1] for row in found[-4:]] == ["−25.0%, worse", "−50.0%, better", "+50.0%", ""]
    assert "pack<b>age, errors 4.00 → 2.00 −50.0%, better" in ended(run)
    assert "<b>age" not in Page(run).html
    assert "pack&lt;b&gt;age" in model_card(run)


def test_the_shortlist_and_what_text_alone_would_take(tmp_path: Path) -> None:
    one, other = ({"segments": [[a, a + 2]], "kl": kl, "probe_kl": d} for a, kl, d in ((2, 0.9, 0.2), (5, 0.6, 3.0)))
    tried = [{"segments": [[2, 4]], "folded": 1.0, "healed": 0.55}, {"segments": [[5, 7]], "folded": 2.0}]
    run = make_run(tmp_path, search={"segments": [[2, 4]], "candidates": [one], "by_text": other, "shortlist": tried})
    assert table_of(run, "search") == [["2–3", "1.00", "0.55"], ["5–6", "2.00", "–"]], "no column of dashes"
    assert "layers 5–6: KL 0.6 nats" in Page(run).text


@pytest.mark.parametrize(("first", "healed", "decided"), [
    ([[5, 7]], None, "5–6; by real cuts: 2–3; by a quick fold: 2–3. Real cuts decided"),
    ([[2, 4]], 0.5, "2–3; by real cuts: 2–3; by healing: 2–3. They agree"),
    ([[2, 4]], 0.1, "2–3; by real cuts: 2–3; by healing: 5–6. Healing decided"),
])  # fmt: skip
def test_which_part_of_the_search_decided(tmp_path: Path, first, healed, decided) -> None:
    segments = [[5, 7]] if healed == 0.1 else [[2, 4]]
    found = {"first_by": {"the Fisher estimate": first, "real cuts": [[2, 4]]}, "segments": segments}
    run = make_run(tmp_path, search=found | {"shortlist": [{"segments": segments, "folded": 1.0, "healed": healed}]})
    assert f"First by the Fisher estimate: {decided}." in Page(run).text


def test_budgets_are_met_by_a_measured_state_or_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, frontier=frontier())
    assert "Budgets" not in judged(run), "of other budgets than this run's"
    (run / "config.yaml").write_text(json.dumps(frontier()["budgets"]))
    assert (judged(run)["Budgets"].mark, judged(run)["Budgets"].figure) == ("good", "67.2 MB")
    assert ["30 layers, 4 bits", "67.2 MB", "+4.0%", "chosen"] in table_of(run, "frontier")
    make_run(tmp_path, frontier=frontier(chosen=None))
    assert judged(run)["Budgets"].mark == "bad"


def test_layers_or_bits_are_shown_of_this_run_alone(tmp_path: Path) -> None:
    points = [{"layers": 0, "segments": [], "folded": 0.0, "rounded": 5.41, "mean_bits": 3.1, "bytes": 53_400_000}]
    run = make_run(tmp_path, search={"segments": []}, shares={"layers": 0, "points": points})
    (run / "config.yaml").write_text("bits: auto\ntarget_size: 53.8MB\nratio: null\n")
    assert table_of(run, "shares") == [["0", "none", "3.10", "53.4 MB", "0", "5.41"]]
    for settings in (
        "bits: auto\nratio: 0.2\n",
        "bits: 4\nratio: null\n",
        "bits: auto\nsegment: ['0:1']\n",
        "{ not YAML",
    ):
        (run / "config.yaml").write_text(settings)
        assert not read_run(run).shares


# ---- charts --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_charts_draw_what_they_are_given(tmp_path: Path) -> None:
    windows = [{"start": a, "stop": a + n, "costs": {"recall": a + n}} for n in (1, 3) for a in range(8 - n)]
    run = make_run(tmp_path, summary={"segments": [[2, 4], [5, 6]], "capabilities": {"hits": {}}},
                   capabilities={"map": {"names": ["recall"], "windows": windows}})  # fmt: skip
    found = read_run(run)
    single, longer = probe_maps(found)
    assert "without layers 2: recall 3.00 nats" in single
    assert [f"removed: {layers}" in single for layers in ("2–3", "5")] == [True, True]
    assert "removed: " not in longer, "neither is three layers long"
    cost = cost_chart(found.search)
    assert cost
    assert cost.count("<title>layers ") == 6
    tuned = tuning_chart(found.heal.tuning)
    assert tuned
    assert "<title>kept: step 100" in tuned
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    bits = bit_map(
        Json({"layers": [{"name": names[0], "bits": 4}], "mixture": {"costs": {name: [] for name in names}}})
    )
    assert bits
    assert ["layer 0: 4 bits" in bits, "layer 1: 16 bits" in bits] == [True, True]
    assert cost_chart(Json()) is tuning_chart(Json()) is bit_map(Json()) is None
    assert probe_maps(RunFacts()) == []


# ---- verdicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("summary", "mark", "words"),
    [
        ({}, "fair", "Ship it with care: perplexity is 1.49×"),
        (with_perplexity(tuned=46.0), "good", "Ship it: perplexity is 1.02×"),
        (with_perplexity(tuned=80.0), "bad", "Do not ship this: perplexity is 1.77×"),
        (with_perplexity(tuned=46.0, quantized=90.0), "bad", "Quantization did that (1.02× before)"),
        (with_perplexity(tuned=500.0), "bad", "broken: its perplexity (tuned) is 500.0, 11.09×"),
        (with_perplexity(tuned="nan"), "bad", "broken"),
        (with_perplexity(tuned=None, folded=None, cut="inf"), "bad", "broken"),
        (with_perplexity(tuned=46.0, quantized=9e9), "bad", "Quantization broke it"),
        (with_perplexity(dense="nan"), "open", "not finite"),
        ({"perplexity": None}, "open", "Do not ship this before"),
        (survival(**with_perplexity(tuned=46.0)), "fair", "failed: Long context; look at: "),
        (survival(retention={"mean": 0.7, "above_chance": 0.3}), "bad", "keeps 30.0% of the task score"),
        (survival(retention={"mean": 0.7, "above_chance": 0.04}), "bad", "broken: it keeps 4.0%"),
        ({"bytes": {"source": 98e6, "before": 269e6, "after": 107e6}}, "bad", "larger than the source (98.0 MB →"),
    ],
)  # fmt: skip
def test_the_conclusion_is_on_page_card_and_terminal(tmp_path: Path, summary: Any, mark: str, words: str) -> None:
    run = make_run(tmp_path, summary=summary)
    found = judged(run)["Conclusion"]
    assert found.mark == mark
    assert words in found.text
    assert found.text in Page(run).text
    assert words in model_card(run).replace("\\", "")
    assert words in " ".join(ended(run))


def test_what_is_called_broken() -> None:
    for values in ({"cut": "inf"}, {"tuned": 135.0}, {"dense": None}, {"dense": "inf"}):
        assert verdicts.broken(with_perplexity(**values)) is None
    guess = survival(retention={"mean": 0.71, "above_chance": 0.04})
    few = {name: {**row, "items": 20} for name, row in guess["tasks"].items()}
    assert verdicts.broken(guess)
    assert verdicts.broken(guess | {"tasks": few}) is None, "fewer than fifty items"


def test_nothing_is_judged_on_fewer_than_twenty_items(tmp_path: Path) -> None:
    tasks = {name: {**row, "items": 9} for name, row in survival()["tasks"].items()}
    skills = skill_figures(3, recall=(1.0, 0.5))
    run = make_run(tmp_path, summary=survival(tasks=tasks, long_context=None, capabilities=skills),
                   capabilities={"judged": skills})  # fmt: skip
    found = judged(run)
    assert [found[name].mark for name in ("Tasks", "Recall and skills")] == ["open", "open"]
    assert [found[name].figure for name in ("Tasks", "Recall and skills")] == ["83.1%", "50.0%"]
    assert found["Conclusion"].text.find("Tasks") < 0


@pytest.mark.parametrize(("recall", "mark"), [(1.0, "good"), (0.6, "fair"), (0.4, "fair"), (0.0, "bad")])
def test_each_kind_of_probe_counts_the_same_and_a_lost_one_is_named(tmp_path: Path, recall: float, mark: str) -> None:
    skills = skill_figures(40, recall=(1.0, recall), sums=(0.25, 0.25))
    run = make_run(tmp_path, summary={"capabilities": skills}, capabilities={"judged": skills})
    found = judged(run)["Recall and skills"]
    assert (found.mark, found.figure) == (mark, f"{50 * (recall + 0.25):.1f}%")
    assert (f"half lost: recall ({40 * recall:.0f} of 40, dense 40)" in found.text) == (recall < 0.5)
    assert "the mean of 2 kinds of question (n = 80)" in found.text


@pytest.mark.parametrize(
    ("repeated", "loss", "mark"),
    [(0.36, 0.7, "good"), (0.477, 0.6, "fair"), (0.36, 1.9, "fair"), (0.6, 0.7, "bad"), (0.36, 2.7, "bad"),
     (0.3, "nan", "bad")],
)  # fmt: skip
def test_text_is_judged_by_repetition_and_by_the_dense_models_loss(repeated: float, loss: Any, mark: str) -> None:
    health = {"dense": {"repeated_4grams": 0.35, "dense_loss": 0.6}, "prompts": 24, "tokens": 64,
              "compressed": {"repeated_4grams": repeated, "dense_loss": loss}}  # fmt: skip
    replies = {"replies": {"dense": 61.4, "compressed": 29.1, "prompts": 8}}
    found = judged(of_summary(generation_health=health | replies))
    assert found["Text it writes"].mark == mark
    assert "Replies to 8 chats have 29 tokens, the dense model's 61." in found["Text it writes"].text
    assert found["Conclusion"].text.startswith("Do not ship this. It goes in circles") == (mark == "bad")


@pytest.mark.parametrize(
    ("near", "far", "mark"),
    [(1.5, 1.5, "fair"), (1.5, 1.8, "bad"), (0.8, 1.05, "good"), (0.8, 1.2, "bad"), (1.05, 1.05, "good")],
)
def test_far_positions_that_are_close_have_lost_nothing(near: float, far: float, mark: str) -> None:
    def perplexity(*values: float) -> list[dict[str, Any]]:
        return [{"start": a, "stop": 64 * a, "perplexity": v} for a, v in zip((1, 64), values, strict=True)]

    buckets = {"dense": perplexity(30.0, 20.0), "compressed": perplexity(30.0 * near, 20.0 * far)}
    assert judged(of_summary(long_context={"perplexity": buckets}))["Long context"].mark == mark


@pytest.mark.parametrize(("ratio", "mark"), [(1.19, "good"), (1.0, "fair"), (0.95, "bad")])
def test_speed_is_that_of_decoding_in_llama_cpp_where_that_reads_the_result(ratio: float, mark: str) -> None:
    summary = Json({"speed": {"decode": {"ratio": ratio}, "prefill": {"ratio": 1.3}}})
    found = judged(RunFacts(summary=summary))
    assert (found["Speed"].mark, found["Speed"].figure) == (mark, f"{ratio:.2f}×")
    theirs = {"gguf": {"again": {"llama_cpp": {"speed": {"dense": 40, "compressed": 44, "ratio": 1.1}}}}}
    found = judged(RunFacts(summary=summary, export=Json(theirs)))
    assert (found["Speed"].mark, found["Speed"].figure) == ("good", "1.10×")
    assert "llama.cpp: 40.00 → 44.00 tokens" in found["Speed"].text


def test_sizes_are_against_the_source_file_and_a_smaller_export_counts(tmp_path: Path) -> None:
    sizes = {"source": 98_400_000, "before": 269e6, "after": 107_100_000}
    inflated = {"model": "/models/tiny.gguf", "bytes": sizes, **with_perplexity(dense=38.6, tuned=42.0)}
    run = make_run(tmp_path, summary=inflated)
    assert (judged(run)["Size"].mark, judged(run)["Size"].figure) == ("bad", "+8.8%")
    assert "layercut export RUN --out FILE.gguf" in judged(run)["Conclusion"].text
    assert str(tmp_path) in str(ended(run)), "the run by its name"
    assert "layercut export RUN" not in model_card(run), "who reads it has no RUN"
    again = {"perplexity": {"model": 42.0, "file": 43.0}, "tokens": 4096}
    for broken, marks, starts in ((None, ("good", "good"), "Ship the exported GGUF file (84.0 MB)"),
                                  ("It is broken.", ("bad", "bad"), "Do not ship")):  # fmt: skip
        (run / "gguf.json").write_text(json.dumps({"bytes": 84e6, "broken": broken, "again": again}))
        assert (judged(run)["GGUF file"].mark, judged(run)["Conclusion"].mark) == marks
        assert judged(run)["Conclusion"].text.startswith(starts)
    assert "layercut export" not in judged(run)["Conclusion"].text, "what is broken is not to be made again"


@pytest.mark.parametrize(
    ("came", "sizes", "expected"),
    [
        ("", (269e6, 226e6), "Q8_0 would give about 142.9 MB at 1.00×"),
        ("Q4_1", (98.4e6, 92e6), "Q4_0 would give about 88.6 MB at 1.11×"),
        ("Q4_K", (98.4e6, 97e6), "Q4_0 would give about 91.3 MB at 1.10×"),
        ("Q2_K", (98.4e6, 92e6), None),
        ("IQ1_S", (98.4e6, 92e6), None),
    ],
)
def test_what_requantizing_alone_would_give(came: str, sizes: tuple[float, float], expected: str | None) -> None:
    summary = {"bytes": dict(zip(("source", "after"), sizes, strict=True)), "parameters": {"before": 134515008}}
    run = RunFacts(summary=Json(summary), export=Json({"gguf": {"source_type": came}} if came else {}))
    assert (expected or "no such") in verdicts.size_alone(run) or (expected is None and not verdicts.size_alone(run))


def test_embeddings_and_narrow_matrices_count_in_what_requantizing_gives() -> None:
    """As llama.cpp quantizes SmolLM2-135M: 91.7 MB in Q4_0, 93.5 in Q3_K_M and 88.2 in Q2_K."""
    weights = {"blocks_of_256": 26542080, "narrower": 79626240, "head": 28311552, "head_narrow": 1}
    file = {"gguf": {"source_type": "Q4_1", "weights": weights | {"other_bytes": 1926208}}}
    expected = (92.6e6, "Q4_0 would give about 91.7 MB at 1.11×"), (86.8e6, "Q2_K gets no further than 88.6 MB")
    for after, words in expected:
        summary = {"bytes": {"source": 98.4e6, "after": after}, "parameters": {"before": 134515008}}
        assert words in verdicts.size_alone(RunFacts(summary=Json(summary), export=Json(file)))


def test_tasks_scored_afterwards_count(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "layercut evaluate RUN --tasks" in judged(run)["Conclusion"].text
    assert "layercut evaluate" not in judged(run, place=None)["Conclusion"].text
    (run / "evaluations").mkdir()
    scored = {key: survival()[key] for key in ("tasks", "retention")}
    (run / "evaluations" / "x.json").write_text(json.dumps({"date": "2026-01-02", **scored}))
    assert "No task was measured" not in judged(run)["Conclusion"].text
    assert (judged(run)["Tasks"].mark, judged(run)["Tasks"].figure) == ("fair", "83.1%")
    assert "arc_easy" in model_card(run)


# ---- the terminal --------------------------------------------------------------------------------------------


def test_the_terminal_ends_with_the_file_its_size_speed_quality_and_the_chat(tmp_path: Path) -> None:
    skills = skill_figures(40, recall=(1.0, 0.9))
    run = make_run(tmp_path / "run", summary=survival(capabilities=skills), capabilities={"judged": skills})
    asked = tmp_path / "small.gguf"
    asked.write_bytes(bytes(1000))
    wanted = ["report", "file", "size", "speed", "quality", "skills", "tasks", "chat"]
    lines = {line.plain.split()[0]: line.plain for line in closing(run, asked)[-len(wanted) :]}
    assert list(lines) == wanted
    assert lines["file"] == f"file     {asked}"
    assert "269.1 MB → 1.0 kB" in lines["size"], "of the file that was asked for"
    assert "1.19×, decoding in transformers: 24.10 → 28.60" in lines["speed"]
    assert "45.10 → 67.40, 1.49×" in lines["quality"]
    assert "right, the mean of 2 kinds of question (n = 52)" in lines["skills"]
    assert lines["chat"] == f"chat     layercut chat {run}"


def test_a_search_is_printed_with_what_it_went_by() -> None:
    both = {"segments": [[3, 5], [6, 7]], "kl": 0.61234567, "probe_kl": 0.25, "score": None}
    found = {"candidates": [both, {"segments": [[3, 6]], "kl": 12.5}]}
    assert search_lines(found)[1:] == ["3:5, 6:7\t0.6123\t0.25", "3:6\t12.50\tnot measured"]


@pytest.mark.parametrize(
    ("show", "value", "expected"),
    [
        ("count", 134515008, "134.5M"), ("count", 950, "950"), ("count", None, "not measured"),
        ("size", 269060552, "269.1 MB"), ("times", 1.25, "1.25×"),
        ("figure", "inf", "not finite"), ("figure", 38.4, "38.40"), ("figure", 20471.2, "20,471"),
        ("figure", True, "not measured"), ("duration", 83.2, "1 min 23 s"), ("duration", 3700, "1 h 1 min"),
        ("label", [[13, 19], [24, 25]], "13:19, 24:25"), ("layer_names", [[13, 19], [24, 25]], "13–18, 24"),
        ("short_name", "runs/a/model.gguf", "model.gguf"), ("short_name", MODEL, MODEL), ("short_name", "./a/b/", "b"),
    ],
)  # fmt: skip
def test_figures_as_text(show: str, value: Any, expected: str) -> None:
    assert getattr(formatting, show)(value) == expected
    assert (formatting.change(30, 24), formatting.change(0, 24)) == ("−20.0%", "")
    assert formatting.times(1.25, 0.001) == "1.2500× ± 0.0013"
