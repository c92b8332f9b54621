"""The dithered control, and a model cut and healed in a run folder of its own: for all benchmarks of quantization.

Weights read from a 4-bit GGUF file lie on a 4-bit grid, on which other 4-bit grids pay differently: some nothing,
some in full. Uniform noise of one step of its own grid on every weight takes that away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layercut.config import DataConfig, EvaluateConfig, HealConfig, SearchConfig
from layercut.config.commands import CompressConfig, RunConfig
from layercut.files import appearing
from layercut.models import decoder_stack, loading
from layercut.pipeline.journey import compress

BLOCK = 32  # columns that share a grid in Q4_1 and Q8_0


@torch.no_grad()
def dither_(model: Any, seed: int = 0) -> None:
    """Uniform noise of one grid step: (max - min) / 15 of each block of 32 for Q4_1, max|w| / 127 for Q8_0.

    The weights are rounded to the number format that they are saved in, also where a wider one is computed in.
    """
    draw = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.dim() != 2:
            continue
        grouped = parameter.float().unflatten(1, (-1, BLOCK))
        if parameter is embeddings:
            step = grouped.abs().amax(-1, keepdim=True) / 127
        else:
            step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
        noise = torch.rand(grouped.shape, generator=draw) - 0.5
        parameter.copy_((grouped + noise * step).flatten(1).to(decoder_stack.stored_dtype(model)))


def save(opened: loading.LanguageModel, folder: Path) -> None:
    """The model as a folder that `compress` takes, whole or not at all."""
    with appearing(folder) as partial:
        decoder_stack.as_stored(opened.model).save_pretrained(partial)
        opened.tokenizer.save_pretrained(partial)


def healed(dense: Path, run: Path, search: SearchConfig, text: DataConfig, heal: HealConfig, apart: str) -> Path:
    """Search or take the segments, cut, fold and tune `dense` in the run folder `run`; the checkpoint's folder.

    A run that was stopped goes on. apart: a text that is not tuned on, which a run must name.
    """
    config = CompressConfig(
        text=text, search=search, heal=heal,
        evaluate=EvaluateConfig(eval_data=apart, eval_tokens=2, eval_window=text.window),
        run=RunConfig(out=run),
    )  # fmt: skip
    return compress(str(dense), config, until="tune") / "model"
