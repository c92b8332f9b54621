"""The models that engines are judged on: written by layercut as users have it write them, each folder once.

Two are tiny and random, with what engines derive from a layer's index or its kind: a Gemma-3 whose cut is off its
period, and a Qwen2 with biases. Those of SmolLM2 are the demo's.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import folders
import tiny
from layercut.cli import demo
from layercut.config import QuantizeConfig
from layercut.export.checkpoint import save
from layercut.models import checkpoints, loading
from layercut.quantization import quantize_
from layercut.segments import Segment
from layercut.surgery import cut_checkpoint, in_memory

WINDOW, PROMPT, NEW = 16, 64, 24
"""Tokens that a sliding layer of the tiny Gemma-3 sees, tokens of a prompt, and new ones."""
TEXT = "The river rises in the hills, runs past two old mills and reaches the sea after ninety miles. "


class MissingError(Exception):
    """A model that cannot be made here."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what it computes in float32 by the transformers that layercut runs on."""

    name: str
    folder: Path
    asked: dict[str, Any]
    """What runners are given: tokens, of which the first are the prompt, and text to tokenize."""
    losses: list[float]
    """-log p of each token but the first."""
    greedy: list[int]
    """The next tokens after the prompt."""
    margins: list[float]
    """By how much the logit of each of these is above the second one's."""
    ids: list[int]
    """Of the text."""


def tiny_gemma3(folder: Path, tokenizer: Any) -> None:
    """Twelve layers, every sixth of which sees everything, without two: then it is the sixth and the tenth, which no
    period gives."""
    whole = folder.with_name("gemma3-whole")
    # vLLM's attention on CPUs takes heads of 32 and more
    heads = {"head_dim": 32, "query_pre_attn_scalar": 32}
    model = tiny.gemma3(
        [5, 11], 12, vocab_size=len(tokenizer), sliding_window=WINDOW, max_position_embeddings=256, **heads
    )
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    cut_checkpoint(whole, [Segment(7, 9)], folder, force=True)


def tiny_qwen2(folder: Path, tokenizer: Any) -> None:
    """Biases of query, key and value that are not zero, and a base of rotary positions that is nobody's default."""
    from transformers import Qwen2Config

    whole = folder.with_name("qwen2-whole")
    model = tiny.tiny(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=6, max_position_embeddings=256, initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    ))  # fmt: skip
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            bias = getattr(layer.self_attn, name).bias
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    cut_checkpoint(whole, [Segment(2, 4)], folder, force=True)


def smollm2(folder: Path, tokenizer: Any) -> None:
    """The demo's model without six layers, in bfloat16."""
    loaded = _demo()
    save(in_memory.cut(loaded.model, [Segment(13, 19)]), loaded.tokenizer, folder, verify=False, overwrite=True)


@cache
def _demo() -> loading.LanguageModel:
    try:
        file = demo.fetch_model()
    except Exception as error:
        raise MissingError(f"the demo's model is not to be had: {error}") from None
    return loading.load(checkpoints.resolve(str(file)))


def smollm2_in(bits: int) -> Callable[[Path, Any], None]:
    """The same in fewer bits, rounded to nearest: how well is no matter here."""

    def make(folder: Path, tokenizer: Any) -> None:
        loaded = _demo()
        cut = in_memory.cut(loaded.model, [Segment(13, 19)])
        quantized = quantize_(cut, None, QuantizeConfig(bits=bits, quantizer="rtn"))
        save(quantized, loaded.tokenizer, folder, verify=False, overwrite=True)

    return make


MODELS: dict[str, Callable[[Path, Any], None]] = {
    "SmolLM2, 24 of 30 layers": smollm2,
    "the same, int8": smollm2_in(8),
    "the same, int4": smollm2_in(4),
    "Gemma-3 off its period": tiny_gemma3,
    "Qwen2 with biases": tiny_qwen2,
}
TINY = ("Gemma-3 off its period", "Qwen2 with biases")


def real_tokenizer() -> Any:
    """The demo's, which llama.cpp's converter knows.

    Raises:
        MissingError: it is not to be had.
    """
    return _demo().tokenizer


def case(name: str, work: Path, threads: int = 1, tokenizer: Any = None) -> Case:
    """Make a model, and compute what it should compute.

    Args:
        name: one of `MODELS`.
        work: a folder for it.
        threads: of everything that computes.
        tokenizer: of the tiny models; None: one trained on made-up words.

    Returns:
        The model and its reference.

    Raises:
        MissingError: it cannot be made here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = work / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    MODELS[name](folder, tokenizer or folders.tokenizer())
    text = TEXT if tokenizer or name not in TINY else folders.prose(5)[:400]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = (ids * (PROMPT // len(ids) + 2))[: PROMPT + 32]
    model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    losses, greedy, margins = computed(model, tokens)
    asked = {"tokens": tokens, "prompt": PROMPT, "new": NEW, "text": text, "threads": threads}
    return Case(
        name=name, folder=folder, asked=asked, losses=losses, greedy=greedy, margins=margins, ids=ids,
    )  # fmt: skip


@torch.no_grad()
def computed(model: Any, tokens: list[int]) -> tuple[list[float], list[int], list[float]]:
    """Losses of the tokens, greedy tokens after the prompt (no cache), and the margins of those."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
    written, margins = tokens[:PROMPT], []
    for _ in range(NEW):
        last = model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1].float()
        best = last.topk(2)
        written = [*written, int(best.indices[0])]
        margins.append(float(best.values[0] - best.values[1]))
    return losses, written[PROMPT:], margins
