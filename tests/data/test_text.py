"""The text stage: no text serves two uses, whatever it is called; and the windows that perplexity is reported on."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig

import folders
import tiny
from layercut import evaluation
from layercut.config import DataConfig, EvaluateConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig
from layercut.data.blocks import Blocks, TextFacts, by_origin, load_blocks, stored_blocks
from layercut.errors import ConfigError, DataError
from layercut.models import checkpoints, loading
from layercut.pipeline.artefacts import SharedText
from layercut.pipeline.resolve_options import ENOUGH_TOKENS, LONG_ROW, check_sources, with_windows
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import Run
from layercut.pipeline.stages import text as text_stage
from layercut.pipeline.stages.text import check_held_out, check_unseen, draw_all, uses


def asking(data: str, tune_data: str | None, eval_data: str) -> CompressConfig:
    return CompressConfig(
        text=DataConfig(data=data, tokens=512, window=32), search=SearchConfig(ratio=0.25),
        heal=HealConfig(tune_data=tune_data, tune_tokens=1024),
        evaluate=EvaluateConfig(eval_data=eval_data, eval_tokens=512, eval_window=64),
    )  # fmt: skip


def draw(model: Path, folder: Path, config: CompressConfig) -> dict:
    with Run(folder) as run:
        run.describe({})
        work = RunContext(checkpoints.resolve(str(model)), config, run)
        draw_all(work, uses(config, "report"))
        shared = run.artefact(SharedText, "text-shared")
        return {use: asdict(facts) for use, facts in work.text.items()} | {"shared": asdict(shared)}


@pytest.fixture(scope="module")
def several(texts, tmp_path_factory):
    """The two texts, and the first one under other names and in other files."""
    folder = tmp_path_factory.mktemp("several")
    prose, other = (file.read_text() for file in texts)
    (folder / "a.txt").write_text(prose)
    (folder / "other.txt").write_text(other)
    (folder / "copy.txt").write_text(prose)
    (folder / "hard.txt").hardlink_to(folder / "a.txt")
    pages = prose.split("\n\n\n")
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    (folder / "one.jsonl").write_text(json.dumps({"text": " ".join(pages)}) + "\n")
    (folder / "half.txt").write_text("\n\n\n".join([*pages[:2], *other.split("\n\n\n")]))
    return folder


def test_what_is_reported_on_is_refused_for_search_by_what_it_is(several, monkeypatch):
    monkeypatch.chdir(several)
    same = [
        ("wikitext2:test", None, "wikitext2"), ("c4", None, "allenai/c4@en:train"),
        ("c4", "Salesforce/wikitext@wikitext-2-raw-v1:test", "wikitext2"), ("a.txt", None, "./a.txt"),
        ("a.txt", None, "copy.txt"), ("other.txt", "a.txt+python-docs", "hard.txt"), ("*.txt", None, "a.txt"),
    ]  # fmt: skip
    for data, tune_data, eval_data in same:
        with pytest.raises(ConfigError, match="reported on as well") as caught:
            check_sources(asking(data, tune_data, eval_data))
        assert "--eval-data" in caught.value.hint
    for data, tune_data, eval_data in [
        ("wikitext2", None, "wikitext2"), ("c4", None, "c4"), ("self", None, "self"), ("a.txt", None, "other.txt"),
    ]:  # fmt: skip
        check_sources(asking(data, tune_data, eval_data))


def test_the_same_text_in_another_file_is_passed_over_or_refused(tiny_model, several, tmp_path):
    """A document that is reported on is left out elsewhere; parted otherwise, its passages tell."""
    lines = asking(f"{several}/half.txt", None, f"{several}/lines.jsonl")
    text = draw(tiny_model, tmp_path / "lines", replace(lines, heal=HealConfig(tune_tokens=7000)))
    assert text["shared"]["documents"] == 0
    assert text["shared"]["passed_over"] > 0
    for number, data, tune_data, eval_data, words in [
        (0, "lines.jsonl", None, "a.txt", "passages of the evaluation text"),
        (1, "other.txt", "one.jsonl", "lines.jsonl", "passages of the evaluation text"),
        (2, "a.txt", "one.jsonl", "other.txt", "passages of the held-out text"),
    ]:
        config = asking(f"{several}/{data}", tune_data and f"{several}/{tune_data}", f"{several}/{eval_data}")
        if number == 0:  # whole documents: there is nothing left to search on
            config = replace(config, evaluate=replace(config.evaluate, eval_tokens=9000))
            words = "documents that other text of this run holds as well"
        if number == 2:
            config = replace(config, text=DataConfig(data=f"{several}/a.txt", tokens=9000, window=32))
        with pytest.raises(DataError, match=words):
            draw(tiny_model, tmp_path / str(number), config)


def test_rows_to_tune_on_are_long_where_they_are_many(tiny_model, several, tmp_path):
    def tuned_on(positions: int, **heal) -> int | None:
        config = replace(asking("c4", None, "wikitext2"), heal=HealConfig(**heal))
        return with_windows(config, tiny.LlamaConfig(max_position_embeddings=positions)).heal.tune_window

    many = ENOUGH_TOKENS
    assert tuned_on(2048, tune_tokens=many) == LONG_ROW
    assert tuned_on(2048, tune_tokens=many - 1) == tuned_on(1023, tune_tokens=many) == 32
    assert tuned_on(2048, tune_tokens=many, batch_tokens=140) == 128

    config = asking(f"{several}/a.txt", None, f"{several}/other.txt")
    config = replace(config, heal=HealConfig(tune_tokens=1000, tune_window=256, probe_share=0))
    draw(tiny_model, tmp_path, config)
    rows = {use: stored_blocks(tmp_path, use) for use in ("calibration", "heldout", "tuning")}
    assert {use: tokens.shape[1] for use, tokens in rows.items()} == {"calibration": 32, "heldout": 32, "tuning": 256}
    stream = load_blocks(
        f"{several}/a.txt", loading.load_tokenizer(checkpoints.resolve(str(tiny_model))), window=32, seed=0,
        tokens=sum(tokens.numel() for tokens in rows.values()),
    ).tokens.flatten()  # fmt: skip
    assert torch.equal(stream, torch.cat([tokens.flatten() for tokens in rows.values()])), "no token twice, none left"


def test_an_edited_file_is_drawn_anew(tiny_model, several, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text((several / "a.txt").read_text())
    config = asking(str(mine), None, f"{several}/other.txt")
    first = draw(tiny_model, tmp_path / "run", config)
    assert draw(tiny_model, tmp_path / "run", config) == first
    before = mine.stat()
    mine.write_text(mine.read_text()[::-1])
    assert mine.stat().st_size == before.st_size
    again = draw(tiny_model, tmp_path / "run", config)
    assert again["calibration"]["fingerprint"] != first["calibration"]["fingerprint"]


def test_what_is_drawn_after_an_edited_file_leaves_out_its_documents(tiny_model, several, tmp_path):
    mine, pages = tmp_path / "mine.txt", (several / "a.txt").read_text().split("\n\n\n")
    half = len(pages) // 2
    mine.write_text("\n\n\n".join(pages[:half]))
    config = asking(str(mine), f"{several}/a.txt", f"{several}/other.txt")
    first = draw(tiny_model, tmp_path / "run", config)
    mine.write_text("\n\n\n".join(pages[half:]))
    again, fresh = (draw(tiny_model, tmp_path / name, config) for name in ("run", "fresh"))
    assert again == fresh
    assert again["tuning"]["fingerprint"] != first["tuning"]["fingerprint"], "documents that calibration has now"


def test_text_that_is_split_into_shuffled_records_is_found(tiny_model, several, tmp_path):
    """Records of some 40 tokens, 43 % of them tuned on as prose: no run of 64 tokens goes across two of them."""
    pages = (several / "a.txt").read_text().split("\n\n\n")
    words = [page.split() for page in pages]
    for length in (8, 20):  # shorter than a run of 13 words, and longer
        records = [" ".join(some[i : i + length]) for some in words for i in range(0, 120, length)]
        random.Random(0).shuffle(records)
        (tmp_path / f"{length}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in records))
        (tmp_path / "tuned.txt").write_text("\n\n\n".join(pages[:17]))
        config = asking(f"{several}/other.txt", f"{tmp_path}/tuned.txt", f"{tmp_path}/{length}.jsonl")
        config = replace(config, heal=HealConfig(tune_data=f"{tmp_path}/tuned.txt", tune_tokens=3000, probe_share=0))
        config = replace(config, evaluate=replace(config.evaluate, eval_tokens=9000))
        with pytest.raises(DataError, match="of the words of the evaluation text"):
            draw(tiny_model, tmp_path / f"run {length}", config)


def test_a_run_is_not_judged_by_what_it_was_tuned_on(tiny_model, several, tmp_path):
    draw(tiny_model, tmp_path, asking(f"{several}/other.txt", f"{several}/a.txt", "python-docs"))
    tokenizer = loading.load_tokenizer(checkpoints.resolve(str(tiny_model)))

    def judged_by(name: str, tokens: int) -> None:
        blocks = load_blocks(name, tokenizer, tokens=tokens, window=64, seed=0, order="as written")
        check_unseen(tmp_path, blocks, tokenizer)

    for name, words in {"copy.txt": "the same source", "lines.jsonl": "documents", "one.jsonl": "passages"}.items():
        with pytest.raises(DataError, match=words) as caught:
            judged_by(f"{several}/{name}", 9000)
        assert "--eval-data" in caught.value.hint
    judged_by("python-docs", 9000)


def test_generated_tests_judge_a_run_that_was_tuned_on_others(tiny_model, several, tmp_path):
    config = asking(f"{several}/other.txt", f"{several}/a.txt+probes:0.5", "python-docs+probes:0.5")
    config = replace(config, text=replace(config.text, window=128))
    check_sources(config)
    draw(tiny_model, tmp_path, config)
    tokenizer = loading.load_tokenizer(checkpoints.resolve(str(tiny_model)))
    blocks = load_blocks("python-docs+probes:0.5", tokenizer, tokens=4096, window=128, seed=0, order="as written")
    assert "probes" in blocks.facts.origins
    check_unseen(tmp_path, blocks, tokenizer)


# --- windows ---


def test_the_reported_window_is_the_models_and_no_longer_than_2048():
    config = asking("self", None, "self")
    unset = replace(config, evaluate=EvaluateConfig())

    def window(positions: int, asked: CompressConfig = unset) -> int | None:
        return with_windows(asked, tiny.LlamaConfig(max_position_embeddings=positions)).evaluate.eval_window

    assert [window(128), window(2048), window(131072)] == [128, 2048, 2048]
    assert with_windows(unset, BloomConfig()).evaluate.eval_window == 2048, "no limit of positions"
    assert window(128, config) == 64
    with pytest.raises(ConfigError, match="--eval-window 64 is longer than the model's 32 positions"):
        window(32, config)
    assert evaluation.perplexity_protocol(2048) == (
        "perplexity of 2,048-token windows, no overlap, the first token of each not predicted"
    )


@pytest.fixture
def chat_model(tiny_model, tmp_path) -> Path:
    """The tiny model with a chat template."""
    folder = shutil.copytree(tiny_model, tmp_path / "chat-model")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_chat_models_are_tuned_on_chats_of_their_own(chat_model, several, tmp_path):
    config = asking(f"{several}/a.txt", None, f"{several}/other.txt")
    found = draw(chat_model, tmp_path / "run", config)
    assert "chats" in found["tuning"]["reads"]
    assert "chats" not in found["calibration"]["reads"]
    opening = loading.load_tokenizer(checkpoints.resolve(str(chat_model))).encode("<user>", add_special_tokens=False)
    rows = by_origin(stored_blocks(tmp_path / "run", "tuning"), found["tuning"]["origins"])["chats"]
    assert rows[:, : len(opening)].tolist() == [opening] * len(rows) != []
    without = draw(chat_model, tmp_path / "other", replace(config, heal=replace(config.heal, chat_share=0.0)))
    assert "chats" not in without["tuning"]["reads"]


def test_no_chats_are_written_where_the_model_cannot(chat_model, several, tmp_path, monkeypatch):
    config = asking(f"{several}/a.txt", None, f"{several}/other.txt")
    said: list[str] = []
    monkeypatch.setattr(text_stage, "say", lambda *words: said.append(" ".join(words)))
    monkeypatch.setattr(RunContext, "writes", False)
    there = draw(chat_model, tmp_path / "run", config)
    assert "chats" not in there["tuning"]["reads"] + there["heldout"]["reads"]
    assert sum("no chats are tuned on" in line for line in said) == 1
    monkeypatch.setattr(RunContext, "writes", True)
    assert draw(chat_model, tmp_path / "run", config) == there, "what a run goes on with where it can"
    (tmp_path / "run" / "text-tuning.json").unlink()
    mixed = draw(chat_model, tmp_path / "run", config)
    assert mixed["heldout"] == there["heldout"]
    assert "chats" in mixed["tuning"]["reads"]
    draw(chat_model, tmp_path / "other", config)
    (tmp_path / "other" / "text-tuning.json").unlink()
    monkeypatch.setattr(RunContext, "writes", False)
    monkeypatch.setattr(RunContext, "dense", property(lambda _: pytest.fail("loaded where it writes nothing")))
    mixed = draw(chat_model, tmp_path / "other", config)
    assert "chats" in mixed["heldout"]["reads"]
    assert "chats" not in mixed["tuning"]["reads"]
    assert not {*map(tuple, stored_blocks(tmp_path / "run", "heldout").tolist())} & {
        *map(tuple, stored_blocks(tmp_path / "run", "tuning").tolist())
    }


def test_what_a_template_always_writes_is_no_text_that_two_uses_share():
    opening, draw = torch.arange(100), torch.Generator().manual_seed(0)

    def blocks(*origins: str) -> Blocks:
        row = torch.cat([opening, torch.randint(100, 9999, (412,), generator=draw)])
        facts = TextFacts(
            source="+".join(origins), reads=[], origins=[*origins], tokens=512, window=256, documents=2, passed_over=0,
            fingerprint="",
        )  # fmt: skip
        return Blocks(row.view(2, 256), facts)

    for heldout, tuning in (("a.txt", "chats"), ("chats", "a.txt"), ("chats", "probes"), ("probes", "chats")):
        check_held_out(blocks(heldout), [blocks(tuning)], folders.tokenizer())
    with pytest.raises(DataError, match="of the passages of the held-out text"):
        check_held_out(blocks("a.txt"), [blocks("b.txt")], folders.tokenizer())
