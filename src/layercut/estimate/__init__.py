"""Tell beforehand what a run will take, from the config alone: no weights are read and no text is drawn.

    layercut plan MODEL --ratio 0.2

Beside the journey: it measures one row through every layer on shapes alone (`shape.py`), asks every stage what it costs
for such a model (their functions `…_cost`), measures this machine for a few seconds (`machine.py`), and says where it
fits (`fits_in_memory.py`). What is not known is null.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import torch

from layercut.config import GROUP_SIZES, CompressConfig, PlanConfig
from layercut.data.probes import capability_names
from layercut.data.self_sampled import ROWS, chat_length
from layercut.errors import ConfigError, SurgeryError
from layercut.estimate.fits_in_memory import Device, judge, targets
from layercut.estimate.machine import Rates, calibrate
from layercut.estimate.shape import count_parts, measure_shape
from layercut.evaluation.evaluation_cost import evaluate_cost
from layercut.export.checkpoint import export_cost
from layercut.files.sizes import parse_bytes
from layercut.healing.fold_prices import JUDGED_ROWS, fold_prices_cost
from layercut.healing.least_squares import fold_cost
from layercut.healing.tuning_cost import healed_bytes, tune_cost, tune_whole_cost
from layercut.layer_search import numbers_of_segments
from layercut.layer_search.on_trial import LONGER, PLACES, TRIED, VARIANTS, priced_after_fold
from layercut.layer_search.search_cost import search_cost, unknown_search
from layercut.models import checkpoints, decoder_stack, devices, loading
from layercut.models.cost import Bounds, Parts, PlannedRun, Shape, Spent, Work, total
from layercut.models.gguf_header import read_header
from layercut.models.memory import Budget, available_bytes, memory_bytes, resident_bytes
from layercut.models.placement import load_cost, placed_peak, spread_peak, weights_peak
from layercut.pipeline.gguf_run import check_names, check_output, keeps_gguf, length_for_target
from layercut.pipeline.resolve_options import (
    check_consumers,
    check_streamed,
    check_target,
    check_window,
    length_for_saved_size,
    score_of,
    wanted_length,
    with_windows,
)
from layercut.pipeline.stages import quantize, trial, tune_quantized
from layercut.pipeline.stages.evaluate import capabilities_work
from layercut.pipeline.stages.heal import tune_settings, tuning_rows_to_fold
from layercut.pipeline.stages.search import planned_search_tests
from layercut.pipeline.stages.text import held_out_tokens
from layercut.quantization import bit_choice
from layercut.quantization.packing import saved_bytes
from layercut.quantization.quantization_cost import quantize_cost
from layercut.quantization.quantizers import resolve as quantizer_of
from layercut.segments import Segment, checked_segments
from layercut.surgery.cut_plan import plan_cut

GROUP = 128
"""Numbers that share one 16-bit scale in weight-only quantization."""

NEXT_TOKEN_BYTES = 12
"""Of each token of the vocabulary and row, while a next one is drawn: logits, their copy and what they become."""

TRIES = 12
"""Segments tried, from the middle outwards, until one is found that the architecture lets go."""


@dataclass(frozen=True, kw_only=True)
class _Planner:
    """Tells a run for any settings and place; a shape is measured once for each window and number format."""

    checkpoint: checkpoints.Checkpoint
    stock: Any
    """The model's config."""
    dtypes: dict[bool, torch.dtype]
    """The number format computed in: on the CPU (True), and on an accelerator (False), where it is the stored one."""
    segments: list[Segment]
    after: Parts
    base: int
    """Bytes of Python and its libraries."""
    device: torch.device
    """That the run is planned on."""
    shapes: dict[tuple[int, torch.dtype], Shape]

    def shape(self, window: int, on_cpu: bool) -> Shape:
        """The model's shape for rows of so many tokens, in the number format of that place."""
        key = window, self.dtypes[on_cpu]
        if key not in self.shapes:
            self.shapes[key] = measure_shape(self.stock, key[1], window)
        return self.shapes[key]

    def run(self, config: CompressConfig, on_cpu: bool, room: int | None = None) -> PlannedRun:
        """The run with these settings, in that place; room: bytes of an accelerator that a run may take."""
        window, heal = config.text.window, config.heal
        shape, tuned = self.shape(window, on_cpu), self.shape(heal.tune_window or window, on_cpu)
        calibration = shape.rows_of(config.text.tokens)
        tuning = tuned.rows_of(heal.tune_tokens) * tuned.window // window  # as rows to fold on
        return PlannedRun(
            config=config,
            shape=shape,
            reported=self.shape(config.evaluate.eval_window or window, on_cpu),
            tuned=tuned,
            segments=self.segments,
            after=self.after,
            heldout=shape.rows_of(held_out_tokens(heal)),
            folded=calibration + min(tuning, tuning_rows_to_fold(calibration * window, window)),
            budget=self.budget(shape, config, on_cpu, room),
            tests=planned_search_tests(config),
            rounding_tests=quantize.planned_rounding_tests(config),
            libraries=self.base if on_cpu else 0,
        )

    def budget(self, shape: Shape, config: CompressConfig, on_cpu: bool, room: int | None) -> Budget:
        """What one pass may take in that place, by the function that a run asks."""
        if config.load.max_memory is not None:
            most = parse_bytes("--max-memory", config.load.max_memory)
            room = most if room is None else min(room, most)
        if room is None:
            room = None if on_cpu else available_bytes(self.device)
        weights = total(weights_peak(shape, config.load.stream == "on"))
        if on_cpu:
            least = None if room is None else Budget.of_accelerator(max(0, room - weights - self.base))
            return Budget.of_cpu().least(least) if least else Budget.of_cpu()
        return Budget.of_accelerator(max(0, (room or 0) - weights))

    def load(self, config: CompressConfig, on_cpu: bool, *, to_cpu: bool) -> Spent:
        """What loading costs: in the memory of that place, or, for an accelerator, in that of the CPU on the way."""
        own, computed, checkpoint = self.checkpoint_dtype, self.dtypes[on_cpu], self.checkpoint
        stored = None if own == computed else own.itemsize
        gguf = read_header(checkpoint.file).elements if checkpoint.gguf else None
        paths = [checkpoint.file] if gguf else checkpoints.weight_files(checkpoint.folder)
        files = sum(file.stat().st_size for file in paths if file.is_file())
        run = self.run(config, on_cpu)
        files = files or run.shape.dense.total * self.dtypes[False].itemsize
        return load_cost(run, files=files, on_cpu=to_cpu, gguf=gguf, stored=stored)

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """The number format of the files."""
        return devices.pick_dtype("auto", self.stock, self.checkpoint)

    def costs(
        self, config: CompressConfig, on_cpu: bool, least: bool = False, room: int | None = None
    ) -> dict[str, Spent]:
        """What each stage costs, the weights, and Python and its libraries where that is the same memory, in its peak.

        least: with the export as it is done where memory is short, its fresh process leaving the layers on disk.
        room: bytes of an accelerator that a run may take; those that are free where not given.
        """
        run = self.run(config, on_cpu, room)
        found = {"load": self.load(config, on_cpu, to_cpu=on_cpu)} | stage_costs(run)
        if least:
            short = export_cost(replace(run, config=_streamed(config))).peak
            peak, work = found["export"].peak, found["export"].work
            fresh = min(peak["fresh process"], short["fresh process"])
            found["export"] = Spent(peak | {"fresh process": fresh}, work)
        beside = {"python and libraries": self.base} if on_cpu else {}
        return {name: Spent(beside | spent.peak, spent.work) for name, spent in found.items()}

    def needs(self, config: CompressConfig, target: Device) -> dict[str, int]:
        """Bytes that each stage needs on a device, or on each of several."""
        on_cpu, room = not target.accelerator, None
        if target.accelerator:  # of weights that are spread each holds a part
            weights = self.shape(config.text.window, on_cpu).dense.total * self.dtypes[on_cpu].itemsize
            room = target.room + (weights - weights // target.devices) * target.spread
        if target.spread and not target.one_process and config.search.score == "healed":
            config = replace(config, search=replace(config.search, score="raw"))  # sharded, no cuts are tried
        peaks = {name: spent.peak for name, spent in self.costs(config, on_cpu, least=True, room=room).items()}
        if target.spread:  # by torchrun, the export is done by the main process, from the files
            shape = self.shape(config.text.window, on_cpu)
            kept = {name: peak for name, peak in peaks.items() if name not in ("load", "export")}
            parted = placed_peak if target.one_process else spread_peak
            peaks = {name: parted(peak, shape, target.devices) for name, peak in kept.items()}
        return {name: total(peak) for name, peak in peaks.items()}


def _streamed(config: CompressConfig, stream: Any = "on") -> CompressConfig:
    """The settings with the layers left on disk, where no cuts are healed on trial, or not."""
    raw = stream == "on" and config.search.score == "healed"
    search = replace(config.search, score="raw") if raw else config.search
    return replace(config, load=replace(config.load, stream=stream), search=search)


def stage_costs(run: PlannedRun) -> dict[str, Spent]:
    """What every stage but loading costs, the weights in its peak, in the run's order."""
    heal, healed, found = run.config.heal, healed_bytes(run), dict[str, Spent]()
    if run.config.shares_size:  # which cuts are tried, and on how many layers each, is not known
        folded = fold_prices_cost(run, Bounds(), 1).peak
        found["shares"] = Spent(max(folded, _quantize_cost(run).peak, key=total), None)
    if run.segments:
        found["search"] = _search_cost(run)
        if heal.fold:
            found["fold"] = fold_cost(run)
        if heal.tune_tokens:
            found["tune"] = _chats_cost(run).then(tune_cost(run, tune_settings(heal)))
    if run.config.quantize.rounds:
        found["quantize"] = _quantize_cost(run)
    found |= {"eval": evaluate_cost(run), "export": export_cost(run)}
    found["eval"].peak["healed weights"] = healed
    if run.config.search.preserve != "none" and (tested := found["eval"].work):
        found["eval"] = replace(found["eval"], work=tested + capabilities_work(run))
    if run.on_disk:
        found["export"].peak["healed weights"] = 2 * healed
    weights = weights_peak(run.shape, run.on_disk)
    return {name: Spent(weights | spent.peak, spent.work) for name, spent in found.items()}


def _chats_cost(run: PlannedRun) -> Spent:
    """What writing the chats that are tuned on costs, of a chat model in memory: a batch at a time, by the token."""
    shape, heal, steps, rows, cached, written = run.shape, run.config.heal, 0, 0.0, 0, 0
    uses = ((run.tuned.window, heal.tune_tokens), (shape.window, run.heldout * shape.window))
    for window, tokens in () if run.on_disk else uses:
        length = chat_length(window)
        chats = math.ceil(heal.chat_share * tokens / length)
        steps, rows = steps + math.ceil(chats / ROWS) * length, rows + chats * length / shape.window
        at_once = min(chats, ROWS)
        written, cached = max(written, at_once), max(cached, at_once * length)
    work = Work.of(
        shape, rows * shape.layers, heads=rows,
        decoded_bytes=steps * shape.dense.total * shape.itemsize, decoded_layers=steps * shape.layers,
    )  # fmt: skip
    cache = cached * (shape.dense.kv_bytes_per_token or 0)
    return Spent({"cache": cache, "next tokens": written * shape.vocabulary * NEXT_TOKEN_BYTES}, work)


def _search_cost(run: PlannedRun) -> Spent:
    """What the search costs, and what goes on from it by quick folds and by healing a few cuts for a while."""
    search, found = run.config.search, search_cost(run)
    if not search.goes_on:
        return found
    count = numbers_of_segments(search.num_segments, run.length, run.tests > 0)[-1]
    cuts, plain = priced_after_fold(run, count)
    folded = fold_prices_cost(run, cuts, count)
    found = found.then(Spent({}, plain)).then(folded)
    return found.then(_trial_cost(run, folded.peak["dense states"])) if search.score == "healed" else found


def _trial_cost(run: PlannedRun, held: int) -> Spent:
    """What healing the cuts on trial costs, with the one by text alone.

    All variants that there may be are taken to be tried, and three cuts to be close in the end and healed longer.

    held: bytes of the dense states that quick folds are solved and judged by.
    """
    short, longer = (_healed_on_trial(run, times) for times in (1, LONGER))
    judged = _judged_on_trial(run)
    held += sum(shape.stream(rows) for shape, rows in judged)
    dense = Work(flops=sum(rows * shape.layers * shape.mean("flops") for shape, rows in judged))
    tried = TRIED + (run.tests > 0) + PLACES * VARIANTS
    found = reduce(Spent.then, [Spent({}, dense), *[short] * tried, *[longer] * 3])
    return replace(found, peak=found.peak | {"dense states": held})


def _judged_on_trial(run: PlannedRun) -> list[tuple[Shape, int]]:
    """How many rows of which length judge what is left of a healed cut."""
    tests, long = (rows * (run.tests > 0) for rows in (trial.SHORT_TESTS, trial.LONG_TESTS))
    return [(run.shape, run.heldout + tests), (run.tuned, long)]


def _healed_on_trial(run: PlannedRun, times: int) -> Spent:
    """One cut on trial, healed on so many times the rows of a short healing, and judged.

    Its layers are no search's, and are not counted as such.
    """
    heal = run.config.heal
    tokens, window = trial.rows_to_tune(run.tuning, times) * run.tuned.window, run.shape.window
    short = replace(heal, tune_tokens=tokens)
    one = replace(
        run, config=replace(run.config, heal=short), heldout=min(run.heldout, JUDGED_ROWS),
        folded=run.calibration + min(tokens // window, tuning_rows_to_fold(run.calibration * window, window)),
    )  # fmt: skip
    each = fold_cost(one).then(tune_cost(one, tune_settings(short)))
    layers = run.shape.layers - run.length
    for shape, judged in _judged_on_trial(run):
        each = each.then(Spent({}, Work.of(shape, judged * layers, heads=2 * judged)))
    work = each.work and replace(each.work, layer_forwards=Bounds(), layer_backwards=Bounds())
    return replace(each, work=work)


def _quantize_cost(run: PlannedRun) -> Spent:
    """What the stage quantize costs: rounding, and what is trained after it."""
    config = run.config
    rounded = quantize_cost(run, calibrated=quantizer_of(config.quantize.quantizer)[1].needs_calibration)
    if not tune_quantized.wanted(config):
        return rounded
    group = config.quantize.group_size or next((size for size in GROUP_SIZES if run.shape.hidden % size == 0), GROUP)
    parameters = run.after.matrices // group
    learned, settings = run.after.matrices, tune_quantized.settings_of(config.heal)
    asked = config.after_rounding.tune_quantized == "rounding"  # what is chosen by itself is done where there is room
    trained = tune_whole_cost(run, settings, parameters + learned * asked, learned * (not asked))
    return rounded.then(trained)


def plan_run(model: str, config: PlanConfig) -> dict[str, Any]:
    """Everything `layercut compress` with the same flags will take."""
    journey = config.journey()
    journey.check()
    checkpoint = checkpoints.resolve(model, weights=False)
    if checkpoint.gguf:
        check_output(journey, checkpoint)  # else it is about --out, which a plan has not
    stock = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    device, asked = devices.pick_device(config.load.device), config.load.dtype
    stored = devices.pick_dtype(asked, stock, checkpoint)
    _check_as_a_run(journey, checkpoint, stock)
    journey = _planned_score(with_windows(journey, stock))
    if journey.quantize.bits == "auto":
        check_target(journey, checkpoint, stock)
    dtypes = {True: devices.computing_dtype(asked, stored, torch.device("cpu")), False: stored}
    on_cpu, before = device.type == "cpu", count_parts(loading.skeleton(stock, stored))
    segments, after = cut_parts(stock, stored, *_removed(journey, checkpoint, stock, before, stored))
    base = resident_bytes()
    planner = _Planner(
        checkpoint=checkpoint, stock=stock, dtypes=dtypes, segments=segments, after=after, base=base or 0,
        device=device, shapes={},
    )  # fmt: skip
    shape = planner.shape(journey.text.window, on_cpu)
    rates = calibrate(shape, dtypes[on_cpu], device, checkpoint.folder) if config.calibrate else None
    in_memory = _streamed(journey, "off")
    return {
        "model": model,
        "device": str(device),
        "dtype": str(stored).removeprefix("torch."),
        "computed_in": str(dtypes[on_cpu]).removeprefix("torch."),
        **_told_sizes(planner, journey, before, stored),
        "host_bytes": planner.base + total(planner.load(in_memory, on_cpu, to_cpu=True).peak),
        "base_bytes": base,
        **_told_stages(planner, journey, on_cpu, rates),
    }


def _check_as_a_run(journey: CompressConfig, checkpoint: checkpoints.Checkpoint, stock: Any) -> None:
    """Refuse what a run would refuse before it begins, as far as it needs no text and no place to write to."""
    check_window("--window", journey.text.window, stock)
    capability_names(journey.search.preserve)
    layers = decoder_stack.count_layers(stock)
    wanted, length = checked_segments(journey.search.segments, layers), wanted_length(journey.search, layers)
    check_consumers(journey, stock, wanted, length, gguf=keeps_gguf(journey, checkpoint))
    check_names(journey, checkpoint, stock)
    if journey.load.stream == "on":
        check_streamed(journey, spread=False)


def _planned_score(journey: CompressConfig) -> CompressConfig:
    """The settings with what --score auto means for a run."""
    score = score_of(journey, heals=True)
    if score == "healed" and journey.load.stream == "on":
        score = "raw"
    return replace(journey, search=replace(journey.search, score=score))


def _told_sizes(planner: _Planner, journey: CompressConfig, before: Parts, stored: torch.dtype) -> dict[str, Any]:
    """Layers, parameters and bytes before and after the cut."""
    ends, given = {"before": before, "after": planner.after}, bool(journey.search.segments)
    length = sum(map(len, planner.segments))
    assumed = "assumed: the search decides; the middle of the stack is taken here" if length else "no layer is removed"
    if journey.shares_size:
        assumed = f"how many layers go is chosen by the run; planned without any search: {length}"
    asked = _asked_sizes(planner, journey, stored)
    left = [before.total - sum(before.layers[s : s + length]) for s in range(len(before.layers) - length + 1)]
    counted = ("total", "embedding", "layers", "head", "other", "tied")
    return {
        "layers": {end: len(parts.layers) for end, parts in ends.items()},
        "segments": [[s.start, s.stop] for s in planner.segments],
        "segments_are": "given" if given else assumed,
        "search_is": unknown_search(journey.search),
        "parameters": {end: {name: getattr(parts, name) for name in counted} for end, parts in ends.items()},
        "parameters_after_range": None if given else {"least": min(left), "most": max(left)},
        "bytes": {end: sizes(parts, stored) | asked.get(end, {}) for end, parts in ends.items()},
        "kv_bytes_per_token": {end: parts.kv_bytes_per_token for end, parts in ends.items()},
        "caches": {end: parts.caches for end, parts in ends.items()},
    }


def _asked_sizes(planner: _Planner, journey: CompressConfig, stored: torch.dtype) -> dict[str, dict[str, int]]:
    """Bytes before and after the cut in the bits that are asked for; nothing where none are, or they are chosen."""
    if not journey.quantize.rounds or journey.quantize.bits == "auto":
        return {}
    saved = saved_bytes(loading.skeleton(planner.stock, stored), journey.quantize, stored)
    gone = sum(sum(saved.layers[cut.start : cut.stop]) for cut in planner.segments)
    return {"before": {"asked": saved.total}, "after": {"asked": saved.total - gone}}


def _told_stages(planner: _Planner, journey: CompressConfig, on_cpu: bool, rates: Rates | None) -> dict[str, Any]:
    """Work, memory and time of every stage, and where all of it fits."""
    shape, costs = planner.shape(journey.text.window, on_cpu), planner.costs(journey, on_cpu)
    stages = {name: _told_stage(shape, spent, rates) for name, spent in costs.items()}
    stages["export"]["least_bytes"] = total(planner.costs(journey, on_cpu, least=True)["export"].peak)
    weights = {place: shape.dense.total * dtype.itemsize for place, dtype in planner.dtypes.items()}
    fits = targets(memory_bytes())
    return {
        "machine": asdict(rates) if rates else None,
        "stages": stages,
        "seconds": sum(s["seconds"] for s in stages.values() if s["seconds"] is not None) if rates else None,
        "fits": [judge(target, journey, planner.needs, weights[not target.accelerator]) for target in fits],
    }


def _told_stage(shape: Shape, spent: Spent, rates: Rates | None) -> dict[str, Any]:
    """One stage of the plan."""
    work = spent.work
    return {
        "peak_bytes": total(spent.peak),
        "parts": spent.peak,
        "flops": work and work.flops + work.flops64,
        "layer_forwards": work and asdict(work.layer_forwards),
        "layer_backwards": work and asdict(work.layer_backwards),
        "read_bytes": work and work.read_bytes,
        "seconds": rates.seconds(shape, work) if rates and work else None,
    }


def _removed(
    config: CompressConfig, checkpoint: checkpoints.Checkpoint, stock: Any, before: Parts, stored: torch.dtype
) -> tuple[list[Segment], int]:
    """The segments given, and how many layers a run would remove, as far as that can be told without the weights."""
    search, layers = config.search, len(before.layers)
    if given := checked_segments(search.segments, layers):
        return given, sum(map(len, given))
    if (length := wanted_length(search, layers)) is not None:
        return [], length
    if not (target := search.target_bytes):
        raise ConfigError(
            "--max-loss is measured on the model, which a plan does not load", "plan a --ratio that you expect"
        )
    if keeps_gguf(config, checkpoint):
        return [], length_for_target(config, checkpoint, target)
    whole = loading.skeleton(stock, stored)
    if config.shares_size:  # the run decides; the fewest are planned
        return [], bit_choice.numbers_left_open(whole, config.quantize, target)[0]
    return [], length_for_saved_size(config, whole, stored)


def cut_parts(config: Any, dtype: torch.dtype, given: list[Segment], length: int) -> tuple[list[Segment], Parts]:
    """What is left after a cut, counted on the class's own skeleton."""
    model = loading.skeleton(config, dtype)
    if not length:
        return [], count_parts(model)
    layers = len(decoder_stack.find_decoder(model))
    middle = (layers - length) // 2
    starts = sorted(range(layers - length + 1), key=lambda s: (abs(s - middle), s))[:TRIES]
    refusals: list[SurgeryError] = []
    for segments in [given] if given else [[Segment(start, start + length)] for start in starts]:
        try:
            cut = plan_cut(model.config, type(model), segments)
        except SurgeryError as error:
            refusals.append(error)
            continue
        return segments, count_parts(loading.skeleton(cut.config, dtype))
    raise refusals[0]


def sizes(parts: Parts, dtype: torch.dtype) -> dict[str, int]:
    """Bytes as saved, and with the layers' matrices in 8 and 4 bits: a number takes bits + 16 / group."""
    rest = (parts.total - parts.matrices) * dtype.itemsize
    packed = {f"{bits} bits": rest + round(parts.matrices * (bits + 16 / GROUP) / 8) for bits in (8, 4)}
    return {"saved": parts.total * dtype.itemsize, **packed}


__all__ = ["plan_run"]
