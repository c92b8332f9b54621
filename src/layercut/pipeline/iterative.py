"""Search, cut, fold and tune: one round of it, or several, each starting from what the one before healed.

The part of the journey that `pipeline/journey.py` runs once or, with --rounds or a budget of loss, again and again
(progressive pruning). A round of several has artefacts of its own (search-1.json, fold-1.json, …); what all of them
did is gathered under the usual names, so that every later stage goes on as after one round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from layercut import layer_search
from layercut.config import CompressConfig
from layercut.distributed import processes
from layercut.errors import ConfigError
from layercut.files.json_values import write_json
from layercut.files.sizes import parse_bytes, size_flag
from layercut.models import loading
from layercut.models.runner import DecoderRunner
from layercut.pipeline import stages
from layercut.pipeline.run_context import RunContext
from layercut.progress import say
from layercut.report.stage_lines import describe_fold, describe_point, describe_tuning
from layercut.segments import Removal, Segment

FRONTIER_BITS = (16, 8, 4)
ROUND_SHARE = 0.1
"""Share of the layers that a round removes where a budget of loss decides how many go in all; a guess."""


# A stage names what it uses and no more, so that a changed flag runs again just what depends on it; of text it uses
# the tokens, whatever flags they came by.


def search_stage(
    work: RunContext, text: dict[str, Any], wanted: Sequence[Segment], length: int | None, after: Sequence[str] = ()
) -> Removal:
    """Which layers go; in a round of several, which of those that are left."""
    scored = [work.source, text["calibration"], work.config.text.seed, asdict(work.config.search), length]
    if work.config.search.score == "folded":
        scored.append(text["heldout"])
    searched = partial(stages.search.search, work, wanted, length)
    found = work.run.stage(work.name("search"), scored, searched, after=after, together=True)
    removal = work.removed(found)
    say("search", f"{found['method']}: remove {', '.join(map(str, removal.all))} of {work.layers} layers")
    return removal


def heal_stages(work: RunContext, text: dict[str, Any], removal: Removal, after: Sequence[str] = ()) -> None:
    """Cut, fold, tune."""
    stage, config, do = partial(work.run.stage, together=True), work.config, stages.heal
    bounds = [[s.start, s.stop] for s in removal.all]
    cut = stage(work.name("cut"), [work.source, bounds], lambda: do.cut(work, removal.all), after=after)
    say("cut", f"{cut['parameters']['before']:,} -> {cut['parameters']['after']:,} parameters")
    folded = [config.heal.fold, text["calibration"], text.get("tuning"), text.get("heldout"), work.rounds]
    fold = stage(work.name("fold"), folded, lambda: do.fold(work, removal), after=[work.name("cut")])
    for outcome in fold["fold"]:
        say("fold", describe_fold(outcome))
    tuned = [asdict(config.heal), text.get("tuning"), text.get("heldout")]
    heal = stage(work.name("heal"), tuned, lambda: do.tune(work, removal), after=[work.name("fold")])
    if heal["tuning"]:
        say("tune", describe_tuning(heal["tuning"]))


def in_rounds(work: RunContext, text: dict[str, Any], length: int | None) -> Removal:
    """Progressive pruning: search, cut, fold and tune, then again from what that left, as far as the budgets allow.

    With a budget of loss every round is measured after healing, and one that exceeds it is undone. With one of size
    as well, every round is measured at 16, 8 and 4 bits, and the first that meets both ends it; `frontier.json` has
    all that was seen. Raises ConfigError: the budgets cannot be met.
    """
    config, run, rounds = work.config, work.run, work.config.number_of_rounds
    budget = config.search.max_loss
    bits = FRONTIER_BITS if config.search.two_budgets else (config.quantize.bits,)
    if length is None and budget is None:
        length = stages.search.length_for_target(work)
    lengths = round_lengths(length, work.layers, rounds)
    done: list[Round] = []
    points: list[dict[str, Any]] = []
    chosen: dict[str, Any] | None = None
    if config.search.two_budgets:
        measured = [work.source, text["heldout"], text["calibration"], asdict(config.quantize)]
        seen = run.stage("frontier-0", measured, lambda: stages.quantize.frontier(work, bits))
        points += seen["points"]
        chosen = within_budgets(seen["points"], config)
    for number, part_length in enumerate(lengths, start=1):
        if chosen:
            break
        part = Round(
            work.checkpoint, config, run, rounds=rounds, own_process=work.own_process, text=text, whole=work,
            number=number, previous=done[-1] if done else None,
        )  # fmt: skip
        say("round", f"{number} of {rounds}" + (" at most" if budget else ""))
        after = [done[-1].name("heal")] if done else []
        part.removal = search_stage(part, text, [], part_length, after)
        heal_stages(part, text, part.removal, after)
        if budget is not None:
            measured = [text["heldout"], asdict(config.quantize), list(bits)]
            looked = partial(stages.quantize.frontier, part, bits)
            seen = run.stage(part.name("frontier"), measured, looked, after=[part.name("heal")])
            points += seen["points"]
            for point in seen["points"]:
                say("frontier", describe_point(point))
            chosen = within_budgets(seen["points"], config)
            if min(point["rise"] for point in seen["points"]) > budget:
                break
        done.append(part)
    if budget is not None:
        told = {"points": points, "chosen": chosen, "budgets": budgets(config)}
        processes.on_main(lambda: write_json(run / "frontier.json", told))
    if (config.search.two_budgets and not chosen) or (not done and not chosen):
        raise out_of_budget(points, config)
    if chosen:
        work.config = replace(config, quantize=replace(config.quantize, bits=chosen["bits"]))
    return gathered(work, done)


def gathered(work: RunContext, done: Sequence[Round]) -> Removal:
    """What all rounds together did, as the artefacts of one: every later stage goes on from these."""
    run, last = work.run, done[-1] if done else None
    removal = last.removal if last and last.removal else Removal.first(())
    after = [part.name("heal") for part in done]
    run.stage("search", "rounds", lambda: rounds_searched(work, done), after=after, together=True)
    run.stage("cut", "rounds", lambda: stages.heal.cut(work, removal.all), after=["search"])
    run.stage("fold", "rounds", lambda: {"fold": [], "changed": []}, after=["cut"])
    run.stage("heal", "rounds", lambda: rounds_healed(work, done), after=["fold"])
    return removal


def round_lengths(length: int | None, layers: int, rounds: int) -> list[int]:
    """Layers that each round removes: a length dealt out evenly; where a budget of loss decides, a tenth of them."""
    if length is None:
        step = max(1, round(ROUND_SHARE * layers))
        return [step] * min(rounds, (layers - 1) // step)
    return [n for n in (length // rounds + (number < length % rounds) for number in range(rounds)) if n]


def within_budgets(points: Sequence[dict[str, Any]], config: CompressConfig) -> dict[str, Any] | None:
    """Of the points inside both budgets the one of least loss; None where there is none, or only one budget."""
    search = config.search
    if not search.two_budgets or search.max_loss is None or search.target_size is None:
        return None
    size = parse_bytes("--target-size", search.target_size)
    inside = [p for p in points if p["bytes"] <= size and p["rise"] <= search.max_loss]
    return min(inside, key=lambda point: point["rise"], default=None)


def budgets(config: CompressConfig) -> dict[str, Any]:
    """The budgets of a run, as frontier.json tells them."""
    return {"target_size": config.search.target_size, "max_loss": config.search.max_loss}


def out_of_budget(points: Sequence[dict[str, Any]], config: CompressConfig) -> ConfigError:
    """What to say where no point is inside: the nearest on either side."""
    search = config.search
    seen = "; ".join(describe_point(point) for point in points)
    if not search.two_budgets:
        least = min(point["rise"] for point in points)
        cost = f"costs {least:.1%}: allow more by --max-loss," if math.isfinite(least) else "leaves no finite loss:"
        hint = f"the first round {cost} give more --tune-tokens or smaller rounds"
        return ConfigError(f"--max-loss {search.max_loss:g} is exceeded by the first round: {seen}", hint)
    target = parse_bytes("--target-size", search.target_size or "")
    small = min((p["rise"] for p in points if p["bytes"] <= target), default=math.inf)
    good = min((p["bytes"] for p in points if p["rise"] <= (search.max_loss or 0)), default=None)
    ways = [f"--max-loss {small:.3f} would reach that size"] if math.isfinite(small) else []
    ways += [f"--target-size {size_flag(good)} would keep that loss"] if good is not None else []
    return ConfigError(
        f"nothing seen is inside both --target-size {search.target_size} and --max-loss {search.max_loss:g}: {seen}",
        "; ".join(ways) or "give larger budgets, or more --tune-tokens",
    )


@dataclass
class Round(RunContext):
    """One of several rounds of search, cut, fold and tuning: it cuts what the round before it healed.

    The teacher is the dense model throughout. Tokens to tune on are dealt out evenly, no token twice.
    """

    whole: RunContext = field(kw_only=True)
    """The run's own workbench, which holds the dense model and the text."""
    number: int = field(kw_only=True)
    """From 1."""
    previous: Round | None = None
    removal: Removal | None = None
    """What is removed once this round is done."""

    @property
    def layers(self) -> int:
        return self.whole.layers

    @property
    def dense(self) -> loading.LanguageModel:
        return self.whole.dense

    @property
    def tokenizer(self) -> Any:
        return self.whole.tokenizer

    @property
    def stack(self) -> DecoderRunner:
        return self.whole.stack

    @property
    def blocks(self) -> dict[str, torch.Tensor]:
        return self.whole.blocks

    @property
    def heldout_perplexity(self) -> float:
        return self.whole.heldout_perplexity

    @property
    def before(self) -> Any:
        return self.previous.healed if self.previous else self.whole.dense.model

    @cached_property
    def before_stack(self) -> DecoderRunner:
        return DecoderRunner(self.before) if self.previous else self.whole.stack

    @cached_property
    def healed(self) -> Any:
        """What this round leaves."""
        assert self.removal is not None
        return self.student(self.removal.cut, "folded", "tuned")

    def name(self, part: str) -> str:
        return f"{part}-{self.number}"

    @property
    def tuning(self) -> torch.Tensor:
        return self.whole.blocks["tuning"].tensor_split(self.rounds)[self.number - 1]

    def in_dense_layers(self, search: dict[str, Any]) -> dict[str, Any]:
        """Candidates stay in the layers of the model that is cut; what was chosen among them is `cut`."""
        removal = self.removed({"cut": search["segments"]})
        return search | {"cut": search["segments"], "segments": [[s.start, s.stop] for s in removal.all]}

    def removed(self, search: dict[str, Any]) -> Removal:
        cut = [Segment(*bounds) for bounds in search["cut"]]
        if self.previous is None or self.previous.removal is None:
            return Removal.first(cut)
        return self.previous.removal.then(cut, self.layers)


def rounds_searched(work: RunContext, done: Sequence[Round]) -> dict[str, Any]:
    """search.json of several rounds: all that they removed, priced as one cut, and what each chose."""
    each = [part.read("search") for part in done]
    removal = done[-1].removal if done and done[-1].removal else Removal.first(())
    found = layer_search.search(work.stack, work.blocks["calibration"], segments=removal.all).to_dict()
    kept = ("method", "segments", "cut", "candidates", "seconds", "layer_forwards", "layer_backwards")
    return found | {
        "method": each[-1]["method"] if each else "none",
        "rounds": [{key: search[key] for key in kept} for search in each],
        "layer_forwards": sum(search["layer_forwards"] for search in each),
        "layer_backwards": sum(search["layer_backwards"] for search in each),
        "dense_tokens": sum(search["dense_tokens"] for search in each),
        "seed": work.config.text.seed,
        "calibration": work.text["calibration"],
    }


def rounds_healed(work: RunContext, done: Sequence[Round]) -> dict[str, Any]:
    """heal.json of several rounds: all weights that they changed, and the last round's tuning."""
    each = [part.read("heal") for part in done]
    changed = work.save_changes(done[-1].healed, "tuned") if done else []
    return {
        "fold": [fold for heal in each for fold in heal["fold"]],
        "tuning": each[-1]["tuning"] if each else None,
        "rounds": [heal["tuning"] for heal in each],
        "changed": changed,
        "files": ["tuned.safetensors"] if changed else [],
    }
