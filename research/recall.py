"""Claim: a cut chosen and healed with generated tests still finds hidden keys; one chosen by text alone does not.

    python research/recall.py --data C4 --texts wiki=WIKI.txt c4=HELDOUT.txt \
        --cuts 13:19 "12:16,5:7 share=0.25" "12:16,5:7 share=0.25 mix=0.3 radius=2"
    python research/recall.py …      # goes on; rows that are done are kept

A cut is its segments, and what its healing has otherwise: `share` of generated tests among the rows to tune on, `chats`
that the dense model writes, `mix` of the next-token loss, `radius`, `tokens` to tune on, peak `rate`,
`window` of the rows and whether some are `parted`, `answer_weight`, another text `beside` the first, and other ways to
teach (teaching.py). Each is folded and tuned as a run does it; then perplexity, hidden keys, values found in lists, the
the cost on tests of the judging family, and replies to eight questions are measured, beside the dense model; with
`--tasks arc_easy,piqa [--include-path FOLDER] --items 400`, what is left of the scores of lm-eval's tasks too.
"nothing" is the dense model, "… unhealed" the cut alone.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from common import RowsDone, arguments, blocks, finish, open_model
from layercut import evaluation
from layercut.data.probes import probe_rows
from layercut.evaluation.probe_scores import Probes, found_of, probed, probes_for
from layercut.models import loading
from layercut.pipeline.stages.heal import FOLD_TOKENS
from layercut.progress import say
from tasks_kept import ASKED, tasks_kept
from teaching import Healing, healed


def judges(model: loading.LanguageModel, args: Namespace, rows: int) -> tuple[dict[str, torch.Tensor], Probes]:
    """The texts to report on, token ids [N, T] by name, and the probes, of which so many rows are of all skills."""
    texts = {
        name: blocks(model, source, args.eval_tokens, args.window, args.seed, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.texts)
    }
    tests = probe_rows(model.tokenizer, rows=rows, window=args.window, family="judging", seed=args.seed)
    longer = probes_for(model.tokenizer, model.model.config, longest=args.longest, seed=args.seed, each=args.trials)
    return texts, replace(longer, rows=tests)


def judged(model: loading.LanguageModel, small: Any, texts: dict[str, torch.Tensor], probes: Probes) -> dict[str, Any]:
    """What was measured: perplexity by text, keys and values found, cost and hit rates of generated tests."""
    found: dict[str, Any] = {"perplexity": {name: evaluation.perplexity(small, text) for name, text in texts.items()}}
    told = probed(small, model.model, model.tokenizer, probes)
    for name, cells in (("keys", told["keys"]), ("lists", told["lists"])):
        hits, trials = found_of(cells)
        found |= {name: cells, f"{name}_found": hits, f"{name}_asked": trials}
    models = {"dense": model.model, "compressed": small}
    written = {name: evaluation.generations(each, model.tokenizer) for name, each in models.items()}
    own = evaluation.replies(model.model, small, model.tokenizer, written)
    return found | (told["capabilities"] or {}) | {"replies": own}


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", texts=["wiki=wikitext2"], cuts=["nothing", "13:19"], tokens=16384, tune_tokens=65536,
        fold_tokens=FOLD_TOKENS, eval_tokens=32768, window=256, longest=1024, trials=2, seed=0, **ASKED,
    )  # fmt: skip
    model = open_model(args.model)
    texts, probes = judges(model, args, rows=24)
    named = ("tokens", "fold_tokens", "eval_tokens", "window", "longest", "trials", "seed")
    facts = {key: getattr(args, key) for key in named}
    done = RowsDone(args.out, facts)
    for asked in (Healing.parse(text, args.tune_tokens) for text in args.cuts):
        row: dict[str, Any] = asdict(asked) | {"beside": Path(asked.beside).name}
        if row in done:
            continue
        small = model.model if asked.segments == "nothing" else healed(model, asked, args, row)
        row |= judged(model, small, texts, probes) | tasks_kept(model, small, args)
        done.add(row)
        say(str(asked), f"{row['perplexity']}, keys {row['keys_found']}, lists {row['lists_found']}")
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, **facts)
    done.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
