"""GPTQ for GGUF files: codes and scales go where llama.cpp reads them, and what is computed comes nearer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import folders
import tiny
from layercut.errors import ModelError
from layercut.export import gguf_gptq
from layercut.export.ggml_codes import LAYOUTS, grid_of, with_codes, with_scales
from layercut.export.gguf_check import read_by_transformers
from layercut.export.gguf_export import CutGguf, write_cut
from layercut.export.gguf_gptq import choose_codes_
from layercut.models import checkpoints, loading, model_weights
from layercut.models.passes import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.quantization import coordinate_descent, scales
from layercut.quantization import gptq as gptq_module
from layercut.quantization.gptq import gram, output_errors
from layercut.quantization.grid import Grid, decode
from layercut.segments import Segment
from layercut.surgery import cut_segment_

gguf = pytest.importorskip("gguf")
from gguf_writer import write_gguf  # noqa: E402 - it needs gguf

SEGMENT = Segment(2, 4)


def random_rows(kind: str, rows: int = 6, columns: int = 512) -> np.ndarray:
    """Rows of blocks as a file has them, with scales that are numbers."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    draw = np.random.default_rng(0)
    packed = draw.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for at in (0, 2) if kind in ("q4_1", "q5_1", "q4_k", "q5_k") else (0,):
        numbers = draw.uniform(-1, 1, packed.shape[:2]).astype(np.float16)
        packed[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return packed.reshape(rows, -1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_codes_are_where_the_format_has_them(kind):
    """By the gguf package's reader: any codes, beside any scales, are what the grid says they are."""
    ggml, packed = gguf.GGMLQuantizationType[kind.upper()], random_rows(kind)
    grid = grid_of(packed, ggml, 512)
    codes = torch.randint(grid.lowest, grid.highest + 1, (6, 512), generator=torch.Generator().manual_seed(1))
    other = with_codes(packed, kind, codes.numpy() - grid.lowest)
    read = torch.from_numpy(gguf.quants.dequantize(other, ggml))
    assert torch.allclose(read, decode(codes.to(torch.int8), grid), rtol=1e-3, atol=1e-3)
    assert (other != packed).any()
    scales = list(range(min(LAYOUTS[kind].low, LAYOUTS[kind].high or 99)))
    size = gguf.GGML_QUANT_SIZES[ggml][1]
    assert (other.reshape(6, -1, size)[..., scales] == packed.reshape(6, -1, size)[..., scales]).all()


@pytest.mark.parametrize("kind", [kind for kind, layout in LAYOUTS.items() if layout.scales])
def test_scales_are_where_the_format_has_them(kind):
    ggml, packed = gguf.GGMLQuantizationType[kind.upper()], random_rows(kind)
    grid = grid_of(packed, ggml, 512)
    wider = Grid(grid.scale * 1.5, grid.zero, grid.bits, grid.group_size)
    other = with_scales(packed, kind, wider)
    read = torch.from_numpy(gguf.quants.dequantize(other, ggml))
    assert torch.allclose(read, 1.5 * torch.from_numpy(gguf.quants.dequantize(packed, ggml)), rtol=2e-3, atol=2e-2)
    found = grid_of(other, ggml, 512)
    assert np.array_equal(with_scales(other, kind, found), other), "what was rounded once stays"


@pytest.mark.parametrize(
    ("kind", "left_out", "share"),
    [(kind, (scales, "TURNS"), 0.97) for kind in ("q4_0", "q4_1", "q5_0", "q5_1")]
    + [(kind, (coordinate_descent, "PASSES"), 0.98) for kind in LAYOUTS],
)
def test_fitted_scales_and_exchanged_codes_bring_rows_nearer(kind, left_out, share, monkeypatch):
    ggml = gguf.GGMLQuantizationType[kind.upper()]
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 512, generator=draw) for n in (6, 2048))
    hessian = gram(x @ torch.randn(512, 512, generator=draw)).double()
    packed = random_rows(kind) if kind.endswith("k") else gguf.quants.quantize(weight.numpy(), ggml)

    def error() -> float:
        rows, points = gguf_gptq._chosen(packed, ggml, weight, hessian)
        assert torch.equal(torch.from_numpy(gguf.quants.dequantize(rows, ggml)), points)
        return output_errors(weight, points, hessian).sum().item()

    whole = error()
    monkeypatch.setattr(*left_out, 0)
    assert whole < share * error()


def test_no_row_of_a_type_with_scales_in_six_bits_is_worse_than_by_gptq(monkeypatch):
    """One column that is far larger than the others, so that the damped H is not H."""
    monkeypatch.setattr(gptq_module, "RIDGE", 0.0)
    draw = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(64, 512, generator=draw)
    x = torch.randn(1024, 4, generator=draw) @ torch.randn(4, 512, generator=draw) / 2
    x += 0.02 * torch.randn(1024, 512, generator=draw)
    x[:, :1] *= 300
    hessian, kind = gram(x).double(), gguf.GGMLQuantizationType.Q4_K
    packed = random_rows("q4_k", 64)
    found = output_errors(weight, gguf_gptq._chosen(packed, kind, weight, hessian)[1], hessian)
    monkeypatch.setattr(coordinate_descent, "PASSES", 0)
    before = output_errors(weight, gguf_gptq._chosen(packed, kind, weight, hessian)[1], hessian)
    assert (found <= before).all()
    assert found.sum() < before.sum()


def test_a_block_without_a_scale_stands_for_one_number():
    ggml, packed = gguf.GGMLQuantizationType.Q4_1, random_rows("q4_1")
    packed[2, :2] = 0  # the first block's scale
    before = gguf.quants.dequantize(packed, ggml)
    grid = grid_of(packed, ggml, 512)
    assert torch.allclose(decode(torch.zeros(6, 512, dtype=torch.int8), grid)[2, :32], torch.tensor(before[2, :32]))
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    _, points = gguf_gptq._chosen(packed, ggml, weight, torch.eye(512, dtype=torch.float64))
    assert torch.equal(points[2, :32], torch.tensor(before[2, :32]))
    assert (points - weight).norm() < 0.5 * (torch.tensor(before) - weight).norm()
    padded = np.zeros_like(packed)
    assert not gguf_gptq._chosen(padded, ggml, weight * 0, torch.eye(512, dtype=torch.float64))[1].any()


@pytest.fixture(scope="module")
def healed(tmp_path_factory):
    """A source file, the cut model with what was changed beside the cut, and text: its tokens are alike, as text is."""
    model = tiny.llama(6, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    source = write_gguf(model, folders.tokenizer(), tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q4_1")
    checkpoint = checkpoints.resolve(str(source))
    student = loading.load(checkpoint, dtype="float32").model
    cut_segment_(student, [SEGMENT])
    draw = torch.Generator().manual_seed(1)
    changed = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=draw)
        for name, weight in student.named_parameters()
        if name.startswith(("model.layers.1.", "model.layers.2."))
    }
    model_weights.replace_parameters_(student, changed)
    few = torch.randint(0, folders.VOCABULARY, (40,), generator=draw)
    tokens = few[torch.randint(0, 40, (24, 32), generator=draw)]
    return CutGguf(checkpoint=checkpoint, segments=[SEGMENT], healed=changed), student, tokens


@pytest.mark.parametrize("kind", ["same", "q4_0"])
def test_what_a_healed_file_computes_is_nearer_to_the_model(healed, tmp_path, kind):
    source, student, tokens = healed
    text, other = tokens[:20], tokens[20:]
    told = {
        name: write_cut(source, tmp_path / f"{name}.gguf", kind, student, given)
        for name, given in (("plain", None), ("gptq", text))
    }
    assert told["plain"]["gptq"] == []
    matrices = [n for n, weight in source.healed.items() if weight.dim() == 2]
    assert told["gptq"]["gptq"] == sorted(matrices)
    files = {name: tmp_path / f"{name}.gguf" for name in told}
    assert files["plain"].stat().st_size == files["gptq"].stat().st_size
    assert sorted(each.name for each in tmp_path.iterdir()) == ["gptq.gguf", "plain.gguf"]
    left = {
        name: mean_kl(DecoderRunner(student), DecoderRunner(read_by_transformers(file)), other)
        for name, file in files.items()
    }
    assert left["gptq"] < 0.8 * left["plain"], left


def test_tokens_count_in_files_too(healed, tmp_path, monkeypatch):
    """By H that counts no token more than another other codes are chosen."""
    source, student, tokens = healed
    asked = list[int]()
    weights = gguf_gptq.token_weights
    monkeypatch.setattr(gguf_gptq, "token_weights", lambda *given: asked.append(len(given[2])) or weights(*given))
    write_cut(source, tmp_path / "weighted.gguf", "q4_0", student, tokens)
    assert asked == [14], "the matrices of the two healed layers"
    monkeypatch.setattr(gguf_gptq, "token_weights", lambda *_: {})
    write_cut(source, tmp_path / "even.gguf", "q4_0", student, tokens)
    assert (tmp_path / "weighted.gguf").read_bytes() != (tmp_path / "even.gguf").read_bytes()


def test_rows_that_the_file_has_in_another_order_are_left_alone(healed, tmp_path, monkeypatch):
    """Query and key of llama are in rotary pairs, which is known; what is not known keeps its codes."""
    (source, student, tokens), said = healed, []
    monkeypatch.setattr(gguf_gptq, "say", lambda *words: said.append(" ".join(words)))
    write_cut(source, file := tmp_path / "file.gguf", "same", student, None)
    names = [n for n in source.healed if "q_proj" in n or "v_proj" in n]
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(file.read_bytes())
    assert choose_codes_(file, student, tokens, names) == sorted(names)
    assert not said
    monkeypatch.setattr(gguf_gptq, "file_rows", lambda name, architecture, config, rows: torch.arange(rows))
    assert choose_codes_(unknown, student, tokens, names) == sorted(n for n in names if "v_proj" in n)
    assert "2 matrices, as model.layers.1.self_attn.q_proj.weight, have other rows" in said[0]

    def error(path):
        read = dict(read_by_transformers(path).named_parameters())
        return max((read[n] - source.healed[n]).norm() / source.healed[n].norm() for n in names)

    assert max(error(file), error(unknown)) < 0.2


def test_names_that_the_file_lacks_and_matrices_wider_than_the_text_are_passed_over(healed, tmp_path, monkeypatch):
    source, student, tokens = healed
    write_cut(source, file := tmp_path / "file.gguf", "same", student, None)
    names = [n for n in source.healed if "v_proj" in n]
    assert choose_codes_(file, student, tokens[:1, :8], names) == []
    known = gguf_gptq.possible_names
    monkeypatch.setattr(
        gguf_gptq, "possible_names", lambda *given: known(*given) | {names[0]: "blk.1.ffn_down_exps"}
    )  # fmt: skip
    assert choose_codes_(file, student, tokens, names) == names[1:]


def test_a_model_that_cannot_be_run_layer_by_layer_keeps_its_rounding(healed, tmp_path, monkeypatch):
    (source, student, tokens), said = healed, []

    def refuses(model):
        raise ModelError("no layers of its own")

    monkeypatch.setattr(gguf_gptq, "DecoderRunner", refuses)
    monkeypatch.setattr(gguf_gptq, "say", lambda *words: said.append(" ".join(words)))
    told = write_cut(source, tmp_path / "file.gguf", "same", student, tokens)
    assert told["gptq"] == []
    assert said == ["note rounded weight by weight, not by GPTQ: no layers of its own"]


def test_only_linear_modules_of_the_decoder_are_taken(healed, tmp_path):
    source, student, tokens = healed
    write_cut(source, file := tmp_path / "file.gguf", "same", student, None)
    assert choose_codes_(file, student, tokens, ["model.embed_tokens.weight", "model.norm.weight"]) == []
    before = file.read_bytes()
    assert choose_codes_(file, copy.deepcopy(student), tokens, []) == []
    assert file.read_bytes() == before
