"""Fresh processes that need not load torch and transformers anew: 4 s of every export that a test has verified.

A process that has loaded both, and neither run nor seen anything else, forks the others; each runs its script as
`python -P SCRIPT …` would. `Warm.process` takes the place of `subprocess.Popen` as far as `checkpoint._checked` needs
it.

    python -P warm_processes.py FILENO    (of a socket that brings commands and takes their exit codes)
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from typing import IO, Any

MOST = 1 << 20
"""Bytes of a command with its environment, at most."""


class Warm:
    """Starts the process that forks when first it is asked, and ends it."""

    def __init__(self) -> None:
        self._ours: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours and self._server:
            self._ours.close()
            self._server.wait()

    def process(self, command: list[str], *, stderr: IO[str], env: dict[str, str], **_: Any) -> _Process:
        """A process for `python -P SCRIPT …`, its output as text."""
        if self._ours is None:
            self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            start = [sys.executable, "-P", __file__, str(theirs.fileno())]
            self._server = subprocess.Popen(start, pass_fds=[theirs.fileno()], env=env)
            theirs.close()
        reader, writer = os.pipe()
        said = json.dumps([command[2:], env]).encode()
        socket.send_fds(self._ours, [said], [writer, stderr.fileno()])
        os.close(writer)
        return _Process(self._ours, os.fdopen(reader))


class _Process:
    def __init__(self, server: socket.socket, stdout: IO[str]) -> None:
        self._server, self.stdout, self.returncode = server, stdout, None

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.returncode = int(self._server.recv(16))


def run(argv: list[str], env: dict[str, str], stdout: int, stderr: int) -> int:
    """A script's exit code, in the process that this is called in."""
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        if not isinstance(error.code, str):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(commands: socket.socket) -> None:
    """Until the other end is closed."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    gc.collect()
    gc.freeze()  # see conftest.py
    while True:
        said, files, *_ = socket.recv_fds(commands, MOST, 2)
        if not said:
            return
        child = os.fork()
        if not child:
            code = run(*json.loads(said), *files)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        for each in files:
            os.close(each)
        commands.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
