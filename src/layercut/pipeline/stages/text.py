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
from layercut.config import CompressConfig, HealConfig
from layercut.data.blocks import Blocks, Marks, Order, Reader, stored_blocks, stored_marks
from layercut.data.chat_templates import prompt_ids
from layercut.data.probe_families import EDITION
from layercut.data.probes import never_chats
from layercut.data.sources import CHATS, MADE_ANEW, TESTS, share_of, split_mix, what_is_read
from layercut.data.text_overlap import MOST, MOST_WORDS, shared, shared_words
from layercut.errors import DataError
from layercut.files.json_values import digest
from layercut.files.reading import read_json
from layercut.models import decoder_stack
from layercut.pipeline.artefacts import SharedText, SharedTextArtefact, TextArtefact
from layercut.pipeline.run_context import RunContext
from layercut.progress import say
from layercut.report.stage_lines import describe_shared

FEWEST_HELD_OUT, HELD_OUT_SHARE = 1024, 32
"""Tokens, beside those that are tuned on, that judge the fold and choose the best state of tuning: one in 32."""
ANSWER_WEIGHT = 4.0
"""What a token of a test's answer counts in the loss while layers beside the cut are trained, of copies excepted."""
Use = Literal["evaluation", "calibration", "heldout", "tuning"]
USED: tuple[Use, ...] = ("calibration", "heldout", "tuning")
"""What is searched, judged and tuned on, and so not reported on; in the order in which they are drawn."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is drawn for one use."""

    source: str
    tokens: int
    window: int
    order: Order = "shuffled"
    """As written, and without a chat template, as reported perplexities need it."""


def uses(config: CompressConfig, until: str) -> list[Use]:
    """What text a run needs, in the order in which it is drawn."""
    heal, heals = config.heal, until != "search"
    judged = config.search.score == "folded" or config.shares_size
    wanted: dict[Use, bool] = {
        "evaluation": until == "report",
        "calibration": True,
        "heldout": judged or (heals and (heal.fold or heal.tune_tokens > 0)),
        "tuning": heals and heal.tune_tokens > 0,
    }
    return [use for use, is_wanted in wanted.items() if is_wanted]


def text_wanted(work: RunContext, use: Use, chats: bool = True) -> Asked:
    """What to draw for a use."""
    text, heal, reported = work.config.text, work.config.heal, work.config.evaluate
    if use == "evaluation":
        return Asked(
            source=reported.eval_data, tokens=reported.eval_tokens, window=work.reported_window, order="as written"
        )
    if use == "calibration":
        return Asked(source=text.data, tokens=text.tokens, window=text.window)
    source = tuning_source(work, chats)
    if use == "heldout":
        return Asked(source=source, tokens=held_out_tokens(heal), window=text.window)
    return Asked(source=source, tokens=heal.tune_tokens, window=heal.tune_window or text.window)


def tuning_source(work: RunContext, chats: bool) -> str:
    """The text that is tuned on, with its shares of tests and of chats, where these fit a row and are not in it yet.

    Where the shares that are named leave no room for one, it is left out.
    """
    heal, preserves = work.config.heal, work.config.search.preserve != "none"
    named = heal.tune_data or work.config.text.data
    shares = [share_of(part) for part in split_mix(named)]
    room = 1 - sum(share or 0 for share in shares) if None in shares else 0
    wanted = {
        TESTS: heal.probe_share * (preserves and work.tests_fit),
        CHATS: heal.chat_share * (chats and heal.tune_tokens > 0 and work.chats_fit),
    }
    added = dict[str, float]()
    for name, share in wanted.items():
        if share and not has(named, name) and sum(added.values()) + share < room:
            added[name] = share
    return "+".join([named, *(f"{name}:{added[name]:g}" for name in (CHATS, TESTS) if name in added)])


def has(source: str, name: str) -> bool:
    """Whether chats, or generated tests, are in a mix."""
    return any(part.partition(":")[0] == name for part in split_mix(source))


def taught(work: RunContext) -> list[str]:
    """How the tests among the rows to tune on are taught, for what depends on it; nothing where there are none."""
    tuning = work.text.get("tuning")
    return ["answers by their own tokens"] if tuning is not None and TESTS in tuning.reads else []


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How the rows to tune on are done, as `tune_` takes it by these names."""

    row_lengths: torch.Tensor | None
    """int64 [N]; None where all are done whole."""
    token_weights: torch.Tensor | None
    """float32 [N, T]; None where every token counts alike."""
    answers: torch.Tensor | None = None
    """bool [N, T]: of tests, whose own tokens are taught, since they are right where the dense model may not be."""

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
        """What a run does with rows of text and tests."""
        lengths = None if short is None else row_lengths(rows, origins, short, marks)
        answers = None if marks is None or not marks.answers.any() else marks.answers
        return cls(row_lengths=lengths, token_weights=token_weights(marks, answer_weight), answers=answers)

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


def token_weights(marks: Marks | None, weight: float) -> torch.Tensor | None:
    """What each token counts."""
    return None if marks is None or weight == 1 or not marks.answers.any() else torch.where(marks.answers, weight, 1.0)


def row_lengths(
    rows: torch.Tensor, origins: Sequence[str], short: int, marks: Marks | None = None
) -> torch.Tensor | None:
    """As how long rows each is done: every second row of each text as short ones, and tests as they are made.

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


def held_out_tokens(heal: HealConfig) -> int:
    """Tokens, beside those that are tuned on, that judge healing."""
    return max(FEWEST_HELD_OUT, heal.tune_tokens // HELD_OUT_SHARE)


def inputs(work: RunContext, use: Use, drawn: Sequence[Use]) -> list[Any]:
    """All that decides which tokens are drawn for a use, after those for other uses were drawn."""
    text, wanted = work.config.text, text_wanted(work, use)
    reads = [*what_is_read(wanted.source, reported=use == "evaluation")]
    before: list[Any] = []
    for other in drawn if use != "evaluation" else ():
        # the documents of all are left out; of the others what they take of a common stream counts, too
        before.append(documents_of(work, other))
        before += [] if other == "evaluation" else [asdict(text_wanted(work, other))]
    edition: list[Any] = [EDITION] if has(wanted.source, TESTS) else []
    if edition and work.config.search.preserve not in ("all", "none"):
        edition.append(work.preserved)
    return [work.source, text.seed, text.chat_template, asdict(wanted), reads, before, *edition]


def draw_all(work: RunContext, uses: Sequence[Use]) -> None:
    """Draw the tokens of these uses, each an artefact of its own, into `work`, and log where they come from."""
    for use in uses:
        drawn = draw(work, use, list(uses[: uses.index(use)]))
        work.text[use], work.blocks[use] = drawn.facts, stored_blocks(work.run.folder, use)
        if use != "heldout":
            say(use, f"{drawn.tokens:,} tokens of {drawn.source}")
        if use == "tuning" and (why := why_no_chats(work, drawn.reads)):
            say("note", f"no chats are tuned on: {why}")
        if use == "tuning" and TESTS in drawn.reads and (plain := never_chats(work.tokenizer, work.preserved)):
            why = "the chat template changes replies, or leaves out turns"
            say("note", f"{why}: generated tests of {', '.join(plain)} are no chats")
    if "evaluation" in uses:
        say("evaluation", evaluation.perplexity_protocol(work.text["evaluation"].window))
        say("evaluation", describe_shared(asdict(in_common(work, uses))))


def why_no_chats(work: RunContext, reads: Sequence[str]) -> str:
    """Why a chat model is tuned on no chats of its own, though a share is asked for; empty where it is or none is."""
    if CHATS in reads or not work.config.heal.chat_share or not work.tokenizer.chat_template:
        return ""
    if not work.chats_fit:
        return "the chat template leaves out what the user says, or opens with more than half of a short row"
    if not has(text_wanted(work, "tuning").source, CHATS):
        return "the shares of the text leave no room for them"
    return "the dense model can write them only where it is in memory as a whole"


def draw(work: RunContext, use: Use, drawn: Sequence[Use]) -> TextArtefact:
    """Draw the blocks of one use: from where the uses drawn before it stopped, and no document that these have."""
    with work.run.stage(TextArtefact, f"text-{use}", inputs(work, use, drawn)) as stage:
        if stage.open:
            check_prompt(work)
            asked = text_wanted(work, use)
            if has(asked.source, CHATS) and not work.writes:
                asked = text_wanted(work, use, chats=False)
            reader = work.reader(asked.source)
            for other in drawn:
                had = text_wanted(work, other, CHATS in work.text[other].reads)
                reader.skip_blocks(other, **asdict(had), keys=keys_of(work, other))
            blocks = reader.draw(use, **asdict(asked))
            decoder_stack.check_tokens(blocks.tokens, work.architecture, work.checkpoint.name)
            work.run.drawn(f"text-{use}", blocks.fingerprint)
            work.save({use: blocks.tokens} | (vars(blocks.marks) if blocks.marks else {}), f"tokens-{use}")
            work.save({use: key_tensor(blocks.keys)}, f"documents-{use}")
            files = [f"tokens-{use}.safetensors", f"documents-{use}.safetensors"]
            stage.found = TextArtefact(**vars(blocks.facts()), files=files)
    return stage.artefact


# --- what two uses have in common ---------------------------------------------------------------------------


def in_common(work: RunContext, uses: Sequence[Use]) -> SharedText:
    """What the evaluation text has in common with what is searched and tuned on; the documents that were left out.

    Of one stream no two uses have the same tokens; what such a text repeats is its own.
    """
    with work.run.stage(SharedTextArtefact, "text-shared", None, after=[f"text-{use}" for use in uses]) as stage:
        if stage.open:
            drawn = {use: _stored(work, use) for use in work.text}
            used = [blocks for use, blocks in drawn.items() if use in USED]
            evaluated = drawn["evaluation"]
            streams = [rows for blocks in used for rows in blocks.rows_by_origin().values()]
            reported = shared([evaluated.tokens], streams)
            if reported > MOST:
                raise DataError(
                    f"{reported:.0%} of the passages of the evaluation text {evaluated.source!r} are also in what "
                    "would be searched or tuned on",
                    "give --eval-data another text than --data and --tune-data",
                )
            read = {name: rows for name, rows in evaluated.rows_by_origin().items() if name not in MADE_ANEW}
            if (words := shared_words([*read.values()], streams, work.tokenizer)) > MOST_WORDS:
                raise DataError(
                    f"{words:.0%} of the words of the evaluation text {evaluated.source!r} are in records and runs of "
                    "words that would be searched or tuned on as well",
                    "give --eval-data another text than --data and --tune-data",
                )
            if "heldout" in drawn:
                others = [blocks for blocks in used if blocks is not drawn["heldout"]]
                check_held_out(drawn["heldout"], others, work.tokenizer)
            keys = frozenset().union(*(blocks.keys for blocks in used))
            stage.found = SharedTextArtefact(
                documents=len(evaluated.keys & keys),
                passages=reported,
                passed_over=sum(blocks.passed_over for blocks in drawn.values()),
            )
    return stage.artefact.facts


def check_held_out(heldout: Blocks, others: list[Blocks], tokenizer: Any) -> None:
    """Refuse held-out text that has too much in common with other text; the same stream gives no row twice."""
    for origin, rows in heldout.rows_by_origin().items():
        if origin in MADE_ANEW:  # of seeds of their own; what a template writes is in chats and in tests
            continue
        parts = [part for blocks in others for part in blocks.rows_by_origin().items()]
        elsewhere = [other for name, other in parts if name not in (origin, *MADE_ANEW)]
        found, words = shared([rows], elsewhere), shared_words([rows], elsewhere, tokenizer)
        if found > MOST or words > MOST_WORDS:
            of = f"{found:.0%} of the passages" if found > MOST else f"{words:.0%} of the words"
            raise DataError(
                f"{of} of the held-out text, from {heldout.source!r}, are also in other text "
                "that would be searched or tuned on",
                "give --tune-data the same text as --data, or one that shares nothing with it",
            )


def _stored(work: RunContext, use: str) -> Blocks:
    """The blocks of a use, as they were drawn."""
    facts = work.text[use]
    return Blocks(
        work.blocks[use], facts.source, facts.documents, facts.fingerprint, tuple(facts.reads), tuple(facts.origins),
        frozenset(keys_of(work, use)), facts.passed_over,
    )  # fmt: skip


def check_unseen(folder: Path, blocks: Blocks, tokenizer: Any) -> None:
    """Refuse to evaluate a finished run on text that it was searched or tuned on.

    Judged by what was read, by the documents' keys and by passages of the run's own tokens, as far as it has them.
    """
    had = [use for use in USED if (folder / f"text-{use}.json").is_file()]
    names = {read for use in had for read in read_json(folder / f"text-{use}.json").get("reads", ())}
    used = [stored_blocks(folder, use) for use in had]
    passages = shared([blocks.tokens], used)
    read = {name: rows for name, rows in blocks.rows_by_origin().items() if name not in MADE_ANEW}
    words = shared_words([*read.values()], used, tokenizer)
    keys = blocks.keys & {key for use in had for key in _keys(folder, use)}
    found = {
        "the same source": names & {*blocks.reads} - MADE_ANEW,
        f"{len(keys):,} of its documents": len(keys) > MOST * max(1, blocks.documents),
        f"{passages:.0%} of its passages": passages > MOST,
        f"{words:.0%} of its words": words > MOST_WORDS,
    }
    if both := [what for what, is_shared in found.items() if is_shared]:
        raise DataError(
            f"the run in {folder} was searched or tuned on {' and '.join(both)}: {blocks.source!r} cannot judge it",
            "give --eval-data another text than the run's --data and --tune-data",
        )
    say("evaluate", describe_shared({"documents": len(keys), "passages": passages, "passed_over": 0}))


def check_prompt(work: RunContext) -> None:
    """Write a prompt as the model will be asked one, so that what is wrong with its chat template is told early."""
    if work.tokenizer.chat_template:
        asked = torch.tensor(prompt_ids(work.tokenizer, "a word"))
        decoder_stack.check_tokens(asked, work.architecture, work.checkpoint.name)


def key_tensor(keys: frozenset[int]) -> torch.Tensor:
    """Keys of documents, sorted, int64."""
    return torch.tensor(sorted(keys), dtype=torch.int64)


def documents_of(work: RunContext, use: str) -> str:
    """Hash of the documents that a use of this run has, for stages that leave them out."""
    return digest(sorted(keys_of(work, use)))


def keys_of(work: RunContext, use: str) -> set[int]:
    """The documents that a use of this run has."""
    return _keys(work.run.folder, use)


def _keys(folder: Path, use: str) -> set[int]:
    return {*load_file(folder / f"documents-{use}.safetensors")[use].tolist()}


def with_evaluation_left_out(reader: Reader, work: RunContext) -> Reader:
    """A reader that skips the documents of the evaluation text, where this run has drawn it."""
    if "evaluation" in work.text:
        reader.drawn["evaluation"] = keys_of(work, "evaluation")
    return reader
