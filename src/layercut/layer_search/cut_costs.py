"""What sets of segments cost by the real cut, row by row, and the race that finds the best without cutting all.

Costs of one row are paired: a hard row is hard for every candidate. So a few rows tell most candidates apart, and
only those that they cannot are run on more: successive halving. A row's cost is computed once and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from layercut.data.probes import ProbeRows
from layercut.distributed import processes, sharding
from layercut.layer_search.result import Candidate, Cost
from layercut.layer_search.sweep import DENSE, Cuts, row_chunks, sweep
from layercut.layer_search.weighted_rows import weighted_rows
from layercut.models.losses import as_cost, teacher_of
from layercut.models.runner import DecoderRunner
from layercut.progress import bar
from layercut.segments import Segment

FIRST_SHARE, FINALISTS = 8, 3
"""A race begins on one row in eight (two at least); so many are run on all rows, if not fewer are wanted."""
WORST = 1e30  # what is taken for a cost that is not finite, where costs are added up
FEWEST_SETS = 16
"""Sets of which the hidden states are held at once at the end of a sweep, at least; else the budget is the limit."""


def first_rows(rows: int) -> int:
    """Of N rows, those that a race begins on."""
    return min(rows, max(2, rows // FIRST_SHARE))


def few_rows(rows: int, kinds: int) -> int:
    """The same where rows are of text, or of text and of probes: two of each kind at least."""
    return min(rows, max(first_rows(rows), 2 * kinds))


def coarse_rows(rows: int, kinds: int) -> int:
    """Of N rows, those that single segments are run on where sums of their costs propose."""
    return min(rows, max(1 if kinds == 1 else 4, few_rows(rows, kinds) // 2))


def row_kl(
    stack: DecoderRunner, dense: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """KL(p || q) of each row, the mean over its tokens or their weighted sum, of h_L by the dense and a cut model.

    A function of the cut model's h_L [B, T, D] that gives [B] and is differentiable. Where no row has weight nothing is
    compared.
    """
    if weights is None:
        teacher = teacher_of(stack, dense, tokens)
        return lambda hidden: teacher.kl(stack.exit(hidden, tokens)).mean(-1)
    counted = (weights > 0).any(0).nonzero()[:, 0]
    counted = counted if len(counted) else torch.zeros(1, dtype=torch.long)  # rows that no probe fitted
    seen = tokens[:, counted.to(tokens.device)]
    some = weights[:, counted]
    # a row's weights keep their sum to the bit of all of them
    some = some * (weights.sum(-1, keepdim=True) / some.sum(-1, keepdim=True).clamp_min(torch.finfo(some.dtype).tiny))
    teacher = teacher_of(stack, dense[:, counted.to(dense.device)], seen)

    def kl(hidden: torch.Tensor) -> torch.Tensor:
        found = teacher.kl(stack.exit(hidden[:, counted.to(hidden.device)], seen))
        return (found * some.to(found.device)).sum(-1)

    return kl


class CutCosts:
    """The cost of every set that was asked for, on each row of text and probes [N, T] so far."""

    def __init__(self, stack: DecoderRunner, tokens: torch.Tensor, cost: Cost, probes: ProbeRows | None = None) -> None:
        """Nothing is run before it is asked for."""
        self.stack, self.cost, self.weighted = stack, cost, weighted_rows(tokens, probes)
        self.tokens, self.weights = self.weighted.tokens, self.weighted.weights
        self.rows, self.kinds = len(self.tokens), 1 if self.weights is None else 2
        self.known: dict[Cuts, list[float]] = {}
        self.advance: Callable[[float], None] = lambda rows: None

    @contextmanager
    def shown(self, what: str, total: float) -> Iterator[None]:
        """While open, a bar shows how many costs of single rows were found."""
        with bar(what, total) as self.advance:
            yield
        self.advance = lambda rows: None

    def of_singles(self, segments: Sequence[Segment]) -> torch.Tensor:
        """What each segment costs alone, on the few rows that sums of single costs are made of (`coarse_rows`)."""
        rows = coarse_rows(self.rows, self.kinds)
        with self.shown("cutting single segments", rows * len(segments)):
            return self.of([(segment,) for segment in segments], rows).clamp_max(WORST)

    def of(self, sets: Sequence[Cuts], rows: int) -> torch.Tensor:
        """Costs on the first `rows` rows [C, rows]; those that are not known yet are found now."""
        missing: dict[int, list[Cuts]] = {}
        for cuts in dict.fromkeys(sets):
            if (have := len(self.known.setdefault(cuts, []))) < rows:
                missing.setdefault(have, []).append(cuts)
        begins = sorted(missing)
        for start, stop in pairwise([*begins, rows]):  # sets that lack a row share its sweep
            lacking = [cuts for begin in begins if begin <= start for cuts in missing[begin]]
            self._run(sorted(lacking), start, stop)
        return torch.tensor([self.known[cuts][:rows] for cuts in sets], dtype=torch.float64)

    @torch.no_grad()
    def _run(self, sets: list[Cuts], start: int, stop: int) -> None:
        """Cut on rows start … stop; of several processes each a share of them, all sets on every row."""
        stack, window = self.stack, self.tokens.shape[1]
        budget, tokens = stack.budget, stack.place(self.tokens[start:stop])
        streams = max(FEWEST_SETS, budget.streams // stack.stream_bytes(window))
        rows = max(1, min(budget.layer_rows(window), streams // len(sets)))
        costs, spent = torch.zeros(len(sets), stop - start, dtype=torch.float64), Cost()
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
                self.advance(processes.world() * sum(some.numel() for some in found))
                own.dense_tokens += tokens[part].numel()
                if counts:
                    costs[:, part] = torch.cat(found)
                    spent += own
        self.cost.add_(spent)
        processes.sum_(costs)
        for cuts, row in zip(sets, costs.tolist(), strict=True):
            self.known[cuts] += map(as_cost, row)

    def _of_batch(
        self, sets: list[Cuts], batch: torch.Tensor, weights: torch.Tensor | None, cost: Cost
    ) -> torch.Tensor:
        """The cost of each set on each row of a batch: token ids [B, T] -> [C, B]."""
        ends = {cuts: streams for cuts, (streams,) in sweep(self.stack, [batch], [DENSE, *sets], cost).items()}
        found: list[torch.Tensor] = []  # [C, b] of each chunk, read at the end
        for part, counts in row_chunks(self.stack, batch):
            kl = row_kl(self.stack, ends[DENSE][part], batch[part], None if weights is None else weights[part])
            costs = torch.stack([kl(ends[cuts][part]) for cuts in sets])
            found += [costs] if counts else []
        return torch.cat(found, dim=1).cpu().double()

    def ranked(self, sets: Iterable[Cuts], rows: int, *, text_only: bool = False) -> list[Cuts]:
        """Sets from the cheapest on the first `rows` rows; the earlier of equals."""
        sets = sorted(sets)
        costs = self.of(sets, rows)
        means = costs[:, self.weighted.text_only(rows)].mean(-1) if text_only else self.weighted.mean(costs)
        return [cuts for _, cuts in sorted(zip(means.tolist(), sets, strict=True))]

    def candidates(self, sets: Sequence[Cuts]) -> list[Candidate]:
        """Sets as candidates, in their order, by all rows; the KL is that of the rows of text."""
        found = self.of(sets, self.rows)
        kl = [as_cost(value, 0.0) for value in self.weighted.part(found, text=True).tolist()]
        if self.weights is None:
            return list(map(Candidate, sets, kl))
        probes = [as_cost(value, 0.0) for value in self.weighted.part(found, text=False).tolist()]
        return list(map(Candidate, sets, kl, self.weighted.mean(found).tolist(), probes))


def rounds(sets: int, rows: int, begin: int, finalists: int) -> Iterator[tuple[int, int]]:
    """The rounds of successive halving: how many sets on how many rows."""
    seen = min(rows, begin)
    while True:
        yield sets, seen
        if seen == rows:
            return
        sets, seen = min(sets, max(finalists, math.ceil(sets / 2))), min(rows, 2 * seen)


def shuffled(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows in the order in which halving takes them."""
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]


def halving(
    costs: CutCosts, sets: Iterable[Cuts], name: str = "race", *, begin: int | None = None, finalists: int = FINALISTS
) -> list[Candidate]:
    """Successive halving: all sets are run on a few rows, the better half on twice as many, and so on.

    On 144 rugged landscapes of four families and four of SmolLM2, eight drawings of 16 rows each, the race among all
    segments from two rows on found the best every time, for 0.36 of the sweep (research/search.md).
    """
    alive = sorted(set(sets))
    schedule = list(rounds(len(alive), costs.rows, begin or few_rows(costs.rows, costs.kinds), finalists))
    total = sum(count * (rows - before) for (_, before), (count, rows) in pairwise([(0, 0), *schedule]))
    with costs.shown(name, total):
        for count, rows in schedule:
            alive = costs.ranked(alive[:count], rows)
        return costs.candidates(alive)


def best_by_text(costs: CutCosts, found: Iterable[Candidate], sets: Iterable[Cuts]) -> Candidate | None:
    """The best by text alone, by all rows: what weighing probes costs, and spares."""
    if costs.weights is None:
        return None
    every = {*sets, *(candidate.segments for candidate in found)}
    # by the rows on which all of them are known already, and the first of these exactly: no race of its own
    known = min(len(costs.known[cuts]) for cuts in every)
    nearest = costs.ranked(every, known, text_only=True)[:FINALISTS]
    return costs.candidates(costs.ranked(nearest, costs.rows, text_only=True))[0]


def with_single(costs: CutCosts, found: list[Candidate], single: Sequence[Cuts]) -> list[Candidate]:
    """Candidates, the best of these cuts of one segment among them."""
    if not single or any(len(each.segments) == 1 for each in found):
        return found
    known = min(len(costs.known.get(cuts, [])) for cuts in single) or few_rows(costs.rows, costs.kinds)
    return sorted([*found, *costs.candidates(costs.ranked(single, known)[:1])], key=lambda each: each.merit)
