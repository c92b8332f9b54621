"""What `layercut plan` prints: sizes, stages, where it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from layercut.files import size

ENDS = ("before", "after")


def tables(plan: dict[str, Any]) -> Iterator[RenderableType]:
    layers, where = plan["layers"], ", ".join(f"{a}:{b}" for a, b in plan["segments"])
    wider = f", computed in {plan['computed_in']}" if plan["computed_in"] != plan["dtype"] else ""
    yield (
        f"{plan['model']}: {layers['before']} -> {layers['after']} layers, {plan['dtype']}{wider}, {plan['device']}; "
        + (f"segment {where} ({plan['segments_are']})" if where else plan["segments_are"])
    )
    if where:
        yield f"healing: {_healing(plan['healing'])}"
    sizes, parameters = Table("", *ENDS, title="Size", title_justify="left"), plan["parameters"]

    def row(words: str, figure: Any) -> None:
        sizes.add_row(words, *(str(figure(parameters[end])) for end in ENDS))

    row("parameters", lambda parts: f"{parts['total']:,}")
    row("  embedding", lambda parts: f"{parts['embedding']:,}")
    row("  one layer", lambda p: " to ".join(f"{n:,}" for n in sorted({min(p["layers"]), max(p["layers"])})))
    row("  head", lambda parts: "tied to the embedding" if parts["tied"] else f"{parts['head']:,}")
    row("  other", lambda parts: f"{parts['other']:,}")
    for name in plan["bytes"]["before"]:
        words = {"saved": "saved", "asked": "  as asked", "gguf": "GGUF file"}.get(name, f"  in {name}")
        sizes.add_row(words, *(size(plan["bytes"][end][name]) for end in ENDS))
    row("cache, bytes a token", lambda parts: parts["kv_bytes_per_token"] or "?")
    row("  layers by cache", lambda parts: ", ".join(f"{n} {kind}" for kind, n in parts["caches"].items()))
    yield sizes

    heads = ("stage", "peak memory", "most of it", "operations", "time, estimated")
    stages = Table(*heads, title="Stages", title_justify="left")
    for name, stage in plan["stages"].items():
        flops = "?" if stage["flops"] is None else f"{stage['flops'] / 1e12:,.2f} T"
        largest = max(stage["parts"], key=stage["parts"].get)
        stages.add_row(name, size(stage["peak_bytes"]), largest, flops, duration(stage["seconds"]))
    stages.add_row("all", "", "", "", duration(plan["seconds"]))
    yield stages
    if plan["search_is"]:
        yield plan["search_is"]
    if plan["times"]:
        heads = ("--time", "tokens to tune on", "trained", "effort", "planned")
        times = Table(*heads, title="In a time", title_justify="left")
        for one in plan["times"]:
            trained = f"radius {one['radius']}" if one["train"] == "endpoints" else one["train"]
            tokens = f"{one['tune_tokens']:,}" if one["tune_tokens"] is not None else "too short"
            times.add_row(one["time"], tokens, trained, one["effort"] or "", duration(one["seconds"]))
        yield times

    fits = Table("where", "needs", "for", "fits", "with", title="Where it fits", title_justify="left")
    for fit in plan["fits"]:
        used = f" ({'each' if fit['devices_used'] > 1 else 'one is used'})" if fit["devices"] > 1 else ""
        advice = fit["why"] or " ".join(fit["flags"]) or "these settings"
        verdict = "yes" if fit["fits"] else "no" if fit["flags"] is None else "no, but"
        fits.add_row(fit["target"] + used, size(fit["needs_bytes"]), fit["stage"], verdict, advice)
    yield fits


def _healing(found: dict[str, Any]) -> str:
    fold, tuned = found["fold"], len(found["tuned"])
    parts = ["a fold where the layers allow one" if fold is None else f"fold ({fold})" if fold else "no fold"]
    how = "LoRA on" if found["train"] == "lora" else "tuning of"
    return ", ".join([*parts, f"{how} {tuned} layer{'s' * (tuned != 1)}" if tuned else "no tuning"])


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
