"""One line about a stage, said when it is done. Words alone: what they tell is in the stage's artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layercut.report.formatting import signed, size


def describe_retention(retained: dict[str, Any]) -> str:
    """One line about the tasks."""
    if retained["mean"] is None:
        return "scored; none has a score of which a share could be retained"
    words = f"{retained['mean']:.1%} of the dense model's score retained over {retained['tasks']} tasks"
    above = retained["above_chance"]
    return words + (f", {above:.1%} of what it has above chance" if above is not None else "; it is not above chance")


def describe_shared(common: dict[str, Any]) -> str:
    """One line about what the evaluation text has in common with what is searched and tuned on."""
    words = f"{common['documents']:,} documents and {common['passages']:.2%} of its passages shared with other text"
    left_out = common["passed_over"]
    return words + (f"; {left_out:,} documents left out there, since another use has them" if left_out else "")


def describe_fold(outcome: dict[str, Any]) -> str:
    """One line about a fold."""
    where = "{}:{}".format(*outcome["segment"])
    if outcome["skipped"]:
        return f"{where} not folded: {outcome['skipped']}"
    verdict = "kept" if outcome["kept"] else "not kept, it does not help"
    return (
        f"{where} into layer {outcome['layer']} {' and '.join(outcome['modules'])}: held-out KL "
        f"{outcome['kl_before']:.4f} -> {outcome['kl_after']:.4f}, {verdict}"
    )


def describe_tuning(tuning: dict[str, Any]) -> str:
    """One line about tuning."""
    start, best = tuning["heldout"][0]["loss"], min(point["loss"] for point in tuning["heldout"])
    verdict = "" if best < start else "; it did not help, the start is kept: try a lower --learning-rate"
    if tuning.get("setbacks"):
        verdict = f", the rate quartered {len(tuning['setbacks'])} times{verdict}"
    return (
        f"layers {', '.join(map(str, tuning['trained_layers']))}, {tuning['tokens']:,} tokens, "
        f"{size(tuning['state_bytes'])} of training state: held-out loss {start:.4f} -> {best:.4f}{verdict}"
    )


def describe_quantization(artefact: dict[str, Any]) -> str:
    """One line about quantization."""
    rows, sizes = artefact["layers"], artefact["bytes"]
    errors = [(row["output_error"], row["rtn_output_error"]) for row in rows if row["output_error"] is not None]
    words = f"{len(rows)} weights, {sizes['before']:,} -> {sizes['after']:,} bytes"
    if errors:
        ours, nearest = (sum(column) / len(errors) for column in zip(*errors, strict=True))
        words += f"; mean relative output error {ours:.5f} (rounded to nearest: {nearest:.5f})"
    if artefact["left"]:
        words += f"; {len(artefact['left'])} matrices stay as they are (first: {artefact['left'][0]})"
    return words


def describe_export(exported: dict[str, Any], folder: Path) -> str:
    """One line about the checkpoint."""
    how = exported["check"].get("how")
    return f"stock checkpoint, verified by a fresh process{f' ({how})' if how else ''}: {folder}"


def describe_point(point: dict[str, Any]) -> str:
    """One point of the frontier."""
    return (
        f"{point['layers']} layers at {point['bits']} bits: {size(point['bytes'])}, perplexity {signed(point['rise'])}"
    )


def describe_gguf_check(facts: dict[str, Any]) -> list[str]:
    """What transformers and llama.cpp made of a GGUF file, a line each; who did not read it is named."""
    again, errors = facts["again"], facts["errors"]
    figures, theirs = again["perplexity"], again["llama_cpp"]
    on = f"perplexity on {again['tokens']:,} tokens"
    before = f"before it was written {figures['model']:.4f}"
    if figures["file"] is None:
        lines = [f"transformers cannot read this architecture from GGUF: no weight was compared; {on} {before}"]
    else:
        worst = f", at most {max(errors.values()):.2g} off where rounded" if errors else ""
        lines = [f"transformers: every weight read back{worst}; {on} {figures['file']:.4f}, {before}"]
    if theirs is None:
        return [*lines, "llama.cpp itself has not read it: pip install 'layercut[llamacpp]'"]
    tokenizer = "same token ids" if theirs["same_token_ids"] else "other token ids than the model's own tokenizer"
    agree = f"{theirs['greedy']} of {theirs['new_tokens']} greedy tokens agree"
    return [
        *lines,
        f"llama.cpp ({theirs['version']}) in a fresh process: {on} {theirs['perplexity']:.4f}; "
        f"logits {theirs['logit_error']:.2%} off, {agree}, {tokenizer}",
    ]
