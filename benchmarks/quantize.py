"""Claim: quantizing a cut and healed model costs no more extra loss than quantizing the dense one.

    python benchmarks/quantize.py --data CALIBRATION --tune-data TUNING --eval-data TEXT [TEXT …]

Extra loss is ln perplexity after quantizing minus before, in nats per token; the claim is the ratio of the cut and
healed model's to the dense model's. Weights read from a 4-bit GGUF file lie on a 4-bit grid, on which other grids
pay differently: `--dither` (the default where the model is a .gguf file) first adds to every weight that was
quantized uniform noise of one step of its own grid, and the result says so ("dithered control"). Ratios are between
two models with the same noise.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, blocks, finish, open_model
from layercut import models
from layercut.config import (
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    HealConfig,
    QuantizeConfig,
    RunConfig,
    SearchConfig,
)
from layercut.evaluate import perplexity
from layercut.pipeline import compress
from layercut.quantize import quantize_
from layercut.workbench import quantization_facts

SETTINGS = {
    "int8 rtn": QuantizeConfig(bits=8, quantizer="rtn"),
    "int4 rtn": QuantizeConfig(bits=4, quantizer="rtn"),
    "int4 gptq": QuantizeConfig(bits=4),
    "int4 gptq asymmetric": QuantizeConfig(bits=4, asymmetric=True),
}
BLOCK = 32  # columns that share a grid in Q4_1 and Q8_0


@torch.no_grad()
def dither_(model: Any, seed: int = 0) -> None:
    """Uniform noise of one grid step: (max - min) / 15 of each block of 32 for Q4_1, max|w| / 127 for Q8_0."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.dim() != 2:
            continue
        grouped = parameter.float().unflatten(1, (-1, BLOCK))
        if parameter is embeddings:
            step = grouped.abs().amax(-1, keepdim=True) / 127
        else:
            step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
        noise = torch.rand(grouped.shape, generator=draw) - 0.5
        parameter.copy_((grouped + noise * step).flatten(1))


def healed(folder: Path, args: Any) -> Path:
    """Cut and heal the model in a folder; the folder of the result."""
    config = CompressConfig(
        text=DataConfig(data=args.data, tokens=args.tokens, window=args.window),
        search=SearchConfig(segment=(args.segment,)),
        heal=HealConfig(tune_data=args.tune_data, tune_tokens=args.tune_tokens),
        evaluate=EvaluateConfig(eval_data=args.eval_data[0], eval_tokens=2),
        run=RunConfig(out=folder / "run"),
    )
    return compress(str(folder / "dense"), config, until="tune") / "model"


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", tune_data="python-docstrings", eval_data=["python-docs"], segment="13:19",
        tokens=16384, tune_tokens=65536, eval_tokens=16384, window=128, dither="auto",
    )  # fmt: skip
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
        source.model.save_pretrained(Path(scratch) / "dense")
        source.tokenizer.save_pretrained(Path(scratch) / "dense")
        cut = models.load(models.resolve(str(healed(Path(scratch), args)))).model
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
        row["ratio"] = {
            text: row["cut and healed"]["extra_loss"][text] / row["dense"]["extra_loss"][text] for text in texts
        }
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
