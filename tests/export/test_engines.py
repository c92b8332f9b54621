"""What layercut writes, in engines that are not the transformers that wrote it: two that are cheap to have.

All of them, on more models: `make test-engines`. Without the package index, and no environment from before, it is said
that transformers 4 was left out.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import folders
import tiny
from engines import judge
from engines.environments import ENGINES, NotInstalledError, python_of
from engines.models import TINY, Case, case, computed
from layercut.segments import Segment
from layercut.surgery import cut_gguf


@pytest.fixture(scope="module")
def python() -> Path:
    """Of an environment with transformers 4, kept in build/ for the next time."""
    try:
        return python_of(ENGINES["transformers 4"])
    except NotInstalledError as error:
        pytest.skip(f"transformers 4 is left out, it cannot be installed: {error}")


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """The tiny models of `make test-engines`."""
    work = tmp_path_factory.mktemp("engines")
    return {name: case(name, work) for name in TINY}


@pytest.mark.parametrize("name", TINY)
def test_transformers_4_computes_the_same(name, cases, python):
    found = judge.judged(ENGINES["transformers 4"], python, cases[name])
    assert (found.verdict, found.greedy, found.same_ids) == ("right", len(cases[name].greedy), True), found


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp_py_sync") is None, reason="pip install llama-cpp-py-sync")
def test_llama_cpp_computes_the_same_from_a_cut_file_off_its_period(tmp_path):
    """On a text of six times the sliding window."""
    pytest.importorskip("gguf")
    from gguf_writer import write_gguf

    model = tiny.gemma3([5], 9, vocab_size=folders.VOCABULARY, max_position_embeddings=256)
    whole = write_gguf(model, folders.tokenizer(), tmp_path / "whole.gguf")
    cut_gguf(whole, [Segment(1, 2)], tmp_path / "cut.gguf")
    small = tiny.gemma3([4], 8, vocab_size=folders.VOCABULARY, max_position_embeddings=256)
    kept = [i for i in range(9) if i != 1]
    for place, i in enumerate(kept):
        small.model.layers[place].load_state_dict(model.model.layers[i].state_dict())
    for part in ("embed_tokens", "norm"):
        getattr(small.model, part).load_state_dict(getattr(model.model, part).state_dict())
    small.lm_head.load_state_dict(model.lm_head.state_dict())
    tokens = torch.randint(2, 250, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    losses, greedy, margins = computed(small, tokens)
    asked = {"tokens": tokens, "prompt": 64, "new": len(greedy), "text": "", "threads": 1}
    small.save_pretrained(tmp_path / "folder")
    made = Case(
        name="cut", folder=tmp_path / "folder", asked=asked, losses=losses, greedy=greedy, margins=margins, ids=[]
    )
    engine = ENGINES["llama.cpp"]
    found = judge.judged(engine, python_of(engine), made, tmp_path / "cut.gguf")
    assert found.verdict == "right", found
    wrong = judge.judged(engine, python_of(engine), made, whole)
    assert wrong.verdict == "wrong", "another model is told apart"


# --- the judge itself ---


def a_case(**changed: Any) -> Case:
    facts = {"losses": [1.0, 2.0, 3.0], "greedy": [5, 6, 7], "margins": [1.0, 1.0, 1.0], "ids": [1, 2]}
    return Case(name="x", folder=Path("x"), asked={"threads": 1}, **{**facts, **changed})


SAME = {"losses": [1.0, 2.0, 3.0], "greedy": [5, 6, 7], "ids": [1, 2]}


@pytest.mark.parametrize(
    ("found", "case", "verdict", "words"),
    [
        ({}, {}, "right", ""),
        ({"losses": [1.0, 2.004, 3.0]}, {}, "right", ""),
        ({"losses": [1.0, 2.1, 3.0]}, {}, "wrong", "losses off by up to 0.1"),
        ({"losses": [1.0, 2.1, 3.0], "dtype": "bfloat16"}, {}, "wrong", "mean by 0.0333"),
        ({"losses": [1.0, 2.05, 3.0], "dtype": "bfloat16"}, {}, "right", ""),
        ({"losses": [1.0, float("nan"), 3.0]}, {}, "wrong", "losses"),
        ({"greedy": [5, 9, 7]}, {}, "wrong", "greedy token 1 is another"),
        ({"greedy": [5, 9, 7]}, {"margins": [1.0, 0.001, 1.0]}, "right", ""),
        ({"greedy": [5]}, {}, "wrong", "greedy token 1"),
        ({"ids": [1]}, {}, "wrong", "other token ids"),
        ({"ids": None}, {}, "right", ""),
    ],
)
def test_verdicts(found, case, verdict, words):
    judged = judge.compared({**SAME, **found}, a_case(**case))
    assert judged.verdict == verdict
    assert words in judged.reason


def test_a_refusal_is_the_engines_words_without_paths():
    stderr = "Traceback\n  File x\nKeyError: 'rope_type'\nwarning: leaving /tmp/a/b behind\n"
    assert judge.why(stderr) == "KeyError: 'rope_type'"
    assert judge.why("ValueError: /home/me/model is no model") == "ValueError: model is no model"


def test_the_table_has_every_engine_and_model(monkeypatch):
    """And nothing in it is silently wrong."""
    from engines.models import MODELS

    result = json.loads((Path(__file__).parents[2] / "research" / "results" / "engines.json").read_text())
    for name, row in result["rows"].items():
        assert set(row["models"]) == {*MODELS}, name
        wrong = [model for model, each in row["models"].items() if each["verdict"] == "wrong"]
        assert not wrong, f"{name} loads {wrong} wrongly, and layercut does not say so"
    assert set(result["rows"]) <= {*ENGINES}
