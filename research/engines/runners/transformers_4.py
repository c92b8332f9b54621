"""Run by itself in the engine's environment: transformers 4 loads a folder and computes in float32.

python transformers_4.py MODEL < ASKED.json
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()


@torch.no_grad()
def main(folder, asked):
    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ids = torch.tensor([asked["tokens"]])
    losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
    prompt = ids[:, : asked["prompt"]]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=asked["new"], min_new_tokens=asked["new"],
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "losses": losses.tolist(),
        "greedy": written[0, asked["prompt"] :].tolist(),
        "ids": tokenizer(asked["text"], add_special_tokens=False).input_ids,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.load(sys.stdin))))
