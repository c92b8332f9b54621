"""Run folders made up to look like the demo's, for tests of the report and the card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
COSTS = {2: 2.15, 9: 1.89, 12: 0.91, 13: 0.84, 14: 0.96, 22: 11.5}
"""KL of removing six layers from a start on."""


_HELD_OUT = [{"step": s, "tokens": 1024 * s, "loss": 0.41 + 0.52 * math.exp(-s / 28)} for s in range(0, 119, 10)]
_REACH = {"ideal": 1.25, "reachable": 1.22, "layer_share": 0.9}
_SPEED = {
    "prefill": {"dense": 1480.2, "compressed": 1803.9, "ratio": 1.219, **_REACH},
    "decode": {"dense": 24.1, "compressed": 28.6, "ratio": 1.187, **_REACH},
    "device": "cpu", "threads": 2, "kv_bytes_per_token": {"dense": 46080, "compressed": 36864},
}  # fmt: skip
_PARTS: dict[str, dict[str, Any]] = {
    "search": {
        "method": "fisher", "segments": [[13, 19]], "seed": 0,
        "cost": {"layer_forwards": 11520, "layer_backwards": 11520},
        "candidates": [{"segments": [[start, start + 6]], "kl": kl} for start, kl in COSTS.items()],
        "calibration": {"source": "self", "tokens": 12288, "fingerprint": "3f9ac2d1b7e0"},
    },
    "heal": {
        "fold": [{"segment": [13, 19], "layer": 12, "modules": ["mlp.down_proj"], "ridges": [0.01],
                  "error_before": 5.21, "error_after": 2.87, "tokens": 65536}],
        "tuning": {"objective": "kl", "tokens": 120832, "steps": 118, "learning_rate": 5e-4, "trained_layers": [12, 13],
                   "trained_parameters": 7080192, "curve": _HELD_OUT[1:], "heldout": _HELD_OUT, "best_step": 100,
                   "data": {"source": "self", "tokens": 120832, "fingerprint": "88b1c0aa42fe"}},
    },
    "summary": {
        "model": MODEL, "layers": {"before": 30, "after": 24}, "segments": [[13, 19]],
        "original_layer_index": [*range(13), *range(19, 30)],
        "parameters": {"before": 134515008, "after": 113276160}, "bytes": {"before": 269060552, "after": 226578440},
        "perplexity": {"dataset": "wikitext-2 test", "window": 512, "tokens": 65536, "dense": 45.1,
                       "cut": 101.3, "folded": 83.2, "tuned": 67.4, "quantized": None},
        "tasks": None, "retention": None, "speed": _SPEED, "seconds": {"search": 41.2, "tune": 132.5},
        "peak_rss_bytes": 2_310_000_000, "versions": {"layercut": "0.1.0", "torch": "2.11.0"},
    },
    "eval": {"speed": _SPEED, "generations": [
        {"prompt": f"Prompt {i}?", "dense": f"Dense answer {i}.", "compressed": f"Pruned answer {i}."} for i in range(3)
    ]},
    "env": {"hardware": "x86_64, 2 cores, 8 GB", "date": "2026-01-05",
            "command": ["layercut", "compress", MODEL, "--ratio", "0.2", "--out", "runs/demo"]},
}  # fmt: skip


def make_run(folder: Path, **changed: Any) -> Path:
    """A complete run folder; `search=None` leaves search.json out, `summary={…}` overrides keys of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in {**_PARTS, **changed}:
        if changed.get(name, {}) is not None:
            content = _PARTS.get(name, {}) | changed.get(name, {})
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_perplexity(**values: Any) -> dict[str, Any]:
    """Keys of summary.json with other perplexities."""
    return {"perplexity": {**_PARTS["summary"]["perplexity"], **values}}


def _task(dense: float, compressed: float, lost: int, gained: int, p: float, chance: float) -> dict[str, Any]:
    return {
        "metric": "acc_norm", "items": 100, "chance": chance, "dense": dense, "dense_stderr": 0.0496,
        "compressed": compressed, "compressed_stderr": 0.0478, "lost": lost, "gained": gained, "p_value": p,
        "retention": compressed / dense, "retention_above_chance": (compressed - chance) / (dense - chance),
        "others": {"acc": {"dense": 0.49, "compressed": 0.41, "p_value": 0.2}},
    }  # fmt: skip


def survival(**changed: Any) -> dict[str, Any]:
    """Keys of summary.json about what the pruned model still does: tasks, long context, hidden keys, generation."""
    grids = {
        name: [{"length": n, "depth": d, "found": found if n == 2048 else 2, "trials": 2}
               for n in (1024, 2048) for d in (0.0, 0.5, 1.0)]
        for name, found in (("dense", 2), ("compressed", 1))
    }  # fmt: skip
    edges = [(1, 64), (64, 1024), (1024, 2048)]
    by_position = {
        name: [{"start": a, "stop": b, "perplexity": value} for (a, b), value in zip(edges, values, strict=True)]
        for name, values in (("dense", (60.0, 40.0, 30.0)), ("compressed", (90.0, 60.0, 54.0)))
    }
    return {
        "tasks": {"arc_easy": _task(0.49, 0.40, 14, 5, 0.064, 0.25), "piqa": _task(0.65, 0.55, 15, 5, 0.041, 0.5)},
        "retention": {"mean": 0.831, "above_chance": 0.6, "tasks": 2, "tasks_above_chance": 2},
        "long_context": {"window": 2048, "windows": 4, "perplexity": by_position, "passkey": grids, "cost": None},
        "generation_health": {
            "dense": {"repeated_4grams": 0.22, "distinct_1": 0.5, "distinct_2": 0.8, "dense_loss": 0.61},
            "compressed": {"repeated_4grams": 0.31, "distinct_1": 0.45, "distinct_2": 0.7, "dense_loss": 1.4},
            "prompts": 24, "tokens": 64,
        },
    } | changed  # fmt: skip


def skill_figures(answers: int = 8, **hits: tuple[float, float]) -> dict[str, Any]:
    """Of each skill the shares of answers that the dense and the pruned model give."""
    return {
        "kl": dict.fromkeys(hits, 0.25), "dense_hits": {name: dense for name, (dense, _) in hits.items()},
        "hits": {name: pruned for name, (_, pruned) in hits.items()}, "answers": dict.fromkeys(hits, answers),
    }  # fmt: skip


def frontier(**changed: Any) -> dict[str, Any]:
    """frontier.json: three states at three numbers of bits; within 5 % two of them, one within 100 MB as well."""
    rises = {30: (0.0, 0.001, 0.04), 27: (0.03, 0.031, 0.09), 24: (0.08, 0.082, 0.19)}
    points = [{"layers": n, "bits": bits, "bytes": n * bits * 560_000, "rise": rise}
              for n, row in rises.items() for bits, rise in zip((16, 8, 4), row, strict=True)]  # fmt: skip
    chosen = next(p for p in points if (p["layers"], p["bits"]) == (30, 4))
    return {"points": points, "chosen": chosen, "budgets": {"target_size": "100MB", "max_loss": 0.05}, **changed}
