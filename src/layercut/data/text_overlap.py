"""Whether two texts are the same in part, by their tokens: however they are called, stored and split into documents.

Beside `data/blocks.py`, which keeps whole documents apart. A passage is a run of PASSAGE tokens, known by a hash of 64
bits; of two sets of rows, the share of the one's different passages that are in the other as well is what they have in
common: Broder's containment (1997) of runs of tokens. In two texts that have nothing to do with each other it is near
0: what is left are formulas that many texts repeat, each of which counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

PASSAGE = 64
"""Tokens in a passage, some 45 words: no two people write these alike."""
MOST = 0.05
"""Share of the passages of a text on which is judged that other text may hold as well. A guess, not
measured: quotations and licences that a set of web pages repeats should come to less, copies come to all."""
BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64: the golden ratio's fraction."""


def passages(rows: torch.Tensor) -> np.ndarray:
    """Hashes of the different runs of PASSAGE tokens in rows [N, T] that follow each other; uint64, sorted.

    A polynomial of the mixed token ids modulo 2^64, by differences of its prefix sums.
    """
    ids = rows.flatten().numpy().astype(np.uint64)
    count = len(ids) - PASSAGE + 1
    if count < 1:
        return np.empty(0, np.uint64)
    with np.errstate(over="ignore"):
        mixed = (ids + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0x94D049BB133111EB)
        powers = _powers(BASE, len(ids))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * powers, dtype=np.uint64)])
        found = (sums[PASSAGE:] - sums[:count]) * _powers(pow(BASE, -1, 2**64), count)
    return np.unique(found)


def _powers(base: int, count: int) -> np.ndarray:
    """base^0 … base^(count - 1) modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def shared(judged: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Share of the passages of some rows that are in other rows as well; 0 where either has none."""
    a, b = (_union(rows) for rows in (judged, others))
    return float(np.isin(a, b, assume_unique=True).mean()) if len(a) and len(b) else 0.0


def _union(rows: Sequence[torch.Tensor]) -> np.ndarray:
    return np.unique(np.concatenate([passages(each) for each in rows])) if rows else np.empty(0, np.uint64)
