"""Part of the stage search: the shortlist, cuts evaluated after a quick fold and the best after a short healing.

Each cost is kept in the run folder as soon as it is known, until the stage is done: one that was stopped goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from layercut import surgery
from layercut.data import sources
from layercut.data.blocks import by_origin, fingerprint
from layercut.data.probes import ProbeRows, probe_rows
from layercut.errors import SurgeryError
from layercut.healing import fold_, tune_
from layercut.healing.quick_fold import FoldCosts, has_fold
from layercut.layer_search import Cost, Restriction, SearchResult, most_segments
from layercut.layer_search.cut_costs import CutCosts, row_kl
from layercut.layer_search.shortlist import EFFORTS, LONGER, Effort, shortlist
from layercut.layer_search.weighted_rows import WeightedRows, probes_alone, weighted_rows
from layercut.models.losses import as_cost
from layercut.models.memory import slices
from layercut.models.runner import DecoderRunner
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import KnownCosts
from layercut.pipeline.stages.heal import keyed, tokens_to_fold, tune_settings
from layercut.pipeline.stages.text import Treatment, tuning_treatment
from layercut.progress import bar, say
from layercut.registries import objectives
from layercut.report.formatting import layer_names
from layercut.segments import Segment

FIT_TESTS = 8  # of the rows that a fold is solved on one in so many is of tests
TUNED_SHARE = LONGER**2  # one in so many of the rows to tune on heal a candidate at first


def inputs(work: RunContext) -> list[Any]:
    """All that the shortlist depends on beside what the search does; nothing where there is none."""
    return [fingerprint(work.held_out_text), *healing_inputs(work)] if work.shortlist else []


def effort_of(work: RunContext) -> Effort:
    """What a shortlist may take; with a low effort there is none, and folds elsewhere are those of a normal one."""
    return EFFORTS.get(work.config.search.effort or "", EFFORTS["normal"])


def healing_inputs(work: RunContext) -> list[Any]:
    """All that healing on some of the rows depends on, beside the cut."""
    heal = keyed(work.config.heal)
    return [heal, work.text.get("tuning"), work.text["heldout"], *objectives.edition(heal.objective)]


def rows_to_tune(rows: int, times: int = 1) -> int:
    """Of the rows to tune on those that heal a candidate."""
    return max(1, times * rows // TUNED_SHARE)


def go_on(
    work: RunContext, result: SearchResult, tokens: torch.Tensor, how: dict[str, Any], stage: str
) -> SearchResult:
    """Go on from a search's candidates by costs after a quick fold, with a high effort after a short healing as well.

    Both are measured on text and probes that the search has not seen.
    """
    tests = how["probes"]
    if not work.shortlist_now:
        return result
    folds, foldable = cache(lambda: fold_costs(work, tokens, tests)), has_fold(work.stack, tokens)
    heals = effort_of(work).healed > 0
    if not foldable:
        instead = "candidates are healed at once" if heals else "plain cuts decide; --effort high heals some"
        say("shortlist", f"no layer of this model has a linear output to fold: {instead}")
    if not (foldable or heals):
        return result
    healed_costs = HealedCosts(work.stack, unseen_rows(work, tests) if heals else [])
    count = most_segments(how["num_segments"], how["n_layers"], tests is not None)
    limits = how["restriction"] or Restriction.none(len(work.stack), how["n_layers"])
    costs, known = CutCosts(work.stack, tokens, Cost(), tests), KnownCosts(work.run, stage)
    of_text: dict[tuple[Segment, ...], float] = {}
    folded: dict[tuple[Segment, ...], float] = {}
    with ExitStack() as shown:
        if foldable:
            advance = shown.enter_context(bar("measuring cuts after a quick fold", None))

        @cache
        def can_be_cut(cuts: tuple[Segment, ...]) -> bool:
            try:
                surgery.cut(work.dense.model, cuts)
            except SurgeryError as error:  # other cuts of this model can be expressed: the search found one
                say("search", f"{', '.join(map(str, cuts))}: {error.message}")
                return False
            return True

        def fold_cost(cuts: Sequence[Segment]) -> float:
            cost = known("folded", cuts, lambda: folds()(cuts)) if can_be_cut(tuple(cuts)) else math.inf
            folded[tuple(cuts)] = cost
            best = min(folded, key=folded.__getitem__)
            layers = layer_names([[each.start, each.stop] for each in best])
            advance(1, f"best of {len(folded)}: without layers {layers}, {folded[best]:.4g} nats")
            return cost

        def healed_cost(cuts: Sequence[Segment], times: int) -> float:
            shown.close()  # healing shows its own
            if not can_be_cut(tuple(cuts)):
                return math.inf
            left = known(f"healed {times}", cuts, lambda: healed_costs(healed_for_a_while(work, cuts, tokens, times)))
            if times == 1:
                of_text[tuple(cuts)] = left[0]
            parts = f"{left[0]:.4g} nats on text" + (f" and {sum(left[1:]):.4g} of tests" if left[1:] else "")
            after = "a short healing" if times == 1 else f"{times} times as much"
            say("shortlist", f"{', '.join(map(str, cuts))}: {parts} after {after}")
            return sum(left)

        quick = fold_cost if foldable else None
        found = shortlist(result, costs, quick, limits, count, healed_cost if heals else None, effort_of(work))
        cost = result.cost + costs.cost
        if folds.cache_info().currsize:
            cost += Cost(folds().dense_tokens, folds().layer_forwards)
    each = [replace(one, text=of_text.get(one.segments)) for one in found.shortlist]
    return replace(found, cost=cost, shortlist=each)


def fold_costs(work: RunContext, tokens: torch.Tensor, tests: ProbeRows | None) -> FoldCosts:
    """Costs of cuts after a quick fold, on held-out text and other tests."""
    effort = effort_of(work)
    fit = tokens[: max(1, effort.fit_tokens // tokens.shape[1])]
    if tests and tests.tokens.shape[1] == fit.shape[1]:
        fit = torch.cat([fit[: len(fit) - len(fit) // FIT_TESTS], tests.tokens[: len(fit) // FIT_TESTS]])
    others = other_tests(work, tests, effort.judged, work.config.text.window)
    few = weighted_rows(work.held_out_text[: effort.judged], others)
    return FoldCosts(work.stack, fit, few.tokens, few.weights, work.run.folder)


def unseen_rows(work: RunContext, tests: ProbeRows | None) -> list[WeightedRows]:
    """What judges a healed cut: held-out text, and tests of each length that is tuned on."""
    text, heal, effort = work.config.text, work.config.heal, effort_of(work)
    windows = {heal.tune_window or text.window: effort.long_tests, text.window: effort.short_tests}
    others = [each for window, rows in windows.items() if (each := other_tests(work, tests, rows, window))]
    unseen = [weighted_rows(work.held_out_text[: effort.heldout], None)]
    return unseen + [probes_alone(replace(each, weight=each.weight / len(others))) for each in others]


def healed_for_a_while(
    work: RunContext, cuts: Sequence[Segment], tokens: torch.Tensor, times: int = 1
) -> DecoderRunner:
    """A cut as the run would heal it, with fewer tokens to tune on."""
    heal, effort = work.config.heal, effort_of(work)
    heldout = work.blocks["heldout"][: effort.judged]
    student = DecoderRunner(surgery.cut(work.dense.model, cuts))
    rows, treated = some_to_tune(work, times) if heal.tokens else (tokens[:0], None)
    if heal.fold:
        fitted = tokens_to_fold(tokens, rows)[: max(1, effort.fold_tokens // tokens.shape[1])]
        fold_(student, work.stack, fitted, heldout=heldout)
    if treated:
        tune_(student, work.stack, rows, heldout=heldout, settings=tune_settings(heal), **vars(treated))
    return student


def some_to_tune(work: RunContext, times: int = 1) -> tuple[torch.Tensor, Treatment]:
    """The rows that heal a candidate, token ids [n, T], and how they are done."""
    some = some_of_each(work, times)
    treated = tuning_treatment(work).by_predictions()  # as costs are
    return work.blocks["tuning"][some], treated.of(lambda each: each[some])


def some_of_each(work: RunContext, times: int = 1) -> torch.Tensor:
    """Which rows to tune on heal a candidate, int64 [n], in their order: of each source its share, one at least.

    Of tests two, of which one is short and one is long.
    """
    parts = by_origin(torch.arange(len(work.blocks["tuning"])), work.text["tuning"].origins)
    counts = {name: max(rows_to_tune(len(part), times), 1 + (name == sources.TESTS)) for name, part in parts.items()}
    return torch.cat([part.sort().values[: counts[name]] for name, part in parts.items()]).sort().values


class HealedCosts:
    """J of `layer_search/weighted_rows.py` of healed models: the dense model is run once, not for each of them."""

    def __init__(self, dense: DecoderRunner, rows: Sequence[WeightedRows]) -> None:
        """Nothing is run before a model is to be judged."""
        self.dense, self.rows = dense, rows
        self.kept: dict[tuple[int, int, int], torch.Tensor] = {}
        """The dense model's h_L of a batch, on the host, by its rows' place and its bounds."""

    def __call__(self, student: DecoderRunner) -> list[float]:
        """The cost of a model, by text and by probes."""
        with bar("measuring a candidate", sum(len(rows.tokens) for rows in self.rows)) as advance:
            return [self._of(student, place, rows, advance) for place, rows in enumerate(self.rows)]

    @torch.no_grad()
    def _of(self, student: DecoderRunner, place: int, rows: WeightedRows, advance: Callable[[float], None]) -> float:
        found, dense = [], self.dense
        at_once = dense.budget.logit_rows(rows.tokens.shape[1], dense.vocabulary)
        queue = dense.parts("search", slices(len(rows.tokens), at_once))
        for part in queue:
            with queue.trying(part):
                tokens, key = rows.tokens[part], (place, part.start, part.stop)
                if key not in self.kept:
                    self.kept[key] = dense.last(tokens).cpu()
                weights = None if rows.weights is None else rows.weights[part]
                kl = row_kl(dense, self.kept[key].to(dense.device), tokens, weights)
                found.append(kl(student.last(tokens)).cpu().double())
                advance(len(tokens))
        return as_cost(rows.mean(torch.cat(found)[None]).item())


def other_tests(work: RunContext, tests: ProbeRows | None, rows: int, window: int) -> ProbeRows | None:
    """Tests that the search has not seen."""
    if tests is None or not tests.weight:
        return None
    found = probe_rows(
        work.tokenizer, rows=rows, window=window, capabilities=tests.names, seed=work.config.text.seed,
        weight=tests.weight, first=len(tests.tokens),
    )  # fmt: skip
    return found if found.names else None
