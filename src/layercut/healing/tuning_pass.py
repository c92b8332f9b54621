"""Forward and backward passes of endpoint tuning, and the score of held-out rows.

Dense teacher and cut student share every hidden state below the first trained layer, so the prefix runs once and
without gradients. Logits exist for a piece of the tokens at a time, in float32 for a few of these: vocabulary-sized
tensors are the largest there are.

B rows of T tokens in a pass, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from layercut.distributed import processes, sharding
from layercut.healing.inputs import Batch, Rows
from layercut.models.losses import NextToken, Objective, not_finite
from layercut.models.memory import slices
from layercut.models.runner import DecoderRunner, carry_, common_prefix, enter_all


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dense model and its cut copy, equal below `prefix`, and what the copy is trained for."""

    dense: DecoderRunner
    student: DecoderRunner
    prefix: int  # the first trained layer, or one below it
    objective: Objective
    apart: bool = False  # whether nothing is shared, not even the embeddings; `prefix` is 0 then

    def backward(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """Add the gradient of weight x the mean loss of each batch, in turn, to the trained parameters."""
        for batch in batches:
            out, dense = self.forward(batch.tokens)
            with self.student.head_once():
                loss, gradient = loss_gradient(self, batch, out, dense)
            out.backward(gradient)
            yield loss

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What leaves the last layer of the student, and of the dense model where it is needed, for tokens [B, T]."""
        dense, student, last = self.dense, self.student, None
        if self.apart:
            with torch.no_grad():
                if self.objective.needs_dense:
                    last = dense.run(*dense.enter(tokens), 0, len(dense))
            return student.run(*student.enter(tokens), 0, len(student)), last
        with torch.no_grad():
            if self.objective.needs_dense:
                shared, dense_calls, calls = common_prefix(dense, student, tokens, self.prefix)
                last = dense.run(shared, dense_calls, self.prefix, len(dense))
            else:
                hidden, calls = student.enter(tokens)
                shared = student.run(hidden, calls, 0, self.prefix)
        return student.run(shared, calls, self.prefix, len(student)), last


def loss_gradient(
    pair: Pair, batch: Batch, out: torch.Tensor, dense: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight x the mean loss of what leaves the student's layers, in parts, and its gradient there [B, T, D]."""
    student, budget, window = pair.student, pair.student.budget, batch.tokens.shape[1]
    scale = torch.tensor(batch.weight / batch.tokens.numel())
    # weights for a mean over T tokens: of a row's T - 1 predictions each counts more
    terms = [(w * (window / (window - 1) if each.per_target else 1.0), each) for w, each in pair.objective.terms()]
    of_all, shape, counted = sum(w for w, _ in terms), out.shape, batch.counted
    tokens, targets = batch.tokens, next_tokens(student.place(batch.tokens))
    given = [batch.token_weights, batch.answers]
    if counted is not None:  # a prompt and padding, which weigh nothing, need no logits
        places = counted

        def counting(each: torch.Tensor) -> torch.Tensor:
            return each.flatten(0, 1)[places.to(each.device)][None]

        out, tokens, targets = counting(out), counting(tokens), counting(targets)
        dense, *given = (x if x is None else counting(x) for x in (dense, *given))
    parts, gradient = list[torch.Tensor](), torch.empty_like(out)
    pieces = list(budget.logit_pieces(len(tokens), tokens.shape[1], student.vocabulary * out.element_size()))
    for piece, counts in sharding.in_step(student.model, pieces, pieces[0]):
        leaf = out[piece].detach().requires_grad_(True)  # [b, t, D]: the graph of the head ends here
        logits = student.exit(leaf, tokens[piece])  # [b, t, V]
        z, slope = logits.detach().flatten(0, 1), torch.empty_like(logits).flatten(0, 1)
        with torch.no_grad():
            p = None if dense is None else pair.dense.exit(dense[piece], tokens[piece]).flatten(0, 1)
        following, weights, answers = (x if x is None else x[piece].flatten() for x in (targets, *given))
        assert following is not None
        total = torch.zeros((), device=z.device)
        for part in slices(len(z), budget.float_tokens(z.shape[-1])):
            q, some = z[part].float().requires_grad_(True), None if p is None else p[part].float()
            losses = torch.stack([w * each.loss(q, some, following[part]) for w, each in terms]).sum(0)
            if answers is not None:
                known = of_all * NextToken().loss(q, None, following[part])
                losses = torch.where(answers[part], known, losses)
            loss = (losses if weights is None else losses * weights[part]).sum()
            (slope[part],) = torch.autograd.grad(loss, q, scale.to(loss))
            total += loss.detach()
        logits.backward(slope.view_as(logits))  # through the head only, down to `leaf`
        assert leaf.grad is not None
        if counts:
            parts.append(total)
            gradient[piece] = leaf.grad
    if counted is not None:
        of_counted, gradient = gradient, gradient.new_zeros(shape)
        gradient.flatten(0, 1)[counted.to(gradient.device)] = of_counted[0]
    return torch.stack(parts) * scale, gradient


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """What each token is to predict, -1 at the end of a row: [B, T] -> [B, T]."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)


@dataclass(frozen=True)
class HeldRows:
    """Held-out rows [B, T] with what stays as it is while the student is tuned."""

    tokens: torch.Tensor
    weights: torch.Tensor | None  # of the loss of predicting the token after each [B, T]; None: 1
    counts: bool  # whether they are this process's own, and not run to keep in step with others
    final: torch.Tensor  # the dense h_L [B, T, D]
    shared: torch.Tensor  # h at `prefix` [B, T, D]

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, rows: int) -> list[HeldRows]:
        """As of a tensor: so many rows each."""
        parts = zip(*(x.split(rows) for x in (self.tokens, self.final, self.shared)), strict=True)
        weights = iter(self.weights.split(rows)) if self.weights is not None else repeat(None)
        return [HeldRows(tokens, next(weights), self.counts, final, shared) for tokens, final, shared in parts]


class HeldOut:
    """Rows that judge a student during tuning. What stays as it is from score to score is computed once.

    That is h at `prefix` and the dense h at the end, in the model's own dtype: 2 D numbers a token. Of several
    processes each takes a share of the rows; the score is over all. In memory some rows are scored after the other,
    fewer at once where memory runs out; of layers on disk all go through a layer together.
    """

    def __init__(self, pair: Pair, held: Rows, rows: int) -> None:
        self.pair, self.tokens, self.weights = pair, held.tokens, held.token_weights
        tokens = self.tokens
        parts = sharding.in_step(pair.student.model, processes.share_of_batches(len(tokens), rows), slice(0, 1))
        self.groups: list[list[HeldRows]] = []
        queue = pair.dense.parts("tune", [parts] if pair.student.on_disk else [[part] for part in parts])
        for group in queue:
            with queue.trying(group):
                self.groups.append(self._held(group))

    @torch.no_grad()
    def _held(self, parts: Sequence[tuple[slice, bool]]) -> list[HeldRows]:
        dense, student, prefix = self.pair.dense, self.pair.student, self.pair.prefix
        batches = [student.place(self.tokens[part]) for part, _ in parts]
        hidden, calls = enter_all(dense, batches)
        carry_(dense, hidden, calls, 0, prefix)
        shared = enter_all(student, batches)[0] if self.pair.apart else list(hidden)
        carry_(dense, hidden, calls, prefix, len(dense))
        for batch, final in zip(batches, hidden, strict=True):
            if not (finite := final.isfinite().flatten(1).all(1)).all():
                row = int((~finite).nonzero()[0])
                raise not_finite(dense, batch[row : row + 1])
        counts = [counts for _, counts in parts]
        weights = [None if self.weights is None else student.place(self.weights[part].float()) for part, _ in parts]
        return [HeldRows(*each) for each in zip(batches, weights, counts, hidden, shared, strict=True)]

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """The mean loss over all held-out tokens, "loss", and of a mixture each term by its name; in nats."""
        terms, sums = self.pair.objective.terms(), list[torch.Tensor]()  # of each piece the loss by each term
        queue, done = self.pair.student.parts("tune", self.groups), list[list[HeldRows]]()
        for group in queue:
            with queue.trying(group), self.pair.student.head_once():
                sums += self._losses(group, [term for _, term in terms])
                done.append(group)
        self.groups = done
        read = torch.stack(sums).tolist() if sums else []  # the host waits here alone
        found = processes.summed([sum(piece[i] for piece in read) for i in range(len(terms))])
        weights = torch.ones(self.tokens.shape) if self.weights is None else self.weights
        counts = [float((weights[:, :-1] if term.per_target else weights).double().sum()) for _, term in terms]
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
                p: Any = None
                q, following = student.exit(out[piece], batch[piece]).flatten(0, 1), targets[piece].flatten()
                weights = None if rows.weights is None else rows.weights[piece].flatten()
                if pair.objective.needs_dense:
                    p = pair.dense.exit(rows.final[piece], batch[piece]).flatten(0, 1)
                if not (rows.counts and counts):
                    continue
                totals = torch.zeros(len(terms), device=q.device)
                for part in slices(len(q), budget.float_tokens(q.shape[-1])):
                    z, dense = q[part].float(), None if p is None else p[part].float()
                    losses = torch.stack([term.loss(z, dense, following[part]) for term in terms])
                    totals += (losses if weights is None else losses * weights[part]).sum(1)
                sums.append(totals)
        return sums
