"""What accelerators need is checked on a stand-in (`stand_in_device.py`), on machines that have none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import stand_in_device
import tiny
from stand_in_device import Counts, CrossedDevicesError


@pytest.fixture
def counts(tmp_path: Path) -> Iterator[Counts]:
    """Two devices; what happens on them."""
    with stand_in_device.present(tmp_path / "backend", devices=2) as found:
        yield found


# --- the stand-in itself ---


def test_it_is_an_accelerator_while_present(tmp_path):
    with stand_in_device.present(tmp_path, devices=2):
        assert str(torch.accelerator.current_accelerator(check_available=True)) == "standin"
        assert torch.accelerator.device_count() == 2
    assert torch.accelerator.current_accelerator(check_available=True) is None


def test_it_computes_what_the_cpu_computes(counts):
    model, tokens = tiny.llama(2), tiny.some_tokens(2, 8)
    there = copy.deepcopy(model).to("standin:1")
    logits = there(tokens.to("standin:1")).logits
    assert logits.device == torch.device("standin:1")
    torch.testing.assert_close(logits.cpu(), model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_gradients_pass_between_its_devices(counts):
    weight = torch.nn.Parameter(torch.ones(3, 3, device="standin:0"))
    (weight.square().to("standin:1") * torch.arange(3.0, device="standin:1")).sum().backward()
    assert weight.grad.device == torch.device("standin:0")
    assert weight.grad.tolist() == [[0.0, 2.0, 4.0]] * 3
    assert counts.between == 2 * 36


def test_devices_are_not_mixed(counts):
    here, there, cpu = torch.ones(2, device="standin:0"), torch.ones(2, device="standin:1"), torch.ones(2)
    for other in (there, cpu):
        with pytest.raises(CrossedDevicesError, match="standin:0"):
            here + other
    assert (here + torch.tensor(1.0)).tolist() == [2.0, 2.0]  # 0-dimensional, as torch allows


def test_it_has_no_float64(counts):
    with pytest.raises(TypeError, match=r"no torch\.float64"):
        torch.ones(2, device="standin").double()


def test_reads_and_copies_are_counted(counts):
    x = torch.ones(4).to("standin")
    counts.reset_()
    assert x.sum().item() == 4.0
    assert (counts.launches, counts.reads) == (2, 1)
    x.cpu()
    assert (counts.reads, counts.to_host, counts.to_device) == (2, 16, 0)


def test_its_memory_is_counted(counts):
    before = torch.accelerator.memory_allocated(1)
    torch.accelerator.reset_peak_memory_stats(1)
    x = torch.ones(1000, device="standin:1")
    del x
    assert torch.accelerator.memory_allocated(1) == before
    assert torch.accelerator.max_memory_allocated(1) == before + 4000
