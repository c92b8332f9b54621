"""Tell beforehand what a run will take, from the config alone: no weights are read and no text is drawn.

    layercut plan MODEL --ratio 0.2

Beside the journey: it asks the pipeline's stages for their own counts (`work.py`), says which tensors are alive at the
peak of each (`models/memory.py`), runs one row through every layer on shapes alone (`shape.py`), measures this machine
for a few seconds (`machine.py`), and says where it fits (`fit.py`). What is not known is null.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from layercut.config import CompressConfig, PlanConfig
from layercut.errors import ConfigError, SurgeryError
from layercut.estimate import memory_peaks, memory_peaks_offloaded, work
from layercut.estimate.fit import Device, judge, targets
from layercut.estimate.machine import Rates, calibrate
from layercut.estimate.shape import Parts, Shape, count_parts, measure_shape
from layercut.files.sizes import parse_bytes
from layercut.layer_search import length_for_size
from layercut.models import checkpoints, loading
from layercut.models.memory import memory_bytes, resident_bytes
from layercut.pipeline.resolve import check_window, wanted_length, with_reported_window
from layercut.segments import Segment, checked_segments
from layercut.surgery.cut_plan import plan_cut

GROUP = 128
"""Numbers that share one 16-bit scale in weight-only quantization."""

TRIES = 12
"""Segments tried, from the middle outwards, until one is found that the architecture lets go."""


STAGES = ("load", "search", "fold", "tune", "eval", "export")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run that is told beforehand: the model's shape, what goes, and how it would be loaded."""

    checkpoint: checkpoints.Checkpoint
    stock: Any
    """The model's config."""
    journey: CompressConfig
    asked: str
    """--dtype"""
    stored: torch.dtype
    given: list[Segment]
    """Segments given by hand."""
    length: int
    """Layers that go."""
    segments: list[Segment]
    after: Parts
    base: int
    """Bytes of Python and its libraries."""
    shapes: dict[tuple[int, torch.dtype], Shape]
    """Shapes measured so far, by window and number format."""

    @property
    def gguf(self) -> bool:
        return self.checkpoint.gguf is not None

    def number_on(self, place: str) -> torch.dtype:
        """The number format to compute in, on "cpu" or another place."""
        on_cpu = place == "cpu"
        return loading.computing_dtype(self.asked, self.stored, torch.device("cpu")) if on_cpu else self.stored

    def shape_at(self, window: int, number: torch.dtype) -> Shape:
        """The model's shape for rows of so many tokens; measured once."""
        if (window, number) not in self.shapes:
            self.shapes[window, number] = measure_shape(self.stock, number, window)
        return self.shapes[window, number]

    def mapped(self, number: torch.dtype) -> bool:
        """Whether weights can be mapped from the file as they are."""
        return not self.gguf and number == loading.pick_dtype("auto", self.stock, self.checkpoint)

    def peaks(self, settings: CompressConfig, on_cpu: bool) -> dict[str, memory_peaks.Peak]:
        """The peak of each stage, in bytes by what takes them."""
        place, number = "cpu" if on_cpu else "accelerator", self.number_on("cpu" if on_cpu else "accelerator")
        at, libraries = self.shape_at(settings.text.window, number), self.base if on_cpu else 0
        found = stage_peaks(at, settings, self.segments, self.length, bool(self.given), self.after, libraries)
        reported = self.shape_at(settings.evaluate.eval_window or at.window, number)
        if settings.load.stream == "on":
            found["eval"] = memory_peaks_offloaded.weights(at) | memory_peaks_offloaded.evaluate(reported, settings)
        else:
            found["eval"] = {"weights": at.dense.total * at.itemsize} | memory_peaks.evaluate(reported, settings)
        if settings.load.stream == "on":
            own = loading.pick_dtype("auto", self.stock, self.checkpoint)
            found["load"] = memory_peaks_offloaded.load(at, own.itemsize)
        else:
            found["load"] = memory_peaks.load(at, gguf=self.gguf, mapped=self.mapped(number), device=place)
        beside = {"python and libraries": self.base}
        return {name: beside | peak if on_cpu else peak for name, peak in found.items()}

    def needs(self, settings: CompressConfig, target: Device) -> dict[str, int]:
        """Bytes that each stage needs on a device, or on each of several."""
        found = self.peaks(settings, not target.accelerator)
        at = self.shape_at(settings.text.window, self.number_on("accelerator" if target.accelerator else "cpu"))
        found["export"] = least_export(at, found["export"])
        if target.spread:  # the export is done by the main process, from the files
            shared = [name for name in found if name not in ("load", "export")]
            found = {name: memory_peaks.spread(name, found[name], at, target.devices) for name in shared}
        return {name: memory_peaks.total(peak) for name, peak in found.items()}


def plan_run(model: str, config: PlanConfig) -> dict[str, Any]:
    """Everything `layercut compress` with the same flags will take, as one JSON object.

    Raises ModelError (no config, not a causal model), ConfigError (neither --ratio nor --segment), SurgeryError
    (the segment cannot be cut).
    """
    journey = config.journey()
    journey.check()
    checkpoint = checkpoints.resolve(model, weights=False)
    stock = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    device = loading.pick_device(config.load.device)
    stored = loading.pick_dtype(config.load.dtype, stock, checkpoint)
    dtype = loading.computing_dtype(config.load.dtype, stored, device)
    check_window("--window", journey.text.window, stock)
    journey = with_reported_window(journey, stock)
    window = journey.text.window
    shape, before = measure_shape(stock, dtype, window), count_parts(loading.skeleton(stock, stored))
    given = checked_segments(journey.search.segments, shape.layers)
    length = sum(map(len, given)) if given else planned_length(journey, shape, stored)
    segments, after = cut_parts(stock, stored, given, length)
    base = resident_bytes()
    run = Planned(
        checkpoint=checkpoint, stock=stock, journey=journey, asked=config.load.dtype, stored=stored, given=given,
        length=length, segments=segments, after=after, base=base or 0, shapes={(window, dtype): shape},
    )  # fmt: skip
    rates = calibrate(shape, dtype, device, checkpoint.folder) if config.calibrate else None
    return {
        "model": model,
        "device": str(device),
        "dtype": str(stored).removeprefix("torch."),
        "computed_in": str(dtype).removeprefix("torch."),
        **told_sizes(run, shape, before, dtype),
        "base_bytes": base,
        **told_stages(run, shape, before, rates, device),
    }


def told_sizes(run: Planned, shape: Shape, before: Parts, dtype: torch.dtype) -> dict[str, Any]:
    """Layers, parameters and bytes before and after the cut."""
    given, length, after = run.given, run.length, run.after
    loaded = memory_peaks.load(shape, gguf=run.gguf, mapped=run.mapped(dtype), device="cpu")
    return {
        "layers": {"before": shape.layers, "after": shape.layers - length},
        "segments": [[s.start, s.stop] for s in run.segments],
        "segments_are": "given" if given else "assumed: the search decides; the middle of the stack is taken here",
        "search_is": None if given else work.unknown_search(run.journey.search.method),
        "parameters": {"before": part_counts(shape.dense), "after": part_counts(after)},
        "parameters_after_range": None if given else _range(shape.dense, length),
        "bytes": {"before": sizes(before, run.stored), "after": sizes(after, run.stored)},
        "kv_bytes_per_token": {"before": before.kv_bytes_per_token, "after": after.kv_bytes_per_token},
        "caches": {"before": before.caches, "after": after.caches},
        "host_bytes": memory_peaks.total(loaded) + run.base,
    }


def told_stages(run: Planned, shape: Shape, before: Parts, rates: Rates | None, device: torch.device) -> dict[str, Any]:
    """Work, memory and time of every stage, and where all of it fits."""
    files = _file_bytes(run.checkpoint) or before.total * run.stored.itemsize
    reported = run.shape_at(run.journey.evaluate.eval_window or shape.window, run.number_on(device.type))
    spent = stage_work(
        shape, reported, run.journey, run.segments, run.length, bool(run.given), run.after, files, run.gguf
    )
    planned = run.peaks(run.journey, device.type == "cpu")
    stages = {name: describe_stage(shape, planned[name], spent[name], rates) for name in STAGES if name in planned}
    stages["export"]["least_bytes"] = memory_peaks.total(least_export(shape, planned["export"]))
    return {
        "machine": rates.to_json() if rates else None,
        "stages": stages,
        "seconds": sum(s["seconds"] for s in stages.values() if s["seconds"] is not None) if rates else None,
        "fits": [
            judge(
                target, run.journey, run.needs,
                before.total * run.number_on("" if target.accelerator else "cpu").itemsize,
            )
            for target in targets(memory_bytes())
        ],
    }  # fmt: skip


def least_export(shape: Shape, peak: memory_peaks.Peak) -> memory_peaks.Peak:
    """The export's peak where memory is short: its fresh process then leaves the layers on disk."""
    base = peak.get("python and libraries", 0)
    return peak | {"fresh process": min(peak["fresh process"], memory_peaks_offloaded.verified(shape, base))}


def planned_length(config: CompressConfig, shape: Shape, stored: torch.dtype) -> int:
    """How many layers a run would remove, as far as that can be told without the weights."""
    search, each = config.search, shape.dense.layers
    if (length := wanted_length(search, shape.layers)) is not None:
        return length
    if search.target_size is None:
        raise ConfigError(
            "--max-loss is measured on the model, which a plan does not load", "plan a --ratio that you expect"
        )
    target = parse_bytes("--target-size", search.target_size)
    return length_for_size([n * stored.itemsize for n in each], shape.dense.total * stored.itemsize, target)


def cut_parts(config: Any, dtype: torch.dtype, given: list[Segment], length: int) -> tuple[list[Segment], Parts]:
    """The segments, given or assumed, and what is left after they are cut, counted on the class's own skeleton."""
    model = loading.skeleton(config, dtype)
    layers = len(loading.find_decoder(model))
    middle = (layers - length) // 2
    starts = sorted(range(layers - length + 1), key=lambda s: (abs(s - middle), s))[:TRIES]
    refusal: SurgeryError | None = None
    for segments in [given] if given else [[Segment(start, start + length)] for start in starts]:
        try:
            cut = plan_cut(model.config, type(model), segments)
        except SurgeryError as error:
            refusal = refusal or error
            continue
        return segments, count_parts(loading.skeleton(cut.config, dtype))
    assert refusal is not None
    raise refusal


def stage_peaks(
    shape: Shape,
    config: CompressConfig,
    segments: list[Segment],
    length: int,
    given: bool,
    after: Parts,
    base: int,
) -> dict[str, memory_peaks.Peak]:
    """The parts of every stage's peak but loading's, the dense weights among them. Of several segments the first is
    tuned deepest. base: what a fresh process holds from the start."""
    if config.load.stream == "on":
        return streamed_peaks(shape, config, min(segments), length, given, base)
    rows = work.rows_of(config.text.tokens, shape.window)
    first = min(segments)
    weights = {"weights": shape.dense.total * shape.itemsize}
    swept = memory_peaks.exhaustive(shape, length, rows)
    search = memory_peaks.sweep(shape, 2, rows) if given else swept
    if config.search.method == "clp" and not given:
        search = memory_peaks.clp(shape, length, rows)
        if config.search.oracle:
            search = max(search, swept, key=memory_peaks.total)
    peaks = {"search": weights | search}
    held = work.rows_of(work.held_out_tokens(config), shape.window)
    if config.heal.fold:
        peaks["fold"] = weights | memory_peaks.fold(shape, rows, held)
    if config.heal.tune_tokens:
        peaks["tune"] = weights | memory_peaks.tune(shape, config, first)
    peaks["export"] = weights | memory_peaks.export(shape, after.total, base)
    return peaks


def streamed_peaks(
    shape: Shape, config: CompressConfig, first: Segment, length: int, given: bool, base: int
) -> dict[str, memory_peaks.Peak]:
    """The same with the layers left on disk."""
    weights, rows = memory_peaks_offloaded.weights(shape), work.rows_of(config.text.tokens, shape.window)
    peaks = {"search": weights | memory_peaks_offloaded.search(shape, config, length, given, rows)}
    if config.heal.fold:
        peaks["fold"] = weights | memory_peaks_offloaded.fold(shape, config)
    if config.heal.tune_tokens:
        peaks["tune"] = weights | memory_peaks_offloaded.tune(shape, config, first)
    peaks["export"] = weights | memory_peaks_offloaded.export(shape, config, base)
    return peaks


def stage_work(
    shape: Shape,
    reported: Shape,
    config: CompressConfig,
    segments: list[Segment],
    length: int,
    given: bool,
    after: Parts,
    files: int,
    gguf: bool,
) -> dict[str, work.Work | None]:
    """What every stage computes; None where that cannot be told beforehand. reported: the shape for the window that
    perplexity is reported on."""
    first, size = min(segments), shape.itemsize
    known = given or (config.search.method in work.METHODS and config.search.num_segments == 1)
    weights = (shape.dense.total * size, after.total * size)
    return {
        "load": work.load_work(files, weights[0]) if not gguf else None,  # dequantizing takes most of it
        "search": work.search_work(shape, config, length, segments if given else []) if known else None,
        "fold": work.fold_work(shape, config, first),
        "tune": work.tune_work(shape, config, first),
        "eval": work.evaluate_work(reported, config, first, weights),
        "export": work.export_work(shape, config, after, weights[1]),
    }


def describe_stage(
    shape: Shape, peak: memory_peaks.Peak, spent: work.Work | None, rates: Rates | None
) -> dict[str, Any]:
    """One stage of the plan."""
    result: dict[str, Any] = {
        "peak_bytes": memory_peaks.total(peak),
        "parts": peak,
        "flops": None,
        "layer_forwards": None,
        "layer_backwards": None,
        "read_bytes": None,
        "seconds": None,
    }
    if spent is None:
        return result
    return result | {
        "flops": spent.flops + spent.flops64,
        "layer_forwards": asdict(spent.layer_forwards),
        "layer_backwards": asdict(spent.layer_backwards),
        "read_bytes": spent.read_bytes,
        "seconds": rates.seconds(shape, spent) if rates else None,
    }


def part_counts(parts: Parts) -> dict[str, Any]:
    """Parameters by part."""
    return {
        "total": parts.total,
        "embedding": parts.embedding,
        "layers": parts.layers,
        "head": parts.head,
        "other": parts.other,
        "tied": parts.tied,
    }


def sizes(parts: Parts, dtype: torch.dtype) -> dict[str, int]:
    """Bytes as saved, and with the layers' matrices in 8 and 4 bits: a number takes bits + 16 / group."""
    rest = (parts.total - parts.matrices) * dtype.itemsize
    packed = {f"{bits} bits": rest + round(parts.matrices * (bits + 16 / GROUP) / 8) for bits in (8, 4)}
    return {"saved": parts.total * dtype.itemsize, **packed}


def _range(parts: Parts, length: int) -> dict[str, int]:
    """Fewest and most parameters left, wherever the segment is."""
    removed = [sum(parts.layers[s : s + length]) for s in range(len(parts.layers) - length + 1)]
    return {"least": parts.total - max(removed), "most": parts.total - min(removed)}


def _file_bytes(checkpoint: checkpoints.Checkpoint) -> int:
    """Bytes of the weight files that are here."""
    files = [checkpoint.file] if checkpoint.gguf else checkpoints.weight_files(checkpoint.folder)
    return sum(file.stat().st_size for file in files if file.is_file())


__all__ = ["plan_run"]
