"""What is handed over with a model: the chat format as Ollama takes it, mergekit's configuration of the cut."""

from __future__ import annotations

import pytest
import yaml
from transformers.utils.chat_template_utils import render_jinja_template

from layercut.errors import DataError
from layercut.export.chat_format import ChatFormat, chat_format
from layercut.export.mergekit_config import mergekit_config, runs

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
    [(COUNTED, "where it stands"), (OFTEN, "how many there are"), (FIRST_TWO, "once, in its place"), (DATED, "date of the day")],
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


@pytest.mark.parametrize(
    ("kept", "ranges"),
    [
        ([0, 1, 2, 5, 6, 9], [(0, 3), (5, 7), (9, 10)]),
        ([2, 3], [(2, 4)]),
        (list(range(30)), [(0, 30)]),
        ([0, 2, 1], [(0, 1), (2, 3), (1, 2)]),
    ],
)
def test_slices_of_mergekit_are_the_kept_layers(kept, ranges):
    assert runs(kept) == ranges
    config = yaml.safe_load(mergekit_config("owner/name", kept, "bfloat16"))
    assert (config["merge_method"], config["dtype"]) == ("passthrough", "bfloat16")
    layers = [
        layer
        for each in config["slices"]
        for source in each["sources"]
        for layer in range(*source["layer_range"])
        if source["model"] == "owner/name"
    ]
    assert layers == kept

