"""Probes of what a model can do: families that share nothing, rows, chats, and tokenizers."""

from __future__ import annotations

import copy
import random
import re
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from layercut.data import probe_families
from layercut.data.blocks import Reader, by_origin
from layercut.data.probe_families import CAPABILITIES, FAMILIES, TUNING, Family, Item
from layercut.data.probes import SHORT_ROW, _Writer, judging_rows, probe_rows
from layercut.data.sources import find, split_mix
from layercut.errors import ConfigError, DataError
from layercut.evaluation import probe_scores
from layercut.files import digest

CHAT = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
SPACED = """{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content + '</s>' }}
{%- endfor %}"""
"""As Mistral's: what stands before a reply is not what ends a prompt."""
LAST_TURN = CHAT.replace("messages %", "messages[-2:] %")
"""A template that forgets the turns before the last, as those do that drop what a model thought."""
ONE_TURN = "{% if messages|length > 2 %}{{ raise_exception('one question at a time') }}{% endif %}" + CHAT


def able(tokenizer: Any, template: str) -> Any:
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = template
    return chats


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


# ---- families ------------------------------------------------------------------------------------------------


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


def test_rows_are_those_of_their_edition(tokenizer):
    """Runs keep what they have drawn: whoever changes what is written, or what is marked, gives it another edition."""
    found = []
    for template, family in (("", "tuning"), (CHAT, "tuning"), ("", "searching"), ("", "judging")):
        rows = probe_rows(able(tokenizer, template), rows=12, window=4 * SHORT_ROW, family=family)
        found += [rows.tokens.tolist(), rows.answers.tolist(), rows.lengths.tolist()]
    assert (probe_families.EDITION, digest(found)) == (6, "b606297a5e5b5c3a")
    whole, tail = (probe_rows(tokenizer, rows=n, window=300, seed=3, first=4 - n) for n in (4, 2))
    assert (whole.tokens[2:] == tail.tokens).all(), "wherever they begin"
    assert (whole.tokens != probe_rows(tokenizer, rows=4, window=300, seed=4).tokens).any()


def test_what_does_not_fit_is_left_out_and_what_is_preserved_alone_fills_the_row(tokenizer, probes):
    short = probe_rows(tokenizer, rows=4, window=128)
    assert "recall" in short.left_out
    assert {*short.left_out} | {*short.names} == {*probes.names} == {*CAPABILITIES}
    assert probe_rows(tokenizer, rows=2, window=12).names == judging_rows(tokenizer, window=12).names == ()
    rows = probe_rows(tokenizer, rows=4, window=256, capabilities=("sums",), family="tuning")
    assert rows.names == ("sums",)
    assert len(rows.capability) > 8, "as many as fit"
    drawn = Reader(tokenizer, seed=0, capabilities=("sums",)).draw("tuning", "probes", tokens=1024, window=256)
    assert (drawn.tokens == rows.tokens).all()
    for made in (probe_rows, judging_rows):
        for count, window in ((0, 64), (2, 0), (-1, 64)):
            with pytest.raises(ConfigError, match=f"{count} rows of {window} tokens"):
                made(tokenizer, rows=count, window=window)


def test_a_quarter_of_a_mix_is_probes_and_no_two_uses_have_the_same(tokenizer, texts, tmp_path):
    reader = Reader(tokenizer, seed=0)
    source = f"{texts[0]}+probes:0.25"
    first, second = (reader.draw(use, source, tokens=8 * 300, window=300) for use in ("heldout", "tuning"))
    made = probe_rows(tokenizer, rows=4, window=300, family="tuning")
    assert first.marks
    weighed = (made.of() >= 0) & (made.of() != made.names.index("copy"))
    assert 0 < weighed[:2].sum() < (made.answers[:2] >= 0).sum(), "words that are copied do not count more"
    for mark, of_probes in ((first.marks.answers, weighed[:2]), (first.marks.lengths, made.lengths[:2])):
        marked = by_origin(mark, first.facts.origins)
        assert torch.equal(marked.pop("probes"), of_probes)
        assert not any(rows.any() for rows in marked.values()), "text has none"
    assert reader.draw("calibration", str(texts[1]), tokens=300, window=300).marks is None
    assert (first.rows_by_origin()["probes"] == made.tokens[:2]).all()
    assert (second.rows_by_origin()["probes"] == made.tokens[2:]).all()
    later = Reader(tokenizer, seed=0)
    later.skip_blocks("heldout", source, tokens=8 * 300, window=300, keys={*first.keys})
    assert (later.draw("tuning", source, tokens=8 * 300, window=300).tokens == second.tokens).all()
    short = Reader(tokenizer, seed=0).draw("tuning", f"{texts[0]}+probes:0.5", tokens=64, window=8)
    assert short.marks
    assert not short.marks.lengths.any(), "where none fits, all of it is done as text"
    with pytest.raises(DataError, match="no probe fits rows of 8 tokens"):
        Reader(tokenizer, seed=0).draw("tuning", "probes", tokens=64, window=8)
    file = tmp_path / "a,b+c.txt"  # a file may be called as a mix is
    file.write_text(texts[0].read_text())
    assert split_mix(f"{file}+probes:0.125") == [str(file), "probes:0.125"]
    assert find("probes:0.004").share == Fraction(4, 1000)


# ---- chats ---------------------------------------------------------------------------------------------------


def chat_of(tokenizer: Any, template: str, item: Item) -> Item | None:
    return _Writer(able(tokenizer, template), "tuning", chat=True).as_chat(item)


def test_a_template_that_does_not_go_on_from_turn_to_turn_writes_no_chat_of_several(tokenizer):
    for capability in ("recall", "lists", "sums"):
        item = CAPABILITIES[capability](TUNING, random.Random(0), 12)
        spaced = chat_of(tokenizer, SPACED, item)
        assert spaced
        assert [said.strip() for said in spaced.parts[1::2]] == [said.strip() for said in item.parts[1::2]]
        for template in (LAST_TURN, ONE_TURN):
            assert (chat_of(tokenizer, template, item) is None) == (len(item.turns) > 1)
            writer = _Writer(able(tokenizer, template), "tuning", chat=True)
            plain = writer.marked(capability, writer.written(capability, 12))
            assert plain.answers == len(item.parts) // 2, "written all the same"
    assert chat_of(tokenizer, CHAT.replace("m.content", "m.content | upper"), item) is None, "replies as they are"


# ---- tokenizers ----------------------------------------------------------------------------------------------


def bpe(vocabulary: list[str], merges: list[tuple[str, str]], **special: Any) -> Any:
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, **special))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.mark.parametrize(
    ("tokenizer", "parts", "of"),
    [  # all digits of an answer, whose tokens what follows makes anew: a 1 23. a
        (bpe([*"123.a", "3.", "23.", "12"], [("3", "."), ("2", "3."), ("1", "2")]), ("a", "123", ".a"),
         [None, 0, 0, None]),
        # nothing that has no token
        (bpe(["?", *"12 ab"], [], unk_token="?"), ("a", "12", "b", "1é", "a", "21"),
         [None, 0, 0, None, None, None, None, 2, 2]),
        # nor what a tokenizer drops without a sign of it
        (bpe([*"12ab"], []), ("a" * 19, "1x", "b", "21", "aa"), [*[None] * 19, None, None, 1, 1, None, None]),
        (bpe([*"12ab"], []), ("ab??", "12"), [None] * 4),
    ],
)  # fmt: skip
def test_tokens_of_an_answer_are_marked(tokenizer, parts, of):
    marked = _Writer(tokenizer, "judging").marked("recall", Item(parts))
    assert [mark and mark[1] for mark in marked.of] == of


def test_a_tokenizer_without_the_words_or_digits_has_no_probes():
    letters, proteins = bpe([*"abcdefghijklmnopqrstuvwxyz "], []), bpe([*"ACDEFGHIKLMNPQRSTVWY"], [])
    for capability in CAPABILITIES:  # digits and the line's end are dropped, words are not
        if capability in ("recall", "sums", "labels"):
            names = probe_rows(letters, rows=4, window=512, capabilities=(capability,)).names
            assert names == (("labels",) if capability == "labels" else ())
        assert probe_rows(proteins, rows=2, window=64, capabilities=(capability,)).names == ()
        assert judging_rows(proteins, rows=2, window=64, capability=capability).names == ()
    assert probe_scores.passkey(bpe([*"0123456789"], []), 64, 0.5, random.Random(0))
