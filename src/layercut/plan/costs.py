"""What every stage holds at its peak and computes: one model of memory and work.

Memory is the weights, hidden states of some rows (streams), what a layer has alive or keeps for the way back, logits,
and the state of what is trained. Work is layers that rows of tokens go through, logits, and what is solved in float64.
Where a run depends on what it finds, memory is taken on the safe side and work as is usual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from layercut.config.commands import CompressConfig
from layercut.data.self_sampled import ROWS, ROWS_OF_ACCELERATOR
from layercut.export.formats import IMPORTANCE_TOKENS
from layercut.healing.recipe import trained_layers
from layercut.layer_search.concave_gate import Schedule, beginnings, gates
from layercut.layer_search.shortlist import EFFORTS
from layercut.models.memory import Budget
from layercut.pipeline.stages.heal import FOLD_TOKENS
from layercut.pipeline.stages.search import searched_rows
from layercut.plan.shape import Parts, Shape
from layercut.segments import Segment, kept_layers

Peak = dict[str, int]  # bytes that are held at once, by what takes them


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage computes; a layer that one row of tokens goes through counts one, as in `layer_search.Cost`."""

    forwards: float = 0
    backwards: float = 0
    flops: float = 0  # of layers forwards, and other products in the model's number format
    back: float = 0  # of the gradients of their inputs
    trained: float = 0  # and of their weights
    logits: float = 0  # numbers that the head gives and that are compared
    flops64: float = 0
    read: float = 0  # bytes from and to the disk
    moved: float = 0  # bytes copied through memory, where that and not arithmetic takes the time
    steps: float = 0  # layers called for tokens that are generated one by one
    wide_steps: float = 0  # the same of as many rows as chats are sampled in
    fixed: float = 0  # seconds on any machine, roughly

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def operations(self, shape: Shape) -> float:
        """Floating-point operations of all of it."""
        return self.flops + self.back + self.trained + 2 * self.logits * shape.hidden + self.flops64

    def __mul__(self, times: float) -> Work:
        return Work(**{f.name: getattr(self, f.name) * times for f in fields(self)})


@dataclass(frozen=True)
class Stage:
    """What one stage holds, and computes; None where that is not known."""

    peak: Peak
    work: Work | None

    def then(self, other: Stage) -> Stage:
        """One after the other."""
        work = None if self.work is None or other.work is None else self.work + other.work
        return Stage(max(self.peak, other.peak, key=total), work)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run in some place: what is asked, how large the model is there, and what one pass may take."""

    config: CompressConfig
    shape: Shape  # for rows of the calibration window
    tuned: Shape  # for rows of the window that is tuned on
    reported: Shape  # for rows of the window that perplexity is reported on
    segments: list[Segment]
    after: Parts  # the pruned model
    tests: int  # rows of probes that are searched on beside the text; as many are rounded on
    shortlisted: bool  # whether candidates are healed for a while before one is chosen
    foldable: bool = True  # whether any layer has what a fold solves
    budget: Budget
    libraries: int  # bytes of Python and its libraries where a stage computes on the CPU

    @property
    def length(self) -> int:
        """n, layers that go."""
        return sum(map(len, self.segments))

    @property
    def text(self) -> int:
        """Rows of calibration text."""
        return self.shape.rows_of(self.config.text.tokens)

    @property
    def heldout(self) -> int:
        """Rows that judge healing."""
        return self.shape.rows_of(max(1024, self.config.heal.tokens // 32))

    @property
    def on_disk(self) -> bool:
        """Whether layers are left there, so that all rows go through each together."""
        return self.config.load.place == "disk"

    @property
    def kept(self) -> list[int]:
        """Layers of the pruned model, by their number in the dense one."""
        return kept_layers(self.segments, self.shape.layers)

    @property
    def trained(self) -> list[int]:
        """Positions, in the pruned model, of the layers that are tuned."""
        return trained_layers(self.segments, self.shape.layers, self.config.heal)

    @property
    def healed_bytes(self) -> int:
        """Of the weights that healing changes, the largest layers taken."""
        heal, shape = self.config.heal, self.shape
        tuned = sum(sorted(shape.dense.layers)[-len(self.trained) :]) if heal.tokens and self.segments else 0
        return (tuned + (heal.fold and bool(self.segments)) * shape.hidden * sum(shape.read)) * shape.itemsize

    def chunk(self, shape: Shape, rows: int) -> int:
        """Numbers in a chunk of so many rows' logits."""
        return min(rows, self.budget.logit_rows(shape.window, shape.vocabulary)) * shape.window * shape.vocabulary


def total(peak: Peak) -> int:
    """Bytes of a peak."""
    return sum(peak.values())


def passes(shape: Shape, there: float, back: float = 0, *, heads: float, trained: float = 0, **more: Any) -> Work:
    """Rows through layers and head; `trained` layers compute a gradient of their weights too."""
    each, logits = shape.mean("flops"), heads * shape.window * shape.vocabulary
    of_layers = {"flops": there * each, "back": back * each, "trained": trained * each}
    return Work(forwards=there, backwards=back, logits=logits, **of_layers, **more)


def weights(shape: Shape, on_disk: bool) -> Peak:
    """What of the dense model's weights is in memory in any stage."""
    if on_disk:
        two = 2 * max(shape.dense.layers) * shape.itemsize
        return {"weights in memory": shape.outside * shape.itemsize, "two layers": two}
    return {"weights": shape.dense.total * shape.itemsize}


def stages(run: Planned) -> dict[str, Stage]:
    """What every stage but loading costs, the weights in its peak, in the run's order."""
    config, found = run.config, dict[str, Stage]()
    if run.segments and config.heal.tokens:
        found["text"] = chats(run)
    if config.shares_size:  # how many cuts are compared is not known
        found["shares"] = Stage(max(fold(run).peak, quantize(run).peak, key=total), None)
    if run.segments:
        judged = run.shortlisted and (run.foldable or EFFORTS[run.config.search.effort or "normal"].healed)
        found["search"] = search(run).then(shortlist(run)) if judged else search(run)
        if config.heal.fold:
            found["fold"] = fold(run)
        if config.heal.tokens:
            found["tune"] = tune(run)
    if config.quantize.rounds:
        found["quantize"] = quantize(run)
    found["eval"] = evaluate(run)
    if config.search.preserve != "none":
        found["capabilities"] = capabilities(run)
    found["export"] = export(run)
    held = weights(run.shape, run.on_disk)
    return {name: Stage(held | stage.peak, stage.work) for name, stage in found.items()}


def search(run: Planned) -> Stage:
    """The search by a criterion; what one of another package computes is unknown."""
    asked, shape, layers, n = run.config.search, run.shape, run.shape.layers, run.length
    text = searched_rows(run.text, asked)
    kept, rows = layers - n, text + run.tests

    def swept(sets: int) -> Peak:
        """So many cuts in one sweep: a hidden state for each, and a chunk of logits or one layer's activations."""
        batch = min(rows, run.budget.swept_rows(shape.window, shape.stream(1), sets))
        logits = run.chunk(shape, batch) * (shape.itemsize + (12 if shape.itemsize < 4 else 8))
        streams = (sets + 2) * shape.stream(rows if run.on_disk else batch)
        return {"streams": streams, "logits or layer": max(logits, batch * shape.most("live"))}

    def halved(sets: float, begin: int) -> Work:
        """Successive halving; half of the kept layers are behind a segment, on average."""
        work, seen, until = Work(), 0, min(rows, begin)
        while seen < rows:
            work += passes(shape, (until - seen) * (layers + sets * kept / 2), heads=(until - seen) * (sets + 1))
            seen, until, sets = until, min(rows, 2 * until), max(2, sets / 2)
        return work

    if asked.segments:
        return Stage(swept(2), passes(shape, rows * (layers + kept), heads=2 * rows))
    number = asked.num_segments if asked.num_segments != "auto" else 2 if run.tests and n > 1 else 1
    gate, gate_peak = concave_gate(run, min(n, number)) if asked.method == "clp" else (Work(), Peak())
    gate += halved(Schedule.finalists, max(2 + 2 * bool(run.tests), rows // 8))
    some, picked = max(2, rows // 8), passes(shape, text * (layers + kept / 2), heads=2 * text)
    fisher = passes(shape, some * (2 * layers - 1), some * (layers - 1), heads=2 * some)
    fisher += halved(24 if run.tests else 10, max(4, rows // 4))
    singly = text * (layers * (layers + 1) / 2 - 1)  # layers that rows enter for the model without each layer in turn
    works = {
        "exhaustive": passes(shape, rows * (layers + kept * (kept + 1) / 2), heads=rows * (kept + 2)),
        "race": halved(kept + 1, 4),
        "clp": gate,
        **dict.fromkeys(("auto", "fisher"), fisher),
        "perplexity": picked + passes(shape, singly, heads=text * layers),
        "sleb": picked + passes(shape, text * n * kept * (layers + 2) / 2, heads=text * n * layers),
        "taylor": picked + passes(shape, 2 * text * layers, text * layers, trained=text * layers, heads=2 * text),
        **dict.fromkeys(("block-influence", "angular", "cosine"), picked + passes(shape, text * layers, heads=0)),
        **dict.fromkeys(("random", "reverse-order"), picked),
    }
    work, peak = works.get(asked.method), swept(kept + 2)
    if work is not None and number > 1 and asked.method != "clp":
        # segments are cut alone, a few rows each, until their costs are known; of every set it is not known
        work = None if asked.method == "exhaustive" else work * (1 + number / 2)
    if asked.method == "clp":
        peak = max(gate_peak, swept(Schedule.finalists), key=total)
    elif asked.method in ("auto", "fisher"):
        logits = shape.window * shape.vocabulary * (2 * shape.itemsize + 8)
        step = {"streams": 2 * layers * shape.stream(1), "kept for backward": shape.most("saved"), "logits": logits}
        peak = max(step, peak, key=total)
    return Stage(peak, work)


def concave_gate(run: Planned, count: int) -> tuple[Work, Peak]:
    """The steps of gradient descent of K wells, by the gates of where they begin; and what the first of them holds."""
    shape, layers, n, schedule, work = run.shape, run.shape.layers, run.length, Schedule(), Work()
    share = 2.0 if run.tests else min(1.0, schedule.piece / shape.window)  # of a row, in a step
    sets = schedule.sets(layers, n, count)
    begun = beginnings(sets[0], layers, n, count, torch.Generator().manual_seed(run.config.text.seed))
    for step, number in enumerate(sets):
        open_ = [gates(walls, layers, schedule.sharpness_at(step, n, count)) for walls in begun]
        # a set of wells shares the dense stream up to its first wall, and passes over what is closed
        entered = sum(((g < 1).cumsum(0) > 0).logical_and(g > 0).sum().item() for g in open_) / len(open_)
        back = share * number * entered
        work += passes(shape, share * layers + back, back, heads=share * (2 * number + 1))
    stream, most = share * shape.stream(1), sets[0]
    kept = 40 * stream * layers * most
    if run.on_disk or kept > 2 * run.budget.streams:
        kept = stream * layers * most + share * shape.most("saved")
    logits = most * share * shape.window * shape.vocabulary * (2 * shape.itemsize + 8)
    return work, {"streams": round((most + 2) * stream), "kept for backward": round(kept), "logits": round(logits)}


def shortlist(run: Planned) -> Stage:
    """Candidates after a quick fold; with a high effort some after a short healing, and a few after a longer one."""
    shape, wide, effort = run.shape, widest(run.shape), EFFORTS[run.config.search.effort or "normal"]
    fit, probed = min(max(1, effort.fit_tokens // shape.window), run.text), run.tests > 0
    judged = min(run.heldout, effort.judged) * (1 + probed)
    solved = solved_flops(wide, shape.hidden, fit * shape.window, 6)
    each = passes(shape, (fit + judged) * shape.layers / 2, heads=2 * judged, flops64=solved)
    states = min(2**31, (shape.layers + 1) * shape.stream(fit + judged))
    rows, long = min(run.heldout, effort.heldout) + effort.short_tests * probed, effort.long_tests * probed
    folded, healed = (
        (2 * effort.pool + 3 + effort.proposed) * run.foldable,
        effort.healed + effort.places * effort.variants,
    )
    healed, longer = healed + bool(healed), min(3, effort.finalists)  # with the best by text alone
    once, trained = fold(run, effort.fold_tokens), tune(run)
    held = {"dense states": states + shape.stream(rows) + run.tuned.stream(long)}
    solving = {"normal equations": 32 * wide * (wide + shape.hidden)}
    peak = held | max([solving, *([once.peak, trained.peak] if healed else [])], key=total)
    seen = passes(shape, rows * shape.layers, heads=2 * rows) + passes(run.tuned, long * shape.layers, heads=long / 4)
    work = ((once.work or Work()) + seen) * (healed + longer)
    return Stage(peak, each * folded + work + (trained.work or Work()) * ((healed + 4 * longer) / 16))


def widest(shape: Shape) -> int:
    """Unknowns of the larger of the fold's two problems: both projections together, where that is not too wide."""
    return sum(shape.read) if sum(shape.read) <= 16384 else max(shape.read)


def solved_flops(unknowns: int, outputs: int, tokens: int, solves: int) -> float:
    """Operations on normal equations in float64: the sums Z'Z and Z'Y, and their solutions with their errors."""
    sums = 2 * tokens * unknowns * (unknowns + outputs)
    return sums + solves * (unknowns**3 / 3 + 4 * unknowns**2 * outputs)


def fold(run: Planned, most: int = FOLD_TOKENS) -> Stage:
    """Of each cut the dense stream to its end, sums in float64 to fit and to check on, KL before and after."""
    shape, d, itemsize = run.shape, run.shape.hidden, run.shape.itemsize
    every = min(shape.rows_of(run.config.text.tokens + run.config.heal.tokens), FOLD_TOKENS // shape.window)
    rows = min(max(run.text, every), max(1, most // shape.window))
    wide, few = widest(shape), min(rows, run.budget.layer_rows(shape.window))
    forwards = rows * sum(segment.stop + 2 for segment in run.segments)
    solved = sum(solved_flops(i, d, rows * shape.window, 3) for i in (wide, shape.read[1]))
    judged = 2 * run.heldout * (2 * shape.layers - run.length)
    work = passes(shape, forwards + judged, heads=4 * run.heldout, flops64=len(run.segments) * solved)
    adding = few * shape.window * (wide * (2 * itemsize + 8) + d * (4 * itemsize + 12))
    peak = {
        "streams": 3 * shape.stream(rows if run.on_disk else few),
        "both ends of the cut": min(2**30, 2 * shape.stream(rows)),
        "normal equations": 16 * wide * (wide + d),
        "solving": max(8 * wide * (2 * wide + 4 * d), adding, few * shape.most("live")),
    }
    chunk = run.chunk(shape, run.heldout)
    streams = run.heldout if run.on_disk else -(-chunk // (shape.window * shape.vocabulary))
    kl = {"streams": 3 * shape.stream(streams), "logits": chunk * (2 * itemsize + (12 if itemsize < 4 else 8))}
    return Stage(max(peak, kl, key=total), work)


def chats(run: Planned) -> Stage:
    """Sampling the chats that are tuned on, many rows at a time, by the token; none where layers are on disk."""
    shape, heal, steps, rows, peak = run.shape, run.config.heal, 0, 0.0, {"cache": 0, "next tokens": 0}
    batch = ROWS if run.libraries else ROWS_OF_ACCELERATOR
    uses = ((run.tuned.window, heal.tokens), (shape.window, run.heldout * shape.window))
    for window, tokens in () if run.on_disk else uses:
        length = min(window, 256)
        count = math.ceil(heal.chat_share * tokens / length)
        steps, at_once = steps + -(-count // batch) * length, min(count, batch)
        rows += count * length / shape.window
        peak["cache"] = max(peak["cache"], at_once * length * (shape.dense.kv_bytes_per_token or 0))
        # of each token of the vocabulary 12 bytes: logits, their copy and what they become
        peak["next tokens"] = max(peak["next tokens"], at_once * shape.vocabulary * 12)
    # of each token of the vocabulary a logit, and what it is drawn by
    return Stage(peak, passes(shape, 0, heads=rows, wide_steps=steps * shape.layers))


def tune(run: Planned, *, rounded: bool = False) -> Stage:
    """Training: the teacher forwards, the student from the first trained layer on there and back.

    Of the layers that are trained; rounded: of the scales and norms of every layer, and of the rounding where asked.
    """
    shape, held, kept, heal = run.tuned, run.shape, run.kept, run.config.heal
    layers = len(kept)
    positions = [*range(layers)] if rounded else run.trained
    first, teacher = min(positions), layers if rounded else held.layers
    rows, scored = shape.rows_of(heal.tokens), 9 * run.heldout  # eight times during training
    work = passes(
        shape, rows * (layers - first + teacher), rows * (layers - first), trained=rows * len(positions), heads=3 * rows
    ) + passes(held, run.heldout * teacher + scored * (layers - first), heads=2 * scored)
    step = min(max(1, heal.batch_tokens // shape.window), rows)
    together = min(step, max(1, run.budget.pass_tokens // shape.window))
    # both models' logits of a piece, their gradient and one copy
    logits = 4 * min(run.budget.piece, together * shape.window * shape.vocabulary * shape.itemsize)
    saved = {
        i: shape.costs[kept[i]].saved_trained if i in positions else shape.costs[kept[i]].saved for i in range(layers)
    }
    learned, peak = sum(shape.dense.layers[kept[i]] for i in positions), Peak()
    if rounded:
        group, whole = run.config.quantize.group_size or 128, run.config.heal.tune_quantized == "rounding"
        learned = run.after.matrices // group + run.after.matrices * whole
        # and their gradients, and the codes where these stay
        peak["decoded weights"] = run.after.matrices * (2 * shape.itemsize + (not whole))
    # of a trained number its master, gradient and AdamW's moments in float32, itself, its gradient and its best value
    peak["trained state"] = learned * (16 + 3 * shape.itemsize)
    if run.on_disk:
        peak["inputs of a step"] = (layers - first + 2) * shape.stream(step)
        peak["logits or layer"] = max(logits, together * shape.most("saved_trained"))
    else:
        peak |= {"kept for backward": together * sum(saved[i] for i in range(first, layers)), "logits": logits}
    return Stage(peak | {"held-out states": (2 + run.on_disk) * held.stream(run.heldout)}, work)


def quantize(run: Planned) -> Stage:
    """Rounding: Hessians of what matrices read, solved in float64; below 8 bits, what tokens count and scales too."""
    shape, asked, layers, matrices = run.shape, run.config.quantize, len(run.after.layers), run.after.matrices
    rows, calibrated = run.text + run.tests, asked.quantizer != "rtn"
    bits = 4 if asked.bits == "auto" else asked.bits
    small = calibrated and asked.small
    # a weight is read or written ten times in float32 for each range that is tried: a guess
    tried = 40 * (8 if small else 4 if bits <= 4 else 1)
    peak, work = {"rounded weights": matrices * (shape.itemsize + 1)}, Work(moved=matrices * tried)
    if calibrated:
        inputs = (shape.hidden, shape.hidden, *shape.read)
        read = [*inputs, *[shape.hidden] * 3 * small]
        # of a weight 2 O I^2 each: its errors at the output, and products of its size with the Hessian
        errors, products = (19, 21) if small else (5, 1)
        each, mean = sum(width**2 for width in read), sum(inputs) / 4
        solved = 2 * errors * matrices * mean + 3 * layers * sum(width**3 for width in read)
        gathered = 2 * layers * rows * shape.window * each + 2 * products * matrices * mean
        work += passes(shape, 2 * rows * layers, heads=0, flops64=solved) + Work(flops=gathered)
        peak |= {"streams": 2 * shape.stream(rows), "Hessians": 32 * sum(width**2 for width in inputs)}
        if small:
            peak["Hessians"] += 24 * shape.hidden**2
            peak["scales fitted"] = 2 * min(2**28, 4 * max(inputs) ** 3 // (asked.group_size or 32) ** 2)
        if asked.small_head:
            work += passes(shape, rows * layers, heads=0, flops64=38 * shape.vocabulary * shape.hidden**2)
            peak["logits"] = shape.itemsize * run.chunk(shape, rows)
            peak["errors"] = 40 * min(2048, shape.vocabulary) * shape.hidden
    found = Stage(peak, work)
    for is_asked, some in ((small, rows), (asked.bits == "auto", min(rows, max(1, 2048 // shape.window)))):
        if is_asked:  # what each token counts, and what each matrix costs at each width
            together = min(some, max(1, run.budget.pass_tokens // shape.window))
            kept, logits = together * round(layers * shape.mean("saved")), 12 * run.chunk(shape, together)
            back = passes(shape, some * layers, some * layers, heads=2 * some)
            found = found.then(Stage({"kept for backward": kept, "logits": logits}, back))
    tuned = run.config.heal.tune_quantized
    trains = run.config.heal.tokens and (bits < 8 if tuned == "auto" else tuned != "none")
    return found.then(tune(run, rounded=True)) if trains else found


def round_healed(run: Planned, read: int) -> Stage:
    """Healed tensors of a GGUF file of so many bytes: a Hessian for each matrix of a layer, inverted in float64."""
    shape, cuts, inputs = run.shape, len(run.segments), [run.shape.hidden] * 5 + [*run.shape.read]
    changed, rows = 2 * cuts * max(shape.dense.layers), min(run.text, shape.rows_of(IMPORTANCE_TOKENS))
    solved = 2 * cuts * sum(2 * width**3 for width in inputs)
    work = passes(shape, rows * len(run.after.layers), heads=0, moved=40 * changed, read=2 * read, flops64=solved)
    factors = 8 * sum(width**2 for width in inputs) + 24 * max(inputs) ** 2
    peak = {"healed weights": 4 * changed, "Hessians": factors, "streams": 2 * shape.stream(rows)}
    return Stage(weights(shape, run.on_disk) | peak, work)


def by_llama_cpp(run: Planned) -> Stage:
    """llama.cpp's check of a GGUF file and nine rounds of 32 tokens of each file, twice as fast as transformers'."""
    return Stage({}, Work(steps=9 * 32 * (run.shape.layers + len(run.after.layers)) / 2, fixed=12))


def evaluate(run: Planned) -> Stage:
    """Perplexity of every state, what the dense and the last model write, and their speed."""
    shape, kept, config, layers = run.reported, len(run.after.layers), run.config, run.reported.layers
    rows = shape.rows_of(config.evaluate.eval_tokens)
    # of the states before the last a quarter of the windows
    passed = rows * (1 + (config.heal.fold + bool(config.heal.tokens) + config.quantize.rounds) / 4)
    written = 8 * 96 / shape.window
    forwards = rows * layers + passed * kept + 2 * written * layers
    dense_steps = cut_steps = 5 * 64 + 64
    if config.evaluate.speed:  # six rounds of a prompt of 512 tokens and 24 more, the dense model twice
        forwards += 6 * 512 / shape.window * (2 * layers + kept)
        dense_steps, cut_steps = dense_steps + 288, cut_steps + 144
    steps = dense_steps * layers + cut_steps * kept
    work = passes(shape, forwards, heads=rows + passed + 2 * written, steps=steps)
    together = min(rows, run.budget.logit_rows(shape.window, shape.vocabulary))
    # where one row's logits are too many, those of a part of it
    some = min(together * shape.window, 4 * run.budget.logit_tokens(shape.vocabulary) // shape.itemsize)
    most = max(2 * some * shape.vocabulary * shape.itemsize, together * shape.most("live"))
    streams = 2 * shape.stream(rows) * run.on_disk
    return Stage({"streams": streams, "logits or layer": most, "healed weights": run.healed_bytes}, work)


def capabilities(run: Planned) -> Stage:
    """Probes: 48 rows of 256 tokens, and of four longer lengths; with --probes the map of layers on twelve rows."""
    shape, layers, kept = run.shape, run.shape.layers, len(run.after.layers)
    entered, heads = (48 * 256 + 8 * 1920) / shape.window * (layers + kept), 0
    if run.config.tasks.probes:
        entered, heads = entered + 12 * layers * (layers + 1) / 2, 12 * (layers + 1)
    return Stage({"layer": shape.most("live")}, passes(shape, entered, heads=heads))


def export(run: Planned) -> Stage:
    """Writing the checkpoint, and the fresh process that reads it in float32, generates and measures it again.

    Where memory is short, or layers are on disk, that process leaves them there.
    """
    shape, after, layers = run.shape, run.after, len(run.after.layers)
    size, wide = after.total * shape.itemsize, 4 * after.total
    rows = (1 + max(1, 4 // shape.itemsize)) * shape.rows_of(min(4096, run.config.evaluate.eval_tokens))
    more = {"read": 2 * size, "moved": wide + 5 * size, "steps": 24 * layers, "fixed": 8}
    work = passes(shape, rows * layers, heads=rows, **more)
    fresh = min(total(weights(shape, True)), size + wide) + run.libraries
    return Stage({"fresh process": fresh, "healed weights": (1 + run.on_disk) * run.healed_bytes}, work)
