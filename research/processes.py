"""Claim: two processes make the same choice and the same losses as one, in less time.

    python research/processes.py --data c4.txt --tune-data wikitext2_train.txt

One process and several do the same search, fold and tuning on the same tokens, each process with as many threads; the
machine needs as many cores, and nothing else to do. Compared are the segments, the price of every candidate, the fold's
error, the losses of every step of tuning and of every held-out score. Timed are the three stages, from a barrier to a
barrier: wall seconds, and CPU seconds of all processes together, which tell what sharing costs on a machine that is
not quiet. `--spread 1` adds the same processes over a model whose weights are spread over them (FSDP2).

In bfloat16 another grouping of rows rounds differently (losses about 1e-3 apart): `--dtype float32` shows that nothing
else differs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import arguments, blocks, finish, open_model
from layercut.cli.demo import fetch_model
from layercut.distributed import processes
from layercut.healing import tune_
from layercut.healing.least_squares import fold_cut_
from layercut.layer_search import search
from layercut.models import checkpoints, decoder_stack, placement
from layercut.models.memory import reuse_freed
from layercut.models.runner import DecoderRunner
from layercut.segments import layers_to_remove
from layercut.surgery import cut_segment_

STAGES = ("search", "fold", "tune")
HELD_OUT = 1024
"""Tokens that judge tuning."""


def main() -> None:
    args = arguments(
        __doc__ or "", data="python-docstrings", tune_data="python-docs", tokens=1024, fold_tokens=8192,
        tune_tokens=12288, window=256, batch_tokens=2048, ratio=0.2, method="exhaustive", dtype="auto", processes=2,
        threads=1, repeats=1, spread=0, worker="",
    )  # fmt: skip
    if args.worker:
        work(args)
        return
    kinds = {"one": (1, "off"), "several": (args.processes, "off")}
    if args.spread:
        kinds["spread"] = (args.processes, "on")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind, (count, shard) in kinds.items():
            runs[kind].append(launched(count, args.threads, shard))
    rows = [{"stage": stage, **timing(stage, runs)} for stage in (*STAGES, "all of these")]
    one = runs["one"][0]
    agreement = {
        kind: {
            "same_segments": all(run["segments"] == one["segments"] for run in found),
            **{name: farthest(one[name], found[0][name]) for name in ("kl", "fold", "curve", "heldout")},
        }
        for kind, found in runs.items()
        if kind != "one"
    }
    kept = ("data", "tune_data", "tokens", "fold_tokens", "tune_tokens", "window", "batch_tokens", "ratio", "method",
            "dtype", "processes", "threads", "repeats")  # fmt: skip
    settings = {name: getattr(args, name) for name in kept}
    claim = f"{args.processes} processes of {args.threads} threads do what one does, faster"
    finish(
        args.out, open_model(args.model), claim, rows,
        segments=one["segments"], farthest_relative=agreement, settings=settings,
    )  # fmt: skip
    print(json.dumps(agreement, indent=1))


# --- one run, in each of its processes ------------------------------------------------------------------------------


def launched(count: int, threads: int, shard: str) -> dict[str, Any]:
    """This script in so many processes; what the first of them found."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "LAYERCUT_SHARD": shard}
        done = subprocess.run(
            [*launcher, __file__, *sys.argv[1:], f"--worker={result}"], env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(result.read_text())


def work(args: Namespace) -> None:
    """Search, fold and tune, timed; the main process writes what came out."""
    torch.set_num_threads(args.threads)
    processes.start()
    place: Any = "processes" if os.environ["LAYERCUT_SHARD"] == "on" else "memory"
    checkpoint = checkpoints.resolve(args.model or str(fetch_model()))
    loaded = placement.load(checkpoint, place=place, device="cpu", dtype=args.dtype)
    draw = {"window": args.window, "seed": 0}
    calibration = blocks(loaded, args.data, args.tokens, **draw).tokens
    text = blocks(loaded, args.tune_data, HELD_OUT + max(args.fold_tokens, args.tune_tokens), **draw).tokens
    heldout, rest = text[: HELD_OUT // args.window], text[HELD_OUT // args.window :]
    dense, seconds = DecoderRunner(loaded.model), {}
    length = layers_to_remove(args.ratio, len(dense))

    def timed(stage: str, compute: Callable[[], Any]) -> Any:
        processes.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        found = compute()
        own = time.process_time() - cpu
        processes.barrier()
        seconds[stage] = {"wall": time.perf_counter() - wall, "cpu": processes.summed([own])[0]}
        return found

    found = timed("search", lambda: search(dense, calibration, n_layers=length, method=args.method, seed=0))
    model = decoder_stack.share(loaded.model)
    cut_segment_(model, found.segments)
    student = DecoderRunner(model)
    rows = rest[: args.fold_tokens // args.window]
    folds = timed("fold", lambda: [fold_cut_(student, dense, segment, rows) for segment in found.segments])
    plain = decoder_stack.share(loaded.model)  # tuned from the plain cut: what is compared does not hang on the fold
    cut_segment_(plain, found.segments)
    tokens, how = rest[: args.tune_tokens // args.window], {"heldout": heldout, "batch_tokens": args.batch_tokens}
    reuse_freed()
    report = timed("tune", lambda: tune_(DecoderRunner(plain), dense, tokens, **how))
    if processes.is_main():
        searched = found.to_dict()
        result = {
            "segments": searched["segments"],
            "kl": {str(candidate["segments"]): candidate["kl"] for candidate in searched["candidates"]},
            "fold": {str(fold.segment): fold.error_after for fold in folds},
            "curve": {point["step"]: point["loss"] for point in report.curve},
            "heldout": {point["step"]: point["loss"] for point in report.heldout},
            "seconds": seconds,
        }
        Path(args.worker).write_text(json.dumps(result))
    processes.stop()


# --- figures --------------------------------------------------------------------------------------------------------


def timing(stage: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians of wall and CPU seconds, and of the ratios of runs that were made one after the other."""

    def seconds(run: dict[str, Any], kind: str) -> float:
        return sum(run["seconds"][name][kind] for name in (STAGES if stage not in STAGES else [stage]))

    found: dict[str, float] = {}
    for name, done in runs.items():
        for kind in ("wall", "cpu"):
            found[f"{kind}_seconds_{name}"] = round(statistics.median(seconds(run, kind) for run in done), 2)
        if name != "one":
            pairs = [(seconds(a, "wall"), seconds(b, "wall")) for a, b in zip(runs["one"], done, strict=True)]
            found[f"speedup_{name}"] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


def farthest(one: dict[Any, float], several: dict[Any, float]) -> float:
    """The largest relative difference; inf where they are not of the same things."""
    if one.keys() != several.keys():
        return float("inf")
    return max((abs(several[key] - value) / max(abs(value), 1e-12) for key, value in one.items()), default=0.0)


if __name__ == "__main__":
    main()
