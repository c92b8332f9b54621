"""What endpoint tuning computes and holds, told beforehand, by the settings and sizes of `endpoint_tuning.py`."""

from __future__ import annotations

from layercut.healing.endpoint_tuning import SCORES, STATE_BYTES, TuneSettings, endpoints, rows_per_step
from layercut.models.cost import PlannedRun, Spent, Work
from layercut.models.objectives import objective_of
from layercut.segments import kept_layers


def tune_cost(run: PlannedRun, settings: TuneSettings) -> Spent:
    """What tuning costs.

    Of every row the dense model is run forwards, the student from the first trained layer on forwards and backwards; of
    held-out rows the dense model once, and the student from there on for every score. Each trained parameter has its
    own copy, gradient and best value in the model's format beside STATE_BYTES (on an accelerator the best values lie in
    the CPU's memory). Kept for the way back is what each layer needs; of layers on disk a step's input to each, and
    what one of them needs at a time.
    """
    shape, held, objective = run.tuned, run.shape, objective_of(settings.objective)
    trained, kept = _trained(run, settings.radius), kept_layers(run.segments, shape.layers)
    first, stop = min(trained), len(kept)

    rows, scored = run.tuning, run.heldout * (1 + SCORES)
    dense = stop + run.length if objective.needs_dense else first
    forwards, heads = rows * (stop - first + dense), rows * (2 + objective.needs_dense)
    work = Work.of(shape, forwards, rows * (stop - first), trained=rows * len(trained), heads=heads)
    judged = run.heldout * held.layers + scored * (len(kept) - first)
    work += Work.of(held, judged, heads=scored * (1 + objective.needs_dense))

    step = min(rows_per_step(settings, shape.window), run.tuning)
    budget, reckoned = run.budget, sum(shape.costs[kept[i]].kept for i in range(first, stop))
    together = min(step, budget.pass_rows(shape.window, reckoned))
    # both models' logits of a piece, their gradient and one copy
    piece = min(budget.piece, together * shape.window * shape.vocabulary * shape.itemsize)
    logits = 4 * piece
    parameters = sum(shape.dense.layers[kept[i]] for i in trained)
    peak = {"trained state": parameters * trained_bytes(shape.itemsize)}
    if run.on_disk:
        peak["inputs of a step"] = (stop - first + 2) * shape.stream(step)
        peak["logits or layer"] = max(logits, together * shape.most("saved_trained"))
    else:
        costs = {i: shape.costs[kept[i]] for i in range(first, stop)}
        saved = sum(cost.saved_trained if i in trained else cost.saved for i, cost in costs.items())
        peak |= {"kept for backward": together * saved, "logits": logits}
    return Spent(peak | {"held-out states": (2 + run.on_disk) * held.stream(run.heldout)}, work)


def tune_whole_cost(run: PlannedRun, settings: TuneSettings, parameters: int, codes: int) -> Spent:
    """What it costs to train parameters in every layer, as after rounding: the model and what it was run whole."""
    shape, held, objective = run.tuned, run.shape, objective_of(settings.objective)
    rows, kept = run.tuning, kept_layers(run.segments, shape.layers)
    heads, backwards = rows * (2 + objective.needs_dense), rows * len(kept)
    work = Work.of(shape, backwards * (1 + objective.needs_dense), backwards, trained=backwards, heads=heads)
    scored = run.heldout * (1 + SCORES)
    work += Work.of(held, (run.heldout + scored) * len(kept), heads=scored * (1 + objective.needs_dense))
    step = min(rows_per_step(settings, shape.window), run.tuning)
    together = min(step, max(1, run.budget.pass_tokens // shape.window))
    logits = 4 * min(run.budget.piece, together * shape.window * shape.vocabulary * shape.itemsize)
    saved = sum(shape.costs[i].saved_trained for i in kept)
    peak = {
        "trained state": parameters * trained_bytes(shape.itemsize),
        "decoded weights": run.after.matrices * 2 * shape.itemsize + codes,  # and their gradients
        "kept for backward": together * saved,
        "logits": logits,
        "held-out states": 2 * held.stream(run.heldout),
    }
    return Spent(peak, work)


def trained_bytes(itemsize: int) -> int:
    """Of a trained number of so many bytes: its training state, itself, its gradient and its best state."""
    return STATE_BYTES + 3 * itemsize


def learned_weight_bytes(itemsize: int) -> int:
    """Of a weight whose rounding is trained: its training, what it is rounded to, its gradient, the one before."""
    return trained_bytes(itemsize) + 3 * itemsize


def healed_bytes(run: PlannedRun) -> int:
    """Bytes of the weights that healing changes in one cut's neighbours, of which the largest layers are taken."""
    shape, heal = run.shape, run.config.heal
    if not run.segments:
        return 0
    trained = sorted(shape.dense.layers)[-len(_trained(run, heal.radius)) :] if heal.tune_tokens else []
    folded = shape.hidden * sum(shape.read) if heal.fold else 0
    return (sum(trained) + folded) * shape.itemsize


def _trained(run: PlannedRun, radius: int) -> list[int]:
    """Positions of the layers that are trained."""
    return endpoints(run.segments, run.shape.layers, radius)
