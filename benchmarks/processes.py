"""Claim: two processes make the same choice and the same losses as one, in less time.

    python benchmarks/processes.py --data web_c4.txt --eval-data wikitext2_valid.txt

One process and several run the same command in turn, each process with as many threads; the machine needs as many
cores, and nothing else to do. Compared are the segments, the price of every candidate, the losses of every step of
tuning and of every held-out score, and the perplexities; timed are the stages that are shared, medians over the
repeats and ratios of neighbours. In bfloat16 another grouping of rows rounds differently (losses 1e-3 apart on a tiny
model): `--dtype float32` shows that nothing else differs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import arguments, finish, open_model
from layercut.demo import fetch_model

SHARED = ("search", "fold", "heal")
"""Evaluation is not timed: beside the perplexities, which are shared, it has what the main process does alone."""


def main() -> None:
    args = arguments(
        __doc__ or "", data="python-docstrings", eval_data="python-docs", tokens=8192, tune_tokens=16384,
        eval_tokens=8192, window=256, batch_tokens=2048, learning_rate=0.0, ratio=0.2, method="exhaustive",
        dtype="auto", processes=2, threads=1, repeats=3,
    )  # fmt: skip
    runs: dict[int, list[dict[str, Any]]] = {1: [], args.processes: []}
    for _ in range(args.repeats):
        for count, done in runs.items():
            done.append(journey(args, count))
    one, several = runs[1], runs[args.processes]
    rows = [{"stage": stage, **timing(stage, one, several)} for stage in (*SHARED, "all of these")]
    agreement = {"same_segments": all(r["segments"] == one[0]["segments"] for r in several + one)}
    agreement |= {name: farthest(one[0][name], several[0][name]) for name in ("kl", "curve", "heldout", "perplexity")}
    kept = ("data", "eval_data", "tokens", "tune_tokens", "eval_tokens", "window", "batch_tokens", "ratio", "method",
            "dtype", "processes", "threads", "repeats")  # fmt: skip
    settings = {name: getattr(args, name) for name in kept}
    settings |= {name: Path(settings[name]).name for name in ("data", "eval_data")}
    claim = f"{args.processes} processes of {args.threads} threads do what one does, faster"
    finish(args.out, open_model(args.model), claim, rows, farthest_relative=agreement, settings=settings)
    print(json.dumps(agreement, indent=1))


def journey(args: Namespace, count: int) -> dict[str, Any]:
    """One run of the command with so many processes: what it chose, lost and took."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in (
            "data", "eval_data", "tokens", "tune_tokens", "eval_tokens", "window", "batch_tokens", "ratio", "method",
            "dtype",
        )]  # fmt: skip
        if args.learning_rate:
            flags.append(f"--learning-rate={args.learning_rate}")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = ["-m", "layercut.cli", "compress", args.model or str(fetch_model()), "--no-speed", f"--out={run}"]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run([*launcher, *command, *flags], env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        read = {stage: json.loads((run / f"{stage}.json").read_text()) for stage in (*SHARED, "eval")}
    tuning, figures = read["heal"]["tuning"], read["eval"]["perplexity"]
    seconds = {stage: read[stage]["seconds"] for stage in SHARED}
    return {
        "segments": read["search"]["segments"],
        "kl": {str(candidate["segments"]): candidate["kl"] for candidate in read["search"]["candidates"]},
        "curve": {point["step"]: point["loss"] for point in tuning["curve"]},
        "heldout": {point["step"]: point["loss"] for point in tuning["heldout"]},
        "perplexity": {state: figures[state] for state in ("dense", "cut", "folded", "tuned") if figures[state]},
        "seconds": seconds | {"all of these": sum(seconds.values())},
    }


def timing(stage: str, one: list[dict[str, Any]], several: list[dict[str, Any]]) -> dict[str, float]:
    """Medians, and the median ratio of runs that were made one after the other."""
    times = [[run["seconds"][stage] for run in runs] for runs in (one, several)]
    ratios = [a / b for a, b in zip(*times, strict=True) if b]
    return {
        "seconds_one": statistics.median(times[0]),
        "seconds_several": statistics.median(times[1]),
        "speedup": round(statistics.median(ratios), 3) if ratios else float("nan"),
    }


def farthest(one: dict[Any, float], several: dict[Any, float]) -> float:
    """The largest relative difference; inf where they are not of the same things."""
    if one.keys() != several.keys():
        return float("inf")
    return max(abs(several[key] - value) / max(abs(value), 1e-12) for key, value in one.items())


if __name__ == "__main__":
    main()
