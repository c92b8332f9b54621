"""The criterion `clp`: price coarsely, descend by gradient, race what was found by the real cut.

    price_coarsely  every single segment on a few rows: where the descent starts
    descend         the gate, from the best sets that differ (`gate.py`)
    race            where it ended, all one-layer moves from there, and the better half of the coarse pricing
    climb           with several segments: one-layer moves of the best, as long as one improves it

Race and climb go by the real cut alone, so that a bad descent costs time and not the answer. For one segment the
coarse pricing covers all there are, on one row in eight; for K segments it prices each alone and adds up, since there
are L^K sets (`cheapest_sums`). What each part contributes was measured: see `clp` and docs/log.md.
"""

from __future__ import annotations

from heapq import nsmallest

import torch

from layercut.data.probes import ProbeRows
from layercut.layer_search.gate import HEAD_EVERY, GateSchedule, descend
from layercut.layer_search.gate_walls import neighbours, spread
from layercut.layer_search.prices import FINALISTS, Prices, as_objective, beside_text, first_rows, race
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Candidate, Cost, SearchResult, merit
from layercut.layer_search.search_cost import all_segments_cost, costs
from layercut.layer_search.sweep import DENSE, Cuts, all_lengths, all_segments, set_work, sweep_cost, sweep_work
from layercut.models.cost import Bounds, Peak, PlannedRun, Spent, Work, total
from layercut.models.objectives import Objective
from layercut.models.runner import DecoderRunner
from layercut.progress import bar
from layercut.segments import Segment

Sums = list[tuple[float, Cuts]]

COARSE_SHARE = 2
"""With one segment: of the coarsely priced, the better one in two races, as in any round of the race."""

DESCENT_SHARE = 0.2
"""With one segment: work of the descent over that of the sweep on all rows, at most."""

SHORT_DESCENT = 4
"""With several segments: steps of the descent. Longer ones ended at worse sets in nine blind trials (docs/log.md)."""

COARSE_SETS, BEAM = 4, 8
"""With several segments: so many proposals a layer race, and `cheapest_sums` keeps so many sets of each kind."""

MOST_CLIMBS = 8
"""Rounds of climbing at most; each takes one move."""


def schedule_for(layers: int, length: int, count: int, rows: int) -> GateSchedule:
    """How many sets descend, and for how long.

    K + 2 sets for K segments, or one for every four starts of a small stack; the coarse pricing says where they begin.
    One segment takes as many steps as it has layers and four more, within DESCENT_SHARE of the sweep's work, two at
    least: a step costs about half as much as a sweep of its row. Several segments take SHORT_DESCENT steps.

    Args:
        layers: L.
        length: n, layers to remove.
        count: K, segments.
        rows: N, calibration rows.

    Returns:
        The schedule.
    """
    starts, kept = layers - length + 1, layers - length
    particles = min(count + 2, max(1, starts // 4))
    if count > 1:
        return GateSchedule(particles=particles, steps=SHORT_DESCENT)
    sweep = layers + starts * kept / 2
    # half of the kept layers come after a segment, on average; a backward is taken as two forwards
    step = layers + particles * (kept / 2 + 2) * 3
    return GateSchedule(particles=particles, steps=min(4 + length, max(2, int(DESCENT_SHARE * rows * sweep / step))))


def clp_cost(run: PlannedRun) -> Spent:
    """Coarse pricing, descent and race, for one segment. The last two depend on where the descent leads.

    In a step of the descent autograd keeps what every gated layer needs for its backward pass, with the difference that
    the gate scales; of layers on disk their inputs, and what one of them needs at a time. P rows of logits are made at
    once, with a float32 copy and p spread over them.
    """
    shape, kept, schedule = (
        run.shape,
        run.shape.layers - run.length,
        schedule_for(run.shape.layers, run.length, 1, run.searched),
    )
    few, raced = race_work(run, schedule.particles)
    step, descent = descent_cost(run, schedule)
    swept = all_segments_cost(run)
    singles = all_segments(run.length, shape.layers)
    coarse = Work.of(shape, sweep_work(singles, shape.layers, few), heads=few * (kept + 2))
    return Spent(max(step, swept.peak, key=total), coarse + descent + raced)


def descent_cost(run: PlannedRun, schedule: GateSchedule) -> tuple[Peak, Work]:
    """What the descent holds in a step, and computes.

    Args:
        run: what is planned.
        schedule: how many sets descend, for how many steps.

    Returns:
        Peak and work.
    """
    shape, layers, kept = run.shape, run.shape.layers, run.shape.layers - run.length
    p, steps, row = schedule.particles, schedule.steps, shape.stream(1)
    # P streams enter the layers behind the segment, half of the kept ones on average, and up to four at its soft walls
    entered = p * (kept / 2 + 2), 0, p * min(layers, kept + 4)
    back = Bounds(*(steps * n for n in entered))
    forth = back + Bounds.exactly(steps * layers)
    descent = Work.of(shape, forth, back, heads=steps * (2 * p + 1) / HEAD_EVERY)
    inside = p * shape.most("saved") if run.on_disk else entered[0] * shape.mean("saved")
    logits = shape.window * shape.vocabulary
    step = {
        "kept for backward": round(entered[0] * row + inside),
        "streams": 3 * p * row,
        "logits": (p * logits * (shape.itemsize + 8) + logits * 4) // HEAD_EVERY,
    }
    return step, descent


def few_rows(run: PlannedRun) -> int:
    """Rows of the first, coarse pricing: of both kinds where there are tests (`Prices.few`)."""
    return min(run.searched, max(first_rows(run.searched), 4 if run.tests else 2))


def several_cost(run: PlannedRun, count: int) -> Spent:
    """What a search for K segments costs: race and climb by how many layers come behind a set's first segment.

    Args:
        run: what is planned.
        count: K.

    Returns:
        Its cost; the memory is taken as that of the descent, or of the coarse pricing of every single segment.
    """
    shape, layers, length = run.shape, run.shape.layers, run.length
    few, schedule = few_rows(run), schedule_for(layers, length, count, run.searched)
    coarse = max(4 if run.tests else 1, few // 2)
    singles = [DENSE, *((segment,) for segment in all_lengths(length, layers))]
    work = Work.of(shape, set_work(singles, layers, coarse), heads=coarse * len(singles))
    step, descent = descent_cost(run, schedule)
    # "auto" races one proposal a layer, and no moves
    auto = run.config.search.num_segments == "auto"
    moves = (2 * count) ** 2
    racing = (1 if auto else COARSE_SETS) * layers + schedule.particles * (2 if auto else 2 + moves)
    work += descent + raced_work(run, racing, few)
    climbed = raced_work(run, moves + 1, few)
    rounds = Bounds(2 * climbed.layer_forwards.expected, climbed.layer_forwards.least,
                    MOST_CLIMBS * climbed.layer_forwards.most)  # fmt: skip
    work += Work.of(shape, rounds, heads=2 * climbed.head_rows)
    return Spent(max(step, sweep_cost(run, singles).peak, key=total), work)


def raced_work(run: PlannedRun, sets: int, few: int) -> Work:
    """A race of sets of several segments, from the first rows on; how much they share is not known beforehand.

    Args:
        run: what is planned.
        sets: how many race.
        few: rows of the first round.

    Returns:
        The work.
    """
    shape, rows, kept = run.shape, run.searched, run.shape.layers - run.length
    forwards, heads, alive, seen, upto = Bounds(), 0, sets, 0, few
    while True:
        new = upto - seen
        forwards += Bounds(new * (shape.layers + alive * kept / 2), 0, new * (shape.layers + alive * kept))
        heads += new * (alive + 1)
        if upto == rows:
            return Work.of(shape, forwards, heads=heads)
        alive, seen, upto = min(sets, max(FINALISTS, -(-alive // 2))), upto, min(rows, 2 * upto)


def race_work(run: PlannedRun, particles: int) -> tuple[int, Work]:
    """The race among the better half of the coarse pricing and what the descent adds to it.

    Args:
        run: what is planned.
        particles: P, ends of the descent, some of which are in that half, as some of their neighbours are.

    Returns:
        The rows of the coarse pricing, which are not priced again, and the work.
    """
    shape, rows, kept = run.shape, run.searched, run.shape.layers - run.length
    fewest = -(-(kept + 1) // COARSE_SHARE)
    alive = [min(kept + 1, fewest + more) for more in (particles, 0, 5 * particles)]
    few = priced = few_rows(run)
    work, seen = Work(), min(rows, 2 * few)
    while True:
        new = seen - priced
        # behind a segment are 0 to L - n layers, half of them on average
        behind = alive[0] * kept / 2, sum(range(alive[1])), sum(range(kept, kept - alive[2], -1))
        work += Work.of(shape, Bounds(*(new * (shape.layers + n) for n in behind)), heads=new * (alive[0] + 1))
        if seen == rows:
            return few, work
        alive = [min(kept + 1, max(FINALISTS, -(-n // 2))) for n in alive]
        priced, seen = seen, min(rows, 2 * seen)


@costs(clp_cost, prices_itself=True, several=several_cost)
def clp(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    length: int,
    *,
    cost: Cost,
    seed: int = 0,
    num_segments: int = 1,
    objective: str | Objective = "kl",
    probes: ProbeRows | None = None,
    restriction: Restriction | None = None,
    proposals: int | None = None,
    schedule: GateSchedule | None = None,
) -> SearchResult:
    """CLP's concave gate (2510.23652), made safe by a race by the real cut.

    The coarse pricing and the race find the answer: the best segment in every case that was compared with the
    exhaustive search (docs/log.md); no case is known in which the gradient proposed a set that they would have missed.
    The descent is kept short and shows how the loss falls (`SearchResult.path`). With several segments, where not all
    sets can be priced, the coarse pricing proposes, the descent adds where it ends, and race and climb decide.

    Args:
        runner: the dense model.
        tokens: calibration token ids [N, T].
        length: n, layers to remove.
        cost: to which the layer passes are added.
        seed: of the order in which the rows are taken.
        num_segments: K, into how many segments at most.
        objective: what is minimised; the candidates' KL is measured beside it, at no cost of the search's.
        probes: generated tests whose damage is minimised along with the text's loss (`weighted_rows`).
        restriction: of the cuts that may be chosen; not given: none. The descent moves freely; where it ends counts
            only if it is allowed.
        proposals: with several segments, race so many sets before climbing, not those of COARSE_SETS and all moves.
        schedule: of the descent; by `schedule_for` where not given.

    Returns:
        Candidates priced on all tokens, from the best, and the descent's path.
    """
    layers, count, objective = len(runner), num_segments, as_objective(objective)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    prices = Prices(runner, tokens, cost, objective, probes)
    schedule = schedule or schedule_for(layers, length, count, prices.rows)
    limits = restriction or Restriction.none(layers, length)
    with bar(f"gate: {schedule.particles} sets descend", schedule.steps) as advance:
        seeds, coarse = price_coarsely(prices, limits, count, schedule.particles)
        rows, weights = prices.unseen()
        ends, path = descend(
            runner, rows, seeds, schedule, cost, count=count, objective=objective, weights=weights, advance=advance
        )
        moves = (near for end in ends if count == 1 or proposals is None for near in neighbours(end, layers, count))
        proposed = set(filter(limits.allows, (*coarse[:proposals], *seeds, *ends, *moves)))
        if count == 1:  # the coarse pricing has been the race's first round, and has seen every neighbour
            found = race(prices, proposed, begin=2 * prices.few)
        else:
            found = climb(prices, race(prices, proposed), limits, count)
        by_text = beside_text(prices, found, filter(limits.allows, prices.known) if count == 1 else ())
    return SearchResult("clp", found, cost, path, by_text=by_text)


def price_coarsely(prices: Prices, limits: Restriction, count: int, particles: int) -> tuple[list[Cuts], list[Cuts]]:
    """Price single segments on a few rows: with one segment all that are allowed, else all there are.

    Args:
        prices: of the calibration rows.
        limits: n, layers to remove, of L, and the cuts that are allowed.
        count: K, segments.
        particles: P, sets that descend.

    Returns:
        P sets that differ, for the descent to begin at, and those that race whatever the descent finds.

    Raises:
        ConfigError: no cut is allowed.
    """
    layers, length = len(limits.may), limits.length
    if count == 1:
        ranked = prices.ranked([(segment,) for segment in limits.needed_segments()], prices.few)
        return spread(ranked, particles), ranked[: -(-len(ranked) // COARSE_SHARE)]
    rows = max(1 if prices.weights is None else 4, prices.few // 2)  # both kinds of rows, where there are tests
    singles = all_lengths(length, layers)
    costs = prices.weighted.mean(prices.of([(segment,) for segment in singles], rows)).tolist()
    ranked = cheapest_sums(dict(zip(singles, costs, strict=True)), limits, count)
    if not ranked:
        limits.needed_segments()  # raises: a single segment would have been among them
    return spread(ranked, particles), ranked[: COARSE_SETS * layers]


def cheapest_sums(costs: dict[Segment, float], limits: Restriction, count: int) -> list[Cuts]:
    """Allowed sets of `count` segments at most with n layers in all, by the sum of their single costs.

    Beam search by dynamic programming: for every number of layers removed and every place where the last segment may
    end, the BEAM cheapest whose kept layers so far stand where they may. What segments do to each other is left to the
    gate and the race.

    Args:
        costs: the price of each segment removed alone.
        limits: n, layers to remove, of L, and the cuts that are allowed.
        count: K.

    Returns:
        Sets from the lowest sum.
    """
    layers, length = len(limits.may), limits.length
    # best[m, e]: sets of m layers that end at e or before; each round of the loop adds one segment
    best: dict[tuple[int, int], Sums] = {(0, e): [(0.0, ())] for e in range(layers + 1) if limits.keeps(0, e, 0)}
    found: dict[Cuts, float] = {}
    for _ in range(count):
        ending: dict[tuple[int, int], Sums] = {}
        for segment, cost in costs.items():
            for m in range(length - len(segment) + 1):
                # at least one kept layer between two segments, or they would be one
                if m and not limits.keeps(segment.start - 1, segment.start, m):
                    continue
                before = best.get((m, segment.start - 1 if m else segment.start), [])
                sums = [(total + cost, (*cuts, segment)) for total, cuts in before]
                ending.setdefault((m + len(segment), segment.stop), []).extend(sums)
        for m in range(1, length + 1):
            for e in range(1, layers + 1):
                kept = best.get((m, e - 1), []) if limits.may_keep(e - 1, m) else []
                options = {*best.get((m, e), []), *kept, *ending.get((m, e), [])}
                best[m, e] = nsmallest(BEAM, options)
        for e in range(1, layers + 1):
            found |= {cuts: total for total, cuts in best[length, e]}
        for sums in (sums for (m, _), sums in ending.items() if m == length):
            found |= {cuts: total for total, cuts in nsmallest(BEAM, sums)}
    return sorted(filter(limits.allows, found), key=lambda cuts: (found[cuts], cuts))


def climb(prices: Prices, found: list[Candidate], limits: Restriction, count: int) -> list[Candidate]:
    """Race the one-layer moves of the best candidate against it until none is better.

    Args:
        prices: of the calibration rows.
        found: candidates priced on all rows, from the best.
        limits: the cuts that are allowed.
        count: K.

    Returns:
        These candidates and all that the races priced on all rows, from the best, which is the best of its neighbours
        as far as a race on these tokens can tell.
    """
    best = found[0].segments
    known = {candidate.segments: candidate for candidate in found}
    for _ in range(MOST_CLIMBS):
        moves = filter(limits.allows, neighbours(best, len(limits.may), count))
        known |= {candidate.segments: candidate for candidate in race(prices, {best, *moves})}
        ordered = sorted(known.values(), key=merit)
        if ordered[0].segments == best:
            break
        best = ordered[0].segments
    return sorted(known.values(), key=merit)
