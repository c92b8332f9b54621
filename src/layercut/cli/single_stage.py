"""One stage alone, on a model or on a finished run: cut, evaluate, quantize.

Export is in `pipeline/conversion.py`.
Beside `journey.compress`, by the same functions, for what is decided only when a run is done.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layercut import evaluation
from layercut.config import (
    AskedBits,
    CutConfig,
    DataConfig,
    ExportConfig,
    GgufType,
    PerplexityConfig,
    QuantizeAloneConfig,
    consumer_names,
)
from layercut.data.blocks import Blocks, load_blocks, stored_blocks
from layercut.data.sources import split_mix
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError, ModelError, RunError
from layercut.evaluation.generated_probes import Probed, probed, probes_for
from layercut.export import consumers
from layercut.export.checkpoint import Exported, save, text_to_check
from layercut.files.json_values import digest, jsonable, write_json
from layercut.files.sizes import parse_bytes
from layercut.files.writing import check_replaceable
from layercut.healing.endpoint_tuning import endpoints
from layercut.models import checkpoints, loading, memory
from layercut.models.compiling import compiled
from layercut.models.layer_reader_protocol import layers_on_disk
from layercut.models.source_card import source_card
from layercut.offload import placement
from layercut.pipeline.conversion import export
from layercut.pipeline.handover import describe_, destination, upload
from layercut.pipeline.provenance import check_finished, is_run, versions
from layercut.pipeline.resolve_options import check_window
from layercut.pipeline.stages.text import check_unseen
from layercut.progress import bar, say
from layercut.quantization import bit_choice, quantize_
from layercut.quantization.quantizers import resolve
from layercut.report.formatting import label
from layercut.report.model_card import Made, from_folder, layers_of, number_format_of, of_run, perplexity_again
from layercut.report.run_facts import model_key
from layercut.report.stage_lines import describe_quantization
from layercut.segments import Segment, kept_layers
from layercut.surgery import cut_checkpoint, cut_gguf, in_memory

GGUF_OF_BITS: dict[AskedBits, GgufType] = {8: "q8_0", 6: "q6_k", 4: "q4_k_m", 3: "q3_k_m", 2: "q2_k"}
"""The number format of a GGUF file that --bits means where no --gguf-type is given."""


def cut(model: str, config: CutConfig) -> Path:
    """Cut given segments out of the files of a checkpoint.

    A folder is cut without loading it, a .gguf file too where --out is one; else it becomes a float checkpoint.

    Args:
        model: Hub id, folder or .gguf file.
        config: the segments, and where to write.

    Returns:
        What was written.

    Raises:
        RunError: --out exists, or cannot be written.
        SurgeryError: the cut cannot be expressed.
    """
    repo_id = destination(config.hub)
    checkpoint = checkpoints.resolve(model, allow_pickle=config.allow_pickle)
    stock = loading.load_config(checkpoint)
    written: consumers.Written = "gguf" if config.out.suffix == ".gguf" else "float"
    consumers.check_cut(stock, config.segments, consumer_names(config.consumers), written)
    if not checkpoint.gguf:
        left = cut_checkpoint(checkpoint.folder, config.segments, config.out, force=config.force)
        if left:
            say("cut", f"not copied, since they are no known part of a model: {', '.join(left)}")
    elif config.out.suffix == ".gguf":
        cut_gguf(checkpoint.file, config.segments, config.out, force=config.force)
    else:
        if config.out.exists() and not config.force:
            raise RunError(f"--out {config.out} exists", "name another folder, or pass --force to replace it")
        check_replaceable(config.out, checkpoint.file)
        loaded = loading.load(checkpoint)
        save(in_memory.cut(loaded.model, config.segments), loaded.tokenizer, config.out, overwrite=config.force)
    consumers.warn_misread("cut", consumers.readings(stock, config.segments, written))
    describe_(config.out, _cut_model(model, config, loading.count_layers(stock)))
    if repo_id:
        upload(config.out, repo_id, private=config.hub.private)
    return config.out


def _cut_model(model: str, config: CutConfig, layers: int) -> Made:
    """What the card of a cut says."""
    source, gguf = source_card(model), config.out.suffix == ".gguf"
    index = [] if gguf else kept_layers(config.segments, layers)
    asked = [(segment.start, segment.stop) for segment in sorted(config.segments)]
    made = layers_of(source, config.out, asked, index, layers)
    return Made(
        **made,
        done=f"{source.name} without layers {label(made['segments'])}, half-open and counted from 0. Nothing was "
        "healed or measured: as it is, it writes worse than it could.",
        gguf=config.out.name if gguf else None,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `layercut evaluate` found, of one model or of a run's two."""

    perplexity: dict[str, float]
    """By the model's name; empty where it was not asked for."""
    tasks: dict[str, dict[str, Any]]
    """A row for each task; of one model alone, compared with itself."""
    ratio: tuple[float, float | None] | None
    """Of a run's two perplexities, compressed over dense, and the standard error of its logarithm over the windows."""
    retention: dict[str, Any] | None
    """Over the tasks; None of one model alone."""
    text: dict[str, Any] | None
    """Source, tokens, window and fingerprint of the text; None where it was not asked for."""
    limit: int | None
    """Items of each task, where that was limited."""
    evaluations: evaluation.Rows
    """Evaluation, metric -> figure by the model's name, and "higher_is_better"."""
    seed: int
    """Of the evaluations and probes."""
    probes: dict[str, Probed] | None = None
    """By the model's name; None where they were not asked for."""

    def to_json(self) -> dict[str, Any]:
        """What --json prints and a run keeps: the figures, and on what they were measured by which versions."""
        value, error = self.ratio or (None, None)
        return jsonable({
            "text": self.text,
            "perplexity": self.perplexity,
            "ratio": {"value": value, "standard_error": error} if self.ratio else None,
            "tasks": self.tasks,
            "retention": self.retention,
            "limit": self.limit,
            **({"evaluations": self.evaluations, "seed": self.seed} if self.evaluations else {}),
            **({"probes": self.probes, "seed": self.seed} if self.probes else {}),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "versions": versions(),
        })  # fmt: skip


def evaluate_only(target: str, config: PerplexityConfig) -> Evaluated:
    """Perplexity, tasks and packages' evaluations of a model, or of a run's dense and compressed model alike.

    What was found of a run is kept in its evaluations/, where `layercut report` finds it.

    Args:
        target: a run folder, or a model.
        config: what to measure, and on what.

    Returns:
        The figures.

    Raises:
        RunError: the run is not finished.
    """
    with memory.memory_limit(config.load.max_memory), compiled(config.compiled.compile):
        found = _evaluate(target, config)
    if is_run(Path(target)):
        try:
            processes.on_main(lambda: _keep(Path(target), found))
        except RunError as error:  # a full disk, or one that is read alone: the figures are told all the same
            say("evaluate", f"not kept for the report: {error.message}")
    return found


def _keep(run: Path, found: Evaluated) -> None:
    """Write evaluations/NAME.json, NAME a hash of what was measured: measured again, it is replaced."""
    asked: list[Any] = [found.text, sorted(found.tasks), found.limit]
    if found.evaluations:
        asked += [sorted(found.evaluations), found.seed]
    if found.probes:
        asked += ["probes", found.seed]
    of = model_key(run)
    (run / "evaluations").mkdir(exist_ok=True)
    write_json(run / "evaluations" / f"{digest([asked, of])}.json", {"run": of} | found.to_json())


def _evaluate(target: str, config: PerplexityConfig) -> Evaluated:
    processes.start()
    run, cache = Path(target), None
    names = {target: target}
    asked = config.tasks
    if asked.names:
        evaluation.check_tasks(asked.names, asked.include_path)
    functions = evaluation.named(asked.evaluation_names)
    source_of_text = config.eval_data or (None if asked.names or functions or asked.probes else "wikitext2")
    if is_run(run):
        check_finished(run, "evaluate")
        names = {"dense": checkpoints.read_json(run / "summary.json")["model"], "compressed": str(run / "model")}
        cache = run / "tasks"
    tasks = evaluation.load_tasks(asked.names, asked.include_path) if asked.names else {}
    losses: dict[str, torch.Tensor] = {}
    records: list[dict[str, Any]] = []
    figures: dict[str, dict[str, dict[str, float]]] = {name: {} for name in functions}
    drawn: Blocks | None = None
    found_probes: dict[str, Probed] = {}
    dense: Any = None
    for name, source in names.items():
        judged = _Judged(source, name, config, source_of_text, drawn, run if cache else None)
        if tasks:
            records.append(judged.tasks(tasks, cache))
        if source_of_text is not None:
            losses[name] = judged.losses()
        for one, function in functions.items():
            figures[one][name] = judged.figures(one, function)
        if asked.probes:
            dense = dense or judged.loaded.model  # damage is measured beside it: it stays in memory
            found_probes[name] = judged.probes(dense)
        drawn = judged.blocks
        del judged  # one model at a time: the next is loaded when this one's memory is free
        memory.release_freed()
    found = evaluation.compare_tasks(records[0], records[-1]) if records else {"tasks": {}, "retention": None}
    perplexities, ratio = {name: evaluation.of_losses(each) for name, each in losses.items()}, None
    if len(losses) == 2:
        error = evaluation.paired_error(losses["compressed"], losses["dense"])
        ratio = perplexities["compressed"] / perplexities["dense"], error
    return Evaluated(
        perplexity=perplexities,
        ratio=ratio,
        tasks=found["tasks"],
        retention=found["retention"] if len(records) == 2 else None,
        text=asdict(drawn.facts()) if drawn else None,
        limit=asked.limit,
        evaluations={one: evaluation.metric_rows(functions[one], of_models) for one, of_models in figures.items()},
        seed=config.seed,
        probes=found_probes or None,
    )


class _Judged:
    """A model to evaluate, loaded; refused where that cannot be done on this text."""

    def __init__(
        self,
        source: str,
        name: str,
        config: PerplexityConfig,
        text: str | None,
        blocks: Blocks | None,
        run: Path | None,
    ) -> None:
        """Load the model, and draw the text unless another model was measured on some.

        Args:
            source: Hub id, folder or .gguf file.
            name: what messages call it.
            config: what to measure, and on what.
            text: the text's source; None: no text is wanted.
            blocks: what another model was measured on; else they are drawn from `text`.
            run: the folder of the run that made the model; text that it was searched or tuned on is refused.
        """
        checkpoint = checkpoints.resolve(source, allow_pickle=config.load.allow_pickle)
        if text is not None:
            stock = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
            self.window = config.eval_window or loading.reported_window(stock)
            check_window("--eval-window", self.window, stock)
        self.name, self.config, self.run = name, config, run
        self.loaded = placement.load(checkpoint, **asdict(config.load))
        if sharding.is_spread(self.loaded.model) and self._needs_one_process(text):
            raise ConfigError(
                "tasks, evaluations, and text from the model itself are of one process, and the weights are sharded",
                "start one process",
            )
        self.blocks = blocks
        if text is not None and blocks is None:
            self.blocks = processes.on_main(lambda: self._drawn(text))

    def probes(self, dense: Any) -> Probed:
        """Keys, lists, and the damage beside the dense model, in the main process."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if layers_on_disk(model):
            raise ConfigError(
                "--probes needs the model in memory, and its layers are left on disk",
                "leave out --probes; with enough memory: --stream off",
            )
        asked = probes_for(tokenizer, model.config, seed=self.config.seed)
        with bar(f"probes of {self.name}", asked.tokens) as advance:
            return processes.on_main(lambda: probed(model, dense, tokenizer, asked, advance=advance))

    def _needs_one_process(self, text: str | None) -> bool:
        asked = self.config.tasks
        return bool(asked.names or asked.evaluation_names or asked.probes or "self" in split_mix(text or ""))

    def figures(self, name: str, function: evaluation.EvaluationFunction) -> dict[str, float]:
        """What a package's evaluation returns, in the main process."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if layers_on_disk(model):
            raise ConfigError(
                "--evaluations needs the model in memory, and its layers are left on disk",
                "leave out --evaluations; with enough memory: --stream off",
            )
        say("evaluate", f"{name} of {self.name}")
        return processes.on_main(lambda: evaluation.measure(name, function, model, tokenizer, seed=self.config.seed))

    def tasks(self, tasks: dict[str, Any], cache: Path | None) -> dict[str, Any]:
        """Scores of the main process, item by item."""
        model, tokenizer, limit = self.loaded.model, self.loaded.tokenizer, self.config.tasks.limit
        return processes.on_main(
            lambda: evaluation.score_tasks(model, tokenizer, tasks, limit=limit, name=self.name, cache=cache)
        )

    def losses(self) -> torch.Tensor:
        """Of each window of the tokens."""
        assert self.blocks is not None
        with bar(f"perplexity of {self.name}", len(self.blocks.tokens)) as advance:
            return evaluation.window_losses(self.loaded.model, self.blocks.tokens, advance=advance)

    def _drawn(self, text: str) -> Blocks:
        config, loaded = self.config, self.loaded
        blocks = load_blocks(
            text, loaded.tokenizer, tokens=config.eval_tokens, window=self.window, seed=config.seed,
            order="as written", model=loaded.model,
        )  # fmt: skip
        loading.check_tokens(blocks.tokens, loaded.model.config, loaded.checkpoint.name)
        if self.run:
            check_unseen(self.run, blocks)
        say("evaluate", f"{blocks.tokens.numel():,} tokens of {text}: {evaluation.perplexity_protocol(self.window)}")
        return blocks


def quantize_alone(target: str, config: QuantizeAloneConfig) -> Path:
    """Quantize a model, or a finished run's, into a new checkpoint with a quantize.json in it.

    A run's model is calibrated on the run's own calibration tokens, unless the text's flags say otherwise.

    Args:
        target: a run folder, or a model.
        config: how to quantize, and where to write.

    Returns:
        The new checkpoint's folder; the .gguf file where --out names one, which `export` then writes.

    Raises:
        RunError: --out exists, or cannot be written.
        ModelError: the model is quantized already, or does not fit in memory.
    """
    config.check()
    if config.out.suffix == ".gguf":
        kind = config.gguf_type or GGUF_OF_BITS[config.quantize.bits]
        asked = ExportConfig(out=config.out, consumers=config.consumers, hub=config.hub, force=config.force)
        return export(target, replace(asked, gguf_type=kind))
    consumers.check_written(consumer_names(config.consumers), consumers.written_by(config.quantize))
    repo_id = destination(config.hub)
    if config.out.exists() and not config.force:
        raise RunError(f"--out {config.out} exists", "name another folder, or pass --force to replace it")
    run = Path(target)
    of_run = is_run(run) and (run / "summary.json").is_file()
    source = checkpoints.resolve(str(run / "model") if of_run else target, allow_pickle=config.load.allow_pickle)
    check_replaceable(config.out, source.file)
    if getattr(loading.load_config(source), "quantization_config", None) and not source.gguf:
        raise ModelError(f"{source.name} is quantized already", "give the float checkpoint it was made from")
    if placement.wanted(source, **asdict(config.load)):
        raise ModelError(loading.STREAMED, loading.STREAMED_HINT)
    loaded = placement.load(source, **asdict(config.load))
    tokens, most = None, parse_bytes("--target-size", config.target_size) if config.target_size else None
    if most:
        bit_choice.check_target(loaded.model, config.quantize, most)
    if most or resolve(config.quantize.quantizer)[1].needs_calibration:
        own = of_run and config.text == DataConfig()
        tokens = stored_blocks(run, "calibration") if own else _calibration(loaded, config.text)
    cut = _cut_of(run) if of_run else []
    with memory.memory_limit(config.load.max_memory):  # in place: old weights leave memory
        found = quantize_(loaded.model, tokens, config.quantize, endpoints=cut, target=most)
    facts = found.to_dict()
    say("quantize", describe_quantization(facts))
    unseen = text_to_check(stored_blocks(run, "evaluation")) if of_run else None
    how: dict[str, Any] = {"text": unseen, "overwrite": config.force, "source": None if source.gguf else source.folder}
    exported = save(found, loaded.tokenizer, config.out, **how)
    write_json(config.out / "quantize.json", facts | {"exported_bytes": exported.bytes, "check": exported.check})
    made = _quantized_model(source.file, run if of_run else None, config, exported)
    describe_(config.out, made, run if of_run else None)
    if repo_id:
        upload(config.out, repo_id, private=config.hub.private)
    return config.out


def _quantized_model(source: Path, run: Path | None, config: QuantizeAloneConfig, exported: Exported) -> Made:
    """What the card of a quantized model says."""
    plain = of_run(run) if run else from_folder(source)
    measured = (exported.check or {}).get("perplexity")
    figures = [perplexity_again(run, measured["value"], measured["tokens"])] if measured and run else []
    bits = config.quantize.bits
    what = f"The decoder layers' weights in {bits} bits"
    if bits == "auto":
        what = f"Each matrix in its own bits, chosen for {config.target_size}"
    return replace(
        plain,
        done=f"{what} ({config.quantize.quantizer}).",
        number_format=number_format_of(bits),
        packed=True,
        figures=figures,
    )


def _calibration(loaded: loading.LanguageModel, text: DataConfig) -> torch.Tensor:
    """Token ids [N, T] of the text that the flags name."""
    tokens = load_blocks(
        text.data, loaded.tokenizer, tokens=text.tokens, window=text.window, seed=text.seed,
        chat_template=text.chat_template, model=loaded.model,
    ).tokens  # fmt: skip
    loading.check_tokens(tokens, loaded.model.config, loaded.checkpoint.name)
    return tokens


def _cut_of(run: Path) -> list[int]:
    """Layers beside the cuts of a finished run, by their place in its model."""
    cut, summary = checkpoints.read_json(run / "cut.json"), checkpoints.read_json(run / "summary.json")
    return endpoints([Segment(*bounds) for bounds in cut["segments"]], summary["layers"]["before"])
