"""Peaks of the stages where the decoder layers are left on disk: beside `models/memory.py`, in the same terms.

In memory are what is no layer, the layer at work and the one that is read ahead. Rows go through a layer together
(`runner.passes`), so that hidden states of all of them are held; where those would not fit, a run takes several passes,
and what is said here is that of one.
"""

from __future__ import annotations

from layercut.config import CompressConfig
from layercut.estimate import memory_peaks
from layercut.estimate.memory_peaks import Peak
from layercut.estimate.shape import Shape
from layercut.estimate.work import descent_entered, fold_rows, held_out_tokens, rows_of
from layercut.healing.endpoint_tuning import endpoints
from layercut.layer_search.clp import schedule_for
from layercut.layer_search.sweep import DENSE, all_segments, streams_held
from layercut.pipeline.stages.heal import objective
from layercut.segments import Segment


def weights(shape: Shape) -> Peak:
    """Embeddings, head and final norm, and two layers."""
    rest = shape.dense.total - sum(shape.dense.layers)
    return {
        "weights in memory": rest * shape.itemsize,
        "two layers": 2 * max(shape.dense.layers) * shape.itemsize,
    }


def load(shape: Shape, stored: int) -> Peak:
    """No layer is read yet, but one of random weights is made to try the model's structure. stored: bytes of a number
    in the files; where the model computes in another format, what was read is there beside what it became."""
    rest, layer = weights(shape)["weights in memory"], max(shape.dense.layers) * shape.itemsize
    read = rest // shape.itemsize * stored if stored != shape.itemsize else 0
    return {"weights in memory": rest, "one layer or as read": max(layer, read)}


def search(shape: Shape, config: CompressConfig, length: int, given: bool, rows: int) -> Peak:
    """The streams of all rows, then a chunk of logits or a layer at work. In a step of the gate the input of every
    layer that was entered, and what one of them keeps for its backward pass."""
    layers = shape.layers
    sets = [DENSE] if given else [DENSE, *((segment,) for segment in all_segments(length, layers))]
    swept = _swept(shape, streams_held(sets, layers), rows)
    if given or config.search.method != "clp":
        return swept
    places = schedule_for(layers, length, 1, rows).particles
    entered = descent_entered(layers, length, places).expected
    row, logits = shape.window * shape.hidden * shape.itemsize, shape.window * shape.vocabulary
    step = {
        "kept for backward": round(entered) * row + places * max(cost.saved for cost in shape.costs),
        "streams": 3 * places * row,
        "logits": places * logits * (shape.itemsize + 8) + logits * 4,
    }
    return max(step, swept, key=memory_peaks.total)


def fold(shape: Shape, config: CompressConfig) -> Peak:
    """Three hidden states of all rows beside the normal equations and what solves them."""
    folded = {
        "streams": 3 * fold_rows(config) * shape.window * shape.hidden * shape.itemsize,
        "normal equations": 2 * memory_peaks.normal_equations(shape),
        "solving": memory_peaks.solving(shape),
    }
    held = rows_of(held_out_tokens(config), shape.window)
    return max(folded, _swept(shape, 3, held, compared=2), key=memory_peaks.total)


def tune(shape: Shape, config: CompressConfig, segment: Segment) -> Peak:
    """State of the trained layers; every layer's input for the rows of a step, from the first of them to the end; what
    one layer keeps for the backward pass of one pass; the held-out rows' states."""
    heal, at_rest = config.heal, memory_peaks.tune(shape, config, segment)
    trained = endpoints([segment], shape.layers, heal.radius)
    kept = shape.layers - len(segment)
    stop = max(trained) + 1 if objective(heal).reads == "hidden" else kept
    token = shape.hidden * shape.itemsize
    step = min(max(heal.batch_tokens, shape.window), heal.tune_tokens)
    held = rows_of(held_out_tokens(config), shape.window) * shape.window
    backward = memory_peaks.pass_rows(shape, config) * max(cost.saved_trained for cost in shape.costs)
    return {
        "trained state": at_rest["trained state"],
        "inputs of a step": (stop - min(trained) + 2) * step * token,
        "held-out states": 3 * held * token,
        "logits or layer": max(memory_peaks.tuning_logits(shape, config), backward),
    }


def evaluate(shape: Shape, config: CompressConfig) -> Peak:
    """Two hidden states of all rows and a chunk of logits; the healed weights of one state."""
    rows = rows_of(config.evaluate.eval_tokens, shape.window)
    healed = memory_peaks.evaluate(shape, config)["healed weights"]
    return _swept(shape, 2, rows) | {"healed weights": healed}


def export(shape: Shape, config: CompressConfig, base: int) -> Peak:
    """Files are copied by range."""
    healed = memory_peaks.evaluate(shape, config)["healed weights"]
    return {"fresh process": verified(shape, base), "healed weights": 2 * healed}


def verified(shape: Shape, base: int) -> int:
    """Bytes of the fresh process that opens the result with its layers on disk and computes 64 tokens; of a run in
    memory where there is not more (`checkpoint.verify`). base: Python and its libraries."""
    return memory_peaks.total(weights(shape)) + base


def _swept(shape: Shape, streams: int, rows: int, compared: int = 1) -> Peak:
    held = streams * rows * shape.window * shape.hidden * shape.itemsize
    at_work = min(rows, memory_peaks.SWEPT_ROWS) * shape.most("live")
    return {"streams": held, "logits or layer": max(memory_peaks.compared_logits(shape, rows, compared), at_work)}
