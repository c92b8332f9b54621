"""Claim: what `layercut compress --ratio 0.2` takes for models of 1 to 8 billion parameters. Computed, nothing is run.

    python benchmarks/shapes.py

`layercut plan` on a config.json of each published shape, with the default settings but for the ratio: bytes before and
after, the peak of every stage on a CPU with bfloat16 instructions, from disk as well, and floating-point operations.
How near such plans come to real runs of small models is measured by plan.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS
from layercut.config import ModelConfig, PlanConfig, SearchConfig
from layercut.estimate import plan_run
from layercut.files.json_values import write_json
from layercut.pipeline.provenance import environment
from stream import SHAPES as LLAMAS

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": LLAMA | LLAMAS["llama-3.2-1b"] | {"tie_word_embeddings": True},
    "Llama-3.2-3B": LLAMA
    | {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "Qwen3-4B": QWEN
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    | {"num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
    "Llama-3-8B": LLAMA | LLAMAS["llama-3-8b"] | {"tie_word_embeddings": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=RESULTS / "shapes.json")
    args = parser.parse_args()
    rows = [row(name, shape, args.ratio) for name, shape in SHAPES.items()]
    claim = (__doc__ or "").splitlines()[0]
    write_json(args.out, {"claim": claim, "ratio": args.ratio, "rows": rows, "environment": environment()})


def row(name: str, shape: dict[str, Any], ratio: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = {**shape, "dtype": "bfloat16", "max_position_embeddings": 8192}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        plans = {
            stream: plan_run(
                folder,
                PlanConfig(
                    load=ModelConfig(device="cpu", dtype="bfloat16", stream=stream),
                    search=SearchConfig(ratio=ratio), calibrate=False,
                ),
            )
            for stream in ("off", "on")
        }  # fmt: skip
    memory = plans["off"]
    return {
        "model": name,
        "shape": shape,
        "layers": memory["layers"],
        "bytes": memory["bytes"],
        "flops": sum(stage["flops"] or 0 for stage in memory["stages"].values()),
        "peak_bytes": {
            way: {stage: facts["peak_bytes"] for stage, facts in plan["stages"].items()} for way, plan in plans.items()
        },
    }


if __name__ == "__main__":
    main()
