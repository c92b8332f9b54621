"""Prices that took long to find, kept in the run folder until their stage is done: one that was stopped goes on there.

Beside the run folder's artefacts (`run_store.py`), which are of whole stages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layercut.distributed import processes
from layercut.files.json_values import jsonable, restored, write_json
from layercut.pipeline.run_store import Run
from layercut.segments import Segment


class KnownPrices:
    """Prices of cuts on trial by kind, in a file that a stopped trial goes on from.

    Args:
        path: of the file.
        key: hash of all that they depend on; those of another are forgotten.
    """

    @classmethod
    def of(cls, run: Run, stage: str) -> KnownPrices:
        """Those of a stage that was begun."""
        return cls(run / f"{stage}-prices.json", run.inputs_of(stage))

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        found = processes.on_main(self._read)
        self.known: dict[str, float] = found["prices"] if found.get("key") == key else {}

    def _read(self) -> dict[str, Any]:
        try:
            found = restored(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("prices"), dict) else {}

    def __call__(self, kind: str, cuts: Sequence[Segment], price: Callable[[], float]) -> float:
        """A price that is known, or that is found now and kept; the main process's counts.

        Args:
            kind: of the price.
            cuts: that it is of.
            price: finds it.

        Returns:
            Nats per token.
        """
        name = f"{kind} {'+'.join(map(str, cuts))}"
        if name not in self.known:
            self.known[name] = processes.from_main(price())
            content = {"key": self.key, "prices": self.known}
            processes.on_main(lambda: write_json(self.path, jsonable(content)))
        return self.known[name]

    def forget_(self) -> None:
        """Remove them: the stage's artefact has what was wanted."""
        processes.on_main(lambda: self.path.unlink(missing_ok=True))
