"""Stages: what survived. Perplexity of every state, generations and speed, tasks, long context, others' evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layercut import evaluation as measures
from layercut.data.blocks import in_rows
from layercut.distributed import processes
from layercut.evaluation import speed
from layercut.models import layer_reader_protocol
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages import text
from layercut.progress import bar, say
from layercut.segments import Segment


def evaluate(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """Perplexity of every state on the same held-out tokens; generations and speed of the first and the last."""
    tokens, told = work.blocks["evaluation"], work.text["evaluation"]
    fold, heal = work.run.read("fold") or {}, work.run.read("heal") or {}
    states: dict[str, list[str] | None] = {"dense": None, "cut": []}
    if fold["changed"]:
        states["folded"] = ["folded"]
    if heal["tuning"]:
        states["tuned"] = ["folded", "tuned"]
    if (work.run.read("quantize") or {})["bits"] < 16:
        states["quantized"] = ["folded", "tuned", "quantized"]
    figures: dict[str, Any] = dict.fromkeys(("dense", "cut", "folded", "tuned", "quantized"))
    losses: dict[str, torch.Tensor] = {}

    def model(state: str) -> Any:
        weights = states[state]
        return work.dense.model if weights is None else work.student(segments, *weights)

    with bar("perplexity", len(states) * len(tokens)) as advance:
        for state in states:
            losses[state] = measures.window_losses(model(state), tokens, advance=advance)
            figures[state] = measures.of_losses(losses[state])
    errors = {name: measures.paired_error(of, losses["dense"]) for name, of in losses.items() if name != "dense"}
    beside = processes.on_main(lambda: look_closer(work, model([*states][-1]), tokens))
    return {
        "perplexity": {
            "dataset": told["source"], "window": tokens.shape[1], "tokens": tokens.numel(), **figures,
            "protocol": measures.perplexity_protocol(tokens.shape[1]), "fingerprint": told["fingerprint"],
            "standard_error": errors, "shared": text.facts(work.run.read("text-shared") or {}),
        },
        **beside,
    }  # fmt: skip


def look_closer(work: RunContext, last: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """What the dense and the last model write, and how fast; not measured where layers are on disk, which would be
    read again for every token written."""
    if layer_reader_protocol.layers_on_disk(last):
        say("evaluate", "layers are left on disk: generations, their health and speed are not measured")
        return {"generations": None, "health": None, "speed": None, "peak_rss_bytes": speed.peak_rss_bytes()}
    samples = [measures.generations(m, work.tokenizer) for m in (work.dense.model, last)]
    return {
        "generations": [
            {"prompt": prompt, "dense": dense, "compressed": compressed}
            for prompt, dense, compressed in zip(measures.PROMPTS, *samples, strict=True)
        ],
        "health": measures.generation_health(work.dense.model, last, in_rows(tokens, work.config.text.window)),
        "speed": speed.speed(work.dense.model, last) if work.config.evaluate.speed else None,
        "peak_rss_bytes": speed.peak_rss_bytes(),
    }


def score(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """Tasks of lm-eval, dense and compressed, on the same items; each task is kept as soon as it is scored."""
    asked, tokenizer = work.config.tasks, work.tokenizer
    tasks = measures.load_tasks(asked.names, asked.include_path)
    both = {"dense": work.dense.model, "compressed": work.student(segments, "folded", "tuned", "quantized")}
    records = {
        name: measures.score_tasks(m, tokenizer, tasks, limit=asked.limit, name=name, cache=work.run / "tasks")
        for name, m in both.items()
    }
    return measures.compare_tasks(records["dense"], records["compressed"]) | {"limit": asked.limit}


def others(work: RunContext, segments: Sequence[Segment], functions: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluations that packages bring, dense and compressed, from the run's seed."""
    both = {
        "dense": lambda: work.dense.model,
        "compressed": lambda: work.student(segments, "folded", "tuned", "quantized"),
    }
    seed = work.config.text.seed
    return {"evaluations": measures.measure_all(functions, both, work.tokenizer, seed=seed), "seed": seed}


def long(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """Perplexity by position on long windows of the evaluation text, hidden keys, and what such a length costs."""
    both = {"dense": work.dense.model, "compressed": work.student(segments, "folded", "tuned", "quantized")}
    windows = measures.long_windows(work.blocks["evaluation"], work.config.long.long_context, work.dense.model)
    longest, tokenizer = windows.shape[1], work.tokenizer
    trials = measures.passkey_cases(tokenizer, longest, work.config.text.seed)
    total = 2 * (windows.numel() + sum(len(ids) for _, _, ids, _ in trials))
    with bar("long context", total) as advance:
        positions = {n: measures.perplexity_by_position(m, windows, advance=advance) for n, m in both.items()}
        grids = {n: measures.passkey_grid(m, tokenizer, trials, advance=advance) for n, m in both.items()}
    return {
        "window": longest,
        "windows": len(windows),
        "perplexity": positions,
        "passkey": grids | {"seed": work.config.text.seed} if trials else None,
        "cost": speed.long_prompt(*both.values(), tokens=longest),
    }
