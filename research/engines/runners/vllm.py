"""Run by itself in the engine's environment: vLLM loads a folder on the CPU, packed weights in bfloat16.

python vllm.py MODEL < ASKED.json
"""

import json
import sys
from pathlib import Path

if sys.path and sys.path[0].endswith("runners"):
    sys.path.pop(0)  # this file has the name of the package

from vllm import LLM, SamplingParams


def main(folder, asked):
    config = json.loads(Path(folder, "config.json").read_text())
    dtype = "bfloat16" if "quantization_config" in config else "float32"
    tokens, prompt = asked["tokens"], asked["prompt"]
    model = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=len(tokens) + asked["new"] + 8, max_num_seqs=4)
    exact = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, ignore_eos=True)
    found = model.generate([{"prompt_token_ids": tokens}], exact)[0].prompt_logprobs
    losses = [-found[i][token].logprob for i, token in enumerate(tokens) if i]
    written = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True)
    output = model.generate([{"prompt_token_ids": tokens[:prompt]}], written)[0].outputs[0]
    ids = model.get_tokenizer()(asked["text"], add_special_tokens=False).input_ids
    return {"losses": losses, "greedy": list(output.token_ids), "ids": list(ids), "dtype": dtype}


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], json.load(sys.stdin))))
