"""Text: documents from every kind of source, packed into exact blocks; no network is used."""

from __future__ import annotations

import json
import random
import re
from datetime import datetime
from itertools import pairwise

import pytest
import torch

from bytes_tokenizer import CHAT, make_tokenizer
from layercut.data import blocks, chat_templates, documents, text_overlap
from layercut.data.blocks import Reader, TextStream, fingerprint, load_blocks
from layercut.data.documents import HubSet, as_document, python_docs, python_docstrings
from layercut.data.sources import find, public_name, split_mix, turns
from layercut.errors import DataError, ModelError

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def text(tmp_path):
    """Fifty documents; no 20 characters occur twice."""
    draw = random.Random(7)
    pages = ["".join(draw.choices("abcdefghij klmnop", k=draw.randrange(20, 90))) for _ in range(50)]
    file = tmp_path / "pages.txt"
    file.write_text("\n\n\n".join(pages))
    return file


def write_lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def table(file, pages, **more):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pages, "id": range(len(pages))}), file, **more)


def read(source, seed=None):
    return list(find(str(source), reported=seed is None).documents(seed))


def rows_of(*tokens):
    return {row for each in tokens for row in map(tuple, each.tolist())}


# --- packing ---


def test_blocks_are_exact_and_in_written_order(text, tokenizer):
    found = load_blocks(str(text), tokenizer, tokens=100, window=16, seed=0, order="as written")
    pages = text.read_text().split("\n\n\n")
    stream = [i for page in pages for i in [0, *tokenizer(page, add_special_tokens=False).input_ids]]
    assert found.tokens.flatten().tolist() == stream[: 7 * 16]
    reads = [f"file {documents.content(text)}"]
    assert vars(found.facts) == {
        "source": "pages.txt", "reads": reads, "origins": reads, "tokens": 112, "window": 16, "passed_over": 0,
        "documents": (found.tokens == 0).sum(), "fingerprint": fingerprint(found.tokens),
        "passes": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({}, ["<s>a", "<s>b"]), ({"adds_bos": False}, ["a</s>", "b</s>"]), ({"bos": False}, ["a</s>", "b</s>"]),
        ({"bos": False, "eos": False}, ["a", "b"]),
    ],
)  # fmt: skip
def test_documents_are_marked_off_as_the_tokenizer_does(marks, expected):
    tokenizer = make_tokenizer(**marks)
    stream = TextStream("text", iter(()), tokenizer, False)
    for texts in (["", "a", " \n", "b"], expected):  # a mark that is there is not doubled
        assert [tokenizer.decode(ids) for *_, ids in stream.encoded(iter(texts))] == expected


def test_skip_and_seed_decide_the_stream_and_nothing_else_does(text, tmp_path, tokenizer):
    def draw(tokens, seed=3, **more):
        return load_blocks(str(text), tokenizer, tokens=tokens, window=16, seed=seed, **more).tokens

    random.seed(1)
    whole = draw(480)
    random.seed(2)
    assert torch.equal(torch.cat([draw(160), draw(320, skip=10)]), whole)
    assert not rows_of(whole[:10]) & rows_of(whole[10:])
    assert not torch.equal(whole, draw(480, seed=4))
    changed = whole.clone()
    changed[0, 0] += 1
    assert fingerprint(changed) != fingerprint(whole)
    for letter in "xyz":  # of a mix in turn
        (tmp_path / f"{letter}.txt").write_text(letter * 2000)
    mix = "+".join(str(tmp_path / f"{letter}.txt") for letter in "xyz")
    whole = load_blocks(mix, tokenizer, tokens=80, window=8, seed=0)
    assert "".join(tokenizer.decode(row[-1:]) for row in whole.tokens) == "xyzxyzxyzx"
    assert whole.facts.documents == 3
    for skip in range(4):
        part = load_blocks(mix.replace("+", ","), tokenizer, tokens=32, window=8, seed=0, skip=skip)
        assert torch.equal(part.tokens, whole.tokens[skip : skip + 4])


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
        first = reader.draw("calibration", "a.txt", tokens=1000, window=16)
        judged = reader.draw("heldout", name, tokens=400, window=16)
        second = reader.draw("tuning", name, tokens=800, window=16)
        drawn = [each.tokens for each in (first, judged, second)]
        assert len(rows_of(*drawn)) == sum(map(len, drawn)), name
        others = first.keys & (judged.keys | second.keys)
        assert len(others) <= 1, "the document in which one use stopped and the next goes on"
    reader = Reader(tokenizer, seed=0)
    reader.draw("calibration", "a.txt", tokens=3000, window=16)
    with pytest.raises(DataError, match=r"beside \d+ documents that other text of this run holds as well"):
        reader.draw("heldout", "lines.jsonl", tokens=2000, window=16)
    pages, reader = [{"text": f"page {i} of many"} for i in range(20)], Reader(tokenizer, seed=0)
    twice = write_lines(tmp_path / "twice.jsonl", *pages, *pages)
    first = reader.draw("evaluation", twice, tokens=160, window=16, order="as written")
    rest = reader.draw("calibration", twice, tokens=160, window=16)
    assert not first.keys & rest.keys, "a repeated document serves one use"
    assert rest.facts.passed_over > 0


def test_names_that_are_published_hold_no_path_and_a_file_with_a_comma_has_shares(tmp_path, monkeypatch):
    write_lines(tmp_path / "mine.jsonl", {})
    monkeypatch.chdir(tmp_path)
    for source, name in {
        f"{tmp_path}/mine.jsonl:body": "mine.jsonl:body", f"{tmp_path}/*.jsonl": "*.jsonl", "../x/a.txt": "a.txt",
        "~/notes/b.txt+c4": "b.txt+c4", "owner/name:test": "owner/name:test", "wikitext2": "wikitext2", "self": "self",
    }.items():  # fmt: skip
        assert public_name(source) == name
    (tmp_path / "a,b.txt").write_text("words")
    mix = "a,b.txt+chats:0.25+probes:0.25"
    assert split_mix(mix) == mix.split("+")
    assert public_name(mix) == mix
    assert turns([find(part) for part in split_mix(mix)]).count(0) == 2
    assert turns([find("python-docs"), find("python-docstrings")]) == (0, 1)
    for share in ("0", "1", "much"):
        with pytest.raises(DataError, match="is not between 0 and 1"):
            find(f"probes:{share}")


def test_passages_tell_the_same_text_parted_otherwise():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(5000, (40, 256), generator=draw) for _ in range(2))
    assert text_overlap.shared([a], [b]) == text_overlap.shared([a[:1, :63]], [a]) == 0.0
    assert text_overlap.shared([a], [a]) == 1.0
    shifted = a.flatten()[100 : 100 + 30 * 300].view(30, 300)
    runs = a.numel() - text_overlap.PASSAGE + 1
    assert text_overlap.shared([a], [b, shifted]) == pytest.approx((9000 - text_overlap.PASSAGE + 1) / runs)
    assert text_overlap.shared([a[:, :60].clone()], [a]) < 0.01, "rows that do not follow each other"
    same = torch.zeros(4, 256, dtype=torch.long)
    assert text_overlap.shared([torch.cat([a, same])], [same]) < 0.01, "a formula counts once"
    head = torch.arange(9000, 9200)
    files = [torch.cat([each for row in rows for each in (head, row)])[None] for rows in (a[:6], b[:6])]
    assert text_overlap.shared(*([each] for each in files)) < 0.02, "a head that the files of both have"


def test_words_tell_shuffled_records_and_let_ordinary_text_pass(tokenizer):
    draw = random.Random(0)
    lexicon = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(3000)]
    licence = " ".join(draw.choices(lexicon, k=60))
    mine, others = ([" ".join(draw.choices(lexicon, k=80)) for _ in range(20)] for _ in range(2))

    def share(*texts):
        encoded = [[[0, *tokenizer(each, add_special_tokens=False).input_ids] for each in text] for text in texts]
        ids = ([i for each in text for i in each] for text in encoded)
        return text_overlap.shared_words(*([torch.tensor(each, dtype=torch.int64)[None]] for each in ids), tokenizer)

    for length in (6, 10, 16):  # shorter than a run of 13 words, and longer
        records = [" ".join(each.split()[i : i + length]) for each in mine for i in range(0, 80, length)]
        draw.shuffle(records)
        assert share(records, others) == 0
        assert share(records, [*others, *mine[:8]]) == pytest.approx(0.4, abs=0.02)
        assert share([each.upper() for each in records], mine[:8]) == pytest.approx(0.4, abs=0.02)
    assert share(mine, [*others, *records[: len(records) // 2]]) == pytest.approx(0.5, abs=0.02)
    for count in (2, 20):
        with_head = [[f"{licence} {each}" for each in texts[:count]] for texts in (mine, others)]
        assert share(*with_head) < 0.01, "code files with the same licence"
    assert share([*mine, "it is the same to us"], [*others, "to him it is the same to us all"]) < 0.01
    assert share([], mine) == share(mine, []) == 0


# --- records and files ---


def test_records_are_read_by_their_fields_and_globs_reach_across_files(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]
    records = [
        {"text": "plain"}, {"page": "of a wiki"}, {"messages": chat}, {"text": None},
        {"instruction": "Add", "input": "1 1", "output": "2", "text": "not this"},
    ]  # fmt: skip
    found = [blocks.render(document) for document in read(write_lines(tmp_path / "r.json", *records))]
    assert found == ["plain", "of a wiki", "hi\n\nho", "", "Add\n\n1 1\n\n2"]
    assert read(write_lines(tmp_path / "c.json", {"a": "one", "b": "two"}) + ":b") == ["two"]
    empty = as_document({"messages": [{"role": "assistant", "content": None}]}, None, "here")
    assert empty == [{"role": "assistant", "content": ""}]
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert read(tmp_path / "list.json") == ["a", "b"]
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\nline\r\n\r\n\r\ntwo")
    assert read(tmp_path / "dos.txt") == ["one\nline", "two"]
    for i in range(5):
        write_lines(tmp_path / f"{i}.jsonl", {"text": f"{i}a"}, {"text": f"{i}b"})
    pattern, written = str(tmp_path / "*.jsonl"), [f"{i}{letter}" for i in range(5) for letter in "ab"]
    assert read(pattern) == read(pattern + ":text") == written
    assert read(pattern, seed=0) != written
    assert sorted(read(pattern, seed=0)) == written


def test_parquet(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("files are read in place"))
    names = [f"page {i}" for i in range(20)]
    table(tmp_path / "a.parquet", names, row_group_size=3)
    assert read(tmp_path / "a.parquet") == read(f"{tmp_path}/*.parquet:text") == names
    shuffled = read(tmp_path / "a.parquet", seed=0)
    assert sorted(shuffled) == sorted(names)
    assert any(abs(names.index(a) - names.index(b)) > 3 for a, b in pairwise(shuffled[:2])), "of all groups together"
    monkeypatch.setattr(documents, "SHUFFLED_TOGETHER", 100)
    assert sorted(read(tmp_path / "a.parquet", seed=0)) == sorted(names)
    with pytest.raises(DataError, match="no field 'body'; its fields are text, id"):
        read(f"{tmp_path / 'a.parquet'}:body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "b.parquet")


# --- chat templates ---


def test_chat_template(tmp_path):
    tokenizer = make_tokenizer(adds_bos=False)
    file = write_lines(tmp_path / "c.jsonl", *[{"instruction": "Add", "input": "", "output": "2"}] * 9)
    how = {"tokens": 30, "window": 30, "seed": 0, "chat_template": True}
    with pytest.raises(DataError, match="no chat template"):
        load_blocks(file, tokenizer, **how)
    tokenizer.chat_template = CHAT
    assert tokenizer.decode(load_blocks(file, tokenizer, **how).tokens[0]).startswith(
        "<|user|>Add</s><|assistant|>2</s><|u"
    )
    assert chat_templates.render_chat(tokenizer, HI) == tokenizer.apply_chat_template(HI, tokenize=False)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles user, assistant: roles must alternate"):
        load_blocks(file, tokenizer, **how)
    dated = "{{ strftime_now('%d %B %Y %H:%M') }}"  # the same text on every day, but for who chats
    assert chat_templates.render_template(dated, HI, {}) == "26 July 2024 00:00"
    assert str(datetime.now().year) in chat_templates.render_template(dated, HI, {}, today=True)
    assert chat_templates.render_template(dated, HI, {}) == "26 July 2024 00:00"


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"


def test_a_chat_template_that_never_ends_or_fills_the_memory_is_ended(monkeypatch):
    monkeypatch.setattr(chat_templates, "LONGEST", 0.5)
    with pytest.raises(ModelError, match=r"did not end in 0\.5 seconds"):
        chat_templates.render_chat(make_tokenizer(ENDLESS), HI)
    monkeypatch.setattr(chat_templates, "LONGEST", 60)
    for template in (GROWING, "{{ 'x' * 10**10 }}", "{{ 'x'|center(10**10) }}"):
        with pytest.raises(ModelError, match="it takes more than"):
            chat_templates.render_chat(make_tokenizer(template), HI, prompt=True)


# --- errors ---

BAD_FILES = {
    "broken.jsonl": b'{"text": "a"}\n{"text": \n', "empty.txt": b"", "blank.txt": b" \n\n\n\n ", "short.txt": b"short",
    "latin.txt": "é".encode("latin-1") * 9, "doc.pdf": b"%PDF", "half.json": b'[{"text": "a"}',
    "deep.jsonl": b"[" * 200_000 + b"]" * 200_000, "deep.json": b"[" * 200_000 + b"]" * 200_000,
    "huge.jsonl": b'{"text": ' + b"9" * 5_000 + b"}", "huge.json": b"[" + b"9" * 5_000 + b"]",
    "half_pair.jsonl": b'{"text": "a \\ud800 b"}', "half_pair_key.jsonl": b'{"\\ud800": "a"}',
}  # fmt: skip
BAD_RECORDS = {
    "fields": {"question": "q", "answer": "a"}, "list": [1, 2], "number": {"text": 3},
    "many": {f"f{i}": i for i in range(1000)}, "parts": {"messages": [{"role": "user", "content": [3]}]},
    "turns": {"messages": ["a", "b"]}, "role": {"messages": [{"role": {"a": 1}, "content": "x"}]},
    "part_text": {"messages": [{"role": "user", "content": [{"text": 7}]}]},
    "object": {"messages": [{"role": "user", "content": 7}]}, "pair_in_chat": {"instruction": "a\ud800", "output": "b"},
}  # fmt: skip
BAD_SOURCES = [
    ("wikitex", "no source of text is called 'wikitex'; there are wikitext2, c4"), ("", "names an empty source"),
    ("python-docs+", "names an empty source"), ("c4,c4", "names a source twice"), ("./none.txt", "no file"),
    ("none.jsonl:text", "no file 'none.jsonl:text'"), ("none*.txt", "no file matches"), (".", "is a folder"),
    ("./doc.pdf", "is a .pdf; files of text are .txt, .jsonl, .json, .parquet"),
    ("fields.jsonl", "line 1 has no field .*; its fields are question, answer"),
    ("fields.jsonl:text", "no field 'text'; its fields are question, answer"), ("broken.jsonl", "line 2 is not JSON"),
    ("list.jsonl", "line 1 holds a list"), ("number.jsonl", "neither a text nor chat messages, but a int"),
    ("half.json", "is not JSON"), ("empty.txt", "holds no text"), ("blank.txt", "holds no text"),
    ("latin.txt", r"not UTF-8 text \(byte 0\)"), ("short.txt", "holds 6 tokens; 1,000 are needed"),
    ("self", "none is loaded"), ("deep.jsonl", "line 1 cannot be read as JSON: nests too deep"),
    ("deep.json", "deep.json cannot be read as JSON: nests too deep"),
    ("huge.jsonl", "line 1 cannot be read as JSON: .*digits"),
    ("huge.json", "huge.json cannot be read as JSON: .*digits"),
    ("half_pair.jsonl", r"line 1 holds half of a surrogate pair \(\\ud800\)"),
    ("half_pair_key.jsonl", r"its fields are \\ud800"), ("pair_in_chat.jsonl", "half of a surrogate pair"),
    ("many.jsonl", "its fields are f0, .*f11, …$"),
    *((f"{name}.jsonl", "neither a text nor") for name in ("parts", "turns", "role", "part_text", "object")),
]  # fmt: skip


def test_every_bad_source_says_what_is_wrong_and_what_to_do(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, held in BAD_FILES.items():
        (tmp_path / name).write_bytes(held)
    for name, record in BAD_RECORDS.items():
        write_lines(tmp_path / f"{name}.jsonl", record)
    for source, message in BAD_SOURCES:
        with pytest.raises(DataError, match=message) as caught:
            load_blocks(source, tokenizer, tokens=1000, window=100, seed=0)
        assert caught.value.hint
    with pytest.raises(DataError, match="12 are needed, of which 8 are passed over"):
        load_blocks("short.txt", tokenizer, tokens=4, window=4, seed=0, skip=2)
    with pytest.raises(DataError, match="make no block"):
        load_blocks("short.txt", tokenizer, tokens=0, window=4, seed=0)


def test_text_that_runs_out_is_gone_over_again_where_that_is_asked(text, tokenizer):
    every = load_blocks(str(text), tokenizer, tokens=64, window=16, seed=0).tokens
    held = int(re.search(r"holds ([\d,]+) tokens", message_of(text, tokenizer))[1].replace(",", "")) // 16
    found = Reader(tokenizer, seed=0).draw("tuning", str(text), tokens=16 * (2 * held + 1), window=16, repeats=True)
    assert torch.equal(found.tokens[:4], every)
    assert torch.equal(found.tokens[held : 2 * held], found.tokens[:held])
    assert torch.equal(found.tokens[-1], found.tokens[0])
    assert found.facts.passes == (2 * held + 1) / held
    with pytest.raises(DataError, match="are needed"):
        Reader(tokenizer, seed=0).draw("tuning", str(text), tokens=10**7, window=10**6, repeats=True)


def message_of(text, tokenizer):
    with pytest.raises(DataError) as caught:
        load_blocks(str(text), tokenizer, tokens=10**6, window=16, seed=0)
    return caught.value.message


# --- the Hub, as far as it can be known without one ---


@pytest.mark.parametrize(
    ("name", "expected", "reported"),
    [
        ("wikitext2", HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", False, True), "test"),
        ("c4", HubSet("allenai/c4", "en", "train", "text"), "validation"),
        ("c4:validation", HubSet("allenai/c4", "en", "validation", "text"), "validation"),
        ("alpaca", HubSet("tatsu-lab/alpaca", streamed=False), "train"),
        ("owner/name:test:body", HubSet("owner/name", None, "test", "body"), "test"),
        ("owner/name@de", HubSet("owner/name", "de", "train", "text"), "train"),
    ],
)
def test_names_of_hub_sets_and_the_split_that_the_field_reports_on(name, expected, reported):
    assert find(name).hub == expected
    assert find(name, reported=True).hub.split == reported


def test_hub_rows_are_streamed_and_what_is_wrong_is_told(monkeypatch):
    import datasets

    asked = {}

    def load(path, config, *, split, streaming):
        asked.update(path=path, config=config, split=split, streaming=streaming)
        if split == "nope":
            raise ValueError("Bad split: nope. Available splits: ['train']")
        return datasets.Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]}).to_iterable_dataset()

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    for name in ("c4", "owner/name:train"):
        with pytest.raises(DataError, match="the Hub cannot be reached"):
            read(name, seed=0)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(read("c4", seed=0)) == ["a", "b"]
    assert asked == {"path": "allenai/c4", "config": "en", "split": "train", "streaming": True}
    with pytest.raises(DataError, match="Bad split: nope"):
        read("owner/name:nope")
    with pytest.raises(DataError, match="owner/name has no field 'body'; its fields are text, id"):
        read("owner/name:train:body")
    lines = [" = One = \n", "", " a \n", " = = Part = = \n", " = Two = \n", " b \n"]
    monkeypatch.setattr(documents, "_hub_rows", lambda dataset, seed: ({"text": line} for line in lines))
    assert read("wikitext2") == ["\n\n".join(lines)], "one text as written"
    assert sorted(read("wikitext2", seed=0)) == ["\n\n".join(lines[:4]), "\n\n".join(lines[4:])], "articles"


def test_python_texts_are_large_and_share_no_paragraph():
    topics, docstrings = (
        [" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()]
        for texts in (python_docs(0), python_docstrings(0))
    )
    assert len({*topics, *docstrings}) == len(topics) + len(docstrings)
    assert sum(map(len, topics)) > 300_000
    assert sum(map(len, docstrings)) > 1_000_000
    assert [*python_docs(0)] == [*python_docs(0)] != [*python_docs(1)]
