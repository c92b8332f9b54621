"""Stage, with quantization: a rounded model is trained towards what it was before, in the same stock format.

Of a cut model that is the healed one: towards the dense model it would lose what healing gave it beside KL, the text's
own next tokens and the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from layercut.config.commands import CompressConfig
from layercut.distributed import processes
from layercut.files import remove_written, size
from layercut.healing.endpoint_tuning import TuningFiles, tune_parameters_
from layercut.healing.inputs import Rows
from layercut.healing.tuning_state import StateFile
from layercut.models import decoder_stack, memory
from layercut.pipeline.artefacts import TuningRecord
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages.text import ANSWER_WEIGHT, tuning_treatment
from layercut.progress import say
from layercut.quantization import Quantized
from layercut.quantization.trainable import RATE, RATE_PER_NAT, RISE, ROUNDING_RATE, ROUNDING_RISE, Trainable

FEW_BITS = 3.5
"""On average of the weights that are packed, up to which the rounding is trained by itself: with 3 bits it takes back
most of what GPTQ loses, with 4 scales alone were better, rounding at their rate (docs/results.md). On
Qwen2.5-Coder-0.5B with 3 scales alone come near it, for an eighth of its time."""
TOWARDS = "what was rounded"
"""What a rounded model is trained towards."""
ROWS = "rows as in healing"
"""How they are done. Whether short rows alone lose what lies further back is not told by one rounding."""
STATE = "quantized-tuning-state.safetensors"
"""Where it stands, written every few minutes and when it is stopped; gone when the stage is done."""
ROUNDED = "rounded-state.safetensors"
"""What is trained as rounding left it, so that a training that is stopped does not round again; gone as that is."""


def wanted(config: CompressConfig) -> bool:
    """Whether what was rounded is trained: below 8 bits, unless that was switched off or nothing is tuned at all."""
    asked = config.heal.tune_quantized
    few = config.quantize.bits == "auto" or config.quantize.bits < 8
    return bool(config.heal.tune_tokens) and (few if asked == "auto" else asked != "none")


def inputs(work: RunContext) -> list[Any]:
    """All that decides the result beside what quantization depends on; nothing where nothing is trained."""
    if not wanted(work.config):
        return []
    heal, text, asked = work.config.heal, work.text, work.config.heal.tune_quantized
    few = [FEW_BITS] if asked == "auto" else []
    trained = [heal.objective, heal.batch_tokens]
    rates = [RATE, ROUNDING_RATE, RATE_PER_NAT, RISE, ROUNDING_RISE]
    return [*few, TOWARDS, ROWS, ANSWER_WEIGHT, *rates, asked, *trained, text["tuning"], text["heldout"]]


def rounded_once(work: RunContext, before: Any, key: str, rounded: Callable[[], Quantized]) -> Quantized:
    """The rounded model: where it is trained after that, as an earlier command of this run kept it."""
    if not wanted(work.config):
        return rounded()
    kept = StateFile(work.run / ROUNDED, key=key)
    if (state := kept.load(key)) is not None:
        tensors, facts = state
        say("quantize", "rounded before the run was stopped: only the training goes on")
        return Quantized.restored(decoder_stack.share(before), {name: one for name, (one,) in tensors.items()}, facts)
    found = rounded()
    kept.save(key, {name: [tensor] for name, tensor in found.packed.items()}, found.to_dict())
    return found


def tune(work: RunContext, found: Quantized, before: Any) -> tuple[Quantized, TuningRecord | None]:
    """Train scales and norms of a quantized model, and the rounding where that is asked."""
    if not wanted(work.config):
        return found, None
    files = TuningFiles(state=StateFile(work.run / STATE, key=work.run.inputs_of("quantize")), stopping=work.stopping)
    if work.own_process:
        memory.reuse_freed()
    parts = Trainable.of_(found, before if learns_rounding(work, found) else None)
    settings = replace(work.config.heal, learning_rate=parts.rate)
    by_kl = settings.objective == "kl"
    treated = tuning_treatment(work).by_predictions()  # healing has taught the answers
    report = tune_parameters_(
        parts.model, before, parts.parameters, Rows(tokens=work.blocks["tuning"], **vars(treated)),
        heldout=work.blocks["heldout"], settings=settings, rate_from=parts.rate_from if by_kl else None,
        tolerated=parts.tolerated, files=files,
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
    needs = total * (16 + 6 * next(iter(weights.values())).itemsize)
    has = memory.whole_bytes(work.dense.device)
    if has is None or needs <= has:
        return True
    what = f"training the rounding would take {size(needs)} of memory, and there are {size(has)}"
    say("quantize", f"{what}: scales and norms alone are trained")
    return False


def forget_state_(work: RunContext) -> None:
    """Remove the state of a training that is done, and what it began with."""

    def remove() -> None:
        for name in (STATE, ROUNDED):
            remove_written(work.run / name)

    processes.on_main(remove)
