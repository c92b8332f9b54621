"""Recall by a judge that is not layercut's: the needle tests of RULER (2404.06654), as lm-eval makes and scores them.

    python benchmarks/ruler.py --others RUN [RUN …]

The dense model and the checkpoints of finished runs answer the same prompts greedily. Three tests, the ones that need
no essays: one number in repeated sentences, one number among as many others as fit, and the same with keys and numbers
that are UUIDs. Needs `pip install wonderwords nltk`. Rows: model, test, length -> found of asked.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from lm_eval.tasks.ruler import common_utils, niah_utils
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    dense, folders = open_model(args.model), [str(Path(run) / "model") for run in args.others]
    asked = {(test, n): questions(test, n, folders[0], args.items) for test in TESTS for n in args.lengths}
    rows: list[dict[str, Any]] = []
    for name, folder in (("dense", None), *zip(args.others, folders, strict=True)):
        model = dense.model if folder is None else AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder or folders[0])
        for (test, length), items in asked.items():
            prompts = [f"{each['input']} {each['gen_prefix']}" for each in items]
            said = answers(model, tokenizer, prompts, ANSWER_TOKENS[test], args.batch)
            wanted = [each["outputs"] for each in items]
            found = common_utils.string_match_all(common_utils.postprocess_pred(said), wanted)
            row = {"model": Path(name).name, "test": test, "length": length, "found": found, "items": len(items)}
            print(row, flush=True)
            rows.append(row)
    claim = "needles of RULER found by greedy decoding, dense and of finished runs"
    finish(args.out, dense, claim, rows, tests=[*TESTS], answer_tokens=ANSWER_TOKENS)


if __name__ == "__main__":
    main()
