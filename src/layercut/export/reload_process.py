"""Verify that a saved checkpoint is the model it should be, in a fresh process, run by `checkpoint.verify_reload`.

Uses torch and transformers alone; what imports layercut here fails. Prints what it does, a line a step, and then one
line of JSON, or fails with the difference as its last line. EXPECTED holds tokens and their logits and, where there is
text to measure perplexity on, its rows [N, T].

    python reload_process.py FOLDER EXPECTED.safetensors DEVICE DTYPE THREADS [ATTENTION]

DEVICE: torch's name, or a device_map as JSON where the model is on several.
ATTENTION: transformers' attn_implementation, where it is not the one that transformers chooses.
"""

import inspect
import json
import math
import sys

import torch
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

sys.modules["layercut"] = None  # type: ignore[assignment]  # so that `import layercut` fails, though it may be on this process's path
NEW_TOKENS = 24
TIE = 1e-3  # logits nearer than this may change places between two orders of summation


def load(folder, dtype, device, attention):
    """The model, by stock transformers; exits where a weight is missing, left over or of another shape."""
    config = AutoConfig.from_pretrained(folder)
    chosen = {"use_kernels": False} | ({"attn_implementation": attention} if attention else {})
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    several = device.startswith("{")
    chosen |= {"device_map": json.loads(device)} if several else {}
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **chosen)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            sys.exit(f"{kind}: {sorted(map(str, info[kind]))[:3]}")
    return (model if several else model.to(device)).eval()


def perplexity(model, rows):
    """exp of the mean loss of every token but each row's first; inf where it is NaN or too large, as in a run."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").cpu().double().sum().item()
    mean = total / (rows.numel() - len(rows))
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def leaves(model, out, **positions):
    """By how much a pass without the cache prefers other tokens than generation with it chose, in logits, at most."""
    uncached = model(input_ids=out.sequences, use_cache=False, **positions).logits[0, -len(out.logits) - 1 : -1]
    chosen = torch.stack(out.logits)[:, 0].to(uncached.dtype)
    worst = 0.0
    for cached_step, uncached_step in zip(chosen, uncached):  # noqa: B905 - a standalone script for any Python
        token = int(cached_step.argmax())
        worst = max(worst, float(uncached_step.max() - uncached_step[token]))
    return worst


@torch.no_grad()
def main(folder, expected, device, dtype, threads, attention=None):
    """Load, compare logits, generate, measure perplexity; prints what was found, or exits with the difference."""
    logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    reference = load_file(expected)

    print("step: loading", flush=True)
    model = load(folder, getattr(torch, dtype), device, attention)
    first = next(model.parameters()).device
    tokens = reference["tokens"].to(first)
    print("step: comparing logits", flush=True)
    got = model(input_ids=tokens, use_cache=False).logits.cpu()
    if not torch.equal(got, reference["logits"]):
        sys.exit(f"logits differ by up to {(got.float() - reference['logits'].float()).abs().max().item():g}")

    print("step: generating", flush=True)
    model = torch.nn.Module.float(model)  # transformers refuses model.float() where weights were quantized
    prompt = tokens[:1, :8]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    worst = leaves(model, out)
    if worst > TIE and "position_ids" in inspect.signature(model.forward).parameters:
        # `generate` counts from 0, where a model by itself may begin elsewhere, as RoBERTa's behind the padding's
        worst = leaves(model, out, position_ids=torch.arange(out.sequences.shape[1], device=first)[None])
    if worst > TIE:
        sys.exit(f"generation with the cache leaves the uncached one by {worst:g} in logits")
    measured = None
    if "text" in reference:
        print("step: measuring perplexity", flush=True)
        text = reference["text"].to(first)
        measured = {"tokens": text.numel(), "value": perplexity(model, text)}
    found = {"logits": "equal to the bit", "cached_generation": "equal", "tokens": NEW_TOKENS}
    print(json.dumps(found | {"perplexity": measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
