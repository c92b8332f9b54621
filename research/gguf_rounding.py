"""Claim: an importance matrix makes llama.cpp's own quantizer good enough.

    python research/gguf_rounding.py --data C4 --texts wiki=WIKI.txt c4=HELDOUT.txt --kinds q4_0 iq4_nl
    python research/gguf_rounding.py …      # goes on; rows that are done are kept

The model is the dithered control (control.py), whole. Each type is rounded by llama.cpp without (where it can) and
with an importance matrix; llama.cpp itself measures perplexity. Until 2026-12 layercut chose codes of four types by
its own GPTQ; those rows stay in the result file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RowsDone, arguments, blocks, finish, open_model
from control import dither_
from layercut.export.gguf_check import perplexity_by_llama_cpp
from layercut.export.gguf_tensors import (
    architecture_of,
    gguf_tensors,
    importance,
    llama_cpp_names,
    quantize_file,
    stored_types,
)
from layercut.models import loading
from layercut.progress import say
from layercut.surgery import cut_gguf

NEED_MATRIX = ("iq1", "iq2", "iq3_xxs", "q2_k_s")
"""What the names of types begin with that llama.cpp makes with an importance matrix alone."""
FLOAT, PLAIN, IMPORTANT = "float32", "llama.cpp", "llama.cpp, importance matrix"


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
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], kinds=["q4_0", "q4_1", "iq4_nl", "q4_k_m"], tokens=16384,
        eval_tokens=16384, window=256, seed=0,
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
        matrices = {name: columns[parameter].numpy() for parameter, name in named.items() if name}
        if {"kind": "f32"} not in done:
            add("f32", FLOAT, plain, time.process_time())
        for kind in args.kinds:
            for how, measured in ((PLAIN, {}), (IMPORTANT, matrices)):
                if how == PLAIN and kind.startswith(NEED_MATRIX):
                    continue
                if {"kind": kind, "rounded": how} not in done:
                    begun = time.process_time()
                    quantize_file(plain, file, kind, measured)
                    add(kind, how, file, begun)
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, weights="dithered control", **facts)
    done.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
