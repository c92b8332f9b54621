"""A plan to read: parameters, stages, where it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from layercut.files.sizes import size


def tables(plan: dict[str, Any]) -> Iterator[RenderableType]:
    """Title, sizes, stages and fits, to be printed one after the other."""
    layers, where = plan["layers"], ", ".join(f"{a}:{b}" for a, b in plan["segments"])
    wider = f", computed in {plan['computed_in']}" if plan["computed_in"] != plan["dtype"] else ""
    yield (
        f"{plan['model']}: {layers['before']} -> {layers['after']} layers, {plan['dtype']}{wider}, {plan['device']}; "
        + (f"segment {where} ({plan['segments_are']})" if where else plan["segments_are"])
    )
    yield _sizes(plan)
    yield _stages(plan)
    if plan["search_is"]:
        yield plan["search_is"]
    yield _fits(plan)
    export = plan["stages"]["export"]
    if export["least_bytes"] < export["peak_bytes"]:
        yield f"Where less is free, the export is verified from disk, with {size(export['least_bytes'])}."
    yield f"Loading for an accelerator takes {size(plan['host_bytes'])} of the CPU's memory, beside mapped files."


def _sizes(plan: dict[str, Any]) -> Table:
    table = Table("", "before", "after", title="Size", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    parameters, saved = plan["parameters"], plan["bytes"]
    ends = ("before", "after")
    table.add_row("parameters", *(f"{parameters[end]['total']:,}" for end in ends))
    table.add_row("  embedding", *(f"{parameters[end]['embedding']:,}" for end in ends))
    table.add_row("  one layer", *(_spread(parameters[end]["layers"]) for end in ends))
    head = [("tied to the embedding" if parameters[end]["tied"] else f"{parameters[end]['head']:,}") for end in ends]
    table.add_row("  head", *head)
    table.add_row("  other", *(f"{parameters[end]['other']:,}" for end in ends))
    for name in saved["before"]:
        words = {"saved": "saved", "asked": "  as asked"}.get(name, f"  in {name}")
        table.add_row(words, *(size(saved[end][name]) for end in ends))
    kv = plan["kv_bytes_per_token"]
    table.add_row("cache, a token", *("?" if kv[end] is None else f"{kv[end]:,} B" for end in ends))
    if set(plan["caches"]["before"]) != {"full"}:
        kinds = [", ".join(f"{n} {kind}" for kind, n in plan["caches"][end].items()) for end in ends]
        table.add_row("  layers by cache", *kinds)
    return table


def _spread(layers: list[int]) -> str:
    least, most = min(layers), max(layers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _stages(plan: dict[str, Any]) -> Table:
    table = Table("stage", "peak memory", "most of it", "operations", "time", title="Stages", title_justify="left")
    for i in (1, 3, 4):
        table.columns[i].justify = "right"
    for name, stage in plan["stages"].items():
        flops = "?" if stage["flops"] is None else f"{stage['flops'] / 1e12:,.2f} T" if stage["flops"] else ""
        largest = max(stage["parts"], key=stage["parts"].get)
        table.add_row(name, size(stage["peak_bytes"]), largest, flops, duration(stage["seconds"]))
    table.add_row("all", "", "", "", duration(plan["seconds"]))
    return table


def _fits(plan: dict[str, Any]) -> Table:
    table = Table("where", "needs", "for", "fits", "with", title="Where it fits", title_justify="left")
    table.columns[1].justify = "right"
    for fit in plan["fits"]:
        place = fit["target"]
        if fit["devices"] > 1:
            how = "spread over all, by torchrun; each needs"
            how = "layers placed over all; the fullest needs" if fit["one_process"] else how
            place += " (one is used)" if fit["devices_used"] == 1 else f" ({how})"
        advice = fit["why"] or " ".join(fit["flags"]) or ("these settings" if fit["fits"] else "")
        verdict = "yes" if fit["fits"] else "no" if fit["flags"] is None else "no, but"
        table.add_row(place, size(fit["needs_bytes"]), fit["stage"], verdict, advice)
    return table


def duration(seconds: float | None) -> str:
    """Seconds, minutes, hours or days."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
