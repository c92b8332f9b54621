"""A GGUF file that keeps one matrix twice: tied embeddings, stored again as the head in another rounding.

Used where a model's own file is opened (`models/gguf_header.py`) and loaded (`models/loading.py`): the two are read as
the one that they were, in the finer rounding. There are such files of tied models: Qwen2.5-Coder-0.5B in Q4_K_M has its
embeddings in Q5_0 and its head in Q8_0, 4 % apart, and a fifth of the file is the coarser of the two.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TIED_WITHOUT_HEAD = frozenset({"llama", "qwen2", "qwen3"})
"""Architectures whose head llama.cpp takes from the embeddings where a file has none; each is tried by a test."""
ERRORS = {
    "F32": 0.0, "F16": 0.0002, "BF16": 0.0017, "Q8_0": 0.0054, "Q6_K": 0.018, "Q5_1": 0.038, "Q5_K": 0.036,
    "Q5_0": 0.043, "Q4_K": 0.071, "IQ4_NL": 0.076, "Q4_1": 0.078, "Q4_0": 0.086, "Q3_K": 0.151, "Q2_K": 0.297,
}  # fmt: skip
"""By what share of its norm rounding to a GGML type moves a row of Gaussian numbers. Pairs of other types stay two."""
SLACK = 2.0
"""Rows of heavier tails (Student's t, 4 degrees) are moved up to 1.9 times as far."""
ROWS = 8192
"""That are compared at once."""


class TensorPlace(NamedTuple):
    """How and where a tensor is in a file."""

    kind: int
    """Number of its GGML type."""
    start: int
    """Byte at which it begins."""
    shape: tuple[int, ...]
    """The fastest dimension first."""


@lru_cache(maxsize=8)
def finer_twin(
    file: Path, stamp: tuple[int, ...], architecture: str, embedding: TensorPlace | None, head: TensorPlace | None
) -> str | None:
    """Which of embeddings and head keeps more bits of a matrix that both hold, row for row."""
    from gguf import GGMLQuantizationType

    if embedding is None or head is None or architecture not in TIED_WITHOUT_HEAD or embedding.shape != head.shape:
        return None
    kinds = [GGMLQuantizationType(each.kind).name for each in (embedding, head)]
    if not all(kind in ERRORS for kind in kinds):
        return None
    first, second = (ERRORS[kind] for kind in kinds)
    count, limit = math.prod(head.shape[1:]), SLACK * math.hypot(first, second)
    for begin in range(0, count, ROWS):
        rows = slice(begin, min(begin + ROWS, count))
        with np.errstate(all="ignore"):  # a file in the other order of bytes holds any numbers
            one, other = _plain(file, embedding, rows), _plain(file, head, rows)
            norms = np.linalg.norm(other, axis=1)
            within = np.linalg.norm(one - other, axis=1) <= limit * np.maximum(norms, 0.01 * np.median(norms))
        if not within.all():
            return None
    return EMBEDDING if first < second else HEAD


def _plain(file: Path, stored: TensorPlace, rows: slice) -> np.ndarray:
    """Some rows of a matrix, decoded."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType(stored.kind)
    block, size = GGML_QUANT_SIZES[kind]
    width = stored.shape[0] // block * size
    place = stored.start + rows.start * width
    raw = np.memmap(file, np.uint8, "r", offset=place, shape=(rows.stop - rows.start, width))
    return quants.dequantize(np.ascontiguousarray(raw), kind)


def read_as_one_(reader: Any, finer: str) -> None:
    """Have a reader's list of tensors show embeddings that are stored twice once."""
    kept = next(tensor for tensor in reader.tensors if tensor.name == finer)._replace(name=EMBEDDING)
    reader.tensors[:] = [kept if t.name == EMBEDDING else t for t in reader.tensors if t.name != HEAD]


def tie_(model: Any, finer: str) -> None:
    """Tie embeddings and head of a model into which both copies were read."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight = head.weight = (head if finer == HEAD else embedding).weight
    model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
