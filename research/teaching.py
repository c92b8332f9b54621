"""How recall.py heals a cut: as a run does it, or as others would, on as many tokens.

`lora=1`: LoRA on all layers (healers.py) in place of the layers beside the cut. `writer`: tuned in two rounds,
the second of which is on text ("text"), or what follows its first words as the healed model ("student": on-policy
distillation, 2607.13124) or the dense one ("dense") writes it, or whole chats by the dense one ("chat"). `hurt`: of so
many times the rows, those of each source on which the folded cut is furthest from the dense model (data by damage, the
idea of PASER, 2502.12594). `by_kl`: of text, tokens count by how far the folded cut is from the dense model on them.
`also`: layers that are trained beside the endpoints, such as those that the capability map names.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from common import blocks
from healers import lora_, train_
from layercut.config import TuneSettings
from layercut.data.self_sampled import ROWS, generating, plain_distribution, sample
from layercut.data.sources import CHATS, TESTS
from layercut.healing import fold_, tune_
from layercut.healing.endpoint_tuning import own_parameters_, tune_parameters_
from layercut.healing.inputs import Rows as TunedRows
from layercut.healing.recipe import default_learning_rate, endpoints, usual_weight
from layercut.models import loading
from layercut.models.losses import KL, kl_divergence
from layercut.models.runner import DecoderRunner
from layercut.pipeline.stages.text import Treatment
from layercut.segments import Segment, kept_layers
from layercut.surgery import cut

WRITERS = ("text", "student", "dense", "chat")

CLIP = 4.0
"""What a token may count, of the mean of all, where they count by their KL; as much as a token of an answer."""
PROMPT = 32
"""Tokens of a row that stay where a model writes the others."""


@dataclass(frozen=True)
class Healing:
    """A cut and how it is healed."""

    segments: str
    share: float = 0.0
    mix: float = 0.0
    radius: int = 1
    tokens: int = 0
    rate: float = 0.0
    window: int = 0
    """Tokens of a row that is folded and tuned on; 0: as those that are reported."""
    parted: int = 0
    """1: every second row of text is done as short ones, as a run does it."""
    answer_weight: float = 1.0
    """What an answer's token counts in the tests that are tuned on; others count 1."""
    beside: str = ""
    """Another text to fold and tune on, of which half the rows are."""
    lora: int = 0
    """1: LoRA on all layers is trained."""
    writer: str = ""
    """Whose text the second of two rounds is on; "": one round."""
    hurt: int = 1
    """Of so many times the rows those that the cut hurt most."""
    fold: int = 1
    """0: the layers beside the cut are trained from what they were."""
    by_kl: int = 0
    """1: a token of text counts as much as its KL after the fold over their mean, CLIP times the others at most."""
    also: str = ""
    """Layers of the dense model that are trained as well, joined by +."""
    """How many times the tokens are gone over; `lora` and `also` once."""
    chats: float = 0.0
    """Share of chats that the dense model writes, among the rows to tune on."""

    @classmethod
    def parse(cls, text: str, tokens: int) -> Healing:
        """From "12:16,5:7 share=0.25"; tokens: how many are tuned on unless it says so."""
        segments, *options = text.split()
        given: dict[str, Any] = {"tokens": 0 if options[:1] == ["unhealed"] else tokens}
        kinds: dict[str, Any] = {each.name: type(each.default) for each in fields(cls)}
        for name, _, value in (option.partition("=") for option in options if option != "unhealed"):
            given[name] = kinds[name](value)
        return cls(segments, **given)

    def __post_init__(self) -> None:
        if self.writer and self.writer not in WRITERS:
            raise SystemExit(f"error: writer is {self.writer!r}\nhint: allowed are {', '.join(WRITERS)}")
        unread = self.parted or self.writer or self.answer_weight != 1 or self.radius != 1
        if self.lora and (unread or not self.rate):
            raise SystemExit(
                "error: lora=1 takes a rate, and of the others share, mix, tokens, window, beside and hurt"
            )


@dataclass
class Rows:
    """Token ids to judge by [M, T] and to tune on [N, T]; of the latter the sources, and how they are done."""

    heldout: torch.Tensor
    tuning: torch.Tensor
    origins: Sequence[str]
    treated: Treatment

    def __getitem__(self, some: slice | list[int]) -> Rows:
        """Some of those to tune on, with the same that judge."""
        origins = [self.origins[i] for i in torch.arange(len(self.tuning))[some].tolist()]
        return Rows(self.heldout, self.tuning[some], origins, self.treated.of(lambda each: each[some]))


def healed(model: loading.LanguageModel, asked: Healing, args: Namespace, row: dict[str, Any]) -> Any:
    """The model without the segments, folded and tuned; what that gave goes into row."""
    small = cut(model.model, [Segment.parse(one) for one in asked.segments.split(",")])
    if not asked.tokens:
        return small
    window = asked.window or args.window
    text = f"{args.data}+{asked.beside}" if asked.beside else args.data
    calibration = blocks(model, text, args.tokens, window, args.seed).tokens
    rows = drawn(model, asked, text, window, args, skip=len(calibration))
    solved = torch.cat([calibration, rows.tuning[: max(0, args.fold_tokens - calibration.numel()) // window]])
    if asked.fold:
        folded = fold_(small, model.model, solved, heldout=rows.heldout)
        row |= {"kl_cut": folded.kl_before, "kl_folded": folded.kl_after}
    begun = time.process_time()
    if asked.by_kl:
        rows = weighted_by_kl(model.model, small, rows)
    if asked.hurt > 1:
        rows = most_hurt(model.model, small, rows, asked.tokens // window)
    if asked.lora:
        row["tuning"] = adapted_(model.model, small, asked, rows)
    elif asked.writer:
        half = len(rows.tuning) // 2
        first = tuned_(model, small, asked, rows[:half])
        rows.tuning[half:] = written(model, small, asked, rows, range(half, len(rows.tuning)), args.seed)
        own = replace(asked, mix=0.0) if asked.writer == "student" else asked  # its own words are nothing to learn by
        second = tuned_(model, small, own, rows[half:])
        row["tuning"] = second | {"heldout": [*first["heldout"], *second["heldout"]]}
    else:
        row["tuning"] = tuned_(model, small, asked, rows)
    row["cpu_seconds"] = time.process_time() - begun
    return small


def drawn(model: loading.LanguageModel, asked: Healing, text: str, window: int, args: Namespace, skip: int) -> Rows:
    """What judges, then what is tuned on: from row `skip` of the mix on; with tests in it some text comes twice."""
    held = max(1024, asked.tokens // 32)
    shares = {CHATS: asked.chats, TESTS: asked.share}
    source = "+".join([text, *(f"{name}:{share}" for name, share in shares.items() if share)])
    found = blocks(model, source, held + asked.tokens * asked.hurt, window, args.seed, skip=skip)
    first = held // window
    treated = Treatment.as_drawn(
        found.tokens, found.facts.origins, found.marks,
        short=args.window if asked.parted else None, answer_weight=asked.answer_weight,
    )  # fmt: skip
    origins = [found.facts.origins[i % len(found.facts.origins)] for i in range(first, len(found.tokens))]
    later = treated.of(lambda each: each[first:])
    return Rows(found.tokens[:first], found.tokens[first:].clone(), origins, later)


def tuned_(model: loading.LanguageModel, small: Any, asked: Healing, rows: Rows) -> dict[str, Any]:
    """Train the layers beside the cuts, in place, and those that are named beside them."""
    given = {"heldout": rows.heldout, **vars(rows.treated)}
    if asked.also:
        found = tuned_with_others_(model, small, asked, rows)
    else:
        found = tune_(
            small, model.model, rows.tuning, objective=KL(mix=asked.mix), radius=asked.radius,
            learning_rate=asked.rate or None, **given,
        )  # fmt: skip
    kept = (
        "learning_rate",
        "trained_layers",
        "trained_parameters",
        "heldout",
        "label",
        "best_step",
        "setbacks",
    )
    return {name: getattr(found, name) for name in kept}


def tuned_with_others_(model: loading.LanguageModel, small: Any, asked: Healing, rows: Rows) -> Any:
    """`tune_` of the endpoints and of the layers `also` names, in place, by the rate for as many layers."""
    student = DecoderRunner(small)
    segments, layers = [Segment.parse(one) for one in asked.segments.split(",")], len(DecoderRunner(model.model))
    kept = kept_layers(segments, layers)
    others = {kept.index(int(layer)) for layer in asked.also.split("+")}
    positions = sorted({*endpoints(segments, layers, asked.radius), *others})
    parameters = own_parameters_(student, positions)
    rate = default_learning_rate(usual_weight(parameters), rows.tuning.numel() // 1024, len(positions))
    objective: Any = KL(mix=asked.mix)
    settings = TuneSettings(objective=objective, learning_rate=asked.rate or rate, batch_tokens=1024)
    given, tuned = [(p, 1.0) for p in parameters], TunedRows(tokens=rows.tuning, **vars(rows.treated))
    found = tune_parameters_(small, model.model, given, tuned, heldout=rows.heldout, settings=settings)
    return replace(found, trained_layers=positions)


def adapted_(dense: Any, small: Any, asked: Healing, rows: Rows) -> dict[str, Any]:
    """Train LoRA on all layers, 1,024 tokens a step, in place; it is left beside the weights, which are shared."""
    student = DecoderRunner(small)
    trained, prefix = lora_(student, Segment(1, 2))
    teacher = DecoderRunner(dense)
    found = train_(teacher, student, trained, prefix, rows.tuning, rows.heldout, asked.rate, 1024, mix=asked.mix)
    names = ("trained_parameters", "heldout")
    layers = [*range(len(student))]
    return {"learning_rate": asked.rate, "trained_layers": layers} | {name: found[name] for name in names}


def written(
    model: loading.LanguageModel, small: Any, asked: Healing, rows: Rows, part: range, seed: int
) -> torch.Tensor:
    """What a model writes in place of the rows [len(part), T] of text; tests stay, and all of "text" does."""
    plain = rows.tuning[part.start : part.stop].clone()
    texts = torch.tensor([i for i, row in enumerate(part) if rows.origins[row] != TESTS])
    if asked.writer == "chat":
        span = range(len(texts))
        plain[texts] = sample(model.model, model.tokenizer, plain.shape[1], span, seed, chat_template=True)
    elif asked.writer != "text":
        plain[texts] = continued({"student": small, "dense": model.model}[asked.writer], plain[texts], seed)
    return plain


def continued(writer: Any, rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows [N, T] whose first words the writer goes on from, by its plain distribution, past EOS."""
    found: list[torch.Tensor] = []
    with generating(writer, plain_distribution(rows.shape[1])):
        for batch in rows[:, :PROMPT].split(ROWS):
            torch.manual_seed(seed + len(found))
            found.append(writer.generate(batch, attention_mask=torch.ones_like(batch), use_cache=True))
    return torch.cat(found).clone()


@torch.no_grad()
def kl_of_rows(dense: Any, small: Any, rows: torch.Tensor) -> torch.Tensor:
    """KL to the dense model of predicting the token after each: [N, T]."""
    return torch.cat([kl_divergence(dense(row[None]).logits, small(row[None]).logits).cpu() for row in rows])


def weighted_by_kl(dense: Any, small: Any, rows: Rows) -> Rows:
    """The rows, whose tokens of text count by their KL; on average as much as before."""
    kl = kl_of_rows(dense, small, rows.tuning).float().clamp(min=0)  # where all but equal, rounding is below it
    text = torch.tensor([origin != TESTS for origin in rows.origins])
    of_text = (kl[text] / kl[text].mean()).clamp(max=CLIP)
    weights = torch.ones_like(kl) if rows.treated.token_weights is None else rows.treated.token_weights.clone()
    weights[text] = of_text / of_text.mean()
    return replace(rows, treated=replace(rows.treated, token_weights=weights))


def most_hurt(dense: Any, small: Any, rows: Rows, number: int) -> Rows:
    """Of each source, in their order, the rows with the most KL per token to the dense model; `number` in all."""
    kl = kl_of_rows(dense, small, rows.tuning).mean(1)
    chosen = list[int]()
    for origin in dict.fromkeys(rows.origins):
        own = torch.tensor([i for i, of in enumerate(rows.origins) if of == origin])
        chosen += own[kl[own].topk(round(len(own) * number / len(rows.tuning))).indices].tolist()
    chosen.sort()
    return rows[chosen]
