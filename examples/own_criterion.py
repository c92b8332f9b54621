"""A criterion of your own beside layercut's: the segment across which hidden states change their norm least.

python examples/own_criterion.py MODEL CALIBRATION [TOKENS] [WINDOW]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layercut as lc

name, calibration = sys.argv[1:3]
tokens_in_all, window = (int(value) for value in (*sys.argv[3:], "16384", "256")[:2])
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
rows = lc.token_blocks(calibration, tokenizer, tokens=2 * tokens_in_all, window=window)
tokens, heldout = rows[: len(rows) // 2], rows[len(rows) // 2 :]


@lc.criteria.register("example-norm")
def norm(runner, tokens, length, **_):
    """argmin_s |log(|h_{s+n}| / |h_s|)|, |h| the mean norm of the hidden states [N, T, D] that enter a layer."""
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    logs = torch.stack([state.float().norm(dim=-1).mean().log() for state in states])
    start = int((logs[length:-1] - logs[: -1 - length]).abs().argmin())
    return [lc.Segment(start, start + length)]


for method in ("example-norm", "cosine", "exhaustive"):
    found = lc.search(model, tokens, ratio=0.2, method=method)
    small = lc.cut(model, found.segments)
    print(method, *found.segments, lc.evaluate(small, heldout, baseline=model))
