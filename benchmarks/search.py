"""Claim: the gate finds the oracle's segments for less than the sweep costs, and several at once for far less.

    python benchmarks/search.py --data TEXT [--ratios 0.1 0.2 …] [--seeds 3] [--tokens 2048]
    python benchmarks/search.py --families 1 --out benchmarks/results/search_families.json

Regret is the price of what was found over that of the best there is, on the same tokens: the KL of the real cut. Cost
is counted in layers applied to a row of tokens, a backward as its seconds over a forward's measured in the same run,
and in seconds, the ways of searching taken in turns. Brute force runs every cut model whole, and the dense one.

--families: random models of other architectures, their layers scaled by random factors so that the landscape has
several minima; weak evidence, but of many landscapes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

from common import RESULTS, arguments, blocks, finish, open_model
from layercut.files.json_values import write_json
from layercut.layer_search import SearchResult, regret, search
from layercut.layer_search.gate import GateSchedule, descend
from layercut.layer_search.gate_walls import all_sets
from layercut.layer_search.prices import Prices, race
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import Cuts
from layercut.models.batch_sizes import rows_per_chunk
from layercut.models.losses import Teacher
from layercut.models.runner import DecoderRunner
from layercut.pipeline.provenance import environment
from layercut.segments import layers_to_remove


def backward_cost(stack: DecoderRunner, tokens: torch.Tensor, repeats: int = 7) -> float:
    """Seconds of a backward through a frozen layer, to its input alone, over seconds of its forward; median."""
    hidden, calls = stack.enter(tokens)
    middle, ratios = len(stack) // 2, []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        with torch.no_grad():
            stack.layer(middle, hidden, calls)
        forward = time.perf_counter() - begun
        leaf = hidden.detach().requires_grad_(True)
        out = stack.layer(middle, leaf, calls)
        begun = time.perf_counter()
        out.backward(torch.ones_like(out))
        ratios.append((time.perf_counter() - begun) / forward)
    return statistics.median(ratios[1:])


@torch.no_grad()
def brute_force(
    stack: DecoderRunner, tokens: torch.Tensor, length: int, count: int = 1, most: int | None = None
) -> Cost:
    """Run the dense model and every cut one (the first `most`) whole, as one would without a sweep."""
    cost = Cost()
    rows = rows_per_chunk(tokens.shape[1], stack.vocabulary)
    for batch in tokens.split(8):
        hidden, calls = stack.enter(batch)
        dense = stack.run(hidden, calls, 0, len(stack))
        teachers = [Teacher(stack.exit(h, t)) for h, t in zip(dense.split(rows), batch.split(rows), strict=True)]
        cost.layer_forwards += len(stack) * len(batch)
        for cuts in all_sets(length, len(stack), count)[:most]:
            h, calls = stack.enter(batch)
            for i in range(len(stack)):
                if not any(segment.start <= i < segment.stop for segment in cuts):
                    h = stack.layer(i, h, calls)
                    cost.layer_forwards += len(batch)
            for teacher, part, t in zip(teachers, h.split(rows), batch.split(rows), strict=True):
                teacher.kl(stack.exit(part, t)).sum().item()
    return cost


def timed(search: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = search()
    return result, time.perf_counter() - begun


def row_of(result: SearchResult) -> dict[str, Any]:
    return {
        "segments": " ".join(map(str, result.segments)),
        "kl": result.candidates[0].kl,
        "layer_forwards": result.cost.layer_forwards,
        "layer_backwards": result.cost.layer_backwards,
        "seconds": result.seconds,
    }


def race_of_all(stack: DecoderRunner, tokens: torch.Tensor, length: int, seed: int) -> SearchResult:
    """No gradient: successive halving that begins with every segment. What the descent has to be compared with."""
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    cost = Cost()
    found, seconds = timed(lambda: race(Prices(stack, tokens, cost), all_sets(length, len(stack), 1)))
    return SearchResult("race", found, cost, seconds=seconds)


def relaxations(stack: DecoderRunner, tokens: torch.Tensor, length: int, exact: SearchResult) -> dict[str, Any]:
    """The descent alone, from places spread evenly, its ends priced exactly and nothing beside: which slope leads."""
    kl: dict[Cuts, float] = {c.segments: c.kl for c in exact.candidates}
    starts = sorted(kl)
    steps = 4 + length
    result = {}
    for name in ("sigmoid", "straight-through"):
        schedule = GateSchedule(particles=4, steps=steps, relaxation=name)
        seeds = [starts[(2 * p + 1) * len(starts) // 8] for p in range(4)]
        ends, _ = descend(stack, tokens, seeds, schedule, cost := Cost())
        result[name] = {
            "regret": min(kl[end] for end in ends) / exact.candidates[0].kl,
            "ends": sorted(segment.start for end in ends for segment in end),
            "layer_forwards": cost.layer_forwards,
            "layer_backwards": cost.layer_backwards,
        }
    return result


def compared(
    stack: DecoderRunner, tokens: torch.Tensor, length: int, seed: int, *, ablations: bool = True
) -> dict[str, Any]:
    """One segment: the sweep, the gate, and two ablations, in turns on the same tokens."""
    exact = search(stack, tokens, n_layers=length, method="exhaustive", seed=seed)
    gate = search(stack, tokens, n_layers=length, method="clp", seed=seed)
    row = {"exhaustive": row_of(exact), "clp": row_of(gate), "regret": regret(gate, exact)}
    if ablations:
        raced = race_of_all(stack, tokens, length, seed)
        row |= {"race": row_of(raced) | {"regret": regret(raced, exact)}}
        row |= {"descent_alone": relaxations(stack, tokens, length, exact)}
    return row


def costs_at(stack: DecoderRunner, tokens: torch.Tensor, length: int, backward: float, repeats: int) -> dict[str, Any]:
    """Brute force : sweep : gate, in layer-forwards and in seconds, in turns; medians of the repeats' own ratios."""
    seconds: dict[str, list[float]] = {"brute_force": [], "sweep": [], "gate": []}
    for repeat in range(repeats):
        brute, took = timed(lambda: brute_force(stack, tokens, length))
        seconds["brute_force"].append(took)
        exact = search(stack, tokens, n_layers=length, method="exhaustive", seed=repeat)
        seconds["sweep"].append(exact.seconds)
        gate = search(stack, tokens, n_layers=length, method="clp", seed=repeat)
        seconds["gate"].append(gate.seconds)
    work = {
        "brute_force": float(brute.layer_forwards),
        "sweep": float(exact.cost.layer_forwards),
        "gate": gate.cost.layer_forwards + backward * gate.cost.layer_backwards,
    }
    return {
        name: {
            "layer_forward_equivalents": work[name],
            "seconds": statistics.median(seconds[name]),
            "work_over_brute_force": work[name] / work["brute_force"],
            "seconds_over_brute_force": statistics.median(
                s / b for s, b in zip(seconds[name], seconds["brute_force"], strict=True)
            ),
        }
        for name in work
    }


def two_segments(stack: DecoderRunner, tokens: torch.Tensor, length: int, backward: float, seed: int) -> dict[str, Any]:
    """K = 2: the gate against every set there is, priced in one shared sweep, and against SLEB and evolution."""
    gate = search(stack, tokens, n_layers=length, method="clp", seed=seed, num_segments=2)
    exact = search(stack, tokens, n_layers=length, method="exhaustive", seed=seed, num_segments=2)
    whole = len(tokens) * (len(stack) + len(exact.candidates) * (len(stack) - length))
    spent = gate.cost.layer_forwards + backward * gate.cost.layer_backwards
    others = {name: search(stack, tokens, n_layers=length, method=name, seed=seed) for name in ("sleb", "evolution")}
    return {
        "length": length,
        "rows": len(tokens),
        "sets": len(exact.candidates),
        "regret": regret(gate, exact),
        "clp": row_of(gate),
        "exhaustive": row_of(exact),
        "best_of_one_segment": min(c.kl for c in exact.candidates if len(c.segments) == 1),
        "brute_force_layer_forwards": whole,
        "clp_over_brute_force": spent / whole,
        "sweep_over_brute_force": exact.cost.layer_forwards / whole,
        **{name: row_of(found) for name, found in others.items()},
    }


# --- other families -----------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.08, "max_position_embeddings": 64}  # fmt: skip
LAYERS = (6, 12, 24, 40)
FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: LlamaConfig(**SIZES, num_hidden_layers=n),
    "qwen2": lambda n: Qwen2Config(**SIZES, num_hidden_layers=n),
    "gemma2": lambda n: Gemma2Config(**SIZES, num_hidden_layers=n, head_dim=12),
    "gpt2": lambda n: GPT2Config(
        vocab_size=128, n_embd=48, n_head=4, n_layer=n, n_positions=64, initializer_range=0.08
    ),
}


@torch.no_grad()
def rugged(family: str, layers: int, seed: int) -> Any:
    """A random model whose layers weigh between a tenth and ten times their initialisation: several local minima."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](layers)).eval().requires_grad_(False).float()
    for layer in DecoderRunner(model).layers:
        factor = 10 ** (2 * torch.rand(()).item() - 1)
        for weight in layer.parameters():
            if weight.ndim > 1:
                weight.mul_(factor**0.5)
    return model


def families(seeds: int) -> list[dict[str, Any]]:
    rows = []
    for family in FAMILIES:
        for layers in LAYERS:
            for seed in range(seeds):
                stack = DecoderRunner(rugged(family, layers, seed))
                tokens = torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(seed))
                for ratio in (0.1, 0.2, 0.3, 0.4):
                    length = layers_to_remove(ratio, layers)
                    row = {"family": family, "layers": layers, "seed": seed, "ratio": ratio, "length": length}
                    rows.append(row | compared(stack, tokens, length, seed, ablations=False))
                if layers in (6, 12):  # two segments, against all sets
                    gate = search(stack, tokens, n_layers=3, method="clp", seed=seed, num_segments=2, oracle=True)
                    found = {"regret": gate.oracle["regret"], "clp": row_of(gate)} if gate.oracle else {}
                    rows.append({"family": family, "layers": layers, "seed": seed, "segments": 2, "length": 3, **found})
                print(family, layers, seed, [round(row["regret"], 4) for row in rows[-5:]], flush=True)
    return rows


def summary(rows: list[dict[str, Any]], key: str = "regret") -> dict[str, float]:
    values = [row[key] for row in rows]
    return {"median": statistics.median(values), "worst": max(values), "cases": len(values)}


def main() -> None:
    args = arguments(
        __doc__, data="python-docstrings", ratios=[0.1, 0.2, 0.3, 0.4], seeds=3, tokens=2048, window=128,
        repeats=2, cost_tokens=2048, two_tokens=256, families=0,
    )  # fmt: skip
    if args.families:
        rows = families(args.families)
        one, two = ([row for row in rows if ("segments" in row) == several] for several in (False, True))
        found = {"claim": __doc__, "one_segment": summary(one), "two_segments": summary(two), "rows": rows}
        print({name: found[name] for name in ("one_segment", "two_segments")})
        write_json(args.out if args.out.name != "search.json" else RESULTS / "search_families.json",
                   found | {"environment": environment()})  # fmt: skip
        return
    model = open_model(args.model)
    stack = DecoderRunner(model.model)
    rows = []
    for ratio in args.ratios:
        for seed in range(args.seeds):
            text = blocks(model, args.data, args.tokens, args.window, seed)
            length = layers_to_remove(ratio, len(stack))
            row = {"ratio": ratio, "length": length, "seed": seed, "fingerprint": text.fingerprint}
            rows.append(row | compared(stack, text.tokens, length, seed, ablations=seed == 0))
            print(rows[-1], flush=True)
    fifth = layers_to_remove(0.2, len(stack))
    text = blocks(model, args.data, max(args.cost_tokens, 2 * args.two_tokens), args.window, 0).tokens
    backward = backward_cost(stack, text[:4])
    cost_rows = text[: max(2, args.cost_tokens // args.window)]
    half = args.window // 2  # short rows, so that a few tokens are several
    two_rows = text[: max(2, args.two_tokens // half), :half]
    finish(
        args.out,
        model,
        __doc__.splitlines()[0],
        rows,
        data=args.data,
        tokens=args.tokens,
        window=args.window,
        regret=summary(rows),
        backward_over_forward=backward,
        cost_at_a_fifth={"rows": len(cost_rows), **costs_at(stack, cost_rows, fifth, backward, args.repeats)},
        two_segments=two_segments(stack, two_rows, fifth, backward, 0) if args.two_tokens else None,
    )


if __name__ == "__main__":
    main()
