"""Stage: which layers go, by one of many methods, and whether other text would have chosen the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from safetensors.torch import load_file

from layercut import layer_search
from layercut.config import SearchConfig
from layercut.data.blocks import Blocks
from layercut.data.sources import public_name, split_mix
from layercut.distributed import processes
from layercut.files.sizes import parse_bytes
from layercut.healing.least_squares import fold_cut_
from layercut.layer_search import (
    SearchResult,
    length_for_size,
    longest_within,
    perplexity_rise,
    rescored,
    split_rows,
    with_triangle,
)
from layercut.layer_search.stability import common_rows, judge, stability_work
from layercut.models import loading
from layercut.models.runner import DecoderRunner, mean_kl
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages.text import with_evaluation_left_out
from layercut.progress import bar
from layercut.segments import Segment


def search(work: RunContext, wanted: Sequence[Segment], length: int | None) -> dict[str, Any]:
    """The segments to remove: those given, or the search's answer."""
    config, tokens, seed = work.config.search, work.blocks["calibration"], work.config.text.seed
    if wanted:
        result = layer_search.search(work.before_stack, tokens, segments=wanted)
    elif length is None and config.max_loss is not None:
        result = search_within(work, config.max_loss)
    else:
        length = length_for_target(work) if length is None else length
        how = asked(config, length)
        result = layer_search.search(work.before_stack, tokens, **how, seed=seed, oracle=config.oracle)
    if config.score == "folded":
        result = rescored(result, partial(folded_kl, work))
    if config.all_lengths:
        result = with_triangle(result, work.before_stack, tokens, sum(map(len, result.segments)))
    return work.in_dense_layers(result.to_dict() | {"seed": seed, "calibration": work.text["calibration"]})


def asked(config: SearchConfig, length: int) -> dict[str, Any]:
    """What the configuration says about the search for so many layers, as arguments of `layer_search.search`."""
    return {
        "n_layers": length,
        "num_segments": config.num_segments,
        "method": config.method,
        "objective": config.search_objective,
    }


def search_again(work: RunContext, seed: int, length: int) -> dict[str, Any]:
    """What the search chooses on the calibration text of another seed."""
    text = work.config.text

    def draw() -> Blocks:
        reader = with_evaluation_left_out(work.reader(text.data, seed=seed), work)
        return reader.draw("calibration", text.data, tokens=text.tokens, window=text.window)

    drawn = processes.on_main(draw)
    work.save({"calibration": drawn.tokens}, f"stability-{seed}")
    result = layer_search.search(work.before_stack, drawn.tokens, **asked(work.config.search, length), seed=seed)
    found = result.to_dict()
    kept = ("segments", "dense_tokens", "layer_forwards", "layer_backwards")
    facts = {"seed": seed, "kl": found["candidates"][0]["kl"], "calibration": drawn.facts()}
    return facts | {key: found[key] for key in kept} | {"files": [f"stability-{seed}.safetensors"]}


def stability(work: RunContext, search: dict[str, Any], again: list[dict[str, Any]], length: int) -> dict[str, Any]:
    """The choices of all seeds, priced on rows that all their texts gave to."""
    texts = [work.blocks["calibration"]]
    texts += [load_file(work.run / file)["calibration"] for found in again for file in found["files"]]
    sources = list(map(public_name, split_mix(work.config.text.data)))
    blocks = {source: rows for source, rows in zip(sources, common_rows(texts, len(sources)), strict=True) if len(rows)}
    searches = [search | {"kl": search["candidates"][0]["kl"]}, *again]
    choices = [tuple(Segment(*bounds) for bounds in found["segments"]) for found in searches]
    rows = sum(map(len, blocks.values()))
    total = stability_work(choices, length, len(work.stack), rows)
    with bar("pricing every seed's choice", total) as advance:
        found = judge(work.stack, blocks, choices, length, advance=advance)
    told = ("seed", "segments", "kl", "calibration")
    return {
        "method": search["method"],
        "search": search["config_hash"],
        "seeds": [{key: one[key] for key in told} for one in searches],
        **found,
    }


def search_within(work: RunContext, max_loss: float) -> SearchResult:
    """The longest cut whose rise of perplexity stays within a budget, on rows that were not searched on."""
    config, (rows, unseen) = work.config.search, split_rows(work.blocks["calibration"])
    seed = work.config.text.seed
    within = longest_within(
        max_loss,
        len(work.before_stack) - 1,
        lambda length: layer_search.search(work.before_stack, rows, **asked(config, length), seed=seed),
        lambda cuts: perplexity_rise(work.before_stack, unseen, cuts),
    )
    return replace(within.result, budget={"max_loss": max_loss, "rise": within.rise, "tried": within.tried})


def length_for_target(work: RunContext) -> int:
    """Layers to remove for --target-size: counted in the number format that is computed and saved in."""
    model = work.dense.model
    target = parse_bytes("--target-size", work.config.search.target_size or "")
    weights = [loading.parameter_bytes(layer, work.stack.stored_dtype) for layer in work.stack.layers]
    return length_for_size(weights, loading.parameter_bytes(model), target)


def folded_kl(work: RunContext, segments: Sequence[Segment]) -> float:
    """KL(p || q) on held-out tokens of the student without the segments, after its fold."""
    student = DecoderRunner(work.student(segments))
    for segment in sorted(segments):
        fold_cut_(student, work.stack, segment, work.blocks["calibration"])
    return mean_kl(work.stack, student, work.blocks["heldout"])
