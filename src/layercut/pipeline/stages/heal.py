"""Stages: cut, fold, tune. What each removes, changes and trains, and whether that is kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from layercut import surgery
from layercut.config import HealConfig
from layercut.data.blocks import fingerprint, in_rows
from layercut.distributed import processes
from layercut.files import digest, remove_written
from layercut.healing import fold_, lora, tune_
from layercut.healing.endpoint_tuning import TuningFiles, frozen_states
from layercut.healing.inputs import Rows
from layercut.healing.tuning_state import StateFile
from layercut.models import decoder_stack, layer_reader
from layercut.models.losses import KL
from layercut.models.runner import DecoderRunner
from layercut.pipeline.artefacts import BeforeAfter, CutArtefact, FoldArtefact, FoldRecord, HealArtefact
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages.text import taught, tuning_treatment
from layercut.progress import say
from layercut.registries import objectives
from layercut.report.stage_lines import describe_fold, describe_tuning
from layercut.segments import Segment, kept_layers

TUNING_STATE = "tuning-state.safetensors"
"""Where tuning stands, written every few minutes and when it is stopped; gone when the stage is done."""
TUNING_STATES = "tuning-states"
"""What the frozen layers make of the tuning tokens, where those are on disk; gone when the stage is done."""
DEFAULT_MIX = 0.3
"""Of the next-token loss: lower perplexity by 3 to 5 %, tasks and keys as without (research/healing.md)."""
FOLD_TOKENS = 65536
"""Tokens that the fold is solved on, at most. From 4,096 to 16,384 to 65,536 it closed more each time."""


def cut(work: RunContext, segments: Sequence[Segment]) -> CutArtefact:
    """Cut once to learn that it can be done and what it saves; later stages cut again, which costs nothing."""
    with work.run.stage(CutArtefact, "cut", [work.source, sorted(segments)], together=True) as stage:
        if stage.open:
            dense, student = work.dense.model, surgery.cut(work.dense.model, segments)
            if layer_reader.layers_on_disk(dense):  # what would otherwise fail at the end of the run
                layers = decoder_stack.find_decoder(student)
                names = {f"{layers.path}.{name}": tensor for name, tensor in layers.layers.named_parameters()}
                surgery.check_checkpoint_cut(work.checkpoint.folder, segments, layer_reader.as_saved(student, names))
            count, sizes = decoder_stack.parameter_count, decoder_stack.parameter_bytes
            stage.found = CutArtefact(
                segments=sorted(segments),
                original_layer_index=kept_layers(segments, work.layers),
                parameters=BeforeAfter(before=count(dense), after=count(student)),
                bytes=BeforeAfter(before=sizes(dense), after=sizes(student)),
            )
    parameters = stage.artefact.parameters
    say("cut", f"{parameters.before:,} -> {parameters.after:,} parameters")
    return stage.artefact


def fold(work: RunContext, segments: Sequence[Segment]) -> FoldArtefact:
    """Least-squares compensation, kept where it brings the student nearer to the dense model on held-out tokens."""
    is_asked, text = work.config.heal.fold and bool(segments), work.text
    inputs = [is_asked, text["calibration"], text.get("tuning"), text.get("heldout")]
    with work.run.stage(FoldArtefact, "fold", inputs, after=["cut"], together=True) as stage:
        if stage.open and not is_asked:
            stage.found = FoldArtefact(fold=[], changed=[])
        elif stage.open:
            student, heldout = DecoderRunner(work.student(segments)), work.blocks["heldout"]
            tuning = work.blocks.get("tuning")
            tokens = tokens_to_fold(work.blocks["calibration"], tuning)
            found = fold_(student, work.stack, tokens, heldout=heldout, segments=segments)
            stage.found = FoldArtefact(
                fold=[
                    FoldRecord(**vars(each), kl_before=found.kl_before, kl_after=found.kl_after, kept=found.kept)
                    for each in found.cuts
                ],
                changed=work.save_changes(student.model, "folded") if found.kept else [],
            )
            stage.files = ["folded.safetensors"] if found.kept else []
    for outcome in stage.artefact.fold:
        say("fold", describe_fold(asdict(outcome)))
    return stage.artefact


def tokens_to_fold(calibration: torch.Tensor, tuning: torch.Tensor | None) -> torch.Tensor:
    """Calibration tokens, and as many of those to tune on as make FOLD_TOKENS: more text, better least squares."""
    if tuning is None:
        return calibration
    window = calibration.shape[1]
    more = max(0, FOLD_TOKENS - calibration.numel()) // window
    return torch.cat([calibration, in_rows(tuning, window)[:more]])


def tune(work: RunContext, segments: Sequence[Segment]) -> HealArtefact:
    """Cutoff endpoint tuning, from the fold where that was kept."""
    config, text = work.config.heal, work.text
    fold = work.run.artefact(FoldArtefact, "fold")
    inputs: list[Any] = [keyed(config), text.get("tuning"), text.get("heldout"), *objectives.edition(config.objective)]
    inputs += [*taught(work), *(lora.RECIPE if config.train == "lora" else [])]
    with work.run.stage(HealArtefact, "heal", inputs, after=["fold"], together=True) as stage:
        if stage.open and not (segments and config.tokens):
            stage.found = HealArtefact(fold=fold.fold, tuning=None, changed=fold.changed)
        elif stage.open:
            student, settings = DecoderRunner(work.student(segments, "folded")), tune_settings(config)
            tokens, treated, key = work.blocks["tuning"], vars(tuning_treatment(work)), work.run.hashes["heal"]
            states = None
            if student.on_disk:
                rows, of_states = Rows(tokens=tokens, **treated), digest([key, fingerprint(tokens)])
                folder = work.run / TUNING_STATES
                states = frozen_states(student, work.stack, rows, settings, folder, key=of_states)
            files = TuningFiles(
                states=states, state=StateFile(work.run / TUNING_STATE, key=key), stopping=work.stopping
            )
            heldout = work.blocks["heldout"]
            report = tune_(student, work.stack, tokens, heldout=heldout, settings=settings, files=files, **treated)
            if states:
                states.close()
            stage.found = HealArtefact(
                fold=fold.fold, tuning=work.trained("heal", report), changed=work.save_changes(student.model, "tuned")
            )
            stage.files = ["tuned.safetensors"]
    if tuning := stage.artefact.tuning:
        say("tune", describe_tuning(asdict(tuning)))
    return stage.artefact


def forget_tuning_(work: RunContext) -> None:
    """Remove what tuning keeps on disk while it is under way."""

    def remove() -> None:
        remove_written(work.run / TUNING_STATE)
        shutil.rmtree(work.run / TUNING_STATES, ignore_errors=True)

    processes.on_main(remove)


def tune_settings(heal: HealConfig) -> HealConfig:
    """How layers beside a cut are trained: towards KL with a share of next-token loss."""
    mixed: Any = KL(mix=DEFAULT_MIX)
    return replace(heal, objective=mixed) if heal.objective == "kl" else heal


def keyed(heal: HealConfig) -> HealConfig:
    """The options by which a stage that heals is known again: however they were given, and wherever the text lies."""
    # the text's name has its share of chats
    return replace(heal, tune_data=None, chat_share=0.0, tune_quantized="auto", tune_tokens=heal.tokens, time=None)
