"""The card of a model that layercut made, README.md of its folder or of its page on the Hub.

At the top YAML that the Hub reads: source, licence, measured figures. Then how to load it, engine by engine, and what
was done; of a run also its verdicts and tables.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layercut.data.sources import find
from layercut.errors import LayercutError
from layercut.models.checkpoints import SourceCard, source_card
from layercut.report import sections, verdicts
from layercut.report.formatting import (
    Json,
    finite,
    label,
    layer_names,
    page,
    printable,
    source_name,
    spans,
    whole_number,
)
from layercut.report.run_facts import RunFacts, last_stage, main_tasks, read_json, read_run, runs_of

HERE = "path/to/this/folder"
"""Stands in the commands of a card for where the model is; `addressed` puts the Hub id there."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing measured on the model that the card is of."""

    metric: str
    """Its type on the Hub: perplexity, acc …"""
    value: float
    dataset: str
    """As the user named the text, or a task's name."""
    words: str = ""
    """On how much, and how."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a card is of."""

    source: SourceCard
    done: str
    """What was done, in a sentence or two; empty of a run's own checkpoint, which its title describes."""
    segments: Sequence[tuple[int, int]] = ()
    """Layers removed."""
    original_layer_index: Sequence[int] = ()
    """Of each layer its place in the source; empty where that is not known."""
    number_format: str = ""
    """Of weights in fewer bits: int4, Q8_0; empty for floats."""
    gguf: str | None = None
    """Name of the GGUF file; None: a checkpoint folder."""
    packed: bool = False
    """Whether the weights are in the format of compressed-tensors."""
    figures: Sequence[Figure] = ()
    consumers: Sequence[tuple[str, str, str]] = ()
    """Engine, what it makes of the model, and why: `sections.engine_rows`."""

    @property
    def title(self) -> str:
        layers = len(self.original_layer_index)
        parts = [self.source.name, f"{layers} layers" if self.segments and layers else "", self.number_format]
        return "-".join(each.replace(" ", "-") for each in parts if each)

    def serves(self, engine: str) -> bool:
        """Whether it is not known that this engine misreads the model, or does not load it."""
        return all(reads == sections.READINGS["right"] for name, reads, _ in self.consumers if name == engine)


def model_card(run: Path) -> str:
    """README.md for the checkpoint exported from RUN. RunError if RUN is not the folder of a finished run."""
    return checkpoint_card(of_run(run), run)


def checkpoint_card(made: Made, run: Path | None = None) -> str:
    """README.md for what was written, with the verdicts and tables of the run it is from."""
    facts = read_run(run, place=None) if run else None
    gguf = printable(made.gguf)
    text = page(
        "card.md",
        made=made,
        done=made.done,
        title=verdicts.title(facts.summary) if facts and not made.done else made.title,
        segments=label([*map(list, made.segments)]),
        removed=layer_names([*map(list, made.segments)]),
        index=json.dumps([*made.original_layer_index]),
        run=facts,
        conclusion=verdicts.conclusion(facts) if facts else None,
        verdicts=verdicts.verdicts(facts) if facts else [],
        sections=sections.of(facts, sections.CARD) if facts else [],
        here=HERE,
        name=re.sub(r"[^a-z0-9._-]+", "-", made.title.lower()).strip("-"),
        path=shlex.quote(f"{HERE}/{gguf}"),
        modelfile=shlex.quote(f"{gguf.removesuffix('.gguf')}.Modelfile"),
        python_name=json.dumps(gguf),
    )
    return front_matter(made) + re.sub(r"\n{3,}", "\n\n", text)


def addressed(card: str, repo_id: str) -> str:
    """A card whose commands name the model on the Hub."""
    return card.replace(HERE, repo_id)


# --- what it is of ---------------------------------------------------------------------------------------------------


def of_run(run: Path) -> Made:
    """The checkpoint in a finished run's folder. RunError if it is no finished run's folder."""
    found = read_run(run)
    bits = found.quantization.bits
    number_format = number_format_of("auto" if bits == "auto" else whole_number(bits))
    removed, index = spans(found.summary.segments), _whole_numbers(found.summary.original_layer_index)
    before = whole_number(found.summary.layers.before) or 0
    return Made(
        **layers_of(source_card(str(found.summary.model)), run / "model", removed, index, before),
        done="",
        number_format=number_format,
        packed=bool(number_format),
        figures=_run_figures(found),
        consumers=sections.engine_rows(found.summary.consumers),
    )


def number_format_of(bits: int | Literal["auto"] | None) -> str:
    """The name of weights in so many bits; empty for floats, and where that is not known."""
    return "mixed integers" if bits == "auto" else f"int{bits}" if bits is not None and bits < 16 else ""


def from_folder(folder: Path) -> Made:
    """A checkpoint folder, or a .gguf file; of a cut one, with the layers that its config names."""
    kept = _index_in(folder)
    return Made(source=source_card(str(folder)), done="", segments=_gaps(kept), original_layer_index=kept)


def layers_of(
    source: SourceCard, folder: Path, removed: Sequence[tuple[int, int]], index: Sequence[int], layers: int
) -> dict[str, Any]:
    """The source and its layers in a model: of the first model, where the source was cut from that one itself."""
    if source.is_first and (first := _index_in(folder)):
        behind = layers - 1 - index[-1] if index else 0  # what else was gone behind the last is in no config
        index, removed = first, [*_gaps(first), *([(first[-1] + 1, first[-1] + 1 + behind)] if behind else [])]
    return {"source": source, "segments": removed, "original_layer_index": index}


def _index_in(folder: Path) -> list[int]:
    """Where the layers of a checkpoint folder stood in the first model of all; empty where it does not say so."""
    config = folder / "config.json"
    return _whole_numbers(read_json(config).original_layer_index) if config.is_file() else []


def _gaps(kept: Sequence[int]) -> list[tuple[int, int]]:
    """The segments that are missing before the last layer that is kept."""
    return [(start, stop) for start, stop in runs_of(set(range(kept[-1] if kept else 0)) - set(kept))]


def _whole_numbers(values: Json) -> list[int]:
    return [number for value in values if (number := whole_number(value)) is not None]


def _run_figures(run: RunFacts) -> list[Figure]:
    """Perplexity of the last state that was measured, finite or not, and each task's main score."""
    found, perplexity = [], run.summary.perplexity
    if last := last_stage(run.summary):
        words = f"{perplexity.tokens} tokens in windows of {perplexity.window}"
        found.append(Figure(metric="perplexity", value=last[1], dataset=str(perplexity.dataset), words=words))
    for task, row in main_tasks(run.scored):
        if (score := finite(row.compressed)) is not None:
            metric, words = str(row.metric) or "score", f"{row['items']} items" if row["items"] else ""
            found.append(Figure(metric=metric, value=score, dataset=task, words=words))
    return found


def perplexity_again(run: Path, value: float, tokens: int) -> Figure:
    """Perplexity of a file or folder that was made from a run's model."""
    dataset = read_json(run / "summary.json").perplexity.dataset
    return Figure(metric="perplexity", value=value, dataset=str(dataset), words=f"the first {tokens} tokens")


# --- what the Hub reads ----------------------------------------------------------------------------------------------


def front_matter(made: Made) -> str:
    """The YAML at the top, between its two lines of ---."""
    from huggingface_hub import EvalResult, ModelCardData

    source, results = made.source, []
    for figure in made.figures:
        if not math.isfinite(figure.value):
            continue
        name, hub = source_name(figure.dataset) or "text", None
        try:
            hub = find(figure.dataset, reported=True).hub if figure.metric == "perplexity" else None
        except LayercutError:  # a file that is gone, or several joined
            hub = None
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=hub.path if hub else name.replace(" ", "-"),
                dataset_name=name,
                dataset_config=hub.config if hub else None,
                dataset_split=hub.split if hub else None,
                metric_type=figure.metric,
                metric_name=f"{figure.metric} ({figure.words})" if figure.words else figure.metric,
                metric_value=figure.value,
            )
        )
    tags = ["layercut", *(["pruned", "layer-pruning", "depth-pruning"] if made.segments else [])]
    tags += ["gguf"] if made.gguf else ["compressed-tensors"] if made.packed else []
    relation: Literal["quantized", "finetune"] = "quantized" if made.number_format else "finetune"
    data = ModelCardData(
        language=[*source.languages] or None,
        license=source.license,
        license_name=source.license_name,
        license_link=source.license_link,
        library_name="gguf" if made.gguf else "transformers",
        pipeline_tag="text-generation",
        base_model=source.base_model,
        base_model_relation=relation if source.base_model else None,
        tags=tags,
        model_name=made.title,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"
