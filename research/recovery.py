"""Claim: fold and cutoff endpoint tuning close most of the log-perplexity gap that a cut opens, and more the longer.

    python research/recovery.py --data TUNE.txt --report wiki=WIKI.txt web=WEB.txt [--tokens 262144 1048576]
    python research/recovery.py …        # goes on: budgets that are done are kept, one that was stopped is resumed

Every budget is a run of its own, with its own schedule: fold on the calibration tokens, then that many tokens of
tuning. Gap closed: (ln cut - ln healed) / (ln cut - ln dense), of perplexities on texts that nothing was tuned on.
Seconds are those of fold and tuning, scoring of the held-out rows included; processor seconds beside them; both null
where the tuning was resumed (its own seconds are counted over all processes). --work keeps finished rows and the healed
weights; other settings want another folder, but for those that a row names.
"""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from common import arguments, blocks, finish, open_model
from layercut.config import TuneSettings
from layercut.evaluation import perplexity
from layercut.files import write_json
from layercut.healing import tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.least_squares import fold_cut_
from layercut.healing.tuning_state import StateFile, asked_to_stop
from layercut.models import decoder_stack
from layercut.models.losses import KL, mean_kl
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut_segment_


def main() -> None:
    args = arguments(
        __doc__ or "", data="python-docstrings", report=["docs=python-docs"], segment="13:19", window=256, seed=0,
        calibration_tokens=65536, heldout_tokens=8192, eval_tokens=65536, tokens=[262144, 1048576], radius=[1],
        mix=0.0, learning_rate=0.0, batch_tokens=TuneSettings.batch_tokens, threads=2, work="runs/recovery",
    )  # fmt: skip
    torch.set_num_threads(args.threads)
    model = open_model(args.model)
    segment, dense = [Segment.parse(args.segment)], DecoderRunner(model.model)
    draw = partial(blocks, model, window=args.window, seed=args.seed)
    calibration = draw(args.data, args.calibration_tokens).tokens
    heldout = draw(args.data, args.heldout_tokens, skip=len(calibration)).tokens
    tokens = draw(args.data, max(args.tokens), skip=len(calibration) + len(heldout)).tokens
    reported = {
        name: draw(source, args.eval_tokens, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.report)
    }

    def measured(student: DecoderRunner) -> dict[str, Any]:
        figures = {name: perplexity(student.model, text) for name, text in reported.items()}
        return {"perplexity": figures, "heldout_kl": mean_kl(dense, student, heldout)}

    def cut() -> DecoderRunner:
        student = decoder_stack.share(model.model)
        cut_segment_(student, segment)
        return DecoderRunner(student)

    def keep(student: DecoderRunner, name: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        shared = {id(p) for p in dense.model.parameters()}
        own = {n: p.detach() for n, p in student.model.named_parameters() if id(p) not in shared}
        save_file(own, work / f"{name}.safetensors")

    def folded() -> DecoderRunner:
        student = cut()
        decoder_stack.replace_parameters_(student.model, load_file(work / "folded.safetensors"))
        return student

    work = Path(args.work)
    part = work / "rows.json"
    rows: list[dict[str, Any]] = json.loads(part.read_text()) if part.is_file() else []
    if not rows:
        student, clock = cut(), Clock()
        fold, spent = fold_cut_(student, dense, segment[0], calibration), clock.read()
        keep(student, "folded")
        rows = [
            {"state": "dense", **measured(dense)},
            {"state": "cut", **measured(cut())},
            {"state": "folded", "fold": fold.to_dict(), **spent, **measured(student)},
        ]
        write_json(part, rows)
    for radius in args.radius:
        objective: Any = KL(mix=args.mix)
        settings = TuneSettings(
            radius=radius, objective=objective,
            learning_rate=args.learning_rate or None, batch_tokens=args.batch_tokens,
        )  # fmt: skip
        for count in sorted(args.tokens):
            settled = {"tune_tokens": count, "radius": radius, "mix": args.mix}
            if any(settled.items() <= row.items() for row in rows if "tune_tokens" in row):
                continue
            student, clock = folded(), Clock()
            name = "-".join(map(str, settled.values()))
            state = StateFile(work / f"{name}.state")
            resumed = state.path.is_file()
            files, rows_of_count = (
                TuningFiles(state=state, stopping=asked_to_stop),
                math.ceil(count / args.window),
            )
            report = tune_(student, dense, tokens[:rows_of_count], heldout=heldout, files=files, settings=settings)
            taken: dict[str, Any] = {k: None if resumed else v + rows[2][k] for k, v in clock.read().items()}
            row = {"state": "tuned", **settled, "batch_tokens": args.batch_tokens, **taken}
            kept = ("learning_rate", "trained_layers", "trained_parameters", "state_bytes", "heldout", "best_step")
            row |= {key: getattr(report, key) for key in kept} | {"tuning_seconds": report.seconds}
            rows.append(row | measured(student))
            print(f"radius {radius}, {count:,} tokens: {rows[-1]['perplexity']}", flush=True)
            write_json(part, rows)
            keep(student, f"tuned-{name}")
            state.path.unlink(missing_ok=True)
    add_gaps_(rows)
    told = ("segment", "window", "seed", "calibration_tokens", "heldout_tokens", "eval_tokens")
    facts = {key: getattr(args, key) for key in (*told, "threads")} | {"reported": list(reported)}
    sources = [Path(each).name for each in args.data.split("+")]
    finish(args.out, model, (__doc__ or "").splitlines()[0], rows, data=sources, **facts)


class Clock:
    """Seconds since it was made, by the wall and of this process's threads."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def add_gaps_(rows: list[dict[str, Any]]) -> None:
    """Gap closed on every text, in every row between the cut and the dense model."""
    at = {row["state"]: row["perplexity"] for row in rows}
    for row in rows[2:]:
        row["gap_closed"] = {
            text: math.log(at["cut"][text] / figure) / math.log(at["cut"][text] / at["dense"][text])
            for text, figure in row["perplexity"].items()
        }


if __name__ == "__main__":
    main()
