"""One line about a stage, said when it is done; the words are in templates/stage_lines.txt, the facts in artefacts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from layercut.report.templating import words

_say = partial(words, "stage_lines.txt")


def describe_retention(retained: dict[str, Any]) -> str:
    """One line about the tasks."""
    return _say("retention", retained)


def describe_shared(common: dict[str, Any]) -> str:
    """One line about what the evaluation text has in common with what is searched and tuned on."""
    return _say("shared", common)


def describe_tried(search: dict[str, Any]) -> str:
    """One line about the cuts on trial."""
    return _say("tried", search)


def describe_shares(found: dict[str, Any]) -> str:
    """One line about how layers and bits share a size."""
    return _say("shares", found)


def describe_fold(outcome: dict[str, Any]) -> str:
    """One line about a fold."""
    return _say("fold", outcome)


def describe_tuning(tuning: dict[str, Any]) -> str:
    """One line about tuning."""
    return _say("tuning", tuning)


def describe_quantization(artefact: dict[str, Any]) -> str:
    """One line about quantization."""
    return _say("quantization", artefact)


def describe_quantized_tuning(tuning: dict[str, Any]) -> str:
    """One line about what was trained after rounding."""
    return _say("quantized_tuning", tuning)


def describe_export(exported: dict[str, Any], folder: Path) -> str:
    """One line about the checkpoint that was written."""
    return _say("export", exported, str(folder))


def describe_point(point: dict[str, Any]) -> str:
    """One point of the frontier."""
    return _say("point", point)


def describe_gguf_check(facts: dict[str, Any]) -> list[str]:
    """What transformers and llama.cpp made of a GGUF file, a line each; who did not read it is named."""
    lines = [_say("transformers_read", facts), _say("llama_cpp_read", facts["again"])]
    theirs = facts["again"]["llama_cpp"] or {}
    if theirs.get("source_perplexity"):
        sizes, figures = (theirs["source_bytes"], facts["bytes"]), (theirs["source_perplexity"], theirs["perplexity"])
        worse = sizes[1] >= sizes[0] and figures[1] > figures[0]
        lines.append(_say("against_source", {"bytes": sizes, "perplexity": figures, "worse": worse}))
    return lines
