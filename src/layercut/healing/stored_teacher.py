"""The dense model's predictions on disk: its K likeliest tokens, and one bucket for all others.

Beside endpoint tuning, before it (`--teacher-topk K`). Computed once, they serve every epoch and every later run on
the same tokens, done as rows of the same lengths: from then on no layer of the dense model above the cut is run.
6 K + 2 bytes a token.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layercut.distributed import processes
from layercut.errors import ConfigError, RunError
from layercut.files.sizes import size
from layercut.files.writing import write_atomically, writing
from layercut.healing.row_parts import lengths_key, row_parts
from layercut.models.memory import slices
from layercut.models.runner import DecoderRunner

SHARD_TOKENS = 8192
"""Tokens in one file; a computation that was stopped is resumed with the first file that is missing."""


class StoredTeacher:
    """log p of the K likeliest tokens and of all others together, at some temperature, for tokens [N, T]."""

    def __init__(self, folder: Path, rows: int, rows_per_file: int, lengths: str) -> None:
        """Open the files; lengths: as how long rows these were done, `lengths_key`."""
        self.rows_per_file, self.lengths = rows_per_file, lengths
        self._closing = ExitStack()
        self._files: list[Any] = [
            self._closing.enter_context(safe_open(_shard(folder, i), framework="pt"))
            for i in range(-(-rows // rows_per_file))
        ]

    def read(self, rows: torch.Tensor, starts: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense model's predictions for parts of some rows, one after another."""
        found = []
        for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
            file, i = self._files[row // self.rows_per_file], row % self.rows_per_file
            of_row = slice(start + columns.start, start + columns.stop)
            found.append([file.get_slice(name)[i, of_row] for name in ("log_p", "index")])
        log_p, index = (torch.cat(parts) for parts in zip(*found, strict=True))
        return log_p.float().log_softmax(-1), index.long()

    def close(self) -> None:
        """Close the files."""
        self._closing.close()


def check_topk(k: int, vocabulary: int) -> None:
    """Refuse a K that leaves nothing of the vocabulary for the bucket."""
    if k >= vocabulary:
        raise ConfigError(
            f"--teacher-topk {k} is not below the model's {vocabulary} tokens",
            f"try --teacher-topk {min(64, max(1, vocabulary // 2))}",
        )


def stored_bytes(tokens: int, k: int) -> int:
    """What will be on disk: K tokens of 4 bytes and K + 1 log-probabilities of 2, for every token."""
    return tokens * (6 * k + 2)


@torch.no_grad()
def store_teacher(
    dense: DecoderRunner,
    tokens: torch.Tensor,
    k: int,
    folder: Path,
    *,
    key: str,
    temperature: float = 1.0,
    row_lengths: torch.Tensor | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> StoredTeacher:
    """Compute what is missing in the folder, and open it. Of several processes each computes a share of the files."""
    check_topk(k, dense.vocabulary)
    rows = max(1, SHARD_TOKENS // tokens.shape[1])
    done_as = lengths_key(row_lengths)
    key = f"{key} k={k} t={temperature:g} rows={rows}{done_as}"
    parts = list(slices(len(tokens), rows))
    missing = processes.on_main(lambda: _make_room(folder, key, [tokens[part].numel() for part in parts], k))
    for i in missing[processes.share(len(missing))]:
        lengths = None if row_lengths is None else row_lengths[parts[i]]
        likeliest = _likeliest(dense, tokens[parts[i]], k, temperature, lengths)
        with write_atomically(_shard(folder, i)) as partial:
            save_file(likeliest, partial, {"key": key})
        advance(tokens[parts[i]].numel())
    processes.barrier()
    return StoredTeacher(folder, len(tokens), rows, done_as)


def _make_room(folder: Path, key: str, tokens: list[int], k: int) -> list[int]:
    """Which files, each of so many tokens, the folder lacks; those of another key are gone if all are missing."""
    missing = [i for i in range(len(tokens)) if not _is_of(_shard(folder, i), key)]
    if len(missing) == len(tokens):
        shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    needed = stored_bytes(sum(tokens[i] for i in missing), k)
    if needed > (free := shutil.disk_usage(folder).free):
        raise RunError(
            f"--teacher-topk {k} needs {size(needed)} on disk; {size(free)} are free",
            f"free some space, or keep fewer: --teacher-topk {max(1, k // 4)}",
        )
    return missing


def _likeliest(
    dense: DecoderRunner, tokens: torch.Tensor, k: int, temperature: float, lengths: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """index int32 [B, T, K] and log_p float16 [B, T, K + 1], the bucket of all others last."""
    index = torch.empty(*tokens.shape, k, dtype=torch.int32)
    log_p = torch.empty(*tokens.shape, k + 1, dtype=torch.float16)
    for row in range(len(tokens)):
        ((batch, _, _),) = row_parts(tokens, torch.tensor([row]), lengths)
        final = dense.last(batch)
        for piece in dense.budget.logit_pieces(len(batch), batch.shape[1], dense.vocabulary * 4):
            log_all = (dense.exit(final[piece], batch[piece]).float() / temperature).log_softmax(-1)
            top = log_all.topk(k, dim=-1)
            others = log_all.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
            index[row].view(*batch.shape, k)[piece] = top.indices.int().cpu()
            # float16 ends at -65504: what is less likely than that has no weight either
            found = torch.cat([top.values, others], -1).clamp_min(-6e4).half().cpu()
            log_p[row].view(*batch.shape, k + 1)[piece] = found
    return {"index": index, "log_p": log_p}


def _shard(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.safetensors"


def _is_of(file: Path, key: str) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("key") == key
    except (OSError, SafetensorError):
        return False
