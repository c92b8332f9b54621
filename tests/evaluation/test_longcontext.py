"""Long context and the health of generations, against direct computation."""

from __future__ import annotations

import math
import statistics
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MistralConfig

import families
import folders
import quick
import tiny
from layercut import evaluation, surgery
from layercut.config import DataConfig, EvaluateConfig
from layercut.config.commands import CompressConfig
from layercut.evaluation import generation, likelihood
from layercut.evaluation.generation import distinct, replies
from layercut.models.losses import next_token_loss
from layercut.pipeline.stages.evaluate import look_closer
from layercut.segments import Segment

# ---- perplexity by position ----------------------------------------------------------------------------------


def sliding() -> Any:
    """Layers that look back ten tokens, fewer than a chunk has."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny.tiny(
        MistralConfig(
            vocab_size=tiny.VOCABULARY, num_hidden_layers=3, sliding_window=10, initializer_range=0.15,
            bos_token_id=0, eos_token_id=1, **sizes,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, sliding, partial(families.tiny, "falcon_mamba")])
@pytest.mark.parametrize("at_once", [17, 512])
@torch.no_grad()
def test_losses_by_position_are_those_of_one_pass(make, at_once, monkeypatch):
    """A cache is not gone on with: of a few tokens falcon_mamba reads no state of its convolution."""
    model, row = make(), tiny.some_tokens(1, 120)[0] % 50
    expected = next_token_loss(model(input_ids=row[None], use_cache=False).logits, row[None])[0]
    monkeypatch.setattr(likelihood, "positions_at_once", lambda *_: at_once)
    seen = []
    found = evaluation.loss_by_position(model, row, advance=seen.append)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(seen) == 120


def test_buckets_part_the_positions_and_add_up_to_the_perplexity():
    model, windows = tiny.llama(), tiny.some_tokens(3, 128)
    rows = evaluation.perplexity_by_position(model, windows)
    assert [(row["start"], row["stop"]) for row in rows] == [(1, 64), (64, 128)]
    total = sum((row["stop"] - row["start"]) * math.log(row["perplexity"]) for row in rows)
    assert math.exp(total / 127) == pytest.approx(evaluation.perplexity(model, windows), rel=1e-4)
    for length, stops in ((64, [64]), (100, [64, 100])):
        assert [row["stop"] for row in evaluation.perplexity_by_position(model, windows[:, :length])] == stops
    model.model.norm.weight.fill_(float("nan"))
    assert {row["perplexity"] for row in evaluation.perplexity_by_position(model, windows[:, :80])} == {math.inf}


def test_the_error_of_a_ratio_is_that_of_the_paired_losses_of_windows():
    dense, tokens = tiny.llama(), tiny.some_tokens(12, 16)
    other = tiny.llama(seed=1)
    ours, theirs = (evaluation.window_losses(model, tokens) for model in (other, dense))
    with torch.no_grad():
        logits = dense(input_ids=tokens).logits[:, :-1]
    direct = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    assert torch.allclose(theirs, direct.view(12, 15).double().mean(1), atol=1e-6)
    assert evaluation.of_losses(ours) == evaluation.perplexity(other, tokens)
    differences = [a - b for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    assert evaluation.paired_error(ours, theirs) == pytest.approx(statistics.stdev(differences) / math.sqrt(12))
    assert evaluation.paired_error(ours, theirs) < math.hypot(ours.std() / 12**0.5, theirs.std() / 12**0.5)
    assert evaluation.paired_error(ours, ours) == 0
    assert evaluation.paired_error(ours[:1], theirs[:1]) is None
    assert evaluation.paired_error(ours * math.nan, theirs) is None


def test_long_windows_are_the_text_in_order_and_end_with_context_or_text():
    model = tiny.llama()  # 128 positions
    blocks = torch.arange(40 * 16).view(40, 16)
    assert torch.equal(evaluation.long_windows(blocks, 96, model), torch.arange(6 * 96).view(6, 96))
    assert evaluation.long_windows(blocks, 4096, model).shape == (5, 128), "the context"
    assert evaluation.long_windows(blocks[:5], 128, model).shape == (1, 80), "the text"
    assert len(evaluation.long_windows(blocks, 32, model)) == 8, "seconds each on a CPU: eight are enough"


@pytest.mark.parametrize("origins", [("a", "b"), ("a", "b", "a"), ("a", "b", "b", "b", "b")])
def test_no_long_window_is_of_two_texts(origins):
    """Rows of several texts come in turn; near and far are of one text, in its order."""
    texts, rows = {"a": 0, "b": 1000}, []
    for row in range(40):
        origin = origins[row % len(origins)]
        rows.append(torch.arange(texts[origin], texts[origin] + 16))
        texts[origin] += 16
    windows = evaluation.long_windows(torch.stack(rows), 64, tiny.llama(), origins)
    assert windows.shape == (8, 64)
    assert (windows.diff() == 1).all()
    assert {row[0].item() // 1000 for row in windows[:2]} == {0, 1}, "of each in turn"


# ---- health of generations -----------------------------------------------------------------------------------


def test_replies_are_judged_by_the_dense_models_own():
    tokenizer = folders.tokenizer()
    dense = tiny.llama(3, vocab_size=len(tokenizer))
    small = surgery.cut(dense, [Segment(1, 2)])
    texts = {"dense": ["", "abc de"], "compressed": ["a", "b"]}
    found = replies(dense, small, tokenizer, texts, prompts=["x", "yz"])
    length, kl = len(tokenizer("abc de", add_special_tokens=False).input_ids), list[float]()
    assert (found["dense"], found["compressed"]) == (length / 2, 1.0)
    for prompt, reply in zip(["x", "yz"], texts["dense"], strict=True):
        ids = tokenizer(prompt + reply).input_ids
        with torch.no_grad():
            p, q = (model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for model in (dense, small))
        kl += (p.exp() * (p - q)).sum(-1)[-len(tokenizer(reply, add_special_tokens=False).input_ids) - 1 :].tolist()
    assert len(kl) == length + 2
    assert found["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def test_a_run_of_a_chat_model_tells_how_it_replies():
    tokenizer = folders.tokenizer()
    dense = tiny.llama(3, vocab_size=len(tokenizer))
    config = CompressConfig(text=DataConfig(window=16), evaluate=EvaluateConfig(speed=False))
    work: Any = SimpleNamespace(tokenizer=tokenizer, dense=SimpleNamespace(model=dense), config=config)
    small, tokens = surgery.cut(dense, [Segment(1, 2)]), tiny.some_tokens(4, 32)
    assert "replies" not in (look_closer(work, small, tokens).health or {})
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    found = look_closer(work, small, tokens)
    assert found.generations
    assert found.health
    told = {name: [getattr(each, name) for each in found.generations] for name in ("dense", "compressed")}
    most = {"most": generation.SAMPLE, "prompts": len(generation.PROMPTS)}
    assert found.health["replies"] == replies(dense, small, tokenizer, told) | most


def test_health_is_that_of_greedy_continuations(monkeypatch):
    quick.bring_back(monkeypatch, "generation_health")
    dense, student = tiny.llama(seed=0), tiny.llama(seed=1)
    blocks = tiny.some_tokens(10, 40)
    found = evaluation.generation_health(dense, student, blocks, tokens=12)
    assert (found["prompts"], found["prompt_tokens"], found["tokens"]) == (10, 32, 12)
    rows = {"dense": by_hand(dense, blocks[:, :32], 12), "compressed": by_hand(student, blocks[:, :32], 12)}
    for name, written in rows.items():
        tails = written[:, 32:].tolist()
        repeated = [1 - len({tuple(t[i : i + 4]) for i in range(9)}) / 9 for t in tails]
        assert found[name]["repeated_4grams"] == pytest.approx(sum(repeated) / 10)
        assert found[name]["distinct_1"] == pytest.approx(sum(len(set(t)) for t in tails) / (10 * 12))
        losses = next_token_loss(dense(input_ids=written).logits, written)[:, 31:]
        assert found[name]["dense_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5, "(1, 2), (2, 1) of four"
    assert distinct([1, 2], 4) == 1.0


@torch.no_grad()
def by_hand(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy continuation without a cache; the end of the text is never chosen."""
    end = model.generation_config.eos_token_id
    for _ in range(tokens):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        if end is not None:
            logits[:, end] = -math.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def test_what_is_measured_goes_by_the_likeliest_token_alone():
    """Whatever the generation config says of repetition and beams; who reads along has it as the config says."""
    model, ids = tiny.llama(), tiny.some_tokens(1, 12)
    expected, row = [], ids
    for _ in range(24):
        row = torch.cat([row, model(input_ids=row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        expected.append(row[0, -1].item())
    assert generation.greedy(model, ids, 24, 0, exactly=True) == [expected]
    model.generation_config.update(
        repetition_penalty=3.0, num_beams=3, no_repeat_ngram_size=2, suppress_tokens=[expected[0]]
    )
    assert generation.greedy(model, ids, 24, 0, exactly=True) == [expected]
    assert model.generation_config.repetition_penalty == 3.0
