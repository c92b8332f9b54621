"""Two processes that tune together and are killed, terminated and started again; for test_processes.py.

    python tests/pairs.py FOLDER

One process loads the libraries and forks the others, a pair for each phase, as a launcher would start them: where one
of a pair dies, the other is told to stop. FOLDER/endings.json has how each phase ended, by kind of model; the pairs
that reach the end leave FOLDER/KIND-PHASE.RANK.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

import tiny
import together
from layercut.distributed import processes
from layercut.distributed.sharding import local
from layercut.healing import endpoint_tuning, tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.tuning_state import StateFile, asked_to_stop
from layercut.models.runner import DecoderRunner

KINDS = ("whole", "spread")
PHASES: dict[str, tuple[int, int, int] | None] = {
    "straight": None,
    "killed": (signal.SIGKILL, 1, 1),
    "terminated": (signal.SIGTERM, 0, 3),
    "resumed": None,
}
"""A signal to one process of the pair, its rank, and the steps done by then."""


def tune(kind: str, phase: str, folder: Path) -> None:
    """What each process of a pair does."""
    processes.start()
    ending, step = PHASES[phase], endpoint_tuning._Training.step_

    steps = 0

    def step_or_die(training: Any) -> int:
        nonlocal steps
        steps += 1
        if ending and ending[1:] == (processes.rank(), training.report.step):
            os.kill(os.getpid(), ending[0])
        return step(training)

    endpoint_tuning._Training.step_ = step_or_die  # type: ignore[method-assign]
    StateFile.due = lambda _: True  # type: ignore[method-assign]
    model = tiny.llama() if kind == "whole" else together.spread_llama(**together.ODD)
    dense, student = DecoderRunner(model), DecoderRunner(together.student_of(model))
    state = StateFile(folder / f"{kind}-{'straight' if phase == 'straight' else 'broken'}")
    report = tune_(
        student, dense, tiny.some_tokens(11, seed=1), heldout=tiny.some_tokens(3, seed=2), learning_rate=3e-3,
        batch_tokens=32, files=TuningFiles(state=state, stopping=asked_to_stop),
    )  # fmt: skip
    weights = hashlib.sha256()
    for p in student.model.parameters():
        weights.update(local(p.detach()).contiguous().numpy().tobytes())
    found = {
        "steps": steps,
        "weights": weights.hexdigest(),
        "losses": [point["loss"] for point in report.curve],
        "heldout": [point["loss"] for point in report.heldout],
    }
    (folder / f"{kind}-{phase}.{processes.rank()}.json").write_text(json.dumps(found))
    processes.stop()


def pair(kind: str, phase: str, folder: Path) -> list[int]:
    """Start both, and wait for them; their exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                tune(kind, phase, folder)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < 2:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child]:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGTERM)
    return [codes[child] for child in children]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    endings = {kind: {phase: pair(kind, phase, folder) for phase in PHASES} for kind in KINDS}
    (folder / "endings.json").write_text(json.dumps(endings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
