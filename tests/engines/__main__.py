"""Every engine on every model: `make test-engines`, which writes research/results/engines.json and the guide's table.

    python -m tests.engines [ENGINE …]     # all but vLLM (3.4 GB) where none is named

Exit code 1 where an engine loads a model and computes something else, unless the model's card would say so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from engines.environments import ENGINES, Engine, NotInstalledError, python_of
from engines.gguf import gguf_of
from engines.judge import Judged, judged, version
from engines.models import MODELS, Case, MissingError, case, real_tokenizer

RESULTS = Path(__file__).parents[2] / "research" / "results" / "engines.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    asked = parser.parse_args()
    if unknown := sorted({*asked.engines} - {*ENGINES}):
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.disable_progress_bar()
    names = asked.engines or [name for name in ENGINES if name != "vLLM"]
    earlier = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    rows = {name: earlier[name] for name in ENGINES if name in earlier and name not in names}
    with tempfile.TemporaryDirectory() as work:
        cases = _cases(Path(work), asked.threads)
        for name in names:
            rows[name] = row(ENGINES[name], cases)
            _write(rows)
    wrong = [f"{engine}: {model}" for engine in names for model, each in rows[engine]["models"].items()
             if each["verdict"] == "wrong"]  # fmt: skip
    print("\n".join(f"WRONG {line}" for line in wrong) or "no engine loads one of these models wrongly")
    return 1 if wrong else 0


def _cases(work: Path, threads: int) -> dict[str, Case | str]:
    """The models and their references, or why there is none."""
    found: dict[str, Case | str] = {}
    try:
        tokenizer = real_tokenizer()
    except MissingError as error:
        print(f"{error}; the tiny models have a tokenizer that llama.cpp's converter does not know", flush=True)
        tokenizer = None
    for name in MODELS:
        try:
            found[name] = case(name, work, threads, tokenizer)
        except MissingError as error:
            found[name] = str(error)
    return found


def row(engine: Engine, cases: dict[str, Case | str]) -> dict[str, Any]:
    """What an engine makes of each model."""
    found: dict[str, Any] = {"version": "", "date": time.strftime("%Y-%m-%d"), "models": {}}
    try:
        python = python_of(engine)
    except NotInstalledError as error:
        print(f"{engine.name}: not installed: {error}", flush=True)
        return found | {"not_installed": str(error)}
    found["version"] = version(engine, python)
    for name, each in cases.items():
        begun = time.perf_counter()
        result = Judged(verdict="not tried", reason=each) if isinstance(each, str) else _one(engine, python, each)
        found["models"][name] = result.to_dict()
        words = f"{result.verdict}{': ' if result.reason else ''}{result.reason}"
        print(f"{engine.name} {found['version']}: {name}: {words} ({time.perf_counter() - begun:.0f} s)", flush=True)
    return found


def _one(engine: Engine, python: Path, each: Case) -> Judged:
    if engine.name != "llama.cpp":
        return judged(engine, python, each)
    file = gguf_of(each)
    return Judged(verdict="refused", reason=file) if isinstance(file, str) else judged(engine, python, each, file)


def _write(rows: dict[str, Any]) -> None:
    reference = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    content = {
        "reference": reference,
        "machine": platform.machine(),
        "rows": {n: rows[n] for n in ENGINES if n in rows},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
