"""A .gguf file in gives a .gguf file out: bytes kept, sizes counted from the file, the result compared with it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig

import folders
import tiny
from layercut.cli.command_line import main
from layercut.config.commands import from_flat
from layercut.errors import ConfigError, RunError
from layercut.export.gguf_check import read_by_transformers
from layercut.export.gguf_tensors import quantize_file, tensor_types
from layercut.models import checkpoints, loading
from layercut.models.checkpoints import Checkpoint
from layercut.pipeline import resolve_options
from layercut.pipeline.journey import compress
from layercut.pipeline.resolve_options import check_names
from layercut.report.run_facts import read_run
from layercut.report.verdicts import verdicts

gguf = pytest.importorskip("gguf")
from gguf_writer import as_converter, write_gguf  # noqa: E402 - it needs gguf

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp_py_sync") is None, reason="pip install llama-cpp-py-sync"
)
SHORT = ["--tokens=128", "--window=16", "--eval-window=16", "--tune-tokens=256", "--eval-tokens=64", "--no-speed"]
SHORT += ["--learning-rate=0.001"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.llama(6, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    return write_gguf(model, folders.tokenizer(), tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q4_1", name="Tiny")


@pytest.fixture(scope="module")
def made(source: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a finished run with a size that one layer meets."""
    out = tmp_path_factory.mktemp("out") / "small.gguf"
    target = source.stat().st_size - 3000
    argv = ["compress", str(source), *SHORT, f"--target-size={target}B", f"--data={texts[0]}", f"--out={out}"]
    assert main([*argv, f"--eval-data={texts[1]}"]) == 0
    assert out.stat().st_size <= target
    return out


def contents(file: Path) -> dict[str, tuple[Any, bytes]]:
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}


def test_a_size_is_searched_for_again_where_the_format_of_healed_layers_is_another(source, texts, tmp_path):
    """Layers that are healed may grow by it, so that more have to go."""
    target, removed = source.stat().st_size - 3000, []
    for kind in ("same", "q8_0"):
        flags = {"tokens": 128, "window": 16, "data": str(texts[0]), "out": tmp_path / "x.gguf", "gguf_type": kind}
        flags["force"] = kind != "same"  # or a finished search is not replaced
        run = compress(str(source), from_flat({"target_size": f"{target}B"} | flags), until="search")
        (segment,) = json.loads((run / "search.json").read_text())["segments"]
        removed.append(segment[1] - segment[0])
    assert removed[0] == 1 < removed[1]


def test_gguf_in_gives_gguf_out(source, made):
    run = made.with_name("small.gguf-run")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["layers"]["after"] == 5
    (start, stop), before, after = summary["segments"][0], contents(source), contents(made)
    healed = {start - 1, start} & set(range(5))
    for name, (kind, data) in after.items():
        block = int(name.split(".")[1]) if name.startswith("blk.") else None
        came = name if block is None or block < start else name.replace(f"blk.{block}.", f"blk.{block + stop - start}.")
        assert kind == before[came][0]
        assert data == before[came][1] or block in healed
    assert sum(after[name] not in before.values() for name in after) > 3
    assert gguf.GGUFReader(made).get_field("general.name").contents() == "Tiny (5 of 6 layers)"
    # counted from the file, and measured on the tensors as they are in the result
    assert summary["bytes"]["source"] == source.stat().st_size
    assert summary["bytes"]["after"] == made.stat().st_size
    assert summary["perplexity"]["quantized"] != summary["perplexity"]["tuned"]
    again = json.loads((run / "gguf.json").read_text())["again"]
    of_file = again["llama_cpp"]["perplexity"] if again["llama_cpp"] else again["perplexity"]["file"]
    assert of_file == pytest.approx(summary["perplexity"]["quantized"], rel=0.02)
    assert again["llama_cpp"] is None or again["llama_cpp"]["source_bytes"] == source.stat().st_size
    assert again["llama_cpp"] is None or again["llama_cpp"]["speed"]["ratio"] > 0
    weighed = json.loads((run / "quantize.json").read_text())["gguf"]["importance"]
    assert weighed > 0 or not again["llama_cpp"], "of the columns of what is rounded coarsely"
    # one file under two names, and what goes with it
    assert {file.name for file in (run / "model").iterdir()} == {"small.gguf", "small.README.md", "small.Modelfile"}
    assert (run / "model" / "small.gguf").samefile(made)
    assert loading.load(checkpoints.resolve(str(run / "model"))).model.config.num_hidden_layers == 5


@needs_llama_cpp
def test_a_larger_and_worse_file_is_planned_and_called_so(source, texts, tmp_path, monkeypatch, capsys):
    """Healed layers in float32 take more than what the cut saves; random models have no perplexity to speak of."""
    monkeypatch.setattr("layercut.export.formats.perplexity_by_llama_cpp", lambda *_: 10.0)
    out = tmp_path / "large.gguf"
    argv = ["compress", str(source), *SHORT, "--segment=3:4", f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    assert main([*argv, "--gguf-type=f32", f"--out={out}"]) == 0
    assert out.stat().st_size > source.stat().st_size
    assert json.loads((tmp_path / "large.gguf-run/quantize.json").read_text())["gguf"]["importance"] == 0
    capsys.readouterr()
    for kind in ("f32", "same", "q8_0"):
        plan = ["plan", str(source), "--segment=3:4", f"--gguf-type={kind}", "--window=16", "--no-calibrate", "--json"]
        assert main(plan) == 0
        sizes = json.loads(capsys.readouterr().out)["bytes"]
        assert sizes["before"] == {"gguf": source.stat().st_size}
        blocks = {name: len(data) for name, (_, data) in contents(source).items() if name.startswith("blk.3.")}
        if kind == "same":
            assert sizes["after"]["gguf"] == source.stat().st_size - sum(blocks.values())
        elif kind == "f32":
            assert sizes["after"]["gguf"] == pytest.approx(out.stat().st_size, abs=500)
        else:  # 34 bytes for 32 weights in place of 20, in the two layers beside the cut
            grown = sum(size * 14 // 20 for name, size in blocks.items() if "norm" not in name)
            assert sizes["after"]["gguf"] == source.stat().st_size - sum(blocks.values()) + 2 * grown
    marks = {verdict.name: verdict.mark for verdict in verdicts(read_run(tmp_path / "large.gguf-run"))}
    assert marks["Size"] == "bad"


def test_evaluate_and_export_take_such_a_run(source, made, texts, tmp_path, capsys):
    run = made.with_name("small.gguf-run")
    assert main(["evaluate", str(run), f"--eval-data={texts[1]}", "--eval-tokens=64", "--eval-window=16"]) == 0
    assert main(["export", str(run), "--format=safetensors", f"--out={tmp_path / 'folder'}"]) == 0
    assert loading.load(checkpoints.resolve(str(tmp_path / "folder"))).model.config.num_hidden_layers == 5
    named = json.loads((run / "summary.json").read_text())["model"]
    assert named == str(source)
    mine = shutil.copytree(run, tmp_path / "run")
    other = write_gguf(tiny.llama(6, vocab_size=folders.VOCABULARY), folders.tokenizer(), tmp_path / source.name)
    summary = (mine / "summary.json").read_text()
    (mine / "summary.json").write_text(summary.replace(json.dumps(named), json.dumps(str(other))))
    for form, name in (("gguf", "x.gguf"), ("safetensors", "x")):
        assert main(["export", str(mine), f"--format={form}", f"--out={tmp_path / name}"]) == 2
        assert "is another file than the one" in " ".join(capsys.readouterr().err.split())


@needs_llama_cpp
def test_a_file_of_that_name_in_the_current_folder_is_not_read_instead(source, tmp_path, monkeypatch):
    """transformers prefers it where it is given a bare name."""
    wanted, theirs = checkpoints.resolve(str(source)), tmp_path / source.name
    before = loading.load(wanted, dtype="float32").model.get_parameter("model.norm.weight")
    other = tiny.llama(6, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    torch.nn.init.constant_(other.model.norm.weight, 7.0)
    write_gguf(other, folders.tokenizer(), theirs, "Q4_1")
    monkeypatch.chdir(tmp_path)
    for read in (loading.load(wanted, dtype="float32").model, read_by_transformers(source)):
        assert torch.equal(read.get_parameter("model.norm.weight"), before)


def test_quantize_writes_gguf_whose_type_says_how_it_is_rounded(source, tmp_path, capsys):
    argv = ["quantize", str(source), "--bits=8", f"--out={tmp_path / 'out.gguf'}"]
    for flag in ("--group-size=64", "--quantizer=rtn", "--embedding-bits=8"):
        assert main([*argv, flag]) == 2
        assert f"error: {flag.partition('=')[0]} is given" in " ".join(capsys.readouterr().err.split())
    assert main(argv) == 0
    assert set(tensor_types(tmp_path / "out.gguf")) == {"Q8_0", "F32"}


def test_refusals(source, tiny_model, tmp_path, capsys, monkeypatch):
    def refused(*argv: Any, words: str) -> None:
        assert main([*map(str, argv)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())

    x, texts = tmp_path / "x", ["--window=16", "--data=python-docs", "--eval-data=python-docstrings"]
    file, folder = ["compress", source, "--segment=2:3", *texts], ["compress", tiny_model, "--segment=2:3", *texts]
    refused(*file, "--bits=4", f"--out={x}", words="packs weights for transformers and vLLM")
    refused(*file, "--format=safetensors", f"--out={x}.gguf", words="name a folder")
    (tmp_path / "there.gguf").write_bytes(b"")
    refused(*file, f"--out={tmp_path / 'there.gguf'}", words="there.gguf exists")
    refused("compress", source, *texts, f"--target-size={source.stat().st_size}B", f"--out={x}", words="is no cut")
    refused("quantize", source, f"--out={x}", "--gguf-type=q8_0", words="--out names no .gguf file")
    refused(*folder, "--gguf-type=q8_0", f"--out={x}", words="the result is a checkpoint folder")
    refused(*folder, "--format=gguf", f"--out={x}", words="--out names no .gguf file")
    for kind in ("same", "finer"):
        refused(*folder, f"--gguf-type={kind}", f"--out={x}.gguf", words="MODEL is in no number format of GGUF")
    monkeypatch.delenv("LAYERCUT_GGUF_CONVERTER", raising=False)
    refused(*folder, f"--out={x}.gguf", words="llama.cpp's converter is missing")
    monkeypatch.setenv("LAYERCUT_GGUF_CONVERTER", str(as_converter(tmp_path / "converter")))
    tiny.gpt2(4).save_pretrained(tmp_path / "gpt2")
    folders.tokenizer().save_pretrained(tmp_path / "gpt2")
    refused("compress", tmp_path / "gpt2", *folder[2:], f"--out={x}.gguf", words="converter refused")
    monkeypatch.setattr("layercut.pipeline.resolve_options.PLAIN", ("f32",))
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", None)
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", None)
    refused(*file, f"--out={x}.gguf", words="hint: pip install")  # before anything is healed
    assert not [*tmp_path.glob("x*")]


@needs_llama_cpp
def test_a_mixture_that_was_stopped_goes_on(source, texts, tmp_path, monkeypatch):
    argv = ["compress", str(source), *SHORT, "--segment=3:4", f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    argv += ["--gguf-type=q5_k_m", f"--out={tmp_path / 'out.gguf'}"]

    def stopped(plain: Path, *_: Any) -> None:
        copied.append(plain.read_bytes())
        raise KeyboardInterrupt

    copied: list[bytes] = []
    with monkeypatch.context() as once:
        once.setattr("layercut.export.formats.quantize_file", stopped)
        assert main(argv) != 0
    left = next(tmp_path.glob("*-run")) / "unrounded.gguf"
    assert not left.exists()
    left.write_bytes(copied[0][:1000])  # as where the process was killed
    assert main(argv) == 0
    assert not left.exists()


@needs_llama_cpp
def test_a_full_disk_is_told_of_what_llama_cpp_writes(source):
    with pytest.raises(RunError, match="cannot write /dev/full"):
        quantize_file(source, Path("/dev/full"), "q5_k_m", {})


def test_a_file_whose_healed_layers_could_not_be_written_back_is_refused_at_the_beginning(tmp_path, monkeypatch):
    """Experts are one tensor in transformers and three in llama.cpp: that was seen when all was healed."""
    of_experts = {"name": "qwen3moe"}
    monkeypatch.setattr(resolve_options, "architecture_of", lambda file: of_experts["name"])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    experts = Qwen3MoeConfig(**sizes, moe_intermediate_size=8, num_experts=4, vocab_size=64, head_dim=8)
    checkpoint = Checkpoint("x.gguf", tmp_path, gguf="x.gguf")
    with pytest.raises(ConfigError, match=r"no single tensor for model\.layers\.0\.mlp\.experts"):
        check_names(from_flat({"ratio": 0.3}), checkpoint, experts)
    check_names(from_flat({"ratio": 0.3, "format": "safetensors"}), checkpoint, experts)
    check_names(from_flat({"ratio": 0.3, "tune_tokens": 0}), checkpoint, experts)
    of_experts["name"] = "qwen3"
    check_names(from_flat({"ratio": 0.3}), checkpoint, Qwen3Config(**sizes, vocab_size=64, head_dim=8))
