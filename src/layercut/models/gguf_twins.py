"""A GGUF file that keeps one matrix twice: tied embeddings, stored again as the head in another rounding.

Used by whatever opens a file (`models/gguf_header.py`) and by the loader (`models/loading.py`): the two are read as
the one that they were, in the finer rounding. Publishers' own files of tied models are like that: Qwen2.5-Coder-0.5B in
Q4_K_M has its embeddings in Q5_0 and its head in Q8_0, 4 % apart, and a fifth of the file is the coarser of the two.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TIED_WITHOUT_HEAD = frozenset({"llama", "qwen2", "qwen3"})
"""Architectures whose head llama.cpp takes from the embeddings where a file has none; each is tried by a test."""
SAMPLE = 1024
"""Rows that are compared, evenly spread over the vocabulary."""
BY_ROUNDING, BY_FLOAT = 0.15, 0.005
"""The largest share of a row's norm by which rounding puts two copies apart: 0.12 in Q3_K, 0.08 in Q4_0, 0.002 in
bfloat16. Matrices that were trained apart differ by more; those of no common origin by 1.4."""
Stored = tuple[int, int]
"""Of a tensor: its GGML type's number, and where in the file its bytes begin."""


def finer_twin(
    file: Path, architecture: str, shapes: dict[str, tuple[int, ...]], stored: dict[str, Stored]
) -> str | None:
    """Which of embeddings and head keeps more bits of a matrix that both hold.

    Args:
        file: a .gguf file.
        architecture: general.architecture.
        shapes: of its tensors, by name, the fastest dimension first.
        stored: how and where they are, by name.

    Returns:
        The name of the finer; None where they are two matrices, or the file has but one.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    if architecture not in TIED_WITHOUT_HEAD or HEAD not in shapes or shapes.get(EMBEDDING) != shapes[HEAD]:
        return None
    columns, count = shapes[HEAD][0], math.prod(shapes[HEAD][1:])
    rows = np.unique(np.linspace(0, count - 1, SAMPLE).astype(np.int64))
    plain, bits, is_float = [], [], []
    for name in (EMBEDDING, HEAD):
        kind, start = GGMLQuantizationType(stored[name][0]), stored[name][1]
        block, size = GGML_QUANT_SIZES[kind]
        raw = np.memmap(file, np.uint8, "r", offset=start, shape=(count, columns // block * size))
        try:
            plain.append(quants.dequantize(np.ascontiguousarray(raw[rows]), kind))
        except NotImplementedError:  # a type that gguf cannot decode; the loader says so
            return None
        bits.append(size / block)
        is_float.append(kind.name in ("F32", "F16", "BF16"))
    apart, norms = np.linalg.norm(plain[0] - plain[1], axis=1), np.linalg.norm(plain[1], axis=1)
    if not (apart <= (BY_FLOAT if all(is_float) else BY_ROUNDING) * norms).all():
        return None
    return EMBEDDING if bits[0] > bits[1] else HEAD


def read_as_one_(reader: Any, finer: str) -> None:
    """Have a reader's list of tensors show embeddings that are stored twice once.

    Args:
        reader: a `gguf.GGUFReader`; its `tensors` are changed in place.
        finer: of the two, the one that is kept.
    """
    kept = next(tensor for tensor in reader.tensors if tensor.name == finer)._replace(name=EMBEDDING)
    reader.tensors[:] = [kept if t.name == EMBEDDING else t for t in reader.tensors if t.name != HEAD]


def tie_(model: Any, finer: str) -> None:
    """Tie embeddings and head of a model into which both copies were read.

    Args:
        model: a causal LM of transformers, changed in place.
        finer: of the two, the one that both are afterwards.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight = head.weight = (head if finer == HEAD else embedding).weight
    model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
