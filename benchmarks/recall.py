"""Claim: a cut chosen and healed with generated tests still finds hidden keys; one chosen by text alone does not.

    python benchmarks/recall.py --data C4 --texts wiki=WIKI.txt c4=HELDOUT.txt --cuts 13:19 12:16,5:7=0.25

A cut is its segments, and behind = the share of generated tests among the rows it is tuned on. Each is folded and tuned
as a run does it; then perplexity, hidden keys, values found in lists, and the damage to tests of the judging family are
measured, beside the dense model.
"""

from __future__ import annotations

from typing import Any

import torch

from common import arguments, blocks, finish, open_model
from layercut import evaluation
from layercut.data.probes import probe_rows
from layercut.files.json_values import write_json
from layercut.healing import fold_, tune_
from layercut.models import loading
from layercut.pipeline.stages.heal import FOLD_TOKENS
from layercut.progress import say
from layercut.segments import Segment
from layercut.surgery import cut


def healed(
    model: loading.LanguageModel, segments: list[Segment], share: float, args: Any
) -> tuple[Any, dict[str, Any]]:
    """The model without the segments, folded and tuned on text with a share of generated tests; and what that gave."""
    source = f"{args.data}+probes:{share}" if share else args.data
    calibration = blocks(model, args.data, args.tokens, args.window, args.seed).tokens
    held = max(1024, args.tune_tokens // 32)
    drawn = blocks(model, source, held + args.tune_tokens, args.window, args.seed, skip=len(calibration)).tokens
    heldout, tuning = drawn[: held // args.window], drawn[held // args.window :]
    small = cut(model.model, segments)
    solved = torch.cat([calibration, tuning[: max(0, FOLD_TOKENS - calibration.numel()) // args.window]])
    folded = fold_(small, model.model, solved, heldout=heldout)
    tuned = tune_(small, model.model, tuning, heldout=heldout)
    return small, {"kl_cut": folded.kl_before, "kl_folded": folded.kl_after, "tuning": tuned.to_dict()}


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], cuts=["13:19"], tokens=16384, tune_tokens=65536,
        eval_tokens=32768, window=256, longest=1024, seed=0,
    )  # fmt: skip
    model = open_model(args.model)
    texts = {
        name: blocks(model, source, args.eval_tokens, args.window, args.seed, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.texts)
    }
    grids = {
        "keys": evaluation.passkey_cases(model.tokenizer, args.longest, args.seed),
        "lists": evaluation.key_value_cases(model.tokenizer, args.longest, args.seed),
    }
    tests = probe_rows(model.tokenizer, rows=24, window=args.window, family="judging", seed=args.seed)
    rows: list[dict[str, Any]] = []
    for name in ["dense", *args.cuts]:
        segments, _, share = name.partition("=")
        student, row = model.model, {"cut": segments, "share": float(share or 0)}
        if name != "dense":
            student, found = healed(model, [Segment.parse(one) for one in segments.split(",")], row["share"], args)
            row |= found
        row["perplexity"] = {text: evaluation.perplexity(student, tokens) for text, tokens in texts.items()}
        for kind, trials in grids.items():
            row[kind] = evaluation.passkey_grid(student, model.tokenizer, trials)
            row[f"{kind}_found"] = sum(cell["found"] for cell in row[kind])
        row |= evaluation.capability_figures(student, model.model, tests).to_dict()
        rows.append(row)
        say(name, f"{row['perplexity']}, keys {row['keys_found']}, lists {row['lists_found']}")
        write_json(args.out.with_name(f".{args.out.stem}.partial.json"), rows)
    facts = {key: getattr(args, key) for key in ("tokens", "tune_tokens", "eval_tokens", "window", "longest", "seed")}
    finish(args.out, model, (__doc__ or "").splitlines()[0], rows, **facts)
    args.out.with_name(f".{args.out.stem}.partial.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
