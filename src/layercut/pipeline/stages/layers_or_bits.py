"""Stage, with --bits auto and nothing that says how many layers go: what of a size layers take, and what bits.

Layers removed are one more choice in the knapsack of `quantization/bit_choice.py`. For numbers of layers a tenth of the
stack apart, the best cut is priced after a quick fold, and the mixture of bits that what is left then needs by its
costs, which were measured once. Both prices are of a model that nobody has trained yet, and few bits cost far less
once they are; so three numbers go on trial: the fewest layers, the number that is cheapest by these prices, and the one
halfway. Each is healed, rounded and trained for a while, and the one of which most is left is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch

from layercut import layer_search, surgery
from layercut import quantization as rounding
from layercut.data.blocks import fingerprint
from layercut.data.probes import ProbeRows
from layercut.errors import ConfigError, SurgeryError
from layercut.models.runner import DecoderRunner
from layercut.pipeline.artefacts import Bounds, PricedArtefact, ShareRecord, SharesArtefact, bounds_of, segments_of
from layercut.pipeline.known_prices import KnownPrices
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages import quantize, trial, tune_quantized
from layercut.pipeline.stages.search import edition, generated_tests, search_options
from layercut.progress import say
from layercut.quantization import bit_choice
from layercut.registries import quantizers
from layercut.report.stage_lines import describe_shares
from layercut.segments import Segment, kept_layers

STEPS = 10
"""Numbers of layers are tried in steps of one in so many of the stack."""
MOST = 2
"""From the fewest layers on, one in so many of the stack more at most."""
TOKENS = 4096
"""Calibration tokens on which the cut of each number is searched; the chosen one is searched on all."""
STAGE, PRICED = "shares", "shares-priced"


def number_of_layers(work: RunContext) -> int:
    """How many layers go for --target-size, where the bits of what stays are chosen too."""
    with work.run.stage(PricedArtefact, PRICED, inputs(work)) as priced:
        if priced.open:
            priced.found = PricedArtefact(points=every_number(work))
    KnownPrices(work.run, PRICED).forget_()
    trained = [*trial.healing_inputs(work), *tune_quantized.inputs(work)]
    with work.run.stage(SharesArtefact, STAGE, trained, after=[PRICED]) as stage:
        if stage.open:
            points = decided(work, priced.artefact.points)
            best = min(points, key=lambda point: math.inf if point.left is None else point.left)
            stage.found = SharesArtefact(layers=best.layers, points=points)
    KnownPrices(work.run, STAGE).forget_()
    say("shares", describe_shares(asdict(stage.artefact)))
    return stage.artefact.layers


def inputs(work: RunContext) -> list[Any]:
    """All that the prices depend on; not what only measures more."""
    config = work.config
    return [
        work.source,
        work.text["calibration"],
        fingerprint(work.held_out_text),
        config.text.seed,
        config.search,
        config.quantize,
        *bit_choice.CHOSEN_AMONG,
        *edition(config.search),
        *quantizers.edition(config.quantize.quantizer),
        *quantize.how_rounded(config, config.quantize),
    ]


def rounding_rows(work: RunContext) -> torch.Tensor:
    """What the run rounds on, token ids [N, T]."""
    return quantize.rows_to_round_on(work, quantize.tests_to_round_on(work, work.config.quantize))


def numbers_tried(possible: Sequence[int], layers: int) -> list[int]:
    """Which of the numbers of layers that could go are tried."""
    return [n for n in possible[:: max(1, round(layers / STEPS))] if n <= possible[0] + layers // MOST]


def every_number(work: RunContext) -> list[ShareRecord]:
    """The best cut of each number of layers after a quick fold, and the bits that what it leaves needs."""
    dense, target = work.dense.model, work.config.search.target_bytes
    config, calibration, tests = work.config.quantize, work.blocks["calibration"], generated_tests(work)
    possible = bit_choice.numbers_left_open(dense, config, target)
    costs = bit_choice.measured(dense, rounding_rows(work), config)
    folds = cache(lambda: trial.fold_prices(work, calibration, tests))
    few = calibration[: max(1, TOKENS // calibration.shape[1])]
    known, points, refused = KnownPrices(work.run, PRICED), list[ShareRecord](), None

    def folded(cuts: Sequence[Segment]) -> float:
        return known("folded", cuts, lambda: folds()(cuts))

    for number in numbers_tried(possible, work.layers):
        try:
            cuts = segments_of(known.value(f"cut {number}", partial(searched, work, few, number, tests)))
            cut = surgery.cut(dense, cuts) if cuts else dense
        except (ConfigError, SurgeryError) as error:  # of this number alone: another one may do
            refused = error
            continue
        removed = set(range(work.layers)) - set(kept_layers(cuts, work.layers))
        left = bit_choice.costs_after(costs, dense, cut, removed, config)
        if (mixture := bit_choice.assigned(cut, left, config, target)) is None:
            continue
        point = ShareRecord(
            layers=number, segments=bounds_of(cuts), folded=folded(cuts) if cuts else 0.0,
            rounded=mixture.cost, mean_bits=mixture.mean_bits, bytes=mixture.bytes,
        )  # fmt: skip
        points.append(point)
        price = f"{point.folded:.4g} nats folded and {point.rounded:.4g} for {point.mean_bits:.2g} bits, untrained"
        say("shares", f"{number} layers removed: {price}")
    if not points:
        raise refused or ConfigError(
            f"no number of layers and bits meets the target size of {work.config.search.target_size}",
            "allow a larger --target-size, or more of --bits-allowed",
        )
    return points


def searched(work: RunContext, tokens: torch.Tensor, number: int, tests: ProbeRows | None) -> list[Bounds]:
    """The best plain cut of so many layers, as artefacts hold it; no segment where the number is 0."""
    if not number:
        return []
    how = search_options(work, number, tests)
    return bounds_of(layer_search.search(work.stack, tokens, **how, seed=work.config.text.seed).segments)


def on_trial(points: Sequence[ShareRecord]) -> list[int]:
    """Which points go on trial: the fewest layers, the cheapest by their prices, and the one halfway."""
    cheapest = min(range(len(points)), key=lambda i: points[i].folded + points[i].rounded)
    return sorted({0, cheapest // 2, cheapest})


def decided(work: RunContext, points: Sequence[ShareRecord]) -> list[ShareRecord]:
    """The points, of those on trial with what is left of the model."""
    known, found = KnownPrices(work.run, STAGE), list(points)
    left_of = trial.Left(work.stack, trial.unseen_rows(work, generated_tests(work)))
    for place in on_trial(points):
        cuts = segments_of(points[place].segments)
        left = known("rounded", cuts, partial(left_after, work, cuts, left_of))
        say("shares", f"{points[place].layers} layers removed: {left:.4g} nats after a short healing and rounding")
        found[place] = replace(points[place], left=left)
    return found


def left_after(work: RunContext, cuts: Sequence[Segment], left_of: trial.Left) -> float:
    """What is left of a model that is cut, healed, rounded to the size and trained after it, each for a while."""
    calibration = work.blocks["calibration"]
    student = trial.healed_for_a_while(work, cuts, calibration).at_rest if cuts else work.dense.model
    options = asdict(work.config.quantize) | {"target_size": work.config.search.target_size}
    found = rounding.quantize(student, rounding_rows(work), **options)
    if tune_quantized.wanted(work.config):
        found = tune_quantized.for_a_while(work, found, student, *trial.some_to_tune(work))
    return sum(left_of(DecoderRunner(found.model)))
