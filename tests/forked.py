"""A verifier that is forked off the tests instead of started anew: it need not load torch and transformers, 4 s each.

It runs its script or code as `python -P SCRIPT …` and `python -P -c CODE …` would, which test_journey.py and
test_from_disk.py do.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from typing import IO, Any


class Forked:
    """Takes the place of `subprocess.Popen` as far as `checkpoint._checked` needs it."""

    def __init__(self, command: list[str], *, stderr: IO[str], env: dict[str, str], **_: Any) -> None:
        reader, writer = os.pipe()
        self.child, self.returncode = os.fork(), 0
        if not self.child:
            os.dup2(writer, 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ.clear()
            os.environ.update(env)
            code = self._run(command[2:])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.close(writer)
        self.stdout = os.fdopen(reader)

    @staticmethod
    def _run(argv: list[str]) -> int:
        sys.argv = ["-c", *argv[2:]] if argv[0] == "-c" else argv
        try:
            if argv[0] == "-c":
                exec(argv[1])
            else:
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            return 1 if isinstance(error.code, str) else error.code or 0
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
