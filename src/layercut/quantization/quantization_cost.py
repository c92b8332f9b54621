"""What quantization computes and holds, told beforehand, by the sizes of `__init__.py`, `sensitivity.py` and `gptq.py`.

The shapes of the single matrices are not in a `Shape`: their columns are reckoned as the mean of what the linear
modules of a layer read. So operations are estimates; layers and rows are counted.
"""

from __future__ import annotations

from layercut.models.cost import Peak, PlannedRun, Spent, Work, total
from layercut.quantization import sensitivity
from layercut.quantization.coordinate_descent import PASSES
from layercut.quantization.grid import ROWS, SEARCHED_BITS, SHARES
from layercut.quantization.scales import EQUATIONS_BYTES, TURNS

MATRICES, WIDTHS = 7, 28
"""Of a layer, and what is tried for each where bits are chosen: those of a Llama."""
SMALLEST_GROUP = 32
"""Columns that share a scale, where the config does not say how many."""
TOUCHED = 10
"""Times that rounding a weight reads or writes it in float32, for each range that is tried. A guess."""

ERRORS, PRODUCTS = 2 * TURNS + 11, 2 + TURNS + (TURNS + 1) * (PASSES + 1)
"""Below 8 bits, of each weight: times that its error at the output is taken, and products of its size with H."""


def quantize_cost(run: PlannedRun, *, calibrated: bool) -> Spent:
    """What quantizing the healed model costs, without what is trained afterwards.

    Of every calibration row each layer is run twice, to gather what its modules read and for the layer after it. Below
    8 bits the whole model runs forwards and backwards once before, for what each token counts, and scales are fitted by
    turns. Where bits are chosen, of the first rows forwards and backwards once more.
    """
    shape, layers, matrices, bits = run.shape, len(run.after.layers), run.after.matrices, run.config.quantize.bits
    small = calibrated and run.config.quantize.small
    ranges = len(SHARES) * (2 if small else 1) if small or bits == "auto" or bits <= SEARCHED_BITS else 1
    work = Work(moved_bytes=4 * matrices * TOUCHED * ranges)
    held = matrices * (shape.itemsize + 1)  # rounded weights beside those before, and their codes
    peak: Peak = {"rounded weights": held}
    if not calibrated:
        return _with_passes(run, Spent(peak, work), weighted=False)
    rows, inputs = run.rounded, _inputs(run)
    read = [*inputs, *[shape.hidden] * (MATRICES - len(inputs))] if small else inputs  # a Hessian for every matrix
    squares, mean = sum(width**2 for width in read), sum(inputs) / len(inputs)
    # of a weight 2 O I^2 each: errors at the output; codes that compensate, are exchanged, and scales for them
    errors, products = (ERRORS, PRODUCTS) if small else (5, 1)
    solved = 2 * errors * matrices * mean + layers * 3 * sum(width**3 for width in read)  # a factor: three times I^3
    gathered = layers * rows * shape.window * 2 * squares + 2 * products * matrices * mean
    work += Work.of(shape, 2 * rows * layers, heads=0, flops64=solved) + Work(flops=gathered)
    peak |= {"streams": 2 * shape.stream(rows), "Hessians": 4 * 8 * sum(width**2 for width in inputs)}
    if small:
        peak["Hessians"] += 8 * (MATRICES - len(inputs)) * shape.hidden**2
        groups = max(inputs) / (run.config.quantize.group_size or SMALLEST_GROUP)
        peak["scales fitted"] = 2 * min(EQUATIONS_BYTES, round(4 * groups**2 * max(inputs)))
    if run.config.quantize.small_head:
        head = _head_cost(run)
        work, peak = work + head.work if head.work else work, peak | head.peak
    return _with_passes(run, Spent(peak, work), weighted=small)


def _with_passes(run: PlannedRun, spent: Spent, *, weighted: bool) -> Spent:
    """With the passes forwards and backwards before anything is rounded."""
    window = run.shape.window
    passes = [_backwards(run, run.rounded, Work())] if weighted else []
    if run.config.quantize.bits == "auto":
        inputs, rows = _inputs(run), min(run.rounded, max(1, sensitivity.TOKENS // window))
        tried = MATRICES * WIDTHS * len(run.after.layers)
        products = 2 * sensitivity.ROWS * rows * window * sum(inputs) / len(inputs) * tried
        passes.append(_backwards(run, rows, Work(flops=products)))
    work, peak = spent.work or Work(), spent.peak
    for each in passes:
        work, peak = work + (each.work or Work()), max(peak, each.peak, key=total)
    return Spent(peak, work)


def _head_cost(run: PlannedRun) -> Spent:
    """One more pass of the calibration rows, for what the head reads, and its rounding."""
    shape, rows, square = run.shape, run.rounded, run.shape.hidden**2
    solved = 2 * ERRORS * shape.vocabulary * square + 3 * shape.hidden**3
    gathered = 2 * square * (rows * shape.window + PRODUCTS * shape.vocabulary)
    together = min(rows, run.budget.logit_rows(shape.window, shape.vocabulary))
    peak = {
        "logits": shape.itemsize * together * shape.window * shape.vocabulary,
        "errors": 5 * 8 * min(ROWS, shape.vocabulary) * shape.hidden,
    }
    return Spent(peak, Work.of(shape, rows * len(run.after.layers), heads=0, flops64=solved) + Work(flops=gathered))


def _backwards(run: PlannedRun, rows: int, beside: Work) -> Spent:
    """Rows once forwards and backwards, and what is computed on the way."""
    shape, layers = run.shape, len(run.after.layers)
    kept = round(layers * shape.mean("kept"))
    fit = min(run.budget.pass_rows(shape.window, kept), run.budget.logit_rows(shape.window, shape.vocabulary))
    together = min(rows, fit)
    work = Work.of(shape, rows * layers, rows * layers, heads=2 * rows) + beside
    saved = round(layers * shape.mean("saved"))
    logits = 3 * 4 * together * shape.window * shape.vocabulary
    return Spent({"kept for backward": together * saved, "logits": logits}, work)


def _inputs(run: PlannedRun) -> tuple[int, int, int, int]:
    """Columns of the Hessians of a layer: of what attention and MLP read, and their output projections."""
    return run.shape.hidden, run.shape.hidden, *run.shape.read
