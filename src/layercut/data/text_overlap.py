"""Whether two texts are the same in part, however they are called, stored and split into documents.

Beside `data/blocks.py`, which keeps whole documents apart. Two measures: runs of 64 tokens find copied passages, runs
of 13 words and whole short records find text that was split into records and shuffled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

PASSAGE = 64  # tokens in a passage, some 45 words: no two people write these alike
MOST = 0.05
"""Share of the passages of a text that is judged on, which other text may hold as well. A guess, not
measured: quotations and licences that a set of web pages repeats should come to less, copies come to all."""
RUN, SHORTEST = 13, 5
"""Words in a run (Brown et al. 2020, 2005.14165, Appendix C), and in the shortest record that is compared whole."""
MOST_WORDS = 0.1
"""Share of the words of a text that is judged on, which may stand in shared runs or short records. Measured on two
halves of one data set: Alpaca 1.9 %, Wikipedia passages 0.6 %, GSM8K 0.1 %, C4 0.0 %; shuffled copies come to all."""
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # a letter of scripts without blanks is a word of its own
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64: the golden ratio's fraction


def runs(ids: np.ndarray, length: int) -> np.ndarray:
    """Hashes of the runs of so many ids, uint64 [N - length + 1]: a polynomial modulo 2^64, by differences of sums."""
    count = len(ids) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)

    def powers(base: int, count: int) -> np.ndarray:
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    with np.errstate(over="ignore"):
        mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0x94D049BB133111EB)
        sums = np.cumsum(mixed * powers(BASE, len(ids)), dtype=np.uint64)
        sums = np.concatenate([np.zeros(1, np.uint64), sums])
        return (sums[length:] - sums[:count]) * powers(pow(BASE, -1, 2**64), count)


def _common(mine: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, int]:
    """Where each hash of a text stands first that another text has, too, unless both repeat it; of how many different.

    A passage that both repeat, such as a licence at the head of files, is in neither.
    """
    (own, first, times), (known, counts) = np.unique(mine, True, False, True), np.unique(others, return_counts=True)
    _, at, there = np.intersect1d(own, known, assume_unique=True, return_indices=True)
    return first[at[(times[at] == 1) | (counts[there] == 1)]], len(own)


def shared(judged: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Share of the different passages of some rows that are in other rows as well (Broder's containment, 1997).

    Rows [N, T] follow each other. 0 where either has no passage.
    """
    mine, theirs = (
        np.concatenate([np.empty(0, np.uint64), *(runs(rows.flatten().numpy(), PASSAGE) for rows in each)])
        for each in (judged, others)
    )
    found, different = _common(mine, theirs)
    return len(found) / different if different else 0.0


def shared_words(judged: Sequence[torch.Tensor], others: Sequence[torch.Tensor], tokenizer: Any) -> float:
    """Share of the words of some rows that stand in runs of RUN words, or in whole shorter records, of other rows.

    Each run and record counts once.
    """
    numbers: dict[str, int] = {}
    records, elsewhere = ([each for some in rows for each in _records(some, tokenizer, numbers)]
                          for rows in (judged, others))  # fmt: skip
    mine, theirs = (np.concatenate([np.empty(0, np.int64), *each]) for each in (records, elsewhere))
    found = np.zeros(len(mine), bool)
    for start in _common(runs(mine, RUN), runs(theirs, RUN))[0]:
        found[start : start + RUN] = True
    starts = np.cumsum([0, *map(len, records)])
    for length in range(SHORTEST, RUN):
        places = np.array([start for start, record in zip(starts, records, strict=False) if len(record) == length], int)
        own, first = np.unique(runs(mine, length)[places], return_index=True)
        for start in places[first[np.isin(own, runs(theirs, length))]]:
            found[start : start + length] = True
    return float(found.mean()) if len(found) else 0.0


def _records(rows: torch.Tensor, tokenizer: Any, numbers: dict[str, int]) -> list[np.ndarray]:
    """The words of each document among rows [N, T] that follow each other, as numbers that equal words share."""
    ids = rows.flatten()
    marks = [mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id) if mark is not None]
    borders = torch.isin(ids, torch.tensor(marks, dtype=ids.dtype)).nonzero()[:, 0].tolist()
    found = []
    for start, stop in zip([0, *(i + 1 for i in borders)], [*borders, len(ids)], strict=True):
        text = tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=True) if start < stop else ""
        words = WORD.findall(text.lower())
        found.append(np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64))
    return found
