"""Endpoint tuning of a model whose layers are on disk: each frozen layer is read as few times as can be.

Beside endpoint tuning. Below the first trained layer nothing changes, and the dense model never does: what both make
of the tuning tokens is computed in one sweep beforehand and kept in files (`store_states`), 2 D numbers a token. The
trained layers stay in memory. The frozen ones above them are read twice a step, upwards and downwards, for all rows of
the step together: of each layer's input for those rows is kept what the way down starts from again.

The same batches go through the same operations as in memory, and their gradients are added up in the same order.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import torch

from layercut.errors import RunError
from layercut.files.sizes import size
from layercut.healing.row_parts import RowParts, lengths_key, row_parts
from layercut.healing.tuning_pass import Batch, Pair, loss_gradient
from layercut.models.devices import placed
from layercut.models.passes import carry_, enter_all, rows_at_once, say_passes
from layercut.models.runner import DecoderRunner

KEY = "key"
"""The file that says of what tokens and model the states are; written last."""


@dataclass(frozen=True)
class FrozenStates:
    """Hidden states [N, T, D] in files, read by parts of rows."""

    files: dict[str, IO[bytes]]
    """By name: "shared" below the first trained layer, "wanted" what the objective compares with, where it does."""
    row: tuple[int, int]
    """T and D."""
    dtype: torch.dtype
    lengths: str
    """As how long rows these were done, `lengths_key`."""

    def read(self, name: str, rows: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        """Hidden states of parts of some rows."""
        found = torch.empty(len(rows), length, self.row[1], dtype=self.dtype)
        for into, row, start in zip(found, rows.tolist(), starts.tolist(), strict=True):
            self._seek(name, row, start)
            self.files[name].readinto(into.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return found

    def write_(self, name: str, parts: RowParts, states: torch.Tensor) -> None:
        """Write hidden states of parts of rows."""
        for row, start, state in zip(parts.rows.tolist(), parts.starts.tolist(), states.cpu(), strict=True):
            self._seek(name, row, start)
            self.files[name].write(state.contiguous().view(torch.uint8).numpy().tobytes())

    def _seek(self, name: str, row: int, start: int) -> None:
        window, hidden_size = self.row
        self.files[name].seek((row * window + start) * hidden_size * self.dtype.itemsize)

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


@torch.no_grad()
def store_states(
    dense: DecoderRunner,
    tokens: torch.Tensor,
    prefix: int,
    stop: int | None,
    folder: Path,
    *,
    rows: tuple[int, int],
    key: str,
    row_lengths: torch.Tensor | None = None,
    advance: Callable[[float], None] = lambda rows: None,
) -> FrozenStates:
    """Dense hidden states at `prefix` and at `stop`; those that are there already are not computed again."""
    names = ["shared"] if stop is None else ["shared", "wanted"]
    window = tokens.shape[1]
    done_as = lengths_key(row_lengths)
    key = f"{key} prefix={prefix} stop={stop} rows={rows} of={tuple(tokens.shape)}{done_as} dtype={dense.model.dtype}"
    if (folder / KEY).is_file() and (folder / KEY).read_text() == key:
        return _opened(folder, names, "rb", dense, window, done_as)
    _make_room(folder, len(names) * dense.stream_bytes(tokens.numel()))
    states = _opened(folder, names, "w+b", dense, window, done_as)
    per_step, per_pass = rows
    together = max(1, rows_at_once(dense, window, 1) // per_step) * per_step
    groups = torch.arange(len(tokens)).split(together)
    say_passes(dense, len(groups[0]) * window, 1, len(groups))
    for group in groups:
        steps = (row_parts(tokens, step, row_lengths) for step in group.split(per_step))
        batches = [batch for parts in chain(*steps) for batch in parts.split(per_pass * window // parts.length)]
        hidden, calls = enter_all(dense, [parts.tokens for parts in batches])
        for name, start, end in zip(names, (0, prefix), (prefix, stop), strict=False):
            for i in range(start, end or 0):
                carry_(dense, hidden, calls, i, i + 1)
                advance(len(group) / (stop or prefix))
            for parts, state in zip(batches, hidden, strict=True):
                states.write_(name, parts, state)
    for file in states.files.values():
        file.flush()
    (folder / KEY).write_text(key)
    return states


def _make_room(folder: Path, needed: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if needed > (free := shutil.disk_usage(folder).free):
        raise RunError(
            f"tuning from disk keeps {size(needed)} in {folder}; {size(free)} are free",
            "free some space, name another --out, or give fewer --tune-tokens",
        )


def _opened(
    folder: Path, names: Sequence[str], mode: str, dense: DecoderRunner, window: int, lengths: str
) -> FrozenStates:
    files = {name: (folder / name).open(mode) for name in names}
    return FrozenStates(files, (window, dense.hidden_size), dense.model.dtype, lengths)


@dataclass(frozen=True, kw_only=True)
class PairOnDisk(Pair):
    """A pair whose frozen layers are on disk."""

    states: FrozenStates
    first: int
    """The first trained layer: how far the way down goes."""

    def backward(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """As in memory, but with layers outermost, so that each is read twice a step."""
        with self.student.on_disk.up_and_down(self.prefix):
            yield from self._up_and_down(batches)

    def _up_and_down(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        student = self.student
        calls = [student.arguments(batch.tokens) for batch in batches]
        hidden = [self._states("shared", batch) for batch in batches]
        inputs: list[list[torch.Tensor]] = []
        for i in range(self.prefix, self.student_stop):
            inputs.append(hidden.copy())
            with torch.no_grad():
                carry_(student, hidden, calls, i, i + 1)
        slopes: list[torch.Tensor] = []
        for number, batch in enumerate(batches):
            wanted = self._states("wanted", batch) if "wanted" in self.states.files else None
            loss, slope = loss_gradient(self, batch, hidden[number], wanted)
            slopes.append(slope)
            yield loss
        del hidden
        for i in reversed(range(self.first, self.prefix + len(inputs))):
            before = inputs.pop()
            for number, arguments in enumerate(calls):
                leaf = before[number].detach().requires_grad_(i > self.first)
                student.plain_layer(i, leaf, arguments).backward(slopes[number])
                if leaf.grad is not None:
                    slopes[number] = leaf.grad
                if any(p.requires_grad for p in student.layers[i].parameters()):
                    yield slopes[number].new_empty(0, dtype=torch.float32)

    def _states(self, name: str, batch: Batch) -> torch.Tensor:
        found = self.states.read(name, batch.rows, batch.starts, batch.tokens.shape[1])
        return placed(found, self.student.device)
