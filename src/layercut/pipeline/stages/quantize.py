"""Stage: what is left in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from layercut import quantization as rounding
from layercut.config import DataConfig, QuantizeConfig
from layercut.config.commands import CompressConfig
from layercut.data.probe_families import EDITION
from layercut.data.probes import ProbeRows, capability_names, probe_rows
from layercut.data.sources import TESTS, has
from layercut.files import digest
from layercut.pipeline import gguf_run
from layercut.pipeline.artefacts import BeforeAfter, QuantizeArtefact
from layercut.pipeline.run_context import RunContext
from layercut.pipeline.stages import tune_quantized
from layercut.pipeline.stages.search import TEXT_ROWS_PER_TEST
from layercut.progress import say
from layercut.quantization.quantizers import calibrated
from layercut.registries import quantizers
from layercut.report.stage_lines import describe_quantization, describe_quantized_tuning
from layercut.segments import Segment

FIRST_TEST = 2**20
"""Number of the first row of tests that weights are rounded on: far beyond those that are tuned on, or judge that."""


def quantize(work: RunContext, segments: Sequence[Segment]) -> QuantizeArtefact:
    """The healed student's weights in fewer bits, where that is asked."""
    if gguf_run.keeps_gguf(work.config, work.checkpoint):
        return gguf_run.quantize(work, segments)
    config = work.config.quantize
    chosen = [work.config.search.target_size] if config.bits == "auto" else []
    read = bool(chosen) or calibrated(config)
    how = [*(how_rounded(work.config, config) if read else []), *quantizers.edition(config.quantizer)]
    rounds = [config, work.text["calibration"] if read else None, *chosen, *how]
    inputs = [*rounds, *tune_quantized.inputs(work)] if config.rounds else None
    with work.run.stage(QuantizeArtefact, "quantize", inputs, after=["heal"]) as stage:
        if stage.open and config.bits == 16:
            stage.found = QuantizeArtefact(bits=16, layers=[])
        elif stage.open:
            student = work.student(segments, "folded", "tuned")
            asked = asdict(config) | {"target_size": chosen[0] if chosen else None}
            tests = tests_to_round_on(work, config)
            decided = digest([*rounds, work.run.inputs_of("heal")])

            def rounded() -> rounding.Quantized:
                return rounding.quantize(student, rows_to_round_on(work, tests), **asked)

            found = tune_quantized.rounded_once(work, student, decided, rounded)
            found, tuning = tune_quantized.tune(work, found, student)
            work.save(dict(found.packed), "quantized")
            stage.found = QuantizeArtefact(
                **(vars(config) | {"zero_points": found.settings["zero_points"]}),
                layers=list(found.weights),
                left=list(found.left),
                bytes=BeforeAfter(before=found.bytes_before, after=found.bytes_after),
                quantization_config=dict(found.config),
                mixture=dict(found.mixture) if found.mixture else None,
                tests=tests.facts() | {"rows": len(tests.asking())} if tests else None,
                tuning=tuning,
            )
            stage.files = ["quantized.safetensors"]
    if stage.artefact.bits != 16:
        tune_quantized.forget_state_(work)
        say("quantize", describe_quantization(asdict(stage.artefact)))
    if stage.artefact.tuning:
        say("quantize", describe_quantized_tuning(asdict(stage.artefact.tuning)))
    return stage.artefact


def how_rounded(config: CompressConfig, asked: QuantizeConfig) -> list[Any]:
    """What decides beside the options how calibrated weights are rounded, and which tests they are rounded on."""
    wanted, text = capabilities_read(config, asked), config.text
    tests = ["rounded on tests", EDITION, FIRST_TEST, rows_of_tests(text), text.seed, *wanted] if wanted else []
    return [*rounding.recipe(asked), *tests]


def capabilities_read(config: CompressConfig, asked: QuantizeConfig) -> Sequence[str]:
    """The capabilities on whose tests weights are rounded beside the text."""
    return () if not calibrated(asked) or has(config.text.data, TESTS) else capability_names(config.search.preserve)


def rows_of_tests(text: DataConfig) -> int:
    """Rows of generated tests that weights are rounded on beside the calibration text."""
    return max(1, math.ceil(text.tokens / text.window) // TEXT_ROWS_PER_TEST)


def tests_to_round_on(work: RunContext, asked: QuantizeConfig) -> ProbeRows | None:
    """Generated tests of the family that is tuned on, and none of those that are, nor of those that judge it.

    On text alone, how much of recall is left after rounding to 3 bits is a matter of chance.
    """
    text, wanted = work.config.text, capabilities_read(work.config, asked)
    if not wanted:
        return None
    tests = probe_rows(
        work.tokenizer, rows=rows_of_tests(text), window=text.window, capabilities=wanted, family="tuning",
        seed=text.seed, first=FIRST_TEST,
    )  # fmt: skip
    return tests if tests.names else None


def rows_to_round_on(work: RunContext, tests: ProbeRows | None) -> torch.Tensor:
    """The calibration rows, and those of the tests that hold any."""
    rows = work.blocks["calibration"]
    return torch.cat([rows, tests.asking()]) if tests else rows
