"""Whether L-BFGS finds more than the turns of the fold behind norms: from where they end, and from the start.

    python research/after_turns.py [TEXT MODELS]

Ten random draws of either norm in float64, ridge 0.1, to convergence. With TEXT and MODELS, the folder that
`stand_ins.py --models` kept, folds of three cuts of each normalised stand-in, with L-BFGS in float32 after the
turns, or more turns instead. Writes research/results/after_turns.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import common
import family_census  # noqa: F401  puts the tests on the path
import stand_ins
from layercut.healing import fold_, least_squares, normalised
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "healing"))
import test_fold_behind_norms as reference  # type: ignore[import-not-found]  # isort: skip

RESULT = Path(__file__).resolve().parent / "results" / "after_turns.json"
WAYS = {"6 turns": (6, 0), "10 turns": (10, 0), "16 turns": (16, 0), "6 turns, 10 of L-BFGS": (6, 10)}
"""Turns, and iterations of L-BFGS after them."""


def draws(*, centred: bool) -> list[dict[str, float]]:
    """Of each draw the sum where all end, as a share of that at the start."""
    found = []
    for seed in range(10):
        turns = reference.random_turns(centred=centred, seed=seed)
        start, fit, _ = least_squares.sums_of_turns(turns)
        pull = 0.1 * fit.zz.diagonal().mean().item()
        began = [each.x for each in turns.branches], [each.gain for each in turns.branches]
        path = turns.solve_(fit.factored(0.1), pull, start, steps=150)
        ended = [each.x for each in turns.branches], [each.gain for each in turns.branches]
        sums = path[-1], reference.by_lbfgs(turns, *ended, pull), reference.by_lbfgs(turns, *began, pull)
        found.append(
            dict(zip(("turns", "turns, then L-BFGS", "L-BFGS"), (each / path[0] for each in sums), strict=True))
        )
    return found


def sum_of(turns: Any, xs: list[torch.Tensor], gains: list[torch.Tensor]) -> torch.Tensor:
    """The squared errors of the tokens to fit, in float32."""
    total = torch.zeros(())
    for batch in turns.batches():
        z, out, wanted, *inputs = (each[~batch.held] for each in (batch.z, batch.out, batch.wanted, *batch.inputs))
        gap = wanted - out
        for branch, u, x, gain in zip(turns.branches, inputs, xs, gains, strict=True):
            norm = branch.norm
            before, after = norm.normal(u)[0], norm.normal(u + z[:, branch.columns] @ (x / branch.metric.float()))[0]
            gap = gap - norm.factor * (gain * after - norm.gain * before)
        total = total + (gap.square().sum(-1) / wanted.square().mean(-1)).sum()
    return total


def go_on_(turns: Any, pull: float, iterations: int) -> None:
    """L-BFGS on X and g from where the turns ended, kept where it leaves less on rows kept out."""
    xs, gains = ([getattr(each, part).float() for each in turns.branches] for part in ("x", "gain"))
    parameters = [each.requires_grad_() for each in (*xs, *gains)]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum_of(turns, xs, gains) + pull * torch.stack([x.square().sum() for x in xs]).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    before = [(each.x, each.gain) for each in turns.branches]
    for branch, x, gain in zip(turns.branches, xs, gains, strict=True):
        branch.x, branch.gain = x.detach().double(), gain.detach().double()
    if (left := turns.measure().left[1]) < turns.least:
        turns.least = left
        return
    for branch, (x, gain) in zip(turns.branches, before, strict=True):
        branch.x, branch.gain = x, gain


def on_stand_ins(text: Path, models: Path) -> list[dict[str, Any]]:
    """KL after the fold over KL after the cut, and seconds, by family, cut and way."""
    rows = stand_ins.tokenized(text)
    unseen, found = rows[len(rows) * 9 // 10 :], list[dict[str, Any]]()
    half, real = min(128, len(unseen) // 2), normalised.Alternation.solve_
    for family in ("Gemma-3", "OLMo-2"):
        model = transformers.AutoModelForCausalLM.from_pretrained(models / family, dtype=torch.float32).eval()
        dense = DecoderRunner(model.requires_grad_(False))
        for segment in (Segment(1, 3), Segment(3, 5), Segment(5, 7)):
            for way, (most, more) in WAYS.items():

                def solve_(turns: Any, solve: Any, pull: float, *rest: Any, most: int = most, more: int = more) -> Any:
                    path = real(turns, solve, pull, rest[0], most)
                    if more:
                        go_on_(turns, pull, more)
                    return path

                normalised.Alternation.solve_ = solve_  # type: ignore[method-assign, assignment]
                student, began = cut(model, [segment]), time.process_time()
                folded: Any = fold_(student, dense, unseen[:half], heldout=unseen[half : half + 64])
                share = folded.kl_after / folded.kl_before
                seconds = round(time.process_time() - began, 1)
                found.append({"family": family, "removed": str(segment), "way": way, "kl": share, "seconds": seconds})
                print(found[-1], flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if len(sys.argv) > 1:
        result["stand-ins"] = on_stand_ins(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        normalised.ENOUGH = 0.0
        result |= {"RMSNorm": draws(centred=False), "LayerNorm": draws(centred=True)}
    RESULT.write_text(common.compact(result), encoding="utf-8")


if __name__ == "__main__":
    main()
