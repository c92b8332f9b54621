"""`layercut evaluate`: perplexity, tasks, tests and packages' evaluations of a model, or of a finished run's two.

The measurements are those of a run (`evaluation/`), one model in memory at a time but for tests, which are judged
beside the dense one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layercut import evaluation
from layercut.config import PerplexityConfig
from layercut.data.blocks import Blocks, load_blocks
from layercut.data.sources import CHATS, SELF, has
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError, RunError
from layercut.evaluation.probe_scores import Probed, probed, probes_for
from layercut.files.json_values import digest, jsonable, write_json
from layercut.models import checkpoints, decoder_stack, loading, memory, placement
from layercut.models.layer_reader import layers_on_disk
from layercut.pipeline.provenance import is_run, models_of, versions
from layercut.pipeline.resolve_options import check_window, needs_memory
from layercut.pipeline.stages.text import check_unseen
from layercut.progress import bar, say
from layercut.report.run_facts import model_key


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `layercut evaluate` found, of one model or of a run's two."""

    perplexity: dict[str, float]
    """By the model's name; empty where it was not asked for."""
    tasks: dict[str, dict[str, Any]]
    """A row for each task; of one model alone, compared with itself."""
    ratio: tuple[float, float | None] | None
    """Of a run's two perplexities, compressed over dense, with its standard error over the windows."""
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
    """Perplexity, tasks, tests and packages' evaluations of a model, or of a run's dense and compressed model alike.

    What was found of a run is kept in its evaluations/, where `layercut report` finds it.
    """
    with memory.memory_limit(config.load.max_memory):
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


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What to measure of which models, found before any of them is loaded."""

    models: dict[str, str]
    """Hub id, folder or .gguf file, by what messages call it: of a run "dense" and "compressed", in this order."""
    run: Path | None
    """The folder of the run that made them; text that it was searched or tuned on is refused."""
    text: str | None
    """The text's source; None: no text is wanted."""
    tasks: dict[str, Any]
    """lm-eval's, by name."""
    functions: dict[str, evaluation.EvaluationFunction]
    """Packages' evaluations, by name."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What was found of one model; None where it was not asked for."""

    losses: torch.Tensor | None
    """Of each window of the text."""
    record: dict[str, Any] | None
    """Items of the tasks."""
    figures: dict[str, dict[str, float]]
    """What each of the packages' evaluations returned."""
    probes: Probed | None


def _evaluate(target: str, config: PerplexityConfig) -> Evaluated:
    processes.start()
    asked, found = _asked(target, config), dict[str, _Measured]()
    drawn: Blocks | None = None
    dense: Any = None
    for name, source in asked.models.items():
        judged = _Judged(source, name, config, asked, drawn)
        if config.tasks.probes:
            dense = dense or judged.loaded.model  # damage is measured beside it: it stays in memory
        found[name], drawn = judged.measured(asked, dense), judged.blocks
        del judged  # one model at a time: the next is loaded when this one's memory is free
        memory.release_freed()
    return _evaluated(found, asked, drawn, config)


def _asked(target: str, config: PerplexityConfig) -> _Asked:
    run, tasks = Path(target), config.tasks
    if tasks.names:
        evaluation.check_tasks(tuple(tasks.names), tasks.include_path)
    functions = evaluation.named(tasks.evaluation_names)
    models, of_run = {target: target}, is_run(run)
    if of_run:
        models = models_of(run, "evaluate", allow_pickle=config.load.allow_pickle)
    return _Asked(
        models=models,
        run=run if of_run else None,
        text=config.eval_data or (None if tasks.names or functions or tasks.probes else "wikitext2"),
        tasks=evaluation.load_tasks(tasks.names, tasks.include_path) if tasks.names else {},
        functions=functions,
    )


def _evaluated(found: dict[str, _Measured], asked: _Asked, text: Blocks | None, config: PerplexityConfig) -> Evaluated:
    """The models side by side."""
    losses = {name: each.losses for name, each in found.items() if each.losses is not None}
    records = [each.record for each in found.values() if each.record is not None]
    perplexity, ratio = {name: evaluation.of_losses(each) for name, each in losses.items()}, None
    if len(losses) == 2:
        error = evaluation.paired_error(losses["compressed"], losses["dense"])
        value = perplexity["compressed"] / perplexity["dense"]
        ratio = value, None if error is None else value * error  # the error was that of ln(value)
    compared = evaluation.compare_tasks(records[0], records[-1]) if records else {"tasks": {}, "retention": None}
    return Evaluated(
        perplexity=perplexity,
        ratio=ratio,
        tasks=compared["tasks"],
        retention=compared["retention"] if len(records) == 2 else None,
        text=asdict(text.facts) if text else None,
        limit=config.tasks.limit,
        evaluations={
            one: evaluation.metric_rows(function, {name: each.figures[one] for name, each in found.items()})
            for one, function in asked.functions.items()
        },
        seed=config.seed,
        probes={name: each.probes for name, each in found.items() if each.probes is not None} or None,
    )


class _Judged:
    """A model to evaluate, loaded; refused where that cannot be done on this text."""

    def __init__(self, source: str, name: str, config: PerplexityConfig, asked: _Asked, blocks: Blocks | None) -> None:
        """Load the model, and draw the text unless another model was measured on some."""
        text = asked.text
        checkpoint = checkpoints.resolve(source, allow_pickle=config.load.allow_pickle)
        if text is not None:
            stock = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
            self.window = config.eval_window or decoder_stack.reported_window(stock)
            check_window("--eval-window", self.window, stock)
        self.name, self.config, self.run = name, config, asked.run
        self.loaded = placement.load(checkpoint, **asdict(config.load))
        if sharding.is_spread(self.loaded.model) and self._needs_one_process(text):
            raise ConfigError(
                "tasks, evaluations, and text from the model itself are of one process, and the weights are sharded",
                "start one process",
            )
        self.blocks = blocks
        if text is not None and blocks is None:
            self.blocks = processes.on_main(lambda: self._drawn(text))

    def measured(self, asked: _Asked, dense: Any) -> _Measured:
        """All that is asked for: tasks, perplexity, packages' evaluations, and tests beside the dense model."""
        return _Measured(
            record=self._record(asked.tasks) if asked.tasks else None,
            losses=self._losses(self.blocks.tokens) if self.blocks else None,
            figures={name: self._figures(name, function) for name, function in asked.functions.items()},
            probes=self._probes(dense) if self.config.tasks.probes else None,
        )

    def _probes(self, dense: Any) -> Probed:
        """Keys, lists, and the damage beside the dense model, in the main process."""
        model, tokenizer = self._in_memory("--probes"), self.loaded.tokenizer
        asked = probes_for(tokenizer, model.config, seed=self.config.seed)
        with bar(f"probes of {self.name}", asked.tokens) as advance:
            return processes.on_main(lambda: probed(model, dense, tokenizer, asked, advance=advance))

    def _in_memory(self, flag: str) -> Any:
        if layers_on_disk(self.loaded.model):
            raise needs_memory(flag)
        return self.loaded.model

    def _needs_one_process(self, text: str | None) -> bool:
        asked, writes = self.config.tasks, text is not None and has(text, SELF, CHATS)
        return bool(asked.names or asked.evaluation_names or asked.probes or writes)

    def _figures(self, name: str, function: evaluation.EvaluationFunction) -> dict[str, float]:
        """What a package's evaluation returns, in the main process."""
        model, tokenizer = self._in_memory("--evaluations"), self.loaded.tokenizer
        say("evaluate", f"{name} of {self.name}")
        return processes.on_main(lambda: evaluation.measure(name, function, model, tokenizer, seed=self.config.seed))

    def _record(self, tasks: dict[str, Any]) -> dict[str, Any]:
        """Scores of the main process, item by item; of a run's models those that it has are not asked again."""
        model, tokenizer, limit = self.loaded.model, self.loaded.tokenizer, self.config.tasks.limit
        cache = self.run / "tasks" if self.run else None
        return processes.on_main(
            lambda: evaluation.score_tasks(model, tokenizer, tasks, limit=limit, name=self.name, cache=cache)
        )

    def _losses(self, tokens: torch.Tensor) -> torch.Tensor:
        with bar(f"perplexity of {self.name}", len(tokens)) as advance:
            return evaluation.window_losses(self.loaded.model, tokens, advance=advance)

    def _drawn(self, text: str) -> Blocks:
        config, loaded = self.config, self.loaded
        blocks = load_blocks(
            text, loaded.tokenizer, tokens=config.eval_tokens, window=self.window, seed=config.seed,
            order="as written", model=loaded.model,
        )  # fmt: skip
        decoder_stack.check_tokens(blocks.tokens, loaded.model.config, loaded.checkpoint.name)
        if self.run:
            check_unseen(self.run, blocks, loaded.tokenizer)
        say("evaluate", f"{blocks.tokens.numel():,} tokens of {text}: {evaluation.perplexity_protocol(self.window)}")
        return blocks
