"""Recall by a judge that is not layercut's: the needle tests of RULER (2404.06654), as lm-eval makes and scores them.

    python research/ruler.py --others RUN [RUN …]

The dense model and those of finished runs, checkpoints or GGUF files, answer the same prompts greedily. Three tests,
the ones that need no essays: one number in repeated sentences, one number among as many others as fit, and the same
with keys and numbers that are UUIDs. Needs `pip install wonderwords nltk`. Rows: model (the run folder's name), test,
length -> found of asked.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval.tasks.ruler import common_utils, niah_utils

from common import arguments, finish, open_model

TESTS = {
    "niah_single_1": niah_utils.niah_single_1,
    "niah_multikey_2": niah_utils.niah_multikey_2,
    "niah_multikey_3": niah_utils.niah_multikey_3,
}
DEFAULTS: dict[str, Any] = {"others": ["run"], "lengths": [512, 1024], "items": 40, "batch": 8}
ANSWER_TOKENS = {"niah_single_1": 24, "niah_multikey_2": 24, "niah_multikey_3": 64}
"""lm-eval's 128 would only be written on: seven digits, or a UUID, come first or not at all."""


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], tokens: int, batch: int) -> list[str]:
    """Greedy continuations of so many tokens."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    given = []
    for first in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[first : first + batch], return_tensors="pt", padding=True).to(model.device)
        said = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        given += tokenizer.batch_decode(said[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return given


def questions(test: str, length: int, folder: str, items: int) -> list[dict[str, Any]]:
    """Prompts of at most so many tokens, the 128 of lm-eval's answer included; evenly from lm-eval's 500."""
    random.seed(0)  # which lm-eval leaves to the process
    rows = TESTS[test](max_seq_lengths=[length], tokenizer=folder)["test"]
    return [rows[i * len(rows) // items] for i in range(items)]


def main() -> None:
    args = arguments(__doc__, **DEFAULTS)
    dense = open_model(args.model)
    with tempfile.TemporaryDirectory() as folder:  # from which lm-eval reads the tokenizer that counts
        dense.tokenizer.save_pretrained(folder)
        asked = {(test, n): questions(test, n, folder, args.items) for test in TESTS for n in args.lengths}
    rows: list[dict[str, Any]] = []
    for run in (None, *map(Path, args.others)):
        judged, name = (open_model(str(run / "model")), run.name) if run else (dense, "dense")
        for (test, length), items in asked.items():
            prompts = [f"{each['input']} {each['gen_prefix']}" for each in items]
            said = answers(judged.model, judged.tokenizer, prompts, ANSWER_TOKENS[test], args.batch)
            wanted = [each["outputs"] for each in items]
            found = common_utils.string_match_all(common_utils.postprocess_pred(said), wanted)
            row = {"model": name, "test": test, "length": length, "found": found, "items": len(items)}
            print(row, flush=True)
            rows.append(row)
    claim = "needles of RULER found by greedy decoding, dense and of finished runs"
    finish(args.out, dense, claim, rows, tests=[*TESTS], answer_tokens=ANSWER_TOKENS)


if __name__ == "__main__":
    main()
