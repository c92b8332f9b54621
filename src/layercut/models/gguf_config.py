"""Corrections to transformers' reading of a GGUF file: what it leaves out of the config, and sizes that the file lacks.

Between `models/gguf_header.py` (the header) and `models/loading.py` (which loads). transformers takes a period of
sliding layers and the scale of attention from its own defaults; llama.cpp takes them from the file and from
`models/llama_cpp_rules.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from layercut.errors import ModelError
from layercut.models import llama_cpp_rules as rules
from layercut.models.gguf_header import Header, corrupt

FULL, SLIDING = "full_attention", "sliding_attention"
SLACK = 2
"""How many times the weights of the file a config may call for: a few that are missing are named by the loader."""


def correct_(config: Any, header: Header) -> None:
    """Write into a config what llama.cpp makes of the file: which layers slide, and how attention is scaled."""
    facts, layers = header.facts(), header.layers
    if getattr(config, "num_hidden_layers", layers) != layers:
        raise corrupt(header.file, f"transformers reads {config.num_hidden_layers} layers of it, it has {layers}")
    full = rules.full_layers(header.architecture, facts, layers)
    listed = getattr(config, "layer_types", None)
    if full and listed and {*listed} <= {FULL, SLIDING}:
        if len(full) != layers:
            raise corrupt(header.file, f"{rules.PATTERN} has {len(full)} entries for {layers} layers")
        config.layer_types = [FULL if each else SLIDING for each in full]
    if hasattr(config, "query_pre_attn_scalar"):
        heads, width = config.num_attention_heads, config.hidden_size
        scale = rules.attention_scale(header.architecture, width, heads, config.head_dim, layers)
        config.query_pre_attn_scalar = config.query_pre_attn_scalar if scale is None else scale


def check_size(config: Any, header: Header, auto: Any) -> None:
    """Refuse a config that calls for more weights than the file holds, before room for them is made.

    The model is built on the meta device, without data.
    """
    numbers = [value for value in config.to_dict().values() if isinstance(value, int)]
    if any(abs(value) > max(1 << 31, header.elements) for value in numbers):
        raise corrupt(header.file, "a size in its metadata is larger than the file")
    with torch.device("meta"):
        model = auto.from_config(config)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > header.elements * SLACK:
        raise ModelError(
            f"{header.file} holds {header.elements:,} weights, and its metadata calls for {wanted:,}",
            "fetch this file again",
        )
