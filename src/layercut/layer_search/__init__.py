"""Find the layers that a model can best do without, by any criterion: `search`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import torch

from layercut import registries
from layercut.data.probes import ProbeRows
from layercut.distributed import processes
from layercut.errors import ConfigError
from layercut.layer_search.budgets import (
    length_for_size,
    longest_within,
    perplexity_rise,
    split_rows,
)
from layercut.layer_search.criteria import Criterion, lowest, names, takes
from layercut.layer_search.cut_costs import CutCosts
from layercut.layer_search.race import MOST_SETS
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Candidate, Cost, SearchResult
from layercut.layer_search.segment_sets import number_of_sets
from layercut.layer_search.skill_map import CapabilityMap, capability_map
from layercut.layer_search.sweep import DENSE, set_costs, set_work
from layercut.layer_search.weighted_rows import check_calibration
from layercut.models.runner import prepared
from layercut.progress import bar, say
from layercut.segments import Segment, as_segments, checked_segments, layers_to_remove

__all__ = [
    "Candidate", "CapabilityMap", "Cost", "Criterion", "Restriction", "SearchResult", "capability_map",
    "length_for_size", "longest_within", "most_segments", "perplexity_rise", "search", "split_rows",
]  # fmt: skip

SECOND_SEGMENT_GAIN = 0.05
"""Two segments are taken instead of one where what is minimised falls by more than this share: they have more
boundaries to heal, and among more sets chance finds a lower cost. A guess."""


def search(
    model: Any,
    tokens: torch.Tensor,
    *,
    ratio: float | None = None,
    n_layers: int | None = None,
    segments: Any = None,
    num_segments: int | Literal["auto"] = 1,
    method: str | Criterion = "auto",
    probes: ProbeRows | None = None,
    seed: int = 0,
    restriction: Restriction | None = None,
) -> SearchResult:
    """Find the layers that the model can best do without. Nothing is cut, and the model stays as it is.

    One of `ratio`, `n_layers` and `segments` says what to remove. Costs are KL(p || q) of real cuts.

    Args:
        model: a causal LM of transformers in memory, or a `DecoderRunner` of one.
        tokens: calibration token ids [N, T], at least one row of two tokens.
        ratio: share of the layers to remove, between 0 and 1.
        n_layers: n, how many layers to remove.
        segments: no search: the cost of these, removed together, each a `Segment`, (13, 19) or "13:19".
        num_segments: how many segments at most, for fisher, race and exhaustive; "auto": two where that pays.
        method: a name in `layercut.criteria`, or a `Criterion`; "auto" is "fisher", an estimate checked by real cuts.
        probes: synthetic probes (`layercut.probe_rows`), whose KL such a search minimises with that of the text.
        seed: of everything drawn at random: the same seed gives the same result.
        restriction: of the cuts that may be chosen, for this number of layers; of `segments` too.

    Returns:
        `SearchResult`: `segments` to hand to `layercut.cut`, all candidates from the best, and what finding them cost.

    Raises:
        ConfigError: none or several of the three are given, something is unknown, or does not fit model or method.
        DataError: the tokens are not [N, T] token ids of this model, or no probe fits the rows of `probes`.
        ModelError: layers exchange more than the hidden state, or dense predictions are not finite.
    """
    begun = time.perf_counter()
    given = None if segments is None else as_segments(segments)
    with prepared(model) as (runner,):
        if probes is not None:
            probes.check()
        check_calibration(runner, tokens, *([probes.tokens] if probes else []))
        layers = len(runner)
        if given is not None and ratio is n_layers is None:
            cuts = tuple(checked_segments(given, layers))
            (restriction or Restriction.none(layers, sum(map(len, cuts)))).check(cuts)
            with bar("cutting the segments", set_work([DENSE, cuts], layers, len(tokens))) as advance:
                if probes is None:
                    found = set_costs(runner, tokens, [cuts], cost := Cost(), advance=advance)
                else:
                    found = CutCosts(runner, tokens, cost := Cost(), probes).candidates([cuts])
                return SearchResult("given", found, cost, seconds=time.perf_counter() - begun)
        limits = restriction or Restriction.none(layers, wanted_length(layers, ratio, n_layers, given is not None))
        limits.needed([0.0] * layers)  # raises where no cut is allowed
        length = limits.length
        if isinstance(method, str):
            name, criterion = "fisher" if method == "auto" else method, registries.criteria.get(method)
        elif callable(method):
            name, criterion = getattr(method, "__name__", type(method).__name__), method
        else:
            raise ConfigError(f"method={method!r} is no criterion", "a name in layercut.criteria, or your own function")
        several = num_segments not in (1, "auto")
        for option, asked in {"num_segments": several, "probes": bool(probes)}.items():
            if asked and not names(criterion, option):
                raise ConfigError(f"{option} is not for the criterion {name!r}", f"leave out {option}, or use 'fisher'")
        compares = can_compare(num_segments, limits, criterion, bool(probes))
        most = most_segments(num_segments, length, compares)

        def picked_by(count: int) -> SearchResult:
            cost = Cost()
            with bar(name, None) if takes(criterion, "advance") else nullcontext(lambda steps: None) as advance:
                options: dict[str, Any] = {
                    "seed": seed, "cost": cost, "advance": advance, "num_segments": count, "probes": probes,
                    "restriction": limits,
                }  # fmt: skip
                taken = {key: value for key, value in options.items() if takes(criterion, key)}
                picked = criterion(runner, tokens, length, **taken)
            if isinstance(picked, torch.Tensor):
                if picked.shape != (layers,):
                    raise ConfigError(
                        f"the criterion {name!r} returned scores of shape {list(picked.shape)}; allowed is [{layers}]",
                        "one score a layer, the lowest are removed",
                    )
                picked = lowest(picked, limits)
            cuts = tuple(checked_segments(segments_of(picked, name), layers))
            if sum(map(len, cuts)) != length:
                raise ConfigError(
                    f"the criterion {name!r} picked {sum(map(len, cuts))} layers ({', '.join(map(str, cuts)) or 'none'}"
                    f"), and {length} were asked for",
                    "its segments must have `length` layers in all",
                )
            limits.check(cuts)
            if not isinstance(picked, SearchResult):
                picked = SearchResult(name, set_costs(runner, tokens, [processes.from_main(cuts)], Cost()), cost)
            return replace(picked, method=name)

        result = picked_by(most)
        if compares:
            if not any(len(each.segments) == 1 for each in result.candidates) and limits.segments():
                result = both(result, picked_by(1))
            result = fewest_worth(result)
        if result.first_by:
            result = replace(result, first_by=result.first_by | {"real cuts": result.candidates[0].segments})
        return replace(result, seconds=time.perf_counter() - begun)


def wanted_length(layers: int, ratio: float | None, n_layers: int | None, segments: bool) -> int:
    """n, the number of layers to remove, from the one that is given."""
    given = {"ratio": ratio is not None, "n_layers": n_layers is not None, "segments": segments}
    if sum(given.values()) != 1:
        raise ConfigError(
            f"{' and '.join(name for name, is_given in given.items() if is_given) or 'none'} of ratio, n_layers and "
            "segments is given; allowed is one of them",
            "a fifth of the layers: ratio=0.2",
        )
    if ratio is not None:
        if not isinstance(ratio, Real):
            raise ConfigError(f"ratio={ratio!r} is no number", "a fifth of the layers: ratio=0.2")
        return layers_to_remove(float(ratio), layers)
    if not isinstance(n_layers, int):
        raise ConfigError(f"n_layers={n_layers!r} is no whole number", f"allowed are 1 to {layers - 1}")
    if not 1 <= n_layers < layers:
        raise ConfigError(f"{n_layers} of {layers} layers cannot be removed", f"allowed are 1 to {layers - 1}")
    return n_layers


def segments_of(picked: Any, criterion: str) -> list[Segment]:
    """The segments that a criterion returned, in any form that a person may give them."""
    try:
        return as_segments(picked.segments if isinstance(picked, SearchResult) else picked)
    except ConfigError as error:
        raise ConfigError(
            f"the criterion {criterion!r} returned what {error.message}", "or a tensor with one score a layer"
        ) from None


def most_segments(asked: int | Literal["auto"], length: int, compares: bool) -> int:
    """K: what is asked, or for "auto" 2 where one segment and two are compared, and one layer each at least."""
    return min(length, asked if asked != "auto" else 2 if compares else 1)


def can_compare(asked: int | Literal["auto"], limits: Restriction, criterion: Criterion, probes: bool) -> bool:
    """Whether one segment is compared with two; by the exhaustive search not where sets of two are too many."""
    if asked != "auto" and not (isinstance(asked, int) and asked >= 1):
        raise ConfigError(f"num_segments={asked!r} is no number of segments", 'allowed are 1 and more, and "auto"')
    if not (asked == "auto" and probes and limits.length > 1 and names(criterion, "num_segments")):
        return False
    sets = number_of_sets(limits.length, len(limits.may), 2)
    if criterion is registries.criteria.get("exhaustive") and sets > MOST_SETS:
        say("note", f"one segment is searched: with two there are {sets:,} sets, and {MOST_SETS:,} at most are cut")
        return False
    return True


def both(several: SearchResult, single: SearchResult) -> SearchResult:
    """The candidates of two searches, and what both cost."""
    by_text = min((x.by_text for x in (several, single) if x.by_text), key=lambda each: each.kl, default=None)
    return replace(
        several,
        candidates=sorted([*several.candidates, *single.candidates], key=lambda each: each.merit),
        cost=several.cost + single.cost,
        by_text=by_text,
    )


def fewest_worth(found: SearchResult) -> SearchResult:
    """One segment first where more are not worth it (SECOND_SEGMENT_GAIN)."""
    best = found.candidates[0]
    single = next((each for each in found.candidates if len(each.segments) == 1), best)
    if best.merit[0] >= (1 - SECOND_SEGMENT_GAIN) * single.merit[0]:
        rest = [each for each in found.candidates if each is not single]
        return replace(found, candidates=[single, *rest], by_number=list(dict.fromkeys([single, best])))
    return replace(found, by_number=[single, best])
