"""On the accelerator that is there: what the stand-in (`test_stand_in.py`) cannot show. `make gpu` runs these alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from journeys import Journey, assert_same, found
from layercut.evaluation import speed
from layercut.models.runner import DecoderRunner

KIND = torch.accelerator.current_accelerator(check_available=True)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(KIND is None, reason="there is no accelerator; make gpu, on one")]
SEVERAL = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="there are no two accelerators")


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Journey:
    return Journey(tmp_path_factory.mktemp("journey"), texts)


@pytest.fixture(scope="module")
def on_cpu(journey: Journey) -> dict[str, Any]:
    return found(journey.run("cpu", device="cpu"))


def test_the_whole_journey_stopped_and_resumed_gives_what_the_cpu_gives(journey, on_cpu):
    assert_same(found(journey.run("one", stopped=True, verified=True)), on_cpu, tolerance=1e-2)


@SEVERAL
def test_layers_on_several_go_through_compress_to_the_end(journey, on_cpu):
    assert_same(found(journey.run("several", device_map="on", verified=True)), on_cpu, tolerance=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_by_layer_is_what_the_model_computes(dtype):
    model, tokens = tiny.llama(4).to(KIND, dtype), tiny.some_tokens(4, 32)
    stack = DecoderRunner(model)
    hidden, calls = stack.enter(tokens)
    got = stack.exit(stack.run(hidden, calls, 0, len(stack)), tokens)
    torch.testing.assert_close(got, model(tokens.to(KIND)).logits)


def test_memory_is_measured_on_the_device():
    model = tiny.llama(4).to(KIND)
    model(tiny.some_tokens(4, 32).to(KIND))
    assert speed.peak_device_bytes(next(model.parameters()).device) > 0
