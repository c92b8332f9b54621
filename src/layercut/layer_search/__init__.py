"""Find the layers that a model can best do without, by any criterion: `search`."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    length_for_speedup,
    longest_within,
    perplexity_rise,
    split_rows,
)
from layercut.layer_search.criteria import Criterion, accepted, lowest, names, takes
from layercut.layer_search.damage_map import CapabilityMap, capability_map
from layercut.layer_search.prices import Prices, as_objective, candidates, is_kl
from layercut.layer_search.race import MOST_SETS
from layercut.layer_search.restriction import Restriction
from layercut.layer_search.result import Candidate, Cost, SearchResult
from layercut.layer_search.segment_sets import number_of_sets
from layercut.layer_search.sweep import DENSE, set_costs, set_work
from layercut.layer_search.weighted_rows import check_calibration
from layercut.models.objectives import Objective
from layercut.models.runner import DecoderRunner, prepared
from layercut.progress import bar, say
from layercut.segments import Segment, as_segments, checked_segments, layers_to_remove

__all__ = [
    "Candidate", "CapabilityMap", "Cost", "Criterion", "Restriction", "SearchResult", "capability_map",
    "length_for_size", "length_for_speedup", "longest_within", "numbers_of_segments", "perplexity_rise",
    "search", "split_rows",
]  # fmt: skip

SECOND_SEGMENT_GAIN = 0.05
"""Two segments are taken instead of one where what is minimised falls by more than this share. A guess."""


def search(
    model: Any,
    tokens: torch.Tensor,
    *,
    ratio: float | None = None,
    n_layers: int | None = None,
    segments: Any = None,
    num_segments: int | Literal["auto"] = 1,
    method: str | Criterion = "auto",
    objective: str | Objective = "kl",
    probes: ProbeRows | None = None,
    seed: int = 0,
    restriction: Restriction | None = None,
) -> SearchResult:
    """Find the layers that the model can best do without. Nothing is cut, and the model stays as it is.

    One of `ratio`, `n_layers` and `segments` says what to remove. KL(p || q) of the real cut prices what is picked.

    Args:
        model: a causal LM of transformers in memory, or a `DecoderRunner` of one.
        tokens: calibration token ids [N, T], at least one row of two tokens.
        ratio: share of the layers to remove, between 0 and 1.
        n_layers: n, how many layers to remove.
        segments: no search: price these, removed together, each a `Segment`, (13, 19) or "13:19".
        num_segments: how many segments at most, for fisher, race and exhaustive; "auto": two where that pays.
        method: a name in `layercut.criteria`, or a `Criterion`; "auto" is "fisher", an estimate checked by real cuts.
        objective: what makes a cut good, a name in `layercut.objectives` or an `Objective`; for criteria that take it.
        probes: generated tests (`layercut.probe_rows`), whose damage such a search minimises with the loss.
        seed: of everything drawn at random: the same seed gives the same result.
        restriction: of the cuts that may be chosen, for this number of layers; of `segments` too.

    Returns:
        `SearchResult`: `segments` to hand to `layercut.cut`, all candidates from the best, and what finding them cost.

    Raises:
        ConfigError: none or several of the three are given, something is unknown, or does not fit model or method.
        DataError: the tokens are not [N, T] token ids of this model, or no test fits the rows of `probes`.
        ModelError: layers exchange more than the hidden state, or dense predictions are not finite.
    """
    segments = None if segments is None else as_segments(segments)
    with prepared(model) as (runner,):
        check_rows(runner, tokens, probes)
        limits = allowed_cuts(len(runner), wanted_length(len(runner), ratio, n_layers, segments), segments, restriction)
        if segments is not None:
            return priced(runner, tokens, segments, probes)
        length, (name, criterion), by = limits.length, named_criterion(method), as_objective(objective)
        asked: dict[str, Any] = {"seed": seed, "probes": probes, "restriction": limits, "objective": by}
        check_asked(criterion, name, num_segments not in (1, "auto"), not is_kl(by), bool(probes))
        found = []
        for k in numbers_searched(num_segments, limits, criterion, bool(probes), len(runner)):
            cost, begun = Cost(), time.perf_counter()
            with bar(name, None) if takes(criterion, "advance") else nullcontext(lambda steps: None) as advance:
                options = {"cost": cost, "advance": advance, **asked, "num_segments": k}
                picked = criterion(runner, tokens, length, **accepted(criterion, options))
            found.append(judged(runner, tokens, limits, name, picked, cost, time.perf_counter() - begun))
        return fewest_worth(found)


def allowed_cuts(
    layers: int, length: int, segments: Sequence[Segment] | None, restriction: Restriction | None
) -> Restriction:
    """The cuts that may be chosen, of which there must be one."""
    limits = restriction or Restriction.none(layers, length)
    if segments is not None:
        limits.check(segments)
    else:
        limits.needed([0.0] * layers)
    return limits


def named_criterion(method: str | Criterion) -> tuple[str, Criterion]:
    """A criterion and its name, from either. ConfigError where it is neither."""
    if isinstance(method, str):
        return "fisher" if method == "auto" else method, registries.criteria.get(method)
    if not callable(method):
        raise ConfigError(f"method={method!r} is no criterion", "a name in layercut.criteria, or your own function")
    return getattr(method, "__name__", type(method).__name__), method


def numbers_of_segments(asked: int | Literal["auto"], length: int, compares: bool) -> list[int]:
    """K of each search that is made: what is asked, or for "auto" 1, and 2 where they are to be compared."""
    if asked == "auto":
        return [1, 2] if length > 1 and compares else [1]
    return [min(asked, length)]


def numbers_searched(
    asked: int | Literal["auto"], limits: Restriction, criterion: Criterion, tests: bool, layers: int
) -> list[int]:
    """The same for a criterion; of "auto" the exhaustive search has 1 alone where sets of two are too many, as
    is said.
    """
    if asked != "auto" and not (isinstance(asked, int) and asked >= 1):
        raise ConfigError(f"num_segments={asked!r} is no number of segments", 'allowed are 1 and more, and "auto"')
    compares = asked == "auto" and tests and names(criterion, "num_segments")
    if compares and limits.length > 1 and criterion is registries.criteria.get("exhaustive"):
        sets = number_of_sets(limits.length, layers, 2)
        if not (compares := sets <= MOST_SETS):
            say(
                "note",
                f"the sweep is of one segment: with two there are {sets:,} sets, and {MOST_SETS:,} at most are priced",
            )
    return numbers_of_segments(asked, limits.length, compares)


def fewest_worth(found: Sequence[SearchResult]) -> SearchResult:
    """Of results with 1, 2, … segments at most the one to take, with what all of them cost.

    A result with more segments is taken where what is minimised falls by more than SECOND_SEGMENT_GAIN: more segments
    have more boundaries to heal, and among more sets chance finds a lower price.
    """
    taken = found[0]
    for more in found[1:]:
        if more.candidates[0].merit[0] < (1 - SECOND_SEGMENT_GAIN) * taken.candidates[0].merit[0]:
            taken = more
    if len(found) == 1:
        return taken
    cost = sum((each.cost for each in found), Cost())
    best = [each.candidates[0] for each in found]
    by_text = min((each.by_text for each in found if each.by_text), key=lambda candidate: candidate.kl, default=None)
    return replace(
        taken, cost=cost, seconds=sum(each.seconds for each in found), by_number=best, by_text=by_text,
        lighter=found[-1].lighter,
    )  # fmt: skip


def wanted_length(layers: int, ratio: float | None, n_layers: int | None, segments: Sequence[Segment] | None) -> int:
    """n, the number of layers to remove, from the one of the three that is given."""
    given = {"ratio": ratio is not None, "n_layers": n_layers is not None, "segments": segments is not None}
    if sum(given.values()) != 1:
        names = [name for name, is_given in given.items() if is_given]
        raise ConfigError(
            f"{' and '.join(names) or 'none'} of ratio, n_layers and segments is given; allowed is one of them",
            "a fifth of the layers: ratio=0.2",
        )
    if segments is not None:
        return sum(map(len, checked_segments(segments, layers)))
    if ratio is not None:
        if not isinstance(ratio, Real):
            raise ConfigError(f"ratio={ratio!r} is no number", "a fifth of the layers: ratio=0.2")
        return layers_to_remove(float(ratio), layers)
    if not isinstance(n_layers, int):
        raise ConfigError(f"n_layers={n_layers!r} is no whole number", f"allowed are 1 to {layers - 1}")
    if not 1 <= n_layers < layers:
        raise ConfigError(f"{n_layers} of {layers} layers cannot be removed", f"allowed are 1 to {layers - 1}")
    return n_layers


def check_rows(runner: DecoderRunner, tokens: torch.Tensor, probes: ProbeRows | None) -> None:
    """Refuse calibration rows that are not this model's, and tests of which none fits a row."""
    if probes is not None:
        probes.check()
    check_calibration(runner, tokens, *([probes.tokens] if probes else []))


def check_asked(criterion: Criterion, name: str, several: bool, other_objective: bool, probes: bool) -> None:
    """Refuse options that a criterion does not name as a parameter and would therefore ignore."""
    for option, is_asked in {"num_segments": several, "objective": other_objective, "probes": probes}.items():
        if is_asked and not names(criterion, option):
            raise ConfigError(f"{option} is not for the criterion {name!r}", f"leave out {option}, or use 'fisher'")


def priced(
    runner: DecoderRunner, tokens: torch.Tensor, segments: Sequence[Segment], probes: ProbeRows | None = None
) -> SearchResult:
    """Segments given by hand, priced as the one cut that they are."""
    cost, cuts = Cost(), tuple(checked_segments(segments, len(runner)))
    with bar("pricing the cut", set_work([DENSE, cuts], len(runner), len(tokens))) as advance:
        if probes is not None:
            return SearchResult("given", candidates(Prices(runner, tokens, cost, probes=probes), [cuts]), cost)
        return SearchResult("given", set_costs(runner, tokens, [cuts], cost, advance=advance), cost)


def judged(
    runner: DecoderRunner,
    tokens: torch.Tensor,
    limits: Restriction,
    name: str,
    picked: Sequence[Segment] | torch.Tensor | SearchResult,
    cost: Cost,
    seconds: float,
) -> SearchResult:
    """What a criterion returned, as a result: priced by the real cut, where the criterion has not done so itself."""
    if isinstance(picked, torch.Tensor):
        if picked.shape != (len(runner),):
            raise ConfigError(
                f"the criterion {name!r} returned scores of shape {list(picked.shape)}; allowed is [{len(runner)}]",
                "one score a layer, the lowest are removed",
            )
        picked = lowest(picked, limits.length, restriction=limits)
    segments = picked.segments if isinstance(picked, SearchResult) else picked
    cuts = tuple(checked_segments(segments, len(runner)))
    length = limits.length
    if sum(map(len, cuts)) != length:
        raise ConfigError(
            f"the criterion {name!r} picked {sum(map(len, cuts))} layers ({', '.join(map(str, cuts)) or 'none'}), "
            f"and {length} were asked for",
            "its segments must have `length` layers in all",
        )
    limits.check(cuts)
    if isinstance(picked, SearchResult):
        return replace(picked, method=name, seconds=seconds)
    cuts = processes.from_main(cuts)
    return SearchResult(name, set_costs(runner, tokens, [cuts], Cost()), cost, seconds=seconds)
