"""Cutoff endpoint tuning: train the layers beside the cut, and nothing else (CLP, arXiv 2510.23652).

Dense teacher and cut student share every frozen weight and, below the first trained layer, every hidden state, so
the prefix runs once and without gradients. Gradients flow from the logits down to the first trained layer; weight
gradients, float32 master weights and AdamW's moments exist for the trained layers only. The student is at all
times the stock model, its weights rounded to the number format they are saved in: what is measured is what is saved.

Objectives (`objectives.py`): "kl" (KL(p || q) on the logits, the default), "next-token" (the paper's setting),
"hidden" (what leaves the last trained layer should be what left it in the dense model; no logits, cheap and weaker).
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layercut.data.blocks import fingerprint
from layercut.distributed import processes, sharding
from layercut.files.json_values import digest
from layercut.healing.objectives import HeldOut, Objective, Pair
from layercut.healing.offloaded import FrozenStates, PairOnDisk, store_states
from layercut.healing.stored_teacher import StoredTeacher
from layercut.healing.tuning_state import StateFile, asked_to_stop
from layercut.models import memory
from layercut.models.losses import as_price, slices
from layercut.models.runner import DecoderRunner, shared_layers
from layercut.segments import Segment, kept_layers

PASS_TOKENS = 1024
"""Tokens in one forward and backward pass: a step's gradient is summed over several. What is remembered for the
backward pass grows with them; speed does not (docs/log.md)."""
SCORES = 8
"""How often the held-out loss is taken during tuning, beside once before it."""
SETBACK = 0.25
"""What the rate is multiplied by where the held-out loss has risen above that of the start."""
FEW_STEPS = 64
"""Fewer take half the default rate."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How long and how fast to train, and towards what."""

    objective: Objective = "kl"
    learning_rate: float | None = None
    """Peak rate of AdamW; None takes `default_learning_rate` of the width and the steps."""
    batch_tokens: int = 1024
    radius: int = 1
    """Layers trained on each side of a cut."""
    temperature: float = 1.0
    """Of both models' predictions in the objective "kl"."""
    mix: float = 0.0
    """Share, 0 to 1, of the next-token loss in the objective "kl"."""
    epochs: int = 1
    """Passes over the tokens; from the second on their rows are shuffled, by the epoch's number."""
    patience: int = 0
    """Stop after so many held-out scores in a row without a new best; 0 never does."""


@dataclass
class Tuning:
    """What was trained and how it went. Losses are means per token, in nats for logits."""

    objective: str
    tokens: int
    """Tokens trained on, those of every epoch counted."""
    steps: int
    learning_rate: float
    trained_layers: list[int]
    trained_parameters: int
    state_bytes: int
    """Bytes of masters, gradients and moments: all there is beside the shared weights."""
    curve: list[dict[str, float]] = field(default_factory=list)
    heldout: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    setbacks: list[int] = field(default_factory=list)
    """Steps after which the held-out loss stood above that of the start (or was no number): each time training went
    on from the best state, at a quarter of the rate."""
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    """Of training, without scoring; over all processes where it was stopped and resumed."""
    cpu_seconds: float = 0.0
    """The same, of processor time over all threads: other work on the machine does not stretch it."""
    stopped_early: bool = False

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.curve)

    @property
    def best(self) -> float:
        """The lowest held-out loss so far."""
        return min(point["loss"] for point in self.heldout)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def endpoints(segments: Sequence[Segment], layers: int, radius: int = 1) -> list[int]:
    """Positions, in the cut model, of the layers beside each cut: s - 1 and e, or more of them by the radius."""
    kept = kept_layers(segments, layers)
    beside: set[int] = set()
    for segment in segments:
        cut = sum(i < segment.start for i in kept)
        beside |= {p for p in range(cut - radius, cut + radius) if 0 <= p < len(kept)}
    return sorted(beside)


def default_learning_rate(hidden_size: int, steps: int = FEW_STEPS) -> float:
    """1.6e-3 at a width of 576, the best there in 128 steps of 1,024 tokens, and half of it in few, the best in 12
    (docs/log.md). Where few end, and the inverse law in the width, are guesses."""
    return 1.6e-3 * 576 / hidden_size * (0.5 if steps < FEW_STEPS else 1.0)


def tune_(
    dense: DecoderRunner,
    student: DecoderRunner,
    segments: Sequence[Segment],
    tokens: torch.Tensor,
    heldout: torch.Tensor,
    settings: TuneSettings,
    *,
    advance: Callable[[int, float], None] = lambda tokens, loss: None,
    teacher: StoredTeacher | None = None,
    states: FrozenStates | None = None,
    state: StateFile | None = None,
) -> Tuning:
    """Train the student's endpoints on tokens [N, T] in their order; leave it in its best state by held-out loss.

    heldout: [M, T], never trained on; it is scored before the first step, so that the end is never worse than the
    start, and a rate that leads astray is lowered (`Tuning.setbacks`). teacher: the dense predictions on `tokens`,
    stored beforehand (for "kl"). states: of models whose layers are on disk, what does not change, stored beforehand.
    state: where to keep the state; one that is there and of the same making is gone on with, and ends in the same bits.
    Deterministic: no randomness is used beside the seeded order of later epochs. Of several processes each takes a
    share of every step's rows; gradients and scores are summed, and all make the same steps, of a spread model
    (`distributed/sharding.py`) each on its parts of the trained weights.
    """
    memory.reuse_freed()
    positions = endpoints(segments, len(dense), settings.radius)
    # below the first trained layer nothing differs, unless an earlier round trained more neighbours of its cut
    prefix = min(min(positions), shared_layers(dense, student))
    pair = Pair(
        dense=dense, student=student, prefix=prefix, last=max(positions),
        objective=settings.objective, temperature=settings.temperature, mix=settings.mix, stored=teacher,
    )  # fmt: skip
    if states:
        pair = PairOnDisk(**vars(pair), states=states, first=min(positions))
    training = _Training(pair, positions, own_parameters_(student, positions), tokens, settings)
    report = training.report
    key = training.key(heldout, [state.key if state else "", teacher is not None])
    judge = HeldOut(pair, heldout, rows=max(1, PASS_TOKENS // heldout.shape[1]))
    try:
        found = state.load(key) if state else None
        if processes.most(0 if found else 1) == 0 and found:  # all of them, or none
            training.restore_(*found)
            if report.curve:
                advance(int(report.curve[-1]["tokens"]), report.curve[-1]["loss"])
        else:
            training.note_score_(judge.score())
        with asked_to_stop() as stop:
            while report.step < report.steps and not report.stopped_early:
                count = training.step_()
                if is_scored(report.step, report.steps):
                    training.note_score_(judge.score())
                advance(count, report.curve[-1]["loss"])
                if (number := processes.most(stop.signal or 0)) and not stop.signal:
                    signal.raise_signal(number)  # all stop after the same step, or some would wait for one that is gone
                if state and processes.from_main(bool(stop.signal) or state.due()):
                    training.save(state, key)
                if stop.signal:
                    processes.barrier()
                stop.now()
    finally:
        training.finish_()
    return report


def frozen_states(
    dense: DecoderRunner,
    student: DecoderRunner,
    segments: Sequence[Segment],
    tokens: torch.Tensor,
    settings: TuneSettings,
    folder: Path,
    *,
    key: str,
    advance: Callable[[float], None] = lambda rows: None,
) -> FrozenStates:
    """For models whose layers are on disk: what `tune_` with the same arguments need not compute in every step.

    advance: counts every row once.
    """
    positions = endpoints(segments, len(dense), settings.radius)
    prefix = min(min(positions), shared_layers(dense, student))
    removed = len(dense) - len(student)
    stop = {"kl": len(dense), "hidden": max(positions) + 1 + removed, "next-token": None}[settings.objective]
    window = tokens.shape[1]
    rows = rows_per_step(settings, window), max(1, PASS_TOKENS // window)
    return store_states(dense, tokens, prefix, stop, folder, rows=rows, key=key, advance=advance)


class _Training:
    """What changes from step to step: all of it is in `tensors` and `report`."""

    def __init__(
        self,
        pair: Pair,
        positions: list[int],
        trained: list[nn.Parameter],
        tokens: torch.Tensor,
        settings: TuneSettings,
    ) -> None:
        self.pair, self.trained, self.tokens, self.settings = pair, trained, tokens, settings
        self.stored = pair.student.stored_dtype
        self.masters = [p.float().clone() for p in self.own]
        self.best_state = [p.cpu().clone() for p in self.own]
        steps = settings.epochs * math.ceil(len(tokens) / rows_per_step(settings, tokens.shape[1]))
        rate = settings.learning_rate or default_learning_rate(pair.student.hidden_size, steps)
        self.optimizer = torch.optim.AdamW(self.masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        count = sum(p.numel() for p in trained)
        self.report = Tuning(
            objective=settings.objective,
            tokens=0,
            steps=steps,
            learning_rate=rate,
            trained_layers=positions,
            trained_parameters=count,
            state_bytes=4 * 4 * count,
        )

    @property
    def own(self) -> list[torch.Tensor]:
        """What this process holds of the trained weights. Asked for anew each time: FSDP2 may move a part to pad it."""
        return [sharding.local(p.detach()) for p in self.trained]

    def key(self, heldout: torch.Tensor, more: list[Any]) -> str:
        """Hash of all that decides the result, the weights that are started from included."""
        start = hashlib.sha256()
        for p in self.trained:
            start.update(sharding.whole(p.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
        data = [[fingerprint(t.cpu()), list(t.shape)] for t in (self.tokens, heldout)]
        plan = [asdict(self.settings), self.report.learning_rate, self.report.steps, self.report.trained_layers]
        return digest([more, plan, data, start.hexdigest()])

    def step_(self) -> int:
        """One optimizer step on the next rows; the tokens in them."""
        report, settings = self.report, self.settings
        begun, cpu = time.perf_counter(), time.process_time()
        rows = rows_of_step(report.step, len(self.tokens), rows_per_step(settings, self.tokens.shape[1]))
        loss = self._gradient_(rows)
        rate = report.learning_rate * warmup_then_cosine(report.step, report.steps) * SETBACK ** len(report.setbacks)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._clip_(1.0)
        self.optimizer.step()
        for master, p in zip(self.masters, self.own, strict=True):
            p.copy_(master.detach().to(self.stored))
        count = len(rows) * self.tokens.shape[1]
        report.seconds += time.perf_counter() - begun
        report.cpu_seconds += time.process_time() - cpu
        report.tokens += count
        spent = {"seconds": round(report.seconds, 2), "cpu_seconds": round(report.cpu_seconds, 2)}
        report.curve.append({"step": report.step + 1, "tokens": report.tokens, "loss": loss, **spent})
        return count

    def _gradient_(self, rows: torch.Tensor) -> float:
        """Fill the masters' float32 gradients with that of the mean loss over these rows; the loss.

        Each process takes its share of the passes and weighs it by its rows, so that the sum over all of them is the
        mean over the step's rows. Passes are made smaller where there are fewer than processes, but for "hidden",
        which is relative to the pass it is taken over: there a step's passes are always the same.
        Of a spread model every backward pass sums over the processes by itself.
        """
        total, model = 0.0, self.pair.student.model
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        batches = []
        for part, counts in sharding.in_step(model, self._passes(len(rows)), slice(0, 1)):
            batches.append((self.tokens[rows[part]], rows[part], len(rows[part]) / len(rows) if counts else 0.0))
        for loss in self.pair.backwards(batches):
            total += loss
            for master, p in zip(self.masters, self.trained, strict=True):
                if p.grad is not None and master.grad is not None:
                    master.grad.add_(sharding.local(p.grad))
                p.grad = None
        if not sharding.is_spread(model):
            processes.sum_(*(master.grad for master in self.masters if master.grad is not None))
        return processes.summed([total])[0]

    def _clip_(self, most: float) -> None:
        """Scale the gradients down where their norm, over all processes, is above `most`."""
        norm = nn.utils.get_total_norm([master.grad for master in self.masters if master.grad is not None])
        if sharding.is_spread(self.pair.student.model):
            norm = norm.new_tensor(math.sqrt(processes.summed([norm.item() ** 2])[0]))
        nn.utils.clip_grads_with_norm_(self.masters, most, norm)

    def _passes(self, rows: int) -> list[slice]:
        """This process's passes over the rows of a step."""
        size = max(1, PASS_TOKENS // self.tokens.shape[1])
        if self.settings.objective == "hidden":
            passes = list(slices(rows, size))
            return passes[processes.share(len(passes))]
        return processes.share_of_batches(rows, size)

    def note_score_(self, score: float) -> None:
        """Remember a held-out loss, the weights where they are the best so far, and whether to stop.

        A score that is not finite is the worst there is: it is never kept, and any finite one is better.
        """
        report, score = self.report, as_price(score)
        first = not report.heldout
        if not first and score < report.best:
            report.best_step = report.step
            self.best_state = [p.cpu().clone() for p in self.own]
        report.heldout.append({"step": report.step, "tokens": report.tokens, "loss": score})
        worse = math.isinf(score) or score > report.heldout[0]["loss"]
        if not first and worse and report.step < report.steps:
            self.step_back_()
        since = sum(point["step"] > report.best_step for point in report.heldout)
        report.stopped_early = 0 < self.settings.patience <= since and report.step < report.steps

    def step_back_(self) -> None:
        """Go on from the best state, slower, and with no momentum: the rate was too high for this model."""
        self.report.setbacks.append(self.report.step)
        for p, master, best in zip(self.own, self.masters, self.best_state, strict=True):
            master.copy_(best)
            p.copy_(best)
        for moments in self.optimizer.state.values():
            moments["exp_avg"].zero_()
            moments["exp_avg_sq"].zero_()

    def finish_(self) -> None:
        """Leave the student in its best state, frozen."""
        for p, value in zip(self.own, self.best_state, strict=True):
            p.copy_(value)
        for p in self.trained:
            p.requires_grad_(False)
            p.grad = None
        self.report.tokens_per_second = self.report.tokens / self.report.seconds if self.report.seconds else 0.0

    # --- to disk and back ---

    def save(self, state: StateFile, key: str) -> None:
        """Have the main process write it; whole, also of a spread model, so that any number of processes can go on."""
        if processes.is_main() or sharding.is_spread(self.pair.student.model):
            tensors = self.tensors()
            if processes.is_main():
                state.save(key, tensors, self.report.to_json())

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
        vars(self.report).update(facts)
        own = {
            name: [sharding.part_like(p, value) for p, value in zip(self.trained, values, strict=True)]
            for name, values in tensors.items()
        }
        for master, p, value in zip(self.masters, self.own, own["master"], strict=True):
            master.copy_(value)
            p.copy_(master.to(self.stored))
        self.best_state = [value.clone() for value in own["best"]]
        saved = self.optimizer.state_dict()
        saved["state"] = {
            i: {"step": torch.tensor(float(self.report.step)), "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in enumerate(zip(own["exp_avg"], own["exp_avg_sq"], strict=True))
        }
        self.optimizer.load_state_dict(saved)


def is_scored(step: int, steps: int) -> bool:
    """Whether the held-out loss is taken after step 1, 2, …, steps: `SCORES` times, evenly, the last among them."""
    return step * SCORES // steps > (step - 1) * SCORES // steps


def rows_per_step(settings: TuneSettings, window: int) -> int:
    """Rows of tokens in one optimizer step."""
    return max(1, settings.batch_tokens // window)


def rows_of_step(step: int, rows: int, batch: int) -> torch.Tensor:
    """The rows, of `rows`, that step 0, 1, … trains on: in their order, in later epochs in one drawn by its number."""
    epoch, place = divmod(step, math.ceil(rows / batch))
    order = torch.arange(rows)
    if epoch:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
    return order[place * batch : (place + 1) * batch]


def own_parameters_(student: DecoderRunner, positions: Sequence[int]) -> list[nn.Parameter]:
    """Give the layers at these positions parameters of their own, trainable, and return them."""
    own: list[nn.Parameter] = []
    for position in positions:
        if sharding.is_spread(student.model):
            student.layers[position] = sharding.trainable_copy(student.layer_at_rest(position))
            own += [p for p in student.layers[position].parameters() if p.requires_grad]
            continue
        for module in student.loaded(position).modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_floating_point():
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
