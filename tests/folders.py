"""A tiny model as users have one, a folder with weights, config and tokenizer, and text for it. Seeded."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

import tiny

LAYERS = 8
VOCABULARY = 300
POSITIONS = 128
SYLLABLES = ["ba", "ko", "rin", "tel", "mu", "sha", "on", "ter", "li", "fe", "dra", "os", "in", "ga"]


def prose(seed: int, documents: int = 40, words: int = 120) -> str:
    """Made-up sentences, parted into documents by two blank lines."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(400)]
    pages = []
    for _ in range(documents):
        page = [draw.choice(lexicon) for _ in range(words)]
        pages.append(" ".join(word + ("." if draw.random() < 0.1 else "") for word in page))
    return "\n\n\n".join(pages)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on made-up text; puts <s> first, as Llama's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([prose(99)], trainer)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def write_model(folder: Path, layers: int = LAYERS) -> Path:
    """A random Llama with its tokenizer, as save_pretrained leaves them."""
    model = tiny.llama(layers, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=1)
    for i in range(3, min(5, layers)):  # two that matter less, so that a search has something to find
        model.model.layers[i].self_attn.o_proj.weight.mul_(0.3)
        model.model.layers[i].mlp.down_proj.weight.mul_(0.3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_fragile_model(folder: Path) -> Path:
    """A model sure of itself whose every weight has a huge column that no input ever reaches: rounding zeroes the rest.

    Layer 3 does nothing, so that cutting it costs nothing.
    """
    model = tiny.llama(6, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
    tiny.make_identity_(model, range(3, 4))
    model.lm_head.weight.mul_(8)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[0] = 0
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(module, nn.Linear):
                module.weight[:, 0] = 1e4
        layer.self_attn.o_proj.weight[:, 8] = 0  # a second query head reads the same value there
        layer.self_attn.v_proj.weight[0] = 0
        layer.mlp.gate_proj.weight[0] = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, seed: int) -> Path:
    """A .txt file of some 20,000 tokens."""
    file.write_text(prose(seed), encoding="utf-8")
    return file


# Two tasks for lm-evaluation-harness: twelve items of two to four choices, and four sums to be written out.
TASK_DATA = """
import datasets

def choices(**_):
    words = "ba ko rin telmu shaon ter lifedra os in ga basha korin".split()
    rows = [{"question": " ".join(words[i % 7 : i % 7 + 4]), "answers": words[i % 5 : i % 5 + 2 + i % 3],
             "right": i % 2} for i in range(12)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

def sums(**_):
    rows = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(4)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
"""
TASK_CHOICES = """
task: tiny_choices
dataset_path: json
custom_dataset: !function data.choices
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: right
doc_to_choice: "{{answers}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TASK_SUMS = """
task: tiny_sums
tag: tiny_tag
dataset_path: json
custom_dataset: !function data.sums
output_type: generate_until
test_split: test
doc_to_text: "{{question}} ="
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_tasks(folder: Path) -> Path:
    """A folder for --include-path with tiny_choices and tiny_sums (tag: tiny_tag)."""
    for name, text in {"data.py": TASK_DATA, "choices.yaml": TASK_CHOICES, "sums.yaml": TASK_SUMS}.items():
        (folder / name).write_text(text)
    return folder
