"""OptiPFair's own depth pruning and distillation, in an environment of its own; the method "optipfair" of healing.py.

    python3 -m venv DIR && DIR/bin/pip install 'optipfair>=0.4.2,<0.5' torch transformers
    python research/healing.py … --peer-python DIR/bin/python         # which runs this file with that interpreter

Reads a folder checkpoint of the dense model and a file of token blocks ("tokens" and "heldout", [N, T] each). Removes
the segment's layers with `prune_model`, trains the rest with `distill_model` on the blocks, once and in their order,
and saves the student as a folder, with report.json in it. All settings of `distill_model` are its defaults, the rate
and one epoch apart; a step has as many tokens as the others' (a quarter in each of its four passes). Weights are in
float32, as its notebooks have them on a CPU: it keeps no master weights beside those it trains.

The loader is where the clock stands still: between two steps, eight times in a run, the held-out KL is taken outside
of the time. Memory: the peak above what is resident with the dense model loaded, so that the student, which is a
model of its own here, counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optipfair
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from memory import high_water, settled_bytes

ACCUMULATION = 4
"""Passes of a step: the default of `distill_model`."""
SCORES = 8


class Loader:
    """Batches of rows in their order, as `distill_model` takes them; what passes between two of them is training."""

    def __init__(self, rows: torch.Tensor, batch_size: int, score: Callable[[], float]) -> None:
        self.batches, self.batch_size, self.score = rows.split(batch_size), batch_size, score
        self.steps = -(-len(self.batches) // ACCUMULATION)
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        self.heldout: list[dict[str, float]] = [{"step": 0, "tokens": 0, "loss": score()}]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._go()
        for i, batch in enumerate(self.batches):
            if i and i % ACCUMULATION == 0:
                self.step_is_done(i // ACCUMULATION)
            yield {"input_ids": batch}

    def step_is_done(self, step: int) -> None:
        """Note the time; the last step ends with `distill_model` and is noted by its caller."""
        self.seconds += time.perf_counter() - self._begun
        self.cpu_seconds += time.process_time() - self._cpu
        tokens = sum(batch.numel() for batch in self.batches[: step * ACCUMULATION])
        spent = {"seconds": round(self.seconds, 2), "cpu_seconds": round(self.cpu_seconds, 2)}
        self.curve.append({"step": step, "tokens": tokens, **spent})
        if step % max(1, self.steps // SCORES) == 0 or step == self.steps:
            self.heldout.append({"step": step, "tokens": tokens, "loss": self.score()})
        self._go()

    def _go(self) -> None:
        self._begun, self._cpu = time.perf_counter(), time.process_time()


@torch.no_grad()
def held_out_kl(teacher: Any, student: Any, tokens: torch.Tensor) -> float:
    """Mean KL(p || q) in nats per token of [N, T]."""
    total = 0.0
    for rows in tokens.split(2):
        p, q = (model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1) for model in (teacher, student))
        total += F.kl_div(q, p, log_target=True, reduction="sum").item()
    return total / tokens.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--removed", type=int, nargs="+", required=True, help="layers, from 0")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    logging.getLogger("optipfair").setLevel(logging.WARNING)
    text = load_file(args.tokens)
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    before = settled_bytes()
    student = copy.deepcopy(teacher)
    teacher.requires_grad_(False)
    student = optipfair.prune_model(student, pruning_type="DEPTH", layer_indices=args.removed, show_progress=False)
    batch_size = max(1, args.batch_tokens // text["tokens"].shape[1] // ACCUMULATION)
    loader = Loader(text["tokens"], batch_size, lambda: held_out_kl(teacher, student, text["heldout"]))
    optipfair.distill_model(
        student, teacher, loader, epochs=1, learning_rate=args.rate, accumulation_steps=ACCUMULATION,
        show_progress=False,
    )  # fmt: skip
    loader.step_is_done(loader.steps)
    peak = high_water() - before

    student.save_pretrained(args.out)
    report = {
        "tokens": text["tokens"].numel(),
        "seconds": loader.seconds,
        "cpu_seconds": loader.cpu_seconds,
        "trained_parameters": sum(p.numel() for p in student.parameters()),
        "peak_above_weights_bytes": peak,
        "curve": loader.curve,
        "heldout": loader.heldout,
        "versions": {name: version(name) for name in ("optipfair", "torch", "transformers")},
    }
    (args.out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
