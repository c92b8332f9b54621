"""`compress` on a tiny model, on any device, and whether two runs found the same; for tests of accelerators."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import folders
from layercut import evaluation
from layercut.config import (
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    HealConfig,
    ModelConfig,
    OutputConfig,
    QuantizeConfig,
    RunConfig,
    SearchConfig,
)
from layercut.export import checkpoint
from layercut.healing import endpoint_tuning, tuning_state
from layercut.pipeline.journey import compress


class StoppedError(RuntimeError):
    """Ends a run while it tunes."""


def stopping(training: Any) -> Any:
    """In the place of a step of tuning: the second one ends the run."""
    if training.report.step == 1:
        raise StoppedError
    return STEP(training)


STEP = endpoint_tuning._Training.step_


class Journey:
    """Runs `compress`, with 8 bits, on a tiny model.

    Args:
        folder: for the model and the runs.
        texts: to calibrate and tune on, and to evaluate on.
    """

    def __init__(self, folder: Path, texts: tuple[Path, Path]) -> None:
        self.folder, self.texts = folder, texts
        self.model = folders.write_model(folder / "model", layers=5)

    def run(self, name: str, *, verified: bool = False, stopped: bool = False, **load: Any) -> Path:
        """The run's folder; verified: by a fresh process; stopped: while tuning at first, and resumed."""
        config = CompressConfig(
            load=ModelConfig(**load),
            text=DataConfig(data=str(self.texts[0]), tokens=128, window=32),
            search=SearchConfig(ratio=0.4),
            heal=HealConfig(tune_tokens=192, batch_tokens=64, learning_rate=1e-3),
            quantize=QuantizeConfig(bits=8),
            evaluate=EvaluateConfig(eval_data=str(self.texts[1]), eval_tokens=128, eval_window=64, speed=False),
            output=OutputConfig(format="safetensors"),
            run=RunConfig(out=self.folder / name),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "generations", lambda *_: [""] * len(evaluation.PROMPTS))
            patch.setattr(evaluation, "generation_health", partial(evaluation.generation_health, tokens=2))
            if not verified:
                patch.setattr(checkpoint, "verify_reload", lambda *_: {})
            if stopped:
                with patch.context() as until:
                    until.setattr(tuning_state.StateFile, "due", lambda _: True)
                    until.setattr(endpoint_tuning._Training, "step_", stopping)
                    with pytest.raises(StoppedError):
                        compress(str(self.model), config)
            return compress(str(self.model), config)


def found(run: Path) -> dict[str, Any]:
    """What a run found, by the names of its summary."""
    summary = json.loads((run / "summary.json").read_text())
    assert (run / "model" / "config.json").exists()
    return {name: summary[name] for name in ("segments", "original_layer_index", "parameters", "perplexity", "bytes")}


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-4) -> None:
    """The same cut, and perplexities as near as another order of summation leaves them."""
    figures, others = one["perplexity"], other["perplexity"]
    for name in one.keys() - {"perplexity"}:
        assert one[name] == other[name], name
    for state in ("dense", "cut", "folded", "tuned", "quantized"):
        assert figures[state] == pytest.approx(others[state], rel=tolerance), state
