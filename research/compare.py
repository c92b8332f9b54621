"""Claim: what the gate removes is as good as what any other method does, at a fraction of the greedy ones' work.

    python research/compare.py --data TEXT --eval-data HELDOUT [--ratios 0.2 0.3] [--tune-tokens 16384] …

`layercut compare` at each ratio, into runs/compare-RATIO (stopped, it goes on there); the outcome is copied to
results/compare-RATIO.json, without paths of this machine, from which `research/readme.py` makes the tables of the
documentation; with --tasks or --probes to results/survives-RATIO.json, what every cut still does. Every method gets the
same calibration, tuning and evaluation tokens, in one run on one machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import arguments
from layercut.cli.demo import fetch_model
from layercut.config import DataConfig, TasksConfig
from layercut.config.commands import CompareConfig, MethodsConfig, RunConfig
from layercut.data.sources import split_mix
from layercut.files import write_json
from layercut.pipeline.compare import compare

HEALING = 4
"""What heals here by default, as docs/what-survives-measured.md numbers it: compare within a number."""


def take_over(run: Path, target: Path, **settings: Any) -> None:
    """Copy a comparison and where it was made."""
    comparison = json.loads((run / "compare.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    comparison["model"] = Path(comparison["model"]).name
    for use in ("calibration", "tuning", "evaluation"):
        if comparison[use]:
            comparison[use]["source"] = "+".join(
                Path(part).name.removesuffix(".txt") for part in split_mix(comparison[use]["source"])
            )
    plain = [argument for argument in sys.argv[1:] if not argument.startswith("/")]
    environment["command"] = [Path(sys.argv[0]).name, *plain]
    environment.pop("commands", None)  # those that made the run folder, with paths
    write_json(target, {**settings, "comparison": comparison, "environment": environment})


def main() -> None:
    args = arguments(
        __doc__ or "",
        data="python-docstrings",
        eval_data="python-docs",
        ratios=[0.2, 0.3],
        methods=MethodsConfig().methods,
        tokens=2048,
        window=256,
        eval_tokens=8192,
        tasks="",
        include_path="",
        limit=400,
        probes=0,
        states="cut,folded,tuned",
        tune_tokens=16384,
        seed=0,
        runs="runs",
    )
    for ratio in args.ratios:
        config = CompareConfig(
            text=DataConfig(data=args.data, tokens=args.tokens, window=args.window, seed=args.seed),
            compare=MethodsConfig(
                ratio=ratio,
                methods=args.methods,
                eval_data=args.eval_data,
                eval_tokens=args.eval_tokens,
                eval_window=args.window,
                tune_tokens=args.tune_tokens,
                states=args.states,
            ),
            tasks=TasksConfig(
                tasks=args.tasks,
                limit=args.limit if args.tasks else None,
                include_path=Path(args.include_path) if args.include_path else None,
                probes=bool(args.probes),
            ),
            run=RunConfig(out=Path(args.runs) / f"compare-{ratio:g}"),
        )
        run = compare(args.model or str(fetch_model()), config)
        name = "survives" if args.tasks or args.probes else "compare"
        take_over(run, args.out.with_name(f"{name}-{ratio:g}.json"), ratio=ratio, seed=args.seed, healing=HEALING)


if __name__ == "__main__":
    main()
