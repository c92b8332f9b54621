"""Cutoff endpoint tuning: train the layers beside the cut, and nothing else (CLP, arXiv 2510.23652).

Dense teacher and cut student share every frozen weight and, below the first trained layer, every hidden state, so
the prefix runs once and without gradients. Gradients flow from the logits down to the first trained layer; weight
gradients, float32 master weights and AdamW's moments exist for the trained layers only. The student is at all
times the stock model, its weights rounded to the dtype they are saved in: what is measured is what is saved. Of
several processes each takes a share of every step's rows.

What is minimised is an `Objective` (`models/objectives.py`): "kl" (KL(p || q) on the logits, the default),
"next-token" (the paper's setting), or one of the caller's own.
"""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from layercut.data.blocks import fingerprint
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError
from layercut.files.json_values import digest
from layercut.healing.inputs import removed_segments, with_held_out
from layercut.healing.offloaded import FrozenStates, PairOnDisk, store_states
from layercut.healing.row_parts import RowParts, check_lengths, row_parts
from layercut.healing.tuning_pass import Batch, HeldOut, Pair
from layercut.healing.tuning_result import TuningResult
from layercut.healing.tuning_state import StateFile, Stop, never_asked
from layercut.models import memory
from layercut.models.losses import LOSS_SCALE, as_price
from layercut.models.memory import kept_bytes
from layercut.models.model_weights import weight_as_stored
from layercut.models.objectives import KL, Objective, objective_of
from layercut.models.passes import shared_layers
from layercut.models.runner import DecoderRunner, prepared
from layercut.progress import bar
from layercut.segments import Segment, kept_layers

Given = Sequence[tuple[nn.Parameter, float]]
"""Parameters to train, each with the unit of which the learning rate is a share."""
STATE_BYTES = 4 * 4
"""Of a trained parameter, in float32: the master, its gradient and AdamW's two moments."""
SCORES = 8
"""How often the held-out loss is taken during tuning, beside once before it."""
SETBACK = 0.25
"""What the rate is multiplied by where the held-out loss has risen above that of the start: see `is_setback`."""
TOLERATED = 0.01
"""Rise above the start, as a share of the start's loss, of a mixture of its KL, that is no setback the first time."""
FEW_STEPS = 64
"""Fewer take half the default rate."""
RAISE_EVERY = 64
"""Steps after which a loss scale that was not too large is doubled."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How long and how fast to train, and towards what: the arguments of `tune_` by these names."""

    objective: str | Objective = "kl"
    learning_rate: float | None = None
    """Peak rate of AdamW; None takes `default_learning_rate` of the weights, the steps and the layers."""
    batch_tokens: int = 1024
    """Tokens in one optimizer step."""
    radius: int = 1
    """Layers trained on each side of a cut."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "radius"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {value}, below 1", f"the least is {name}=1")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate is {self.learning_rate:g}, outside 0 to 1", "try 1e-4, or leave it out")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        objective = objective_of(self.objective)
        return vars(self) | {"mix": 0.0} | objective.options | {"objective": objective.name}


@dataclass(frozen=True, kw_only=True)
class TuningFiles:
    """What tuning reads from and keeps on disk, and how it is asked to stop: nothing by default."""

    states: FrozenStates | None = None
    """Of models whose layers are on disk: what does not change, stored beforehand (`frozen_states`)."""
    state: StateFile | None = None
    """Where to keep the state; one of the same key that is there is resumed, to the same bits."""
    stopping: Callable[[], AbstractContextManager[Stop]] = never_asked
    """Opened while steps are made: a stop that it notes is acted on after the step, once the state is written."""


@dataclass
class _Progress:
    """What changes from step to step, beside tensors: see `TuningResult`."""

    tokens: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    heldout: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    setbacks: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    pass_rows: int = 1
    loss_scale: float = 1.0

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.curve)


def tune_(
    student: Any,
    dense: Any,
    tokens: torch.Tensor,
    *,
    heldout: torch.Tensor | None = None,
    objective: str | Objective = "kl",
    learning_rate: float | None = None,
    batch_tokens: int = 1024,
    radius: int = 1,
    row_lengths: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    answers: torch.Tensor | None = None,
    files: TuningFiles = TuningFiles(),
) -> TuningResult:
    """Train the layers beside the student's cuts, in place, and leave it in its best state by held-out loss.

    Cutoff endpoint tuning (CLP, 2510.23652). The held-out loss is taken before the first step: the end is never worse
    than the start, and a rate that makes it rise is lowered. The trained layers get parameters of their own, so that a
    dense model that shares weights with the student is left as it is. Deterministic.

    Args:
        student: a model without some of the dense model's layers (`layercut.cut`), folded or not.
        dense: the model that it was cut from.
        tokens: token ids [N, T] to train on, in their order.
        heldout: token ids [M, T] that judge; not given, the last eighth of the rows, one at least, is not trained on.
        objective: a registered name, or an `Objective`: `models.objectives.KL(mix=0.1)`.
        learning_rate: peak rate of AdamW; not given, `default_learning_rate`.
        batch_tokens: tokens in one optimizer step.
        radius: layers trained on each side of a cut.
        row_lengths: int64 [N], divisors of T, 2 or more: a row is done as several so long, as in what was stored.
        token_weights: [N, T], factors of the loss of predicting the token after each; none of the held-out loss.
        answers: bool [N, T], where the token after is a test's answer, so known: the next-token loss alone counts.
        files: what to keep on disk; nothing by default.

    Returns:
        What was trained, and the losses.

    Raises:
        ConfigError: an argument is outside what is allowed, or it cannot be seen which layers the student lacks.
        ModelError: the dense model's states are not finite, or its layers cannot be run one by one.
    """
    settings = TuneSettings(
        objective=objective_of(objective), batch_tokens=batch_tokens, radius=radius, learning_rate=learning_rate
    )  # fmt: skip
    _check_treatment(row_lengths, token_weights, answers, tokens, files)
    tokens, heldout = with_held_out(tokens, heldout, dense)
    opened = prepared(student, dense), bar("tuning the endpoints", tokens.numel()), torch.enable_grad()
    with opened[0] as (cut, whole), opened[1] as advance, opened[2]:
        training = _Training(*_pair(cut, whole, settings, files), tokens, settings)
        training.treat_rows(row_lengths, token_weights, answers)
        with training.running_(heldout, files, advance) as after:
            while training.unfinished:
                after(training.step_())
    return training.result()


def tune_parameters_(
    student: Any,
    dense: Any,
    given: Given,
    tokens: torch.Tensor,
    *,
    heldout: torch.Tensor,
    settings: TuneSettings,
    rate_from: Callable[[float], float] | None = None,
    tolerated: float = TOLERATED,
    row_lengths: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    answers: torch.Tensor | None = None,
    files: TuningFiles = TuningFiles(),
    words: str = "tuning the quantized model",
) -> TuningResult:
    """Train parameters that the caller has put into the student, anywhere in it, by the loop of `tune_`.

    Nothing is shared with what it should predict like, so that both run whole: after quantization every layer differs.
    """
    _check_treatment(row_lengths, token_weights, answers, tokens, files)
    opened = prepared(student, dense), bar(words, tokens.numel()), torch.enable_grad()
    with opened[0] as (cut, whole), opened[1] as advance, opened[2]:
        for parameter, _ in given:
            parameter.requires_grad_(True)
        pair = Pair(
            dense=whole, student=cut, prefix=0, last=len(cut) - 1, objective=objective_of(settings.objective),
            apart=True,
        )  # fmt: skip
        training = _Training(pair, list(range(len(cut))), tokens, settings, given)
        training.rate_from, training.tolerated = rate_from, tolerated
        training.treat_rows(row_lengths, token_weights, answers)
        with training.running_(heldout, files, advance) as after:
            while training.unfinished:
                after(training.step_())
    return training.result()


def _check_treatment(
    lengths: torch.Tensor | None,
    weights: torch.Tensor | None,
    answers: torch.Tensor | None,
    tokens: torch.Tensor,
    files: TuningFiles,
) -> None:
    """Refuse what `tune_` is told to do with its rows, where that is not for these."""
    check_lengths(lengths, tokens, files.states.lengths if files.states else None)
    check_weights(weights, tokens)
    check_answers(answers, tokens)


def _pair(
    student: DecoderRunner, dense: DecoderRunner, settings: TuneSettings, files: TuningFiles
) -> tuple[Pair, list[int]]:
    """The two models and the objective; the positions of the layers that are trained."""
    positions = endpoints(removed_segments(student, dense), len(dense), settings.radius)
    objective = objective_of(settings.objective)
    # below the first trained layer nothing differs, unless an earlier round trained more neighbours of its cut
    prefix = min(min(positions), shared_layers(dense, student))
    pair = Pair(dense=dense, student=student, prefix=prefix, last=max(positions), objective=objective)
    if files.states:
        pair = PairOnDisk(**vars(pair), states=files.states, first=min(positions))
    return pair, positions


def frozen_states(
    student: DecoderRunner,
    dense: DecoderRunner,
    tokens: torch.Tensor,
    settings: TuneSettings,
    folder: Path,
    *,
    key: str,
    row_lengths: torch.Tensor | None = None,
) -> FrozenStates:
    """For models whose layers are on disk: what `tune_` with the same arguments need not compute in every step."""
    (pair, _), window = _pair(student, dense, settings, TuningFiles()), tokens.shape[1]
    rows = rows_per_step(settings, window), rows_per_pass(pair, window)
    with bar("running the frozen layers once", len(tokens)) as advance:
        return store_states(
            dense, tokens, pair.prefix, pair.dense_stop, folder, rows=rows, key=key, row_lengths=row_lengths,
            advance=advance,
        )  # fmt: skip


def check_weights(weights: torch.Tensor | None, tokens: torch.Tensor) -> None:
    """Refuse weights of tokens that cannot be."""
    if weights is None:
        return
    if not isinstance(weights, torch.Tensor):
        raise ConfigError(f"token_weights are a {type(weights).__name__}, not a tensor", "torch.ones(tokens.shape)")
    if weights.shape != tokens.shape or not weights.isfinite().all() or weights.min() < 0:
        raise ConfigError(
            f"token_weights {list(weights.shape)} from {weights.min()} to {weights.max()} are not for tokens "
            f"{list(tokens.shape)}",
            "give a finite weight of 0 or more for each token",
        )


def check_answers(answers: torch.Tensor | None, tokens: torch.Tensor) -> None:
    """Refuse what does not say of each token whether the one after it is known."""
    if answers is not None and (answers.dtype != torch.bool or answers.shape != tokens.shape):
        raise ConfigError(
            f"answers are {answers.dtype} {list(answers.shape)}, and tokens {list(tokens.shape)}",
            "give True or False for each token: torch.zeros(tokens.shape, dtype=torch.bool)",
        )


def endpoints(segments: Sequence[Segment], layers: int, radius: int = 1) -> list[int]:
    """Positions, in the cut model, of the layers beside each cut: s - 1 and e, or more of them by the radius."""
    kept = kept_layers(segments, layers)
    beside: set[int] = set()
    for segment in segments:
        cut = sum(i < segment.start for i in kept)
        beside |= {p for p in range(cut - radius, cut + radius) if 0 <= p < len(kept)}
    return sorted(beside)


def default_learning_rate(weight: float, steps: int = FEW_STEPS, layers: int = 2) -> float:
    """A 120th of a weight, half of it in fewer than `FEW_STEPS` steps, and 2 / N of it where N > 2 layers are trained.

    A step of AdamW is the rate whatever the gradient, so it is a share of what it changes. Of SmolLM2-135M, whose
    weights are 0.19, 1.6e-3 was the best in 128 steps of 1,024 tokens, half of it the best in 12; of four layers half
    of either, and 19 were trained well at an eighth. Of Qwen2.5-0.5B, whose weights are 0.016 at nearly that width,
    eight times as much ruined the first steps (measured). Where few ends, and 2 / N, are guesses.
    """
    return weight / 120 * (0.5 if steps < FEW_STEPS else 1.0) * min(1.0, 2 / layers)


def usual_weight(parameters: Sequence[torch.Tensor]) -> float:
    """Each matrix' root mean square, of these the median; of the vectors where there is no matrix, 0 of nothing.

    That of all entries together would be the fold's, which solves a few of the matrices: it has some entries hundreds
    of times the others where removed layers wrote them, and a rate by those ruins the rest (measured).
    """
    counted = [p for p in parameters if p.dim() > 1] or parameters
    squares = [float(sharding.whole(p.detach().float().square().sum())) / max(1, p.numel()) for p in counted]
    return math.sqrt(median(squares)) if squares else 0.0


class _Training:
    """The loop's parts. What changes from step to step is in `tensors` and `report`."""

    def __init__(
        self, pair: Pair, positions: list[int], tokens: torch.Tensor, settings: TuneSettings, given: Given | None = None
    ) -> None:
        """Take the endpoints' parameters, or those that are given, each with the unit of which the rate is a share."""
        self.pair, self.tokens, self.settings, self.report = pair, tokens, settings, _Progress()
        stored = pair.student.stored_dtype
        if given is None:
            given = [(p, 1.0) for p in own_parameters_(pair.student, positions)]
            self.saved_in = [weight_as_stored(sharding.whole(p.detach()), stored).dtype for p, _ in given]
        else:
            self.saved_in = [stored] * len(given)
        self.positions, self.trained = positions, [p for p, _ in given]
        self.row_lengths: torch.Tensor | None = None
        self.token_weights: torch.Tensor | None = None
        self.answers: torch.Tensor | None = None
        self.rate_from: Callable[[float], float] | None = None
        self.tolerated = TOLERATED
        self.masters = [p.float().clone() for p in self.own]
        self.best_state = [p.cpu().clone() for p in self.own]
        self.steps = math.ceil(len(tokens) / rows_per_step(settings, tokens.shape[1]))
        self.rate = settings.learning_rate or default_learning_rate(
            usual_weight(self.trained), self.steps, len(positions)
        )
        # parameters of one unit are stepped together
        alike = groupby(zip(self.masters, given, strict=True), key=lambda pair: pair[1][1])
        groups = [{"params": [master for master, _ in pairs], "unit": unit} for unit, pairs in alike]
        # fused: one launch, where torch would else take a dozen, and as much work space as one of the moments
        fused = pair.student.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.state_key = ""
        self.report.pass_rows = rows_per_pass(pair, tokens.shape[1])
        self.report.loss_scale = LOSS_SCALE if pair.student.model.dtype == torch.float16 else 1.0
        for master in self.masters:
            master.grad = torch.zeros_like(master)

    def treat_rows(
        self, lengths: torch.Tensor | None, weights: torch.Tensor | None, answers: torch.Tensor | None
    ) -> None:
        """Do the rows as `tune_` is told to; those that judge are not among them."""
        self.row_lengths = None if lengths is None else lengths[: len(self.tokens)]
        self.token_weights = None if weights is None else weights[: len(self.tokens)].float()
        self.answers = None if answers is None else answers[: len(self.tokens)]

    @property
    def own(self) -> list[torch.Tensor]:
        """What this process holds of the trained weights. Read again each time: FSDP2 may move a part to pad it."""
        return [sharding.local(p.detach()) for p in self.trained]

    @property
    def unfinished(self) -> bool:
        """Whether there is a step left."""
        return self.report.step < self.steps

    @contextmanager
    def running_(
        self, heldout: torch.Tensor, files: TuningFiles, advance: Callable[..., None]
    ) -> Iterator[Callable[[int], None]]:
        """While open, steps are made, all or those that are left; the student is then in its best state."""
        try:
            judge = self.begin_(heldout, files, advance)
            with files.stopping() as stop:

                def after(count: int) -> None:
                    self.score_(judge)
                    advance(count, f"loss {self.report.curve[-1]['loss']:.4f}")
                    self.keep(files.state, stop)

                yield after
        finally:
            self.finish_()

    def begin_(self, heldout: torch.Tensor, files: TuningFiles, advance: Callable[..., None]) -> HeldOut:
        """Resume from the state on disk where its key is the same, else take the first score."""
        self.state_key = self.key(heldout, [files.state.key if files.state else ""])
        judge = HeldOut(self.pair, heldout, rows=rows_per_pass(self.pair, heldout.shape[1]))
        found = files.state.load(self.state_key) if files.state else None
        if processes.most(0 if found else 1) == 0 and found:  # all of them, or none
            self.restore_(*found)
            if self.report.curve:
                advance(int(self.report.curve[-1]["tokens"]), f"loss {self.report.curve[-1]['loss']:.4f}")
        else:
            self.note_score_(judge.score())
        if self.rate_from:
            first = self.report.heldout[0]
            self.rate = self.rate_from(first.get(KL.name, first["loss"]))
        return judge

    def keep(self, state: StateFile | None, stop: Stop) -> None:
        """Write the state where it is due, and stop where that was asked for."""
        if (number := processes.most(stop.signal or 0)) and not stop.signal:
            signal.raise_signal(number)  # all stop after the same step, or some would wait in an all-reduce forever
        if state and processes.from_main(bool(stop.signal) or state.due()):
            self.save(state, self.state_key)
        if stop.signal:
            processes.barrier()
        stop.now()

    def result(self) -> TuningResult:
        """All of it, as of now."""
        objective, count = self.pair.objective, sum(p.numel() for p in self.trained)
        return TuningResult(
            objective=objective.name, label=objective.label, steps=self.steps,
            learning_rate=self.rate, trained_layers=list(self.positions), trained_parameters=count,
            state_bytes=STATE_BYTES * count,
            tokens_per_second=self.report.tokens / self.report.seconds if self.report.seconds else 0.0,
            **copy.deepcopy(vars(self.report)),
        )  # fmt: skip

    def key(self, heldout: torch.Tensor, more: list[Any]) -> str:
        """Hash of all that decides the result, the weights that are started from included."""
        start = hashlib.sha256()
        for p in self.trained:
            start.update(sharding.whole(p.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
        lengths = [] if self.row_lengths is None else [self.row_lengths[:, None]]
        data: list[Any] = [[fingerprint(t.cpu()), list(t.shape)] for t in (self.tokens, heldout, *lengths)]
        for of_tokens in (self.token_weights, self.answers):
            if of_tokens is not None:
                data.append(hashlib.sha256(of_tokens.cpu().contiguous().numpy().tobytes()).hexdigest())
        plan = [self.settings.facts, self.rate, self.steps, self.positions]
        plan += [self.tolerated] if self.tolerated != TOLERATED else []
        return digest([more, plan, data, start.hexdigest()])

    def step_(self) -> int:
        """One optimizer step on the next rows; the tokens in them.

        The gradient is that of the mean loss over the step's rows: each process takes its share of the passes and
        weighs it by its rows. Of a sharded model every backward pass sums over the processes by itself. It is taken
        again by smaller passes where memory runs out, and by a smaller loss scale where float16 overflows.
        """
        report, begun, cpu = self.report, time.perf_counter(), time.process_time()
        batch = rows_per_step(self.settings, self.tokens.shape[1])
        rows = torch.arange(len(self.tokens))[report.step * batch :][:batch]
        if report.loss_scale > 1 and report.step and report.step % RAISE_EVERY == 0:
            report.loss_scale *= 2
        total: float | None = None
        while total is None:
            losses, failed = list[torch.Tensor](), None
            self._forget_gradients_()
            try:
                for loss in self.pair.backward(self._batches(rows)):
                    losses.append(loss)
                    self._take_gradients_()
            except (RuntimeError, MemoryError) as error:
                failed = error
            if failed is None:
                total = self._clip_(losses)
            else:  # out of the handler, whose error would keep the pass's tensors
                self._halve_passes_(failed, len(rows))
        for group in self.optimizer.param_groups:
            share = warmup_then_cosine(report.step, self.steps) * SETBACK ** len(report.setbacks)
            group["lr"] = self.rate * group["unit"] * share
        self.optimizer.step()
        self._round_()
        count = len(rows) * self.tokens.shape[1]
        report.seconds += time.perf_counter() - begun
        report.cpu_seconds += time.process_time() - cpu
        report.tokens += count
        spent = {"seconds": round(report.seconds, 2), "cpu_seconds": round(report.cpu_seconds, 2)}
        report.curve.append({"step": report.step + 1, "tokens": report.tokens, "loss": total, **spent})
        return count

    def _halve_passes_(self, error: RuntimeError | MemoryError, rows: int) -> None:
        """Smaller passes for this step, which is taken again, and for those that follow, where memory ran out."""
        if processes.world() > 1 or not memory.ran_out(error):
            raise error  # of several processes the others wait for this one's gradients
        together = min(self.report.pass_rows, rows)
        memory.halve_(error.with_traceback(None), "tune", self.pair.student.device, together)
        self.report.pass_rows = max(1, together // 2)

    def _clip_(self, losses: list[torch.Tensor]) -> float | None:
        """Clip the gradients' norm to 1; the host waits for the device here alone in a step."""
        report, spread = self.report, sharding.is_spread(self.pair.student.model)
        if not spread:
            processes.sum_(*self._of_masters)
        if report.loss_scale != 1:
            torch._foreach_mul_(self._of_masters, 1 / report.loss_scale)
        norm = nn.utils.get_total_norm(self._of_masters)
        *parts, length = torch.cat([*losses, norm.reshape(1).to(self.pair.student.device)]).tolist()
        total, squares = processes.summed([sum(parts) / report.loss_scale, length**2])
        if spread:
            length = math.sqrt(squares)
        if not math.isfinite(length) and report.loss_scale > 1:
            report.loss_scale /= 2
            return None
        nn.utils.clip_grads_with_norm_(self.masters, 1.0, norm.new_tensor(length) if spread else norm)
        return total

    @property
    def _of_masters(self) -> list[torch.Tensor]:
        return [master.grad for master in self.masters if master.grad is not None]

    def _forget_gradients_(self) -> None:
        torch._foreach_zero_(self._of_masters)
        for p in self.trained:
            p.grad = None

    def _take_gradients_(self) -> None:
        """Add a pass's gradients to the masters', in float32."""
        pairs = zip(self.masters, self.trained, strict=True)
        found = [(m.grad, sharding.local(p.grad)) for m, p in pairs if m.grad is not None and p.grad is not None]
        if found:
            torch._foreach_add_(*map(list, zip(*found, strict=True)))
        for p in self.trained:
            p.grad = None

    def _round_(self) -> None:
        """The masters' values in the dtype that is saved: what the next step computes with is what will be on disk."""
        own = self.own
        values = [
            m.detach() if p.dtype == saved_in else m.detach().to(saved_in)
            for m, p, saved_in in zip(self.masters, own, self.saved_in, strict=True)
        ]
        torch._foreach_copy_(own, values)

    def _batches(self, rows: torch.Tensor) -> list[Batch]:
        """This process's passes over the rows of a step, each with its weight; rows of one length after another."""
        parts = row_parts(self.tokens, rows, self.row_lengths)
        return [batch for each in parts for batch in self._of_length(each, rows.numel() * self.tokens.shape[1])]

    def _of_length(self, given: RowParts, of: int) -> list[Batch]:
        """The passes over these of a step's rows, whose tokens are `of` in all.

        They are made smaller where there are fewer than processes.
        """
        tokens, rows, starts = given
        parts_of_row, student = self.tokens.shape[1] // given.length, self.pair.student
        weights, answers = (
            None if of_tokens is None else of_tokens[rows[::parts_of_row]].view(tokens.shape)
            for of_tokens in (self.token_weights, self.answers)
        )
        parts = processes.share_of_batches(len(tokens), self.report.pass_rows * parts_of_row)
        scale = self.report.loss_scale * given.length / of
        return [
            Batch(
                student.place(tokens[part]),
                rows[part],
                starts[part],
                len(tokens[part]) * scale if counts else 0.0,
                None if weights is None else student.place(weights[part]),
                None if answers is None or not answers[part].any() else student.place(answers[part]),
            )
            for part, counts in sharding.in_step(student.model, parts, slice(0, 1))
        ]

    def score_(self, judge: HeldOut) -> None:
        """Take the held-out loss, where it is due after this step."""
        if is_scored(self.report.step, self.steps):
            self.note_score_(judge.score())

    def note_score_(self, scores: dict[str, float]) -> None:
        """Remember a held-out loss and its terms, and the weights where they are the best so far.

        A score that is not finite is the worst there is: it is never kept, and any finite one is better.
        """
        report, scores = self.report, {name: as_price(each) for name, each in scores.items()}
        score = scores["loss"]
        if report.heldout and score < min(point["loss"] for point in report.heldout):
            report.best_step = report.step
            self.best_state = [p.cpu().clone() for p in self.own]
        report.heldout.append({"step": report.step, "tokens": report.tokens, **scores})
        if is_setback(report.heldout, report.setbacks, self.tolerated) and report.step < self.steps:
            self.step_back_()

    def step_back_(self) -> None:
        """Return to the best state, to continue slower and with no momentum: the rate was too high for this model."""
        self.report.setbacks.append(self.report.step)
        for p, master, best in zip(self.own, self.masters, self.best_state, strict=True):
            master.copy_(best)
            p.copy_(best)
        for moments in self.optimizer.state.values():
            moments["exp_avg"].zero_()
            moments["exp_avg_sq"].zero_()

    def finish_(self) -> None:
        """Leave the student in its best state, without gradients."""
        for p, value in zip(self.own, self.best_state, strict=True):
            p.copy_(value)
        for p in self.trained:
            p.requires_grad_(False)
            p.grad = None

    # --- to disk and back ---

    def save(self, state: StateFile, key: str) -> None:
        """Have the main process write it; unsharded, so that any number of processes can resume."""
        if processes.is_main() or sharding.is_spread(self.pair.student.model):
            tensors = self.tensors()
            if processes.is_main():
                state.save(key, tensors, self.result().to_dict())

    def tensors(self) -> dict[str, Sequence[torch.Tensor]]:
        moments = [self.optimizer.state[m] for m in self.masters]
        held = {
            "master": self.masters,
            "best": [best.to(p.device) for best, p in zip(self.best_state, self.own, strict=True)],
            **{name: [m[name] for m in moments] for name in ("exp_avg", "exp_avg_sq")},
        }
        return {
            name: [sharding.whole(p.detach(), part.detach()).cpu() for p, part in zip(self.trained, parts, strict=True)]
            for name, parts in held.items()
        }

    @torch.no_grad()
    def restore_(self, tensors: dict[str, list[torch.Tensor]], facts: dict[str, Any]) -> None:
        vars(self.report).update({name: facts[name] for name in vars(self.report) if name in facts})
        own = {
            name: [sharding.part_like(p, value) for p, value in zip(self.trained, values, strict=True)]
            for name, values in tensors.items()
        }
        for master, value in zip(self.masters, own["master"], strict=True):
            master.copy_(value)
        self._round_()
        self.best_state = [value.clone() for value in own["best"]]
        saved = self.optimizer.state_dict()
        saved["state"] = {
            i: {"step": torch.tensor(float(self.report.step)), "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in enumerate(zip(own["exp_avg"], own["exp_avg_sq"], strict=True))
        }
        self.optimizer.load_state_dict(saved)


def is_scored(step: int, steps: int) -> bool:
    """Whether the held-out loss is taken after a step: `SCORES` times, evenly, the last step among them."""
    return step * SCORES // steps > (step - 1) * SCORES // steps


def is_setback(heldout: Sequence[dict[str, float]], setbacks: Sequence[int], tolerated: float = TOLERATED) -> bool:
    """Whether the last held-out score says that the rate is too high.

    So it does above the start's by more than is tolerated, and above it for the second time in a row. A smaller rise
    may pass by itself, where the rate that it would cost does not come back (measured).
    """
    start, *later = heldout
    if not later:
        return False
    last, rises = later[-1], [math.isinf(point["loss"]) or point["loss"] > start["loss"] for point in later]
    again = len(later) > 1 and rises[-2] and later[-2]["step"] not in setbacks
    allowed = tolerated * abs(start.get(KL.name, start["loss"]))
    return rises[-1] and (again or math.isinf(last["loss"]) or last["loss"] > start["loss"] + allowed)


def rows_per_pass(pair: Pair, window: int) -> int:
    """Rows of tokens in one forward and backward pass, by what the student's layers keep for the way back."""
    student, budget = pair.student, pair.student.budget
    layers = student.layers[pair.prefix : pair.student_stop]
    itemsize = student.model.dtype.itemsize
    kept = sum(kept_bytes([p.shape for p in layer.parameters()], itemsize) for layer in layers)
    return budget.pass_rows(window, kept)


def rows_per_step(settings: TuneSettings, window: int) -> int:
    """Rows of tokens in one optimizer step."""
    return max(1, settings.batch_tokens // window)


def own_parameters_(student: DecoderRunner, positions: Sequence[int]) -> list[nn.Parameter]:
    """Give the layers at these positions parameters of their own, trainable.

    What several layers of the model share, as Zamba's attention, stays as it is: it is no part of one of them.
    """
    own: list[nn.Parameter] = []
    layers = Counter(id(p) for layer in student.layers for p in layer.parameters())
    for position in positions:
        if sharding.is_spread(student.model):
            student.layers[position] = sharding.trainable_copy(student.layer_at_rest(position))
            own += [p for p in student.layers[position].parameters() if p.requires_grad]
            continue
        for module in student.loaded(position).modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_floating_point() and layers[id(parameter)] <= 1:
                    replacement = nn.Parameter(parameter.detach().clone(), requires_grad=True)
                    setattr(module, name, replacement)
                    own.append(replacement)
    return own


def warmup_then_cosine(step: int, steps: int) -> float:
    """Share of the peak rate: up over the first 5 % of the steps, then down a cosine to 5 %."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
