"""What an evaluation computes and holds, told beforehand: perplexity, what the models write, speed."""

from __future__ import annotations

from layercut.evaluation import speed
from layercut.evaluation.generation import CONTINUATION, FEWEST_PROMPTS, LONGEST_PROMPT, PROMPTS, SAMPLE
from layercut.models.cost import PlannedRun, Spent, Work


def evaluate_cost(run: PlannedRun) -> Spent:
    """What an evaluation of the dense model and of the cut, folded, tuned and quantized ones costs.

    Both models write after the prompts and, for their health, after several at once, which the dense one then scores;
    each round of `speed.speed` fills a prompt and decodes, twice with the dense model. A decoded token, or several at
    once, reads every weight. Held is a chunk of rows in one layer, or their logits, and of them those that predict
    something; of layers on disk two hidden states of all rows.
    """
    shape, rows, kept, heal = run.reported, run.evaluation, len(run.after.layers), run.config.heal
    states = 1 + heal.fold + bool(heal.tune_tokens) + run.config.quantize.rounds
    written = FEWEST_PROMPTS * (LONGEST_PROMPT + CONTINUATION) / shape.window
    forwards = rows * (shape.layers + states * kept) + 2 * written * shape.layers
    cut_steps = dense_steps = len(PROMPTS) * SAMPLE + CONTINUATION
    if run.config.evaluate.speed:
        rounds = 1 + speed.REPEATS
        forwards += rounds * speed.PROMPT / shape.window * (2 * shape.layers + kept)
        dense_steps, cut_steps = dense_steps + 2 * rounds * speed.DECODE, cut_steps + rounds * speed.DECODE
    work = Work.of(
        shape, forwards, heads=rows * (1 + states) + 2 * written,
        decoded_bytes=(dense_steps * shape.dense.total + cut_steps * run.after.total) * shape.itemsize,
        decoded_layers=dense_steps * shape.layers + cut_steps * kept,
    )  # fmt: skip
    together = min(rows, run.budget.logit_rows(shape.window, shape.vocabulary))
    # where one row's logits are too many, those of a part of it
    some = min(together * shape.window, 4 * run.budget.logit_tokens(shape.vocabulary) // shape.itemsize)
    logits = 2 * some * shape.vocabulary * shape.itemsize
    held = {"streams": 2 * shape.stream(rows)} if run.on_disk else {}
    return Spent(held | {"logits or layer": max(logits, together * shape.most("live"))}, work)
