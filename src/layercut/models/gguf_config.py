"""The config of a GGUF file, as transformers reads it and corrected.

transformers takes a period of sliding layers and the scale of attention from its own defaults; llama.cpp takes them
from the file and from `models/llama_cpp_rules.py`.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

from layercut.models import llama_cpp_rules as rules
from layercut.models.gguf_header import corrupt, read_header, stamp

FULL, SLIDING = "full_attention", "sliding_attention"


def read_config(file: Path) -> Any:
    """The config of a .gguf file, with what llama.cpp makes of it: which layers slide, and how attention is scaled."""
    header = read_header(file)
    config = copy.deepcopy(_as_transformers_reads(file, stamp(file)))
    facts, layers = header.facts(), header.layers
    if getattr(config, "num_hidden_layers", layers) != layers:
        raise corrupt(file, f"transformers reads {config.num_hidden_layers} layers of it, it has {layers}")
    full = rules.full_layers(header.architecture, facts, layers)
    listed = getattr(config, "layer_types", None)
    if full and listed and {*listed} <= {FULL, SLIDING}:
        if len(full) != layers:
            raise corrupt(file, f"{rules.PATTERN} has {len(full)} entries for {layers} layers")
        config.layer_types = [FULL if each else SLIDING for each in full]
    if hasattr(config, "query_pre_attn_scalar"):
        heads, width = config.num_attention_heads, config.hidden_size
        scale = rules.attention_scale(header.architecture, width, heads, config.head_dim, layers)
        config.query_pre_attn_scalar = config.query_pre_attn_scalar if scale is None else scale
    return config


@lru_cache(maxsize=4)
def _as_transformers_reads(file: Path, told: tuple[int, ...]) -> Any:
    """Tied where the file keeps its embeddings twice; kept until the file's stamp is another.

    transformers reads every token's text to find it: 3 seconds for 49,000 tokens, 10 for 152,000.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.tie_word_embeddings = config.tie_word_embeddings or read_header(file).finer_twin is not None
    return config
