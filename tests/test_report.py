"""The report, the model card and the closing table, from run folders made up to look like the demo's."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import wraps
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from layercut.errors import RunError
from layercut.report import charts, formatting, tables, thresholds, verdicts
from layercut.report.formatting import Json
from layercut.report.model_card import model_card
from layercut.report.page import closing, search_lines, write_report
from layercut.report.run_facts import RunFacts, read_run

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EVIL = "<script>alert(1)</script>"
BROKEN = "The compressed model is broken"
# Costs by start, shaped like those of SmolLM2-135M-Instruct with n = 6: ten measured, the others filled in.
COSTS = [9.7, 4.1, 2.15, 2.6, 3.0, 3.2, 3.1, 2.7, 2.2, 1.89, 1.6, 1.2, 0.91, 0.84, 0.96, 1.16, 1.6, 2.0, 2.41,
         3.3, 4.86, 8.0, 11.5, 16.6, 12.1]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _each_chart_is_drawn_once() -> Iterator[None]:
    """Drawing takes nearly all the time of a page, and most runs of these tests differ in what is not drawn."""

    def once(draw: Callable[..., Any]) -> Callable[..., Any]:
        drawn: dict[bytes, Any] = {}

        @wraps(draw)
        def chart(*given: Any) -> Any:
            key = pickle.dumps(given)
            if key not in drawn:
                drawn[key] = draw(*given)
            return drawn[key]

        return chart

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cost", "_map", "tuning", "position", "frontier"):
            patch.setattr(charts, f"{name}_chart", once(getattr(charts, f"{name}_chart")))
        yield


def search_json() -> dict[str, Any]:
    every = [{"segments": [[s, s + 6]], "kl": kl} for s, kl in enumerate(COSTS)]
    return {
        "method": "fisher", "segments": [[13, 19]], "candidates": [every[i] for i in (2, 9, 12, 13, 14, 22)],
        "dense_tokens": 12288, "layer_forwards": 11520, "layer_backwards": 11520, "seconds": 41.2, "seed": 0,
        "calibration": {"source": "self", "tokens": 12288, "fingerprint": "3f9ac2d1b7e0"}, "statistics": None,
    }  # fmt: skip


def heal_json() -> dict[str, Any]:
    curve = [
        {
            "step": s,
            "tokens": 1024 * s,
            "loss": 0.34 + 0.55 * math.exp(-s / 25) + 0.05 * math.sin(7.3 * s),
            "seconds": 1.1 * s,
        }
        for s in range(1, 119)
    ]
    heldout = [
        {
            "step": s,
            "tokens": 1024 * s,
            "loss": 0.41 + 0.52 * math.exp(-s / 28) + (0.0004 * (s - 100) if s > 100 else 0),
        }
        for s in range(0, 119, 10)
    ]
    return {
        "fold": [{"segment": [13, 19], "layer": 12, "modules": ["mlp.down_proj"], "ridges": [0.01],
                  "error_before": 5.21, "error_after": 2.87, "tokens": 65536}],
        "tuning": {"objective": "kl", "tokens": 120832, "steps": 118, "learning_rate": 5e-4,
                   "trained_layers": [12, 13], "trained_parameters": 7080192, "curve": curve,
                   "heldout": heldout, "best_step": 100, "tokens_per_second": 912.4,
                   "data": {"source": "self", "tokens": 120832, "fingerprint": "88b1c0aa42fe"}},
        "changed": ["model.layers.12.mlp.down_proj.weight"],
    }  # fmt: skip


def speed_json() -> dict[str, Any]:
    return {
        "prefill": {"dense": 1480.2, "compressed": 1803.9, "ratio": 1.219, "ideal": 1.25},
        "decode": {"dense": 24.1, "compressed": 28.6, "ratio": 1.187, "ideal": 1.25},
        "device": "cpu", "threads": 2, "kv_bytes_per_token": {"dense": 46080, "compressed": 36864},
    }  # fmt: skip


def summary_json() -> dict[str, Any]:
    return {
        "model": MODEL, "layers": {"before": 30, "after": 24}, "segments": [[13, 19]],
        "original_layer_index": [*range(13), *range(19, 30)],
        "parameters": {"before": 134515008, "after": 113276160},
        "bytes": {"before": 269060552, "after": 226578440},
        "perplexity": {"dataset": "wikitext-2 test", "window": 512, "tokens": 65536, "dense": 45.1,
                       "cut": 101.3, "folded": 83.2, "tuned": 67.4, "quantized": None},
        "tasks": None, "retention": None, "speed": speed_json(),
        "seconds": {"search": 41.2, "cut": 2.6, "fold": 38.0, "tune": 132.5, "evaluate": 88.1, "export": 9.4},
        "peak_rss_bytes": 2_310_000_000,
        "versions": {"layercut": "0.1.0", "torch": "2.11.0", "transformers": "5.20.0", "python": "3.12.3"},
    }  # fmt: skip


def eval_json() -> dict[str, Any]:
    dense = "The sky looks blue because air molecules scatter short wavelengths of sunlight most."
    cut = "The sky is blue because the light of the sun is scattered by the air, and the sky is blue."
    return {
        "perplexity": summary_json()["perplexity"], "speed": speed_json(), "peak_rss_bytes": 2_310_000_000,
        "generations": [
            {"prompt": "Why is the sky blue?", "dense": dense, "compressed": cut},
            {"prompt": "Write a Python function that reverses a list.",
             "dense": "def reverse(items):\n    return items[::-1]",
             "compressed": "def reverse(items):\n    return items[:-1]"},
        ],
    }  # fmt: skip


def env_json() -> dict[str, Any]:
    return {
        "hardware": "x86_64, 2 cores, 8 GB", "platform": "Linux 6.1", "cpu": "Intel Xeon", "threads": 2,
        "date": "2026-01-05",
        "command": ["layercut", "compress", MODEL, "--ratio", "0.2", "--out", "runs/demo"],
        "versions": summary_json()["versions"],
    }  # fmt: skip


def make_run(folder: Path, **changed: Any) -> Path:
    """A complete run folder; `search=None` leaves search.json out, `summary={…}` overrides keys of it."""
    parts = {
        "summary": summary_json(),
        "search": search_json(),
        "heal": heal_json(),
        "eval": eval_json(),
        "env": env_json(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in parts.items():
        if changed.get(name, value) is not None:
            (folder / f"{name}.json").write_text(json.dumps({**(value or {}), **changed.get(name, {})}))
    return folder


def with_perplexity(**values: Any) -> dict[str, Any]:
    return {"perplexity": {**summary_json()["perplexity"], **values}}


class Page(HTMLParser):
    """Tags, ids, addresses and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)


def report(run: Path) -> tuple[str, Page]:
    html = write_report(run).read_text(encoding="utf-8")
    return html, Page(html)


def shown(summary: dict[str, Any], width: int = 110) -> str:
    """What the terminal shows at the end of a run of which there is no more than the summary."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "summary.json").write_text(json.dumps(summary))
        return ended(Path(folder), width)


def ended(run: Path, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width)
    table, lines = closing(run)
    for part in (table, *lines):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_command_that_is_advised_can_be_pasted(tmp_path: Path) -> None:
    place = tmp_path / "my runs"
    place.mkdir()
    run = make_run(place, summary={"tasks": None})
    words = " ".join(ended(run, 400).split())
    assert f"layercut evaluate '{run}' --tasks NAMES" in words
    (run / "summary.json").unlink()
    with pytest.raises(RunError) as refusal:
        closing(run)
    assert f"--out '{run}'" in refusal.value.hint


# ---- the page ----------------------------------------------------------------------------------------------


def test_report_shows_every_section_and_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    html, page = report(run)
    assert {
        "stack",
        "figures",
        "verdict",
        "cost",
        "tuning",
        "speed",
        "fold",
        "samples",
        "provenance",
    } <= set(page.ids)
    for text in (
        "6 of its 30 layers (13–18)", "15.8% smaller (134.5M → 113.3M parameters)",
        "67.40 once tuned, 1.49× the dense model's 45.10",
        "101.3", "83.20", "24.3%", "50.4%", "1.19×", "1.25×", "3f9ac2d1b7e0", "88b1c0aa42fe", "torch 2.11.0",
        "Intel Xeon",
        "layercut compress", "46.1 kB", "Why is the sky blue?",
    ):  # fmt: skip
        assert text in page.text, text
    assert BROKEN not in page.text
    assert not list(run.glob(".report*")), "no draft is left behind"
    assert html.count("<title>layer ") == 30 + 24, "each layer of both stacks has a hover title"
    assert "<title>layer 12, now layer 12: folded, tuned</title>" in html
    assert "<title>layer 19, now layer 13: tuned</title>" in html


def test_page_needs_nothing_outside_itself(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path))
    assert all(address.startswith("#") for address in page.addresses), page.addresses
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert "://" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids)), "ids of different charts must not collide"


def test_references_inside_the_charts_resolve(tmp_path: Path) -> None:
    html, page = report(make_run(tmp_path))
    wanted = {address[1:] for address in page.addresses} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted
    assert wanted <= set(page.ids)


def test_charts_follow_the_colours_of_the_page(tmp_path: Path) -> None:
    html, _ = report(make_run(tmp_path))
    body = html.partition("</style>")[2]
    assert "var(--ink)" in body
    assert "var(--accent)" in body
    assert not any(code in body for code in charts.VARIABLES)
    known = set(re.findall(r"(--[a-z-]+):", html.partition("</style>")[0]))
    assert set(re.findall(r"var\((--[a-z-]+)\)", html)) <= known


def test_strings_of_users_and_models_are_escaped(tmp_path: Path) -> None:
    texts = {"prompt": EVIL, "dense": f"</p>{EVIL}", "compressed": '"><img src=x onerror=alert(1)>'}
    run = make_run(
        tmp_path,
        summary={
            "model": f"a/{EVIL}",
            "versions": {EVIL: EVIL},
            "seconds": {EVIL: 1.0},
            **with_perplexity(dataset=EVIL),
        },
        search={"method": EVIL, "calibration": {"source": EVIL, "tokens": 1, "fingerprint": EVIL}},
        heal={"fold": [{**heal_json()["fold"][0], "modules": [EVIL]}]},
        eval={"generations": [texts], "speed": {**speed_json(), "device": EVIL}},
        env={"command": ["layercut", EVIL], "cpu": EVIL},
    )
    html, page = report(run)
    assert not {"script", "img"} & set(page.tags)
    assert "<script" not in html.lower()
    assert "alert(1)" in page.text, "shown as text"


def test_summary_alone_is_enough_and_nothing_is_invented(tmp_path: Path) -> None:
    bare = {"model": MODEL, "layers": {"before": 30, "after": 24}, "segments": [[13, 19]]}
    (tmp_path / "summary.json").write_text(json.dumps(bare))
    html, page = report(tmp_path)
    assert page.text.count("not measured") >= 6
    assert not {"cost", "fold"} & set(page.ids)
    assert "has not had its perplexity measured" in page.text
    assert not re.search(r"\bnan\b", page.text)
    assert "None" not in page.text
    assert "Undefined" not in html


@pytest.mark.parametrize("missing", ["search", "heal", "eval", "env"])
def test_each_artefact_may_be_missing(tmp_path: Path, missing: str) -> None:
    _, page = report(make_run(tmp_path, **{missing: None}))
    assert "6 of its 30 layers" in page.text
    card = model_card(tmp_path)
    assert "6 of its 30 layers" in card


def test_odd_values_do_not_stop_the_report(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        summary={"segments": [[13, 19], "x", [1]], "layers": {"before": 30, "after": None},
                 "parameters": None, "seconds": None, "speed": None,
                 "tasks": {"arc": {"dense": 0.4, "compressed": 0.35}, "odd": 3}},
        search={"candidates": [{"segments": [[13, 19]], "kl": "inf"}, {"segments": None}, 3,
                               {"segments": [[2, 8]], "kl": 0.0}]},
        heal={"fold": None, "tuning": {"curve": [{"step": 1}], "heldout": None}},
        eval={"generations": [None, {"prompt": "p"}], "speed": None},
        env={"command": "layercut", "versions": None},
    )  # fmt: skip
    _, page = report(run)
    assert "0.35" in page.text
    assert model_card(run)
    assert shown(json.loads((run / "summary.json").read_text()))


def test_several_segments_and_long_stacks(tmp_path: Path) -> None:
    segments = [[20, 26], [40, 50]]
    scores = [{"segments": [[s, s + 6], [40, 50]], "kl": 0.3 + 0.1 * s} for s in range(20, 26)]
    run = make_run(
        tmp_path,
        summary={"layers": {"before": 80, "after": 64}, "segments": segments},
        search={"segments": segments, "candidates": scores},
        heal={"tuning": {**heal_json()["tuning"], "trained_layers": [19, 20, 33, 34]}, "fold": []},
    )
    html, page = report(run)
    assert "16 of its 80 layers (20–25, 40–49)" in page.text
    assert html.count("<polygon") == 3
    assert "<title>layer 50, now layer 34: tuned</title>" in html


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = write_report(run).read_text()
    assert write_report(run).read_text() == first, "same run, same bytes"
    assert {p.suffix for p in run.iterdir()} == {".json", ".html"}


# ---- budgets ------------------------------------------------------------------------------------


def frontier_json(**changed: Any) -> dict[str, Any]:
    """Three states at three numbers of bits; within 5 %: two of them, one within 100 MB as well."""
    rises = {30: (0.0, 0.001, 0.04), 27: (0.03, 0.031, 0.09), 24: (0.08, 0.082, 0.19)}
    points = [{"layers": n, "bits": bits, "bytes": n * bits * 560_000, "rise": rise}
              for n, row in rises.items() for bits, rise in zip((16, 8, 4), row, strict=True)]  # fmt: skip
    chosen = next(p for p in points if (p["layers"], p["bits"]) == (30, 4))
    return {"points": points, "chosen": chosen, "budgets": {"target_size": "100MB", "max_loss": 0.05}, **changed}


def run_with_budgets(folder: Path, **frontier: Any) -> Path:
    run, found = make_run(folder), frontier_json(**frontier)
    (run / "frontier.json").write_text(json.dumps(found))
    (run / "config.yaml").write_text(yaml.safe_dump(found["budgets"]))
    return run


def budgets_verdict(**changed: Any) -> tuple[str, str, str] | None:
    frontier = tables.frontier(Json(frontier_json(**changed)))
    if frontier is None:
        return None
    found = verdicts.budgets_verdict(frontier)
    return found.mark, found.stage, found.text


def test_what_layers_and_bits_take_of_a_size_is_shown_of_this_run_alone(tmp_path: Path) -> None:
    points = [
        {"layers": 0, "segments": [], "folded": 0.0, "rounded": 5.41, "mean_bits": 3.1, "bytes": 53_400_000},
        {"layers": 6, "segments": [[13, 19]], "folded": 0.5, "rounded": 2.7, "mean_bits": 3.9, "bytes": 53_500_000},
    ]
    points[0]["left"] = 0.912
    run = make_run(tmp_path, search={"segments": []})
    (run / "shares.json").write_text(json.dumps({"layers": 0, "points": points}))
    (run / "config.yaml").write_text("bits: auto\ntarget_size: 53.8MB\nratio: null\n")
    _, page = report(run)
    assert "shares" in page.ids
    for text in ("0 none 3.10 53.4 MB 0 5.41 0.912", "6 13:19 3.90 53.5 MB 0.5 2.70 –"):
        assert text in page.text, text
    for settings in ("bits: auto\nratio: 0.2\n", "bits: 4\nratio: null\n", "bits: auto\nsegment: ['0:1']\n"):
        (run / "config.yaml").write_text(settings)
        assert "shares" not in report(run)[1].ids
    (run / "config.yaml").write_text("bits: auto\nratio: null\n")
    (run / "shares.json").write_text(json.dumps({"layers": 6, "points": points}))
    assert "shares" not in report(run)[1].ids, "of as many layers as were not removed"


def test_the_frontier_is_shown(tmp_path: Path) -> None:
    run = run_with_budgets(tmp_path)
    html, page = report(run)
    assert "frontier" in page.ids
    assert len(page.ids) == len(set(page.ids))
    for text in (
        "30 4 67.2 MB +4.0% chosen", "27 8 121.0 MB +3.1% no", "24 4 53.8 MB +19.0% no",
    ):  # fmt: skip
        assert text in page.text, text
    chart = html.partition('id="frontier">')[2].partition("</section>")[0]
    for text in (
        "<title>chosen: 30 layers at 4 bits, 67.2 MB, perplexity +4.0%</title>",
        "<title>budget: perplexity up by 5.0%</title>",
        "<title>budget: 100.0 MB</title>",
        "<title>24 layers at 16 bits, 215.0 MB, perplexity +8.0%</title>",
    ):
        assert chart.count(text) == 1, text
    for bits in (16, 8, 4):
        assert f">{bits} bits<" in chart
    marks = [v for v in verdicts.verdicts(read_run(run)) if v.stage == "Budgets"]
    assert [v.mark for v in marks] == ["good"]
    card = model_card(run)
    assert "| 30 | 4 | 67.2 MB | +4.0% | chosen |" in card
    assert marks[0].text in card


def test_a_run_without_budgets_has_no_frontier(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "frontier.json").write_text(json.dumps(frontier_json()))  # of an earlier run in this folder
    _, page = report(run)
    assert "frontier" not in page.ids
    assert "Size against loss" not in model_card(run)


def test_what_another_cut_could_do_is_left_out(tmp_path: Path) -> None:
    able = {"damage": {"recall": 0.5}, "hits": {"recall": 0.5}, "dense_hits": {"recall": 1.0}}
    for summary, shown in (({"capabilities": able}, True), ({"capabilities": None}, False)):
        run = make_run(tmp_path, summary=summary)
        (run / "capabilities.json").write_text(
            json.dumps({"map": {}, "words": ["layer 3 holds recall"], "judged": able})
        )
        assert bool(read_run(run).capabilities) == shown


def test_what_heeding_tests_costs_is_told_before_and_after_healing(tmp_path: Path) -> None:
    ours, by_text = (
        {"segments": [bounds], "kl": kl, "damage": d} for bounds, kl, d in (([2, 4], 0.9, 0.2), ([5, 7], 0.6, 3.0))
    )
    both = [{"segments": [[2, 4]], "folded": 1.0, "healed": 0.55, "text": 0.25}]
    both.append({"segments": [[5, 7]], "folded": 2.0, "healed": 1.0, "text": 0.125})
    for name, left in (("both", both), ("one", both[:1]), ("folded", [{**one, "text": None} for one in both])):
        known = {"segments": [[2, 4]], "candidates": [ours], "by_text": by_text, "tried": left}
        _, page = report(make_run(tmp_path / name, search=known))
        assert "by the text alone it would have been 5:7, at 0.6 and 3.00" in page.text
        assert ("Healed on a part of the tokens" in page.text) == (name == "both")
        told = "the one has 0.25 nats on other text and 0.3 of other tests in their weight, the other 0.125 and 0.875."
        assert (told in page.text) == (name == "both")


def test_where_text_alone_takes_the_same_nothing_is_traded(tmp_path: Path) -> None:
    found = {"segments": [[2, 4]], "kl": 0.9, "damage": 0.2}
    _, page = report(make_run(tmp_path, search={"segments": [[2, 4]], "candidates": [found], "by_text": found}))
    assert "2:4 is what the text alone would take" in page.text
    assert "it would have been" not in page.text


def test_the_map_is_drawn_of_single_layers_and_of_longer_windows(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary={"segments": [[2, 4], [5, 6]], "capabilities": {"hits": {"recall": 0.5}}})
    windows = [
        {"start": start, "stop": start + n, "damage": {"recall": start + n}} for n in (1, 3) for start in range(8 - n)
    ]
    found = {"map": {"names": ["recall"], "windows": windows}, "words": ["layer 3 holds recall"], "judged": {}}
    (run / "capabilities.json").write_text(json.dumps(found))
    single, longer = charts.map_charts(read_run(run))
    assert "without layer 2: recall 3.00 nats" in single
    assert [frame in single for frame in ("removed: 2:4", "removed: 5:6")] == [True, True]
    assert "without 2:5: recall 5.00 nats" in longer
    assert "removed: " not in longer, "neither is three layers long"
    _, page = report(run)
    assert "without each window of as many neighbouring layers" in page.text


def test_the_frontier_of_other_budgets_is_left_out(tmp_path: Path) -> None:
    run = run_with_budgets(tmp_path)
    (run / "config.yaml").write_text("target_size: 100MB\nmax_loss: 0.05\n")
    assert read_run(run).frontier
    (run / "config.yaml").write_text("ratio: 0.2\nmax_loss: null\n")
    assert not read_run(run).frontier
    (run / "config.yaml").write_text("{ not YAML")
    assert not read_run(run).settings


def test_verdicts_on_two_budgets() -> None:
    assert budgets_verdict() == (
        "good", "Budgets",
        "30 layers at 4 bits, 67.2 MB, perplexity +4.0% on held-out text: inside 100.0 MB and 5.0%, and the smallest "
        "seen within 5.0%.",
    )  # fmt: skip
    larger = budgets_verdict(chosen={"layers": 27, "bits": 8}, budgets={"target_size": "150MB", "max_loss": 0.05})
    assert larger
    assert larger[0] == "good"
    assert larger[2].endswith("The smallest seen within 5.0%: 30 layers at 4 bits, 67.2 MB, perplexity +4.0%.")
    missed = budgets_verdict(chosen=None, budgets={"target_size": "60MB", "max_loss": 0.05})
    assert missed == (
        "bad", "Budgets",
        "nothing seen is inside both 60.0 MB and 5.0%: the smallest within 5.0% (30 layers at 4 bits, 67.2 MB, "
        "perplexity +4.0%) is 7.2 MB too large; the best of that size (24 layers at 4 bits, 53.8 MB, perplexity "
        "+19.0%) is 14.0 points over the loss.",
    )  # fmt: skip
    neither = budgets_verdict(chosen=None, budgets={"target_size": "1MB", "max_loss": -0.5})
    assert neither
    assert "keeps either; the smallest is 53.8 MB" in neither[2]


def test_odd_frontiers_do_not_stop_the_report(tmp_path: Path) -> None:
    points = [*frontier_json()["points"][:1], 3, {"layers": 2}, {"layers": 9, "bits": 4, "bytes": 1e6, "rise": "inf"},
              {"layers": 9, "bits": 8, "bytes": 1e6, "rise": "nan"}]  # fmt: skip
    run = run_with_budgets(tmp_path, points=points, chosen=None, budgets={"target_size": EVIL, "max_loss": "x"})
    html, page = report(run)
    assert "<script" not in html.lower()
    assert "9 4 1.0 MB not finite" in page.text
    assert model_card(run)


def test_a_frontier_far_beyond_its_budget_is_still_drawn() -> None:
    points = [{"layers": n, "bits": 16, "bytes": n * 2e7, "rise": rise} for n, rise in ((9, 0.01), (3, 4e3))]
    drawn = charts.frontier_chart(tables.frontier(Json(frontier_json(points=points, chosen=None))))
    assert drawn
    assert "+400,000.0%" in drawn
    assert charts.frontier_chart(tables.frontier(Json())) is None


def test_a_model_with_all_its_layers_is_told_so() -> None:
    whole = {"layers": {"before": 30, "after": 30}, "segments": [],
             "parameters": {"before": 134515008, "after": 134515008}}  # fmt: skip
    alone = with_perplexity(cut=None, folded=None, tuned=None, quantized=46.0)
    text = verdicts.headline(Json({**summary_json(), **whole, **alone}))
    assert text.startswith("SmolLM2-135M-Instruct with all of its 30 layers has a perplexity")


# ---- the verdict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tuned": 500.0}, "broken: its perplexity (tuned) is 500.0, 11.09× the dense model's 45.10"),
        ({"tuned": float("inf")}, "broken: its perplexity (tuned) is not a finite number"),
        ({"tuned": "nan"}, "broken: its perplexity (tuned) is not a finite number"),
        (
            {"tuned": None, "folded": None, "cut": "inf"},
            "broken: its perplexity (cut) is not a finite number",
        ),
        ({"quantized": 9e9}, "broken: its perplexity (quantized)"),
    ],
)
def test_a_ruined_model_is_called_broken_at_the_top(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    run = make_run(tmp_path, summary=with_perplexity(**values))
    _, page = report(run)
    assert words in page.text
    assert page.text.index("broken") < page.text.index("What was cut")
    assert words in model_card(run)
    assert "broken" in shown(json.loads((run / "summary.json").read_text()))


@pytest.mark.parametrize("values", [{"cut": "inf"}, {"tuned": 135.0}, {"dense": None}, {"dense": "inf"}])
def test_a_model_that_is_not_ruined_is_not_called_so(values: dict[str, Any]) -> None:
    assert verdicts.broken({**summary_json(), **with_perplexity(**values)}) is None


@pytest.mark.parametrize(
    ("values", "mark"),
    [
        ({}, "open"), ({"cut": 200.0}, "open"), ({"cut": 45.0}, "good"), ({"cut": 200.0, "quantized": 9e9}, "open"),
        ({"cut": "inf"}, "bad"), ({"cut": 900.0, "folded": 500.0, "tuned": 200.0}, "bad"),
        ({"cut": 200.0, "folded": None, "tuned": None}, "bad"),
    ],
)  # fmt: skip
def test_a_cut_that_was_healed_has_not_failed(values: dict[str, Any], mark: str) -> None:
    run = RunFacts(summary=Json({**summary_json(), **with_perplexity(**values)}))
    assert next(v for v in verdicts.verdicts(run) if v.stage == "Cut").mark == mark


def test_stages_that_do_not_improve_are_named(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        summary={**with_perplexity(folded=110.0, tuned=110.0, quantized=140.0),
                 "bytes": {"before": 92_000_000, "after": 226_578_440}},
        heal={"tuning": {**heal_json()["tuning"], "best_step": 0}},
        search={"segments": [[12, 18]]},
        eval={"speed": {"decode": {"dense": 24.0, "compressed": 23.0, "ratio": 0.958, "ideal": 1.25}}},
    )  # fmt: skip
    _, page = report(run)
    for text in (
        "did not improve: perplexity 101.3 → 110.0",
        "did not improve: perplexity 110.0 → 110.0. No step beat the start on held-out text",
        "the files did not get smaller, 92.0 MB → 226.6 MB on disk (+146.3%): ",
        "the input stores 5.5 bits per weight, the output 16.0",
        "did not get faster (0.96×)",
        "perplexity 110.0 → 140.0 (+27.3%)",
    ):
        assert text in page.text, text
        assert text in model_card(run), text


def test_gap_closed_is_a_share_of_the_log_perplexity() -> None:
    rows = {row.name: row for row in tables.stage_rows(Json(summary_json()))}
    expected = (math.log(101.3) - math.log(67.4)) / (math.log(101.3) - math.log(45.1))
    assert rows["tuned"].gap_closed == pytest.approx(expected)
    assert rows["dense"].gap_closed is None
    assert rows["tuned"].over_dense == "1.49×", "no error on record"
    known = {**summary_json(), **with_perplexity(standard_error={"tuned": 0.01, "cut": "nan", "folded": 0.001})}
    known = {row.name: row.over_dense for row in tables.stage_rows(Json(known))}
    assert (known["tuned"], known["cut"]) == ("1.49× ± 0.01", "2.25×")
    assert known["folded"].endswith("× ± 0.0018")
    assert rows["cut"].bar == pytest.approx(1.0)
    assert rows["quantized"].perplexity is None


def test_a_stage_that_ran_without_a_figure_says_so() -> None:
    summary = {**summary_json(), **with_perplexity(tuned=None)}
    run = RunFacts(summary=Json(summary), heal=Json(heal_json()))
    assert any("ran, but has no finite perplexity" in verdict.text for verdict in verdicts.verdicts(run))


# ---- by which rules, and what a careful engineer would say -------------------------------------------------


def concluded(folder: Path, gguf: dict[str, Any] | None = None, **changed: Any) -> verdicts.Verdict:
    run = make_run(folder, **changed)
    (run / "gguf.json").write_text(json.dumps(gguf or {}))
    return verdicts.conclusion(read_run(run))


INFLATED = {
    "model": "/models/tiny.Q4_1.gguf", "bytes": {"source": 98_400_000, "before": 269_000_000, "after": 107_100_000},
    **with_perplexity(dense=38.6, tuned=82.2),
}  # fmt: skip


def test_sizes_are_against_the_file_that_came(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary=INFLATED)
    _, page = report(run)
    size_of = next(v for v in verdicts.verdicts(read_run(run)) if v.stage == "Size")
    assert size_of.mark == "bad"
    assert "98.4 MB → 107.1 MB on disk (+8.8%)" in size_of.text
    for text in (page.text, model_card(run), ended(run)):
        assert "60.2%" not in text
        assert "8.8%" in text
    assert "what came: 98.4 MB, +8.8%" in page.text
    assert re.search(r"bytes on disk +│ +98\.4 MB │ +107\.1 MB │ +\+8\.8%", ended(run))


def test_what_is_larger_and_worse_is_not_to_be_shipped_and_export_is_named(tmp_path: Path) -> None:
    found = concluded(tmp_path, summary=INFLATED)
    assert found.mark == "bad"
    for words in (
        "Do not ship this: larger than what came (98.4 MB → 107.1 MB), and perplexity is 2.13× the dense model's",
        "layercut export RUN --out FILE.gguf keeps the file's own number formats, about 8",
    ):
        assert words in found.text
    assert f"layercut export {tmp_path} --out" in " ".join(ended(tmp_path, width=1000).split()), "the run by its name"
    assert "layercut export RUN" not in model_card(tmp_path)
    sound = {**INFLATED, **with_perplexity(dense=38.6, tuned=42.0)}
    exported = {"bytes": 84e6, "broken": None}
    assert concluded(tmp_path, summary=sound).text.startswith("Do not ship this: larger than what came")
    found = concluded(tmp_path, exported, summary=sound)
    assert found.text.startswith("The exported GGUF file (84.0 MB) is usable where a perplexity that is 1.09×")
    assert "broken" not in found.text
    found = concluded(tmp_path, {**exported, "broken": "The compressed model is broken."}, summary=sound)
    assert found.mark == "bad"
    assert "export" not in found.text, "what is broken is not recommended, nor to be made again"
    folder = concluded(tmp_path, summary={**INFLATED, "model": MODEL})
    assert "layercut quantize RUN --bits 4" in folder.text
    assert "layercut quantize RUN" not in model_card(tmp_path), "who reads it has no RUN"


@pytest.mark.parametrize(
    ("summary", "mark", "words"),
    [
        ({}, "fair", "Usable where a perplexity that is 1.49× the dense model's on wikitext-2 test is acceptable"),
        (with_perplexity(tuned=46.0), "good", "Usable where a perplexity that is 1.02×"),
        (with_perplexity(tuned=80.0), "bad", "Do not ship this: perplexity is 1.77× the dense model's. Heal on more"),
        (with_perplexity(tuned="nan"), "bad", "Do not ship this. The compressed model is broken"),
        ({"perplexity": None}, "open", "Do not ship this before its perplexity is measured"),
    ],
)
def test_the_closing_line(tmp_path: Path, summary: dict[str, Any], mark: str, words: str) -> None:
    found = concluded(tmp_path, summary=summary)
    assert found.mark == mark
    assert found.text.startswith(words)
    assert words.split(" on ")[0] in " ".join(ended(tmp_path).split()), "the last thing the terminal says"


def test_the_closing_line_names_what_failed(tmp_path: Path) -> None:
    found = concluded(tmp_path / "fold", summary=with_perplexity(folded=110.0, tuned=46.0))
    assert found.mark == "fair", "a stage that failed is no tick"
    assert "is acceptable; look first at Fold, which failed. No task" in found.text
    left = {"mean": 0.9, "above_chance": 0.6}
    both = concluded(
        tmp_path / "both",
        summary={**with_perplexity(folded=110.0, tuned=46.0, quantized=51.0), **survival_json(retention=left)},
    )
    assert "look first at Fold, Long context, which failed; and then at Quantization, Tasks" in both.text
    healed = concluded(tmp_path / "cut", summary=with_perplexity(cut=500.0, tuned=46.0))
    assert healed.mark == "good", "the cut's price is in the result"
    assert "failed" not in healed.text


def test_tasks_scored_afterwards_count_in_the_closing_line(tmp_path: Path) -> None:
    assert "No task was measured: layercut evaluate RUN" in concluded(tmp_path).text
    assert "No task was measured.**" in (card := model_card(tmp_path)), "who reads it has no RUN"
    assert "RUN" not in card
    (tmp_path / "evaluations").mkdir()
    scored = {key: survival_json()[key] for key in ("tasks", "retention")}
    scored["retention"] = {**scored["retention"], "above_chance": 0.3}
    (tmp_path / "evaluations" / "x.json").write_text(json.dumps({"run": None, "date": "2026-01-02", **scored}))
    found = verdicts.conclusion(read_run(tmp_path))
    assert found.text.startswith("Do not ship this: 83.1% of the dense model's score is left over 2 tasks, 30.0% of")
    assert "tasks: not measured" not in report(tmp_path)[1].text
    card = model_card(tmp_path)
    assert "Tasks: not measured" not in card
    assert "Retained on average: 83.1%" in card


def test_a_task_without_a_share_to_keep_was_measured(tmp_path: Path) -> None:
    none = {"mean": None, "above_chance": None, "tasks": 0, "tasks_above_chance": 0}
    found = concluded(tmp_path, summary={**with_perplexity(tuned=46.0), **survival_json(retention=none)})
    assert found.text.startswith("Usable")
    assert "No task was measured" not in found.text


def test_where_the_dense_models_perplexity_is_no_number_none_is_asked_for(tmp_path: Path) -> None:
    found = concluded(tmp_path, summary=with_perplexity(dense="nan", cut=12.0))
    assert "The dense model's own perplexity is not finite" in found.text


def with_tests(run: Path, **hits: tuple[float, float]) -> Path:
    """The run with generated tests, of each capability the shares of the dense and the compressed model, and lists."""
    judged = {
        "damage": dict.fromkeys(hits, 0.25),
        "dense_hits": {name: dense for name, (dense, _) in hits.items()},
        "hits": {name: compressed for name, (_, compressed) in hits.items()},
        "answers": dict.fromkeys(hits, 8),
    }
    by_length = [{"capability": "recall", "length": 512, "dense": 1.0, "compressed": 0.25, "answers": 23}]
    (run / "capabilities.json").write_text(json.dumps({"judged": judged, "by_length": by_length}))
    values = {
        name: [{"length": 128, "depth": 0.5, "found": n, "trials": 9}] for name, n in (("dense", 8), ("compressed", 3))
    }
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"capabilities": judged, "probes": {"keys": {}, "lists": values}}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.mark.parametrize(
    ("recall", "mark", "named"),
    [(1.0, "good", ""), (0.6, "fair", ""), (0.4, "fair", "; less than half is left of recall (40.0% for 100.0%)")],
)
def test_a_lost_capability_is_judged_and_named(tmp_path: Path, recall: float, mark: str, named: str) -> None:
    """Each counts the same: of two, of which the dense model gives 100 and 25 %."""
    run = with_tests(make_run(tmp_path), recall=(1.0, recall), sums=(0.25, 0.25))
    found = {v.stage: v for v in verdicts.verdicts(read_run(run))}
    mean = f"{100 * (recall + 0.25) / 2:.1f}%"
    said = f"gives {mean} of the answers to generated tests, the dense model 62.5%, mean over capabilities{named}."
    assert (found["Capabilities"].mark, found["Capabilities"].text) == (mark, said)
    assert found["List values"].mark == "bad"
    conclusion = verdicts.conclusion(read_run(run)).text
    assert "List values" in conclusion
    assert ("Capabilities" in conclusion) == (mark != "good")
    assert verdicts.conclusion(read_run(with_tests(run, recall=(1.0, 0.0)))).text.count("Capabilities") == 1
    card = model_card(run)
    assert "| `recall` | 8 | 100.0% | 0.0% | 0.25 |" in card
    assert "Values of lists of up to 128 tokens, found: 3 of 9; by the dense model 8." in card
    page = report(run)[1].text
    assert "recall 512 23 100.0% 25.0%" in page, "by length, with the number of answers"


def test_a_search_is_printed_with_what_it_went_by() -> None:
    heeding = {"segments": [[3, 5], [6, 7]], "kl": 0.61234567, "damage": 0.25, "score": 0.8623}
    plain = {"segments": [[3, 6]], "kl": 12.5, "damage": None, "score": None}
    assert search_lines({"candidates": [heeding, plain]}) == [
        "segments\tKL, nats\tdamage, nats\tscore", "3:5, 6:7\t0.6123\t0.25\t0.8623",
        "3:6\t12.50\tnot measured\tnot measured",
    ]  # fmt: skip
    assert search_lines({"candidates": [plain]}) == ["segments\tKL, nats", "3:6\t12.50"]


def test_what_is_not_asked_for_has_no_row(tmp_path: Path) -> None:
    rows = report(make_run(tmp_path, summary=with_perplexity(tuned=None)))[1].text
    assert "tuned not measured" in rows
    assert "lora not measured" not in rows
    assert "quantized not measured" not in rows


def test_keys_found_afterwards_are_in_the_report(tmp_path: Path) -> None:
    make_run(tmp_path)
    cells = {
        name: [{"length": 128, "depth": 0.5, "found": n, "trials": 2}] for name, n in (("dense", 2), ("compressed", 1))
    }
    hits = {"damage": {"copy": 0.5}, "hits": {"copy": 0.5}, "dense_hits": {"copy": 1.0}, "answers": {"copy": 11}}
    probes = {name: {"keys": cells[name], "lists": [], "capabilities": hits} for name in cells}
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "x.json").write_text(json.dumps({"date": "2026-01-02", "probes": probes}))
    assert "Measured afterwards" in report(tmp_path)[1].text
    assert "50% 2 → 1 of 2" in report(tmp_path)[1].text
    assert (
        "Keys hidden in text, found by the dense model → by the compressed one, of 2 in all: 2 → 1."
        in report(tmp_path)[1].text
    )
    assert "copy 11 100.0% 50.0% 0.5" in report(tmp_path)[1].text
    assert "loss, dense" not in report(tmp_path)[1].text, "of an evaluation that did not measure it"
    hits |= {"dense_loss": {"copy": 0.125}, "loss": {"copy": 0.0625}}
    (tmp_path / "evaluations" / "x.json").write_text(json.dumps({"date": "2026-01-02", "probes": probes}))
    assert "copy 11 100.0% 50.0% 0.5 0.125 0.0625" in report(tmp_path)[1].text
    assert "text tokens window dense compressed" not in report(tmp_path)[1].text, "a table without rows"


def test_every_cross_and_caution_is_in_the_terminal(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        summary={**survival_json(), **with_perplexity(folded=110.0, tuned=67.4, quantized=70.0)},
        eval={"speed": {"decode": {"dense": 24.0, "compressed": 23.0, "ratio": 0.958, "ideal": 1.25}}},
    )
    found = verdicts.verdicts(read_run(run, place=str(run)))
    said = " ".join(ended(run, width=2000).split())
    assert {v.stage for v in found if v.mark == "bad"} >= {"Fold", "Decode", "Tasks"}
    for verdict in found:
        assert (verdict.text in said) == (verdict.mark in ("fair", "bad")), verdict


def test_generation_that_repeats_more_is_no_tick() -> None:
    def mark(repeated: float, loss: float) -> str:
        health = {"dense": {"repeated_4grams": 0.35, "dense_loss": 0.6},
                  "compressed": {"repeated_4grams": repeated, "dense_loss": loss}}  # fmt: skip
        words = verdicts.generation_verdict(Json(health))
        assert words
        return words.mark

    assert mark(0.477, 0.6) == "fair"
    assert mark(0.36, 0.7) == "good"
    assert mark(0.36, 1.9) == "fair"
    assert mark(0.6, 0.7) == mark(0.36, 2.7) == "bad"


def test_replies_that_have_become_short_are_no_tick(tmp_path: Path) -> None:
    health = survival_json()["generation_health"]
    health["compressed"] |= health["dense"]
    marks = []
    for tokens in (30.0, 20.0):
        health["replies"] = {"dense": 50.0, "compressed": tokens, "most": 64, "prompts": 8, "kl": 0.457}
        words = verdicts.generation_verdict(Json(health))
        assert words
        marks.append((words.mark, "short, 20.00 tokens for 50.00" in words.text))
    assert marks == [("good", False), ("fair", True)]
    html, _ = report(make_run(tmp_path, summary=survival_json(generation_health=health)))
    assert "tokens of a reply, of 64 at most" in html
    assert "0.457" in html


# ---- nothing that reassures or misleads ----------------------------------------------------------------------


def test_marks_have_words_and_headings_a_scope(tmp_path: Path) -> None:
    html, _ = report(make_run(tmp_path, summary=survival_json()))
    verdict = html.partition('id="verdict"')[2].partition("</ul>")[0]
    marks = [v.mark for v in verdicts.verdicts(read_run(tmp_path))]
    for mark, word in thresholds.MARK_WORDS.items():
        assert verdict.count(f'<span class="sr">{word}: </span>') == marks.count(mark)
    headings = re.findall(r"<th\b[^>]*>", html)
    assert len(headings) > 50
    assert all(re.search(r'scope="(col|row)"', heading) for heading in headings)


def test_a_stage_worse_than_the_bare_cut_closes_no_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path, summary=with_perplexity(folded=120.0, tuned=110.0))
    _, page = report(run)
    assert "of the log-perplexity gap" not in page.text + model_card(run)
    assert "| tuned | 110.0 | 2.44× | none |" in model_card(run)
    assert "improved perplexity from 120.0 to 110.0; it is still above that of the bare cut" in page.text


def test_the_page_says_how_many_candidates_were_priced(tmp_path: Path) -> None:
    every = [{"segments": [[s, s + 6]], "kl": kl} for s, kl in enumerate(COSTS)]
    _, page = report(make_run(tmp_path / "all", search={"method": "exhaustive", "candidates": every}))
    assert "All 25 segments of this length were priced." in page.text
    _, page = report(make_run(tmp_path / "some"))
    assert "6 of 25 segments of this length were priced; --method exhaustive prices all." in page.text
    assert "very candidate" not in page.text


def test_the_page_has_no_empty_card_and_says_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"model": MODEL}))
    html, page = report(tmp_path)
    cards = re.findall(r'<section id="(\w+)">(.*?)</section>', html, re.DOTALL)
    assert [name for name, inside in cards if not re.search(r"<table|<svg|<li|<dl|<details|<p", inside)] == []
    assert {name for name, inside in cards if "not measured" in inside} <= {"unmeasured", "provenance"}
    _, page = report(make_run(tmp_path / "cpu", env={"hardware": "Intel Xeon", "cpu": "Intel Xeon"}))
    assert page.text.count("Intel Xeon") == 1
    assert "one weight matrix" not in page.text
    assert "MLP output" not in page.text


def test_continuations_that_are_counted_are_told_apart_from_samples_that_are_shown(tmp_path: Path) -> None:
    html, _ = report(make_run(tmp_path, summary=survival_json()))
    samples = html.partition('id="samples"')[2].partition("</section>")[0]
    assert "continuations" not in samples
    assert "2 fixed prompts" in samples
    assert "counted here, not shown" in html.partition('id="health"')[2].partition("</section>")[0]


# ---- where things lie is nobody's business -------------------------------------------------------------------


def test_page_and_card_name_files_without_their_folders(tmp_path: Path) -> None:
    place = "/home/someone/secret-client"
    run = make_run(
        tmp_path,
        summary={"model": f"{place}/model", **with_perplexity(dataset=f"{place}/heldout.txt+wikitext2")},
        search={"calibration": {"source": f"{place}/a.jsonl:text+{place}/b/*.txt", "tokens": 1}},
        heal={"tuning": {**heal_json()["tuning"], "data": {"source": "../up/c.parquet", "tokens": 1}}},
        env={"command": ["layercut", "compress", f"{place}/model", f"--data={place}/a.jsonl", "--tune-data",
                         f"{place}/a b.txt+c4", "--out", f"{place}/runs/x", "--eval-data", "org/set:test:text"]},
    )  # fmt: skip
    (run / "evaluations").mkdir()
    text = {"source": f"{place}/later.txt", "tokens": 64, "window": 16}
    (run / "evaluations" / "x.json").write_text(json.dumps({"text": text, "perplexity": {"dense": 4, "compressed": 5}}))
    html, page = report(run)
    for shown_text in (html, model_card(run)):
        assert "someone" not in shown_text
        assert "../up" not in shown_text
        assert "heldout.txt+wikitext2" in shown_text
        assert "a.jsonl:text+*.txt" in shown_text
    assert "layercut compress model --data=a.jsonl --tune-data 'a b.txt+c4' --out x" in page.text
    assert "org/set:test:text" in page.text
    assert "later.txt 64 16 4.00 5.00" in page.text


@pytest.mark.parametrize("value", [math.inf, math.nan, "inf", "nan", "-inf", None, -1, 0, "x", [], 10**400])
def test_figures_that_are_no_numbers_do_not_stop_the_report(tmp_path: Path, value: Any) -> None:
    """Every number in every artefact at once."""

    def spoiled(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: spoiled(inside) for key, inside in found.items()}
        if isinstance(found, list):
            return [spoiled(inside) for inside in found]
        return value if isinstance(found, int | float) and not isinstance(found, bool) else found

    run = make_run(tmp_path, summary=survival_json(**with_perplexity(quantized=70.0)))
    (run / "frontier.json").write_text(json.dumps(frontier_json()))
    whole = {"layers": {"before": 30, "after": 24}}  # the stack is drawn all the same
    for file in run.glob("*.json"):
        found = json.loads(file.read_text())
        file.write_text(json.dumps(spoiled(found) | (whole if file.stem == "summary" else {})))
    assert report(run)[1].text
    assert model_card(run)
    assert ended(run)


# ---- what survived -----------------------------------------------------------------------------------------


def task_json(dense: float, compressed: float, lost: int, gained: int, p: float, chance: float) -> dict[str, Any]:
    return {
        "metric": "acc_norm", "items": 100, "chance": chance, "dense": dense, "dense_stderr": 0.0496,
        "compressed": compressed, "compressed_stderr": 0.0478, "lost": lost, "gained": gained, "p_value": p,
        "retention": compressed / dense, "retention_above_chance": (compressed - chance) / (dense - chance),
        "higher_is_better": True, "others": {"acc": {"dense": 0.49, "compressed": 0.41, "p_value": 0.2}},
    }  # fmt: skip


def survival_json(**changed: Any) -> dict[str, Any]:
    grids = {
        name: [
            {"length": n, "depth": d, "found": found if n == 2048 else 2, "trials": 2}
            for n in (1024, 2048)
            for d in (0.0, 0.5, 1.0)
        ]
        for name, found in (("dense", 2), ("compressed", 1))
    }
    buckets = {
        name: [{"start": a, "stop": b, "perplexity": value * k} for (a, b), value in zip(edges, values, strict=True)]
        for name, k, edges, values in (
            ("dense", 1.0, [(1, 64), (64, 1024), (1024, 2048)], [60.0, 40.0, 30.0]),
            ("compressed", 1.5, [(1, 64), (64, 1024), (1024, 2048)], [60.0, 40.0, 36.0]),
        )
    }
    return {
        "tasks": {
            "arc_easy": task_json(0.49, 0.40, 14, 5, 0.064, 0.25),
            "piqa": task_json(0.65, 0.55, 15, 5, 0.041, 0.5),
        },
        "retention": {"mean": 0.831, "above_chance": 0.479, "tasks": 2, "tasks_above_chance": 2},
        "long_context": {
            "window": 2048, "windows": 4, "perplexity": buckets, "passkey": {**grids, "seed": 0},
            "cost": {"tokens": 2048, "prefill_seconds": {"dense": 3.1, "compressed": 2.5},
                     "kv_bytes": {"dense": 94371840, "compressed": 75497472}},
        },
        "generation_health": {
            "dense": {"repeated_4grams": 0.22, "distinct_1": 0.5, "distinct_2": 0.8, "dense_loss": 0.61},
            "compressed": {"repeated_4grams": 0.31, "distinct_1": 0.45, "distinct_2": 0.7, "dense_loss": 1.4},
            "agreement": {"first_divergence": 6.5, "shortest": 0, "longest": 20},
            "prompts": 8, "prompt_tokens": 32, "tokens": 64,
        },
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("values", "mark", "words"),
    [
        ({"cut": 44.0, "folded": 44.8}, "good", "nearer to the dense model's 45.10: 44.00 → 44.80"),
        ({"cut": 45.0, "folded": 45.3}, "bad", "did not improve"),
        ({"cut": 44.0, "folded": 43.0}, "good", "improved perplexity"),
    ],
)
def test_a_fold_that_comes_nearer_to_the_dense_model_has_not_failed(
    values: dict[str, Any], mark: str, words: str
) -> None:
    """A cut may stand below it by chance."""
    run = RunFacts(summary=Json({**summary_json(), **with_perplexity(**values)}))
    (found,) = (v for v in verdicts.verdicts(run) if v.stage == "Fold")
    assert found.mark == mark
    assert words in found.text


@pytest.mark.parametrize(
    ("near", "far", "mark"),
    [(1.5, 1.5, "fair"), (1.5, 1.8, "bad"), (0.8, 1.05, "good"), (0.8, 1.2, "bad"), (1.05, 1.05, "good")],
)
def test_far_positions_that_are_close_have_lost_nothing(near: float, far: float, mark: str) -> None:
    def perplexity(*values: float) -> list[dict[str, Any]]:
        places = [(1, 64), (64, 128)]
        return [{"start": a, "stop": b, "perplexity": v} for (a, b), v in zip(places, values, strict=True)]

    buckets = {"dense": perplexity(30.0, 20.0), "compressed": perplexity(30.0 * near, 20.0 * far)}
    run = RunFacts(summary=Json(survival_json(long_context={"perplexity": buckets})))
    assert next(v for v in verdicts.verdicts(run) if v.stage == "Long context").mark == mark


def test_what_survived_is_shown_and_judged(tmp_path: Path) -> None:
    reach = {"layer_share": 0.9, "reachable": 1.22, "reached": 0.973}
    speed = {k: {**v, **reach} if k in ("prefill", "decode") else v for k, v in speed_json().items()}
    speed["generation_bytes"] = {"dense": 61_000_000, "compressed": 48_000_000}
    run = make_run(tmp_path, summary={**survival_json(), "speed": speed}, eval={"speed": speed})
    html, page = report(run)
    assert {"tasks", "long", "keys"} <= set(page.ids)
    for text in (
        "0.490 ± 0.050", "0.400 ± 0.048", "0.064", "83.1% of the dense model's score",
        "47.9% of what it has above chance", "; 1 got worse by more than chance", "2 → 1 of 2",
        "found 9 of 12 keys hidden in up to 2,048 tokens; the dense model 12",
        "at positions 1,024 to 2,047 perplexity is 54.00, 1.80× the dense model's 30.00; over the first 63 it is 1.50×",
        "3.1 s dense and 2.5 s compressed", "94.4 MB and 75.5 MB", "4-grams that repeat", "31.0%",
        "the two write the same for 6.5 of 64 tokens", "at most 1.25×, 1.22× with 90.0% of the time spent in layers",
        "61.0 MB",
    ):  # fmt: skip
        assert text in page.text, text
    assert "<title>positions 64 to 1,023: 60.00 (compressed)</title>" in html
    card = model_card(run)
    assert "| `arc_easy` | `acc_norm` | 100 | 25.0% | 0.490 ± 0.050 | 0.400 ± 0.048 | 14 | 5 | 0.064 |" in card
    assert "| 1,024–2,047 | 30.00 | 54.00 |" in card
    assert "found: 9 of 12; by the dense model 12." in card
    assert "| 4-grams that repeat | 22.0% | 31.0% |" in card
    assert BROKEN not in page.text + card
    terminal = shown(json.loads((run / "summary.json").read_text()))
    assert re.search(r"arc_easy, acc_norm +│ +0\.490 ± 0\.050 │ +0\.400 ± 0\.048 │ +0\.82×", terminal)
    assert re.search(r"retention above chance +│ +│ +47\.9%", terminal)


def test_a_model_that_only_guesses_is_called_broken(tmp_path: Path) -> None:
    guess = {"mean": 0.71, "above_chance": 0.04, "tasks": 2, "tasks_above_chance": 2}
    run = make_run(tmp_path, summary=survival_json(retention=guess))
    _, page = report(run)
    words = "broken: of what the dense model scores above chance, 4.0% is left over 2 tasks"
    assert words in page.text
    assert words in model_card(run)
    assert "broken" in shown(json.loads((run / "summary.json").read_text()))
    few = {name: {**row, "items": 20} for name, row in survival_json()["tasks"].items()}
    assert verdicts.broken({**summary_json(), **survival_json(retention=guess, tasks=few)}) is None, "40 items: noise"
    guessed = {"arc_easy": few["arc_easy"], "piqa": survival_json()["tasks"]["piqa"] | {"retention_above_chance": None}}
    assert verdicts.broken({**summary_json(), **survival_json(retention=guess, tasks=guessed)}) is None, "20 that count"
    unknown = {"mean": 0.9, "above_chance": None, "tasks": 1, "tasks_above_chance": 0}
    assert verdicts.broken({**summary_json(), **survival_json(retention=unknown)}) is None


@pytest.mark.parametrize(
    ("figures_of_it", "words"),
    [
        ({"repeated_4grams": 0.7, "dense_loss": 1.0}, "70.0% of what it writes repeats, of what the dense model"),
        ({"repeated_4grams": 0.0, "dense_loss": 5.2}, "unlikely, 5.20 nats per token against 0.61 of its own"),
        ({"repeated_4grams": 0.0, "dense_loss": "nan"}, "unlikely, not finite nats per token"),
    ],
)  # fmt: skip
def test_generation_that_did_not_survive_is_said_plainly(
    tmp_path: Path, figures_of_it: dict[str, Any], words: str
) -> None:
    health = survival_json()["generation_health"]
    run = make_run(tmp_path, summary=survival_json(generation_health={**health, "compressed": figures_of_it}))
    _, page = report(run)
    for text in (page.text, model_card(run)):
        assert "Generation did not survive" in text
        assert words in text
    assert "Generation did not survive" in shown(json.loads((run / "summary.json").read_text()))


def test_odd_values_of_what_survived_do_not_stop_the_report(tmp_path: Path) -> None:
    odd = {
        "tasks": {"a": {"metric": None, "dense": "inf", "others": 3}, "b": {"dense": 0.3, "others": {"acc": 1}}},
        "retention": {"mean": "x"},
        "long_context": {"perplexity": {"compressed": [3, {"start": 1, "stop": 64, "perplexity": "inf"}]},
                         "passkey": {"dense": [{"length": 5}], "compressed": None}, "cost": None},
        "generation_health": {"dense": {"repeated_4grams": 0.1}, "compressed": {"repeated_4grams": None, "x": 1}},
    }  # fmt: skip
    run = make_run(tmp_path, summary=odd)
    _, page = report(run)
    assert "not finite" in page.text
    assert model_card(run)
    assert shown(json.loads((run / "summary.json").read_text()))


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_report, model_card])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, write: Any) -> None:
    with pytest.raises(RunError, match=r"has no summary\.json") as missing:
        write(tmp_path)
    assert "layercut compress" in missing.value.hint
    for content in ("{", "[1]", ""):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(RunError, match="JSON") as wrong:
            write(tmp_path)
        assert wrong.value.hint
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="not valid JSON"):
        write(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---- the model card ----------------------------------------------------------------------------------------


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    empty, header, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(header), body


def test_model_card_holds_every_figure(tmp_path: Path) -> None:
    front, body = front_matter(model_card(make_run(tmp_path)))
    assert front["base_model"] == MODEL
    assert front["library_name"] == "transformers"
    assert "layercut" in front["tags"]
    for text in (
        "`13:19`", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]",
        "| tuned | 67.40 | 1.49× | 50.4% |", "| parameters | 134,515,008 | 113,276,160 | −15.8% |",
        "| decode, tokens/s | 24.10 | 28.60 | 1.19× | 1.25× |",
        "| tuning | `self` | 120,832 | `88b1c0aa42fe` |",
        "`torch` `2.11.0`", 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "overstate what survives", "Tasks: not measured.", "layers `12, 13` of this model",
    ):  # fmt: skip
        assert text in body, text
    assert "\n\n\n\n" not in body


def test_names_cannot_break_the_markdown(tmp_path: Path) -> None:
    evil = f"a|b`{EVIL}`\n# title [x](http://y) *z*"
    run = make_run(
        tmp_path,
        summary={"model": evil, **with_perplexity(dataset=evil)},
        search={"calibration": {"source": evil}},
    )
    _, body = front_matter(model_card(run))
    outside = re.sub(r"`[^`\n]*`", "", body.replace("\\`", ""))
    assert "<script" not in outside
    assert "\n# title" not in body
    assert "[x](" not in outside.replace("\\[", "").replace("\\]", "")


# ---- the closing table -------------------------------------------------------------------------------------


def test_closing_table_shows_what_was_measured() -> None:
    text = shown(summary_json())
    for row in (
        r"layers +│ +30 │ +24 │ +−20\.0%", r"13:19", r"134\.5M │ +113\.3M",
        r"perplexity, tuned +│ +45\.10 │ +67\.40 │ +1\.49×",
        r"decode, tokens/s +│ +24\.10 │ +28\.60 │ +1\.19×", r"time, tune +│ +│ +2 min 12 s", r"peak memory",
    ):  # fmt: skip
        assert re.search(row, text), row
    assert "quantized" not in text
    assert BROKEN not in text


def test_closing_table_shows_what_is_found_in_context() -> None:
    def grid(found: int) -> list[dict[str, Any]]:
        return [{"length": 128, "depth": 0.5, "found": found, "trials": 10}]

    probes = {"keys": {"dense": grid(10), "compressed": grid(9)}, "lists": {"dense": grid(6), "compressed": grid(4)}}
    rows = [
        " ".join(line.strip("│").replace("│", " ").split())
        for line in shown(summary_json() | {"probes": probes}).splitlines()
    ]
    assert "hidden keys found 10/10 9/10" in rows
    assert "list values found 6/10 4/10" in rows


def test_closing_table_of_a_bare_summary_and_a_name_with_markup() -> None:
    text = shown({"model": "[red]x[/red]\x1b[31m"})
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert "not measured" in text


# ---- figures as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.count(134515008), "134.5M"),
        (formatting.count(8_030_000_000), "8.0B"),
        (formatting.count(950), "950"),
        (formatting.count(None), "not measured"),
        (formatting.size(269060552), "269.1 MB"),
        (formatting.figure("inf"), "not finite"),
        (formatting.figure(38.4), "38.40"),
        (formatting.figure(20471.2), "20,471"),
        (formatting.figure(True), "not measured"),
        (formatting.duration(83.2), "1 min 23 s"),
        (formatting.duration(3700), "1 h 1 min"),
        (formatting.times(1.25), "1.25×"),
        (formatting.change(30, 24), "−20.0%"),
        (formatting.change(0, 24), ""),
        (formatting.label([[13, 19], [24, 25]]), "13:19, 24:25"),
        (formatting.layer_names([[13, 19], [24, 25]]), "13–18, 24"),
        (formatting.short_name("runs/a/model.gguf"), "model.gguf"),
        (formatting.short_name(MODEL), MODEL),
        (formatting.short_name("./local/model/"), "model"),
    ],
)
def test_figures_as_text(text: str, expected: str) -> None:
    assert text == expected


# ---- a real browser ----------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no chromium installed: apt-get install chromium")
def test_report_opens_in_a_browser(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run"))
    shot = tmp_path / "shot.png"
    command = [str(BROWSER), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,3000"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 50_000, "an empty page is far smaller"


def test_what_packages_measured_and_tuned_by_is_shown_and_escaped(tmp_path: Path) -> None:
    rows = {
        "score": {"dense": 0.8, "compressed": 0.6, "higher_is_better": True},
        "errors": {"dense": 4, "compressed": 2, "higher_is_better": False},
        "same": {"dense": 1, "compressed": 1, "higher_is_better": True},
        "open": {"dense": 2, "compressed": 3, "higher_is_better": None},
        "ruined": {"dense": 2, "compressed": "inf", "higher_is_better": False},
        "none": {"dense": None, "compressed": None},
        "odd": None,
    }
    measured = {"evaluations": {"pack<b>age": rows, "broken": 3}}
    tuning = {**heal_json()["tuning"], "objective": "mine", "label": "reverse <i>KL</i>", "unit": "$x^$ units"}
    run = make_run(tmp_path, summary=measured, heal={"tuning": tuning})
    html, page = report(run)
    assert "<b>age" not in html
    assert "<i>KL" not in html
    assert "by the objective reverse <i>KL</i>" in page.text
    changes = {str(row["metric"]): row["change"] for row in tables.evaluation_rows(Json(measured))}
    assert changes == {
        "score": "−25.0%, worse", "errors": "−50.0%, better", "same": "+0.0%", "open": "+50.0%",
        "ruined": "", "none": "",
    }  # fmt: skip
    card, terminal = model_card(run), shown({**summary_json(), **measured})
    assert "`pack<b>age`" in card
    for text in (page.text, card, terminal):
        for words in ("pack<b>age", "errors", "−50.0%, better", "+50.0%", "not finite"):
            assert words in text, words
