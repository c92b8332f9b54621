"""What every decoder-only model has: a stack of layers, a number of positions, a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layercut.errors import ModelError
from layercut.models.config_checks import COUNTS

OTHER_TOWERS = ("vision", "visual", "audio", "encoder", "image", "speech", "mtp", "depth_decoder")
"""Parts of a model whose layers are not the decoder's, by a word in their path."""
REPORTED_WINDOW = 2048
"""Tokens in the windows that perplexities are reported on, where a model reaches so far: the field's length."""
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configs call their number of positions: MPT the second, the decoders of Whisper the third."""
BEHIND_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Model types whose first token has the position behind the padding's: that many fewer are left."""


@dataclass(frozen=True)
class Decoder:
    """Where a model keeps its decoder layers."""

    path: str
    """Dotted name of the list inside the model, e.g. "model.layers"."""
    layers: Any
    """An nn.ModuleList; a few architectures keep an nn.ModuleDict."""
    config: Any
    """The (text) config that counts these layers."""

    def __len__(self) -> int:
        return len(self.layers)


def find_decoder(model: Any) -> Decoder:
    """The ModuleList of decoder layers of any architecture, and the config that counts them.

    Searched inside the text model only, so that vision or audio towers never match.
    """
    config = model.config.get_text_config(decoder=True)
    counts = {value for name in COUNTS if isinstance(value := getattr(config, name, None), int)}
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts
    ]
    # BERT's relatives keep their decoder under `encoder`: only prefer what is in no other tower
    lists = [item for item in lists if not any(word in item[0] for word in OTHER_TOWERS)] or lists
    if not lists:
        raise ModelError(
            f"no stack of {' or '.join(map(str, sorted(counts))) or 'any number of'} decoder layers "
            f"was found in {type(model).__name__}",
            "this architecture is not supported; see docs/families.md for those that are",
        )
    # of nested lists the outermost is the stack; of several, the one that weighs most
    path, layers = max(lists, key=lambda item: (-item[0].count("."), sum(p.numel() for p in item[1].parameters())))
    return Decoder(path, layers, config)


def count_layers(config: Any) -> int:
    """L, the number of decoder layers that a config promises; the model's own stack has the last word."""
    text = config.get_text_config(decoder=True)
    for name in COUNTS:
        if isinstance(value := getattr(text, name, None), int):
            return value
    raise ModelError(
        f"the config of this {config.model_type!r} does not count its layers ({', '.join(COUNTS)})",
        "use the model's own config.json",
    )


def positions(config: Any) -> int | None:
    """How many tokens in a row a model has positions for; None where its config sets no limit."""
    text = config.get_text_config()
    found = (value for name in POSITIONS if isinstance(value := getattr(text, name, None), int) and value > 0)
    limit = next(found, None)
    if limit is not None and text.model_type in BEHIND_PADDING:
        limit -= (text.pad_token_id or 0) + 1
    return limit


def reported_window(config: Any) -> int:
    """Tokens in a window that perplexity is reported on, where the user asks for none."""
    return min(REPORTED_WINDOW, positions(config) or REPORTED_WINDOW)


def check_tokens(tokens: torch.Tensor, config: Any, name: str) -> None:
    """Refuse tokens that the model has no embedding for."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        worst = int(tokens.max()) if int(tokens.max()) >= size else int(tokens.min())
        raise ModelError(
            f"the tokenizer of {name} gives token {worst:,}, and the model's vocabulary has {size:,}",
            "give the tokenizer files that belong to this model",
        )
