"""Whether an engine computes from a folder what transformers does, and whether layercut says so.

right: it does. refused: it does not load it, with its own words. misread: it loads it and computes something else, and
layercut names it (`layercut.export.engines`: a warning, and a refusal with --for). wrong: the same, and layercut does
not know: a fault of layercut.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from engines.environments import Engine
from engines.models import Case
from layercut.export.engines import readings
from layercut.models import checkpoints, loading

TOLERANCE = 5e-3
"""Nats by which the loss of any token may differ where the engine computes in float32. Seen: up to 5e-4."""
ROUNDED, ROUNDED_MEAN = 0.3, 0.03
"""The same, and of the mean, where it computes in bfloat16."""
SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One engine on one model."""

    verdict: str
    """right, refused, misread or wrong."""
    reason: str = ""
    """Of a refusal the engine's words, of a misreading what differs."""
    largest: float | None = None
    """Nats by which the loss of a token differs, at most."""
    mean: float | None = None
    """Difference of the mean losses."""
    greedy: int | None = None
    """Greedy tokens that are the reference's, up to the first that is not."""
    same_ids: bool | None = None
    """Whether its tokenizer gives the same token ids; None: it has none of its own."""
    layercut: str = ""
    """What layercut says of it: right, note, misread or refused, and why."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judged(engine: Engine, python: Path, case: Case, file: Path | None = None) -> Judged:
    """Run an engine on a model.

    Args:
        engine: what loads it.
        python: of the engine's environment.
        case: the model and what it should compute.
        file: what the engine is given, where that is not the folder.

    Returns:
        How it went.
    """
    environment = (
        os.environ | dict(engine.variables) | {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": str(case.asked["threads"])}
    )
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(engine.runner), str(file or case.folder)]
    try:
        done = subprocess.run(
            command, input=json.dumps(case.asked), capture_output=True, text=True, env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return Judged(verdict="refused", reason=f"nothing within {SECONDS} s")
    said = predicted(engine, case)
    if done.returncode != 0:
        return Judged(verdict="refused", reason=why(done.stderr), layercut=said)
    found = compared(json.loads(done.stdout.strip().splitlines()[-1]), case)
    known = found.verdict == "wrong" and said.startswith(("misread", "refused"))
    return replace(found, layercut=said, verdict="misread" if known else found.verdict)


def predicted(engine: Engine, case: Case) -> str:
    """What layercut says that an engine makes of a model."""
    config = loading.load_config(checkpoints.resolve(str(case.folder)))
    packed = getattr(config, "quantization_config", None)
    bits = {8: "int8", 4: "int4"}[packed["config_groups"]["group_0"]["weights"]["num_bits"]] if packed else "float"
    (reading,) = readings(config, [], bits, [engine.consumer])
    return f"{reading.verdict}: {reading.words}" if reading.words else reading.verdict


def why(stderr: str) -> str:
    """The last line of an error that says something, without this machine's paths."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in stderr.splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    line = (errors or lines or ["no message"])[-1]
    words = [Path(word).name if word.startswith("/") else word for word in line.split()]
    return " ".join(words)[:200]


def compared(found: dict[str, Any], case: Case) -> Judged:
    """What an engine computed, against the reference.

    A greedy token may be another where the two likeliest are as near each other as the tolerance.
    """
    rounded = found.get("dtype") == "bfloat16"
    differences = [abs(a - b) for a, b in zip(found["losses"], case.losses, strict=True)]
    mean = abs(sum(found["losses"]) - sum(case.losses)) / len(differences)
    pairs = enumerate(zip_longest(found["greedy"], case.greedy))
    same = next((i for i, (a, b) in pairs if a != b), len(case.greedy))
    limit = ROUNDED if rounded else TOLERANCE
    tie = same >= len(case.greedy) or (len(found["greedy"]) == len(case.greedy) and case.margins[same] <= 2 * limit)
    ids = None if found.get("ids") is None else found["ids"] == case.ids
    wrong = []
    if not all(each <= limit for each in differences) or (rounded and not mean <= ROUNDED_MEAN):
        wrong.append(f"losses off by up to {max(differences):.3g}, their mean by {mean:.3g}")
    if not tie:
        wrong.append(f"greedy token {same} is another")
    if ids is False:
        wrong.append("its tokenizer gives other token ids")
    return Judged(
        verdict="wrong" if wrong else "right", reason="; ".join(wrong), largest=max(differences), mean=mean,
        greedy=same, same_ids=ids,
    )  # fmt: skip


def version(engine: Engine, python: Path) -> str:
    """Of the engine's package."""
    command = [str(python), "-c", f"import importlib.metadata as m; print(m.version({engine.package!r}))"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"not known ({sys.platform})"
