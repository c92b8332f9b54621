"""The run folder: one artefact a stage, resumed by content, written atomically.

A stage's JSON carries a hash of everything that went into it, results of earlier stages included. A stage
whose artefact is there with the same hash is not run again; so a run that was killed goes on from the last
finished stage when the same command is given again, and a changed flag runs again just what depends on it. The
JSON file is taken away when its stage is run again and written last, by rename: where it is there, the stage
is whole.

Of several processes the main one holds the folder, decides whether a stage is whole, and writes; all get the same
artefact. The folder must lie where all of them can read it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from layercut import memory, processes
from layercut.errors import RunError
from layercut.files import as_recorded

Artefact = dict[str, Any]
TEXTS = ("text-calibration", "text-heldout", "text-tuning", "text-evaluation")
STAGES = (*TEXTS, "search", "cut", "fold", "heal", "quantize", "eval", "export", "summary")
PROOFS = ("tasks", "long")
"""Stages that run only where they are asked for."""
PACKAGES = ("layercut", "torch", "transformers", "accelerate", "safetensors", "datasets", "numpy", "compressed-tensors")


class Run:
    """A run folder, created or gone on with. Only one command at a time may hold it."""

    def __init__(self, folder: Path | str, *, force: bool = False) -> None:
        self.folder = Path(folder)
        self.seconds: dict[str, float] = {}
        self._hashes: dict[str, str] = {}
        self._lock: IO[str] | None = None

        def take() -> None:
            self._lock = self._open()
            if force:
                self._forget()

        processes.on_main(take)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    # --- stages ---

    def stage(
        self,
        name: str,
        inputs: Any,
        compute: Callable[[], Artefact],
        *,
        after: Sequence[str] = (),
        together: bool = False,
    ) -> Artefact:
        """The stage's artefact: read where it is there and of the same inputs, else computed and written.

        `inputs` is anything JSON can hold; `after` names the stages whose own inputs count as well. "files" in an
        artefact are further files of this folder without which the stage is not whole. together: several processes
        compute it, each its share of the rows; else the main one does, and the others wait.
        """
        self._hashes[name] = digest([name, inputs, [self._hashes[earlier] for earlier in after]])
        finished = processes.on_main(lambda: self._begin(name))
        if finished is None:
            begun = time.perf_counter()
            computed = compute() if together else processes.on_main(compute)
            memory.give_back()
            seconds = round(time.perf_counter() - begun, 2)
            finished = processes.on_main(lambda: self._finish(name, computed, seconds))
        if not isinstance(finished.get("seconds"), dict):
            self.seconds[name] = finished.get("seconds", 0.0)
        return finished

    def _begin(self, name: str) -> Artefact | None:
        """The stage's artefact where it is whole; else the folder is made ready for it."""
        finished = self.read(name)
        if finished is not None and self._whole(name, finished):
            return finished
        # what is about to be overwritten must not pass for whole, nor a summary of it for the present one
        for stale in (name, "summary"):
            (self / f"{stale}.json").unlink(missing_ok=True)
        self.event(name, 0, "started", 1, "")
        return None

    def _finish(self, name: str, computed: Artefact, seconds: float) -> Artefact:
        """Write what a stage computed."""
        self.seconds[name] = seconds
        # an artefact's own "seconds" stand, such as the summary's, which are those of all stages
        artefact = {"seconds": seconds} | computed | {"config_hash": self._hashes[name]}
        write_json(self / f"{name}.json", artefact)
        self.event(name, 0, "finished", seconds, "s")
        return restored(jsonable(artefact))  # what a later run reads, to the type

    def _whole(self, name: str, artefact: Artefact) -> bool:
        """Whether an artefact is of these inputs, and its files are there, and those in its record as they were."""
        files = artefact.get("files") or []
        there = artefact.get("config_hash") == self._hashes[name] and all((self / f).exists() for f in files)
        return there and as_recorded(self.folder, artefact.get("record", {}))

    def inputs_of(self, name: str) -> str:
        """Hash of all that goes into a stage that was begun, earlier stages included."""
        return self._hashes[name]

    def read(self, name: str) -> dict[str, Any] | None:
        """A stage's artefact, or None where there is none that can be read."""
        try:
            artefact = restored(json.loads((self / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        return artefact if isinstance(artefact, dict) else None

    # --- provenance ---

    def describe(self, config: dict[str, Any]) -> None:
        """Write config.yaml, with every default filled in, and env.json."""

        def write() -> None:
            write_text(self / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            write_json(self / "env.json", environment() | {"processes": count})

        count = processes.world()
        processes.on_main(write)

    def event(self, stage: str, step: int, name: str, value: float, unit: str) -> None:
        """Append one line to metrics.jsonl; of several processes the main one does."""
        if not processes.is_main():
            return
        now = round(time.time(), 3)
        event = {"time": now, "stage": stage, "step": step, "name": name, "value": value, "unit": unit}
        with (self / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(event)) + "\n")

    # --- the folder itself ---

    def _open(self) -> IO[str]:
        if self.folder.is_file():
            raise RunError(
                f"--out {self.folder} is a file", "name a folder that is new, empty, or holds a run"
            )
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self / "config.yaml").exists():
            raise RunError(
                f"--out {self.folder} is not empty and holds no layercut run",
                "name a folder that is new, empty, or holds a run",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self / "config.yaml").touch()
            # never through a link, of whoever made the folder, and nothing is truncated
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.fdopen(os.open(self / ".lock", flags, 0o666), "r+")
        except OSError as error:
            raise RunError(
                f"--out {self.folder} cannot be written: {error.strerror}",
                "name a folder that you may write to",
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another layercut is at work in {self.folder}", "wait for it to end, or name another --out"
            ) from None
        return lock

    def _forget(self) -> None:
        parts = ("compare*", "stability*", "frontier*", "tasks/*", *(f"{name}-*" for name in STAGES))
        more = (file for part in parts for file in self.folder.glob(f"{part}.json"))
        for artefact in (*(self / f"{name}.json" for name in (*STAGES, *PROOFS)), *more):
            artefact.unlink(missing_ok=True)


def digest(content: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(jsonable(content), sort_keys=True).encode()).hexdigest()[:16]


def jsonable(content: Any) -> Any:
    """Replace what JSON has no word for: infinite and undefined numbers become strings (`restored`), paths text."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [jsonable(value) for value in content]
    if isinstance(content, Path):
        return str(content)
    return content


NOT_FINITE = {str(number): number for number in (math.inf, -math.inf, math.nan)}


def restored(content: Any) -> Any:
    """The inverse of `jsonable` for numbers: "inf", "-inf" and "nan" in what was read from JSON are floats again."""
    if isinstance(content, str):
        return NOT_FINITE.get(content, content)
    if isinstance(content, dict):
        return {key: restored(value) for key, value in content.items()}
    return [restored(value) for value in content] if isinstance(content, list) else content


def write_json(path: Path, content: Any) -> None:
    """Write JSON, as every reader of the standard takes it, so that the file is there whole or not at all."""
    write_text(path, json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write text so that the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written: {error.strerror}", "free some space, or name another --out"
        ) from None


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in its place, over what an earlier run left there."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What ran this: hardware, platform, versions, the command."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "platform": platform.platform(),
        "hardware": gpu or cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
