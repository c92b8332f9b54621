"""Shared by all tests: one thread, transformers silent, and a tiny model with text, on disk.

`tiny_model` and `texts` are made once and shared: a test that spoils a file copies the folder first.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import folders
import quick
from forked import Forked
from layercut.data.probes import ProbeRows, probe_rows
from layercut.export import checkpoint

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start: sums are split by it, hence their last bits
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
LONGEST = ("journey", "resume", "from_disk", "processes", "cut_families", "gguf_export", "bits_by_budget", "plan",
           "gguf_run", "command_line", "compare", "trial", "cut_gguf", "probes_in_runs")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: each is one process's, and none should be left alone with one at the end."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """A run collects garbage before each stage, 0.2 s where all that the libraries hold is looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _runs_take_less_time() -> Iterator[None]:
    """What is slow is left out, and no run waits for the disk; `quick.bring_back` has it done where it is tested.

    What verifies an export without a GPU finds the libraries loaded, but in test_journey.py.
    """

    def popen(command: list[str], **how: Any) -> Any:
        places = " ".join(command[5:7])
        here = command[2] in (str(checkpoint.CHECKER), "-c") and ("cpu" in places or "standin" in places)
        return (Forked if here else subprocess.Popen)(command, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
        patch.setattr(os, "fsync", lambda _: None)
        quick.leave_out(patch)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return folders.tokenizer()


@pytest.fixture(scope="module")
def probes(tokenizer: Any) -> ProbeRows:
    return probe_rows(tokenizer, rows=4, window=512)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of 8 layers, safetensors and tokenizer included."""
    return folders.write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two .txt files that have no sentence in common: one to calibrate and tune on, one to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    return folders.write_text(folder / "calibration.txt", 1), folders.write_text(folder / "evaluation.txt", 2)


@pytest.fixture(scope="module")
def run_until() -> Iterator[Callable[..., int]]:
    """run_until(moment, signal, log, argv): run a command up to a moment of tests/killed.py, end it; its exit code."""
    command = [sys.executable, str(Path(__file__).with_name("killed.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(moment: str, number: int, log: Path, argv: list[str]) -> int:
            print(json.dumps([moment, int(number), str(log), argv]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield run
