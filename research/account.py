"""Account of a run: passes through layers and head, and time, by stage and by what a stage does.

    python research/account.py NAME compress MODEL [options of layercut compress]

Runs the command in this process on one thread and counts, with hooks of torch, the rows' tokens that enter a decoder
layer (in passes through the whole dense stack, so that a model with fewer layers counts less), those of them that are
taken with a gradient, and those that enter the head. Seconds are of this process, and of processes that it waited for.
NAME names the record in research/results/account.json; one of the same name is replaced.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from common import RESULTS, compact, named, without_folder
from layercut import evaluation, layer_search
from layercut.cli.command_line import main
from layercut.evaluation import speed
from layercut.files import write_atomically
from layercut.healing.quick_fold import FoldCosts
from layercut.layer_search.cut_costs import CutCosts
from layercut.pipeline import stages
from layercut.pipeline.environment import environment
from layercut.pipeline.stages import evaluate, export, quantize, shortlisting, text

STAGES = {
    "text": (text, "draw_all"),
    "search": (stages.search, "search"),
    "cut": (stages.heal, "cut"),
    "fold": (stages.heal, "fold"),
    "tune": (stages.heal, "tune"),
    "quantize": (quantize, "quantize"),
    "evaluate": (evaluate, "evaluate"),
    "capabilities": (evaluate, "capabilities"),
    "export": (export, "export"),
}
PARTS: dict[str, tuple[Any, str]] = {
    "the search": (layer_search, "search"),
    "cuts priced": (CutCosts, "_run"),
    "dense states of quick folds": (shortlisting, "fold_costs"),
    "quick folds": (FoldCosts, "__call__"),
    "short healings: fold": (shortlisting, "fold_"),
    "short healings: tuning": (shortlisting, "tune_"),
    "short healings: judging": (shortlisting.HealedCosts, "__call__"),
    "perplexity": (evaluation, "window_losses"),
    "generations": (evaluation, "generations"),
    "generation health": (evaluation, "generation_health"),
    "replies": (evaluation, "replies"),
    "speed": (speed, "speed"),
    "map of capabilities": (evaluate, "capability_map"),
    "probes": (evaluation, "capability_figures"),
    "writing the GGUF file": (quantize, "write_cut"),
    "checking the GGUF file": (export, "check_cut"),
    "speed in llama.cpp": (export, "speed_by_llama_cpp"),
}
spent: dict[tuple[str, str], dict[str, float]] = {}
now: list[tuple[str, str]] = [("", "")]
layers = 0


def seconds() -> tuple[float, float]:
    of = os.times()
    return of.user + of.system + of.children_user + of.children_system, time.perf_counter()


def record() -> dict[str, float]:
    return spent.setdefault(now[-1], dict.fromkeys(("calls", "layers", "with_gradient", "head", "cpu", "wall"), 0))


@contextmanager
def within(stage: str, part: str) -> Iterator[None]:
    """What is spent inside counts here, and not in what is around."""
    cpu, wall = seconds()
    around = record()
    now.append((stage or now[-1][0], part))
    one = record()
    try:
        yield
    finally:
        cpu, wall = (after - before for after, before in zip(seconds(), (cpu, wall), strict=True))
        now.pop()
        one["calls"] += 1
        for of, sign in ((one, 1), (around, -1)):
            of["cpu"] += sign * cpu
            of["wall"] += sign * wall


def counted(where: Any, name: str, stage: str, part: str) -> None:
    inner: Callable[..., Any] = getattr(where, name)

    def outer(*args: Any, **named_args: Any) -> Any:
        with within(stage, part):
            return inner(*args, **named_args)

    setattr(where, name, outer)


def entering(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    global layers
    stands_in = "forward" in vars(module)  # for a layer that is passed by, or is called through this one
    if isinstance(module, GradientCheckpointingLayer) and not stands_in and args and isinstance(args[0], torch.Tensor):
        tokens = args[0].numel() // args[0].shape[-1]
        record()["layers"] += tokens
        record()["with_gradient"] += tokens * torch.is_grad_enabled()
        layers = max(layers, 1 + (getattr(getattr(module, "self_attn", None), "layer_idx", 0) or 0))
    elif isinstance(module, torch.nn.Linear) and module.out_features > 16 * module.in_features:
        record()["head"] += args[0].numel() // args[0].shape[-1]


def rows() -> list[dict[str, Any]]:
    """By stage and part, in order; passes are tokens through the whole dense stack."""
    return [
        {"stage": stage, "part": part, "calls": int(of["calls"]), "tokens_of_a_pass": round(of["layers"] / layers),
         "with_gradient": round(of["with_gradient"] / layers), "head_tokens": int(of["head"]),
         "cpu_seconds": round(of["cpu"], 1), "seconds": round(of["wall"], 1)}
        for (stage, part), of in spent.items() if stage
    ]  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for label, (where, name) in STAGES.items():
        counted(where, name, label, "")
    for label, (where, name) in PARTS.items():
        counted(where, name, "", label)
    torch.nn.modules.module.register_module_forward_pre_hook(entering)
    title, *asked = sys.argv[1:]
    status = main(asked)
    out = RESULTS / "account.json"
    there = json.loads(out.read_text()) if out.is_file() else {}
    command = ["layercut", *(named(without_folder(word)) for word in asked)]
    there[title] = {"command": command, "layers": layers, "rows": rows(), "environment": environment()}
    del there[title]["environment"]["command"]
    with write_atomically(out) as partial:
        partial.write_text(compact(there), encoding="utf-8")
    raise SystemExit(status)
