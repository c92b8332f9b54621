"""Claim: the concave gate, and the Fisher estimate, find the segments that real cuts of all would find, at less work.

    python research/gates.py families [--seeds 1]                      random weights, four families
    python research/gates.py pairs [--seeds 1]                         as they, K = 2, beside all sets cut for real
    python research/gates.py one --data TEXT [--ratios 0.1 0.2 …]      a real model, beside the baselines
    python research/gates.py two|several --data TEXT [--ratios …]      K = 2 or 3, against SLEB and evolution
    python research/gates.py planted                                   30, 80 and 126 layers, one planted segment
    python research/gates.py deep                                      80 and 126 layers, several planted segments

What a method found is added to research/results/gates.json when it is done; what is there is not run again, and a run
that was stopped goes on. `--again clp` runs this method of the cases that are there once more, `--methods` those alone.
Regret is the KL of the real cut on all calibration rows over that of the exhaustive search, or, where that is not run,
over the best that any method found. A baseline may have less than 1 where it takes layers that are not neighbours. Work
is counted in layers applied to a row of tokens, a backward as `backward_over_forward` of them. `clp-uncut` is the first
place that the concave gate proposes, with no real cut made.

families, pairs: layers scaled by random factors, so that the landscape has several minima.
planted, deep: as they, and segments whose layers add little; of several segments all sets cannot be cut.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

from common import RESULTS, blocks, compact, named, open_model
from layercut.files import write_text
from layercut.layer_search import SearchResult, search
from layercut.layer_search.baselines import sleb_work
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import set_costs
from layercut.models.runner import DecoderRunner
from layercut.pipeline.environment import environment
from layercut.segments import Segment, joined_segments, layers_to_remove

ALONE = ("clp", "fisher", "race", "exhaustive")
BASELINES = ("random", "reverse-order", "angular", "cosine", "block-influence", "perplexity", "taylor")
SEVERAL = ("clp", "fisher", "race", "sleb", "evolution")
KEYS = ("kind", "model", "layers", "ratio", "seed")
SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.08, "max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: LlamaConfig(**SIZES, num_hidden_layers=n),
    "qwen2": lambda n: Qwen2Config(**SIZES, num_hidden_layers=n),
    "gemma2": lambda n: Gemma2Config(**SIZES, num_hidden_layers=n, head_dim=12),
    "gpt2": lambda n: GPT2Config(
        vocab_size=128, n_embd=48, n_head=4, n_layer=n, n_positions=64, initializer_range=0.08, bos_token_id=0,
        eos_token_id=0,
    ),
}  # fmt: skip


@torch.no_grad()
def rugged(family: str, layers: int, seed: int, planted: tuple[Segment, ...] = ()) -> DecoderRunner:
    """A random model whose layers weigh a tenth to ten times their initialisation; planted ones a hundredth."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](layers)).eval().requires_grad_(False).float()
    cheap = {i for segment in planted for i in range(segment.start, segment.stop)}
    for i, layer in enumerate(DecoderRunner(model).layers):
        factor = 0.01 if i in cheap else 10 ** (2 * torch.rand(()).item() - 1)
        for weight in layer.parameters():
            if weight.ndim > 1:
                weight.mul_(factor**0.5)
    return DecoderRunner(model)


def backward_cost(stack: DecoderRunner, tokens: torch.Tensor, repeats: int = 9) -> float:
    """Seconds of a backward through a frozen layer, to its input alone, over seconds of its forward; median."""
    hidden, calls = stack.enter(tokens)
    middle, ratios = len(stack) // 2, []
    for _ in range(repeats + 1):
        begun = time.process_time()
        with torch.no_grad():
            stack.layer(middle, hidden, calls)
        forward = time.process_time() - begun
        leaf = hidden.detach().requires_grad_(True)
        out = stack.layer(middle, leaf, calls)
        begun = time.process_time()
        out.backward(torch.ones_like(out))
        ratios.append((time.process_time() - begun) / forward)
    return statistics.median(ratios[1:])


def row_of(result: SearchResult, seconds: float) -> dict[str, Any]:
    return {
        "segments": " ".join(map(str, result.segments)),
        "kl": result.kl,
        "layer_forwards": result.cost.layer_forwards,
        "layer_backwards": result.cost.layer_backwards,
        "cpu_seconds": seconds,
    }


class Cases:
    """The cases of the result file, and which methods of one are to be run."""

    def __init__(self, file: Path, again: list[str], methods: list[str]) -> None:
        self.file, self.again, self.methods = file, again, methods
        new: dict[str, Any] = {"claim": (__doc__ or "").splitlines()[0], "cases": []}
        self.there = json.loads(file.read_text()) if file.exists() else new

    def at(self, case: dict[str, Any]) -> int:
        """Where a case stands, or would."""
        keys = [tuple(each[key] for key in KEYS) for each in [*self.there["cases"], case]]
        return keys.index(keys[-1])

    def found(self, case: dict[str, Any]) -> dict[str, Any]:
        """What methods found of it before."""
        there = self.there["cases"][self.at(case) :]
        return there[0]["methods"] if there else {}

    def lacking(self, case: dict[str, Any], methods: tuple[str, ...]) -> tuple[str, ...]:
        """Those of its methods that are to be run."""
        before = self.found(case)
        methods = tuple(m for m in methods if m in (self.methods or methods))
        return tuple(m for m in methods if (m in self.again and m in before if self.again else m not in before))

    def keep(self, case: dict[str, Any]) -> None:
        """Keep a case on disk, in its place, with the methods that are done; refuse one of other text than it had."""
        at, case = self.at(case), named(case)
        for old in self.there["cases"][at : at + 1]:
            if text := {name: old[name] for name in ("rows", "window", "data") if old.get(name) != case.get(name)}:
                raise SystemExit(f"error: the case that is there was measured on {text}\nhint: give the same")
            if "backward_over_forward" in old:
                case["backward_over_forward"] = old["backward_over_forward"]
        self.there["cases"][at : at + 1] = [case]
        command = ["gates.py", "|".join(KINDS)]
        self.there["environment"] = environment() | {"command": command}
        write_text(self.file, compact(named(self.there)))
        print({key: case[key] for key in KEYS}, {name: (row.get("regret"), row["layer_forwards"],
              row["layer_backwards"]) for name, row in case["methods"].items()}, flush=True)  # fmt: skip


def by_methods(
    stack: DecoderRunner, tokens: torch.Tensor, cases: Cases, case: dict[str, Any], methods: tuple[str, ...]
) -> None:
    """What each method finds and spends, kept when it is done, and its regret beside all that were kept."""
    found = dict(cases.found(case))
    length, count, seed, costs = case["length"], case["segments"], case["seed"], dict[tuple[Segment, ...], float]()
    for method in methods:
        takes: dict[str, Any] = {} if method in (*BASELINES, "sleb", "evolution") else {"num_segments": count}
        begun = time.process_time()
        result = search(stack, tokens, n_layers=length, method=method, seed=seed, **takes)
        found[method] = row_of(result, time.process_time() - begun)
        if result.gate:
            first = " ".join(map(str, result.gate.proposed[0]))
            found["clp-uncut"] = {"segments": first, "cpu_seconds": None, "layer_forwards": 0, "layer_backwards": 0}
        if method == "exhaustive":
            costs = {each.segments: each.kl for each in result.candidates}
        cases.keep(case | {"methods": found})
    # what no sweep has cut is cut in one, so that equal sets have equal costs
    sets = {name: joined_segments(i for text in row["segments"].split() for i in range(*map(int, text.split(":"))))
            for name, row in found.items()}  # fmt: skip
    if not costs.keys() >= {*sets.values()}:
        costs |= {c.segments: c.kl for c in set_costs(stack, tokens, sets.values(), Cost())}
    best = costs[sets["exhaustive"]] if "exhaustive" in sets else min(costs[cuts] for cuts in sets.values())
    for name, row in found.items():
        row |= {"kl": costs[sets[name]], "regret": costs[sets[name]] / best}
    cases.keep(case | {"methods": found})


def of_families(args: argparse.Namespace) -> None:
    """One segment, or two, of random stacks; the sweep, or all sets, says what the best is."""
    count = 2 if args.what == "pairs" else 1
    for seed, layers in product(range(args.seeds), (12, 24) if count == 2 else (12, 24, 40)):
        for family, ratio in product(FAMILIES, args.ratios):
            case = {"kind": args.what, "model": family, "layers": layers, "ratio": ratio, "seed": seed}
            if asked := args.cases.lacking(case, ALONE):
                stack = rugged(family, layers, seed)
                tokens = torch.randint(128, (64, 32), generator=torch.Generator().manual_seed(seed))
                length = layers_to_remove(ratio, layers)
                by_methods(stack, tokens, args.cases, case | {"length": length, "rows": 64, "segments": count}, asked)


def of_model(args: argparse.Namespace) -> None:
    """One segment, or several, of a real model."""
    count = {"one": 1, "two": 2, "several": 3}[args.what]
    model = open_model(args.model)
    stack = DecoderRunner(model.model)
    backward = None
    for seed in range(args.seeds):
        text = blocks(model, args.data, args.tokens, args.window, seed)
        for ratio in args.ratios:
            name = Path(model.checkpoint.name).name
            case = {"kind": args.what, "model": name, "layers": len(stack), "ratio": ratio, "seed": seed}
            if asked := args.cases.lacking(case, ALONE + BASELINES if count == 1 else SEVERAL):
                backward = backward or backward_cost(stack, text.tokens[:2])
                length = layers_to_remove(ratio, len(stack))
                by_methods(stack, text.tokens, args.cases, case | {
                    "length": length, "rows": len(text.tokens), "window": args.window, "data": args.data,
                    "segments": count, "backward_over_forward": backward,
                }, asked)  # fmt: skip


PLANTED = ((30, (Segment(13, 16),)), (80, (Segment(37, 45),)), (126, (Segment(60, 73),)))
DEEP = (
    (80, (Segment(11, 15), Segment(37, 38), Segment(52, 59))),
    (80, (Segment(11, 15), Segment(37, 38), Segment(52, 59), Segment(70, 73))),
    (126, (Segment(9, 12), Segment(60, 68), Segment(101, 107))),
)


def of_deep(args: argparse.Namespace) -> None:
    """Stacks in which a set is planted, which may not be the best; of several segments all sets are too many to cut."""
    for seed, (layers, planted) in product(range(args.seeds), PLANTED if args.what == "planted" else DEEP):
        length, count = sum(map(len, planted)), len(planted)
        case = {"kind": args.what, "model": "llama", "layers": layers, "ratio": length / layers, "seed": seed}
        if asked := args.cases.lacking(case, ALONE if count == 1 else ALONE[:3]):
            stack = rugged("llama", layers, seed, planted)
            tokens = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(seed))
            by_methods(stack, tokens, args.cases, case | {
                "length": length, "rows": 8, "segments": count, "planted": " ".join(map(str, planted)),
                "planted_kl": set_costs(stack, tokens, [planted], Cost())[0].kl,
                "sleb_layer_forwards": sleb_work(length, layers, 8),
            }, asked)  # fmt: skip


KINDS = {
    "families": of_families, "pairs": of_families, "one": of_model, "two": of_model, "several": of_model,
    "planted": of_deep, "deep": of_deep,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(KINDS))
    parser.add_argument("--model", default=None, help="Hub id, folder or .gguf; the demo's SmolLM2 where not given")
    parser.add_argument("--data", default="python-docstrings")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--again", nargs="+", default=[], choices=sorted({*ALONE, *BASELINES, *SEVERAL}))
    parser.add_argument("--methods", nargs="+", default=[], help="these alone")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULTS / "gates.json")
    args = parser.parse_args()
    args.cases = Cases(args.out, args.again, args.methods)
    KINDS[args.what](args)


if __name__ == "__main__":
    main()
