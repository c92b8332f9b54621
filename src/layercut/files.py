"""Files: read within limits, written whole or not at all, recognised by digests; the JSON of a run; sizes in bytes."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import msgspec
import psutil

from layercut.errors import ConfigError, LayercutError, ModelError, RunError, first_line

Kind = TypeVar("Kind")

# --- reading what comes from elsewhere ---

LARGEST_JSON = 256 * 2**20  # bytes. The largest tokenizer.json seen has 33 MB, the largest index 8 MB
DEEPEST = 64  # levels of lists and objects in each other. Real configs have five; `copy.deepcopy` fails at some 300
MOST_DIGITS = 64  # of a whole number. tokenizer_config.json writes "no limit" with 31
REFETCH = "fetch this file again"


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a folder, pipe or device in its place is refused, and never waited for."""
    try:
        # a pipe without a writer would block without O_NONBLOCK, which does nothing to regular files
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path} is no regular file", REFETCH)
    return os.fdopen(descriptor, "rb")


def _unreadable(path: Path, error: Exception) -> ModelError:
    why = getattr(error, "strerror", None) or first_line(error)
    return ModelError(f"{path} cannot be read: {why}", "give a complete model folder")


def read_json(path: Path, need: str = "") -> Any:
    """What a JSON file holds: a regular file of bounded size, depth and numbers, whose text is Unicode."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_JSON:
                raise ModelError(f"{path} has {size:,} bytes; allowed are {LARGEST_JSON:,}", REFETCH)
            raw = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        raise ModelError(f"no file {path}{f': {need}' if need else ''}", "give a complete model folder") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        content = json.loads(raw.decode("utf-8"), parse_int=_whole)
        _check(content)
    except RecursionError:
        raise ModelError(f"{path} nests deeper than {DEEPEST} levels", REFETCH) from None
    except ValueError as error:  # not UTF-8, not JSON, or one of the limits
        raise ModelError(f"{path} is not valid JSON: {first_line(error)}", REFETCH) from None
    return content


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits; allowed are {MOST_DIGITS}")
    return int(digits)


def _check(content: Any) -> None:
    """ValueError or RecursionError for nesting too deep, and for text that no file can hold (half a surrogate pair)."""
    level = [content]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode("utf-8")
            elif isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise RecursionError


# --- recognising files ---


def content_digest(path: Path) -> str:
    """SHA-256 of a whole file: 1.8 GB/s on one core (measured), less than reading it from most disks takes."""
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 22):
            digest.update(part)
        return digest.hexdigest()


def _outline(path: Path) -> list[Any]:
    """Size and SHA-256: of a safetensors file its header's, which says where each tensor lies; of another all of it."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [size, content_digest(path)]
    with open_regular(path) as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), LARGEST_JSON))
    return [size, hashlib.sha256(length + header).hexdigest()]


def record(paths: Iterable[Path], base: Path) -> dict[str, list[Any]]:
    files = [file for path in paths for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    return {str(file.relative_to(base)): _outline(file) for file in files}


def differing(folder: Path, recorded: Mapping[str, Any]) -> str | None:
    """The first file that is missing, or no longer has the size and digest that `record` noted."""
    for name, noted in recorded.items():
        try:
            if _outline(folder / name) != noted:
                return name
        except (OSError, ValueError, ModelError):
            return name
    return None


# --- the JSON of a run ---

OPTIONAL = {"optional": True}  # metadata of a dataclass's field that JSON leaves out where it has its default
NOT_FINITE = {str(number): number for number in (math.inf, -math.inf, math.nan)}
SEAL = "content_hash"


class Damaged(ValueError):
    """JSON that is not what the stage wrote; the message says where."""


def digest(content: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(jsonable(content), sort_keys=True).encode()).hexdigest()[:16]


def jsonable(content: Any) -> Any:
    """Dataclasses as objects, less OPTIONAL fields at their default; structs as lists; paths, inf and nan as text."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [jsonable(value) for value in content]
    if isinstance(content, msgspec.Struct):
        return [jsonable(value) for value in msgspec.structs.astuple(content)]
    if is_dataclass(content) and not isinstance(content, type):
        found = {}
        for each in fields(content):
            value = getattr(content, each.name)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if not (each.metadata.get("optional") and value == default):
                found[each.name] = jsonable(value)
        return found
    return str(content) if isinstance(content, Path) else content


def restored(content: Any) -> Any:
    """The inverse of `jsonable` for numbers: "inf", "-inf" and "nan" in what was read from JSON are floats again."""
    if isinstance(content, str):
        return NOT_FINITE.get(content, content)
    if isinstance(content, dict):
        return {key: restored(value) for key, value in content.items()}
    return [restored(value) for value in content] if isinstance(content, list) else content


def decode(kind: type[Kind], content: Any) -> Kind:
    """JSON as a dataclass. Damaged: a key is missing or of another type."""
    try:
        return msgspec.convert(restored(content), kind)
    except (msgspec.ValidationError, LayercutError) as error:
        raise Damaged(str(error)) from None


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a hash of all that is in it, which shows a changed number as types cannot."""
    return content | {SEAL: digest({key: value for key, value in content.items() if key != SEAL})}


def check_seal(content: dict[str, Any]) -> None:
    """Damaged where a JSON object is not as it was sealed."""
    if content.get(SEAL) != seal(content)[SEAL]:
        raise Damaged("it is not as it was written")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, so that the file is there whole or not at all."""
    write_text(path, json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    with write_atomically(path) as partial:
        partial.write_text(content, encoding="utf-8")


# --- writing whole or not at all ---


def partial_of(path: Path) -> Path:
    """Where a file or folder is while it is written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield the path of an empty file beside `path` to write to; it takes the name `path` when the block ends well.

    By then it is on the disk, and so is the folder's entry for it; its mode is what the umask gives, whatever the
    writer made of it. When the block fails nothing is left, and `path` is as it was.
    """
    partial = partial_of(path)
    with writing(path):
        try:
            partial.unlink(missing_ok=True)
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors writes files that their owner alone can read
            sync(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def remove_written(path: Path) -> None:
    """Remove a file, if it is there, and what a command left of it that was killed while it wrote."""
    for each in (path, partial_of(path)):
        each.unlink(missing_ok=True)


def check_new(target: Path, force: bool) -> None:
    if os.path.lexists(target) and not force:
        raise RunError(f"{target} exists already", "give another --out, or pass --force to replace it")


def check_replaceable(target: Path, source: Path | None = None) -> None:
    """Refuse to replace what is read, and runs, which hold more than a model, whatever the user allowed."""
    if source is not None and source.exists() and source.resolve().is_relative_to(target.resolve()):
        raise RunError(f"--out {target} is or holds what is read, {source}, and would replace it", "name another --out")
    runs = [file for pattern in ("env.json", "*/env.json") for file in target.glob(pattern)] if target.is_dir() else []
    if runs:
        words = f"--out {target} is or holds a run folder, {runs[0].parent}, all of which would be replaced"
        raise RunError(words, "name another --out, or remove it yourself")


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in its place, over what an earlier run left there; its files are on the disk by then."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    for path in (*partial.rglob("*"), partial):
        sync(path)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def appearing(
    target: Path, *, force: bool = False, need: int = 0, within: bool = False, source: Path | None = None
) -> Iterator[Path]:
    """A temporary sibling to fill, which takes the name `target` when the block ends without an error, else is removed.

    What an earlier, killed run left beside `target` is removed first, or put back where it was about to be replaced.
    """
    target = Path(os.path.abspath(target))
    work = target.parent / f".{target.name}.layercut-{os.getpid()}"
    old = work.with_name(f"{work.name}-old")

    check_new(target, force)
    check_replaceable(target, source)
    with writing(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # what killed runs left, PID-old before PID
            for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.layercut-*"), reverse=True):
                pid = left.name.removesuffix("-old").rpartition("-")[2]
                if pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid)):
                    continue
                if left.name.endswith("-old"):
                    _put_back(left, target)
                _remove(left)
            check_new(target, force)  # what was put back is not replaced unasked either
            if need > shutil.disk_usage(target.parent).free:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({need:,} bytes are needed)")
            work.mkdir()
            yield work
            if os.path.lexists(target):
                target.rename(old)
            try:
                (work / target.name if within or target.suffix == ".gguf" else work).rename(target)
            except BaseException:
                _put_back(old, target)
                raise
            _remove(old)
        finally:
            _remove(work)


def _put_back(old: Path, target: Path) -> None:
    """Give what was replaced its place again, where nothing has taken it."""
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)


def _remove(path: Path) -> None:
    """Remove what is there; what cannot be removed (a read-only disk) stays, since an error before matters more."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def usual_mode_(folder: Path) -> None:
    """Give every file in a folder the permissions of a new one: libraries that write by temporary files leave 0600."""
    probe = folder / ".mode"
    try:
        probe.touch(exist_ok=False)
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for a folder
            raise
    finally:
        os.close(opened)


# --- what the system says ---

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
HINTS = {
    **dict.fromkeys(FULL, "free some space, or name another --out"),
    **dict.fromkeys(CLOSED, "name a folder that you may write to: --out"),
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or name an --out on another disk",
}
"""Errors of a disk that the user can correct, and that no fault of layercut causes."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While open, `path` is written and nothing is read: the system's refusal becomes a RunError that names it."""
    try:
        yield
    except Exception as error:
        if (found := _system_error(error)) is None:
            raise
        hint = HINTS.get(found.errno or 0, "check the disk, or name another --out")
        raise RunError(f"{path} cannot be written: {found.strerror or found}", hint) from error


def disk_refusal(error: BaseException, path: Path | None = None) -> RunError | None:
    """What to tell the user of an error that a full, read-only or closed disk raised."""
    found = _system_error(error)
    if found is None or found.errno not in HINTS:
        return None
    name = found.filename or path or "the output"
    # what may not be opened may have been opened to be read
    verb = "opened" if found.errno in (errno.EACCES, errno.EPERM) else "written"
    return RunError(f"{name} cannot be {verb}: {found.strerror or found}", HINTS[found.errno])


def _system_error(error: BaseException) -> OSError | None:
    """The system's error that this is, or that safetensors or tokenizers put into their words; None of any other."""
    if isinstance(error, OSError):
        return error
    foreign = type(error) is Exception or type(error).__name__ == "SafetensorError"  # tokenizers raises a plain one
    if foreign and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return None


# --- sizes, as people read and write them: 200MB in a flag, 269.0 MB in a line ---

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
UNIT_BYTES = {"B": 1} | {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_bytes(flag: str, text: str) -> int:
    """Bytes of "200MB", "1.5GiB" or a plain number; MB is 10^6 bytes and MiB 2^20."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?i?b)?\s*", text, re.IGNORECASE)
    unit = (found[2] or "B").upper() if found else ""
    count = float(found[1]) * UNIT_BYTES[unit] if found and unit in UNIT_BYTES else 0.0
    size = round(count) if math.isfinite(count) else 0
    if size < 1:
        raise ConfigError(f"{flag} {text!r} is no size", f"allowed is a number with MB, GB, MiB or GiB: {flag} 200MB")
    return size


def parse_time(flag: str, text: str) -> float:
    """Seconds of "30m", "2h" or "1.5h"; a plain number is refused, since its unit is not known."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|m|min|h|d)\s*", text, re.IGNORECASE)
    seconds = float(found[1]) * UNIT_SECONDS[found[2][0].lower()] if found else 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{flag} {text!r} is no time", f"allowed is a number with m, h or d: {flag} 30m")
    return seconds


def size(count: float) -> str:
    """269030016 -> 269.0 MB; of bytes that make no unit of a thousand, their number: 100 B."""
    for limit, unit in UNITS:
        if abs(count) >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:.0f} B"


def size_flag(count: float) -> str:
    """The size to give to a flag that allows so many bytes, rounded up: 71234567 -> 71.3MB."""
    for limit, unit in UNITS:
        if count >= limit:
            return f"{math.ceil(count / limit * 10) / 10:.10g}{unit}"
    return f"{math.ceil(count)}B"


# --- run folders ---


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of layercut: its env.json says with which version it was made."""
    made_with = read_object(folder / "env.json").get("versions")
    return isinstance(made_with, dict) and "layercut" in made_with


def check_run_folder(folder: Path) -> None:
    """Refuse a place for a run that is a file, or a folder that holds something else."""
    hint = "name a folder that is new, empty, or holds a run"
    if folder.is_file():
        raise RunError(f"--out {folder} is a file", hint)
    # what a command leaves that was killed at its very beginning
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not all(name == ".lock" or name.endswith(".partial") for name in held) and not is_run(folder):
        raise RunError(f"--out {folder} is not empty and holds no layercut run", hint)


def hold(lock: IO[str], folder: Path) -> None:
    """Lock a run folder's .lock until it is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        words = f"another layercut command is using {folder}"
        raise RunError(words, "wait for it to end, or name another --out") from None
