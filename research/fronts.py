"""What a cloud of measured points says: the smallest size within a loss, the loss at a size, and which way is better.

A point is a dict with `bytes`, `share` (of the dense model's bytes) and `rise` (of perplexity over the dense model's,
by text); its loss is the largest rise of any text. Pure functions, for frontier.py and stage_two.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Point = dict[str, Any]
BUDGETS = (0.01, 0.05, 0.10, 0.25)
SMALLER = 0.8
"""Share of the bytes that is to be saved: the goal, at the first of the budgets."""
AS_PRINTED = 0.0005
"""Shares are told to a tenth of a per cent, so what is smaller by that much less counts as reaching the goal."""
WAYS = ("fewer layers", "fewer bits", "both")


def loss(point: Point) -> float:
    """The largest rise of perplexity over the dense model's on any text, as a share."""
    return max(point["rise"].values())


def way(point: Point) -> str:
    """How a point came to be smaller; "dense" where it is not."""
    cut, rounded = point["ratio"] > 0, point["setting"] != "bf16"
    return ("dense", *WAYS)[cut + 2 * rounded]


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in bytes and loss at once, from the smallest to the largest."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p["bytes"], loss(p))):
        if not best or loss(point) < loss(best[-1]):
            best.append(point)
    return best


def loss_at(points: Sequence[Point], size: float) -> float | None:
    """Loss of a front (as `front` gives it) at so many bytes: ln(1 + loss) on straight lines between its points.

    None below its smallest point. Above its largest one: that one's, since whatever is smaller fits as well.
    """
    if not points or size < points[0]["bytes"]:
        return None
    for small, large in pairwise(points):
        if size < large["bytes"]:
            share = (size - small["bytes"]) / (large["bytes"] - small["bytes"])
            low, high = math.log1p(loss(small)), math.log1p(loss(large))
            return math.expm1(low + share * (high - low))
    return loss(points[-1])


def answers(points: Sequence[Point]) -> dict[str, Any]:
    """Everything asked of points of one set of weights, the dense one among them."""
    dense = next(point for point in points if way(point) == "dense")
    smaller = [point for point in points if point is not dense]
    goal = goal_bytes(dense)
    fronts = {name: front([p for p in smaller if way(p) == name] + [dense] * (name != "both")) for name in WAYS}
    fitting = [p for p in smaller if p["bytes"] <= goal]
    return {
        "smallest_within": {f"{budget:g}": smallest_within(points, budget) for budget in BUDGETS},
        "goal": {
            "bytes": goal,
            "best_that_fits": min(fitting, key=loss, default=None),
            "smallest": min(points, key=lambda p: p["bytes"]),
            "loss_interpolated": loss_at(front(points), goal),
        },
        "equal_bytes": [
            at_size(fronts, share * dense["bytes"]) | {"share": share}
            for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)
        ],
        "words": [words for words in (goal_words(points), *verdicts(fronts)) if words],
    }


def goal_bytes(dense: Point) -> float:
    """The most bytes that are SMALLER, to the digits that are told."""
    return (1 - SMALLER + AS_PRINTED) * dense["bytes"]


def extra_losses(points: Sequence[Point]) -> list[dict[str, Any]]:
    """What each setting of the quantizer costs a cut and healed model, beside what it costs the dense one.

    extra: ln perplexity in few bits minus in 16, nats per token, by text; over_dense: that over the dense model's, None
    where quantizing the dense model cost nothing.
    """
    logs = {(p["ratio"], p["setting"]): {t: math.log(v) for t, v in p["perplexity"].items()} for p in points}

    def extra(ratio: float, setting: str) -> dict[str, float]:
        plain = logs[ratio, "bf16"]
        return {text: value - plain[text] for text, value in logs[ratio, setting].items()}

    found = []
    for ratio, setting in logs:
        if setting != "bf16" and {(ratio, "bf16"), (0, "bf16"), (0, setting)} <= logs.keys():
            ours, dense = extra(ratio, setting), extra(0, setting)
            over = {text: ours[text] / dense[text] if dense[text] > 0 else None for text in ours}
            found.append({"ratio": ratio, "setting": setting, "extra": ours, "over_dense": over})
    return found


def smallest_within(points: Sequence[Point], budget: float) -> Point:
    """The smallest point whose loss is within a budget, of equal ones the best; the dense one always is."""
    return min((p for p in points if loss(p) <= budget), key=lambda p: (p["bytes"], loss(p)))


def at_size(fronts: dict[str, list[Point]], size: float) -> dict[str, Any]:
    return {"bytes": size, "loss": {name: loss_at(points, size) for name, points in fronts.items()}}


def goal_words(points: Sequence[Point]) -> str:
    """How far the goal of 80 % smaller within 1 % is, from either side."""
    dense = next(point for point in points if way(point) == "dense")
    near = smallest_within(points, BUDGETS[0])
    fitting = [p for p in points if p["bytes"] <= goal_bytes(dense)]
    reached = f"Within {BUDGETS[0]:.0%} the model gets {1 - near['share']:.0%} smaller"
    if not fitting:
        least = min(points, key=lambda p: p["bytes"])
        smallest = f"the smallest is {1 - least['share']:.1%} smaller, and perplexity rises by {loss(least):.0%}"
        return f"{reached}, and no point is {SMALLER:.0%} smaller: {smallest} ({named(least)})."
    best = min(fitting, key=loss)
    exactly = 1 - best["bytes"] / dense["bytes"]
    rounded = f" (to a tenth of a per cent; it is {exactly:.2%})" if exactly < SMALLER else ""
    return f"{reached}; at {SMALLER:.0%} smaller{rounded} perplexity rises by {loss(best):.0%} ({named(best)})."


def named(point: Point) -> str:
    return f"{point['layers']} layers, {worded(point['setting'])}"


def worded(setting: str) -> str:
    """A setting of frontier.py as one reads it: "bits=4 embeddings=8 train=scales tokens=16384"."""
    if "=" not in setting:
        return setting
    said = dict(word.split("=") for word in setting.split())
    bits, embeddings = said.pop("bits"), said.pop("embeddings", 16)
    auto = bits == "auto"  # of embeddings too
    words = [f"bits by budget for {said.pop('size')}"] if auto else [f"{bits} bits", f"embeddings {embeddings}"]
    words += ["zero points"] if said.pop("asymmetric", "0") == "1" else []
    words += [f"groups of {said.pop('group')}"] if "group" in said else []
    words += ["to nearest"] if said.get("quantizer") == "rtn" else []
    words += ["rounded on tests too"] if said.pop("rounding_tests", None) else []
    if "train" in said:
        words.append(f"{said.pop('train')} trained on {int(said.pop('tokens')):,} tokens")
        words += [f"{float(said.pop('tests')):.0%} of them tests"] if "tests" in said else []
        words += [f"{said.pop('batch')} a step"] if "batch" in said else []
    return ", ".join([*words, *(f"{name} {value}" for name, value in said.items() if value != "rtn")])


def verdicts(fronts: dict[str, list[Point]]) -> list[str]:
    """Fewer layers against fewer bits, then both against the better of the two alone."""
    layers, bits, both = (fronts[name] for name in WAYS)
    if not any(point["ratio"] for point in (*layers, *both)):
        return ["No model without some layers was measured."]
    found = [duel("fewer bits", bits, "fewer layers", layers), duel("both together", both, "fewer bits alone", bits)]
    if both and bits and both[0]["bytes"] < bits[0]["bytes"]:
        found.append(f"Below {bits[0]['bytes'] / 1e6:.1f} MB, where no bits alone were measured, there is only both.")
    return found


def duel(one: str, ours: Sequence[Point], other: str, theirs: Sequence[Point]) -> str:
    """A sentence on two fronts at equal bytes: at the sizes of either's points that both of them reach."""
    sizes = sorted({point["bytes"] for point in (*ours, *theirs) if way(point) != "dense"})
    seen = [(size, loss_at(ours, size), loss_at(theirs, size)) for size in sizes]
    known = [(size, a, b) for size, a, b in seen if a is not None and b is not None]
    if not known:
        return f"At no size can {one} be compared with {other}."
    won = [row for row in known if row[1] < row[2]]
    lost = [row for row in known if row[1] > row[2]]
    between = f"{known[0][0] / 1e6:.0f} and {known[-1][0] / 1e6:.0f} MB"
    if len(won) == len(known):
        verdict = f"{one} cost less than {other} at every one of {len(known)} sizes between {between}"
    elif len(lost) == len(known):
        verdict = f"{other} cost less than {one} at every one of {len(known)} sizes between {between}"
    else:
        verdict = f"{one} cost less than {other} at {len(won)} of {len(known)} sizes between {between}"
    size, a, b = max(known, key=lambda row: abs(math.log1p(row[1]) - math.log1p(row[2])))
    most = f"most at {size / 1e6:.0f} MB, by {a:.1%} against {b:.1%} in perplexity"
    return f"At equal bytes {verdict}; they differ {most}."
