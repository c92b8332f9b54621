"""Claim: a few layers hold recall, and of these some are among the cheapest by the loss on text.

    python research/maps.py --data C4                                           # results/maps.json and .svg
    python research/maps.py --model QWEN.gguf --data C4 --out results/maps-qwen.json

Each layer is removed alone: its cost on generated tests of every capability, of the family that searches, and KL on
text, in one sweep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layercut as lc
from common import arguments, blocks, finish, open_model
from layercut.data.probes import probe_rows
from layercut.progress import say


def main() -> None:
    args = arguments(__doc__ or "", data="c4", tests=16, text_rows=8, window=256, seed=0)
    model = open_model(args.model)
    tests = probe_rows(model.tokenizer, rows=args.tests, window=args.window, seed=args.seed)
    text = blocks(model, args.data, args.text_rows * args.window, args.window, args.seed).tokens
    found = lc.capability_map(model.model, probes=tests, text=text)
    for line in found.words():
        say("map", line)
    answers = {name: int((tests.capability == c).sum()) for c, name in enumerate(tests.names)}
    facts: dict[str, Any] = {"layers": found.layers, "names": list(found.names), "words": found.words()}
    facts |= {"answers": answers, **{key: getattr(args, key) for key in ("tests", "text_rows", "window", "seed")}}
    finish(args.out, model, (__doc__ or "").splitlines()[0], found.to_dict()["windows"], **facts)
    draw(found, args.out.with_suffix(".svg"))


def draw(found: lc.CapabilityMap, file: Path) -> None:
    """The map as a picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "layercut"  # the same file each time
    canvas, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    found.plot(axes)
    canvas.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
