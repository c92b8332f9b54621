"""Endpoint tuning of a model whose layers are on disk: each frozen layer is read as few times as can be.

Below the first trained layer nothing changes, and the dense model never does: what both make of the tuning tokens is
computed in one sweep beforehand and kept in files (`store_states`), 2 D numbers a token. The trained layers stay in
memory. The frozen ones above them are read twice a step, upwards and downwards, for all rows of the step together: of
each layer's input for those rows is kept what the way down starts from again.

The same batches go through the same operations as in memory, and their gradients are added up in the same order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import torch

from layercut.errors import RunError
from layercut.files import size
from layercut.healing.inputs import Batch, Rows
from layercut.healing.tuning_pass import Pair, loss_gradient
from layercut.models.memory import placed
from layercut.models.runner import carry_, enter_all, rows_at_once, say_passes
from layercut.progress import bar

KEY = "key"  # the file that says of what tokens and model the states are; written last


@dataclass(frozen=True)
class FrozenStates:
    """Hidden states [N, T, D] in files, read by parts of rows."""

    files: dict[str, IO[bytes]]
    """By name: "shared" below the first trained layer, "last" of the dense model, where the objective needs it."""
    row: tuple[int, int]  # T and D
    dtype: torch.dtype
    lengths_key: str  # as how long rows these were done, `Rows.lengths_key`

    def read(self, name: str, batch: Batch) -> torch.Tensor:
        """Hidden states [n, t, D] of parts of some rows."""
        found = torch.empty(*batch.tokens.shape, self.row[1], dtype=self.dtype)
        for into, row, start in zip(found, batch.rows.tolist(), batch.starts.tolist(), strict=True):
            self._seek(name, row, start)
            self.files[name].readinto(into.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return found

    def write_(self, name: str, batch: Batch, states: torch.Tensor) -> None:
        """Write hidden states of parts of rows."""
        for row, start, state in zip(batch.rows.tolist(), batch.starts.tolist(), states.cpu(), strict=True):
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
def store_states(pair: Pair, rows: Rows, folder: Path, *, per_step: int, per_pass: int, key: str) -> FrozenStates:
    """Dense hidden states at `prefix` and at the end; those that are there already are not computed again."""
    dense, (count, window) = pair.dense, rows.shape
    names = ["shared", "last"] if pair.objective.needs_dense else ["shared"]
    stops = [pair.prefix, len(dense)][: len(names)]
    key = f"{key} stops={stops} rows={per_step, per_pass} of={count, window}{rows.lengths_key} {dense.model.dtype}"

    def opened(mode: str) -> FrozenStates:
        files = {name: (folder / name).open(mode) for name in names}
        return FrozenStates(files, (window, dense.hidden_size), dense.model.dtype, rows.lengths_key)

    if (folder / KEY).is_file() and (folder / KEY).read_text() == key:
        return opened("rb")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed = len(names) * dense.stream_bytes(count * window)
    if needed > (free := shutil.disk_usage(folder).free):
        words = f"tuning from disk keeps {size(needed)} in {folder}; {size(free)} are free"
        raise RunError(words, "free some space, name another --out, or give fewer --tune-tokens")
    states = opened("w+b")
    together = max(1, rows_at_once(dense, window, 1) // per_step) * per_step
    groups = torch.arange(count).split(together)
    say_passes(dense, len(groups[0]) * window, 1, len(groups))
    with bar("running the frozen layers once", count) as advance:
        for group in groups:
            steps = chain.from_iterable(rows.parts(step) for step in group.split(per_step))
            batches = [each for parts in steps for each in parts.split(per_pass * window // parts.tokens.shape[1])]
            hidden, calls = enter_all(dense, [batch.tokens for batch in batches])
            for name, start, end in zip(names, [0, *stops], stops, strict=False):
                for i in range(start, end):
                    carry_(dense, hidden, calls, i, i + 1)
                    advance(len(group) / stops[-1])
                for batch, state in zip(batches, hidden, strict=True):
                    states.write_(name, batch, state)
    for file in states.files.values():
        file.flush()
    (folder / KEY).write_text(key)
    return states


@dataclass(frozen=True, kw_only=True)
class PairOnDisk(Pair):
    """A pair whose frozen layers are on disk."""

    states: FrozenStates
    first: int  # the first trained layer: how far the way down goes

    def backward(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """As in memory, but with layers outermost, so that each is read twice a step."""
        student, prefix = self.student, self.prefix
        with student.on_disk.up_and_down(prefix):
            calls = [student.arguments(batch.tokens) for batch in batches]
            hidden = [self._read("shared", batch) for batch in batches]
            inputs: list[list[torch.Tensor]] = []
            for i in range(prefix, len(student)):
                inputs.append(hidden.copy())
                with torch.no_grad():
                    carry_(student, hidden, calls, i, i + 1)
            slopes: list[torch.Tensor] = []
            for batch, out in zip(batches, hidden, strict=True):
                last = self._read("last", batch) if "last" in self.states.files else None
                loss, slope = loss_gradient(self, batch, out, last)
                slopes.append(slope)
                yield loss
            del hidden
            for i in reversed(range(self.first, len(student))):
                before = inputs.pop()
                for number, arguments in enumerate(calls):
                    leaf = before[number].detach().requires_grad_(i > self.first)
                    student.plain_layer(i, leaf, arguments).backward(slopes[number])
                    if leaf.grad is not None:
                        slopes[number] = leaf.grad
                    if any(p.requires_grad for p in student.layers[i].parameters()):
                        yield slopes[number].new_empty(0, dtype=torch.float32)

    def _read(self, name: str, batch: Batch) -> torch.Tensor:
        return placed(self.states.read(name, batch), self.student.device)
