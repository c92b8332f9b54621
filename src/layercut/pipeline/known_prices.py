"""What took long to find, kept in the run folder until its stage is done: one that was stopped goes on there.

Beside the run folder's artefacts (`run_folder.py`), which are of whole stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from layercut.distributed import processes
from layercut.files import write_json
from layercut.pipeline.run_folder import Run
from layercut.segments import Segment


class KnownPrices:
    """Prices of cuts by kind, and what else is named, in a file that a stopped stage goes on from.

    Each with the seconds that it took, which the stage counts as its own where an earlier command spent them.
    """

    def __init__(self, run: Run, stage: str) -> None:
        self.run, self.name, self.key = run, f"{stage}-prices", run.inputs_of(stage)
        found = processes.on_main(lambda: run.read(self.name)) or {}
        self.found_before: dict[str, list[Any]] = found["prices"] if found.get("key") == self.key else {}
        self.known = dict(self.found_before)

    def __call__(self, kind: str, cuts: Sequence[Segment], price: Callable[[], Any]) -> Any:
        """A price that is known, or that is found now and kept; the main process's counts."""
        return self.value(f"{kind} {'+'.join(map(str, cuts))}", price)

    def value(self, name: str, find: Callable[[], Any]) -> Any:
        """The same for any JSON value."""
        if name in self.found_before:
            self.run.took_before(self.found_before.pop(name)[1])
        elif name not in self.known:
            begun = time.perf_counter()
            self.known[name] = processes.from_main([find(), time.perf_counter() - begun])
            content = {"key": self.key, "prices": self.known}
            processes.on_main(lambda: write_json(self.run / f"{self.name}.json", content))
        return self.known[name][0]

    def forget_(self) -> None:
        """Remove them, now that the stage's artefact has what was wanted; those of other inputs stay."""

        def remove() -> None:
            if (self.run.read(self.name) or {}).get("key") == self.key:
                (self.run / f"{self.name}.json").unlink(missing_ok=True)

        processes.on_main(remove)
