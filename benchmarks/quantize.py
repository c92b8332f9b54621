"""Claim: quantizing a cut and healed model costs no more extra loss than quantizing the dense one.

    python benchmarks/quantize.py --data CALIBRATION --tune-data TUNING --eval-data TEXT [TEXT …]

Extra loss is ln perplexity after quantizing minus before, in nats per token; the claim is the ratio of the cut and
healed model's to the dense model's. Where the model is a .gguf file both are the dithered control (control.py), the
same noise in both, unless `--dither no` says otherwise; the result says which. Other ratios of layers: frontier.py.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, blocks, finish, open_model
from control import dither_, healed, save
from layercut import models
from layercut.config import DataConfig, HealConfig, QuantizeConfig, SearchConfig
from layercut.evaluate import perplexity
from layercut.quantize import quantize_
from layercut.stages.quantize import quantization_facts

SETTINGS = {
    "int8 rtn": QuantizeConfig(bits=8, quantizer="rtn"),
    "int4 rtn": QuantizeConfig(bits=4, quantizer="rtn"),
    "int4 gptq": QuantizeConfig(bits=4),
    "int4 gptq asymmetric": QuantizeConfig(bits=4, asymmetric=True),
}


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", tune_data="python-docstrings", eval_data=["python-docs"], segment="13:19",
        tokens=16384, tune_tokens=65536, eval_tokens=16384, window=128, dither="auto", threads=2,
    )  # fmt: skip
    torch.set_num_threads(args.threads)
    source = open_model(args.model)
    dithered = args.dither == "yes" or (args.dither == "auto" and source.checkpoint.gguf is not None)
    texts = {
        Path(text).name: blocks(source, text, args.eval_tokens, args.window, 0, order="as written").tokens
        for text in args.eval_data
    }
    calibration = blocks(source, args.data, args.tokens, args.window, 0)
    original = {name: perplexity(source.model, tokens) for name, tokens in texts.items()}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if dithered:
            dither_(source.model)
        dense = Path(scratch) / "dense"
        save(source, dense)
        text = DataConfig(data=args.data, tokens=args.tokens, window=args.window)
        heal = HealConfig(tune_data=args.tune_data, tune_tokens=args.tune_tokens)
        search = SearchConfig(segment=(args.segment,))
        place = healed(dense, Path(scratch) / "run", search, text, heal, args.eval_data[0])
        cut = models.load(models.resolve(str(place))).model
    candidates = {"dense": source.model, "cut and healed": cut}
    before = {
        name: {text: perplexity(model, tokens) for text, tokens in texts.items()} for name, model in candidates.items()
    }
    for setting, config in SETTINGS.items():
        row: dict[str, Any] = {"setting": setting}
        for name, model in candidates.items():
            student, begun = models.share(model), time.perf_counter()
            found = quantize_(student, calibration.tokens, config)
            seconds = time.perf_counter() - begun
            after = {text: perplexity(student, tokens) for text, tokens in texts.items()}
            row[name] = {
                "bytes": quantization_facts(found, student, config)["bytes"],
                "seconds": seconds,
                "perplexity": after,
                "extra_loss": {text: math.log(after[text]) - math.log(before[name][text]) for text in texts},
            }
        ours, dense_ones = (row[name]["extra_loss"] for name in ("cut and healed", "dense"))
        # None: quantizing the dense model cost nothing, and a ratio to that says nothing
        row["ratio"] = {text: ours[text] / dense_ones[text] if dense_ones[text] > 0 else None for text in texts}
        rows.append(row)
        print(row, flush=True)
    finish(
        args.out,
        source,
        __doc__.splitlines()[0],
        rows,
        weights="dithered control" if dithered else "as they came",
        perplexity_before={"before dithering": original, **before},
        calibration={"source": Path(args.data).name, "tokens": args.tokens, "fingerprint": calibration.fingerprint},
        tuning={"source": Path(args.tune_data).name, "tokens": args.tune_tokens},
        segment=args.segment,
        eval_tokens=args.eval_tokens,
        window=args.window,
    )


if __name__ == "__main__":
    main()
