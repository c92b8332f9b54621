"""Tiny random models of every decoder that transformers ships, built from their own configs.

`model_types()` walks transformers' mappings, so a new release adds rows by itself; `tiny(model_type)` shrinks the
default config by names that configs share (SHRINK), then by the few facts single families need (OVERRIDES).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LAYERS = 8
VOCAB = 96
WINDOW = 6

SHRINK: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embed_dim": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 2,
    "num_dense_layers": 2,
}
"""Applied where the config has the attribute."""

OVERRIDES: dict[str, dict[str, Any]] = {}
"""Per model type, on top of SHRINK; a value None leaves the attribute at its default."""

NOT_DECODERS: frozenset[str] = frozenset()


def model_types() -> list[str]:
    """Model types of the causal-LM mapping, then the vision-language ones with a decoder."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + sorted(
        set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )


def model_class(model_type: str) -> type:
    """The class that `AutoModelForCausalLM` (or its vision-language sister) would take."""
    import transformers

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    name = name if isinstance(name, str) else name[0]
    return getattr(transformers, name)


def tiny_config(model_type: str, **facts: Any) -> Any:
    """A config of this model type with LAYERS layers and tiny sizes; `facts` go to the text part."""
    cls = CONFIG_MAPPING[model_type]
    wanted = {**SHRINK, **OVERRIDES.get(model_type, {}), **facts}
    known = set(vars(cls())) | set(cls.attribute_map)
    return cls(**{k: v for k, v in wanted.items() if v is not None and (k in known or k in OVERRIDES.get(model_type, {}) or k in facts)})


def tiny(model_type: str, seed: int = 0, **facts: Any) -> Any:
    """A random model in float32 and eval mode; all weights are random, norms and biases too, so that nothing cancels."""
    torch.manual_seed(seed)
    model = model_class(model_type)(tiny_config(model_type, **facts)).eval()
    return randomize_(model)


def check_size(model_type: str, most: int = 3_000_000) -> None:
    """Raise ValueError where SHRINK does not reach a new family's sizes, before memory is spent on it."""
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(model_type)(tiny_config(model_type)).parameters())
    if size > most:
        raise ValueError(f"a tiny {model_type} would have {size:,} parameters; shrink it in OVERRIDES")


def randomize_(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dtype.is_floating_point:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens(length: int = 20, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Token ids [B, T], longer than WINDOW, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB - 4, (batch, length), generator=generator)


def clone(model: Any) -> Any:
    return copy.deepcopy(model)
