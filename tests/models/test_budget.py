"""How much is done at once: by the device's memory, within a limit, and less where memory runs out all the same."""

from dataclasses import replace

import pytest
import torch

import tiny
from layercut import memory_limit
from layercut.errors import ConfigError, ModelError
from layercut.evaluation import likelihood
from layercut.healing import fold_, tune_, tuning_pass
from layercut.layer_search import sweep
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import all_segments, set_costs, set_losses
from layercut.models import memory
from layercut.models.losses import mean_kl
from layercut.models.memory import Budget
from layercut.models.runner import DecoderRunner
from layercut.surgery import cut

CPU, GIB = torch.device("cpu"), 2**30
PAIRS = [(segment,) for segment in all_segments(2, 8)]


def cut_copy(model):
    return cut(model, "3:5")


# --- sizes ---


def test_a_cpu_does_as_much_at_once_whatever_is_free():
    assert memory.budget(CPU) == Budget.of_cpu() == Budget.of_cpu(torch.get_num_threads())
    with memory_limit("1TB"):
        assert replace(memory.budget(CPU), swept_tokens=Budget.of_cpu().swept_tokens) == Budget.of_cpu()


def test_a_limit_is_a_size_and_ends(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: GIB)
    with memory_limit("1200MiB"):
        assert memory.budget(CPU) == Budget.of_cpu().least(Budget.of_accelerator(176 * 2**20))
    assert memory.budget(CPU) == Budget.of_cpu()
    with pytest.raises(ConfigError, match="--max-memory 'much' is no size"), memory_limit("much"):
        pass


# --- where memory runs out ---


def short_of_memory(patch, where, name, most, rows=lambda first, *_: len(first)):
    """Have a method run out of memory with more rows than `most`; returns the rows of each call."""
    function, asked = getattr(where, name), []

    def checked(self, *args, **kwargs):
        asked.append(rows(*args))
        if asked[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(self, *args, **kwargs)

    patch.setattr(where, name, checked)
    return asked


def stages():
    model, tokens = tiny.llama(), tiny.some_tokens(7)
    stack, student = DecoderRunner(model), DecoderRunner(cut_copy(model))
    return {
        "sweep": lambda cost: [(c.segments, c.kl) for c in set_costs(stack, tokens, PAIRS, cost)],
        "losses": lambda cost: list(set_losses(stack, tokens, PAIRS, cost).items()),
        "cuts": lambda cost: list(zip(PAIRS, CutCosts(stack, tokens, cost).of(PAIRS, 7).mean(1).tolist(), strict=True)),
        "kl": lambda cost: [("kl", mean_kl(stack, student, tokens))],
    }


@pytest.mark.parametrize("name", ["sweep", "losses", "cuts", "kl"])
def test_a_stage_that_runs_out_of_memory_finds_the_same_in_halves_and_says_so(name, monkeypatch, caplog):
    stage, plain, halved = stages()[name], Cost(), Cost()
    wanted = dict(stage(plain))
    asked = short_of_memory(monkeypatch, DecoderRunner, "enter", 2)
    with pytest.raises(torch.OutOfMemoryError):
        stage(Cost())  # nobody could remember it
    with memory_limit():
        found = dict(stage(halved))
        before = len(asked)
        stage(Cost())
    assert found == pytest.approx(wanted, rel=1e-5)
    assert all(rows <= 2 for rows in asked[before:]), "what follows knows"
    assert (halved.layer_forwards, halved.dense_tokens) == (plain.layer_forwards, plain.dense_tokens)
    assert "out of memory on cpu: going on with 1/2 as much at once" in caplog.text


def test_an_evaluation_and_a_fold_go_on_too(monkeypatch):
    model, tokens = tiny.llama(), tiny.some_tokens(16)
    losses = likelihood.window_losses(model, tokens)
    plain = fold_(first := cut_copy(model), model, tokens[:-2], heldout=tokens[-2:])
    forward = type(model).forward

    def short(self, input_ids, **kwargs):
        if len(input_ids) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", short)
    with memory_limit():
        torch.testing.assert_close(likelihood.window_losses(model, tokens), losses)
    found = fold_(second := cut_copy(model), model, tokens[:-2], heldout=tokens[-2:])
    assert found.kl_after == pytest.approx(plain.kl_after, rel=1e-4)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_step_that_runs_out_of_memory_is_taken_again_in_smaller_passes(monkeypatch, caplog):
    model, tokens, results = tiny.llama(), tiny.some_tokens(8), []
    for most in (8, 2):
        with monkeypatch.context() as patch:
            asked = short_of_memory(patch, tuning_pass.Pair, "forward", most)
            student = cut_copy(model)
            results.append(tune_(student, model, tokens[:-1], heldout=tokens[-1:], batch_tokens=64, learning_rate=1e-3))
    plain, halved = results
    assert (plain.pass_rows, halved.pass_rows) == (64, 2)
    assert [p["loss"] for p in halved.curve] == pytest.approx([p["loss"] for p in plain.curve], rel=1e-4)
    assert halved.heldout[-1]["loss"] == pytest.approx(plain.heldout[-1]["loss"], rel=1e-4)
    assert asked == [4, 2, 2, 2, 1], "the first step twice; the second has three rows"
    assert "out of memory on cpu" in caplog.text


def test_what_no_halving_helps_ends_with_a_hint_and_other_errors_are_not_taken_for_it(monkeypatch):
    stack = DecoderRunner(tiny.llama())
    with monkeypatch.context() as patch, memory_limit():
        short_of_memory(patch, DecoderRunner, "enter", 0)
        with pytest.raises(ModelError, match="out of memory on cpu even with the least") as caught:
            set_costs(stack, tiny.some_tokens(2), PAIRS, Cost())
    assert "--place disk" in caught.value.hint
    monkeypatch.setattr(sweep, "sweep", lambda *_: (_ for _ in ()).throw(RuntimeError("size mismatch")))
    with memory_limit(), pytest.raises(RuntimeError, match="size mismatch"):
        set_costs(stack, tiny.some_tokens(2), PAIRS, Cost())


def test_a_command_has_gpus_sum_in_float32():
    flags, names = torch.backends.cuda.matmul, [f"allow_{k}_reduced_precision_reduction" for k in ("fp16", "bf16")]
    before, tf32 = {name: getattr(flags, name) for name in names}, torch.backends.cudnn.allow_tf32
    try:
        memory.sum_in_float32_()
        assert not any(getattr(flags, name) for name in names)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        for name, value in before.items():
            setattr(flags, name, value)
