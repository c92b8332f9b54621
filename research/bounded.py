"""A checkpoint larger than a memory limit on the process goes through the whole journey, its layers left on disk.

Writes a checkpoint of random bfloat16 weights (3.0 GB, 120 narrow layers), then runs `layercut
compress --place disk --device cpu` on it to the end, in a process of its own that may not have more than `--limit` GB
of data (RLIMIT_DATA: heap and private mappings; its children have the same limit each). The peak of the resident size
is read from the kernel and set back at the beginning of every stage (Linux), so that each stage's own can be set
beside what `layercut plan --place disk` says of it; of the export, which starts a process to check the checkpoint, the
two together, sampled, as the plan counts them. The text is Python's own documentation, and little of it: memory is
what is looked at. The checkpoint is deleted at the end.

    python research/bounded.py --limit 2.2
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import common
from layercut.models import checkpoints, loading
from layercut.pipeline.run_folder import Run
from layercut.pipeline.stages import text
from memory import Children, high_water, reset_peak
from plan import tokenizer
from stream import write_checkpoint

SHAPE = {
    "num_hidden_layers": 120, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 65536, "max_position_embeddings": 2048,
}  # fmt: skip
STAGES = ["text-evaluation", "text-calibration", "text-heldout", "text-tuning"]
STAGES += ["search", "cut", "fold", "heal", "eval", "export"]
PLANNED = {"search": ["load", "search"], "fold": ["fold"], "heal": ["tune"], "eval": ["eval"], "export": ["export"]}
FLAGS = ["--place=disk", "--device=cpu", "--ratio=0.2", "--method=angular", "--window=64"]


def flags(args: Any) -> list[str]:
    sizes = {"tokens": args.tokens, "tune-tokens": args.tune_tokens, "eval-tokens": args.eval_tokens}
    return [*FLAGS, f"--batch-tokens={args.batch_tokens}", *(f"--{name}={size}" for name, size in sizes.items())]


def journey(argv: list[str], limit: int, held_out: int) -> None:
    """The command under the limit, in this process; prints each stage's peak and seconds."""
    from layercut.cli.command_line import main as command

    text.FEWEST_HELD_OUT = held_out
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    peaks: dict[str, dict[str, float]] = {}
    stage = Run.stage

    @contextmanager
    def watched(run: Run, kind: Any, name: str, inputs: Any, **how: Any) -> Iterator[Any]:
        reset_peak()
        begun, both = time.perf_counter(), Children()
        try:
            with stage(run, kind, name, inputs, **how) as opened:
                yield opened
        finally:
            together = both.stop()
        peaks[name] = {"peak_rss_bytes": high_water(), "seconds": round(time.perf_counter() - begun, 1)}
        if name == "export":
            peaks[name]["peak_rss_bytes_with_the_fresh_process"] = together
        print(name, peaks[name], file=sys.stderr, flush=True)

    Run.stage = watched  # type: ignore
    code = command(argv)
    print(json.dumps({"exit_code": code, "stages": peaks}))


def plan(argv: list[str], held_out: int) -> None:
    """`layercut plan`, in this process, for so few rows held out."""
    from layercut.cli.command_line import main as command

    text.FEWEST_HELD_OUT = held_out
    sys.exit(command(argv))


def child(*command: str) -> str:
    """Standard output of a Python process; ends this one where it fails."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[:3]} ended with {done.returncode}")
    return done.stdout


def main() -> None:
    args = common.arguments(
        __doc__.splitlines()[0], limit=2.2, tokens=128, tune_tokens=256, batch_tokens=128, eval_tokens=128,
        held_out=128, layers=SHAPE["num_hidden_layers"], folder=tempfile.gettempdir(),
    )  # fmt: skip
    limit = round(args.limit * 1e9)
    with tempfile.TemporaryDirectory(prefix="layercut-bounded-", dir=args.folder) as place:
        model, run = Path(place) / "model", Path(place) / "run"
        model.mkdir()
        shape = SHAPE | {"num_hidden_layers": args.layers}
        size = write_checkpoint(model, shape)
        words: PreTrainedTokenizerFast = tokenizer()
        words.save_pretrained(model)
        if size <= limit:
            sys.exit(f"the checkpoint has {size / 1e9:.2f} GB, no more than the limit: give a smaller --limit")
        print(f"{size / 1e9:.2f} GB written, limit {limit / 1e9:.2f} GB", file=sys.stderr, flush=True)
        asked = ["plan", str(model), *flags(args), "--no-calibrate", "--json"]
        plans = json.loads(child(__file__, "--plan", json.dumps([asked, args.held_out])))
        texts = ["--data=python-docs", "--eval-data=python-docstrings", f"--out={run}"]
        argv = ["compress", str(model), *flags(args), *texts]
        seen = json.loads(child(__file__, "--child", json.dumps([argv, limit, args.held_out])).splitlines()[-1])
        if seen["exit_code"] != 0:
            sys.exit(f"compress ended with {seen['exit_code']}")
        exported = json.loads((run / "export.json").read_text())
        summary = json.loads((run / "summary.json").read_text())
    rows = []
    for stage in STAGES:
        parts = [plans["stages"][name]["peak_bytes"] for name in PLANNED.get(stage, ())]
        planned = max(parts, default=None)
        measured = max(value for key, value in seen["stages"][stage].items() if key != "seconds")
        ratio = round(planned / measured, 2) if planned else None
        rows.append({"stage": stage, **seen["stages"][stage], "planned_bytes": planned, "planned_to_measured": ratio})
    checkpoint = checkpoints.Checkpoint(f"random weights, {args.layers} layers", Path("random"))
    common.finish(
        args.out,
        loading.LanguageModel(None, None, checkpoint, torch.bfloat16, torch.device("cpu")),
        "a checkpoint larger than the memory limit on the process goes through compress to the end",
        rows,
        shape=shape,
        checkpoint_bytes=size,
        exported_bytes=exported["bytes"],
        check=exported["check"],
        limit={"bytes": limit, "kind": "RLIMIT_DATA", "on": "compress, and by itself the process it starts"},
        exit_code=seen["exit_code"],
        settings=[*flags(args), f"at least {args.held_out} tokens held out"],
        removed=summary["segments"],
        perplexity=summary["perplexity"],
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        journey(*json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["--plan"]:
        plan(*json.loads(sys.argv[2]))
    else:
        main()
