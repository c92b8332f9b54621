"""Stage: the healed model's weights in fewer bits, trained afterwards in the same stock format.

A rounded model is trained towards the healed one: towards the dense model it would lose what healing gave it beside KL,
the text's own next tokens and the probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from layercut import quantization as rounding
from layercut.config import DataConfig, QuantizeConfig
from layercut.config.commands import CompressConfig
from layercut.data.probe_families import EDITION, capability_names
from layercut.data.probes import ProbeRows, probe_rows
from layercut.data.sources import TESTS, has
from layercut.distributed import processes
from layercut.export.formats import CutGguf, is_mixture, write_cut
from layercut.files import digest, remove_written, size
from layercut.healing.endpoint_tuning import TuningFiles, tune_parameters_
from layercut.healing.inputs import Rows
from layercut.healing.tuning_state import StateFile
from layercut.models import decoder_stack, memory
from layercut.pipeline.artefacts import BeforeAfter, QuantizeArtefact, TuningRecord
from layercut.pipeline.resolve_options import keeps_gguf, type_of_healed
from layercut.pipeline.run_context import QUANTIZED_GGUF, RunContext
from layercut.pipeline.stages.search import TEXT_ROWS_PER_TEST
from layercut.pipeline.stages.text import ANSWER_WEIGHT, tuning_treatment
from layercut.progress import say
from layercut.quantization import Quantized
from layercut.quantization.quantizers import calibrated
from layercut.quantization.trainable import RATE, RATE_PER_NAT, RISE, ROUNDING_RATE, ROUNDING_RISE, Trainable
from layercut.registries import quantizers
from layercut.report.stage_lines import describe_quantization, describe_quantized_tuning
from layercut.segments import Segment

FIRST_TEST = 2**20
"""Number of the first row of probes that weights are rounded on: far beyond those that are tuned on, or judge that."""
FEW_BITS = 3.5
"""On average of the weights that are packed, up to which the rounding is trained by itself: with 3 bits it takes back
most of what GPTQ loses, with 4 scales alone were better, rounding at their rate (docs/results.md). On
Qwen2.5-Coder-0.5B with 3 scales alone come near it, for an eighth of its time."""
TOWARDS = "what was rounded"  # what a rounded model is trained towards
ROWS = "rows as in healing"
"""How they are done. Whether short rows alone lose what lies further back is not told by one rounding."""
STATE = "quantized-tuning-state.safetensors"
"""Where its training stands, written every few minutes and when it is stopped; gone when the stage is done."""
ROUNDED = "rounded-state.safetensors"
"""What is trained as rounding left it, so that a training that is stopped does not round again; gone as that is."""


def quantize(work: RunContext, segments: Sequence[Segment]) -> QuantizeArtefact:
    """The healed student's weights in fewer bits, where that is asked."""
    if keeps_gguf(work.config, work.checkpoint):
        return quantize_gguf(work, segments)
    config, trains = work.config.quantize, is_trained(work.config)
    chosen = [work.config.search.target_size] if config.bits == "auto" else []
    read = bool(chosen) or calibrated(config)
    how = [*(how_rounded(work.config, config) if read else []), *quantizers.edition(config.quantizer)]
    rounds = [config, work.text["calibration"] if read else None, *chosen, *how]
    inputs = [*rounds, *(training_inputs(work) if trains else [])] if config.rounds else None
    with work.run.stage(QuantizeArtefact, "quantize", inputs, after=["heal"]) as stage:
        if stage.open and config.bits == 16:
            stage.found = QuantizeArtefact(bits=16, layers=[])
        elif stage.open:
            student, tuning = work.student(segments, "folded", "tuned"), None
            rows, probes = rows_to_round_on(work, config)
            kept = StateFile(work.run / ROUNDED, key=digest([*rounds, work.run.hashes["heal"]]))
            if trains and (state := kept.load(kept.key)) is not None:
                say("quantize", "rounded before the run was stopped: only the training goes on")
                packed = {name: one for name, (one,) in state[0].items()}
                found = Quantized.restored(decoder_stack.share(student), packed, state[1])
            else:
                asked = asdict(config) | {"target_size": chosen[0] if chosen else None}
                found = rounding.quantize(student, rows, **asked)
            if trains:
                if state is None:
                    kept.save(kept.key, {name: [one] for name, one in found.packed.items()}, found.to_dict())
                found, tuning = trained(work, found, student)
            work.save(dict(found.packed), "quantized")
            stage.found = QuantizeArtefact(
                **(vars(config) | {"zero_points": found.settings["zero_points"]}),
                layers=list(found.weights),
                left=list(found.left),
                bytes=BeforeAfter(before=found.bytes_before, after=found.bytes_after),
                quantization_config=dict(found.config),
                mixture=dict(found.mixture) if found.mixture else None,
                tests=probes.facts() | {"rows": len(probes.asking())} if probes else None,
                tuning=tuning,
            )
            stage.files = ["quantized.safetensors"]
    if stage.artefact.bits != 16:
        for name in (STATE, ROUNDED):
            processes.on_main(lambda name=name: remove_written(work.run / name))  # type: ignore[misc]
        say("quantize", describe_quantization(asdict(stage.artefact)))
    if stage.artefact.tuning:
        say("quantize", describe_quantized_tuning(asdict(stage.artefact.tuning)))
    return stage.artefact


# --- a .gguf file ---


def cut_of(work: RunContext, segments: Sequence[Segment]) -> CutGguf:
    """The run's .gguf file without segments, and what healing changed."""
    healed = work.changed(work.student(segments, "folded", "tuned"))
    return CutGguf(checkpoint=work.checkpoint, segments=[*segments], healed=healed)


def quantize_gguf(work: RunContext, segments: Sequence[Segment]) -> QuantizeArtefact:
    """The .gguf file of the healed student, its tensors rounded as they will be in the result."""
    kind = type_of_healed(work.config)
    inputs = [kind, work.text["calibration"], "GPTQ by blocks"]
    with work.run.stage(QuantizeArtefact, "quantize", inputs, after=["heal"]) as stage:
        if stage.open:
            file, student = work.run / QUANTIZED_GGUF, work.student(segments, "folded", "tuned")
            file.unlink(missing_ok=True)
            source = cut_of(work, segments)
            written = write_cut(source, file, kind, student, work.blocks["calibration"])
            written["rounded"] = sorted(
                name
                for name, p in student.named_parameters()
                if name in source.healed or (is_mixture(kind) and p.dim() > 1)
            )
            stage.found = QuantizeArtefact(bits=16, layers=[], gguf=written)
            stage.files = [QUANTIZED_GGUF]
    found = stage.artefact.gguf or {}
    if found["rounded"]:
        by = "importance" if is_mixture(kind) else "GPTQ"
        how = f", {found['importance']} by {by}" if found["importance"] else ""
        say("quantize", f"{len(found['rounded'])} tensors written again ({found['kind']}{how}), the others kept")
    return stage.artefact


# --- what is rounded on ---


def how_rounded(config: CompressConfig, asked: QuantizeConfig) -> list[Any]:
    """What decides beside the options how calibrated weights are rounded, and which probes they are rounded on."""
    wanted, text = capabilities_read(config, asked), config.text
    probes = ["rounded on tests", EDITION, FIRST_TEST, rows_of_probes(text), text.seed, *wanted] if wanted else []
    return [*rounding.recipe(asked), *probes]


def capabilities_read(config: CompressConfig, asked: QuantizeConfig) -> Sequence[str]:
    """The capabilities on whose probes weights are rounded beside the text."""
    return () if not calibrated(asked) or has(config.text.data, TESTS) else capability_names(config.search.preserve)


def rows_of_probes(text: DataConfig) -> int:
    """Rows of probes that weights are rounded on beside the calibration text."""
    return max(1, math.ceil(text.tokens / text.window) // TEXT_ROWS_PER_TEST)


def rows_to_round_on(work: RunContext, asked: QuantizeConfig) -> tuple[torch.Tensor, ProbeRows | None]:
    """The calibration rows, and probes of the family that is tuned on, none of which is tuned on or judges that.

    On text alone, how much of recall is left after rounding to 3 bits is a matter of chance.
    """
    text, wanted, rows = work.config.text, capabilities_read(work.config, asked), work.blocks["calibration"]
    if not wanted:
        return rows, None
    how: dict[str, Any] = {"family": "tuning", "seed": text.seed, "first": FIRST_TEST}
    probes = probe_rows(work.tokenizer, rows=rows_of_probes(text), window=text.window, capabilities=wanted, **how)
    return (torch.cat([rows, probes.asking()]), probes) if probes.names else (rows, None)


# --- training what was rounded ---


def is_trained(config: CompressConfig) -> bool:
    """Whether what was rounded is trained: below 8 bits, unless that was switched off or nothing is tuned at all."""
    asked, bits = config.heal.tune_quantized, config.quantize.bits
    wanted = (bits == "auto" or bits < 8) if asked == "auto" else asked != "none"
    return config.quantize.rounds and bool(config.heal.tokens) and wanted


def training_inputs(work: RunContext) -> list[Any]:
    """All that decides the result of the training beside what quantization depends on."""
    heal, asked = work.config.heal, work.config.heal.tune_quantized
    rates = [RATE, ROUNDING_RATE, RATE_PER_NAT, RISE, ROUNDING_RISE]
    how = [*([FEW_BITS] if asked == "auto" else []), TOWARDS, ROWS, ANSWER_WEIGHT, *rates, asked]
    return [*how, heal.objective, heal.batch_tokens, work.text["tuning"], work.text["heldout"]]


def trained(work: RunContext, found: Quantized, before: Any) -> tuple[Quantized, TuningRecord]:
    """Train scales and norms of a quantized model, and the rounding where that is asked."""
    files = TuningFiles(state=StateFile(work.run / STATE, key=work.run.hashes["quantize"]), stopping=work.stopping)
    parts = Trainable.of_(found, before if learns_rounding(work, found) else None)
    settings = replace(work.config.heal, learning_rate=parts.rate)
    treated = tuning_treatment(work).by_predictions()  # healing has taught the answers
    report = tune_parameters_(
        parts.model, before, parts.parameters, Rows(tokens=work.blocks["tuning"], **vars(treated)),
        heldout=work.blocks["heldout"], settings=settings, tolerated=parts.tolerated, files=files,
        rate_from=parts.rate_from if settings.objective == "kl" else None,
    )  # fmt: skip
    report = replace(report, label=report.label.replace("the dense model", TOWARDS))
    return parts.finished_(), work.trained("quantize", report)


def learns_rounding(work: RunContext, found: Quantized) -> bool:
    """Whether the rounding itself is trained: where asked, and by itself where bits are few and memory is not."""
    asked = work.config.heal.tune_quantized
    if asked != "auto":
        return asked == "rounding"
    packed = [each for each in found.weights if f"{each.name}.weight_packed" in found.packed]
    weights = {each.name: found.model.get_submodule(each.name).weight for each in packed}
    total = sum(weight.numel() for weight in weights.values())
    if not total or sum(each.bits * weights[each.name].numel() for each in packed) > FEW_BITS * total:
        return False
    needs, has = total * (16 + 6 * next(iter(weights.values())).itemsize), memory.whole_bytes(work.dense.device)
    if has is None or needs <= has:
        return True
    what = f"training the rounding would take {size(needs)} of memory, and there are {size(has)}"
    say("quantize", f"{what}: scales and norms alone are trained")
    return False
