"""Messages and progress of a stage: lines in the log, and a bar or a line every 30 s about how far it is.

Messages go through the logger "layercut" of the standard library, so a library's user sees nothing without a handler;
they get progress by a callback (`progress_to`), in a notebook by a bar of tqdm. The command installs handlers
(`shown`): on a terminal a bar and short lines, elsewhere a line with its time for each message, all on stderr. Of
several processes the main one logs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from layercut import errors

log = logging.getLogger("layercut")
log.addHandler(logging.NullHandler())
console = Console(stderr=True, highlight=False)

EVERY, MEASURE_EVERY = 30.0, 0.5
"""Seconds between two lines about a stage, and between two measurements of work that cannot count its steps."""
_bars = False
"""Whether bars are drawn: on a terminal, in a command without --quiet."""
Callback = Callable[[str, float, float | None, str], object]
"""(description, done, total, words): what is under way, steps done of how many in all (None: not known), and what
there is to say beside it, such as a loss."""
_callback: ContextVar[Callback | None] = ContextVar("layercut_progress", default=None)


def say(stage: str, words: str) -> None:
    """Log one line about a stage."""
    _say(logging.INFO, stage, words)


def warn(stage: str, words: str) -> None:
    """Log one line that is shown also with --quiet."""
    _say(logging.WARNING, stage, words)


def _say(level: int, stage: str, words: str, *, progress: bool = False) -> None:
    if _is_main():
        log.log(level, "%s", words, extra={"stage": stage, "progress": progress})


def _is_main() -> bool:
    from layercut.distributed.processes import is_main  # which loads torch

    return is_main()


# --- how far a run is ------------------------------------------------------------------------------------------------

KNOWN = 0.02
"""Of the planned work, what has to be done before the time left is told by it."""


class _Whole:
    """How far a run is, by what is planned for each stage: the stages done say how fast this machine is."""

    def __init__(self, plan: Callable[[], Mapping[str, float]]) -> None:
        self.plan = cache(plan)  # which takes seconds, and is made where a stage runs
        self.now, self.begun = "", 0.0
        """The stage that runs, and when it began, by the monotonic clock."""
        self.over: set[str] = set()
        self.taken: dict[str, float] = {}
        """Seconds of those of them that were run, and not found in the folder."""

    def enter(self, name: str) -> None:
        self.plan()
        self.now, self.begun = name, time.monotonic()

    def leave(self, name: str) -> None:
        self.over.add(name)
        if name == self.now:
            self.taken[name], self.now = time.monotonic() - self.begun, ""

    @property
    def words(self) -> str:
        """Which stage it is, and how long the run takes from now on; nothing outside of what is planned."""
        plan = self.plan()
        if self.now not in plan:
            return ""
        now, later = plan[self.now], sum(plan[name] for name in plan.keys() - self.over - {self.now})
        planned, taken = (sum(of[name] for name in plan.keys() & self.taken) for of in (plan, self.taken))
        words = f"stage {len(plan.keys() & self.over) + 1} of {len(plan)}"
        if planned < KNOWN * (planned + now + later):
            return words
        pace, spent = taken / planned, time.monotonic() - self.begun
        left = max(pace * now - spent, 0.05 * pace * now) + pace * later
        share = (taken + spent) / (taken + spent + left)
        return f"{words}, {share:.0%} of the run, about {duration(left)} left of it"


_whole: _Whole | None = None


@contextmanager
def whole_run(plan: Callable[[], Mapping[str, float]]) -> Iterator[None]:
    """While open, progress says how far the run is, by the planned time of each stage in any unit; nothing of none."""
    global _whole
    _whole = _Whole(plan)
    try:
        yield
    finally:
        _whole = None


def enter_stage(name: str) -> None:
    """A stage of the whole run begins, whose artefact is not in the folder."""
    if _whole and _is_main():
        _whole.enter(name)


def leave_stage(name: str) -> None:
    """A stage is over, run or found."""
    if _whole:
        _whole.leave(name)


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def progress_to(callback: Callback) -> Iterator[None]:
    """Have a function called with the progress of the work that is begun while this is open, in place of any bar.

        with lc.progress_to(lambda description, done, total, words: print(description, done, total, words)):
            lc.search(model, tokens, ratio=0.2)

    It holds for the thread (or asyncio task) that opened it; the innermost one open counts. Of several processes the
    main one calls it.

    Args:
        callback: called with (description, done, total, words) when work begins, with done = 0, and after each step.
            total is None where it is not known. Work that cannot count its steps is measured from a thread of its own,
            which calls it then; what it raises elsewhere stops the work.
    """
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


@contextmanager
def bar(
    description: str, total: float | None, measure: Callable[[], float] | None = None
) -> Iterator[Callable[..., None]]:
    """Show how far work is; call what it yields with the steps done, and optionally words to show beside it."""
    done, words, begun, over = 0.0, "", time.monotonic(), threading.Event()
    main = _is_main()
    callback, heard, drawn = _callback.get() if main else None, main and _is_heard(), main and _bars
    cell: Any = None
    with ExitStack() as stack:
        if drawn:
            columns = [
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[words]}"),
            ]  # fmt: skip
            rich = stack.enter_context(Progress(*columns, console=console, transient=True))
            row = rich.add_task(escape(errors.shown(description)), total=total, words=_whole.words if _whole else "")
        elif main and callback is None and console.is_jupyter:
            from tqdm.auto import tqdm

            cell = stack.enter_context(tqdm(desc=description, total=total, leave=False))

        def advance(steps: float = 1, beside: str = "") -> None:
            nonlocal done, words
            done, words = done + steps, beside
            if drawn:
                told = "  ".join(filter(None, [words, _whole.words if _whole else ""]))
                rich.update(row, completed=done, words=escape(errors.shown(told)))
            if cell is not None:
                cell.set_postfix_str(words, refresh=False)
                cell.update(steps)
            if callback is not None:
                callback(description, done, total, words)

        def watch() -> None:
            logged = begun
            while not over.wait(MEASURE_EVERY if measure else EVERY):
                if measure:
                    advance(measure() - done)
                if time.monotonic() - logged >= EVERY:
                    logged = time.monotonic()
                    line = _line(description, logged - begun, done, total, words)
                    _say(logging.INFO, "progress", line, progress=True)

        advance(0)
        watcher = threading.Thread(target=watch, name="layercut-progress", daemon=True)
        watching = heard or (measure is not None and bool(callback or drawn or cell is not None))
        if watching:
            watcher.start()
        try:
            yield advance
        finally:
            over.set()
            if watching:
                watcher.join()


def _line(description: str, seconds: float, done: float, total: float | None, words: str) -> str:
    """How far work is."""
    parts = [f"{duration(seconds)} so far"]
    if total:
        share = min(1.0, done / total)
        parts.insert(0, f"{share:.0%} ({done:,.0f} of {total:,.0f})")
        if 0 < share < 1:
            parts.append(f"about {duration(seconds * (1 - share) / share)} left")
    line = f"{description}: {', '.join([*parts, words] if words else parts)}"
    return f"{line}; {_whole.words}" if _whole and _whole.words else line


def duration(seconds: float) -> str:
    """Seconds in words: 80 -> 1 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- where it is seen ------------------------------------------------------------------------------------------------


def _is_heard() -> bool:
    """Whether a handler takes messages about progress; without one no thread is started for them."""
    logger: logging.Logger | None = log if log.isEnabledFor(logging.INFO) else None
    while logger is not None:
        if any(not isinstance(h, logging.NullHandler) and h.level <= logging.INFO for h in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


class _ToConsole(logging.Handler):
    """Above a bar on a terminal, which shows progress itself; elsewhere one line for each message, with its time.

    Without what a terminal would obey. Fails with the command where a message cannot be written, as print does.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stage, words = f"{record.__dict__.get('stage', ''):>9}", errors.shown(record.getMessage())
        if not console.is_terminal:
            print(logging.Formatter().formatTime(record, "%Y-%m-%d %H:%M:%S"), f"{stage}  {words}", file=console.file)
        elif not record.__dict__.get("progress"):
            console.print(f"[bold]{escape(stage)}[/bold]  {escape(words)}")


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[None]:
    """While open, messages are written to stderr; the command calls this once."""
    global _bars
    handler, before = _ToConsole(), (log.level, log.propagate, _bars)
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate, _bars = False, console.is_terminal and not quiet
    try:
        yield
    finally:
        log.setLevel(before[0])
        log.propagate, _bars = before[1:]
        log.removeHandler(handler)
