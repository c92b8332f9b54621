"""Claim: what endpoint tuning brings back is not the same everywhere; by task and by genre, what it does not.

    python benchmarks/recovery.py … --work HEALED
    python benchmarks/brought_back.py --weights folded=HEALED/folded.safetensors \\
        tuned=HEALED/tuned-1-1048576.safetensors --tasks local_arc_easy,… --include-path FOLDER \\
        --genres wiki=WIKI.txt maths=gsm8k.jsonl:answer …

The dense model, the plain cut and every set of healed weights: accuracy with standard error on the same items of
lm-evaluation-harness, perplexity on text of several genres, the health of what is generated, and with --keys T how many
keys are found that were hidden in up to T tokens. Brought back: of a
score (x - cut) / (dense - cut), of a perplexity the same in logarithms.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from common import arguments, blocks, finish, open_model
from layercut import evaluation
from layercut.files.json_values import write_json
from layercut.models import loading
from layercut.progress import bar, say
from layercut.segments import Segment
from layercut.surgery import cut_segment_


def main() -> None:
    args = arguments(
        __doc__ or "", segment="13:19", weights=[""], tasks="", limit=100, include_path="", genres=["docs=python-docs"],
        genre_tokens=16384, window=256, seed=0, keys=0,
    )  # fmt: skip
    model = open_model(args.model)
    texts = {
        name: blocks(model, source, args.genre_tokens, args.window, args.seed, order="as written").tokens
        for name, _, source in (item.partition("=") for item in args.genres)
    }
    trials = evaluation.passkey_cases(model.tokenizer, args.keys, args.seed) if args.keys else []
    names = [name for name in args.tasks.split(",") if name]
    tasks = evaluation.load_tasks(names, Path(args.include_path) if args.include_path else None) if names else {}
    students: dict[str, Any] = {"dense": model.model}
    for name, _, file in (item.partition("=") for item in ["cut=", *args.weights] if item):
        students[name] = loading.share(model.model)
        cut_segment_(students[name], [Segment.parse(args.segment)])
        if file:
            loading.replace_parameters_(students[name], load_file(file))

    cache = args.out.with_name(f".{args.out.stem}-tasks")  # a stopped run goes on with the next task
    rows: list[dict[str, Any]] = []
    records: dict[str, Any] = {}
    for name, student in students.items():
        records[name] = evaluation.score_tasks(
            student, model.tokenizer, tasks, limit=args.limit or None, name=name, cache=cache
        )
        row: dict[str, Any] = {"state": name}
        row["perplexity"] = {genre: evaluation.perplexity(student, tokens) for genre, tokens in texts.items()}
        if trials:
            with bar(f"hidden keys, {name}", sum(len(ids) for _, _, ids, _ in trials)) as advance:
                row["keys"] = evaluation.passkey_grid(student, model.tokenizer, trials, advance=advance)
        if name != "dense":
            row |= evaluation.compare_tasks(records["dense"], records[name])
            row["health"] = evaluation.generation_health(model.model, student, next(iter(texts.values())))
        rows.append(row)
        say(name, ", ".join(f"{genre} {figure:.2f}" for genre, figure in row["perplexity"].items()))
        write_json(args.out.with_name(f".{args.out.stem}.partial.json"), rows)
    dense, cut = rows[:2]
    for row in rows[2:]:
        row["brought_back"] = {
            genre: math.log(cut["perplexity"][genre] / figure)
            / math.log(cut["perplexity"][genre] / dense["perplexity"][genre])
            for genre, figure in row["perplexity"].items()
        }
    facts = {key: getattr(args, key) for key in ("segment", "limit", "genre_tokens", "window", "seed", "keys")}
    finish(args.out, model, (__doc__ or "").splitlines()[0], rows, genres=list(texts), **facts)
    args.out.with_name(f".{args.out.stem}.partial.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
