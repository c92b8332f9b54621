"""The journey, from a model's name to a smaller checkpoint and its report. Read this file first.

    model + text -> search -> cut -> fold -> tune -> quantize -> evaluate -> export -> report

Each stage leaves an artefact in the run folder (`runs.py`); a stage whose artefact is there is not run again, and
the model is not loaded before a stage needs it. The dense model and the cut one (the *student*) share all weights
but those that healing changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from layercut import evaluate, measure, models, processes, stream
from layercut.config import (
    CompressConfig,
    CutConfig,
    HealConfig,
    PerplexityConfig,
    QuantizeConfig,
    SearchConfig,
    flattened,
    parse_bytes,
)
from layercut.cut import cut_checkpoint, cut_gguf, cut_segment_
from layercut.data import Blocks, load_blocks, origins, split_mix
from layercut.errors import ConfigError, ModelError, RunError
from layercut.export import export_checkpoint
from layercut.figures import label
from layercut.findings import stability_words
from layercut.heal.endpoints import TuneSettings, tune_
from layercut.heal.fold import fold_
from layercut.heal.state import StateFile
from layercut.heal.stored import StoredTeacher, check_topk, store_teacher, stored_bytes
from layercut.progress import bar, say
from layercut.quantize import Quantization, endpoints_of, quantize_, quantized_weights
from layercut.report import model_card, write_report
from layercut.runs import Run, digest, versions, write_text
from layercut.search import (
    SearchResult,
    add_triangle_,
    find_segments,
    length_for_size,
    length_for_speedup,
    longest_within,
    perplexity_rise,
    price_segments,
    rescored,
    split_rows,
    stability,
)
from layercut.segments import Segment, checked_segments, kept_layers, layers_to_remove
from layercut.sweep import Stack, mean_kl

Stage = Literal["search", "tune", "report"]
FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""
TUNING_STATE = "tuning-state.safetensors"
"""Where tuning stands, written every few minutes and when it is stopped; gone when the stage is done."""


def compress(model: str, config: CompressConfig, *, until: Stage = "report") -> Path:
    """Search, cut, heal, measure and export `model`; returns the run folder. Goes on where a run was stopped.

    until: "search" stops when the segments are known, "tune" saves the healed checkpoint and leaves out the rest.
    Several processes that a launcher started do it together (`processes.py`); each returns the folder.
    """
    processes.start()
    config.check()
    checkpoint = models.resolve(model, allow_pickle=config.load.allow_pickle)
    architecture = models.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
    check_window(config.text.window, architecture)
    if config.heal.teacher_topk:
        check_topk(config.heal.teacher_topk, architecture.get_text_config().vocab_size)
    layers = models.count_layers(architecture)
    wanted = checked_segments(config.search.segments, layers)
    length = wanted_length(config.search, layers)
    check_sources(config)
    models.pick_device(config.load.device)
    if config.tasks.names and until == "report":
        evaluate.check_tasks(config.tasks.names, config.tasks.include_path)

    with Run(config.run.out or default_folder(model), force=config.run.force) as run:
        run.describe({"model": model, **flattened(config)})
        work = Workbench(checkpoint, config, run)
        if until != "search" and not run.read("search") and stream.wanted(checkpoint, **asdict(config.load)):
            raise ModelError(models.STREAMED, models.STREAMED_HINT)

        # A stage names what it uses and no more, so that a changed flag runs again just what depends on it;
        # of text it uses the tokens, whatever flags they came by.
        dense, text = work.source, text_stage(work)
        scored = [dense, text["calibration"], config.text.seed, asdict(config.search)]
        search = run.stage("search", scored, lambda: work.search(wanted, length), together=True)
        segments = [Segment(*bounds) for bounds in search["segments"]]
        say("search", f"{search['method']}: remove {', '.join(map(str, segments))} of {layers} layers")
        if config.stability.seeds > 1:
            say("stability", stability_words(stability_stage(work, search, sum(map(len, segments)))))
        if until == "search":
            return run.folder

        cut = run.stage("cut", [dense, search["segments"]], lambda: work.cut(segments))
        say("cut", f"{cut['parameters']['before']:,} -> {cut['parameters']['after']:,} parameters")
        folded = [config.heal.fold, text["calibration"], text["heldout"]]
        fold = run.stage("fold", folded, lambda: work.fold(segments), after=["cut"], together=True)
        for outcome in fold["fold"]:
            say("fold", describe_fold(outcome))
        tuned = [asdict(config.heal), text["tuning"], text["heldout"]]
        heal = run.stage("heal", tuned, lambda: work.tune(segments), after=["fold"], together=True)
        (run / TUNING_STATE).unlink(missing_ok=True)
        if heal["tuning"]:
            say("tune", describe_tuning(heal["tuning"]))
        calibrated = text["calibration"] if config.quantize.quantizer == "gptq" else None
        stored = [asdict(config.quantize), calibrated] if config.quantize.bits < 16 else None
        quantized = run.stage("quantize", stored, lambda: work.quantize(segments), after=["heal"])
        if quantized["bits"] < 16:
            say("quantize", describe_quantization(quantized))

        if until == "tune":
            run.stage("export", None, lambda: work.export(segments), after=["quantize"])
            say("export", f"stock checkpoint, verified by a fresh process: {run / 'model'}")
            return run.folder

        reported = [asdict(config.evaluate), text["evaluation"]]
        judged = partial(work.evaluate, segments)
        measured = run.stage("eval", reported, judged, after=["quantize"], together=True)
        proofs = further_proofs(work, segments)
        exported = run.stage("export", None, lambda: work.export(segments), after=["quantize"])
        run.stage(
            "summary",
            model,
            lambda: summarise(run, model, layers, search, cut, measured, exported) | summarise_proofs(proofs),
            after=["text", "search", "eval", *proofs, "export"],
        )
        processes.on_main(lambda: write_text(run / "model" / "README.md", model_card(run.folder)))
        processes.on_main(lambda: write_report(run.folder))
        return run.folder


def wanted_length(search: SearchConfig, layers: int) -> int | None:
    """How many layers the user wants removed; None where that depends on the model's weights or on its loss."""
    if search.ratio is not None:
        return layers_to_remove(search.ratio, layers)
    return length_for_speedup(layers, search.target_speedup) if search.target_speedup is not None else None


def text_stage(work: Workbench) -> dict[str, Any]:
    """Draw all tokens of a run, and say where they come from."""
    heal, reported = work.config.heal, work.config.evaluate
    drawn = [heal.tune_data, heal.tune_tokens, reported.eval_data, reported.eval_tokens]
    text = work.run.stage("text", [work.source, asdict(work.config.text), drawn], work.read_text)
    for use in ("calibration", "tuning", "evaluation"):
        if text[use]:
            say(use, "{tokens:,} tokens of {source}".format(**text[use]))
    return text


def stability_stage(work: Workbench, search: dict[str, Any], length: int) -> dict[str, Any]:
    """Search again, on other text from other seeds, and judge all choices on a common set; one artefact a seed."""
    text, run = work.config.text, work.run
    again, asked = [], asdict(replace(work.config.search, oracle=False))
    for seed in range(text.seed + 1, text.seed + work.config.stability.seeds):
        inputs = [work.source, asdict(replace(text, seed=seed)), asked, length]
        again.append(run.stage(f"stability-{seed}", inputs, partial(work.search_again, seed, length), together=True))
        say("stability", f"seed {seed}: remove {label(again[-1]['segments'])}")
    hashes = [found["config_hash"] for found in again]
    judged = partial(work.stability, search, again, length)
    return run.stage("stability", hashes, judged, after=["search"], together=True)


def further_proofs(work: Workbench, segments: Sequence[Segment]) -> dict[str, dict[str, Any]]:
    """The artefacts of tasks and of long context, as far as they were asked for."""
    config, run = work.config, work.run
    found: dict[str, dict[str, Any]] = {}
    if config.tasks.names:
        asked = [config.tasks.names, config.tasks.limit, evaluate.harness_version(config.tasks.include_path)]
        found["tasks"] = run.stage("tasks", asked, lambda: work.score(segments), after=["quantize"])
        say("tasks", describe_retention(found["tasks"]["retention"]))
    if config.long.long_context:
        text = run.read("text") or {}
        asked = [config.long.long_context, config.text.seed, text["evaluation"]]
        found["long"] = run.stage("long", asked, lambda: work.long(segments), after=["quantize"])
        say("long", "up to {window:,} tokens".format(**found["long"]))
    return found


def check_sources(config: CompressConfig) -> None:
    """What is reported on must not be what is searched or tuned on."""
    reported = origins(config.evaluate.eval_data) - {"self"}
    used = origins(config.text.data) | origins(config.heal.tune_data or config.text.data)
    if both := reported & used:
        raise ConfigError(
            f"{', '.join(sorted(both))} would be searched or tuned on and reported on as well",
            "give --eval-data another text than --data and --tune-data",
        )


def check_window(window: int, architecture: Any) -> None:
    """Rows of tokens must fit the positions that the model knows."""
    limit = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if limit and window > limit:
        raise ConfigError(
            f"--window {window} is longer than the model's {limit} positions",
            f"allowed is up to {limit}: --window {min(limit, 256)}",
        )


def default_folder(model: str) -> Path:
    """runs/NAME, from the last part of the model's name."""
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", Path(model).name.removesuffix(".gguf")).strip(".-") or "run")


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


@dataclass
class Workbench:
    """What stages share: the dense model, loaded when first needed, the token blocks, and the run folder."""

    checkpoint: models.Checkpoint
    config: CompressConfig
    run: Run

    @property
    def source(self) -> dict[str, Any]:
        """What the dense model depends on."""
        return {"checkpoint": self.checkpoint.fingerprint(), "load": asdict(self.config.load)}

    @cached_property
    def dense(self) -> models.LanguageModel:
        """The model as it came."""
        loaded = stream.load(self.checkpoint, **asdict(self.config.load), tokenizer=self.tokenizer)
        where = ", layers left on disk" if stream.layers_on_disk(loaded.model) else ""
        say("load", f"{self.checkpoint.name}: {loaded.dtype}, {loaded.device}{where}".replace("torch.", ""))
        return loaded

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, which text needs and the model's weights do not."""
        return models.load_tokenizer(self.checkpoint, trust_remote_code=self.config.load.trust_remote_code)

    @cached_property
    def stack(self) -> Stack:
        return Stack(self.dense.model)

    @cached_property
    def blocks(self) -> dict[str, torch.Tensor]:
        """Token blocks [N, T] by use, as the text stage left them."""
        return load_file(self.run / "tokens.safetensors")

    # --- stages: each returns its artefact ---

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

    def search(self, wanted: Sequence[Segment], length: int | None) -> dict[str, Any]:
        """The segments to remove: those given, or the search's answer."""
        config, tokens = self.config.search, self.blocks["calibration"]
        if wanted:
            result = price_segments(self.stack, tokens, list(wanted))
        elif config.max_loss is not None:
            result = self.search_within(config.max_loss)
        else:
            length = self.length_for_target() if length is None else length
            result = self.find(tokens, length, self.config.text.seed, oracle=config.oracle)
        if config.score == "folded":
            result = rescored(result, self.folded_kl)
        if config.all_lengths:
            add_triangle_(result, self.stack, tokens, sum(map(len, result.segments)))
        text = self.run.read("text") or {}
        return result.to_json() | {"seed": self.config.text.seed, "calibration": text["calibration"]}

    def find(self, tokens: torch.Tensor, length: int, seed: int, *, oracle: bool = False) -> SearchResult:
        """The search itself, for one length, on any tokens."""
        config = self.config.search
        return find_segments(
            self.stack, tokens, length, config.method, seed=seed, oracle=oracle,
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
            len(self.stack) - 1,
            lambda length: self.find(rows, length, self.config.text.seed),
            lambda cuts: perplexity_rise(self.stack, unseen, cuts),
        )
        within.result.budget = {"max_loss": max_loss, "rise": within.rise, "tried": within.tried}
        return within.result

    def length_for_target(self) -> int:
        """Layers to remove for --target-size: counted in the number format that is computed and saved in."""
        model = self.dense.model
        target = parse_bytes("--target-size", self.config.search.target_size or "")
        weights = [models.parameter_bytes(layer) for layer in self.stack.layers]
        return length_for_size(weights, models.parameter_bytes(model), target)

    def folded_kl(self, segments: Sequence[Segment]) -> float:
        """KL(p || q) on held-out tokens of the student without the segments, after its fold."""
        student = Stack(self.student(segments))
        fold_(self.stack, student, segments, self.blocks["calibration"])
        return mean_kl(self.stack, student, self.blocks["heldout"])

    def cut(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Cut once to learn that it can be done and what it saves; later stages cut again, which costs nothing."""
        student = self.student(segments)
        dense = self.dense.model
        return {
            "segments": [[s.start, s.stop] for s in segments],
            "original_layer_index": kept_layers(segments, len(self.stack)),
            "parameters": {"before": models.parameter_count(dense), "after": models.parameter_count(student)},
            "bytes": {"before": models.parameter_bytes(dense), "after": models.parameter_bytes(student)},
        }

    def fold(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """The closed-form fold, kept where it brings the student nearer to the dense model on held-out tokens."""
        if not self.config.heal.fold:
            return {"fold": [], "changed": []}
        student, heldout = Stack(self.student(segments)), self.blocks["heldout"]
        before = mean_kl(self.stack, student, heldout)
        tokens = self.blocks["calibration"]
        with bar("folding", len(segments) * len(tokens)) as advance:
            folds = fold_(self.stack, student, segments, tokens, advance=advance)
        after = mean_kl(self.stack, student, heldout)
        kept = after < before
        changed = self.save_changes(student.model, "folded") if kept else []
        outcome = [f.to_json() | {"kl_before": before, "kl_after": after, "kept": kept} for f in folds]
        return {"fold": outcome, "changed": changed, "files": ["folded.safetensors"] if kept else []}

    def tune(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Cutoff endpoint tuning, from the fold where that was kept."""
        fold, heal, text = self.run.read("fold") or {}, self.config.heal, self.run.read("text") or {}
        if not heal.tune_tokens:
            return {"fold": fold["fold"], "tuning": None, "changed": fold["changed"]}
        student = Stack(self.student(segments, "folded"))
        settings = tune_settings(heal)
        tokens, heldout = self.blocks["tuning"], self.blocks["heldout"]
        teacher = self.stored_teacher(tokens, text["tuning"]["fingerprint"]) if heal.teacher_topk else None
        with bar("tuning the endpoints", heal.epochs * tokens.numel()) as advance:
            report = tune_(
                self.stack, student, segments, tokens, heldout, settings,
                advance=lambda seen, loss: advance(seen, f"loss {loss:.4f}"),
                teacher=teacher,
                state=StateFile(self.run / TUNING_STATE, key=self.run.inputs_of("heal")),
            )  # fmt: skip
        for point in report.curve:
            self.run.event("heal", int(point["step"]), "loss", point["loss"], "nats/token")
        changed = self.save_changes(student.model, "tuned")
        tuning = report.to_json() | {"data": text["tuning"]}
        return {"fold": fold["fold"], "tuning": tuning, "changed": changed, "files": ["tuned.safetensors"]}

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

    def quantize(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """The healed student's weights in fewer bits, where that is asked."""
        config = self.config.quantize
        if config.bits == 16:
            return {"bits": 16, "layers": []}
        student = self.student(segments, "folded", "tuned")
        layers = len(models.find_decoder(student))
        with bar("quantizing", layers) as advance:
            ends = endpoints_of(student.config, layers)
            found = quantize_(student, self.blocks["calibration"], config, endpoints=ends, advance=advance)
        partial = self.run / ".quantized.partial"
        save_file(found.packed, partial)
        partial.replace(self.run / "quantized.safetensors")
        return quantization_facts(found, student, config) | {"files": ["quantized.safetensors"]}

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
        last = self.dense.model
        with bar("perplexity", len(states) * len(tokens)) as advance:
            for state, weights in states.items():
                last = self.dense.model if weights is None else self.student(segments, *weights)
                figures[state] = evaluate.perplexity(last, tokens, advance=advance)
        beside = processes.on_main(lambda: self.look_closer(last, tokens))
        return {
            "perplexity": {
                "dataset": config.eval_data, "window": tokens.shape[1], "tokens": tokens.numel(), **figures,
                "fingerprint": text["evaluation"]["fingerprint"],
            },
            **beside,
        }  # fmt: skip

    def look_closer(self, last: Any, tokens: torch.Tensor) -> dict[str, Any]:
        """What the dense and the last model write, and how fast."""
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
        packing: dict[str, Any] = {}
        if quantized["bits"] < 16:
            packing["packed"] = load_file(self.run / "quantized.safetensors")
            packing["quantization_config"] = quantized["quantization_config"]
        with bar("saving and verifying", None):
            model = self.student(segments, "folded", "tuned", "quantized")
            exported = export_checkpoint(model, self.tokenizer, self.run / "model", **packing)
        return exported | {"files": ["model"]}

    # --- the student and its changed weights ---

    def student(self, segments: Sequence[Segment], *weights: str) -> Any:
        """The dense model without the segments, over the same tensors, then with what healing changed."""
        student = models.share(self.dense.model)
        cut_segment_(student, segments)
        kept = {"folded": ("fold", "changed"), "tuned": ("heal", "tuning")}
        for name in weights:
            if name == "quantized":
                self.put_quantized_(student)
                continue
            stage, key = kept[name]
            if (self.run.read(stage) or {}).get(key):
                models.replace_parameters_(student, load_file(self.run / f"{name}.safetensors"))
        return student

    def put_quantized_(self, student: Any) -> None:
        """Put the rounded weights in, where the run quantizes."""
        artefact = self.run.read("quantize") or {}
        if artefact["bits"] < 16:
            packed = load_file(self.run / "quantized.safetensors")
            models.replace_parameters_(student, quantized_weights(packed, artefact["quantization_config"]))

    def save_changes(self, student: Any, name: str) -> list[str]:
        """Write the parameters that are no longer the dense model's; their names."""
        shared = {id(p) for p in self.dense.model.parameters()}
        changed = {n: p.detach().cpu() for n, p in student.named_parameters() if id(p) not in shared}
        self.save(changed, name)
        return sorted(changed)

    def save(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        """Write tensors to NAME.safetensors in the run folder, whole or not at all; the main process does."""

        def write() -> None:
            partial = self.run / f".{name}.partial"
            save_file(tensors, partial)
            partial.replace(self.run / f"{name}.safetensors")

        processes.on_main(write)


def summarise(
    run: Run,
    model: str,
    layers: int,
    search: dict[str, Any],
    cut: dict[str, Any],
    measured: dict[str, Any],
    exported: dict[str, Any],
) -> dict[str, Any]:
    """summary.json: the run on one page. What was not measured is null."""
    return {
        "model": model,
        "layers": {"before": layers, "after": len(cut["original_layer_index"])},
        "segments": search["segments"],
        "original_layer_index": cut["original_layer_index"],
        "parameters": cut["parameters"],
        "bytes": {"before": cut["bytes"]["before"], "after": exported["bytes"]},
        "perplexity": measured["perplexity"],
        "tasks": None,
        "retention": None,
        "speed": measured["speed"],
        "generation_health": measured.get("health"),
        "seconds": run.seconds.copy(),
        "peak_rss_bytes": measured["peak_rss_bytes"],
        "versions": versions(),
    }


def summarise_proofs(proofs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the summary takes over of tasks and long context; null where they were not measured."""
    tasks, long = proofs.get("tasks"), proofs.get("long")
    return {
        "tasks": tasks["tasks"] if tasks else None,
        "retention": tasks["retention"] if tasks else None,
        "long_context": {k: v for k, v in long.items() if k not in ("seconds", "config_hash")} if long else None,
    }


def describe_retention(retained: dict[str, Any]) -> str:
    """One line about the tasks."""
    if retained["mean"] is None:
        return "scored; none has a score of which a share could be retained"
    words = f"{retained['mean']:.1%} of the dense model's score retained over {retained['tasks']} tasks"
    above = retained["above_chance"]
    return words + (f", {above:.1%} of what it has above chance" if above is not None else "; it is not above chance")


def describe_fold(outcome: dict[str, Any]) -> str:
    """One line about a fold."""
    where = "{}:{}".format(*outcome["segment"])
    if outcome["skipped"]:
        return f"{where} not folded: {outcome['skipped']}"
    verdict = "kept" if outcome["kept"] else "not kept, it does not help"
    return (
        f"{where} into layer {outcome['layer']} {' and '.join(outcome['modules'])}: held-out KL "
        f"{outcome['kl_before']:.4f} -> {outcome['kl_after']:.4f}, {verdict}"
    )


def describe_tuning(tuning: dict[str, Any]) -> str:
    """One line about tuning."""
    start, best = tuning["heldout"][0]["loss"], min(point["loss"] for point in tuning["heldout"])
    verdict = "" if best < start else "; it did not help, the start is kept"
    return (
        f"layers {', '.join(map(str, tuning['trained_layers']))}, {tuning['tokens']:,} tokens, "
        f"{tuning['state_bytes'] / 1e6:,.1f} MB of training state: held-out loss {start:.4f} -> {best:.4f}{verdict}"
    )


def quantization_facts(found: Quantization, model: Any, config: QuantizeConfig) -> dict[str, Any]:
    """quantize.json: what was asked, what became of every weight, and how many bytes that makes."""
    parameters = {id(p): p for p in model.parameters()}
    quantized = {row["name"] for row in found.layers}
    covered = {id(model.get_submodule(name).weight) for name in quantized}
    after = sum(p.nbytes for key, p in parameters.items() if key not in covered)
    after += sum(t.nbytes for t in found.packed.values())
    return {
        **asdict(config),
        "layers": found.layers,
        "left": found.left,
        "bytes": {"before": models.parameter_bytes(model), "after": after},
        "quantization_config": found.config,
    }


def describe_quantization(artefact: dict[str, Any]) -> str:
    """One line about quantization."""
    rows, sizes = artefact["layers"], artefact["bytes"]
    errors = [(row["output_error"], row["rtn_output_error"]) for row in rows if row["output_error"] is not None]
    words = f"{len(rows)} weights, {sizes['before']:,} -> {sizes['after']:,} bytes"
    if errors:
        ours, nearest = (sum(column) / len(errors) for column in zip(*errors, strict=True))
        words += f"; mean relative output error {ours:.5f} (rounded to nearest: {nearest:.5f})"
    if artefact["left"]:
        words += f"; {len(artefact['left'])} matrices stay as they are (first: {artefact['left'][0]})"
    return words


# --- single stages ---------------------------------------------------------------------------------------------


def cut(model: str, config: CutConfig) -> Path:
    """Cut given segments out of the files of a checkpoint; returns what was written.

    A folder is cut without loading it, a .gguf file too where --out is one; else it becomes a float checkpoint.
    """
    checkpoint = models.resolve(model, allow_pickle=config.allow_pickle)
    if not checkpoint.gguf:
        cut_checkpoint(checkpoint.folder, config.segments, config.out, force=config.force)
    elif config.out.suffix == ".gguf":
        cut_gguf(checkpoint.file, config.segments, config.out, force=config.force)
    else:
        if config.out.exists() and not config.force:
            raise RunError(f"--out {config.out} exists", "name another folder, or pass --force to replace it")
        loaded = models.load(checkpoint)
        cut_segment_(loaded.model, config.segments)
        export_checkpoint(loaded.model, loaded.tokenizer, config.out)
    return config.out


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `layercut evaluate` found, of one model or of a run's two."""

    perplexity: dict[str, float]
    """By the model's name; empty where only tasks were asked for."""
    tasks: dict[str, dict[str, Any]]
    """A row for each task; of one model alone, compared with itself."""
    retention: dict[str, Any] | None
    """Over the tasks; None of one model alone."""


def evaluate_only(target: str, config: PerplexityConfig) -> Evaluation:
    """Perplexity and tasks of a model, or of a run's dense and compressed model on the same tokens and items."""
    processes.start()
    run, cache = Path(target), None
    names = {target: target}
    asked, tasks = config.tasks, None
    if asked.names:
        evaluate.check_tasks(asked.names, asked.include_path)
    source_of_text = config.eval_data or (None if asked.names else "wikitext2")
    if (run / "config.yaml").is_file():
        if not (run / "summary.json").is_file():
            raise RunError(f"the run in {target} is not finished", "give its compress command again, then evaluate")
        names = {"dense": models.read_json(run / "summary.json")["model"], "compressed": str(run / "model")}
        cache = run / "tasks"
    perplexities, records, tokens = {}, [], None
    for name, source in names.items():
        checkpoint = models.resolve(source, allow_pickle=config.load.allow_pickle)
        check_window(config.window, models.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code))
        loaded = stream.load(checkpoint, **asdict(config.load))
        if asked.names:
            tasks = tasks or evaluate.load_tasks(asked.names, asked.include_path)
            score = partial(
                evaluate.score_tasks,
                loaded.model, loaded.tokenizer, tasks, limit=asked.limit, name=name, cache=cache,
            )  # fmt: skip
            records.append(processes.on_main(score))
        if source_of_text is None:
            continue
        if tokens is None:
            drawn = partial(
                load_blocks,
                source_of_text,
                loaded.tokenizer,
                tokens=config.eval_tokens,
                window=config.window,
                seed=config.seed,
                order="as written",
                model=loaded.model,
            )
            tokens = processes.on_main(drawn).tokens
        with bar(f"perplexity of {name}", len(tokens)) as advance:
            perplexities[name] = evaluate.perplexity(loaded.model, tokens, advance=advance)
    found = evaluate.compare_tasks(records[0], records[-1]) if records else {"tasks": {}, "retention": None}
    return Evaluation(
        perplexity=perplexities,
        tasks=found["tasks"],
        retention=found["retention"] if len(records) == 2 else None,
    )
