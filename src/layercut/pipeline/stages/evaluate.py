"""Stages: perplexity of every state, generations and speed, tasks, long context, probes, packages' evaluations.

Each measures the dense model and the one of the run's last state in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from layercut import evaluation as measures
from layercut.data.blocks import in_rows
from layercut.data.probe_families import EDITION
from layercut.data.probes import judging_rows, probe_rows
from layercut.distributed import processes
from layercut.evaluation import probe_scores, speed
from layercut.evaluation.probe_scores import LONGEST_PROBE, TEST_ROWS, TEST_WINDOW, found_of, probes_for, retrieval_grid
from layercut.evaluation.tasks import CLEAR
from layercut.layer_search.skill_map import capability_map
from layercut.models import decoder_stack, layer_reader
from layercut.models.placement import placed_over
from layercut.models.runner import DecoderRunner
from layercut.pipeline.artefacts import (
    CapabilitiesArtefact,
    CloserLook,
    EvaluateArtefact,
    EvaluationsArtefact,
    FoldArtefact,
    FoundByLength,
    Generation,
    HealArtefact,
    HitsByLength,
    LongContext,
    Metric,
    Perplexities,
    QuantizeArtefact,
    SharedText,
    TasksArtefact,
)
from layercut.pipeline.run_context import RunContext, Weights
from layercut.progress import bar, say
from layercut.report.stage_lines import describe_retention
from layercut.segments import Segment

TESTS_OF_MAP, TEXT_OF_MAP = 8, 4
"""Rows of probes and of text that the map is made of: of SmolLM2 two thirds of a minute of one core, a guess of what a
picture is worth."""
FEWEST_WINDOWS = 4  # windows that a state between the dense and the pruned model is measured on, at least
ROWS_OF_A_LENGTH = 4  # rows of probes of recall, and of lists, alone at each length


def both(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """The model before any cut, and the one of the run's last state."""
    return {"dense": work.dense.model, "compressed": work.compressed(segments)}


def evaluate(work: RunContext, segments: Sequence[Segment]) -> EvaluateArtefact:
    """Perplexity of the dense and the pruned model on held-out tokens; what they write, and how fast.

    The states between are measured on the first quarter of the windows, against the dense model on the same.
    """
    text = work.text["evaluation"]
    inputs = [replace(work.config.evaluate, eval_data="", long_context=0), text]
    with work.run.stage(EvaluateArtefact, "eval", inputs, after=["quantize"], together=True) as stage:
        if stage.open:
            tokens, states = work.blocks["evaluation"], states_of(work)
            few = tokens[: max(FEWEST_WINDOWS, len(tokens) // 4)]
            (*between, (final, last)) = states.items()
            losses: dict[str, torch.Tensor] = {}
            with bar("perplexity", 2 * len(tokens) + len(between) * len(few)) as advance:
                dense = measures.window_losses(work.dense.model, tokens, advance=advance)
                for state, weights in between:
                    losses[state] = measures.window_losses(work.student(segments, *weights), few, advance=advance)
                losses[final] = measures.window_losses(work.student(segments, *last), tokens, advance=advance)
            # a student of its own: where weights are sharded, the main process alone has a whole model
            beside = processes.on_main(lambda: look_closer(work, work.student(segments, *last), tokens))
            # of a state between, what it is above the dense model on the same windows
            found = {
                state: measures.of_losses(of if len(of) == len(dense) else dense.mean() + of - dense[: len(of)])
                for state, of in losses.items()
            }
            errors = {state: measures.paired_error(of, dense[: len(of)]) for state, of in losses.items()}
            perplexity = Perplexities(
                dataset=text.source, window=text.window, tokens=text.tokens, dense=measures.of_losses(dense),
                cut=found["cut"], folded=found.get("folded"), tuned=found.get("tuned"),
                quantized=found.get("quantized"), protocol=measures.perplexity_protocol(text.window),
                fingerprint=text.fingerprint, standard_error=errors,
                shared=work.run.artefact(SharedText, "text-shared"),
            )  # fmt: skip
            stage.found = EvaluateArtefact(perplexity=perplexity, **vars(beside))
    return stage.artefact


def states_of(work: RunContext) -> dict[str, list[Weights]]:
    """The states of the cut model that this run has, in order, and the weights that each has of earlier stages."""
    run = work.run
    states: dict[str, list[Weights]] = {"cut": []}
    if run.artefact(FoldArtefact, "fold").changed:
        states["folded"] = ["folded"]
    if run.artefact(HealArtefact, "heal").tuning:
        states["tuned"] = ["folded", "tuned"]
    quantized = run.artefact(QuantizeArtefact, "quantize")
    if quantized.bits != 16 or (quantized.gguf and quantized.gguf["rounded"]):
        states["quantized"] = ["folded", "tuned", "quantized"]
    return states


def look_closer(work: RunContext, last: Any, tokens: torch.Tensor) -> CloserLook:
    """What the dense and the last model write, and how fast.

    Not measured where layers are on disk, which would be read again for every token written.
    """
    on_devices = [size for device in placed_over(last) if (size := speed.peak_device_bytes(device)) is not None]
    peaks: dict[str, Any] = {
        "peak_rss_bytes": speed.peak_rss_bytes(), "peak_device_bytes": max(on_devices, default=None)
    }  # fmt: skip
    if layer_reader.layers_on_disk(last):
        say("evaluate", "layers are left on disk: generations, their health and speed are not measured")
        return CloserLook(generations=None, health=None, speed=None, **peaks)
    dense = work.dense.model
    samples = {name: measures.generations(m, work.tokenizer) for name, m in (("dense", dense), ("compressed", last))}
    health = measures.generation_health(dense, last, in_rows(tokens, work.config.text.window))
    if work.tokenizer.chat_template:
        found = measures.replies(dense, last, work.tokenizer, samples)
        health["replies"] = {**found, "most": measures.SAMPLE, "prompts": len(measures.PROMPTS)}
    written = [
        Generation(prompt=prompt, dense=dense, compressed=compressed)
        for prompt, dense, compressed in zip(measures.PROMPTS, *samples.values(), strict=True)
    ]
    timed = speed.speed(dense, last) if work.config.evaluate.speed else None
    return CloserLook(generations=written, health=health, speed=timed, **peaks)


def score(work: RunContext, segments: Sequence[Segment]) -> TasksArtefact:
    """Tasks of lm-eval on the same items; each task is kept as soon as it is scored."""
    asked = work.config.tasks
    inputs = [asked.names, asked.limit, measures.harness_version(asked.include_path), CLEAR]
    with work.run.stage(TasksArtefact, "tasks", inputs, after=["quantize"]) as stage:
        if stage.open:
            tasks, cache = measures.load_tasks(asked.names, asked.include_path), work.run / "tasks"
            records = {
                name: measures.score_tasks(m, work.tokenizer, tasks, limit=asked.limit, name=name, cache=cache)
                for name, m in both(work, segments).items()
            }
            found = measures.compare_tasks(records["dense"], records["compressed"])
            stage.found = TasksArtefact(**found, limit=asked.limit)
    say("tasks", describe_retention(stage.artefact.retention))
    return stage.artefact


def others(work: RunContext, segments: Sequence[Segment]) -> EvaluationsArtefact:
    """Packages' evaluations, from the run's seed."""
    functions, seed = measures.named(work.config.tasks.evaluation_names), work.config.text.seed
    inputs = [[[name, measures.source_digest(each)] for name, each in functions.items()], seed]
    with work.run.stage(EvaluationsArtefact, "evaluations", inputs, after=["quantize"]) as stage:
        if stage.open:
            models = {"dense": lambda: work.dense.model, "compressed": lambda: work.compressed(segments)}
            found = measures.measure_all(functions, models, work.tokenizer, seed=seed)
            rows = {name: {key: Metric(**row) for key, row in of.items()} for name, of in found.items()}
            stage.found = EvaluationsArtefact(evaluations=rows, seed=seed)
    say("evaluations", ", ".join(functions))
    return stage.artefact


def long(work: RunContext, segments: Sequence[Segment]) -> LongContext:
    """Perplexity by position on long windows of the evaluation text, hidden keys, and what such a length costs."""
    asked, seed = work.config.evaluate.long_context, work.config.text.seed
    text, tokenizer = work.text["evaluation"], work.tokenizer
    inputs = [asked, seed, text, *(["a window is of one text"] if len({*text.origins}) > 1 else [])]
    with work.run.stage(LongContext, "long", inputs, after=["quantize"]) as stage:
        if stage.open:
            models = both(work, segments)
            windows = measures.long_windows(work.blocks["evaluation"], asked, work.dense.model, text.origins)
            longest = windows.shape[1]
            keys = probe_scores.trials(probe_scores.passkey, tokenizer, longest, seed)
            with bar("long context", 2 * (windows.numel() + sum(len(ids) for _, _, ids, _ in keys))) as advance:
                positions = {n: measures.perplexity_by_position(m, windows, advance=advance) for n, m in models.items()}
                grids = {n: retrieval_grid(m, tokenizer, keys, advance=advance) for n, m in models.items()}
            stage.found = LongContext(
                window=longest, windows=len(windows), perplexity=positions,
                passkey=grids | {"seed": seed} if keys else None,
                cost=speed.long_prompt(*models.values(), tokens=longest),
            )  # fmt: skip
    say("long", f"up to {stage.artefact.window:,} tokens")
    return stage.artefact


def capabilities(work: RunContext, segments: Sequence[Segment]) -> CapabilitiesArtefact | None:
    """What the pruned model can still do of probes that it was not tuned on; with --probes, which layers hold what."""
    text = work.config.text
    if work.config.search.preserve == "none" and not work.config.tasks.probes:
        return None
    tests = probe_rows(work.tokenizer, rows=TESTS_OF_MAP, window=text.window, seed=text.seed)
    if not tests.names:
        say("capabilities", f"no probe fits rows of {text.window} tokens: not looked at")
        return None
    mapped = work.config.tasks.probes
    inputs = [work.source, text.seed, text.window, text.tokens, len(segments), EDITION, mapped]
    with work.run.stage(CapabilitiesArtefact, "capabilities", inputs, after=["quantize"], together=True) as stage:
        if stage.open:
            some = work.blocks["calibration"][:TEXT_OF_MAP]
            found = capability_map(work.stack, probes=tests, text=some) if mapped else None
            models, by_length = (DecoderRunner(work.compressed(segments)), work.stack), list[HitsByLength]()
            of: dict[str, Any] = {"tokenizer": work.tokenizer, "seed": text.seed}
            longest = min(LONGEST_PROBE, decoder_stack.positions(work.architecture) or LONGEST_PROBE)
            with bar("probes", None) as advance:
                window = min(max(text.window, TEST_WINDOW), longest)
                rows = probe_rows(**of, rows=TEST_ROWS, window=window, family="judging")
                judged = measures.capability_figures(*models, rows, advance=advance)
                for name in ("recall", "lists"):
                    for length in probe_scores.lengths(longest):
                        longer = judging_rows(**of, rows=ROWS_OF_A_LENGTH, window=length, capability=name)
                        if longer.names:
                            hits = measures.capability_figures(*models, longer, advance=advance)
                            by_length.append(
                                HitsByLength(
                                    capability=name, length=length, dense=hits.dense_hits[name],
                                    compressed=hits.hits[name], answers=hits.answers[name],
                                )
                            )  # fmt: skip
            stage.found = CapabilitiesArtefact(
                map=found.to_dict() if found else None, words=found.words() if found else [], judged=judged,
                by_length=by_length,
            )  # fmt: skip
    told = stage.artefact.judged
    kept = ", ".join(
        f"{name} {round(told.dense_hits[name] * n)} -> {round(told.hits[name] * n)} of {n}"
        for name, n in told.answers.items()
    )
    say("capabilities", f"right answers to probes: {kept}")
    return stage.artefact


def probes(work: RunContext, segments: Sequence[Segment]) -> FoundByLength:
    """Keys hidden in long text and values in lists as long: what greedy decoding finds."""
    seed = work.config.text.seed
    with work.run.stage(FoundByLength, "probes", [work.source, seed, EDITION], after=["quantize"]) as stage:
        if stage.open:
            asked, models = probes_for(work.tokenizer, work.architecture, seed=seed), both(work, segments)
            with bar("keys and lists", 2 * asked.prompt_tokens) as advance:
                keys, lists = (
                    {name: retrieval_grid(m, work.tokenizer, each, advance=advance) for name, m in models.items()}
                    for each in (asked.keys, asked.lists)
                )
            stage.found = FoundByLength(keys=keys, lists=lists, longest=asked.longest, seed=seed)
    found = stage.artefact
    for name, grids in (("keys", found.keys), ("lists", found.lists)):
        (dense, asked_of), (compressed, _) = (found_of(grids[each]) for each in ("dense", "compressed"))
        if asked_of:
            say("probes", f"{name} found: {dense} -> {compressed} of {asked_of}")
    return found
