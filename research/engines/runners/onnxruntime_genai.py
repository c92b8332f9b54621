"""Run by itself in the engine's environment: onnxruntime-genai builds its model of a folder in float32.

python onnxruntime_genai.py MODEL < ASKED.json
"""

import json
import math
import subprocess
import sys
import tempfile
from itertools import pairwise

if sys.path and sys.path[0].endswith("runners"):
    sys.path.pop(0)  # this file has the name of the package

import numpy as np
import onnxruntime_genai as og


def loss(logits, token):
    """-log p(token)"""
    z = logits.astype(np.float64)
    return float(z.max() + math.log(np.exp(z - z.max()).sum()) - z[token])


def main(folder, asked):
    with tempfile.TemporaryDirectory() as built:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", folder, "-o", built]
        done = subprocess.run([*command, "-p", "fp32", "-e", "cpu"], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit("the builder: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
        model = og.Model(built)
        tokens, prompt = asked["tokens"], asked["prompt"]
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(tokens) + asked["new"] + 1, do_sample=False)
        losses = []
        generator = og.Generator(model, settings)
        for token, following in pairwise(tokens):
            generator.append_tokens(np.array([[token]], dtype=np.int32))
            losses.append(loss(np.array(generator.get_logits()).reshape(-1), following))
        generator = og.Generator(model, settings)
        generator.append_tokens(np.array([tokens[:prompt]], dtype=np.int32))
        greedy = []
        for _ in range(asked["new"]):
            greedy.append(int(np.array(generator.get_logits()).reshape(-1).argmax()))
            generator.append_tokens(np.array([[greedy[-1]]], dtype=np.int32))
        return {"losses": losses, "greedy": greedy, "ids": None}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.load(sys.stdin))))
