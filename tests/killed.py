"""Runs commands of layercut up to a moment and ends each there by a signal: what the fixture `run_until` starts.

Each line of its input is JSON: [moment, number of the signal, file for what the command prints, the command's words].
It answers with the command's exit code. A moment is the worst one of a stage: all its work is done and its JSON half
written; "export/folder": the new model stands beside its place; "step/N": tuning begins a step after N.

One process loads the libraries and forks the others, which spares 3 s each.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401

import layercut.layer_search.fisher
import layercut.report.charts  # noqa: F401
import quick
from layercut import cli
from layercut.export import checkpoint
from layercut.healing import endpoint_tuning, tuning_state
from layercut.pipeline import run_folder


def run(where: str, number: int, log: str, argv: list[str]) -> None:
    """The command, in a process of its own, which this ends."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), number)

    def write_half(path: Path, content: Any) -> None:
        if path.name == where + ".json":
            path.with_name(f".{path.name}.partial").write_text('{"half": ')
            die()
        write_json(path, content)

    def at_step(training: Any) -> int:
        if training.report.step == int(where.partition("/")[2]):
            die()
        return step(training)

    write_json, run_folder.write_json = run_folder.write_json, write_half
    step = endpoint_tuning._Training.step_
    if where.startswith("step/"):
        endpoint_tuning._Training.step_ = at_step  # type: ignore[method-assign]
        if number == signal.SIGKILL:
            tuning_state.StateFile.due = lambda _: True  # type: ignore[method-assign]
    quick.leave_out(pytest.MonkeyPatch())
    if where == "export/folder":
        checkpoint.replace_folder = die  # type: ignore[assignment]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os._exit(cli.main(argv))


def main() -> None:
    """Until its input ends."""
    # a shell that starts the tests in the background lets them ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.freeze()  # see conftest.py
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
