"""Stage: every token of a run, drawn before anything else; an artefact for each use, so that a command draws what it
needs and a later one goes on with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from layercut.config import CompressConfig
from layercut.data import split_mix
from layercut.workbench import Workbench

FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""

Use = Literal["calibration", "heldout", "tuning", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is drawn for one use."""

    source: str
    tokens: int
    skip: int = 0
    """Blocks of the source that other uses have."""
    as_written: bool = False
    """In the order of the source and without a chat template, as reported perplexities need it."""


def uses(config: CompressConfig, until: str) -> list[Use]:
    """What text a run needs as far as it goes: "search", "tune" or "report"."""
    heal, heals = config.heal, until != "search"
    wanted: dict[Use, bool] = {
        "calibration": True,
        "heldout": config.search.score == "folded" or (heals and (heal.fold or heal.tune_tokens > 0)),
        "tuning": heals and heal.tune_tokens > 0,
        "evaluation": until == "report",
    }
    return [use for use, is_wanted in wanted.items() if is_wanted]


def asked(config: CompressConfig, use: Use) -> Asked:
    """What to draw for a use. Blocks of one source never overlap: calibration, then held-out, then tuning."""
    text, heal = config.text, config.heal
    if use == "calibration":
        return Asked(source=text.data, tokens=text.tokens)
    if use == "evaluation":
        return Asked(source=config.evaluate.eval_data, tokens=config.evaluate.eval_tokens, as_written=True)
    source = heal.tune_data or text.data
    shared = set(split_mix(source)) & set(split_mix(text.data))
    skip = math.ceil(text.tokens / text.window) if shared else 0
    heldout = max(FEWEST_HELD_OUT, heal.tune_tokens // HELD_OUT_SHARE)
    if use == "heldout":
        return Asked(source=source, tokens=heldout, skip=skip)
    return Asked(source=source, tokens=heal.tune_tokens, skip=skip + math.ceil(heldout / text.window))


def inputs(work: Workbench, use: Use) -> list[Any]:
    """All that decides which tokens are drawn for a use."""
    text, wanted = work.config.text, asked(work.config, use)
    return [work.source, text.window, text.seed, text.chat_template, asdict(wanted)]


def draw(work: Workbench, use: Use) -> dict[str, Any]:
    """Draw the blocks of one use."""
    wanted = asked(work.config, use)
    order = {"order": "as written", "chat_template": False} if wanted.as_written else {}
    blocks = work.draw(wanted.source, wanted.tokens, skip=wanted.skip, **order)
    work.save({use: blocks.tokens}, f"tokens-{use}")
    work.__dict__.pop("blocks", None)
    return blocks.facts() | {"files": [f"tokens-{use}.safetensors"]}
