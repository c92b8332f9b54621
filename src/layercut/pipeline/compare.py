"""Search methods side by side: what each removes, what finding that took, and what becomes of its cut.

Every method gets the same calibration tokens. Its cut is measured by perplexity on the same held-out tokens: plain,
after the closed-form fold, after endpoint tuning and after LoRA, each on the same rows; its control is the dense model
with the same layers trained on these. With --tasks, --probes and --evaluations it is measured what a cut still does in
every state. Each method (`compare-METHOD.json`), and each state of each set of removed layers
(`compare-at-SEGMENTS-STATE.json`), is a stage of the run folder: a comparison that was stopped goes on there, methods
can be added later, and what two methods remove alike is measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from layercut import evaluation, layer_search
from layercut.config import check_window
from layercut.config.commands import COMPARED_STATES, TRAINED_STATES, CompareConfig, MethodsConfig, flattened
from layercut.data.blocks import by_origin, in_rows
from layercut.data.probe_families import EDITION, capability_names
from layercut.data.sources import check_sources, split_mix
from layercut.distributed import processes
from layercut.errors import ConfigError, SurgeryError
from layercut.evaluation.probe_scores import Grid, Probes, found_of, probed, probes_for
from layercut.evaluation.tasks import Retained, compare_records, representative_metric, retained
from layercut.files import OPTIONAL, jsonable
from layercut.healing import TuningResult, lora, tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.least_squares import Fold, fold_cut_
from layercut.models import checkpoints, decoder_stack, loading, memory, placement
from layercut.models.losses import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.pipeline.resolve_options import default_folder, with_windows
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import Run
from layercut.pipeline.stages.heal import keyed, tune_settings
from layercut.pipeline.stages.search import edition, generated_tests
from layercut.pipeline.stages.text import Use, draw_all, taught, tuning_treatment
from layercut.progress import bar, say
from layercut.report import formatting
from layercut.report.page import write_report
from layercut.segments import Segment, checked_segments, layers_to_remove
from layercut.surgery import cut


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """compare-METHOD.json: what one method removes, its KL on the calibration tokens, and what finding it took."""

    method: str
    segments: list[Segment]
    kl: float
    probe_kl: float | None = None  # on probes, where the method searched with them, in nats per answer token
    search_seconds: float
    dense_tokens: int
    layer_forwards: int
    layer_backwards: int


@dataclass(frozen=True, kw_only=True)
class CutState:
    """compare-at-SEGMENTS-STATE.json, and compare-dense.json."""

    perplexity: float | None = None
    """None where there is no such state: nothing could be folded, or these layers cannot be cut out."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each window of the evaluation tokens, in nats per token."""
    fold: list[Fold] = field(default_factory=list)
    tuning: TuningResult | None = None  # without the loss of each step
    from_fold: bool = False  # whether training began at the fold, which it does where that helps on held-out rows
    refused: str | None = None  # why these layers cannot be cut out


@dataclass(frozen=True, kw_only=True)
class Judged:
    """compare-at-SEGMENTS-STATE-judged.json: what a model still does; what was not asked for is empty or None."""

    scores: dict[str, float] = field(default_factory=dict)  # by task
    flips: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    """By task: items lost and gained beside the dense model, and McNemar's p."""
    retained: Retained | None = None
    keys: Grid = field(default_factory=list)
    lists: Grid = field(default_factory=list)
    capabilities: dict[str, Any] | None = None
    health: dict[str, Any] | None = None  # `evaluation.generation_health` beside the dense model
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # by evaluation of a package, then by metric
    records: dict[str, Any] = field(default_factory=dict, metadata=OPTIONAL)
    """Of `evaluation.score_tasks`: every item of every task; not in compare.json."""


def compare(model: str, config: CompareConfig, *, own_process: bool = False) -> Path:
    """Run every method on a model and measure what it removes."""
    processes.start()
    if own_process:
        memory.reuse_freed()
    asked, journey = config.compare, config.journey()
    if config.load.place == "processes":
        raise ConfigError("compare needs a whole model in every process", "leave out --place processes")
    checkpoint = checkpoints.resolve(model, allow_pickle=config.load.allow_pickle)
    decoder_stack.refuse_on_disk(placement.place_of(checkpoint, alone=True, **asdict(config.load)) == "disk")
    if config.tasks.names:
        evaluation.check_tasks(tuple(config.tasks.names), config.tasks.include_path)
    architecture = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window("--window", config.text.window, decoder_stack.positions(architecture))
    journey = with_windows(journey, architecture)
    if "lora" in asked.state_names:
        lora.check_lora(loading.skeleton(architecture, torch.float32))
    layers = decoder_stack.count_layers(architecture)
    length = layers_to_remove(asked.ratio or 0, layers)
    for name in asked.names:
        search = asked.search(name)
        capability_names(search.preserve)
        if search.segments and (got := sum(map(len, checked_segments(search.segments, layers)))) != length:
            words = f"--methods {name} removes {got} layers, and --ratio {asked.ratio:g} is {length} of {layers}"
            raise ConfigError(words, "all methods remove as many layers")
    check_sources(journey)

    folder = config.run.out or default_folder(model).with_name(f"{default_folder(model).name}-compare")
    with memory.memory_limit(config.load.max_memory), Run(folder, force=config.run.force) as run:
        described = replace(config, compare=replace(asked, eval_window=journey.evaluate.eval_window))
        run.describe({"model": model, **flattened(described)}, checkpoint)
        work = RunContext(checkpoint, journey, run, own_process=own_process)
        judges: list[Use] = ["heldout", "tuning"] if asked.tune_tokens else []
        draw_all(work, ["calibration", *judges, "evaluation"])
        compared(work, model, asked, length)
        processes.on_main(lambda: write_report(run.folder))
        run.finished()
        return run.folder


def compared(work: RunContext, model: str, asked: MethodsConfig, length: int) -> None:
    """Search by every method and measure every cut: the plain cuts of all first, then what takes longest."""
    run, text, judge = work.run, work.text, CutJudge(work)
    with run.stage(CutState, "compare-dense", [work.source, text["evaluation"]], together=True) as stage:
        if stage.open:
            stage.found = measured(work, work.dense.model)
    dense = stage.artefact
    choices = [search_by(work, asked, method, length) for method in asked.names]
    judged_dense = judge("compare-dense", lambda: work.dense.model) if judge.is_asked else None
    trained = {"tuned", *asked.state_names}.intersection(TRAINED_STATES) if asked.tune_tokens else set[str]()
    states = [state for state in COMPARED_STATES if state not in TRAINED_STATES or state in trained]
    cuts: dict[str, dict[str, CutState]] = {chosen.method: {} for chosen in choices}
    judged: dict[str, dict[str, Judged]] = {}
    for state in states:
        found = dict[str, Judged]()
        for method, segments in [(chosen.method, chosen.segments) for chosen in choices]:
            name = f"{stem(segments)}-{state}"
            cuts[method][state] = cut_in_state(work, segments, state)
            if judge.is_asked and state in asked.state_names and cuts[method][state].perplexity is not None:
                found[method] = judge(name, lambda s=segments, at=state: student_in(work, s, at), [name])  # type: ignore[misc]
        judged[state] = beside_dense(judged_dense, found, choices[0].method)
    rows = []
    for chosen in choices:
        of = cuts[chosen.method]
        known = {state: found.losses for state, found in of.items() if found.losses}
        rows.append({
            **vars(chosen),
            "perplexity": {"tuned": None} | {state: each.perplexity for state, each in of.items()},
            # of ln(perplexity / dense), paired over the windows
            "standard_error": {state: error_of(losses, dense.losses) for state, losses in known.items()},
            "texts": {state: by_text(work, losses) for state, losses in known.items()},
            "fold": of["folded"].fold,
            "tuning": of["tuned"].tuning if "tuned" in of else None,
            **{state: of[state].tuning if state in of else None for state in ("lora", "control")},
            "refused": of["cut"].refused,
            "judged": {state: each[chosen.method] for state, each in judged.items() if chosen.method in each},
        })  # fmt: skip
    content = {
        "model": model,
        "layers": {"before": work.layers, "after": work.layers - length},
        **{use: text.get(use) for use in ("calibration", "tuning", "evaluation")},
        "dense": {"perplexity": dense.perplexity, "texts": by_text(work, dense.losses)},
        "methods": rows,
        "tasks": tasks_of(judged_dense.records) if judged_dense else {},
        "judged_dense": replace(judged_dense, records={}) if judged_dense else None,
    }
    inputs = [run.hashes["compare-dense"], rows, content["judged_dense"]]
    with run.stage(dict[str, Any], "compare", inputs) as comparison:
        if comparison.open:
            comparison.found = jsonable(content)


# --- stages ------------------------------------------------------------------------------------------------------


def search_by(work: RunContext, asked: MethodsConfig, method: str, length: int) -> MethodChoice:
    """What one method removes, its KL on the calibration tokens, and what finding it took."""
    config, seed = asked.search(method), work.config.text.seed
    inputs = [work.source, work.text["calibration"], seed, method, length, *edition(config)]
    with work.run.stage(MethodChoice, f"compare-{method.replace(':', '-')}", inputs, together=True) as stage:
        if stage.open:
            probes = generated_tests(work, config=config) if config.preserve != "none" else None
            how: dict[str, Any] = {"probes": probes, "num_segments": "auto"} if probes else {}
            how |= {"segments": config.segments} if config.segments else {"n_layers": length, "method": config.method}
            result = layer_search.search(work.stack, work.blocks["calibration"], seed=seed, **how)
            stage.found = MethodChoice(
                method=method, segments=result.segments, kl=result.kl,
                probe_kl=result.candidates[0].probe_kl if probes else None,
                search_seconds=round(result.seconds, 3), **vars(result.cost),
            )  # fmt: skip
    found = stage.artefact
    layers = formatting.layer_names([[one.start, one.stop] for one in found.segments])
    say("compare", f"{method}: remove layers {layers}, KL {formatting.figure(found.kl)}")
    return found


def cut_in_state(work: RunContext, segments: Sequence[Segment], state: str) -> CutState:
    """A cut in one state, measured; its weights are kept for what else is measured of it."""
    name, text, config = f"{stem(segments)}-{state}", work.text, work.config.heal
    inputs = [work.source, text["calibration"], text["evaluation"], segments]
    if state in TRAINED_STATES:
        inputs += [keyed(config), text["tuning"], text["heldout"], *taught(work)]
        inputs += lora.RECIPE if state == "lora" else []
    with work.run.stage(CutState, name, inputs, together=True) as stage:
        if stage.open:
            try:
                student, found = cut(work.dense.model, segments), CutState()
                student = cut(work.dense.model, ()) if state == "control" else student
            except SurgeryError as error:  # layers apart from each other may leave what the architecture cannot express
                student, found = None, CutState(refused=error.message)
            if student is not None and state == "folded":
                tokens, runner = work.blocks["calibration"], DecoderRunner(student)
                with bar("folding", len(segments) * len(tokens)) as advance:
                    folds = [fold_cut_(runner, work.stack, s, tokens, advance=advance) for s in sorted(segments)]
                found = CutState(fold=folds)
            elif student is not None and state in TRAINED_STATES:
                student, found = trained(work, student, segments, state)
            if student is not None and not (state == "folded" and all(fold.skipped for fold in found.fold)):
                seen = measured(work, student)
                found = replace(found, perplexity=seen.perplexity, losses=seen.losses)
                if state != "cut":
                    work.save(work.changed(student), name)
                    stage.files = [f"{name}.safetensors"]
            stage.found = found
    return stage.artefact


def trained(work: RunContext, student: Any, segments: Sequence[Segment], state: str) -> tuple[Any, CutState]:
    """A student trained as the journey does it, or by LoRA on the same rows: from the fold where that is nearer."""
    stack, rows, heldout, from_fold = work.stack, work.blocks["tuning"], work.blocks["heldout"], False
    if state != "control" and work.run.artefact(CutState, f"{stem(segments)}-folded").losses:
        folded = student_in(work, segments, "folded")
        kl = [mean_kl(stack, DecoderRunner(one), heldout) for one in (folded, student)]
        from_fold = kl[0] < kl[1]
        student = folded if from_fold else student
    how: dict[str, Any] = {"heldout": heldout, "files": TuningFiles(stopping=work.stopping)}
    how["settings"], treated = tune_settings(work.config.heal), vars(tuning_treatment(work))
    beside = segments if state == "control" else ()
    how["settings"] = replace(how["settings"], train="lora") if state == "lora" else how["settings"]
    report = tune_(student, stack, rows, beside=beside, **how, **treated)
    start = report.heldout[0]["loss"]
    say(state, f"{', '.join(map(str, segments))}: held-out loss {start:.4f} -> {report.best:.4f}")
    return student, CutState(tuning=replace(report, curve=[]), from_fold=from_fold)


def measured(work: RunContext, model: Any) -> CutState:
    tokens = work.blocks["evaluation"]
    with bar("perplexity", len(tokens)) as advance:
        losses = evaluation.window_losses(model, tokens, advance=advance)
    return CutState(perplexity=evaluation.of_losses(losses), losses=losses.tolist())


def student_in(work: RunContext, segments: Sequence[Segment], state: str) -> Any:
    """The model without the segments, in a state whose weights the run folder has."""
    student = cut(work.dense.model, () if state == "control" else segments)
    if state != "cut":
        decoder_stack.replace_parameters_(student, load_file(work.run / f"{stem(segments)}-{state}.safetensors"))
    return student


def stem(segments: Sequence[Segment]) -> str:
    """What the artefacts of a set of removed layers begin with."""
    return "compare-at-" + "-".join(f"{s.start}.{s.stop}" for s in segments)


def error_of(losses: list[float], dense: list[float]) -> float | None:
    """Standard error of ln(perplexity / dense), paired over the windows."""
    return evaluation.paired_error(*(torch.tensor(each, dtype=torch.float64) for each in (losses, dense)))


def by_text(work: RunContext, losses: Sequence[float]) -> dict[str, float]:
    """Perplexity of each text, where the evaluation text is a mix of several."""
    text = work.text["evaluation"]
    named = split_mix(text.source)  # what streams are called; of files that is less telling than their names
    parts = by_origin(
        torch.tensor(losses, dtype=torch.float64), named if len(named) == len(text.origins) else text.origins
    )
    if len(parts) == 1:
        return {}
    return {formatting.source_name(name): evaluation.of_losses(part) for name, part in parts.items()}


# --- what a cut still does ---------------------------------------------------------------------------------------


@dataclass
class CutJudge:
    """Measures models by what `--tasks`, `--probes` and `--evaluations` name, each once."""

    work: RunContext

    @property
    def is_asked(self) -> bool:
        asked = self.work.config.tasks
        return bool(asked.names or asked.probes or asked.evaluation_names)

    @cached_property
    def tasks(self) -> dict[str, Any]:
        return evaluation.load_tasks(self.work.config.tasks.names, self.work.config.tasks.include_path)

    @cached_property
    def probes(self) -> Probes:
        return probes_for(self.work.tokenizer, self.work.architecture, seed=self.work.config.text.seed)

    def __call__(self, name: str, model: Callable[[], Any], after: Sequence[str] = ()) -> Judged:
        """Everything that is asked for, of one model; each task is kept as soon as it is scored."""
        work, asked, seed = self.work, self.work.config.tasks, self.work.config.text.seed
        shown, functions = name.removeprefix("compare-"), evaluation.named(asked.evaluation_names)
        inputs = [work.source, seed, {one: evaluation.source_digest(each) for one, each in functions.items()}]
        inputs += [asked.names, asked.limit, evaluation.harness_version(asked.include_path)] if asked.names else []
        inputs += ["probes", self.probes.longest, EDITION, work.text["evaluation"]] if asked.probes else []
        with work.run.stage(Judged, f"{name}-judged", inputs, after=after) as stage:
            if stage.open:
                judged, found = model(), dict[str, Any]()
                if asked.probes:
                    dense, rows = work.dense.model, in_rows(work.blocks["evaluation"], work.config.text.window)
                    with bar(f"probes, {shown}", self.probes.tokens) as advance:
                        found |= probed(judged, dense, work.tokenizer, self.probes, advance=advance)
                    found["health"] = evaluation.generation_health(dense, judged, rows) if after else None
                if asked.names:
                    how: dict[str, Any] = {"limit": asked.limit, "name": shown, "cache": work.run / "tasks"}
                    found["records"] = evaluation.score_tasks(judged, work.tokenizer, self.tasks, **how)
                    found["scores"] = {task: score_of(record) for task, record in found["records"].items()}
                found["evaluations"] = {
                    one: evaluation.measure(one, each, judged, work.tokenizer, seed=seed)
                    for one, each in functions.items()
                }
                stage.found = Judged(**found)
        result = stage.artefact
        words = [f"{task} {score:.3f}" for task, score in result.scores.items()]
        for what, grid in (("keys", result.keys), ("lists", result.lists)):
            hits, of = found_of(grid)
            words += [f"{what} {hits} of {of}"] if of else []
        say("judge", f"{shown}: {', '.join(words) or ', '.join(functions)}")
        return result


def score_of(record: Mapping[str, Any]) -> float:
    return float(record["metrics"][representative_metric(record)]["score"])


def tasks_of(records: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each task its metric, items and chance, and whether a score is a share of the items."""
    found = {}
    for task, record in records.items():
        row = compare_records(record, record)
        of = record["metrics"][row["metric"]]
        share = of["higher_is_better"] and of["score"] <= 1
        found[task] = {name: row[name] for name in ("metric", "items", "chance")} | {"share": share}
    return found


def beside_dense(dense: Judged | None, judged: dict[str, Judged], first: str) -> dict[str, Judged]:
    """What each method retains in one state of the dense model's task scores, and how far it is behind the first."""
    if dense is None or not dense.records or not judged:
        return judged
    found = {}
    for method, kept in retained(dense.records, {method: one.records for method, one in judged.items()}).items():
        pairs = {task: compare_records(dense.records[task], of) for task, of in judged[method].records.items()}
        flips = {
            task: (row["lost"], row["gained"], row["p_value"]) for task, row in pairs.items() if row["lost"] is not None
        }
        if first not in judged:  # what it does not have in this state is no reference
            kept = replace(kept, behind=None, behind_error=None, p_value=None)
        found[method] = replace(judged[method], flips=flips, retained=kept, records={})
    return found
