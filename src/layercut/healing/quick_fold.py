"""What cuts cost once each has a quick fold: nearer to the cost after healing, for a search.

The cost of a plain cut is that of a model that nobody will use. Of SmolLM2's pairs of segments this one tells the good
from the bad where plain costs do not, but not neighbours from each other (measured). It is the fold of
`least_squares.py` made cheap: of the layer before a cut the last projection alone, the dense states computed once for
all cuts:

    h_e ~ h + z X,    X = (Z'Z + ridge I)^-1 Z'Y,    Y = h_e - h

h is what leaves layer s - 1, z what its last linear output reads. No weight is changed: z X is added to the stream, and
behind a norm what the norm makes of it more (`normalised.py`).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from layercut.healing.least_squares import take_turns_
from layercut.healing.linear_outputs import LinearOutput, find_targets, norms_of, run_and_catch
from layercut.healing.normal_equations import Normal, add_split_, kept_out
from layercut.healing.normalised import Alternation, Branch, FoldBatch
from layercut.models.losses import as_cost, teacher_of
from layercut.models.memory import place_of_float64, slices
from layercut.models.runner import DecoderRunner, carry_, enter_all
from layercut.segments import Segment

RIDGES = (1e-3, 1e-1)
"""Relative ridges that are tried on rows kept out. Of few tokens for many unknowns the larger is better."""
IN_MEMORY = 2**30  # bytes of the dense model's states, of either kind of rows, beyond which they are kept in a file
QUICK_STEPS = 3  # turns behind a norm, at most

Leaving = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""h after a layer, what its target reads or puts out, and what the norm behind that reads, or h again."""


def has_fold(dense: DecoderRunner, tokens: torch.Tensor) -> bool:
    """Whether any layer that a cut may follow has something to solve again."""
    return any(find_targets(dense, position, tokens[:2, :32]) for position in range(len(dense) - 1))


class FoldCosts:
    """Costs of sets of segments after a quick fold of each cut; the dense model's states are computed once."""

    @torch.no_grad()
    def __init__(
        self,
        dense: DecoderRunner,
        fit: torch.Tensor,
        judged: torch.Tensor,
        weights: torch.Tensor | None = None,
        folder: Path | None = None,
    ) -> None:
        """Run the dense model on all rows; its states are kept in the host's memory, L + 1 of each row."""
        self.dense, self.targets = dense, dict[int, LinearOutput | None]()
        self.probing = fit[:2, :32]
        even = torch.full(judged.shape, 1 / judged.shape[1])
        self.weights = (even if weights is None else weights).float()
        at_once = [dense.budget.layer_rows(fit.shape[1]), dense.budget.logit_rows(judged.shape[1], dense.vocabulary)]
        self.fit, self.judged = _Rows(dense, fit, at_once[0], folder), _Rows(dense, judged, min(at_once), folder)

    @property
    def dense_tokens(self) -> int:
        """Tokens that went through the whole dense model."""
        return self.fit.tokens.numel() + self.judged.tokens.numel()

    @property
    def layer_forwards(self) -> int:
        """Layers applied to rows since."""
        return self.fit.forwards + self.judged.forwards

    @torch.no_grad()
    def __call__(self, cuts: Sequence[Segment]) -> float:
        """The cost of segments removed together, in nats per token."""
        cuts, dense = sorted(cuts), self.dense
        at = max(cuts[0].start - 1, 0)
        fit, judged = self.fit.states(at), self.judged.states(at)
        for number, segment in enumerate(cuts):
            for rows, states in ((self.fit, fit), (self.judged, judged)):
                rows.carry_(states, at, segment.start - 1)
            if segment.start:
                self._cross_(segment, fit, judged, last=number == len(cuts) - 1)
            at = segment.stop
        self.judged.carry_(judged, at, len(dense))
        return as_cost(sum(map(self._cost, range(len(judged)), judged)) / len(self.weights))

    def _cross_(self, segment: Segment, fit: list[torch.Tensor], judged: list[torch.Tensor], *, last: bool) -> None:
        """Run layer s - 1, and add what stands for the segment; of the rows to fit nothing is needed after the last."""
        position = segment.start - 1
        if position not in self.targets:
            self.targets[position] = next(reversed(find_targets(self.dense, position, self.probing)), None)
        target = self.targets[position]
        if target is None:
            for rows, states in ((self.fit, fit), (self.judged, judged)):
                rows.carry_(states, position, segment.start)
            return
        left = list(self.fit.leaving(fit, position, target))
        x = self._solved_in_turns(segment, left, target) if target.norm else self._solved(segment, left)
        judged[:] = [_with(*each, x) for each in self.judged.leaving(judged, position, target)]
        if not last:
            fit[:] = [_with(*each, x) for each in left]

    def _solved_in_turns(self, segment: Segment, left: Sequence[Leaving], target: LinearOutput) -> Branch | None:
        """What a norm's input and its gain become; None where a sum is not finite."""

        def batches() -> Iterator[FoldBatch]:
            for (out, *read), part in zip(left, self.fit.parts, strict=True):
                wanted, held = self.fit.kept[segment.stop, part].to(out.device), kept_out(part)
                z, u, out, wanted = (each.flatten(0, 1) for each in (*read, out, wanted))
                yield FoldBatch(z, [u], out, wanted, held.repeat_interleave(self.fit.tokens.shape[1]))

        turns = Alternation([target], self.dense.hidden_size, batches, place_of_float64(left[0][0].device))
        return turns.branches[0] if take_turns_(turns, RIDGES, RIDGES[-1:], QUICK_STEPS) else None

    def _solved(self, segment: Segment, left: Sequence[Leaving]) -> torch.Tensor | None:
        """X [I, D] of what leaves layer s - 1 and what its target reads, by batch; None where a sum is not finite."""
        solved, check = (Normal.zeros(left[0][1].shape[-1], self.dense.hidden_size, left[0][0].device) for _ in "ab")
        for batch, (out, z, _) in enumerate(left):
            part = self.fit.parts[batch]
            add_split_(solved, check, part, z, out, self.fit.kept[segment.stop, part])
        if not (solved.finite and check.finite):
            return None
        return solved.solve_best(RIDGES if check.tokens else RIDGES[-1:], check)[1]

    def _cost(self, batch: int, hidden: torch.Tensor) -> float:
        """Sum over a batch of its positions' weighted KL, those without weight left out."""
        part, dense = self.judged.parts[batch], self.dense
        counted = self.weights[part].flatten().nonzero()[:, 0].to(hidden.device)
        tokens = self.judged.tokens[part].flatten()[counted.cpu()].unsqueeze(0)
        last = self.judged.kept[len(dense), part].to(hidden)
        p, q = (states.flatten(0, 1)[counted].unsqueeze(0) for states in (last, hidden))
        kl = teacher_of(dense, p, tokens).kl(dense.exit(q, tokens)).flatten()
        return float(kl.cpu().double() @ self.weights[part].flatten()[counted.cpu()].double())


def _with(out: torch.Tensor, z: torch.Tensor, u: torch.Tensor, x: torch.Tensor | Branch | None) -> torch.Tensor:
    """h + z X, in h's dtype, or with what a norm makes of it; h where there is no X."""
    if isinstance(x, Branch):
        return out + x.change(z.float(), u.float())[0].to(out.dtype)
    return out if x is None else out + (z.float() @ x.float().to(z.device)).to(out.dtype)


def _on_the_host(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """An empty tensor in memory; a large one in a file that is there as long as it is."""
    if (size := math.prod(shape) * dtype.itemsize) <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".states-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and not later a dead process
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


class _Rows:
    """Rows of tokens in batches, and the dense model's hidden states of them at every boundary."""

    def __init__(self, dense: DecoderRunner, tokens: torch.Tensor, at_once: int, folder: Path | None) -> None:
        self.dense, self.tokens, self.parts = dense, tokens, list(slices(len(tokens), at_once))
        self.forwards = 0
        """Layers applied to rows since."""
        shape = (len(dense) + 1, *tokens.shape, dense.hidden_size)
        self.kept = _on_the_host(shape, dense.model.dtype, folder)
        """h_0 … h_L [L + 1, N, T, D]."""
        states, self.calls = enter_all(dense, [dense.place(tokens[part]) for part in self.parts])
        for i in range(len(dense) + 1):  # layers outermost: one on disk is read once
            if i:
                carry_(dense, states, self.calls, i - 1, i)
            for part, hidden in zip(self.parts, states, strict=True):
                self.kept[i, part] = hidden.cpu()

    def states(self, boundary: int) -> list[torch.Tensor]:
        """The dense model's h of every batch, to be carried on."""
        kept = (self.kept[boundary, part].to(self.dense.device) for part in self.parts)
        return [self.dense.on_device_of(min(boundary, len(self.dense) - 1), hidden) for hidden in kept]

    def carry_(self, states: list[torch.Tensor], start: int, stop: int) -> None:
        """Replace h_start of every batch by what layers start … stop make of it."""
        self.forwards += len(self.tokens) * max(0, stop - start)
        carry_(self.dense, states, self.calls, start, stop)

    def leaving(self, states: list[torch.Tensor], position: int, target: LinearOutput) -> Iterator[Leaving]:
        """What leaves a layer, of every batch."""
        layer = self.dense.loaded(position)
        module = layer.get_submodule(target.name)
        norms = [layer.get_submodule(norm.name) for norm in norms_of([target])]
        self.forwards += len(self.tokens)
        for hidden, calls in zip(states, self.calls, strict=True):
            hidden = self.dense.on_device_of(position, hidden)
            out, caught = run_and_catch(layer, hidden, calls[position], [module, *norms])
            yield out, target.of(caught[module], out), caught[norms[0]][0].reshape(out.shape) if norms else out
