"""Claim: codes and scales by GPTQ and least squares lose less than llama.cpp's rounding, in as many bytes.

    python research/gguf_rounding.py --data C4 --texts wiki=WIKI.txt c4=HELDOUT.txt --kinds q4_0 q4_1 q5_0
    python research/gguf_rounding.py …      # goes on; rows that are done are kept

The model is the dithered control (control.py), whole. Of each type of llama.cpp's: rounded by llama.cpp, the same with
an importance matrix, and the latter's file with other codes and scales. llama.cpp itself measures perplexity;
importance and GPTQ are measured on the same calibration tokens.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RowsDone, arguments, blocks, finish, open_model
from control import dither_
from layercut.export.ggml import quantize_file
from layercut.export.gguf_check import perplexity_by_llama_cpp
from layercut.export.gguf_gptq import choose_codes_
from layercut.export.gguf_tensors import architecture_of, gguf_tensors, llama_cpp_names, stored_types
from layercut.export.importance import importance
from layercut.models import loading
from layercut.progress import say
from layercut.surgery import cut_gguf

FLOAT, PLAIN, IMPORTANT = "float32", "llama.cpp", "llama.cpp, importance matrix"
GPTQ = "GPTQ, codes exchanged, scales fitted"


def unrounded(model: loading.LanguageModel, folder: Path) -> Path:
    """The model's weights in a .gguf file in float32."""
    came, file = model.checkpoint.file, folder / "unrounded.gguf"
    types, weights = stored_types(came), dict(model.model.named_parameters())
    names = llama_cpp_names(weights, model.model.config, architecture_of(came))
    held = {name: weights[name] for name, theirs in names.items() if theirs in types}
    cut_gguf(came, [], file, replaced=gguf_tensors(held, model.model.config, architecture_of(came), "f32"))
    return file


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], kinds=["q4_0", "q4_1"], tokens=16384, eval_tokens=16384,
        window=256, seed=0,
    )  # fmt: skip
    model = open_model(args.model)
    dither_(model.model)
    model.model.float()  # a file of float32 weights; what is rounded is compared with that
    calibration = blocks(model, args.data, args.tokens, args.window, args.seed).tokens
    texts = {
        name: blocks(model, source, args.eval_tokens, args.window, args.seed, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.texts)
    }
    facts = {key: getattr(args, key) for key in ("tokens", "eval_tokens", "window", "seed")}
    done = RowsDone(args.out, facts)
    columns = importance(model.model, calibration)

    def add(kind: str, how: str, file: Path, begun: float, **more: Any) -> None:
        seconds = time.process_time() - begun
        perplexity = {name: perplexity_by_llama_cpp(file, tokens) for name, tokens in texts.items()}
        row = {"kind": kind, "rounded": how, "bytes": file.stat().st_size, "cpu_seconds": seconds} | more
        done.add(row | {"perplexity": perplexity})
        say(kind, f"{how}: {perplexity}")

    with tempfile.TemporaryDirectory() as name:
        plain, file = unrounded(model, Path(name)), Path(name) / "rounded.gguf"
        named = llama_cpp_names([*columns], model.model.config, architecture_of(plain))
        matrices = {named[parameter]: values.numpy() for parameter, values in columns.items()}
        if {"kind": "f32"} not in done:
            add("f32", FLOAT, plain, time.process_time())
        for kind in args.kinds:
            if {"kind": kind, "rounded": GPTQ} in done:
                continue
            done.rows = [row for row in done.rows if row["kind"] != kind]
            for how, heeded in ((PLAIN, {}), (IMPORTANT, matrices)):
                begun = time.process_time()
                quantize_file(plain, file, kind, heeded)
                add(kind, how, file, begun)
            begun = time.process_time()
            weights = [name for name, p in model.model.named_parameters() if p.dim() > 1]
            chosen = choose_codes_(file, model.model, calibration, weights)
            add(kind, GPTQ, file, begun, chosen=len(chosen))
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, weights="dithered control", **facts)
    done.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
