"""`layercut evaluate`: perplexity, tasks, probes and packages' evaluations of a model, or of a finished run's two."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layercut import evaluation
from layercut.config.commands import PerplexityConfig
from layercut.data.blocks import Blocks, load_blocks
from layercut.data.sources import CHATS, SELF, has
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError, RunError
from layercut.evaluation.probe_scores import probed, probes_for
from layercut.files import digest, jsonable, write_json
from layercut.models import checkpoints, decoder_stack, loading, memory, placement
from layercut.models.layer_reader import layers_on_disk
from layercut.pipeline.environment import versions
from layercut.pipeline.resolve_options import check_window, needs_memory
from layercut.pipeline.run_folder import is_run, models_of
from layercut.pipeline.stages.text import check_unseen
from layercut.progress import bar, say
from layercut.report.run_facts import model_key


def evaluate_only(target: str, config: PerplexityConfig) -> dict[str, Any]:
    """Measure a model, or a run's dense and compressed model alike; what --json prints.

    What was found of a run is kept in its evaluations/, where `layercut report` finds it. Figures stand by the model's
    name. "ratio" is that of a run's two perplexities, with its standard error over the windows; "tasks" of one model
    alone are compared with itself.
    """
    run = Path(target) if is_run(Path(target)) else None
    with memory.memory_limit(config.load.max_memory):
        found = _evaluate(target, config, run)
    if run:
        asked: list[Any] = [found["text"], sorted(found["tasks"]), found["limit"]]
        asked += [sorted(found["evaluations"]), found["seed"]] if "evaluations" in found else []
        asked += ["probes", found["seed"]] if "probes" in found else []
        of = model_key(run)
        file = run / "evaluations" / f"{digest([asked, of])}.json"  # measured again, it is replaced

        def keep() -> None:
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"run": of} | found)

        try:
            processes.on_main(keep)
        except RunError as error:  # a full disk, or one that is read alone: the figures are told all the same
            say("evaluate", f"not kept for the report: {error.message}")
    return found


def _evaluate(target: str, config: PerplexityConfig, run: Path | None) -> dict[str, Any]:
    processes.start()
    wanted, seed = config.tasks, config.seed
    if wanted.names:
        evaluation.check_tasks(tuple(wanted.names), wanted.include_path)
    functions = evaluation.named(wanted.evaluation_names)
    models = models_of(run, "evaluate", allow_pickle=config.load.allow_pickle) if run else {target: target}
    text = config.eval_data or (None if wanted.names or functions or wanted.probes else "wikitext2")
    tasks = evaluation.load_tasks(wanted.names, wanted.include_path) if wanted.names else {}
    losses, records, figures, probes = dict[str, Any](), dict[str, Any](), dict[str, Any](), dict[str, Any]()
    blocks: Blocks | None = None
    dense: Any = None

    def measure(name: str, source: str) -> None:
        """All that is asked for, of one model; it leaves memory with this call."""
        nonlocal blocks, dense
        checkpoint = checkpoints.resolve(source, allow_pickle=config.load.allow_pickle)
        window = 0
        if text is not None:
            stock = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
            window = config.eval_window or decoder_stack.reported_window(stock)
            check_window("--eval-window", window, stock)
        loaded = placement.load(checkpoint, **asdict(config.load))
        model, tokenizer = loaded.model, loaded.tokenizer
        by_one = wanted.names or functions or wanted.probes or (text is not None and has(text, SELF, CHATS))
        if by_one and sharding.is_spread(model):
            raise ConfigError(
                "tasks, evaluations, and text from the model itself are of one process, and the weights are sharded",
                "start one process",
            )

        def draw(source: str) -> Blocks:
            drawn = load_blocks(
                source, tokenizer, tokens=config.eval_tokens, window=window, seed=seed, order="as written", model=model
            )
            decoder_stack.check_tokens(drawn.tokens, model.config, loaded.checkpoint.name)
            if run:
                check_unseen(run, drawn, tokenizer)
            protocol = evaluation.perplexity_protocol(window)
            say("evaluate", f"{drawn.tokens.numel():,} tokens of {source}: {protocol}")
            return drawn

        if text is not None and blocks is None:
            blocks = processes.on_main(lambda: draw(text))
        if tasks:
            how: dict[str, Any] = {"limit": wanted.limit, "name": name, "cache": run / "tasks" if run else None}
            records[name] = processes.on_main(lambda: evaluation.score_tasks(model, tokenizer, tasks, **how))
        if blocks:
            with bar(f"perplexity of {name}", len(blocks.tokens)) as advance:
                losses[name] = evaluation.window_losses(model, blocks.tokens, advance=advance)
        if (functions or wanted.probes) and layers_on_disk(model):
            raise needs_memory("--evaluations" if functions else "--probes")

        def measured(title: str) -> dict[str, float]:
            say("evaluate", f"{title} of {name}")
            return evaluation.measure(title, functions[title], model, tokenizer, seed=seed)

        figures[name] = {one: processes.on_main(lambda one=one: measured(one)) for one in functions}  # type: ignore[misc]
        if wanted.probes:
            dense = model if dense is None else dense  # the KL is taken beside it: it stays in memory
            asked = probes_for(tokenizer, model.config, seed=seed)
            with bar(f"probes of {name}", asked.tokens) as advance:
                probes[name] = processes.on_main(lambda: probed(model, dense, tokenizer, asked, advance=advance))

    for name, source in models.items():
        measure(name, source)
        memory.release_freed()

    perplexity, ratio = {name: evaluation.of_losses(each) for name, each in losses.items()}, None
    if len(losses) == 2:
        error = evaluation.paired_error(losses["compressed"], losses["dense"])  # of the ratio's logarithm
        value = perplexity["compressed"] / perplexity["dense"]
        ratio = {"value": value, "standard_error": None if error is None else value * error}
    scored = list(records.values())
    compared = evaluation.compare_tasks(scored[0], scored[-1]) if scored else {"tasks": {}}
    by_function = {
        one: evaluation.metric_rows(function, {name: each[one] for name, each in figures.items()})
        for one, function in functions.items()
    }
    found: dict[str, Any] = jsonable({
        "text": asdict(blocks.facts) if blocks else None,
        "perplexity": perplexity,
        "ratio": ratio,
        "tasks": compared["tasks"],
        "retention": compared["retention"] if len(scored) == 2 else None,
        "limit": wanted.limit,
        **({"evaluations": by_function} if functions else {}),
        **({"probes": probes} if probes else {}),
        **({"seed": seed} if functions or probes else {}),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": versions(),
    })  # fmt: skip
    return found
