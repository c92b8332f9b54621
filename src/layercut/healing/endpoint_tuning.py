"""Cutoff endpoint tuning: train the layers beside the cut, and nothing else (CLP, arXiv 2510.23652).

Dense teacher and cut student share every frozen weight and, below the first trained layer, every hidden state.
Gradients flow from the logits down to the first trained layer; weight gradients, float32 master weights and AdamW's
moments exist for the trained layers only. The student is at all times the stock model, its weights rounded to the dtype
they are saved in: what is measured is what is saved. Of several processes each takes a share of every step's rows.

What is minimised is an `Objective` (`models/losses.py`). The held-out loss is taken SCORES times. The state that
scored best is what the student is left in; where the loss has risen above that of the start, training goes on from that
state, at SETBACK of the rate.
"""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercut.config import TuneSettings
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError
from layercut.files import digest
from layercut.healing import lora
from layercut.healing.inputs import Batch, Rows, removed_segments, with_held_out
from layercut.healing.offloaded import FrozenStates, PairOnDisk, store_states
from layercut.healing.recipe import (
    SETBACK,
    TOLERATED,
    default_learning_rate,
    is_setback,
    trained_layers,
    usual_weight,
    warmup_then_cosine,
)
from layercut.healing.tuning_pass import HeldOut, Pair
from layercut.healing.tuning_state import StateFile, Stop, TuningResult, never_asked
from layercut.models import memory
from layercut.models.decoder_stack import weight_as_stored
from layercut.models.losses import KL, LOSS_SCALE, as_cost, objective_of
from layercut.models.memory import kept_bytes
from layercut.models.runner import DecoderRunner, prepared, shared_layers
from layercut.progress import bar
from layercut.segments import Segment, kept_layers

Given = Sequence[tuple[nn.Parameter, float]]
"""Parameters to train, each with the unit of which the learning rate is a share."""
STATE_BYTES = 4 * 4  # of a trained parameter, in float32: the master, its gradient and AdamW's two moments
SCORES = 8  # how often the held-out loss is taken during tuning, beside once before it
RAISE_EVERY = 64  # steps after which a loss scale that was not too large is doubled


@dataclass(frozen=True, kw_only=True)
class TuningFiles:
    """What tuning reads from and keeps on disk, and how it is asked to stop: nothing by default."""

    states: FrozenStates | None = None
    """Of models whose layers are on disk: what does not change, stored beforehand (`frozen_states`)."""
    state: StateFile | None = None
    """Where to keep the state; one of the same key that is there is resumed, to the same bits."""
    stopping: Callable[[], AbstractContextManager[Stop]] = never_asked
    """Opened while steps are made: a stop that it notes is acted on after the step, once the state is written."""


def tune_(
    student: Any,
    dense: Any,
    tokens: torch.Tensor,
    *,
    heldout: torch.Tensor | None = None,
    settings: TuneSettings | None = None,
    row_lengths: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    answers: torch.Tensor | None = None,
    heldout_weights: torch.Tensor | None = None,
    beside: Sequence[Segment] = (),
    files: TuningFiles = TuningFiles(),
    **options: Any,
) -> TuningResult:
    """Train the layers beside the student's cuts, in place, and leave it in its best state by held-out loss.

    Cutoff endpoint tuning (CLP, 2510.23652); by `train` all layers, or LoRA on all (2106.09685), instead. The held-out
    loss is taken before the first step: the end is never worse than the start, and a rate that makes it rise is
    lowered. The trained layers get parameters of their own, so that a dense model that shares weights with the student
    is left as it is. Deterministic.

    Args:
        student: a model without some of the dense model's layers (`layercut.cut`), folded or not; to train all layers,
            also one that lacks none.
        dense: the model that it was cut from.
        tokens: token ids [N, T] to train on, in their order.
        heldout: token ids [M, T] that judge; not given, the last eighth of the rows, one at least, is not trained on.
        settings: how to train.
        row_lengths: int64 [N], divisors of T, 2 or more: a row is done as several so long, as in what was stored.
        token_weights: [N, T], factors of the loss of predicting the token after each.
        answers: bool [N, T], where the token after is a test's answer, so known: the next-token loss alone counts.
        heldout_weights: [M, T], the same of the held-out loss; not given, every token counts alike.
        beside: segments of a student that has all layers: those beside them are trained. The control of their cut: what
            the text brings without it.
        files: what to keep on disk; nothing by default.
        options: fields of the settings by their names: `learning_rate=1e-3`, `batch_tokens=1024`, `radius=1`,
            `train="all"`, `objective="next-token"` or an `Objective`, as `KL(mix=0.3)`.

    Returns:
        What was trained, and the losses.

    Raises:
        ConfigError: an argument is outside what is allowed, or it cannot be seen which layers the student lacks.
        ModelError: the dense model's states are not finite, or its layers cannot be run one by one.
    """
    settings = replace(settings or TuneSettings(), **options)
    own, heldout = with_held_out(tokens, heldout, dense)
    rows = Rows(tokens=tokens, row_lengths=row_lengths, token_weights=token_weights, answers=answers).first(len(own))
    if files.states and files.states.lengths_key != rows.lengths_key:
        raise ConfigError("the states were stored of rows of other lengths", "store them with the same row_lengths")
    judged = Rows(tokens=heldout, token_weights=heldout_weights)
    if heldout_weights is not None and not heldout_weights.any():
        raise ConfigError("heldout_weights are all 0: no token judges", "give a weight above 0 to some")
    with prepared(student, dense) as (cut, whole), torch.enable_grad():
        pair, positions = _pair(cut, whole, settings, beside)
        if files.states:
            pair = PairOnDisk(**vars(pair), states=files.states, first=min(positions))
        if settings.train == "lora":
            settings = replace(settings, learning_rate=settings.learning_rate or lora.LEARNING_RATE)
            training = _Training(
                pair,
                positions,
                rows,
                settings,
                [(each, 1.0) for each in lora.adapters_([cut.layers[p] for p in positions])],
            )
            try:
                training.run_(judged, files, "tuning LoRA")
            finally:
                lora.merge_(cut)
        else:
            training = _Training(pair, positions, rows, settings)
            training.run_(judged, files, "tuning")
    return training.result()


def tune_parameters_(
    student: Any,
    dense: Any,
    given: Given,
    rows: Rows,
    *,
    heldout: torch.Tensor,
    settings: TuneSettings,
    rate_from: Callable[[float], float] | None = None,
    tolerated: float = TOLERATED,
    files: TuningFiles = TuningFiles(),
    words: str = "tuning the quantized model",
) -> TuningResult:
    """Train parameters that the caller has put into the student, anywhere in it, by the loop of `tune_`.

    Nothing is shared with what it should predict like, so that both run whole: after quantization every layer differs.
    """
    with prepared(student, dense) as (cut, whole), torch.enable_grad():
        for parameter, _ in given:
            parameter.requires_grad_(True)
        pair = Pair(dense=whole, student=cut, prefix=0, objective=objective_of(settings.objective), apart=True)
        training = _Training(pair, list(range(len(cut))), rows, settings, given)
        training.rate_from, training.tolerated, training.train = rate_from, tolerated, "rounded"
        training.run_(Rows(tokens=heldout), files, words)
    return training.result()


def frozen_states(
    student: DecoderRunner, dense: DecoderRunner, rows: Rows, settings: TuneSettings, folder: Path, *, key: str
) -> FrozenStates:
    """For models whose layers are on disk: what `tune_` with the same arguments need not compute in every step."""
    (pair, _), window = _pair(student, dense, settings), rows.shape[1]
    per_step, per_pass = rows_per_step(settings, window), _rows_per_pass(pair, window)
    return store_states(pair, rows, folder, per_step=per_step, per_pass=per_pass, key=key)


def _pair(
    student: DecoderRunner, dense: DecoderRunner, settings: TuneSettings, beside: Sequence[Segment] = ()
) -> tuple[Pair, list[int]]:
    """The two models and the objective; the positions of the layers that are trained."""
    whole = settings.train != "endpoints" and len(student) == len(dense) and not beside
    removed = () if whole else beside or removed_segments(student, dense)
    positions = trained_layers(removed, len(dense), settings)
    if beside:
        if len(student) != len(dense):
            words = f"beside is given, and the student has {len(student)} of the dense model's {len(dense)} layers"
            raise ConfigError(words, "the control of a cut has all of them: student = layercut.cut(dense, [])")
        kept = kept_layers(beside, len(dense))
        positions = [kept[p] for p in positions]
    # below the first trained layer nothing differs, unless the student was changed there before
    prefix = min(min(positions), shared_layers(dense, student))
    return Pair(dense=dense, student=student, prefix=prefix, objective=objective_of(settings.objective)), positions


def rows_per_step(settings: TuneSettings, window: int) -> int:
    """Rows of tokens in one optimizer step."""
    return max(1, settings.batch_tokens // window)


def _rows_per_pass(pair: Pair, window: int) -> int:
    """Rows of tokens in one forward and backward pass, by what the student's layers keep for the way back."""
    student, itemsize = pair.student, pair.student.model.dtype.itemsize
    shapes = [[p.shape for p in layer.parameters()] for layer in student.layers[pair.prefix :]]
    return student.budget.pass_rows(window, sum(kept_bytes(each, itemsize) for each in shapes))


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


class _Training:
    """The loop. What changes from step to step is in `report`, the masters, AdamW's moments and the best state."""

    def __init__(
        self, pair: Pair, positions: list[int], rows: Rows, settings: TuneSettings, given: Given | None = None
    ) -> None:
        """Take the endpoints' parameters, or those that are given, each with the unit of which the rate is a share."""
        self.pair, self.positions, self.rows, self.settings, self.report = pair, positions, rows, settings, _Progress()
        student, stored = pair.student, pair.student.stored_dtype
        if given is None:
            given = [(p, 1.0) for p in own_parameters_(student, positions)]
            self.saved_in = [weight_as_stored(sharding.whole(p.detach()), stored).dtype for p, _ in given]
        else:
            self.saved_in = [stored] * len(given)
        self.trained = [p for p, _ in given]
        self.masters = [p.float().clone() for p in self.own]
        self.best_state = [p.cpu().clone() for p in self.own]
        self.per_step = rows_per_step(settings, rows.shape[1])
        self.steps = math.ceil(rows.shape[0] / self.per_step)
        default = default_learning_rate(usual_weight(self.trained), self.steps, len(positions))
        self.rate = settings.learning_rate or default
        self.rate_from: Callable[[float], float] | None = None
        self.tolerated = TOLERATED
        self.train: str = settings.train
        # parameters of one unit are stepped together
        alike = groupby(zip(self.masters, given, strict=True), key=lambda pair: pair[1][1])
        groups = [{"params": [master for master, _ in pairs], "unit": unit} for unit, pairs in alike]
        # fused: one launch, where torch would else take a dozen, and as much work space as one of the moments
        fused = student.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.report.pass_rows = _rows_per_pass(pair, rows.shape[1])
        self.report.loss_scale = LOSS_SCALE if student.model.dtype == torch.float16 else 1.0
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient

    @property
    def own(self) -> list[torch.Tensor]:
        """What this process holds of the trained weights. Read again each time: FSDP2 may move a part to pad it."""
        return [sharding.local(p.detach()) for p in self.trained]

    def run_(self, heldout: Rows, files: TuningFiles, words: str) -> None:
        """Make all steps, or those that are left of a stopped run; leave the student in its best state."""
        report, state = self.report, files.state
        try:
            key = self.key(heldout, state.key if state else "")
            judge = HeldOut(self.pair, heldout, rows=_rows_per_pass(self.pair, heldout.shape[1]))
            with bar(words, self.rows.tokens.numel()) as advance:
                found = state.load(key) if state else None
                if processes.most(0 if found else 1) == 0 and found:  # all of them, or none
                    self.restore_(*found)
                    if report.curve:
                        advance(int(report.curve[-1]["tokens"]), f"loss {report.curve[-1]['loss']:.4f}")
                else:
                    self.note_score_(judge.score())
                if self.rate_from:
                    self.rate = self.rate_from(report.heldout[0].get(KL.name, report.heldout[0]["loss"]))
                with files.stopping() as stop:
                    while report.step < self.steps:
                        count = self.step_()
                        if report.step * SCORES // self.steps > (report.step - 1) * SCORES // self.steps:
                            self.note_score_(judge.score())
                        advance(count, f"loss {report.curve[-1]['loss']:.4f}")
                        self.keep(state, key, stop)
        finally:
            for p, value in zip(self.own, self.best_state, strict=True):
                p.copy_(value)
            for p in self.trained:
                p.requires_grad_(False)
                p.grad = None

    def step_(self) -> int:
        """One optimizer step on the next rows; the tokens in them.

        The gradient is that of the mean loss over the step's rows: each process takes its share of the passes and
        weighs it by its rows. Of a sharded model every backward pass sums over the processes by itself. It is taken
        again by smaller passes where memory runs out, and by a smaller loss scale where float16 overflows.
        """
        report, begun, cpu = self.report, time.perf_counter(), time.process_time()
        rows = torch.arange(self.rows.shape[0])[report.step * self.per_step :][: self.per_step]
        if report.loss_scale > 1 and report.step and report.step % RAISE_EVERY == 0:
            report.loss_scale *= 2
        total: float | None = None
        while total is None:
            losses, failed = list[torch.Tensor](), None
            torch._foreach_zero_(self.gradients)
            for p in self.trained:
                p.grad = None
            try:
                for loss in self.pair.backward(self._batches(rows)):
                    losses.append(loss)
                    self._take_gradients_()
            except (RuntimeError, MemoryError) as error:
                failed = error
            if failed is None:
                total = self._clip_(losses)
                continue
            # out of the handler, whose error would keep the pass's tensors
            if processes.world() > 1 or not memory.ran_out(failed):
                raise failed  # of several processes the others wait for this one's gradients
            together = min(report.pass_rows, len(rows))
            memory.halve_(failed.with_traceback(None), "tune", self.pair.student.device, together)
            report.pass_rows = max(1, together // 2)
        for group in self.optimizer.param_groups:
            share = warmup_then_cosine(report.step, self.steps) * SETBACK ** len(report.setbacks)
            group["lr"] = self.rate * group["unit"] * share
        self.optimizer.step()
        self._round_()
        count = len(rows) * self.rows.shape[1]
        report.seconds += time.perf_counter() - begun
        report.cpu_seconds += time.process_time() - cpu
        report.tokens += count
        spent = {"seconds": round(report.seconds, 2), "cpu_seconds": round(report.cpu_seconds, 2)}
        report.curve.append({"step": report.step + 1, "tokens": report.tokens, "loss": total, **spent})
        return count

    def _batches(self, rows: torch.Tensor) -> list[Batch]:
        """This process's passes over the rows of a step, each with its weight; rows of one length after another.

        They are made smaller where there are fewer than processes.
        """
        student, window, found = self.pair.student, self.rows.shape[1], list[Batch]()
        for parts in self.rows.parts(rows):
            length = parts.tokens.shape[1]
            scale = self.report.loss_scale * length / (rows.numel() * window)
            mine = processes.share_of_batches(len(parts.tokens), self.report.pass_rows * (window // length))
            for part, counts in sharding.in_step(student.model, mine, slice(0, 1)):
                tokens, of_rows, starts, weights, answers, *_ = parts.some(part)
                counted = None  # found on the host: an accelerator would be waited for
                if weights is not None and not sharding.is_spread(student.model) and not weights.all():
                    counted = weights.flatten().nonzero()[:, 0] if weights.any() else None
                weights = None if weights is None else student.place(weights.float())
                answers = None if answers is None or not answers.any() else student.place(answers)
                weight = len(tokens) * scale if counts else 0.0
                found.append(Batch(student.place(tokens), of_rows, starts, weights, answers, counted, weight))
        return found

    def _take_gradients_(self) -> None:
        """Add a pass's gradients to the masters', in float32."""
        pairs = zip(self.gradients, self.trained, strict=True)
        found = [(gradient, sharding.local(p.grad)) for gradient, p in pairs if p.grad is not None]
        if found:
            torch._foreach_add_(*map(list, zip(*found, strict=True)))
        for p in self.trained:
            p.grad = None

    def _clip_(self, losses: list[torch.Tensor]) -> float | None:
        """Clip the gradients' norm to 1; the loss, or None where the gradients overflow. The host waits here alone."""
        report, spread = self.report, sharding.is_spread(self.pair.student.model)
        if not spread:
            processes.sum_(*self.gradients)
        if report.loss_scale != 1:
            torch._foreach_mul_(self.gradients, 1 / report.loss_scale)
        norm = nn.utils.get_total_norm(self.gradients)
        *parts, length = torch.cat([*losses, norm.reshape(1).to(self.pair.student.device)]).tolist()
        total, squares = processes.summed([sum(parts) / report.loss_scale, length**2])
        if spread:
            length = math.sqrt(squares)
        if not math.isfinite(length) and report.loss_scale > 1:
            report.loss_scale /= 2
            return None
        nn.utils.clip_grads_with_norm_(self.masters, 1.0, norm.new_tensor(length) if spread else norm)
        return total

    def _round_(self) -> None:
        """The masters' values in the dtype that is saved: what the next step computes with is what will be on disk."""
        own = self.own
        values = [
            m.detach() if p.dtype == saved_in else m.detach().to(saved_in)
            for m, p, saved_in in zip(self.masters, own, self.saved_in, strict=True)
        ]
        torch._foreach_copy_(own, values)

    def note_score_(self, scores: dict[str, float]) -> None:
        """Remember a held-out loss and its terms, and the weights where they are the best so far.

        A score that is not finite is the worst there is: it is never kept, and any finite one is better. After a
        setback training goes on from the best state, slower and with no momentum.
        """
        report, scores = self.report, {name: as_cost(each) for name, each in scores.items()}
        if report.heldout and scores["loss"] < min(point["loss"] for point in report.heldout):
            report.best_step = report.step
            self.best_state = [p.cpu().clone() for p in self.own]
        report.heldout.append({"step": report.step, "tokens": report.tokens, **scores})
        if is_setback(report.heldout, report.setbacks, self.tolerated) and report.step < self.steps:
            report.setbacks.append(report.step)
            for p, master, best in zip(self.own, self.masters, self.best_state, strict=True):
                master.copy_(best)
                p.copy_(best)
            for moments in self.optimizer.state.values():
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].zero_()

    def result(self) -> TuningResult:
        """All of it, as of now."""
        objective, count, report = self.pair.objective, sum(p.numel() for p in self.trained), self.report
        return TuningResult(
            objective=objective.name, label=objective.label, steps=self.steps, learning_rate=self.rate,
            trained_layers=list(self.positions), trained_parameters=count, train=self.train,
            state_bytes=STATE_BYTES * count,
            tokens_per_second=report.tokens / report.seconds if report.seconds else 0.0, **copy.deepcopy(vars(report)),
        )  # fmt: skip

    # --- to disk and back ---

    def key(self, heldout: Rows, of_file: str) -> str:
        """Hash of all that decides the result, the weights that are started from included."""
        start, objective = hashlib.sha256(), self.pair.objective
        for p in self.trained:
            start.update(sharding.whole(p.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
        facts = {one.name: getattr(self.settings, one.name) for one in fields(TuneSettings)}
        facts |= objective.options | {"objective": objective.name}
        data = [*self.rows.digests, *heldout.digests]
        plan = [of_file, facts, self.rate, self.steps, self.positions, self.tolerated]
        return digest([plan, data, start.hexdigest()])

    def keep(self, state: StateFile | None, key: str, stop: Stop) -> None:
        """Write the state where it is due, unsharded, and stop where that was asked for."""
        if (number := processes.most(stop.signal or 0)) and not stop.signal:
            signal.raise_signal(number)  # all stop after the same step, or some would wait in an all-reduce forever
        due = state and processes.from_main(bool(stop.signal) or state.due())
        if state and due and (processes.is_main() or sharding.is_spread(self.pair.student.model)):
            tensors = self.tensors()
            if processes.is_main():
                state.save(key, tensors, self.result().to_dict())
        if stop.signal:
            processes.barrier()
        stop.now()

    def tensors(self) -> dict[str, Sequence[torch.Tensor]]:
        """The training state, whole and in the CPU's memory."""
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
        """Go on from a state that `keep` wrote."""
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
