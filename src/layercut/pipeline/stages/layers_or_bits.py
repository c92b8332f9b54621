"""Stage, with --bits auto and nothing that says how many layers go: what of a size layers take, and what bits.

For numbers of layers a tenth of the stack apart, the cost of the best cut after a quick fold is added to the estimated
cost of the mixture of bits that what stays then needs; the number of the least sum is taken. The costs of bits are
measured once, on the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

from layercut import layer_search, surgery
from layercut.data.blocks import fingerprint
from layercut.errors import ConfigError, SurgeryError
from layercut.files import jsonable
from layercut.pipeline.artefacts import ShareRecord, SharesArtefact
from layercut.pipeline.known_prices import KnownPrices
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages import quantize, trial
from layercut.pipeline.stages.search import edition, generated_tests, search_options
from layercut.progress import say
from layercut.quantization import bit_choice
from layercut.registries import quantizers
from layercut.report.stage_lines import describe_shares
from layercut.segments import Segment, as_segments, kept_layers

STEPS, MOST = 10, 2
"""Numbers of layers are one in so many of the stack apart; from the fewest on, one in so many of it more at most."""
TOKENS = 4096
"""Calibration tokens on which the cut of each number is searched; the chosen one is searched on all."""
STAGE = "shares"


def number_of_layers(work: RunContext) -> int:
    """How many layers go for --target-size, where the bits of what stays are chosen too."""
    config = work.config
    inputs = [
        work.source, work.text["calibration"], fingerprint(work.held_out_text), config.text.seed,
        config.search, config.quantize, *bit_choice.CHOSEN_AMONG, *edition(config.search),
        *quantizers.edition(config.quantize.quantizer), *quantize.how_rounded(config, config.quantize),
    ]  # fmt: skip
    with work.run.stage(SharesArtefact, STAGE, inputs) as stage:
        if stage.open:
            points = every_number(work)
            best = min(points, key=lambda point: point.folded + point.rounded)
            stage.found = SharesArtefact(layers=best.layers, points=points)
    KnownPrices(work.run, STAGE).forget_()
    say(STAGE, describe_shares(jsonable(stage.artefact)))
    return stage.artefact.layers


def numbers_tried(possible: Sequence[int], layers: int) -> list[int]:
    """Which of the numbers of layers that could go are tried."""
    return [n for n in possible[:: max(1, round(layers / STEPS))] if n <= possible[0] + layers // MOST]


def every_number(work: RunContext) -> list[ShareRecord]:
    """The best cut of each number of layers after a quick fold, and the bits that what it leaves needs."""
    dense, target = work.dense.model, work.config.search.target_bytes
    config, calibration, tests = work.config.quantize, work.blocks["calibration"], generated_tests(work)
    rounding = quantize.rows_to_round_on(work, quantize.tests_to_round_on(work, config))
    costs = bit_choice.measured(dense, rounding, config)
    folds = cache(lambda: trial.fold_prices(work, calibration, tests))
    few = calibration[: max(1, TOKENS // calibration.shape[1])]
    known, points, refused = KnownPrices(work.run, STAGE), list[ShareRecord](), None

    def best_cut(number: int) -> list[list[int]]:
        if not number:
            return []
        how = search_options(work, number, tests)
        found = layer_search.search(work.stack, few, **how, seed=work.config.text.seed)
        return [[s.start, s.stop] for s in found.segments]

    def folded(cuts: Sequence[Segment]) -> float:
        return folds()(cuts)

    for number in numbers_tried(bit_choice.numbers_left_open(dense, config, target), work.layers):
        try:
            cuts = as_segments(known.value(f"cut {number}", partial(best_cut, number)))
            cut = surgery.cut(dense, cuts) if cuts else dense
        except (ConfigError, SurgeryError) as error:  # of this number alone: another one may do
            refused = error
            continue
        removed = set(range(work.layers)) - set(kept_layers(cuts, work.layers))
        mixture = bit_choice.assigned(cut, bit_choice.costs_after(costs, dense, cut, removed, config), config, target)
        if mixture is None:
            continue
        cost = known("folded", cuts, partial(folded, cuts)) if cuts else 0.0
        points.append(
            ShareRecord(
                layers=number, segments=[*cuts], folded=cost, rounded=mixture.cost,
                mean_bits=mixture.mean_bits, bytes=mixture.bytes,
            )
        )  # fmt: skip
    if not points:
        raise refused or ConfigError(
            f"no number of layers and bits meets the target size of {work.config.search.target_size}",
            "allow a larger --target-size, or more of --bits-allowed",
        )
    return points
