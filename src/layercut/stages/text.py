"""Stage: every token of a run, drawn before anything else, and none of it for two uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from layercut import checkpoints
from layercut.chats import render_chat
from layercut.data import Blocks
from layercut.errors import DataError
from layercut.overlap import MOST, shared
from layercut.progress import say
from layercut.remarks import describe_shared
from layercut.sources import SELF
from layercut.workbench import Workbench

FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""
USED = ("calibration", "heldout", "tuning")
"""What is searched, judged and tuned on, and so not reported on."""


def draw_all(work: Workbench) -> dict[str, Any]:
    """Draw evaluation, calibration, held-out and tuning blocks, in this order: the text that is reported on is as it
    is, and what is searched and tuned on gives way to it, document by document."""
    text, heal, reported = work.config.text, work.config.heal, work.config.evaluate
    tune_data, heldout = heal.tune_data or text.data, max(FEWEST_HELD_OUT, heal.tune_tokens // HELD_OUT_SHARE)
    check_template(work.tokenizer)
    reader = work.reader(text.data, tune_data, reported.eval_data)
    drawn = {
        "evaluation": reader.draw(
            "evaluation", reported.eval_data,
            tokens=reported.eval_tokens, window=work.reported_window, order="as written",
        )
    }  # fmt: skip
    wanted = {"calibration": (text.data, text.tokens), "heldout": (tune_data, heldout)}
    if heal.tune_tokens:
        wanted["tuning"] = (tune_data, heal.tune_tokens)
    for use, (source, tokens) in wanted.items():
        drawn[use] = reader.draw(use, source, tokens=tokens, window=text.window)
    common = in_common(drawn)
    work.save({use: blocks.tokens for use, blocks in drawn.items()}, "tokens")
    work.save({use: key_tensor(blocks.keys) for use, blocks in drawn.items()}, "documents")
    work.__dict__.pop("blocks", None)
    facts = {use: blocks.facts() for use, blocks in drawn.items()}
    return {"tuning": None, **facts, "shared": common, "files": ["tokens.safetensors", "documents.safetensors"]}


def in_common(drawn: dict[str, Blocks]) -> dict[str, Any]:
    """What the evaluation text has in common with what is searched and tuned on; the documents that were left out.

    DataError where it is too much; or where held-out rows, which decide whether a fold is kept, have too much in
    common with other rows. Of one stream no two uses have the same tokens; what such a text repeats is its own.
    """
    used = [blocks for use, blocks in drawn.items() if use in USED]
    evaluation, heldout = drawn["evaluation"], drawn["heldout"]
    reported = shared([evaluation.tokens], [rows for blocks in used for rows in blocks.rows_by_origin().values()])
    if reported > MOST:
        raise DataError(
            f"{reported:.0%} of the passages of the evaluation text {evaluation.source!r} are also in what would be "
            "searched or tuned on",
            "give --eval-data another text than --data and --tune-data",
        )
    for origin, rows in heldout.rows_by_origin().items():
        others = [
            other
            for blocks in used
            for name, other in blocks.rows_by_origin().items()
            if blocks is not heldout and name != origin
        ]
        if (found := shared([rows], others)) > MOST:
            raise DataError(
                f"{found:.0%} of the passages of the held-out text, from {heldout.source!r}, are also in other text "
                "that would be searched or tuned on",
                "give --tune-data the same text as --data, or one that shares nothing with it",
            )
    keys = frozenset().union(*(blocks.keys for blocks in used))
    return {
        "documents": len(evaluation.keys & keys),
        "passages": reported,
        "passed_over": sum(blocks.passed_over for blocks in drawn.values()),
    }


def check_unseen(folder: Path, blocks: Blocks) -> None:
    """DataError where a text that a finished run is to be evaluated on is one that it was searched or tuned on.

    Told by what was read, by the documents' keys and by passages of the run's own tokens, as far as it has them.
    """
    text = checkpoints.read_json(folder / "text.json")
    names = {read for use in ("calibration", "tuning") for read in (text.get(use) or {}).get("reads", ())}
    tokens, documents = (_tensors(folder / f"{name}.safetensors") for name in ("tokens", "documents"))
    passages = shared([blocks.tokens], [tokens[use] for use in USED if use in tokens])
    keys = blocks.keys & {key for use in USED if use in documents for key in documents[use].tolist()}
    found = {
        "the same source": names & {*blocks.reads} - {SELF},
        f"{len(keys):,} of its documents": len(keys) > MOST * max(1, blocks.documents),
        f"{passages:.0%} of its passages": passages > MOST,
    }
    if told := [what for what, is_shared in found.items() if is_shared]:
        raise DataError(
            f"the run in {folder} was searched or tuned on {' and '.join(told)}: {blocks.source!r} cannot judge it",
            "give --eval-data another text than the run's --data and --tune-data",
        )
    say("evaluate", describe_shared({"documents": len(keys), "passages": passages, "passed_over": 0}))


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file) if file.is_file() else {}


def check_template(tokenizer: Any) -> None:
    """Render a chat by the model's template, where it has one: a template at fault is told before anything is long."""
    if getattr(tokenizer, "chat_template", None):
        render_chat(tokenizer, [{"role": "user", "content": "a word"}], prompt=True)


def key_tensor(keys: frozenset[int]) -> torch.Tensor:
    """Keys of documents, sorted, int64."""
    return torch.tensor(sorted(keys), dtype=torch.int64)


def keys_of(work: Workbench, use: str) -> set[int]:
    """The documents that a use of this run has."""
    return {*load_file(work.run / "documents.safetensors")[use].tolist()}
