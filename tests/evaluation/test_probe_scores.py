"""What a model makes of probes: of each capability, of keys hidden in long text, and of values in long lists."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, PreTrainedTokenizerFast

import folders
import tiny
from layercut import evaluation
from layercut.data.probes import probe_rows
from layercut.evaluation import capability_figures, probe_scores
from layercut.evaluation.probe_scores import probes_for
from layercut.models.losses import kl_divergence
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut


@torch.no_grad()
def test_figures_are_those_of_direct_computation_also_where_memory_runs_out(probes, monkeypatch):
    model = tiny.llama(5, vocab_size=folders.VOCABULARY, max_position_embeddings=512)
    small = cut(model, [Segment(1, 3)])
    figures, weights = capability_figures(small, model, probes), probes.weights()
    whole, left = (m(input_ids=probes.tokens).logits for m in (model, small))
    kl, right = kl_divergence(whole, left), left[:, :-1].argmax(-1) == probes.tokens[:, 1:]
    for c, name in enumerate(probes.names):
        share = weights[probes.of() == c].sum() / len(probes.tokens)
        assert share.item() == pytest.approx(1 / len(probes.names)), "a search weighs all alike"
        assert figures.kl[name] == pytest.approx(kl[probes.of() == c].mean().item(), rel=1e-4)
        at = (probes.of() == c)[:, :-1]
        for loss, logits in ((figures.loss, left), (figures.dense_loss, whole)):
            nll = cross_entropy(logits[:, :-1][at], probes.tokens[:, 1:][at])
            assert loss[name] == pytest.approx(nll.item(), rel=1e-4)
        own = (probes.capability == c).nonzero()[:, 0]
        hits = [bool(right[(probes.answers == a)[:, :-1]].all()) for a in own]
        assert figures.hits[name] == pytest.approx(sum(hits) / len(hits))
        assert figures.answers[name] == len(hits)
    assert max(capability_figures(model, model, probes).kl.values()) < 1e-6
    enter, stacks = DecoderRunner.enter, [DecoderRunner(small), DecoderRunner(model)]

    def short(self, tokens):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return enter(self, tokens)

    monkeypatch.setattr(DecoderRunner, "enter", short)
    assert capability_figures(*stacks, probes).kl == pytest.approx(figures.kl, rel=1e-4)


def test_every_trial_hides_a_key_and_a_value_of_its_own(tokenizer, caplog):
    config = tiny.llama(2, max_position_embeddings=1024).config
    few, many = (probes_for(tokenizer, config, longest=1024, each=each) for each in (1, 3))
    assert len(many.keys) == 3 * len(few.keys) > 0
    assert len({key for *_, key in many.keys}) == len(many.keys)
    assert len(many.lists) > 2 * len(few.lists) > 0, "a list may not fit the shortest prompts"
    caplog.set_level("INFO", logger="layercut")
    none = probes_for(tokenizer, GPT2Config(n_positions=64))
    assert (none.keys, none.lists) == ([], [])
    assert all(f"no prompt of {what} fits 64 tokens" in caplog.text for what in ("keys", "lists"))


def with_line_ends_in_signs(signs: str = "!~>]?.", ends: Sequence[str] = ("", "\n", "\n\n")) -> Any:
    """A tokenizer that writes "!" and the line's end as one token, as Qwen's and Llama 3's do; or other signs."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\p{N}|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    lines = [f"{word}{sign}{end}" for word in ("ba", "ko") for sign in signs or [""] for end in ends]
    core.train_from_iterator(lines * 9, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_what_follows_an_answer_in_one_token_with_its_last_sign_does_not_count(tokenizer):
    merging = with_line_ends_in_signs()
    made = probe_rows(merging, rows=4, window=512, capabilities=("format",), family="judging")
    signs = {merging.decode([token]).strip() for token in made.closings}
    assert set() < signs <= set("!~>]?.|/*#+=;:)")
    for row in range(4):
        at = (made.answers[row] >= 0).nonzero()[:, 0]
        wanted, last = made.tokens[row, at + 1], made.answers[row, at] != made.answers[row, at + 1]
        one_line = wanted.clone()
        for k in last.nonzero()[:, 0].tolist():
            one_line[k] = merging.encode(merging.decode([int(wanted[k])]).rstrip() + "\n")[0]
        assert not torch.equal(one_line, wanted), "the last probe of a row's item ends with an empty line"
        assert made.right(row, wanted).all()
        assert made.right(row, one_line).all()
        for k in range(len(wanted)):
            wrong = wanted.clone()
            wrong[k] = made.tokens.max() if wanted[k] != made.tokens.max() else 0
            assert made.right(row, wrong).tolist() == [i != k for i in range(len(wanted))]
    assert probe_rows(tokenizer, rows=4, family="judging").closings == {}, "one that ends lines apart"
    # of code the answer's last sign is the line's end, in one token with what parts the probe from the next
    merging = with_line_ends_in_signs("", ("\n", "\n\n", "\n    "))
    one, two, indented, other = (merging.encode(end)[0] for end in ("\n", "\n\n", "\n    ", ")"))
    made, ended = probe_rows(merging, rows=8, window=512, capabilities=("structure",), family="judging"), 0
    for row in range(8):
        at = (made.answers[row] >= 0).nonzero()[:, 0]
        for k in (made.tokens[row, at + 1] == two).nonzero()[:, 0].tolist():
            given, ended = made.tokens[row, at + 1].clone(), ended + 1
            for end, right in ((one, True), (indented, True), (other, False)):
                given[k] = end
                assert made.right(row, given)[k] == right
    assert ended


def test_prompts_fill_the_length_and_hide_the_key_at_the_depth():
    tokenizer = folders.tokenizer()
    found = probe_scores.trials(probe_scores.passkey, tokenizer, 1024, seed=3)
    assert {length for length, *_ in found} == {256, 512, 1024}, "128 has no room for the task with this tokenizer"
    assert len(found) == 3 * len(probe_scores.DEPTHS) * probe_scores.TRIALS
    for length, depth, ids, key in found:
        room = length - probe_scores.ANSWER
        assert room - 60 < len(ids) <= room
        text = tokenizer.decode(ids)
        before, needle, after = text.partition(f"The pass key is {key}.")
        assert needle
        filler = [sum(part.count(sentence) for sentence in probe_scores.FILLER) for part in (before, after)]
        assert filler[0] == round(depth * sum(filler))
        assert text.endswith("The pass key is")
        assert text.count(key) == 2
    assert len({key for *_, key in found}) > 15, "a key of its own for every trial"
    assert probe_scores.trials(probe_scores.passkey, tokenizer, 1024, seed=3) == found
    assert probe_scores.trials(probe_scores.passkey, tokenizer, 1024, seed=4) != found


def test_a_length_without_room_for_the_key_has_no_cases():
    assert probe_scores.passkey(folders.tokenizer(), 30, 0.5, random.Random(0)) is None
    assert probe_scores.trials(probe_scores.passkey, folders.tokenizer(), 64, seed=0) == []


def test_lengths_are_halves():
    assert probe_scores.lengths(4096) == [512, 1024, 2048, 4096]
    assert probe_scores.lengths(300) == [150, 300]
    assert probe_scores.lengths(100) == [100]


class Oracle:
    """Reads the key out of the prompt, except where it is longer than `memory` tokens."""

    def __init__(self, tokenizer: Any, memory: int) -> None:
        self.tokenizer, self.memory = tokenizer, memory

    def parameters(self):
        yield torch.zeros(1)

    def get_output_embeddings(self):
        return None

    def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        text = self.tokenizer.decode(ids[0])
        key = text.partition("The pass key is ")[2][:5] if ids.shape[1] <= self.memory else "12345"
        reply = self.tokenizer(f" {key}.", add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([ids, reply], dim=1)


def test_the_grid_counts_what_is_found():
    tokenizer = folders.tokenizer()
    trials = probe_scores.trials(probe_scores.passkey, tokenizer, 1024, seed=0)
    grid = evaluation.retrieval_grid(Oracle(tokenizer, memory=512), tokenizer, trials)
    places = [(cell["length"], cell["depth"]) for cell in grid]
    assert places == [(n, d) for n in (256, 512, 1024) for d in probe_scores.DEPTHS]
    assert all(cell["trials"] == probe_scores.TRIALS for cell in grid)
    assert all(cell["found"] == (probe_scores.TRIALS if cell["length"] < 1024 else 0) for cell in grid)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (" 12345.", "12345"), ("12,345", "12345"), (" 12 345 and", "12345"), ("12'345", "12345"),
        ("1 2 3 4 5", "12345"),
        ("**12345**", "12345"), ("the key, which is 12345, not 9", "12345"), ("\n\"12345\"", "12345"),
        ("912345", "912345"), ("123456", "123456"), ("54321 12345", "54321"), ("not 12345, it is 99999", ""),
        ("it isn't 12345", ""), ("1234.5", "1234.5"), ("A12345", "A12345"), ("12345b", "12345b"), ("1,12345", "1"),
        ("12,3456", "12"), (" rose and 1", "1"), (" rose and", "rose"), ("", ""), ("...", ""),
    ],
)  # fmt: skip
def test_a_reply_is_judged_by_its_first_whole_number(reply, answer):
    assert probe_scores.first_answer(reply) == answer


def test_the_chat_template_is_used_where_there_is_one():
    tokenizer = folders.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}<bot>"
    made = probe_scores.passkey(tokenizer, 700, 0.5, random.Random(0))
    assert made is not None
    text = tokenizer.decode(made[0])
    assert text.startswith("<user>A pass key is hidden")
    assert text.endswith("</user><bot>The pass key is")
