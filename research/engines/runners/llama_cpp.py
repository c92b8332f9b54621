"""Run by itself: llama.cpp loads a GGUF file and computes, by the same code as layercut's own check of what it exports.

python llama_cpp.py MODEL.gguf < ASKED.json
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "src" / "layercut" / "export"))
from llama_cpp_process import Model


def main(file, asked):
    tokens, prompt = asked["tokens"], asked["prompt"]
    model = Model(file, len(tokens) + asked["new"] + 8, asked["threads"])
    z = model.logits(tokens).astype(np.float64)[:-1]
    highest = z.max(1)
    losses = highest + np.log(np.exp(z - highest[:, None]).sum(1)) - z[np.arange(len(z)), tokens[1:]]
    written = list(tokens[:prompt])
    token = int(model.logits(written)[-1].argmax())
    for _ in range(asked["new"]):
        written.append(token)
        token = int(model.logits([token], start=len(written) - 1)[-1].argmax())
    ids = model.ids(asked["text"].encode()) if asked["text"] else None
    return {"losses": losses.tolist(), "greedy": written[prompt:], "ids": ids}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.load(sys.stdin))))
