"""What the stages of a run share: the models and the token blocks, made when first needed, and the run folder.

Between the journey, which makes it, and the stages (`stages/`). The dense model and the cut one (the *student*) share
all weights but those that healing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from layercut import evaluation, surgery
from layercut.config.commands import CompressConfig
from layercut.data.blocks import TextFacts, by_origin
from layercut.data.probe_families import CAPABILITIES, capability_names
from layercut.data.probes import probe_rows
from layercut.data.self_sampled import writes_chats
from layercut.data.sources import SHARED
from layercut.distributed import processes, sharding
from layercut.export.gguf_check import weights_in
from layercut.files import size, write_atomically
from layercut.healing import TuningResult
from layercut.healing.tuning_state import Stop, asked_to_stop, never_asked
from layercut.models import checkpoints, decoder_stack, layer_reader, loading, placement
from layercut.models.gguf_header import read_header
from layercut.models.runner import DecoderRunner
from layercut.pipeline.artefacts import FoldArtefact, HealArtefact, QuantizeArtefact, TuningRecord
from layercut.pipeline.run_folder import Run
from layercut.progress import bar, say
from layercut.quantization import quantized_weights
from layercut.segments import Segment

Weights = Literal["folded", "tuned", "quantized"]  # what stages change in the cut model, in this order
QUANTIZED_GGUF = "quantized.gguf"  # the healed model in a run that writes a GGUF file
FIRST_PROBES = 4  # rows of probes that show whether any fits the run's rows


@dataclass
class RunContext:
    """What stages share: the dense model, loaded when first needed, the token blocks, and the run folder."""

    checkpoint: checkpoints.Checkpoint
    config: CompressConfig
    run: Run
    spread: bool = False  # whether the weights are sharded over several processes
    own_process: bool = False
    """Whether signals may be caught and the allocator be set: in a command, not in a library call."""
    shortlist: bool = False
    """Whether candidates are healed before one is chosen, by the options: what the search is filed under."""
    shortlist_now: bool = False  # the same where the search is made now
    text: dict[str, TextFacts] = field(default_factory=dict)  # where what the text stage has drawn comes from, by use
    blocks: dict[str, torch.Tensor] = field(default_factory=dict)  # its token ids [N, T], by use

    @property
    def stopping(self) -> Callable[[], AbstractContextManager[Stop]]:
        """What tells a training to keep its state and stop: signals, where these may be caught."""
        return asked_to_stop if self.own_process else never_asked

    def trained(self, stage: str, report: TuningResult) -> TuningRecord:
        """What an artefact has of a training, its losses put among the run's events."""
        for point in report.curve:
            self.run.event(stage, int(point["step"]), "loss", point["loss"], "nats/token")
        return TuningRecord(**vars(report), data=self.text["tuning"])

    @cached_property
    def source(self) -> dict[str, Any]:
        """What the dense model depends on; not on where it runs and its weights lie."""
        load = asdict(self.config.load)
        for where in ("device", "place", "max_memory"):
            del load[where]
        finer = read_header(self.checkpoint.file).finer_twin if self.checkpoint.gguf else None
        twins = {"embeddings": finer} if finer else {}  # another model than an earlier version loaded
        return {"checkpoint": processes.on_main(self._fingerprint), "load": load} | twins

    def _fingerprint(self) -> str:
        """Of the checkpoint's files, remembered in the run folder."""
        with bar("reading the checkpoint", sum(file.stat().st_size for file in self.checkpoint.files())) as advance:
            return self.checkpoint.fingerprint(self.run / checkpoints.DIGESTS, advance)

    @cached_property
    def architecture(self) -> Any:
        """The dense model's config, which needs no weights."""
        return loading.load_config(self.checkpoint, trust_remote_code=self.config.load.trust_remote_code)

    @cached_property
    def layers(self) -> int:
        """L, before anything is removed."""
        return decoder_stack.count_layers(self.architecture)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, which text needs and the model's weights do not."""
        return loading.load_tokenizer(self.checkpoint, trust_remote_code=self.config.load.trust_remote_code)

    # --- the dense model ---

    @property
    def dense(self) -> loading.LanguageModel:
        """The model before any cut.

        Where its weights are sharded over the processes, one of them cannot run it: what the main process does by
        itself, it does on a model of its own.
        """
        return self._alone if self.spread and processes.world() == 1 else self._together

    @cached_property
    def _together(self) -> loading.LanguageModel:
        return self.load(sharded=self.spread)

    @cached_property
    def _alone(self) -> loading.LanguageModel:
        return self.load(sharded=False)

    @cached_property
    def stack(self) -> DecoderRunner:
        """For stages that all processes do together."""
        return DecoderRunner(self._together.model)

    def load(self, *, sharded: bool) -> loading.LanguageModel:
        """The model, sharded over the processes or of this one alone, and a line about it."""
        how = asdict(self.config.load) | ({"place": "processes"} if sharded else {"alone": True})
        loaded = placement.load(self.checkpoint, **how, tokenizer=self.tokenizer)
        where = ", layers left on disk" if layer_reader.layers_on_disk(loaded.model) else ""
        if sharding.is_spread(loaded.model):
            held = size(sharding.bytes_held(loaded.model))
            where = f", sharded over {processes.world()} processes, {held} in this one"
        if len(devices := placement.placed_over(loaded.model)) > 1:
            where = f" to {devices[-1]}, layers placed over {len(devices)} devices"
        stored = decoder_stack.stored_dtype(loaded.model)
        number = f"{loaded.dtype}" if stored == loaded.dtype else f"{stored}, computed in {loaded.dtype}"
        say("load", f"{self.checkpoint.name}: {number}, {loaded.device}{where}".replace("torch.", ""))
        return loaded

    # --- its text ---

    @cached_property
    def preserved(self) -> tuple[str, ...]:
        """The capabilities of --preserve; of none all, for what is asked for by another flag."""
        return capability_names(self.config.search.preserve) or tuple(CAPABILITIES)

    @cached_property
    def probes_fit(self) -> bool:
        """Whether rows of the run's window hold probes to tune on."""
        text = self.config.text
        how: dict[str, Any] = {"family": "tuning", "seed": text.seed, "capabilities": self.preserved}
        return bool(probe_rows(self.tokenizer, rows=FIRST_PROBES, window=text.window, **how).names)

    @cached_property
    def chats_fit(self) -> bool:
        """Whether the model has a template by which it can write chats in the run's rows."""
        text, heal = self.config.text, self.config.heal
        return writes_chats(self.tokenizer, min(text.window, heal.tune_window or text.window))

    @property
    def writes(self) -> bool:
        """Whether the dense model can write text where it is: in memory, and whole in a process."""
        return not self.spread and not layer_reader.layers_on_disk(self.dense.model)

    @property
    def verified_on(self) -> str:
        """The use whose tokens measure what was saved: the evaluation's, or held-out where none is evaluated."""
        return next(use for use in ("evaluation", "heldout", "calibration") if use in self.text)

    @property
    def held_out_text(self) -> torch.Tensor:
        """What judges cuts as text, token ids [N, T]: held-out rows, without the probes and chats tuned on too.

        All of them where nothing else is tuned on.
        """
        rows = self.blocks["heldout"]
        parts = by_origin(torch.arange(len(rows)), self.text["heldout"].origins)
        of_text = [part for name, part in parts.items() if name not in SHARED]
        return rows[torch.cat(of_text).sort().values] if of_text else rows

    @cached_property
    def heldout_perplexity(self) -> float:
        """The dense model's, on held-out text."""
        return evaluation.perplexity(self.dense.model, self.held_out_text)

    # --- the student and its changed weights ---

    def student(self, cut: Sequence[Segment], *weights: Weights) -> Any:
        """The dense model without some layers, over the same tensors, then with weights of earlier stages in it."""
        run, student = self.run, surgery.cut(self.dense.model, cut)
        changed = {
            "folded": lambda: run.artefact(FoldArtefact, "fold").changed,
            "tuned": lambda: run.artefact(HealArtefact, "heal").tuning,
        }
        for each in weights:
            if each != "quantized":
                if changed[each]():
                    decoder_stack.replace_parameters_(student, load_file(run / f"{each}.safetensors"))
                continue
            quantized = run.artefact(QuantizeArtefact, "quantize")
            if quantized.gguf:
                rounded = weights_in(run / QUANTIZED_GGUF, student, quantized.gguf["rounded"])
                decoder_stack.replace_parameters_(student, rounded)
            if quantized.quantization_config:
                packed = load_file(run / "quantized.safetensors")
                decoder_stack.replace_parameters_(student, quantized_weights(packed, quantized.quantization_config))
        return student

    def compressed(self, cut: Sequence[Segment]) -> Any:
        """The student with whatever all stages so far have changed."""
        return self.student(cut, "folded", "tuned", "quantized")

    def changed(self, student: Any) -> dict[str, torch.Tensor]:
        """The parameters that are no longer those of the dense model."""
        shared = {id(p) for p in self.dense.model.parameters()}
        own = {n: p for n, p in student.named_parameters() if id(sharding.origin(p)) not in shared}
        return {n: sharding.whole(p.detach()).cpu() for n, p in own.items()}

    def save(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        """Write tensors to NAME.safetensors in the run folder, whole or not at all; the main process does."""

        def write() -> None:
            with write_atomically(self.run / f"{name}.safetensors") as partial:
                save_file(tensors, partial)

        processes.on_main(write)

    def save_changes(self, student: Any, weights: Weights) -> list[str]:
        """Write the parameters that are no longer those of the dense model; their names."""
        changed = self.changed(student)
        self.save(changed, weights)
        return sorted(changed)
