"""What the stages of a journey do, one method each; `pipeline/journey.py` says in which order and what each depends on.

A stage takes the tokens and the models it needs from here, calls into its room, and returns its artefact. The dense
model and the cut one (the *student*) share all weights but those that healing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layercut import evaluation, surgery
from layercut.config import CompressConfig, ShardMode
from layercut.data.blocks import Reader, stored_blocks
from layercut.data.sources import split_mix
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError
from layercut.files.sizes import size
from layercut.files.writing import write_atomically
from layercut.models import checkpoints, layer_reader_protocol, loading
from layercut.models.runner import DecoderRunner
from layercut.offload import placement
from layercut.pipeline.run_store import Run
from layercut.progress import bar, say
from layercut.quantization import quantized_weights
from layercut.segments import Removal, Segment


@dataclass
class RunContext:
    """What stages share: the dense model, loaded when first needed, the token blocks, and the run folder."""

    checkpoint: checkpoints.Checkpoint
    config: CompressConfig
    run: Run
    rounds: int = 1
    """Among which the tuning tokens are dealt out."""
    spread: bool = False
    """Whether the weights are spread over several processes."""
    own_process: bool = False
    """Whether signals may be caught and the allocator be set: in a command, not in a library call."""
    text: dict[str, Any] = field(default_factory=dict)
    """What the text stage has drawn, by use: source, tokens, window, documents, fingerprint."""

    @cached_property
    def source(self) -> dict[str, Any]:
        """What the dense model depends on; not on where its weights lie while it runs."""
        load = {name: value for name, value in asdict(self.config.load).items() if name != "shard"}
        return {"checkpoint": processes.on_main(self._fingerprint), "load": load}

    def _fingerprint(self) -> str:
        """Of the checkpoint's files, remembered in the run folder."""
        with bar("reading the checkpoint", sum(file.stat().st_size for file in self.checkpoint.files())) as advance:
            return self.checkpoint.fingerprint(self.run / ".digests.json", advance)

    @cached_property
    def architecture(self) -> Any:
        """The dense model's config, which needs no weights."""
        return loading.load_config(self.checkpoint, trust_remote_code=self.config.load.trust_remote_code)

    @cached_property
    def layers(self) -> int:
        """L, before anything is removed."""
        return loading.count_layers(self.architecture)

    @property
    def dense(self) -> loading.LanguageModel:
        """The model as it came. Where its weights are spread over the processes, one of them cannot run it: what the
        main process does by itself, it does on a model of its own."""
        return self._alone if self.spread and processes.world() == 1 else self._dense

    @cached_property
    def _dense(self) -> loading.LanguageModel:
        return self.load("on" if self.spread else "off")

    @cached_property
    def _alone(self) -> loading.LanguageModel:
        return self.load("off")

    def load(self, shard: ShardMode) -> loading.LanguageModel:
        """The model, spread over the processes or not, and a line about it."""
        how = asdict(self.config.load) | {"shard": shard}
        loaded = placement.load(self.checkpoint, **how, tokenizer=self.tokenizer)
        where = ", layers left on disk" if layer_reader_protocol.layers_on_disk(loaded.model) else ""
        if sharding.is_spread(loaded.model):
            held = size(sharding.bytes_held(loaded.model))
            where = f", spread over {processes.world()} processes, {held} in this one"
        stored = loading.stored_dtype(loaded.model)
        number = f"{loaded.dtype}" if stored == loaded.dtype else f"{stored}, computed in {loaded.dtype}"
        say("load", f"{self.checkpoint.name}: {number}, {loaded.device}{where}".replace("torch.", ""))
        return loaded

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, which text needs and the model's weights do not."""
        return loading.load_tokenizer(self.checkpoint, trust_remote_code=self.config.load.trust_remote_code)

    @cached_property
    def stack(self) -> DecoderRunner:
        """For stages that all processes do together."""
        return DecoderRunner(self._dense.model)

    @cached_property
    def blocks(self) -> dict[str, torch.Tensor]:
        """Token blocks [N, T] by use, of all that this run has drawn."""
        return {use: stored_blocks(self.run.folder, use) for use in self.text}

    def reader(self, *sources: str, seed: int | None = None) -> Reader:
        """Draws blocks of these sources for several uses; by the run's seed where no other is given."""
        text, own = self.config.text, [source for source in sources if "self" in split_mix(source)]
        model = self.dense.model if own else None
        if model is not None and layer_reader_protocol.layers_on_disk(model):
            raise ConfigError(
                f"{own[0]!r} has the model write text, for which layers on disk would be read for every token",
                "give another text, or --stream off",
            )
        seed = text.seed if seed is None else seed
        return Reader(self.tokenizer, seed=seed, model=model, chat_template=text.chat_template)

    @cached_property
    def reported_window(self) -> int:
        """Tokens in the windows that perplexity is reported on."""
        return self.config.evaluate.eval_window or loading.reported_window(self.architecture)

    # --- what a round of several has of its own: see `Round` ---

    @property
    def before(self) -> Any:
        """The model that is cut."""
        return self.dense.model

    @property
    def before_stack(self) -> DecoderRunner:
        return self.stack

    def name(self, part: str) -> str:
        """What an artefact, a file or a stage is called."""
        return part

    def read(self, stage: str) -> dict[str, Any]:
        """An artefact of this round."""
        return self.run.read(self.name(stage)) or {}

    def removed(self, search: dict[str, Any]) -> Removal:
        """What a search's artefact says is to go."""
        return Removal.first(Segment(*bounds) for bounds in search["segments"])

    def in_dense_layers(self, search: dict[str, Any]) -> dict[str, Any]:
        """A search's artefact whose `segments` are in the dense model's layers."""
        return search

    @property
    def healed(self) -> Any:
        """What is left once this is done: the dense model where nothing is."""
        return self.before

    @property
    def tuning(self) -> torch.Tensor:
        """Blocks to tune on [N, T]."""
        return self.blocks["tuning"]

    @cached_property
    def heldout_perplexity(self) -> float:
        """The dense model's, on the rows that judge healing."""
        return evaluation.perplexity(self.dense.model, self.blocks["heldout"])

    # --- the student and its changed weights ---

    def student(self, cut: Sequence[Segment], *weights: str) -> Any:
        """The model that is cut without some layers, over the same tensors, then with what healing changed."""
        student = surgery.cut(self.before, cut)
        kept = {"folded": ("fold", "changed"), "tuned": ("heal", "tuning")}
        for name in weights:
            if name == "quantized":
                self.put_quantized_(student)
                continue
            stage, key = kept[name]
            if self.read(stage).get(key):
                loading.replace_parameters_(student, load_file(self.run / f"{self.name(name)}.safetensors"))
        return student

    def put_quantized_(self, student: Any) -> None:
        """Put the rounded weights in, where the run quantizes."""
        artefact = self.run.read("quantize") or {}
        if artefact["bits"] < 16:
            packed = load_file(self.run / "quantized.safetensors")
            loading.replace_parameters_(student, quantized_weights(packed, artefact["quantization_config"]))

    def save_changes(self, student: Any, name: str) -> list[str]:
        """Write the parameters that are no longer those of the model that was cut; their names."""
        changed = self.changed(student)
        self.save(changed, self.name(name))
        return sorted(changed)

    def changed(self, student: Any) -> dict[str, torch.Tensor]:
        """The parameters that are no longer those of the model that was cut, by name."""
        shared = {id(p) for p in self.before.parameters()}
        own = {n: p for n, p in student.named_parameters() if id(sharding.origin(p)) not in shared}
        return {n: sharding.whole(p.detach()).cpu() for n, p in own.items()}

    def save(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        """Write tensors to NAME.safetensors in the run folder, whole or not at all; the main process does."""

        def write() -> None:
            with write_atomically(self.run / f"{name}.safetensors") as partial:
                save_file(tensors, partial)

        processes.on_main(write)
