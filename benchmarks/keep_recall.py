"""Claim: window criteria cut through the layers that hold recall; where these have to stay, their next pick is dearer.

    python benchmarks/keep_recall.py --data C4 --keep 16 18

Every published criterion chooses twice on the same tokens: freely, and where the layers of --keep (from the
capability map) have to stay. Of every cut: KL on the text, and the damage to generated tests of the judging family,
which no criterion sees. A run that was stopped goes on with the next choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cache

import torch

from common import RowsDone, arguments, blocks, finish, named, open_model
from layercut.data.probe_families import EDITION
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

CRITERIA = "angular,block-influence,cosine,reverse-order,taylor,perplexity,sleb,evolution"


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
        __doc__ or "", data="c4", methods=CRITERIA, ratio=0.2, keep=[16, 18], tokens=4096, window=256, priced=8,
        tests=8, seed=0,
    )  # fmt: skip
    facts = {key: getattr(args, key) for key in ("ratio", "keep", "tokens", "priced", "window", "tests", "seed")}
    facts |= {"data": named(args.data), "edition": EDITION}
    done = RowsDone(args.out, facts)
    model = open_model(args.model)
    stack = DecoderRunner(model.model)
    tokens = blocks(model, args.data, args.tokens, args.window, args.seed).tokens
    tests = probe_rows(model.tokenizer, rows=args.tests, window=args.window, family="judging", seed=args.seed)
    length, alike = layers_to_remove(args.ratio, len(stack)), similarity(stack, tokens, Cost())
    free = Restriction.none(len(stack), length)

    @cache
    def left(cuts: Cuts) -> tuple[float, dict[str, float]]:
        (cut,) = set_costs(stack, tokens[: args.priced], [cuts], Cost())
        return cut.kl, capability_costs(stack, tests, [cuts], Cost())[cuts]

    for name in args.methods.split(","):
        for keeps in (False, True):
            if {"method": name, "keeps": keeps} in done:
                continue
            limits = Kept(free.may, free.why, frozenset(args.keep)) if keeps else free
            cuts = by_similarity(alike, length, limits).get(name) or tuple(
                search(stack, tokens, n_layers=length, method=name, restriction=limits, seed=args.seed).segments
            )
            kl, damage = left(cuts)
            mean = torch.tensor(list(damage.values())).mean()
            say(name, f"{'keeping' if keeps else 'free'}: {', '.join(map(str, cuts))}, KL {kl:.2f}, damage {mean:.2f}")
            segments = [[s.start, s.stop] for s in cuts]
            done.add({"method": name, "keeps": keeps, "segments": segments, "kl": kl, "damage": damage})
    finish(args.out, model, (__doc__ or "").splitlines()[0], done.rows, **facts)
    done.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
