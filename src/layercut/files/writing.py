"""Files and folders that are there whole or not at all, and errors of a full or read-only disk.

A file of a result is written by `write_atomically`, a folder of one by `appearing`. What the system refuses is for the
user to correct: `writing` says it with the path that was written, `disk_refusal` of what is raised elsewhere.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from layercut.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
REFUSALS = (*FULL, *CLOSED, errno.EFBIG)
"""Errors of a disk that the user can correct, and that no fault of layercut causes."""


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


def partial_of(path: Path) -> Path:
    """Where a file or folder is while it is written."""
    return path.with_name(f".{path.name}.partial")


def remove_written(path: Path) -> None:
    """Remove a file, if it is there, and what a command left of it that was killed while it wrote."""
    for each in (path, partial_of(path)):
        each.unlink(missing_ok=True)


def check_replaceable(target: Path, source: Path | None = None) -> None:
    """Refuse to replace what is read, and runs, which hold more than a model, whatever the user allowed."""
    if source is not None and source.exists() and source.resolve().is_relative_to(target.resolve()):
        raise RunError(f"--out {target} is or holds what is read, {source}, and would replace it", "name another --out")
    runs = [file for pattern in ("env.json", "*/env.json") for file in target.glob(pattern)] if target.is_dir() else []
    if runs:
        raise RunError(
            f"--out {target} is or holds a run folder, {runs[0].parent}, all of which would be replaced",
            "name another --out, or remove it yourself",
        )


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
    _check_free(target, force)
    check_replaceable(target, source)
    work = target.parent / f".{target.name}.layercut-{os.getpid()}"
    old = work.with_name(f"{work.name}-old")
    with writing(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _clear(target)
            _check_free(target, force)  # what was put back is not replaced unasked either
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


def _check_free(target: Path, force: bool) -> None:
    if os.path.lexists(target) and not force:
        raise RunError(f"{target} exists already", "give another --out, or pass --force to replace it")


def _clear(target: Path) -> None:
    """Remove what killed runs left beside `target` (PID-old, then PID); what one was replacing gets its place back."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.layercut-*"), reverse=True):
        pid = left.name.removesuffix("-old").rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid)):
            continue
        if left.name.endswith("-old"):
            _put_back(left, target)
        _remove(left)


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


def usual_mode_(path: Path) -> None:
    """Give a file, or every file in a folder, the permissions that any new file here gets.

    Libraries that write by way of a temporary file leave 0600.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if not files:
        return
    probe = files[0].with_name(f".{files[0].name[:64]}.mode")
    with suppress(FileNotFoundError):
        probe.unlink()
    try:
        probe.touch(exist_ok=False)
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in files:
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While open, `path` is written and nothing is read: the system's refusal becomes a RunError that names it."""
    try:
        yield
    except Exception as error:
        if (found := system_error(error)) is None:
            raise
        raise RunError(f"{path} cannot be written: {_words(found)}", _hint(found)) from error


def disk_refusal(error: BaseException, path: Path | None = None) -> RunError | None:
    """What to tell the user of an error that a full, read-only or closed disk raised."""
    found = system_error(error)
    if found is None or found.errno not in REFUSALS:
        return None
    name = found.filename or path or "the output"
    # what may not be opened may have been opened to be read
    verb = "opened" if found.errno in (errno.EACCES, errno.EPERM) else "written"
    return RunError(f"{name} cannot be {verb}: {_words(found)}", _hint(found))


def system_error(error: BaseException) -> OSError | None:
    """The system's error that this is, or that safetensors or tokenizers put into their words; None of any other."""
    if isinstance(error, OSError):
        return error
    foreign = type(error) is Exception or type(error).__name__ == "SafetensorError"  # tokenizers raises a plain one
    if foreign and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return None


def _words(error: OSError) -> str:
    return error.strerror or str(error)


def _hint(error: OSError) -> str:
    if error.errno in FULL:
        return "free some space, or name another --out"
    if error.errno in CLOSED:
        return "name a folder that you may write to: --out"
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of a file (ulimit -f), or name an --out on another disk"
    return "check the disk, or name another --out"
