"""The exhaustive search: the exact cost of every segment, or of any sets of segments, in one sweep through the stack.

Carry the dense stream h_0, h_1, … through the layers once. At depth s fork a stream that jumps over the segment:
what enters layer s + n is h_s. Layer j then serves the dense stream and every fork already past its jump, so that
all L - n + 1 candidates cost about half of running each in full, and each layer is entered once. A set of several
segments forks at each of them; sets that begin with the same segments share a stream until they part.

Of a model on disk each layer is read once, for all rows; that needs the streams of all rows at once, about L - n + 2 of
them, N T D numbers each.

Several processes run a share of the rows each, all sets on every row; the sums are over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from layercut.distributed import processes, sharding
from layercut.layer_search.result import Candidate, Cost
from layercut.models.losses import as_cost, next_token_loss, teacher_of
from layercut.models.memory import slices
from layercut.models.runner import Calls, DecoderRunner, passes_in_step
from layercut.segments import Segment

Cuts = tuple[Segment, ...]  # segments removed together, sorted and disjoint. The empty tuple is the dense model

DENSE: Cuts = ()


def set_costs(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    sets: Iterable[Cuts],
    cost: Cost,
    *,
    rows: int | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[Candidate]:
    """KL(p || q) of each set of segments cut out together, from the best."""
    sets = list(dict.fromkeys(sets))

    def kl(ends: Mapping[Cuts, torch.Tensor], chunk: torch.Tensor) -> list[torch.Tensor]:
        teacher = teacher_of(stack, ends[DENSE], chunk)  # p [rows, T, V], for all sets
        return [teacher.kl(stack.exit(ends[cuts], chunk)).sum() for cuts in sets]

    totals = _sums(stack, tokens, [DENSE, *sets], len(sets), kl, cost, rows, advance)
    found = [Candidate(cuts, as_cost(kl / tokens.numel(), 0.0)) for cuts, kl in zip(sets, totals, strict=True)]
    return sorted(found, key=lambda candidate: (candidate.kl, candidate.segments))


def set_losses(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    sets: Iterable[Cuts],
    cost: Cost,
    *,
    rows: int | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> dict[Cuts, float]:
    """Next-token loss without each set of segments; the dense stream is carried only as far as the last fork."""
    sets = list(dict.fromkeys(sets))

    def losses(ends: Mapping[Cuts, torch.Tensor], chunk: torch.Tensor) -> list[torch.Tensor]:
        return [next_token_loss(stack.exit(ends[cuts], chunk), chunk).sum() for cuts in sets]

    totals = _sums(stack, tokens, sets, len(sets), losses, cost, rows, advance)
    predictions = tokens.numel() - len(tokens)
    return {cuts: as_cost(loss / predictions) for cuts, loss in zip(sets, totals, strict=True)}


@torch.no_grad()
def _sums(
    stack: DecoderRunner,
    tokens: torch.Tensor,
    wanted: Sequence[Cuts],
    values: int,
    of_chunk: Callable[[Mapping[Cuts, torch.Tensor], torch.Tensor], list[torch.Tensor]],
    cost: Cost,
    rows: int | None,
    advance: Callable[[int], None],
) -> list[float]:
    """The sums over all rows of what is found of the ends of a sweep, some rows at a time."""
    totals, spent, tokens = [0.0] * values, Cost(), stack.place(tokens)
    window = tokens.shape[1]
    rows = rows or stack.budget.swept_rows(window, stack.stream_bytes(window), len(wanted))
    queue = stack.parts("search", passes_in_step(stack, tokens, rows, streams_held(wanted, len(stack))))
    for one in queue:
        with queue.trying(one):
            (batches, counts), own = one, Cost()
            ends = sweep(stack, batches, wanted, own, advance)
            found: list[torch.Tensor] = []  # of each chunk [values], read at the end
            for b, batch in enumerate(batches):
                for part, chunk_counts in row_chunks(stack, batch):
                    some = of_chunk({cuts: streams[b][part] for cuts, streams in ends.items()}, batch[part])
                    found += [torch.stack(some)] if some and chunk_counts else []
                own.dense_tokens += batch.numel() * (DENSE in ends)
            if counts:
                for chunk in torch.stack(found).tolist() if found else []:
                    totals = [total + value for total, value in zip(totals, chunk, strict=True)]
                spent += own
    cost.add_(spent)
    return processes.summed(totals)


def all_segments(length: int, layers: int) -> list[Segment]:
    """The L - n + 1 segments of one length."""
    return [Segment(start, start + length) for start in range(layers - length + 1)]


def all_lengths(longest: int, layers: int) -> list[Segment]:
    """Every segment of 1 … `longest` layers."""
    return [segment for length in range(1, longest + 1) for segment in all_segments(length, layers)]


def set_work(sets: Iterable[Cuts], layers: int, rows: int) -> int:
    """Layer-forwards of a sweep: every stream from its last jump to where no set needs it any more."""
    reach = _reach(sets, layers)
    return rows * sum(max(0, stop - _entry(cuts)) for cuts, stop in reach.items())


def sweep(
    stack: DecoderRunner,
    batches: Sequence[torch.Tensor],
    sets: Sequence[Cuts],
    cost: Cost,
    advance: Callable[[int], None] = lambda layers: None,
) -> dict[Cuts, list[torch.Tensor]]:
    """Hidden states after the last layer with each set of segments skipped.

    Layers outermost: each is entered once, for all batches. A stream is named by the segments it has jumped over
    so far, and freed when no set needs it any more.
    """
    wanted, reach = set(sets), _reach(sets, len(stack))
    # hidden states [B, T, D] of each batch, by the segments that the stream has jumped over
    streams: dict[Cuts, list[torch.Tensor]] = {DENSE: []}
    calls: list[Calls] = []
    for hidden, arguments in map(stack.enter, batches):
        streams[DENSE].append(hidden)
        calls.append(arguments)
        del hidden
    rows = sum(map(len, batches))
    for j in range(len(stack)):
        for cuts in sorted(reach, key=len):  # of two segments side by side, the second forks from the first
            if cuts and cuts[-1].start == j:
                streams[cuts] = streams[cuts[:-1]]
        # a stream past its last fork is freed, unless it is an answer
        streams = {cuts: h for cuts, h in streams.items() if reach[cuts] > j or cuts in wanted}
        # one that jumps over layer j waits: it enters at the end of its segment
        entered = [cuts for cuts in streams if _entry(cuts) <= j < reach[cuts]]
        for cuts in entered:
            streams[cuts] = [stack.layer(j, h, c) for h, c in zip(streams[cuts], calls, strict=True)]
        cost.layer_forwards += len(entered) * rows
        advance(len(entered) * rows)
    return {cuts: streams[cuts] for cuts in wanted}


def streams_held(sets: Iterable[Cuts], layers: int) -> int:
    """The most hidden states of all tokens that `sweep` holds at once: one a stream, one more while it is replaced.

    Streams that wait to land after jumps from the same place hold one and the same state.
    """
    wanted = set(sets)
    reach = _reach(wanted, layers)
    most = 1
    for j in range(layers):
        alive = [cuts for cuts in reach if not cuts or cuts[-1].start <= j]
        alive = [cuts for cuts in alive if reach[cuts] > j or cuts in wanted]
        states = {(cuts, 0) if _entry(cuts) <= j else (cuts[:-1], cuts[-1].start) for cuts in alive}
        most = max(most, len(states) + 1)
    return most


def _reach(sets: Iterable[Cuts], layers: int) -> dict[Cuts, int]:
    """Every stream of a sweep, and the depth to which it must be carried: its last fork, or the end."""
    reach = {DENSE: 0}
    for cuts in sets:
        for k, segment in enumerate(cuts):
            reach[cuts[:k]] = max(reach.get(cuts[:k], 0), segment.start)
        reach[cuts] = layers
    return reach


def _entry(cuts: Cuts) -> int:
    """The first layer that a stream enters after its last jump."""
    return cuts[-1].stop if cuts else 0


def row_chunks(stack: DecoderRunner, tokens: torch.Tensor) -> list[tuple[slice, bool]]:
    """Rows whose logits are computed together, so that [rows, T, V] fits in memory."""
    rows = stack.budget.logit_rows(tokens.shape[1], stack.vocabulary)
    return sharding.in_step(stack.model, list(slices(len(tokens), rows)), slice(0, 1))
