"""Stages that decide how many layers go where a size is given, and the bits or the loss are open too.

For numbers of layers a tenth of the stack apart, the best cut is searched and costed. `number_of_layers` (--bits auto)
adds its cost after a quick fold to the estimated cost of the bits that the rest then needs, and takes the least sum.
`layers_and_bits` (--max-loss) heals each cut for a while, measures it at 16, 8 and 4 bits, and takes the first number
that is inside both budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

from layercut import evaluation, layer_search, surgery
from layercut import quantization as rounding
from layercut.config import Bits, consumer_names
from layercut.config.commands import CompressConfig
from layercut.data.blocks import fingerprint
from layercut.errors import ConfigError, SurgeryError
from layercut.export.engines import ENGINES, written_by
from layercut.files import jsonable, size_flag
from layercut.layer_search.shortlist import LONGER
from layercut.models import decoder_stack
from layercut.models.losses import as_cost
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import KnownCosts
from layercut.pipeline.stages import quantize, shortlisting
from layercut.pipeline.stages.search import edition, generated_tests, search_options
from layercut.progress import say
from layercut.quantization import bit_choice
from layercut.registries import quantizers
from layercut.report.stage_lines import describe_point, describe_shares
from layercut.segments import Segment, as_segments, kept_layers

STEPS, MOST = 10, 2
"""Numbers of layers are one in so many of the stack apart; from the fewest on, one in so many of it more at most."""
TOKENS = 4096
"""Calibration tokens on which the cut of each number is searched for --bits auto; the chosen one is searched on all."""
BITS: tuple[Bits, ...] = (16, 8, 4)
MOST_STEPS = 5  # steps of numbers of layers that are healed and measured for --max-loss; a guess


@dataclass(frozen=True, kw_only=True)
class ShareRecord:
    """A number of layers that could go, and the bits that the rest would then have."""

    layers: int  # that go
    segments: list[Segment]
    folded: float  # the cost of that cut after a quick fold, nats per token
    rounded: float  # the estimated cost of the bits, untrained, nats per token
    mean_bits: float
    bytes: int  # of the checkpoint's weights, at most


@dataclass(frozen=True, kw_only=True)
class SharesArtefact:
    """shares.json: how layers and bits share a size."""

    layers: int  # that go: those of the point of least cost
    points: list[ShareRecord]


@dataclass(frozen=True, kw_only=True)
class FrontierRecord:
    """Size and loss of so many layers at one number of bits."""

    layers: int
    bits: Bits
    bytes: int
    rise: float  # of perplexity over the dense model's on held-out rows, as a share


@dataclass(frozen=True, kw_only=True)
class FrontierArtefact:
    """frontier.json: what was measured for two budgets."""

    points: list[FrontierRecord]
    chosen: FrontierRecord | None  # None where no point is inside both
    budgets: dict[str, Any]


def inputs_of(work: RunContext, *more: Any) -> list[Any]:
    """What either choice depends on."""
    config = work.config
    text = [work.text["calibration"], fingerprint(work.held_out_text), config.text.seed]
    return [work.source, *text, config.search, config.quantize, *edition(config.search), *more]


# --- layers or bits, for a size ---


def number_of_layers(work: RunContext) -> int:
    """How many layers go for --target-size, where the bits of the rest are chosen too."""
    asked = work.config.quantize
    how = [*quantizers.edition(asked.quantizer), *quantize.how_rounded(work.config, asked)]
    inputs = inputs_of(work, bit_choice.CHOSEN_AMONG, how)
    with work.run.stage(SharesArtefact, "shares", inputs) as stage:
        if stage.open:
            points = every_number(work)
            best = min(points, key=lambda point: point.folded + point.rounded)
            stage.found = SharesArtefact(layers=best.layers, points=points)
    KnownCosts(work.run, "shares").forget_()
    say("shares", describe_shares(jsonable(stage.artefact)))
    return stage.artefact.layers


def numbers_measured(possible: Sequence[int], layers: int) -> list[int]:
    """Which of the numbers of layers that could go are measured."""
    return [n for n in possible[:: max(1, round(layers / STEPS))] if n <= possible[0] + layers // MOST]


def every_number(work: RunContext) -> list[ShareRecord]:
    """The best cut of each number of layers after a quick fold, and the bits that the rest needs.

    The costs of bits are measured once, on the dense model.
    """
    dense, target, config = work.dense.model, work.config.search.target_bytes, work.config.quantize
    calibration, tests = work.blocks["calibration"], generated_tests(work)
    costs = bit_choice.measured(dense, quantize.rows_to_round_on(work, config)[0], config)
    folds = cache(lambda: shortlisting.fold_costs(work, calibration, tests))
    few = calibration[: max(1, TOKENS // calibration.shape[1])]
    known, points, refused = KnownCosts(work.run, "shares"), list[ShareRecord](), None

    def best_cut(number: int) -> list[list[int]]:
        if not number:
            return []
        found = layer_search.search(work.stack, few, **search_options(work, number, tests), seed=work.config.text.seed)
        return [[s.start, s.stop] for s in found.segments]

    for number in numbers_measured(bit_choice.numbers_left_open(dense, config, target), work.layers):
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
        cost = known("folded", cuts, lambda cuts=cuts: folds()(cuts)) if cuts else 0.0  # type: ignore[misc]
        what: dict[str, Any] = {"rounded": mixture.cost, "mean_bits": mixture.mean_bits, "bytes": mixture.bytes}
        points.append(ShareRecord(layers=number, segments=[*cuts], folded=cost, **what))
    if not points:
        raise refused or ConfigError(
            f"no number of layers and bits meets the target size of {work.config.search.target_size}",
            "allow a larger --target-size, or more of --bits-allowed",
        )
    return points


# --- layers and bits, inside a size and a loss ---


def layers_and_bits(work: RunContext) -> tuple[int, Bits]:
    """The fewest layers whose cut is inside both budgets, and of the bits that are the best; all points are kept."""
    search, asked, most = work.config.search, work.config.quantize, work.config.search.max_loss or 0.0
    names, written = consumer_names(search.consumers), {n: written_by(replace(asked, bits=n)) for n in BITS}
    bits = [one for one in BITS if all(ENGINES[name].takes(written[one]) for name in names)]
    rounded = [replace(asked, bits=one) for one in bits if one != 16]
    how = [quantize.how_rounded(work.config, each) for each in rounded]
    how += [quantizers.edition(asked.quantizer)] if rounded else []
    inputs = inputs_of(work, bits, shortlisting.healing_inputs(work), how)
    with work.run.stage(FrontierArtefact, "frontier", inputs) as stage:
        if stage.open:
            known, points, chosen = KnownCosts(work.run, "frontier"), list[FrontierRecord](), None
            step = max(1, round(work.layers / STEPS))
            for removed in range(0, min(MOST_STEPS * step, work.layers - 1) + 1, step):
                rows = known.value(f"{removed} layers", partial(measured, work, removed, bits))
                seen = [FrontierRecord(**row) for row in rows]
                for point in seen:
                    say("frontier", describe_point(asdict(point)))
                points += seen
                inside = [one for one in seen if one.bytes <= search.target_bytes and one.rise <= most]
                chosen = min(inside, key=lambda one: one.rise, default=None)
                if chosen or min(one.rise for one in seen) > most:
                    break
            budgets: dict[str, Any] = {"target_size": search.target_size, "max_loss": search.max_loss}
            stage.found = FrontierArtefact(points=points, chosen=chosen, budgets=budgets)
    KnownCosts(work.run, "frontier").forget_()
    found = stage.artefact
    if found.chosen is None:
        raise out_of_budget(found.points, work.config)
    return work.layers - found.chosen.layers, found.chosen.bits


def measured(work: RunContext, removed: int, bits: Sequence[Bits]) -> list[dict[str, Any]]:
    """The best cut of so many layers, healed for a while: bytes and rise of perplexity at each number of bits."""
    model, calibration, points = work.dense.model, work.blocks["calibration"], []
    if removed:
        how = search_options(work, removed, generated_tests(work))
        cuts = layer_search.search(work.stack, calibration, **how, seed=work.config.text.seed).segments
        model = shortlisting.healed_for_a_while(work, cuts, calibration, LONGER).at_rest
    for one in bits:
        smaller, size = model, decoder_stack.parameter_bytes(model)
        if one < 16:
            asked = replace(work.config.quantize, bits=one)
            found = rounding.quantize(model, quantize.rows_to_round_on(work, asked)[0], **asdict(asked))
            smaller, size = found.model, found.bytes_after
        rise = as_cost(evaluation.perplexity(smaller, work.held_out_text) / work.heldout_perplexity - 1)
        layers = len(decoder_stack.find_decoder(model))
        points.append({"layers": layers, "bits": one, "bytes": size, "rise": rise})
    return points


def out_of_budget(points: Sequence[FrontierRecord], config: CompressConfig) -> ConfigError:
    """The error where no point is inside: it names the nearest on either side."""
    search, seen = config.search, "; ".join(describe_point(asdict(point)) for point in points)
    small = min((p.rise for p in points if p.bytes <= search.target_bytes), default=math.inf)
    good = min((p.bytes for p in points if p.rise <= (search.max_loss or 0)), default=None)
    ways = [f"--max-loss {small:.3f} would reach that size"] if math.isfinite(small) else []
    ways += [f"--target-size {size_flag(good)} would keep that loss"] if good is not None else []
    return ConfigError(
        f"nothing seen is inside both --target-size {search.target_size} and --max-loss {search.max_loss:g}: {seen}",
        "; ".join(ways) or "give larger budgets, or more --tune-tokens",
    )
