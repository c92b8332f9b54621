"""Run by itself in the engine's environment: mlx-lm loads a folder and computes in float32, generating with its cache.

python mlx_lm.py MODEL < ASKED.json
"""

import json
import sys

if sys.path and sys.path[0].endswith("runners"):
    sys.path.pop(0)  # this file has the name of the package

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.generate import generate_step


def main(folder, asked):
    mx.set_default_device(mx.cpu)
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    ids = mx.array(asked["tokens"])
    logits = model(ids[None])[0].astype(mx.float32)
    losses = nn.losses.cross_entropy(logits[:-1], ids[1:])
    steps = generate_step(ids[: asked["prompt"]], model, max_tokens=asked["new"])
    greedy = [int(token) for token, _ in steps]
    return {
        "losses": [float(x) for x in losses],
        "greedy": greedy,
        "ids": list(tokenizer.encode(asked["text"], add_special_tokens=False)),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.load(sys.stdin))))
