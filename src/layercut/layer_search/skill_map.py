"""The capability map: what the removal of each layer, and of each window of n, does to what the model can do.

One sweep over rows of generated tests (`data/probes.py`) measures every window on every capability, since streams share
what they have in common (`sweep.py`) and a row holds tests of several capabilities. Layers that are cheap on text may
be the ones that hold recall; the map shows which, and the search weighs it (`cut_costs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from layercut.data.probe_families import CAPABILITIES
from layercut.data.probes import ProbeRows, probe_rows
from layercut.distributed import processes, sharding
from layercut.errors import ConfigError, DataError
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import DENSE, Cuts, all_segments, set_costs, set_work, streams_held, sweep
from layercut.layer_search.weighted_rows import check_calibration
from layercut.models.decoder_stack import positions
from layercut.models.losses import as_cost, teacher_of
from layercut.models.runner import DecoderRunner, passes_in_step, prepared
from layercut.plotting import axes_or_new
from layercut.progress import bar
from layercut.segments import Segment

MAP_ROWS, MAP_WINDOW = 32, 256  # rows of generated tests and their tokens: some 8,000. A guess that held on SmolLM2
TEXT = "text"  # the column of plain text, where some is given
HELD_SHARE = 0.5
"""A layer holds a capability where its removal does at least this share of the highest cost that any single layer's
does, the first two and the last left out, which hold everything."""
NAMED = 6  # layers that a sentence names, at most


@dataclass(frozen=True)
class CapabilityMap:
    """Costs by window of layers and by capability."""

    layers: int
    """L."""
    names: tuple[str, ...]
    """The columns: capabilities, and "text" where text was given."""
    costs: dict[tuple[int, int], dict[str, float]]
    """{(start, stop): {name: nats}}: KL(dense || cut) of the cut [start, stop), mean over the answers' tokens of a
    capability; of "text" over all tokens."""
    cost: Cost = field(default_factory=Cost, compare=False)
    """What the sweep spent."""
    left_out: tuple[str, ...] = ()
    """Capabilities of which no test fits a row."""

    def lengths(self) -> list[int]:
        """The lengths of the windows that were measured."""
        return sorted({stop - start for start, stop in self.costs})

    def matrix(self, length: int = 1) -> list[list[float]]:
        """Costs [C, L - length + 1], of every window of a length."""
        return [
            [self.costs[start, start + length][name] for start in range(self.layers - length + 1)]
            for name in self.names
        ]

    def inner(self) -> range:
        """The layers that may be said to hold something: all but the first two and the last, if there are others."""
        return range(2, self.layers - 1) if self.layers > 4 else range(self.layers)

    def holders(self) -> dict[str, list[int]]:
        """Which single layers hold each capability (HELD_SHARE), those that do most first.

        Returns:
            {capability: layers}; text left out. Nothing where layers were not removed one by one.
        """
        found = dict[str, list[int]]()
        for name in self.names if 1 in self.lengths() else ():
            if name != TEXT:
                values = {i: self.costs[i, i + 1][name] for i in self.inner()}
                worst = max(values.values())
                kept = [i for i, value in values.items() if value >= HELD_SHARE * worst] if worst > 0 else []
                found[name] = sorted(kept, key=lambda i: -values[i])
        return found

    def cheap_on_text(self) -> dict[int, float]:
        """The layers without which less is lost on text than without half of the others (`inner`).

        Returns:
            {layer: nats per token of text}; nothing where no text was given, or layers were not removed one by one.
        """
        if TEXT not in self.names or 1 not in self.lengths():
            return {}
        on_text = {i: self.costs[i, i + 1][TEXT] for i in self.inner()}
        middle = median(on_text.values())
        return {i: nats for i, nats in on_text.items() if nats < middle}

    def words(self) -> list[str]:
        """Sentences on which layers hold what, and which of those are cheap on text, where some was given."""
        cheap = self.cheap_on_text()
        said = [f"{name}: none of its probes fits a row" for name in self.left_out]
        for name, layers in self.holders().items():
            if not layers:
                said.append(f"{name}: no layer alone")
                continue
            top, *others = layers[:NAMED]
            line = f"{name}: most at layer {top} ({self.costs[top, top + 1][name]:.2f} nats without it)"
            line += f", then {', '.join(map(str, others))}" * bool(others)
            if of_these := [f"{i} ({cheap[i]:.2f})" for i in layers[:NAMED] if i in cheap]:
                line += f"; cheap on text: {', '.join(of_these)}"
            said.append(line)
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values.

        Returns:
            {"layers", "names", "left_out", "windows": [{"start", "stop", "costs": {name: nats}}, …], "holders",
            "dense_tokens", "layer_forwards"}
        """
        windows = [{"start": a, "stop": b, "costs": dict(row)} for (a, b), row in sorted(self.costs.items())]
        spent = {"dense_tokens": self.cost.dense_tokens, "layer_forwards": self.cost.layer_forwards}
        return {
            "layers": self.layers, "names": list(self.names), "left_out": list(self.left_out), "windows": windows,
            "holders": {name: list(found) for name, found in self.holders().items()}, **spent,
        }  # fmt: skip

    def plot(self, axes: Any = None, length: int | None = None) -> Any:
        """Draw capabilities x windows as a heat map, all by one logarithmic scale.

        Args:
            axes: matplotlib Axes to draw on; new ones of the current pyplot figure where not given.
            length: of the windows; not given, the shortest that were measured.

        Returns:
            The Axes.

        Raises:
            ConfigError: no windows of this length were measured.
        """
        from matplotlib.colors import LogNorm

        length = length or self.lengths()[0]
        if length not in self.lengths():
            measured = ", ".join(map(str, self.lengths()))
            words = f"windows of {length} layers were not measured: there are {measured}"
            raise ConfigError(words, f"length={self.lengths()[0]}")
        axes = axes_or_new(axes, xlabel="layer removed" if length == 1 else f"first of {length} layers removed")
        values = torch.tensor(self.matrix(length), dtype=torch.float64)
        worst = max([1.0, *values[values.isfinite()].tolist()])
        shown = values.nan_to_num(posinf=worst).clamp_min(1e-3)
        image = axes.imshow(shown.numpy(), aspect="auto", cmap="magma_r", norm=LogNorm(1e-2, worst))
        axes.set_yticks(range(len(self.names)), self.names)
        axes.figure.colorbar(image, ax=axes, label="cost, nats per answer token")
        return axes


def capability_map(
    model: Any,
    tokenizer: Any = None,
    *,
    probes: ProbeRows | None = None,
    text: torch.Tensor | None = None,
    lengths: Sequence[int] = (1,),
    window: int | None = None,
    seed: int = 0,
) -> CapabilityMap:
    """What the removal of each window of layers does to each capability, from one sweep.

    Args:
        model: a causal LM of transformers in memory, or a `DecoderRunner` of one.
        tokenizer: its tokenizer, of which the tests are generated.
        probes: rows of tests of the caller's own instead (`probe_rows`).
        text: token ids [N, T] of plain text, for a column beside the capabilities.
        lengths: of the windows; (1,) removes each layer alone, (1, 6) each window of six as well.
        window: tokens in a row of generated tests; None: 256, or as many as the model has positions for.
        seed: of the tests.

    Returns:
        The map.

    Raises:
        DataError: neither a tokenizer nor probes are given, no test fits the window, or `text` is not [N, T].
        ConfigError: a length is below 1, or as many as the layers or more; or there is none.
        ModelError: the layers exchange more than the hidden state, or the dense predictions are not finite.
    """
    if probes is None and tokenizer is None:
        raise DataError("neither a tokenizer nor probes are given", "capability_map(model, tokenizer)")
    with prepared(model) as (stack,):
        if not lengths or not all(0 < n < len(stack) for n in lengths):
            given = ", ".join(map(str, lengths)) or "none"
            raise ConfigError(f"lengths of windows are {given}: allowed are 1 to {len(stack) - 1}", "lengths=(1,)")
        if probes is None:
            window = window or min(MAP_WINDOW, positions(stack.model.config) or MAP_WINDOW)
            probes = probe_rows(tokenizer, rows=MAP_ROWS, window=window, capabilities=tuple(CAPABILITIES), seed=seed)
        probes.check()
        check_calibration(stack, probes.tokens, *([] if text is None else [text]))
        sets = [(segment,) for n in sorted({*lengths}) for segment in all_segments(n, len(stack))]
        cost, rows = Cost(), len(probes.tokens) + (0 if text is None else len(text))
        with bar("capability map", set_work([DENSE, *sets], len(stack), rows)) as advance:
            found = capability_costs(stack, probes, sets, cost, advance=advance)
            if text is not None:
                for candidate in set_costs(stack, text, sets, cost, advance=advance):
                    found[candidate.segments][TEXT] = candidate.kl
        names = (*probes.names, *([] if text is None else [TEXT]))
        costs = {bounds(cuts[0]): found[cuts] for cuts in sets}
        return CapabilityMap(len(stack), names, costs, cost, probes.left_out)


def bounds(segment: Segment) -> tuple[int, int]:
    """(start, stop)."""
    return segment.start, segment.stop


@torch.no_grad()
def capability_costs(
    stack: DecoderRunner,
    probes: ProbeRows,
    sets: Sequence[Cuts],
    cost: Cost,
    *,
    rows: int | None = None,
    advance: Callable[[int], None] = lambda layers: None,
) -> dict[Cuts, dict[str, float]]:
    """The cost of sets of segments to each capability, in one sweep."""
    wanted = [DENSE, *sets]
    of, at = probes.of(), torch.arange(len(probes.tokens))[:, None]
    marked = torch.cat([at, probes.tokens], dim=1)  # the row's number goes along, before its tokens
    sums, spent = torch.zeros(len(sets), len(probes.names), dtype=torch.float64), Cost()
    rows = rows or stack.budget.layer_rows(probes.tokens.shape[1])
    queue = stack.parts("search", passes_in_step(stack, marked, rows, streams_held(wanted, len(stack))))
    for one in queue:
        with queue.trying(one):
            (batches, counts), own = one, Cost()
            found = _costs(stack, probes, sets, batches, own, advance)
            if counts:
                sums += found
                spent += own
    cost.add_(spent)
    processes.sum_(sums)
    tokens_of = torch.bincount(of[of >= 0], minlength=len(probes.names))
    means = (sums / tokens_of).tolist()
    return {
        cuts: {name: as_cost(value, 0.0) for name, value in zip(probes.names, row, strict=True)}
        for cuts, row in zip(sets, means, strict=True)
    }


def _costs(
    stack: DecoderRunner,
    probes: ProbeRows,
    sets: Sequence[Cuts],
    marked: Sequence[torch.Tensor],
    cost: Cost,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """The cost of each set to each capability, summed over the answers of some rows: float64 [C, capabilities].

    marked: the number of each row among the probes, and its tokens [B, 1 + T].
    """
    of, sums = probes.of(), torch.zeros(len(sets), len(probes.names), dtype=torch.float64)
    numbers, tokens = [b[:, 0].tolist() for b in marked], [stack.place(b[:, 1:]) for b in marked]
    ends = sweep(stack, tokens, [DENSE, *sets], cost, advance)
    for b, batch in enumerate(tokens):
        for row, (number, counted) in enumerate(sharding.in_step(stack.model, numbers[b], numbers[b][0])):
            places = (of[number] >= 0).nonzero()[:, 0]
            if not len(places):
                continue
            at, where = min(row, len(batch) - 1), places.to(stack.device)
            shown = batch[at : at + 1, where]
            dense, *others = (ends[cuts][b][at : at + 1] for cuts in (DENSE, *sets))  # maybe on several devices
            teacher = teacher_of(stack, dense[:, where.to(dense.device)], shown)
            kls = [teacher.kl(stack.exit(h[:, where.to(h.device)], shown))[0] for h in others]
            if counted:
                sums.index_add_(1, of[number, places], torch.stack(kls).cpu().double())
    cost.dense_tokens += sum(batch.numel() for batch in tokens)
    return sums
