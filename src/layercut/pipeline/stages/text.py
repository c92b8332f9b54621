"""Stage: every token of a run, drawn before anything else, and none of it for two uses.

An artefact for each use, so that a command draws what it needs and a later one continues from it. Text that is reported
on is drawn first and as it is; its documents are left out of what is searched and tuned on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from layercut import evaluation
from layercut.config.commands import CompressConfig
from layercut.data.blocks import Blocks, Marks, Reader, TextFacts, stored_blocks, stored_marks
from layercut.data.chat_templates import prompt_ids
from layercut.data.probe_families import EDITION
from layercut.data.sources import CHATS, MADE_ANEW, SELF, TESTS, has, share_of, split_mix, what_is_read
from layercut.data.text_overlap import MOST, MOST_WORDS, shared, shared_words
from layercut.errors import ConfigError, DataError
from layercut.files import digest, read_json
from layercut.models import decoder_stack, layer_reader
from layercut.pipeline.artefacts import SharedText
from layercut.pipeline.run_context import RunContext
from layercut.progress import say
from layercut.report.stage_lines import describe_shared

FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""
ANSWER_WEIGHT = 4.0
"""What a token of a probe's answer counts in the loss while layers beside the cut are trained, of copies excepted."""
Use = Literal["evaluation", "calibration", "heldout", "tuning"]
USED: tuple[Use, ...] = ("calibration", "heldout", "tuning")
"""What is searched, judged and tuned on, and so not reported on; in the order in which they are drawn."""


def uses(config: CompressConfig, until: str) -> list[Use]:
    """What text a run needs, in the order in which it is drawn."""
    heal, heals = config.heal, until != "search"
    wanted: dict[Use, bool] = {
        "evaluation": until == "report",
        "calibration": True,
        "heldout": config.shares_size or (heals and (heal.fold or heal.tokens > 0)),
        "tuning": heals and heal.tokens > 0,
    }
    return [use for use, is_wanted in wanted.items() if is_wanted]


def text_wanted(work: RunContext, use: Use, chats: bool = True) -> dict[str, Any]:
    """What to draw for a use, by the names of `Reader.draw`."""
    text, heal, reported = work.config.text, work.config.heal, work.config.evaluate
    if use == "evaluation":  # as written, and without a chat template, as reported perplexities need it
        window = reported.eval_window or decoder_stack.reported_window(work.architecture)
        return {
            "source": reported.eval_data, "tokens": reported.eval_tokens, "window": window, "order": "as written"
        }  # fmt: skip
    tokens, window = {
        "calibration": (text.tokens, text.window),
        "heldout": (max(FEWEST_HELD_OUT, heal.tokens // HELD_OUT_SHARE), text.window),
        "tuning": (heal.tokens, heal.tune_window or text.window),
    }[use]
    source = text.data if use == "calibration" else tuning_source(work, chats)
    return {"source": source, "tokens": tokens, "window": window, "order": "shuffled"}


def tuning_source(work: RunContext, chats: bool) -> str:
    """The text that is tuned on, with its shares of probes and of chats, where these fit a row and are not in it yet.

    Where the shares that are named leave no room for one, it is left out.
    """
    heal, preserves = work.config.heal, work.config.search.preserve != "none"
    named = heal.tune_data or work.config.text.data
    shares = [share_of(part) for part in split_mix(named)]
    room = 1 - sum(share or 0 for share in shares) if None in shares else 0
    wanted = {
        TESTS: heal.probe_share * (preserves and work.probes_fit),
        CHATS: heal.chat_share * (chats and heal.tokens > 0 and work.chats_fit),
    }
    added = dict[str, float]()
    for name, share in wanted.items():
        if share and not has(named, name) and sum(added.values()) + share < room:
            added[name] = share
    return "+".join([named, *(f"{name}:{added[name]:g}" for name in (CHATS, TESTS) if name in added)])


# --- how the rows to tune on are done ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How the rows to tune on are done, as `tune_` takes it by these names."""

    row_lengths: torch.Tensor | None  # int64 [N]; None where all are done whole
    token_weights: torch.Tensor | None  # float32 [N, T]; None where every token counts alike
    answers: torch.Tensor | None = None
    """bool [N, T]: of probes, whose own tokens are taught, since they are right where the dense model may not be."""

    @classmethod
    def as_drawn(
        cls,
        rows: torch.Tensor,
        origins: Sequence[str],
        marks: Marks | None,
        *,
        short: int | None,
        answer_weight: float = ANSWER_WEIGHT,
    ) -> Treatment:
        """What a run does with rows of text and probes."""
        lengths = None if short is None else row_lengths(rows, origins, short, marks)
        answers = None if marks is None or not marks.answers.any() else marks.answers
        weights = None if answers is None or answer_weight == 1 else torch.where(answers, answer_weight, 1.0)
        return cls(row_lengths=lengths, token_weights=weights, answers=answers)

    def by_predictions(self) -> Treatment:
        """The same with answers, too, as the dense model predicts them."""
        return replace(self, answers=None)

    def of(self, some: Callable[[torch.Tensor], torch.Tensor]) -> Treatment:
        """For the rows that `some` takes of what there is for each."""
        return Treatment(**{name: value if value is None else some(value) for name, value in vars(self).items()})


def tuning_treatment(work: RunContext) -> Treatment:
    """Of each row to tune on, as how long rows it is done, and what its tokens count."""
    rows, origins, marks = work.blocks["tuning"], work.text["tuning"].origins, stored_marks(work.run.folder, "tuning")
    return Treatment.as_drawn(rows, origins, marks, short=work.config.text.window)


def taught(work: RunContext) -> list[str]:
    """How the probes among the rows to tune on are taught, for what depends on it; nothing where there are none."""
    tuning = work.text.get("tuning")
    return ["answers by their own tokens"] if tuning is not None and TESTS in tuning.reads else []


def row_lengths(
    rows: torch.Tensor, origins: Sequence[str], short: int, marks: Marks | None = None
) -> torch.Tensor | None:
    """As how long rows each is done: every second row of each text as short ones, and probes as they are made.

    Long rows lower perplexity more; from rows that begin anew a model learns to use the beginning of a context.
    """
    longest, seen = rows.shape[1], Counter[str]()
    of_text = (longest, short if longest % short == 0 else longest)
    lengths = torch.zeros(len(rows), dtype=torch.int64) if marks is None else marks.lengths.clone()
    for i in (lengths == 0).nonzero()[:, 0].tolist():
        kind = origins[i % len(origins)]
        lengths[i] = of_text[seen[kind] % 2]
        seen[kind] += 1
    return lengths if (lengths < longest).any() else None


# --- drawing ------------------------------------------------------------------------------------------------


def draw_all(work: RunContext, uses: Sequence[Use]) -> None:
    """Draw the tokens of these uses, each an artefact of its own, into `work`, and log where they come from."""
    for use in uses:
        drawn = draw(work, use, list(uses[: uses.index(use)]))
        work.text[use], work.blocks[use] = drawn, stored_blocks(work.run.folder, use)
        if use != "heldout":
            over = "" if drawn.passes == 1 else f"; the text runs out, and is gone over {drawn.passes:.1f} times"
            say(use, f"{drawn.tokens:,} tokens of {drawn.source}{over}")
        asks_chats = work.config.heal.chat_share and use == "tuning" and work.tokenizer.chat_template
        if asks_chats and CHATS not in drawn.reads:
            why = "the dense model can write them only where it is in memory as a whole"
            if not work.chats_fit:
                why = "the chat template leaves out what the user says, or opens with more than half of a short row"
            elif not has(tuning_source(work, True), CHATS):
                why = "the shares of the text leave no room for them"
            say("note", f"no chats are tuned on: {why}")
    if "evaluation" in uses:
        say("evaluation", evaluation.perplexity_protocol(work.text["evaluation"].window))
        say("evaluation", describe_shared(asdict(in_common(work, uses))))


def draw(work: RunContext, use: Use, drawn: Sequence[Use]) -> TextFacts:
    """Draw the blocks of one use: from where the uses drawn before it stopped, and no document that these have."""
    wanted, text = text_wanted(work, use), work.config.text
    before: list[Any] = []
    for other in drawn if use != "evaluation" else ():
        # the documents of all are left out; of the others what they take of a common stream counts, too
        before.append(digest(sorted(_keys(work.run.folder, other))))
        before += [] if other == "evaluation" else [text_wanted(work, other)]
    edition: list[Any] = [EDITION] if has(wanted["source"], TESTS) else []
    if edition and work.config.search.preserve not in ("all", "none"):
        edition.append(work.preserved)
    reads = [*what_is_read(wanted["source"], reported=use == "evaluation")]
    inputs = [work.source, text.seed, wanted, reads, before, *edition]
    with work.run.stage(TextFacts, f"text-{use}", inputs) as stage:
        if stage.open:
            check_prompt(work)
            if has(wanted["source"], CHATS) and not work.writes:
                wanted = text_wanted(work, use, chats=False)
            model = work.dense.model if has(wanted["source"], SELF, CHATS) else None
            if model is not None and layer_reader.layers_on_disk(model):
                raise ConfigError(
                    f"{wanted['source']!r} has the model write text, for which layers on disk would be read for every "
                    "token",
                    "give another text, or --place memory",
                )
            reader = Reader(work.tokenizer, seed=text.seed, model=model, capabilities=work.preserved)
            for other in drawn:
                had = text_wanted(work, other, CHATS in work.text[other].reads)
                reader.skip_blocks(other, **had, keys=_keys(work.run.folder, other))
            blocks = reader.draw(use, **wanted, repeats=use == "tuning")
            decoder_stack.check_tokens(blocks.tokens, work.architecture, work.checkpoint.name)
            work.run.drawn(f"text-{use}", blocks.facts.fingerprint)
            work.save({use: blocks.tokens} | (vars(blocks.marks) if blocks.marks else {}), f"tokens-{use}")
            work.save({use: torch.tensor(sorted(blocks.keys), dtype=torch.int64)}, f"documents-{use}")
            stage.found, stage.files = blocks.facts, [f"tokens-{use}.safetensors", f"documents-{use}.safetensors"]
    return stage.artefact


def check_prompt(work: RunContext) -> None:
    """Write a prompt as the model will be asked one, so that what is wrong with its chat template is told early."""
    if work.tokenizer.chat_template:
        asked = torch.tensor(prompt_ids(work.tokenizer, "a word"))
        decoder_stack.check_tokens(asked, work.architecture, work.checkpoint.name)


# --- what two uses have in common ---------------------------------------------------------------------------


def in_common(work: RunContext, uses: Sequence[Use]) -> SharedText:
    """What the evaluation text has in common with what is searched and tuned on; the documents that were left out.

    Of one stream no two uses have the same tokens; what such a text repeats is its own.
    """
    with work.run.stage(SharedText, "text-shared", None, after=[f"text-{use}" for use in uses]) as stage:
        if stage.open:
            drawn = {
                use: Blocks(work.blocks[use], facts, frozenset(_keys(work.run.folder, use)))
                for use, facts in work.text.items()
            }
            evaluated, used = drawn["evaluation"], [blocks for use, blocks in drawn.items() if use in USED]
            streams = [rows for blocks in used for rows in blocks.rows_by_origin().values()]
            passages, words = _shared(evaluated, streams, work.tokenizer)
            if copied := _copied(passages, words):
                raise DataError(
                    f"{copied} of the evaluation text {evaluated.facts.source!r} are also in what would be searched "
                    "or tuned on",
                    "give --eval-data another text than --data and --tune-data",
                )
            if "heldout" in drawn:
                others = [blocks for blocks in used if blocks is not drawn["heldout"]]
                check_held_out(drawn["heldout"], others, work.tokenizer)
            keys = frozenset().union(*(blocks.keys for blocks in used))
            stage.found = SharedText(
                documents=len(evaluated.keys & keys),
                passages=passages,
                passed_over=sum(blocks.facts.passed_over for blocks in drawn.values()),
            )
    return stage.artefact


def _shared(blocks: Blocks, others: Sequence[torch.Tensor], tokenizer: Any) -> tuple[float, float]:
    """The shares of a text's passages, and of the words that it was not given anew, that are in other text."""
    read = [rows for name, rows in blocks.rows_by_origin().items() if name not in MADE_ANEW]
    return shared([blocks.tokens], others), shared_words(read, others, tokenizer)


def _copied(passages: float, words: float) -> str:
    """How much of a text other text holds, where that is too much."""
    if passages > MOST:
        return f"{passages:.0%} of the passages"
    return f"{words:.0%} of the words" if words > MOST_WORDS else ""


def check_held_out(heldout: Blocks, others: list[Blocks], tokenizer: Any) -> None:
    """Refuse held-out text that has too much in common with other text; the same stream gives no row twice."""
    for origin, rows in heldout.rows_by_origin().items():
        if origin in MADE_ANEW:  # of seeds of their own; what a template writes is in chats and in probes
            continue
        parts = [part for blocks in others for part in blocks.rows_by_origin().items()]
        elsewhere = [other for name, other in parts if name not in (origin, *MADE_ANEW)]
        if copied := _copied(shared([rows], elsewhere), shared_words([rows], elsewhere, tokenizer)):
            raise DataError(
                f"{copied} of the held-out text, from {heldout.facts.source!r}, are also in other text "
                "that would be searched or tuned on",
                "give --tune-data the same text as --data, or one that shares nothing with it",
            )


def check_unseen(folder: Path, blocks: Blocks, tokenizer: Any) -> None:
    """Refuse to evaluate a finished run on text that it was searched or tuned on.

    Judged by what was read, by the documents' keys and by the run's own tokens, as far as it has them.
    """
    had = [use for use in USED if (folder / f"text-{use}.json").is_file()]
    names = {read for use in had for read in read_json(folder / f"text-{use}.json").get("reads", ())}
    passages, words = _shared(blocks, [stored_blocks(folder, use) for use in had], tokenizer)
    keys = blocks.keys & {key for use in had for key in _keys(folder, use)}
    found = {
        "the same source": names & {*blocks.facts.reads} - MADE_ANEW,
        f"{len(keys):,} of its documents": len(keys) > MOST * max(1, blocks.facts.documents),
        _copied(passages, words): _copied(passages, words),
    }
    if both := [said for said, is_shared in found.items() if is_shared]:
        raise DataError(
            f"the run in {folder} was searched or tuned on {' and '.join(both)}: {blocks.facts.source!r} cannot judge "
            "it",
            "give --eval-data another text than the run's --data and --tune-data",
        )
    say("evaluate", describe_shared({"documents": len(keys), "passages": passages, "passed_over": 0}))


def _keys(folder: Path, use: str) -> set[int]:
    """The documents that a use of a run has."""
    return {*load_file(folder / f"documents-{use}.safetensors")[use].tolist()}
