"""Least-squares compensation, "the fold": change the layer before a cut so that the stream is what it was after it.

After the cut, layer e receives what layer s - 1 puts out: x + z_a W_a + z_m W_m, its input and what its attention
and its MLP add to the residual stream, z being what their output projections read. It used to receive h_e. Each
projection is solved again, the attention's first (together with the MLP's as it would be with nothing changed), then
the MLP's on what it really reads: X minimising

    sum_t || z_t (W + X) + rest_t - h_et ||^2 / || h_et ||^2 + ridge || X ||^2,
    X = (Z'Z + ridge I)^-1 Z'Y,      Y = h_e - h,      the rows of Z and Y over || h_et || / sqrt(D)

with h the stream that leaves layer s - 1, in float64 from streamed Z'Z and Z'Y. What follows reads the stream through a
norm, so that an error counts as a share of the token's own size: else the few tokens of massive activations, a thousand
times as large as others, would decide alone (measured). The result stays a stock
architecture (after ReplaceMe, 2505.02819, equation 5, which multiplies the MLP's *output* by a square matrix:
W + X is any matrix, of which that is the part of the form W T). The ridge pulls
towards the weight as it is, so that without evidence nothing changes; it is relative to the mean of Z'Z's diagonal
and is chosen on tokens that the statistics have not seen.

Where no single linear module writes to the stream, in a mixture of experts, the same square matrix T goes into every
expert's output weights: the outputs are weighted and summed after, so that the sum is multiplied by T.

A layer's *inputs* take no fold: attention and MLP read the stream through RMSNorm, which no linear map passes.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch

from layercut.distributed import sharding
from layercut.healing.inputs import kept_positions, removed_segments, with_held_out
from layercut.healing.linear_outputs import WIDEST, LinearOutput, find_targets, norms_of, run_and_catch
from layercut.healing.normal_equations import Normal, add_split_, kept_out
from layercut.healing.normalised import STEPS, Alternation, FoldBatch, Sums
from layercut.models.losses import as_cost, mean_kl
from layercut.models.memory import place_of_float64
from layercut.models.runner import DecoderRunner, carry_, enter_all, own_device, prepared, shared_layers, shared_passes
from layercut.progress import bar
from layercut.segments import Segment

Advance = Callable[[float], None]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Relative ridges that are tried. Which is best depends on the number of tokens; the largest guard against few."""

KEPT_BYTES = 2**30
"""What the hidden states at both ends of a cut may take in the host's memory, so that they are computed once for all
projections of the layer before it."""


@dataclass(frozen=True)
class Fold:
    """What one fold did, or why it could not be done."""

    segment: list[int]  # the cut: its first layer and the first one after it, in the dense model
    layer: int | None  # index, in the cut model, of the layer that was changed
    modules: list[str]  # what was solved again in that layer, in this order
    ridges: list[float]  # the ridge that was chosen for each of them, relative to the mean of Z'Z's diagonal
    error_before: float | None
    error_after: float | None
    """Squared error of what enters layer e, each token's relative to its own square, on held-out rows, as a share of
    the plain cut's (error_before = 1)."""
    tokens: int  # tokens that it was solved and chosen on
    skipped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Of JSON values alone, by the fields' names."""
        return asdict(self)


@dataclass(frozen=True)
class FoldResult:
    """What the fold of every cut did, and whether it was kept."""

    cuts: tuple[Fold, ...]
    """One for each cut, from the first to the last."""
    kl_before: float | None
    """KL(dense || student) on the held-out rows before the fold, mean nats per token; None where no cut has one."""
    kl_after: float | None
    """The same after it, also where it was then undone."""
    kept: bool
    """Whether the student is left folded; if not, it has the very weights that it had before."""

    def to_dict(self) -> dict[str, Any]:
        """Of JSON values alone, by the fields' names."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """What matters of it as a table, in a notebook."""
        done, rows = "kept" if self.kept else "undone", list[tuple[str, str]]()
        if self.kl_before is not None and self.kl_after is not None:
            rows.append(("held-out KL", f"{self.kl_before:.4g} → {self.kl_after:.4g}, {done}"))
        for cut in self.cuts:
            done = cut.skipped or f"{', '.join(cut.modules)} of layer {cut.layer}: error 1 → {cut.error_after:.3g}"
            rows.append((f"cut {cut.segment[0]}:{cut.segment[1]}", done))
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
        return f"<table>{''.join(cells)}</table>"


def fold_(
    student: Any,
    dense: Any,
    tokens: torch.Tensor,
    *,
    heldout: torch.Tensor | None = None,
    segments: Sequence[Segment] | None = None,
    rows: int | None = None,
) -> FoldResult:
    """Compensate the student's cuts by least squares in the layer before each, in place, where held-out KL falls.

    After ReplaceMe (2505.02819, equation 5); see this module's docstring for what is solved. Where the KL does not
    fall, the student is left as it was, to the bit. What is changed gets parameters of its own, so that a dense model
    that shares weights with the student is left as it is. Of several processes each takes a share of the rows.

    Args:
        student: a model without some of the dense model's layers (`layercut.cut`), healed before or not; its config's
            `original_layer_index` says which.
        dense: the model that it was cut from, which may have been cut before itself.
        tokens: token ids [N, T] to solve on.
        heldout: token ids [M, T] that decide whether the fold is kept; not given, the last eighth of the rows of
            `tokens`, one at least, which are then not solved on.
        segments: the cuts to fold, in the dense model's layers; not given, all.
        rows: rows of `tokens` in one pass through the model; not given, as many as the budget allows.

    Returns:
        What was solved at each cut, and the KL before and after; where no cut has a fold, nothing is run, nor the KL.

    Raises:
        ConfigError: the tokens are not [N, T] token ids, or it cannot be seen which layers the student lacks.
        ModelError: the dense model's predictions are not finite, or its layers cannot be run one by one.
    """
    tokens, heldout = with_held_out(tokens, heldout, dense)
    with prepared(student, dense) as (cut, whole):
        segments = sorted(removed_segments(cut, whole) if segments is None else segments)
        folds, before, after, kept = list[Fold](), None, None, False
        undo_ = _undoing(cut, {_position(cut, whole, segment) for segment in segments})
        with bar("folding", len(segments) * len(tokens)) as advance:
            for segment in segments:
                found = _targets_before(cut, whole, segment, tokens)
                if isinstance(found, Fold):
                    folds.append(found)
                    continue
                if before is None:
                    before = mean_kl(whole, cut, heldout, shared_layers(whole, cut))
                folds.append(_fold_targets_(cut, whole, segment, found, tokens, rows, advance))
        if before is not None:
            solved = any(fold.skipped is None for fold in folds)
            after = mean_kl(whole, cut, heldout, shared_layers(whole, cut)) if solved else before
            kept = after < before
        if not kept:
            undo_()
    return FoldResult(tuple(folds), before, after, kept)


def _undoing(student: DecoderRunner, positions: set[int]) -> Callable[[], None]:
    """What puts the student's layers at these positions back as they are now, with the very same parameters."""

    def nothing_read() -> None:
        if student.on_disk:
            student.on_disk.files.leave_()

    nothing_read()
    layers = {i: student.layers[i] for i in positions if i >= 0}
    weights = [(module, dict(module._parameters)) for layer in layers.values() for module in layer.modules()]

    def undo_() -> None:
        nothing_read()
        for i, layer in layers.items():
            student.layers[i] = layer
        for module, parameters in weights:
            module._parameters.update(parameters)

    return undo_


def _position(student: DecoderRunner, dense: DecoderRunner, segment: Segment) -> int:
    """The layer before a cut, in the student; -1 where the cut begins the stack."""
    return sum(i < segment.start for i in kept_positions(student, dense)) - 1


def _nothing(rows: float) -> None:
    pass


@torch.no_grad()
def fold_cut_(
    student: DecoderRunner,
    dense: DecoderRunner,
    segment: Segment,
    tokens: torch.Tensor,
    rows: int | None = None,
    advance: Advance = _nothing,
) -> Fold:
    """Fold one cut, whether that helps or not.

    The student's changed weights are new parameters; its other layers may be healed already, in whatever way. A cut
    is skipped, with the reason, where there is no layer before it, where nothing in that layer adds a linear output
    to the residual stream, or where what reaches the cut is not finite.
    """
    found = _targets_before(student, dense, segment, tokens)
    if isinstance(found, Fold):
        return found
    return _fold_targets_(student, dense, segment, found, tokens, rows, advance)


def _targets_before(
    student: DecoderRunner, dense: DecoderRunner, segment: Segment, tokens: torch.Tensor
) -> list[LinearOutput] | Fold:
    """What to solve again before a cut, at least one; or the fold that is skipped, with the reason."""
    position = _position(student, dense, segment)
    if position < 0:
        return _skipped(segment, "no layer before the cut")
    if sharding.is_spread(student.layers[position]):
        student.layers[position] = sharding.whole_copy(student.layer_at_rest(position))
    targets = find_targets(student, position, tokens[:2, :32])
    return targets or _skipped(segment, "the layer before the cut adds no linear output to the residual stream")


@torch.no_grad()
def _fold_targets_(
    student: DecoderRunner, dense: DecoderRunner, segment: Segment, targets: list[LinearOutput],
    tokens: torch.Tensor, rows: int | None, advance: Advance,
) -> Fold:  # fmt: skip
    position = _position(student, dense, segment)

    def share_of_bar(rows: float) -> None:
        advance(rows / len(targets))

    behind_norms = any(target.norm for target in targets)
    ends = _Ends(dense, student, segment, position, kept=len(targets) > 1 or behind_norms)
    ridges: list[float] = []
    plain = 0.0
    for number, target in enumerate(targets):
        # jointly with the later projections, so that an earlier one does not take over their part; only its own rows
        # of X are used, and the later ones are solved again on what they then read
        solve = _solve_in_turns if behind_norms else _solve
        found = solve(ends, together(targets[number:]), tokens, rows, share_of_bar)
        if found is None:
            if not number:
                return _skipped(segment, "what reaches the cut is not finite")
            break  # by an earlier projection of this fold, which held-out KL then judges
        layer, stored = student.loaded(position), student.stored_dtype
        target.fold_into_(layer, found.x[: target.width], stored)
        if target.norm and found.gain is not None:
            target.norm.write_(layer, found.gain, stored)
        ridges.append(found.ridge)
        plain, left, counted = plain or found.before, found.after, found.tokens
    names = [target.name for target in targets[: len(ridges)]]
    share = as_cost(left / plain) if plain else 1.0
    return Fold([segment.start, segment.stop], position, names, ridges, 1.0, share, counted)


class _Solved(NamedTuple):
    """X [sum of widths, D] of targets solved together, and what it leaves of the judging tokens' squared error."""

    x: torch.Tensor
    gain: torch.Tensor | None  # [D], of the norm behind the first target
    ridge: float
    before: float
    after: float
    tokens: int


def _solve(
    ends: _Ends, targets: Sequence[LinearOutput], tokens: torch.Tensor, rows: int | None, advance: Advance
) -> _Solved | None:
    """The least squares of what is added to the stream as it is; None where a sum is not finite."""
    width = sum(target.width for target in targets)
    fit, check = (Normal.zeros(width, ends.student.hidden_size, ends.device) for _ in range(2))
    for part, z, _, out, wanted in _read(ends, targets, tokens, rows, advance):
        add_split_(fit, check, part, z, out, wanted)
    fit.sum_()
    check.sum_()
    judge = check if check.tokens else fit
    if not (fit.finite and check.finite):
        return None
    # with no rows kept out, one that hardly trusts the rows
    ridge, x = fit.solve_best(RIDGES if check.tokens else RIDGES[-2:-1], check)
    return _Solved(x, None, ridge, judge.yy, judge.left(x), fit.tokens + check.tokens)


def _solve_in_turns(
    ends: _Ends, targets: Sequence[LinearOutput], tokens: torch.Tensor, rows: int | None, advance: Advance
) -> _Solved | None:
    """The same where norms read some of it (`normalised.py`); what the turns go through again is kept, if it fits."""
    kept: list[FoldBatch] = []

    def batches() -> Iterator[FoldBatch]:
        if kept:
            yield from kept
            return
        found, room = list[FoldBatch](), ends.room
        nonlocal advance
        for part, z, inputs, out, wanted in _read(ends, targets, tokens, rows, advance):
            held = kept_out(part).repeat_interleave(z.shape[1])
            z, out, wanted, *inputs = (each.flatten(0, 1) for each in (z, out, wanted.to(out.device), *inputs))
            batch = FoldBatch(z, inputs, out, wanted, held)
            yield batch
            room -= sum(each.nbytes for each in (z, out, wanted, *inputs))
            if room > 0:
                found.append(batch)
        if room > 0:
            kept.extend(found)
        advance = _nothing

    turns = Alternation(targets, ends.student.hidden_size, batches, place_of_float64(ends.device))
    taken = take_turns_(turns, RIDGES, RIDGES[-2:-1], STEPS)
    if taken is None:
        return None
    ridge, start = taken
    x = torch.cat([branch.weights for branch in turns.branches])
    to_fit, to_check, fitted, checked = start.left
    before, counted = to_check if checked else to_fit, int(fitted + checked)
    return _Solved(x, turns.branches[0].gain, ridge, before, turns.least, counted)


def take_turns_(
    turns: Alternation, ridges: Sequence[float], alone: Sequence[float], steps: int
) -> tuple[float, Sums] | None:
    """The ridge that the least squares of the first step is best with, with which the turns are taken then, and the
    sums before them; None where one is not finite. `alone`: the ridges where no rows are kept out.
    """
    start, fit, check = sums_of_turns(turns)
    if not (fit.finite and check.finite):
        return None
    ridge, _ = fit.solve_best(ridges if check.tokens else alone, check)
    turns.solve_(fit.factored(ridge), ridge * fit.zz.diagonal().mean().item(), start, steps)
    return ridge, start


def sums_of_turns(turns: Alternation) -> tuple[Sums, Normal, Normal]:
    """What a first pass finds, and the least squares of a first step, of the tokens to fit and of those that check."""
    fit, check = (Normal.zeros(turns.width, turns.hidden, turns.place) for _ in range(2))

    def add_(
        read: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor], gap: torch.Tensor, held: torch.Tensor
    ) -> None:
        for sums, chosen in ((fit, ~held), (check, held)):
            which = chosen.nonzero()[:, 0].to(gap.device)
            sums.add_(torch.cat(list(read), dim=-1)[which], gap[which])
            for branch, z, slope in zip(turns.branches, read, slopes, strict=True):
                sums.zy[branch.columns] += (z[which].T @ (slope - gap)[which]).to(sums.zy)

    start = turns.measure(add_)
    fit.sum_()
    check.sum_()
    return start, fit, check


def _skipped(segment: Segment, reason: str) -> Fold:
    return Fold([segment.start, segment.stop], None, [], [], None, None, 0, reason)


def together(targets: Sequence[LinearOutput]) -> list[LinearOutput]:
    """The first of them, and as many of the next as one system of at most WIDEST unknowns takes."""
    wide = list(accumulate(target.width for target in targets))
    return [target for target, width in zip(targets, wide, strict=True) if target is targets[0] or width <= WIDEST]


class _Ends:
    """What enters the layer before a cut, h_{s-1}, and what layer e used to receive, h_e [B, T, D], of each batch.

    Neither depends on that layer, so that they are the same for all projections that are solved in it.
    """

    def __init__(
        self, dense: DecoderRunner, student: DecoderRunner, segment: Segment, position: int, *, kept: bool
    ) -> None:
        """Nothing is run yet; with `kept`, what has been is kept in the host's memory, up to KEPT_BYTES."""
        self.dense, self.student, self.segment, self.position = dense, student, segment, position
        # processes that run the layers of a spread model together have to run the same ones
        self.device = own_device(student.layers[position]) or student.device
        self.room = KEPT_BYTES if kept and not sharding.is_spread(student.model) else 0
        self.kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tokens: torch.Tensor, parts: Sequence[slice]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Both of every batch."""
        keys = [(part.start, part.stop) for part in parts]
        if not all(key in self.kept for key in keys):
            found = self._run([tokens[part] for part in parts])
            taken = sum(state.nbytes for both in found for state in both)
            if taken > self.room:
                return found
            self.room -= taken
            self.kept.update(
                (key, (before.cpu(), wanted.cpu())) for key, (before, wanted) in zip(keys, found, strict=True)
            )
        return [self.kept[key] for key in keys]

    def _run(self, batches: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The layers that are the same in both models run once."""
        dense, student = self.dense, self.student
        shared = min(shared_layers(dense, student), self.position)
        wanted, calls = enter_all(dense, batches)
        carry_(dense, wanted, calls, 0, shared)
        before = list(wanted)
        carry_(dense, wanted, calls, shared, self.segment.stop)
        calls = [student.arguments(batch) for batch in batches]
        carry_(student, before, calls, shared, self.position)
        return list(zip(before, wanted, strict=True))


def _read(
    ends: _Ends, targets: Sequence[LinearOutput], tokens: torch.Tensor, rows: int | None, advance: Advance
) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """By batch of rows: which, what the targets are solved from side by side, what their norms read, the stream as it
    is and as it is to be.

    Of several processes each takes a share of the rows. Of layers on disk each, up to the cut, is read once a pass.
    """
    dense, student = ends.dense, ends.student
    tokens, rows = dense.place(tokens), rows or dense.budget.layer_rows(tokens.shape[1])
    shared = sharding.in_step(student.model, shared_passes(dense, tokens, rows, streams=3), [slice(0, 1)])
    queue = dense.parts("fold", shared)
    for one in queue:
        parts, counts = one
        found: Iterator[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]] = iter(())
        with queue.trying(one):
            gaps = _gaps(ends, targets, tokens, parts)
            found = chain([next(gaps)], gaps)  # all layers have been run by then
        for part, each in zip(parts, found, strict=False):  # none where memory ran out
            if counts:
                yield (part, *each)
                advance(len(each[0]))


def _gaps(
    ends: _Ends, targets: Sequence[LinearOutput], tokens: torch.Tensor, parts: Sequence[slice]
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """What the targets are solved from [B, T, I], side by side, what their norms read, and the stream as it is and is
    to be [B, T, D].
    """
    student, position = ends.student, ends.position
    both = ends.of(tokens, parts)
    layer = student.loaded(position)
    modules = [layer.get_submodule(target.name) for target in targets]
    norms = [layer.get_submodule(norm.name) for norm in norms_of(targets)]
    for part, (before, wanted) in zip(parts, both, strict=True):
        hidden = student.on_device_of(position, before.to(student.device))
        out, caught = run_and_catch(layer, hidden, student.arguments(tokens[part])[position], [*modules, *norms])
        outputs = [target.of(caught[module], out) for module, target in zip(modules, targets, strict=True)]
        inputs = [caught[norm][0].reshape(out.shape) for norm in norms]
        yield torch.cat(outputs, dim=-1), inputs, out, wanted
