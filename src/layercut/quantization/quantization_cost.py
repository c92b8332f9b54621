"""What quantization computes and holds, told beforehand, by the sizes of `__init__.py`, `sensitivity.py` and `gptq.py`.

The shapes of the single matrices are not in a `Shape`: their columns are reckoned as the mean of what the linear
modules of a layer read. So operations are estimates; layers and rows are counted.
"""

from __future__ import annotations

from layercut.models.cost import Peak, PlannedRun, Spent, Work, total
from layercut.quantization import sensitivity
from layercut.quantization.gptq import ROWS
from layercut.quantization.grid import SEARCHED_BITS, SHARES

MATRICES, WIDTHS = 7, 16
"""Of a layer, and what is tried for each where bits are chosen: those of a Llama."""
PASSES = 10
"""Times that rounding a weight reads or writes it in float32, for each range that is tried. A guess."""


def quantize_cost(run: PlannedRun, *, calibrated: bool) -> Spent:
    """What quantizing the healed model costs, without what is trained afterwards.

    Of every calibration row each layer is run twice, to gather what its modules read and for the layer after it. Where
    bits are chosen, of the first rows forwards and backwards once more.

    Args:
        run: what is planned; its config says how many bits.
        calibrated: whether the quantizer asks for Hessians.

    Returns:
        Its cost.
    """
    shape, layers, matrices, bits = run.shape, len(run.after.layers), run.after.matrices, run.config.quantize.bits
    ranges = len(SHARES) if bits == "auto" or bits <= SEARCHED_BITS else 1
    work = Work(moved_bytes=4 * matrices * PASSES * ranges)
    held = matrices * (shape.itemsize + 1)  # rounded weights beside those before, and their codes
    peak: Peak = {"rounded weights": held}
    if calibrated:
        rows, inputs = run.calibration, _inputs(run)
        squares, mean = sum(width**2 for width in inputs), sum(inputs) / len(inputs)
        # errors at the output of four weights, 2 O I^2 each, and of a factor three times I^3
        solved = 8 * matrices * mean + layers * 3 * sum(width**3 for width in inputs)
        gathered = layers * rows * shape.window * 2 * squares + 2 * matrices * mean
        work += Work.of(shape, 2 * rows * layers, heads=0, flops64=solved) + Work(flops=gathered)
        peak |= {"streams": 2 * shape.stream(rows), "Hessians": 4 * 8 * squares}
        if run.config.quantize.small_head:
            head = _head_cost(run)
            work, peak = work + head.work if head.work else work, peak | head.peak
    if bits == "auto":
        measured = _measured(run)
        work = work + measured.work if measured.work else work
        peak = max(peak, measured.peak, key=total)
    return Spent(peak, work)


def _head_cost(run: PlannedRun) -> Spent:
    """One more pass of the calibration rows, for what the head reads, and its rounding."""
    shape, rows, square = run.shape, run.calibration, run.shape.hidden**2
    solved = 8 * shape.vocabulary * square + 3 * shape.hidden**3
    gathered = 2 * square * (rows * shape.window + shape.vocabulary)
    together = min(rows, run.budget.logit_rows(shape.window, shape.vocabulary))
    peak = {
        "logits": shape.itemsize * together * shape.window * shape.vocabulary,
        "errors": 5 * 8 * min(ROWS, shape.vocabulary) * shape.hidden,
    }
    return Spent(peak, Work.of(shape, rows * len(run.after.layers), heads=0, flops64=solved) + Work(flops=gathered))


def _measured(run: PlannedRun) -> Spent:
    """One pass forwards and backwards, and the products of rounded rows with what their modules read."""
    shape, layers = run.shape, len(run.after.layers)
    rows = min(run.calibration, max(1, sensitivity.TOKENS // shape.window))
    inputs = _inputs(run)
    products = 2 * sensitivity.ROWS * rows * shape.window * sum(inputs) / len(inputs) * MATRICES * WIDTHS * layers
    together = min(rows, run.budget.pass_rows(shape.window, 0), run.budget.logit_rows(shape.window, shape.vocabulary))
    work = Work.of(shape, rows * layers, rows * layers, heads=2 * rows) + Work(flops=products)
    saved = round(layers * shape.mean("saved"))
    logits = 3 * 4 * together * shape.window * shape.vocabulary
    return Spent({"kept for backward": together * saved, "logits": logits}, work)


def _inputs(run: PlannedRun) -> tuple[int, int, int, int]:
    """Columns of the Hessians of a layer: of what attention and MLP read, and their output projections."""
    return run.shape.hidden, run.shape.hidden, *run.shape.read
