"""Tiny random models built from configs, for every test that needs one. No network, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

VOCABULARY = 96


def tiny(config: Any, seed: int = 0) -> Any:
    """A random model in eval mode, weights frozen, as `models.load` hands them out."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model.to(torch.float32)


def llama(layers: int = 8, **changes: Any) -> Any:
    """A Llama of 8 layers whose layers matter: at the usual initialisation they hardly change the stream."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": layers, "max_position_embeddings": 128,
        "initializer_range": 0.15, "tie_word_embeddings": False,
    }  # fmt: skip
    return tiny(LlamaConfig(**(settings | changes)))


def gemma3(full: list[int], layers: int = 8, **changes: Any) -> Any:
    """A Gemma 3 whose layers attend to 16 tokens, but for those in `full`, which attend to everything."""
    types = ["full_attention" if i in full else "sliding_attention" for i in range(layers)]
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": layers,
        "sliding_window": 16, "layer_types": types, "max_position_embeddings": 128, "initializer_range": 0.15,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    return tiny(Gemma3TextConfig(**(settings | changes)))


def gpt2(layers: int = 6) -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 128}
    return tiny(GPT2Config(**sizes, initializer_range=0.15))


def some_tokens(rows: int = 6, window: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, window), generator=torch.Generator().manual_seed(seed))


def make_identity_(model: Any, positions: range) -> None:
    """Plant layers that do nothing: their output projections are zero."""
    for i in positions:
        layer = model.model.layers[i]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
