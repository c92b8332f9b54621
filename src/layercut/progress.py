"""What a person sees while a stage runs: one bar, and a line when it is done. On stderr; stdout is for results.

Of several processes the main one speaks, and its bar counts its share of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from layercut import errors
from layercut.processes import is_main

console = Console(stderr=True, highlight=False)


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A progress bar; call what it yields with the steps done, and optionally words to show beside it."""
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    ]
    shown = console.is_terminal and is_main()
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(escape(errors.shown(description)), total=total, words="")

        def advance(steps: float = 1, words: str = "") -> None:
            progress.update(task, advance=steps, words=escape(errors.shown(words)))

        yield advance


def say(stage: str, words: str) -> None:
    """One line about a stage."""
    if is_main():
        console.print(f"[bold]{escape(f'{stage:>9}')}[/bold]  {escape(errors.shown(words))}")
