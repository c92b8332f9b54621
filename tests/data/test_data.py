"""Text: documents from every kind of source, packed into exact blocks; no network is used."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from datetime import datetime
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layercut.data import blocks, chat_templates, self_sampled, sources, text_files, text_overlap
from layercut.data.blocks import PIECE, Reader, encode, load_blocks
from layercut.data.python_docs import paragraphs, python_docs, python_docstrings
from layercut.data.records import as_document
from layercut.data.self_sampled import chat_length, writes_chats
from layercut.data.sources import HubSet, documents, find, public_name, split_mix, turns, what_is_read
from layercut.errors import DataError, ModelError

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"


def make_tokenizer(*, bos: bool = True, eos: bool = True, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: a token is a byte, so that what blocks hold can be read off."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos and adds_bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    marks = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, **marks, **({"eos_token": "</s>"} if eos else {}))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for a second thread
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    yield LlamaForCausalLM(config).eval()
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    """Fifty documents; no 20 characters occur twice."""
    draw = random.Random(7)
    pages = ["".join(draw.choices("abcdefghij klmnop", k=draw.randrange(20, 90))) for _ in range(50)]
    file = tmp_path / "pages.txt"
    file.write_text("\n\n\n".join(pages))
    return file, [page.strip() for page in pages]


def write_lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def words(source, seed=None):
    return list(documents(str(source), seed))


# --- packing ---


def test_blocks_are_exact_and_in_written_order(text, tokenizer):
    file, _ = text
    blocks = load_blocks(str(file), tokenizer, tokens=100, window=16, seed=0, order="as written")
    assert blocks.tokens.shape == (7, 16)
    assert blocks.tokens.dtype == torch.int64
    pages = file.read_text().split("\n\n\n")
    stream = [i for page in pages for i in [0, *tokenizer(page, add_special_tokens=False).input_ids]]
    assert blocks.tokens.flatten().tolist() == stream[: 7 * 16]
    assert asdict(blocks.facts()) == {
        "source": "pages.txt",
        "reads": [f"file {text_files.content(file)}"],
        "origins": [f"file {text_files.content(file)}"],
        "tokens": 112,
        "window": 16,
        "documents": blocks.documents,
        "passed_over": 0,
        "fingerprint": blocks.fingerprint,
    }
    assert blocks.documents == (blocks.tokens == 0).sum()


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({}, ["<s>a", "<s>b"]),
        ({"adds_bos": False}, ["a</s>", "b</s>"]),
        ({"bos": False}, ["a</s>", "b</s>"]),
        ({"bos": False, "eos": False}, ["a", "b"]),
    ],
)
def test_documents_are_marked_off_as_the_tokenizer_does(marks, expected):
    tokenizer = make_tokenizer(**marks)
    assert [tokenizer.decode(ids) for *_, ids in encode(iter(["", "a", " \n", "b"]), tokenizer)] == expected


def test_a_mark_that_is_there_is_not_doubled():
    assert next(encode(iter(["<s>ab"]), make_tokenizer()))[-1].count(0) == 1
    assert next(encode(iter(["ab</s>"]), make_tokenizer(bos=False)))[-1].count(1) == 1


def test_skip_gives_the_next_blocks_of_the_same_stream(text, tokenizer):
    args = {"window": 16, "seed": 3}
    whole = load_blocks(str(text[0]), tokenizer, tokens=480, **args)
    first = load_blocks(str(text[0]), tokenizer, tokens=160, **args)
    rest = load_blocks(str(text[0]), tokenizer, tokens=320, skip=10, **args)
    assert torch.equal(torch.cat([first.tokens, rest.tokens]), whole.tokens)
    assert first.documents < whole.documents
    assert not {*map(tuple, first.tokens.tolist())} & {*map(tuple, rest.tokens.tolist())}


def test_the_seed_decides_the_order_and_nothing_else_does(text, tokenizer):
    def draw(seed):
        return load_blocks(str(text[0]), tokenizer, tokens=320, window=32, seed=seed)

    random.seed(1)
    first = draw(0)
    random.seed(2)
    assert torch.equal(first.tokens, draw(0).tokens)
    assert first.fingerprint == draw(0).fingerprint
    assert not torch.equal(first.tokens, draw(1).tokens)
    assert len(first.fingerprint) == 16
    changed = first.tokens.clone()
    changed[0, 0] += 1
    assert blocks.fingerprint(changed) != first.fingerprint


def test_a_mix_deals_blocks_in_turn_and_skip_still_holds(tmp_path, tokenizer):
    for letter in "xyz":
        (tmp_path / f"{letter}.txt").write_text(letter * 2000)
    mix = "+".join(str(tmp_path / f"{letter}.txt") for letter in "xyz")
    whole = load_blocks(mix, tokenizer, tokens=80, window=8, seed=0)
    assert "".join(tokenizer.decode(row[-1:]) for row in whole.tokens) == "xyzxyzxyzx"
    assert whole.documents == 3
    for skip in range(4):
        part = load_blocks(mix.replace("+", ","), tokenizer, tokens=32, window=8, seed=0, skip=skip)
        assert torch.equal(part.tokens, whole.tokens[skip : skip + 4])


def test_only_as_many_documents_are_tokenised_as_needed(tokenizer, monkeypatch):
    def endless(source, seed):
        while True:
            yield "some text"

    monkeypatch.setattr(sources.Source, "documents", endless)
    assert load_blocks("c4", tokenizer, tokens=64, window=8, seed=0).documents == 7


def test_a_long_text_is_tokenised_as_far_as_needed(tokenizer, monkeypatch):
    """Otherwise one line of 16 MB takes gigabytes and a minute."""
    asked = []

    class Counting:
        def __call__(self, text, **more):
            asked.append(len(text))
            return tokenizer(text, **more)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    assert PIECE > 1_300_000, "WikiText-2's test text is one piece, as the field has it"
    monkeypatch.setattr(blocks, "PIECE", 20_000)
    next(encode(iter(["some words " * 1_500_000]), Counting()))
    assert max(asked) <= 20_000
    short = ["ab cd ef gh", "abcdefgh", "a\nb c"]
    for text in short:
        for longest in (3, 4, 5):
            parts = [*blocks.pieces(text, longest)]
            assert "".join(parts) == text
            assert max(map(len, parts)) <= longest
    assert [*blocks.pieces("ab cd ef gh", 6)] == ["ab cd", " ef gh"], "parted before white space"


# --- text that serves two uses ---


def test_uses_of_one_text_never_share_a_row_however_it_is_named(tmp_path, tokenizer, monkeypatch):
    """Held-out rows decide whether a fold is kept."""
    draw = random.Random(3)
    pages = ["".join(draw.choices("abcdefghij klmnop", k=80)) for _ in range(60)]
    text = "\n\n\n".join(pages)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(text)
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "a.txt")
    (tmp_path / "soft.txt").symlink_to(tmp_path / "a.txt")
    write_lines(tmp_path / "lines.jsonl", *({"text": page} for page in pages))
    (tmp_path / "wrapped.txt").write_text(text.replace(" ", "\n"))
    (tmp_path / "b.txt").write_text("\n\n\n".join(page[::-1] for page in pages))
    table(tmp_path / "table.parquet", pages)
    monkeypatch.chdir(tmp_path)
    for name in ["a.txt", "./a.txt", "copy.txt", "hard.txt", "soft.txt", "lines.jsonl", "wrapped.txt", "table.parquet",
                 "a.txt+b.txt", "b.txt,copy.txt"]:  # fmt: skip
        reader = Reader(tokenizer, seed=0)
        args = {"window": 16}
        first = reader.draw("calibration", "a.txt", tokens=1000, **args)
        judged = reader.draw("heldout", name, tokens=400, **args)
        second = reader.draw("tuning", name, tokens=800, **args)
        rows = [{*map(tuple, blocks.tokens.tolist())} for blocks in (first, judged, second)]
        assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows)), name
        others = first.keys & (judged.keys | second.keys)
        assert len(others) <= 1, "the document in which one use stopped and the next goes on"
    reader = Reader(tokenizer, seed=0)
    reader.draw("calibration", "a.txt", tokens=3000, **args)
    with pytest.raises(DataError, match=r"beside \d+ documents that other text of this run holds as well"):
        reader.draw("heldout", "lines.jsonl", tokens=2000, **args)


def table(file, pages, **more):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pages, "id": range(len(pages))}), file, **more)
    return file


def test_a_repeated_document_serves_one_use(tmp_path, tokenizer):
    pages = [f"page {i} of many" for i in range(20)]
    write_lines(tmp_path / "twice.jsonl", *({"text": page} for page in [*pages, *pages]))
    reader = Reader(tokenizer, seed=0)
    first = reader.draw("evaluation", str(tmp_path / "twice.jsonl"), tokens=160, window=16, order="as written")
    rest = reader.draw("calibration", str(tmp_path / "twice.jsonl"), tokens=160, window=16)
    assert first.documents == len(first.keys)
    assert not first.keys & rest.keys
    assert rest.passed_over > 0
    assert rest.facts().passed_over == rest.passed_over


def test_self_is_other_text_where_it_is_reported_on(llama, tokenizer):
    reader = Reader(tokenizer, seed=0, model=llama)
    reported = reader.draw("evaluation", "self", tokens=64, window=16, order="as written")
    used = reader.draw("calibration", "self", tokens=64, window=16)
    judged = reader.draw("heldout", "self", tokens=64, window=16)
    assert not reported.keys & used.keys
    assert not used.keys & judged.keys
    assert torch.equal(used.tokens, load_blocks("self", tokenizer, tokens=64, window=16, seed=0, model=llama).tokens)


def test_what_is_read_has_one_name(tmp_path, monkeypatch):
    def reads(source, **more):
        return {*what_is_read(source, **more)}

    assert reads("wikitext2:test") == reads("wikitext2", reported=True)
    assert reads("wikitext2") == reads("Salesforce/wikitext@wikitext-2-raw-v1:train")
    assert reads("c4") == reads("c4:train") == reads("allenai/C4@en") == reads("allenai/c4@en:train:text")
    assert not reads("c4") & reads("c4", reported=True)
    assert reads("owner/name") == reads("owner/name@default:train:body")
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("some text")
    (tmp_path / "c.txt").write_text("some more")
    monkeypatch.chdir(tmp_path)
    assert reads("a.txt") == reads("./a.txt") == reads(str(tmp_path / "b.txt"))
    assert reads("*.txt") == reads("a.txt+c.txt") != reads("a.txt")
    before = reads("a.txt")
    (tmp_path / "a.txt").write_text("same size")
    assert reads("a.txt") != before, "an edited file is other text"


def test_names_that_are_published_hold_no_path(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for source, name in {
        f"{tmp_path}/mine.jsonl:body": "mine.jsonl:body", f"{tmp_path}/*.jsonl": "*.jsonl", "../x/a.txt": "a.txt",
        "~/notes/b.txt+c4": "b.txt+c4", "owner/name:test": "owner/name:test", "wikitext2": "wikitext2", "self": "self",
    }.items():  # fmt: skip
        assert public_name(source) == name


def test_passages_tell_the_same_text_parted_otherwise():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(5000, (40, 256), generator=draw) for _ in range(2))
    assert text_overlap.shared([a], [b]) == 0.0
    assert text_overlap.shared([a], [a]) == 1.0
    shifted = a.flatten()[100 : 100 + 30 * 300].view(30, 300)
    runs = a.numel() - text_overlap.PASSAGE + 1
    assert text_overlap.shared([a], [b, shifted]) == pytest.approx((9000 - text_overlap.PASSAGE + 1) / runs)
    assert text_overlap.shared([a[:, :60].clone()], [a]) < 0.01, "rows that do not follow each other"
    same = torch.zeros(4, 256, dtype=torch.long)
    assert text_overlap.shared([torch.cat([a, same])], [same]) < 0.01, "a formula counts once"
    assert text_overlap.shared([a[:1, :63]], [a]) == 0.0
    head = torch.arange(9000, 9200)
    files = [torch.cat([each for row in rows for each in (head, row)])[None] for rows in (a[:6], b[:6])]
    assert text_overlap.shared(*([each] for each in files)) < 0.02, "a head that the files of both have"
    by_hand = {tuple(a.flatten()[i : i + text_overlap.PASSAGE].tolist()) for i in range(runs)}
    assert len({*text_overlap.runs(a.flatten().numpy(), text_overlap.PASSAGE)}) == len(by_hand)


def test_words_tell_shuffled_records_and_let_ordinary_text_pass(tokenizer):
    draw = random.Random(0)
    lexicon = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(3000)]
    licence = " ".join(draw.choices(lexicon, k=60))

    def rows(documents):
        return torch.tensor([i for each in documents for i in [0, *tokenizer.encode(each, add_special_tokens=False)]])[
            None
        ]

    def prose(count):
        return [" ".join(draw.choices(lexicon, k=80)) for _ in range(count)]

    def share(judged, others):
        return text_overlap.shared_words([rows(judged)], [rows(others)], tokenizer)

    mine, others = prose(20), prose(20)
    for length in (6, 10, 16):
        records = [" ".join(each.split()[i : i + length]) for each in mine for i in range(0, 80, length)]
        draw.shuffle(records)
        assert share(records, others) == 0
        assert share(records, [*others, *mine[:8]]) == pytest.approx(0.4, abs=0.02)
        assert share([each.upper() for each in records], mine[:8]) == pytest.approx(0.4, abs=0.02)
        if length > text_overlap.RUN:
            assert share(mine, [*others, *records[: len(records) // 2]]) == pytest.approx(0.5, abs=0.02)
    for count in (2, 20):
        with_head = [[f"{licence} {each}" for each in texts[:count]] for texts in (mine, others)]
        assert share(*with_head) < 0.01, "code files with the same licence"
    assert share([*mine, "it is the same to us"], [*others, "to him it is the same to us all"]) < 0.01
    assert share([], mine) == share(mine, []) == 0


# --- records and files ---


def test_records_are_read_by_their_fields(tmp_path):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "ho"}]},
    ]
    file = write_lines(
        tmp_path / "r.jsonl",
        {"text": "plain"},
        {"page": "of a wiki"},
        {"messages": chat},
        {"instruction": "Add", "input": "1 1", "output": "2", "text": "not this"},
        {"text": None},
    )
    found = [blocks.render(document) for document in words(file)]
    assert found == ["plain", "of a wiki", "hi\n\nho", "Add\n\n1 1\n\n2", ""]
    assert words(write_lines(tmp_path / "c.jsonl", {"a": "one", "b": "two"}) + ":b") == ["two"]


def test_json_arrays_and_windows_line_ends(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert words(tmp_path / "list.json") == ["a", "b"]
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\nline\r\n\r\n\r\ntwo")
    assert words(tmp_path / "dos.txt") == ["one\nline", "two"]


def test_globs_and_shuffling_reach_across_files(tmp_path, text):
    for i in range(5):
        write_lines(tmp_path / f"{i}.jsonl", {"text": f"{i}a"}, {"text": f"{i}b"})
    pattern = str(tmp_path / "*.jsonl")
    written = [f"{i}{letter}" for i in range(5) for letter in "ab"]
    assert words(pattern) == written
    assert words(pattern, seed=0) != written
    assert sorted(words(pattern, seed=0)) == written
    assert words(pattern + ":text") == written


def test_parquet(tmp_path, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise AssertionError("a file of this machine is read in place: nothing is copied, no server asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    names = [f"page {i}" for i in range(20)]
    table(tmp_path / "a.parquet", names, row_group_size=3)
    assert words(tmp_path / "a.parquet") == names
    shuffled = words(tmp_path / "a.parquet", seed=0)
    assert shuffled != names
    assert sorted(shuffled) == sorted(names)
    assert abs(names.index(shuffled[0]) - names.index(shuffled[1])) > 3, "rows of all groups are shuffled together"
    monkeypatch.setattr(text_files, "SHUFFLED_TOGETHER", 100)
    assert sorted(words(tmp_path / "a.parquet", seed=0)) == sorted(names)
    assert words(f"{tmp_path}/*.parquet:text") == names
    with pytest.raises(DataError, match="no field 'body'; its fields are text, id"):
        words(f"{tmp_path / 'a.parquet'}:body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        words(tmp_path / "b.parquet")


def test_chat_template(tmp_path):
    tokenizer = make_tokenizer(adds_bos=False)
    rows = [{"instruction": "Add", "input": "", "output": "2"}] * 9
    file = write_lines(tmp_path / "c.jsonl", *rows)
    with pytest.raises(DataError, match="no chat template"):
        load_blocks(file, tokenizer, tokens=8, window=8, seed=0, chat_template=True)
    tokenizer.chat_template = CHAT
    blocks = load_blocks(file, tokenizer, tokens=30, window=30, seed=0, chat_template=True)
    assert tokenizer.decode(blocks.tokens[0]).startswith("<|user|>Add</s><|assistant|>2</s><|u")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles user, assistant: roles must alternate"):
        load_blocks(file, tokenizer, tokens=8, window=8, seed=0, chat_template=True)


def test_text_by_a_template_that_writes_the_date_is_the_same_on_every_day():
    dated = "{{ strftime_now('%d %B %Y %H:%M') }} {{ messages[0].content }}"
    messages = [{"role": "user", "content": "hi"}]
    year, rendered = str(datetime.now().year), partial(chat_templates.render_template, dated, messages, {})
    assert rendered() == "26 July 2024 00:00 hi"
    assert year in rendered(today=True), "a person who chats has the day"
    assert rendered() == "26 July 2024 00:00 hi"


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"


def test_a_chat_template_that_never_ends_or_fills_the_memory_is_ended(monkeypatch):
    tokenizer, chat = make_tokenizer(), [{"role": "user", "content": "hi"}]
    monkeypatch.setattr(chat_templates, "LONGEST", 0.5)
    tokenizer.chat_template = ENDLESS
    with pytest.raises(ModelError, match=r"did not end in 0\.5 seconds") as caught:
        chat_templates.render_chat(tokenizer, chat)
    assert "--chat-template" in caught.value.hint
    monkeypatch.setattr(chat_templates, "LONGEST", 60)
    for template in (GROWING, "{{ 'x' * 10**10 }}", "{{ 'x'|center(10**10) }}"):
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match="it takes more than"):
            chat_templates.render_chat(tokenizer, chat, prompt=True)
    tokenizer.chat_template = CHAT
    assert chat_templates.render_chat(tokenizer, chat) == tokenizer.apply_chat_template(chat, tokenize=False)


# --- errors ---


def bad_sources(tmp):
    write_lines(tmp / "fields.jsonl", {"question": "q", "answer": "a"})
    (tmp / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    write_lines(tmp / "list.jsonl", [1, 2])
    write_lines(tmp / "number.jsonl", {"text": 3})
    (tmp / "empty.txt").write_text("")
    (tmp / "blank.txt").write_text(" \n\n\n\n ")
    (tmp / "latin.txt").write_bytes("é".encode("latin-1") * 9)
    (tmp / "short.txt").write_text("short")
    (tmp / "doc.pdf").write_text("%PDF")
    (tmp / "half.json").write_text('[{"text": "a"}')
    (tmp / "deep.jsonl").write_text("[" * 200_000 + "]" * 200_000)
    (tmp / "deep.json").write_text("[" * 200_000 + "]" * 200_000)
    (tmp / "huge.jsonl").write_text('{"text": ' + "9" * 5_000 + "}")
    (tmp / "huge.json").write_text("[" + "9" * 5_000 + "]")
    (tmp / "half_pair.jsonl").write_text('{"text": "a \\ud800 b"}')
    (tmp / "half_pair_key.jsonl").write_text('{"\\ud800": "a"}')
    write_lines(tmp / "many.jsonl", {f"f{i}": i for i in range(1000)})
    write_lines(tmp / "parts.jsonl", {"messages": [{"role": "user", "content": [3]}]})
    write_lines(tmp / "turns.jsonl", {"messages": ["a", "b"]})
    write_lines(tmp / "role.jsonl", {"messages": [{"role": {"a": 1}, "content": "x"}]})
    write_lines(tmp / "part_text.jsonl", {"messages": [{"role": "user", "content": [{"text": 7}]}]})
    write_lines(tmp / "object.jsonl", {"messages": [{"role": "user", "content": 7}]})
    write_lines(tmp / "pair_in_chat.jsonl", {"instruction": "a\ud800", "output": "b"})
    return [
        ("wikitex", "no source of text is called 'wikitex'; there are wikitext2, c4", "owner/name:split"),
        ("", "names an empty source", "--data"),
        ("python-docs+", "names an empty source", "--data"),
        ("c4,c4", "names a source twice", "once"),
        (f"{tmp}/none.txt", "no file", "--data self"),
        ("none.jsonl:text", "no file 'none.jsonl:text'", "--data self"),
        (f"{tmp}/none*.txt", "no file matches", "quotes"),
        (f"{tmp}", "is a folder", "*.jsonl"),
        (f"{tmp}/doc.pdf", "is a .pdf; files of text are .txt, .jsonl, .json, .parquet", "convert"),
        (f"{tmp}/fields.jsonl", "line 1 has no field .*; its fields are question, answer", "FILE:FIELD"),
        (f"{tmp}/fields.jsonl:text", "no field 'text'; its fields are question, answer", "FILE:FIELD"),
        (f"{tmp}/broken.jsonl", "line 2 is not JSON", "one object"),
        (f"{tmp}/list.jsonl", "line 1 holds a list", "text"),
        (f"{tmp}/number.jsonl", "neither a text nor chat messages, but a int", "role"),
        (f"{tmp}/half.json", "is not JSON", "check"),
        (f"{tmp}/empty.txt", "holds no text", "--data self"),
        (f"{tmp}/blank.txt", "holds no text", "--data self"),
        (f"{tmp}/latin.txt", r"not UTF-8 text \(byte 0\)", "iconv"),
        (f"{tmp}/short.txt", "holds 6 tokens; 1,000 are needed", "--tokens"),
        ("self", "none is loaded", "file"),
        (f"{tmp}/deep.jsonl", "line 1 cannot be read as JSON: nests too deep", "one object"),
        (f"{tmp}/deep.json", "deep.json cannot be read as JSON: nests too deep", "check"),
        (f"{tmp}/huge.jsonl", "line 1 cannot be read as JSON: .*digits", "one object"),
        (f"{tmp}/huge.json", "huge.json cannot be read as JSON: .*digits", "check"),
        (f"{tmp}/half_pair.jsonl", r"line 1 holds half of a surrogate pair \(\\ud800\)", "UTF-8"),
        (f"{tmp}/half_pair_key.jsonl", r"its fields are \\ud800", "FILE:FIELD"),
        (f"{tmp}/pair_in_chat.jsonl", "half of a surrogate pair", "UTF-8"),
        (f"{tmp}/many.jsonl", "its fields are f0, .*f11, …$", "FILE:FIELD"),
        (f"{tmp}/parts.jsonl", "neither a text nor chat messages", "role"),
        (f"{tmp}/turns.jsonl", "neither a text nor chat messages", "role"),
        (f"{tmp}/role.jsonl", "neither a text nor chat messages", "role"),
        (f"{tmp}/part_text.jsonl", "neither a text nor chat messages", "role"),
        (f"{tmp}/object.jsonl", "neither a text nor chat messages", "role"),
    ]


def test_every_bad_source_says_what_is_wrong_and_what_to_do(tmp_path, tokenizer):
    for source, message, hint in bad_sources(tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            load_blocks(source, tokenizer, tokens=1000, window=100, seed=0)
        assert hint in caught.value.hint, source
    with pytest.raises(DataError, match="12 are needed, of which 8 are passed over"):
        load_blocks(f"{tmp_path}/short.txt", tokenizer, tokens=4, window=4, seed=0, skip=2)
    with pytest.raises(DataError, match="make no block"):
        load_blocks(f"{tmp_path}/short.txt", tokenizer, tokens=0, window=4, seed=0)


# --- the Hub, as far as it can be known without one ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wikitext2", HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", False, True)),
        ("wikitext2:train", HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", False, True)),
        ("c4:validation", HubSet("allenai/c4", "en", "validation", "text")),
        ("owner/name", HubSet("owner/name", None, "train", "text")),
        ("owner/name:test:body", HubSet("owner/name", None, "test", "body")),
        ("owner/name@de:test", HubSet("owner/name", "de", "test", "text")),
    ],
)
def test_names_of_hub_sets(name, expected, monkeypatch):
    monkeypatch.setattr(sources, "from_hub", lambda dataset, seed: iter([dataset]))
    assert list(documents(name, 0)) == [expected]


def test_reported_text_is_of_the_split_that_the_field_reports_on():
    splits = {
        name: (find(name).hub.split, find(name, reported=True).hub.split)
        for name in ("wikitext2", "c4", "alpaca", "c4:train", "owner/name")
    }
    assert splits == {
        "wikitext2": ("train", "test"), "c4": ("train", "validation"), "alpaca": ("train", "train"),
        "c4:train": ("train", "train"), "owner/name": ("train", "train"),
    }  # fmt: skip


def test_an_unreachable_hub_is_said_at_once(tokenizer, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    for name in ("c4", "owner/name:train"):
        with pytest.raises(DataError, match="the Hub cannot be reached") as caught:
            load_blocks(name, tokenizer, tokens=8, window=8, seed=0)
        assert "--data self" in caught.value.hint


def test_wiki_lines_are_one_text_as_written_and_articles_when_shuffled(monkeypatch):
    lines = [" = One = \n", "", " a \n", " = = Part = = \n", " = Two = \n", " b \n"]
    monkeypatch.setattr(sources, "_hub_rows", lambda dataset, seed: ({"text": line} for line in lines))
    assert words("wikitext2") == ["\n\n".join(lines)]
    assert sorted(words("wikitext2", seed=0)) == ["\n\n".join(lines[:4]), "\n\n".join(lines[4:])]


def test_hub_rows_are_streamed_and_bad_splits_told(monkeypatch):
    import datasets

    asked = {}

    def load(path, config, *, split, streaming):
        asked.update(path=path, config=config, split=split, streaming=streaming)
        if split == "nope":
            raise ValueError("Bad split: nope. Available splits: ['train']")
        return datasets.Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]}).to_iterable_dataset()

    monkeypatch.setattr(sources, "_check_reachable", lambda dataset: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(words("c4", seed=0)) == ["a", "b"]
    assert asked == {"path": "allenai/c4", "config": "en", "split": "train", "streaming": True}
    with pytest.raises(DataError, match="Bad split: nope"):
        words("owner/name:nope")
    with pytest.raises(DataError, match="owner/name has no field 'body'; its fields are text, id"):
        words("owner/name:train:body")


# --- the documentation inside Python ---


def test_python_texts_are_large_and_share_no_paragraph():
    def keys(texts):
        return [" ".join(part.split()) for text in texts for part in paragraphs(text)]

    topics, docstrings = keys(python_docs(0)), keys(python_docstrings(0))
    assert len({*topics}) == len(topics)
    assert len({*docstrings}) == len(docstrings)
    assert not {*topics} & {*docstrings}
    assert sum(map(len, topics)) > 300_000
    assert sum(map(len, docstrings)) > 1_000_000
    assert [*python_docs(0)] == [*python_docs(0)] != [*python_docs(1)]


# --- self ---


def test_self_is_seeded_and_leaves_no_trace(llama, tokenizer, capsys):
    own, state = llama.generation_config, torch.get_rng_state()
    args = {"tokens": 40 * 12, "window": 12, "model": llama}
    blocks = load_blocks("self", tokenizer, seed=0, **args)
    assert llama.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)
    assert blocks.tokens.shape == (40, 12)
    assert blocks.documents == 40
    assert (blocks.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert not blocks.tokens.is_inference()
    assert torch.equal(blocks.tokens, load_blocks("self", tokenizer, seed=0, **args).tokens)
    assert not torch.equal(blocks.tokens, load_blocks("self", tokenizer, seed=1, **args).tokens)
    later = load_blocks("self", tokenizer, seed=0, skip=40, **args).tokens
    assert not {*map(tuple, later.tolist())} & {*map(tuple, blocks.tokens.tolist())}
    assert capsys.readouterr().out == ""


def test_self_samples_the_models_plain_distribution(llama, tokenizer):
    llama.generation_config.top_k, llama.generation_config.repetition_penalty = 2, 9.0
    blocks = load_blocks("self", tokenizer, tokens=4096 * 2, window=2, seed=0, model=llama)
    with torch.inference_mode():
        p = llama(torch.tensor([[0]])).logits[0, -1].softmax(-1)  # [V]
    counts = torch.bincount(blocks.tokens[:, 1], minlength=258) / 4096
    assert (counts - p).abs().max() < 0.01
    assert (counts > 0).float().mean() > 0.95


def test_self_goes_on_past_eos(llama, tokenizer):
    blocks = load_blocks("self", tokenizer, tokens=64 * 64, window=64, seed=0, model=llama)
    row = next(row for row in blocks.tokens if (row[:-2] == 1).any())
    assert (row[row.tolist().index(1) + 1 :] != 1).any()


def test_self_without_bos_starts_from_random_plain_tokens(llama):
    tokenizer = make_tokenizer(bos=False)
    blocks = load_blocks("self", tokenizer, tokens=64 * 4, window=4, seed=0, model=llama)
    assert len({*blocks.tokens[:, 0].tolist()}) > 20
    assert not (blocks.tokens[:, 0] == tokenizer.eos_token_id).any()


def test_self_as_a_chat_opens_with_the_template(llama):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    blocks = load_blocks("self", tokenizer, tokens=60, window=20, seed=0, model=llama, chat_template=True)
    opening = tokenizer("<|user|>", add_special_tokens=False).input_ids
    assert blocks.tokens[:, : len(opening)].tolist() == [opening] * 3
    with pytest.raises(DataError, match="opens with 8 tokens; the window has 8"):
        load_blocks("self", tokenizer, tokens=60, window=8, seed=0, model=llama, chat_template=True)


def test_self_in_a_mix(llama, tokenizer, text):
    blocks = load_blocks(f"self+{text[0]}", tokenizer, tokens=64, window=16, seed=0, model=llama)
    assert blocks.tokens.shape == (4, 16)
    assert blocks.tokens[0, 0] == blocks.tokens[2, 0] == 0


def test_a_message_without_content_is_empty():
    record = {"messages": [{"role": "assistant", "content": None}]}
    assert as_document(record, None, "here") == [{"role": "assistant", "content": ""}]


# --- chats ---


def test_chats_are_written_from_the_users_first_word_and_laid_end_to_end(llama):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    opening = tokenizer("<|user|>", add_special_tokens=False).input_ids
    blocks = load_blocks("chats", tokenizer, tokens=2 * 512, window=512, seed=0, model=llama)
    chats = blocks.tokens.view(4, 256)
    assert chats[:, : len(opening)].tolist() == [opening] * 4
    assert len({*map(tuple, chats.tolist())}) == 4
    assert blocks.marks
    assert blocks.marks.lengths.tolist() == [256, 256]
    assert not blocks.marks.answers.any()
    shorter = load_blocks("chats", tokenizer, tokens=4 * 256, window=256, seed=0, model=llama).tokens
    assert not {*map(tuple, chats.tolist())} & {*map(tuple, shorter.tolist())}


def test_chats_are_seeded_and_no_two_uses_have_the_same(llama):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    rows = []
    for seed in (0, 0, 1):
        reader = Reader(tokenizer, seed=seed, model=llama)
        for use, order in (("heldout", "shuffled"), ("tuning", "shuffled"), ("evaluation", "as written")):
            rows.append(reader.draw(use, "chats", tokens=3 * 32, window=32, order=order).tokens)
    assert all(map(torch.equal, rows[:3], rows[3:6]))
    assert len({tuple(row.tolist()) for draw in (*rows[:3], *rows[6:]) for row in draw}) == 18


def test_chats_are_cooler_than_the_models_plain_distribution(llama):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    opening = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_sampled, "chat_prefix", lambda *_: opening)
        blocks = load_blocks("chats", tokenizer, tokens=4096 * 2, window=2, seed=0, model=llama)
    with torch.inference_mode():
        logits = llama(torch.tensor([opening])).logits[0, -1]  # [V]
    counts = torch.bincount(blocks.tokens[:, 1], minlength=258) / 4096
    cool, plain = ((logits / heat).softmax(-1) for heat in (self_sampled.CHAT_HEAT, 1.0))
    assert (counts - cool).abs().sum() < (counts - plain).abs().sum()


@pytest.mark.parametrize(("window", "length"), [(8, 8), (256, 256), (300, 300), (512, 256), (1024, 256), (1000, 500)])
def test_a_chat_is_as_long_as_a_short_row_of_tests(window, length):
    assert chat_length(window) == length


def test_chats_are_written_in_smaller_batches_where_memory_runs_out(llama, monkeypatch):
    tokenizer, generate, batches = make_tokenizer(), llama.generate, list[int]()
    tokenizer.chat_template = CHAT

    def short_of_memory(prompt, **how):
        batches.append(len(prompt))
        if len(prompt) > 3:
            raise MemoryError
        return generate(prompt, **how)

    monkeypatch.setattr(llama, "generate", short_of_memory)
    chats = load_blocks("chats", tokenizer, tokens=7 * 32, window=32, seed=0, model=llama).tokens
    assert batches == [7, 3, 3, 1]
    assert len({*map(tuple, chats.tolist())}) == 7
    monkeypatch.setattr(llama, "generate", lambda *_, **__: pytest.fail("no memory error"))
    with pytest.raises(pytest.fail.Exception):
        load_blocks("chats", tokenizer, tokens=7 * 32, window=32, seed=0, model=llama)


def test_a_blank_before_the_users_words_is_their_first_tokens():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    assert self_sampled.chat_prefix(tokenizer, 64) == tokenizer("[INST]", add_special_tokens=False).input_ids
    tokenizer.chat_template = "{% for m in messages %}User:\n{{ m.content }}{% endfor %}"
    assert self_sampled.chat_prefix(tokenizer, 64) == tokenizer("User:\n", add_special_tokens=False).input_ids


def test_who_can_write_chats():
    tokenizer = make_tokenizer()
    assert not writes_chats(tokenizer, 64)
    tokenizer.chat_template = CHAT
    assert writes_chats(tokenizer, 64)
    assert not writes_chats(tokenizer, 12)  # the template alone has eight tokens
    tokenizer.chat_template = "nothing of what is said"
    assert not writes_chats(tokenizer, 64)
    with pytest.raises(DataError, match="needs a chat template"):
        load_blocks("chats", make_tokenizer(), tokens=64, window=64, seed=0, model=object())


def test_a_file_with_a_comma_in_its_name_has_shares_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.txt").write_text("words")
    assert split_mix("a,b.txt+chats:0.1+probes:0.1") == ["a,b.txt", "chats:0.1", "probes:0.1"]
    assert public_name("a,b.txt+chats:0.1+probes:0.1") == "a,b.txt+chats:0.1+probes:0.1"
    assert turns([find(part) for part in split_mix("a,b.txt+chats:0.25+probes:0.25")]).count(0) == 2
