"""Search, cut, fold and tune: one round of it, or several, each starting from what the one before healed.

The part of the journey that `pipeline/journey.py` runs once or, with --rounds or a budget of loss, again and again
(progressive pruning). A round of several has artefacts of its own (search-1.json, fold-1.json, …); what all of them
did is gathered under the usual names, so that every later stage continues as after one round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layercut import layer_search
from layercut.config import Bits, CompressConfig, consumer_names
from layercut.data.blocks import fingerprint
from layercut.distributed import processes
from layercut.errors import ConfigError
from layercut.export.engines import ENGINES, written_by
from layercut.files.json_values import write_json
from layercut.files.sizes import size_flag
from layercut.pipeline import stages
from layercut.pipeline.artefacts import (
    CutArtefact,
    FoldArtefact,
    FrontierRecord,
    HealArtefact,
    RoundRecord,
    SearchArtefact,
)
from layercut.pipeline.run_context import Round, RunContext
from layercut.progress import say
from layercut.registries import quantizers
from layercut.report.stage_lines import describe_point
from layercut.segments import Removal

FRONTIER_BITS: tuple[Bits, ...] = (16, 8, 4)
ROUND_SHARE = 0.1
"""Share of the layers that a round removes where a budget of loss decides how many go in all; a guess."""


def in_rounds(work: RunContext, length: int | None) -> Removal:
    """Progressive pruning: search, cut, fold and tune, then again from what that left, as far as the budgets allow.

    With a budget of loss every round is measured after healing, and one that exceeds it is undone. With one of size
    as well, every round is measured at 16, 8 and 4 bits, and the first that meets both ends it; `frontier.json` has
    all that was measured.
    """
    config, text, count = work.config, work.text, work.config.number_of_rounds
    budget = config.search.max_loss
    bits: tuple[Bits, ...] = tried_bits(config) if config.search.two_budgets else fixed_bits(config)
    if length is None and budget is None:
        length = stages.search.length_for_target(work)
    done: list[Round] = []
    points: list[FrontierRecord] = []
    chosen: FrontierRecord | None = None
    judged_by = [] if budget is None else [fingerprint(work.held_out_text)]
    if config.search.two_budgets:
        measured = [work.source, *judged_by, text["calibration"], config.quantize, *recipes(config, bits)]
        points += stages.quantize.frontier(Round(work), bits, measured)
        chosen = within_budgets(points, config)
    for number, part in enumerate(round_lengths(length, work.layers, count), start=1):
        if chosen:
            break
        this = Round(work, number, of=count, previous=done[-1] if done else None)
        say("round", f"{number} of {count}" + (" at most" if budget else ""))
        removal = stages.search.search(this, [], part)
        stages.heal.cut(this, removal)
        stages.heal.fold(this, removal)
        stages.heal.tune(this, removal)
        if budget is not None:
            measured = [*judged_by, config.quantize, bits, *recipes(config, bits)]
            seen = stages.quantize.frontier(this, bits, measured)
            points += seen
            for point in seen:
                say("frontier", describe_point(vars(point)))
            chosen = within_budgets(seen, config)
            if min(point.rise for point in seen) > budget:
                break
        done.append(this)
    if budget is not None:
        recorded = {"points": points, "chosen": chosen, "budgets": budgets(config)}
        processes.on_main(lambda: write_json(work.run / "frontier.json", recorded))
    if (config.search.two_budgets and not chosen) or (not done and not chosen):
        raise out_of_budget(points, config)
    if chosen:
        work.config = replace(config, quantize=replace(config.quantize, bits=chosen.bits))
    return gathered(work, done)


def recipes(config: CompressConfig, bits: Sequence[Bits]) -> list[Any]:
    """How weights of each of these bits are rounded, as an input of the stages that measure them."""
    asked = [replace(config.quantize, bits=each) for each in bits if each != 16]
    edited = quantizers.edition(config.quantize.quantizer) if asked else []
    return [*edited, *(how for each in asked for how in stages.quantize.how_rounded(config, each))]


def fixed_bits(config: CompressConfig) -> tuple[Bits, ...]:
    """The bits that a run asks for; none where they are chosen for a size."""
    return () if config.quantize.bits == "auto" else (config.quantize.bits,)


def tried_bits(config: CompressConfig) -> tuple[Bits, ...]:
    """The bits of two budgets' walk, without those that a consumer of --for does not read."""
    names = consumer_names(config.search.consumers)
    as_written = {bits: written_by(replace(config.quantize, bits=bits)) for bits in FRONTIER_BITS}
    return tuple(bits for bits, written in as_written.items() if all(ENGINES[name].takes(written) for name in names))


def nothing_removed(work: RunContext) -> Removal:
    """The artefacts of a run that removes no layers, and quantizes the model as it is."""
    return gathered(work, [])


def gathered(work: RunContext, done: Sequence[Round]) -> Removal:
    """What all rounds together did, as the artefacts of one: every later stage continues from these."""
    run, removal = work.run, done[-1].removal if done else None
    removal = removal or Removal.first(())
    after = [part.name("heal") for part in done]
    inputs = ["rounds", work.source, work.text.get("calibration"), work.config.text.seed]
    with run.stage(SearchArtefact, "search", inputs, after=after, together=True) as search:
        if search.open:
            search.found = rounds_searched(work, done, removal)
    with run.stage(CutArtefact, "cut", "rounds", after=["search"]) as cut:
        if cut.open:
            cut.found = stages.heal.cut_once(work, removal.all)
    with run.stage(FoldArtefact, "fold", "rounds", after=["cut"]) as fold:
        if fold.open:
            fold.found = FoldArtefact(fold=[], changed=[])
    with run.stage(HealArtefact, "heal", "rounds", after=["fold"]) as heal:
        if heal.open:
            heal.found = rounds_healed(work, done)
    return removal


def rounds_searched(work: RunContext, done: Sequence[Round], removal: Removal) -> SearchArtefact:
    """search.json of several rounds: all that they removed, priced as one cut, and what each chose."""
    each = [work.run.artefact(SearchArtefact, part.name("search")) for part in done]
    found = layer_search.search(work.stack, work.blocks["calibration"], segments=removal.all)
    rounds = [
        RoundRecord(
            method=one.method, segments=one.segments, cut=one.cut, candidates=one.candidates, seconds=one.seconds,
            layer_forwards=one.layer_forwards, layer_backwards=one.layer_backwards,
        )
        for one in each
    ]  # fmt: skip
    return replace(
        stages.search.recorded(found, work),
        method=each[-1].method if each else "none",
        rounds=rounds,
        layer_forwards=sum(one.layer_forwards for one in each),
        layer_backwards=sum(one.layer_backwards for one in each),
        dense_tokens=sum(one.dense_tokens for one in each),
    )


def rounds_healed(work: RunContext, done: Sequence[Round]) -> HealArtefact:
    """heal.json of several rounds: all weights that they changed, and the last round's tuning."""
    each = [work.run.artefact(HealArtefact, part.name("heal")) for part in done]
    changed = Round(work).save_changes(done[-1].healed, "tuned") if done else []
    return HealArtefact(
        fold=[fold for heal in each for fold in heal.fold],
        tuning=each[-1].tuning if each else None,
        rounds=[heal.tuning for heal in each],
        changed=changed,
        files=["tuned.safetensors"] if changed else [],
    )


def round_lengths(length: int | None, layers: int, rounds: int) -> list[int]:
    """Layers that each round removes: a length divided evenly; where a budget of loss decides, a tenth of them."""
    if length is None:
        step = max(1, round(ROUND_SHARE * layers))
        return [step] * min(rounds, (layers - 1) // step)
    return [n for n in (length // rounds + (number < length % rounds) for number in range(rounds)) if n]


def within_budgets(points: Sequence[FrontierRecord], config: CompressConfig) -> FrontierRecord | None:
    """Of the points inside both budgets the one of least loss."""
    search = config.search
    if not search.two_budgets or search.max_loss is None:
        return None
    inside = [p for p in points if p.bytes <= search.target_bytes and p.rise <= search.max_loss]
    return min(inside, key=lambda point: point.rise, default=None)


def budgets(config: CompressConfig) -> dict[str, Any]:
    """The budgets of a run, as frontier.json holds them."""
    return {"target_size": config.search.target_size, "max_loss": config.search.max_loss}


def out_of_budget(points: Sequence[FrontierRecord], config: CompressConfig) -> ConfigError:
    """The error where no point is inside: it names the nearest on either side."""
    search = config.search
    seen = "; ".join(describe_point(vars(point)) for point in points)
    if not search.two_budgets:
        least = min(point.rise for point in points)
        cost = f"costs {least:.1%}: allow more by --max-loss," if math.isfinite(least) else "leaves no finite loss:"
        hint = f"the first round {cost} give more --tune-tokens or smaller rounds"
        return ConfigError(f"--max-loss {search.max_loss:g} is exceeded by the first round: {seen}", hint)
    small = min((p.rise for p in points if p.bytes <= search.target_bytes), default=math.inf)
    good = min((p.bytes for p in points if p.rise <= (search.max_loss or 0)), default=None)
    ways = [f"--max-loss {small:.3f} would reach that size"] if math.isfinite(small) else []
    ways += [f"--target-size {size_flag(good)} would keep that loss"] if good is not None else []
    return ConfigError(
        f"nothing seen is inside both --target-size {search.target_size} and --max-loss {search.max_loss:g}: {seen}",
        "; ".join(ways) or "give larger budgets, or more --tune-tokens",
    )
