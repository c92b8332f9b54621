"""Which engines would misread a cut: the table, cuts on and off a period, and the four ways out of one model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import folders
import tiny
from layercut.cli.command_line import main
from layercut.config import CONSUMER_NAMES
from layercut.config.commands import CutConfig
from layercut.errors import ConfigError
from layercut.export.engines import ENGINES, LLAMA_CPP, check_cut, readings, restriction
from layercut.export.gguf_check import by_llama_cpp
from layercut.models import checkpoints, loading
from layercut.models.gguf_header import read_header
from layercut.report.model_card import model_card
from layercut.report.page import write_report
from layercut.segments import Segment

pytest.importorskip("gguf")
from gguf_writer import write_gguf

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp_py_sync") is None, reason="pip install llama-cpp-py-sync"
)
OFF = [Segment(2, 3)]
"""Takes the layer that attends to everything, the sixth, to the fifth place."""
ON = [Segment(0, 6)]
READ_GGUF = ["llama.cpp", "ollama", "lm-studio"]


class Config(SimpleNamespace):
    """What is asked of a config."""

    num_attention_heads, hidden_size, intermediate_size, head_dim, sliding_window = 4, 576, 1536, 64, 16

    def get_text_config(self, **_: Any) -> Config:
        return self

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def config(model_type: str, full: list[int], layers: int = 12, **facts: Any) -> Config:
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(layers)]
    return Config(**{"model_type": model_type, "num_hidden_layers": layers, "layer_types": kinds, **facts})


def verdicts(model: Config, segments: list[Segment], **how: Any) -> dict[str, str]:
    return {one.consumer: one.verdict for one in readings(model, segments, **how)}


def table() -> str:
    """The engines as Markdown, for the documents."""
    lines = ["| consumer | `--for` | reads | takes from a layer's place | seen in |", "|---|---|---|---|---|"]
    for name, engine in ENGINES.items():
        as_llama_cpp = name != "llama.cpp" and set(LLAMA_CPP) <= set(engine.rules)
        own = [rule for rule in engine.rules if not (as_llama_cpp and rule in LLAMA_CPP)]
        words = {rule.words: [t for one in own if one.words == rule.words for t in one.model_types] for rule in own}
        told = ["what llama.cpp does"] if as_llama_cpp else []
        told += [f"{', '.join(types)}: {each}" for each, types in words.items()]
        seen = "; ".join(dict.fromkeys([engine.tried, *(rule.source for rule in own)]))
        row = (engine.title, f"`{name}`", ", ".join(engine.reads), "; ".join(told) or "nothing", seen)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def test_the_table_stands_in_the_guide_with_where_each_rule_was_seen():
    assert tuple(ENGINES) == CONSUMER_NAMES
    for engine in ENGINES.values():
        assert engine.tried
        assert all(rule.source and any(c.isdigit() for c in rule.source + engine.tried) for rule in engine.rules)
    guide = Path(__file__).parents[2] / "docs" / "engines.md"
    shown = guide.read_text(encoding="utf-8").split("<!-- consumers -->\n")[1].split("<!-- /consumers -->")[0]
    assert shown == table()


def test_a_cut_off_the_period_of_gemma_3():
    model = config("gemma3_text", [5, 11])
    found = verdicts(model, OFF)
    assert [name for name, verdict in found.items() if verdict == "misread"] == ["ollama", "mlx"]
    assert found["llama.cpp"] == found["lm-studio"] == "note"  # an array says it, which older builds do not read
    assert found["vllm"] == found["transformers"] == found["openvino"] == "right"
    assert found["onnxruntime"] == "refused"
    assert "layer 4 is otherwise (layer 5 of the whole model)" in readings(model, OFF, names=["mlx"])[0].words
    on = verdicts(model, ON)
    assert "misread" not in on.values()
    assert on["llama.cpp"] == "right"
    every_2nd = verdicts(config("gemma3_text", [3, 7, 9, 11]), [Segment(0, 8)])
    assert (every_2nd["mlx"], every_2nd["ollama"]) == ("right", "misread")  # mlx reads the period that is written


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        (config("gpt_oss", [1, 3, 5, 7, 9, 11]), ["vllm", "ollama", "onnxruntime"]),
        (config("cohere2", [3, 7, 11]), ["mlx"]),
        (config("cohere2", [3, 7, 11], sliding_window_pattern=4), ["mlx"]),
        (config("gemma2", [1, 3, 5, 7, 9, 11]), ["sglang", "ollama"]),
        (config("smollm3", [], layer_types=None, no_rope_layers=[1, 1, 1, 0] * 3), READ_GGUF),
        (config("olmo3", [3, 7, 11]), []),
        (config("llama", [*range(12)], sliding_window=None), []),
        (config("gemma3_text", [5, 11], sliding_window=None), []),  # nothing slides
    ],
    ids=lambda value: value.model_type if isinstance(value, Config) else "",
)
def test_who_misreads_one_layer_less(model, wrong):
    found = verdicts(model, OFF)
    assert [name for name, verdict in found.items() if verdict == "misread"] == wrong


def test_a_rule_on_the_number_of_layers():
    model = config("gemma3_text", [*range(5, 62, 6)], 62)
    assert verdicts(model, [Segment(0, 6)])["llama.cpp"] == "misread"
    assert verdicts(model, [Segment(0, 6)])["mlx"] == "right"
    with pytest.raises(ConfigError, match="62 would become 56"):
        restriction(model, ["llama.cpp"], 6)


def test_the_search_is_restricted_to_whole_periods():
    model = config("gemma3_text", [*range(5, 24, 6)], 24)
    limits = restriction(model, ["mlx"], 6)
    assert limits.segments() == [Segment(s, s + 6) for s in range(19)]
    assert not limits.allows([Segment(0, 1), Segment(7, 12)])
    assert limits.allows([Segment(2, 3), Segment(5, 10)])  # 3 and 4 slide, as those in their places did
    assert restriction(model, ["vllm", "transformers"], 5).is_none
    # off the period the end alone can go, where nothing moves
    assert restriction(model, ["mlx"], 5).segments() == [Segment(19, 24)]


@pytest.mark.parametrize(
    ("names", "written", "refusal"),
    [
        (["vllm", "mlx"], "int4", "MLX does not read int4 weights .*; it reads folders"),
        (["llama.cpp"], "int8", r"llama\.cpp does not read int8 .* GGUF files, and folders of float weights"),
        (["vllm"], "int8 embeddings", "vLLM does not read int8 embeddings"),
        (["mlx"], "gguf", "MLX does not read GGUF files"),
        (["llama.cpp", "ollama"], "gguf", "Ollama would not read this model right: it lets every 6th layer"),
    ],
)
def test_what_an_engine_does_not_read_is_refused(names, written, refusal):
    with pytest.raises(ConfigError, match=refusal):
        check_cut(config("gemma3_text", [4, 10], 11), [], names, written)


def test_what_engines_read_is_not_refused():
    check_cut(config("llama", [], sliding_window=None), [Segment(2, 3)], ["llama.cpp", "mlx", "vllm"], "float")
    check_cut(config("gemma3_text", [4, 10], 11), [], ["llama.cpp"], "gguf")
    with pytest.raises(ConfigError, match="ONNX Runtime does not load gemma3_text"):
        restriction(config("gemma3_text", [5, 11]), ["onnxruntime"], 6)


def test_widths_that_marlin_does_not_take():
    found = {one.consumer: one for one in readings(config("llama", []), OFF, "int4")}
    assert found["vllm"].words.endswith("multiples of 128, not 576")
    assert found["mlx"].verdict == found["llama.cpp"].verdict == "refused"
    wide = config("llama", [], hidden_size=512)
    assert verdicts(wide, OFF, written="int4")["vllm"] == "right"


# --- four ways ---

TOKENS = torch.randint(2, folders.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(2, folders.VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(1))
"""Five times as long as the sliding window."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict[str, Any]:
    """A Gemma 3 on its period as a folder and as a file, and what it computes with the cut layer made the identity."""
    place = tmp_path_factory.mktemp("gemma")
    model = tiny.gemma3([5, 11], 12, vocab_size=folders.VOCABULARY)
    model.save_pretrained(place / "whole")
    folders.tokenizer().save_pretrained(place / "whole")
    write_gguf(model, folders.tokenizer(), place / "whole.gguf", "F32")
    tiny.make_identity_(model, range(2, 3))
    with torch.no_grad():
        return {"folder": place / "whole", "file": place / "whole.gguf", "logits": model(LONG).logits, "model": model}


def off(logits: torch.Tensor, source: dict[str, Any]) -> float:
    return ((logits - source["logits"]).norm() / source["logits"].norm()).item()


def in_transformers(folder: Path, **changes: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)
    with torch.no_grad():
        return model(LONG).logits


def converted(folder: Path, out: Path, *_: Any) -> None:
    """As llama.cpp's converter: without the array."""
    loaded = loading.load(checkpoints.resolve(str(folder)), dtype="float32")
    write_gguf(loaded.model, loaded.tokenizer, out, "F32")


def cut(source: dict[str, Any], what: str, out: Path) -> Path:
    assert main(["cut", str(source[what]), "--segment=2:3", f"--out={out}"]) == 0
    return out


@pytest.mark.parametrize("what", ["folder", "file"])
def test_to_a_folder(what, source, tmp_path, capsys):
    out = cut(source, what, tmp_path / "out")
    assert off(in_transformers(out), source) < (0.02 if what == "file" else 1e-6)  # of a file, bfloat16 is written
    by_period = {"layer_types": [*["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 5]}
    assert off(in_transformers(out, **by_period), source) > 0.1  # what a consumer that goes by the place computes
    said = " ".join(capsys.readouterr().err.split())
    assert "MLX would misread it: it lets every 6th layer" in said
    assert "llama.cpp would misread" not in said
    assert "| MLX | would misread it | it lets every 6th layer" in (out / "README.md").read_text()


@needs_llama_cpp
@pytest.mark.parametrize("what", ["folder", "file"])
def test_to_a_gguf_file(what, source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.gguf"
    if what == "file":
        cut(source, what, out)
    else:
        monkeypatch.setattr("layercut.export.formats.convert", converted)
        folder = cut(source, what, tmp_path / "out")
        assert main(["export", str(folder), "--gguf-type=f32", f"--out={out}"]) == 0
    assert read_header(out).values["gemma3.attention.sliding_window_pattern"] == [i not in (4, 10) for i in range(11)]
    found = by_llama_cpp(out, source["model"], folders.tokenizer(), TOKENS)
    assert found["positions"] == 80
    assert found["logit_error"] < 1e-3
    assert "Ollama would misread it" in " ".join(capsys.readouterr().err.split())


def test_a_cut_that_a_named_consumer_misreads_is_refused(source, tmp_path, capsys):
    for what, out in (("folder", "out"), ("file", "out.gguf")):
        name = "mlx" if what == "folder" else "ollama"
        assert main(["cut", str(source[what]), "--segment=2:3", f"--for={name}", f"--out={tmp_path / out}"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "would misread the cut 2:3: it lets every 6th layer" in said
        assert "hint: segments of as many layers that it reads right: --segment 11:12" in said
    assert not list(tmp_path.iterdir())
    assert main(["cut", str(source["folder"]), "--segment=0:6", "--for=mlx", f"--out={tmp_path / 'out'}"]) == 0
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError, match="'mlks' is unknown"):
        CutConfig(segment=("2:3",), out=tmp_path, consumers="mlks")


# --- the search and the report ---


def test_the_command_searches_among_what_a_consumer_reads_right(source, texts, tmp_path, capsys):
    asked = ["search", str(source["folder"]), "--ratio=0.17", f"--data={texts[0]}", "--tokens=64", "--window=16"]
    assert main([*asked, "--for=mlx,vllm", "--num-segments=2", f"--out={tmp_path / 'searched'}"]) == 0
    out, said = capsys.readouterr()
    named = [line.split("\t")[0].split(", ") for line in out.splitlines()[1:]]
    cuts = [[tuple(map(int, one.split(":"))) for one in cut] for cut in named]
    kept = [[i for i in range(12) if not any(a <= i < b for a, b in cut)] for cut in cuts]
    assert len(kept) > 1
    assert all(len(one) == 10 and [p for p, i in enumerate(one) if i in (5, 11)] == [5] for one in kept)
    assert "MLX lets every 6th layer attend to everything" in " ".join(said.split())
    assert main([*asked, "--segment=2:4", "--for=mlx", f"--out={tmp_path / 'given'}"]) == 2
    assert main(["compress", *asked[1:], "--bits=4", "--for=mlx", f"--out={tmp_path / 'bits'}"]) == 2
    assert "MLX does not read int4 weights" in " ".join(capsys.readouterr().err.split())


def test_report_and_card_name_who_would_misread_it(tmp_path):
    found = [asdict(one) for one in readings(config("gemma3_text", [5, 11]), OFF)]
    (tmp_path / "summary.json").write_text(json.dumps({"model": "gemma", "segments": [[2, 3]], "consumers": found}))
    card, page = model_card(tmp_path), write_report(tmp_path).read_text()
    assert "| MLX | would misread it | it lets every 6th layer attend to everything" in card
    assert "| ONNX Runtime | does not load it |" in card
    assert "would misread it" in page
    assert "gemma3.attention.sliding_window_pattern" in page


def test_no_engine_that_was_tried_is_silently_wrong():
    """make test-engines"""
    result = json.loads((Path(__file__).parents[2] / "research" / "results" / "engines.json").read_text())
    verdicts = {each["verdict"] for row in result["rows"].values() for each in row["models"].values()}
    assert verdicts == {"right", "misread", "refused"}
