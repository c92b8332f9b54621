"""The run folder: one JSON a stage, known again by a hash of its inputs, and written atomically.

The hash is of everything that went into a stage, results of earlier stages included. A stage whose artefact is there
with the same hash is not run again: a run that was killed goes on after its last finished stage, and a changed flag
runs again just what depends on it. The JSON file is removed when its stage is run again and written last, by rename.
Where it is there, and it and the files that it names are as they were written, the stage is whole.

What a finished command has made of a model is not replaced by a command of other settings, text, model or code unless
--force is given: what is refused leaves the folder as it was. What is only measured is measured again.

Of several processes the main one holds the folder, decides whether a stage is whole, and writes; all get the same
artefact. The folder must lie where all of them can read it.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, NoReturn, TypeVar

import yaml
from safetensors import SafetensorError, safe_open

from layercut.distributed import processes
from layercut.errors import RunError
from layercut.files import (
    Damaged,
    check_run_folder,
    check_seal,
    decode,
    differing,
    digest,
    disk_refusal,
    hold,
    jsonable,
    read_object,
    record,
    restored,
    seal,
    write_json,
    write_text,
    writing,
)
from layercut.models import checkpoints, memory
from layercut.pipeline.environment import environment, versions
from layercut.progress import enter_stage, leave_stage, warn
from layercut.segments import Segment

Kind = TypeVar("Kind")
MEASURED = ("eval", "export", "summary", "tasks", "capabilities", "compare", "text-shared")
"""Stages that any command makes anew where their inputs changed; of a comparison those that end in -judged."""
ELSEWHERE = {"out", "device", "place", "max_memory"}
"""Settings that change where a run is computed or what becomes of it, and not what it finds."""


@dataclass
class RunStage(Generic[Kind]):
    """A stage of a run, as `Run.stage` opens it."""

    kind: type[Kind]
    open: bool = False  # whether this process is to find the artefact and set it as `found`
    found: Kind | None = None
    files: Sequence[str] = ()  # files and folders of the run folder without which the artefact is not whole

    @property
    def artefact(self) -> Kind:
        """What the run folder holds, to the type that a later run reads; known once the stage is closed."""
        assert self.found is not None
        return self.found


class Run:
    """A run folder, created or resumed. Only one command at a time may hold it."""

    def __init__(self, folder: Path | str, *, force: bool = False) -> None:
        self.folder, self.force = Path(folder), force
        self.seconds: dict[str, float] = {}
        """By stage, without those that are a part of another."""
        self.hashes: dict[str, str] = {}
        """Of everything that goes into each stage that was begun, earlier stages included."""
        self._artefacts: dict[str, Any] = {}
        self._depth, self._earlier = 0, 0.0
        """Stages that are open, and the seconds that an earlier command spent on the innermost."""
        self._processes = processes.world()  # that share the run; inside `on_main` there is one
        self._config: dict[str, Any] | None = None
        """The command's, until config.yaml holds it."""
        self._finished: list[str] = []
        """Stages of a finished command, which are not made anew of other inputs."""
        self._lock: IO[str] | None = None
        processes.on_main(self._take)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
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
        self.hashes[name] = digest([name, inputs, [self.hashes[earlier] for earlier in after]])
        found, seconds = processes.on_main(lambda: self._begin(kind, name))
        stage = RunStage(kind, found=found)
        if found is not None:
            yield stage
            self._earlier += seconds
        else:
            if not self._depth:
                enter_stage(name)
            memory.release_freed()  # what earlier stages held
            outer, self._earlier, begun = self._earlier, 0.0, time.perf_counter()
            self._depth += 1
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
                self._depth -= 1
                spent, self._earlier = self._earlier, outer + self._earlier
            seconds = round(time.perf_counter() - begun + spent, 2)
            stage.open, stage.found = False, processes.on_main(lambda: self._finish(name, stage, seconds))
        self._artefacts[name] = stage.artefact
        if not self._depth:
            self.seconds[name] = seconds
            leave_stage(name)

    def took_before(self, seconds: float) -> None:
        """Count seconds that an earlier command spent on the stage that is open."""
        self._earlier += seconds

    def artefact(self, kind: type[Kind], name: str) -> Kind:
        """The artefact of a stage that was closed."""
        found = self._artefacts[name]
        assert isinstance(found, kind)
        return found

    def earlier(self, kind: type[Kind], name: str) -> Kind | None:
        """What a finished command measured of the same model, where this one does not ask for it."""
        content = self.read(name) if name in self._finished else None
        return decode(kind, content) if content is not None and not self._damage(content) else None

    def finished(self, *but: str) -> None:
        """Note that the command has reached its end: what it made, `but` some stages, is replaced by --force alone."""
        done = [name for name in self.hashes if name not in but]

        def note() -> None:
            self._describe()
            write_json(self / "env.json", self._env() | {"finished": sorted({*self._finished, *done})})

        processes.on_main(note)

    def _begin(self, kind: type[Kind], name: str) -> tuple[Kind | None, float]:
        """The stage's artefact where it is whole, and its seconds; else the folder is prepared for it."""
        content = self.read(name)
        damage = self._damage(content) if content is not None else None
        is_same = content is not None and content.get("config_hash") == self.hashes[name]
        if content is not None and is_same and not damage:
            try:
                found, spent = decode(kind, content), content.get("seconds")
            except Damaged as error:
                damage = str(error)
            else:
                return found, spent if isinstance(spent, float | int) else 0.0
        if content is not None and is_same:
            warn(name, f"{name}.json is damaged and computed again: {damage}")
        if not name.startswith("text-"):
            if content is not None and not damage:
                self._check(name, content)
            self._replace(name)
        elif name not in self._finished:
            self._replace(name)
        self.event(name, 0, "started", 1, "")
        return None, 0.0

    def _check(self, name: str, content: dict[str, Any]) -> None:
        """Refuse to replace what a finished command has made of other inputs."""
        is_made = name in self._finished and name not in MEASURED and not name.endswith("-judged")
        if is_made and content.get("config_hash") != self.hashes[name]:
            self._refuse(f"{name}.json is of other settings, text or code")

    def check(self, name: str, inputs: Callable[[], Any]) -> None:
        """Refuse what would replace a stage of a finished command, before another stage is begun that has it inside."""

        def refuse() -> None:
            if name in self._finished and (content := self.read(name)):
                self.hashes[name] = digest([name, inputs(), []])
                self._check(name, content)

        processes.on_main(refuse)

    def drawn(self, name: str, fingerprint: str) -> None:
        """Called before what was drawn for a stage of text is written: what is the same may replace itself."""
        if name in self._finished and (self.read(name) or {}).get("fingerprint") not in (None, fingerprint):
            self._refuse(f"{name}.json is of another text by now")
        self._replace(name)

    def _replace(self, name: str) -> None:
        """What is about to be overwritten must not pass for whole, nor a summary of it for the present one."""
        self._describe()
        for stale in (name, "summary"):
            (self / f"{stale}.json").unlink(missing_ok=True)

    def _finish(self, name: str, stage: RunStage[Kind], seconds: float) -> Kind:
        """Write what a stage found."""
        assert stage.found is not None
        content = jsonable(stage.found) | {
            "seconds": self.seconds if name == "summary" else seconds,
            "versions": versions(),
            "config_hash": self.hashes[name],
            "files": [*stage.files],
            "record": record([self / file for file in stage.files], self.folder),
        }
        content = seal(content)
        write_json(self / f"{name}.json", content)
        self.event(name, 0, "finished", seconds, "s")
        return decode(type(stage.found), content)  # what a later run reads, to the type

    def _damage(self, content: dict[str, Any]) -> str | None:
        """What of an artefact and its files is not as it was written; of weights only headers are read."""
        try:
            check_seal(content)
        except Damaged as damage:
            return str(damage)
        if missing := [name for name in content["files"] if not (self / name).exists()]:
            return f"{missing[0]} is gone"
        if changed := differing(self.folder, content["record"]):
            return f"{changed} is not as it was written"
        for name in content["record"]:
            if name.endswith(".safetensors"):
                try:
                    with safe_open(self / name, framework="pt"):
                        pass
                except (OSError, SafetensorError) as error:
                    return f"{name} cannot be read: {error}"
        return None

    def read(self, name: str) -> dict[str, Any] | None:
        """NAME.json of the folder, or None where there is none that can be read."""
        found = read_object(self / f"{name}.json")
        return restored(found) if found else None

    def _refuse(self, why: str) -> NoReturn:
        changed = f" ({'; '.join(found)})" if (found := self._changed()) else ""
        words = f"{self.folder} holds a finished run, and {why}{changed}: this command would replace it"
        raise RunError(words, "name another --out, or pass --force to replace it")

    # --- what the folder says of itself ---

    def describe(self, config: dict[str, Any], checkpoint: checkpoints.Checkpoint | None = None) -> None:
        """Have config.yaml, with every default filled in, and env.json; a finished run's stay until it changes."""

        def write() -> None:
            self._config = yaml.safe_load(yaml.safe_dump(config))
            finished = self._env().get("finished")
            if isinstance(finished, list) and not self.force:
                if checkpoint is not None and checkpoint.changed_since(self / checkpoints.DIGESTS):
                    self._refuse("the model that it was made of is another by now")
                self._finished = finished
            else:
                self._describe()

        processes.on_main(write)

    def _describe(self) -> None:
        """Write config.yaml and env.json, once: of the command that began what the folder holds, and of every one."""
        if self._config is None:
            return
        before, now = self._env(), environment() | {"processes": self._processes}
        earlier = before.pop("commands", [])
        is_new = self.force or "command" not in before or bool(self._changed())
        told = {key: now[key] for key in ("date", "command", "hardware", "processes", "versions")}
        finished = {"finished": self._finished} if self._finished else {}
        write_json(self / "env.json", (now if is_new else before) | finished | {"commands": [*earlier, told]})
        write_text(self / "config.yaml", yaml.safe_dump(self._config, sort_keys=False))
        self._config = None

    def _env(self) -> dict[str, Any]:
        return read_object(self / "env.json")

    def _changed(self) -> list[str]:
        """The settings in which the command differs from the folder's, in words."""
        try:
            before = yaml.safe_load((self / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return []
        keys = [key for key in before if key not in ELSEWHERE] if isinstance(before, dict) else []
        now = self._config or {}
        told = {key: ["not given" if one.get(key) is None else str(one[key]) for one in (before, now)] for key in keys}
        return [f"{key} was {old} and is {new}" for key, (old, new) in told.items() if old != new]

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

    def _take(self) -> None:
        """Create the folder where it is not there, and lock it; with --force what it holds is computed anew."""
        with writing(self.folder):
            check_run_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            # never through a link, of whoever made the folder, and nothing is truncated
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.fdopen(os.open(self / ".lock", flags, 0o666), "r+")
        hold(self._lock, self.folder)
        if self.force:
            kept, states = {self / "env.json"}, self.folder.glob("*-state.safetensors")
            for stale in {*self.folder.glob("*.json"), *self.folder.glob("tasks/*.json"), *states} - kept:
                stale.unlink(missing_ok=True)


class KnownCosts:
    """Costs of cuts by kind, and other values by name, kept in the run folder until their stage is done.

    A stage that was stopped goes on from them, and counts the seconds that they took as its own.
    """

    def __init__(self, run: Run, stage: str) -> None:
        self.run, self.name, self.key = run, f"{stage}-costs", run.hashes[stage]
        found = processes.on_main(lambda: run.read(self.name)) or {}
        self.found_before: dict[str, list[Any]] = found["costs"] if found.get("key") == self.key else {}
        self.known = dict(self.found_before)

    def __call__(self, kind: str, cuts: Sequence[Segment], cost: Callable[[], Any]) -> Any:
        """A cost that is known, or that is found now and kept; the main process's counts."""
        return self.value(f"{kind} {'+'.join(map(str, cuts))}", cost)

    def value(self, name: str, find: Callable[[], Any]) -> Any:
        """The same for any JSON value."""
        if name in self.found_before:
            self.run.took_before(self.found_before.pop(name)[1])
        elif name not in self.known:
            begun = time.perf_counter()
            self.known[name] = processes.from_main([find(), time.perf_counter() - begun])
            content = {"key": self.key, "costs": self.known}
            processes.on_main(lambda: write_json(self.run / f"{self.name}.json", content))
        return self.known[name][0]

    def forget_(self) -> None:
        """Remove them, now that the stage's artefact has what was wanted; those of other inputs stay."""

        def remove() -> None:
            if (self.run.read(self.name) or {}).get("key") == self.key:
                (self.run / f"{self.name}.json").unlink(missing_ok=True)

        processes.on_main(remove)


# --- folders of runs, for other commands -----------------------------------------------------------------------------


def check_finished(run: Path, command: str) -> None:
    """Refuse a run folder whose journey has not reached its end."""
    hint = f"give its compress command again, then {command}"
    if not (run / "summary.json").is_file():
        raise RunError(f"the run in {run} is not finished", hint)
    if not isinstance(read_object(run / "summary.json").get("model"), str):
        raise RunError(f"{run / 'summary.json'} is damaged", hint)


def models_of(run: Path, command: str, *, allow_pickle: bool = False) -> dict[str, str]:
    """The two models of a finished run: the one that it was made of, as it was then, and what it made of it."""
    check_finished(run, command)
    dense = read_object(run / "summary.json")["model"]
    if checkpoints.resolve(dense, allow_pickle=allow_pickle).changed_since(run / checkpoints.DIGESTS):
        words = f"{dense} is another model than the one that {run} was made of"
        raise RunError(words, "put that one back, or compress this one")
    return {"dense": dense, "compressed": str(run / "model")}
