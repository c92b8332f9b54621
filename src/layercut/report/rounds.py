"""What a run in several rounds found, and what its budgets allowed, in numbers safe to print and in plain words.

Beside `report/survival.py` under `report/verdicts.py`, at the end of the journey. Reads search.json and heal.json of
several rounds and frontier.json; what is not there is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layercut.errors import ConfigError
from layercut.files.sizes import parse_bytes
from layercut.report.formatting import figure, finite, items, layer_names, number, part, percent, signed, size, spans
from layercut.report.thresholds import Verdict


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """What one round did."""

    number: int
    """From 1."""
    removed: str
    """Layers that this round removed, in the dense model's numbers."""
    kl: float | None
    """KL(p || q) of its cut, before it is healed; None where it was not priced."""
    tokens: float | None
    """Tokens tuned on."""
    before: float | None
    """Held-out loss where tuning began."""
    after: float | None
    """The least held-out loss, whose state is kept."""


def round_rows(search: dict[str, Any], heal: dict[str, Any]) -> list[RoundRow]:
    """A row for each round that was kept; none of a run that was not in rounds."""
    rows, gone, tunings = [], set[int](), items(heal, "rounds")
    for index, found in enumerate(map(part, items(search, "rounds"))):
        now = {i for start, stop in spans(found.get("segments")) for i in range(start, stop)}
        tuning = part(tunings[index]) if index < len(tunings) else {}
        losses = [loss for point in items(tuning, "heldout") if (loss := finite(part(point).get("loss"))) is not None]
        prices = [finite(part(candidate).get("kl")) for candidate in items(found, "candidates")[:1]]
        rows.append(
            RoundRow(
                number=index + 1,
                removed=layer_names(_runs(now - gone)),
                kl=prices[0] if prices else None,
                tokens=finite(tuning.get("tokens")),
                before=losses[0] if losses else None,
                after=min(losses, default=None),
            )
        )
        gone = now
    return rows


def _runs(layers: set[int]) -> list[list[int]]:
    """{2, 3, 7} -> [[2, 4], [7, 8]]"""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return runs


def rounds_verdict(search: dict[str, Any], heal: dict[str, Any]) -> Verdict | None:
    """Whether tuning healed something in every round; None of a run that was not in rounds."""
    rows = round_rows(search, heal)
    if not rows:
        return None
    removed = "; ".join(f"{row.number}: layers {row.removed or 'none'}" for row in rows)
    text = f"{len(rows)} {'round' if len(rows) == 1 else 'rounds'} ({removed})"
    tuned = [(row.number, row.before, row.after) for row in rows if row.before is not None and row.after is not None]
    if len(tuned) < len(rows):
        return Verdict("open", "Rounds", f"{text}; not every round has held-out losses on record.")
    losses = ", ".join(f"{figure(before)} → {figure(after)}" for _, before, after in tuned)
    failed = [str(n) for n, before, after in tuned if after >= before]
    if failed:
        text += f"; held-out loss {losses}: tuning did not help in round {', '.join(failed)}."
        return Verdict("bad", "Rounds", text)
    return Verdict("good", "Rounds", f"{text}; tuning lowered the held-out loss in each: {losses}.")


# ---- the frontier ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One state of the model that was measured: how large, how much worse."""

    layers: int
    bits: int
    bytes: float
    rise: float
    """Of perplexity over the dense model's, as a share; may be inf or nan."""
    chosen: bool
    fits: bool
    """Inside every budget that was given."""

    @property
    def words(self) -> str:
        return f"{self.layers} layers at {self.bits} bits, {size(self.bytes)}, perplexity {signed(self.rise)}"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """frontier.json, with its budgets as numbers."""

    points: list[FrontierPoint]
    size: float | None
    """Bytes allowed; None: no such budget."""
    loss: float | None
    """Rise of perplexity allowed, a share; None: not known."""

    @property
    def small(self) -> list[FrontierPoint]:
        return [p for p in self.points if self.size is None or p.bytes <= self.size]

    @property
    def good(self) -> list[FrontierPoint]:
        return [p for p in self.points if self.loss is None or p.rise <= self.loss]


def read_frontier(found: dict[str, Any]) -> Frontier | None:
    """frontier.json as it can be used; None where it holds no point."""
    budgets, choice = part(found, "budgets"), part(found, "chosen")
    loss, target = finite(budgets.get("max_loss")), budgets.get("target_size")
    try:
        allowed = float(parse_bytes("--target-size", str(target))) if target is not None else None
    except ConfigError:
        allowed = None
    points = []
    for row in map(part, items(found, "points")):
        layers, bits = row.get("layers"), row.get("bits")
        weight, rise = finite(row.get("bytes")), number(row.get("rise"))
        if type(layers) is not int or type(bits) is not int or weight is None or rise is None:
            continue
        fits = (allowed is None or weight <= allowed) and (loss is None or rise <= loss)
        chosen = (choice.get("layers"), choice.get("bits")) == (layers, bits)
        points.append(FrontierPoint(layers=layers, bits=bits, bytes=weight, rise=rise, chosen=chosen, fits=fits))
    return Frontier(points=points, size=allowed, loss=loss) if points else None


def budgets_verdict(frontier: Frontier | None) -> Verdict | None:
    """Whether the budgets were met, and by what; None where there was none."""
    if frontier is None or frontier.loss is None:
        return None
    within = f"within {percent(frontier.loss)}"
    smallest = min(frontier.good, key=lambda p: (p.bytes, p.rise), default=None)
    if frontier.size is None:
        return _one_budget(frontier, smallest, within)
    both = f"{size(frontier.size)} and {percent(frontier.loss)}"
    choice = next((p for p in frontier.points if p.chosen), None)
    if choice:
        text = f"{choice.words} on held-out text: inside {both}"
        if smallest == choice:
            text += f", and the smallest seen {within}"
        elif smallest:
            text += f". The smallest seen {within}: {smallest.words}"
        return Verdict("good", "Budgets", f"{text}.")
    misses = []
    if smallest:
        misses.append(f"the smallest {within} ({smallest.words}) is {size(smallest.bytes - frontier.size)} too large")
    least = min((p for p in frontier.small if p.rise == p.rise), key=lambda p: p.rise, default=None)
    if least:
        misses.append(f"the best of that size ({least.words}) is {over(least.rise, frontier.loss)} over the loss")
    tiniest = size(min(p.bytes for p in frontier.points))
    missed = "; ".join(misses) or f"nothing seen keeps either; the smallest is {tiniest}"
    return Verdict("bad", "Budgets", f"nothing seen is inside both {both}: {missed}.")


def _one_budget(frontier: Frontier, smallest: FrontierPoint | None, within: str) -> Verdict:
    """Of a budget of loss alone; a round beyond it was undone."""
    assert frontier.loss is not None
    beyond = [p for p in frontier.points if not p.fits]
    if smallest is None:
        least = min(frontier.points, key=lambda p: p.rise if p.rise == p.rise else float("inf"))
        missed = over(least.rise, frontier.loss)
        return Verdict("bad", "Budgets", f"nothing seen is {within}: {least.words}, {missed} over it.")
    text = f"the smallest seen {within}: {smallest.words} on held-out text"
    if beyond:
        missed = over(beyond[-1].rise, frontier.loss)
        text += f". One more round ({beyond[-1].words}) was {missed} over it and was undone"
    return Verdict("good", "Budgets", f"{text}.")


def over(rise: float, budget: float) -> str:
    """By how many points of per cent a rise exceeds a budget."""
    found = finite(rise)
    return "beyond measure" if found is None else f"{100 * (found - budget):,.1f} points"
