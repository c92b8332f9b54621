"""Claim: every published criterion removes the layers that hold recall, and picks another, dearer cut where it may not.

    python benchmarks/keep_recall.py --data C4 --keep 16 18

Each criterion chooses twice on the same tokens: freely, and where the layers of --keep (from the capability map) have
to stay. Of both cuts: KL on the text, and the damage to generated tests of the judging family, which none of them sees.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from common import arguments, blocks, finish, open_model
from layercut.data.probes import probe_rows
from layercut.files.json_values import write_json
from layercut.layer_search import Restriction, search
from layercut.layer_search.damage_map import capability_costs
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import Cuts
from layercut.models.runner import DecoderRunner
from layercut.progress import say
from layercut.segments import Segment, layers_to_remove


@dataclass(frozen=True)
class Kept(Restriction):
    """Cuts that leave some layers in."""

    layers: frozenset[int] = frozenset()

    def segments(self) -> list[Segment]:
        return [one for one in super().segments() if not self.layers & set(range(one.start, one.stop))]

    def cheapest(self, costs: Sequence[float], must: Set[int] = frozenset()) -> Cuts | None:
        dear = [float("inf") if i in self.layers else cost for i, cost in enumerate(costs)]
        return super().cheapest(dear, must)


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", methods="block-influence,angular,cosine,taylor,exhaustive,perplexity", ratio=0.2,
        keep=[16, 18], tokens=2048, window=256, tests=8, seed=0,
    )  # fmt: skip
    model = open_model(args.model)
    stack = DecoderRunner(model.model)
    tokens = blocks(model, args.data, args.tokens, args.window, args.seed).tokens
    tests = probe_rows(model.tokenizer, rows=args.tests, window=args.window, family="judging", seed=args.seed)
    length = layers_to_remove(args.ratio, len(stack))
    free = Restriction.none(len(stack), length)
    damage: dict[Cuts, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for method in args.methods.split(","):
        for keep in (frozenset(), frozenset(args.keep)):
            limits = Kept(free.may, free.why, keep)
            found = search(stack, tokens, n_layers=length, method=method, restriction=limits, seed=args.seed)
            cuts = tuple(found.segments)
            if cuts not in damage:
                damage |= capability_costs(stack, tests, [cuts], Cost())
            row = {"method": method, "kept": sorted(keep), "segments": [[s.start, s.stop] for s in cuts]}
            rows.append(row | {"kl": found.kl, "damage": damage[cuts]})
            mean = torch.tensor(list(damage[cuts].values())).mean().item()
            say(method, f"keeping {sorted(keep)}: {', '.join(map(str, cuts))}, KL {found.kl:.3f}, damage {mean:.3f}")
            write_json(args.out.with_name(f".{args.out.stem}.partial.json"), rows)
    facts = {key: getattr(args, key) for key in ("ratio", "keep", "tokens", "window", "tests", "seed")}
    finish(args.out, model, (__doc__ or "").splitlines()[0], rows, **facts)
    args.out.with_name(f".{args.out.stem}.partial.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
