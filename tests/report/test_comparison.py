"""The tables of a comparison, from made-up figures."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layercut.cli.command_line import main
from layercut.report.formatting import Json
from layercut.report.page import comparison, comparison_tables


def tables(found: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Of each section the columns by their heads."""
    made = {section.name: section.tables[0] for section in comparison(Json(found))}
    columns = {name: map(list, zip(*table.rows, strict=True)) for name, table in made.items()}
    return {name: dict(zip(made[name].heads, cells, strict=True)) for name, cells in columns.items()}


def page(folder: Path, found: dict[str, Any]) -> str:
    (folder / "compare.json").write_text(json.dumps({"model": "x", **found}))
    assert main(["report", str(folder)]) == 0
    return (folder / "compare.html").read_text()


def row(method: str, kl: float, **values: float) -> dict[str, Any]:
    return {"method": method, "segments": [[13, 19]], "kl": kl, "perplexity": values, "search_seconds": 3.0,
            "standard_error": dict.fromkeys(values, 0.01), "layer_forwards": 123456, "layer_backwards": 0}  # fmt: skip


@pytest.mark.parametrize("lora", [{}, {"lora": 99_999.0}])
def test_methods_are_sorted_by_kl_with_their_perplexities_and_error(lora: dict[str, float]) -> None:
    values = {"cut": 99_999.0, "folded": 99_999.0, "tuned": 99_999.0, **lora}
    rows = [row("block-influence", 2.0, **values), row("clp:all", 1.0, **values) | {"refused": "why"}]
    found = {"model": "m", "layers": {"before": 30, "after": 24}, "tuning": {"tokens": 64}, "methods": rows,
             "dense": {"perplexity": 33_333.0}, "evaluation": {"source": "wikitext2"}}  # fmt: skip
    shown = tables(found)["methods"]
    assert shown["method"] == ["clp:all", "block-influence"]
    assert shown["removed"] == ["13–18", "13–18"]
    assert shown["ppl cut"] == ["refused", "99,999"]
    assert (shown["±"][0], shown["over dense"][0], shown["forwards"][0]) == ("1000.0", "3.00× ± 0.03", "123,456")
    console = Console(width=80, file=io.StringIO())
    console.print(*comparison_tables(found))
    assert console.file.getvalue().count("99,999") == 2 * len(values) - 1, "eighty columns hold them all"  # type: ignore[attr-defined]


def test_each_of_several_texts_has_its_perplexity() -> None:
    found = {"dense": {"texts": {"wiki.txt": 21.25, "web": 33.5}},
             "methods": [{"method": "clp", "texts": {"cut": {"wiki.txt": 41.75, "web": 57.25}}}]}  # fmt: skip
    shown = tables(found)["texts"]
    assert (shown["wiki.txt"], shown["web"]) == (["21.25", "41.75"], ["33.50", "57.25"])
    found["dense"]["texts"] = {"wiki.txt": 21.25}  # type: ignore[call-overload]
    assert "texts" not in tables(found)


def test_what_survives_stands_beside_the_dense_model() -> None:
    hits = {"dense_hits": {"recall": 1.0, "sums": 0.5}, "hits": {"recall": 0.25, "sums": 0.125}}
    told = hits | {"kl": {"recall": 0.5}}
    cut = {"scores": {"wiki": 60.3}, "retained": {"mean": 0.912, "error": 0.008, "behind": 0.1, "p_value": 0.01},
           "capabilities": told, "evaluations": {"sentiment": {"bias": 0.03}}}  # fmt: skip
    dense = {"scores": {"wiki": 35.2}, "keys": [{"found": 1, "trials": 2}, {"found": 1, "trials": 2}]}
    found = {"tasks": {"wiki": {"metric": "word_perplexity", "items": 62, "share": False}}, "judged_dense": dense,
             "methods": [{"method": "clp", "judged": {"cut": cut}}]}  # fmt: skip
    shown = tables(found)["survives"]
    assert shown["kept %"] == ["100", "91.2 ± 0.8"]
    assert shown["behind"] == ["–", "10.0*"]
    assert shown["wiki"] == ["35.20", "60.30"], "a perplexity is no share"
    assert (shown["keys"], shown["probes"]) == (["2/4", "-"], ["75.0%", "18.8%"])
    assert (shown["KL on probes"], shown["sentiment bias"]) == (["–", "0.5"], ["–", "0.03"])
    nothing = copy.deepcopy(found)
    nothing["methods"][0]["judged"]["cut"]["retained"] = None  # type: ignore[index]
    assert tables(nothing)["survives"]["kept %"] == ["–", "–"]


def test_a_page_of_odd_figures_and_names_is_made_all_the_same(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = [{"method": evil, "segments": "x", "kl": "inf", "perplexity": {"cut": "nan", "folded": None},
             "refused": evil, "search_seconds": None}, 3, row("clp", 1.0, cut=2.0)]  # fmt: skip
    html = page(tmp_path, {"model": evil, "methods": rows, "dense": None, "layers": {"before": 30, "after": 24}})
    assert "<script" not in html
    assert "alert(1)" in html
    assert '<rect class="gone" x="13" width="6"' in html
    assert "://" not in html
