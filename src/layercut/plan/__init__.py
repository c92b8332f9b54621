"""Memory and time of a run from its config alone: no weights are read and no text is drawn.

    layercut plan MODEL --ratio 0.2

One row of tokens is measured through every layer on shapes alone (`shape.py`), every stage follows from that
(`costs.py`), this machine is measured for a few seconds, and where a run does not fit, flags are looked for that
make it fit. What is not known is null.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from layercut import registries
from layercut.config import check_window
from layercut.config.commands import CompressConfig, PlanConfig
from layercut.data.probe_families import capability_names
from layercut.errors import ConfigError, LayercutError, ModelError, SurgeryError
from layercut.export.formats import is_mixture
from layercut.files import parse_bytes
from layercut.healing.recipe import trained_layers
from layercut.models import checkpoints, decoder_stack, loading
from layercut.models.memory import Budget, available_bytes, resident_bytes
from layercut.pipeline.environment import accelerator_name
from layercut.pipeline.resolve_options import (
    ResolvedRun,
    bytes_by_block,
    check_consumers,
    check_names,
    check_output,
    check_streamed,
    check_target,
    keeps_gguf,
    length_for_saved_size,
    length_for_target,
    needing_memory,
    shortlists,
    wanted_length,
    with_defaults,
    with_windows,
)
from layercut.pipeline.stages.search import planned_search_tests
from layercut.plan.costs import Planned, Stage, Work, by_llama_cpp, round_healed, stages, total
from layercut.plan.rates import CARDS, Rates
from layercut.plan.shape import Parts, Shape, count_parts, measure_shape
from layercut.plan.time_budget import ON_ACCELERATOR, Seconds, fitted
from layercut.quantization import bit_choice
from layercut.quantization.packing import saved_bytes
from layercut.segments import Segment, checked_segments
from layercut.surgery.cut_plan import plan_cut

GB = 10**9
TIMES = ("30m", "2h", "8h")
UNPLANNED = 1.1
"""What a run takes over what is planned: 990 s for 896 on SmolLM2-135M (research/cost.md)."""
RESERVED = 1 * GB  # left alone on an accelerator: its runtime and what the allocator cannot use. A guess


@dataclass(frozen=True, kw_only=True)
class Place:
    """A machine to run on; the weights are spread over its devices where one cannot hold them."""

    name: str
    bytes: int  # memory of one device
    devices: int = 1
    accelerator: bool = True

    @property
    def room(self) -> int:
        """Bytes of it that a run may take."""
        return self.bytes - RESERVED * self.accelerator


@dataclass(frozen=True, kw_only=True)
class Planner:
    """A model whose runs are planned, in any place; a shape is measured once for each window and dtype."""

    checkpoint: checkpoints.Checkpoint
    stock: Any  # the model's config
    whole: Any  # the model without its weights, in the stored number format
    dtypes: dict[bool, torch.dtype]
    """Computed in on the CPU (True), and on an accelerator (False), where it is the stored one."""
    segments: list[Segment]
    after: Parts
    base: int  # bytes of Python and its libraries
    shapes: dict[tuple[int, torch.dtype], Shape]

    @classmethod
    def of(cls, asked: CompressConfig, checkpoint: checkpoints.Checkpoint, stock: Any) -> Planner:
        """Of a run that is asked, with the segments given or the most central ones."""
        stored = loading.pick_dtype(asked.load.dtype, stock, checkpoint)
        given = checked_segments(asked.search.segments, decoder_stack.count_layers(stock))
        whole = loading.skeleton(stock, stored)
        segments, after = pruned_parts(stock, stored, given, _length(asked, checkpoint, whole, stored))
        dtypes = {True: loading.computing_dtype(asked.load.dtype, stored, torch.device("cpu")), False: stored}
        return cls(
            checkpoint=checkpoint, stock=stock, whole=whole, dtypes=dtypes, segments=segments, after=after,
            base=resident_bytes(), shapes={},
        )  # fmt: skip

    def shape(self, window: int, on_cpu: bool) -> Shape:
        """The model's shape for rows of so many tokens, in the number format of that place."""
        key = window, self.dtypes[on_cpu]
        if key not in self.shapes:
            known = (shape.dense for (_, dtype), shape in self.shapes.items() if dtype == key[1])
            self.shapes[key] = measure_shape(self.stock, key[1], window, next(known, None))
        return self.shapes[key]

    def rates(self, config: CompressConfig, device: torch.device, **limit: float) -> Rates | None:
        """What this machine does in a second."""
        on_cpu = device.type == "cpu"
        shape = self.shape(config.text.window, on_cpu)
        return Rates.measured(self.stock, shape, self.dtypes[on_cpu], device, self.checkpoint.folder, **limit)

    def costs(self, config: CompressConfig, on_cpu: bool, room: int) -> dict[str, Stage]:
        """Every stage in a place with so much memory for weights and what they compute."""
        window, base = config.text.window, self.base * on_cpu
        shape, on_disk = self.shape(window, on_cpu), config.load.place == "disk"
        if config.load.max_memory is not None:
            room = min(room, parse_bytes("--max-memory", config.load.max_memory))
        weights = shape.dense.total * shape.itemsize
        held = shape.outside * shape.itemsize if on_disk else weights
        budget = Budget.of_accelerator(max(0, room - held - base))
        if on_cpu:
            budget = Budget.of_cpu() if config.load.max_memory is None else Budget.of_cpu().least(budget)
        run = Planned(
            config=config, shape=shape, tuned=self.shape(config.heal.tune_window or window, on_cpu),
            reported=self.shape(config.evaluate.eval_window or window, on_cpu), segments=self.segments,
            after=self.after, tests=planned_search_tests(config), budget=budget, libraries=base,
            shortlisted=not on_disk and shortlists(config), foldable=what_folds(self.stock) != "",
        )  # fmt: skip
        found = stages(run)
        gguf, folder = self.checkpoint.gguf, self.checkpoint.folder
        files = [self.checkpoint.file] if gguf else checkpoints.weight_files(folder)
        read = sum(file.stat().st_size for file in files if file.is_file()) or weights
        if keeps_gguf(config, self.checkpoint) and "eval" in found:  # what healing changed is rounded and written
            last = {name: found.pop(name) for name in [*found][[*found].index("eval") :]}
            last["export"] = last["export"].then(by_llama_cpp(run))
            found |= {"quantize": round_healed(run, read)} | last
        # safetensors in the format that is computed in are mapped; a GGUF file is made float32 first
        mapped = on_cpu and not gguf and self.dtypes[True] == self.dtypes[False] and not on_disk
        peak = {"weights": 0 if mapped else held * (4 // shape.itemsize if gguf and on_cpu else 1)}
        found = {"load": Stage(peak, Work(read=read, moved=2 * weights)), **found}
        beside = {"python and libraries": base} if on_cpu else {}
        return {name: Stage(beside | stage.peak, stage.work) for name, stage in found.items()}

    def seconds(self, asked: CompressConfig, device: torch.device, until: str = "report") -> Seconds:
        """What runs take on this machine, which is measured now."""
        if (rates := self.rates(asked, device)) is None:
            raise ModelError("there is no room to run a layer of the model", "free some memory")
        return self.by(rates, device.type == "cpu", available_bytes(device), until)

    def by(self, rates: Rates, on_cpu: bool, room: int, until: str = "report") -> Seconds:
        """What runs take by these rates."""
        measured = {"eval", "capabilities"} if until == "tune" else set()

        def seconds(run: CompressConfig) -> float:
            found = self.costs(with_windows(run, self.stock), on_cpu, room)
            works = [stage.work for name, stage in found.items() if stage.work and name not in measured]
            return UNPLANNED * sum(map(rates.seconds, works))

        return seconds

    def judged(self, place: Place, config: CompressConfig) -> dict[str, Any]:
        """Whether every stage fits a place, and if not, the flags that make it fit; None where none do."""
        on_cpu = not place.accelerator
        shape = self.shape(config.text.window, on_cpu)
        weights, layer = shape.dense.total * shape.itemsize, max(shape.dense.layers) * shape.itemsize
        spread = weights > place.room and place.devices > 1 and config.load.place != "disk"

        def needs(asked: CompressConfig) -> dict[str, int]:
            room = place.room + (weights - weights // place.devices) * spread
            peaks = {name: stage.peak for name, stage in self.costs(asked, on_cpu, room).items()}
            if not spread:
                return {name: total(peak) for name, peak in peaks.items()}
            # each device has a part of the weights and of what is trained, and gathers two layers, one that runs and
            # one ahead of it, twice; backwards a trained layer's gradient. Computed, never measured
            parted, found = ("weights", "trained state", "healed weights"), dict[str, int]()
            for name in peaks.keys() - {"load", "export"}:
                parts = {key: size // place.devices if key in parted else size for key, size in peaks[name].items()}
                gathered = max(4 * layer, 2 * shape.outside * shape.itemsize)
                found[name] = total(parts) + gathered + 2 * layer * ("trained state" in parts)
            return found

        stages_need = needs(config)
        worst = max(stages_need, key=lambda name: stages_need[name])
        fits, why = stages_need[worst] <= place.room, None
        flags: list[str] | None = []
        if not fits and spread and weights // place.devices > place.room:
            flags, why = None, "the weights alone are larger than all devices"
        elif not fits:
            saving = (f for f, less in savings(config, spread) if max(needs(less).values()) <= place.room)
            flags = next(saving, None)
            why = None if flags else "no setting makes it fit"
        return {
            "target": place.name, "bytes_per_device": place.bytes, "devices": place.devices,
            "devices_used": place.devices if spread else 1, "needs_bytes": stages_need[worst], "stage": worst,
            "fits": fits, "flags": flags, "why": why,
        }  # fmt: skip


def places(card: str | None) -> Iterator[Place]:
    """A GPU that is named, this machine's CPU and its accelerators, one of 24 GB, and eight of 80 GB."""
    if card:
        yield Place(name=f"one {card}", bytes=CARDS[card][0] * GB)
    memory = psutil.virtual_memory().total
    yield Place(name="this machine's CPU", bytes=memory, accelerator=False)
    if kind := torch.accelerator.current_accelerator(check_available=True):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            memory = torch.accelerator.get_memory_info(kind)[1]
        count = torch.accelerator.device_count()
        name = f"this machine's {f'{count} x ' if count > 1 else ''}{accelerator_name()}"
        yield Place(name=name, bytes=memory, devices=count)
    yield Place(name="one 24 GB GPU", bytes=24 * GB)
    yield Place(name="8 x 80 GB GPUs", bytes=80 * GB, devices=8)


def savings(config: CompressConfig, spread: bool) -> Iterator[tuple[list[str], CompressConfig]]:
    """Settings that need less and less: first what costs nothing but time, then layers on disk, then shorter rows."""
    window, text, heal, load = config.text.window, config.text, config.heal, config.load
    from_disk = not spread and load.place != "disk" and not needing_memory(config)
    for on_disk in (False, True) if from_disk else (False,):
        flags, less = [], config
        if on_disk:
            flags, less = ["--place disk"], replace(config, load=replace(load, place="disk"))
            yield flags, less
        if (heal.tune_window or window) > window:
            short = replace(heal, batch_tokens=window, tune_window=window)  # rows are no longer than a step
            yield [*flags, f"--batch-tokens {window}"], replace(less, heal=short)
        if heal.batch_tokens > 1:
            flags = [*flags, "--batch-tokens 1"]
            less = replace(less, heal=replace(heal, batch_tokens=1, tune_window=window))
            yield flags, less
    while window > 64:
        window //= 2
        shorter = replace(less, text=replace(text, window=window), heal=replace(less.heal, tune_window=window))
        yield [*flags, f"--window {window}"], shorter


def shares(run: ResolvedRun) -> dict[str, float]:
    """Seconds that each stage of a run takes, by the names in its folder, measured roughly."""
    config, device = run.config, loading.pick_device(run.config.load.device)
    on_cpu = device.type == "cpu"
    try:
        planner = Planner.of(config, run.checkpoint, run.architecture)
        found = planner.costs(config, on_cpu, available_bytes(device))
    except LayercutError:  # how many layers go is found by the run
        return {}
    named = {"text": "text-tuning", "tune": "heal"}
    rates = planner.rates(config, device, limit=0.05) or Rates.of_some_core(planner.shape(config.text.window, on_cpu))
    return {
        named.get(name, name): rates.seconds(stage.work)
        for name, stage in found.items()
        if stage.work and name != "load"
    }


def plan_run(model: str, config: PlanConfig) -> dict[str, Any]:
    """Everything `layercut compress` with the same flags will take; what a run would refuse is refused."""
    given = config.journey()
    given.check()
    asked = with_defaults(given)
    checkpoint = checkpoints.resolve(model, weights=False)
    if checkpoint.gguf:
        check_output(asked, checkpoint)  # else it is about --out, which a plan has not
    stock = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    wants_gpu = config.load.device.startswith("cuda") and not torch.cuda.is_available()
    card, layers = config.on or ("a100" if wants_gpu else None), decoder_stack.count_layers(stock)
    device = torch.device("cuda") if card else loading.pick_device(config.load.device)
    stored = loading.pick_dtype(config.load.dtype, stock, checkpoint)
    check_window("--window", asked.text.window, decoder_stack.positions(stock))
    capability_names(asked.search.preserve)
    wanted = checked_segments(asked.search.segments, layers)
    check_consumers(asked, stock, wanted, wanted_length(asked.search, layers), gguf=keeps_gguf(asked, checkpoint))
    check_names(asked, checkpoint, stock)
    if asked.load.place == "disk":
        check_streamed(asked, spread=False)
    asked = with_windows(asked, stock)
    if asked.quantize.bits == "auto":
        check_target(asked, checkpoint, stock)

    planner = Planner.of(asked, checkpoint, stock)
    whole, segments, after, dtypes = planner.whole, planner.segments, planner.after, planner.dtypes
    before, length, on_cpu = count_parts(whole), sum(map(len, segments)), device.type == "cpu"
    shape = planner.shape(asked.text.window, on_cpu)
    rates = Rates.of_card(card, shape) if card else planner.rates(asked, device) if config.calibrate else None
    folds = what_folds(stock)
    told, room = {}, CARDS[card][0] * GB - RESERVED if card else available_bytes(device)
    time = given.heal.time or (None if on_cpu else ON_ACCELERATOR)
    if rates and time and given.heal.tune_tokens is None:
        timed = replace(given, heal=replace(given.heal, time=time))
        asked = with_windows(fitted(timed, planner.by(rates, on_cpu, room)), stock)
    for name, stage in planner.costs(asked, on_cpu, room).items():
        if name == "fold" and folds == "":
            continue
        work = stage.work
        told[name] = {
            "peak_bytes": total(stage.peak), "parts": stage.peak, "flops": work and work.operations(shape),
            "layer_forwards": work and work.forwards, "layer_backwards": work and work.backwards,
            "seconds": rates.seconds(work) if rates and work else None,
        }  # fmt: skip
    ends = {"before": before, "after": after}
    trained = trained_layers(segments, layers, asked.heal) if asked.heal.tokens and segments else []
    saved = {end: sizes(parts, stored) for end, parts in ends.items()}
    if keeps_gguf(asked, checkpoint) and not (asked.output.gguf_type and is_mixture(asked.output.gguf_type)):
        file = bytes_by_block(asked, checkpoint)
        gone = sum(sum(file.blocks[s.start : s.stop]) for s in segments)
        grown = sum(sorted(file.growth)[-len(trained) :]) if trained else 0
        saved = {"before": {"gguf": file.whole}, "after": {"gguf": file.whole - gone + grown}}
    elif asked.quantize.rounds and asked.quantize.bits != "auto":
        packed = saved_bytes(whole, asked.quantize, stored)
        saved["before"]["asked"] = packed.total
        saved["after"]["asked"] = packed.total - sum(sum(packed.layers[s.start : s.stop]) for s in segments)
    assumed = "assumed: the search decides; the middle of the stack is taken here" if length else "no layer is removed"
    if asked.shares_size:
        assumed = f"how many layers go is chosen by the run; planned without any search: {length}"
    left = [before.total - sum(before.layers[s : s + length]) for s in range(layers - length + 1)]
    unknown = not wanted and asked.search.method not in registries.criteria.own
    return {
        "model": model,
        "device": card or str(device),
        "dtype": str(stored).removeprefix("torch."),
        "computed_in": str(dtypes[on_cpu]).removeprefix("torch."),
        "layers": {end: len(parts.layers) for end, parts in ends.items()},
        "segments": [[s.start, s.stop] for s in segments],
        "segments_are": "given" if wanted else assumed,
        "healing": {
            "fold": folds if asked.heal.fold and segments else "",
            "train": asked.heal.train,
            "tuned": trained,
        },
        "search_is": f"What the criterion {asked.search.method!r} takes is not known." if unknown else None,
        "parameters": {end: asdict(parts) | {"total": parts.total} for end, parts in ends.items()},
        "parameters_after_range": None if wanted else {"least": min(left), "most": max(left)},
        "bytes": saved,
        "base_bytes": planner.base,
        "machine": asdict(rates) if rates else None,
        "stages": told,
        "seconds": sum(stage["seconds"] or 0 for stage in told.values()) if rates else None,
        "times": times(given, planner.by(rates, on_cpu, room)) if rates and given.heal.tune_tokens is None else [],
        "fits": [planner.judged(place, asked) for place in places(card)],
    }


def times(asked: CompressConfig, seconds: Seconds) -> list[dict[str, Any]]:
    """What --time would decide; null where it is too short."""
    found = []
    for time in TIMES:
        run: CompressConfig | None = None
        with contextlib.suppress(ConfigError):
            run = fitted(replace(asked, heal=replace(asked.heal, time=time)), seconds)
        heal, decided = asked.heal, {"tune_tokens": run and run.heal.tokens, "effort": run and run.search.effort}
        found.append(
            {"time": time, **decided, "train": heal.train, "radius": heal.radius, "seconds": run and seconds(run)}
        )
    return found


def what_folds(config: Any) -> str | None:
    """What the fold solves in models of this type, by the census of research/families.md; "" nothing, None unknown."""
    table = json.loads(Path(__file__).with_name("foldable.json").read_text())
    types = {config.model_type, config.get_text_config(decoder=True).model_type}
    return next((folds for folds, names in table.items() if types & {*names}), None)


def _length(config: CompressConfig, checkpoint: checkpoints.Checkpoint, whole: Any, stored: torch.dtype) -> int:
    """How many layers a run would remove, as far as that can be told without the weights."""
    search, layers = config.search, len(decoder_stack.find_decoder(whole).layers)
    if search.segments:
        return sum(map(len, checked_segments(search.segments, layers)))
    if (length := wanted_length(search, layers)) is not None:
        return length
    if not search.target_bytes:
        words = "--max-loss is measured on the model, which a plan does not load"
        raise ConfigError(words, "plan a --ratio that you expect")
    if keeps_gguf(config, checkpoint):
        return length_for_target(config, checkpoint, search.target_bytes)
    if config.shares_size:  # the run decides; the fewest are planned
        return bit_choice.numbers_left_open(whole, config.quantize, search.target_bytes)[0]
    return length_for_saved_size(config, whole, stored)


def pruned_parts(config: Any, dtype: torch.dtype, given: list[Segment], length: int) -> tuple[list[Segment], Parts]:
    """The pruned model, counted on the class's own skeleton; of no given segments the most central that may go."""
    model = loading.skeleton(config, dtype)
    if not length:
        return [], count_parts(model)
    layers = len(decoder_stack.find_decoder(model).layers)
    middle = (layers - length) // 2
    starts = sorted(range(layers - length + 1), key=lambda s: (abs(s - middle), s))[:12]
    refused: SurgeryError | None = None
    for segments in [given] if given else [[Segment(start, start + length)] for start in starts]:
        try:
            cut = plan_cut(model.config, type(model), segments)
            return segments, count_parts(loading.skeleton(cut.config, dtype))
        except SurgeryError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def sizes(parts: Parts, dtype: torch.dtype) -> dict[str, int]:
    """Bytes as saved, and with the layers' matrices in 8 and 4 bits, of which 128 share a scale of 16."""
    rest = (parts.total - parts.matrices) * dtype.itemsize
    packed = {f"{bits} bits": rest + round(parts.matrices * (bits + 16 / 128) / 8) for bits in (8, 4)}
    return {"saved": parts.total * dtype.itemsize, **packed}
