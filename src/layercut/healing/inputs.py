"""Checks of healing's inputs: token ids, rows of them held out, and a student that says which layers it lacks.

Before the least squares (`least_squares.py`) and endpoint tuning (`endpoint_tuning.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from layercut.errors import ConfigError
from layercut.models.decoder_stack import check_tokens
from layercut.models.runner import DecoderRunner, model_of
from layercut.segments import Segment, joined_segments

SHARE_HELD_OUT = 8
"""Where the caller gives no held-out rows, the last 1 in so many of the tokens' rows are held out, one at least."""


def with_held_out(tokens: torch.Tensor, heldout: torch.Tensor | None, dense: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to heal on and rows to score on; the last eighth of the first where none are given."""
    config = model_of(dense).config
    for name, rows in (("tokens", tokens), ("heldout", heldout)):
        if rows is None:
            continue
        hint = "blocks of text: layercut.token_blocks(source, tokenizer, tokens=16384)"
        if not isinstance(rows, torch.Tensor):
            raise ConfigError(f"{name} is a {type(rows).__name__}; wanted are token ids [N, T], a tensor", hint)
        if rows.dim() != 2 or rows.dtype not in (torch.int64, torch.int32) or not len(rows) or rows.shape[1] < 2:
            raise ConfigError(
                f"{name} has the shape {list(rows.shape)} and type {rows.dtype}; wanted are token ids [N, T], T > 1",
                hint,
            )
        check_tokens(rows, config, getattr(config, "name_or_path", "") or "the model")
    if heldout is not None:
        return tokens, heldout
    if len(tokens) < 2:
        raise ConfigError("of one row of tokens none can be held out", "give more rows, or heldout=")
    held = max(1, len(tokens) // SHARE_HELD_OUT)
    return tokens[:-held], tokens[-held:]


def kept_positions(student: DecoderRunner, dense: DecoderRunner) -> list[int]:
    """Positions, in the dense model, of the student's layers: from `original_layer_index` of both models' configs.

    The dense model may have been cut before; the index of both is then in the layers of the first model of all.
    """
    whole = dense.original_layer_index or list(range(len(dense)))
    indices = student.original_layer_index or (whole if len(student) == len(dense) else [])
    place = {original: position for position, original in enumerate(whole)}
    kept = [place.get(original, -1) for original in indices]
    if len(kept) != len(student) or len(place) != len(dense) or kept != sorted({*kept} - {-1}):
        raise ConfigError(
            f"which of the dense model's {len(dense)} layers the student's {len(student)} are cannot be seen from "
            "original_layer_index in its config",
            "cut it from the dense model with layercut.cut, which notes it",
        )
    return kept


def removed_segments(student: DecoderRunner, dense: DecoderRunner) -> tuple[Segment, ...]:
    """What the student lacks of the dense model."""
    segments = joined_segments(set(range(len(dense))) - set(kept_positions(student, dense)))
    if not segments:
        raise ConfigError(
            f"the student has all {len(dense)} layers of the dense model: there is no cut to heal",
            "cut some first: student = layercut.cut(dense, segments)",
        )
    return segments
