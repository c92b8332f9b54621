"""What sets of segments cost by the real cut, row by row, and the race that finds the best without pricing all.

Costs of one row are paired: a hard row is hard for every candidate. So a few rows tell most candidates apart, and
only those that they cannot are looked at again: successive halving. A row's price is computed once and kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F

from layercut.distributed import processes, sharding
from layercut.layer_search.result import Candidate, Cost
from layercut.layer_search.sweep import DENSE, Cuts, row_chunks, sweep
from layercut.models.losses import as_price
from layercut.models.runner import DecoderRunner, teacher_of

Objective = Literal["kl", "next-token", "hidden"]

FIRST_SHARE, FINALISTS = 8, 3
"""A race begins on one row in eight (two at least); so many candidates at least are priced on all rows."""

BUDGET_BYTES = 512 * 2**20
"""Hidden states at the end of a sweep, held at once; one row and sixteen sets at least."""


class Judge:
    """How far a stream is from the dense one, mean over the tokens of each row; differentiable in the stream.

    kl: KL(p || q) of the predictions, nats. next-token: the loss on the text, nats. hidden: |h - h_dense|^2 /
    |h_dense|^2 of the last hidden states, which spares the head.

    dense: h_L [B, T, D] for tokens [B, T]. `every`: one position in so many goes through the head, which is applied
    to each by itself, so that a look costs less and remains an honest sample.
    """

    def __init__(
        self, objective: Objective, stack: DecoderRunner, dense: torch.Tensor, tokens: torch.Tensor, every: int = 1
    ) -> None:
        self.objective, self.stack, self.dense = objective, stack, dense
        last = tokens.shape[1] - (objective == "next-token")
        self.seen = slice(0, last, every)
        self.tokens = tokens[:, self.seen]
        self.targets = stack.place(tokens)[:, 1:][:, ::every]
        if objective == "kl":
            with torch.no_grad():
                self.teacher = teacher_of(stack, dense[:, self.seen], self.tokens)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B]; or, where there is one row of tokens, [P, T, D] -> [P]."""
        if self.objective == "hidden":
            norm = self.dense.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            return ((hidden.float() - self.dense.float()).square().sum(-1) / norm).mean(-1)
        logits = self.stack.exit(hidden[:, self.seen], self.tokens.expand(len(hidden), -1))
        if self.objective == "kl":
            return self.teacher.kl(logits).mean(-1)
        targets = self.targets.expand(len(hidden), -1)
        return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").mean(-1)


class Prices:
    """The price of every set that was asked for, on each row of tokens [N, T] so far."""

    def __init__(self, stack: DecoderRunner, tokens: torch.Tensor, cost: Cost, objective: Objective = "kl") -> None:
        self.stack, self.tokens, self.cost, self.objective = stack, tokens, cost, objective
        self.known: dict[Cuts, list[float]] = {}

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def few(self) -> int:
        """Rows of a first look."""
        return min(self.rows, max(2, self.rows // FIRST_SHARE))

    def of(self, sets: Sequence[Cuts], rows: int) -> torch.Tensor:
        """Prices on the first `rows` rows, those not known yet measured now; infinite where not finite.  [C, rows]"""
        missing: dict[int, list[Cuts]] = {}
        for cuts in dict.fromkeys(sets):
            if (have := len(self.known.setdefault(cuts, []))) < rows:
                missing.setdefault(have, []).append(cuts)
        begins = sorted(missing)
        for start, stop in pairwise([*begins, rows]):  # sets that lack a row share its sweep
            lacking = [cuts for begin in begins if begin <= start for cuts in missing[begin]]
            self._measure(sorted(lacking), start, stop)
        return torch.tensor([self.known[cuts][:rows] for cuts in sets], dtype=torch.float64)

    @torch.no_grad()
    def _measure(self, sets: list[Cuts], start: int, stop: int) -> None:
        """Price rows start … stop; of several processes each a share of them, all sets on every row."""
        size = self.tokens.shape[1] * self.stack.hidden_size * next(self.stack.model.parameters()).element_size()
        streams = max(16, BUDGET_BYTES // size)
        rows = max(1, min(8, streams // len(sets)))
        prices, spent = torch.zeros(len(sets), stop - start, dtype=torch.float64), Cost()
        shared = processes.share_of_batches(stop - start, rows)
        for part, counts in sharding.in_step(self.stack.model, shared, slice(0, 1)):
            batch, cost = self.tokens[start:stop][part], spent if counts else Cost()
            for some in range(0, len(sets), streams):
                chosen = slice(some, some + streams)
                found = self._of_batch(sets[chosen], batch, cost)
                if counts:
                    prices[chosen, part] = found
            cost.dense_tokens += batch.numel()
        self.cost.add_(spent)
        processes.sum_(prices)
        for cuts, found in zip(sets, prices.tolist(), strict=True):
            self.known[cuts] += map(as_price, found)

    def _of_batch(self, sets: list[Cuts], batch: torch.Tensor, cost: Cost) -> torch.Tensor:
        """[B, T] -> [C, B]"""
        ends = {cuts: streams for cuts, (streams,) in sweep(self.stack, [batch], [DENSE, *sets], cost).items()}
        found: list[list[float]] = [[] for _ in sets]
        for part, counts in row_chunks(self.stack, batch):
            judge = Judge(self.objective, self.stack, ends[DENSE][part], batch[part])
            for prices, cuts in zip(found, sets, strict=True):
                price = judge(ends[cuts][part]).tolist()
                prices += price if counts else []
        return torch.tensor(found, dtype=torch.float64)

    def ranked(self, sets: Iterable[Cuts], rows: int) -> list[Cuts]:
        """Sets from the cheapest on the first `rows` rows; the earlier of equals."""
        sets = sorted(sets)
        means = self.of(sets, rows).mean(-1).tolist()
        return [cuts for _, cuts in sorted(zip(means, sets, strict=True))]


def race(prices: Prices, sets: Iterable[Cuts], *, begin: int | None = None) -> list[Candidate]:
    """Successive halving: the sets that survive it, priced on all rows, from the cheapest.

    All are priced on a few rows (`begin`), the better half on twice as many, and so on; FINALISTS at least reach the
    end. On 144 rugged landscapes of four families and four of SmolLM2, eight drawings of 16 rows each, the race among
    all segments from two rows on found the best every time, for 0.36 of the sweep (docs/log.md).
    """
    alive, seen = sorted(set(sets)), min(prices.rows, begin or prices.few)
    while True:
        alive = prices.ranked(alive, seen)
        if seen == prices.rows:
            return candidates(prices, alive)
        alive = alive[: max(FINALISTS, math.ceil(len(alive) / 2))]
        seen = min(prices.rows, 2 * seen)


def candidates(prices: Prices, sets: Sequence[Cuts]) -> list[Candidate]:
    """Sets priced on all rows as they were searched; where that is not by KL, their KL beside it, at no cost of the
    search's."""
    means = prices.of(sets, prices.rows).mean(-1).tolist()
    if prices.objective == "kl":
        return [Candidate(cuts, as_price(mean, 0.0)) for cuts, mean in zip(sets, means, strict=True)]
    kl = Prices(prices.stack, prices.tokens, Cost()).of(sets, prices.rows).mean(-1).tolist()
    return [Candidate(cuts, as_price(k, 0.0), mean) for cuts, k, mean in zip(sets, kl, means, strict=True)]
