"""Generated tests of what a model can do: families that share nothing, rows, damage, the map, the search by both."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, PreTrainedTokenizerFast

import folders
import tiny
from layercut import layer_search, quantization
from layercut.cli.command_line import main
from layercut.config import CompressConfig, DataConfig, HealConfig, SearchConfig
from layercut.data import probe_families
from layercut.data import probes as probes_module
from layercut.data.blocks import Reader, by_origin, stored_blocks, stored_marks
from layercut.data.chat_templates import prompt_ids
from layercut.data.probe_families import CAPABILITIES, FAMILIES, JUDGING, Family
from layercut.data.probes import SHORT_ROW, ProbeRows, capability_names, judging_rows, never_chats, probe_rows
from layercut.data.sources import find, split_mix, turns
from layercut.errors import ConfigError, DataError
from layercut.evaluation import probe_scores
from layercut.evaluation.probe_scores import TEST_ROWS, capability_figures, probes_for
from layercut.files.json_values import digest
from layercut.healing import tune_
from layercut.layer_search import search
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.damage_map import TEXT, capability_costs, capability_map
from layercut.layer_search.fisher import estimate
from layercut.layer_search.race import least_sums
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import set_costs
from layercut.layer_search.weighted_rows import weighted_rows
from layercut.models import checkpoints, loading
from layercut.models.losses import kl_divergence
from layercut.models.runner import DecoderRunner
from layercut.pipeline import compare
from layercut.pipeline.stages import evaluate, heal, quantize, trial
from layercut.pipeline.stages.text import tuning_source
from layercut.segments import Segment
from layercut.surgery import cut


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return folders.tokenizer()


@pytest.fixture(scope="module")
def probes(tokenizer: Any) -> ProbeRows:
    return probe_rows(tokenizer, rows=4, window=512)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(5, vocab_size=folders.VOCABULARY, max_position_embeddings=512)


# ---- families ------------------------------------------------------------------------------------------------


def nouns(family: Family) -> set[str]:
    classes = {word for label, words in family.classes for word in (label, *words)}
    return {*family.people, *family.things, *family.syllables, *classes}


def forms(family: Family) -> list[str]:
    nested = [family.needles, family.lists, family.repeats, family.sums, family.code, family.formats]
    return [*family.filler, *family.labelled, *(part for form in nested for parts in form for part in parts)]


def passages(texts: list[str], length: int = 4) -> set[tuple[str, ...]]:
    found = set()
    for text in texts:
        words = re.findall(r"[a-z]+", re.sub(r"\{\w\w+\}", "", text.lower()))
        found |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found


@pytest.mark.parametrize("pair", [*combinations(FAMILIES, 2)], ids="-".join)
def test_two_families_share_no_noun_and_no_passage_of_their_forms(pair):
    a, b = (FAMILIES[name] for name in pair)
    assert not nouns(a) & nouns(b)
    assert not passages(forms(a)) & passages(forms(b))
    for one, other in ((a, b), (b, a)):
        said = {word for form in forms(other) for word in re.findall(r"\w+", form.lower())}
        assert not {noun.lower() + ending for noun in nouns(one) for ending in ("", "s", "es")} & said, "in no form"
    taught, other = ({(i, j) for i in range(1, 10) for j in range(1, 10) if each.adds(i, j)} for each in (a, b))
    assert len(taught) > 20
    assert not taught & (other | {(j, i) for i, j in other}), "nor a sum, in whichever order"
    assert not {*a.brackets} & {*b.brackets}


def test_keys_of_the_three_families_differ_in_their_length():
    digits = {}
    for name, family in FAMILIES.items():
        draw = random.Random(0)
        digits[name] = {len(key) for key in (family.key(draw) for _ in range(300)) if key.isdigit()}
    assert not set.intersection(*digits.values())
    assert digits["judging"] == {5}
    assert not digits["tuning"] & (digits["judging"] | digits["searching"])


def test_the_judge_of_lists_is_of_the_judging_family_alone(tokenizer):
    ids, value = probe_scores.key_value(tokenizer, 1500, 0.5, random.Random(0)) or ([], "")
    text = tokenizer.decode(ids)
    assert len(ids) <= 1500
    assert re.search(f"under number {value}\\.", text)
    own = passages([re.sub(r"\d|" + "|".join((*JUDGING.people, *JUDGING.things)), "", text)])
    told = {word for sentence in probe_scores.FILLER for word in re.findall(r"\w+", sentence.lower())}
    for name in ("searching", "tuning"):
        assert not own & passages(forms(FAMILIES[name]))
        assert not {noun.lower() + ending for noun in nouns(FAMILIES[name]) for ending in ("", "s", "es")} & told


def test_no_key_of_a_long_list_that_judges_is_of_a_form_that_was_taught(tokenizer):
    rows = judging_rows(tokenizer, rows=8, window=1500, capability="lists")
    texts = [tokenizer.decode(row) for row in rows.tokens]
    owned = [re.findall(rf"({'|'.join(JUDGING.things)}) of ({'|'.join(JUDGING.people)})", text) for text in texts]
    assert all(len(each) > len(JUDGING.things) for each in owned), "more entries than things"
    assert not any(re.search(rf"({'|'.join(JUDGING.people)}) ?' ?s ", text) for text in texts)


# ---- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_answer_is_what_its_item_says(tokenizer, family, capability):
    rows = judging_rows(tokenizer, rows=2, window=700, capability=capability, family=family)
    assert rows.tokens.shape == (2, 700)
    assert rows.names == (capability,)
    for a in range(len(rows.capability)):
        (row,) = {*(rows.answers == a).nonzero()[:, 0].tolist()}
        places = (rows.answers[row] == a).nonzero()[:, 0]
        said = tokenizer.decode(rows.tokens[row, places + 1]).strip()
        before = tokenizer.decode(rows.tokens[row, : places[0] + 1])
        assert said
        if capability in ("recall", "lists", "labels"):
            assert said in before, "the answer can be known from the row"
        if capability == "sums":
            line = before.splitlines()[-1]
            assert int(said) == sum(map(int, re.findall(r"\d+", line)))
        if capability == "copy":
            assert said.split()[0] in before


CHAT = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
SPACED = """{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content + '</s>' }}
{%- endfor %}"""
"""As Mistral's: what stands before a reply is not what ends a prompt."""
TRIMMED = CHAT.replace("m.content", "m.content | trim")
"""As Llama 3's and Gemma's."""
LAST_TURN = CHAT.replace("messages %", "messages[-2:] %")
"""A template that forgets the turns before the last, as those do that drop what a model thought."""
ONE_TURN = "{% if messages|length > 2 %}{{ raise_exception('one question at a time') }}{% endif %}" + CHAT
NO_REPLIES = "{% for m in messages if m.role == 'assistant' %}{{ raise_exception('no replies') }}{% endfor %}" + CHAT
THOUGHTFUL = CHAT.replace("{{ m.c", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.c")
"""As Qwen3's: before the last reply stands a thought, before earlier ones none."""


def able(tokenizer: Any, template: str) -> Any:
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = template
    return chats


def chat_of(tokenizer: Any, template: str, item: probe_families.Item) -> probe_families.Item | None:
    writer = probes_module._Writer(able(tokenizer, template), FAMILIES["tuning"], random.Random(0), chat=True)
    return writer.as_chat(item)


def test_a_row_of_chats_begins_once(tokenizer):
    """Templates as Gemma's and Llama's begin with BOS, which the tokenizer puts before a text as well."""
    beginning = able(tokenizer, "{{ bos_token }}" + CHAT)
    beginning.add_special_tokens({"bos_token": "<s>"})
    begin = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", begin)]
    )
    made = probe_rows(beginning, rows=8, window=SHORT_ROW, family="tuning")
    chats = [row for row in made.tokens.tolist() if "<user>" in beginning.decode(row)]
    assert chats
    assert [row.count(begin) for row in made.tokens.tolist()] == [1] * 8
    assert all(row[0] == begin for row in chats)


@pytest.mark.parametrize("template", [CHAT, TRIMMED, THOUGHTFUL], ids=["plain", "trimmed", "thoughtful"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_answer_of_a_chat_has_its_question(tokenizer, capability, template):
    several, family = 0, FAMILIES["tuning"]
    for seed in range(16):
        item = CAPABILITIES[capability](family, random.Random(seed), 12)
        chat = chat_of(tokenizer, template, item)
        assert chat
        assert [said.strip() for said in chat.parts[1::2]] == [said.strip() for said in item.parts[1::2]]
        assert chat.text.endswith("</>"), "the reply is closed"
        assert chat.text.count("<think></think>") == (template == THOUGHTFUL)
        text = chat.text.replace("<think></think>", "")
        if not item.turns:
            assert text.count("<user>") == text.count("<assistant>") == 1
            assert chat.parts[0].endswith(("<assistant>", "</think>")), "its first words are an answer"
            assert chat.parts[1] == chat.parts[1].lstrip(), "no reply begins with a space"
            continue
        several += len(item.turns) > 1
        said = re.findall(r"<user>(.*?)</><assistant>(.*?)</>", text, re.DOTALL)
        told = said[0][0]
        for (asked, reply), (question, begins), answer in zip(said, item.turns, item.parts[1::2], strict=True):
            assert asked.endswith(question.strip())
            assert reply == begins + answer + item.closes
            nouns_of = (*family.people, *family.things)
            if capability == "labels":
                nouns_of = tuple(word for _, own in family.classes for word in own)
            words = sorted((word for word in nouns_of if word in question), key=question.index)
            assert words, "the question says what is asked for"
            assert {word for word in nouns_of if word in begins} <= {*words}, "and the reply tells no other"
            if capability == "labels":
                continue
            ends = capability != "lists" or f"{answer.strip()}{item.closes}" in told
            assert ends, "a value ends as it does where it is told"
            pair = ".{0,16}".join(words), re.escape(answer.strip())
            assert re.search("{0}.{{0,32}}{1}|{1}.{{0,16}}{0}".format(*pair), told), "the answer stands beside its key"
        assert told.count("</>") == 0
    assert several > 3 or capability not in ("recall", "lists", "labels")


def test_a_template_that_does_not_go_on_from_turn_to_turn_writes_no_chat_of_several(tokenizer):
    for capability in ("recall", "lists", "sums"):
        item = CAPABILITIES[capability](FAMILIES["tuning"], random.Random(0), 12)
        spaced = chat_of(tokenizer, SPACED, item)
        assert spaced
        assert [said.strip() for said in spaced.parts[1::2]] == [said.strip() for said in item.parts[1::2]]
        for template in (LAST_TURN, ONE_TURN):
            assert (chat_of(tokenizer, template, item) is None) == (len(item.turns) > 1)
            writer = probes_module._Writer(able(tokenizer, template), FAMILIES["tuning"], random.Random(0), chat=True)
            plain = writer.marked(capability, writer.written(capability, 12))
            assert plain.answers == len(item.parts) // 2, "written all the same"
    several = ("recall", "lists", "labels")
    for template, plain in ((CHAT, ()), (LAST_TURN, several), (ONE_TURN, several), (NO_REPLIES, tuple(CAPABILITIES))):
        assert never_chats(able(tokenizer, template)) == plain
    assert never_chats(able(tokenizer, LAST_TURN), ("sums", "lists")) == ("lists",)
    assert never_chats(tokenizer) == (), "it has no template to say anything of"
    assert chat_of(tokenizer, CHAT.replace("m.content", "m.content | upper"), item) is None, "replies as they are"


@pytest.mark.usefixtures("quick_runs")
@pytest.mark.parametrize("template", [CHAT, NO_REPLIES], ids=["chats", "none"])
def test_a_run_says_which_tests_are_no_chats(tiny_model, texts, tmp_path, capsys, monkeypatch, template):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    able(folders.tokenizer(), template).save_pretrained(model)
    monkeypatch.setattr(probes_module, "FOCUS_SHARE", 0.3)  # or nothing but copies fits rows of 128 letters
    flags = [f"--data={texts[0]}", "--tokens=1024", "--window=128", "--ratio=0.25", "--tune-tokens=1024"]
    flags += ["--preserve=sums,copy", f"--out={tmp_path / 'run'}"]
    assert main(["tune", str(model), *flags]) == 0
    said = re.search("leaves out turns: probes of (.*) are no chats", capsys.readouterr().err)
    assert (said and said[1]) == (None if template == CHAT else "copy, sums")


@pytest.mark.parametrize("window", [SHORT_ROW, 4 * SHORT_ROW])
def test_answers_of_rows_with_chats_stand_where_they_are_asked_for(tokenizer, window):
    kept = {"capabilities": ("lists", "recall"), "family": "tuning"}
    rows = probe_rows(able(tokenizer, CHAT), rows=24, window=window, **kept)
    chats = replies = 0
    for tokens, answers in zip(rows.tokens, rows.answers, strict=True):
        chats += "<user>" in tokenizer.decode(tokens)
        for answer in answers.unique().tolist()[1:]:
            places = (answers == answer).nonzero()[:, 0]
            before, said = (tokenizer.decode(some) for some in (tokens[: places[0] + 1], tokens[places + 1]))
            assert said.strip()
            assert said.strip() in before, "it can be known from the row"
            replies += (turn := before.rfind("<assistant>")) > before.rfind("<user>") and "</>" not in before[turn:]
    assert 0 < chats < 24
    assert replies > 4


def test_every_trial_hides_a_key_and_a_value_of_its_own(tokenizer):
    config = tiny.llama(2, max_position_embeddings=1024).config
    few, many = (probes_for(tokenizer, config, longest=1024, each=each) for each in (1, 3))
    assert len(many.keys) == 3 * len(few.keys) > 0
    assert len({key for *_, key in many.keys}) == len(many.keys)
    assert len(many.lists) > 2 * len(few.lists) > 0, "a list may not fit the shortest prompts"


def test_prompts_that_fit_no_position_are_told(tokenizer, caplog):
    caplog.set_level("INFO", logger="layercut")
    found = probes_for(tokenizer, GPT2Config(n_positions=64))
    assert (found.keys, found.lists) == ([], [])
    assert [f"no prompt of {what} fits 64 tokens" in caplog.text for what in ("keys", "lists")] == [True, True]


def test_rows_are_the_same_for_the_same_seed_wherever_they_begin(tokenizer):
    whole = probe_rows(tokenizer, rows=4, window=300, seed=3)
    tail = probe_rows(tokenizer, rows=2, window=300, seed=3, first=2)
    assert (whole.tokens[2:] == tail.tokens).all()
    assert (whole.tokens != probe_rows(tokenizer, rows=4, window=300, seed=4).tokens).any()


def test_long_rows_to_tune_on_are_long_tests_or_short_ones_laid_end_to_end(tokenizer, monkeypatch):
    made, longer, row = list[int](), list[tuple[str, ...]](), probes_module._row

    def noted(writer, capabilities, window, number):
        made.append(window)
        return row(writer, capabilities, window, number)

    def noted_long(writer, capabilities, window):
        longer.append(tuple(capabilities))
        return long_row(writer, capabilities, window)

    long_row = probes_module._long_row
    monkeypatch.setattr(probes_module, "_row", noted)
    monkeypatch.setattr(probes_module, "_long_row", noted_long)
    kept = {"rows": 12, "capabilities": ("recall", "lists", "sums")}
    found = probe_rows(tokenizer, window=4 * SHORT_ROW, family="tuning", **kept)
    assert found.tokens.shape == (12, 4 * SHORT_ROW)
    assert longer == 6 * [("recall", "lists", "lists")]
    assert made == 4 * 6 * [SHORT_ROW]
    assert found.lengths.tolist() == [SHORT_ROW, 4 * SHORT_ROW] * 6, "by turns, so that few rows have both"
    assert (found.answers >= 0).any(1).all(), "tests in each of them"
    sums = probe_rows(tokenizer, window=4 * SHORT_ROW, family="tuning", rows=12, capabilities=("sums",))
    assert sums.lengths.tolist() == [SHORT_ROW] * 12, "sums are never long"
    assert len(made) == 4 * 18
    for window, short in ((5 * SHORT_ROW - 1, [319, 320, 320, 320]), (2 * SHORT_ROW + 1, [256, 257])):
        made.clear()
        odd = probe_rows(tokenizer, window=window, family="tuning", **kept)
        assert odd.tokens.shape == (12, window)
        assert odd.lengths.tolist() == [short[0], window] * 6
        assert made == 6 * short
    for family, window in (("searching", 4 * SHORT_ROW), ("tuning", 2 * SHORT_ROW - 1), ("tuning", SHORT_ROW)):
        made.clear()
        assert probe_rows(tokenizer, window=window, family=family, **kept).lengths.tolist() == 12 * [window]
        assert made == 12 * [window]


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
@pytest.mark.parametrize("template", ["", CHAT])
def test_every_capability_is_in_short_rows_that_are_chats_and_in_others(tokenizer, pieces, template, monkeypatch):
    """What a row holds goes by its number, and so does whether it is a chat: neither may decide the other."""
    short = 4 * SHORT_ROW  # of letters, as these tokens are, it takes more
    monkeypatch.setattr(probes_module, "SHORT_ROW", short)
    found = probe_rows(able(tokenizer, template), rows=48, window=pieces * short, family="tuning")
    seen: dict[bool, set[int]] = {}
    for row, of in zip(found.tokens[found.lengths == short], found.of()[found.lengths == short], strict=True):
        for piece, capability in zip(row.split(short), of.split(short), strict=True):
            seen.setdefault("<user>" in tokenizer.decode(piece), set()).update(capability.unique().tolist())
    everything = {*range(-1, len(CAPABILITIES))}
    assert seen == ({False: everything, True: everything} if template else {False: everything})


@pytest.mark.parametrize("rows", [range(4), range(5, 9), range(8, 12)])
def test_four_rows_have_short_and_long_chats_and_others(tokenizer, rows):
    kept = {"rows": 4, "first": rows.start, "window": 4 * SHORT_ROW, "family": "tuning"}
    found = probe_rows(able(tokenizer, CHAT), **kept)
    pieces = zip(found.tokens, found.lengths.tolist(), strict=True)
    kinds = [(n, "<user>" in tokenizer.decode(piece)) for row, n in pieces for piece in row.split(n)]
    assert Counter(kinds) == {
        (n, chat): 4 if n == SHORT_ROW else 1 for n in (SHORT_ROW, 4 * SHORT_ROW) for chat in (True, False)
    }
    assert not any("<user>" in tokenizer.decode(row) for row in probe_rows(tokenizer, **kept).tokens), (
        "without a template none"
    )


@pytest.mark.parametrize("chat", [False, True])
def test_long_tests_hold_more_keys_than_short_ones(tokenizer, chat):
    writer = probes_module._Writer(able(tokenizer, CHAT), FAMILIES["tuning"], random.Random(0), chat)
    found = [writer.grown("lists", 4096, one_form=True) for _ in range(24)]
    filled = [each for each in found if each and len(each.ids) > 3072]
    assert len(filled) > 5, "lists of pairs grow as the room does"
    assert max(each.answers for each in found if each) > len(FAMILIES["tuning"].things)
    anew = [writer.grown("lists", 4096) for _ in range(24)]
    assert sum(len(each.ids) > 3072 for each in anew if each) < len(filled), "drawn anew, short forms are first to fit"


@pytest.mark.parametrize("length", [512, 1024])
def test_judged_lists_are_as_long_as_the_row(tokenizer, length):
    rows = judging_rows(tokenizer, rows=8, window=length, capability="lists")
    last = [(row >= 0).nonzero().max().item() for row in rows.answers]
    assert sum(last) > 0.75 * len(last) * length


def test_lists_longer_than_there_are_things_have_a_persons_things():
    item = probe_families.lists(probe_families.JUDGING, random.Random(0), 60)
    entries = re.findall(r"[a-z]+ of [A-Z][a-z]+", item.parts[0])
    assert len(set(entries)) >= 60
    assert "'s" not in probe_families.lists(probe_families.JUDGING, random.Random(0), 20).parts[0]


class Merging:
    """A tokenizer of characters, that makes one token of a sign and the line break behind it, as Qwen's does."""

    bos_token_id = unk_token_id = chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        pieces = re.findall(r"[^\w\s]\n|.|\n", text)
        return SimpleNamespace(input_ids=[sum(ord(c) << 8 * i for i, c in enumerate(piece)) for piece in pieces])

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i & 255) + (chr(i >> 8) if i >> 8 else "") for i in ids)


@pytest.mark.parametrize("capability", ["structure", "format"])
def test_a_token_of_an_answers_end_and_a_line_break_is_the_answers(capability):
    draw = random.Random(0)
    writer = probes_module._Writer(Merging(), probe_families.JUDGING, draw, False)
    ends = set()
    for _ in range(40):
        marked = writer.item(capability)
        last = max(i for i, mark in enumerate(marked.of) if mark)
        assert not any(marked.of[last + 1 :])
        assert marked.ids[last + 1 :] in ([], [ord("\n")]), "all of the answer's signs are marked"
        ends.add(marked.ids[last] >= 256)
    assert True in ends, "some ends are one token with the line break"


def bpe(vocabulary: list[str], merges: list[tuple[str, str]], **special: Any) -> Any:
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, **special))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_all_digits_of_an_answer_are_marked_whose_tokens_what_follows_makes_anew():
    merging = bpe([*"123.a", "3.", "23.", "12"], [("3", "."), ("2", "3."), ("1", "2")])
    writer = probes_module._Writer(merging, probe_families.JUDGING, random.Random(0), False)
    marked = writer.marked("recall", probe_families.Item(("a", "123", ".a")))
    assert merging.convert_ids_to_tokens(marked.ids) == ["a", "1", "23.", "a"]
    assert marked.of == [None, ("recall", 0), ("recall", 0), None]


def test_what_has_no_token_is_no_answer():
    unaware = bpe(["?", *"12 ab"], [], unk_token="?")
    writer = probes_module._Writer(unaware, probe_families.JUDGING, random.Random(0), False)
    marked = writer.marked("recall", probe_families.Item(("a", "12", "b", "1é", "a", "21")))
    assert [mark and mark[1] for mark in marked.of] == [None, 0, 0, None, None, None, None, 2, 2]


def test_what_a_tokenizer_drops_is_no_test():
    """Some drop what they do not know, without a sign of it."""
    dropping = bpe([*"12ab"], [])
    writer = probes_module._Writer(dropping, probe_families.JUDGING, random.Random(0), False)
    marked = writer.marked("recall", probe_families.Item(("aaaaaaaaaaaaaaaaaaa", "1x", "b", "21", "aa")))
    assert [mark and mark[1] for mark in marked.of] == [*[None] * 19, None, None, 1, 1, None, None]
    assert not any(writer.marked("recall", probe_families.Item(("ab??", "12"))).of), "the question is gone"
    letters = bpe([*"abcdefghijklmnopqrstuvwxyz "], [])
    for capability in ("recall", "sums", "labels"):  # digits and the line's end are dropped, words are not
        names = probe_rows(letters, rows=4, window=512, capabilities=(capability,)).names
        assert names == (("labels",) if capability == "labels" else ())
    proteins = bpe([*"ACDEFGHIKLMNPQRSTVWY"], [])
    for capability in CAPABILITIES:
        assert probe_rows(proteins, rows=2, window=64, capabilities=(capability,)).names == ()
        assert judging_rows(proteins, rows=2, window=64, capability=capability).names == ()
    assert probe_scores.passkey(bpe([*"0123456789"], []), 64, 0.5, random.Random(0))


def test_rows_that_judge_begin_as_text_does():
    class Begins(Merging):
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            found = super().__call__(text)
            return SimpleNamespace(input_ids=[*[1] * add_special_tokens, *found.input_ids])

    for capability in ("recall", "sums"):
        rows = judging_rows(Begins(), rows=2, window=512, capability=capability)
        assert rows.names == (capability,)
        assert rows.tokens[:, 0].tolist() == [1, 1]


def test_a_tokenizer_without_words_has_no_tests():
    class Digits(Merging):
        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=[ord(c) for c in text if c in "0123456789+=-"])

    assert probe_rows(Digits(), rows=2, window=64).names == ()


def test_what_is_preserved_alone_fills_the_row_and_is_all_that_is_taught(tokenizer):
    rows = probe_rows(tokenizer, rows=4, window=256, capabilities=("sums",), family="tuning")
    assert rows.names == ("sums",)
    assert len(rows.capability) > 8, "as many as fit"
    drawn = Reader(tokenizer, seed=0, capabilities=("sums",)).draw("tuning", "probes", tokens=1024, window=256)
    assert (drawn.tokens == rows.tokens).all()


def test_parts_of_a_pair_are_in_other_keys_too():
    for seed in range(200):
        item = probe_families.lists(FAMILIES["tuning"], random.Random(seed), 30)
        if "{name}" not in random.Random(seed).choice(FAMILIES["tuning"].lists)[1]:
            continue
        lines = re.split(r"\n|; ", item.told)
        for _, begins in item.turns:
            parts = [word for word in (*FAMILIES["tuning"].people, *FAMILIES["tuning"].things) if word in begins]
            assert len(parts) == 2
            assert all(sum(part in line for line in lines) > 1 for part in parts), "neither alone tells the value"
            assert sum(all(part in line for part in parts) for line in lines) == 1


def test_ends_of_a_long_list_are_asked_for():
    family, seen = FAMILIES["tuning"], 0
    for seed in range(40):
        if "{name}" in random.Random(seed).choice(family.lists)[1]:
            continue  # of pairs the first word does not tell the entry
        item = probe_families.lists(family, random.Random(seed), 12)
        things = [thing for thing in family.things if thing in item.told]
        asked = [begins for _, begins in item.turns]
        assert 6 <= len(asked) <= 8
        for end in (min(things, key=item.told.index), max(things, key=item.told.index)):
            assert any(end in begins for begins in asked)
        assert len(probe_families.lists(family, random.Random(seed), 7).turns) == 1, "one in four of few"
        seen += 1
    assert seen > 10


def test_rows_weigh_every_capability_alike(probes):
    assert {*probes.names} == {*CAPABILITIES}
    weights, of = probes.weights(), probes.of()
    for c in range(len(probes.names)):
        share = weights[of == c].sum() / len(probes.tokens)
        assert share.item() == pytest.approx(1 / len(probes.names))


def test_what_does_not_fit_is_left_out(tokenizer):
    assert probe_rows(tokenizer, rows=2, window=12).names == ()
    assert judging_rows(tokenizer, window=12).names == ()


@pytest.mark.parametrize(("rows", "window"), [(0, 64), (2, 0), (-1, 64)])
def test_rows_that_cannot_be_are_refused(tokenizer, rows, window):
    for made in (probe_rows, judging_rows):
        with pytest.raises(ConfigError, match=f"{rows} rows of {window} tokens"):
            made(tokenizer, rows=rows, window=window)


def test_names_of_capabilities():
    assert capability_names("all") == tuple(CAPABILITIES)
    assert capability_names("none") == ()
    assert capability_names("copy, recall") == ("recall", "copy")
    with pytest.raises(ConfigError, match="no capability is called 'memory'"):
        capability_names("memory")


# ---- damage --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_damage_and_hits_are_those_of_direct_computation(model, probes):
    small = cut(model, [Segment(1, 3)])
    figures = capability_figures(small, model, probes)
    whole, left = (m(input_ids=probes.tokens).logits for m in (model, small))
    kl, right = kl_divergence(whole, left), left[:, :-1].argmax(-1) == probes.tokens[:, 1:]
    for c, name in enumerate(probes.names):
        assert figures.kl[name] == pytest.approx(kl[probes.of() == c].mean().item(), rel=1e-4)
        at = (probes.of() == c)[:, :-1]
        for loss, logits in ((figures.loss, left), (figures.dense_loss, whole)):
            cost = cross_entropy(logits[:, :-1][at], probes.tokens[:, 1:][at])
            assert loss[name] == pytest.approx(cost.item(), rel=1e-4)
        own = (probes.capability == c).nonzero()[:, 0]
        hits = [bool(right[(probes.answers == a)[:, :-1]].all()) for a in own]
        assert figures.hits[name] == pytest.approx(sum(hits) / len(hits))
        assert figures.answers[name] == len(hits)
    assert max(capability_figures(model, model, probes).kl.values()) < 1e-6


def test_capabilities_are_tested_in_halves_where_memory_runs_out(model, probes, monkeypatch):
    small, enter = DecoderRunner(cut(model, [Segment(1, 3)])), DecoderRunner.enter
    whole = DecoderRunner(model)
    wanted = capability_figures(small, whole, probes)

    def short(self, tokens):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return enter(self, tokens)

    monkeypatch.setattr(DecoderRunner, "enter", short)
    assert capability_figures(small, whole, probes).kl == pytest.approx(wanted.kl, rel=1e-4)


def test_the_map_holds_the_damage_of_every_window(model, probes):
    text = tiny.some_tokens(3, 16)
    found = capability_map(model, probes=probes, text=text, lengths=(1, 2))
    assert found.lengths() == [1, 2]
    assert len(found.damage) == 5 + 4
    assert found.names == (*probes.names, TEXT)
    direct = capability_figures(cut(model, [Segment(2, 4)]), model, probes).kl
    assert found.damage[2, 4] == pytest.approx(direct | {TEXT: found.damage[2, 4][TEXT]}, rel=1e-4)
    priced = set_costs(DecoderRunner(model), text, [(Segment(2, 3),)], Cost())[0]
    assert found.damage[2, 3][TEXT] == pytest.approx(priced.kl)
    assert len(found.to_dict()["windows"]) == 9
    assert len(found.words()) == len(probes.names)
    assert found.holders()["recall"][0] in range(5)
    shown = found.plot(length=2)
    assert shown.images[0].get_array().shape == (len(found.names), 4)
    assert found.plot(shown) is shown
    assert shown.images[-1].get_array().shape == (len(found.names), 5), "of single layers, where nothing is said"


def test_a_map_of_longer_windows_alone_says_nothing_of_single_layers(model, probes):
    found = capability_map(model, probes=probes, lengths=(2,))
    assert (found.holders(), found.words(), len(found.to_dict()["windows"])) == ({}, [], 4)
    assert found.plot().get_xlabel() == "first of 2 layers removed"
    with pytest.raises(ConfigError, match="windows of 1 layers were not priced: there are 2"):
        found.plot(length=1)


@pytest.mark.parametrize("lengths", [(), (0,), (1, 5)])
def test_lengths_that_no_window_has_are_refused(model, probes, lengths):
    with pytest.raises(ConfigError, match=r"lengths of windows are .*: allowed are 1 to 4"):
        capability_map(model, probes=probes, lengths=lengths)


def test_words_name_the_holders_that_are_cheap_on_text():
    recall, text = [9.0, 8.0, 0.1, 0.1, 1.0, 0.9, 0.2, 9.0], [7.0, 3.0, 0.5, 0.6, 0.1, 0.55, 0.4, 2.0]
    damage = {(i, i + 1): {"recall": recall[i], TEXT: text[i]} for i in range(8)}
    found = layer_search.CapabilityMap(8, ("recall", TEXT), damage, left_out=("labels",))
    assert found.words() == [
        "labels: no test of it fits a row",
        "recall: most at layer 4 (1.00 nats without it), then 5; cheap on text: 4 (0.10)",
    ]
    dear = {span: row | {TEXT: 1.0} for span, row in damage.items()}
    (line,) = layer_search.CapabilityMap(8, ("recall", TEXT), dear).words()
    assert "cheap" not in line
    alike = {(i, i + 1): {"recall": 1.0} for i in range(12)}
    (line,) = layer_search.CapabilityMap(12, ("recall",), alike).words()
    assert line == "recall: most at layer 2 (1.00 nats without it), then 3, 4, 5, 6, 7"


def test_a_map_without_a_finite_price_is_drawn():
    found = layer_search.CapabilityMap(2, ("recall",), {(i, i + 1): {"recall": float("inf")} for i in range(2)})
    assert found.plot().images[0].get_array().tolist() == [[1.0, 1.0]]


def test_what_fits_no_row_is_told(model, tokenizer):
    short, long = (probe_rows(tokenizer, rows=4, window=window) for window in (128, 512))
    assert "recall" in short.left_out
    assert {*short.left_out} | {*short.names} == {*long.left_out} | {*long.names} == {*CAPABILITIES}
    found = capability_map(model, probes=short)
    assert found.left_out == short.left_out
    assert found.to_dict()["left_out"] == list(short.left_out)


def test_a_search_with_tests_of_which_none_fits_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="no probe fits rows of 16 tokens"):
        search(model, tiny.some_tokens(4, 16), n_layers=1, probes=probe_rows(tokenizer, rows=1, window=16))


# ---- the search ----------------------------------------------------------------------------------------------


def test_the_mean_price_of_weighted_rows_is_the_objective(model, probes):
    text, weight = tiny.some_tokens(6, 16), 0.7
    heavier = ProbeRows(**(vars(probes) | {"weight": weight}))
    sets = [(Segment(1, 2),), (Segment(0, 1), Segment(3, 4))]
    stack = DecoderRunner(model)
    found = CutCosts(stack, text, Cost(), heavier).candidates(sets)
    kl = {c.segments: c.kl for c in set_costs(stack, text, sets, Cost())}
    damage = capability_costs(stack, probes, sets, Cost())
    for candidate in found:
        mean = sum(damage[candidate.segments].values()) / len(probes.names)
        assert candidate.kl == pytest.approx(kl[candidate.segments], rel=1e-4)
        assert candidate.probe_kl == pytest.approx(mean, rel=1e-4)
        assert candidate.score == pytest.approx(candidate.kl + weight * mean, rel=1e-4)


def test_tests_and_text_stand_in_turn_and_each_kind_has_its_own_mean(probes):
    rows = weighted_rows(tiny.some_tokens(12, 16), probes)
    assert rows.tokens.shape == (16, 512)
    assert rows.is_text.tolist() == [True, False] * 4 + [True] * 8
    prices = torch.where(rows.is_text, 1.0, 5.0)[None].double()
    for first in (2, 3, 8, 16):
        assert rows.mean(prices[:, :first]).item() == pytest.approx(prices.mean().item())
    alone = weighted_rows(tiny.some_tokens(12, 16), None)
    assert alone.weights is None
    assert alone.is_text.all()


def test_what_few_rows_propose_has_seen_the_tests(monkeypatch, model, probes):
    """On the first row alone, which is text, nothing would tell the layers that hold recall from the others."""
    planted(monkeypatch, {0: (0.9, 0.1), 1: (0.1, 9.0), 2: (0.8, 0.1), 3: (0.1, 9.0), 4: (0.8, 0.1)})
    prices = CutCosts(DecoderRunner(model), tiny.some_tokens(4, 512), Cost(), probes=probes)
    proposed = least_sums(prices, Restriction.none(5, 2), 2)
    assert {layer for segment in proposed[0] for layer in range(segment.start, segment.stop)} <= {0, 2, 4}


def planted(monkeypatch: pytest.MonkeyPatch, single: dict[int, tuple[float, float]]) -> None:
    """Have every layer cost what a table says: (on text, on tests); sets cost their sum."""

    def of_batch(self: CutCosts, sets: Any, batch: torch.Tensor, weights: Any, cost: Cost) -> torch.Tensor:
        tests = [weights is not None and bool((row == 0).any()) for row in (weights if weights is not None else batch)]
        found = torch.zeros(len(sets), len(batch), dtype=torch.float64)
        for s, cuts in enumerate(sets):
            text, test = (sum(single[i][k] for c in cuts for i in range(c.start, c.stop)) for k in (0, 1))
            for r, is_test in enumerate(tests):
                scale = 1.0 if weights is None else float(weights[r].sum())
                found[s, r] = scale * (test if is_test else text)
        return found

    monkeypatch.setattr(CutCosts, "_of_batch", of_batch)


@pytest.mark.parametrize("method", ["fisher", "race", "exhaustive"])
def test_a_layer_that_is_cheap_on_text_and_holds_recall_is_kept(monkeypatch, model, probes, method):
    cheap_on_text = {0: (9.0, 9.0), 1: (0.4, 0.1), 2: (0.5, 0.2), 3: (0.1, 8.0), 4: (0.2, 8.0)}
    planted(monkeypatch, cheap_on_text)
    text, flat = tiny.some_tokens(8, 512), 0
    blind = search(model, text, n_layers=2, method=method, seed=flat)
    if method != "exhaustive":  # which without tests prices by a sweep of its own, which knows no table
        assert blind.segments == [Segment(3, 5)]
    seeing = search(model, text, n_layers=2, method=method, seed=flat, probes=probes)
    assert seeing.segments == [Segment(1, 3)]
    assert seeing.by_text is not None
    assert seeing.by_text.segments == (Segment(3, 5),)
    assert seeing.candidates[0].kl == pytest.approx(0.9)
    assert seeing.candidates[0].probe_kl == pytest.approx(0.3)


def test_two_segments_are_taken_where_they_spare_enough(monkeypatch, model, probes):
    apart = {0: (9.0, 9.0), 1: (0.1, 0.1), 2: (2.0, 3.0), 3: (0.1, 0.1), 4: (2.0, 2.0)}
    planted(monkeypatch, apart)
    text = tiny.some_tokens(8, 512)
    by_gate = search(model, text, n_layers=2, num_segments="auto", probes=probes)
    assert {sum(map(len, cuts)) for cuts in by_gate.lighter} == {2}, "proposals in which the tests count less"
    assert not search(model, text, n_layers=2).lighter
    found = search(model, text, n_layers=2, method="exhaustive", num_segments="auto", probes=probes)
    assert found.segments == [Segment(1, 2), Segment(3, 4)]
    assert [len(candidate.segments) for candidate in found.by_number] == [1, 2]
    planted(monkeypatch, dict.fromkeys(range(5), (1.0, 1.0)) | {0: (0.99, 1.0), 2: (1.0, 0.99)})
    found = search(model, text, n_layers=2, method="exhaustive", num_segments="auto", probes=probes)
    assert len(found.segments) == 1, "one per cent does not pay for two more boundaries"


def test_of_too_many_sets_one_segment_alone_is_searched(monkeypatch, model, probes, caplog):
    """Left to itself, the exhaustive search of a deep stack is not refused after its first half is done."""
    planted(monkeypatch, {0: (9.0, 9.0), 1: (0.1, 0.1), 2: (2.0, 3.0), 3: (0.1, 0.1), 4: (2.0, 2.0)})
    monkeypatch.setattr("layercut.layer_search.MOST_SETS", 5)
    monkeypatch.setattr("layercut.layer_search.race.MOST_SETS", 5)
    text, asked = tiny.some_tokens(8, 512), {"n_layers": 2, "method": "exhaustive", "probes": probes}
    found = search(model, text, num_segments="auto", **asked)
    assert found.segments == search(model, text, **asked).segments
    assert len(found.segments) == 1
    with pytest.raises(ConfigError, match="10 sets of 2 segments are too many"):
        search(model, text, num_segments=2, **asked)


def test_a_method_of_the_literature_takes_no_tests(model, probes):
    with pytest.raises(ConfigError, match="probes is not for the criterion 'cosine'"):
        search(model, tiny.some_tokens(), n_layers=2, method="cosine", probes=probes)


def test_the_estimate_goes_by_the_answers(model, probes):
    stack, text = DecoderRunner(model), tiny.some_tokens(4, 64)
    seeing, blind = (estimate(CutCosts(stack, text, Cost(), probes=tests), 2, 0) for tests in (probes, None))
    only = CutCosts(stack, text, Cost(), probes=probes)
    only.weights = torch.where(only.weighted.is_text[:, None], only.weights, 0.0)  # as if no answer counted
    assert not torch.equal(seeing.table, blind.table)
    assert not torch.equal(seeing.table, estimate(only, 2, 0).table)
    found = layer_search.search(model, text, n_layers=2, probes=probes)
    assert found.candidates[0].score == pytest.approx(found.kl + found.candidates[0].probe_kl, rel=1e-5)


def test_pseudo_words_are_of_their_family():
    word = probe_families.pseudo_word(FAMILIES["tuning"], random.Random(1))
    assert any(word.startswith(syllable) for syllable in FAMILIES["tuning"].syllables)


# ---- in a mix, and in a run ----------------------------------------------------------------------------------


def test_a_mix_gives_every_part_its_share():
    assert turns([find("python-docs")]) == (0,)
    assert turns([find("python-docs"), find("python-docstrings")]) == (0, 1)
    order = turns([find("python-docs"), find("python-docstrings"), find("probes:0.25")])
    assert [order.count(part) for part in range(3)] == [3, 3, 2]
    for share in ("0", "1", "much"):
        with pytest.raises(DataError, match="is not between 0 and 1"):
            find(f"probes:{share}")


def test_where_no_test_fits_a_mix_has_text_alone_and_tests_alone_are_refused(tokenizer, texts):
    found = Reader(tokenizer, seed=0).draw("tuning", f"{texts[0]}+probes:0.5", tokens=64, window=8)
    assert found.marks
    assert not found.marks.lengths.any(), "all of it is done as text"
    with pytest.raises(DataError, match="no probe fits rows of 8 tokens"):
        Reader(tokenizer, seed=0).draw("tuning", "probes", tokens=64, window=8)


def test_a_file_may_be_called_as_a_mix_is_and_be_mixed_with_tests(texts, tmp_path):
    file = tmp_path / "a,b+c.txt"
    file.write_text(texts[0].read_text())
    assert split_mix(f"{file}+probes:0.125") == [str(file), "probes:0.125"]
    assert find("probes:0.004").share == Fraction(4, 1000)


def test_a_quarter_of_the_rows_are_tests_and_no_two_uses_have_the_same(tokenizer, texts):
    reader = Reader(tokenizer, seed=0)
    source = f"{texts[0]}+probes:0.25"
    first, second = (reader.draw(use, source, tokens=8 * 300, window=300) for use in ("heldout", "tuning"))
    rows = {origin: len(found) for origin, found in first.rows_by_origin().items()}
    assert rows["probes"] == 2
    assert sum(rows.values()) == 8
    tests = probe_rows(tokenizer, rows=4, window=300, family="tuning")
    made = tests.tokens
    assert first.marks
    weighed = (tests.of() >= 0) & (tests.of() != tests.names.index("copy"))
    assert 0 < weighed[:2].sum() < (tests.answers[:2] >= 0).sum(), "words that are copied do not count more"
    for mark, of_tests in ((first.marks.answers, weighed[:2]), (first.marks.lengths, tests.lengths[:2])):
        marked = by_origin(mark, first.facts.origins)
        assert torch.equal(marked.pop("probes"), of_tests)
        assert not any(rows.any() for rows in marked.values()), "text has none"
    assert reader.draw("calibration", str(texts[1]), tokens=300, window=300).marks is None
    assert (first.rows_by_origin()["probes"] == made[:2]).all()
    assert (second.rows_by_origin()["probes"] == made[2:]).all()
    later = Reader(tokenizer, seed=0)
    later.skip_blocks("heldout", source, tokens=8 * 300, window=300, keys={*first.keys})
    assert (later.draw("tuning", source, tokens=8 * 300, window=300).tokens == second.tokens).all()


def test_rows_of_tests_are_those_of_their_edition(tokenizer):
    """Runs keep what they have drawn: whoever changes what is written, or what is marked, gives it another edition."""
    found = []
    for template, family in (("", "tuning"), (CHAT, "tuning"), ("", "searching"), ("", "judging")):
        rows = probe_rows(able(tokenizer, template), rows=12, window=4 * SHORT_ROW, family=family)
        found += [rows.tokens.tolist(), rows.answers.tolist(), rows.lengths.tolist()]
    assert (probe_families.EDITION, digest(found)) == (6, "b606297a5e5b5c3a")


@pytest.mark.parametrize(
    ("asked", "preserve", "source", "window", "tests"),
    [
        ({"bits": 4}, "all", "c4", 128, [*CAPABILITIES]),
        ({"bits": "auto"}, "structure,copy", "c4", 128, ["copy", "structure"]),
        ({"bits": 4}, "none", "c4", 128, []),
        ({"bits": 8}, "all", "c4", 128, []),
        ({"bits": 4, "quantizer": "rtn"}, "all", "c4", 128, []),
        ({"bits": 4}, "all", "c4+probes:0.25", 128, []),  # which has them already
        ({"bits": 4}, "all", "c4", 16, []),  # where none fits
    ],
)
def test_few_bits_are_rounded_on_tests_as_well(tokenizer, monkeypatch, asked, preserve, source, window, tests):
    monkeypatch.setattr(probes_module, "FOCUS_SHARE", 0.3)  # or nothing but copies fits rows of 128 letters
    config, rows = CompressConfig(), torch.arange(12 * window).view(12, window)
    config = replace(
        config, search=replace(config.search, preserve=preserve), quantize=replace(config.quantize, **asked),
        text=replace(config.text, data=source, tokens=12 * window, window=window, seed=3),
    )  # fmt: skip
    work: Any = SimpleNamespace(
        tokenizer=tokenizer, checkpoint=SimpleNamespace(gguf=None), run=Refusing(), config=config,
        blocks={"calibration": rows}, text=dict.fromkeys(("calibration", "tuning", "heldout")),
    )  # fmt: skip
    found = quantize.rows_to_round_on(work, quantize.tests_to_round_on(work, config.quantize))
    assert torch.equal(found[:12], rows)
    made = probe_rows(
        tokenizer, rows=3, window=window, family="tuning", capabilities=tests or ["copy"], seed=3, first=2**20
    )
    held = made.tokens[(made.answers >= 0).any(1)]
    assert torch.equal(found[12:], held if tests else rows[:0]), "one for four rows of text"
    assert len(held) == 3 * bool(made.names), "which all hold some"
    told = quantize.how_rounded(config, config.quantize)
    assert (told != quantization.recipe(config.quantize)) == (bool(tests) or window == 16)
    if asked.get("quantizer") != "rtn":
        with pytest.raises(Refused) as refused:
            quantize.quantize(work, [])
        assert all(each in refused.value.args[0] for each in told), "what the stage is redone for"


class Refused(Exception):
    """With what a stage depends on."""


class Refusing:
    """A run that does nothing."""

    def stage(self, kind: Any, name: str, inputs: Any, **_: Any) -> Any:
        raise Refused(inputs)


@pytest.mark.usefixtures("quick_runs")
def test_a_run_rounds_on_tests_wherever_it_rounds(tiny_model, texts, tmp_path, monkeypatch):
    seen, round_ = [], quantization.quantize

    def noted(model, tokens, *, bits, **how):
        seen.append((bits, tokens))
        return round_(model, tokens, bits=bits, **how)

    def measured(model, tokens, config):
        seen.append(("auto", tokens))
        return measure(model, tokens, config)

    measure = quantization.bit_choice.measured
    monkeypatch.setattr(quantization.bit_choice, "measured", measured)
    monkeypatch.setattr(quantization, "quantize", noted)
    monkeypatch.setattr(probes_module, "FOCUS_SHARE", 0.3)  # or nothing but copies fits rows of 128 letters
    argv = [str(tiny_model), f"--data={texts[0]}", "--tokens=1024", "--window=128", "--tune-tokens=0", "--no-speed"]
    argv += [f"--eval-data={texts[1]}", "--eval-tokens=256", "--no-fold", "--bits=auto"]
    size = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    assert main(["compress", *argv, f"--out={tmp_path}", f"--target-size={size // 2}B"]) == 0
    (text,) = load_file(tmp_path / "tokens-calibration.safetensors").values()
    made = probe_rows(folders.tokenizer(), rows=2, window=128, family="tuning", first=2**20)
    both = torch.cat([text, made.tokens])
    assert len(seen) >= 2, "where bits are priced and in the end"
    assert all(torch.equal(tokens, both) for _, tokens in seen)


@pytest.mark.usefixtures("quick_runs")
def test_answers_count_more_where_a_run_tunes_and_where_it_tries(tiny_model, texts, tmp_path, monkeypatch):
    seen = []

    def noted(stage):
        def noted(student, dense, tokens, *, token_weights, answers, **how):
            seen.append((stage, tokens, token_weights, answers))
            return tune_(student, dense, tokens, token_weights=token_weights, answers=answers, **how)

        return noted

    monkeypatch.setattr("layercut.pipeline.resolve_options.ENOUGH_TOKENS", 4096)
    monkeypatch.setattr(probes_module, "FOCUS_SHARE", 0.3)  # or nothing but copies fits rows of 128 letters
    for stage in (heal, trial):
        monkeypatch.setattr(stage, "tune_", noted(stage))
    flags = [f"--data={texts[0]}", "--tokens=1024", "--window=128", "--ratio=0.25", f"--out={tmp_path}"]
    flags += ["--tune-tokens=4096", "--probe-share=0.3"]
    assert main(["tune", str(tiny_model), *flags]) == 0
    assert len(seen) > 2
    marks, rows = (found(tmp_path, "tuning") for found in (stored_marks, stored_blocks))
    assert marks
    assert marks.answers.any()
    assert torch.equal(seen[-1][1], rows)
    for stage, tokens, weights, answers in seen:
        of = [next(i for i, row in enumerate(rows) if torch.equal(row, some)) for some in tokens]
        # what is left of a cut on trial is told by what the dense model predicts, and so is what heals it
        assert answers is None if stage is trial else torch.equal(answers, marks.answers[of])
        assert torch.equal(weights, 1 + 3.0 * marks.answers[of])


def test_answers_count_more_for_every_method_that_is_compared(tiny_model, texts, tmp_path, monkeypatch):
    seen, taught = [], []

    def noted(*given, token_weights, answers, **how):
        seen.append(token_weights)
        taught.append(answers)
        return tune_(*given, token_weights=token_weights, answers=answers, **how)

    monkeypatch.setattr(probes_module, "FOCUS_SHARE", 0.3)  # or nothing but copies fits rows of 128 letters
    monkeypatch.setattr(compare, "tune_", noted)
    flags = [f"--data={texts[0]}", f"--eval-data={texts[1]}", "--tokens=512", "--window=128", "--eval-tokens=256"]
    flags += ["--eval-window=64", "--tune-tokens=2048", "--probe-share=0.3", "--methods=exhaustive", "--ratio=0.25"]
    assert main(["compare", str(tiny_model), *flags, f"--out={tmp_path}"]) == 0
    marks = stored_marks(tmp_path, "tuning")
    assert marks
    assert marks.answers.any()
    assert [weights.tolist() for weights in seen] == [torch.where(marks.answers, 4.0, 1.0).tolist()]
    assert [answers.tolist() for answers in taught] == [marks.answers.tolist()]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "a.txt+chats:0.1+probes:0.1"),
        ({"probe_share": 0.2}, "a.txt+chats:0.1+probes:0.2"),
        ({"probe_share": 0.0}, "a.txt+chats:0.1"),
        ({"chat_share": 0.2}, "a.txt+chats:0.2+probes:0.1"),
        ({"chat_share": 0.0}, "a.txt+probes:0.1"),
        ({"tune_data": "b.txt"}, "b.txt+chats:0.1+probes:0.1"),
        ({"tune_data": "python-docs+probes:0.5"}, "python-docs+probes:0.5+chats:0.1"),
        ({"tune_data": "python-docs+chats"}, "python-docs+chats+probes:0.1"),
        ({"tune_data": "probes:0.5"}, "probes:0.5"),
        ({"tune_data": "probes"}, "probes+chats:0.1"),
        ({"tune_data": "b.txt+probes:0.95"}, "b.txt+probes:0.95"),
        ({"tune_tokens": 0}, "a.txt+probes:0.1"),
    ],
)
def test_what_is_tuned_on_has_its_shares_of_chats_and_tests(given, found):
    def tuned_on(chats: bool = True, preserve: str = "all", **fits: bool) -> list[str]:
        asked = replace(config, search=SearchConfig(preserve=preserve))
        work: Any = SimpleNamespace(config=asked, **{"tests_fit": True, "chats_fit": True} | fits)
        return tuning_source(work, chats).split("+")

    config = CompressConfig(text=DataConfig(data="a.txt"), heal=HealConfig(**given))
    parts, named = found.split("+"), (given.get("tune_data") or "a.txt").split("+")
    assert tuned_on() == parts
    no_tests = [part for part in parts if part in named or not part.startswith("probes")]
    assert tuned_on(tests_fit=False) == tuned_on(preserve="none") == no_tests
    no_chats = [part for part in parts if part in named or not part.startswith("chats")]
    assert tuned_on(chats_fit=False) == tuned_on(chats=False) == no_chats


def test_chats_give_way_to_tests():
    config = CompressConfig(text=DataConfig(data="a.txt"), heal=HealConfig(probe_share=0.9))
    for fit, found in ((True, "a.txt+probes:0.9"), (False, "a.txt+chats:0.1")):
        work: Any = SimpleNamespace(config=config, tests_fit=fit, chats_fit=True)
        assert tuning_source(work, True) == found


@pytest.mark.parametrize(
    "given",
    [{"chat_share": 1.0}, {"chat_share": -0.1}, {"probe_share": 0.0001}],
)
def test_shares_leave_some_text_to_tune_on(given):
    with pytest.raises(ConfigError, match=next(iter(given)).replace("_", "-")) as error:
        HealConfig(**given)
    assert "0.1" in error.value.hint


def test_a_run_tells_what_the_layers_hold_and_what_is_left(tiny_model, texts, tmp_path, capsys, quick_runs):
    out = tmp_path / "run"
    flags = [f"--data={texts[0]}", f"--eval-data={texts[1]}", "--tokens=512", "--window=128", "--tune-tokens=0"]
    flags += ["--no-fold", "--eval-tokens=128", "--eval-window=64", "--no-speed", "--ratio=0.25", f"--out={out}"]
    assert main(["compress", str(tiny_model), *flags, "--preserve=sums,recall"]) == 2
    assert "no test of recall fits rows of 128 tokens" in capsys.readouterr().err
    assert main(["compress", str(tiny_model), *flags]) == 0, capsys.readouterr().err
    search, found, told = (json.loads((out / f"{n}.json").read_text()) for n in ("search", "capabilities", "summary"))
    assert search["tests"]["capabilities"] == found["map"]["names"][:-1]
    best = search["candidates"][0]
    assert best["score"] == pytest.approx(best["kl"] + best["probe_kl"], rel=1e-5)
    opened = loading.load(checkpoints.resolve(str(tiny_model)))
    small = cut(opened.model, [Segment(*bounds) for bounds in search["segments"]])
    assert_judged(found, small, opened)
    assert search["by_text"]["kl"] <= best["kl"] + 1e-9
    assert next(len(each["segments"]) for each in search["by_number"]) == 1
    assert len(found["map"]["windows"]) == folders.LAYERS
    assert told["capabilities"]["hits"].keys() == found["judged"]["dense_hits"].keys()
    page = (out / "report.html").read_text()
    other = "Text alone would take" in page
    assert other == (search["by_text"]["segments"] != best["segments"])
    assert found["words"][0] in page
    assert "without layers 0: sums" in page


def assert_judged(found: dict[str, Any], small: Any, opened: Any) -> None:
    """capabilities.json has what the compressed model makes of tests of the judging family, beside the dense one."""
    kept = {"family": "judging", "rows": TEST_ROWS, "window": 128}
    figures = capability_figures(small, opened.model, probe_rows(opened.tokenizer, **kept))
    assert found["judged"].keys() == vars(figures).keys()
    for name, by_capability in vars(figures).items():
        assert found["judged"][name] == pytest.approx(by_capability, rel=1e-4)
    assert min(figures.kl.values()) > 1e-3, "the dense model beside itself would have none"
    kept |= {"rows": evaluate.ROWS_OF_A_LENGTH, "window": folders.POSITIONS}
    rows = {name: judging_rows(opened.tokenizer, capability=name, **kept) for name in ("recall", "lists")}
    answers = {name: len(each.capability) for name, each in rows.items() if each.names}
    assert {each["capability"]: each["answers"] for each in found["by_length"]} == answers


def test_tests_longer_than_the_models_positions_are_refused_or_made_to_fit(tokenizer):
    model = tiny.tiny(GPT2Config(vocab_size=folders.VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128))
    assert capability_map(model, tokenizer).names, "of rows of 128 tokens"
    with pytest.raises(DataError, match="rows of 256 tokens are longer than the model's 128 positions"):
        capability_map(model, tokenizer, window=256)
    with pytest.raises(DataError, match="rows of 256 tokens are longer"):
        search(model, tiny.some_tokens(4), n_layers=1, probes=probe_rows(tokenizer, rows=2))


def test_where_no_layer_does_damage_none_holds_anything():
    found = layer_search.CapabilityMap(3, ("recall",), {(i, i + 1): {"recall": 0.0} for i in range(3)})
    assert found.holders() == {"recall": []}
    assert found.words() == ["recall: no layer alone"]


def test_a_prompt_is_not_closed(tokenizer):
    class Closing(Merging):
        eos_token_id = 7

        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=[*super().__call__(text).input_ids, 7])

    assert prompt_ids(Closing(), "ab", "c") == Merging()("ab c").input_ids
    assert prompt_ids(able(tokenizer, ""), "ab") == tokenizer("ab").input_ids


def with_line_ends_in_signs(signs: str = "!~>]?.", ends: Sequence[str] = ("", "\n", "\n\n")) -> Any:
    """A tokenizer that writes "!" and the line's end as one token, as Qwen's and Llama 3's do; or other signs."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\p{N}|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    lines = [f"{word}{sign}{end}" for word in ("ba", "ko") for sign in signs or [""] for end in ends]
    core.train_from_iterator(lines * 9, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_what_follows_an_answer_in_one_token_with_its_last_sign_does_not_count():
    tokenizer = with_line_ends_in_signs()
    tests = probe_rows(tokenizer, rows=4, window=512, capabilities=("format",), family="judging")
    assert tests.closings
    signs = {tokenizer.decode([token]).strip() for token in tests.closings}
    assert signs <= set("!~>]?.|/*#+=;:)")
    for row in range(4):
        at = (tests.answers[row] >= 0).nonzero()[:, 0]
        wanted, last = tests.tokens[row, at + 1], tests.answers[row, at] != tests.answers[row, at + 1]
        assert tests.right(row, wanted).all()
        one_line = wanted.clone()
        for k in last.nonzero()[:, 0].tolist():
            one_line[k] = tokenizer.encode(tokenizer.decode([int(wanted[k])]).rstrip() + "\n")[0]
        assert not torch.equal(one_line, wanted), "the last test of a row's item ends with an empty line"
        assert tests.right(row, one_line).all()
        for k in range(len(wanted)):
            wrong = wanted.clone()
            wrong[k] = tests.tokens.max() if wanted[k] != tests.tokens.max() else 0
            assert tests.right(row, wrong).tolist() == [i != k for i in range(len(wanted))]


def test_a_line_that_ends_an_answer_may_go_on_with_any_blanks():
    """Of code the answer's last sign is the line's end, in one token with what parts the test from the next."""
    tokenizer = with_line_ends_in_signs("", ("\n", "\n\n", "\n    "))
    one, two, indented = (tokenizer.encode(end)[0] for end in ("\n", "\n\n", "\n    "))
    tests = probe_rows(tokenizer, rows=8, window=512, capabilities=("structure",), family="judging")
    ended = [
        (row, at, k)
        for row in range(8)
        for at in [(tests.answers[row] >= 0).nonzero()[:, 0]]
        for k, place in enumerate(at.tolist())
        if tests.tokens[row, place + 1] == two
    ]
    assert ended
    for row, at, k in ended:
        given = tests.tokens[row, at + 1].clone()
        for end, right in ((one, True), (indented, True), (tokenizer.encode(")")[0], False)):
            given[k] = end
            assert tests.right(row, given)[k] == right


def test_chats_that_leave_no_room_for_a_test_are_written_plain(tokenizer, monkeypatch):
    """Templates that begin with a long text of their own."""
    short = 4 * SHORT_ROW  # of letters, as these tokens are, it takes more
    monkeypatch.setattr(probes_module, "SHORT_ROW", short)
    begun = able(tokenizer, "{{ 'You are a careful assistant. ' * 34 }}" + CHAT)
    rows = probe_rows(begun, rows=8, window=2 * short, family="tuning", capabilities=("recall", "sums"))
    asked = rows.answers >= 0
    assert all(piece.any() for row in asked[rows.lengths == short] for piece in row.split(short))
    assert never_chats(begun) == (), "where there is room they are chats"
    assert "careful" in tokenizer.decode(rows.tokens.flatten())


def test_a_tokenizer_that_ends_lines_apart_has_nothing_to_forgive(tokenizer):
    assert probe_rows(tokenizer, rows=4, family="judging").closings == {}
