"""What every method's cut still does, for `compare`: tasks, keys and lists, capabilities, generations, others' figures.

Beside `compare.py`, which measures perplexity. Each state of each set of removed layers is measured once, each kind of
measurement is an artefact of its own, and each task is kept as soon as it is scored: a stopped run resumes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from layercut import evaluation
from layercut.data.blocks import in_rows
from layercut.data.probe_families import EDITION
from layercut.evaluation.paired_retention import Retained, retained
from layercut.evaluation.probe_scores import Probed, Probes, found_of, probed, probes_for
from layercut.evaluation.retention import compare_records
from layercut.pipeline.artefacts import part_of, segments_of
from layercut.pipeline.compare_artefacts import (
    ComparedMethod,
    ComparedTask,
    CompareOthersArtefact,
    CompareProbesArtefact,
    CompareTasksArtefact,
    JudgedState,
)
from layercut.pipeline.compare_states import stem
from layercut.pipeline.run_context import RunContext
from layercut.progress import bar, say

DENSE = "compare-dense"


@dataclass
class CutJudge:
    """Measures models of a run by what `--tasks`, `--probes` and `--evaluations` name."""

    work: RunContext

    @property
    def is_asked(self) -> bool:
        """Whether anything is."""
        asked = self.work.config.tasks
        return bool(asked.names or asked.probes or asked.evaluation_names)

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """lm-eval's tasks by name."""
        asked = self.work.config.tasks
        return evaluation.load_tasks(asked.names, asked.include_path)

    @cached_property
    def probes(self) -> Probes:
        """What all models are asked."""
        return probes_for(self.work.tokenizer, self.work.architecture, seed=self.work.config.text.seed)

    def judge(self, name: str, model: Callable[[], Any], after: Sequence[str] = ()) -> JudgedState:
        """Everything that is asked for, of one model."""
        the_model = cache(model)  # made when first needed, once
        asked, found = self.work.config.tasks, JudgedState()
        if asked.probes:
            told = self._probes(name, the_model, after)
            found = replace(found, **vars(part_of(Probed, told)), health=told.health)
        if asked.names:
            scored = self._records(name, the_model, after)
            found = replace(found, scores={task: score_of(record) for task, record in scored.items()})
        if asked.evaluation_names:
            found = replace(found, evaluations=self._others(name, the_model, after))
        return found

    def records(self, name: str) -> dict[str, Any]:
        """The records of a model that was judged."""
        return self.work.run.artefact(CompareTasksArtefact, f"{name}-tasks").records

    def _records(self, name: str, model: Callable[[], Any], after: Sequence[str]) -> dict[str, Any]:
        work, asked = self.work, self.work.config.tasks
        inputs = [work.source, asked.names, asked.limit, evaluation.harness_version(asked.include_path)]
        with work.run.stage(CompareTasksArtefact, f"{name}-tasks", inputs, after=after) as stage:
            if stage.open:
                shown, folder = name.removeprefix("compare-"), work.run / "tasks"
                stage.found = CompareTasksArtefact(
                    records=evaluation.score_tasks(
                        model(), work.tokenizer, self.tasks, limit=asked.limit, name=shown, cache=folder
                    )
                )
        scores = ", ".join(f"{task} {score_of(record):.3f}" for task, record in stage.artefact.records.items())
        say("tasks", f"{name.removeprefix('compare-')}: {scores}")
        return stage.artefact.records

    def _probes(self, name: str, model: Callable[[], Any], after: Sequence[str]) -> CompareProbesArtefact:
        work = self.work
        inputs = [work.source, work.config.text.seed, self.probes.longest, work.text["evaluation"], "probes", EDITION]
        with work.run.stage(CompareProbesArtefact, f"{name}-probes", inputs, after=after) as stage:
            if stage.open:
                dense, judged = work.dense.model, model()
                with bar(f"probes, {name.removeprefix('compare-')}", self.probes.tokens) as advance:
                    found = probed(judged, dense, work.tokenizer, self.probes, advance=advance)
                rows = in_rows(work.blocks["evaluation"], work.config.text.window)
                health = evaluation.generation_health(dense, judged, rows) if name != DENSE else None
                stage.found = CompareProbesArtefact(**vars(found), health=health)
        told = stage.artefact
        asked = {what: found_of(getattr(told, what)) for what in ("keys", "lists")}
        if words := [f"{what} {hits} of {of}" for what, (hits, of) in asked.items() if of]:
            say("probes", f"{name.removeprefix('compare-')}: {', '.join(words)}")
        return told

    def _others(self, name: str, model: Callable[[], Any], after: Sequence[str]) -> dict[str, dict[str, float]]:
        work, seed = self.work, self.work.config.text.seed
        functions = evaluation.named(work.config.tasks.evaluation_names)
        inputs = [work.source, [[one, evaluation.source_digest(each)] for one, each in functions.items()], seed]
        with work.run.stage(CompareOthersArtefact, f"{name}-others", inputs, after=after) as stage:
            if stage.open:
                figures = {
                    one: evaluation.measure(one, each, model(), work.tokenizer, seed=seed)
                    for one, each in functions.items()
                }
                stage.found = CompareOthersArtefact(figures=figures)
        return stage.artefact.figures


def score_of(record: Mapping[str, Any]) -> float:
    """The score of the metric that represents a task."""
    return float(record["metrics"][evaluation.representative_metric(record)]["score"])


def asked_tasks(records: Mapping[str, Any]) -> dict[str, ComparedTask]:
    """The tasks, as all models were asked them."""
    found = {}
    for task, record in records.items():
        row = compare_records(record, record)
        of = record["metrics"][row["metric"]]
        share = of["higher_is_better"] and of["score"] <= 1
        found[task] = ComparedTask(metric=row["metric"], items=row["items"], chance=row["chance"], share=share)
    return found


def with_retention(rows: Sequence[ComparedMethod], judge: CutJudge) -> list[ComparedMethod]:
    """The rows with what each retains of the dense model's task scores, beside the first row in the same state."""
    dense, states = judge.records(DENSE), {state for row in rows for state in row.judged}
    found = {row.method: dict(row.judged) for row in rows}
    for state in states:
        judged = {
            row.method: judge.records(f"{stem(segments_of(row.segments))}-{state}")
            for row in rows
            if state in row.judged
        }
        for method, kept in retained(dense, judged).items():
            pairs = {task: compare_records(dense[task], record) for task, record in judged[method].items()}
            flips = {
                task: (row["lost"], row["gained"], row["p_value"]) for task, row in pairs.items()
                if row["lost"] is not None
            }  # fmt: skip
            # what the first row does not have in this state is no reference
            first = rows[0].method in judged
            found[method][state] = replace(
                found[method][state], flips=flips, retained=kept if first else without_reference(kept)
            )
    return [replace(row, judged=found[row.method]) for row in rows]


def without_reference(kept: Retained) -> Retained:
    """What is retained, and no word of how far it is behind another."""
    return replace(kept, behind=None, behind_error=None, p_value=None)
