"""Claim: perplexity and plain scores overstate what survives a cut; retention above chance, hidden keys and the health
of generations tell a usable model from a ruined one.

    python benchmarks/survival.py --tasks arc_easy,piqa --limit 200 --eval-data wikitext2

For each segment cut out, nothing healed: perplexity, tasks, keys hidden in long text and generations beside the dense
model's, on the same tokens, items and prompts, with the warnings that a report would print.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import arguments, blocks, finish, open_model
from layercut import evaluation
from layercut.models import loading
from layercut.progress import bar, say
from layercut.report import verdicts
from layercut.report.formatting import Json
from layercut.report.run_facts import RunFacts
from layercut.segments import Segment
from layercut.surgery import cut_segment_


def main() -> None:
    args = arguments(
        __doc__ or "",
        segments=["13:19", "13:22", "23:29"], tasks="", limit=100, include_path="",
        eval_data="wikitext2", eval_tokens=4096, window=256, longest=1024, seed=0,
    )  # fmt: skip
    model = open_model(args.model)
    tokens = blocks(model, args.eval_data, args.eval_tokens, args.window, args.seed, order="as written")
    students: dict[str, Any] = {"dense": model.model}
    for name in args.segments:
        students[name] = loading.share(model.model)
        cut_segment_(students[name], [Segment.parse(name)])

    names = [name for name in args.tasks.split(",") if name]
    tasks = evaluation.load_tasks(names, Path(args.include_path) if args.include_path else None) if names else {}
    windows = evaluation.long_windows(tokens.tokens, args.longest, model.model)
    trials = evaluation.passkey_cases(model.tokenizer, args.longest, args.seed)
    seen: dict[str, dict[str, Any]] = {}
    for name, student in students.items():
        seen[name] = {
            "perplexity": evaluation.perplexity(student, tokens.tokens),
            "records": evaluation.score_tasks(
                student, model.tokenizer, tasks, limit=args.limit or None, name=name, cache=None
            ),
            "positions": evaluation.perplexity_by_position(student, windows),
        }
        with bar(f"hidden keys, {name}", sum(len(ids) for _, _, ids, _ in trials)) as advance:
            seen[name]["keys"] = evaluation.passkey_grid(student, model.tokenizer, trials, advance=advance)
        say(name, f"perplexity {seen[name]['perplexity']:.2f}")
    rows = [compare(name, seen, evaluation.generation_health(model.model, students[name], tokens.tokens))
            for name in args.segments]  # fmt: skip
    facts = {"evaluation": asdict(tokens.facts()), "limit": args.limit, "longest": args.longest, "seed": args.seed}
    finish(args.out, model, "retention above chance, keys and health tell a ruined model", rows, **facts)


def compare(name: str, seen: dict[str, dict[str, Any]], health: dict[str, Any]) -> dict[str, Any]:
    """One cut model beside the dense one."""
    dense, cut = seen["dense"], seen[name]
    scored = evaluation.compare_tasks(dense["records"], cut["records"])
    summary = {
        **scored,
        "generation_health": health,
        "long_context": {
            "perplexity": {"dense": dense["positions"], "compressed": cut["positions"]},
            "passkey": {"dense": dense["keys"], "compressed": cut["keys"]},
        },
    }
    judged = verdicts.verdicts(RunFacts(summary=Json(summary)))
    survived = ("Tasks", "Long context", "Hidden keys", "Generation")
    return {
        "segment": name,
        "perplexity": {"dense": dense["perplexity"], "cut": cut["perplexity"]},
        **summary,
        "verdicts": [verdict for verdict in judged if verdict.stage in survived],
        "guesses": verdicts.broken(summary),
    }


if __name__ == "__main__":
    main()
