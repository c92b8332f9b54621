"""Stages: cut, fold, tune. What each removes, changes and trains, and whether that is kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch

from layercut.config import HealConfig
from layercut.data.blocks import fingerprint
from layercut.distributed import processes
from layercut.errors import ConfigError
from layercut.files.json_values import digest
from layercut.files.sizes import size
from layercut.healing import fold_, tune_
from layercut.healing.endpoint_tuning import TuneSettings, TuningFiles, frozen_states
from layercut.healing.offloaded import FrozenStates
from layercut.healing.stored_teacher import StoredTeacher, store_teacher, stored_bytes
from layercut.healing.tuning_state import StateFile, asked_to_stop, never_asked
from layercut.models import layer_reader_protocol, loading, memory
from layercut.models.objectives import Objective, objective_of
from layercut.models.runner import DecoderRunner
from layercut.offload import layer_reader, weight_sharing
from layercut.pipeline.run_context import RunContext
from layercut.progress import bar, say
from layercut.segments import Removal, Segment, kept_layers
from layercut.surgery import check_checkpoint_cut, cut_segment_

TUNING_STATE = "tuning-state.safetensors"
"""Where tuning stands, written every few minutes and when it is stopped; gone when the stage is done."""
TUNING_STATES = "tuning-states"
"""What the frozen layers make of the tuning tokens, where those are on disk; gone when the stage is done."""
FOLD_TOKENS = 65536
"""Tokens that the fold is solved on, at most. From 4,096 to 16,384 to 65,536 it closed more each time (docs/log.md)."""


def cut(work: RunContext, segments: Sequence[Segment]) -> dict[str, Any]:
    """Cut once to learn that it can be done and what it saves; later stages cut again, which costs nothing.

    segments: in the dense model's layers, all that is removed.
    """
    dense = work.dense.model
    student = weight_sharing.share(dense)
    if segments:
        cut_segment_(student, segments)
    if layer_reader_protocol.layers_on_disk(dense):  # what would come to light at the end of the run
        layers = loading.find_decoder(student)
        names = {f"{layers.path}.{name}": tensor for name, tensor in layers.layers.named_parameters()}
        check_checkpoint_cut(work.checkpoint.folder, segments, layer_reader.as_saved(student, names))
    return {
        "segments": [[s.start, s.stop] for s in segments],
        "original_layer_index": kept_layers(segments, work.layers),
        "parameters": {"before": loading.parameter_count(dense), "after": loading.parameter_count(student)},
        "bytes": {"before": loading.parameter_bytes(dense), "after": loading.parameter_bytes(student)},
    }


def fold(work: RunContext, removal: Removal) -> dict[str, Any]:
    """Least-squares compensation, kept where it brings the student nearer to the dense model on held-out tokens."""
    if not work.config.heal.fold:
        return {"fold": [], "changed": []}
    student, heldout = DecoderRunner(work.student(removal.cut)), work.blocks["heldout"]
    found = fold_(student, work.stack, fold_tokens(work), heldout=heldout, segments=removal.new)
    changed = work.save_changes(student.model, "folded") if found.kept else []
    told = {"kl_before": found.kl_before, "kl_after": found.kl_after, "kept": found.kept}
    files = [f"{work.name('folded')}.safetensors"] if found.kept else []
    return {"fold": [cut.to_dict() | told for cut in found.cuts], "changed": changed, "files": files}


def fold_tokens(work: RunContext) -> torch.Tensor:
    """Calibration tokens, and as many of those to tune on as make FOLD_TOKENS: more text, better least squares."""
    rows = [work.blocks["calibration"]]
    if "tuning" in work.blocks:
        rows.append(work.tuning[: max(0, FOLD_TOKENS - rows[0].numel()) // work.tuning.shape[1]])
    return torch.cat(rows)


def tune(work: RunContext, removal: Removal) -> dict[str, Any]:
    """Cutoff endpoint tuning, from the fold where that was kept."""
    fold, heal, text = work.read("fold"), work.config.heal, work.text
    if not heal.tune_tokens:
        return {"fold": fold["fold"], "tuning": None, "changed": fold["changed"]}
    student = DecoderRunner(work.student(removal.cut, "folded"))
    tokens, heldout = work.tuning, work.blocks["heldout"]
    teacher = stored_teacher(work, tokens, fingerprint(tokens)) if heal.teacher_topk else None
    states = stored_states(work, student, tokens) if student.on_disk else None
    state = StateFile(work.run / TUNING_STATE, key=work.run.inputs_of(work.name("heal")))
    stopping = asked_to_stop if work.own_process else never_asked
    files = TuningFiles(teacher=teacher, states=states, state=state, stopping=stopping)
    if work.own_process:
        memory.reuse_freed()
    report = tune_(student, work.stack, tokens, heldout=heldout, files=files, **vars(tune_settings(heal)))
    if states:
        states.close()
    for point in report.curve:
        work.run.event(work.name("heal"), int(point["step"]), "loss", point["loss"], "nats/token")
    changed = work.save_changes(student.model, "tuned")
    tuning = report.to_dict() | {"data": text["tuning"]}
    weights = [f"{work.name('tuned')}.safetensors"]
    return {"fold": fold["fold"], "tuning": tuning, "changed": changed, "files": weights}


def stored_teacher(work: RunContext, tokens: torch.Tensor, fingerprint: str) -> StoredTeacher:
    """The dense predictions on the tuning tokens, computed where they are not in the run folder yet."""
    heal = work.config.heal
    stored = size(stored_bytes(tokens.numel(), heal.teacher_topk))
    say("teacher", f"{heal.teacher_topk} likeliest tokens each: {stored} in {work.run / 'teacher'}")
    with bar("storing the dense predictions", tokens.numel()) as advance:
        return store_teacher(
            work.stack, tokens, heal.teacher_topk, work.run / "teacher",
            key=digest([work.source, fingerprint]), temperature=heal.temperature, advance=advance,
        )  # fmt: skip


def stored_states(work: RunContext, student: DecoderRunner, tokens: torch.Tensor) -> FrozenStates:
    """What the frozen layers, which are on disk, make of the tuning tokens; kept in the run folder."""
    key = digest([work.run.inputs_of(work.name("heal")), fingerprint(tokens)])
    settings, folder = tune_settings(work.config.heal), work.run / TUNING_STATES
    return frozen_states(student, work.stack, tokens, settings, folder, key=key)


def forget_tuning_(work: RunContext) -> None:
    """Remove what tuning keeps on disk while it is under way."""

    def remove() -> None:
        (work.run / TUNING_STATE).unlink(missing_ok=True)
        shutil.rmtree(work.run / TUNING_STATES, ignore_errors=True)

    processes.on_main(remove)


def tune_settings(heal: HealConfig) -> TuneSettings:
    """What tuning itself takes of the options."""
    return TuneSettings(
        objective=objective(heal), learning_rate=heal.learning_rate, batch_tokens=heal.batch_tokens,
        radius=heal.radius, epochs=heal.epochs, patience=heal.patience,
    )  # fmt: skip


def objective(heal: HealConfig) -> Objective:
    """What tuning minimises, with the options that were given.

    Raises:
        ConfigError: its package cannot be imported, or it takes no such option.
    """
    given = {"temperature": (heal.temperature, 1.0), "mix": (heal.mix, 0.0)}
    options = {name: value for name, (value, neutral) in given.items() if value != neutral}
    found = objective_of(heal.objective, **options)
    if heal.teacher_topk and not found.stored_topk:
        raise ConfigError(
            f"--objective {heal.objective} needs all of the dense model's logits, and --teacher-topk keeps some",
            "leave out --teacher-topk",
        )
    return found
