"""What a finished run found, in numbers that are safe to print and in plain words.

Reads the artefacts of a run folder and judges each stage from its figures. It sits at the end of the journey,
under `report/page.py`, which lays these findings out as a page, a model card and the terminal's closing table.
A figure that was not measured is None here and "not measured" in words; nothing is made up.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercut.errors import RunError
from layercut.report import rounds, survival
from layercut.report.formatting import (
    change,
    count,
    figure,
    finite,
    items,
    label,
    layer_names,
    number,
    part,
    percent,
    printable,
    short_name,
    size,
    source_name,
    spans,
    times,
    with_error,
)
from layercut.report.thresholds import (
    BROKEN_FACTOR,
    CLOSE,
    FAIR,
    FASTER,
    NEAR_BEST,
    ROUNDED,
    ROUNDED_FAIR,
    SLOWER,
    Verdict,
    graded,
)

STAGES = ("dense", "cut", "folded", "tuned", "quantized")
KEPT_TYPE_BITS = 8.5
"""Bits a weight of q8_0, in which `export` writes what healing changed of a GGUF file."""


# ---- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The JSON artefacts of a run folder; those a run does not have are empty."""

    summary: dict[str, Any]
    search: dict[str, Any]
    heal: dict[str, Any]
    evaluation: dict[str, Any]
    env: dict[str, Any]
    stability: dict[str, Any] = field(default_factory=dict)
    """Of this very search; that of an earlier one is left out."""
    quantization: dict[str, Any] = field(default_factory=dict)
    frontier: dict[str, Any] = field(default_factory=dict)
    """Of this very run in rounds; that of an earlier one in its folder is left out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """config.yaml."""
    gguf: dict[str, Any] = field(default_factory=dict)
    """Of the GGUF file last exported from this very run."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """What `layercut evaluate RUN` measured of this very run, in the order of their files."""


def read_run(folder: Path) -> RunFacts:
    """Read a run folder. RunError if summary.json is missing, or if any artefact is not a JSON object."""
    if not (folder / "summary.json").is_file():
        raise RunError(
            f"{folder} has no summary.json, so it is not the folder of a finished run",
            f"finish the run first: layercut compress MODEL --out {folder}",
        )
    search, stability = read_json(folder / "search.json"), read_json(folder / "stability.json")
    summary, gguf = read_json(folder / "summary.json"), read_json(folder / "gguf.json")
    frontier, settings = read_json(folder / "frontier.json"), _settings(folder / "config.yaml")
    budgets = part(frontier, "budgets")
    of_this_run = "rounds" in search and all(settings.get(key, value) == value for key, value in budgets.items())
    return RunFacts(
        summary=summary,
        search=search,
        heal=read_json(folder / "heal.json"),
        evaluation=read_json(folder / "eval.json"),
        env=read_json(folder / "env.json"),
        stability=stability if stability.get("search") == search.get("config_hash") else {},
        quantization=read_json(folder / "quantize.json"),
        frontier=frontier if of_this_run else {},
        settings=settings,
        gguf=gguf if gguf.get("run") == summary.get("config_hash") else {},
        evaluations=[
            found
            for file in sorted(folder.glob("evaluations/*.json"))
            if (found := read_json(file)).get("run") == summary.get("config_hash")
        ],
    )


def _settings(path: Path) -> dict[str, Any]:
    """What a run was asked for; empty where that cannot be read, for the report does not hang on it."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """An artefact, empty where there is none. RunError where it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what a wrong encoding raises
        raise RunError(
            f"{path} is not valid JSON ({error})",
            f"remove {path} and run the same layercut command again; it makes the file anew",
        ) from None
    if not isinstance(value, dict):
        raise RunError(
            f"{path} holds a {type(value).__name__}; allowed is a JSON object",
            f"remove {path} and run the same layercut command again; it makes the file anew",
        )
    return value


def by_kl(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The methods' rows of compare.json, from the cheapest cut to the dearest; those without a finite KL last."""

    def kl(row: dict[str, Any]) -> float:
        found = finite(row.get("kl"))
        return math.inf if found is None else found

    return sorted(map(part, items(comparison, "methods")), key=kl)


def evaluation_row(found: dict[str, Any]) -> dict[str, Any]:
    """What `layercut evaluate RUN` measured, as the report shows it."""
    ratio = part(found, "ratio")
    factor, error = finite(ratio.get("value")), finite(ratio.get("standard_error"))
    return {
        "date": printable(found.get("date")),
        "text": part(found, "text"),
        "perplexity": part(found, "perplexity"),
        "ratio": "" if factor is None else times(factor) if error is None else with_error(factor, error),
        "tasks": survival.task_rows(found),
        "measured": survival.evaluation_rows(found),
        "retention": part(found, "retention"),
    }


def with_tasks(run: RunFacts) -> dict[str, Any]:
    """The summary, with the tasks that `layercut evaluate RUN` scored last where the run itself scored none."""
    later = [found for found in run.evaluations if survival.task_rows(found)]
    if survival.task_rows(run.summary) or not later:
        return run.summary
    last = max(later, key=lambda found: printable(found.get("date")))
    return {**run.summary, "tasks": last.get("tasks"), "retention": last.get("retention")}


def coverage(run: RunFacts) -> tuple[int, int] | None:
    """How many segments were priced of how many of that length there are; None where that is not known."""
    layers, removed = part(run.summary, "layers").get("before"), spans(run.search.get("segments"))
    if type(layers) is not int or len(removed) != 1:
        return None
    length = removed[0][1] - removed[0][0]
    candidates = items(run.search, "candidates") + items(part(run.search, "oracle"), "candidates")
    priced = {where[0] for c in candidates if len(where := spans(part(c).get("segments"))) == 1}
    of_length = {where for where in priced if where[1] - where[0] == length}
    return (len(of_length), layers - length + 1) if of_length else None


def unmeasured(run: RunFacts) -> list[str]:
    """What the report has no figures for, by name."""
    summary = run.summary
    there = {
        "perplexity": last_stage(summary) is not None,
        "cost of the candidates": bool(items(run.search, "candidates")),
        "tuning": bool(part(run.heal, "tuning")),
        "speed": bool(speed(run)),
        "size on disk": bool(part(summary, "bytes")),
        "tasks": bool(survival.task_rows(with_tasks(run))),
        "long context": bool(survival.positions(summary)),
        "generations": bool(items(run.evaluation, "generations") or survival.health(summary)),
    }
    return [name for name, known in there.items() if not known]


# ---- judging -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Perplexity after one stage."""

    name: str
    perplexity: float | None
    """As measured: may be inf or nan. None: not measured."""
    factor: float | None
    """Over the dense model's."""
    error: float | None
    """Standard error of the factor's logarithm, over the windows of text."""
    gap_closed: float | None
    """(ln cut - ln x) / (ln cut - ln dense): 0 at the bare cut, 1 at the dense model."""
    bar: float | None
    """Log-perplexity on a scale from the dense model (0) to the worst stage (1)."""

    @property
    def closed(self) -> str:
        """50.4%: the gap closed; empty where it is not known, or the stage is further off than the bare cut."""
        return percent(self.gap_closed) if self.gap_closed is not None and self.gap_closed >= 0 else ""

    @property
    def over_dense(self) -> str:
        """1.24× ± 0.01: the factor with its standard error, as far as known."""
        return times(self.factor) if self.factor is None or self.error is None else with_error(self.factor, self.error)


def perplexities(summary: dict[str, Any]) -> dict[str, float]:
    """Those that were measured, in the order of the journey."""
    table = part(summary, "perplexity")
    found = {name: number(table.get(name)) for name in STAGES}
    return {name: value for name, value in found.items() if value is not None}


def stages(summary: dict[str, Any]) -> list[Stage]:
    """One row for each stage of the journey, measured or not."""
    measured = perplexities(summary)
    logs = {name: math.log(value) for name, value in measured.items() if math.isfinite(value) and value > 0}
    dense, cut, worst = logs.get("dense"), logs.get("cut"), max(logs.values(), default=0.0)
    rows = []
    for name in STAGES:
        here = logs.get(name)
        factor = gap = bar = None
        if here is not None and dense is not None:
            factor = math.exp(min(here - dense, 700.0))
            bar = max(0.0, here - dense) / (worst - dense) if worst > dense else 0.0
            if cut is not None and cut > dense and name not in ("dense", "cut"):
                gap = (cut - here) / (cut - dense)
        error = finite(part(summary, "perplexity", "standard_error").get(name))
        rows.append(
            Stage(name=name, perplexity=measured.get(name), factor=factor, error=error, gap_closed=gap, bar=bar)
        )
    return rows


def last_stage(summary: dict[str, Any]) -> tuple[str, float] | None:
    """The last stage whose perplexity was measured (not the dense model's), and that perplexity."""
    found = [pair for pair in perplexities(summary).items() if pair[0] != "dense"]
    return found[-1] if found else None


def broken(summary: dict[str, Any]) -> str | None:
    """In plain words, that the compressed model is ruined; None if it is not, or if that is not known."""
    last = last_stage(summary)
    if last is None:
        return survival.guessing(summary)
    name, value = last
    dense = perplexities(summary).get("dense")
    before = _sound_before_quantization(summary) if name == "quantized" else ""
    if not math.isfinite(value):
        return f"The compressed model is broken: its perplexity ({name}) is not a finite number. Do not use it.{before}"
    factor = final_factor(summary)
    if dense is not None and factor is not None and factor > BROKEN_FACTOR:
        return (
            f"The compressed model is broken: its perplexity ({name}) is {figure(value)}, "
            f"{times(factor)} the dense model's {figure(dense)}. Do not use it as it is.{before}"
        )
    return survival.guessing(summary)


def _sound_before_quantization(summary: dict[str, Any]) -> str:
    """Words on whether quantization is what broke the model; none where it was broken before, or that is not known."""
    earlier = {name: value for name, value in perplexities(summary).items() if name != "quantized"}
    dense, last = earlier.get("dense"), list(earlier.values())[-1:]
    if dense is None or len(earlier) < 2 or not last[0] <= BROKEN_FACTOR * dense:
        return ""
    return f" Quantization broke it: before, its perplexity was {figure(last[0])}. More bits may save it."


def headline(summary: dict[str, Any]) -> str:
    """One sentence to quote: what was removed, how much smaller, what became of the perplexity."""
    layers, sizes = part(summary, "layers"), part(summary, "parameters")
    before, after = finite(layers.get("before")), finite(layers.get("after"))
    name = short_name(summary.get("model")).rpartition("/")[2]
    removed = (
        f"{before - after:.0f} of its {before:.0f} layers"
        if before is not None and after is not None
        else "some of its layers"
    )
    which = layer_names(summary.get("segments"))
    sentence = f"{name} without {removed}" + (f" ({which})" if which else "")
    if before is not None and before == after:
        sentence = f"{name} with all of its {before:.0f} layers"
    old, new = finite(sizes.get("before")), finite(sizes.get("after"))
    facts = []
    if old and new is not None:
        way = "smaller" if new < old else "larger"
        if new != old:
            facts.append(f"is {percent(abs(1 - new / old))} {way} ({count(old)} → {count(new)} parameters)")
    facts.append(_perplexity_words(summary))
    return f"{sentence} {' and '.join(facts)}."


def _perplexity_words(summary: dict[str, Any]) -> str:
    last, dense = last_stage(summary), perplexities(summary).get("dense")
    text = source_name(part(summary, "perplexity").get("dataset"))
    where = f" on {text}" if text else ""
    if last is None or dense is None:
        return "has not had its perplexity measured against the dense model"
    name, value = last
    if not (math.isfinite(value) and math.isfinite(dense)):
        return f"has a perplexity{where} that is {figure(value)}, against {figure(dense)} of the dense model"
    state = "with nothing healed yet" if name == "cut" else f"once {name}"
    against = f"{times(final_factor(summary))} the dense model's {figure(dense)}"
    return f"has a perplexity{where} of {figure(value)} {state}, {against}"


def verdicts(run: RunFacts) -> list[Verdict]:
    """Did each stage do its job? Stages that did not run are left out."""
    found = [_result_verdict(run.summary), _search_verdict(run), _stability_verdict(run.stability)]
    found += [_cut_verdict(run.summary), rounds.rounds_verdict(run.search, run.heal)]
    found += [rounds.budgets_verdict(rounds.read_frontier(run.frontier))]
    found += [_healing_verdict(run, "folded", "Fold"), _healing_verdict(run, "tuned", "Tuning")]
    found += [_quantize_verdict(run), _size_verdict(run), _gguf_verdict(run)]
    found += [_speed_verdict(run, "prefill"), _speed_verdict(run, "decode")]
    survived = (survival.tasks_verdict, survival.long_verdict, survival.keys_verdict, survival.generation_verdict)
    found += [judge(with_tasks(run)) for judge in survived]
    return [verdict for verdict in found if verdict]


def _result_verdict(summary: dict[str, Any]) -> Verdict | None:
    """What the run ends with against the dense model."""
    factor = final_factor(summary)
    if factor is None:
        return None
    name, value = last_stage(summary) or ("", math.nan)
    dense = figure(perplexities(summary)["dense"])
    against = f", {times(factor)} the dense" if math.isfinite(factor) else "; the dense"
    text = f"perplexity ({name}) is {figure(value)}{against} model's {dense}."
    return Verdict(graded(factor, CLOSE, FAIR), "Result", text)


def final_factor(summary: dict[str, Any]) -> float | None:
    """Perplexity of the last measured stage over the dense model's, inf where that is ruined; None: not known."""
    last, dense = last_stage(summary), perplexities(summary).get("dense")
    if last is None or dense is None or not math.isfinite(dense) or dense <= 0:
        return None
    return last[1] / dense if math.isfinite(last[1]) else math.inf


def chosen_kl(search: dict[str, Any]) -> float | None:
    """Exact calibration KL of the segments the search chose, if they were scored."""
    wanted = spans(search.get("segments"))
    for candidate in items(search, "candidates") + items(part(search, "oracle"), "candidates"):
        if wanted and spans(part(candidate).get("segments")) == wanted:
            return finite(candidate.get("kl"))
    return None


def _search_verdict(run: RunFacts) -> Verdict | None:
    oracle = part(run.search, "oracle")
    choice, rival = label(run.search.get("segments")), label(oracle.get("segments"))
    if chosen_by_fold(run):
        return _folded_verdict(run.search, choice, rival)
    ours, best, unit = chosen_kl(run.search), finite(oracle.get("kl")), "nats"
    scores = [_score(run.search, run.search.get("segments")), _score(oracle, oracle.get("segments"))]
    if None not in scores:  # what the search went by, and the oracle beside it
        (ours, best), unit = scores, f"by --search-objective {printable(run.settings.get('search_objective'))}".strip()
    if not best or ours is None:
        return None
    gap = ours / best - 1
    if choice == rival:
        return Verdict("good", "Search", f"chose {choice}, the cheapest segment by exhaustive search as well.")
    text = f"chose {choice} at {figure(ours)} {unit}; exhaustive search finds {rival} at {figure(best)}"
    if gap <= NEAR_BEST - 1:
        allowed = percent(NEAR_BEST - 1)
        return Verdict("good", "Search", f"{text}: {percent(max(gap, 0.0))} more, within the {allowed} allowed.")
    return Verdict("bad", "Search", f"{text}: it missed the best by {percent(gap)}.")


def _score(found: dict[str, Any], segments: Any) -> float | None:
    """What a search went by for these segments, where that is not their KL."""
    for candidate in map(part, items(found, "candidates")):
        if spans(candidate.get("segments")) == spans(segments):
            return finite(candidate.get("score"))
    return None


def chosen_by_fold(run: RunFacts) -> bool:
    """Whether --score folded chose: its scores are KL after the fold, which the oracle does not have."""
    oracle = part(run.search, "oracle")
    if _score(run.search, run.search.get("segments")) is None:
        return False
    return run.settings.get("score") == "folded" or (bool(oracle) and _score(oracle, oracle.get("segments")) is None)


def _folded_verdict(search: dict[str, Any], choice: str, rival: str) -> Verdict | None:
    """--score folded beside the oracle: the choice by what is left after the fold, the search by the plain cuts.

    A choice that is dearer as a plain cut is no miss; the search is judged by the best it found before the fold.
    """
    oracle, ours = part(search, "oracle"), _score(search, search.get("segments"))
    regret = finite(oracle.get("regret"))
    if regret is None or ours is None:
        return None
    text = f"chose {choice}, by what is left after the fold: {figure(ours)} nats"
    there = _score(search, oracle.get("segments"))
    if choice == rival:
        text += "; it is the best plain cut by exhaustive search as well"
    elif there is not None:
        text += f", where {rival}, the best plain cut by exhaustive search, is left with {figure(there)}"
    missed = percent(max(regret - 1, 0.0))
    if regret <= NEAR_BEST:
        return Verdict("good", "Search", f"{text}. The search's best plain cut is within {missed} of it.")
    return Verdict("bad", "Search", f"{text}. The search's best plain cut missed {rival} by {missed}.")


def _stability_verdict(stability: dict[str, Any]) -> Verdict | None:
    worst = number(stability.get("worst"))
    if not items(stability, "seeds") or worst is None:
        return None
    return Verdict(graded(worst, NEAR_BEST, NEAR_BEST), "Stability", stability_words(stability))


def stability_words(stability: dict[str, Any]) -> str:
    """In plain words, whether the choice depends on the text it was made on, and what that costs."""
    rows = [part(row) for row in items(stability, "choices")]
    searches, best = items(stability, "seeds"), part(stability, "best")
    of = f"of {len(searches)} seeds"
    votes = [f"{label(row.get('segments'))} ({count(row.get('seeds'))} {of})" for row in rows]
    worst = number(stability.get("worst")) or 1.0
    lost = percent(worst - 1) if math.isfinite(worst) else "beyond measure"
    if len(rows) == 1:
        text = f"the choice is stable: {len(searches)} {of} remove {label(rows[0].get('segments'))}"
        if worst > 1:
            text += f"; {label(best.get('segments'))} would be the best on all their text, by {lost} in KL"
    else:
        start = "two choices alternate" if len(rows) == 2 else f"the choice wanders between {len(rows)}"
        text = f"{start}, {', '.join(votes)}; the difference costs at most {lost} in KL"
        if spans(best.get("segments")) not in [spans(row.get("segments")) for row in rows]:
            text += f" against {label(best.get('segments'))}, the best on all their text"
    texts = {part(one, "calibration").get("fingerprint") for one in searches}
    if len(texts) < len(searches):
        text += f". The source had but {len(texts)} different {'text' if len(texts) == 1 else 'texts'} for them"
    return f"{text}."


def _cut_verdict(summary: dict[str, Any]) -> Verdict | None:
    found = perplexities(summary)
    if "cut" not in found or "dense" not in found:
        return None
    cut, dense = found["cut"], found["dense"]
    if not (math.isfinite(cut) and math.isfinite(dense) and dense > 0):
        return Verdict("bad", "Cut", f"left a model whose perplexity is {figure(cut)} (dense: {figure(dense)}).")
    if cut <= dense:
        return Verdict("good", "Cut", f"cost nothing: perplexity {figure(dense)} → {figure(cut)}.")
    rise = f"from {figure(dense)} to {figure(cut)} ({times(cut / dense)})"
    text = f"raised perplexity {rise}; the price before healing."
    return Verdict("open" if cut <= BROKEN_FACTOR * dense else "bad", "Cut", text)


def _healing_verdict(run: RunFacts, name: str, title: str) -> Verdict | None:
    """A healing stage against the last measured stage before it."""
    found = perplexities(run.summary)
    ran = run.heal.get("fold") if name == "folded" else run.heal.get("tuning")
    if name not in found:
        return Verdict("open", title, "ran, but has no finite perplexity on record.") if ran else None
    earlier = [s for s in STAGES[1 : STAGES.index(name)] if s in found]
    if not earlier:
        return Verdict("open", title, f"ended at perplexity {figure(found[name])}; the state before was not measured.")
    old, new = found[earlier[-1]], found[name]
    if math.isfinite(new) and (not math.isfinite(old) or new < old):
        stage = next(s for s in stages(run.summary) if s.name == name)
        closed = f"; {stage.closed} of the log-perplexity gap is closed so far" if stage.closed else ""
        if stage.gap_closed is not None and not stage.closed:
            closed = "; it is still above that of the bare cut"
        return Verdict("good", title, f"improved perplexity from {figure(old)} to {figure(new)}{closed}.")
    kept = ""
    if name == "tuned" and part(run.heal, "tuning").get("best_step") == 0:
        kept = " No step beat the start on held-out text, so the start was kept."
    return Verdict("bad", title, f"did not improve: perplexity {figure(old)} → {figure(new)}.{kept}")


def _quantize_verdict(run: RunFacts) -> Verdict | None:
    found, made = perplexities(run.summary), run.quantization
    names = list(found)
    if "quantized" not in found or len(names) < 2:
        return None
    old, new = found[names[-2]], found["quantized"]
    if not (math.isfinite(old) and math.isfinite(new) and old > 0):
        return Verdict("bad", "Quantization", f"perplexity {figure(old)} → {figure(new)}.")
    how = f"to {made['bits']} bits ({printable(made.get('quantizer'))}): " if finite(made.get("bits")) else ""
    text = f"{how}perplexity {figure(old)} → {figure(new)} ({change(old, new)})."
    return Verdict(graded(new / old, ROUNDED, ROUNDED_FAIR), "Quantization", text)


def _gguf_verdict(run: RunFacts) -> Verdict | None:
    """What became of the model in the GGUF file, and who has read it."""
    again, words = part(run.gguf, "again"), run.gguf.get("broken")
    measured, theirs = part(again, "perplexity"), part(again, "llama_cpp")
    before, tokens = number(measured.get("model")), finite(again.get("tokens"))
    after = number(theirs.get("perplexity")) if theirs else number(measured.get("file"))
    if before is None or after is None or tokens is None:
        return None
    if words:
        return Verdict("bad", "GGUF", printable(words))
    reader = "llama.cpp" if theirs else "transformers (llama.cpp itself has not read it)"
    came, weight = came_with(run.summary), finite(run.gguf.get("bytes"))
    text = f"{size(weight)}, read by {reader}: perplexity {figure(before)} → {figure(after)}"
    sound = math.isfinite(after) and math.isfinite(before) and before > 0
    mark = graded(after / before, ROUNDED, ROUNDED_FAIR) if sound else "bad"
    text += f" ({change(before, after)}) on {count(tokens)} tokens"
    if came is not None and weight is not None and weight >= came:
        mark = "fair" if mark == "good" else mark
        text += f"; no smaller than what came, {size(came)}"
    return Verdict(mark, "GGUF", f"{text}.")


def came_with(summary: dict[str, Any]) -> float | None:
    """Bytes of the weight files the model came in; of an older run, in the number format it was run in."""
    sizes = part(summary, "bytes")
    return finite(sizes.get("source")) or finite(sizes.get("before"))


def _size_verdict(run: RunFacts) -> Verdict | None:
    summary = run.summary
    sizes, parameters = part(summary, "bytes"), part(summary, "parameters")
    old, new = came_with(summary), finite(sizes.get("after"))
    if not old or new is None:
        return None
    text = f"{size(old)} → {size(new)} on disk ({change(old, new)})"
    if new < old:
        return Verdict("good", "Size", f"{text}.")
    had, has = finite(parameters.get("before")), finite(parameters.get("after"))
    bits = ""
    if had and has and new / has > 1.05 * old / had:
        bits = f": the input stores {8 * old / had:.1f} bits per weight, the output {8 * new / has:.1f}"
    way = better_way(run)
    return Verdict("bad", "Size", f"the files did not get smaller, {text}{bits}.{f' {way}' if way else ''}")


def better_way(run: RunFacts) -> str:
    """A sentence on how a smaller file of this run's model is to be had; empty where there is none to name.

    Of a GGUF file `export` keeps what healing left alone byte for byte. Its size is estimated: what came, less the
    share of parameters removed, and q8_0 for what healing changed.
    """
    summary = run.summary
    if not printable(summary.get("model")).endswith(".gguf"):
        bits = finite(run.quantization.get("bits"))
        four = bits is not None and bits <= 4
        return "" if four else "Fewer bits make it smaller: layercut quantize RUN --bits 4 --out DIR."
    weight, came, parameters = finite(run.gguf.get("bytes")), came_with(summary), part(summary, "parameters")
    if weight is not None and came is not None and weight < came:
        return f"The exported GGUF file is smaller: {size(weight)}."
    had, has = finite(parameters.get("before")), finite(parameters.get("after"))
    about = ""
    if came and had and has:
        healed = finite(part(run.heal, "tuning").get("trained_parameters")) or 0.0
        about = f", about {size(came * has / had + healed * max(0.0, KEPT_TYPE_BITS - 8 * came / had) / 8)}"
    return f"Better: layercut export RUN --out FILE.gguf keeps the file's own number formats{about}."


# ---- the last word -----------------------------------------------------------------------------------------


def conclusion(run: RunFacts) -> Verdict:
    """What a careful engineer would say of the result: do not ship it, or where it is usable, and what is not known."""
    summary = with_tasks(run)
    ruined, factor = broken(summary) or survival.generation_warning(summary), final_factor(summary)
    if ruined:
        return _refused(f". {ruined}")
    if factor is None:
        return Verdict("open", CONCLUSION, "Do not ship this before its perplexity is measured: layercut evaluate RUN.")
    rise = f"perplexity is {times(factor)} the dense model's"
    marks = {verdict.stage: verdict for verdict in verdicts(run)}
    exported = _smaller_export(run)
    if "Size" in marks and marks["Size"].mark == "bad" and not exported and factor > 1:
        sizes = f"{size(came_with(summary))} → {size(part(summary, 'bytes').get('after'))}"
        return _refused(f": larger than what came ({sizes}), and {rise}. {better_way(run)}".rstrip())
    if factor > FAIR:
        before = _factor_before_quantization(summary)
        rounded = before is not None and before <= FAIR
        way = f"Quantization did that ({times(before)} before): give it more bits" if rounded else HEAL_MORE
        return _refused(f": {rise}. {way}.")
    if "Tasks" in marks and marks["Tasks"].mark == "bad":
        return _refused(f": {marks['Tasks'].text}")
    return _usable(f"The exported GGUF file ({size(run.gguf.get('bytes'))}) is usable" if exported else "Usable",
                   factor, marks, summary)  # fmt: skip


CONCLUSION, HEAL_MORE = "Conclusion", "Heal on more tokens, or remove fewer layers"


def _factor_before_quantization(summary: dict[str, Any]) -> float | None:
    """Perplexity over the dense model's of the state that was quantized; None where none was, or it is not known."""
    table = {**part(summary, "perplexity"), "quantized": None}
    return final_factor({"perplexity": table}) if "quantized" in perplexities(summary) else None


def _refused(why: str) -> Verdict:
    return Verdict("bad", CONCLUSION, f"Do not ship this{why}")


def _smaller_export(run: RunFacts) -> bool:
    """Whether a GGUF file was exported that is sound, and smaller than what came."""
    weight, came = finite(run.gguf.get("bytes")), came_with(run.summary)
    return weight is not None and came is not None and weight < came and not run.gguf.get("broken")


def _usable(what: str, factor: float, marks: dict[str, Verdict], summary: dict[str, Any]) -> Verdict:
    """Where a result is usable that is not ruled out, and what speaks against it."""
    text = source_name(part(summary, "perplexity").get("dataset")) or "the evaluation text"
    where = f"where a perplexity that is {times(factor)} the dense model's on {text} is acceptable"
    weak = ("Tasks", "Long context", "Hidden keys", "Generation", "GGUF")
    against = [name for name in weak if name in marks and marks[name].mark in ("fair", "bad")]
    if not any(phase not in marks or marks[phase].mark == "good" for phase in ("Prefill", "Decode")):
        against.append("Speed")
    words = f"{what} {where}"
    words += f"; look first at {', '.join(against)}, marked below the best" if against else ""
    words += "" if "Tasks" in marks else ". No task was measured: layercut evaluate RUN --tasks NAMES"
    return Verdict("good" if factor <= CLOSE and not against else "fair", CONCLUSION, f"{words}.")


def speed(run: RunFacts) -> dict[str, Any]:
    """The speed table of eval.json, or else of summary.json."""
    return part(run.evaluation, "speed") or part(run.summary, "speed")


def _speed_verdict(run: RunFacts, phase: str) -> Verdict | None:
    table = part(speed(run), phase)
    ratio, ideal = finite(table.get("ratio")), finite(table.get("ideal"))
    if ratio is None:
        return None
    reachable, share = finite(table.get("reachable")), finite(table.get("layer_share"))
    most = f"; removing these layers allows at most {times(ideal)}" if ideal else ""
    if reachable and share is not None:
        most += f", {times(reachable)} with {percent(share)} of the time spent in layers"
    if ratio > FASTER:
        return Verdict("good", phase.capitalize(), f"is {times(ratio)} as fast{most}.")
    if ratio >= SLOWER:
        return Verdict("fair", phase.capitalize(), f"is as fast as before ({times(ratio)}){most}.")
    return Verdict("bad", phase.capitalize(), f"did not get faster ({times(ratio)}){most}.")
