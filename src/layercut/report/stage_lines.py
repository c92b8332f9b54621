"""One line about a stage, said when it is done, from its artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layercut.report.formatting import figure, layer_names, percent, signed, size, times


def describe_retention(retained: dict[str, Any]) -> str:
    if retained["mean"] is None:
        return "scored; the dense model has no score on them to retain"
    above = retained["above_chance"]
    rest = "the dense model is not above chance" if above is None else f"{percent(above)} of the score above chance"
    error = "" if retained["error"] is None else f" ± {percent(retained['error'])}"
    of = f"{retained['tasks']} tasks, {retained['items']:,} items"
    return f"{percent(retained['mean'])}{error} of the dense model's score retained over {of}; {rest}"


def describe_shared(common: dict[str, Any]) -> str:
    words = f"{common['documents']:,} documents and {100 * common['passages']:.2f}% of its passages are in other text"
    left_out = common["passed_over"]
    return words + (f"; {left_out:,} documents left out, since they are in another text" if left_out else "")


def describe_shortlist(search: dict[str, Any]) -> str:
    every = search["shortlist"]
    healed = [one for one in every if one.get("healed")]
    longer = ", the closest also after a longer one" if any(one.get("longer") for one in every) else ""
    costs = [
        f"{layer_names(one['segments'])} "
        + ", ".join(figure(one[key]) for key in (("healed", "longer") if healed else ("folded",)) if one.get(key))
        for one in healed or every[:4]
    ]
    how = f"a short healing{longer}" if healed else "a quick fold"
    return f"cost in nats per token after {how}: {'; '.join(costs)} ({len(every)} evaluated)"


def describe_shares(found: dict[str, Any]) -> str:
    points = [
        f"{one['layers']} layers and {one['mean_bits']:.1f} bits {figure(one['folded'] + one['rounded'])}"
        for one in found["points"]
    ]
    return f"{found['layers']} layers are removed; estimated cost in nats per token: {'; '.join(points)}"


def describe_fold(outcome: dict[str, Any]) -> str:
    cut = f"layers {layer_names([outcome['segment']])}"
    if outcome["skipped"]:
        return f"{cut} not folded: {outcome['skipped']}"
    where = f"{cut} into layer {outcome['layer']} {' and '.join(outcome['modules'])}"
    kept = "kept" if outcome["kept"] else "not kept, since it does not help"
    return f"{where}: held-out KL {outcome['kl_before']:.4f} -> {outcome['kl_after']:.4f}, {kept}"


def _losses(tuning: dict[str, Any], unchanged: str) -> str:
    losses = [point["loss"] for point in tuning["heldout"]]
    start, best = losses[0], min(losses)
    about = f"{tuning['tokens']:,} tokens, {size(tuning['state_bytes'])} of training state"
    return f"{about}: held-out loss {start:.4f} -> {best:.4f}" + ("" if best < start else f"; {unchanged}")


def describe_tuning(tuning: dict[str, Any]) -> str:
    words = _losses(tuning, "it did not help, so the start is kept: try a lower --learning-rate")
    quartered = f"; learning rate quartered {len(tuning['setbacks'])} times" if tuning["setbacks"] else ""
    layers = f"layers {', '.join(map(str, tuning['trained_layers']))}"
    trained = {"all": "all layers", "lora": "LoRA on all layers"}.get(tuning.get("train", ""), layers)
    return f"{trained}, {words}{quartered}"


def describe_quantization(artefact: dict[str, Any]) -> str:
    layers, (before, after) = artefact["layers"], (artefact["bytes"][key] for key in ("before", "after"))
    parts = [f"{len(layers)} weights, {size(before)} -> {size(after)}"]
    if mixture := artefact.get("mixture"):
        zeros = ", with zero points" if artefact["zero_points"] else ""
        kl = figure(mixture["predicted_kl"])
        parts.append(f"{mixture['mean_bits']:.2f} bits a weight on average{zeros}, estimated KL {kl}")
    if known := [row for row in layers if row["output_error"] is not None]:
        ours, rtn = (sum(row[key] for row in known) / len(known) for key in ("output_error", "rtn_output_error"))
        parts.append(f"mean relative output error {ours:.5f} (rounded to nearest: {rtn:.5f})")
    if artefact.get("tests"):
        parts.append(f"calibrated on {artefact['tests']['rows']} rows of probes as well")
    if left := artefact["left"]:
        parts.append(f"{len(left)} matrices stay as they are (first: {left[0]})")
    return "; ".join(parts)


def describe_quantized_tuning(tuning: dict[str, Any]) -> str:
    return f"tuned after rounding on {_losses(tuning, 'it did not help, so the rounded weights are kept')}"


def describe_export(exported: dict[str, Any], folder: Path) -> str:
    how = exported["check"].get("how")
    return f"stock checkpoint, verified in a fresh process{f' ({how})' if how else ''}: {folder}"


def describe_point(point: dict[str, Any]) -> str:
    where = f"{point['layers']} layers at {point['bits']} bits"
    return f"{where}: {size(point['bytes'])}, perplexity {signed(point['rise'])}"


def describe_gguf_check(facts: dict[str, Any]) -> list[str]:
    """What transformers and llama.cpp made of a GGUF file, a line each; a reader that could not is named."""
    again = facts["again"]
    theirs, found = again["llama_cpp"], again["perplexity"]

    def risen(perplexity: float) -> str:
        return f"{times(perplexity / found['model'])} the perplexity of before it was written"

    if not again["read"]:
        lines = ["transformers cannot read this architecture from GGUF, so no weight was compared"]
    else:
        off = f", at most {max(facts['errors'].values()):.2g} off where rounded" if facts["errors"] else ""
        lines = [f"transformers: every weight read back{off}" + (f"; {risen(found['file'])}" if found["file"] else "")]
    if theirs is None:
        return [*lines, "llama.cpp itself has not read it: pip install 'layercut[gguf]'"]
    same = "same token ids" if theirs["same_token_ids"] else "other token ids than the model's own tokenizer"
    lines.append(
        f"llama.cpp ({theirs['version']}) in a fresh process: {risen(theirs['perplexity'])}; logits "
        f"{100 * theirs['logit_error']:.2f}% off, {theirs['greedy']} of {theirs['new_tokens']} greedy tokens agree, "
        f"{same}"
    )
    if speed := theirs.get("speed"):
        both = " -> ".join(figure(speed[model]) for model in ("dense", "compressed"))
        lines.append(f"llama.cpp decodes {both} tokens/s, {times(speed['ratio'])}, {speed['threads']} threads")
    return lines
