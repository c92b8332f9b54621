"""Claim: choosing among the search's best candidates after their fold gives a better folded model than choosing raw.

    python benchmarks/search_folded.py --data TEXT --eval-data HELDOUT [--ratios 0.1 0.2 0.3]

For each ratio, the gate's first candidates: raw KL on the calibration text, KL on held-out tokens of its source before
and after the fold, and perplexity before and after on another text; and which candidate either score would choose.
"""

from __future__ import annotations

from typing import Any

from common import arguments, blocks, finish, open_model
from layercut import evaluation
from layercut.healing.least_squares import fold_cut_
from layercut.layer_search import search
from layercut.models import loading
from layercut.models.runner import DecoderRunner, mean_kl
from layercut.segments import layers_to_remove
from layercut.surgery import cut_segment_

CANDIDATES = 4


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", eval_data="python-docs", ratios=[0.1, 0.2, 0.3], tokens=4096, window=128,
        heldout_tokens=1024, eval_tokens=4096,
    )  # fmt: skip
    model = open_model(args.model)
    stack = DecoderRunner(model.model)
    calibration = blocks(model, args.data, args.tokens, args.window, 0).tokens
    heldout = blocks(model, args.data, args.heldout_tokens, args.window, 0, skip=len(calibration)).tokens
    reported = blocks(model, args.eval_data, args.eval_tokens, args.window, 0).tokens
    rows = []
    for ratio in args.ratios:
        found = search(stack, calibration, n_layers=layers_to_remove(ratio, len(stack)), method="clp", seed=0)
        tried: list[dict[str, Any]] = []
        for candidate in found.candidates[:CANDIDATES]:
            student = loading.share(model.model)
            cut_segment_(student, list(candidate.segments))
            opened = DecoderRunner(student)
            row = {"segments": " ".join(map(str, candidate.segments)), "kl": candidate.kl}
            row |= {"heldout_kl_cut": mean_kl(stack, opened, heldout)}
            row |= {"perplexity_cut": evaluation.perplexity(student, reported)}
            for segment in candidate.segments:
                fold_cut_(opened, stack, segment, calibration)
            row |= {"heldout_kl_folded": mean_kl(stack, opened, heldout)}
            tried.append(row | {"perplexity_folded": evaluation.perplexity(student, reported)})
        raw, folded = (min(tried, key=lambda row: row[key]) for key in ("kl", "heldout_kl_folded"))
        rows.append({"ratio": ratio, "raw_chooses": raw, "folded_chooses": folded, "candidates": tried})
        print(rows[-1], flush=True)
    dense = evaluation.perplexity(model.model, reported)
    facts = {"data": args.data, "eval_data": args.eval_data, "tokens": args.tokens, "window": args.window}
    finish(args.out, model, __doc__.splitlines()[0], rows, perplexity_dense=dense, **facts)


if __name__ == "__main__":
    main()
