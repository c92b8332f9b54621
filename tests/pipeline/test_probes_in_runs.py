"""Probes in a run: what is tuned and rounded on, what answers count, and what is told of the result."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import folders
from layercut import quantization
from layercut.cli.command_line import main
from layercut.config import DataConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig
from layercut.data import probes as probes_module
from layercut.data.blocks import stored_blocks, stored_marks
from layercut.data.probe_families import CAPABILITIES
from layercut.data.probes import judging_rows, probe_rows
from layercut.errors import ConfigError
from layercut.evaluation import capability_figures
from layercut.evaluation.probe_scores import TEST_ROWS
from layercut.healing import tune_
from layercut.models import checkpoints, loading
from layercut.pipeline import compare
from layercut.pipeline.stages import evaluate, heal, quantize, shortlisting
from layercut.pipeline.stages.text import tuning_source
from layercut.segments import Segment
from layercut.surgery import cut


@pytest.fixture
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing but copies fits rows of 128 letters."""
    monkeypatch.setattr(probes_module, "FOCUS_SHARE", 0.3)


class Refused(Exception):
    """With what a stage depends on."""


def refuse(kind: Any, name: str, inputs: Any, **_: Any) -> Any:
    raise Refused(inputs)


@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize(
    ("asked", "preserve", "source", "window", "wanted"),
    [
        ({"bits": 4}, "all", "c4", 128, [*CAPABILITIES]),
        ({"bits": "auto"}, "structure,copy", "c4", 128, ["copy", "structure"]),
        ({"bits": 4}, "none", "c4", 128, []),
        ({"bits": 8}, "all", "c4", 128, []),
        ({"bits": 4, "quantizer": "rtn"}, "all", "c4", 128, []),
        ({"bits": 4}, "all", "c4+probes:0.25", 128, []),  # which has them already
        ({"bits": 4}, "all", "c4", 16, []),  # where none fits
    ],
)
def test_few_bits_are_rounded_on_probes_as_well(asked, preserve, source, window, wanted):
    config, rows = CompressConfig(), torch.arange(12 * window).view(12, window)
    config = replace(
        config, search=replace(config.search, preserve=preserve), quantize=replace(config.quantize, **asked),
        text=replace(config.text, data=source, tokens=12 * window, window=window, seed=3),
    )  # fmt: skip
    work: Any = SimpleNamespace(
        tokenizer=folders.tokenizer(), checkpoint=SimpleNamespace(gguf=None), run=SimpleNamespace(stage=refuse),
        config=config, blocks={"calibration": rows}, text=dict.fromkeys(("calibration", "tuning", "heldout")),
    )  # fmt: skip
    found, _ = quantize.rows_to_round_on(work, config.quantize)
    assert torch.equal(found[:12], rows)
    how: dict[str, Any] = {"family": "tuning", "capabilities": wanted or ["copy"], "seed": 3, "first": 2**20}
    made = probe_rows(folders.tokenizer(), rows=3, window=window, **how)
    held = made.tokens[(made.answers >= 0).any(1)]
    assert torch.equal(found[12:], held if wanted else rows[:0]), "one for four rows of text"
    assert len(held) == 3 * bool(made.names), "which all hold some"
    told = quantize.how_rounded(config, config.quantize)
    assert (told != quantization.recipe(config.quantize)) == (bool(wanted) or window == 16)
    if asked.get("quantizer") != "rtn":
        with pytest.raises(Refused) as refused:
            quantize.quantize(work, [])
        assert all(each in refused.value.args[0] for each in told), "what the stage is redone for"


@pytest.mark.usefixtures("_letters")
def test_a_run_rounds_on_probes_wherever_it_rounds(tiny_model, texts, tmp_path, monkeypatch):
    seen, round_, measure = [], quantization.quantize, quantization.bit_choice.measured

    def noted(model, tokens, *, bits, **how):
        seen.append(tokens)
        return round_(model, tokens, bits=bits, **how)

    def measured(model, tokens, config):
        seen.append(tokens)
        return measure(model, tokens, config)

    monkeypatch.setattr(quantization.bit_choice, "measured", measured)
    monkeypatch.setattr(quantization, "quantize", noted)
    argv = [str(tiny_model), f"--data={texts[0]}", "--tokens=1024", "--window=128", "--tune-tokens=0", "--no-fold"]
    size = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    assert main(["tune", *argv, "--bits=auto", f"--out={tmp_path}", f"--target-size={size // 2}B"]) == 0
    (text,) = load_file(tmp_path / "tokens-calibration.safetensors").values()
    made = probe_rows(folders.tokenizer(), rows=2, window=128, family="tuning", first=2**20)
    both = torch.cat([text, made.tokens])
    assert len(seen) >= 2, "where bits are chosen and in the end"
    assert all(torch.equal(tokens, both) for tokens in seen)


@pytest.mark.usefixtures("_letters")
def test_answers_count_more_where_a_run_tunes_and_where_it_compares(tiny_model, texts, tmp_path, monkeypatch):
    seen = []

    def noted(stage):
        def noted(student, dense, tokens, *, token_weights, answers, **how):
            seen.append((stage, tokens, token_weights, answers))
            return tune_(student, dense, tokens, token_weights=token_weights, answers=answers, **how)

        return noted

    monkeypatch.setattr("layercut.pipeline.resolve_options.ENOUGH_TOKENS", 4096)
    for stage in (heal, shortlisting, compare):
        monkeypatch.setattr(stage, "tune_", noted(stage))
    flags = [f"--data={texts[0]}", "--window=128", "--ratio=0.25", "--probe-share=0.3"]
    asked = [*flags, "--effort=high", "--tokens=1024", "--tune-tokens=4096", f"--out={tmp_path / 'run'}"]
    assert main(["tune", str(tiny_model), *asked]) == 0
    assert len(seen) > 2
    marks, rows = (found(tmp_path / "run", "tuning") for found in (stored_marks, stored_blocks))
    assert marks
    assert marks.answers.any()
    assert torch.equal(seen[-1][1], rows)
    for stage, tokens, weights, answers in seen:
        of = [next(i for i, row in enumerate(rows) if torch.equal(row, some)) for some in tokens]
        # a candidate of the shortlist is judged by what the dense model predicts, and so is what heals it
        assert answers is None if stage is shortlisting else torch.equal(answers, marks.answers[of])
        assert torch.equal(weights, 1 + 3.0 * marks.answers[of])
    seen.clear()
    asked = [*flags, "--tokens=512", "--tune-tokens=2048", f"--eval-data={texts[1]}", "--eval-tokens=256"]
    asked += ["--eval-window=64", "--methods=exhaustive", f"--out={tmp_path / 'compared'}"]
    assert main(["compare", str(tiny_model), *asked]) == 0
    marks = stored_marks(tmp_path / "compared", "tuning")
    assert marks
    ((stage, _, weights, answers),) = seen
    assert stage is compare
    assert torch.equal(weights, torch.where(marks.answers, 4.0, 1.0))
    assert torch.equal(answers, marks.answers)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "a.txt+chats:0.1+probes:0.1"),
        ({"probe_share": 0.2}, "a.txt+chats:0.1+probes:0.2"),
        ({"probe_share": 0.0}, "a.txt+chats:0.1"),
        ({"probe_share": 0.9}, "a.txt+probes:0.9"),  # chats give way
        ({"chat_share": 0.2}, "a.txt+chats:0.2+probes:0.1"),
        ({"tune_data": "b.txt"}, "b.txt+chats:0.1+probes:0.1"),
        ({"tune_data": "python-docs+probes:0.5"}, "python-docs+probes:0.5+chats:0.1"),
        ({"tune_data": "python-docs+chats"}, "python-docs+chats+probes:0.1"),
        ({"tune_data": "probes"}, "probes+chats:0.1"),
        ({"tune_data": "b.txt+probes:0.95"}, "b.txt+probes:0.95"),
        ({"tune_tokens": 0}, "a.txt+probes:0.1"),
    ],
)
def test_what_is_tuned_on_has_its_shares_of_chats_and_probes(given, found):
    def tuned_on(chats: bool = True, preserve: str = "all", **fits: bool) -> list[str]:
        asked = replace(config, search=SearchConfig(preserve=preserve))
        work: Any = SimpleNamespace(config=asked, **{"probes_fit": True, "chats_fit": True} | fits)
        return tuning_source(work, chats).split("+")

    config = CompressConfig(text=DataConfig(data="a.txt"), heal=HealConfig(**given))
    parts, named = found.split("+"), (given.get("tune_data") or "a.txt").split("+")
    assert tuned_on() == parts
    no_chats = [part for part in parts if part in named or not part.startswith("chats")]
    assert tuned_on(chats_fit=False) == tuned_on(chats=False) == no_chats
    no_probes = [part for part in parts if part in named or not part.startswith("probes")]
    no_probes += ["chats:0.1"] * (given.get("probe_share") == 0.9)
    assert tuned_on(probes_fit=False) == tuned_on(preserve="none") == no_probes


@pytest.mark.parametrize("given", [{"chat_share": 1.0}, {"chat_share": -0.1}, {"probe_share": 0.0001}])
def test_shares_leave_some_text_to_tune_on(given):
    with pytest.raises(ConfigError, match=next(iter(given)).replace("_", "-")) as error:
        HealConfig(**given)
    assert "0.1" in error.value.hint


def test_a_run_tells_what_the_layers_hold_and_what_is_left(tiny_model, texts, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [f"--data={texts[0]}", f"--eval-data={texts[1]}", "--tokens=512", "--window=128", "--tune-tokens=0"]
    flags += ["--no-fold", "--eval-tokens=128", "--eval-window=64", "--no-speed", "--ratio=0.25"]
    flags += ["--probes", f"--out={out}"]
    assert main(["compress", str(tiny_model), *flags, "--preserve=sums,recall"]) == 2
    assert "of recall fits rows of 128 tokens" in capsys.readouterr().err
    assert main(["compress", str(tiny_model), *flags]) == 0, capsys.readouterr().err
    search, found, told = (json.loads((out / f"{n}.json").read_text()) for n in ("search", "capabilities", "summary"))
    assert search["tests"]["capabilities"] == found["map"]["names"][:-1]
    best = search["candidates"][0]
    assert best["score"] == pytest.approx(best["kl"] + best["probe_kl"], rel=1e-5)
    assert search["by_text"]["kl"] <= best["kl"] + 1e-9
    assert next(len(each["segments"]) for each in search["by_number"]) == 1
    cuts = [tuple(map(tuple, each["segments"])) for each in search["by_number"]]
    assert len(cuts) == len({*cuts}), "each cut once"
    assert all(len(cut) == len({*cut}) for cut in cuts), "no cut holds a segment twice"
    assert len(found["map"]["windows"]) == folders.LAYERS
    assert told["capabilities"]["hits"].keys() == found["judged"]["dense_hits"].keys()
    page = (out / "report.html").read_text()
    assert ("Text alone would take" in page) == (search["by_text"]["segments"] != best["segments"])
    # what the compressed model makes of probes of the judging family, beside the dense one
    opened = loading.load(checkpoints.resolve(str(tiny_model)))
    small = cut(opened.model, [Segment(*bounds) for bounds in search["segments"]])
    kept = {"family": "judging", "rows": TEST_ROWS, "window": 128}
    figures = capability_figures(small, opened.model, probe_rows(opened.tokenizer, **kept))
    assert found["judged"].keys() == vars(figures).keys()
    for name, by_capability in vars(figures).items():
        assert found["judged"][name] == pytest.approx(by_capability, rel=1e-4)
    assert min(figures.kl.values()) > 1e-3, "the dense model beside itself would have none"
    kept |= {"rows": evaluate.ROWS_OF_A_LENGTH, "window": folders.POSITIONS}
    rows = {name: judging_rows(opened.tokenizer, capability=name, **kept) for name in ("recall", "lists")}
    answers = {name: len(each.capability) for name, each in rows.items() if each.names}
    assert {each["capability"]: each["answers"] for each in found["by_length"]} == answers
