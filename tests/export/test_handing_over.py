"""What is handed over with a model: the chat format as Ollama takes it, mergekit's configuration of the cut."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers.utils.chat_template_utils import render_jinja_template

import folders
import tiny
from layercut.cli.command_line import main
from layercut.errors import DataError
from layercut.export.modelfile import ChatFormat, chat_format, modelfile
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set first = '' %}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if loop.first %}{{ first }}{% endif %}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
COUNTED = "{% for m in messages %}<|{{ m.role }}{{ loop.index }}|>{{ m.content }}{% endfor %}"
OFTEN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|{{ messages | length }}|>"
FIRST_TWO = "{% for m in messages[:2] %}{{ m.content }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + PHI3
TALK = [
    {"role": role, "content": text}
    for role, text in zip(
        ["system", "user", "assistant", "user", "assistant", "user"],
        ["Speak\nplainly.", 'Say "hello"', "Hello\\n", "{{ .Content }}?", "Yes.", "And }} ü \t…"],
        strict=True,
    )
]


def renderer(template: str):
    def render(messages: list[dict[str, str]]) -> str:
        try:
            (text,), _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
            )
        except Exception as error:
            raise DataError(str(error)) from None
        return text

    return render


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL, PHI3, THINKING])
@pytest.mark.parametrize("begins", ["system", "user"])
def test_a_chat_from_the_pieces_is_the_templates(template, begins):
    render = renderer(template)
    found = chat_format(template, render)
    if begins == "system" and template is MISTRAL:
        assert found.system is None
        return
    for length in (1, 3, 5):
        chat = TALK[: length + 1] if begins == "system" else TALK[1 : length + 1]
        assert found.render(chat) == render(chat)


@pytest.mark.parametrize(
    ("template", "why"),
    [(COUNTED, "where it stands"), (OFTEN, "how many there are"), (FIRST_TWO, "once, in its"), (DATED, "date of the")],
)
def test_a_template_that_is_no_such_pieces_is_refused_with_the_reason(template, why):
    with pytest.raises(DataError, match=why):
        chat_format(template, renderer(template))


def test_go_template_has_the_pieces_as_literals():
    found = ChatFormat(opening="<u>\n", system=("<s>", '"\\'), answered="</u><a>", asked="</a><u>", answering="</u><a>")
    assert found.without_first("<u>").opening == "\n"
    assert found.to_go() == (
        '{{ if .System }}{{ "<s>" }}{{ .System }}{{ "\\"\\\\" }}{{ else }}{{ "<u>\\n" }}{{ end }}'
        '{{ $asked := false }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if $asked }}{{ "</a><u>" }}{{ end }}'
        '{{ $asked = true }}{{ .Content }}{{ else if eq .Role "assistant" }}{{ "</u><a>" }}{{ .Content }}{{ end }}'
        '{{ end }}{{ "</u><a>" }}'
    )


# --- beside what the commands write ---

TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """A quantized model of 6 layers with a chat template and a licence in its metadata."""
    pytest.importorskip("gguf")
    from gguf_writer import with_metadata, write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    model = tiny.llama(6, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    plain = write_gguf(model, folders.tokenizer(), folder / "plain.gguf", "Q4_1")
    said = {"tokenizer.chat_template": TURNS, "general.license": "mit"}
    return with_metadata(plain, folder / "chatty.Q4_1.gguf", said)


def test_a_cut_gguf_file_comes_with_a_modelfile_and_a_card(gguf_file, tmp_path):
    out = tmp_path / "small.gguf"
    assert main(["cut", str(gguf_file), "--segment", "2:4", "--out", str(out), "--quiet"]) == 0
    first, template, stop = (tmp_path / "small.Modelfile").read_text().splitlines()
    assert first == "FROM ./small.gguf"
    begun = 'TEMPLATE """{{ if .System }}{{ "<system> " }}{{ .System }}{{ "</s><user> " }}{{ else }}{{ "<user> " }}'
    assert template.startswith(begun), template
    assert stop == 'PARAMETER stop "</s>"'
    card = (tmp_path / "small.README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["base_model"], front["library_name"]) == ("mit", "chatty", "gguf")
    assert "without layers 2–3" in card


def test_a_gguf_file_without_a_chat_template_says_so_in_its_modelfile(tmp_path):
    from gguf_writer import write_gguf

    model = tiny.llama(2, vocab_size=folders.VOCABULARY, bos_token_id=0, eos_token_id=1)
    lines = modelfile(write_gguf(model, folders.tokenizer(), tmp_path / "x.gguf")).splitlines()
    assert lines[1].startswith("# No TEMPLATE: the file has no chat template. Ollama then looks")
    assert lines[2:] == ['PARAMETER stop "</s>"']


def test_quantize_writes_a_card_and_what_is_packed_is_not_cut(tiny_model, tmp_path, quick_runs, capsys):
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "int8"
    assert main(["quantize", str(tiny_model), "--bits", "8", "--quantizer", "rtn", "--out", str(out), "--quiet"]) == 0
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("tiny-llama", "quantized")
    assert "pip install compressed-tensors" in card
    assert "Nothing was measured on this model" in card
    assert "vllm serve" in card
    for flags in (["3"], ["4", "--embedding-bits=8"]):
        argv = ["quantize", str(tiny_model), "--quantizer", "rtn", "--out", str(out), "--quiet", "--force"]
        assert main([*argv, "--bits", *flags]) == 0
        card = (out / "README.md").read_text()
        assert "| vLLM | reads it right" not in card, flags
        assert "vllm serve" not in card, flags
    capsys.readouterr()
    assert main(["cut", str(out), "--segment=3:5", f"--out={tmp_path / 'cut'}"]) == 2
    assert "packed in few bits" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


# --- chat ---


@pytest.fixture
def chatted(tiny_model, tmp_path, monkeypatch, capsys):
    """Give lines to `layercut chat` on a run made up of two models; what it prints."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    cut_checkpoint(tiny_model, [Segment(3, 5)], run / "model", force=True)
    (run / "env.json").write_text(json.dumps({"versions": {"layercut": "0"}}))
    (run / "summary.json").write_text(json.dumps({"model": str(tiny_model)}))

    def chat(lines: str | io.TextIOBase, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines) if isinstance(lines, str) else lines)
        code = main(["chat", str(run), "--quiet", *flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run, chat


def test_both_models_answer_every_message(chatted):
    _, chat = chatted
    code, out, err = chat("ba ko rin\n\nba ko rin\n/new\nba ko rin\n", "--max-new-tokens", "4")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith(("dense: ", "pruned: "))]
    assert len(lines) == 6
    assert lines[0] != lines[2], "the second message goes on from the first"
    assert lines[:2] == lines[4:], "a new chat forgets"


def test_the_oldest_messages_are_left_out_where_a_chat_gets_too_long(chatted):
    _, chat = chatted
    code, out, err = chat("ba ko rin tel mu sha on ter li fe\n" * 6, "--max-new-tokens", "8")
    assert code == 0, err
    assert out.count("pruned: ") == 6
    code, _, err = chat("ba ko rin " * 60)
    assert code == 2
    assert "positions" in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as Python reads in a locale with UTF-8, and without
def test_messages_that_are_not_utf8_are_refused(chatted, errors):
    _, chat = chatted
    code, _, err = chat(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    assert code == 2
    assert "not UTF-8" in err
    assert "iconv" in err


def test_a_run_without_a_finished_model_is_refused(chatted, tmp_path, capsys):
    run, chat = chatted
    (run / "summary.json").unlink()
    code, out, err = chat("ba\n")
    assert (code, out) == (2, "")
    assert "is not finished" in err
    assert main(["chat", str(tmp_path / "none")]) == 2
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_runs")
def test_what_neither_model_nor_tokenizer_writes_comes_with_a_run_and_with_fewer_bits(tiny_model, texts, tmp_path):
    pytest.importorskip("compressed_tensors")
    source = shutil.copytree(tiny_model, tmp_path / "source")
    beside = {"preprocessor_config.json": "{}", "LICENSE.txt": "free", "chat_template.json": "{}"}
    for name, text in {**beside, "README.md": "the source's", "notes.txt": "private"}.items():
        (source / name).write_text(text)
    text = ["--data", str(texts[0]), "--eval-data", str(texts[1]), "--eval-tokens=64", "--eval-window=16"]
    cut = ["compress", str(source), "--segment=2:3", "--window=16", "--tokens=64", "--tune-tokens=0", "--no-fold"]
    assert main([*cut, *text, "--preserve=none", "--no-speed", "--out", str(tmp_path / "run")]) == 0
    assert main(["quantize", str(source), "--bits=8", "--quantizer=rtn", "--out", str(tmp_path / "int8")]) == 0
    for folder in (tmp_path / "run" / "model", tmp_path / "int8"):
        assert all((folder / name).read_text() == text for name, text in beside.items())
        assert "the source's" not in (folder / "README.md").read_text()
        assert not (folder / "notes.txt").exists()
