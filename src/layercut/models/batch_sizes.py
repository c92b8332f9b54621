"""How much is done at once: rows in a pass, logits in a piece, hidden states that are held. One place for these sizes.

The largest tensors there are, logits [rows, T, V] and hidden states [rows, T, D], are made a few rows at a time, so
that each stays within a `Budget` of bytes. Stages ask the budget of their device (`memory.budget`) how many rows that
is, and so do the functions beside them that say what a stage takes (`models/cost.py`). Pure arithmetic; nothing depends
on the results but memory, speed and the last bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

CHUNK_BYTES = 256 * 2**20
"""CPU: logits of a chunk of rows, in float32."""

PIECE_BYTES = 32 * 2**20
"""CPU: logits of a piece of a tuning pass. Above it glibc no longer reuses memory but fetches it from the system, page
by page, each time."""

INNER_BYTES = 2**19
"""CPU: logits in float32 within a piece, a thread: they, and what is made of them, fit its inner cache."""

STREAM_BYTES = 512 * 2**20
"""CPU: hidden states at the end of a sweep, held at once; those of one row at least."""

SWEPT_ROWS = 8
"""CPU: rows of tokens that go through a layer together where weights are in memory, at most."""

PASS_TOKENS = 1024
"""CPU: tokens in one forward and backward pass: a step's gradient is summed over several. What is remembered for the
backward pass grows with them; speed does not (docs/log.md)."""

LAYER_TOKENS = 2048
"""CPU: tokens that go through a layer together where its inputs are recorded."""

MOST_TOKENS = 8192
"""Accelerator: tokens that go through a layer together, at most. They fill any of them; a guess."""

TOKEN_BYTES = 2**20
"""Accelerator: free memory that is reckoned for each of these tokens. A guess: a layer of Llama 3 8B takes 0.1 MiB."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one pass may take on a device: bytes of activations, logits and work space, and how many rows these hold."""

    logits: int
    """Bytes of a chunk of rows' logits in float32; up to five times as many are there while they are compared."""
    piece: int
    """Bytes of the logits of a piece of a tuning pass, in the model's format; four times as many are there."""
    inner: int
    """Bytes of logits in float32 within a piece; four times as many are there."""
    streams: int
    """Bytes of hidden states at the end of a sweep."""
    kept: int
    """Bytes that a pass keeps for its way back."""
    rows: int
    """Rows that go through a layer together, at most."""
    swept_tokens: int
    """Tokens that go through a layer together, at most."""
    tokens: int
    """The same where its inputs are recorded, or a pass keeps something for its way back."""
    pass_tokens: int
    """Tokens in a forward and backward pass: as many at least, whatever is kept for its way back."""
    most_rows: int = sys.maxsize
    """Rows of anything at once: with twice as many memory ran out."""

    @classmethod
    def of_cpu(cls, threads: int | None = None) -> Budget:
        """That of a CPU, by what its caches and the C library's allocator bear, measured (docs/log.md)."""
        return cls(
            logits=CHUNK_BYTES, piece=PIECE_BYTES, inner=INNER_BYTES * (threads or torch.get_num_threads()),
            streams=STREAM_BYTES, kept=0, rows=SWEPT_ROWS, swept_tokens=sys.maxsize,
            tokens=LAYER_TOKENS, pass_tokens=PASS_TOKENS,
        )  # fmt: skip

    @classmethod
    def of_accelerator(cls, free: int) -> Budget:
        """That of an accelerator: shares of its free memory, which leave room for what is made of them. Guesses."""
        tokens = min(MOST_TOKENS, max(256, _power_of_two(free // TOKEN_BYTES)))
        share = _power_of_two(free)  # between free / 2 and free
        return cls(
            logits=share // 16, piece=share // 32, inner=share // 64, streams=share // 4, kept=share // 4,
            rows=tokens, swept_tokens=tokens, tokens=tokens, pass_tokens=min(PASS_TOKENS, tokens),
        )  # fmt: skip

    def divided(self, by: int, most_rows: int = sys.maxsize) -> Budget:
        """A smaller one."""
        smaller = {name: max(1, value // by) for name, value in vars(self).items()}
        return replace(self, **smaller | {"most_rows": most_rows})

    def least(self, other: Budget) -> Budget:
        """The smaller of both, figure by figure."""
        return replace(self, **{name: min(value, getattr(other, name)) for name, value in vars(self).items()})

    def logit_rows(self, window: int, vocabulary: int) -> int:
        """Rows whose logits are had at once in float32: [rows, T, V] tensors are the largest there are."""
        return max(1, min(self.most_rows, self.logits // (window * vocabulary * 4)))

    def logit_tokens(self, vocabulary: int) -> int:
        """Positions of a row whose logits are had at once in float32."""
        return max(1, self.logits // (4 * vocabulary))

    def logit_pieces(self, rows: int, window: int, bytes_per_token: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of a [rows, window] of tokens, so that the logits of each piece fit."""
        tokens = max(1, self.piece // bytes_per_token)
        for part in slices(rows, max(1, tokens // window)):
            for columns in slices(window, min(window, tokens)):
                yield part, columns

    def float_tokens(self, vocabulary: int) -> int:
        """Tokens whose logits are in float32 at a time, within a piece."""
        return max(1, self.inner // (4 * vocabulary))

    def swept_rows(self, window: int, stream_bytes: int, streams: int) -> int:
        """Rows per batch of a sweep, which at its end holds one hidden state for each set."""
        return max(1, min(self.layer_rows(window), self.streams // (stream_bytes * streams)))

    def layer_rows(self, window: int) -> int:
        """Rows that go through a layer together, without gradients."""
        return max(1, min(self.rows, self.most_rows, self.swept_tokens // window))

    def recorded_rows(self, window: int) -> int:
        """Rows that go through a layer together where its inputs are recorded."""
        return max(1, min(self.most_rows, self.tokens // window))

    def pass_rows(self, window: int, kept_bytes: int) -> int:
        """Rows in one forward and backward pass."""
        tokens = max(self.pass_tokens, min(self.tokens, self.kept // max(1, kept_bytes)))
        return max(1, min(self.most_rows, tokens // window))


def _power_of_two(number: int) -> int:
    """The largest that is not above a number; 1 for what is below it."""
    return 1 << (max(1, number).bit_length() - 1)


def kept_bytes(weights: Sequence[torch.Size], itemsize: int) -> int:
    """Bytes that a layer keeps of a token for a backward pass, told from its weights: twice what they read and write.

    Of experts' weights, stacked, up to eight are reckoned. On the safe side: of Llama 3 8B 2.5 times what was kept.
    """
    widths = [sum(shape[-2:]) * min(8, shape[:-2].numel()) for shape in weights if len(shape) > 1]
    return 2 * sum(widths) * itemsize


def slices(length: int, step: int) -> Iterator[slice]:
    """range(length) in runs of `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
