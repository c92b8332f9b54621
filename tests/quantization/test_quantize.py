"""Quantization: the grid, GPTQ against a direct reference, whole models, and what a reload makes of them."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, OlmoConfig, Phi3Config, Qwen3Config

import folders
import quick
import tiny
from layercut import quantization
from layercut.cli.command_line import main
from layercut.cli.single_stage import quantize_alone
from layercut.config import CompressConfig, QuantizeAloneConfig, QuantizeConfig, SearchConfig
from layercut.data.blocks import stored_blocks
from layercut.errors import ConfigError, ModelError
from layercut.evaluation import perplexity
from layercut.export import checkpoint
from layercut.models import checkpoints, loading, model_weights
from layercut.models.memory import Budget, memory_limit
from layercut.models.runner import DecoderRunner
from layercut.pipeline.stages.quantize import how_rounded
from layercut.quantization import (
    bit_choice,
    coordinate_descent,
    quantize_,
    quantized_weights,
    recipe,
    scales,
    sensitivity,
)
from layercut.quantization import gptq as gptq_module
from layercut.quantization.coordinate_descent import descended
from layercut.quantization.gptq import DAMPING, damped, gptq, gram, output_errors
from layercut.quantization.grid import Grid, decode, encode, fit_grid
from layercut.quantization.layer_by_layer import each_with_hessian, hessian_of_head
from layercut.quantization.packing import saved_bytes
from layercut.quantization.scales import better_start, by_turns, fitted_scales
from layercut.quantization.sensitivity import token_weights

TOKENS = tiny.some_tokens(32)


def problem(outputs: int, inputs: int, seed: int = 0, samples: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, I] and the Hessian 2 X'X of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw)
    mixing = torch.randn(inputs, inputs, generator=draw)
    x = torch.randn(samples, inputs, generator=draw) @ mixing * torch.rand(inputs, generator=draw)
    hessian = torch.zeros(inputs, inputs, dtype=torch.float64)
    hessian += gram(x[: samples // 2])
    hessian += gram(x[samples // 2 :])
    return weight, hessian


def grid_of(weight: torch.Tensor, bits: int, size: int, asymmetric: bool = False, **more: torch.Tensor) -> Grid:
    return fit_grid(weight, bits, size, asymmetric=asymmetric, dtype=weight.dtype, **more)


# --- the grid ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_grid_is_that_of_compressed_tensors(bits, asymmetric, dtype):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = problem(8, 64)[0].to(dtype)
    weight[:, 3] += 1
    args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=not asymmetric)
    grouped = weight.float().unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    grid = grid_of(weight, bits, 32, asymmetric)
    assert torch.equal(grid.scale, scale.to(dtype))
    codes = encode(weight, grid)
    if dtype == torch.float32:
        assert grid.zero is None or torch.equal(grid.zero, zero)
        assert torch.equal(codes, quantize(weight, scale, zero, args, dtype=torch.int8))
    assert torch.equal(decode(codes, grid), dequantize(codes, grid.scale, grid.zero, args))
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1


def test_a_group_of_zeros_stays_zero():
    weight = torch.zeros(2, 32)
    grid = grid_of(weight, 4, 32)
    assert torch.equal(decode(encode(weight, grid), grid), weight)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_few_bits_take_the_range_of_least_error(bits, asymmetric):
    weight = problem(16, 64)[0]
    weight[:, ::32] *= 4  # an outlier in each group, which a covering grid spends its points on
    low, high = (f(weight.unflatten(1, (-1, 32)), -1) for f in (torch.amin, torch.amax))
    span = high.clamp(min=0) - low.clamp(max=0) if asymmetric else 2 * torch.maximum(high, -low)
    grid = grid_of(weight, bits, 32, asymmetric)
    covering = Grid(span / (2**bits - 1), None, bits, 32)
    if asymmetric:
        zero = (grid.lowest - low.clamp(max=0) / covering.scale).round().clamp(grid.lowest, grid.highest)
        covering = Grid(covering.scale, zero.to(torch.int8), bits, 32)
    errors = [(decode(encode(weight, g), g) - weight).unflatten(1, (-1, 32)).square().sum(-1) for g in (grid, covering)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()
    assert (grid.scale <= covering.scale).all()


# --- GPTQ ---


def direct(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The paper's step as it is derived: round a column, correct the open ones by H^-1 of the open ones."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    w, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.int8)
    rest = hessian.diagonal().argsort(descending=True).tolist()
    while rest:
        column, inverse = rest[0], torch.linalg.inv(damped[rest][:, rest])
        codes[:, column] = encode(w.float(), grid)[:, column]
        error = (w[:, column] - decode(codes, grid)[:, column].double()) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0]
        rest = rest[1:]
    return codes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gptq_is_the_direct_computation(seed, asymmetric):
    weight, hessian = problem(16, 160, seed)  # more columns than a block
    grid = grid_of(weight, 4, 32, asymmetric)
    ours, reference = gptq(weight, hessian, grid), direct(weight, hessian, grid)
    # float32 against float64: a column within rounding of a half may fall either way, and then shifts its row
    errors = [output_errors(weight, decode(codes, grid), hessian) for codes in (ours, reference)]
    same_rows = (ours == reference).all(1)
    assert same_rows.float().mean() >= 0.8
    assert torch.allclose(errors[0][same_rows], errors[1][same_rows])
    assert errors[0].sum() <= 1.02 * errors[1].sum()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("samples", [8, 256])  # 8 inputs for 64 columns: H has no inverse before it is damped
def test_gptq_is_never_worse_than_rounding_to_nearest(seed, samples):
    weight, hessian = problem(32, 64, seed, samples)
    grid = grid_of(weight, 4, 32)
    ours = output_errors(weight, decode(gptq(weight, hessian, grid), grid), hessian)
    nearest = output_errors(weight, decode(encode(weight, grid), grid), hessian)
    assert (ours <= nearest).all()
    assert ours.sum() < 0.8 * nearest.sum()


def test_output_errors_are_those_at_the_output():
    weight, other = torch.randn(3, 8), torch.randn(3, 8)
    x = torch.randn(5, 7, 8)
    hessian = torch.zeros(8, 8, dtype=torch.float64)
    hessian += gram(x)
    expected = ((weight - other) @ x.flatten(0, 1).T).square().sum(1)
    assert torch.allclose(output_errors(weight, other, hessian).float(), expected, rtol=1e-5)


def test_one_column_is_brute_force():
    weight, hessian = problem(16, 1)
    grid = Grid(torch.full((16, 1), 0.37), None, 4, 1)
    points = torch.arange(-8, 8) * 0.37
    best = (weight - points).abs().argmin(1, keepdim=True) - 8
    assert torch.equal(gptq(weight, hessian, grid), best.to(torch.int8))


def test_independent_columns_are_brute_force():
    weight = problem(6, 3)[0]
    hessian = torch.diag(torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))
    grid = grid_of(weight, 4, 3)
    every = torch.tensor(list(itertools.product(range(-8, 8), repeat=3)), dtype=torch.int8)
    errors = [output_errors(weight, decode(codes.expand(6, 3), grid), hessian) for codes in every]
    best = every[torch.stack(errors).argmin(0)]
    assert torch.equal(gptq(weight, hessian, grid), best)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_weight_on_the_grid_is_kept_exactly(asymmetric):
    hessian = problem(8, 64)[1]
    codes = torch.randint(-7, 8, (8, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[:, ::32], codes[:, 1::32] = -8, 7  # the whole range is used, so that a fit finds the same grid
    zero = torch.ones(8, 2, dtype=torch.int8) if asymmetric else None
    given = Grid(torch.full((8, 2), 0.25), zero, 4, 32)
    weight = decode(codes, given)
    grid = grid_of(weight, 4, 32, asymmetric=True) if asymmetric else given
    assert torch.equal(decode(gptq(weight, hessian, grid), grid), weight)


def test_inputs_that_never_occur_change_nothing():
    weight, hessian = problem(8, 64)
    hessian[5], hessian[:, 5] = 0, 0
    grid = grid_of(weight, 4, 32)
    codes = gptq(weight, hessian, grid)
    assert torch.equal(codes[:, 5], encode(weight, grid)[:, 5])


def test_a_hessian_is_solved_once_while_it_stays_as_it_is(monkeypatch):
    weight, hessian = problem(8, 64)
    grid, solved = grid_of(weight, 4, 32), []
    solve = gptq_module.inverse_factor
    monkeypatch.setattr(gptq_module, "inverse_factor", lambda h: solved.append(1) or solve(h))
    first = gptq(weight, hessian, grid)
    assert torch.equal(gptq(weight, hessian, grid), first)
    assert len(solved) == 1
    hessian.diagonal().add_(hessian.diagonal().mean())
    assert torch.equal(gptq(weight, hessian, grid), gptq(weight, hessian.clone(), grid))
    assert len(solved) == 3


def test_a_ridge_is_nearer_on_inputs_that_were_not_seen(monkeypatch):
    """Of 96 inputs for 64 columns the Hessian is theirs more than their distribution's; the more, the less so."""
    weight, _ = problem(64, 64)
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=draw)
    seen, other = (gram(torch.randn(n, 64, generator=draw) @ mixing).double() for n in (96, 4096))

    def error() -> float:
        heeded = gptq_module.with_ridge(seen)
        choose = partial(gptq, weight, heeded)
        start = better_start(weight, heeded, lambda counts: grid_of(weight, 3, 32, counts=counts), choose)
        grid, codes = by_turns(weight, heeded, *start, partial(descended, weight, heeded))
        return output_errors(weight, decode(codes, grid), other).sum().item()

    found = error()
    monkeypatch.setattr(gptq_module, "RIDGE", 0.0)
    assert found < 0.97 * error()


# --- coordinate descent ---


def step_by_step(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """Every single code tried in its place, by the whole error, column after column."""
    codes = codes.clone()
    for column in hessian.diagonal().argsort(descending=True).tolist():
        tried = []
        for code in range(grid.lowest, grid.highest + 1):
            other = codes.clone()
            other[:, column] = code
            tried.append(output_errors(weight.double(), decode(other, grid).double(), hessian))
        codes[:, column] = (torch.stack(tried).argmin(0) + grid.lowest).to(torch.int8)
    return codes


@pytest.mark.parametrize("asymmetric", [False, True])
def test_each_code_becomes_the_best_one_while_the_others_stay(asymmetric, monkeypatch):
    monkeypatch.setattr(coordinate_descent, "PASSES", 1)
    weight, hessian = problem(8, 160)  # more columns than a block
    grid = grid_of(weight, 3, 32, asymmetric)
    first = gptq(weight, hessian, grid)
    found, expected = descended(weight, hessian, grid, first), step_by_step(weight, damped(hessian), grid, first)
    assert (found == expected).all(1).float().mean() >= 0.7  # float32 against float64, as of GPTQ above
    errors = [output_errors(weight, decode(each, grid), damped(hessian)).sum() for each in (first, found, expected)]
    assert errors[1] < 0.995 * errors[0]
    assert errors[1] <= 1.005 * errors[2]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_rows_of_a_head_are_rounded_in_parts(asymmetric, monkeypatch):
    weight, hessian = problem(48, 64)

    def rounded() -> tuple[torch.Tensor, torch.Tensor]:
        grid = grid_of(weight, 3, 32, asymmetric, counts=hessian.diagonal())
        codes = descended(weight, hessian, grid, encode(weight, grid))
        return codes, decode(codes, fitted_scales(weight, hessian, grid, codes))

    whole = rounded()
    for module in (quantization.grid, coordinate_descent, scales):
        monkeypatch.setattr(module, "ROWS", 7)
    parts = rounded()
    assert torch.equal(parts[0], whole[0])
    assert torch.allclose(parts[1], whole[1], atol=1e-4)


# --- codes and scales by turns ---


@pytest.mark.parametrize("asymmetric", [False, True])
def test_scales_are_the_least_squares_for_their_codes(asymmetric, monkeypatch):
    monkeypatch.setattr(scales, "DAMPING", 0.0)
    monkeypatch.setattr(scales, "TINY", 1e-30)
    weight, hessian = problem(8, 64)
    grid = grid_of(weight, 3, 16, asymmetric=asymmetric)
    codes = gptq(weight, hessian, grid)
    found = fitted_scales(weight, hessian, grid, codes)
    root = torch.linalg.cholesky(hessian.double()).T  # ||(w - q) X'||^2 = ||root (w - q)||^2 / 2
    for o in range(8):
        steps = codes[o].double().view(4, 16)
        if grid.zero is not None:
            steps = steps - grid.zero[o].double().unsqueeze(-1)
        columns = torch.zeros(64, 4, dtype=torch.float64)
        for g in range(4):
            columns[16 * g : 16 * (g + 1), g] = steps[g]
        expected = torch.linalg.lstsq(root @ columns, (root @ weight[o].double()).unsqueeze(-1)).solution[:, 0]
        assert torch.allclose(found.scale[o].double(), expected, rtol=1e-3)
    before, after = (output_errors(weight, decode(codes, each), hessian) for each in (grid, found))
    assert (after < before).all()


def test_turns_make_no_row_worse_and_all_together_better():
    weight, hessian = problem(64, 64)
    grid = grid_of(weight, 3, 32)
    first = gptq(weight, hessian, grid)
    turned, codes = by_turns(weight, hessian, grid, first, partial(descended, weight, hessian))
    before, after = (output_errors(weight, decode(*each), hessian) for each in ((first, grid), (codes, turned)))
    assert (after <= before).all()
    assert after.sum() < 0.95 * before.sum()
    assert torch.equal(after, output_errors(weight, decode(codes, turned), hessian))


def test_zero_points_that_need_be_no_codes_are_fitted_too(monkeypatch):
    monkeypatch.setattr(scales, "DAMPING", 0.0)
    monkeypatch.setattr(scales, "TINY", 1e-30)
    weight, hessian = problem(8, 64)
    weight += 0.3
    grid = grid_of(weight, 3, 16, asymmetric=True)
    grid = Grid(grid.scale, grid.zero.float(), 3, 16)
    codes = gptq(weight, hessian, grid)
    found = fitted_scales(weight, hessian, grid, codes)
    root = torch.linalg.cholesky(hessian.double()).T
    for o in range(8):
        columns = torch.zeros(64, 8, dtype=torch.float64)
        for g in range(4):
            columns[16 * g : 16 * (g + 1), g] = codes[o, 16 * g : 16 * (g + 1)].double()
            columns[16 * g : 16 * (g + 1), 4 + g] = 1
        expected = torch.linalg.lstsq(root @ columns, (root @ weight[o].double()).unsqueeze(-1)).solution[:, 0]
        assert torch.allclose(found.scale[o].double(), expected[:4], rtol=1e-2)
        assert torch.allclose(-(found.zero * found.scale)[o].double(), expected[4:], rtol=1e-2, atol=1e-3)
    still = fitted_scales(weight, hessian, Grid(grid.scale, grid.zero.to(torch.int8), 3, 16), codes)
    errors = [output_errors(weight, decode(codes, each), hessian).sum() for each in (grid, still, found)]
    assert errors[0] > errors[1] > 1.05 * errors[2]
    assert still.zero.dtype == torch.int8


def test_a_group_far_from_zero_does_not_hold_the_others():
    weight, hessian = problem(8, 64)
    weight *= 0.05
    weight[:, 16:32] = 1 + 1e-4 * weight[:, 16:32]
    low, high = (f(weight.unflatten(1, (4, 16)), -1) for f in (torch.amin, torch.amax))
    scale = 1.2 * (high - low) / 7
    grid = Grid(scale, -4 - low / scale, 3, 16)
    found = fitted_scales(weight, hessian, grid, encode(weight, grid))
    assert ((found.scale / scale - 1).abs()[:, [0, 2, 3]].mean(0) > 0.01).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_a_range_by_what_columns_count_is_better_where_they_differ(bits):
    weight, _ = problem(64, 64)
    weight[:, ::32] *= 4  # an outlier in each group, in a column that counts nothing
    counts = torch.ones(64)
    counts[::32] = 0
    hessian = torch.diag(counts).double()
    grids = [grid_of(weight, bits, 32), grid_of(weight, bits, 32, counts=counts)]
    errors = [output_errors(weight, decode(encode(weight, each), each), hessian).sum() for each in grids]
    assert errors[1] < 0.5 * errors[0]
    assert torch.isfinite(grid_of(weight, bits, 32, counts=torch.zeros(64)).scale).all()


def test_each_row_begins_on_the_better_range():
    weight, hessian = problem(64, 64)
    rise = torch.linspace(0.1, 3, 64).double()
    hessian = hessian * rise[:, None] * rise
    choose = partial(gptq, weight, hessian)
    grid, codes = better_start(weight, hessian, lambda counts: grid_of(weight, 3, 32, counts=counts), choose)
    found = output_errors(weight, decode(codes, grid), hessian)
    each = [grid_of(weight, 3, 32, counts=counts) for counts in (torch.ones(64), hessian.diagonal())]
    errors = torch.stack([output_errors(weight, decode(choose(one), one), hessian) for one in each])
    assert torch.equal(found, errors.amin(0))
    assert set(errors.argmin(0).tolist()) == {0, 1}


def test_a_group_without_a_code_keeps_its_scale():
    weight, hessian = problem(4, 64)
    weight[:, :32] = 0
    grid = grid_of(weight, 3, 32)
    found = fitted_scales(weight, hessian, grid, encode(weight, grid))
    assert torch.equal(found.scale[:, 0], grid.scale[:, 0])
    assert torch.isfinite(found.scale).all()


# --- whole models ---


def half(model):
    """As a checkpoint in bfloat16 is loaded: buffers stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def linears(model) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def test_every_layer_is_calibrated_on_the_quantized_ones_before_it():
    dense = tiny.llama(4)
    student = model_weights.share(dense)
    found = quantize_(student, TOKENS, QuantizeConfig(bits=4))
    rows = {row.name: row for row in found.weights}
    assert set(rows) == set(linears(dense))
    for i in range(4):
        name, caught = f"model.layers.{i}.self_attn.q_proj", []
        module = student.get_submodule(name)
        hook = module.register_forward_hook(lambda _, args, out, caught=caught: caught.append(args[0]))
        student(TOKENS, use_cache=False)
        hook.remove()
        counts = token_weights(dense, TOKENS, [name])[name]  # before anything is rounded
        hessian = gram(caught[0] * counts.sqrt().unsqueeze(-1)).double()
        weight, rounded = (m.get_submodule(name).weight for m in (dense, student))
        whole = output_errors(weight, torch.zeros_like(weight), hessian).sum()
        expected = (output_errors(weight, rounded, hessian).sum() / whole).item()
        assert rows[name].output_error == pytest.approx(expected, rel=1e-4)
        assert rows[name].method == "gptq"
    assert all(row.output_error <= row.rtn_output_error for row in found.weights)


def test_weights_are_the_slopes_of_what_is_predicted():
    dense, name = tiny.llama(3), "model.layers.1.mlp.down_proj"
    dense.get_submodule(name).weight.requires_grad_(True)
    found = token_weights(dense, TOKENS, [name], seed=5)[name]
    assert dense.get_submodule(name).weight.requires_grad, "as it was"
    assert dense.get_submodule(name).weight.grad is None
    kept = []
    hook = dense.get_submodule(name).register_forward_hook(lambda _, args, out: kept.append(out))
    logits = dense(TOKENS, use_cache=False).logits
    hook.remove()
    drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=torch.Generator().manual_seed(5))
    likelihood = logits.log_softmax(-1).flatten(0, 1).gather(1, drawn).sum()
    (slope,) = torch.autograd.grad(likelihood, kept)
    expected = slope.square().mean(-1).sqrt()
    assert torch.allclose(found, expected / expected.mean(), rtol=1e-3)


def test_slopes_are_the_same_where_memory_runs_out_on_the_way(monkeypatch):
    """And where the model writes into what a projection gives, as OLMo does that clips its queries."""
    dense = tiny.tiny(OlmoConfig(**SIZES, clip_qkv=0.5))
    names = list(linears(dense))
    monkeypatch.setattr(sensitivity, "_drawn_log_likelihood_", lambda logits, _: logits.sum().backward())
    whole = token_weights(dense, TOKENS, names)
    assert set(whole) == set(names)
    forward, batches = type(dense).forward, list[int]()

    def failing(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        batches.extend([len(args[0])] if torch.is_grad_enabled() else [])
        if len(batches) == 1:
            raise MemoryError
        return found

    monkeypatch.setattr(type(dense), "forward", failing)
    with memory_limit():
        halves = token_weights(dense, TOKENS, names)
    assert batches[0] > batches[1]
    assert sum(batches[1:]) == len(TOKENS)
    assert all(torch.allclose(halves[name], whole[name], rtol=1e-4) for name in names)


@pytest.mark.parametrize("fits", [False, True])
def test_a_quantizer_says_whether_scales_are_fitted_to_its_codes(fits):
    dense, asked = tiny.llama(2), list[Grid]()

    class Own:
        needs_calibration, fits_scales = True, fits

        def __call__(self, weight, hessian, grid):
            asked.append(grid)
            return encode(weight, grid)

    quantize_(dense, TOKENS, QuantizeConfig(bits=4), quantizer=Own)
    assert len(asked) == 2 * 7 * (1 + (scales.TURNS + 2) * fits)


def test_how_few_bits_are_rounded_is_an_input_of_the_stages_that_round():
    assert recipe(QuantizeConfig(bits=8)) == []
    assert recipe(QuantizeConfig(bits=8, embedding_bits=8)) == []
    assert recipe(QuantizeConfig(bits=4)) == scales.RECIPE
    with_head = QuantizeConfig(bits=4, embedding_bits=4)
    assert recipe(with_head) == scales.RECIPE
    assert recipe(QuantizeConfig(bits="auto")) == scales.RECIPE + bit_choice.CHOSEN_AMONG
    config = CompressConfig(quantize=QuantizeConfig(bits=4))
    plain = replace(config, search=SearchConfig(preserve="none"))
    assert how_rounded(plain, config.quantize) == scales.RECIPE
    on_tests = how_rounded(config, config.quantize)
    assert on_tests[: len(scales.RECIPE)] == scales.RECIPE != on_tests


def test_rounding_needs_no_mode_of_its_own():
    dense = tiny.llama(2)
    found = [quantize_(model_weights.share(dense), TOKENS, QuantizeConfig(bits=4)).packed]
    with torch.inference_mode():
        found.append(quantize_(model_weights.share(dense), TOKENS, QuantizeConfig(bits=4)).packed)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_tokens_that_count_twice_are_as_two(rows, monkeypatch):
    monkeypatch.setattr(Budget, "recorded_rows", lambda *_: rows)
    dense = tiny.llama(3)
    names = list(linears(dense))[:7]
    doubled = torch.ones(TOKENS.shape)
    doubled[2:] = 2

    def hessians(tokens: torch.Tensor, **more) -> dict:
        stack = DecoderRunner(dense)
        return {n: h for _, n, h in each_with_hessian(stack, tokens, {0: names}, lambda _: None, **more)}

    twice = hessians(torch.cat([TOKENS, TOKENS[2:]]))
    found = hessians(TOKENS, weights=dict.fromkeys(names[1:], doubled))
    assert all(torch.allclose(found[name], twice[name], rtol=1e-5, atol=1e-2) for name in names[1:])
    assert torch.equal(found[names[0]], hessians(TOKENS)[names[0]]), "without weights each counts once"


def test_a_module_that_does_not_see_every_token_has_no_weights():
    dense = tiny.llama(3)
    mlp = dense.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:1]), x[1:]])  # as an expert to which one row is sent
    names = list(linears(dense))
    weights = token_weights(dense, TOKENS, names)
    assert set(names) - set(weights) == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert all(each.shape == TOKENS.shape for each in weights.values())
    methods = {row.method for row in quantize_(dense, TOKENS, QuantizeConfig(bits=4)).weights}
    assert methods == {"gptq"}


LEFT_OUT = {
    "turns": (scales, "TURNS", 0),
    "descent": (coordinate_descent, "PASSES", 0),
    "two ranges": (quantization, "better_start", lambda w, h, fit, choose: (g := fit(torch.ones(len(h))), choose(g))),
    "token weights": (quantization, "token_weights", lambda *_: {}),
}


def error_of_3_bits(seed: int) -> float:
    """Σ (w - ŵ) H (w - ŵ)' / Σ w H w' over the matrices of the first layer of a tiny model, tokens by their weight."""
    dense = tiny.tiny(tiny.llama(2).config, seed)
    names = [name for name in linears(dense) if ".layers.0." in name]
    weights, found = token_weights(dense, TOKENS, names), 0.0
    quantize_(student := model_weights.share(dense), TOKENS, QuantizeConfig(bits=3))
    for _, name, h in each_with_hessian(DecoderRunner(dense), TOKENS, {0: names}, lambda _: None, weights=weights):
        was = linears(dense)[name].weight.double()
        left = was - linears(student)[name].weight.double()
        found += (((left @ h.double()) * left).sum() / ((was @ h.double()) * was).sum()).item()
    return found


@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_what_is_left_out_makes_few_bits_worse(left_out, monkeypatch):
    """Turns, exchanges, the better of two ranges and weights each lower the error that they are for, in every model.

    Without the ridge, which is for inputs of which calibration tells less than it does of random tokens.
    """
    monkeypatch.setattr(gptq_module, "RIDGE", 0.0)
    whole = [error_of_3_bits(seed) for seed in range(3)]
    monkeypatch.setattr(*LEFT_OUT[left_out])
    assert all(error_of_3_bits(seed) > 1.004 * error for seed, error in enumerate(whole))


def test_calibration_brings_the_logits_nearer_to_the_dense_ones():
    dense, distance = tiny.llama(4), {}
    for quantizer in ("rtn", "gptq"):
        student = model_weights.share(dense)
        quantize_(student, TOKENS, QuantizeConfig(bits=4, quantizer=quantizer))
        heldout = tiny.some_tokens(seed=9)
        logits = [m(heldout, use_cache=False).logits.log_softmax(-1) for m in (dense, student)]
        distance[quantizer] = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    assert 0 < distance["gptq"] < distance["rtn"]


def row_weights() -> torch.Tensor:
    return torch.linspace(0.1, 1.9, len(TOKENS)).unsqueeze(1).expand(TOKENS.shape)


def rows_of_head(dense, monkeypatch) -> torch.Tensor:
    """H of what its head reads, by parts of two rows, the second of which runs out of memory once, at its end; the
    tokens of each row count otherwise."""
    stack, calls, exits = DecoderRunner(dense), [], DecoderRunner.exit

    def failing(self, *args):
        logits = exits(self, *args)
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise MemoryError
        return logits

    monkeypatch.setattr(DecoderRunner, "exit", failing)
    monkeypatch.setattr(Budget, "logit_rows", lambda *_: 2)
    with memory_limit():
        found = hessian_of_head(stack, TOKENS, row_weights())
    assert found is not None
    assert sum(calls) > len(TOKENS), "one part came again"
    monkeypatch.undo()
    return found


def test_a_head_beside_plain_embeddings_is_calibrated_too(monkeypatch):
    monkeypatch.setattr(bit_choice, "unpacks_while_loading", lambda: False)  # else all in one width is cheaper
    mixed = QuantizeConfig(bits="auto", bits_allowed="16,4,3")
    found = quantize_(tiny.llama(4, tie_word_embeddings=False), TOKENS, mixed, target=62_000)
    methods = {row.name: row.method for row in found.weights if ".layers." not in row.name}
    assert methods == {"lm_head": "gptq"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_few_bits_is_calibrated_on_what_it_reads(tied, monkeypatch):
    dense, caught = tiny.llama(4, tie_word_embeddings=tied), []
    hook = dense.lm_head.register_forward_hook(lambda _, args, out: caught.append(args[0]))
    dense(TOKENS, use_cache=False)
    hook.remove()
    counts = token_weights(dense, TOKENS, ["lm_head"])["lm_head"]
    hessian = gram(caught[0] * counts.sqrt().unsqueeze(-1)).double()
    options = QuantizeConfig(bits=4, embedding_bits=4)
    student = model_weights.share(dense)
    rows = {row.name: row for row in quantize_(student, TOKENS, options).weights}
    row = rows["model.embed_tokens" if tied else "lm_head"]
    assert row.method == "gptq"
    weight, rounded = dense.lm_head.weight, student.lm_head.weight
    whole = output_errors(weight, torch.zeros_like(weight), hessian).sum()
    expected = (output_errors(weight, rounded, hessian).sum() / whole).item()
    assert row.output_error == pytest.approx(expected, rel=1e-4)
    assert row.output_error < 0.9 * row.rtn_output_error
    if not tied:
        assert rows["model.embed_tokens"].method == "rtn", "what rows are read as they are is not calibrated"
    monkeypatch.setattr("layercut.quantization.gptq.ROWS", 7)
    by_parts = model_weights.share(dense)
    quantize_(by_parts, TOKENS, options)
    assert torch.equal(by_parts.lm_head.weight, rounded)
    several = rows_of_head(dense, monkeypatch)
    by_row = caught[0] * row_weights().sqrt().unsqueeze(-1)
    assert torch.allclose(several, gram(by_row).double(), rtol=1e-5, atol=1e-2)
    whole_bytes = quantize_(model_weights.share(dense), TOKENS, QuantizeConfig(bits=4, embedding_bits=8)).weights
    assert {row.method for row in whole_bytes if row.bits == 8} == {"rtn"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [{"bits": 8}, {"bits": 4}])
def test_the_packed_tensors_are_the_model(tied, width):
    dense = half(tiny.llama(4, tie_word_embeddings=tied))
    before = {name: weight.clone() for name, weight in dense.named_parameters()}
    student = model_weights.share(dense)
    found = quantize_(student, TOKENS, QuantizeConfig(quantizer="rtn", embedding_bits=8, **width))
    assert all(torch.equal(weight, before[name]) for name, weight in dense.named_parameters()), "the dense model"
    weights = quantized_weights(found.packed, found.config)
    for name, weight in student.named_parameters(remove_duplicate=False):
        if name in weights:
            assert torch.equal(weight, weights[name])
        elif "norm" in name:
            assert torch.equal(weight, before[name])
        else:
            assert (name, tied) == ("lm_head.weight", True)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    bits = {row.name: row.bits for row in found.weights}
    assert {bits[name] for name in bits if ".layers." in name} == {width["bits"]}
    assert bits["model.embed_tokens"] == 8
    assert {row.group_size for row in found.weights} == {32, 64}, "the largest that divides each weight's columns"


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_config_says_what_vllm_asks(bits):
    """Its rules, as read in its source: every linear module in a group or ignored, by full name; modules that it fuses
    in one group; weights of four or eight bits alone, packed, in groups it has kernels for."""
    model = half(tiny.llama(4))
    found = quantize_(model, TOKENS, QuantizeConfig(bits=bits, quantizer="rtn"))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = [name for group in found.config["config_groups"].values() for name in group["targets"]]
    assert sorted(named + found.config["ignore"]) == sorted(linear)
    assert "lm_head" in found.config["ignore"]
    assert found.config["quant_method"] == "compressed-tensors"
    where = {name: key for key, group in found.config["config_groups"].items() for name in group["targets"]}
    for i in range(4):
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            names = [name for name in linear if f".layers.{i}." in name and name.endswith(fused)]
            assert len({where.get(name) for name in names}) == 1
    for group in found.config["config_groups"].values():
        assert group["format"] == "pack-quantized"
        assert group["input_activations"] is None
        weights = group["weights"]
        assert (weights["type"], weights["strategy"], weights.get("actorder")) == ("int", "group", None)
        assert (weights["dynamic"], weights["symmetric"], weights["num_bits"]) == (False, bits > 3, bits)
        assert weights["group_size"] in (32, 64, 128)
        for name in group["targets"]:
            rows, columns = model.get_submodule(name).weight.shape
            packed = {key: tuple(found.packed[f"{name}.{key}"].shape) for key in ("weight_packed", "weight_scale")}
            groups = columns // weights["group_size"]
            assert packed == {"weight_packed": (rows, -(-columns * bits // 32)), "weight_scale": (rows, groups)}
            assert found.packed[f"{name}.weight_shape"].tolist() == [rows, columns]
            if bits == 3:  # packed along the outputs
                assert found.packed[f"{name}.weight_zero_point"].shape == (-(-rows * bits // 32), groups)


def test_bits_and_bytes_of_the_packed_weights():
    model = half(tiny.llama(2))
    found = quantize_(model, TOKENS, QuantizeConfig(bits=4, quantizer="rtn"))
    for row in found.weights:
        weight = model.get_submodule(row.name).weight
        groups = weight.numel() // row.group_size
        assert row.bytes == weight.numel() // 2 + 2 * groups + 2 * 8  # codes, scales, the shape


SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**SIZES, tie_word_embeddings=True), Phi3Config(**SIZES), GPTNeoXConfig(**SIZES)],
    ids=lambda config: config.model_type,
)
def test_other_architectures_reload_to_the_bit(config, tmp_path, monkeypatch):
    quick.leave_out(monkeypatch)
    model = half(tiny.tiny(config))
    found = quantize_(model, TOKENS, QuantizeConfig(bits=4, embedding_bits=8))
    packing = {"packed": found.packed, "quantization_config": found.config}
    checkpoint.export_checkpoint(model, folders.tokenizer(), tmp_path / "model", **packing)
    loaded = loading.load(checkpoints.resolve(str(tmp_path / "model")), dtype="bfloat16").model
    assert torch.equal(loaded(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
    assert not hasattr(model.config, "quantization_config"), "the model in memory is a plain one"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_one_width_throughout_reloads_to_the_bit(bits, tied, tmp_path, monkeypatch):
    """Embeddings packed as all other weights, which stock transformers unpacks while loading; tied ones stored once."""
    monkeypatch.setattr("layercut.export.checkpoint.verify_reload", lambda *_: {})
    model = half(tiny.llama(2, tie_word_embeddings=tied))
    config = QuantizeConfig(bits=bits, quantizer="rtn", embedding_bits=bits)
    found = quantize_(model, TOKENS, config)
    assert {row.group_size for row in found.weights} == {32}, "one for all: a loader takes the first group's"
    packing = {"packed": found.packed, "quantization_config": found.config}
    written = checkpoint.export_checkpoint(model, folders.tokenizer(), tmp_path / "model", **packing)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(loaded(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert sum("weight_scale" in name for name in found.packed) == 2 * 7 + (1 if tied else 2)
    assert found.bytes_after <= written["bytes"] < found.bytes_after + 8192, "with the header of the file"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4, "embedding_bits": 3}, "beside --bits 4 cannot be loaded"),
    ],
    ids=str,
)
def test_widths_that_cannot_be_loaded_together_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        QuantizeConfig(**options)


# --- what is refused ---


def test_refusals(monkeypatch):
    model = tiny.llama(2)
    with pytest.raises(ConfigError, match="groups of 48 do not divide the columns of all weights, 32, 64") as refusal:
        quantize_(model, TOKENS, QuantizeConfig(bits=4, group_size=48))
    assert refusal.value.hint == "give --group-size 32"
    with pytest.raises(ModelError, match="no linear modules"):
        quantize_(tiny.gpt2(2), TOKENS, QuantizeConfig(bits=4))
    with pytest.raises(ModelError, match="experts of MixtralForCausalLM are merged"):
        quantize_(tiny.tiny(MixtralConfig(**SIZES, num_local_experts=2)), TOKENS, QuantizeConfig(bits=4))
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj holds weights that are not finite"):
        quantize_(model, TOKENS, QuantizeConfig(bits=4, quantizer="rtn"))
    with monkeypatch.context() as older:
        older.delattr("transformers.integrations.compressed_tensors.CompressedTensorsDequantize")
        with pytest.raises(ConfigError, match="cannot load zero points or packed embeddings"):
            quantize_(tiny.llama(2), TOKENS, QuantizeConfig(bits=3))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ConfigError, match="compressed-tensors") as refusal:
        quantize_(model, TOKENS, QuantizeConfig(bits=4))
    assert refusal.value.hint == 'pip install "layercut[quantize]"'


def test_a_tie_that_came_apart_is_noticed(tmp_path):
    from safetensors.torch import save_file

    weight = torch.zeros(4, 4)
    state = {"a": weight, "b": weight}
    save_file({"a": weight}, tmp_path / "model.safetensors")
    checkpoint.check_bytes(tmp_path, state)
    save_file({"a": weight, "b": weight.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(checkpoint.ReloadError, match="128 bytes of weights were saved, but the model has 64"):
        checkpoint.check_bytes(tmp_path, state)


# --- the journey ---

SHORT = ["--tokens=256", "--window=32", "--tune-tokens=0", "--eval-tokens=256", "--no-speed", "--no-fold"]


@pytest.fixture(scope="module")
def quantized_run(texts, tmp_path_factory) -> Path:
    """A tied bfloat16 model, cut and quantized with everything on."""
    folder = tmp_path_factory.mktemp("quantize")
    model = half(tiny.llama(6, vocab_size=folders.VOCABULARY, tie_word_embeddings=True))
    model.save_pretrained(folder / "model")
    folders.tokenizer().save_pretrained(folder / "model")
    flags = [*SHORT, "--segment=2:4", "--bits=4", "--embedding-bits=8"]
    argv = ["compress", str(folder / "model"), *flags, f"--data={texts[0]}", f"--eval-data={texts[1]}"]
    with pytest.MonkeyPatch.context() as patch:
        quick.leave_out_samples(patch)
        assert main([*argv, f"--out={folder / 'run'}"]) == 0
    return folder / "run"


def read(run: Path, name: str) -> dict:
    return json.loads((run / f"{name}.json").read_text())


def test_a_run_measures_and_exports_the_quantized_model(quantized_run):
    summary, quantize = read(quantized_run, "summary"), read(quantized_run, "quantize")
    exported = read(quantized_run, "export")
    assert exported["check"]["logits"] == "equal to the bit"
    assert exported["check"]["perplexity"]["tokens"] == exported["perplexity"]["tokens"] == 256
    assert exported["perplexity"]["value"] == summary["perplexity"]["quantized"]
    # row by row and in float32 in the fresh process, all at once in the run
    assert exported["check"]["perplexity"]["value"] == pytest.approx(exported["perplexity"]["value"], rel=1e-3)
    file = quantized_run / "model" / "model.safetensors"
    assert summary["bytes"]["after"] == file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert quantize["bytes"]["after"] == file.stat().st_size - header
    assert quantize["bytes"]["after"] < 0.5 * quantize["bytes"]["before"]
    loaded = loading.load(checkpoints.resolve(str(quantized_run / "model")))
    tokens = stored_blocks(quantized_run, "evaluation")
    assert perplexity(loaded.model, tokens) == summary["perplexity"]["quantized"]
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert sorted(loaded.model.state_dict()) == sorted(tiny.llama(4, tie_word_embeddings=True).state_dict())
    assert summary["perplexity"]["quantized"] != summary["perplexity"]["cut"]
    card = (quantized_run / "model" / "README.md").read_text()
    assert "pip install compressed-tensors" in card
    assert "to 4 bits (gptq)" in card


def test_a_quantized_model_is_loaded_as_a_plain_one(quantized_run, tmp_path):
    loaded = loading.load(checkpoints.resolve(str(quantized_run / "model")), dtype="bfloat16").model
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS, use_cache=False).logits, loaded(TOKENS, use_cache=False).logits)
    packed = AutoModelForCausalLM.from_pretrained(quantized_run / "model")
    assert torch.equal(packed(TOKENS, use_cache=False).logits, loaded(TOKENS, use_cache=False).logits)


def test_a_quantized_model_is_not_quantized_again(quantized_run, tmp_path, capsys):
    assert main(["quantize", str(quantized_run), "--bits=8", f"--out={tmp_path / 'q'}"]) == 2
    assert "quantized already" in capsys.readouterr().err


def test_quantize_alone(tiny_model, texts, tmp_path, monkeypatch, capsys):
    quick.leave_out(monkeypatch)
    out = tmp_path / "int8"
    argv = ["quantize", str(tiny_model), "--bits=8", "--tokens=256", "--window=32"]
    argv += [f"--data={texts[0]}", f"--out={out}"]
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == str(out)
    rows = read(out, "quantize")["layers"]
    assert {(row["bits"], row["method"]) for row in rows} == {(8, "gptq")}
    dense, loaded = (loading.load(checkpoints.resolve(str(path))).model for path in (tiny_model, out))
    logits = [m(TOKENS, use_cache=False).logits for m in (dense, loaded)]
    assert 0 < (logits[0] - logits[1]).abs().mean() < 0.1 * logits[0].std()
    assert main(argv) == 2
    assert main(["quantize", str(tiny_model), f"--out={tmp_path / 'none'}"]) == 2
    assert "--bits 8 or --bits 4" in capsys.readouterr().err


def test_a_ruined_model_goes_the_same_way_and_is_called_broken(texts, tmp_path, monkeypatch):
    quick.leave_out(monkeypatch)
    flags = [*SHORT, "--segment=3:4", "--quantizer=rtn", f"--data={texts[0]}", "--eval-data=self"]
    model = str(folders.write_fragile_model(tmp_path / "fragile"))
    assert main(["compress", model, *flags, f"--out={tmp_path / 'run'}", "--bits=4"]) == 0
    figures = read(tmp_path / "run", "summary")["perplexity"]
    assert figures["cut"] < 1.01 * figures["dense"]
    assert figures["quantized"] > 3 * figures["dense"]
    rows = read(tmp_path / "run", "quantize")["layers"]
    assert all(row["bytes"] > 0 for row in rows)
    for page in ("report.html", "model/README.md"):
        assert "The compressed model is broken" in (tmp_path / "run" / page).read_text()
    assert "Quantization broke it" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"bits": 16},
        {"bits": 4},
        {"bits": 6, "group_size": 32},
        {"bits": 4, "embedding_bits": 8},
        {"bits": 3},
        {"bits": 3, "embedding_bits": 3},
        {"bits": 4, "embedding_bits": 4},
    ],
)
def test_bytes_are_known_before_anything_is_rounded(asked, tied):
    """To the byte those of the tensors, of each layer too: without it there are as many fewer."""
    config = QuantizeConfig(quantizer="rtn", **asked)
    model = half(tiny.llama(3, tie_word_embeddings=tied))
    model.stored_dtype = torch.bfloat16
    found = saved_bytes(model, config, torch.bfloat16)
    whole = model_weights.parameter_bytes(model)
    if config.rounds:
        whole = quantize_(model_weights.share(model), None, config).bytes_after
    assert found.total == whole
    fewer = saved_bytes(half(tiny.llama(2, tie_word_embeddings=tied)), config, torch.bfloat16)
    assert found.layers == (found.total - fewer.total,) * 3


@pytest.mark.parametrize(("bits", "kind"), [(8, "q8_0"), (6, "q6_k"), (4, "q4_k_m"), (3, "q3_k_m"), (2, "q2_k")])
def test_a_gguf_file_has_the_bits_that_are_asked_for(bits, kind, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("layercut.cli.single_stage.export", lambda _, config: asked.append(config))
    quantize_alone("model", QuantizeAloneConfig(out=tmp_path / "x.gguf", quantize=QuantizeConfig(bits=bits)))
    assert asked[0].gguf_type == kind
