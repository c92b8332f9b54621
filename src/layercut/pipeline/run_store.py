"""The run folder: one artefact a stage, resumed by content, written atomically.

A stage's JSON carries a hash of everything that went into it, results of earlier stages included. A stage
whose artefact is there with the same hash is not run again; so a run that was killed is resumed after the last
finished stage when the same command is given again, and a changed flag runs again just what depends on it. The
JSON file is removed when its stage is run again and written last, by rename: where it is there, and it and the files
that it names are as they were written, the stage is whole.

A finished run is not replaced by one of other settings (`pipeline/provenance.py`), nor where its text, its model or
its code is another by now, unless --force is given: what is refused leaves the folder as it was.

Of several processes the main one holds the folder, decides whether a stage is whole, and writes; all get the same
artefact. The folder must lie where all of them can read it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Generic, NoReturn, TypeVar

import yaml
from safetensors import SafetensorError, safe_open

from layercut.distributed import processes
from layercut.errors import RunError
from layercut.files.json_values import (
    Damaged,
    check_seal,
    decode,
    digest,
    jsonable,
    restored,
    seal,
    write_json,
    write_text,
)
from layercut.files.reading import differing, record
from layercut.files.writing import disk_refusal, write_atomically, writing
from layercut.models import checkpoints, memory
from layercut.pipeline import provenance
from layercut.pipeline.artefacts import Artefact
from layercut.progress import say, warn

Kind = TypeVar("Kind", bound=Artefact)
TEXTS = ("text-evaluation", "text-calibration", "text-heldout", "text-tuning")
STAGES = (*TEXTS, "text-shared", "search", "cut", "fold", "heal", "quantize", "eval", "export", "summary")
PROOFS = ("tasks", "long", "evaluations", "capabilities", "probes")
"""Stages that run only where they are asked for."""
MAKING = {"search", "cut", "fold", "heal", "quantize", "frontier", "shares", "compare"}
"""Stages that make the model, in every round (`heal-1`), and what a comparison has of every method."""
JUDGED = ("-tasks", "-probes", "-others")
"""Of a comparison's, those that more is measured in."""
DESCRIBED = ("env.json", "config.yaml")
"""What a folder says of itself: who made it, with which settings."""


@dataclass
class RunStage(Generic[Kind]):
    """A stage of a run, as `Run.stage` opens it."""

    kind: type[Kind]
    open: bool = False
    """Whether this process is to find the artefact and set it as `found`."""
    found: Kind | None = None

    @property
    def artefact(self) -> Kind:
        """What the run folder holds, to the type that a later run reads; known once the stage is closed."""
        assert self.found is not None
        return self.found


class Run:
    """A run folder, created or resumed. Only one command at a time may hold it."""

    def __init__(self, folder: Path | str, *, force: bool = False) -> None:
        self.folder = Path(folder)
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []
        """Of each open stage, from the outermost: seconds that stages within it took before, in an earlier command."""
        self._hashes: dict[str, str] = {}
        self._after: dict[str, dict[str, str]] = {}
        self._artefacts: dict[str, Artefact] = {}
        self._lock: IO[str] | None = None
        self._force = force
        self._kept: set[str] = set()
        """Stages that are not made anew of other inputs, as the folder holds a finished run."""
        self._before: dict[str, bytes] = {}
        """A finished run's `DESCRIBED`, until something is replaced."""

        def take() -> None:
            self._lock = self._open()
            if force:
                self._forget()

        processes.on_main(take)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        for name, content in self._before.items() if error is not None else ():
            with write_atomically(self / name) as partial:
                partial.write_bytes(content)
        if self._lock:
            self._lock.close()
        if error is not None and (refused := disk_refusal(error, self.folder)):
            raise refused from error

    # --- stages ---

    @contextmanager
    def stage(
        self, kind: type[Kind], name: str, inputs: Any, *, after: Sequence[str] = (), together: bool = False
    ) -> Iterator[RunStage[Kind]]:
        """Open a stage, whose artefact is read where it is there and of the same inputs, else found and written.

            with run.stage(CutArtefact, "cut", inputs, after=["search"]) as stage:
                if stage.open:
                    stage.found = CutArtefact(…)
            cut = stage.artefact

        A stage within another is a part of it: its seconds are in the other's too, whenever it was run.
        """
        self._after[name] = {earlier: self._hashes[earlier] for earlier in after}
        self._hashes[name] = digest([name, inputs, [*self._after[name].values()]])
        stage = RunStage(kind, found=processes.on_main(lambda: self._begin(kind, name)))
        is_reused, earlier = stage.found is not None, 0.0
        if is_reused:
            yield stage
        else:
            memory.release_freed()  # what earlier stages held
            begun = time.perf_counter()
            self._within.append(0.0)
            try:
                if together:
                    stage.open = True
                    yield stage
                else:
                    with processes.main_alone() as work:
                        stage.open = work.mine
                        yield stage
                        work.value = stage.found
                    stage.found = work.value
            finally:
                earlier = self._within.pop()
            seconds, found = round(time.perf_counter() - begun + earlier, 2), stage.artefact
            stage.open, stage.found = False, processes.on_main(lambda: self._finish(name, found, seconds))
        self._artefacts[name] = stage.artefact
        if self._within:
            self._within[-1] += stage.artefact.seconds if is_reused else earlier
        elif not isinstance(stage.artefact.seconds, dict):
            self.seconds[name] = stage.artefact.seconds

    def took_before(self, seconds: float) -> None:
        """Count seconds that an earlier command spent on the stage that is open."""
        self._within[-1] += seconds

    def artefact(self, kind: type[Kind], name: str) -> Kind:
        """The artefact of a stage that was closed."""
        found = self._artefacts[name]
        assert isinstance(found, kind)
        return found

    def earlier(self, kind: type[Kind], name: str) -> Kind | None:
        """What a stage that this command does not ask for left of the same model, in an earlier command."""

        def find() -> Kind | None:
            content = self.read(name) or {}
            after = content.get("after")
            same = isinstance(after, dict) and after and all(self._hashes.get(each) == after[each] for each in after)
            return self._as_written(kind, name, content, "and left out") if same else None

        found = processes.on_main(find)
        if found is not None:
            self._hashes[name], self._artefacts[name] = found.config_hash, found
            self.seconds[name] = found.seconds
        return found

    def _begin(self, kind: type[Kind], name: str) -> Kind | None:
        """The stage's artefact where it is whole; else the folder is prepared for it."""
        content = self.read(name)
        if content is not None and (finished := self._whole(kind, name, content)) is not None:
            return finished
        if content is not None and self._is_kept(name, content):
            self._refuse(f"code that its {name}.json was made with is another by now")
        if not (self._kept and name.startswith("text-")):
            self._replace(name, "summary")
        self.event(name, 0, "started", 1, "")
        return None

    def _replace(self, *names: str) -> None:
        """What is about to be overwritten must not pass for whole, nor a summary of it for the present one."""
        self._before = {}
        for stale in names:
            (self / f"{stale}.json").unlink(missing_ok=True)

    def _refuse(self, why: str) -> NoReturn:
        hint = "name another --out, or pass --force to replace it"
        raise RunError(f"{self.folder} holds a finished run, and {why}", hint)

    def drawn(self, name: str, fingerprint: str) -> None:
        """Called before what was drawn for a stage of text is written."""
        earlier = self.read(name) if self._kept else None
        if earlier is not None and earlier.get("fingerprint") not in (None, fingerprint):
            self._refuse(f"its text is another by now ({name}.json)")
        if self._kept:
            self._replace(name)

    def _finish(self, name: str, found: Kind, seconds: float) -> Kind:
        """Write what a stage found."""
        if not isinstance(found.seconds, dict):  # the summary's are those of all stages
            found = replace(found, seconds=seconds)
        files = record([self / file for file in found.files], self.folder) if found.files else {}
        found = replace(
            found, versions=provenance.versions(), config_hash=self._hashes[name], after=self._after[name], record=files
        )
        content = seal(jsonable(found))
        write_json(self / f"{name}.json", content)
        self.event(name, 0, "finished", seconds, "s")
        return decode(type(found), content)  # what a later run reads, to the type

    def _whole(self, kind: type[Kind], name: str, content: dict[str, Any]) -> Kind | None:
        """The artefact, where it is of these inputs, as it was written, and its files too."""
        if content.get("config_hash") != self._hashes[name]:
            return None
        return self._as_written(kind, name, content, "and computed again")

    def _as_written(self, kind: type[Kind], name: str, content: dict[str, Any], otherwise: str) -> Kind | None:
        """The artefact, where it and its files are as they were written; otherwise: what is said to become of it."""
        try:
            check_seal(content)
            found = decode(kind, content)
            self._check_files(found.files, found.record)
        except Damaged as damage:
            warn(name, f"{name}.json is damaged {otherwise}: {damage}")
            return None
        return found

    def _is_kept(self, name: str, content: dict[str, Any]) -> bool:
        """Whether what a stage of a finished run left is of other inputs, as it was written, and not to be replaced.

        Text and model were looked at before; what is left is code, such as a criterion of one's own.
        """
        if name == "compare" or name.split("-")[0] not in self._kept or name.endswith(JUDGED):
            return False
        if content.get("config_hash") in (None, self._hashes[name]):
            return False
        try:
            check_seal(content)
        except Damaged:
            return False
        return True

    def _check_files(self, names: Sequence[str], recorded: Mapping[str, Any]) -> None:
        """Damaged where a file is gone or no longer what was recorded, or is no safetensors file to its end.

        Of weights only headers are read.
        """
        if missing := [name for name in names if not (self / name).exists()]:
            raise Damaged(f"{missing[0]} is gone")
        if changed := differing(self.folder, recorded):
            raise Damaged(f"{changed} is not as it was written")
        for name in {*recorded, *names}:
            if name.endswith(".safetensors"):
                try:
                    with safe_open(self / name, framework="pt"):
                        pass
                except (OSError, SafetensorError) as error:
                    raise Damaged(f"{name} cannot be read: {error}") from None

    def inputs_of(self, name: str) -> str:
        """Hash of all that goes into a stage that was begun, earlier stages included."""
        return self._hashes[name]

    def read(self, name: str) -> dict[str, Any] | None:
        """NAME.json of the folder, or None where there is none that can be read."""
        try:
            artefact = restored(json.loads((self / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            return None
        return artefact if isinstance(artefact, dict) else None

    # --- provenance ---

    def describe(self, config: dict[str, Any], checkpoint: checkpoints.Checkpoint | None = None) -> None:
        """Write config.yaml, with every default filled in, and env.json."""

        def write() -> None:
            changed, lost = provenance.would_be_lost(self.folder, config)
            if lost:
                raise RunError(
                    f"{self.folder} holds a finished run of other settings ({'; '.join(changed)}); this command would "
                    f"replace its {', '.join(lost)}",
                    "name another --out, or pass --force to replace it",
                )
            if others := provenance.other_versions(self.folder):
                say("run", f"begun with other versions: {', '.join(others)}")
            differences = provenance.differences(self.folder, config)
            if provenance.is_finished(self.folder) and not self._force:
                if checkpoint is not None and checkpoint.changed_since(self / checkpoints.DIGESTS):
                    self._refuse("the model that it was made of is another by now")
                self._kept = MAKING
                self._before = {name: (self / name).read_bytes() for name in DESCRIBED if (self / name).exists()}
            anew = self._force or bool(differences)
            write_json(self / "env.json", provenance.described(self.folder, count, anew=anew))
            write_text(self / "config.yaml", text)

        count, text = processes.world(), yaml.safe_dump(config, sort_keys=False)
        processes.on_main(write)

    def event(self, stage: str, step: int, name: str, value: float, unit: str) -> None:
        """Append one line to metrics.jsonl; of several processes the main one does."""
        if not processes.is_main():
            return
        now = round(time.time(), 3)
        event = {"time": now, "stage": stage, "step": step, "name": name, "value": value, "unit": unit}
        path = self / "metrics.jsonl"
        with writing(path), path.open("ab", buffering=0) as file:
            line, end = (json.dumps(jsonable(event)) + "\n").encode(), file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)  # half a line would spoil the next one
                raise

    # --- the folder itself ---

    def _open(self) -> IO[str]:
        if self.folder.is_file():
            raise RunError(f"--out {self.folder} is a file", "name a folder that is new, empty, or holds a run")
        with writing(self.folder):
            if self.folder.is_dir() and not provenance.is_empty(self.folder) and not provenance.is_run(self.folder):
                raise RunError(
                    f"--out {self.folder} is not empty and holds no layercut run",
                    "name a folder that is new, empty, or holds a run",
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            # never through a link, of whoever made the folder, and nothing is truncated
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.fdopen(os.open(self / ".lock", flags, 0o666), "r+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another layercut command is using {self.folder}", "wait for it to end, or name another --out"
            ) from None
        return lock

    def _forget(self) -> None:
        parts = ("compare*", "frontier*", "shares*", "tasks/*", *(f"{name}-*" for name in STAGES))
        more = (file for part in parts for file in self.folder.glob(f"{part}.json"))
        for artefact in (*(self / f"{name}.json" for name in (*STAGES, *PROOFS)), *more):
            artefact.unlink(missing_ok=True)
        for state in self.folder.glob("*-state.safetensors"):  # nor does a training go on
            state.unlink(missing_ok=True)
