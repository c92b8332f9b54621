"""How much memory each stage needs at its peak: which tensors are alive at that moment, and how large they are.

One function a stage. Each returns the parts of its peak in bytes, so that what dominates can be seen and changed; the
weights of the dense model are in every one. Figures are of the device that holds the model; on a CPU that is the
process itself, and what Python and its libraries take comes on top.

s is the bytes of a number in the model's format; logits are [rows, T, V] and never more rows than fit
`losses.rows_per_chunk`, except in the gate, which takes all its places at once.
"""

from __future__ import annotations

from layercut.config import CompressConfig
from layercut.estimate.shape import Shape
from layercut.estimate.work import descent_entered, fold_systems, held_out_tokens, rows_of
from layercut.healing.endpoint_tuning import PASS_TOKENS, endpoints
from layercut.layer_search.clp import schedule_for
from layercut.layer_search.sweep import all_segments
from layercut.models.losses import PIECE_BYTES, rows_per_chunk
from layercut.pipeline.stages.heal import objective
from layercut.segments import Segment

SWEPT_ROWS = 8
"""Rows that sweep and fold carry at once: the default of `set_costs` and of `fold_`."""

Peak = dict[str, int]


def chunk_logits(shape: Shape, rows: int) -> int:
    """Numbers in one chunk of the logits of so many rows."""
    return min(rows, rows_per_chunk(shape.window, shape.vocabulary)) * shape.window * shape.vocabulary


def compared_logits(shape: Shape, rows: int, kept: int) -> int:
    """KL of one chunk. Beside `kept` sets of logits in the model's format: p, and of the student's logits a float32
    copy and the exponentials that logsumexp makes of it. A float32 model needs no copy."""
    copies = 3 if shape.itemsize < 4 else 2
    return chunk_logits(shape, rows) * (kept * shape.itemsize + 4 * copies)


def load(shape: Shape, *, gguf: bool, mapped: bool, device: str) -> Peak:
    """The weights, read on the CPU and, for an accelerator, moved there.

    Safetensors in the model's own format are mapped, not read: the file's pages are the weights, and come in when
    they are first used. In another format they are converted, tensor by tensor. Of a GGUF file every tensor is
    dequantized to float32 before the first is rounded to the model's format, and each is let go as it is rounded.
    """
    weights = shape.dense.total * shape.itemsize
    if device != "cpu":
        return {"weights": weights}
    if gguf:
        return {"weights in float32": 4 * shape.dense.total}
    return {"weights, mapped": 0} if mapped else {"weights": weights}


def sweep(shape: Shape, streams: int, rows: int) -> Peak:
    """Every stream [rows, T, D] at the end of a sweep, and then either one layer at work or a chunk of logits."""
    rows = min(rows, SWEPT_ROWS)
    logits = max(_teacher(shape, rows), compared_logits(shape, rows, 1))
    return {
        "streams": streams * rows * shape.window * shape.hidden * shape.itemsize,
        "logits or layer": max(logits, rows * shape.most("live")),
    }


def _teacher(shape: Shape, rows: int) -> int:
    """Making p: the dense logits, their float32 copy or p, and log p."""
    return chunk_logits(shape, rows) * (shape.itemsize + 8)


def exhaustive(shape: Shape, length: int, rows: int) -> Peak:
    """The sweep with a stream for every segment and the dense one."""
    return sweep(shape, len(all_segments(length, shape.layers)) + 1, rows)


def clp(shape: Shape, length: int, rows: int) -> Peak:
    """One step of the descent, or the look at all segments, whichever is larger.

    In a step autograd keeps what every gated layer needs for its backward pass, with the difference that the gate
    scales; P rows of logits are made at once, with a float32 copy and p spread over them, or, backwards, the
    logits' gradient in float32 beside the copy it is made from.
    """
    places = schedule_for(shape.layers, length, 1, rows).particles
    entered = descent_entered(shape.layers, length, places).expected
    row = shape.window * shape.hidden * shape.itemsize
    saved = round(entered * (shape.total("saved") / shape.layers + row))
    logits = shape.window * shape.vocabulary
    step = {
        "kept for backward": saved,
        "streams": 3 * places * row,
        "logits": places * logits * (shape.itemsize + 8) + logits * 4,
    }
    looked = sweep(shape, len(all_segments(length, shape.layers)) + 1, rows)
    return max(step, looked, key=lambda peak: sum(peak.values()))


def fold(shape: Shape, rows: int, held: int) -> Peak:
    """Normal equations beside what solves them, or beside the streams of a few rows and float64 copies of what they
    read and lack. Or, before and after, KL on the rows held out."""
    wide, tokens = max(fold_systems(shape)), min(rows, SWEPT_ROWS) * shape.window
    equations = normal_equations(shape)
    # what the rows add, before it is added; z in the model's format, side by side and in float64, y in float32 and 64
    adding = equations + tokens * (wide * (2 * shape.itemsize + 8) + shape.hidden * (4 * shape.itemsize + 12))
    working = max(solving(shape), adding, min(rows, SWEPT_ROWS) * shape.most("live"))
    return max(
        {"normal equations": 2 * equations, "solving": working},
        {"logits": compared_logits(shape, held, 2)},
        key=total,
    )


def normal_equations(shape: Shape) -> int:
    """Z'Z and Z'Y in float64, of the wider of the fold's systems."""
    wide = max(fold_systems(shape))
    return 8 * wide * (wide + shape.hidden)


def solving(shape: Shape) -> int:
    """Z'Z with the ridge and its factors; X, what Z'Z makes of it, and their product with Z'Y; all in float64."""
    wide = max(fold_systems(shape))
    return 8 * wide * (2 * wide + 3 * shape.hidden)


def tune(shape: Shape, config: CompressConfig, segment: Segment) -> Peak:
    """State of the trained layers, activations from the first of them to the end for one pass, and a piece of logits.

    Each trained parameter has its own copy, gradient and best value in the model's format, and in float32 the master,
    its gradient and two moments. On an accelerator the best values lie in the CPU's memory.
    """
    heal = config.heal
    trained = endpoints([segment], shape.layers, heal.radius)
    kept = [i for i in range(shape.layers) if not segment.start <= i < segment.stop]
    parameters = sum(shape.dense.layers[kept[p]] for p in trained)
    stop = max(trained) + 1 if objective(heal).reads == "hidden" else len(kept)
    saved = sum(
        shape.costs[kept[p]].saved_trained if p in trained else shape.costs[kept[p]].saved
        for p in range(min(trained), stop)
    )
    held = rows_of(held_out_tokens(config), shape.window)
    return {
        "trained state": parameters * (3 * shape.itemsize + 16),
        "kept for backward": pass_rows(shape, config) * saved,
        "logits": tuning_logits(shape, config) if objective(heal).reads == "logits" else 0,
        "held-out states": 2 * held * shape.window * shape.hidden * shape.itemsize,
    }


def pass_rows(shape: Shape, config: CompressConfig) -> int:
    """Rows of one forward and backward pass of tuning."""
    step = min(max(1, config.heal.batch_tokens // shape.window), rows_of(config.heal.tune_tokens, shape.window))
    return min(step, max(1, PASS_TOKENS // shape.window))


def tuning_logits(shape: Shape, config: CompressConfig) -> int:
    """Both models' logits of one piece of a pass, their gradient and one copy."""
    return 4 * min(PIECE_BYTES, pass_rows(shape, config) * shape.window * shape.vocabulary * shape.itemsize)


def evaluate(shape: Shape, config: CompressConfig) -> Peak:
    """A chunk of rows through the whole model: one layer at work, or logits, and of them those that predict something.
    Where one row's logits are too many, those of a part of it. The states share the dense weights; of those that
    healing changed there is one set at a time. shape: for the window that perplexity is reported on."""
    part = rows_per_chunk(1, shape.vocabulary)
    if shape.window > part:
        rows, logits = 1, part * shape.vocabulary
    else:
        logits = chunk_logits(shape, rows_of(config.evaluate.eval_tokens, shape.window))
        rows = logits // (shape.window * shape.vocabulary)
    logits *= 2 * shape.itemsize
    trained = sorted(shape.dense.layers)[-2 * config.heal.radius :] if config.heal.tune_tokens else []
    folded = shape.hidden * sum(shape.read) if config.heal.fold else 0
    return {
        "logits or layer": max(logits, rows * shape.most("live")),
        "healed weights": (sum(trained) + folded) * shape.itemsize,
    }


def export(shape: Shape, after: int, base: int) -> Peak:
    """What a fresh process needs beside this one to verify the saved model: it turns it into float32, and on a CPU
    has Python and its libraries once more (base). Where float32 stands in for a narrower format, this process holds
    the model as it is saved, and the other one loads that: as many bytes again."""
    return {"fresh process": after * (shape.itemsize + 4) + base}


def spread(stage: str, peak: Peak, shape: Shape, devices: int) -> Peak:
    """A stage over weights spread over so many devices (`distributed/sharding.py`), on each of them. Computed, never
    measured.

    Each has a part of the weights and of the trained layers' state. Gathered on top are two layers, one that runs and
    one ahead of it, each in the buffer that the devices fill and in the weights made of it, or so what is no layer;
    backwards, the whole gradient of a trained layer, in the model's format and in float32.
    """
    layer, rest = max(shape.dense.layers), shape.dense.total - sum(shape.dense.layers)
    parted = ("weights", "trained state", "healed weights")
    parts = {name: size // devices if name in parted else size for name, size in peak.items()}
    parts["gathered"] = max(4 * layer, 2 * rest) * shape.itemsize
    if stage == "tune":
        parts["gradient of a layer"] = layer * (shape.itemsize + 4)
    return parts


def total(parts: Peak) -> int:
    return sum(parts.values())


def largest(parts: Peak) -> str:
    """The part that dominates."""
    return max(parts, key=lambda name: parts[name])
