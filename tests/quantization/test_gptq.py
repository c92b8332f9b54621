"""The grid, and GPTQ's steps against direct references."""

from __future__ import annotations

import pytest
import torch

from layercut.quantization import grid as grid_module
from layercut.quantization import quantizers as module
from layercut.quantization.grid import Grid, decode, encode, fit_grid
from layercut.quantization.quantizers import (
    DAMPING,
    compensated,
    factored,
    fitted_scales,
    gptq,
    gram,
    output_errors,
    with_ridge,
)

both = pytest.mark.parametrize("zeros", [False, True])


def problem(outputs: int, inputs: int, seed: int = 0, samples: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, I] and the Hessian 2 X'X of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw)
    mixing = torch.randn(inputs, inputs, generator=draw)
    x = torch.randn(samples, inputs, generator=draw) @ mixing * torch.rand(inputs, generator=draw)
    return weight, gram(x[: samples // 2]).double() + gram(x[samples // 2 :])


def grid_of(weight: torch.Tensor, bits: int, size: int, zeros: bool = False, **more: torch.Tensor) -> Grid:
    return fit_grid(weight, bits, size, asymmetric=zeros, dtype=weight.dtype, **more)


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    return compensated(weight, grid, *factored(hessian))


def errors(weight: torch.Tensor, hessian: torch.Tensor, *found: tuple[Grid, torch.Tensor]) -> list[torch.Tensor]:
    return [output_errors(weight, decode(codes, grid), hessian) for grid, codes in found]


# --- the grid ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
@pytest.mark.parametrize("bits", [4, 8])
def test_grid_is_that_of_compressed_tensors(bits, zeros, dtype):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = problem(8, 64)[0].to(dtype)
    weight[:, 3] += 1
    args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=not zeros)
    grouped = weight.float().unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    grid = grid_of(weight, bits, 32, zeros)
    assert torch.equal(grid.scale, scale.to(dtype))
    codes = encode(weight, grid)
    if dtype == torch.float32:
        assert grid.zero is None or torch.equal(grid.zero, zero)
        assert torch.equal(codes, quantize(weight, scale, zero, args, dtype=torch.int8))
    assert torch.equal(decode(codes, grid), dequantize(codes, grid.scale, grid.zero, args))


def test_a_group_of_zeros_stays_zero():
    weight = torch.zeros(2, 32)
    grid = grid_of(weight, 4, 32)
    assert torch.equal(decode(encode(weight, grid), grid), weight)


@both
@pytest.mark.parametrize("bits", [2, 3])
def test_few_bits_take_the_range_of_least_error(bits, zeros, monkeypatch):
    weight = problem(16, 64)[0]
    weight[:, ::32] *= 4  # an outlier in each group, which a covering grid spends its points on
    grid = grid_of(weight, bits, 32, zeros)
    monkeypatch.setattr(grid_module, "SEARCHED_BITS", 0)
    covering = grid_of(weight, bits, 32, zeros)
    found = [(decode(encode(weight, g), g) - weight).unflatten(1, (-1, 32)).square().sum(-1) for g in (grid, covering)]
    assert (found[0] <= found[1]).all()
    assert found[0].sum() < 0.95 * found[1].sum()


# --- codes column by column ---


def direct(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The paper's step as it is derived: round a column, correct the open ones by H^-1 of the open ones."""
    damp = hessian.clone()
    damp.diagonal().add_(DAMPING * hessian.diagonal().mean())
    w, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.int8)
    rest = hessian.diagonal().argsort(descending=True).tolist()
    while rest:
        column, inverse = rest[0], torch.linalg.inv(damp[rest][:, rest])
        codes[:, column] = encode(w.float(), grid)[:, column]
        error = (w[:, column] - decode(codes, grid)[:, column].double()) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0]
        rest = rest[1:]
    return codes


@pytest.mark.parametrize("seed", range(4))
@both
def test_codes_are_those_of_the_direct_computation(seed, zeros):
    weight, hessian = problem(16, 160, seed)  # more columns than a block
    grid = grid_of(weight, 4, 32, zeros)
    ours, reference = plain_gptq(weight, hessian, grid), direct(weight, hessian, grid)
    # float32 against float64: a column within rounding of a half may fall either way, and then shifts its row
    found = errors(weight, hessian, (grid, ours), (grid, reference))
    assert (ours == reference).all(1).float().mean() >= 0.8
    assert found[0].sum() <= 1.02 * found[1].sum()


# --- codes exchanged ---


# --- scales ---


def test_a_group_without_a_code_keeps_its_scale():
    weight, hessian = problem(4, 64)
    weight[:, :32] = 0
    grid = grid_of(weight, 3, 32)
    found = fitted_scales(weight, hessian, grid, encode(weight, grid))
    assert torch.equal(found.scale[:, 0], grid.scale[:, 0])
    assert torch.isfinite(found.scale).all()


# --- all of it ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("samples", [8, 256])  # 8 inputs for 64 columns: H has no inverse before it is damped
def test_no_row_is_worse_than_rounded_to_nearest(seed, samples):
    weight, hessian = problem(32, 64, seed, samples)
    hessian[5], hessian[:, 5] = 0, 0  # an input that never occurs
    plain = grid_of(weight, 3, 32)
    ours, nearest = errors(weight, hessian, gptq(weight, hessian, plain), (plain, encode(weight, plain)))
    assert (ours <= 1.001 * nearest).all()
    assert ours.sum() < 0.7 * nearest.sum()


@pytest.mark.parametrize("left_out", [("TURNS", 0), ("PASSES", 0), ("compensated", lambda w, g, *_: encode(w, g))])
def test_each_step_lowers_the_error(left_out, monkeypatch):
    weight, hessian = problem(64, 64)
    plain = grid_of(weight, 3, 32)
    (whole,) = errors(weight, hessian, gptq(weight, hessian, plain))
    monkeypatch.setattr(module, *left_out)
    (less,) = errors(weight, hessian, gptq(weight, hessian, plain))
    assert whole.sum() < 0.99 * less.sum()


def test_a_ridge_is_nearer_on_inputs_that_were_not_seen():
    """Of 96 inputs for 64 columns the Hessian is theirs more than their distribution's; the more, the less so."""
    weight = problem(64, 64)[0]
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=draw)
    seen, other = (gram(torch.randn(n, 64, generator=draw) @ mixing).double() for n in (96, 4096))
    found = [gptq(weight, h, grid_of(weight, 3, 32)) for h in (with_ridge(seen), seen)]
    with_it, without = errors(weight, other, *found)
    assert with_it.sum() < 0.97 * without.sum()


@both
def test_the_rows_of_a_head_are_rounded_in_parts(zeros, monkeypatch):
    weight, hessian = problem(48, 64)
    whole = gptq(weight, hessian, grid_of(weight, 3, 32, zeros))
    for each in (grid_module, module):
        monkeypatch.setattr(each, "ROWS", 7)
    parts = gptq(weight, hessian, grid_of(weight, 3, 32, zeros))
    assert (parts[1] == whole[1]).all(1).float().mean() > 0.9
    assert torch.allclose(*(each.sum() for each in errors(weight, hessian, whole, parts)), rtol=1e-2)
