"""What the stages of a journey do, one method each; `pipeline.py` says in which order and what each depends on.

A stage takes the tokens and the models it needs from here, calls into its room, and returns its artefact. The dense
model and the cut one (the *student*) share all weights but those that healing changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layercut import evaluate, lending, measure, models, processes, sharding, stream
from layercut.config import CompressConfig, HealConfig, QuantizeConfig, ShardMode, parse_bytes
from layercut.cut import check_checkpoint_cut, cut_checkpoint, cut_segment_
from layercut.data import Blocks, fingerprint, load_blocks, split_mix
from layercut.errors import ConfigError
from layercut.export import export_checkpoint, publish_streamed, text_to_check
from layercut.heal.endpoints import TuneSettings, frozen_states, tune_
from layercut.heal.fold import fold_
from layercut.heal.from_disk import FrozenStates
from layercut.heal.state import StateFile
from layercut.heal.stored import StoredTeacher, store_teacher, stored_bytes
from layercut.progress import bar, say
from layercut.quantize import Quantization, endpoints_of, quantize_, quantized_weights
from layercut.runs import Run, digest
from layercut.search import (
    SearchResult,
    add_triangle_,
    find_segments,
    length_for_size,
    longest_within,
    perplexity_rise,
    price_segments,
    rescored,
    split_rows,
    stability,
)
from layercut.segments import Removal, Segment, kept_layers
from layercut.sweep import Stack, mean_kl, shared_layers

FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""
TUNING_STATE = "tuning-state.safetensors"
"""Where tuning stands, written every few minutes and when it is stopped; gone when the stage is done."""
TUNING_STATES = "tuning-states"
"""What the frozen layers make of the tuning tokens, where those are on disk; gone when the stage is done."""
FOLD_TOKENS = 65536
"""Tokens that the fold is solved on, at most. From 4,096 to 16,384 to 65,536 it closed more each time (docs/log.md)."""


@dataclass
class Workbench:
    """What stages share: the dense model, loaded when first needed, the token blocks, and the run folder."""

    checkpoint: models.Checkpoint
    config: CompressConfig
    run: Run
    rounds: int = 1
    """Among which the tuning tokens are dealt out."""
    spread: bool = False
    """Whether the weights are spread over several processes."""

    @property
    def source(self) -> dict[str, Any]:
        """What the dense model depends on; not on where its weights lie while it runs."""
        load = {name: value for name, value in asdict(self.config.load).items() if name != "shard"}
        return {"checkpoint": self.checkpoint.fingerprint(), "load": load}

    @cached_property
    def layers(self) -> int:
        """L, before anything is removed."""
        trust = self.config.load.trust_remote_code
        return models.count_layers(models.load_config(self.checkpoint, trust_remote_code=trust))

    @property
    def dense(self) -> models.LanguageModel:
        """The model as it came. Where its weights are spread over the processes, one of them cannot run it: what the
        main process does by itself, it does on a model of its own."""
        return self._alone if self.spread and processes.world() == 1 else self._dense

    @cached_property
    def _dense(self) -> models.LanguageModel:
        return self.load("on" if self.spread else "off")

    @cached_property
    def _alone(self) -> models.LanguageModel:
        return self.load("off")

    def load(self, shard: ShardMode) -> models.LanguageModel:
        """The model, spread over the processes or not, and a line about it."""
        how = asdict(self.config.load) | {"shard": shard}
        loaded = stream.load(self.checkpoint, **how, tokenizer=self.tokenizer)
        where = ", layers left on disk" if stream.layers_on_disk(loaded.model) else ""
        if sharding.is_spread(loaded.model):
            held = sharding.bytes_held(loaded.model) / 1e6
            where = f", spread over {processes.world()} processes, {held:,.1f} MB in this one"
        stored = models.stored_dtype(loaded.model)
        number = f"{loaded.dtype}" if stored == loaded.dtype else f"{stored}, computed in {loaded.dtype}"
        say("load", f"{self.checkpoint.name}: {number}, {loaded.device}{where}".replace("torch.", ""))
        return loaded

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, which text needs and the model's weights do not."""
        return models.load_tokenizer(self.checkpoint, trust_remote_code=self.config.load.trust_remote_code)

    @cached_property
    def stack(self) -> Stack:
        """For stages that all processes do together."""
        return Stack(self._dense.model)

    @cached_property
    def blocks(self) -> dict[str, torch.Tensor]:
        """Token blocks [N, T] by use, as the text stage left them."""
        return load_file(self.run / "tokens.safetensors")

    # --- text ---

    def read_text(self) -> dict[str, Any]:
        """Draw calibration, tuning and evaluation blocks. Of one source, tuning takes what calibration left."""
        text, heal, draw = self.config.text, self.config.heal, self.draw
        drawn = {"calibration": draw(text.data, text.tokens)}
        tune_data = heal.tune_data or text.data
        # blocks of one source never overlap: calibration, then held-out, then tuning
        skip = len(drawn["calibration"].tokens) if set(split_mix(tune_data)) & set(split_mix(text.data)) else 0
        drawn["heldout"] = draw(tune_data, max(FEWEST_HELD_OUT, heal.tune_tokens // HELD_OUT_SHARE), skip=skip)
        if heal.tune_tokens:
            drawn["tuning"] = draw(tune_data, heal.tune_tokens, skip=skip + len(drawn["heldout"].tokens))
        drawn["evaluation"] = draw(
            self.config.evaluate.eval_data,
            self.config.evaluate.eval_tokens,
            order="as written",
            chat_template=False,
        )
        self.save({use: blocks.tokens for use, blocks in drawn.items()}, "tokens")
        self.__dict__.pop("blocks", None)
        facts = {use: blocks.facts() for use, blocks in drawn.items()}
        return {"tuning": None, **facts, "files": ["tokens.safetensors"]}

    def draw(self, source: str, tokens: int, **more: Any) -> Blocks:
        """Blocks of a source, with the run's window and seed unless `more` says otherwise."""
        text = self.config.text
        shared = {"window": text.window, "seed": text.seed, "chat_template": text.chat_template}
        model = self.dense.model if "self" in split_mix(source) else None
        if model is not None and stream.layers_on_disk(model):
            raise ConfigError(
                f"{source!r} has the model write text, for which layers on disk would be read for every token",
                "give another text, or --stream off",
            )
        return load_blocks(source, self.tokenizer, tokens=tokens, model=model, **{**shared, **more})

    # --- what a round of several has of its own: see `Round` ---

    @property
    def before(self) -> Any:
        """The model that is cut."""
        return self.dense.model

    @property
    def before_stack(self) -> Stack:
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

    @property
    def healed(self) -> Any:
        """What is left once this is done: the dense model where nothing is."""
        return self.before

    @property
    def tuning(self) -> torch.Tensor:
        """Blocks to tune on [N, T]."""
        return self.blocks["tuning"]

    # --- stages: each returns its artefact ---

    def search(self, wanted: Sequence[Segment], length: int | None) -> dict[str, Any]:
        """The segments to remove: those given, or the search's answer."""
        config, tokens = self.config.search, self.blocks["calibration"]
        if wanted:
            result = price_segments(self.before_stack, tokens, list(wanted))
        elif length is None and config.max_loss is not None:
            result = self.search_within(config.max_loss)
        else:
            length = self.length_for_target() if length is None else length
            result = self.find(tokens, length, self.config.text.seed, oracle=config.oracle)
        if config.score == "folded":
            result = rescored(result, self.folded_kl)
        if config.all_lengths:
            add_triangle_(result, self.before_stack, tokens, sum(map(len, result.segments)))
        text = self.run.read("text") or {}
        return result.to_json() | {"seed": self.config.text.seed, "calibration": text["calibration"]}

    def find(self, tokens: torch.Tensor, length: int, seed: int, *, oracle: bool = False) -> SearchResult:
        """The search itself, for one length, on any tokens."""
        config = self.config.search
        return find_segments(
            self.before_stack, tokens, length, config.method, seed=seed, oracle=oracle,
            count=min(config.num_segments, length), objective=config.search_objective,
        )  # fmt: skip

    def search_again(self, seed: int, length: int) -> dict[str, Any]:
        """What the search chooses on the calibration text of another seed."""
        text = self.config.text
        drawn = processes.on_main(lambda: self.draw(text.data, text.tokens, seed=seed))
        self.save({"calibration": drawn.tokens}, f"stability-{seed}")
        found = self.find(drawn.tokens, length, seed).to_json()
        kept = ("segments", "dense_tokens", "layer_forwards", "layer_backwards")
        facts = {"seed": seed, "kl": found["candidates"][0]["kl"], "calibration": drawn.facts()}
        return facts | {key: found[key] for key in kept} | {"files": [f"stability-{seed}.safetensors"]}

    def stability(self, search: dict[str, Any], again: list[dict[str, Any]], length: int) -> dict[str, Any]:
        """The choices of all seeds, priced on rows that all their texts gave to."""
        texts = [self.blocks["calibration"]]
        texts += [load_file(self.run / file)["calibration"] for found in again for file in found["files"]]
        sources = split_mix(self.config.text.data)
        blocks = {
            source: rows
            for source, rows in zip(sources, stability.common_rows(texts, len(sources)), strict=True)
            if len(rows)
        }
        searches = [search | {"kl": search["candidates"][0]["kl"]}, *again]
        choices = [tuple(Segment(*bounds) for bounds in found["segments"]) for found in searches]
        rows = sum(map(len, blocks.values()))
        work = stability.stability_work(choices, length, len(self.stack), rows)
        with bar("pricing every seed's choice", work) as advance:
            found = stability.judge(self.stack, blocks, choices, length, advance=advance)
        told = ("seed", "segments", "kl", "calibration")
        return {
            "method": search["method"],
            "search": search["config_hash"],
            "seeds": [{key: one[key] for key in told} for one in searches],
            **found,
        }

    def search_within(self, max_loss: float) -> SearchResult:
        """The longest cut whose rise of perplexity stays within a budget, on rows that were not searched on."""
        rows, unseen = split_rows(self.blocks["calibration"])
        within = longest_within(
            max_loss,
            len(self.before_stack) - 1,
            lambda length: self.find(rows, length, self.config.text.seed),
            lambda cuts: perplexity_rise(self.before_stack, unseen, cuts),
        )
        within.result.budget = {"max_loss": max_loss, "rise": within.rise, "tried": within.tried}
        return within.result

    def length_for_target(self) -> int:
        """Layers to remove for --target-size: counted in the number format that is computed and saved in."""
        model = self.dense.model
        target = parse_bytes("--target-size", self.config.search.target_size or "")
        weights = [models.parameter_bytes(layer, self.stack.stored_dtype) for layer in self.stack.layers]
        return length_for_size(weights, models.parameter_bytes(model), target)

    def folded_kl(self, segments: Sequence[Segment]) -> float:
        """KL(p || q) on held-out tokens of the student without the segments, after its fold."""
        student = Stack(self.student(segments))
        fold_(self.stack, student, segments, self.blocks["calibration"])
        return mean_kl(self.stack, student, self.blocks["heldout"])

    def cut(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Cut once to learn that it can be done and what it saves; later stages cut again, which costs nothing.

        segments: in the dense model's layers, all that is removed.
        """
        dense = self.dense.model
        student = lending.share(dense)
        if segments:
            cut_segment_(student, segments)
        if stream.layers_on_disk(dense):  # what would come to light at the end of the run
            layers = models.find_decoder(student)
            names = {f"{layers.path}.{name}": tensor for name, tensor in layers.layers.named_parameters()}
            check_checkpoint_cut(self.checkpoint.folder, segments, stream.as_saved(student, names))
        return {
            "segments": [[s.start, s.stop] for s in segments],
            "original_layer_index": kept_layers(segments, self.layers),
            "parameters": {"before": models.parameter_count(dense), "after": models.parameter_count(student)},
            "bytes": {"before": models.parameter_bytes(dense), "after": models.parameter_bytes(student)},
        }

    def fold(self, removal: Removal) -> dict[str, Any]:
        """The closed-form fold, kept where it brings the student nearer to the dense model on held-out tokens."""
        if not self.config.heal.fold:
            return {"fold": [], "changed": []}
        student, heldout = Stack(self.student(removal.cut)), self.blocks["heldout"]
        before = mean_kl(self.stack, student, heldout, shared_layers(self.stack, student))
        tokens = self.fold_tokens()
        with bar("folding", len(removal.new) * len(tokens)) as advance:
            folds = fold_(self.stack, student, removal.all, tokens, only=removal.new, advance=advance)
        after = mean_kl(self.stack, student, heldout, shared_layers(self.stack, student))
        kept = after < before
        changed = self.save_changes(student.model, "folded") if kept else []
        outcome = [f.to_json() | {"kl_before": before, "kl_after": after, "kept": kept} for f in folds]
        return {"fold": outcome, "changed": changed, "files": [f"{self.name('folded')}.safetensors"] if kept else []}

    def fold_tokens(self) -> torch.Tensor:
        """Calibration tokens, and as many of those to tune on as make FOLD_TOKENS: more text, better least squares."""
        rows = [self.blocks["calibration"]]
        if "tuning" in self.blocks:
            rows.append(self.tuning[: max(0, FOLD_TOKENS - rows[0].numel()) // self.tuning.shape[1]])
        return torch.cat(rows)

    def tune(self, removal: Removal) -> dict[str, Any]:
        """Cutoff endpoint tuning, from the fold where that was kept."""
        fold, heal, text = self.read("fold"), self.config.heal, self.run.read("text") or {}
        if not heal.tune_tokens:
            return {"fold": fold["fold"], "tuning": None, "changed": fold["changed"]}
        student = Stack(self.student(removal.cut, "folded"))
        tokens, heldout = self.tuning, self.blocks["heldout"]
        teacher = self.stored_teacher(tokens, fingerprint(tokens)) if heal.teacher_topk else None
        states = self.frozen_states(student, removal, tokens) if student.on_disk else None
        with bar("tuning the endpoints", heal.epochs * tokens.numel()) as advance:
            report = tune_(
                self.stack, student, removal.all, tokens, heldout, tune_settings(heal),
                advance=lambda seen, loss: advance(seen, f"loss {loss:.4f}"),
                teacher=teacher,
                states=states,
                state=StateFile(self.run / TUNING_STATE, key=self.run.inputs_of(self.name("heal"))),
            )  # fmt: skip
        if states:
            states.close()
        for point in report.curve:
            self.run.event(self.name("heal"), int(point["step"]), "loss", point["loss"], "nats/token")
        changed = self.save_changes(student.model, "tuned")
        tuning = report.to_json() | {"data": text["tuning"]}
        files = [f"{self.name('tuned')}.safetensors"]
        return {"fold": fold["fold"], "tuning": tuning, "changed": changed, "files": files}

    def stored_teacher(self, tokens: torch.Tensor, fingerprint: str) -> StoredTeacher:
        """The dense predictions on the tuning tokens, computed where they are not in the run folder yet."""
        heal = self.config.heal
        size = stored_bytes(tokens.numel(), heal.teacher_topk)
        say("teacher", f"{heal.teacher_topk} likeliest tokens each: {size / 1e6:,.1f} MB in {self.run / 'teacher'}")
        with bar("storing the dense predictions", tokens.numel()) as advance:
            return store_teacher(
                self.stack, tokens, heal.teacher_topk, self.run / "teacher",
                key=digest([self.source, fingerprint]), temperature=heal.temperature, advance=advance,
            )  # fmt: skip

    def frozen_states(self, student: Stack, removal: Removal, tokens: torch.Tensor) -> FrozenStates:
        """What the frozen layers, which are on disk, make of the tuning tokens; kept in the run folder."""
        key = digest([self.run.inputs_of(self.name("heal")), fingerprint(tokens)])
        with bar("running the frozen layers once", len(tokens)) as advance:
            return frozen_states(
                self.stack, student, removal.all, tokens, tune_settings(self.config.heal), self.run / TUNING_STATES,
                key=key, advance=advance,
            )  # fmt: skip

    def forget_tuning_(self) -> None:
        """Remove what tuning keeps on disk while it is under way."""

        def remove() -> None:
            (self.run / TUNING_STATE).unlink(missing_ok=True)
            shutil.rmtree(self.run / TUNING_STATES, ignore_errors=True)

        processes.on_main(remove)

    def quantize(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """The healed student's weights in fewer bits, where that is asked."""
        config = self.config.quantize
        if config.bits == 16:
            return {"bits": 16, "layers": []}
        student = self.student(segments, "folded", "tuned")
        found = quantize_with_bar_(student, self.blocks["calibration"], config)
        self.save(found.packed, "quantized")
        return quantization_facts(found, student, config) | {"files": ["quantized.safetensors"]}

    def frontier(self, bits: Sequence[int]) -> dict[str, Any]:
        """Size and loss of what is left, at several numbers of bits."""
        return {"points": [self.point(self.healed, width) for width in bits]}

    def point(self, model: Any, bits: int) -> dict[str, Any]:
        """A point of the frontier: bytes, and by how much perplexity rises over the dense model's on held-out rows."""
        quantize = replace(self.config.quantize, bits=bits)  # type: ignore[arg-type]
        size, layers = models.parameter_bytes(model), len(models.find_decoder(model))
        if bits < 16:
            model = models.share(model)
            found = quantize_with_bar_(model, self.blocks["calibration"], quantize)
            size = quantization_facts(found, model, quantize)["bytes"]["after"]
        perplexity = evaluate.perplexity(model, self.blocks["heldout"])
        return {"layers": layers, "bits": bits, "bytes": size, "rise": perplexity / self.heldout_perplexity - 1}

    @cached_property
    def heldout_perplexity(self) -> float:
        """The dense model's, on the rows that judge healing."""
        return evaluate.perplexity(self.dense.model, self.blocks["heldout"])

    def evaluate(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Perplexity of every state on the same held-out tokens; generations and speed of the first and the last."""
        config, tokens, text = self.config.evaluate, self.blocks["evaluation"], self.run.read("text") or {}
        fold, heal = self.run.read("fold") or {}, self.run.read("heal") or {}
        states: dict[str, list[str] | None] = {"dense": None, "cut": []}
        if fold["changed"]:
            states["folded"] = ["folded"]
        if heal["tuning"]:
            states["tuned"] = ["folded", "tuned"]
        if (self.run.read("quantize") or {})["bits"] < 16:
            states["quantized"] = ["folded", "tuned", "quantized"]
        figures: dict[str, Any] = dict.fromkeys(("dense", "cut", "folded", "tuned", "quantized"))

        def model(state: str) -> Any:
            weights = states[state]
            return self.dense.model if weights is None else self.student(segments, *weights)

        with bar("perplexity", len(states) * len(tokens)) as advance:
            for state in states:
                figures[state] = evaluate.perplexity(model(state), tokens, advance=advance)
        beside = processes.on_main(lambda: self.look_closer(model([*states][-1]), tokens))
        return {
            "perplexity": {
                "dataset": config.eval_data, "window": tokens.shape[1], "tokens": tokens.numel(), **figures,
                "fingerprint": text["evaluation"]["fingerprint"],
            },
            **beside,
        }  # fmt: skip

    def look_closer(self, last: Any, tokens: torch.Tensor) -> dict[str, Any]:
        """What the dense and the last model write, and how fast; not measured where layers are on disk, which would be
        read again for every token written."""
        if stream.layers_on_disk(last):
            say("evaluate", "layers are left on disk: generations, their health and speed are not measured")
            return {"generations": None, "health": None, "speed": None, "peak_rss_bytes": measure.peak_rss_bytes()}
        samples = [evaluate.generations(m, self.tokenizer) for m in (self.dense.model, last)]
        return {
            "generations": [
                {"prompt": prompt, "dense": dense, "compressed": compressed}
                for prompt, dense, compressed in zip(evaluate.PROMPTS, *samples, strict=True)
            ],
            "health": evaluate.generation_health(self.dense.model, last, tokens),
            "speed": measure.speed(self.dense.model, last) if self.config.evaluate.speed else None,
            "peak_rss_bytes": measure.peak_rss_bytes(),
        }

    def score(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Tasks of lm-eval, dense and compressed, on the same items; each task is kept as soon as it is scored."""
        asked, tokenizer = self.config.tasks, self.tokenizer
        tasks = evaluate.load_tasks(asked.names, asked.include_path)
        both = {"dense": self.dense.model, "compressed": self.student(segments, "folded", "tuned", "quantized")}
        records = {
            name: evaluate.score_tasks(m, tokenizer, tasks, limit=asked.limit, name=name, cache=self.run / "tasks")
            for name, m in both.items()
        }
        return evaluate.compare_tasks(records["dense"], records["compressed"]) | {"limit": asked.limit}

    def long(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Perplexity by position on long windows of the evaluation text, hidden keys, and what such a length costs."""
        both = {"dense": self.dense.model, "compressed": self.student(segments, "folded", "tuned", "quantized")}
        windows = evaluate.long_windows(self.blocks["evaluation"], self.config.long.long_context, self.dense.model)
        longest, tokenizer = windows.shape[1], self.tokenizer
        trials = evaluate.passkey_cases(tokenizer, longest, self.config.text.seed)
        work = 2 * (windows.numel() + sum(len(ids) for _, _, ids, _ in trials))
        with bar("long context", work) as advance:
            positions = {n: evaluate.perplexity_by_position(m, windows, advance=advance) for n, m in both.items()}
            grids = {n: evaluate.passkey_grid(m, tokenizer, trials, advance=advance) for n, m in both.items()}
        return {
            "window": longest,
            "windows": len(windows),
            "perplexity": positions,
            "passkey": grids | {"seed": self.config.text.seed} if trials else None,
            "cost": measure.long_prompt(*both.values(), tokens=longest),
        }

    def export(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """The healed and, where asked, quantized student as a stock checkpoint."""
        quantized = self.run.read("quantize") or {}
        text = text_to_check(self.blocks["evaluation"])
        packing: dict[str, Any] = {}
        if quantized["bits"] < 16:
            packing["packed"] = load_file(self.run / "quantized.safetensors")
            packing["quantization_config"] = quantized["quantization_config"]
        with bar("saving and verifying", None):
            model = self.student(segments, "folded", "tuned", "quantized")
            if stream.layers_on_disk(model):
                return self.export_files(model, segments) | {"files": ["model"]}
            exported = export_checkpoint(model, self.tokenizer, self.run / "model", text=text, **packing)
            # what the fresh process should have found
            exported["perplexity"] = {"tokens": text.numel(), "value": evaluate.perplexity(model, text)}
        return exported | {"files": ["model"]}

    def export_files(self, student: Any, segments: Sequence[Segment]) -> dict[str, Any]:
        """The same from the files of a model whose layers are on disk: byte ranges, and what healing changed."""
        healed, partial = stream.as_saved(student, self.changed(student)), self.run / ".model.partial"
        dtype = self.stack.stored_dtype
        cut_checkpoint(self.checkpoint.folder, segments, partial, force=True, healed=healed, dtype=dtype)
        return publish_streamed(student, partial, self.run / "model")

    # --- the student and its changed weights ---

    def student(self, cut: Sequence[Segment], *weights: str) -> Any:
        """The model that is cut without some layers, over the same tensors, then with what healing changed."""
        student = lending.share(self.before)
        if cut:
            cut_segment_(student, cut)
        kept = {"folded": ("fold", "changed"), "tuned": ("heal", "tuning")}
        for name in weights:
            if name == "quantized":
                self.put_quantized_(student)
                continue
            stage, key = kept[name]
            if self.read(stage).get(key):
                models.replace_parameters_(student, load_file(self.run / f"{self.name(name)}.safetensors"))
        return student

    def put_quantized_(self, student: Any) -> None:
        """Put the rounded weights in, where the run quantizes."""
        artefact = self.run.read("quantize") or {}
        if artefact["bits"] < 16:
            packed = load_file(self.run / "quantized.safetensors")
            models.replace_parameters_(student, quantized_weights(packed, artefact["quantization_config"]))

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
            partial = self.run / f".{name}.partial"
            save_file(tensors, partial)
            partial.replace(self.run / f"{name}.safetensors")

        processes.on_main(write)


def tune_settings(heal: HealConfig) -> TuneSettings:
    """What tuning itself takes of the options."""
    return TuneSettings(
        objective=heal.objective,
        learning_rate=heal.learning_rate,
        batch_tokens=heal.batch_tokens,
        radius=heal.radius,
        temperature=heal.temperature,
        mix=heal.mix,
        epochs=heal.epochs,
        patience=heal.patience,
    )


def quantize_with_bar_(model: Any, tokens: torch.Tensor, config: QuantizeConfig) -> Quantization:
    """`quantize_`, with the layers beside the cut found in the model's own config, and a bar."""
    layers = len(models.find_decoder(model))
    with bar(f"quantizing to {config.bits} bits", layers) as advance:
        return quantize_(model, tokens, config, endpoints=endpoints_of(model.config, layers), advance=advance)


def quantization_facts(found: Quantization, model: Any, config: QuantizeConfig) -> dict[str, Any]:
    """quantize.json: what was asked, what became of every weight, and how many bytes that makes."""
    parameters = {id(p): p for p in model.parameters()}
    quantized = {row["name"] for row in found.layers}
    covered = {id(model.get_submodule(name).weight) for name in quantized}
    stored = models.stored_dtype(model).itemsize
    after = sum(p.numel() * min(stored, p.itemsize) for key, p in parameters.items() if key not in covered)
    after += sum(t.nbytes for t in found.packed.values())
    return {
        **asdict(config),
        "layers": found.layers,
        "left": found.left,
        "bytes": {"before": models.parameter_bytes(model), "after": after},
        "quantization_config": found.config,
    }
