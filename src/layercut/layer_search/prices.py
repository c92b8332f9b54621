"""What sets of segments cost by the real cut, row by row, and the race that finds the best without pricing all.

Costs of one row are paired: a hard row is hard for every candidate. So a few rows tell most candidates apart, and
only those that they cannot are priced on more: successive halving. A row's price is computed once and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from layercut.data.probes import ProbeRows
from layercut.distributed import processes, sharding
from layercut.layer_search.result import Candidate, Cost
from layercut.layer_search.sweep import DENSE, Cuts, row_chunks, sweep
from layercut.layer_search.weighted_rows import weighted_rows
from layercut.models.losses import as_price
from layercut.models.objectives import KL, Objective
from layercut.models.passes import dense_logits
from layercut.models.runner import DecoderRunner
from layercut.progress import bar
from layercut.registries import objectives
from layercut.segments import Segment

FIRST_SHARE, FINALISTS = 8, 3
"""A race begins on one row in eight (two at least); so many are priced on all rows, if not fewer are wanted."""

WORST = 1e30
"""What is taken for a price that is not finite, where prices are added up."""

FEWEST_SETS = 16
"""Sets of which the hidden states are held at once at the end of a sweep, at least; else the budget is the limit."""


def first_rows(rows: int) -> int:
    """Of N rows, those that a race begins on."""
    return min(rows, max(2, rows // FIRST_SHARE))


def few_rows(rows: int, kinds: int) -> int:
    """Of N rows, those of the first, coarse pricing of sets."""
    return min(rows, max(first_rows(rows), 2 * kinds))


def coarse_rows(rows: int, kinds: int) -> int:
    """Of N rows, those that single segments are priced on where sums of their prices propose."""
    return min(rows, max(1 if kinds == 1 else 4, few_rows(rows, kinds) // 2))


def as_objective(objective: str | Objective) -> Objective:
    """An objective by its name in `layercut.objectives`, or itself."""
    if isinstance(objective, Objective):
        return objective
    found = objectives.get(objective)
    return found() if isinstance(found, type) else found


def is_kl(objective: Objective) -> bool:
    """Whether an objective is what candidates are priced by in any case: KL(p || q)."""
    return type(objective) is KL and not objective.mix


class Judge:
    """An objective, mean or weighted sum over the tokens of each row, of hidden states after the last layer.

    It is differentiable in them.
    """

    def __init__(
        self,
        objective: Objective,
        stack: DecoderRunner,
        dense: torch.Tensor,
        tokens: torch.Tensor,
        *,
        weights: torch.Tensor | None = None,
        every: int = 1,
    ) -> None:
        """Prepare what all that is judged shares."""
        self.stack = stack
        # what does not need the dense model compares with the next token, and the last position has none
        last = tokens.shape[1] - (not objective.needs_dense)
        self.seen: slice | torch.Tensor = slice(0, last, every)
        self.weights = None
        if weights is not None:
            counted = (weights[:, :last] > 0).any(0).nonzero()[:, 0]
            counted = counted if len(counted) else torch.zeros(1, dtype=torch.long)  # rows that no test fitted
            self.seen = counted[:: max(1, len(counted) * every // last)]  # few answers are all compared
            some = weights[:, self.seen]
            # a row's weights keep their sum, whichever of its positions are compared
            scale = weights.sum(-1, keepdim=True) / some.sum(-1, keepdim=True).clamp_min(torch.finfo(some.dtype).tiny)
            self.weights = some * scale
        self.tokens = _positions(tokens, self.seen)
        targets = _positions(F.pad(stack.place(tokens)[:, 1:], (0, 1), value=-1), self.seen)
        compared = None
        if objective.needs_dense:
            with torch.no_grad():
                compared = dense_logits(stack, _positions(dense, self.seen), self.tokens)
        self.loss = objective.against(compared, targets)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B]; or, where there is one row of tokens, [P, T, D] -> [P]."""
        losses = self.loss(self.stack.exit(_positions(hidden, self.seen), self.tokens.expand(len(hidden), -1)))
        if self.weights is None:
            return losses.mean(-1)
        self.weights = self.weights.to(losses.device)
        return (losses * self.weights).sum(-1)


def _unseen(prices: float) -> None:
    """How far the work is, where nothing shows it."""


def _positions(of_rows: torch.Tensor, chosen: slice | torch.Tensor) -> torch.Tensor:
    """Some positions of [B, T, …], chosen on any device."""
    return of_rows[:, chosen if isinstance(chosen, slice) else chosen.to(of_rows.device)]


class Prices:
    """The price of every set that was asked for, on each row of tokens [N, T] so far."""

    def __init__(
        self,
        stack: DecoderRunner,
        tokens: torch.Tensor,
        cost: Cost,
        objective: Objective | None = None,
        probes: ProbeRows | None = None,
    ) -> None:
        """Nothing is measured before it is asked for."""
        self.stack, self.cost, self.objective, self.probes = stack, cost, objective or KL(), probes
        self.text, self.weighted = tokens, weighted_rows(tokens, probes)
        self.tokens, self.weights = self.weighted.tokens, self.weighted.weights
        self.known: dict[Cuts, list[float]] = {}
        self._advance: Callable[[float], None] = _unseen

    @contextmanager
    def shown(self, description: str, total: float) -> Iterator[Callable[[float], None]]:
        """While open, a bar shows how many of the prices of single rows that are asked for are known."""
        done = 0.0
        with bar(description, total) as advance:

            def measured(prices: float) -> None:
                nonlocal done
                done += prices
                advance(prices)

            self._advance = measured
            try:
                yield lambda prices: measured(prices - done)
            finally:
                self._advance = _unseen

    @property
    def rows(self) -> int:
        """N, those of generated tests among them."""
        return len(self.tokens)

    @property
    def kinds(self) -> int:
        """How many kinds of rows there are: text, or text and generated tests in turn."""
        return 1 if self.weights is None else 2

    @property
    def few(self) -> int:
        """Rows of the first, coarse pricing; two of text and two of tests at least, where there are tests."""
        return few_rows(self.rows, self.kinds)

    def of_singles(self, segments: Sequence[Segment]) -> torch.Tensor:
        """What each segment costs alone, on the few rows that sums of single prices are made of (`coarse_rows`)."""
        rows = coarse_rows(self.rows, self.kinds)
        with self.shown("pricing single segments", total := rows * (1 + len(segments))) as reached:
            found = self.of([DENSE, *((segment,) for segment in segments)], rows).clamp_max(WORST)
            reached(total)
        return found[1:] - found[:1]

    def unseen(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All rows and their weights, those first that the coarse pricing has not seen; of tests and text in turn."""
        if self.weights is None:
            return self.tokens.flip(0), None
        return self.tokens.roll(-self.few, 0), self.weights.roll(-self.few, 0)

    def of(self, sets: Sequence[Cuts], rows: int) -> torch.Tensor:
        """Prices on the first `rows` rows; those that are not known yet are measured now."""
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
        stack, window = self.stack, self.tokens.shape[1]
        budget, tokens = stack.budget, stack.place(self.tokens[start:stop])
        streams = max(FEWEST_SETS, budget.streams // stack.stream_bytes(window))
        rows = max(1, min(budget.layer_rows(window), streams // len(sets)))
        prices, spent = torch.zeros(len(sets), stop - start, dtype=torch.float64), Cost()
        shared = processes.share_of_batches(stop - start, rows)
        queue = stack.parts("search", sharding.in_step(stack.model, shared, slice(0, 1)))
        for one in queue:
            with queue.trying(one):
                (part, counts), own = one, Cost()
                weights = None if self.weights is None else self.weights[start:stop][part]
                found = [
                    self._of_batch(sets[some : some + streams], tokens[part], weights, own)
                    for some in range(0, len(sets), streams)
                ]
                self._advance(processes.world() * sum(some.numel() for some in found))
                own.dense_tokens += tokens[part].numel()
                if counts:
                    prices[:, part] = torch.cat(found)
                    spent += own
        self.cost.add_(spent)
        processes.sum_(prices)
        for cuts, found in zip(sets, prices.tolist(), strict=True):
            self.known[cuts] += map(as_price, found)

    def _of_batch(
        self, sets: list[Cuts], batch: torch.Tensor, weights: torch.Tensor | None, cost: Cost
    ) -> torch.Tensor:
        """The price of each set on each row of a batch: token ids [B, T] -> [C, B]."""
        ends = {cuts: streams for cuts, (streams,) in sweep(self.stack, [batch], [DENSE, *sets], cost).items()}
        found: list[torch.Tensor] = []  # [C, b] of each chunk, read at the end
        for part, counts in row_chunks(self.stack, batch):
            some = None if weights is None else weights[part]
            judge = Judge(self.objective, self.stack, ends[DENSE][part], batch[part], weights=some)
            prices = torch.stack([judge(ends[cuts][part]) for cuts in sets])
            found += [prices] if counts else []
        return torch.cat(found, dim=1).cpu().double()

    def ranked(self, sets: Iterable[Cuts], rows: int, *, text_only: bool = False) -> list[Cuts]:
        """Sets from the cheapest on the first `rows` rows; the earlier of equals."""
        sets = sorted(sets)
        prices = self.of(sets, rows)
        some = prices[:, self.weighted.text_only(rows)].mean(-1) if text_only else self.weighted.mean(prices)
        means = some.tolist()
        return [cuts for _, cuts in sorted(zip(means, sets, strict=True))]


def rounds(sets: int, rows: int, begin: int, finalists: int) -> Iterator[tuple[int, int]]:
    """The rounds of successive halving."""
    seen = min(rows, begin)
    while True:
        yield sets, seen
        if seen == rows:
            return
        sets, seen = min(sets, max(finalists, math.ceil(sets / 2))), min(rows, 2 * seen)


def halving(
    prices: Prices, sets: Iterable[Cuts], name: str = "race", *, begin: int | None = None, finalists: int = FINALISTS
) -> list[Candidate]:
    """Successive halving: all sets are priced on a few rows, the better half on twice as many, and so on.

    On 144 rugged landscapes of four families and four of SmolLM2, eight drawings of 16 rows each, the race among all
    segments from two rows on found the best every time, for 0.36 of the sweep (docs/log.md).
    """
    alive = sorted(set(sets))
    schedule = list(rounds(len(alive), prices.rows, begin or prices.few, finalists))
    asked = [*accumulate(count * (rows - before) for (_, before), (count, rows) in pairwise([(0, 0), *schedule]))]
    with prices.shown(name, asked[-1]) as reached:
        for (count, rows), so_many in zip(schedule, asked, strict=True):
            alive = prices.ranked(alive[:count], rows)
            reached(so_many)
    return candidates(prices, alive)


def candidates(prices: Prices, sets: Sequence[Cuts]) -> list[Candidate]:
    """Sets as candidates, in their order, priced on all rows by the objective.

    The KL is that of the rows of text. Where the objective is not KL, it is measured beside it, which is not counted
    as a cost of the search.
    """
    found = prices.of(sets, prices.rows)
    means = prices.weighted.mean(found).tolist()
    if is_kl(prices.objective):
        kl = prices.weighted.part(found, text=True).tolist()
    else:
        kl = Prices(prices.stack, prices.text, Cost()).of(sets, len(prices.text)).mean(-1).tolist()
    if prices.weights is None:
        scores = [None if is_kl(prices.objective) else mean for mean in means]
        damage: list[float | None] = [None] * len(means)
    else:
        scores, damage = [*means], [as_price(d, 0.0) for d in prices.weighted.part(found, text=False).tolist()]
    return [
        Candidate(cuts, as_price(k, 0.0), score, lost)
        for cuts, k, score, lost in zip(sets, kl, scores, damage, strict=True)
    ]


def beside_text(prices: Prices, found: list[Candidate], sets: Iterable[Cuts]) -> Candidate | None:
    """The best by text alone, priced on all rows: what heeding generated tests costs, and spares."""
    if prices.weights is None:
        return None
    every = {*sets, *(candidate.segments for candidate in found)}
    # by the rows on which all of them are known already, and the first of these exactly: no race of its own
    known = min(len(prices.known[cuts]) for cuts in every)
    nearest = prices.ranked(every, known, text_only=True)[:FINALISTS]
    return candidates(prices, prices.ranked(nearest, prices.rows, text_only=True))[0]
