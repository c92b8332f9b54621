"""The journey, from a model's name to a smaller checkpoint and its report. Read this file first.

    model + text -> search -> cut -> fold -> tune -> evaluate -> export -> report

Each stage leaves an artefact in the run folder (`runs.py`); a stage whose artefact is there is not run again, and
the model is not loaded before a stage needs it. The dense model and the cut one (the *student*) share all weights
but those that healing changes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from layercut import evaluate, measure, models
from layercut.config import CompressConfig, CutConfig, PerplexityConfig, SearchConfig, flattened, parse_bytes
from layercut.cut import cut_checkpoint, cut_gguf, cut_segment_
from layercut.data import Blocks, load_blocks, origins, split_mix
from layercut.errors import ConfigError, RunError
from layercut.export import export_checkpoint
from layercut.heal.endpoints import TuneSettings, tune_
from layercut.heal.fold import fold_
from layercut.progress import bar, say
from layercut.report import model_card, write_report
from layercut.runs import Run, versions, write_text
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
)
from layercut.segments import Segment, checked_segments, kept_layers, layers_to_remove
from layercut.sweep import Stack, mean_kl

Stage = Literal["search", "tune", "report"]
FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""


def compress(model: str, config: CompressConfig, *, until: Stage = "report") -> Path:
    """Search, cut, heal, measure and export `model`; returns the run folder. Goes on where a run was stopped.

    until: "search" stops when the segments are known, "tune" saves the healed checkpoint and leaves out the rest.
    """
    config.check()
    checkpoint = models.resolve(model, allow_pickle=config.load.allow_pickle)
    layers = models.count_layers(models.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code))
    wanted = checked_segments(config.search.segments, layers)
    length = wanted_length(config.search, layers)
    check_sources(config)

    with Run(config.run.out or default_folder(model), force=config.run.force) as run:
        run.describe({"model": model, **flattened(config)})
        work = Workbench(checkpoint, config, run)

        # A stage names what it uses and no more, so that a changed flag runs again just what depends on it;
        # of text it uses the tokens, whatever flags they came by.
        dense, text = work.source, text_stage(work)
        scored = [dense, text["calibration"], config.text.seed, asdict(config.search)]
        search = run.stage("search", scored, lambda: work.search(wanted, length))
        segments = [Segment(*bounds) for bounds in search["segments"]]
        say("search", f"{search['method']}: remove {', '.join(map(str, segments))} of {layers} layers")
        if until == "search":
            return run.folder

        cut = run.stage("cut", [dense, search["segments"]], lambda: work.cut(segments))
        say("cut", f"{cut['parameters']['before']:,} -> {cut['parameters']['after']:,} parameters")
        folded = [config.heal.fold, text["calibration"], text["heldout"]]
        fold = run.stage("fold", folded, lambda: work.fold(segments), after=["cut"])
        for outcome in fold["fold"]:
            say("fold", describe_fold(outcome))
        tuned = [asdict(config.heal), text["tuning"], text["heldout"]]
        heal = run.stage("heal", tuned, lambda: work.tune(segments), after=["fold"])
        if heal["tuning"]:
            say("tune", describe_tuning(heal["tuning"]))

        if until == "tune":
            run.stage("export", None, lambda: work.export(segments), after=["heal"])
            say("export", f"stock checkpoint, verified by a fresh process: {run / 'model'}")
            return run.folder

        reported = [asdict(config.evaluate), text["evaluation"]]
        measured = run.stage("eval", reported, lambda: work.evaluate(segments), after=["heal"])
        exported = run.stage("export", None, lambda: work.export(segments), after=["heal"])
        run.stage(
            "summary",
            model,
            lambda: summarise(run, model, layers, search, cut, measured, exported),
            after=["text", "search", "eval", "export"],
        )
        write_text(run / "model" / "README.md", model_card(run.folder))
        write_report(run.folder)
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


def check_sources(config: CompressConfig) -> None:
    """What is reported on must not be what is searched or tuned on."""
    reported = origins(config.evaluate.eval_data) - {"self"}
    used = origins(config.text.data) | origins(config.heal.tune_data or config.text.data)
    if both := reported & used:
        raise ConfigError(
            f"{', '.join(sorted(both))} would be searched or tuned on and reported on as well",
            "give --eval-data another text than --data and --tune-data",
        )


def default_folder(model: str) -> Path:
    """runs/NAME, from the last part of the model's name."""
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", Path(model).name.removesuffix(".gguf")).strip(".-") or "run")


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
        load = self.config.load
        loaded = models.load(self.checkpoint, **asdict(load))
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and self.config.text.window > limit:
            raise ConfigError(
                f"--window {self.config.text.window} is longer than the model's {limit} positions",
                f"allowed is up to {limit}: --window {min(limit, 256)}",
            )
        say("load", f"{self.checkpoint.name}: {loaded.dtype}, {loaded.device}".replace("torch.", ""))
        return loaded

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
        text, heal = self.config.text, self.config.heal
        shared = {"window": text.window, "seed": text.seed, "chat_template": text.chat_template}

        def draw(source: str, tokens: int, **more: Any) -> Blocks:
            model = self.dense.model if "self" in split_mix(source) else None
            return load_blocks(source, self.dense.tokenizer, tokens=tokens, model=model, **{**shared, **more})

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
        partial = self.run / ".tokens.partial"
        save_file({use: blocks.tokens for use, blocks in drawn.items()}, partial)
        partial.replace(self.run / "tokens.safetensors")
        self.__dict__.pop("blocks", None)
        facts = {use: blocks.facts() for use, blocks in drawn.items()}
        return {"tuning": None, **facts, "files": ["tokens.safetensors"]}

    def search(self, wanted: Sequence[Segment], length: int | None) -> dict[str, Any]:
        """The segments to remove: those given, or the search's answer."""
        config, tokens = self.config.search, self.blocks["calibration"]
        if wanted:
            result = price_segments(self.stack, tokens, list(wanted))
        elif config.max_loss is not None:
            result = self.search_within(config.max_loss)
        else:
            result = self.find(tokens, self.length_for_target() if length is None else length)
        if config.score == "folded":
            result = rescored(result, self.folded_kl)
        if config.all_lengths:
            add_triangle_(result, self.stack, tokens, sum(map(len, result.segments)))
        text = self.run.read("text") or {}
        return result.to_json() | {"seed": self.config.text.seed, "calibration": text["calibration"]}

    def find(self, tokens: torch.Tensor, length: int) -> SearchResult:
        """The search itself, for one length."""
        config = self.config.search
        return find_segments(
            self.stack, tokens, length, config.method, seed=self.config.text.seed, oracle=config.oracle,
            count=min(config.num_segments, length), objective=config.search_objective,
        )  # fmt: skip

    def search_within(self, max_loss: float) -> SearchResult:
        """The longest cut whose rise of perplexity stays within a budget, on rows that were not searched on."""
        rows, unseen = split_rows(self.blocks["calibration"])
        within = longest_within(
            max_loss,
            len(self.stack) - 1,
            lambda length: self.find(rows, length),
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
        settings = TuneSettings(
            objective=heal.objective,
            learning_rate=heal.learning_rate,
            batch_tokens=heal.batch_tokens,
            radius=heal.radius,
        )
        tokens, heldout = self.blocks["tuning"], self.blocks["heldout"]
        with bar("tuning the endpoints", tokens.numel()) as advance:
            report = tune_(
                self.stack, student, segments, tokens, heldout, settings,
                advance=lambda seen, loss: advance(seen, f"loss {loss:.4f}"),
            )  # fmt: skip
        for point in report.curve:
            self.run.event("heal", int(point["step"]), "loss", point["loss"], "nats/token")
        changed = self.save_changes(student.model, "tuned")
        tuning = report.to_json() | {"data": text["tuning"]}
        return {"fold": fold["fold"], "tuning": tuning, "changed": changed, "files": ["tuned.safetensors"]}

    def evaluate(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """Perplexity of every state on the same held-out tokens; generations and speed of the first and the last."""
        config, tokens, text = self.config.evaluate, self.blocks["evaluation"], self.run.read("text") or {}
        fold, heal = self.run.read("fold") or {}, self.run.read("heal") or {}
        states: dict[str, list[str] | None] = {"dense": None, "cut": []}
        if fold["changed"]:
            states["folded"] = ["folded"]
        if heal["tuning"]:
            states["tuned"] = ["folded", "tuned"]
        figures: dict[str, Any] = dict.fromkeys(("dense", "cut", "folded", "tuned", "quantized"))
        last = self.dense.model
        with bar("perplexity", len(states) * len(tokens)) as advance:
            for state, weights in states.items():
                last = self.dense.model if weights is None else self.student(segments, *weights)
                figures[state] = evaluate.perplexity(last, tokens, advance=advance)
        samples = [evaluate.generations(m, self.dense.tokenizer) for m in (self.dense.model, last)]
        return {
            "perplexity": {
                "dataset": config.eval_data, "window": tokens.shape[1], "tokens": tokens.numel(), **figures,
                "fingerprint": text["evaluation"]["fingerprint"],
            },
            "generations": [
                {"prompt": prompt, "dense": dense, "compressed": compressed}
                for prompt, dense, compressed in zip(evaluate.PROMPTS, *samples, strict=True)
            ],
            "speed": measure.speed(self.dense.model, last) if config.speed else None,
            "peak_rss_bytes": measure.peak_rss_bytes(),
        }  # fmt: skip

    def export(self, segments: Sequence[Segment]) -> dict[str, Any]:
        """The healed student as a stock checkpoint."""
        with bar("saving and verifying", None):
            model = self.student(segments, "folded", "tuned")
            exported = export_checkpoint(model, self.dense.tokenizer, self.run / "model")
        return exported | {"files": ["model"]}

    # --- the student and its changed weights ---

    def student(self, segments: Sequence[Segment], *weights: str) -> Any:
        """The dense model without the segments, over the same tensors, then with what healing changed."""
        student = models.share(self.dense.model)
        cut_segment_(student, segments)
        kept = {"folded": ("fold", "changed"), "tuned": ("heal", "tuning")}
        for name in weights:
            stage, key = kept[name]
            if (self.run.read(stage) or {}).get(key):
                models.replace_parameters_(student, load_file(self.run / f"{name}.safetensors"))
        return student

    def save_changes(self, student: Any, name: str) -> list[str]:
        """Write the parameters that are no longer the dense model's; their names."""
        shared = {id(p) for p in self.dense.model.parameters()}
        changed = {n: p.detach().cpu() for n, p in student.named_parameters() if id(p) not in shared}
        partial = self.run / f".{name}.partial"
        save_file(changed, partial)
        partial.replace(self.run / f"{name}.safetensors")
        return sorted(changed)


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
        "seconds": run.seconds.copy(),
        "peak_rss_bytes": measured["peak_rss_bytes"],
        "versions": versions(),
    }


def describe_fold(outcome: dict[str, Any]) -> str:
    """One line about a fold."""
    where = "{}:{}".format(*outcome["segment"])
    if outcome["skipped"]:
        return f"{where} not folded: {outcome['skipped']}"
    verdict = "kept" if outcome["kept"] else "not kept, it does not help"
    return (
        f"{where} into layer {outcome['layer']} {outcome['module']}: held-out KL "
        f"{outcome['kl_before']:.4f} -> {outcome['kl_after']:.4f}, {verdict}"
    )


def describe_tuning(tuning: dict[str, Any]) -> str:
    """One line about tuning."""
    start, best = tuning["heldout"][0]["loss"], min(point["loss"] for point in tuning["heldout"])
    verdict = "" if best < start else "; it did not help, the start is kept"
    return (
        f"layers {', '.join(map(str, tuning['trained_layers']))}, {tuning['tokens']:,} tokens: "
        f"held-out loss {start:.4f} -> {best:.4f}{verdict}"
    )


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


def evaluate_only(target: str, config: PerplexityConfig) -> list[tuple[str, float]]:
    """(name, perplexity) of a model, or of a run's dense and compressed model on the same tokens."""
    run = Path(target)
    names = {target: target}
    if (run / "config.yaml").is_file():
        if not (run / "summary.json").is_file():
            raise RunError(f"the run in {target} is not finished", "give its compress command again, then evaluate")
        names = {"dense": models.read_json(run / "summary.json")["model"], "compressed": str(run / "model")}
    results, tokens = [], None
    for name, source in names.items():
        loaded = models.load(models.resolve(source, allow_pickle=config.load.allow_pickle), **asdict(config.load))
        if tokens is None:
            tokens = load_blocks(
                config.eval_data,
                loaded.tokenizer,
                tokens=config.eval_tokens,
                window=config.window,
                seed=config.seed,
                order="as written",
                model=loaded.model,
            ).tokens
        with bar(f"perplexity of {name}", len(tokens)) as advance:
            results.append((name, evaluate.perplexity(loaded.model, tokens, advance=advance)))
    return results
