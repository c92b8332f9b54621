"""Claim: window criteria cut through the layers that hold recall; where these have to stay, their next pick is dearer.

    python benchmarks/keep_recall.py --data C4 --keep 16 18

Block influence, angular and cosine distance (one pass through the dense model gives all three), and any others that
are named, choose twice on the same tokens: freely, and where the layers of --keep (from the capability map) have to
stay. Of every cut: KL on the text, and the damage to generated tests of the judging family, which no criterion sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from common import arguments, blocks, finish, open_model
from layercut.data.probes import probe_rows
from layercut.layer_search import Restriction, search
from layercut.layer_search.criteria import best_start, lowest
from layercut.layer_search.damage_map import capability_costs
from layercut.layer_search.result import Cost
from layercut.layer_search.statistics import Similarity, similarity
from layercut.layer_search.sweep import Cuts, set_costs
from layercut.models.runner import DecoderRunner
from layercut.progress import say
from layercut.segments import Segment, layers_to_remove


@dataclass(frozen=True)
class Kept(Restriction):
    """Cuts that leave some layers in."""

    layers: frozenset[int] = frozenset()

    @property
    def is_none(self) -> bool:
        return not self.layers and super().is_none

    def allows(self, cuts: Iterable[Segment]) -> bool:
        cuts = list(cuts)
        return not any(self.layers.intersection(range(one.start, one.stop)) for one in cuts) and super().allows(cuts)

    def cheapest(self, costs: Sequence[float], must: Set[int] = frozenset()) -> Cuts | None:
        dear = [float("inf") if i in self.layers else cost for i, cost in enumerate(costs)]
        found = super().cheapest(dear, must)
        return found if found is not None and self.allows(found) else None


def by_similarity(found: Similarity, length: int, limits: Restriction) -> dict[str, Cuts]:
    """What the criteria of that name pick (`layer_search/criteria.py`), of one pass."""
    allowed = limits.segments()
    return {
        "block-influence": lowest(1 - found.cosine.diagonal(1), length, restriction=limits),
        "angular": best_start(found.angular.diagonal(length), length, allowed),
        "cosine": best_start(-found.cosine.diagonal(length), length, allowed),
    }


def main() -> None:
    args = arguments(
        __doc__ or "", data="c4", others="", ratio=0.2, keep=[16, 18], tokens=4096, window=256, priced=8, tests=8,
        seed=0,
    )  # fmt: skip
    model = open_model(args.model)
    stack = DecoderRunner(model.model)
    tokens = blocks(model, args.data, args.tokens, args.window, args.seed).tokens
    tests = probe_rows(model.tokenizer, rows=args.tests, window=args.window, family="judging", seed=args.seed)
    length, alike = layers_to_remove(args.ratio, len(stack)), similarity(stack, tokens, Cost())
    free = Restriction.none(len(stack), length)
    picks: dict[tuple[str, bool], Cuts] = {}
    for keeps in (False, True):
        limits = Kept(free.may, free.why, frozenset(args.keep)) if keeps else free
        picks |= {(name, keeps): cuts for name, cuts in by_similarity(alike, length, limits).items()}
        for name in filter(None, args.others.split(",")):
            found = search(stack, tokens, n_layers=length, method=name, restriction=limits, seed=args.seed)
            picks[name, keeps] = tuple(found.segments)
    for (name, keeps), cuts in picks.items():
        say(name, f"{'keeping' if keeps else 'free'}: {', '.join(map(str, cuts))}")
    every = list(dict.fromkeys(picks.values()))
    kl = {one.segments: one.kl for one in set_costs(stack, tokens[: args.priced], every, Cost())}
    damage = capability_costs(stack, tests, every, Cost())
    rows: list[dict[str, Any]] = [
        {
            "method": name, "keeps": keeps, "segments": [[s.start, s.stop] for s in cuts], "kl": kl[cuts],
            "damage": damage[cuts],
        }
        for (name, keeps), cuts in sorted(picks.items())
    ]  # fmt: skip
    facts = {key: getattr(args, key) for key in ("ratio", "keep", "tokens", "priced", "window", "tests", "seed")}
    mean = {cuts: torch.tensor(list(harm.values())).mean().item() for cuts, harm in damage.items()}
    say("damage", ", ".join(f"{'+'.join(map(str, cuts))} {value:.2f}" for cuts, value in mean.items()))
    finish(args.out, model, (__doc__ or "").splitlines()[0], rows, **facts)


if __name__ == "__main__":
    main()
