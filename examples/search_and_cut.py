"""Find a fifth of the layers, in one segment or two, cut them out, heal the cut, measure it, save it.

    python examples/search_and_cut.py MODEL CALIBRATION HELDOUT OUT [TOKENS] [WINDOW]

MODEL is a Hub id or a folder; CALIBRATION and HELDOUT are text files, or names that --data takes.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import layercut as lc

name, calibration, evaluation, out = sys.argv[1:5]
tokens_in_all, window = (int(value) for value in (*sys.argv[5:], "16384", "256")[:2])
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
rows = lc.token_blocks(calibration, tokenizer, tokens=2 * tokens_in_all, window=window)
tokens, more = rows[: len(rows) // 2], rows[len(rows) // 2 :]  # to search on, and to heal on
heldout = lc.token_blocks(evaluation, tokenizer, tokens=tokens_in_all, window=window, order="as written")

tests = lc.probe_rows(tokenizer, window=window)  # of recall, lists and more: without them text alone decides
found = lc.search(model, tokens, ratio=0.2, num_segments="auto", probes=tests if tests.names else None)
print("remove", *found.segments)
small = lc.cut(model, found.segments)
print("cut", lc.evaluate(small, heldout, baseline=model))
lc.fold_(small, model, tokens)
lc.tune_(small, model, more)
print("healed", lc.evaluate(small, heldout, baseline=model))
lc.save(small, tokenizer, out)
