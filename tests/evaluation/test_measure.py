"""Speed and memory: the arithmetic on made-up timings, bytes against what the shapes say."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest
import torch

import tiny
from layercut.evaluation import generation, speed
from layercut.evaluation.speed import Seconds
from layercut.models import decoder_stack, memory
from layercut.segments import Segment
from layercut.surgery import cut_segment_


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    dense = tiny.llama(8)
    student = decoder_stack.share(dense)
    cut_segment_(student, [Segment(2, 4)])
    return dense, student


def test_ratios_of_known_timings(pair, monkeypatch):
    """2 s outside the layers; each of 8 layers takes 1 s to prefill and 0.5 s to decode; the first round is slow."""
    warm = set()

    def timed(model: Any, prompt: int, decode: int) -> dict[str, Seconds]:
        layers, slow = model.config.num_hidden_layers, 9 * (model not in warm)
        warm.add(model)
        return {"prefill": Seconds(2 + layers + slow, 4 + layers), "decode": Seconds(1 + layers / 2, 1 + layers / 2)}

    monkeypatch.setattr(speed, "time_once", timed)
    found = speed.speed(*pair, prompt=20, decode=10, repeats=1)
    for phase, tokens, dense, compressed in (("prefill", 20, 10, 8), ("decode", 10, 5, 4)):
        assert found[phase] == {
            "dense": pytest.approx(tokens / dense), "compressed": pytest.approx(tokens / compressed),
            "ratio": pytest.approx(1.25), "cpu_ratio": pytest.approx(12 / 10 if phase == "prefill" else 1.25),
            "ideal": pytest.approx(8 / 6),
        }  # fmt: skip


def test_real_timings_and_bytes(pair):
    found = speed.speed(*pair, prompt=24, decode=4, repeats=2)
    assert min(min(found[phase].values()) for phase in ("prefill", "decode")) > 0
    # two heads of 8 for keys and for values, in float32
    assert found["kv_bytes_per_token"] == {"dense": 8 * 2 * 2 * 8 * 4, "compressed": 6 * 2 * 2 * 8 * 4}
    assert found["weight_bytes"]["dense"] == sum(p.numel() * 4 for p in pair[0].parameters())


@pytest.mark.parametrize(
    "generate",
    [lambda model: generation.greedy(model, torch.tensor([[3, 4]]), 2, 0), lambda model: speed._generate(model, 8, 2)],
)
def test_generation_runs_the_head_as_transformers_leaves_it(pair, generate, monkeypatch):
    """A head that takes no gradients is copied for each row by torch: no user's model is so slow."""
    model, took = pair[0], []
    stock = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *a, **k: took.append(model.lm_head.weight.requires_grad) or stock(*a, **k)
    )
    generate(model)
    assert took == [True]
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_long_prompt_holds_the_cache_that_was_computed(pair):
    found = speed.long_prompt(*pair, tokens=100, repeats=1)
    assert found["kv_bytes"] == found["kv_bytes_computed"]
    assert found["kv_bytes"]["compressed"] / found["kv_bytes"]["dense"] == 6 / 8
    assert min(found["prefill_seconds"].values()) > 0


def test_freed_memory_is_reused_until_it_is_given_back():
    """glibc gives back the top of its heap as it is freed; tuning has it keep some, which a stage's end gives back."""
    if memory.resident_bytes() is None or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("Linux with glibc only")
    script = """
from layercut.models import memory
def held():
    blocks = [bytearray(16 * 2**20) for _ in range(12)]
    del blocks
    return memory.resident_bytes()
memory.release_freed()
before, freed = memory.resident_bytes(), held()
memory.reuse_freed()
kept = held()
memory.release_freed()
print(freed - before, kept - before, memory.resident_bytes() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    freed, kept, returned = (int(word) / 2**20 for word in run.stdout.split())
    assert freed < 100 < 170 < kept < 256
    assert returned < 40
