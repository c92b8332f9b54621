"""The cut as a configuration of mergekit, with which anybody can repeat it without layercut.

    mergekit-yaml mergekit.yaml OUT

A passthrough merge of one model with itself: each slice copies a run of the source's layers. What healing and
quantization change is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import yaml

NAME = "mergekit.yaml"


def mergekit_config(model: str, original_layer_index: Sequence[int], dtype: str) -> str:
    """The cut as a passthrough merge."""
    slices = [{"sources": [{"model": model, "layer_range": list(run)}]} for run in runs(original_layer_index)]
    config = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    about = "# The cut alone, as it was before healing: mergekit-yaml mergekit.yaml OUT\n"
    return about + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def runs(original_layer_index: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 5, 6] -> [(0, 3), (5, 7)]: half-open, as mergekit's layer_range is."""
    steps = enumerate(pairwise(original_layer_index), start=1)
    starts = [0, *(i for i, (before, after) in steps if after != before + 1), len(original_layer_index)]
    return [(original_layer_index[a], original_layer_index[b - 1] + 1) for a, b in pairwise(starts)]
