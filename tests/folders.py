"""A tiny model as users have one, a folder with weights, config and tokenizer, and text for it. Seeded."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([prose(99)], trainer)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def write_model(folder: Path, layers: int = LAYERS) -> Path:
    """A random Llama with its tokenizer, as save_pretrained leaves them."""
    model = tiny.llama(
        layers, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=1
    )
    for i in range(3, min(5, layers)):  # two that matter less, so that a search has something to find
        model.model.layers[i].self_attn.o_proj.weight.mul_(0.3)
        model.model.layers[i].mlp.down_proj.weight.mul_(0.3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, seed: int) -> Path:
    """A .txt file of some 20,000 tokens."""
    file.write_text(prose(seed), encoding="utf-8")
    return file
