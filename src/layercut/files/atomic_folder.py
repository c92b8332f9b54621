"""A result folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layercut.errors import RunError
from layercut.files.writing import check_replaceable


@contextmanager
def appearing(
    target: Path, *, force: bool = False, need: int = 0, within: bool = False, source: Path | None = None
) -> Iterator[Path]:
    """A temporary sibling to fill, which takes the name `target` when the block ends without an error.

    Else it is removed. What an earlier, killed run left beside `target` is removed first.
    """
    target = Path(os.path.abspath(target))
    _check_free(target, force)
    check_replaceable(target, source)
    work = target.parent / f".{target.name}.layercut-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        _check_free(target, force)  # what was put back is not replaced unasked either
        free = shutil.disk_usage(target.parent).free
        if need > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        work.mkdir()
        yield work
        old = target.parent / f"{work.name}-old"
        if os.path.lexists(target):
            target.rename(old)
        produced = work / target.name if within or target.suffix == ".gguf" else work
        try:
            produced.rename(target)
        except BaseException:
            _put_back(old, target)
            raise
        _remove(old)
    except OSError as error:
        raise _readable(error, target, need) from error
    finally:
        _remove(work)


def _check_free(target: Path, force: bool) -> None:
    if os.path.lexists(target) and not force:
        raise RunError(f"{target} exists already", "give another --out, or pass --force to replace it")


def _clear(target: Path) -> None:
    """Remove what killed runs left beside `target`; where one was killed as it replaced it, it gets its place back."""
    for left in sorted(target.parent.glob(f".{_literal(target.name)}.layercut-*"), reverse=True):  # PID-old, then PID
        if _alive(left.name.removesuffix("-old").rpartition("-")[2]):
            continue
        if left.name.endswith("-old"):
            _put_back(left, target)
        _remove(left)


def _put_back(old: Path, target: Path) -> None:
    """Give what was replaced its place again, where nothing has taken it."""
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)


def _readable(error: OSError, target: Path, need: int) -> RunError:
    size = f" ({need:,} bytes are needed)" if need else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left for {target}{size}", "free some space, or give an --out on another disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(
            f"{target.parent} cannot be written to: {os.strerror(error.errno)}",
            "give an --out in a folder you own",
        )
    return RunError(f"{target} cannot be written: {error}", "check the disk and the --out path")


def _remove(path: Path) -> None:
    """Remove what is there; what cannot be removed (a read-only disk) stays, since an error before matters more."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    """Whether another process still works on this temporary folder."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
