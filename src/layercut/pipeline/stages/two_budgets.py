"""Stage, with both --target-size and --max-loss: how many layers go, and in how many bits the others are stored.

For numbers of layers a tenth of the stack apart, the best cut is healed for a while and measured at 16, 8 and 4 bits.
The first number with a point inside both budgets is taken. The run then heals its cut with all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from layercut import evaluation, layer_search
from layercut import quantization as rounding
from layercut.config import Bits, consumer_names
from layercut.config.commands import CompressConfig
from layercut.data.blocks import fingerprint
from layercut.errors import ConfigError
from layercut.export.engines import ENGINES, written_by
from layercut.files import size_flag
from layercut.layer_search.shortlist import LONGER
from layercut.models import decoder_stack
from layercut.models.losses import as_cost
from layercut.pipeline.artefacts import FrontierArtefact, FrontierRecord
from layercut.pipeline.known_prices import KnownPrices
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages import quantize, trial
from layercut.pipeline.stages.search import edition, generated_tests, search_options
from layercut.progress import say
from layercut.registries import quantizers
from layercut.report.stage_lines import describe_point

BITS: tuple[Bits, ...] = (16, 8, 4)
STEP, STEPS = 0.1, 5
"""Share of the layers between two numbers that are measured, and how many steps at most; a guess."""


def layers_and_bits(work: RunContext) -> tuple[int, Bits]:
    """The fewest layers whose cut is inside both budgets, and of the bits that are the best; all points are kept."""
    config = work.config
    search = config.search
    names, budget = consumer_names(search.consumers), search.max_loss or 0.0
    written = {bits: written_by(replace(config.quantize, bits=bits)) for bits in BITS}
    bits = [one for one in BITS if all(ENGINES[name].takes(written[one]) for name in names)]
    rounded = [replace(config.quantize, bits=one) for one in bits if one != 16]
    inputs = [
        work.source, work.text["calibration"], fingerprint(work.held_out_text), config.text.seed, search, bits,
        config.quantize, *edition(search), *trial.healing_inputs(work),
        *(quantizers.edition(config.quantize.quantizer) if rounded else []),
        *(how for asked in rounded for how in quantize.how_rounded(config, asked)),
    ]  # fmt: skip
    with work.run.stage(FrontierArtefact, "frontier", inputs) as stage:
        if stage.open:
            known, points, chosen = KnownPrices(work.run, "frontier"), list[FrontierRecord](), None
            step = max(1, round(STEP * work.layers))
            for removed in range(0, min(STEPS * step, work.layers - 1) + 1, step):
                rows = known.value(f"{removed} layers", partial(measured, work, removed, bits))
                seen = [FrontierRecord(**row) for row in rows]
                for point in seen:
                    say("frontier", describe_point(asdict(point)))
                points += seen
                inside = [one for one in seen if one.bytes <= search.target_bytes and one.rise <= budget]
                chosen = min(inside, key=lambda one: one.rise, default=None)
                if chosen or min(one.rise for one in seen) > budget:
                    break
            budgets: dict[str, Any] = {"target_size": search.target_size, "max_loss": search.max_loss}
            stage.found = FrontierArtefact(points=points, chosen=chosen, budgets=budgets)
    KnownPrices(work.run, "frontier").forget_()
    found = stage.artefact
    if found.chosen is None:
        raise out_of_budget(found.points, config)
    return work.layers - found.chosen.layers, found.chosen.bits


def measured(work: RunContext, removed: int, bits: Sequence[Bits]) -> list[dict[str, Any]]:
    """The best cut of so many layers, healed for a while: bytes and rise of perplexity at each number of bits."""
    model, calibration, points = work.dense.model, work.blocks["calibration"], []
    if removed:
        how = search_options(work, removed, generated_tests(work))
        cuts = layer_search.search(work.stack, calibration, **how, seed=work.config.text.seed).segments
        model = trial.healed_for_a_while(work, cuts, calibration, LONGER).at_rest
    for one in bits:
        smaller, size = model, decoder_stack.parameter_bytes(model)
        if one < 16:
            asked = replace(work.config.quantize, bits=one)
            rows = quantize.rows_to_round_on(work, quantize.tests_to_round_on(work, asked))
            found = rounding.quantize(model, rows, **asdict(asked))
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
