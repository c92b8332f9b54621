"""Stage: every token of a run, drawn before anything else."""

from __future__ import annotations

from typing import Any

from layercut.data import split_mix
from layercut.workbench import Workbench

FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""


def draw_all(work: Workbench) -> dict[str, Any]:
    """Draw calibration, tuning and evaluation blocks. Of one source, tuning takes what calibration left."""
    text, heal, draw = work.config.text, work.config.heal, work.draw
    drawn = {"calibration": draw(text.data, text.tokens)}
    tune_data = heal.tune_data or text.data
    # blocks of one source never overlap: calibration, then held-out, then tuning
    skip = len(drawn["calibration"].tokens) if set(split_mix(tune_data)) & set(split_mix(text.data)) else 0
    drawn["heldout"] = draw(tune_data, max(FEWEST_HELD_OUT, heal.tune_tokens // HELD_OUT_SHARE), skip=skip)
    if heal.tune_tokens:
        drawn["tuning"] = draw(tune_data, heal.tune_tokens, skip=skip + len(drawn["heldout"].tokens))
    drawn["evaluation"] = draw(
        work.config.evaluate.eval_data,
        work.config.evaluate.eval_tokens,
        order="as written",
        chat_template=False,
    )
    work.save({use: blocks.tokens for use, blocks in drawn.items()}, "tokens")
    work.__dict__.pop("blocks", None)
    facts = {use: blocks.facts() for use, blocks in drawn.items()}
    return {"tuning": None, **facts, "files": ["tokens.safetensors"]}
