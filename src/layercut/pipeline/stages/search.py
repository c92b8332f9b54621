"""Stage: which layers go, by one of many methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import torch

from layercut import layer_search
from layercut.config import DataConfig, SearchConfig, consumer_names
from layercut.config.commands import CompressConfig
from layercut.data.probe_families import EDITION, capability_names
from layercut.data.probes import ProbeRows, probe_rows
from layercut.errors import ConfigError
from layercut.export.engines import restriction
from layercut.files import jsonable
from layercut.layer_search import Restriction, SearchResult, longest_within, perplexity_rise, split_rows
from layercut.layer_search.criteria import names
from layercut.pipeline.artefacts import SearchArtefact
from layercut.pipeline.resolve_options import keeps_gguf, length_for_saved_size
from layercut.pipeline.resolve_options import length_for_target as length_in_gguf
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.run_folder import KnownCosts
from layercut.pipeline.stages import shortlisting
from layercut.progress import say
from layercut.registries import criteria
from layercut.report.formatting import layer_names
from layercut.report.stage_lines import describe_shortlist
from layercut.segments import Segment

TEXT_ROWS_PER_TEST, FEWEST_TESTS = 4, 8
"""Rows of text for one of generated tests, and so many of these at least. On SmolLM2, 16 rows told the layers that hold
recall from the others (measured)."""

FEWEST_ROWS = 16  # rows of calibration text that are searched on with any effort

SHORTEST_TESTED = 64  # rows shorter than this are planned to hold no tests, which depends on the tokenizer


def search(work: RunContext, wanted: Sequence[Segment], length: int | None) -> list[Segment]:
    """Which layers go: those given, or the search's answer."""
    config, seed = work.config.search, work.config.text.seed
    counted = keeps_gguf(work.config, work.checkpoint) or work.config.quantize.bits not in (16, "auto")
    if counted and config.target_size and config.max_loss is None and length is None:
        length = length_for_target(work)  # by the file's header; it depends on options that the search does not know
    if not wanted and length != 0 and not (length is None and config.max_loss is not None):
        number = (lambda: length_for_target(work)) if length is None else (lambda: length)
        work.run.check("search-plain", lambda: plain_inputs(work, number()))
    scored = [work.source, work.text["calibration"], seed, config, length, *edition(config), *shortlisting.inputs(work)]
    with work.run.stage(SearchArtefact, "search", scored, together=True) as stage:
        if stage.open:
            result: SearchResult
            stack, tests = work.stack, generated_tests(work)
            tokens = work.blocks["calibration"][: searched_rows(len(work.blocks["calibration"]), config)]
            if wanted:  # --for has been checked by `resolve`
                result = layer_search.search(stack, tokens, segments=wanted, probes=tests)
            elif length == 0:
                result = replace(layer_search.search(stack, tokens, segments=()), method="none")
            elif length is None and config.max_loss is not None:
                result = search_within(work, config.max_loss, tests)
            else:
                how = search_options(work, length_for_target(work) if length is None else length, tests)
                inputs, name = plain_inputs(work, how["n_layers"]), "search-plain"
                with work.run.stage(SearchArtefact, name, inputs, together=True) as plain:
                    if plain.open:
                        result = layer_search.search(stack, tokens, **how, seed=seed)
                        plain.found = recorded(result, work)
                result = plain.artefact
                if work.shortlist_now:
                    result = gone_on_from(work, result, tokens, how)
            stage.found = replace(recorded(result, work), tests=tests.facts() if tests else None)
    found = stage.artefact
    if found.shortlist:
        say("search", describe_shortlist(jsonable(found)))
    words = layer_names([[one.start, one.stop] for one in found.segments])
    say("search", f"{found.method}: remove layers {words} of {work.layers}")
    return found.segments


def gone_on_from(work: RunContext, result: SearchResult, tokens: torch.Tensor, how: dict[str, Any]) -> SearchResult:
    """The shortlist, a stage of its own: the plain search may go on without healing its cuts again."""
    name = "search-shortlist"
    inputs = [*plain_inputs(work, how["n_layers"]), work.config.search, *shortlisting.inputs(work)]
    with work.run.stage(SearchArtefact, name, inputs, together=True) as stage:
        if stage.open:
            stage.found = recorded(shortlisting.go_on(work, result, tokens, how, name), work)
    KnownCosts(work.run, name).forget_()
    return stage.artefact


def plain_inputs(work: RunContext, length: int) -> list[Any]:
    """All that a search by plain cuts depends on, which healing does not enter: it is found once for a run folder."""
    config = work.config.search
    return [work.source, work.text["calibration"], work.config.text.seed, config, length, *edition(config)]


def edition(config: SearchConfig) -> list[Any]:
    """Of the tests that a search sees, and of a criterion that is another package's."""
    tests = [] if config.preserve == "none" else [EDITION]
    return [*tests, *criteria.edition(config.method)]


def recorded(result: SearchResult, work: RunContext) -> SearchArtefact:
    """A search as its artefact holds it."""
    given = {each.name: getattr(result, each.name) for each in fields(SearchResult) if each.init}
    return SearchArtefact(**given, seed=work.config.text.seed, calibration=work.text["calibration"])


def generated_tests(work: RunContext, config: SearchConfig | None = None) -> ProbeRows | None:
    """Rows of tests that the search weighs with the text, one for four rows of text."""
    config, text = config or work.config.search, work.config.text
    wanted = capability_names(config.preserve)
    if not wanted or not names(criteria.get(config.method), "probes"):
        return None
    made = probe_rows(
        work.tokenizer, rows=rows_of_tests(text, config), window=text.window, capabilities=wanted,
        seed=text.seed,
    )  # fmt: skip
    left = made.left_out
    if left and config.preserve != "all":
        words = f"no probe of {', '.join(left)} fits rows of {text.window} tokens"
        raise ConfigError(words, "give longer rows: --window 256")
    if left:
        what = "none: layers are chosen by the text alone" if not made.names else "all but " + ", ".join(left)
        say("search", f"probes that fit rows of {text.window} tokens: {what}")
    return made if made.names else None


def searched_rows(rows: int, config: SearchConfig) -> int:
    """Of the rows of calibration text, those that are searched on: a quarter of many, unless a high effort is asked."""
    return rows if config.effort == "high" else min(rows, max(FEWEST_ROWS, rows // 4))


def rows_of_tests(text: DataConfig, config: SearchConfig) -> int:
    """Rows of generated tests beside the calibration text."""
    return max(FEWEST_TESTS, searched_rows(math.ceil(text.tokens / text.window), config) // TEXT_ROWS_PER_TEST)


def planned_search_tests(config: CompressConfig) -> int:
    """Rows of tests that a run will search on, as far as that is known without its tokenizer."""
    search = config.search
    takes = search.preserve != "none" and names(criteria.get(search.method), "probes")
    return rows_of_tests(config.text, search) if takes and config.text.window >= SHORTEST_TESTED else 0


def search_options(work: RunContext, length: int, tests: ProbeRows | None) -> dict[str, Any]:
    """What the configuration says about a search, as arguments of `layer_search.search`."""
    config = work.config.search
    return {
        "restriction": limits(work, length),
        "n_layers": length,
        "num_segments": config.num_segments,
        "method": config.method,
        "probes": tests,
    }


def limits(work: RunContext, length: int) -> Restriction | None:
    """The cuts that stay right in the consumers of --for, how many of which are left is logged."""
    names = consumer_names(work.config.search.consumers)
    if not names:
        return None
    found = restriction(work.stack.model.config, names, length)
    if not found.is_none:
        left, every = len(found.segments()), len(work.stack) - length + 1
        say("search", f"--for {','.join(names)}: {left} of {every} segments of {length} layers stay right: {found.why}")
    return found


def search_within(work: RunContext, max_loss: float, tests: ProbeRows | None) -> SearchResult:
    """The longest cut whose rise of perplexity stays within a budget, on rows that were not searched on."""
    rows, unseen = split_rows(work.blocks["calibration"])
    seed = work.config.text.seed
    within = longest_within(
        max_loss,
        lengths_to_try(work),
        lambda length: layer_search.search(work.stack, rows, **search_options(work, length, tests), seed=seed),
        lambda cuts: perplexity_rise(work.stack, unseen, cuts),
    )
    return replace(within.result, budget={"max_loss": max_loss, "rise": within.rise, "lengths": within.lengths})


def lengths_to_try(work: RunContext) -> list[int]:
    """How many layers a search within a budget may remove: of --for such as may go almost anywhere, as whole periods.

    Of other numbers only the last layers may go, which are dear, so that the rise would not grow with the length.
    """
    names, every = consumer_names(work.config.search.consumers), range(1, len(work.stack))
    if not names:
        return [*every]
    shares = {}
    for length in every:
        with suppress(ConfigError):  # none of so many layers
            right = restriction(work.stack.model.config, names, length).segments()
            shares[length] = len(right) / (len(work.stack) - length + 1)
    most = max(shares.values(), default=0.0)
    return [length for length, share in shares.items() if share > most / 2] or [*every]


def length_for_target(work: RunContext) -> int:
    """Layers to remove for --target-size: counted as the result is saved."""
    if keeps_gguf(work.config, work.checkpoint):
        return length_in_gguf(work.config, work.checkpoint, work.config.search.target_bytes)
    return length_for_saved_size(work.config, work.dense.model, work.stack.stored_dtype)
