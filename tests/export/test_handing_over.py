"""What is handed over with a model: the chat format as Ollama takes it, mergekit's configuration of the cut."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers.utils.chat_template_utils import render_jinja_template

import folders
import hub_stand_in
import tiny
from layercut.cli.command_line import main
from layercut.errors import ConfigError, DataError
from layercut.export import hub as hub_module
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


def test_quantize_writes_a_card_and_what_is_packed_is_not_cut(tiny_model, tmp_path, capsys):
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


SCRIPT = """
import contextlib, gc, io, json, os, sys
import transformers.models.llama.modeling_llama
import hub_stand_in
from layercut.cli.command_line import main
from layercut.export import checkpoint

checkpoint.verify_reload = lambda *_: {}  # tested elsewhere, and slow
gc.freeze()  # see conftest.py

model, calibration, text, out = sys.argv[1:]
said = {}

def run(name, *arguments, token=hub_stand_in.GOOD, **environment):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= environment | ({"HF_TOKEN": token} if token else {})
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main([str(word) for word in arguments])
    said[name] = [code, printed.getvalue(), errors.getvalue()]

cut = ["cut", model, "--segment", "3:5", "--quiet"]
assert main([*cut, "--out", f"{out}/cut"]) == 0
run("no token", "push", f"{out}/cut", "small", token=None)
run("refused", "push", f"{out}/cut", "small", token="hf_bad")
run("reads", "push", f"{out}/cut", "small", token=hub_stand_in.READS)
run("stranger", "push", f"{out}/cut", "them/small")
run("watched", "push", f"{out}/cut", "watched/small")
run("name", "push", f"{out}/cut", "a b")
run("cut", "push", f"{out}/cut", "small", "--quiet")
run("private there", "push", f"{out}/cut", "small", "--private")
run("private", "push", f"{out}/cut", "lab/other", "--private", "--quiet")
run("evaluate", "evaluate", "me/small", "--eval-data", text, "--eval-tokens", "64", "--window", "16", "--quiet")
run("evaluate here", "evaluate", f"{out}/cut", "--eval-data", text, "--eval-tokens", "64", "--window", "16", "--quiet")

few = ["--data", calibration, "--eval-data", text, "--tokens", "64", "--window", "16", "--tune-tokens", "0"]
few += ["--eval-tokens", "64", "--no-fold", "--no-speed", "--segment", "3:5", "--preserve", "none", "--quiet"]
assert main(["compress", model, *few, "--out", f"{out}/run"]) == 0
run("run", "push", f"{out}/run", "run", "--private", "--quiet")

from transformers import AutoModelForCausalLM
said["layers"] = len(AutoModelForCausalLM.from_pretrained("me/small").model.layers)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub():
    state = hub_stand_in.Hub()
    with state.serve() as server:
        state.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


@pytest.fixture(scope="module")
def said(hub, tiny_model, texts, tmp_path_factory):
    """What each command printed, with its exit code."""
    out = tmp_path_factory.mktemp("hub")
    old = hub.repositories["me/small"] = hub_stand_in.Repository(private=False)
    old.files = {"model-00001-of-00002.safetensors": b"stale", "notes.txt": b"mine"}
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(out / "home"), "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(tiny_model), str(texts[0]), str(texts[1]), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"out": out}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no token", "needs a token, and there is none"), ("refused", "the token is refused (401)"),
        ("reads", "the token may only read"), ("stranger", "no member of 'them'"),
        ("watched", "me may only read in 'watched'"), ("name", "'a b' is no name for a repository"),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_refused(said, name, words):
    code, printed, errors = said[name]
    assert code == 2, errors
    assert words in errors
    assert "hint: " in errors
    assert not printed


def test_a_model_is_pushed_whole_and_its_old_weights_are_gone(said, hub):
    assert said["cut"][0] == 0, said["cut"][2]
    pushed = hub.repositories["me/small"].files
    kept = {path.name: path.read_bytes() for path in (said["out"] / "cut").iterdir()}
    assert set(pushed) == {*kept, "notes.txt"}
    assert all(pushed[name] == content for name, content in kept.items() if name != "README.md")
    assert hub.repositories["me/small"].commits == ["A model made smaller by layercut"]
    card = pushed["README.md"].decode()
    assert 'from_pretrained("me/small")' in card
    assert "vllm serve me/small" in card
    assert "path/to/this/folder" not in card
    assert "path/to/this/folder" in kept["README.md"].decode()


def test_a_private_repository_is_private_and_a_public_one_is_not_taken_for_it(said, hub):
    code, _, errors = said["private there"]
    assert code == 2
    assert "me/small is there and public" in errors
    code, printed, errors = said["private"]
    assert code == 0, errors
    assert printed.strip() == f"{hub.address}/lab/other"
    assert hub.repositories["lab/other"].private
    assert not hub.repositories["me/small"].private


def test_it_is_evaluated_and_loaded_by_its_id(said):
    assert said["layers"] == folders.LAYERS - 2
    code, printed, errors = said["evaluate"]
    assert code == 0, errors
    assert printed.split()[0] == "me/small"
    assert printed.split()[1] == said["evaluate here"][1].split()[1], "the same perplexity as of the folder"
    assert float(printed.split()[1]) > 1


def test_of_a_run_only_its_model_is_pushed(said, hub):
    code, _, errors = said["run"]
    assert code == 0, errors
    pushed, model = hub.repositories["me/run"], said["out"] / "run" / "model"
    assert pushed.private
    assert set(pushed.files) == {path.name for path in model.iterdir()}
    assert pushed.files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    front = yaml.safe_load(pushed.files["README.md"].decode().split("---\n")[1])
    (figure,) = front["model-index"][0]["results"]
    summary = json.loads((said["out"] / "run" / "summary.json").read_text())
    assert figure["metrics"][0]["value"] == summary["perplexity"]["cut"]
    assert str(said["out"]) not in pushed.files["README.md"].decode(), "no path of this machine"


def test_the_card_and_mergekits_slices_are_of_the_cut(said, hub):
    files = hub.repositories["lab/other"].files
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == "tiny-llama"
    assert {"layercut", "pruned"} <= set(front["tags"])
    config = yaml.safe_load(files["mergekit.yaml"])
    ranges = [source["layer_range"] for each in config["slices"] for source in each["sources"]]
    assert ranges == [[0, 3], [5, 8]]
    assert json.loads(files["config.json"])["original_layer_index"] == [0, 1, 2, 5, 6, 7]
    assert len(load_file(said["out"] / "cut" / "model.safetensors")) > 0


def test_nothing_is_pushed_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.GOOD)
    with pytest.raises(ConfigError, match="cannot be asked") as refused:
        hub_module.check_destination("me/small")
    assert "network" in refused.value.hint
