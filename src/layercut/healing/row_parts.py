"""How rows of tokens are done: whole, or each as several shorter ones that begin anew.

Beside endpoint tuning. What the dense model makes of rows is stored in their order, whichever way they are done, and is
read for parts of them (`offloaded.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from layercut.data.blocks import fingerprint
from layercut.errors import ConfigError


class RowParts(NamedTuple):
    """n rows of t tokens each, which are parts of longer ones."""

    tokens: torch.Tensor
    """Ids [n, t]."""
    rows: torch.Tensor
    """Of which row each is a part [n]."""
    starts: torch.Tensor
    """Where in that row it begins [n]."""

    @property
    def length(self) -> int:
        """t."""
        return self.tokens.shape[1]

    def split(self, count: int) -> list[RowParts]:
        """As of a tensor: so many each."""
        return [RowParts(*each) for each in zip(*(one.split(count) for one in self), strict=True)]


def row_parts(tokens: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor | None) -> list[RowParts]:
    """Some rows as they are done, those of one length after another."""
    window, found = tokens.shape[1], list[RowParts]()
    of_rows = torch.full_like(rows, window) if lengths is None else lengths[rows]
    for length in of_rows.unique().tolist():
        some = rows[of_rows == length]
        starts = torch.arange(0, window, length)
        found.append(
            RowParts(tokens[some].view(-1, length), some.repeat_interleave(len(starts)), starts.repeat(len(some)))
        )
    return found


def lengths_key(lengths: torch.Tensor | None) -> str:
    """What stands for the lengths in the key of what is stored of the rows; nothing where all are done whole."""
    return "" if lengths is None else f" lengths={fingerprint(lengths[:, None])}"


def check_lengths(lengths: torch.Tensor | None, tokens: torch.Tensor, stored: str | None) -> None:
    """Refuse lengths that rows cannot be done as, or that they were not done as where their states are stored."""
    if lengths is not None:
        rows, window = tokens.shape
        if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"row_lengths are a {type(lengths).__name__}, not whole numbers in a tensor",
                "torch.tensor([256] * len(tokens))",
            )
        if lengths.shape != (rows,) or lengths.min() < 2 or (window % lengths).any():
            raise ConfigError(
                f"row_lengths {list(lengths.shape)} from {lengths.min()} to {lengths.max()} are not for tokens "
                f"{[rows, window]}",
                "give a divisor of the row's tokens for each, 2 at least",
            )
    if stored not in (None, lengths_key(lengths)):
        raise ConfigError("the states were stored of rows of other lengths", "store them with the same row_lengths")
