"""One forward and backward pass of endpoint tuning for a few rows of tokens, and the score of held-out rows.

Between the loop (`endpoint_tuning.py`) and the loss (`models/objectives.py`). Dense teacher and cut student share
every hidden state below the first trained layer, so the prefix runs once and without gradients. From the logits down
the gradient is written out by hand, piece by piece: vocabulary-sized tensors are the largest there are.

B rows of T tokens in a pass, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from layercut.distributed import processes, sharding
from layercut.models.memory import slices
from layercut.models.objectives import KL, NextToken, Objective
from layercut.models.passes import carry_, common_prefix, enter_all, not_finite
from layercut.models.runner import DecoderRunner


class Batch(NamedTuple):
    """Rows of one pass."""

    tokens: torch.Tensor
    """Ids [B, T]."""
    rows: torch.Tensor
    """Of which of the rows that are tuned on each is a part [B]."""
    starts: torch.Tensor
    """Where in that row it begins [B]."""
    weight: float
    """Of their mean loss in the step's."""
    token_weights: torch.Tensor | None = None
    """[B, T], by what the loss at each token is multiplied; None: by 1."""
    answers: torch.Tensor | None = None
    """bool [B, T], where the next-token loss alone counts; None: nowhere."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dense model and its cut copy, equal below `prefix`, and what the copy is trained for."""

    dense: DecoderRunner
    student: DecoderRunner
    prefix: int
    """The first trained layer."""
    last: int
    """The last trained layer, counted in the student."""
    objective: Objective = field(default_factory=KL)
    apart: bool = False
    """Whether nothing is shared, not even the embeddings; `prefix` is 0 then."""

    @property
    def student_stop(self) -> int:
        """How many layers of the student are run: all."""
        return len(self.student)

    @property
    def dense_stop(self) -> int | None:
        """The dense layers that correspond; None where the objective compares with no dense model."""
        removed = len(self.dense) - len(self.student)
        return self.student_stop + removed if self.objective.needs_dense else None

    def backward(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """Add the gradient of weight x the mean loss of each batch, in turn, to the trained parameters."""
        for batch in batches:
            out, wanted = self.forward(batch.tokens)
            with self.student.head_once():
                loss, gradient = loss_gradient(self, batch, out, wanted)
            out.backward(gradient)
            yield loss

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What leaves the student's layers that are run, and the dense model's where needed, for tokens [B, T]."""
        if self.apart:
            wanted = None
            if self.dense_stop is not None:
                with torch.no_grad():
                    wanted = self.dense.run(*self.dense.enter(tokens), 0, self.dense_stop)
            return self.student.run(*self.student.enter(tokens), 0, self.student_stop), wanted
        with torch.no_grad():
            if self.dense_stop is None:
                hidden, calls = self.student.enter(tokens)
                shared, wanted = self.student.run(hidden, calls, 0, self.prefix), None
            else:
                shared, dense_calls, calls = common_prefix(self.dense, self.student, tokens, self.prefix)
                wanted = self.dense.run(shared, dense_calls, self.prefix, self.dense_stop)
        return self.student.run(shared, calls, self.prefix, self.student_stop), wanted


def loss_gradient(
    pair: Pair, batch: Batch, out: torch.Tensor, wanted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight x the mean loss of what leaves the student's layers, and its gradient there."""
    tokens, counted, answers, student = batch.tokens, batch.token_weights, batch.answers, pair.student
    targets, scale = next_tokens(student.place(tokens)), torch.tensor(batch.weight / tokens.numel())
    terms = terms_per_token(pair.objective, tokens.shape[1])
    parts, gradient = list[torch.Tensor](), torch.empty_like(out)
    budget = student.budget
    pieces = list(budget.logit_pieces(len(tokens), tokens.shape[1], student.vocabulary * out.element_size()))
    for piece, counts in sharding.in_step(student.model, pieces, pieces[0]):
        leaf = out[piece].detach().requires_grad_(True)  # [b, t, D]: the graph of the head ends here
        logits = student.exit(leaf, tokens[piece])  # [b, t, V]
        with torch.no_grad():
            z, following = logits.detach().flatten(0, 1), targets[piece]
            p = None if wanted is None else pair.dense.exit(wanted[piece], tokens[piece]).flatten(0, 1)
            slope, loss = torch.empty_like(z), torch.zeros((), device=z.device)  # dloss/dz [M, V]
            for part in slices(len(z), budget.float_tokens(z.shape[-1])):  # float32 exists for a few tokens at a time
                some = None if p is None else p[part]
                weights = None if counted is None else counted[piece].flatten()[part]
                given = None if answers is None else answers[piece].flatten()[part]
                summed, slope[part] = _slope_of(
                    z[part], some, following.flatten()[part], scale, terms, weights, given
                )
                loss += summed
        logits.backward(slope.view_as(logits))  # through the head only, down to `leaf`
        assert leaf.grad is not None
        if counts:
            parts.append(loss)
            gradient[piece] = leaf.grad
    return torch.stack(parts) * scale, gradient


def _slope_of(
    logits: torch.Tensor,
    dense: torch.Tensor | None,
    targets: torch.Tensor,
    scale: torch.Tensor,
    terms: list[tuple[float, Objective]],
    weights: torch.Tensor | None,
    answers: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted losses of a student's logits [M, V], summed, and scale x their gradient in float32 [M, V].

    dense: the dense model's logits [M, V]; None where the objective needs none.
    weights: by what a token's loss is multiplied [M]; None: by 1.
    answers: bool [M], where the next-token loss has the shares of all terms; None: nowhere.
    """
    q, p = logits.detach().float().requires_grad_(True), None if dense is None else dense.float()
    with torch.enable_grad():
        found = [share * term.loss(q, p, targets) for share, term in terms]
        losses = torch.stack(found).sum(0) if len(found) > 1 else found[0]
        if answers is not None:
            shares = sum(share for share, _ in terms)
            losses = torch.where(answers, shares * NextToken().loss(q, None, targets), losses)
        summed = (losses if weights is None else losses * weights).sum()
        (slope,) = torch.autograd.grad(summed, q, scale)
    return summed.detach(), slope


def terms_per_token(objective: Objective, window: int) -> list[tuple[float, Objective]]:
    """The objective's terms with weights for a mean over T tokens: of a row's T - 1 predictions each counts more."""
    return [(share * (window / (window - 1) if term.per_target else 1.0), term) for share, term in objective.terms()]


def dense_states(pair: Pair, batches: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The dense hidden states at the end, and those at `prefix`, which the student shares."""
    with torch.no_grad():
        hidden, calls = enter_all(pair.dense, batches)
        carry_(pair.dense, hidden, calls, 0, pair.prefix)
        shared = enter_all(pair.student, batches)[0] if pair.apart else list(hidden)
        carry_(pair.dense, hidden, calls, pair.prefix, len(pair.dense))
    return list(zip(hidden, shared, strict=True))


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """What each token is to predict, -1 at the end of a row: [B, T] -> [B, T]."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)


@dataclass(frozen=True)
class HeldRows:
    """Held-out rows [B, T] with what stays as it is while the student is tuned."""

    tokens: torch.Tensor
    counts: bool
    """Whether they are this process's own, and not run to keep in step with others."""
    final: torch.Tensor
    """The dense h_L [B, T, D]."""
    shared: torch.Tensor
    """h at `prefix` [B, T, D]."""

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, rows: int) -> list[HeldRows]:
        """As of a tensor: so many rows each."""
        parts = zip(*(x.split(rows) for x in (self.tokens, self.final, self.shared)), strict=True)
        return [HeldRows(tokens, self.counts, final, shared) for tokens, final, shared in parts]


class HeldOut:
    """Rows that judge a student during tuning. What stays as it is from score to score is computed once.

    That is h at `prefix` and the dense h at the end, in the model's own dtype: 2 D numbers a token. Of several
    processes each takes a share of the rows; the score is over all. In memory some rows are scored after the other,
    fewer at once where memory runs out; of layers on disk all go through a layer together.
    """

    def __init__(self, pair: Pair, tokens: torch.Tensor, rows: int) -> None:
        self.pair, self.tokens, self.objective = pair, tokens, pair.objective
        parts = sharding.in_step(pair.student.model, processes.share_of_batches(len(tokens), rows), slice(0, 1))
        self.groups: list[list[HeldRows]] = []
        queue = pair.dense.parts("tune", self._together(parts))
        for group in queue:
            with queue.trying(group):
                batches = [pair.student.place(tokens[part]) for part, _ in group]
                states = dense_states(pair, batches)
                for batch, (final, _) in zip(batches, states, strict=True):
                    if not (finite := final.isfinite().flatten(1).all(1)).all():
                        row = int((~finite).nonzero()[0])
                        raise not_finite(pair.dense, batch[row : row + 1])
                counted = zip(batches, group, states, strict=True)
                self.groups.append([HeldRows(batch, mine, *found) for batch, (_, mine), found in counted])

    def _together(self, parts: list[Any]) -> list[list[Any]]:
        return [parts] if self.pair.student.on_disk else [[part] for part in parts]

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """The mean of the objective's `judge` over all held-out tokens; in nats, where that is a loss of logits."""
        terms, sums = self.objective.terms(), list[torch.Tensor]()  # of each piece the loss by each term
        queue, done = self.pair.student.parts("tune", self.groups), list[list[HeldRows]]()
        for group in queue:
            with queue.trying(group), self.pair.student.head_once():
                sums += self._losses(group, [term for _, term in terms])
                done.append(group)
        self.groups = done
        read = torch.stack(sums).tolist() if sums else []  # the host waits here alone
        found = processes.summed([sum(piece[i] for piece in read) for i in range(len(terms))])
        tokens, ends = self.tokens.numel(), len(self.tokens)
        counts = [tokens - ends if term.per_target else tokens for _, term in terms]
        means = [loss / count for loss, count in zip(found, counts, strict=True)]
        mean = sum(share * each for (share, _), each in zip(terms, means, strict=True))
        by_name = {term.name: each for (_, term), each in zip(terms, means, strict=True)}
        return {"loss": mean} | (by_name if len(terms) > 1 else {})

    def _losses(self, group: Sequence[HeldRows], terms: Sequence[Objective]) -> list[torch.Tensor]:
        """The loss by each term [n] of each piece of these rows, summed over its tokens."""
        pair, sums = self.pair, list[torch.Tensor]()
        student, budget = pair.student, pair.student.budget
        outs = [rows.shared for rows in group]
        carry_(student, outs, [student.arguments(rows.tokens) for rows in group], pair.prefix, len(student))
        for rows, out in zip(group, outs, strict=True):
            batch, targets = rows.tokens, next_tokens(rows.tokens)
            pieces = list(budget.logit_pieces(len(batch), batch.shape[1], student.vocabulary * out.element_size()))
            for piece, counts in sharding.in_step(student.model, pieces, pieces[0]):
                q, p = student.exit(out[piece], batch[piece]).flatten(0, 1), None
                if self.objective.needs_dense:
                    p = pair.dense.exit(rows.final[piece], batch[piece]).flatten(0, 1)
                if rows.counts and counts:
                    following = targets[piece].flatten()
                    together = budget.float_tokens(q.shape[-1])
                    sums.append(torch.stack([_summed(term, q, p, following, together) for term in terms]))
        return sums


def _summed(
    term: Objective, q: torch.Tensor, p: torch.Tensor | None, targets: torch.Tensor, together: int
) -> torch.Tensor:
    """The loss of logits [M, V], summed; float32 exists for a few tokens at a time, `together`."""
    total = torch.zeros((), device=q.device)
    for part in slices(len(q), together):
        total += term.loss(q[part].float(), None if p is None else p[part].float(), targets[part]).sum()
    return total
