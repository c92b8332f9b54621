"""What healing is given: rows of token ids, how long they are, and a student that says which layers it lacks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from layercut.data.blocks import fingerprint
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
            got = f"{name} has the shape {list(rows.shape)} and type {rows.dtype}"
            raise ConfigError(f"{got}; wanted are token ids [N, T], T > 1", hint)
        check_tokens(rows, config, getattr(config, "name_or_path", "") or "the model")
    if heldout is not None:
        return tokens, heldout
    if len(tokens) < 2:
        raise ConfigError("of one row of tokens none can be held out", "give more rows, or heldout=")
    held = max(1, len(tokens) // SHARE_HELD_OUT)
    return tokens[:-held], tokens[-held:]


class Batch(NamedTuple):
    """n rows of t tokens, each a part of a longer row or a whole one."""

    tokens: torch.Tensor  # ids [n, t]
    rows: torch.Tensor  # of which row each is a part [n]
    starts: torch.Tensor  # where in that row it begins [n]
    token_weights: torch.Tensor | None = None  # factor of each token's loss [n, t]; None: 1
    answers: torch.Tensor | None = None  # bool [n, t], where the next-token loss alone counts; None: nowhere
    counted: torch.Tensor | None = None  # int64 [k], places in n * t of the tokens that weigh something; None: all
    weight: float = 1.0  # factor of the mean loss over the batch

    def some(self, part: slice) -> Batch:
        """Some of the rows."""
        weights, answers = (x if x is None else x[part] for x in (self.token_weights, self.answers))
        return Batch(self.tokens[part], self.rows[part], self.starts[part], weights, answers, weight=self.weight)

    def split(self, count: int) -> list[Batch]:
        """So many rows each."""
        return [self.some(slice(at, at + count)) for at in range(0, len(self.tokens), count)]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows to tune on, and how: whole, or each as several shorter ones that begin anew."""

    tokens: torch.Tensor  # ids [N, T]
    row_lengths: torch.Tensor | None = None  # int64 [N]: t of the parts that a row is done as, a divisor of T; None: T
    token_weights: torch.Tensor | None = None  # [N, T], as of a batch
    answers: torch.Tensor | None = None  # bool [N, T], as of a batch

    def __post_init__(self) -> None:
        (rows, window), lengths, weights, answers = self.shape, self.row_lengths, self.token_weights, self.answers
        if lengths is not None:
            if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int64, torch.int32):
                what = f"row_lengths are a {type(lengths).__name__}, not whole numbers in a tensor"
                raise ConfigError(what, "torch.tensor([256] * len(tokens))")
            if lengths.shape != (rows,) or lengths.min() < 2 or (window % lengths).any():
                what = f"row_lengths {list(lengths.shape)} from {lengths.min()} to {lengths.max()}"
                hint = "give a divisor of the row's tokens for each, 2 at least"
                raise ConfigError(f"{what} are not for tokens {[rows, window]}", hint)
        if weights is not None:
            if not isinstance(weights, torch.Tensor):
                what = f"token_weights are a {type(weights).__name__}, not a tensor"
                raise ConfigError(what, "torch.ones(tokens.shape)")
            if weights.shape != self.shape or not weights.isfinite().all() or weights.min() < 0:
                what = f"token_weights {list(weights.shape)} from {weights.min()} to {weights.max()}"
                hint = "give a finite weight of 0 or more for each token"
                raise ConfigError(f"{what} are not for tokens {[rows, window]}", hint)
        if answers is not None and (answers.dtype != torch.bool or answers.shape != self.shape):
            what = f"answers are {answers.dtype} {list(answers.shape)}, and tokens {[rows, window]}"
            raise ConfigError(what, "give True or False for each token: torch.zeros(tokens.shape, dtype=torch.bool)")

    @property
    def shape(self) -> torch.Size:
        """N and T."""
        return self.tokens.shape

    def first(self, count: int) -> Rows:
        """The first rows alone."""
        of_rows = (self.row_lengths, self.token_weights, self.answers)
        lengths, weights, answers = (x if x is None else x[:count] for x in of_rows)
        return Rows(tokens=self.tokens[:count], row_lengths=lengths, token_weights=weights, answers=answers)

    def parts(self, rows: torch.Tensor) -> list[Batch]:
        """Some rows as they are done, those of one length after another."""
        window, found = self.shape[1], list[Batch]()
        of_rows = torch.full_like(rows, window) if self.row_lengths is None else self.row_lengths[rows]
        for length in of_rows.unique().tolist():
            some, starts = rows[of_rows == length], torch.arange(0, window, length)
            of_tokens = (self.tokens, self.token_weights, self.answers)
            tokens, weights, answers = (x if x is None else x[some].view(-1, length) for x in of_tokens)
            assert tokens is not None
            rows_of_parts, starts = some.repeat_interleave(len(starts)), starts.repeat(len(some))
            found.append(Batch(tokens, rows_of_parts, starts, weights, answers))
        return found

    @property
    def lengths_key(self) -> str:
        """What stands for the lengths in the key of what is stored of the rows; nothing where all are done whole."""
        return "" if self.row_lengths is None else f" lengths={fingerprint(self.row_lengths[:, None])}"

    @property
    def digests(self) -> list[Any]:
        """Hashes of all of it."""
        hashes = [[fingerprint(self.tokens.cpu()), list(self.shape)], self.lengths_key]
        of_tokens = (x for x in (self.token_weights, self.answers) if x is not None)
        return hashes + [hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest() for x in of_tokens]


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
        words = f"the student has all {len(dense)} layers of the dense model: there is no cut to heal"
        raise ConfigError(words, "cut some first: student = layercut.cut(dense, segments)")
    return segments
