"""Claim: a cut chosen and healed with generated tests still finds hidden keys; one chosen by text alone does not.

    python benchmarks/recall.py --data C4 --texts wiki=WIKI.txt c4=HELDOUT.txt \
        --cuts 13:19 "12:16,5:7 share=0.25" "12:16,5:7 share=0.25 mix=0.3 radius=2"
    python benchmarks/recall.py …      # goes on; rows that are done are kept

A cut is its segments, and what its healing has otherwise: `share` of generated tests among the rows to tune on, `mix`
of the next-token loss, `radius`, `tokens` to tune on, peak `rate`, `window` of the rows and whether some are `parted`,
`answer_weight`, another text `beside` the first. Each is folded and tuned as a run does it; then
perplexity, hidden keys, values found in lists, and the damage to tests of the judging family are measured, beside the
dense model; with `--tasks arc_easy,piqa [--include-path FOLDER] --items 400`, what is left of the scores of lm-eval's
tasks too. "nothing" is the dense model, "… unhealed" the cut alone.
"""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, RowsDone, arguments, blocks, finish, open_model
from layercut import evaluation
from layercut.data.probes import probe_rows
from layercut.evaluation.generated_probes import Probes, found_of, probed, probes_for
from layercut.evaluation.paired_retention import retained
from layercut.healing import fold_, tune_
from layercut.models import loading
from layercut.models.objectives import KL
from layercut.pipeline.compare_judged import score_of
from layercut.pipeline.stages.heal import FOLD_TOKENS
from layercut.pipeline.stages.text import row_lengths
from layercut.progress import say
from layercut.segments import Segment
from layercut.surgery import cut


@dataclass(frozen=True)
class Healing:
    """A cut and how it is healed."""

    segments: str
    share: float = 0.0
    mix: float = 0.0
    radius: int = 1
    tokens: int = 0
    rate: float = 0.0
    window: int = 0
    """Tokens of a row that is folded and tuned on; 0: as those that are reported."""
    parted: int = 0
    """1: rows of tests, and every second one of text, are done as short ones, as a run does it."""
    answer_weight: float = 1.0
    """What an answer's token counts in the tests that are tuned on; others count 1."""
    beside: str = ""
    """Another text to fold and tune on, of which half the rows are."""

    @classmethod
    def parse(cls, text: str, tokens: int) -> Healing:
        """From "12:16,5:7 share=0.25"; tokens: how many are tuned on unless it says so."""
        segments, *options = text.split()
        given: dict[str, Any] = {"tokens": 0 if options[:1] == ["unhealed"] else tokens}
        kinds = {each.name: type(each.default) for each in fields(cls)}
        for name, _, value in (option.partition("=") for option in options if option != "unhealed"):
            given[name] = kinds[name](value)
        return cls(segments, **given)


def healed(model: loading.LanguageModel, asked: Healing, args: Namespace, row: dict[str, Any]) -> Any:
    """The model without the segments, folded and tuned; what that gave goes into row."""
    small = cut(model.model, [Segment.parse(one) for one in asked.segments.split(",")])
    if not asked.tokens:
        return small
    window = asked.window or args.window
    text = f"{args.data}+{asked.beside}" if asked.beside else args.data
    source = f"{text}+probes:{asked.share}" if asked.share else text
    calibration = blocks(model, text, args.tokens, window, args.seed).tokens
    held = max(1024, asked.tokens // 32)
    drawn = blocks(model, source, held + asked.tokens, window, args.seed, skip=len(calibration))
    heldout, tuning = drawn.tokens[: held // window], drawn.tokens[held // window :]
    lengths = row_lengths(drawn.tokens, drawn.origins, args.window) if asked.parted else None
    solved = torch.cat([calibration, tuning[: max(0, args.fold_tokens - calibration.numel()) // window]])
    folded = fold_(small, model.model, solved, heldout=heldout)
    objective, begun = KL(mix=asked.mix), time.process_time()
    tuned = tune_(
        small, model.model, tuning, heldout=heldout, objective=objective, radius=asked.radius,
        learning_rate=asked.rate or None, token_weights=answer_weights(model, asked, tuning, args.seed),
        row_lengths=None if lengths is None else lengths[held // window :],
    )  # fmt: skip
    row |= {"kl_cut": folded.kl_before, "kl_folded": folded.kl_after, "cpu_seconds": time.process_time() - begun}
    kept = ("learning_rate", "trained_layers", "trained_parameters", "heldout", "heldout_label", "setbacks")
    row["tuning"] = {name: getattr(tuned, name) for name in kept}
    return small


def answer_weights(model: loading.LanguageModel, asked: Healing, rows: torch.Tensor, seed: int) -> torch.Tensor | None:
    """What each token of rows [N, T] counts: tokens before an answer's those of the setting, others 1."""
    if asked.answer_weight == 1:
        return None
    tests = probe_rows(model.tokenizer, rows=len(rows), window=rows.shape[1], family="tuning", seed=seed)
    of = {tuple(row.tolist()): marks >= 0 for row, marks in zip(tests.tokens, tests.answers, strict=True)}
    found = [of.get(tuple(row.tolist()), torch.zeros_like(row, dtype=torch.bool)) for row in rows]
    return torch.where(torch.stack(found), asked.answer_weight, 1.0)


def judged(model: loading.LanguageModel, small: Any, texts: dict[str, torch.Tensor], probes: Probes) -> dict[str, Any]:
    """What is left: perplexity by text, keys and values found, damage and hit rates of generated tests."""
    found: dict[str, Any] = {"perplexity": {name: evaluation.perplexity(small, text) for name, text in texts.items()}}
    told = probed(small, model.model, model.tokenizer, probes)
    for name, cells in (("keys", told.keys), ("lists", told.lists)):
        hits, trials = found_of(cells)
        found |= {name: cells, f"{name}_found": hits, f"{name}_asked": trials}
    return found | (told.capabilities or {})


def scored(model: loading.LanguageModel, small: Any, args: Namespace) -> dict[str, Any]:
    """Scores of lm-eval's tasks, and what they retain of the dense model's; nothing where no task is asked."""
    if not args.tasks:
        return {}
    tasks = evaluation.load_tasks(args.tasks.split(","), Path(args.include_path) if args.include_path else None)
    dense, cut_down = (
        evaluation.score_tasks(one, model.tokenizer, tasks, limit=args.items, name=name, cache=RESULTS / ".tasks")
        for one, name in ((model.model, "dense"), (small, "cut"))
    )
    kept = asdict(retained(dense, {"cut": cut_down})["cut"])
    return {"tasks": {name: score_of(record) for name, record in cut_down.items()}, "retained": kept}


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], cuts=["nothing", "13:19"], tokens=16384, tune_tokens=65536,
        fold_tokens=FOLD_TOKENS, eval_tokens=32768, window=256, longest=1024, seed=0, tasks="", include_path="",
        items=400,
    )  # fmt: skip
    model = open_model(args.model)
    texts = {
        name: blocks(model, source, args.eval_tokens, args.window, args.seed, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.texts)
    }
    tests = probe_rows(model.tokenizer, rows=24, window=args.window, family="judging", seed=args.seed)
    longer = probes_for(model.tokenizer, model.model.config, longest=args.longest, seed=args.seed)
    probes = replace(longer, tests=tests)
    facts = {key: getattr(args, key) for key in ("tokens", "fold_tokens", "eval_tokens", "window", "longest", "seed")}
    done = RowsDone(args.out, facts)
    for asked in (Healing.parse(text, args.tune_tokens) for text in args.cuts):
        row: dict[str, Any] = asdict(asked) | {"beside": Path(asked.beside).name}
        if row in done:
            continue
        small = model.model if asked.segments == "nothing" else healed(model, asked, args, row)
        row |= judged(model, small, texts, probes) | scored(model, small, args)
        done.add(row)
        say(str(asked), f"{row['perplexity']}, keys {row['keys_found']}, lists {row['lists_found']}")
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, **facts)
    done.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
