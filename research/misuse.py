"""Processor time from a wrong command to its error: `python research/misuse.py`, for the commands of tests/misuses.py.

Each is a process of its own beside a model of 8 layers and 128 positions, run three times, or once where torch is
imported; the medians are written to research/results/misuse.json. Seconds by the clock stand beside them: they depend
on what else the machine does.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import family_census  # noqa: F401  puts the tests on the path
import folders
import misuses
from common import RESULTS, compact
from layercut.files import write_text
from layercut.pipeline.environment import environment

TIMES, TEXTS = 3, ("calibration.txt", "evaluation.txt")


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place, model = Path(folder, "place"), folders.write_model(Path(folder, "model"))
        place.mkdir()
        texts = [
            folders.write_text(Path(folder, name), i) for i, name in enumerate(("calibration.txt", "evaluation.txt"))
        ]
        names = {"model": model, "text": texts[0], "heldout": texts[1], "tmp": place}
        with misuses.litter(place, texts[0]):
            for command in (*misuses.EARLY, *misuses.LATER):
                took = []
                for _ in range(TIMES if command in misuses.EARLY else 1):
                    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                    done = subprocess.run(
                        [sys.executable, "-m", "layercut.cli", *misuses.argv(command, names)],
                        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": folder},
                    )  # fmt: skip
                    after = resource.getrusage(resource.RUSAGE_CHILDREN)
                    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                    took.append((cpu, time.perf_counter() - begun))
                cpu, wall = (round(statistics.median(column), 2) for column in zip(*took, strict=True))
                error = next((line for line in done.stderr.splitlines() if line.startswith("error")), "")
                rows.append({
                    "command": command, "early": command in misuses.EARLY, "exit": done.returncode, "cpu_seconds": cpu,
                    "seconds": wall, "error": error.replace(str(place), "{tmp}").replace(folder, "."),
                })  # fmt: skip
                print(*rows[-1].values(), sep=" | ", flush=True)
    facts = {"environment": environment(), "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg(), "times": TIMES}
    write_text(RESULTS / "misuse.json", compact({**facts, "rows": rows}))


if __name__ == "__main__":
    main()
