"""How much is done at once: rows in a pass, logits in a piece, hidden states that are held. One place for these sizes.

The largest tensors there are, logits [rows, T, V] and hidden states [rows, T, D], are made a few rows at a time, so
that each stays within a budget of bytes. Stages ask here how many rows that is, and so do the functions beside them
that say what a stage takes (`models/cost.py`). Pure arithmetic; nothing depends on the results but memory and speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_BYTES = 256 * 2**20
"""Logits of a chunk of rows, in float32."""

PIECE_BYTES = 32 * 2**20
"""Logits of a piece of a tuning pass. Above it glibc no longer reuses memory but fetches it from the system, page by
page, each time."""

STREAM_BYTES = 512 * 2**20
"""Hidden states at the end of a sweep, held at once; those of one row at least."""

SWEPT_ROWS = 8
"""Rows of tokens that go through a layer together where weights are in memory, at most."""


def rows_per_chunk(tokens_per_row: int, vocabulary: int, budget_bytes: int = CHUNK_BYTES) -> int:
    """How many rows of logits fit the budget in float32: [rows, T, V] tensors are the largest there are.

    Args:
        tokens_per_row: T.
        vocabulary: V.
        budget_bytes: in bytes.

    Returns:
        At least 1.
    """
    return max(1, budget_bytes // (tokens_per_row * vocabulary * 4))


def logit_pieces(
    rows: int, window: int, bytes_per_token: int, budget_bytes: int = PIECE_BYTES
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a [rows, window] of tokens, so that the logits of each piece fit the budget.

    Args:
        rows: N.
        window: T.
        bytes_per_token: of the logits of one token.
        budget_bytes: of the logits of a piece.

    Yields:
        Slices of the rows and of the positions.
    """
    tokens = max(1, budget_bytes // bytes_per_token)
    for part in slices(rows, max(1, tokens // window)):
        for columns in slices(window, min(window, tokens)):
            yield part, columns


def tokens_at_once(logits: torch.Tensor, budget_bytes: int | None = None) -> int:
    """How many tokens' logits to have in float32 at a time.

    On a CPU so few (half a MiB a thread) that they, and what is made of them, stay in its inner cache (docs/log.md).

    Args:
        logits: [..., V].
        budget_bytes: for them in float32; by device where not given.

    Returns:
        At least 1.
    """
    budget = budget_bytes or (torch.get_num_threads() * 2**19 if logits.device.type == "cpu" else CHUNK_BYTES)
    return max(1, budget // (4 * logits.shape[-1]))


def swept_rows(stream_bytes: int, streams: int) -> int:
    """Rows per batch of a sweep, which at its end holds one hidden state for each set.

    Args:
        stream_bytes: bytes of a row's hidden state.
        streams: hidden states.

    Returns:
        Between 1 and SWEPT_ROWS.
    """
    return max(1, min(SWEPT_ROWS, STREAM_BYTES // (stream_bytes * streams)))


def slices(length: int, step: int) -> Iterator[slice]:
    """range(length) in runs of `step`.

    Args:
        length: how many in all.
        step: how many in a run, the last one excepted.

    Yields:
        Slices, in order.
    """
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
