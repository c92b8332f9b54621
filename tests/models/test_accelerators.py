"""What accelerators need, on a stand-in (`stand_in_device.py`); `make gpu` runs what is for those that are there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

import folders
import layercut as lc
import quick
import stand_in_device
import tiny
from layercut import surgery
from layercut.errors import ConfigError
from layercut.evaluation import speed
from layercut.healing import endpoint_tuning, tuning_state
from layercut.models import checkpoints, placement
from layercut.models.runner import DecoderRunner
from stand_in_device import Counts, CrossedDevicesError

KIND = torch.accelerator.current_accelerator(check_available=True)
NONE = pytest.mark.skipif(KIND is None, reason="there is no accelerator; make gpu, on one")
SEVERAL = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="there are no two accelerators")


@pytest.fixture
def counts(tmp_path: Path) -> Iterator[Counts]:
    """Two devices; what happens on them."""
    with stand_in_device.present(tmp_path / "backend", devices=2) as happened:
        yield happened


def test_devices_are_not_mixed(counts):
    """On the stand-in itself: what it is for."""
    here = torch.ones(2, device="standin:0")
    for other in (torch.ones(2, device="standin:1"), torch.ones(2)):
        with pytest.raises(CrossedDevicesError, match="standin:0"):
            here + other
    assert (here + torch.tensor(1.0)).tolist() == [2.0, 2.0]  # 0-dimensional, as torch allows


OPTIONS = {"tokens": 128, "window": 32, "ratio": 0.4, "tune_tokens": 192, "batch_tokens": 64, "learning_rate": 1e-3}
OPTIONS |= {"bits": 8, "eval_tokens": 128, "eval_window": 64, "speed": False, "format": "safetensors"}


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Callable[..., dict[str, Any]]:
    """Runs `compress`, with 8 bits, on a tiny model; returns what it found, by the names of its summary."""
    folder = tmp_path_factory.mktemp("journey")
    model, step = folders.write_model(folder / "model", layers=5), endpoint_tuning._Training.step_

    def stopping(training: Any) -> Any:
        if training.report.step == 1:
            raise StoppedError
        return step(training)

    def run(name: str, *, verified: bool = False, stopped: bool = False, **load: Any) -> dict[str, Any]:
        """verified: by a fresh process; stopped: while tuning at first, and resumed."""
        options = {"data": str(texts[0]), "eval_data": str(texts[1]), "out": folder / name, **OPTIONS, **load}
        with pytest.MonkeyPatch.context() as patch:
            if verified:
                quick.bring_back(patch, "verify_reload")
            if stopped:
                with patch.context() as until:
                    until.setattr(tuning_state.StateFile, "due", lambda _: True)
                    until.setattr(endpoint_tuning._Training, "step_", stopping)
                    with pytest.raises(StoppedError):
                        lc.compress(model, **options)
            summary = lc.compress(model, **options).summary
        return {key: summary[key] for key in ("segments", "original_layer_index", "parameters", "perplexity", "bytes")}

    return run


class StoppedError(RuntimeError):
    """Ends a run while it tunes."""


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-4) -> None:
    """The same cut, and perplexities as near as another order of summation leaves them."""
    for name in one.keys() - {"perplexity"}:
        assert one[name] == other[name], name
    for state in ("dense", "cut", "folded", "tuned", "quantized"):
        assert one["perplexity"][state] == pytest.approx(other["perplexity"][state], rel=tolerance), state


@pytest.fixture(scope="module")
def on_cpu(journey: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return journey("cpu", device="cpu")


def test_the_whole_journey_stopped_and_resumed_gives_what_the_cpu_gives(counts, journey, on_cpu):
    assert_same(journey("one", stopped=True), on_cpu)
    assert counts.launches > 1000
    assert counts.between == 0


def test_layers_on_two_devices_go_through_compress_to_the_end(counts, journey, on_cpu):
    assert_same(journey("two", place="devices", verified=True), on_cpu)
    assert counts.between > 0


@pytest.mark.gpu
@NONE
def test_a_journey_on_the_accelerator_stopped_and_resumed_gives_what_the_cpu_gives(journey, on_cpu):
    assert_same(journey("gpu", stopped=True, verified=True), on_cpu, tolerance=1e-2)


@pytest.mark.gpu
@SEVERAL
def test_layers_on_several_accelerators_go_through_compress_to_the_end(journey, on_cpu):
    assert_same(journey("several", place="devices", verified=True), on_cpu, tolerance=1e-2)


@pytest.mark.gpu
@NONE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_by_layer_on_the_accelerator_is_what_the_model_computes(dtype):
    model, tokens = tiny.llama(4).to(KIND, dtype), tiny.some_tokens(4, 32)
    stack = DecoderRunner(model)
    got = stack.exit(stack.last(tokens), tokens)
    torch.testing.assert_close(got, model(tokens.to(KIND)).logits)
    assert speed.peak_device_bytes(next(model.parameters()).device) > 0


def test_layers_are_divided_so_that_the_fullest_device_is_as_empty_as_can_be():
    assert placement.place_layers([2, 2, 2, 2], 2, [10, 10]) == [0, 0, 1, 1]
    assert placement.place_layers([2, 2, 2, 2], 5, [100, 100]) == [0, 1, 1, 1]
    assert placement.place_layers([1, 1, 4, 1], 0, [9, 9]) == [0, 0, 1, 1]
    assert placement.place_layers([5, 5], 1, [5, 100]) == [1, 1]
    assert placement.place_layers([5, 5], 1, [9, 4]) is None


def test_a_model_too_large_for_one_device_is_placed_over_two(counts, tiny_model, monkeypatch):
    """Hidden states follow the layers, of a clone too; logits are where the tokens are."""
    files = checkpoints.resolve(str(tiny_model))
    assert placement.place_of(files) == "memory"
    weights = placement.weight_bytes(files)
    monkeypatch.setattr(placement, "available_bytes", lambda _: weights)  # 0.8 of it is not enough, of two it is
    assert placement.place_of(files) == "devices"
    assert placement.place_of(files, device="standin:0") == "disk"
    with pytest.raises(ConfigError, match="are 1"):
        placement.place_of(files, "devices", device="standin:0")
    model = placement.load(files).model
    assert placement.placed_over(model) == [torch.device("standin", 0), torch.device("standin", 1)]
    clone, tokens = surgery.cut(model, "3:5"), tiny.some_tokens(2, 8)
    there = tokens.to("standin:0")
    assert clone(there).logits.device == torch.device("standin:0")
    stack = DecoderRunner(model)
    hidden, calls = stack.enter(tokens)
    hidden = stack.run(hidden, calls, 0, len(stack))
    assert hidden.device == torch.device("standin:1")
    assert torch.equal(stack.exit(hidden, tokens).cpu(), model(there).logits.cpu())


def test_layers_on_disk_are_read_onto_it(counts, tiny_model):
    files, tokens, left = checkpoints.resolve(str(tiny_model)), tiny.some_tokens(3, 8), []
    elsewhere = torch.accelerator.memory_allocated(0)
    torch.accelerator.reset_peak_memory_stats(0)
    for where in ({"place": "memory", "device": "cpu"}, {"place": "disk", "device": "standin:1"}):
        model = placement.load(files, **where).model
        for layers, method in ((1, "exhaustive"), (2, "fisher")):  # forwards, and backwards too
            found = lc.search(model, tokens, n_layers=layers, method=method)
            left.append([found.segments, found.kl])
    for (segments, kl), (theirs, their_kl) in zip(left[:2], left[2:], strict=True):
        assert segments == theirs
        assert kl == pytest.approx(their_kl, rel=1e-3)
    assert max(model.layers_on_disk.files.layers_read) > 1
    assert counts.between == 0
    assert torch.accelerator.max_memory_allocated(0) <= elsewhere, "nothing is on the other device"


# --- what is told beforehand, and measured ---


# --- wherever layers are ---


def placed(model: Any) -> Any:
    """A copy over two devices, its head on the last one, as device_map="auto" leaves it."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": i // 2 for i in range(4)}
    devices = {name: torch.device("standin", place) for name, place in places.items()}
    return dispatch_model(copy.deepcopy(model), devices, main_device=torch.device("standin", 0))


def test_a_model_that_transformers_placed_is_searched_cut_and_folded_as_it_lies(counts):
    both, tokens = (model := tiny.llama(4), placed(model)), tiny.some_tokens(8, 8)
    found = [lc.search(each, tokens, n_layers=1, method="exhaustive") for each in both]
    assert found[0].segments == found[1].segments
    folds = [lc.fold_(lc.cut(each, "1:2"), each, tokens) for each in both]
    assert folds[1].kl_after == pytest.approx(folds[0].kl_after, rel=1e-3)
