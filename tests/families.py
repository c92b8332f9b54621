"""Tiny random models of every decoder that transformers ships, built from their own configs.

`model_types()` walks transformers' mappings, so a new release adds rows by itself; `tiny(model_type)` shrinks
the default config by names that configs share (SHRINK), then by the few facts single families need
(OVERRIDES).
"""

from __future__ import annotations

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
    "vocab_size": VOCAB, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embed_dim": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
    "n_positions": 128, "n_ctx": 128, "sliding_window": WINDOW, "window_size": WINDOW, "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW, "index_topk": 4, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "first_k_dense_replace": 2, "num_dense_layers": 2,
}  # fmt: skip
"""Applied where the config has the attribute."""
OTHER_SHRINK: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "d_model": 32, "depth": 2, "num_hidden_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "head_dim": 8, "intermediate_size": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "image_size": 32, "patch_size": 16, "out_hidden_size": 32,
    "projection_dim": 32, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
"""The same for the parts beside the decoder (vision and audio towers)."""


def _each(names: str, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names.split(), facts)


OVERRIDES: dict[str, dict[str, Any]] = {
    **_each("bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl", {"is_decoder": True}),
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 4, "hash_seed": 0, "axial_pos_shape": (4, 8),
        "axial_pos_embds_dim": (16, 16), "attention_head_size": 8, "feed_forward_size": 48,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "max_position_embeddings": 32,
        "num_hidden_layers": None},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "roc_bert": {"is_decoder": True, "pronunciation_vocab_size": 20, "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    **_each("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 sarvam_mla youtu "
        "bailing_hybrid mistral4", {"num_key_value_heads": 4}),
    **_each("bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper",
        {"decoder_layers": LAYERS, "encoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
        "is_decoder": True, "is_encoder_decoder": False}),
    "prophetnet": {"num_decoder_layers": LAYERS, "num_encoder_layers": 2, "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4, "is_decoder": True, "is_encoder_decoder": False},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [2,
        5]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    **_each("codegen gptj", {"rotary_dim": 8}),
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "num_layers": LAYERS},
    "ctrl": {"dff": 48},
    "xlnet": {"d_inner": 48},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "laurel_rank": 4},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "num_dense_layers": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
        "num_hidden_layers": None, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "layers_block_type": ["linear_attention", "hybrid",
        "linear_attention", "linear_attention"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16,
        "num_key_value_heads": 4, "mamba_dt_rank": 4, "n_mamba_heads": 2, "mamba_d_state": 8, "head_dim": None},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "linear_attention"] * 2,
        "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1,
        "head_dim": None},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8, "num_experts": 4},
    **_each("qwen3_next qwen3_5_text qwen3_5_moe_text", {"linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8}),
    "kimi_linear": {"num_key_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 8},
    "recurrent_gemma": {"lru_width": 32, "num_key_value_heads": 1},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 4,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cpmant": {"prompt_types": 2, "prompt_length": 4, "segment_types": 40, "dim_head": 8, "dim_ff": 48,
        "position_bias_max_distance": 64, "position_bias_num_buckets": 16},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "inkling2_text": {"n_layers_per_attn_res_block": 2, "unpadded_vocab_size": VOCAB, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": WINDOW, "d_rel": 4, "rel_extent": 32},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 6,
        "unpadded_vocab_size": VOCAB, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "sliding_window_size": WINDOW, "d_rel": 4, "rel_extent": 32},
    "inkling_text": {"unpadded_vocab_size": VOCAB, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 8, "sliding_window_size": WINDOW, "d_rel": 4, "rel_extent": 32},
    "longcat_flash": {"num_layers": LAYERS, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48,
        "num_key_value_heads": 4, "zero_expert_num": 1, "moe_topk": 2, "head_dim": 8},
    "qwen4_exp_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4},
    **_each("qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text paddleocr_vl_text glm4v_text glm_ocr_text glm46v_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}),
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.5}},
    "llama4_text": {"intermediate_size_mlp": 48},
}  # fmt: skip
"""Per model type, on top of SHRINK; a value None leaves the attribute at its default."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "zamba, three shared blocks": ("zamba", {"layers_block_type": ["linear_attention", "hybrid", "linear_attention",
        "hybrid", "linear_attention", "linear_attention", "hybrid", "linear_attention"]}),
    "gpt2, scores scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "qwen3_moe, every second sparse": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "qwen2, window in the upper half": ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}),
    "glm_moe_dsa, shared indexers": ("glm_moe_dsa", {"indexer_types": ["full", "full", "shared", "shared", "full",
        "shared", "full", "shared"]}),
    "ernie4_5_moe, every second sparse": ("ernie4_5_moe", {"moe_layer_interval": 2}),
    "llama4_text, every second sparse": ("llama4_text", {"interleave_moe_layer_step": 2}),
    "gemma3n_text, shared keys and values": ("gemma3n_text", {"num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4}),
    "gemma4_text, shared keys and values": ("gemma4_text", {"num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4}),
    "qwen4_exp_text, embeddings in two layers": ("qwen4_exp_text", {"ple_layer_ids": [2, 5], "ple_embed_dim": 8,
        "ngram_vocab_size_base": 50, "heads_per_ngram": 2, "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8}),
    "lfm2, attention by index": ("lfm2", {"layer_types": None, "full_attn_idxs": [1, 4, 6]}),
    "recurrent_gemma, pattern of two": ("recurrent_gemma", {"block_types": ["recurrent", "attention"]}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox, sequential residual": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, tied embeddings off": ("opt", {"tie_word_embeddings": False}),
    "llama, tied embeddings": ("llama", {"tie_word_embeddings": True}),
}  # fmt: skip
"""Families with per-layer rules switched on: name -> (model type, facts)."""

REQUIRED = ("is_decoder", "hidden_size_per_layer_input")
"""Facts without which a default config of some class is not even valid."""


def model_types() -> list[str]:
    """Model types of the causal-LM mapping, then the vision-language ones with a decoder."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + sorted(
        set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )


def model_class(model_type: str) -> type:
    """The class that `AutoModelForCausalLM` (or its vision-language sister) would take."""
    import transformers

    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        if model_type in names:
            name = names[model_type]
            cls = getattr(transformers, name if isinstance(name, str) else name[0])
            if cls.config_class is CONFIG_MAPPING[model_type]:  # else it takes only the text part of this config
                return cls
    return cls


def tiny_config(model_type: str, **facts: Any) -> Any:
    """A config of this model type with LAYERS layers and tiny sizes; `facts` go to the text part."""
    return CONFIG_MAPPING[model_type](**_tiny_facts(CONFIG_MAPPING[model_type], model_type, SHRINK, facts))


def _tiny_facts(cls: Any, model_type: str, shrink: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a config class; nested configs are shrunk too, the text part as a decoder."""
    own = {**OVERRIDES.get(model_type, {}), **facts} if shrink is SHRINK else {}
    default = cls(**{k: v for k, v in own.items() if k in REQUIRED})
    known = set(vars(default)) | set(cls.attribute_map)
    children = {}
    text = default.get_text_config(decoder=True)
    for name, value in vars(default).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            part, more = (SHRINK, facts) if value is text else (OTHER_SHRINK, {})
            children[name] = type(value)(**_tiny_facts(type(value), value.model_type, part, more))
    wanted = {**{k: v for k, v in shrink.items() if k in known}, **own}
    return {**children, **{k: v for k, v in wanted.items() if v is not None}}


def tiny(model_type: str, seed: int = 0, **facts: Any) -> Any:
    """A random model in float32 and eval mode; all weights are random, so that nothing cancels."""
    torch.manual_seed(seed)
    return randomize_(model_class(model_type)(tiny_config(model_type, **facts)).eval())


def check_size(model_type: str, most: int = 20_000_000, **facts: Any) -> None:
    """Raise ValueError where SHRINK does not reach a new family's sizes, before memory is spent on it."""
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(model_type)(tiny_config(model_type, **facts)).parameters())
    if size > most:
        raise ValueError(f"a tiny {model_type} would have {size:,} parameters; shrink it in OVERRIDES")


def randomize_(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype.is_floating_point:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens(length: int = 20, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Token ids [B, T], longer than WINDOW, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB - 4, (batch, length), generator=generator)
