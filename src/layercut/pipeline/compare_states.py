"""What becomes of every method's cut, for `compare`: plain, folded, tuned beside the cut, or by LoRA on all layers.

Beside `compare.py`, which searches. Each set of removed layers is measured once, by perplexity on the same held-out
tokens, and its weights are kept for what else is measured of it (`compare_judged.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from layercut import evaluation
from layercut.data.blocks import by_origin
from layercut.data.sources import split_mix
from layercut.errors import SurgeryError
from layercut.healing import lora, tune_
from layercut.healing.endpoint_tuning import TuningFiles
from layercut.healing.least_squares import fold_cut_
from layercut.healing.tuning_result import TuningResult
from layercut.models import memory, model_weights
from layercut.models.passes import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.pipeline.artefacts import segments_of
from layercut.pipeline.compare_artefacts import (
    CompareCutArtefact,
    ComparedMethod,
    ComparedTuning,
    CompareTunedArtefact,
    MethodChoice,
    StartAndBest,
)
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages.heal import keyed, tune_settings
from layercut.pipeline.stages.text import taught, tuning_treatment
from layercut.progress import bar, say
from layercut.report import formatting
from layercut.segments import Segment
from layercut.surgery import cut

WINDOWS = "losses of each window"
"""Among a stage's inputs, since artefacts of earlier versions do not hold them."""


def cut_row(work: RunContext, chosen: MethodChoice, dense: list[float]) -> ComparedMethod:
    """A method's row, cut and folded: the same stages, so the same figures, for all methods that remove the same."""
    segments, at = segments_of(chosen.segments), stem(segments_of(chosen.segments))
    inputs = cut_inputs(work, chosen)
    with work.run.stage(CompareCutArtefact, f"{at}-cut", inputs, together=True) as cutting:
        if cutting.open:
            cutting.found = cut_and_fold(work, segments, f"{at}-folded")
    cut = cutting.artefact
    return ComparedMethod(
        **vars(chosen),
        perplexity={"cut": cut.cut, "folded": cut.folded, "tuned": None},
        standard_error={state: error_of(losses, dense) for state, losses in cut.losses.items()},
        texts={state: by_text(work, losses) for state, losses in cut.losses.items()},
        fold=cut.fold,
        tuning=None,
        refused=cut.refused,
    )


def cut_inputs(work: RunContext, chosen: MethodChoice) -> list[Any]:
    """What a cut and its fold depend on."""
    return [work.source, work.text["calibration"], work.text["evaluation"], chosen.segments, WINDOWS]


def trained_row(work: RunContext, row: ComparedMethod, dense: list[float], state: str) -> ComparedMethod:
    """A method's row with what training did."""
    segments, at = segments_of(row.segments), stem(segments_of(row.segments))
    inputs = [*cut_inputs(work, row), keyed(work.config.heal), work.text["tuning"], work.text["heldout"]]
    inputs += [*taught(work), *(lora.RECIPE if state == "lora" else [])]
    with work.run.stage(CompareTunedArtefact, f"{at}-{state}", inputs, together=True) as training:
        if training.open:
            files = work.run.artefact(CompareCutArtefact, f"{at}-cut").files
            training.found = train(work, segments, files, state)
    trained = training.artefact
    return replace(
        row,
        perplexity=row.perplexity | {state: trained.tuned},
        standard_error=row.standard_error | {state: error_of(trained.losses, dense)},
        texts=row.texts | {state: by_text(work, trained.losses)},
        tuning=trained.tuning if state == "tuned" else row.tuning,
        lora=trained.tuning if state == "lora" else row.lora,
    )


def cut_and_fold(work: RunContext, segments: Sequence[Segment], name: str) -> CompareCutArtefact:
    """Perplexity of the cut model, and after the fold, helpful or not; the folded weights are kept for tuning."""
    try:
        student = cut(work.dense.model, segments)
    except SurgeryError as error:  # layers apart from each other may leave what the architecture cannot express
        return CompareCutArtefact(refused=error.message)
    losses, tokens = {"cut": window_losses(work, student)}, work.blocks["calibration"]
    runner = DecoderRunner(student)
    with bar("folding", len(segments) * len(tokens)) as advance:
        folds = [fold_cut_(runner, work.stack, segment, tokens, advance=advance) for segment in sorted(segments)]
    is_folded = not all(fold.skipped for fold in folds)
    if is_folded:
        work.save(work.changed(student), name)
        losses["folded"] = window_losses(work, student)
    return CompareCutArtefact(
        cut=evaluation.of_losses(losses["cut"]),
        folded=evaluation.of_losses(losses["folded"]) if is_folded else None,
        losses={state: each.tolist() for state, each in losses.items()},
        fold=folds,
        files=[f"{name}.safetensors"] if is_folded else [],
    )


def train(work: RunContext, segments: Sequence[Segment], folded: list[str], state: str) -> CompareTunedArtefact:
    """Train as the journey does it, or by LoRA on the same rows: from the fold where that helps on the held-out
    rows.
    """
    student, kept = start_of(work, segments, folded)
    if work.own_process:
        memory.reuse_freed()
    report = trained_by(work, student, state)
    start = report.heldout[0]["loss"]
    say(state, f"{', '.join(map(str, segments))}: held-out loss {start:.4f} -> {report.best:.4f}")
    losses, name = window_losses(work, student), f"{stem(segments)}-{state}"
    work.save(work.changed(student), name)
    return CompareTunedArtefact(
        files=[f"{name}.safetensors"],
        tuned=evaluation.of_losses(losses),
        losses=losses.tolist(),
        tuning=ComparedTuning(
            tokens=report.tokens,
            trained_layers=report.trained_layers,
            trained_parameters=report.trained_parameters,
            from_fold=kept,
            heldout=StartAndBest(start=start, best=report.best),
            best_step=report.best_step,
            tokens_per_second=report.tokens_per_second,
        ),
    )


def start_of(work: RunContext, segments: Sequence[Segment], folded: list[str]) -> tuple[Any, bool]:
    """What training starts from."""
    stack, heldout = work.stack, work.blocks["heldout"]
    plain = cut(work.dense.model, segments)
    if folded:
        with_fold = cut(work.dense.model, segments)
        model_weights.replace_parameters_(with_fold, load_file(work.run / folded[0]))
        if mean_kl(stack, DecoderRunner(with_fold), heldout) < mean_kl(stack, DecoderRunner(plain), heldout):
            return with_fold, True
    return plain, False


def trained_by(work: RunContext, student: Any, state: str) -> TuningResult:
    """Train a cut model, in place."""
    rows, settings = work.blocks["tuning"], tune_settings(work.config.heal)
    how: dict[str, Any] = {"heldout": work.blocks["heldout"], "files": TuningFiles(stopping=work.stopping)}
    how |= vars(tuning_treatment(work))
    if state == "lora":
        return lora.tune_lora_(student, work.stack, rows, settings=settings, **how)
    return tune_(student, work.stack, rows, **how, **vars(settings))


def window_losses(work: RunContext, model: Any) -> torch.Tensor:
    """The mean loss of each window of the evaluation tokens."""
    tokens = work.blocks["evaluation"]
    with bar("perplexity", len(tokens)) as advance:
        return evaluation.window_losses(model, tokens, advance=advance)


def error_of(losses: list[float], dense: list[float]) -> float | None:
    """Standard error of ln(perplexity / dense), paired over the windows."""
    of_model, of_dense = (torch.tensor(each, dtype=torch.float64) for each in (losses, dense))
    return evaluation.paired_error(of_model, of_dense)


def in_state(work: RunContext, segments: Sequence[Segment], state: str) -> Any:
    """The model without the segments, in a state whose weights the run folder has."""
    student = cut(work.dense.model, segments)
    if state != "cut":
        model_weights.replace_parameters_(student, load_file(work.run / f"{stem(segments)}-{state}.safetensors"))
    return student


def stem(segments: Sequence[Segment]) -> str:
    """What the artefacts of a set of removed layers begin with."""
    return "compare-at-" + "-".join(f"{s.start}.{s.stop}" for s in segments)


def by_text(work: RunContext, losses: Sequence[float]) -> dict[str, float]:
    """Perplexity of each text, where the evaluation text is a mix of several."""
    text = work.text["evaluation"]
    named = split_mix(text.source)  # what streams are called; of files that is less telling than their names
    origins = named if len(named) == len(text.origins) else text.origins
    parts = by_origin(torch.tensor(losses, dtype=torch.float64), origins)
    if len(parts) == 1:
        return {}
    return {formatting.source_name(name): evaluation.of_losses(part) for name, part in parts.items()}
