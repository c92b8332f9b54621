"""Claim: scales and norms that are trained after rounding bring a quantized model nearer to the dense one.

    python benchmarks/tune_quantized.py --data C4 --texts wiki=WIKI.txt c4=HELDOUT.txt \
        --settings "bits=4" "bits=4 train=scales" "bits=3 embeddings=3 group=96 train=rounding"
    python benchmarks/tune_quantized.py …      # goes on; rows that are done are kept

A setting is `bits`, `group` (columns that share a scale), `quantizer`, `embeddings` (their bits; 16 where not given),
and what is trained after rounding: `train` none, scales or rounding (the integers too), on `tokens`, `batch` of them a
step, at `rate` (a share of each unit; the default where not given). "bits=auto size=86MB" chooses the bits of each
matrix for a size, embeddings and head too (`embeddings` is not read then), and is to be compared with one width of that
size. The model is the dithered control (control.py), whole: no layer is removed. Perplexity of the same tokens for all,
beside the dense model's.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections import Counter
from typing import Any

import torch

from common import RowsDone, arguments, blocks, finish, open_model
from control import dither_
from layercut import evaluation
from layercut.config import QuantizeConfig
from layercut.files.sizes import parse_bytes
from layercut.healing.endpoint_tuning import TuneSettings, tune_parameters_
from layercut.models import loading
from layercut.progress import say
from layercut.quantization import quantize_
from layercut.quantization.trainable import RATE, Trainable

PLAIN = {"bits": 16, "group": 0, "quantizer": "gptq", "embeddings": 16, "train": "none", "tokens": 0}
LATER = {"size": str, "rate": float, "batch": int}
"""Options of single settings, which the rows of others do not name."""


def parsed(text: str, tokens: int) -> dict[str, Any]:
    """A setting from "bits=4 train=scales"; tokens: how many it trains on unless it says so."""
    given = dict(option.split("=") for option in text.split())
    types = {name: type(value) for name, value in PLAIN.items()} | LATER
    if unknown := given.keys() - types:
        raise SystemExit(f"error: no setting is called {', '.join(unknown)}\nhint: allowed are {', '.join(types)}")
    trains = given.get("train", "none") != "none"
    typed = {name: value if value == "auto" else types[name](value) for name, value in given.items()}
    return PLAIN | {"tokens": tokens if trains else 0} | typed


def quantized(model: loading.LanguageModel, asked: dict[str, Any], text: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The model in fewer bits, trained after that as asked; with what it takes and how the training went."""
    config = QuantizeConfig(
        bits=asked["bits"], quantizer=asked["quantizer"], group_size=asked["group"] or None,
        quantize_embeddings=asked["bits"] != "auto" and asked["embeddings"] < 16,
        embedding_bits=asked["embeddings"] if asked["embeddings"] < 16 else None,
    )  # fmt: skip
    target = parse_bytes("size", asked["size"]) if "size" in asked else None
    begun = time.process_time()
    found = quantize_(loading.share(model.model), text["calibration"], config, target=target)
    row: dict[str, Any] = {"bytes": found.bytes_after, "of_dense": found.bytes_after / found.bytes_before}
    if found.mixture:
        row |= {name: found.mixture[name] for name in ("predicted_kl", "mean_bits", "one_width")}
        row["weights_by_bits"] = dict(sorted(Counter(str(weight.bits) for weight in found.weights).items()))
    row["quantize_cpu_seconds"] = time.process_time() - begun
    if asked["train"] != "none":
        parts = Trainable.of_(found, model.model if asked["train"] == "rounding" else None)
        tuning = text["tuning"][: asked["tokens"] // text["tuning"].shape[1]]
        settings = TuneSettings(learning_rate=asked.get("rate", RATE), batch_tokens=asked.get("batch", 1024))
        told = tune_parameters_(
            parts.model, model.model, parts.parameters, tuning, heldout=text["heldout"], settings=settings
        )
        kept = ("learning_rate", "trained_parameters", "state_bytes", "heldout", "best_step", "cpu_seconds", "setbacks")
        row["tuning"] = {name: getattr(told, name) for name in kept}
        found = parts.finished_()
    return row | {"model": found.model}


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], settings=["bits=4", "bits=4 train=scales"], tokens=8192,
        tune_tokens=16384, heldout_tokens=2048, eval_tokens=16384, window=256, seed=0,
    )  # fmt: skip
    model = open_model(args.model)
    dither_(model.model)
    text, reported = drawn(model, args)
    facts = {key: getattr(args, key) for key in ("tokens", "heldout_tokens", "eval_tokens", "window", "seed")}
    done = RowsDone(args.out, facts)
    for asked in (PLAIN, *(parsed(setting, args.tune_tokens) for setting in args.settings)):
        if asked in done:
            continue
        found = {"model": model.model} if asked["bits"] == 16 else quantized(model, asked, text)
        small = found.pop("model")
        found["perplexity"] = {name: evaluation.perplexity(small, tokens) for name, tokens in reported.items()}
        done.add(asked | found)
        say(str(asked), f"{found['perplexity']}, {found.get('bytes')} bytes")
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, weights="dithered control", **facts)
    done.partial.unlink(missing_ok=True)


def drawn(model: loading.LanguageModel, args: Namespace) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tokens to calibrate, to judge and to train on, other rows each; and the texts that are reported."""
    counts = {"calibration": args.tokens, "heldout": args.heldout_tokens, "tuning": args.tune_tokens}
    rows = blocks(model, args.data, sum(counts.values()), args.window, args.seed).tokens
    parts = rows.split([count // args.window for count in counts.values()])
    reported = {
        name: blocks(model, source, args.eval_tokens, args.window, args.seed, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.texts)
    }
    return dict(zip(counts, parts, strict=True)), reported


if __name__ == "__main__":
    main()
