"""Text and chats that the model writes itself: seeded, of the plain distribution or a cooler one, without a trace."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bytes_tokenizer import CHAT, make_tokenizer
from layercut.data import self_sampled
from layercut.data.blocks import Reader, load_blocks
from layercut.data.self_sampled import chat_length, writes_chats
from layercut.errors import DataError


def rows_of(*tokens):
    return {row for each in tokens for row in map(tuple, each.tolist())}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)).eval()


def test_sampling_multiplies_the_heads_weight_once_and_not_by_row(llama, tokenizer):
    llama.requires_grad_(False)  # as a model is loaded
    with pytest.MonkeyPatch.context() as patch, torch.profiler.profile(record_shapes=True) as seen:
        patch.setattr(self_sampled, "chat_prefix", lambda *_: [0, 2, 3])
        load_blocks("chats", make_tokenizer(CHAT), tokens=64 * 4, window=64, seed=0, model=llama)
    by_row = [each.input_shapes[1] for each in seen.events() if each.name == "aten::bmm"]
    assert all(shape[-1] != llama.config.vocab_size for shape in by_row)
    assert not llama.lm_head.weight.requires_grad


def test_self_is_seeded_and_leaves_no_trace(llama, capsys):
    tokenizer = make_tokenizer()

    def draw(seed=0, **more):
        return load_blocks("self", tokenizer, seed=seed, tokens=40 * 12, window=12, model=llama, **more).tokens

    own, state = llama.generation_config, torch.get_rng_state()
    tokens = draw()
    assert llama.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens.shape == (40, 12)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert not tokens.is_inference()
    assert torch.equal(tokens, draw())
    assert not rows_of(tokens) & rows_of(draw(seed=1), draw(skip=40), draw(order="as written"))
    assert capsys.readouterr().out == ""


def test_self_samples_the_plain_distribution_past_eos_and_chats_a_cooler_one(llama, monkeypatch):
    llama.generation_config.top_k, llama.generation_config.repetition_penalty = 2, 9.0
    monkeypatch.setattr(self_sampled, "chat_prefix", lambda *_: [0])
    with torch.inference_mode():
        logits = llama(torch.tensor([[0]])).logits[0, -1]  # [V]
    how = {"seed": 0, "model": llama}
    of_self, of_chats = (
        torch.bincount(load_blocks(*named, tokens=4096 * 2, window=2, **how).tokens[:, 1], minlength=258) / 4096
        for named in (("self", make_tokenizer()), ("chats", make_tokenizer(CHAT)))
    )
    cool, plain = ((logits / heat).softmax(-1) for heat in (self_sampled.CHAT_HEAT, 1.0))
    assert (of_self - plain).abs().max() < 0.01
    assert (of_chats - cool).abs().sum() < (of_chats - plain).abs().sum()
    rows = load_blocks("self", make_tokenizer(), tokens=64 * 64, window=64, **how).tokens
    row = next(row for row in rows if (row[:-2] == 1).any())
    assert (row[row.tolist().index(1) + 1 :] != 1).any()


def test_chats_are_seeded_written_from_the_users_first_word_and_laid_end_to_end(llama, monkeypatch):
    tokenizer = make_tokenizer(CHAT)
    opening = tokenizer("<|user|>", add_special_tokens=False).input_ids
    found = load_blocks("chats", tokenizer, tokens=2 * 512, window=512, seed=0, model=llama)
    chats = found.tokens.view(4, 256)
    assert chats[:, : len(opening)].tolist() == [opening] * 4
    assert len(rows_of(chats)) == 4
    assert found.marks.lengths.tolist() == [256, 256]
    assert not found.marks.answers.any()
    rows = []
    for seed in (0, 0, 1):
        reader = Reader(tokenizer, seed=seed, model=llama)
        for use, order in (("heldout", "shuffled"), ("tuning", "shuffled"), ("evaluation", "as written")):
            rows.append(reader.draw(use, "chats", tokens=3 * 32, window=32, order=order).tokens)
    assert all(map(torch.equal, rows[:3], rows[3:6]))
    assert len(rows_of(*rows[:3], *rows[6:])) == 18, "no two uses have the same"
    lengths = {8: 8, 256: 256, 300: 300, 512: 256, 1024: 256, 1000: 500}
    assert {window: chat_length(window) for window in lengths} == lengths
    generate, batches = llama.generate, list[int]()

    def short_of_memory(prompt, **how):
        batches.append(len(prompt))
        if len(prompt) > 3:
            raise MemoryError
        return generate(prompt, **how)

    monkeypatch.setattr(llama, "generate", short_of_memory)
    chats = load_blocks("chats", tokenizer, tokens=7 * 32, window=32, seed=0, model=llama).tokens
    assert batches == [7, 3, 3, 1], "smaller batches where memory runs out"
    assert len(rows_of(chats)) == 7


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (CHAT, "<|user|>"), ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "[INST]"),
        ("{% for m in messages %}User:\n{{ m.content }}{% endfor %}", "User:\n"), ("nothing of what is said", None),
        ("", None),
    ],
)  # fmt: skip
def test_who_can_write_chats(template, opening, llama):
    """A blank before the user's words is part of their first token."""
    tokenizer = make_tokenizer(template)
    assert writes_chats(tokenizer, 64) == bool(opening)
    assert not writes_chats(tokenizer, 10), "the opening alone is more than half of a row"
    if opening:
        assert self_sampled.chat_prefix(tokenizer, 64) == tokenizer(opening, add_special_tokens=False).input_ids
    else:
        with pytest.raises(DataError, match="chat template"):
            load_blocks("chats", tokenizer, tokens=64, window=64, seed=0, model=llama)
